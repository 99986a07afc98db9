"""Compares the pages for contributors with the code: names, rooms, the paths of a row."""

import ast
import functools
import json
import re
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import tfrs_pipeline as tp

# isort: split
import tensorflow as tf

from tests.model.conftest import eagerly
from tests.service.running_server import address_of
from tests.test_imports import PACKAGE, ROOMS, SOURCES
from tfrs_pipeline.samples.store import RowLists

ROOT = PACKAGE.parent
PAGES = {
    name: (ROOT / name).read_text()
    for name in ("CONTRIBUTING.md", "docs/explanation/architecture.md")
}
CONTRIBUTING, ARCHITECTURE = PAGES.values()
CLICK, QUERY = "From a click in a file to the loss", "From an HTTP query to ids"


@functools.cache
def function_of(code: CodeType, module: str) -> tuple[str, str] | None:
    """Names a function of the package, also if AutoGraph has rewritten it in another file."""
    path, name = SOURCES.get(module, PACKAGE / "__init__.py"), code.co_name.removeprefix("tf__")
    # An object of an earlier test may be deleted at any time.
    is_there = path != PACKAGE / "__init__.py" and name not in ("<module>", "__del__")
    return (str(path.relative_to(PACKAGE)), name) if is_there else None


class Calls(list[tuple[str, str]]):
    """Calls of the package's functions, in order, such as ("data/files.py", "scan")."""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            found = function_of(frame.f_code, frame.f_globals.get("__name__") or "")
            self.extend([found] if found else [])

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records calls in this thread, in threads that it starts, and in those of tf.data."""
        numpy_function = tf.numpy_function

        def recorded(func: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            def run(*values: Any) -> Any:
                sys.setprofile(self)
                try:
                    return func(*values)
                finally:
                    sys.setprofile(None)

            return numpy_function(run, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tf, "numpy_function", recorded)
            threading.setprofile(self)
            sys.setprofile(self)
            try:
                yield
            finally:
                sys.setprofile(None)
                threading.setprofile(None)


@functools.cache
def from_click_to_loss(folder: Path) -> Calls:
    rng = np.random.default_rng(0)
    users, requests = rng.integers(0, 9, 20).repeat(6), np.arange(120) // 6
    events = pd.DataFrame({"user_id": users, "item_id": rng.integers(0, 20, 120)})
    events["timestamp"] = pd.to_datetime(10**9 + 60 * requests, unit="s", utc=True)
    events["stage"] = rng.choice(["clicked", "exposed", "pre_ranked"], 120)
    events.to_csv(folder / "events.csv", index=False)
    calls = Calls()
    with eagerly(), calls.recording():
        train, _, _ = tp.Log.from_files(folder / "events.csv").split(validation=0.1, test=0.1)
        model: dict[str, Any] = {"dim": 4, "negatives": [tp.InBatch(), tp.Uniform(8)]}
        model["hard"] = tp.FunnelLosers(share=0.1, stages=("pre_ranked",))
        training = tp.TrainingSettings(batch_size=16, max_epochs=1)
        tp.TwoTower(training=training, **model).fit(train)
    return calls


@functools.cache
def from_query_to_ids(folder: Path) -> Calls:
    vectors = tf.Variable(np.eye(4, dtype=np.float32))
    towers = (
        lambda query_rows, history_rows: tf.gather(vectors, history_rows[:, 0]),
        lambda rows: tf.gather(vectors, rows),
    )
    of = {"items": pa.table({"item_id": ["a", "b", "c"]}), "query_ids": np.array([7])}
    clicks = RowLists.from_lists([np.zeros(0, int), np.array([1])])
    of |= {"histories": clicks, "known_positives": clicks}
    served = tp.Exportable(*towers, [vectors], **of, history_length=1)
    model = tp.export(served, folder / "model", index=tp.Exact()).parent
    tp.load(model).record([{"user_id": 7, "item_id": "b", "type": "click"}])
    calls = Calls()
    with calls.recording():
        address = address_of(model)
        request = urllib.request.Request(
            f"{address}:predict", b'{"inputs": [7]}', {"Content-Type": "application/json"}
        )
        calls.clear()  # Drops the calls of the server's start.
        with urllib.request.urlopen(request) as answer:
            ids = json.load(answer)["outputs"]["candidate_ids"]
    assert ids == [["c", *[""] * 99]]
    return calls


def section(title: str) -> str:
    return ARCHITECTURE.split(f"## {title}\n")[1].split("\n## ")[0]


def modules_in(text: str) -> list[str]:
    """Lists the modules of a text in order; a name without a folder is in the one before it."""
    found: list[str] = []
    for name in re.findall(r"`([\w/]+\.py)`", text):
        beside = f"{Path(found[-1]).parent}/{name}" if found else ""
        found.append(name if (PACKAGE / name).exists() else beside)
    return found


@pytest.mark.usefixtures("trusted_exports")
@pytest.mark.parametrize(
    ("title", "record", "most"), [(CLICK, from_click_to_loss, 14), (QUERY, from_query_to_ids, 13)]
)
def test_a_path_names_every_module_that_runs(
    tmp_path_factory: pytest.TempPathFactory, title: str, record: Any, most: int
) -> None:
    calls = record(tmp_path_factory.getbasetemp())
    table = re.findall(r"(?m)^\| \d+ \| `([\w/]+\.py)` \| `(\w+)` \|", section(title))
    assert len(table) <= most
    beside = modules_in(section(title).partition("Beside the path")[2].partition("\n\nNot ")[0])
    named = [module for module, _ in table] + beside
    assert sorted(named) == sorted({module for module, _ in calls})
    # The functions of the table ran, in its order.
    later = iter(calls)
    assert [step for step in table if step not in later] == []


def test_the_lists_of_rooms_are_that_of_the_imports() -> None:
    tree = re.findall(r"(?m)^  (\w+)(?:/|\.py)  ", ARCHITECTURE)
    assert tree == ROOMS
    order = CONTRIBUTING.partition("in the order of")[2].partition("[The")[0]
    assert re.findall(r"`(\w+)`", order) == ROOMS


@functools.cache
def defined() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in SOURCES.values():
        tree = ast.parse(path.read_text())
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for name, body in [(path.stem, tree.body), *((x.name, x.body) for x in classes)]:
            names = found.setdefault(name, set())
            for node in body:
                targets = getattr(node, "targets", [getattr(node, "target", None)])
                names |= {getattr(x, "id", "") for x in targets} | {getattr(node, "name", "")}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page: str) -> None:
    spans = re.findall(r"`([\w./]+)`", PAGES[page])
    files = [x for x in spans if "/" in x or x.endswith((".py", ".cfg", ".txt", ".yml", ".md"))]
    for name in files:
        assert any((folder / name).exists() for folder in (ROOT, PACKAGE)) or any(
            path.name == name for path in PACKAGE.rglob("*.py")
        ), name
    for name in {*spans} - {*files}:
        owner, _, member = name.removeprefix("tfrs_pipeline.").rpartition(".")
        if owner and owner not in ("tf", "tp", "tf.data", "tfrs"):
            assert member in defined()[owner.rpartition(".")[2]], name
