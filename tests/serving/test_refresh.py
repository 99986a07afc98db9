"""A model over other items: what is new is found by its features, what is gone is gone."""

import dataclasses
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.serving.conftest import NUM_CANDIDATES, Served, make_served
from tfrs_pipeline.cli import main
from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.serving import export as export_module
from tfrs_pipeline.serving.export import export
from tfrs_pipeline.serving.index import Exact, Scann
from tfrs_pipeline.serving.publish import MANIFEST_FILE, versions_of
from tfrs_pipeline.serving.refresh import refresh_index
from tfrs_pipeline.serving.retriever import LoadedRetriever, load

pytestmark = pytest.mark.usefixtures("trusted_exports")
PROVE = export_module.prove
NUM_GONE = 7


@functools.cache
def exported(ids: str) -> Path:
    """Exports the model with ids of a type, once for all tests."""
    folder = Path(tempfile.mkdtemp()) / "films"
    served = make_served(ids)
    export(served, folder, index=Exact(), filter_by="genres", queries=served.queries())
    return folder


def publish(served: Served, directory: Path) -> Path:
    """Copies an export to where a test may change it."""
    ids = "int" if served.candidate_ids.dtype == np.int64 else "str"
    return Path(shutil.copytree(exported(ids), directory / "films"))


@pytest.fixture(scope="module")
def of_int() -> Served:
    """For what does not depend on the type of ids."""
    return make_served("int")


@pytest.fixture(scope="module")
def refreshed(served: Served, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pa.Table]:
    """A model's folder after a refreshment, its second version, and the items of that."""
    directory = tmp_path_factory.mktemp("refreshed")
    folder = publish(served, directory)
    items = write_items(served, directory / "items.parquet")
    done = refresh_index(folder, directory / "items.parquet")
    assert (done.num_items, done.num_new, done.num_untrained) == (NUM_CANDIDATES - 5, 2, 2)
    assert (done.num_dropped, done.num_skipped) == (NUM_GONE, 0)
    assert done.folder == folder / "2"
    return folder, items


def new_ids(served: Served) -> list[Any]:
    """Two ids: one sorts before, one after those of the training."""
    is_integer = served.candidate_ids.dtype == np.int64
    return [1, 10_000] if is_integer else ["a film", "zum Film"]


def write_items(served: Served, path: Path) -> pa.Table:
    """Writes today's items: the first ones are gone, two are new, one has changed its genres."""
    first, last = new_ids(served)
    rows: list[tuple[Any, list[str], str | None]] = [(first, ["a", "c"], "A premiere")]
    rows += [
        (id_, genres, f"title of {id_}")
        for id_, genres in zip(
            served.candidate_ids.tolist()[NUM_GONE:], served.genres[NUM_GONE:], strict=True
        )
    ]
    rows[1] = (rows[1][0], ["c"], rows[1][2])
    rows.append((last, [], None))
    ids, genres, titles = zip(*rows, strict=True)
    table = pa.table(
        {
            "title": list(titles),
            "genres": pa.array(list(genres), pa.list_(pa.string())),
            "item_id": list(ids),
        }
    )
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(ids))), path)
    return table


def expected_embeddings(served: Served, items: pa.Table) -> np.ndarray:
    """Embeds the items with the model itself: row 0 is what the training did not have."""
    row = {id_: i for i, id_ in enumerate(served.candidate_ids.tolist(), 1)}
    rows = np.array([row.get(id_, 0) for id_ in items["item_id"].to_pylist()], np.int32)
    encoded = served.candidate_features[0].encode_column(items["genres"].to_pylist())
    return served.model.embed_candidates(rows, {"genres": encoded}).numpy()


def test_a_refreshed_model_ranks_todays_items(
    served: Served, refreshed: tuple[Path, pa.Table]
) -> None:
    folder, items = refreshed
    ids = items["item_id"].to_pylist()
    loaded = load(folder)
    queries = served.queries()
    embeddings = expected_embeddings(served, items)
    scores = loaded.embed_queries(queries) @ embeddings.T
    found, found_scores = loaded.retrieve(queries, len(ids))
    np.testing.assert_allclose(found_scores, -np.sort(-scores, axis=1), atol=1e-5)
    for i in range(len(queries)):
        place = {id_: j for j, id_ in enumerate(ids)}
        mine = [scores[i, place[id_]] for id_ in found[i].tolist()]
        np.testing.assert_allclose(mine, found_scores[i], atol=1e-5)
    assert loaded.titles()[ids[0]] == "A premiere"
    by_id = dict(zip(loaded.candidate_ids(), loaded.candidate_embeddings(), strict=True))
    np.testing.assert_allclose([by_id[id_] for id_ in ids], embeddings, atol=1e-6)


def test_users_are_as_they_were(served: Served, refreshed: tuple[Path, pa.Table]) -> None:
    folder, _ = refreshed
    before, after = load(folder / "1"), load(folder / "2")
    np.testing.assert_allclose(
        before.embed_queries(served.queries()), after.embed_queries(served.queries()), atol=1e-6
    )
    gone = set(served.candidate_ids.tolist()[:NUM_GONE])
    users = served.query_ids.tolist()
    ids, scores, is_known = after.retrieve_user(users, NUM_CANDIDATES)
    assert is_known.all()
    for row, user_ids in enumerate(ids.tolist(), 1):
        known = set(served.known(row))
        left = set(after.candidate_ids()) - known
        assert set(user_ids[: len(left)]) == left
        assert not set(user_ids[: len(left)]) & gone
        assert np.isneginf(scores[row - 1][len(left) :]).all()


def test_filters_go_by_todays_values(served: Served, refreshed: tuple[Path, pa.Table]) -> None:
    folder, items = refreshed
    loaded = load(folder)
    found, scores = loaded.retrieve([{}], 60, allowed=[["a"]])
    with_a = {
        id_
        for id_, genres in zip(
            items["item_id"].to_pylist(), items["genres"].to_pylist(), strict=True
        )
        if "a" in genres
    }
    assert set(found[0][np.isfinite(scores[0])].tolist()) == with_a
    assert new_ids(served)[0] in with_a
    # A history is read by what the training had: also by what is gone, by nothing that is new.
    asked = [*served.candidate_ids[[0, -1]].tolist(), *new_ids(served)]
    assert loaded.knows(asked).tolist() == [True, True, *[False] * len(new_ids(served))]


def test_refreshing_again_goes_back_to_what_was_dropped(
    served: Served, refreshed: tuple[Path, pa.Table], tmp_path: Path
) -> None:
    """An item that comes back has its trained embedding: the encoder never forgets."""
    folder = Path(shutil.copytree(refreshed[0], tmp_path / "films"))
    all_items = pa.table({"item_id": served.candidate_ids.tolist(), "genres": served.genres})
    pq.write_table(all_items, tmp_path / "all.parquet")
    done = refresh_index(folder, tmp_path / "all.parquet", keep_versions=2)
    assert (done.num_new, done.num_untrained, done.num_dropped) == (NUM_GONE, 0, 2)
    assert versions_of(folder) == [2, 3]
    expected, _ = served.in_memory.retrieve(served.queries(), 20)
    found, _ = load(folder).retrieve(served.queries(), 20)
    assert found.tolist() == expected.tolist()
    manifest = json.loads((folder / "3" / MANIFEST_FILE).read_text())
    assert manifest["refreshed"]["from_version"] == 2
    assert manifest["refreshed"]["num_items"] == NUM_CANDIDATES


def test_what_a_refreshment_asks_for_holds_for_the_next(of_int: Served, tmp_path: Path) -> None:
    """From exact search to ScaNN and on from there, the settings those of the last one."""
    folder = publish(of_int, tmp_path)
    items = pa.table({"item_id": of_int.candidate_ids.tolist(), "genres": of_int.genres})
    pq.write_table(items, tmp_path / "items.parquet")
    refresh_index(folder, tmp_path / "items.parquet", index=Scann(recall=0.9))
    done = refresh_index(folder / "2", tmp_path / "items.parquet", keep_versions=1)
    assert versions_of(folder) == [3]
    assert done.folder == folder / "3"
    manifest = json.loads((folder / "3" / MANIFEST_FILE).read_text())
    assert manifest["index"]["target_recall"] == 0.9
    assert min(request["recall"] for request in manifest["index"]["requests"]) >= 0.9
    asked = {"kind": "scann", "recall": 0.9}
    assert manifest["export"] == {"index": asked, "keep_versions": 1, "filter_by": "genres"}
    assert manifest["filter"]["name"] == "genres"
    expected, _ = of_int.in_memory.retrieve(of_int.queries(), 10)
    found, _ = load(folder, exact=True).retrieve(of_int.queries(), 10)
    assert found.tolist() == expected.tolist()
    with pytest.raises(ValueError, match="keep must be 1 or more"):
        refresh_index(folder, tmp_path / "items.parquet", keep_versions=0)


def test_without_features_new_items_are_skipped(of_int: Served, tmp_path: Path) -> None:
    by_id = dataclasses.replace(of_int, candidate_features=())
    folder = export(by_id, tmp_path / "ids", index=Exact())
    (tmp_path / "items.csv").write_text("item_id,colour\n10,red\n76,blue\n17,red\n")
    done = refresh_index(folder.parent, tmp_path / "items.csv")
    assert (done.num_items, done.num_skipped, done.num_untrained) == (2, 1, 0)
    assert load(folder.parent).candidate_ids() == [10, 17]
    (tmp_path / "new.csv").write_text("item_id\n76\n78\n")
    with pytest.raises(DataError, match="holds no item that the model can embed"):
        refresh_index(folder.parent, tmp_path / "new.csv")


def test_paths_are_judged_before_the_work(
    of_int: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish(of_int, tmp_path)
    write_items(of_int, tmp_path / "items.parquet")
    # By a link, and from within: the model's own name and number count.
    (folder / "latest").symlink_to("1")
    assert refresh_index(folder / "latest", tmp_path / "items.parquet").folder == folder / "2"
    monkeypatch.chdir(folder)
    assert refresh_index(".", tmp_path / "items.parquet").folder == folder / "3"
    assert json.loads((folder / "3" / MANIFEST_FILE).read_text())["name"] == "films"
    shutil.copytree(folder / "3", tmp_path / "copy")
    with pytest.raises(ValueError, match="named by its number"):
        refresh_index(tmp_path / "copy", tmp_path / "items.parquet")


def test_a_filter_without_any_value_allows_nothing_but_all(of_int: Served, tmp_path: Path) -> None:
    folder = publish(of_int, tmp_path)
    ids = of_int.candidate_ids.tolist()
    genres = pa.array([None] * len(ids), pa.list_(pa.string()))
    pq.write_table(pa.table({"item_id": ids, "genres": genres}), tmp_path / "items.parquet")
    refresh_index(folder, tmp_path / "items.parquet")
    loaded = load(folder)
    found, _ = loaded.retrieve([{}], 60, allowed=[[]])
    assert sorted(found[0].tolist()) == sorted(ids)
    with pytest.raises(ValueError, match="No item has 'a'"):
        loaded.retrieve([{}], 60, allowed=[["a"]])


def without_genres(table: pa.Table) -> pa.Table:
    place, kind = table.column_names.index("genres"), table.schema.field("genres")
    return table.set_column(place, kind, pa.nulls(len(table), kind.type))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["genres"]), r"no column 'genres'.*\. Name the columns as"),
        (lambda t: t.drop_columns(["item_id"]), r"no column 'item_id'"),
        (lambda t: pa.concat_tables([t, without_genres(t.slice(0, 3))]), r"One row an id"),
        (lambda t: t.slice(0, 0), r"holds no row"),
    ],
    ids=["no feature", "no id", "an id twice", "no row"],
)
def test_a_bad_item_table_changes_nothing(
    of_int: Served, tmp_path: Path, change: Any, message: str
) -> None:
    folder = publish(of_int, tmp_path)
    table = change(write_items(of_int, tmp_path / "items.parquet"))
    pq.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=message):
        refresh_index(folder, tmp_path / "bad.parquet")
    assert [path.name for path in folder.iterdir()] == ["1"]


def test_ids_of_another_kind_are_refused_unless_all_are_new(of_int: Served, tmp_path: Path) -> None:
    folder = publish(of_int, tmp_path)
    ids = [2, 4, 5]
    pq.write_table(pa.table({"item_id": ids, "genres": [["a"]] * 3}), tmp_path / "new.parquet")
    with pytest.raises(DataError, match=r"none of its 3 ids, such as 2, is known"):
        refresh_index(folder, tmp_path / "new.parquet")
    assert versions_of(folder) == [1]
    done = refresh_index(folder, tmp_path / "new.parquet", allow_all_new=True)
    assert (done.num_items, done.num_untrained) == (3, 3)


def test_text_ids_are_refused_by_a_model_of_integers(of_int: Served, tmp_path: Path) -> None:
    folder = publish(of_int, tmp_path)
    pq.write_table(pa.table({"item_id": ["x"], "genres": [["a"]]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match="holds text, and the model's item ids are integers"):
        refresh_index(folder, tmp_path / "text.parquet")


@pytest.mark.slow
def test_the_command_says_what_it_did(
    of_int: Served,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export_module, "prove", PROVE)
    folder = publish(of_int, tmp_path)
    write_items(of_int, tmp_path / "items.parquet")
    command = ["refresh-index", str(folder), "--items", str(tmp_path / "items.parquet")]
    assert main([*command, "--index", "scann", "--keep-versions", "1"]) == 0
    said = capsys.readouterr().out
    assert "55 items: 2 are new, 7 gone" in said
    assert "2 were in no training: embedded by their features alone" in said
    # Nothing says how this model was trained.
    assert "an unknown id: if that was not trained, they will seldom be found" in said
    assert "Train with model.id_dropout above 0" in said
    assert "ScaNN finds" in said
    assert versions_of(folder) == [2]
    loaded: LoadedRetriever = load(folder)
    assert loaded.manifest["index"]["kind"] == "scann"
    assert "exact search alone would do" in said
    assert main(["tune-index", str(folder), "--target-recall", "0.9"]) == 0
    said = capsys.readouterr().out
    assert all(column in said for column in ("of 1 leaves", "excluded", "recall", "known"))


def test_the_command_keeps_the_recall_target_that_it_is_not_given(
    of_int: Served, tmp_path: Path
) -> None:
    folder = publish(of_int, tmp_path)
    write_items(of_int, tmp_path / "items.parquet")
    command = ["refresh-index", str(folder), "--items", str(tmp_path / "items.parquet")]
    for flags in (["--target-recall", "0.9"], ["--index", "scann"]):
        assert main([*command, *flags]) == 0
        assert load(folder).manifest["index"]["target_recall"] == 0.9


@pytest.mark.parametrize(
    ("settings", "is_trained"),
    [
        (None, None),
        ({"id_dropout": 0.1}, True),
        ({"id_dropout": 0.0}, False),
        ({"id_dropout": 0.0, "use_candidate_id": False}, True),
    ],
)
def test_whether_the_unknown_id_was_trained_is_said_where_it_is_known(
    of_int: Served, tmp_path: Path, settings: dict[str, Any] | None, is_trained: bool | None
) -> None:
    manifest = {} if settings is None else {"config": {"model": settings}}
    folder = tmp_path / "films"
    export(of_int, folder, index=Exact(), manifest=manifest)
    write_items(of_int, tmp_path / "items.parquet")
    assert refresh_index(folder, tmp_path / "items.parquet").has_trained_unknown is is_trained
