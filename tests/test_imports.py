"""Imports go one way, and the counting half of the package is free of TensorFlow."""

import ast
import configparser
import functools
import graphlib
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tfrs_pipeline
from tfrs_pipeline.libraries import EXTRAS

PACKAGE = Path(tfrs_pipeline.__file__).parent
FIRST = (
    "libraries messages settings retrieval durable features cluster data sources negatives testing"
)
LAST = (
    "samples batches search evaluation drawing records answers service model exports presets "
    "config run"
)
ROOMS = f"{FIRST} {LAST} report cli".split()
TENSORFLOW = {"tensorflow", "tf_keras", "keras", "tensorflow_recommenders", "scann"}
LIGHT_ROOMS = "messages settings retrieval durable cluster drawing data sources samples evaluation"
LIGHT_MODULES = "features negatives.samplers search records answers service run.refresh cli"
LIGHT_STARTS = (*LIGHT_ROOMS.split(), *LIGHT_MODULES.split())
IN_GRAPH = {"tfrs_pipeline.features.graph", "tfrs_pipeline.features.layers"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def walk(tree: ast.AST, *, is_deferred: bool) -> Iterator[ast.AST]:
    """Yields a module's nodes; those in functions and TYPE_CHECKING only if `is_deferred`."""
    for node in ast.iter_child_nodes(tree):
        is_hint = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if is_deferred or not (is_hint or isinstance(node, ast.FunctionDef)):
            yield node
            yield from walk(node, is_deferred=is_deferred)


def imports(source: str, *, is_deferred: bool = True) -> Iterator[str]:
    """Yields what a module imports, also in functions; public names become their modules."""
    for node in walk(ast.parse(source), is_deferred=is_deferred):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the package, so that they can be searched for"
            base = str(node.module)
            for alias in node.names:
                if base == "tfrs_pipeline":
                    home = tfrs_pipeline.PUBLIC.get(alias.name, alias.name)
                    yield f"tfrs_pipeline.{home}"
                else:
                    name = f"{base}.{alias.name}"
                    yield base if base in SOURCES and name not in SOURCES else name


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@functools.cache
def graph() -> dict[str, set[str]]:
    return {module: set(imports(path.read_text())) for module, path in SOURCES.items()}


@functools.cache
def graph_at_start() -> dict[str, set[str]]:
    """Returns what each module imports before any of its functions is called."""
    return {x: set(imports(path.read_text(), is_deferred=False)) for x, path in SOURCES.items()}


@functools.cache
def graph_when_loaded() -> dict[str, set[str]]:
    deferred = ("libraries", "features", "records", "answers", "service", "run", "cli")
    kinds = (module for module in SOURCES if room(module) in deferred)
    return graph() | {x: set(imports(SOURCES[x].read_text(), is_deferred=False)) for x in kinds}


def reached(module: str, edges: dict[str, set[str]]) -> set[str]:
    """Returns all that a module imports, directly or indirectly, including its packages."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        if (name := pending.pop()) not in seen:
            seen.add(name)
            pending += [*edges.get(name, ()), *({name.rpartition(".")[0]} & edges.keys())]
    return seen


@pytest.mark.parametrize(("source", "expected"), [
    ("import numpy as np, os.path", {"numpy", "os.path"}),
    ("def f():\n    import tensorflow as tf", {"tensorflow"}),
    ("if x:\n    from tensorflow import keras", {"tensorflow.keras"}),
    ("from tfrs_pipeline import config", {"tfrs_pipeline.config"}),
    ("from tfrs_pipeline import RunConfig", {"tfrs_pipeline.config"}),
    ("from tfrs_pipeline.config import RunConfig", {"tfrs_pipeline.config"}),
])  # fmt: skip
def test_the_reader_of_imports_sees(source: str, expected: set[str]) -> None:
    assert set(imports(source)) == expected


@pytest.mark.parametrize("module", [module for module in SOURCES if room(module)])
def test_a_module_imports_only_what_stands_before_it(module: str) -> None:
    before = ROOMS[: ROOMS.index(room(module)) + 1]
    for name in graph()[module]:
        if name.split(".")[0] == "tfrs_pipeline" and room(name) in ROOMS:
            assert room(name) in before, f"{module} imports {name}"


def test_imports_within_functions_and_hints_are_told_apart() -> None:
    source = "import a\nif TYPE_CHECKING:\n    import b\nclass C:\n    def f(self): import c"
    assert set(imports(source)) == {"a", "b", "c"}
    assert set(imports(source, is_deferred=False)) == {"a"}


def test_no_module_imports_itself_by_a_detour() -> None:
    edges = {module: names & SOURCES.keys() - {module} for module, names in graph().items()}
    tuple(graphlib.TopologicalSorter(edges).static_order())  # Raises CycleError.


LIGHT = [
    x
    for x in SOURCES
    if x.removeprefix("tfrs_pipeline.").startswith(LIGHT_STARTS) and x not in IN_GRAPH
]


@pytest.mark.parametrize("module", LIGHT)
def test_no_tensorflow_is_reached_from(module: str) -> None:
    roots = {name.split(".")[0] for name in reached(module, graph_when_loaded())}
    assert not roots & TENSORFLOW


SETTINGS = {"pydantic", "pydantic_core"}
ARRAYS = {"numpy"}
LOADED = {*SETTINGS, *ARRAYS, "pyarrow"}
HTTP = {"prometheus_client", "starlette", "typing_extensions", "uvicorn"}


@pytest.mark.parametrize(("start", "allowed"), [
    ("cli.commands", {*SETTINGS, "rich"}),
    ("cli.models", {*SETTINGS, "rich"}),
    ("cli.runs", {*SETTINGS, *ARRAYS, "rich"}),
    ("features.kinds", ARRAYS),
    ("search.candidates", ARRAYS),
    ("records.database", set()),
    ("service.settings", SETTINGS),
    ("records.user_events", {*SETTINGS, *ARRAYS}),
    ("answers.retriever", LOADED),
    ("answers.recommend", LOADED),
    ("answers.vectors", LOADED),
    ("answers.log_of_service", LOADED),
    ("service.server", {*LOADED, *HTTP}),
])  # fmt: skip
def test_a_light_start_imports_few_libraries(start: str, allowed: set[str]) -> None:
    names = reached(f"tfrs_pipeline.{start}", graph_at_start())
    roots = {name.partition(".")[0] for name in names} - {"tfrs_pipeline"}
    assert roots - sys.stdlib_module_names <= allowed


def packages(requirements: str) -> set[str]:
    names = re.findall(r"^[\w.-]+", requirements, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def test_a_missing_library_is_named_with_the_extra_that_has_it() -> None:
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    core = packages(setup["options"]["install_requires"])
    extras = {name: packages(setup["options.extras_require"][name]) for name in EXTRAS}
    packages_of = importlib.metadata.packages_distributions()
    # Those that come with others: rich in notebooks; pydantic, LiteRT and Jinja require theirs.
    indirect = {"IPython", "google", "markupsafe", "pydantic_core", "pyspark", "typing_extensions"}
    roots = {name.partition(".")[0] for names in graph().values() for name in names}
    for module in roots - sys.stdlib_module_names - indirect - {"tfrs_pipeline"}:
        homes = packages("\n".join(packages_of[module]))
        named = [extra for extra, modules in EXTRAS.items() if module in modules]
        assert bool(homes & core) != bool(named), module
        assert all(homes & extras[extra] for extra in named), module


def test_no_module_has_a_name_that_says_nothing() -> None:
    names = {module.rpartition(".")[2] for module in SOURCES}
    names |= {path.stem for path in Path(__file__).parent.rglob("*.py")}
    assert not names & {"utils", "util", "helpers", "helper", "manager", "common", "misc"}


def test_a_public_name_is_that_of_its_module() -> None:
    for name, module in tfrs_pipeline.PUBLIC.items():
        home = importlib.import_module(f"tfrs_pipeline.{module}")
        assert getattr(tfrs_pipeline, name) is getattr(home, name)
    assert set(tfrs_pipeline.__all__) <= set(dir(tfrs_pipeline))
    with pytest.raises(AttributeError, match="no attribute 'RunConfg'"):
        _ = tfrs_pipeline.RunConfg
