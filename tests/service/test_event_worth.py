"""Service keeps the types of events, weights and sessions that the training log has."""

import contextlib
import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from tests.search.test_item_graph import graph_of
from tests.service.conftest import make_served
from tests.service.running_server import Running, send
from tests.service.test_log_of_service import answer
from tfrs_pipeline import Log, Reading, load, write_log
from tfrs_pipeline.answers.publish import MANIFEST_FILE
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.durable import write_record
from tfrs_pipeline.records.journal import Journal
from tfrs_pipeline.records.user_events import Event, check_events

TYPES: dict[str, Any] = {
    "purchase": 5,
    "cart": 3,
    "click": 1,
    "view": "exposed",
    "report": "disliked",
}
START = 1_780_000_000  # In 2026.


def shop_of(films: Path, types: Mapping[str, Any] = TYPES) -> Path:
    """Gives types with weights to the training log of a model."""
    path = films / "1" / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    names = [name for name in manifest.pop("sha256") if name != path.name]
    manifest["reading"] = {"event_weights": dict(types)}
    manifest["histories_until"] = "2026-01-01T00:00:00+00:00"
    write_record(path, manifest, [path.parent / name for name in names])
    return films


def shop_events(items: list[Any], num: int = 900) -> pd.DataFrame:
    """Makes a log with visits, sessions whose numbers come again, amounts and requests."""
    rng = np.random.default_rng(3)
    seconds = START + np.cumsum(
        rng.choice([1, 40, 900, 2_500, 90_000], num, p=[0.3, 0.4, 0.2, 0.09, 0.01])
    )
    session = pd.Series(rng.integers(0, 6, num).astype(str)).where(rng.random(num) < 0.4)
    request = pd.Series(rng.integers(0, num // 3, num).astype(str)).where(rng.random(num) < 0.4)
    frame = pd.DataFrame(
        {
            "user_id": rng.integers(9_000, 9_004, num),
            "item_id": rng.choice(items[:9], num),
            "timestamp": pd.to_datetime(seconds, unit="s", utc=True).astype("datetime64[ms, UTC]"),
            "event": rng.choice([*TYPES], num, p=[0.15, 0.15, 0.3, 0.39, 0.01]),
            "session_id": session.astype("string"),
            "weight": rng.choice([1.0, 1.0, 2.5, 30.0], num),
            "request_id": request.astype("string"),
            "rank": pd.Series([None] * num, dtype="Int32"),
        }
    )
    # A request is one moment's, and so belongs to one user.
    first = frame.groupby("request_id")["user_id"].transform("first")
    return frame.assign(user_id=first.fillna(frame["user_id"]).astype("int64"))


def as_sent(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns events as a client sends them, without what is missing."""
    frame = frame.drop(columns="rank").rename(columns={"event": "type", "timestamp": "time"})
    rows = frame.to_dict("records")
    return [{name: value for name, value in row.items() if not pd.isna(value)} for row in rows]


def read(path: Path, types: Mapping[str, Any] = TYPES) -> Log:
    return Log.from_files(path, reading=Reading(event_weights=dict(types)))


def rows_of(log: Log) -> list[tuple[Any, ...]]:
    names = ("user_id", "item_id", "timestamp", "stage", "weight", "session_id")
    columns = (log.events[name].to_pyarrow().to_pylist() for name in names)
    return sorted(zip(*columns, strict=True), key=str)


def test_half_a_log_and_half_from_service_are_the_log(films: Path, tmp_path: Path) -> None:
    model = load(shop_of(films))
    frame = shop_events(model.candidate_ids())
    whole, folder = tmp_path / "whole.parquet", tmp_path / "logs"
    folder.mkdir()
    frame.to_parquet(whole)
    frame[:400].to_parquet(folder / "first.parquet")
    assert model.record(as_sent(frame[400:])) == 500
    assert write_log(films, folder / "served.parquet") == 500
    names = [pq.read_schema(path).names for path in folder.iterdir()]
    assert names[0] == names[1]
    expected, joined = read(whole), read(folder)
    assert rows_of(joined) == rows_of(expected)
    assert joined.counts() == expected.counts()
    assert len({row[4] for row in rows_of(joined)}) > 5  # Types times amounts.
    # A user's history in service holds what the training of tomorrow will: each visit once.
    served = read(folder / "served.parquet")
    clicks = served.positives().order_by(["timestamp", "event_number"])
    columns = clicks.select("user_id", "item_id").to_pyarrow().to_pydict()
    disliked = {
        (e.user_id, e.item_id)
        for e in model.checked_events(as_sent(frame[400:]))
        if e.type == "disliked"
    }
    for user in range(9_000, 9_004):
        (now,) = model.users.now([user])
        pairs = zip(columns["user_id"], columns["item_id"], strict=True)
        items = [item for id_, item in pairs if id_ == user and (user, item) not in disliked]
        assert len(items) > 5
        assert now.history == items


def test_each_visit_moves_the_graph_once(films: Path) -> None:
    """Shown, clicked and bought in a visit: one click counts, as in training."""
    model, served = load(shop_of(films)), make_served("int")
    before = model.graph.totals.sum()
    model.record(as_sent(shop_events(model.candidate_ids())))
    model.catch_up()
    users = model.users.now([*served.query_ids.tolist(), *range(9_000, 9_004)])
    items = Ids(served.candidate_ids)
    histories = [items.rows(user.history)[::-1].tolist() for user in users]
    expected = graph_of(histories, model.graph.kind, len(served.candidate_ids))
    assert expected.totals.sum() > before
    np.testing.assert_allclose(model.graph.totals, expected.totals, rtol=1e-5)


def test_types_of_one_moment_are_kept_apart_and_repeats_are_not_new(films: Path) -> None:
    model = load(shop_of(films))
    item, other = model.candidate_ids()[:2]
    same = {"user_id": 9_000, "item_id": item, "time": START}
    kinds = [{**same, "type": "click"}, {**same, "type": "purchase", "weight": 12.5}]
    kinds.append({**same, "type": "cart"})
    assert model.record([*kinds, {**same, "item_id": other, "type": "clicked"}]) == 4
    assert model.record([*kinds, {**same, "item_id": other, "type": "click"}]) == 0
    assert model.record(kinds[::-1]) == 0
    (events,) = Journal(films).events_by_user([9_000]).values()
    written = {(event.item_id, event.event, event.weight, event.type) for event in events}
    assert written == {
        (item, None, None, "clicked"),
        (item, "purchase", 12.5, "clicked"),
        (item, "cart", None, "clicked"),
        (other, None, None, "clicked"),
    }
    assert model.users.history(9_000) == [other, item]


def test_what_was_served_and_what_stages_say_has_a_word(films: Path, tmp_path: Path) -> None:
    shop_of(films, types := {"purchase": 5, "clicked": 2, "retrieved": "retrieved"})
    journal, path = Journal(films), tmp_path / "log.parquet"
    events = [
        Event(1, START * 1000 + n, item, stage, request, None)
        for n, (item, stage, request) in enumerate(
            [(3, "clicked", "a"), (10, "exposed", "a"), (17, "disliked", None)]
        )
    ]
    journal.write([events], [answer("a", [1], [[3, 10, 24]], START * 1000)])
    assert write_log(films, path) == 4
    rows = pq.read_table(path).to_pylist()
    written = {(row["item_id"], row["event"], row["request_id"], row["rank"]) for row in rows}
    assert written == {
        (3, "clicked", "a", 1),
        (10, "view", "a", 2),
        (24, "retrieved", "a", 3),
        (17, "dislike", None, None),
    }
    log = read(path, types)
    # Types that the log's settings lack are dropped and counted.
    dropped = {entry.reason.split("'")[3]: entry.num_rows for entry in log.dropped}
    assert dropped == {"view": 1, "dislike": 1}
    stages = log.events.select("item_id", "stage", "weight").to_pyarrow().to_pylist()
    assert {tuple(row.values()) for row in stages} == {(3, "clicked", 2.0), (24, "retrieved", 1.0)}


def test_what_was_shown_is_never_a_type_that_is_a_positive(films: Path, tmp_path: Path) -> None:
    """In this shop a view is the opened page of an item, and nothing says what was shown."""
    shop_of(films, types := {"purchase": 5, "view": 1, "disliked": 2})
    model, path = load(films), tmp_path / "log.parquet"
    kinds = ("exposed", "view", "purchase", "dislike", "disliked")
    model.record(
        [
            {"user_id": 9_000, "item_id": n, "type": kind, "time": START + n}
            for n, kind in enumerate(kinds)
        ]
    )
    write_log(films, path)
    rows = pq.read_table(path).to_pylist()
    names = {row["item_id"]: row["event"] for row in rows}
    assert names == {0: "exposed", 1: "view", 2: "purchase", 3: "dislike", 4: "disliked"}
    clicks = read(path, types).positives().to_pyarrow().to_pylist()
    assert {row["item_id"] for row in clicks} == {1, 2, 4}


def test_a_log_of_stages_has_weights_if_an_event_has(films: Path, tmp_path: Path) -> None:
    model, path = load(films), tmp_path / "log.parquet"
    sent = {"user_id": 9_000, "item_id": model.candidate_ids()[0], "type": "click", "time": START}
    model.record([sent])
    write_log(films, path)
    columns = ["user_id", "item_id", "timestamp", "stage", "request_id", "rank"]
    assert pq.read_schema(path).names == columns
    model.record([{**sent, "time": START + 1, "weight": 7}])
    write_log(films, path)
    assert pq.read_table(path)["weight"].to_pylist() == [1.0, 7.0]
    log = Log.from_files(path)
    assert sorted(log.events["weight"].to_pyarrow().to_pylist()) == [1.0, 7.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "scroll"}, "type: must be one of purchase, cart, click, view, report, dislike"),
        ({"weight": 0}, "weight: Input should be greater than or equal to 0.000000001"),
        ({"weight": "5"}, "weight: Input should be a valid number"),
        ({"weight": float("nan")}, "weight: Input should be"),
        ({"session_id": True}, "session_id: Input should be a valid string"),
        ({"session_id": "x" * 201}, "session_id: String should have at most 200"),
        ({"event": "purchase"}, "unknown 'event'"),
    ],
)
def test_a_wrong_type_weight_or_session_is_refused(change: dict[str, Any], message: str) -> None:
    right = {"user_id": 1, "item_id": 2, "type": "purchase", "session_id": 8, "weight": 2}
    types: dict[str, Any] = {"users_are_text": False, "items_are_text": False}
    types["types"] = {
        name: "clicked" if name in ("purchase", "cart") else "exposed" for name in TYPES
    }
    (event,) = check_events([right], **types)
    assert (event.type, event.event, event.session_id, event.weight) == (
        "clicked",
        "purchase",
        "8",
        2,
    )
    # This log calls a view a click, so the name is kept.
    (event,) = check_events([{**right, "type": "click"}], **types)
    assert (event.type, event.event) == ("exposed", "click")
    with pytest.raises(ValueError, match=f"Event 0: {message}"):
        check_events([right | change], **types)


def test_a_server_takes_the_types_of_its_model(films: Path) -> None:
    with Running(shop_of(films), takes_writes=True) as running:
        bought = {
            "user_id": 9_000,
            "item_id": 3,
            "type": "purchase",
            "weight": 2,
            "session_id": "s",
        }
        assert send(running, {"events": [bought]}).json()["num_new"] == 1
        refused = send(running, {"events": [bought | {"type": "scroll"}]})
        assert refused.status_code == 400
        assert "must be one of purchase, cart, click" in refused.json()["error"]
    ((event,),) = Journal(films).events_by_user([9_000]).values()
    assert event[3:] == ("clicked", None, None, "purchase", "s", 2.0)


_OLDER_FILE = """
PRAGMA journal_mode = WAL;
CREATE TABLE events (
    user_id NOT NULL, type TEXT NOT NULL, time INTEGER NOT NULL, item_id NOT NULL, request_id TEXT,
    event_id INTEGER, arrival INTEGER NOT NULL, PRIMARY KEY (user_id, type, time, item_id)
) WITHOUT ROWID;
CREATE TABLE event_ids (id INTEGER PRIMARY KEY);
CREATE TABLE served (
    arrival INTEGER PRIMARY KEY, request_id TEXT NOT NULL, user_id NOT NULL, time INTEGER NOT NULL,
    version INTEGER NOT NULL, items TEXT NOT NULL
);
CREATE INDEX served_by_user ON served (user_id);
CREATE TRIGGER event_known BEFORE INSERT ON events
    WHEN NEW.event_id IN (SELECT id FROM event_ids) BEGIN SELECT RAISE(IGNORE); END;
CREATE TRIGGER event_added AFTER INSERT ON events WHEN NEW.event_id IS NOT NULL
    BEGIN INSERT INTO event_ids VALUES (NEW.event_id); END;
CREATE TRIGGER event_deleted AFTER DELETE ON events WHEN OLD.event_id IS NOT NULL
    BEGIN DELETE FROM event_ids WHERE id = OLD.event_id; END;
PRAGMA application_id = 1;
INSERT INTO events VALUES (9000, 'clicked', 1780000000000, 3, 'a', 77, 1);
INSERT INTO events VALUES (9000, 'exposed', 1780000001000, 10, NULL, NULL, 2);
INSERT INTO served VALUES (1, 'a', 9000, 1779999999000, 1, '[3, 24]');
"""
"""A file of the release whose events had no types with weights."""


def test_an_older_file_loses_nothing(films: Path, tmp_path: Path) -> None:
    shop_of(films)
    path, log = Journal(films).path, tmp_path / "log.parquet"
    with contextlib.closing(sqlite3.connect(path)) as old:
        old.executescript(_OLDER_FILE)
    before = path.read_bytes()
    reader = Journal(films)  # Stays open while another process adds the columns.
    first = [
        Event(9000, START * 1000, 3, "clicked", "a", 77),
        Event(9000, START * 1000 + 1000, 10, "exposed", None, None),
    ]
    assert reader.events_by_user([9000]) == {9000: first}
    assert write_log(films, log) == 3
    words = pq.read_table(log)["event"].to_pylist()
    assert words == ["retrieved", "click", "view"]
    assert path.read_bytes() == before  # A reader changes nothing.
    bought = {"user_id": 9000, "item_id": 24, "type": "purchase", "time": START + 9, "weight": 4}
    model = load(films)
    assert model.record([bought]) == 1
    again = {"user_id": 9000, "item_id": 3, "type": "click", "time": START}
    assert model.record([again]) == 0
    last = Event(9000, START * 1000 + 9000, 24, "clicked", None, None, "purchase", None, 4.0)
    assert reader.events_by_user([9000]) == {9000: [*first, last]}
    assert write_log(films, log) == 4
    assert pq.read_table(log)["weight"].to_pylist() == [1.0, 1.0, 1.0, 4.0]
    # The older release still reads and writes the file, in the columns that it knows.
    with contextlib.closing(sqlite3.connect(path)) as old, old:
        old.execute(
            "INSERT INTO events (user_id, time, item_id, type, request_id, event_id, arrival) "
            "VALUES (9000, 1780000020000, 31, 'clicked', NULL, 78, 9)"
        )
    assert [event.item_id for event in reader.events_by_user([9000])[9000]] == [3, 10, 24, 31]
    assert Journal(films).forget([9000]) == [5]
