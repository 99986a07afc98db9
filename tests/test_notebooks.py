"""The notebooks run from the first cell to the last, and are committed with their output."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from tests.small_log import NUM_ITEMS, NUM_USERS, Ids, event_table, item_table, user_table, write

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
QUICKSTART = NOTEBOOKS / "01_quickstart.ipynb"
SAMPLING = NOTEBOOKS / "02_sampling.ipynb"
SERVING = NOTEBOOKS / "03_serving.ipynb"
LOOP = NOTEBOOKS / "04_loop.ipynb"
MAX_BYTES = {QUICKSTART: 400_000, SAMPLING: 700_000, SERVING: 700_000, LOOP: 200_000}
FIGURES = {
    QUICKSTART: ("popularity", "curve", "slices"),
    SAMPLING: ("positives", "samplers", "correction", "hard", "exposed", "figure"),
    SERVING: ("space",),
    LOOP: ("rate",),
}
OF_ALL = {QUICKSTART: ("data", "100,000 events"), SERVING: ("data", "1,682 films, 40 of them")}
OF_ALL[SAMPLING] = ("funnel", "in all     1,000,000")
OF_ALL[LOOP] = ("world", "200 users, 500 items, 2,000 requests until today")
# The check of an export in a fresh process takes seconds and has its own tests.
TRUST_EXPORTS = """
from tfrs_pipeline.exports import export
export.prove = lambda *arguments: None
del export
"""
MACHINE = re.compile(r"/(?:work|tmp|root|home|usr|private)/")
DECIMAL = re.compile(r"[-+]?\d*\.\d+")


def write_tables(folder: Path, ids: Ids) -> None:
    """Writes the tests' small log as the tables that the notebooks read."""
    write(event_table(ids).drop_columns(["rating"]), folder / "events.csv")
    items, users, number = item_table(ids), user_table(ids), np.arange(max(NUM_ITEMS, NUM_USERS))
    # One of the films that the notebook looks for; the others are missing.
    items = items.set_column(1, "title", [["Star Wars", *items["title"].to_pylist()[1:]]])
    genres = [f"{genre}|Film" for genre in items["genre"].to_pylist()]
    items = items.drop_columns(["genre"]).append_column("genres", [genres])
    write(items.append_column("year", [1980 + number[:NUM_ITEMS] % 20]), folder / "items.csv")
    texts = {"age_group": ["25-34"], "gender": ["F", "M"], "occupation": ["writer"]}
    for name, values in texts.items():
        column = np.resize(np.array(values, object), NUM_USERS)
        users = users.append_column(name, [column])
    write(users.drop_columns(["age"]), folder / "users.csv")


def code_cells(notebook: Any) -> Iterator[Any]:
    return (cell for cell in notebook.cells if cell.cell_type == "code")


def outputs(cell: Any) -> str:
    texts = []
    for output in cell.outputs:
        texts.append(output.get("text", ""))
        shown = output.get("data", {})
        texts += [shown[kind] for kind in ("text/plain", "text/markdown") if kind in shown]
    return "\n".join(texts)


def is_figure(output: Any) -> bool:
    return not {"image/svg+xml", "image/png"}.isdisjoint(output.get("data", {}))


def run(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs a notebook without network and returns its code cells by id."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # Nothing listens: a fetch would fail.
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # For the notebook's own server.
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs = []
    notebook.cells.insert(0, nbformat.v4.new_code_cell(TRUST_EXPORTS))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    cells = {cell.id: cell for cell in code_cells(notebook)}
    assert not [o for c in cells.values() for o in c.outputs if o.output_type == "error"]
    for name in FIGURES[path]:
        assert any(is_figure(output) for output in cells[name].outputs), name
    return cells


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Makes notebooks read tables in the folder and train two epochs; no downloads allowed."""
    monkeypatch.setenv("TFRS_PIPELINE_NOTEBOOK_DATA", str(tmp_path))
    monkeypatch.setenv("TFRS_PIPELINE_NOTEBOOK_SMALL", "1")
    monkeypatch.setenv("TFRS_PIPELINE_NOTEBOOK_EPOCHS", "2")
    monkeypatch.setenv("TFRS_PIPELINE_CACHE", str(tmp_path / "empty_cache"))
    yield tmp_path
    assert not (tmp_path / "empty_cache").exists()


@pytest.mark.slow
def test_quickstart_runs_on_a_small_log(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tables(small, "int")
    cells = run(QUICKSTART, small, monkeypatch)
    assert f"{NUM_USERS:,} users" in outputs(cells["data"])
    assert "ease" in outputs(cells["metrics"])
    assert "kind: scann" in outputs(cells["export"])
    assert len(outputs(cells["query"]).splitlines()) == 15


@pytest.mark.nightly
def test_sampling_runs_on_a_small_funnel(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = run(SAMPLING, small, monkeypatch)
    assert "150,000" in outputs(cells["funnel"])
    every = "mixed_uncorrected in_batch_uncorrected resampled_0.6"
    shown = dict.fromkeys(("compare", "measure", "correction"), every)
    shown |= {"hard": "hybrid_0.05", "exposed": "exposed_0.05"}
    # A notebook is told how a training goes, in one line that changes.
    (line,) = [x for x in outputs(cells["compare"]).splitlines() if "epochs: loss" in x]
    assert line.startswith("resampled_0.6, 2/2 epochs: loss")
    for cell, plans in shown.items():
        assert all(plan in outputs(cells[cell]) for plan in plans.split()), cell


@pytest.mark.nightly
def test_serving_runs_on_a_small_log(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tables(small, "str")
    cells = run(SERVING, small, monkeypatch)
    kept_away = rf"{NUM_ITEMS} films, ([1-9]\d*) of them kept away"
    (num_new,) = re.findall(kept_away, outputs(cells["data"]))
    assert f"{NUM_ITEMS} items, {num_new} of them new" in outputs(cells["refresh"])
    assert "known" in outputs(cells["curve"])
    # The query asks for more items than there are, so that three slots are empty.
    assert re.search(r"('' *){3}\] .*(-inf *){3}\]", outputs(cells["filter"]))
    assert f"the last {num_new}" in outputs(cells["ranks"])
    assert "as exact search from Python: True" in outputs(cells["serve"])


@pytest.mark.nightly
def test_the_loop_runs_in_a_small_world(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = run(LOOP, small, monkeypatch)
    # The second answer to a user has nothing of the first.
    assert "; 0 items in both" in outputs(cells["serve"])
    assert len(re.findall(r"run: exit code [03]\n", outputs(cells["days"]))) == 2
    stages = dict(re.findall(r"(?m)^(\w+) +(\d+)$", outputs(cells["log"])))
    # Ten of the items of each of 180 requests were shown; two answers were trials.
    shown = int(stages["exposed"]) + int(stages["clicked"])
    assert shown == 1800 < int(stages["retrieved"])
    assert "'num_deleted'" in outputs(cells["end"])


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_the_output_of_the_whole_data(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < MAX_BYTES[path]
    cells = list(code_cells(notebook))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    assert {c.id for c in cells if any(map(is_figure, c.outputs))} == set(FIGURES[path])
    assert not [cell.id for cell in cells if MACHINE.search(outputs(cell))]
    assert not [o.text for cell in cells for o in cell.outputs if o.get("name") == "stderr"]
    place, text = OF_ALL[path]
    assert text in outputs(next(cell for cell in cells if cell.id == place))


@pytest.mark.parametrize(
    ("path", "num_numbers"), [(SAMPLING, 20), (SERVING, 10)], ids=["02_sampling", "03_serving"]
)
def test_numbers_in_the_text_are_those_of_the_output(path: Path, num_numbers: int) -> None:
    """The text cell "x-out" describes the output of the code cell "x"."""
    notebook = nbformat.read(path, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    num_checked = 0
    for name in [name for name in cells if name.endswith("-out")]:
        printed = [float(x) for x in DECIMAL.findall(outputs(cells[name.removesuffix("-out")]))]
        for number in DECIMAL.findall(cells[name].source):
            num_decimals, is_signed = len(number.partition(".")[2]), number[0] in "+-"
            rounded = {round(x if is_signed else abs(x), num_decimals) for x in printed}
            assert float(number) in rounded, (name, number)
            num_checked += 1
    assert num_checked > num_numbers
