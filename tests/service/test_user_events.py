"""What users do in service: it counts from the next query on, once, and is gone when deleted."""

import shutil
import string
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pytest

from tests.damage import copy_database
from tests.service.conftest import NUM_CANDIDATES, Served, make_served
from tests.service.running_server import Running, retrieve_user, send, until
from tfrs_pipeline.answers.log_of_service import write_log
from tfrs_pipeline.answers.publish import MANIFEST_FILE
from tfrs_pipeline.answers.retriever import LoadedRetriever, load
from tfrs_pipeline.durable import Damaged, StorageError, read_record, write_record
from tfrs_pipeline.exports import export as export_module
from tfrs_pipeline.records.journal import JOURNAL_FILE, Journal
from tfrs_pipeline.records.live_items import _plain
from tfrs_pipeline.records.recorder import Recorder
from tfrs_pipeline.records.settings import Lately
from tfrs_pipeline.records.user_events import TYPES, Answer, Event, check_events, id_hash
from tfrs_pipeline.search.settings import Exact

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")
K = NUM_CANDIDATES


def event(user: Any, item: Any, type_: str = "click", **more: Any) -> dict[str, Any]:
    return {"user_id": user, "item_id": item, "type": type_, **more}


def new_user(served: Served) -> Any:
    return 999 if served.ids == "int" else "newcomer ☂"


def ranked(ids: np.ndarray, scores: np.ndarray, *_: Any) -> dict[Any, float]:
    pairs = zip(ids[0].tolist(), scores[0].tolist(), strict=True)
    return {id_: score for id_, score in pairs if score > -np.inf}


def by_user(retriever: LoadedRetriever, user: Any) -> dict[Any, float]:
    return ranked(*retriever.retrieve_user([user], K))


def by_history(
    retriever: LoadedRetriever, user: Any, history: list[Any], excluded: Any
) -> dict[Any, float]:
    query = {"user_id": user, "history": history}
    return ranked(*retriever.retrieve([query], K, [list(excluded)]))


def test_a_click_changes_the_next_answer(served: Served, model: Path) -> None:
    retriever, user = load(model, exact=True), served.query_ids[2]
    known = served.known(3)
    unknown = [item for item in served.candidate_ids.tolist() if item not in known]
    first, second, third, seen = unknown[20:24]
    before = by_user(retriever, user)
    assert before == pytest.approx(by_history(retriever, user, known, known), abs=1e-5)
    # The times count, not the order of arrival; a view and a dislike are no clicks.
    start = time.time()
    recorded = [event(user, second, time=start + 9), event(user, first, time=start + 5)]
    recorded += [event(user, third, "dislike"), event(user, seen, "view")]
    assert retriever.record(recorded) == 4
    excluded = {*known, first, second, third}
    after = by_user(retriever, user)
    assert after == pytest.approx(
        by_history(retriever, user, [*known, first, second], excluded), abs=1e-5
    )
    assert after != pytest.approx(
        by_history(retriever, user, [*known, second, first], excluded), abs=1e-5
    )
    assert seen in after
    assert retriever.users.history(user) == [second, first, *known[::-1]]
    # In a batch, beside users without events; and over the signatures that a server answers.
    users = [served.query_ids[4], user, served.query_ids[1]]
    ids, scores, is_known = retriever.retrieve_user(users, K)
    assert is_known.all()
    for line, id_ in enumerate(users):
        single = by_user(retriever, id_)
        assert ranked(ids[line : line + 1], scores[line : line + 1]) == pytest.approx(
            single, abs=1e-5
        )
    is_text = served.ids == "str"
    user_ids = np.array(users, object if is_text else np.int64)
    empty = np.zeros((3, 0), user_ids.dtype)
    request: dict[str, Any] = {"user_id": user_ids, "exclude": empty, "k": np.int32(K)}
    answer = retriever.engine.answer("retrieve_user", request)
    np.testing.assert_array_equal(answer["candidate_ids"], ids)
    assert answer["num_known_items"].tolist() == [8, 6, 2]
    # What the request brings wins.
    mine = ranked(*retriever.retrieve([{"user_id": user, "history": known}], K))
    assert third in mine
    # Another process, and every version of the model, know it.
    shutil.copytree(model / "1", model / "2")
    for path in (model, model / "1"):
        assert by_user(load(path, exact=True), user) == pytest.approx(after, abs=1e-5)
    assert by_user(load(model, exact=True, live=False), user) == pytest.approx(before, abs=1e-5)


def test_a_first_event_makes_a_user_known(served: Served, model: Path) -> None:
    retriever, user, item = load(model, exact=True), new_user(served), served.candidate_ids[7]
    assert not retriever.retrieve_user([user], 1)[2][0]
    assert retriever.record([event(user, item, "view")]) == 1
    assert retriever.retrieve_user([user], 1)[2][0]
    assert item in by_user(retriever, user)
    unknown = 9_999 if served.ids == "int" else "unheard of"
    retriever.record([event(user, unknown), event(user, item)])
    assert by_user(retriever, user) == pytest.approx(
        by_history(retriever, user, [unknown, item], [item]), abs=1e-5
    )


def test_a_repeat_changes_nothing(films: Path) -> None:
    retriever = load(films)
    once = [event(100, 3, event_id="a", time=10), event(100, 3, event_id="b", time=20)]
    assert retriever.record(once) == 2
    assert retriever.record([*once, event(100, 10, event_id="a"), event(100, 3, time=20)]) == 0
    assert retriever.record([event(101, 3, event_id="a")]) == 0  # Nor does it for another user.
    assert retriever.record([event(100, 3, "view", time=20)]) == 1
    assert retriever.record([]) == 0


@pytest.mark.parametrize(
    ("exclude", "left_out"), [("none", {2}), ("clicked", {1, 2}), ("seen", {1, 2, 3})]
)
def test_what_is_left_out_is_as_in_the_evaluation(
    films: Path, exclude: str, left_out: set[int]
) -> None:
    path = films / "1" / MANIFEST_FILE
    manifest = read_record(path)
    files = [file for file in (films / "1").rglob("*") if file.is_file() and file != path]
    write_record(path, manifest | {"exclude": exclude}, files)
    retriever, items = load(films), {1: 10, 2: 17, 3: 24}
    types = {1: "clicked", 2: "disliked", 3: "exposed"}
    retriever.record([event(999, items[n], types[n]) for n in items])
    assert set(items.values()) - set(by_user(retriever, 999)) == {items[n] for n in left_out}


def test_a_log_that_holds_the_events_does_not_count_them_twice(tmp_path: Path) -> None:
    served, end = make_served("int"), datetime(2026, 5, 1, 12, tzinfo=UTC)
    exportable = served.exportable()
    object.__setattr__(exportable, "histories_until", end)
    folder = export_module.export(exportable, tmp_path / "films", index=Exact())
    retriever, user, known = load(folder, exact=True), 102, served.known(3)
    before = by_user(retriever, user)
    # The last click of the stored history, as the log that was written from the events has it.
    retriever.record([event(user, known[-1], time=end), event(user, known[-2], time=0)])
    assert by_user(retriever, user) == pytest.approx(before, abs=1e-5)
    later = end + timedelta(milliseconds=1)
    retriever.record([event(user, 3 + 7 * 50, time=later)])
    assert retriever.users.history(user) == [353, *known[::-1]]


def test_a_clock_ahead_in_the_log_silences_nobody(tmp_path: Path) -> None:
    """A phone that sent its local time as UTC, to the server or in the log."""
    exportable = make_served("int").exportable()
    object.__setattr__(exportable, "histories_until", datetime.now(UTC) + timedelta(hours=14))
    folder = export_module.export(exportable, tmp_path / "films", index=Exact())
    retriever = load(folder, exact=True)
    retriever.record([event(999, 10)])
    assert retriever.users.history(999) == [10]


def test_times_are_read_with_the_events(tmp_path: Path) -> None:
    served = make_served("int", reads_times=True)
    assert served.history_times is not None
    model = export_module.export(served.exportable(), tmp_path / "films", index=Exact()).parent
    retriever, user, now = load(model), served.query_ids[2], 1.9e9 - 1e8
    retriever.users.until = 0
    items = served.candidate_ids[[20, 21]].tolist()
    clicks = [event(user, item, time=now + n) for n, item in enumerate(items)]
    clicks = [{**click, "time": click["time"] - 1e7} for click in clicks]
    assert retriever.record(clicks) == 2
    starts = np.cumsum([0, *map(len, served.clicks)])
    stored = served.history_times[starts[3] : starts[4]][::-1].tolist()
    times = [*stored, *(click["time"] for click in clicks)]
    history = [*served.known(3), *items]
    timed = {"user_id": user, "history": history, "history_timestamps": times}
    ids, scores = retriever.retrieve([timed], K, [history])
    assert by_user(retriever, user) == pytest.approx(ranked(ids, scores), abs=1e-5)
    assert by_user(retriever, user) != pytest.approx(
        by_history(retriever, user, history, history), rel=1e-3
    )


def test_events_of_a_model_with_other_ids_change_nothing(served: Served, model: Path) -> None:
    """Item ids that were numbers are text in the next model of this name, or the reverse."""
    user, others = served.query_ids.tolist()[2], [*range(len(TYPES))]
    if served.ids == "int":
        others = [*map(str, others)]
    before, later = by_user(load(model, exact=True), user), time.time_ns() // 1_000_000 + 1000
    old_events = [
        Event(user, later, other, type_, None, None)
        for other, type_ in zip(others, TYPES.values(), strict=True)
    ]
    Journal(model).write(
        [old_events], [Answer("old", later, 1, np.array([user]), np.array([others]))]
    )
    retriever = load(model, exact=True)
    assert by_user(retriever, user) == pytest.approx(before)
    assert retriever.users.disliked([user]) == [[]]
    with Running(model, record_share=1.0, exclude_served_answers=1) as running:
        outputs = running.predict(**retrieve_user([user], [[]], K))["outputs"]
    assert set(before) == {*outputs["candidate_ids"][0]} - {-1, ""}


def test_a_user_whom_no_event_can_have(films: Path) -> None:
    retriever = load(films, exact=True)
    retriever.record([event(102, 3)])
    beyond = [2**63, -(2**63) - 1]
    assert [retriever.users.history(user) for user in beyond] == [[], []]
    assert retriever.users.disliked(beyond) == [[], []]
    assert retriever.forget(2**63) == 0
    # An id of the other type would delete nothing, and say so in a number alone.
    with pytest.raises(ValueError, match=r"ids are integers\. Received: '102'"):
        retriever.forget("102")
    assert retriever.forget(102) == 1


def test_a_deleted_user_is_gone_from_the_file(tmp_path: Path) -> None:
    journal, rng = Journal(tmp_path), np.random.default_rng(0)
    users = [f"user {n:04} of many" for n in range(400)]
    for _ in range(40):
        events = [
            Event(user, int(rng.integers(10**9)), 7, "clicked", None, None)
            for user in rng.choice(users, 60)
        ]
        journal.write([events])
    reader = Journal(tmp_path)
    assert reader.events_by_user(users)
    deleted = users[::8]
    num_events = sum(map(len, reader.events_by_user(deleted).values()))
    assert num_events == sum(journal.forget(deleted[:20])) + sum(journal.forget(deleted[20:]))
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert [user for user in deleted if user.encode() in content] == []
    assert reader.events_by_user(deleted) == {}
    assert len(reader.events_by_user(users)) > 300
    # An id with spaces around it is that of the user whose events were recorded without them.
    assert journal.forget([10**30, f" {users[1]} ", users[1]])[::2] == [0, 0]
    assert reader.events_by_user(users[1:2]) == {}
    # An answer is recorded with the id that was asked.
    journal.write([], [Answer("r", 1, 1, np.array([" a "], object), np.array([[7]]))])
    assert journal.forget(["a"]) == [0]
    assert journal.forget([" a "]) == [1]


def test_a_deletion_beside_a_long_read_lets_others_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its user is confirmed once the read has ended; one that does not end is an error."""
    tried = threading.Event()

    def pause(seconds: float) -> None:
        tried.set()
        threading.Event().wait(seconds)

    Journal(tmp_path).write([[Event(n, n, 7, "clicked", None, None) for n in range(9)]])
    monkeypatch.setattr("tfrs_pipeline.records.journal.time.sleep", pause)
    monkeypatch.setattr("tfrs_pipeline.records.database.BUSY_SECONDS", 1)
    with ThreadPoolExecutor() as threads:
        read = Journal(tmp_path).log(2)
        next(read)
        deletion = threads.submit(Journal(tmp_path).forget, [3])
        assert tried.wait(5)
        assert Journal(tmp_path).write([[Event(4, 99, 7, "clicked", None, None)]]) == [1]
        assert not deletion.done()
        assert len([*read]) == 4
        assert deletion.result(5) == [1]
    monkeypatch.setattr("tfrs_pipeline.records.journal._MAX_CUTS", 2)
    read = Journal(tmp_path).log(2)
    next(read)
    with pytest.raises(StorageError, match="is being read and may hold events: delete again"):
        Journal(tmp_path).forget([4])


def test_the_file_may_be_deleted_restored_or_damaged(films: Path, tmp_path: Path) -> None:
    retriever, path = load(films), films / JOURNAL_FILE
    retriever.record([event(999, 10)])
    copy_database(path, tmp_path / "backup")
    retriever.record([event(999, 17)])
    assert retriever.users.history(999) == [17, 10]
    copy_database(tmp_path / "backup", path)
    assert retriever.users.history(999) == [10]
    path.unlink()
    assert retriever.users.history(999) == []
    assert retriever.record([event(999, 24)]) == 1
    assert retriever.users.history(999) == [24]
    path.write_bytes(b"no database" * 100)
    with pytest.raises(Damaged, match=rf"{JOURNAL_FILE} is damaged.* its events are then lost"):
        load(films).users.history(999)


def test_a_file_of_another_version_is_named(films: Path, tmp_path: Path) -> None:
    uses: dict[str, Callable[[Journal], object]] = {
        "ALTER TABLE events DROP COLUMN arrival": lambda journal: journal.events_by_user([7]),
        "DROP TABLE served": lambda journal: [*journal.log(10)],
        "PRAGMA application_id = 9": lambda journal: journal.write([[first]]),
        "PRAGMA application_id = 0": lambda journal: journal.write([[first]]),
    }
    first = Event(7, 1, 10, "clicked", None, None)
    for change, use in uses.items():
        Journal(films).path.unlink(missing_ok=True)
        journal = Journal(films)
        journal.write([[first]])
        with journal.writing() as connection:
            connection.execute(change)
        before = journal.path.read_bytes()
        with pytest.raises(Damaged) as caught:
            use(Journal(films))
        message = str(caught.value)
        assert f"{JOURNAL_FILE} is damaged, or of another version of this package (" in message
        assert "use that version, or move it away" in message
        assert "\n" not in message
        assert journal.path.read_bytes() == before
    with pytest.raises(Damaged, match="of another version"):
        Running(films, takes_writes=True)
    # The last one can still be read, so no event is lost on the way to a new file.
    assert 10 not in by_user(load(films), 7)
    assert write_log(films, tmp_path / "log.parquet") == 1


def stored_ids(journal: Journal) -> tuple[list[Any], list[Any]]:
    """Returns the ids in the events, and in the table that tells repeats."""
    with journal.writing() as sql:
        queries = (
            "SELECT event_id FROM events WHERE event_id IS NOT NULL",
            "SELECT id FROM event_ids",
        )
        in_events, in_table = (sorted(sql.execute(query).fetchall()) for query in queries)
    return in_events, in_table


@pytest.mark.parametrize("seed", range(3))
def test_ids_live_as_long_as_their_events(tmp_path: Path, seed: int) -> None:
    """Writes, deletions and drops by a second route: a set of ids, and one of keys."""
    journal, rng = Journal(tmp_path), np.random.default_rng(seed)
    held: dict[tuple[Any, ...], str | None] = {}
    for _ in range(12):
        groups: list[list[dict[str, Any]]] = [[], []]
        expected = [0, 0]
        for number in rng.integers(2, size=30).tolist():
            user, item, time_ = rng.integers([1, 1, 1], [5, 4, 9]).tolist()
            id_ = None if rng.random() < 0.3 else f"id {rng.integers(60)}"
            groups[number].append(event(user, item, time=time_, event_id=id_))
        for number, group in enumerate(groups):
            for line in group:
                key = line["user_id"], line["item_id"], line["time"]
                if key not in held and line["event_id"] not in {*held.values()} - {None}:
                    held[key] = line["event_id"]
                    expected[number] += 1
        types: dict[str, Any] = {"users_are_text": False, "items_are_text": False}
        assert journal.write([check_events(group, **types) for group in groups]) == expected
        if rng.random() < 0.4:
            users = rng.integers(1, 5, 2).tolist()
            gone = [{key for key in held if key[0] == user} for user in users]
            counts = [len(gone[0]), len(gone[1] - gone[0])]
            assert journal.forget(users) == counts
            held = {key: id_ for key, id_ in held.items() if key[0] not in users}
        if rng.random() < 0.3:
            end = int(rng.integers(1, 6))
            assert journal.drop_older(1000 * end)[0] == sum(key[2] < end for key in held)
            held = {key: id_ for key, id_ in held.items() if key[2] >= end}
        ids = sorted((id_hash(id_),) for id_ in held.values() if id_ is not None)
        assert stored_ids(journal) == (ids, ids)


def test_ids_of_events_keep_the_file_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = [str(uuid.UUID(bytes=rng.bytes(16))) for _ in range(20_000)]
    events = [event(n % 500, n % 90, time=1e9 + n, event_id=id_) for n, id_ in enumerate(ids)]
    journal = Journal(tmp_path)
    journal.write([check_events(events, users_are_text=False, items_are_text=False)])
    with journal.writing() as sql:
        ((num_bytes,),) = sql.execute(
            "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
        )
    assert num_bytes / len(ids) < 80
    # Kept in files, so it must not change; and the largest fit into SQLite's integers.
    assert id_hash("a") == 4681665781835383343
    hashes = [*map(id_hash, ids)]
    assert len({*hashes}) == len(ids)
    assert -(2**63) <= min(hashes) < -(2**62) < 2**62 < max(hashes) < 2**63


def test_clocks_that_run_backwards_and_ahead(films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, clock = time.time(), time.time_ns
    retriever = load(films)
    # A client's clock: the times count, whatever the order of arrival.
    times = [(now + 60, 3), (now + 30, 10), (now + 3600, 17), (now - 3 * 10**8, 24)]
    for time_, item in times:
        assert retriever.record([event(999, item, time=time_)]) == 1
    assert retriever.users.history(999) == [17, 3, 10]
    answer = retriever.retrieve_user([999], K)[0][0].tolist()
    assert not set(answer) & {item for _, item in times}
    with pytest.raises(ValueError, match="more than a day from now"):
        retriever.record([event(999, 4, time=now + 2 * 86_400)])
    # The server's clock, which was ahead by an hour and is set back: what came in meanwhile is the
    # newest for an hour.
    monkeypatch.setattr(time, "time_ns", lambda: clock() + 3600 * 10**9)
    assert retriever.record([event(998, 3)]) == 1
    monkeypatch.undo()
    assert retriever.record([event(998, 10)]) == 1
    assert retriever.users.history(998) == [3, 10]
    assert set(retriever.retrieve_user([998], K)[0][0].tolist()) & {3, 10} == set()


def test_an_event_counts_once_its_item_is_known(films: Path) -> None:
    retriever = load(films)
    assert retriever.record([event(999, 90_000), event(998, 90_001, "dislike")]) == 2
    names = [feature.name for feature in retriever.features["candidate"]]
    names += [] if retriever.item_filter is None else [retriever.item_filter["name"]]
    new = [{**dict.fromkeys(names), "item_id": id_} for id_ in (90_000, 90_001)]
    assert retriever.upsert(new) == 2
    answers = retriever.retrieve_user([999, 998, 997], K + 2)[0]
    found = [{90_000, 90_001} & {*answer} for answer in answers.tolist()]
    assert found == [{90_001}, {90_000}, {90_000, 90_001}]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"time": 1e12}, "time: is more than a day from now; give seconds"),
    ({"time": -1}, "time: takes seconds since 1970"),
    ({"time": float("nan")}, "time: takes seconds"),
    ({"time": True}, "time: takes seconds"),
    ({"time": "2026-01-01T00:00"}, "time: it has no zone"),
    ({"time": "2026-01-01T00:00Z\0"}, "time: Invalid isoformat string"),
    ({"time": datetime(2026, 1, 1)}, "time: needs a time zone"),
    ({"type": "buy"}, "type: must be one of click, view, dislike"),
    ({"user_id": "7"}, "user_id: Input should be a valid integer"),
    ({"user_id": -1}, "user_id: is not an id"),
    ({"item_id": 2**63}, "item_id: Input should be less than"),
    ({"item_id": None}, "item_id: Input should be a valid integer"),
    ({"item": 7}, "unknown 'item'; the keys are user_id, time, item_id"),
    ({"event_id": ""}, "event_id: String should have at least 1"),
    ({"request_id": "x" * 201}, "request_id: String should have at most 200"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_event_is_refused(change: dict[str, Any], message: str) -> None:
    types: dict[str, Any] = {"users_are_text": False, "items_are_text": False}
    with pytest.raises(ValueError, match=f"Event 1: {message}"):
        check_events([event(1, 2), event(1, 2) | change], **types)
    with pytest.raises(ValueError, match="Event 0 must be an object"):
        check_events([[1]], **types)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="in a list, also a single one"):
        check_events(event(1, 2), **types)  # type: ignore[arg-type]


def test_only_the_space_that_a_log_strips_is_stripped() -> None:
    spaces = [*string.whitespace, "\x1f", "\x85", "\xa0", "\u2007", "\u3000"]
    ids = [f"{space}Zo{space}ë{space}" for space in spaces]
    expected = ibis.memtable({"id": ids})["id"].strip().to_pyarrow().to_pylist()
    events = check_events(
        [event(id_, id_) for id_ in ids], users_are_text=True, items_are_text=True
    )
    assert [event.user_id for event in events] == expected
    assert [event.item_id for event in events] == expected
    assert [_plain("An id", id_) for id_ in ids] == expected


def test_times_are_exact_to_a_millisecond() -> None:
    types: dict[str, Any] = {"users_are_text": True, "items_are_text": False}
    when = datetime(2026, 5, 1, 12, 30, 15, 123_000, UTC)
    times = [when, when.isoformat(), when.timestamp(), np.float64(when.timestamp())]
    times += [np.int64(int(when.timestamp())) + 0.123]
    events = check_events([event(" a ", np.int64(2), time=time_) for time_ in times], **types)
    assert {checked.time for checked in events} == {1_777_638_615_123}
    assert events[0][:1] == ("a",)
    assert check_events([event("a", 2, time=0)], **types)[0].time == 0
    assert abs(check_events([event("a", 2, time=None)], **types)[0].time - 1000 * time.time()) < 1e4


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    unfit: Any = object()
    groups = [[Event(7, 1, 10, "clicked", None, None)], [Event(7, 2, unfit, "clicked", None, None)]]
    with pytest.raises(Damaged, match="not supported"):
        Journal(tmp_path).write(groups)
    assert Journal(tmp_path).events_by_user([7]) == {}


def test_what_comes_together_is_written_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, real, sizes = Recorder(Journal(tmp_path)), Journal.write, list[int]()

    def write(self: Journal, groups: Any, answers: Any) -> list[int]:
        sizes.append(len(groups))
        time.sleep(0.1)
        return real(self, groups, answers)

    monkeypatch.setattr(Journal, "write", write)
    events = [Event("u", n // 2, 7, "clicked", None, None) for n in range(41)]
    waiting = [recorder.submit([single]) for single in events]
    # Each client gets the number of its new events: of two alike, the first is new.
    assert [future.result(5) for future in waiting] == [1, 0] * 20 + [1]
    assert len(sizes) <= 3
    monkeypatch.setattr(Journal, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        recorder.submit(events).result(5)
    monkeypatch.undo()
    # A client that leaves does not take the thread with it.
    left = recorder.submit([events[0]._replace(time=98)])
    assert not left.cancel()
    assert recorder.submit([events[0]._replace(time=99)]).result(5) == 1
    assert left.result() == 1


def test_users_deleted_together_share_a_rewrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is confirmed before it. Meanwhile no answer shows the users, and no query waits."""
    journal, real, rewrites = Journal(tmp_path), Journal._rewrite, list[int]()
    events = [Event(n % 9, n, 7, "clicked", None, n) for n in range(90)]
    journal.write([events])
    recorder, started, goes_on = Recorder(journal), threading.Event(), threading.Event()

    def rewrite(self: Journal) -> None:
        rewrites.append(1)
        with self._opened():
            started.set()
            assert goes_on.wait(10)
        real(self)

    monkeypatch.setattr(Journal, "_rewrite", rewrite)
    first = recorder.forget(0)
    assert started.wait(5)
    later = [recorder.forget(user) for user in (1, 2, 3, 2)]
    late = recorder.submit([Event(0, 999, 7, "clicked", None, None)])
    assert recorder.served_lately([0], Lately(answers=2), 9) == [[]]
    assert [*Journal(tmp_path).events_by_user(range(9))] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not any(future.done() for future in (first, *later, late))
    goes_on.set()
    assert first.result(5) == 10
    assert [future.result(5) for future in later] == [10, 10, 10, 0]
    assert (late.result(5), len(rewrites)) == (1, 2)
    assert [*Journal(tmp_path).events_by_user(range(9))] == [0, 4, 5, 6, 7, 8]
    # A rewrite that fails confirms nobody; the next one rewrites for them too.
    monkeypatch.setattr(Journal, "_rewrite", lambda _: (_ for _ in ()).throw(StorageError("full")))
    failed = [recorder.forget(4), recorder.forget(5)]
    for future in failed:
        with pytest.raises(StorageError, match="full"):
            future.result(5)
    monkeypatch.setattr(Journal, "_rewrite", real)
    assert recorder.forget(4).result(5) == 0
    assert [*Journal(tmp_path).events_by_user(range(9))] == [0, 6, 7, 8]


def ids_of(running: Running, user: int) -> list[int]:
    return running.predict(**retrieve_user([user], [[]], 60))["outputs"]["candidate_ids"][0]


def test_rest_takes_events_and_deletes_users(writable: Running) -> None:
    before = ids_of(writable, 102)
    items = before[:3]
    body = {"events": [event(102, items[0]), event(102, items[1], "dislike", event_id="x")]}
    answer = send(writable, body)
    assert (answer.status_code, answer.json()) == (200, {"num_new": 2, "num_unknown_items": 0})
    after = ids_of(writable, 102)
    assert set(before) - set(after) - {-1} == set(items[:2])
    assert send(writable, body["events"][1]).json()["num_new"] == 0
    assert send(writable, event(999, 10**6)).json() == {"num_new": 1, "num_unknown_items": 1}
    rows = writable.predict(instances=[102, 999, 998])["predictions"]
    assert [row["is_known_user"] for row in rows] == [True, True, False]
    assert not set(rows[0]["candidate_ids"]) & set(items[:2])
    # The page shows the history until now.
    page = writable.post("/page/query", json={"user_id": 102, "k": 3}).json()
    assert page["history"]["items"][0]["item_id"] == items[0]
    # A new version keeps them.
    model, versions = writable.server.versions._path, writable.server.versions
    shutil.copytree(model / "1", model / ".2")
    (model / ".2").rename(model / "2")
    until(lambda: versions.statuses().get(2, ("",))[0] == "AVAILABLE")
    assert ids_of(writable, 102) == after
    assert send(writable, b"", "/v1/users/102", "DELETE").json() == {"num_deleted": 2}
    assert ids_of(writable, 102) == before
    assert send(writable, b"", "/v1/users/102", "DELETE").json() == {"num_deleted": 0}


def test_a_link_that_is_set_anew_takes_events_where_they_are_read(
    int_folder: Path, tmp_path: Path
) -> None:
    first, second = (
        Path(shutil.copytree(int_folder / "1", tmp_path / name / number)).parent
        for name, number in (("green", "1"), ("blue", "2"))
    )
    link = tmp_path / "films"
    link.symlink_to(first)
    with Running(link, takes_writes=True) as running:
        before = ids_of(running, 102)
        assert send(running, event(102, before[0])).status_code == 200
        link.unlink()
        link.symlink_to(second)
        until(lambda: running.get("/readyz").text.endswith("version 2\n"))
        assert ids_of(running, 102) == before
        assert send(running, event(102, before[1])).status_code == 200
        assert set(before) - set(ids_of(running, 102)) == {before[1]}


def test_a_full_disk_confirms_nothing(writable: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise StorageError("events.sqlite: No space left on device.")

    monkeypatch.setattr(Journal, "write", full)
    answer = send(writable, event(102, 3))
    assert (answer.status_code, "nothing has changed" in answer.text) == (503, True)
    monkeypatch.undo()
    assert send(writable, event(102, 3)).json()["num_new"] == 1
    # A deletion that fails may have deleted rows, whose copies are still in the file.
    monkeypatch.setattr(Journal, "forget", full)
    answer = send(writable, b"", "/v1/users/102", "DELETE")
    assert (answer.status_code, "delete the user again" in answer.text) == (503, True)
    assert "nothing has changed" not in answer.text
