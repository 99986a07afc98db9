"""A model refreshed with other items: new ones are found by their features, old ones are gone."""

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.exports.saved import ask_saved_model
from tests.service.conftest import NUM_CANDIDATES, Exported, Served, make_served
from tests.small_log import Watched
from tfrs_pipeline import Auto, DataError, Exact, LoadedRetriever, Scann, load
from tfrs_pipeline.answers import retriever, signatures
from tfrs_pipeline.answers import version as version_module
from tfrs_pipeline.answers.publish import (
    MANIFEST_FILE,
    SAVED_MODEL_PARTS,
    SCANN_FOLDER,
    versions_of,
)
from tfrs_pipeline.answers.signatures import RETRIEVALS
from tfrs_pipeline.answers.version import ExportOptions
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.durable import read_record
from tfrs_pipeline.exports.export import export
from tfrs_pipeline.exports.graph_index import load_scann_ops
from tfrs_pipeline.features.kinds import KINDS
from tfrs_pipeline.run import refresh
from tfrs_pipeline.run.refresh import refresh_index
from tfrs_pipeline.search import searcher
from tfrs_pipeline.service.settings import ServeSettings
from tfrs_pipeline.service.versions import ServedVersion

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")
# As they are without the two fixtures.
SAVE_GRAPHS, ALL_RETRIEVALS = refresh._save_graphs, RETRIEVALS

NUM_GONE = 7
# Two ids: one sorts before those of the training, and one after them.
NEW_IDS: dict[str, list[Any]] = {"int": [1, 10_000], "str": ["a film", "zum Film"]}


class Refreshed(NamedTuple):
    """A model, its folder, the items of its second version, and both versions."""

    served: Served
    new_ids: list[Any]
    folder: Path
    items: pa.Table
    before: LoadedRetriever
    after: LoadedRetriever


@pytest.fixture(scope="module", params=["int", "str"])
def refreshed(request: pytest.FixtureRequest, exported: Exported, module_path: Path) -> Refreshed:
    directory = module_path / request.param
    served = make_served(request.param)
    folder = Path(shutil.copytree(exported(request.param, "exact"), directory / "films"))
    items = write_items(served, directory / "items.parquet", NEW_IDS[request.param])
    done = refresh_index(folder, directory / "items.parquet")
    assert (done.num_items, done.num_new) == (NUM_CANDIDATES - 5, 2)
    told = "\n".join(done.notes)
    assert f"2 new, {NUM_GONE} gone" in told
    assert not re.search("skipped|no value that", told)
    assert done.folder == folder / "2"
    versions = load(folder / "1"), load(folder)
    return Refreshed(served, NEW_IDS[request.param], folder, items, *versions)


@pytest.fixture(scope="module")
def of_int() -> Served:
    """Returns a model for tests that do not depend on the type of ids."""
    return make_served("int")


@pytest.fixture
def folder(films: Path) -> Path:
    return films


@pytest.fixture
def items_file(of_int: Served, tmp_path: Path) -> Path:
    write_items(of_int, tmp_path / "items.parquet", NEW_IDS["int"])
    return tmp_path / "items.parquet"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Records what would be exported, instead of exporting it."""
    calls: list[dict[str, Any]] = []

    def write_version(path: Path, options: ExportOptions, **given: Any) -> Any:
        calls.append({"path": path, **vars(options), **given})
        return path, {"index": {"kind": "exact"}}

    monkeypatch.setattr(version_module, "write_version", write_version)
    return calls


def write_items(served: Served, path: Path, new_ids: list[Any]) -> pa.Table:
    """Writes today's items: the first ones are gone, two are new, one has changed its genres."""
    first, last = new_ids
    kept = served.candidate_ids.tolist()[NUM_GONE:]
    ids = [first, *kept, last]
    genres = [["a", "c"], ["c"], *served.genres[NUM_GONE + 1 :], []]
    titles = ["A premiere", *(f"title of {id_}" for id_ in kept), None]
    column = pa.array(genres, pa.list_(pa.string()))
    table = pa.table({"title": titles, "genres": column, "item_id": ids})
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(ids))), path)
    return table


def write_all(served: Served, folder: Path) -> Path:
    """Writes the items of the training."""
    path = folder / "all.parquet"
    items = {"item_id": served.candidate_ids.tolist(), "genres": served.genres}
    pq.write_table(pa.table(items), path)
    return path


def with_genres(table: pa.Table, genres: Sequence[list[str] | None]) -> pa.Table:
    place, kind = table.column_names.index("genres"), table.schema.field("genres")
    return table.set_column(place, kind, pa.array(genres, kind.type))


def expected_embeddings(served: Served, items: pa.Table) -> np.ndarray:
    """Embeds the items with the model itself; those that the training did not have are row 0."""
    row = {id_: i for i, id_ in enumerate(served.candidate_ids.tolist(), 1)}
    rows = np.array([row.get(id_, 0) for id_ in items["item_id"].to_pylist()], np.int32)
    encoded = served.candidate_features[0].encode_column(items["genres"].to_pylist())
    return served.model.embed_candidates(rows, {"genres": encoded}).numpy()


def test_a_refreshed_model_ranks_todays_items(refreshed: Refreshed) -> None:
    ids, loaded = refreshed.items["item_id"].to_pylist(), refreshed.after
    queries = refreshed.served.queries()
    embeddings = expected_embeddings(refreshed.served, refreshed.items)
    scores = loaded.embed_queries(queries) @ embeddings.T
    found, found_scores = loaded.retrieve(queries, len(ids))
    np.testing.assert_allclose(found_scores, -np.sort(-scores, axis=1), atol=1e-5)
    mine = np.take_along_axis(scores, Ids(ids).rows(found.ravel()).reshape(found.shape) - 1, axis=1)
    np.testing.assert_allclose(mine, found_scores, atol=1e-5)
    assert loaded.titles()[ids[0]] == "A premiere"
    by_id = dict(zip(loaded.candidate_ids(), loaded.candidate_embeddings(), strict=True))
    np.testing.assert_allclose([by_id[id_] for id_ in ids], embeddings, atol=1e-6)


def test_users_are_as_they_were(refreshed: Refreshed) -> None:
    served, before, after = refreshed.served, refreshed.before, refreshed.after
    then, now = (version.embed_queries(served.queries()) for version in (before, after))
    np.testing.assert_allclose(then, now, atol=1e-6)
    gone = set(served.candidate_ids.tolist()[:NUM_GONE])
    ids, scores, is_known = after.retrieve_user(served.query_ids.tolist(), NUM_CANDIDATES)
    assert is_known.all()
    for row, user_ids in enumerate(ids.tolist(), 1):
        left = set(after.candidate_ids()) - set(served.known(row))
        assert set(user_ids[: len(left)]) == left
        assert not set(user_ids[: len(left)]) & gone
        assert np.isneginf(scores[row - 1][len(left) :]).all()


def test_filters_go_by_todays_values(refreshed: Refreshed) -> None:
    items, loaded = refreshed.items, refreshed.after
    found, scores = loaded.retrieve([{}], 60, allowed=[["a"]])
    columns = items["item_id"].to_pylist(), items["genres"].to_pylist()
    with_a = {id_ for id_, genres in zip(*columns, strict=True) if "a" in genres}
    assert set(found[0][np.isfinite(scores[0])].tolist()) == with_a
    assert refreshed.new_ids[0] in with_a
    # In a history, items of the training are known even if they are gone, and new ones are not.
    asked = [*refreshed.served.candidate_ids[[0, -1]].tolist(), *refreshed.new_ids]
    assert loaded.stored.has_items(asked).tolist() == [True, True, False, False]


@pytest.mark.parametrize("refreshed", ["int"], indirect=True)
def test_refreshing_again_restores_what_was_dropped(refreshed: Refreshed, tmp_path: Path) -> None:
    """An item that comes back has its trained embedding, which the encoder has kept."""
    folder = Path(shutil.copytree(refreshed.folder, tmp_path / "films"))
    served = refreshed.served
    done = refresh_index(folder, write_all(served, tmp_path), keep_versions=2)
    assert f"{NUM_GONE} new, 2 gone" in "\n".join(done.notes)
    assert versions_of(folder) == [2, 3]
    expected, _ = served.in_memory.retrieve(served.queries(), 20)
    found, _ = load(folder).retrieve(served.queries(), 20)
    assert found.tolist() == expected.tolist()
    refreshed_as = json.loads((folder / "3" / MANIFEST_FILE).read_text())["refreshed"]
    assert (refreshed_as["from_version"], refreshed_as["trained_as"]) == (2, 1)
    assert refreshed_as["num_items"] == NUM_CANDIDATES


def test_what_a_refresh_asks_for_holds_for_the_next(
    of_int: Served, folder: Path, tmp_path: Path, request: pytest.FixtureRequest, command: Any
) -> None:
    """Refreshes from exact search to ScaNN; later refreshes keep the settings of the last one."""
    path = write_all(of_int, tmp_path)
    refresh_index(folder, path, index=Scann(recall=0.9), keep_versions=1)
    assert versions_of(folder) == [2]
    manifest = json.loads((folder / "2" / MANIFEST_FILE).read_text())
    assert manifest["index"]["target_recall"] == 0.9
    assert min(request["recall"] for request in manifest["index"]["requests"]) >= 0.9
    scann = {"kind": "scann", "recall": 0.9}
    assert manifest["export"] == {"index": scann, "keep_versions": 1, "filter_by": "genres"}
    assert manifest["filter"]["name"] == "genres"
    expected, _ = of_int.in_memory.retrieve(of_int.queries(), 10)
    found, _ = load(folder, exact=True).retrieve(of_int.queries(), 10)
    assert found.tolist() == expected.tolist()
    with pytest.raises(ValueError, match="keep must be 1 or more"):
        refresh_index(folder, path, index=Exact(), keep_versions=0)
    asked = request.getfixturevalue("asked")
    refresh_index(folder / "2", path)
    assert command("refresh-index", folder, "--items", path, "--keep-versions", 3).code == 0
    refresh_index(folder, path, index=Auto(recall=0.8))
    assert [x["index"] for x in asked] == [Scann(recall=0.9), Scann(recall=0.9), Auto(recall=0.8)]
    assert [x["keep_versions"] for x in asked] == [1, 3, 1]
    assert [(x["path"], x["filter_by"]) for x in asked] == [(folder, "genres")] * 3


@pytest.mark.slow
def test_the_savedmodel_of_a_refresh_answers_as_its_service(
    of_int: Served,
    exported: Exported,
    items_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Written in a process of its own, with ScaNN's operation too."""
    monkeypatch.setattr(refresh, "_save_graphs", SAVE_GRAPHS)
    monkeypatch.setattr(signatures, "RETRIEVALS", ALL_RETRIEVALS)
    folder = Path(shutil.copytree(exported("int", "scann"), tmp_path / "films"))
    done = refresh_index(folder, items_file)
    assert not any("SavedModel" in note for note in done.notes)
    assert versions_of(folder) == [1, 2]
    loaded, exact = load(done.folder), load(done.folder, exact=True)
    queries = of_int.queries()
    arrays = {**loaded.inputs.read(queries), "k": 9}
    ids, scores, _ = exact.retrieve_user(of_int.query_ids.tolist(), 9)
    load_scann_ops()
    for part in (Path(), SCANN_FOLDER):
        by_user = ask_saved_model(done.folder / part, "retrieve_user", arrays, len(queries))
        assert by_user["candidate_ids"].tolist() == ids.tolist()
        np.testing.assert_allclose(by_user["scores"], scores, atol=1e-5)
        found = ask_saved_model(done.folder / part, "retrieve", arrays, len(queries))
        assert found["candidate_ids"].tolist() == loaded.retrieve(queries, 9)[0].tolist()
        # Of today's items, not of those before.
        similar = {"item_id": [NEW_IDS["int"][0]], "k": 4}
        best = ask_saved_model(done.folder / part, "similar", similar, 1)["candidate_ids"]
        assert best.tolist() == exact.similar([NEW_IDS["int"][0]], 4)[0].tolist()
    before, after = (read_record(folder / n / MANIFEST_FILE, check_files=False) for n in "12")
    assert after["signatures"] == before["signatures"]


def test_without_tensorflow_a_refresh_says_that_it_writes_no_savedmodel(
    folder: Path, items_file: Path, monkeypatch: pytest.MonkeyPatch, of_int: Served
) -> None:
    monkeypatch.setattr(refresh, "_save_graphs", SAVE_GRAPHS)
    monkeypatch.setattr(
        refresh, "find_spec", lambda name: None if name == "tensorflow" else find_spec(name)
    )
    done = refresh_index(folder, items_file)
    (note,) = [note for note in done.notes if "SavedModel" in note]
    assert note.startswith("no SavedModel is written: TensorFlow is not installed here, or ")
    assert not [part for part in SAVED_MODEL_PARTS if (done.folder / part).exists()]
    # The towers and users are the files of the version before, not copies of them.
    for name in ("query.tflite", "histories.npy"):
        ours, theirs = (folder / number / "service" / name for number in "21")
        assert ours.samefile(theirs)
    # Where TensorFlow is back, the version before has no SavedModel whose encoder could be kept.
    monkeypatch.setattr(refresh, "find_spec", find_spec)
    again = refresh_index(folder, items_file)
    assert note in again.notes
    ServedVersion(again.folder, ServeSettings())
    found, _ = load(again.folder).retrieve(of_int.queries(), 9)
    assert found.tolist() == load(done.folder).retrieve(of_int.queries(), 9)[0].tolist()


def test_a_savedmodel_that_cannot_be_written_publishes_nothing(
    folder: Path, items_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh, "_save_graphs", SAVE_GRAPHS)
    failed = subprocess.CompletedProcess([], 1, b"", b"Traceback\nOSError: the disk is full")
    monkeypatch.setattr(searcher, "in_fresh_process", lambda *arguments, **options: failed)
    with pytest.raises(RuntimeError, match=r"(?s)SavedModel could not be written: .*disk is full"):
        refresh_index(folder, items_file)
    assert versions_of(folder) == [1]
    assert not [*folder.glob(".partial*")]


def test_without_features_new_items_are_skipped(of_int: Served, tmp_path: Path) -> None:
    by_id = dataclasses.replace(of_int, candidate_features=())
    folder = export(by_id.exportable(), tmp_path / "ids", index=Exact())
    (tmp_path / "items.csv").write_text("item_id,colour\n10,red\n76,blue\n17,red\n")
    done = refresh_index(folder.parent, tmp_path / "items.csv")
    assert done.num_items == 2
    assert any(note.startswith("skipped 1 of the file") for note in done.notes)
    assert load(folder.parent).candidate_ids() == [10, 17]
    (tmp_path / "new.csv").write_text("item_id\n76\n78\n")
    with pytest.raises(DataError, match="holds no item that the model can embed"):
        refresh_index(folder.parent, tmp_path / "new.csv")


def test_paths_are_judged_before_the_work(
    folder: Path, items_file: Path, monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]
) -> None:
    # By a link, and from within its folder: the model's own name and number count.
    (folder / "latest").symlink_to("1")
    monkeypatch.chdir(folder)
    for path in (folder / "latest", Path(".")):
        refresh_index(path, items_file)
        assert asked[-1]["path"] == folder
        assert asked[-1]["manifest"]["refreshed"]["from_version"] == 1
    (folder / "1").rename(folder / "copy")
    with pytest.raises(ValueError, match="named by its number"):
        refresh_index(folder / "copy", items_file)
    assert len(asked) == 2


def test_ids_of_another_kind_are_refused_unless_all_are_new(folder: Path, tmp_path: Path) -> None:
    """With new items only, the filter has no values here, and can only allow all items."""
    new, path = pa.table({"item_id": [2, 4, 5], "genres": [["a"]] * 3}), tmp_path / "new.parquet"
    pq.write_table(new, path)
    with pytest.raises(DataError, match=r"none of its 3 ids, such as 2, is known"):
        refresh_index(folder, path)
    assert versions_of(folder) == [1]
    pq.write_table(with_genres(new, [None] * 3), path)
    done = refresh_index(folder, path, allow_all_new=True)
    assert (done.num_items, done.num_new) == (3, 3)
    loaded = load(folder)
    found, _ = loaded.retrieve([{}], 3, allowed=[[]])
    assert sorted(found[0].tolist()) == [2, 4, 5]
    with pytest.raises(ValueError, match="No item has 'a'"):
        loaded.retrieve([{}], 60, allowed=[["a"]])


def test_categories_that_the_training_did_not_have_are_counted_and_all_are_refused(
    folder: Path, items_file: Path, asked: list[dict[str, Any]], command: Any
) -> None:
    """With another spelling they would be lost, and the filter's values with them."""
    table = pq.read_table(items_file)
    genres = [x or [] for x in table["genres"].to_pylist()]
    num_given = sum(map(any, genres))

    def write(lists: list[list[str]]) -> None:
        pq.write_table(with_genres(table, lists), items_file)

    # One known value among unknown ones is enough; an item without values does not count.
    write([["A", *x] if i else [y.upper() for y in x] for i, x in enumerate(genres)])
    num_other = sum(not any(x) for x in genres[1:]) + any(genres[0])
    told = "genres: {} of 55 items have no value that the training had: taken as missing"
    assert told.format(num_other) in refresh_index(folder, items_file).notes
    write([[y.upper() for y in x] for x in genres])
    watched = Watched()
    with pytest.raises(DataError, match=r"no value of 'genres', such as '[A-C]', is known.*'a'"):
        refresh_index(folder, items_file, progress=watched)
    assert len(asked) == 1
    assert watched.tasks[-1] == ("check", 0)  # Before the items are embedded.
    said = command("refresh-index", folder, "--items", items_file, "--allow-all-new").out
    said = " ".join(said.split())
    assert f"genres: {num_given} of 55 items have no value that the training had" in said
    # A single unknown value is accepted unless all items have it; two are refused, even of one.
    write([["new"] if i in (3, 4) else [] for i in range(55)])
    assert told.format(2) in refresh_index(folder, items_file).notes
    for other in [["new"]] * 55, [["new", "newer"] if i == 3 else [] for i in range(55)]:
        write(other)
        with pytest.raises(DataError, match="no value of 'genres', such as 'new', is known"):
            refresh_index(folder, items_file)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("categorical", ["a", None]),
        ("multi_categorical", [["a"], None]),
        ("text", ["a b", "b"]),  # A word of a single row has no code.
        ("numeric", [1.0, None]),
        ("bucketized", [1.0, 2.0]),
        ("timestamp", [datetime(2024, 5, day, tzinfo=UTC) for day in (1, 2)]),
        ("vector", [[1.0, 2.0], None]),
    ],
)
def test_a_feature_that_the_training_had_must_have_a_value(kind: Any, values: list[Any]) -> None:
    path, given = Path("today.csv"), pa.array(values)
    nothing = pa.nulls(2, given.type)
    feature = KINDS[kind].fit("price", given, reference=datetime(2024, 6, 1, tzinfo=UTC))
    refresh.refuse_lost(feature, path, pa.table({"price": given}))
    with pytest.raises(DataError, match=r"none of 2 items has a value of 'price'.*allow_all_new"):
        refresh.refuse_lost(feature, path, pa.table({"price": nothing}))
    if kind != "vector":
        refresh.refuse_lost(KINDS[kind].fit("price", nothing), path, pa.table({"price": nothing}))


@pytest.mark.parametrize("refreshed", ["int"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["genres"]), r"no column 'genres'.*\. Name the columns as"),
        (lambda t: t.drop_columns(["item_id"]), r"no column 'item_id'"),
        (lambda t: pa.concat_tables([t, with_genres(t.slice(0, 3), [None] * 3)]), r"One row an id"),
        (lambda t: t.slice(0, 0), r"holds no row"),
        (lambda t: pa.table({"item_id": ["x"], "genres": [["a"]]}), "item ids are integers"),
    ],
    ids=["no feature", "no id", "an id twice", "no row", "text ids"],
)
def test_a_bad_item_table_changes_nothing(
    refreshed: Refreshed,
    folder: Path,
    items_file: Path,
    change: Any,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retriever, "load", lambda *arguments, **options: refreshed.before)
    pq.write_table(change(pq.read_table(items_file)), items_file)
    with pytest.raises(DataError, match=message):
        refresh_index(folder, items_file)
    assert [path.name for path in folder.iterdir()] == ["1"]
