"""Answers that can be traced, and the log that they and the events make."""

import base64
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.service.running_server import (
    PREDICT,
    Running,
    off_the_event_loop,
    retrieve_user,
    send,
    until,
)
from tests.service.test_user_events import event
from tfrs_pipeline import ConfigError, Log, Reading, load, write_log
from tfrs_pipeline.answers import log_of_service
from tfrs_pipeline.durable import StorageError
from tfrs_pipeline.records import journal as journal_module
from tfrs_pipeline.records import recorder as recorder_module
from tfrs_pipeline.records.journal import JOURNAL_FILE, Journal
from tfrs_pipeline.records.recorder import Recorder
from tfrs_pipeline.records.settings import Lately
from tfrs_pipeline.records.user_events import Answer, Event
from tfrs_pipeline.service import server as server_module
from tfrs_pipeline.service.settings import ServeSettings


def answer(id_: str, users: list[Any], items: list[list[Any]], time: int = 5) -> Answer:
    arrays = (np.array(x, object if isinstance(users[0], str) else int) for x in (users, items))
    return Answer(id_, time, 3, *arrays)


def served(journal: Journal) -> list[tuple[Any, ...]]:
    query = "SELECT request_id, user_id, time, version, items FROM served"
    with journal.writing() as connection:
        return connection.execute(query).fetchall()


def test_an_answer_is_kept_as_it_was_served(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    answers = [
        answer("one", [7], [[30, 10, 20, -1]]),
        answer("two", [8, -1, 9], [[1, 2], [3, 4], [5, -1]]),
        answer("text", ["Zoë"], [["fé", ""]]),
        answer("texts", ["Ann", ""], [["a", ""], ["b", ""]]),
    ]
    assert journal.write([], answers) == []
    rows = {id_: (user, version, items) for id_, user, _, version, items in served(journal)}
    assert rows == {
        "one": (7, 3, "[30, 10, 20]"),
        "two.0": (8, 3, "[1, 2]"),
        "two.2": (9, 3, "[5]"),
        "text": ("Zoë", 3, '["f\\u00e9"]'),
        "texts.0": ("Ann", 3, '["a"]'),
    }
    assert journal.forget([7]) == [1]
    assert "one" not in {row[0] for row in served(journal)}


def test_answers_wait_for_others_and_never_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "_ANSWER_SECONDS", 0.2)
    recorder = Recorder(Journal(tmp_path))
    for n in range(20):
        assert recorder.keep(answer(f"a{n}", [n], [[1]]))
    assert not (tmp_path / JOURNAL_FILE).exists()
    until(lambda: (tmp_path / JOURNAL_FILE).exists() and len(served(Journal(tmp_path))) == 20)
    # An event takes them along; a stop writes what is left.
    monkeypatch.setattr(recorder_module, "_ANSWER_SECONDS", 60.0)
    recorder.keep(answer("b", [1], [[1]]))
    assert recorder.submit([Event(1, 1, 1, "clicked", None, None)]).result(5) == 1
    assert len(served(Journal(tmp_path))) == 21
    recorder.keep(answer("c", [1], [[1]]))
    # A deletion also takes what waits.
    recorder.keep(answer("d", [77], [[1]]))
    assert recorder.forget(77).result(5) == 1
    recorder.close()
    assert len(served(Journal(tmp_path))) == 22
    # Too many for the disk are dropped, and a full disk drops them too.
    recorder = Recorder(Journal(tmp_path))
    monkeypatch.setattr(recorder_module, "_MAX_WAITING", 0)
    assert not recorder.keep(answer("d", [1], [[1]]))
    monkeypatch.undo()
    monkeypatch.setattr(Journal, "write", lambda *_: (_ for _ in ()).throw(StorageError("full")))
    assert recorder.keep(answer("e", [1], [[1]]))
    recorder.close()
    monkeypatch.undo()
    assert len(served(Journal(tmp_path))) == 22


@pytest.fixture
def running(films: Path) -> Iterator[Running]:
    with Running(films, takes_writes=True, record_share=1) as running:
        yield running


def ask(running: Running, body: Any, request_id: str | None = None) -> Any:
    headers = {} if request_id is None else {"X-Request-ID": request_id}
    return running.post(PREDICT, json=body, headers=headers)


def test_the_log_holds_what_was_served_and_done(running: Running, tmp_path: Path) -> None:
    response = ask(running, retrieve_user([102], [[]], 6), "mine")
    assert response.headers["x-request-id"] == "mine"
    assert response.headers["x-model-version"] == "1"
    items = response.json()["outputs"]["candidate_ids"][0]
    new_id = ask(running, {"inputs": [103, 104]}).headers["x-request-id"]
    assert new_id != ask(running, retrieve_user([-1], [[]], 6)).headers["x-request-id"]
    assert ask(running, retrieve_user([102], [[]], 6), "x" * 201).status_code == 400
    ask(running, {"signature_name": "embed_user", "inputs": {"user_id": [102]}}, "embedded")
    types = {1: ["view", "click"], 2: ["view"], 3: ["pre_ranked"], 4: ["dislike"]}
    start = time.time()
    events = [
        event(102, items[n], type_, request_id="mine", time=start + 10 * position)
        for n, item_types in types.items()
        for position, type_ in enumerate(item_types)
    ]
    alone = [event(102, items[0], type_, time=start + 60) for type_ in ("view", "click")]
    assert send(running, {"events": [*events, *alone]}).json()["num_new"] == 7
    model = running.server.versions._path
    num_rows = write_log(model, tmp_path / "log.parquet")
    table = pq.read_table(tmp_path / "log.parquet")
    rows = table.to_pylist()
    assert num_rows == len(rows) == 6 + 2 * 60 - 6 - 8 + 1
    assert [row["timestamp"] for row in rows] == sorted(row["timestamp"] for row in rows)
    mine = {row["item_id"]: row for row in rows if row["request_id"] == "mine"}
    stages = ["retrieved", "clicked", "exposed", "pre_ranked", "disliked", "retrieved"]
    assert [mine[item]["stage"] for item in items] == stages
    assert [mine[item]["rank"] for item in items] == [1, 2, 3, 4, 5, 6]
    clicked = mine[items[1]]["timestamp"].timestamp()
    assert clicked == pytest.approx(start + 10, abs=1e-3)
    (row,) = (row for row in rows if row["request_id"] is None)
    assert (row["item_id"], row["stage"], row["rank"]) == (items[0], "clicked", None)
    others = [row for row in rows if row["request_id"] in (f"{new_id}.0", f"{new_id}.1")]
    assert {row["user_id"] for row in others} == {103, 104}
    assert {row["stage"] for row in others} == {"retrieved"}
    # It can be read as a log without any settings.
    log = Log.from_files(tmp_path / "log.parquet")
    counts = log.events.group_by("stage").agg(num=log.events.count()).to_pyarrow().to_pylist()
    assert {row["stage"]: row["num"] for row in counts}["clicked"] == 2
    assert log.events.count().to_pyarrow().as_py() == num_rows


def served_ids(running: Running, **more: Any) -> list[int]:
    response = running.post(PREDICT, json=retrieve_user([102], [[]], 5) | more)
    assert response.status_code == 200, response.text
    return response.json()["outputs"]["candidate_ids"][0]


def test_what_was_served_lately_is_left_out(films: Path) -> None:
    best = load(films).retrieve_user([102], 60)[0][0].tolist()
    lately: dict[str, Any] = {"record_share": 1, "exclude_served_answers": 2}
    with Running(films, **lately) as running:
        assert [served_ids(running) for _ in range(3)] == [best[:5], best[5:10], best[10:15]]
        # Two answers are left out, not three; and a request has the last word.
        assert served_ids(running) == best[:5]
        assert served_ids(running, exclude_served={"answers": 0}) == best[:5]
        assert served_ids(running, exclude_served={"hours": 0.5}) == best[15:20]
        # Several users in a call, each by their own answers, and what the request excludes.
        body = retrieve_user([103, 102, 999], [[-1], [best[20]], [-1]], 5)
        other = load(films).retrieve_user([103, 999], 60)[0].tolist()
        outputs = running.predict(**body, exclude_served={"hours": 1})["outputs"]
        assert outputs["candidate_ids"] == [other[0][:5], best[21:26], other[1][:5]]
        # A signature without `exclude` as an input, and a user of no id.
        body = {"inputs": [103], "exclude_served": {"answers": 1}}
        rest = [item for item in other[0][5:] if item != -1]
        assert running.predict(**body)["outputs"]["candidate_ids"][0][: len(rest)] == rest
        alike = [
            running.predict(**retrieve_user([-1], [[]], 5), exclude_served={"hours": 1})
            for _ in range(2)
        ]
        assert alike[0] == alike[1]
        # Answers that are on disk, and are older than an hour, or of another user.
        journal = Journal(films)
        past = round(1000 * (time.time() - 5400))
        journal.write([], [answer("old", [102], [best[30:33]], past)])
        journal.write([], [answer("of another", [100], [best[26:]], past)])
        assert served_ids(running, exclude_served={"hours": 1}) == [best[20], *best[26:30]]
        assert served_ids(running, exclude_served={"hours": 2}) == best[33:38]
    # A server that starts later, like another one of the folder, reads what this one recorded.
    with Running(films, **lately) as running:
        assert served_ids(running, exclude_served={"hours": 2}) == best[38:43]
        assert served_ids(running, exclude_served={"answers": 1}) == best[:5]
        wrong: list[Any] = [
            {"answers": -1},
            {"answer": 3},
            [3],
            3,
            {"answers": 1001},
            {"hours": -1},
        ]
        wrong += [{"answers": "2"}, {"answers": True}, {"hours": ""}]
        for value in wrong:
            response = running.post(
                PREDICT, json=retrieve_user([1], [[]], 5) | {"exclude_served": value}
            )
            assert (response.status_code, "exclude_served" in response.text) == (400, True), value
        # Those that cannot leave anything out say so.
        for name, inputs, missing in (
            ("similar", {"item_id": [best[0]], "exclude": [[]], "k": 3}, "user_id"),
            ("embed_user", {"user_id": [102]}, "exclude"),
        ):
            body = {"signature_name": name, "inputs": inputs, "exclude_served": {"answers": 1}}
            response = running.post(PREDICT, json=body)
            told = f"exclude_served: '{name}' has no input '{missing}'"
            assert (response.status_code, told in response.text) == (400, True)


def test_an_answer_that_waits_to_be_written_counts_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    recorder, lately = Recorder(journal), Lately(answers=2)
    journal.write([], [answer("a", [7], [[1, 2]], 10), answer("b", [7], [[3]], 20)])
    recorder.keep(answer("b", [7], [[3]], 20))
    assert recorder.served_lately([7], lately, 9) == [[3, 1, 2]]
    recorder.keep(answer("c", [7, 8], [[4, -1], [5, 6]], 30))
    assert recorder.served_lately([7, 8, 9], lately, 9) == [[4, 3], [5, 6], []]
    recorder.close()
    assert recorder.served_lately([7, 8, 9], lately, 9) == [[4, 3], [5, 6], []]
    assert recorder._waiting == {}


def test_each_answer_of_a_request_id_is_recorded(films: Path, tmp_path: Path) -> None:
    """Proxies send one id of a trace with several calls, also for several users."""
    body, other = retrieve_user([102], [[]], 5), retrieve_user([103], [[]], 5)
    with Running(films, takes_writes=True, record_share=1, exclude_served_answers=1) as running:
        lists = [
            ask(running, request, "trace").json()["outputs"]["candidate_ids"][0]
            for request in (body, other, body, other, body)
        ]
        assert not {*lists[0]} & {*lists[2]}
        assert not {*lists[1]} & {*lists[3]}
        # The rule leaves out the last answer alone, so the first one comes again.
        assert lists[4] == lists[0]
        click = event(102, lists[0][2], request_id="trace", time=time.time() + 9)
        assert send(running, click).status_code == 200
    write_log(films, tmp_path / "log.parquet")
    rows = pq.read_table(tmp_path / "log.parquet").to_pylist()
    assert {row["request_id"] for row in rows} == {"trace"}
    for user, answers in ((102, lists[::2]), (103, lists[1::2])):
        counted = [(row["item_id"], row["rank"]) for row in rows if row["user_id"] == user]
        expected = [(id_, n) for answer_ in answers for n, id_ in enumerate(answer_, 1)]
        assert sorted(counted) == sorted(expected)
    # The click is that of one answer, the last that had the item.
    clicked = [row for row in rows if row["stage"] == "clicked"]
    assert [(row["user_id"], row["item_id"], row["rank"]) for row in clicked] == [
        (102, lists[0][2], 3)
    ]


def test_served_lately_goes_by_arrival_and_not_by_the_clock(
    films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, wall = time.time_ns, time.time
    with Running(films, record_share=1, exclude_served_answers=1) as running:
        monkeypatch.setattr(time, "time_ns", lambda: clock() + 3600 * 10**9)
        monkeypatch.setattr(time, "time", lambda: wall() + 3600)
        lists = [served_ids(running)]
        monkeypatch.undo()  # Set back by an hour.
        lists += [served_ids(running)]
        until(lambda: running.server.recorder._waiting == {})
        lists += [served_ids(running) for _ in range(3)]
    assert lists[0] == lists[2] == lists[4]
    assert lists[1] == lists[3]
    assert not {*lists[0]} & {*lists[1]}


def test_what_is_left_out_has_a_bound_known_before(tmp_path: Path) -> None:
    """By a second route: a loop over the answers, newest first."""
    recorder, lately = Recorder(Journal(tmp_path)), Lately(answers=1000)
    rng, lists = np.random.default_rng(0), []
    for n in range(60):  # The last ten wait to be written.
        lists.append(rng.permutation(400)[: rng.integers(1, 150)].tolist())
        if n < 50:
            recorder.journal.write([], [answer("same", [7], [lists[-1]], 5)])
        else:
            recorder.keep(answer(f"{n}", [7], [lists[-1]], 5))
    for most in (1, 50, 700, 2000):
        read: list[int] = []
        for ids in reversed(lists):
            if len(read) < most:
                read += ids[:100]
        expected = [*dict.fromkeys(read)][:most]
        assert recorder.served_lately([7, 7, 8], lately, most) == [expected, expected, []]
    recorder.close()


def test_reading_stops_and_a_user_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, parsed, real = Journal(tmp_path), list[int](), journal_module.json.loads
    journal.write([], [answer(f"{n}", [7], [[*range(1600)]], n) for n in range(100)])

    def loads(text: str) -> Any:
        parsed.append(1)
        return real(text)

    monkeypatch.setattr(journal_module.json, "loads", loads)
    recorder = Recorder(journal)
    served = recorder.served_lately([7] * 10, Lately(answers=1000), 2000)
    assert served == [[*range(100)]] * 10
    assert len(parsed) <= 2000 / 100 + 1
    recorder.close()


def test_one_huge_answer_leaves_items_for_the_next(films: Path) -> None:
    with Running(films, record_share=1, exclude_served_answers=3) as running:
        for _ in range(3):
            ask(running, retrieve_user([102], [[]], 60))
        ids = served_ids(running)
        assert len({*ids} - {-1}) == 5
        # And what is left out is no longer than --max-exclude.
    with Running(films, record_share=1, max_exclude=4) as running:
        best = served_ids(running, exclude_served={"answers": 0})
        assert served_ids(running, exclude_served={"answers": 1})[0] == best[4]


def test_much_to_leave_out_does_not_run_among_the_small(
    films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off_the_event_loop(monkeypatch)
    journal, ran = Journal(films), list[str]()
    for user, num in ((102, 1), (103, 40)):
        items = [[*range(100 * n, 100 * n + 100)] for n in range(num)]
        journal.write([], [answer(f"{n}", [user], [ids]) for n, ids in enumerate(items)])
    real = server_module._answer

    def noted(*arguments: Any) -> Any:
        ran.append(threading.current_thread().name.rpartition("_")[0])
        return real(*arguments)

    monkeypatch.setattr(server_module, "_answer", noted)
    with Running(films, record_share=1) as running:
        for user in (102, 103):
            body = retrieve_user([user], [[]], 5) | {"exclude_served": {"answers": 1000}}
            assert ask(running, body).status_code == 200
    assert ran == ["requests", "large-requests"]


def test_ids_without_end_are_refused_wherever_they_come(exported: Any, tmp_path: Path) -> None:
    model = Path(shutil.copytree(exported("str", "exact"), tmp_path / "films"))
    long, edge = "é" * 1001, "é" * 1000
    with Running(model, takes_writes=True, record_share=1) as running:

        def codes(id_: str) -> list[int]:
            bodies = [
                retrieve_user([id_], [[]], 5),
                retrieve_user(["x"], [[id_]], 5),
                {
                    "signature_name": "retrieve",
                    "inputs": {"user_id": [""], "history": [[id_]], "exclude": [[]], "k": 5},
                },
                {"inputs": [{"b64": base64.b64encode(id_.encode()).decode()}]},
            ]
            responses = [ask(running, body) for body in bodies]
            responses += [send(running, event(id_, "x")), send(running, event("x", id_))]
            responses += [send(running, b"", f"/v1/users/{id_}", "DELETE")]
            path = "/v1/models/films/items"
            responses += [send(running, {"item_ids": [id_]}, path, "DELETE")]
            assert all(
                "1,000" in r.text or "1000" in r.text for r in responses if r.status_code > 200
            )
            return [response.status_code for response in responses]

        assert codes(edge) == [200] * 8
        assert codes(long) == [400] * 8


@pytest.mark.parametrize(
    "id_", ["4_2", "+42", "\u0664\u0662", "\uff14\uff12", " 42", "4\uff12", "0x2a", "-", "42.0"]
)
def test_an_address_with_another_id_deletes_nobody(running: Running, id_: str) -> None:
    send(running, event(42, 3))
    response = send(running, b"", f"/v1/users/{quote(id_)}", "DELETE")
    assert (response.status_code, "ids are integers" in response.text) == (400, True)
    assert send(running, b"", "/v1/users/42", "DELETE").json() == {"num_deleted": 1}


def test_clicks_of_a_millisecond_keep_their_order(films: Path, tmp_path: Path) -> None:
    """In service, in the written log, and in the log of the next training."""
    retriever, now = load(films), time.time()
    items, requests = [24, 3, 17, 10], ["z", None, "a", "m"]
    for item, request in zip(items, requests, strict=True):
        retriever.record([event(999, item, time=now, request_id=request)])
    assert retriever.users.history(999) == items[::-1]
    write_log(films, tmp_path / "log.parquet")
    assert pq.read_table(tmp_path / "log.parquet")["item_id"].to_pylist() == items
    log = Log.from_files(tmp_path / "log.parquet").events
    assert log.order_by("event_number").to_pyarrow()["item_id"].to_pylist() == items


def test_views_push_out_no_click_and_no_dislike(
    films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_MAX_EVENTS", 10)
    retriever, start = load(films), time.time() - 10**6
    types = {0: "dislike", 1: "click"}
    retriever.record(
        [event(999, 3 + 7 * (n % 50), types.get(n, "view"), time=start + n) for n in range(200)]
    )
    (events,) = Journal(films).events_by_user([999]).values()
    assert [e.type for e in events] == ["disliked", "clicked", *["exposed"] * 10]
    assert [e.time for e in events] == sorted(e.time for e in events)
    assert not {3, 10} & {*retriever.retrieve_user([999], 60)[0][0].tolist()}


def test_a_deletion_holds_up_no_request(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    recorder, lately = Recorder(journal), Lately(answers=2)
    journal.write([], [answer("a", [7], [[1, 2]], 10)])
    # A deletion holds the connection that writes while the file is written anew.
    with ThreadPoolExecutor(1) as threads, journal.writing():
        assert threads.submit(recorder.served_lately, [7], lately, 9).result(10) == [[1, 2]]
    recorder.close()


def test_only_a_server_that_records_all_answers_leaves_them_out(int_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"exclude_served_hours: got 0\.5 with record_share 0\.9"):
        ServeSettings(record_share=0.9, exclude_served_hours=0.5)
    with Running(int_folder) as running:
        body = retrieve_user([102], [[]], 5) | {"exclude_served": {"answers": 1}}
        response = running.post(PREDICT, json=body)
        assert (response.status_code, "--record-share 1" in response.text) == (400, True)


def test_blocks_do_not_change_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, films: Path
) -> None:
    journal = Journal(films)
    types = ("clicked", "exposed", "ranked", "disliked")
    events = [Event(n % 3, n, n % 5, types[n % 4], None, None) for n in range(40)]
    journal.write([events], [answer("a", [1, 2], [[1, 2], [3, 4]])])
    assert write_log(films, tmp_path / "whole.parquet") == 44
    monkeypatch.setattr(log_of_service, "BLOCK", 7)
    assert write_log(load(films), tmp_path / "blocks.parquet") == 44
    whole, blocks = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "blocks"))
    assert whole.equals(blocks)
    assert whole.schema.field("timestamp").type == pa.timestamp("ms", tz="UTC")


def test_a_model_of_the_log_does_not_count_its_events_twice(films: Path, tmp_path: Path) -> None:
    when = datetime(2026, 5, 1, 12, 30, 15, 123_456, UTC)
    load(films).record([event(100, n, time=when) for n in (3, 10)])
    write_log(films, tmp_path / "log.parquet")
    log = Log.from_files(tmp_path / "log.parquet")
    last = log.events["timestamp"].max().to_pyarrow().as_py()
    # The time that an export notes as the end of its histories is exactly that of the last event.
    (newest, *_) = Journal(films).events_by_user([100])[100][::-1]
    assert round(1000 * last.timestamp()) == newest.time


def test_the_command(films: Path, tmp_path: Path, command: Any) -> None:
    done = command("log", films, "--out", tmp_path / "log.parquet")
    assert (done.code, "Nothing has been recorded" in done.err) == (1, True)
    assert not (tmp_path / "log.parquet").exists()
    load(films).record([event(100, 3)])
    done = command("log", films, "--out", tmp_path / "log.parquet")
    assert (done.code, done.err, done.out.endswith("log.parquet: 1 row\n")) == (0, "", True)


def test_the_command_drops_what_is_old(films: Path, tmp_path: Path, command: Any) -> None:
    now, day = time.time(), 86_400
    load(films).record([event(100, 3, time=now - day * n) for n in (0, 1, 9, 11, 40)])
    for n in (1, 30):
        past = round(1000 * (now - day * n))
        Journal(films).write([], [answer(f"secret {n}", [100], [[10, 17]], past)])
    done = command("log", films, "--out", tmp_path / "log.parquet", "--drop-older-days", 10)
    assert (done.code, done.err) == (0, "")
    # The file is written first, so that no row is lost between the two.
    assert pq.read_metadata(tmp_path / "log.parquet").num_rows == 5 + 2 * 2
    assert "log.parquet: 9 rows\ndropped  2 events and 1 answer from before 20" in done.out
    assert [
        round((now - e.time / 1000) / day) for e in Journal(films).events_by_user([100])[100]
    ] == [
        9,
        1,
        0,
    ]
    content = b"".join(path.read_bytes() for path in films.glob(f"{JOURNAL_FILE}*"))
    assert (b"secret 30" in content, b"secret 1" in content) == (False, True)
    done = command("log", films, "--drop-older-days", 10)
    assert (done.code, "dropped  0 events and 0 answers" in done.out) == (0, True)
    for flags in (["--drop-older-days", 0], ["--drop-older-days", 1e9]):
        assert command("log", films, *flags).code == 2


def test_no_log_is_replaced_once_rows_were_dropped(
    films: Path, tmp_path: Path, command: Any
) -> None:
    now, day, out = time.time(), 86_400, tmp_path / "logs" / "log.parquet"
    out.parent.mkdir()
    old, newer = (now - 20 * day, 3), (now - 5 * day, 5)
    load(films).record([event(100, item, time=time_) for time_, item in (old, newer)])
    flags = ["log", films, "--drop-older-days", 10, "--out"]
    # While nothing has been dropped, the file is replaced each night.
    assert command(*flags[:3], 30, "--out", out).code == 0
    assert "dropped  1 event" in command(*flags, out).out
    # The next night. Nothing is written and nothing dropped.
    whole = out.read_bytes()
    late = event(100, 7, time=now - 15 * day)
    load(films).record([late, event(100, 9)])
    done = command(*flags, out)
    assert done.code == 1
    assert "have been dropped from" in done.err
    assert "log-20" in done.err
    with pytest.raises(ValueError, match="replacing the file may lose them"):
        write_log(films, out)
    assert out.read_bytes() == whole
    assert [e.item_id for e in Journal(films).events_by_user([100])[100]] == [7, 5, 9]
    # A file for each night, as the message says: together they have each row, once.
    assert command(*flags, out.with_name("log-2.parquet")).code == 0
    log = Log.from_files(out.parent, reading=Reading(duplicates="drop"))
    rows = log.events.order_by("timestamp").to_pyarrow().to_pylist()
    assert [row["item_id"] for row in rows] == [3, 7, 5, 9]
    # Nothing was dropped from another store.
    Journal(films).path.unlink()
    load(films).record([event(100, 9)])
    out.write_bytes(whole)
    assert write_log(films, out) == 1


def test_a_log_is_recorded_again(films: Path, tmp_path: Path) -> None:
    types = ("click", "view", "dislike", "ranked")
    events = [
        event(n % 7, n % 5, types[n % 4], time=1_770_000_000 + n // 3, request_id=f"r{n % 9}")
        for n in range(90)
    ]
    load(films).record(events)
    write_log(films, tmp_path / "log.parquet")
    other = Path(shutil.copytree(films, tmp_path / "other" / "films"))
    Journal(other).path.unlink()
    first = pq.read_table(tmp_path / "log.parquet")
    past = first.drop_columns("rank").rename_columns({"timestamp": "time", "stage": "type"})
    # Tomorrow's store holds what today's log does, and adding it again changes nothing.
    for num_new in (len(first), 0):
        assert load(other).record(past.to_pylist()) == num_new
        write_log(other, tmp_path / "again.parquet")
        assert pq.read_table(tmp_path / "again.parquet").equals(first)


def test_a_log_of_models_with_numbers_and_with_text_as_ids_has_text(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items were numbers until the first one with a letter came."""
    monkeypatch.setattr(log_of_service, "BLOCK", 1)
    journal, path = Journal(films), tmp_path / "log.parquet"
    journal.write([[Event(7, 1, 3, "clicked", None, None)]], [answer("a", [7], [[3, 10]], 2)])
    write_log(films, path)
    assert pq.read_table(path)["item_id"].to_pylist() == [3, 3, 10]
    journal.write([[Event(7, 4, "A1", "clicked", None, None)]])
    write_log(films, path)
    rows = pq.read_table(path).to_pylist()
    expected = [(7, "3"), (7, "3"), (7, "10"), (7, "A1")]
    assert [(row["user_id"], row["item_id"]) for row in rows] == expected
    journal.write([], [answer("b", ["Ann"], [["A1"]], 5)])
    write_log(films, path)
    assert pq.read_table(path)["user_id"].to_pylist() == ["7", "7", "7", "7", "Ann"]


def test_what_a_ranker_did_is_no_act_of_a_user(films: Path) -> None:
    """An answer has a hundred retrieved items, which would push clicks out of the newest events."""
    types = ("retrieved", "pre_ranked", "ranked", "clicked", "exposed", "disliked")
    load(films).record([event(100, n, type_, time=1e9 + n) for n, type_ in enumerate(types)])
    load(films).record([event(101, 1, "retrieved", time=1e9)])
    journal = Journal(films)
    (events,) = journal.events_by_user([100, 101]).values()
    assert [event.type for event in events] == ["clicked", "exposed", "disliked"]
    assert journal.user_ids() == [100]


def test_an_old_event_that_comes_while_the_log_is_written_is_kept(
    films: Path, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = time.time() - 40 * 86_400
    load(films).record([event(100, 3, time=old)])
    write = log_of_service.write_log

    def write_and_receive(model: Path, out: Path) -> int:
        num_rows = write(model, out)
        load(films).record([event(101, 5, time=old)])
        return num_rows

    monkeypatch.setattr(log_of_service, "write_log", write_and_receive)
    flags = ["--out", tmp_path / "log.parquet", "--drop-older-days", 10]
    done = command("log", films, *flags)
    assert "1 row\ndropped  1 event and 0 answers" in done.out
    assert [*Journal(films).events_by_user([100, 101])] == [101]


def test_what_cannot_be_written_is_refused_at_the_start(
    int_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(folder: Path) -> None:
        raise StorageError(f"{folder}: Permission denied.")

    monkeypatch.setattr("tfrs_pipeline.service.server.try_writing", closed)
    with pytest.raises(StorageError, match="denied"):
        Running(int_folder, record_share=0.5)
