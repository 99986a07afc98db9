"""The notebooks run from the first cell to the last, and are committed with their output."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
QUICKSTART = NOTEBOOKS / "01_quickstart.ipynb"
NUM_USERS, NUM_ITEMS, NUM_GROUPS = 200, 160, 4
MAX_BYTES = 400_000
FIGURES = ("popularity", "curve", "slices", "nearest")
MACHINE = re.compile(r"/(?:work|tmp|root|home|usr|private)/")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_tables(folder: Path) -> None:
    """Writes a log in which users click what is popular and of their own group."""
    rng = np.random.default_rng(0)
    group = np.arange(NUM_ITEMS) % NUM_GROUPS
    popularity = 1 / (1 + np.arange(NUM_ITEMS)) ** 0.6
    events: list[dict[str, Any]] = []
    for user in range(NUM_USERS):
        appeal = popularity * np.where(group == user % NUM_GROUPS, 8, 1)
        shown = rng.choice(NUM_ITEMS, size=30, replace=False, p=appeal / appeal.sum())
        times = 1_700_000_000 + np.sort(rng.integers(0, 100_000, size=30))
        for item, time in zip(shown.tolist(), times.tolist(), strict=True):
            stage = "clicked" if rng.random() < 0.7 else "exposed"
            row = {"user_id": user, "item_id": item, "timestamp": time, "stage": stage}
            events.append(row)
    write_csv(folder / "events.csv", events)
    # One of the films that the notebook looks for; the others are missing.
    titles = ["Star Wars", *(f"Film {item}" for item in range(1, NUM_ITEMS))]
    items = [
        {"item_id": i, "title": title, "year": 1980 + i % 20, "genres": f"Genre {group[i]}|Film"}
        for i, title in enumerate(titles)
    ]
    write_csv(folder / "items.csv", items)
    users = [
        {"user_id": user, "age_group": "25-34", "gender": "FM"[user % 2], "occupation": "writer"}
        for user in range(NUM_USERS)
    ]
    write_csv(folder / "users.csv", users)


def code_cells(notebook: Any) -> Iterator[Any]:
    return (cell for cell in notebook.cells if cell.cell_type == "code")


def outputs(cell: Any) -> str:
    """Returns what a cell printed."""
    return "".join(output.get("text", "") for output in cell.outputs)


def test_quickstart_runs_on_a_small_log_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tables(tmp_path)
    monkeypatch.setenv("TFRS_PIPELINE_NOTEBOOK_DATA", str(tmp_path))
    monkeypatch.setenv("TFRS_PIPELINE_NOTEBOOK_EPOCHS", "2")
    monkeypatch.setenv("TFRS_PIPELINE_CACHE", str(tmp_path / "empty_cache"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # Nothing listens: a fetch would fail.
    notebook = nbformat.read(QUICKSTART, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs = []
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    cells = {cell.id: cell for cell in code_cells(notebook)}
    assert not [o for c in cells.values() for o in c.outputs if o.output_type == "error"]
    assert f"{NUM_USERS:,} users" in outputs(cells["data"])
    assert "ease" in outputs(cells["metrics"])
    assert "kind: scann" in outputs(cells["export"])
    assert len(outputs(cells["query"]).splitlines()) == 15
    for name in FIGURES:
        assert any("image/png" in output.get("data", {}) for output in cells[name].outputs)
    assert not (tmp_path / "empty_cache").exists()


def test_quickstart_is_committed_with_its_output() -> None:
    notebook = nbformat.read(QUICKSTART, as_version=4)
    nbformat.validate(notebook)
    assert QUICKSTART.stat().st_size < MAX_BYTES
    cells = list(code_cells(notebook))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    assert "100,000 events" in outputs({cell.id: cell for cell in cells}["data"])
    figures = {c.id for c in cells for o in c.outputs if "image/png" in o.get("data", {})}
    assert figures == set(FIGURES)


def test_saved_output_holds_no_path_and_no_log() -> None:
    notebook = nbformat.read(QUICKSTART, as_version=4)
    for cell in code_cells(notebook):
        assert not MACHINE.search(outputs(cell)), cell.id
        assert not [o.text for o in cell.outputs if o.get("name") == "stderr"], cell.id
