"""Writes the parts of the documentation that come from the code and the result files.

    python docs/generate.py

The pages are plain Markdown, which code hosts show as they are. A part stands between a comment
that names it and `<!-- end -->`; `tests/test_docs.py` says which pages are stale.
"""

import argparse
import ast
import inspect
import json
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tfrs_pipeline
from tfrs_pipeline.cli.commands import COMMAND_LINE
from tfrs_pipeline.cli.flags import as_typed
from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.presets import PRESETS
from tfrs_pipeline.settings import Config, tables_in

ROOT = Path(__file__).parents[1]
COMMAND = "python docs/generate.py"
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
# Package of the code -> title, in the order of the work.
ROOMS = {
    "data": "Logs",
    "model": "Models",
    "negatives": "Negatives",
    "samples": "Samples",
    "batches": "Batches",
    "evaluation": "Evaluation and baselines",
    "presets": "Recipes",
    "run": "Races, comparisons and runs",
    "report": "Reports",
    "drawing": "Figures",
    "exports": "Export",
    "search": "Search",
    "answers": "Models in service",
    "retrieval": "Retrievers",
    "config": "Settings of a run",
    "settings": "Errors of settings",
}
# Commit -> scripts of result files that were removed after it.
LAST_COMMITS = {
    "25d6e44f": ("dirty_inputs",),
    "2c9c996c": ("sparse_sequences", "unbiased"),
    "50fbddf7": ("paired_seeds",),
    "68806fa8": ("losses",),
    "6f31dd76": (
        "corrections",
        "dislikes",
        "exposure",
        "funnel",
        "kuairand",
        "live",
        "loop",
        "new_items",
        "refresh",
        "request",
        "warm_start",
    ),
    "8efbb7e8": (
        "optimizers",
        "patience",
        "rectools_speed",
        "similar",
        "step_cost",
        "ties",
        "times",
    ),
    "d279cefe": ("presets",),
}
# Sections that the page shows of a function or a class; of a method, the errors alone.
SECTIONS = ("Args", "Attributes", "Returns", "Raises")
# Class of settings -> where the page of all settings describes them.
SETTINGS = {
    "TwoTowerSettings": "[`model`](configuration.md#model)",
    "TrainingSettings": "[`training`](configuration.md#training)",
    "RunConfig": "[all](configuration.md)",
}
# A heading alone on its line, and what is indented below it.
SECTION = re.compile(r"^([A-Z][\w ]*):\n((?:(?: {4}.*)?(?:\n|\Z))+)", re.MULTILINE)


def public_names() -> Iterator[str]:
    """Yields each public name with its signature, and of its docstring what a caller needs."""
    rooms = defaultdict(list)
    for name, module in tfrs_pipeline.PUBLIC.items():
        rooms[module.partition(".")[0]].append((name, module))
    nodes = {name: _node(name, module) for name, module in tfrs_pipeline.PUBLIC.items()}
    for room, names in sorted(rooms.items(), key=lambda item: [*ROOMS].index(item[0])):
        yield from (f"## {ROOMS[room]}", "")
        for name, _ in names:
            yield from (f"### {name}", "", *_symbol(nodes[name], name))


def _node(name: str, module: str) -> Any:
    """Finds the definition of a name; the docstring of a type alias is the string below it."""
    path = ROOT / "tfrs_pipeline" / f"{module.replace('.', '/')}.py"
    body = ast.parse(path.read_text()).body
    for place, node in enumerate(body):
        if getattr(node, "name", None) == name:
            return node
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            return node, _text_of(body[place + 1])
    raise ValueError(f"{path} defines no {name}")


def _text_of(node: Any) -> str:
    """Returns the text of a statement that is a string alone, or ""."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return inspect.cleandoc(node.value.value) if is_text else ""


def _symbol(node: Any, name: str) -> Iterator[str]:
    if isinstance(node, tuple):
        yield from ("```python", ast.unparse(node[0]), "```", "", *_text(node[1]))
    elif isinstance(node, ast.ClassDef):
        yield from _class(node)
    else:
        yield from _function(node, name)


def _function(
    node: ast.FunctionDef, name: str, sections: tuple[str, ...] = SECTIONS
) -> Iterator[str]:
    decorators = {ast.unparse(found) for found in node.decorator_list}
    if decorators & {"property", "cached_property", "functools.cached_property"}:
        returned = _unparsed(node.returns) if node.returns else ""
        yield from ("```python", f"{name}: {returned}", "```", "")
    else:
        yield from _signature(name, node, "classmethod" in decorators)
    yield from _text(ast.get_docstring(node) or "", sections)


def _signature(name: str, node: ast.FunctionDef, is_of_class: bool = False) -> Iterator[str]:
    given = node.args
    parts = [_unparsed(arg) for arg in (*given.posonlyargs, *given.args)]
    for place, default in enumerate(reversed(given.defaults), 1):
        parts[-place] += f" = {_code(default)}"
    if given.vararg or given.kwonlyargs:
        parts.append(f"*{ast.unparse(given.vararg)}" if given.vararg else "*")
    for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        parts.append(_unparsed(arg) + (f" = {_code(default)}" if default else ""))
    if given.kwarg:
        parts.append(f"**{ast.unparse(given.kwarg)}")
    parts = [part for part in parts if part not in ("self", "cls")]
    returned = f" -> {_unparsed(node.returns)}" if node.returns else ""
    yield "```python"
    if is_of_class:
        yield "@classmethod"
    line = f"{name}({', '.join(parts)}){returned}"
    if len(line) <= 88:
        yield line
    else:
        yield from (f"{name}(", *(f"    {part}," for part in parts), f"){returned}")
    yield from ("```", "")


def _code(node: ast.AST) -> str:
    return ast.unparse(node).replace("'", '"')


def _unparsed(node: ast.AST) -> str:
    """Writes an annotation without the quotes of a forward reference."""
    return re.sub(r'(^|: )"([^"]+)"$', r"\1\2", _code(node))


def _class(node: ast.ClassDef) -> Iterator[str]:
    """Yields a class: its docstring, the fields that have a docstring, and public methods."""
    fields = _fields(node)
    init = next((x for x in node.body if getattr(x, "name", "") == "__init__"), None)
    if isinstance(init, ast.FunctionDef) and not fields:
        yield from _signature(node.name, init)
    elif fields and not any(about for *_, about in fields):
        arguments = [f"{n}: {t}" + (f" = {d}" if d else "") for n, t, d, _ in fields]
        shown = [f"{node.name}(", *(f"    {argument}," for argument in arguments), ")"]
        short = f"{node.name}({', '.join(arguments)})"
        yield from ("```python", *([short] if len(short) <= 88 else shown), "```", "")
    yield from _text(ast.get_docstring(node) or "")
    if node.name in SETTINGS:
        yield from (f"Its fields: {SETTINGS[node.name]}.", "")
    elif any(about for *_, about in fields):
        yield from ("| setting | default | |", "|---|---|---|")
        for name, _, default, about in fields:
            yield f"| `{name}` | {f'`{_bars(default)}`' if default else ''} | {_cell(about)} |"
        yield ""
    for inner in node.body:
        is_public = isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_")
        if is_public and ast.get_docstring(inner):
            yield from (f"#### {node.name}.{inner.name}", "")
            yield from _function(inner, inner.name, ("Raises",))


def _fields(node: ast.ClassDef) -> list[tuple[str, str, str, str]]:
    """Returns name, type, default and the string below of each public field."""
    found = []
    for place, inner in enumerate(node.body):
        if isinstance(inner, ast.AnnAssign) and not ast.unparse(inner.target).startswith("_"):
            below = node.body[place + 1] if place + 1 < len(node.body) else None
            default = "" if inner.value is None else _code(inner.value)
            if default.startswith(("field(", "Field(")):
                call: Any = inner.value
                named = {x.arg: ast.unparse(x.value) for x in call.keywords}
                factory = named.get("default_factory")
                default = ast.unparse(call.args[0]) if call.args else named.get("default", "")
                default = (
                    f"{factory}()".removeprefix("lambda: ").removesuffix("()")
                    if factory
                    else default.replace("...", "")
                )
            found.append(
                (ast.unparse(inner.target), _unparsed(inner.annotation), default, _text_of(below))
            )
    return found


def _text(docstring: str, sections: tuple[str, ...] = SECTIONS) -> Iterator[str]:
    """Yields the first paragraph of a docstring of Google's style, and sections of it."""
    before, *parts = SECTION.split(docstring)
    yield from (*before.strip().partition("\n\n")[0].splitlines(), "")
    for title, text in zip(parts[::3], parts[1::3], strict=True):
        if title in sections:
            yield from (f"**{title}**", "", *_entries(textwrap.dedent(text).strip()), "")


def _entries(body: str) -> Iterator[str]:
    """Yields the list of a section, or its text if it has no entries; of each, one sentence."""
    for block in re.split(r"\n(?=\S)", body):
        name, colon, text = block.partition(": ")
        if colon and re.fullmatch(r"[\w.*]+(, [\w.*]+)*", name):
            yield f"- `{name}`: {_first_sentence(text)}"
        else:
            yield " ".join(block.split())


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.) (?=[A-Z`])", " ".join(text.split()))[0]


def settings() -> Iterator[str]:
    """Yields the settings of a run, table by table."""
    yield from _table(RunConfig, "")


def _table(table: type[Config], prefix: str) -> Iterator[str]:
    tables = tables_in(table)
    yield from ("| setting | default | |", "|---|---|---|")
    for name, field in table.model_fields.items():
        if name not in tables:
            default = "" if field.default is None else f"`{_bars(as_typed(field.default))}`"
            yield f"| `{prefix}{name}` | {default} | {_cell(str(field.description))} |"
    yield ""
    for name, inner in tables.items():
        yield from (f"## `{prefix}{name}`", "", str(table.model_fields[name].description), "")
        yield from _table(inner, f"{prefix}{name}.")


def presets() -> Iterator[str]:
    """Yields the presets, what each sets, and whether it is a recipe of the race."""
    for name, preset in PRESETS.items():
        races = " A recipe of the [race](../guides/recipes.md)." if preset.races else ""
        yield from (f"### `{name}`", "", f"For {preset.words}.{races}", "")
        for setting, value in preset.settings.items():
            yield f"- `{setting}`: `{as_typed(value)}`"
        yield ""


def commands() -> Iterator[str]:
    """Yields the flags of each command that its `--help` shows."""
    for command, parser in COMMAND_LINE.parsers().items():
        about = inspect.getdoc(COMMAND_LINE.table(command)) or ""
        about = re.sub(r"--[a-z][\w.-]*\w", r"`\g<0>`", about)
        yield from (f"## `{COMMAND_LINE.program} {command}`", "", *about.splitlines(), "")
        yield from ("| flag | values | |", "|---|---|---|")
        for action in parser._actions:
            if action.help not in (None, argparse.SUPPRESS) and action.dest != "help":
                names = ", ".join(f"`{name}`" for name in action.option_strings)
                takes = action.metavar or "/".join(map(str, action.choices or ()))
                shown = f"`{_bars(str(takes))}`" if takes and action.nargs != 0 else ""
                about = str(action.help).replace("%%", "%")
                yield f"| {names or f'`{action.dest}`'} | {shown} | {_cell(about)} |"
        yield ""


def result_files() -> Iterator[str]:
    """Yields a table of the result files: commit, date, command and machine of each.

    Commands are without `--json FILE`. Where the script is gone, the newest commit that has it
    follows.
    """
    last_commits = {name: commit for commit, names in LAST_COMMITS.items() for name in names}
    yield from ("| file | as of | command | cores, load |", "|---|---|---|---|")
    for path in RESULTS:
        record = json.loads(path.read_text())
        day = record["date"].split()[0]
        as_of = f"{record['commit']}, {day}" if "commit" in record else day
        machine = record["machine"]
        load = f"{machine['num_cores']}, {machine['load_average_5_min']}"
        link = f"[{path.name}](../../benchmarks/results/{path.name})"
        command = re.sub(r" --json \S+", "", record["command"])
        script = command.split()[1]
        at = "" if (ROOT / script).exists() else f" at {last_commits[Path(script).stem]}"
        yield f"| {link} | {as_of} | `{command}`{at} | {load} |"


def _bars(text: str) -> str:
    return text.replace("|", "\\|")


def _cell(text: str) -> str:
    return _bars(" ".join(text.split()))


# Page -> its parts, by the comment before each.
PARTS = {
    "reference/api.md": {"public names": public_names},
    "reference/configuration.md": {"settings": settings, "presets": presets},
    "reference/command_line.md": {"commands": commands},
    "results/files.md": {"result files": result_files},
}


def page(name: str) -> str:
    """Returns a page as it should be, from the text around its parts."""
    text = (ROOT / "docs" / name).read_text()
    for part, lines in PARTS[name].items():
        start = f"<!-- {part}: made by {COMMAND} -->"
        made = re.sub(r"\n{3,}", "\n\n", "\n".join(lines())).strip()
        pattern = re.compile(re.escape(start) + r".*?<!-- end -->", re.DOTALL)
        text, num = pattern.subn(lambda _, s=start, m=made: f"{s}\n\n{m}\n\n<!-- end -->", text)
        assert num == 1, f"{name} has no part {part!r}"
    return text


def main() -> None:
    """Writes the pages that are stale."""
    for name in PARTS:
        if (made := page(name)) != (ROOT / "docs" / name).read_text():
            (ROOT / "docs" / name).write_text(made)
            print(f"docs/{name}")


if __name__ == "__main__":
    main()
