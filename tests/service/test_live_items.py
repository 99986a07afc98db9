"""Items written while a model is in service: found at once, durable, and refused if wrong."""

import contextlib
import dataclasses
import logging
import shutil
import sqlite3
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.damage import copy_database, damage
from tests.service import running_server
from tests.service.conftest import NUM_CANDIDATES, Exported, Served, make_served
from tests.service.running_server import TOKEN, Running, until
from tests.service.test_user_events import event
from tests.small_log import Watched
from tfrs_pipeline import Exact, LoadedRetriever, Reading, load, refresh_index
from tfrs_pipeline.durable import Damaged, StorageError
from tfrs_pipeline.exports import export as export_module
from tfrs_pipeline.features.numeric import Numeric, Timestamp
from tfrs_pipeline.messages import StepReport
from tfrs_pipeline.records import live_items
from tfrs_pipeline.records.journal import JOURNAL_FILE
from tfrs_pipeline.records.live_items import STORE_FILE, Store, _check_kind, _plain
from tfrs_pipeline.search import candidates as candidates_module

ITEMS = "/v1/models/films/items"
pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")


@pytest.fixture
def retriever(model: Path) -> LoadedRetriever:
    return load(model)


def new_id(served: Served, number: int = 0) -> Any:
    return 90_000 + number if served.ids == "int" else f"new ☂ {number}"


def item(id_: Any, genres: Any = ("a", "b"), **more: Any) -> dict[str, Any]:
    return {"item_id": id_, "genres": genres, **more}


def ranking(retriever: LoadedRetriever, query: dict[str, Any], **options: Any) -> dict[Any, float]:
    """Returns the scores of all candidates, best first."""
    ids, scores = retriever.retrieve([query], NUM_CANDIDATES + 10, **options)
    pairs = zip(ids[0].tolist(), scores[0].tolist(), strict=True)
    return {id_: score for id_, score in pairs if score > -np.inf}


def items_csv(folder: Path, ids: Any) -> Path:
    lines = ["item_id,title,genres", *(f"{id_},Title,b" for id_ in ids)]
    (folder / "items.csv").write_text("\n".join(lines))
    return folder / "items.csv"


def test_a_new_item_is_found_by_the_next_query(served: Served, retriever: LoadedRetriever) -> None:
    id_, query = new_id(served), {"history": served.known(3)}
    before = ranking(retriever, query)
    assert retriever.upsert([item(id_, title="Brand New")]) == 1
    after = ranking(retriever, query)
    # The score comes from the exported towers: the dot product of the query and of an unknown id
    # with these features.
    vector, is_known = retriever.embed_candidates([id_], {"genres": [["a", "b"]]})
    assert not is_known[0]
    expected = float((retriever.embed_queries([query]) @ vector.T)[0, 0])
    assert after.pop(id_) == pytest.approx(expected, rel=1e-4)
    assert list(after) == list(before)
    assert retriever.num_candidates == NUM_CANDIDATES + 1
    assert retriever.live.titles.get(id_) == "Brand New"
    # Exclusions and filters know it.
    assert id_ not in ranking(retriever, query, exclude=[[id_]])
    assert id_ in ranking(retriever, query, allowed=[["a"]])
    assert id_ not in ranking(retriever, query, allowed=[["c"]])
    assert retriever.upsert([item(id_, ["brand-new genre"])]) == 0
    assert set(ranking(retriever, query, allowed=[["brand-new genre"]])) == {id_}


def test_a_known_item_is_replaced_and_removed(served: Served, retriever: LoadedRetriever) -> None:
    id_, query = served.candidate_ids[11], {"history": served.known(2)}
    before = ranking(retriever, query)
    assert retriever.upsert([item(id_, ["c"])]) == 0
    vector, is_known = retriever.embed_candidates([id_], {"genres": [["c"]]})
    assert is_known[0]
    after = ranking(retriever, query)
    expected = float(retriever.embed_queries([query])[0] @ vector[0])
    assert after[id_] == pytest.approx(expected, rel=1e-4)
    assert len(after) == len(before) == NUM_CANDIDATES
    assert retriever.remove([id_, new_id(served)]) == 1
    assert set(before) - set(ranking(retriever, query)) == {id_}
    user = served.query_ids[0]
    assert id_ not in retriever.retrieve_user([user], NUM_CANDIDATES)[0][0].tolist()


def test_live_items_are_everywhere(served: Served, model: Path, retriever: LoadedRetriever) -> None:
    query, other = {"history": served.known(3)}, load(model)
    retriever.upsert([item(new_id(served, i)) for i in range(5)])
    retriever.remove([new_id(served, 1), served.candidate_ids[4]])
    other.upsert([item(new_id(served, 2), ["c"]), item(new_id(served, 7))])
    retriever.catch_up()
    expected = ranking(retriever, query)
    assert len(expected) == NUM_CANDIDATES + 4
    for again in (other, load(model), load(model, exact=True), load(model / "1")):
        assert ranking(again, query) == pytest.approx(expected)
    frozen = load(model, live=False)
    assert len(ranking(frozen, query)) == NUM_CANDIDATES
    with pytest.raises(ValueError, match="live=True"):
        frozen.upsert([item(new_id(served))])


def test_a_retriever_says_what_does_not_hold(served: Served, retriever: LoadedRetriever) -> None:
    kept, gone = [new_id(served, n) for n in (1, 2)]
    retriever.upsert([item(kept), item(gone), item(served.candidate_ids[3])])
    retriever.remove([gone, served.candidate_ids[4]])
    assert retriever.violations() == []
    # Behind the back of the live items, candidates change.
    candidates = retriever.candidates
    vector = candidates.vectors_of([kept])
    candidates.change([gone], vector, None, [kept])
    assert retriever.violations() == [
        f"live item {kept!r} was written, and is not found",
        f"live item {gone!r} was removed, and is still found",
    ]
    candidates.change([kept], np.full_like(vector, np.nan), None, [gone])
    assert retriever.violations() == ["a candidate's vector is not finite"]
    candidates.change([kept], vector, None, [])
    view = candidates._view
    candidates._view = dataclasses.replace(view, num_removed=view.num_removed + 1)
    num = NUM_CANDIDATES
    assert retriever.violations() == [f"{num} candidates are there, and {num - 1} are counted"]
    twice = view.ids.copy()
    twice[1] = twice[2]
    candidates._view = dataclasses.replace(view, ids=twice)
    assert f"{num} candidates have {num - 1} different ids" in retriever.violations()


def test_a_file_of_before_without_a_number_is_read_and_written(films: Path) -> None:
    retriever = load(films)
    retriever.upsert([item(90_001)])
    with contextlib.closing(sqlite3.connect(retriever.live.path)) as sql:
        assert sql.execute("PRAGMA application_id").fetchone() == (1,)
        sql.execute("PRAGMA application_id = 0")
    before = load(films)
    assert before.upsert([item(90_002)]) == 1
    assert before.candidates.has([90_001, 90_002]).all()
    with contextlib.closing(sqlite3.connect(retriever.live.path)) as sql:
        sql.execute("PRAGMA application_id = 2")
    with pytest.raises(Damaged, match=r"live.sqlite is damaged, or of another version .*is 2, and"):
        load(films).upsert([item(90_003)])


def test_a_newer_version_knows_better(films: Path, tmp_path: Path) -> None:
    served, model = make_served("int"), films
    first = load(model)
    (mine, gone, during), new = served.candidate_ids[5:8], new_id(served)
    first.upsert([item(mine, ["c"], title="Live"), item(new, ["a"], title="New")])
    first.remove([gone])

    def remove(_: StepReport) -> None:
        if first.candidates.has([during])[0]:
            first.remove([during])

    items = items_csv(tmp_path, served.candidate_ids[:40])
    refresh_index(model, items, progress=Watched(on_step=remove))
    second, query = load(model), {"history": served.known(3)}
    assert second.manifest["refreshed"]["num_items"] == 40
    after = ranking(second, query)
    assert {mine, gone, new} <= set(after)
    # What is written during the refresh counts.
    assert (during in after, len(after)) == (False, 40)
    assert after[mine] == pytest.approx(ranking(load(model, live=False), query)[mine])
    assert (second.live.titles.get(mine), second.live.titles.get(new)) == (None, "New")
    assert second.titles()[mine] == "Title"
    # Later writes take precedence over the version.
    second.remove([mine])
    assert mine not in ranking(load(model), query)
    # All writes apply to an older version.
    assert gone not in ranking(load(model / "1"), query)


def test_values_are_cleaned_as_those_of_a_log(exported: Exported, tmp_path: Path) -> None:
    for ids, id_, other in (("int", 90_000, 90_001), ("str", " new ", "other")):
        model = Path(shutil.copytree(exported(ids, "exact"), tmp_path / ids))
        retriever = load(model)
        retriever.upsert([item(id_, ["  spaced "], title=float("nan")), item(other, np.nan)])
        assert retriever.live.prepare([item(id_, [" a "]), item(other, np.nan)]).notes == []
        clean = id_.strip() if isinstance(id_, str) else id_
        assert set(ranking(retriever, {}, allowed=[["spaced"]])) == {clean}
        assert retriever.titles().get(clean) is None
    for wrong in ("nan", "None", "  "):
        with pytest.raises(ValueError, match="needs an id"):
            retriever.upsert([item(wrong)])


def test_values_that_are_null_are_not_told_as_unknown(films: Path) -> None:
    retriever = load(films)
    missing: list[Any] = [None, [], [None], ["", None], " ", "|"]
    known = [["a"], ["zydeco", "a"], "a", "zydeco|a"]
    items = [item(90_000 + i, genres) for i, genres in enumerate(missing + known)]
    assert retriever.live.prepare(items).notes == []
    told = retriever.live.prepare([item(90_000, ["zydeco", None])]).notes
    assert told == [
        "genres ['zydeco', None] of item 90000 is unknown to the model: taken as missing"
    ]


def test_a_text_of_several_values_is_split_as_in_a_file(tmp_path: Path) -> None:
    model, read, separator = tmp_path / "films", datetime(2024, 1, 1, tzinfo=UTC), ", "
    exportable = replace(
        make_served("int").exportable(), reading=Reading(list_separator=separator), items_read=read
    )
    export_module.export(exportable, model, index=Exact(), filter_by="genres")
    retriever = load(model)
    assert datetime.fromisoformat(retriever.manifest["items_read"]) == read
    text = separator.join([" a", "", "c "])
    retriever.upsert([item(90_000, text), item(90_001, ["a", "c"]), item(90_002, text[:2])])
    with_both, listed, one = retriever.candidates.vectors_of([90_000, 90_001, 90_002])
    np.testing.assert_array_equal(with_both, listed)
    assert not np.allclose(one, listed)
    for value, ids in {"a": {90_000, 90_001, 90_002}, "c": {90_000, 90_001}}.items():
        assert {x for x in ranking(retriever, {}, allowed=[[value]]) if x >= 90_000} == ids
    # A refresh reads the same texts from a file alike. Neither strips a no-break space.
    kept = f"a\u00a0{separator}c"
    retriever.upsert([item(90_004, kept)])
    rows = f'90003,x,"{text}"\n3,y,b\n90004,x,"{kept}"\n'
    (tmp_path / "items.csv").write_text(f"item_id,title,genres\n{rows}")
    refresh_index(model, tmp_path / "items.csv")
    expected = [listed, *retriever.candidates.vectors_of([90_004])]
    refreshed = load(model).candidates.vectors_of([90_003, 90_004])
    np.testing.assert_allclose(refreshed, expected, atol=1e-6)


def test_only_the_last_write_of_an_item_is_kept(films: Path) -> None:
    retriever, other = load(films), load(films)
    for step in range(60):
        retriever.upsert([item(90_000 + step % 5, ["abc"[step % 3]], title=f"v{step}")])
        other.remove([90_000 + (step + 1) % 5])
    assert len(Store(films).items_after(0)) == 5
    retriever.catch_up()
    for again in (other, load(films)):
        assert ranking(again, {}) == pytest.approx(ranking(retriever, {}), abs=1e-6)
        assert again.live.titles == retriever.live.titles
    assert retriever.live.titles == {90_000 + i: f"v{55 + i}" for i in range(1, 5)}


def refresh(model: Path, ids: Any) -> LoadedRetriever:
    """Makes a version with these items, and loads it as a server would."""
    refresh_index(model, items_csv(model.parent, ids))
    return load(model)


def test_an_item_that_a_table_leaves_out_is_gone(films: Path) -> None:
    model, (changed, gone, other, *rest) = films, make_served("int").candidate_ids.tolist()
    first = load(model)
    first.upsert([item(changed, ["c"]), item(90_000), item(90_001)])
    first.remove([gone])
    # Neither the changed nor the removed item is in the next table; nor are the live ones.
    second = refresh(model, [other, *rest])
    assert set(second.candidate_ids()) == {other, *rest, 90_000, 90_001}
    assert (second.live.titles.get(changed), 90_000 in second.live.titles) == (None, True)
    # A table takes a live item over; the next one leaves it out.
    third = refresh(model, [other, *rest, 90_000])
    assert third.titles()[90_000] == "Title"
    fourth = refresh(model, [other, *rest])
    assert set(fourth.candidate_ids()) == {other, *rest, 90_001}
    # Written anew it is live again, and stays although the next table lacks it.
    fourth.upsert([item(90_000)])
    fourth.remove([90_001])
    fifth = refresh(model, [other, *rest])
    assert set(fifth.candidate_ids()) == {other, *rest, 90_000}
    # All of this is as it was for who goes back to the first version.
    for number in (2, 3, 4, 5):
        shutil.rmtree(model / str(number))
    back = load(model)
    assert set(back.candidate_ids()) == {changed, other, *rest, 90_000}
    expected = first.candidates.vectors_of([changed])
    np.testing.assert_allclose(back.candidates.vectors_of([changed]), expected, atol=1e-6)


def test_old_writes_that_no_version_takes_are_dropped(
    films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, days = make_served("int").candidate_ids.tolist(), 86_400
    now = time.time()
    for age in (31 * days, 29 * days):
        with monkeypatch.context() as patch:
            patch.setattr("tfrs_pipeline.records.live_items.time.time", lambda age=age: now - age)
            first = 0 if age > 30 * days else 1
            written = {id_: item(id_) for id_ in (ids[first], 90_000 + first)}
            Store(films).write_items(written | dict.fromkeys([ids[2 + first], 90_002 + first]))
    load(films)
    left = {row.item_id for row in Store(films).items_after(0)}
    assert left == {ids[1], ids[3], 90_000, 90_001, 90_003}


def test_a_clock_that_is_set_back_undoes_no_write(
    films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The items of a version were read an hour from now, by the clock of the write."""
    earlier = datetime.fromisoformat(load(films).manifest["items_read"]).timestamp() - 3600
    monkeypatch.setattr("tfrs_pipeline.records.live_items.time.time", lambda: earlier)
    removed, changed = make_served("int").candidate_ids[:2].tolist()
    retriever, query = load(films), {"history": [removed]}
    retriever.remove([removed])
    retriever.upsert([item(changed, ["c"])])
    expected = ranking(retriever, query)
    assert removed not in expected
    assert ranking(load(films), query) == pytest.approx(expected)


def test_a_write_on_disk_has_not_failed(
    films: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    retriever = load(films)
    with monkeypatch.context() as patch:
        patch.setattr(retriever.live, "_apply", lambda *arguments: 1 / 0)
        assert retriever.upsert([item(90_100), item(90_101)]) == 2
    assert "on disk, but not in service until the next look" in caplog.text
    assert 90_100 in load(films).candidate_ids()
    retriever.catch_up()
    assert {90_100, 90_101} <= set(retriever.candidate_ids())


@pytest.mark.parametrize("failing", ["write_items", "mark_listed"])
def test_a_failed_write_changes_nothing(
    films: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    retriever, other = load(films), load(films)
    other.upsert([item(90_000)])
    before = None

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Store, failing, fail)
        for act in (
            lambda: retriever.upsert([item(90_001), item(90_000, ["c"])]),
            lambda: retriever.remove([90_000, make_served("int").candidate_ids[0]]),
        ):
            with pytest.raises(StorageError, match=f"{STORE_FILE}: No space"):
                act()
            now = Store(films).items_after(0), sorted(load(films).candidate_ids())
            before = before or now
            assert now == before
            assert sorted(retriever.candidate_ids()) == now[1]
    assert retriever.upsert([item(90_001)]) == 1


def test_a_damaged_file_is_named(films: Path) -> None:
    load(films).upsert([item(90_000)])
    damage(films / STORE_FILE, "emptied")
    with pytest.raises(Damaged, match=f"{STORE_FILE} is damaged"):
        load(films)
    assert load(films, live=False).num_candidates == NUM_CANDIDATES


@pytest.mark.parametrize("served", ["int"], indirect=True)
def test_an_index_of_which_few_or_none_are_left(
    served: Served, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ScaNN refuses to build one of them, and would be asked to at each look."""
    monkeypatch.setattr(candidates_module, "_LEAST_CHANGES", 10)
    retriever, ids = load(model), served.candidate_ids.tolist()
    assert retriever.manifest["index"]["kind"] == "scann"
    retriever.remove(ids[12:])
    until(lambda: not retriever.candidates.has_drifted)
    query = {"history": ids[:1]}
    assert list(ranking(retriever, query)) == list(ranking(load(model, exact=True), query))
    retriever.remove(ids[:12])
    retriever.catch_up()
    assert not retriever.candidates.has_drifted
    assert ranking(retriever, query) == {}
    retriever.upsert([item(id_) for id_ in ids])
    until(lambda: not retriever.candidates.has_drifted)
    assert set(ranking(retriever, query)) == set(ids)
    assert "cannot build the index anew" not in caplog.text


WRONG: dict[str, Any] = {
    "come in a list": {"item_id": 1},
    "is a mapping": [3],
    "lacks 'genres'": [{"item_id": 90_000, "genre": ["a"]}],
    "lacks 'item_id'": [{"genres": ["a"]}],
    "needs an id": [item(-1)],
    "ids are integers": [item("90000")],
    "int64": [item(2**63)],
    "text, a number": [item(90_000, {"a": 1})],
    "list of lists": [item(90_000, [["a"]])],
    "must be finite": [item(90_000, weight=float("inf"))],
    "no valid text": [item(90_000, ["\ud800"])],
    "more than once": [item(90_000), item(90_000)],
    "time zone": [item(90_000, since=datetime(2024, 1, 1))],
}


def test_a_wrong_item_is_refused_and_changes_nothing(films: Path) -> None:
    retriever = load(films)
    for message, wrong in WRONG.items():
        with pytest.raises(ValueError, match=message):
            retriever.upsert([item(90_001), *wrong] if isinstance(wrong, list) else wrong)
    # Each letter of a text would be an id, in a model whose ids are text.
    with pytest.raises(ValueError, match="item_ids must be a list"):
        retriever.remove("5")
    for ids in ([True], [None], ["5"], [1.0], [7, 7]):
        with pytest.raises(ValueError, match=r"id|Item 7 occurs"):
            retriever.remove(ids)
    assert retriever.num_candidates == NUM_CANDIDATES
    assert not (films / STORE_FILE).exists()


def test_values_have_the_kind_of_their_feature() -> None:
    price, since = Numeric.fit("price", [1.0, 2.0]), Timestamp.fit("since", [datetime.now(UTC)])
    text = "2024-01-01T00:00:00Z"
    cases: list[Any] = [(price, [1, 2.5, None], ["1", True, [1.0], [1]])]
    for feature, fine, wrong in [*cases, (since, [text, None], [[text], 1.7e9])]:
        for value in fine:
            _check_kind(feature, 7, value)
        for value in wrong:
            with pytest.raises(ValueError, match=f"'{feature.name}' of item 7 takes one value"):
                _check_kind(feature, 7, value)
    assert _plain("x", np.array([1, 2])) == [1, 2]
    assert _plain("x", datetime(2024, 1, 1, tzinfo=UTC)) == "2024-01-01T00:00:00+00:00"


def send(running: Running, method: str, body: Any, token: str | None = TOKEN) -> Any:
    return running_server.send(running, body, ITEMS, method, token or "")


def test_rest_adds_and_removes_items(writable: Running, caplog: pytest.LogCaptureFixture) -> None:
    def found() -> list[int]:
        asked = {"user_id": [-1], "history": [[]], "exclude": [[]], "k": 80}
        answer = writable.predict(signature_name="retrieve", inputs=asked)["outputs"]
        return [id_ for id_ in answer["candidate_ids"][0] if id_ != -1]

    own = set(found())
    answer = send(writable, "PUT", {"items": [item(90_001), item(90_002, title="<b>Two</b>")]})
    assert (answer.status_code, answer.json()) == (200, {"num_new": 2, "num_items": 62})
    assert set(found()) == own | {90_001, 90_002}
    answer = send(writable, "PUT", item(90_003, genres=["zydeco"])).json()
    told = "genres ['zydeco'] of item 90003 is unknown to the model: taken as missing"
    assert answer == {"num_new": 1, "num_items": 63, "notes": [told]}
    assert send(writable, "DELETE", {"item_ids": [90_001, 5]}).json()["num_removed"] == 1
    assert set(found()) == own | {90_002, 90_003}
    page = writable.get("/page/items?search=two").json()["items"]
    assert {"item_id": 90_002, "title": "<b>Two</b>"} in page
    assert writable.get("/page/items?search=90001").json()["items"] == []
    # A new version, exported without these items, takes them over.
    model, versions = writable.server.versions._path, writable.server.versions
    shutil.copytree(model / "1", model / ".2")
    (model / ".2").rename(model / "2")
    until(lambda: versions.statuses().get(2, ("",))[0] == "AVAILABLE")
    assert set(found()) == own | {90_002, 90_003}
    # Another process writes.
    load(model).upsert([item(90_009)])
    until(lambda: 90_009 in found())


HOSTILE: list[tuple[str, Any, str | None, int]] = [
    *(("PUT", {"items": [item(90_001)]}, x, 401) for x in (None, TOKEN[:-1], f"{TOKEN}0")),
    ("DELETE", {"item_ids": [1]}, "", 401),
    ("POST", {"items": [item(90_001)]}, TOKEN, 405),
    ("GET", b"", TOKEN, 405),
    ("PUT", b'{"items": [{"item_id": 90001, "genres": NaN}]}', TOKEN, 400),
    ("PUT", b'{"items": [{"item_id": 90001, "genres": 1e999}]}', TOKEN, 400),
    ("PUT", b'{"items": [{"item_id": 90001, "genres": [], "more": -Infinity}]}', TOKEN, 400),
    ("DELETE", b'{"item_ids": [NaN]}', TOKEN, 400),
    ("PUT", b"[" * 100_000, TOKEN, 400),
    ("PUT", b'{"items": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", TOKEN, 400),
    ("PUT", b'{"items": [{"item_id": 90001, "genres": "\\ud800"}]}', TOKEN, 400),
    ("PUT", {"items": []}, TOKEN, 400),
    ("PUT", {"items": {}}, TOKEN, 400),
    ("PUT", {"items": [item(90_001)], "more": 1}, TOKEN, 400),
    ("PUT", {"items": [item("90001")]}, TOKEN, 400),
    ("PUT", {"items": [item(90_001, 5.5, item_idx=3), item(90_001)]}, TOKEN, 400),
    ("PUT", {"items": [item(i) for i in range(20_000)]}, TOKEN, 413),
    ("DELETE", {"item_ids": [str(10**40)]}, TOKEN, 400),
    ("DELETE", {"item_ids": [10**40]}, TOKEN, 400),
    ("DELETE", {"items": [1]}, TOKEN, 400),
]


HOSTILE_EVENTS: list[tuple[str, str, Any, str, int]] = [
    ("POST", "/v1/events", event(1, 3), "", 401),
    ("POST", "/v1/events", event(1, 3), f"{TOKEN}0", 401),
    ("DELETE", "/v1/users/102", b"", "", 401),
    ("GET", "/v1/events", b"", TOKEN, 405),
    ("POST", "/v1/users/102", b"", TOKEN, 405),
    ("DELETE", "/v1/users/x", b"", TOKEN, 400),
    ("DELETE", f"/v1/users/{'9' * 5000}", b"", TOKEN, 400),
    ("POST", "/v1/events", {"events": []}, TOKEN, 400),
    ("POST", "/v1/events", {"events": {}}, TOKEN, 400),
    ("POST", "/v1/events", {"events": [[]] * 1000}, TOKEN, 400),
    ("POST", "/v1/events", b"[" * 100_000, TOKEN, 400),
    ("POST", "/v1/events", b'{"events": [{"user_id": 1, "item_id": 2, "time": NaN}]}', TOKEN, 400),
    ("POST", "/v1/events", event(1, 3, time=10**400), TOKEN, 400),
    ("POST", "/v1/events", event(1, 3, time="0" * 5000), TOKEN, 400),
    ("POST", "/v1/events", event(1, 3, request_id=["a"]), TOKEN, 400),
    ("POST", "/v1/events", {"events": [event(1, 3)] * 5000}, TOKEN, 413),
]


def test_hostile_writes_change_nothing(writable: Running, caplog: pytest.LogCaptureFixture) -> None:
    of_items = [(method, ITEMS, *rest) for method, *rest in HOSTILE]
    for method, path, body, token, code in [*of_items, *HOSTILE_EVENTS]:
        answer = running_server.send(writable, body, path, method, token or "")
        assert answer.status_code == code, (method, path, str(body)[:200], answer.text)
        assert answer.json()["error"]
        assert "\n" not in answer.json()["error"]
    with writable.server.versions.use() as version:
        assert version.retriever.num_candidates == NUM_CANDIDATES
    for file in (STORE_FILE, JOURNAL_FILE):
        assert not (writable.server.versions._path / file).exists()
    assert not [x for x in caplog.records if x.levelno >= logging.ERROR]


def test_names_with_odd_characters_stay_what_they_are(writable: Running) -> None:
    odd = ["../../etc", "a\nb", "\x00", "'; drop table", "‮evil", "<script>", "é" * 500]
    body = {"items": [item(90_100 + i, [name], title=name) for i, name in enumerate(odd)]}
    assert send(writable, "PUT", body).json()["num_new"] == len(odd)
    again = load(writable.server.versions._path)
    for i, name in enumerate(odd):
        assert again.live.titles.get(90_100 + i) == name
        assert set(ranking(again, {}, allowed=[[name]])) == {90_100 + i}


def test_without_a_token_nobody_writes(exported: Exported, tmp_path: Path) -> None:
    with Running(exported("int", "exact")) as running:
        assert send(running, "PUT", {"items": [item(90_001)]}).status_code == 403
        answer = running_server.send(running, {"events": [{}]})
        assert (answer.status_code, "--token-file" in answer.text) == (403, True)
    for text in ("short", "a token with a space", "é" * 20):
        (tmp_path / "token").write_text(text)
        with pytest.raises(ValueError, match="16 or more ASCII"):
            Running(exported("int", "exact"), token_file=tmp_path / "token")


def test_a_full_disk_changes_nothing(writable: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "mark_listed", full)
    answer = send(writable, "PUT", {"items": [item(90_001)]})
    assert (answer.status_code, "nothing has changed" in answer.text) == (503, True)
    monkeypatch.undo()
    assert send(writable, "PUT", {"items": [item(90_002)]}).json()["num_items"] == 61


def test_deleted_and_restored_items_are_noticed(writable: Running) -> None:
    versions = writable.server.versions
    model = versions._path

    def num_items() -> int:
        with versions.use() as version:
            return version.retriever.num_candidates

    send(writable, "PUT", {"items": [item(90_001), item(90_002)]})
    copy_database(model / STORE_FILE, model.parent / "backup")
    send(writable, "DELETE", {"item_ids": [90_001, 90_002]})
    for file in model.glob(f"{STORE_FILE}*"):
        file.unlink()
    # Until the next look, a write is refused or goes to the new file.
    answer = send(writable, "PUT", {"items": [item(90_003)]})
    assert answer.status_code in (200, 503), answer.text
    until(lambda: send(writable, "PUT", {"items": [item(90_004)]}).status_code == 200)
    kept = {90_004, *([90_003] if answer.status_code == 200 else [])}
    assert {row.item_id for row in Store(model).items_after(0)} == kept
    assert num_items() == NUM_CANDIDATES + len(kept)
    copy_database(model.parent / "backup", model / STORE_FILE)
    until(lambda: num_items() == NUM_CANDIDATES + 2)
    assert send(writable, "DELETE", {"item_ids": [90_001, 90_004]}).json()["num_removed"] == 1


def test_no_other_version_comes_between_the_vectors_of_a_write_and_the_write(
    writable: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version has other vectors, and comes into use with this lock alone."""
    versions, real, held = writable.server.versions, live_items.LiveItems.prepare, list[bool]()

    def prepare(*arguments: Any) -> Any:
        held.append(versions.writing.locked())
        return real(*arguments)

    monkeypatch.setattr(live_items.LiveItems, "prepare", prepare)
    answer = send(writable, "PUT", {"items": [item(90_001, ["zydeco"])]})
    assert (len(answer.json()["notes"]), held) == (1, [True])
