"""A loaded model against the one in memory; what loading refuses."""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.damage import damage
from tests.service.conftest import KIND_OF, NUM_CANDIDATES, Exported, Served, make_served
from tfrs_pipeline import Auto, LoadedRetriever, Scann, export, load
from tfrs_pipeline.answers.publish import INDEX_FOLDER, ITEMS_FILE, MANIFEST_FILE
from tfrs_pipeline.durable import Damaged, write_record
from tfrs_pipeline.search import settings as index

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("is_fallback", [False, True])
def test_loaded_and_in_memory_agree(served: Served, folder: Path, is_fallback: bool) -> None:
    if is_fallback and KIND_OF[served.ids] == "exact":
        pytest.skip("has no fallback")
    loaded = load(folder, exact=is_fallback)
    queries = [
        {"user_id": served.query_ids[2], "history": served.known(3)},
        {"history": served.known(5)},
        {"user_id": served.query_ids[0]},
        {},
    ]
    exclude = [served.candidate_ids[:20].tolist(), [], served.known(4), []]
    expected_ids, expected_scores = served.in_memory.retrieve(queries, 15, exclude)
    ids, scores = loaded.retrieve(queries, 15, exclude)
    assert ids.tolist() == expected_ids.tolist()
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-4)
    assert loaded.titles()[served.candidate_ids[1]] == "The 1th Film"


def test_the_graph_does_not_grow_with_the_ids(exported: Exported) -> None:
    """Ids are stored in variables, because a graph must not exceed 2 GB."""
    graph = (exported("str", "exact") / "1" / "saved_model.pb").read_bytes()
    assert b"film-\xc3\xa9-" not in graph
    assert "Zoë".encode() not in graph


def test_a_filter_takes_what_is_allowed_from_the_whole_answer(
    served: Served, loaded: LoadedRetriever
) -> None:
    user = served.query_ids[0]
    query = {"user_id": user, "history": served.known(3)}
    queries: list[dict[str, Any]] = [
        {**query, "features": {"gender": served.genders[0]}},
        {**query, "features": {"gender": None}},
        *(query, query),
    ]
    found = loaded.retrieve(queries, NUM_CANDIDATES, allowed=[["b"], ["b"], ["b"], []])
    genres = zip(served.candidate_ids.tolist(), served.genres, strict=True)
    with_b = {id_ for id_, of_item in genres if "b" in of_item}
    assert 0 < len(with_b) < NUM_CANDIDATES
    for i, each in enumerate(queries):
        (ids,), (scores,) = loaded.retrieve([each], NUM_CANDIDATES)
        is_allowed = np.array([i == 3 or id_ in with_b for id_ in ids.tolist()])
        num = is_allowed.sum()
        assert found[0][i, :num].tolist() == ids[is_allowed].tolist()
        np.testing.assert_allclose(found[1][i, :num], scores[is_allowed], atol=1e-5)
    filtered, _, _ = loaded.retrieve_user([user], 5, allowed=[["b"]])
    (ids,), _, _ = loaded.retrieve_user([user], NUM_CANDIDATES)
    assert filtered[0].tolist() == [id_ for id_ in ids.tolist() if id_ in with_b][:5]


def test_refuses_what_it_cannot_answer(served: Served, loaded: LoadedRetriever) -> None:
    user = served.query_ids[0]
    other = 7 if isinstance(user, str) else "7"
    wrong: dict[str, Any] = {
        "feature 'age'; known: gender": lambda: loaded.retrieve([{"features": {"age": 3}}], 2),
        r"did you mean \['b'\]\?": lambda: loaded.retrieve([{}], 3, allowed=["b"]),
        "No item has 'B' as its genres": lambda: loaded.retrieve([{}], 3, allowed=[["B"]]),
        r"user_ids must be a list.*\['u0'\]": lambda: loaded.retrieve_user("u0", 3),
        r"user_ids must be a list.*\[3\]": lambda: loaded.retrieve_user(3, 3),
        "k must be": lambda: loaded.retrieve_user([user], 0),
        f"ids are .* Received: {other!r}": lambda: loaded.retrieve_user([other], 3),
    }
    for message, ask in wrong.items():
        with pytest.raises(ValueError, match=message):
            ask()


def test_a_version_is_served_as_exported_or_not_at_all(exported: Exported, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported("int", "scann") / "1", tmp_path / "1"))
    service, index = Path("service"), INDEX_FOLDER / "hashed_dataset.npy"
    for name in (service / "query.tflite", service / "vectors.npy", service / "known.npy", index):
        # As with an index over other towers: the same form, but other numbers.
        whole = (folder / name).read_bytes()
        damage(folder / name, "flipped")
        with pytest.raises(Damaged, match=f"{name}.* towers and index belong together"):
            load(folder, exact=name != index)
        (folder / name).write_bytes(whole)
    # The SavedModel is for others: a service reads none of its files, so it checks none.
    damage(folder / "variables" / "variables.data-00000-of-00001", "flipped")
    shutil.rmtree(folder / "scann")
    load(folder)
    manifest = folder / MANIFEST_FILE
    text = manifest.read_text()
    assert '"num_leaves": 1,' in text
    manifest.write_text(text.replace('"num_leaves": 1,', '"num_leaves": 2,'))
    with pytest.raises(Damaged, match=r"manifest\.json"):
        load(folder)


def test_a_missing_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No exported model at .*manifest.json.* run` "):
        load(tmp_path)
    manifest = tmp_path / "movies" / "1" / MANIFEST_FILE
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    for path in (tmp_path, tmp_path / "movie"):
        with pytest.raises(FileNotFoundError, match=rf"Did you mean {tmp_path}/movies\?"):
            load(path)


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_a_version_of_another_format_is_refused_in_one_line(tmp_path: Path, number: int) -> None:
    """As before a version held what a service without TensorFlow reads."""
    (tmp_path / "films" / "1").mkdir(parents=True)
    manifest = {"index": {"kind": "exact"}, **({"format": number} if number > 1 else {})}
    write_record(tmp_path / "films" / "1" / MANIFEST_FILE, manifest)
    message = f"1 was exported by another version .* its format is {number}, .* Export the model a"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "films")


def test_each_item_has_its_own_values_of_the_filter(served: Served, folder: Path) -> None:
    """They are in the file of items, which can be read without this package too."""
    rows = pq.read_table(folder / "1" / ITEMS_FILE).to_pylist()
    assert [row["filter"] for row in rows] == served.genres


def hide_scann(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process one on a machine for which ScaNN has no package."""
    find = importlib.metadata.distribution

    def distribution(name: str) -> importlib.metadata.Distribution:
        if name == "scann":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setitem(sys.modules, "scann", None)


@pytest.mark.usefixtures("trusted_exports", "few_signatures")
def test_without_scann_exports_are_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hide_scann(monkeypatch)
    monkeypatch.setattr(index, "SMALLEST_SCANN_CORPUS", 10)
    served = make_served("int")
    folder = export(served.exportable(), tmp_path / "films", index=Auto())
    assert [record.getMessage() for record in caplog.records] == [
        "ScaNN is not installed here: 60 candidates are searched exactly"
    ]
    loaded = load(folder)
    assert loaded.manifest["index"] == {"kind": "exact"}
    assert "scann" not in loaded.manifest["versions"]
    expected, _ = served.in_memory.retrieve(served.queries(), 7)
    assert loaded.retrieve(served.queries(), 7)[0].tolist() == expected.tolist()
    with pytest.raises(ImportError, match=r"needs the package scann.* or use exact search"):
        export(served.exportable(), tmp_path / "films", index=Scann())


def test_without_scann_an_index_is_searched_exactly(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hide_scann(monkeypatch)
    served, folder = make_served("int"), exported("int", "scann")
    loaded = load(folder)
    (record,) = caplog.records
    assert record.getMessage() == f"ScaNN is not installed here: {folder / '1'} is searched exactly"
    expected, _ = served.in_memory.retrieve(served.queries(), 7)
    assert loaded.retrieve(served.queries(), 7)[0].tolist() == expected.tolist()


WITHOUT_THE_OPERATION = """
import sys
import tfrs_pipeline
import tensorflow as tf

def refuse(path):
    raise tf.errors.NotFoundError(None, None, f"{path}: undefined symbol")

tf.load_op_library = refuse
from tests.service.running_server import GOOD, Running
from tfrs_pipeline.answers.retriever import load

loaded = load(sys.argv[1])
ids, _ = loaded.retrieve([{"history": [7]}], 5)
assert loaded.candidates._view.searcher is not None
with Running(__import__("pathlib").Path(sys.argv[1])) as running:
    answer = running.predict(**GOOD)["outputs"]["candidate_ids"][0]
heavy = {"ibis", "duckdb", "tensorflow_recommenders", "tensorflow_datasets", "implicit"}
imported = {name for name, module in sys.modules.items() if module is not None}
assert not {"scann", "matplotlib", *heavy} & imported
assert "_scann_ops" not in open("/proc/self/maps").read()
print(len(ids[0]), len(answer))
"""


def test_a_tensorflow_without_the_operation_loads_and_serves(exported: Exported) -> None:
    command = [sys.executable, "-c", WITHOUT_THE_OPERATION, str(exported("int", "scann"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "5 5\n"), done.stderr
