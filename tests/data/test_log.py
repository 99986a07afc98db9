"""A log of tables in memory, what it keeps on disk, and what it never takes for a click."""

import dataclasses
import os
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ibis.common.exceptions import IbisError

from tests.damage import largest_file
from tests.small_log import arguments, column
from tfrs_pipeline import ConfigError, Log, Reading, RunConfig
from tfrs_pipeline.data.engines import connect
from tfrs_pipeline.data.schema import DataError, Dropped
from tfrs_pipeline.data.tables import make_tables
from tfrs_pipeline.durable import Damaged, StorageError

TIMES = [f"2024-01-0{day}T12:00:00Z" for day in (3, 1, 2)]
EVENTS = pd.DataFrame(
    {"user": ["a", "b", "a"], "item_id": [7, 8, 9], "timestamp": TIMES, "rating": [5.0, 1.0, 4.0]}
)
# `kind` has integers, which pandas stores as floats because a value is missing.
ITEMS = pd.DataFrame({"sku": [9, 7, 8], "kind": [1.0, None, 2.0], "name": ["nine", "seven", None]})
OPTIONS: dict[str, Any] = {
    "items": ITEMS,
    "columns": {"user_id": "user"},
    "item_columns": {"item_id": "sku", "title": "name"},
    "item_features": {"kind": "categorical", "title": "text"},
    "rating_threshold": 4,
}


def made(events: Any = EVENTS, **changes: Any) -> Log:
    return Log.from_table(events, **arguments(**OPTIONS | changes))


def rows(table: ibis.Table, key: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table.order_by(key).to_pyarrow().to_pylist()
    return found


@pytest.mark.parametrize("form", ["pandas", "arrow", "reader", "ibis", "other connection", "file"])
def test_all_ways_in_give_one_log(form: str, tmp_path: Path) -> None:
    """Each table has a mapping of its own; ISO strings are times in all of them."""
    arrow = pa.Table.from_pandas(EVENTS)
    pq.write_table(arrow, tmp_path / "events.parquet")
    other = ibis.duckdb.connect()
    forms: dict[str, Any] = {
        "pandas": EVENTS,
        "arrow": arrow,
        "reader": arrow.to_reader(),
        "ibis": ibis.memtable(EVENTS),
        "other connection": other.create_table("events", EVENTS),
    }
    if form == "file":
        log = Log.from_files(tmp_path / "events.parquet", **arguments(**OPTIONS))
    else:
        log = made(forms[form])
    expected = [("a", 7, 3, "clicked"), ("b", 8, 1, "exposed"), ("a", 9, 2, "clicked")]
    names = ("user_id", "item_id", "timestamp", "event_number", "stage")
    assert [tuple(row[name] for name in names) for row in rows(log.events, "event_number")] == [
        (user, item, datetime(2024, 1, day, 12, tzinfo=UTC), number, stage)
        for number, (user, item, day, stage) in enumerate(expected)
    ]
    assert log.events.columns == names
    assert rows(log.items, "item_id") == [
        {"item_id": 7, "kind": None, "title": "seven", "_listed": True},
        {"item_id": 8, "kind": 2, "title": None, "_listed": True},
        {"item_id": 9, "kind": 1, "title": "nine", "_listed": True},
    ]
    assert (log.order, log.dropped, log.whole) == ("timestamp", (), log)
    assert repr(log) == "Log(3 events, 3 items, 2 users; order timestamp; features kind, title)"


def test_a_title_is_shown_under_the_name_that_its_column_is_given() -> None:
    log = made(**{"item_features": {}})
    assert column(log.items, "title", "item_id") == ["seven", None, "nine"]
    assert log.items.columns == ("item_id", "title", "_listed")


def test_columns_that_duckdb_does_not_take() -> None:
    """Intervals, which would break the connection; half floats; a column without values."""
    ages, scores = pd.cut(pd.Series([1.0, 2.0, 3.0]), 2), np.array([0.5, 1, 2], np.float16)
    events = EVENTS.assign(age=ages, score=scores)
    items = ITEMS.assign(price=np.array([1, 2, 3], np.float16), text=[None] * 3)
    options: dict[str, Any] = {"items": items, "connection": ibis.duckdb.connect()}
    options["item_features"] = {"price": "numeric", "text": "text"}
    log = made(events, **options)
    assert column(log.items, "price", "item_id") == [2, 3, 1]
    assert column(log.items, "text", "item_id") == [None] * 3
    with pytest.raises(DataError, match="'age' must be"):
        made(events, **options, request_features={"age": "categorical"})
    assert log.counts()["events"] == 3  # The connection is alive.


def test_the_id_of_another_table_may_be_a_feature() -> None:
    items = ITEMS.assign(user_id=["maker", "maker", "other"])
    log = made(**{"items": items, "item_features": {"user_id": "categorical"}})
    assert column(log.items, "user_id", "item_id") == ["maker", "other", "maker"]
    # A warehouse may store ids as whole decimals.
    ids = pa.array([2**60, 2**60 + 1], pa.int64()).cast(pa.decimal128(38, 0))
    log = Log.from_table(pa.table({"user_id": ids, "item_id": ids}))
    assert column(log.items, "item_id", "item_id") == [2**60, 2**60 + 1]


def test_a_fingerprint_is_of_the_rows(tmp_path: Path) -> None:
    log = made()
    log.write(tmp_path)
    # A rating is read as a stage, and 4.5 gives the same stage as 5.
    same = [Log.read(tmp_path), made(EVENTS.replace(5.0, 4.5))]
    assert {each.fingerprint() for each in same} == {log.fingerprint()}
    changes = {"rating": [5.0, 4.0, 4.0], "item_id": [7, 8, 7], "user": ["a", "b", "b"]}
    others = [made(EVENTS.assign(**{name: values})) for name, values in changes.items()]
    others.append(made(**{"items": ITEMS.assign(kind=[1.0, None, 3.0])}))
    assert len({each.fingerprint() for each in [log, *others]}) == 5


def test_items_that_only_the_events_have_are_told_from_those_of_the_table(tmp_path: Path) -> None:
    log = made(**{"items": ITEMS[ITEMS["sku"] != 9]})
    log.write(tmp_path)
    # The same for tables in the engine, whether the item table has only the listed items or all.
    table = log.items.filter(log.items["item_id"] < 9)
    logs = [log, Log.read(tmp_path), Log.from_ibis(log.events, items=table)]
    logs.append(Log.from_ibis(log.events, items=log.items))
    for each in logs:
        assert column(each.items, "item_id", "item_id") == [7, 8, 9]
        assert each.listed_ids.tolist() == [7, 8]
    clicks = EVENTS[["user", "item_id"]].rename(columns={"user": "user_id"})
    for each in (Log.from_table(clicks), Log.from_ibis(log.events)):
        assert each.listed_ids.tolist() == [7, 8, 9]


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    users = pa.table({"user_id": ["b", "a", "c"], "vector": [[1.0, 2.0], None, [0.5, 3.0]]})
    features: dict[str, Any] = {"users": users, "user_features": {"vector": "vector"}}
    log = made(EVENTS.iloc[[0, 1, 2, 0]], **features, duplicates="drop")
    assert log.dropped == (Dropped("repeats an earlier event", 1),)
    log.write(tmp_path)
    back = Log.read(tmp_path)
    for name, key in (("events", "event_number"), ("items", "item_id"), ("users", "user_id")):
        before, after = getattr(log, name), getattr(back, name)
        assert after.schema() == before.schema()
        assert after.to_pyarrow().to_pylist() == rows(before, key)
    names = ("item_features", "user_features", "dropped", "is_ordered", "reading", "items_read")
    for name in names:
        assert getattr(back, name) == getattr(log, name)
    (tmp_path / "log.json").unlink()
    with pytest.raises(DataError, match=r"no log\.json"):
        Log.read(tmp_path)


def test_a_log_knows_when_its_tables_began_to_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A live write while the items are read is later, and a copy of the log changes nothing."""
    during: list[datetime] = []

    def make(*arguments: Any) -> Any:
        during.append(datetime.now(UTC))
        return make_tables(*arguments)

    before = datetime.now(UTC)
    monkeypatch.setattr("tfrs_pipeline.data.log.make_tables", make)
    log = made()
    assert before <= log.items_read <= during[0]
    log.write(tmp_path / "log")
    copy = Path(shutil.copytree(tmp_path / "log", tmp_path / "copy", copy_function=shutil.copyfile))
    for file in copy.iterdir():
        os.utime(file, (0, 0))
    back = Log.read(copy)
    train = back.split("last_share", validation=0, test=0.5, min_positives=1).train
    assert log.items_read == back.items_read == train.items_read
    back.write(tmp_path / "again")
    assert Log.read(tmp_path / "again").items_read == log.items_read


def test_a_log_is_written_over_the_one_that_it_is_read_from(tmp_path: Path) -> None:
    made().write(tmp_path)
    log = Log.read(tmp_path)
    log.write(tmp_path)
    assert Log.read(tmp_path).fingerprint() == log.fingerprint()
    assert len(list(tmp_path.iterdir())) == 4
    # A part, which has the items of the whole, can be written too. A failed write changes nothing.
    split = log.split("last_share", validation=0, test=0.5, min_positives=1)
    num = split.train.counts()
    assert num != log.counts()
    with pytest.raises(IbisError):
        dataclasses.replace(log, users=log.users.drop("user_id")).write(tmp_path)
    assert Log.read(tmp_path).fingerprint() == log.fingerprint()
    split.train.write(tmp_path)
    assert Log.read(tmp_path).counts() == num
    # What a write leaves if it is killed between its tables.
    (tmp_path / "log.partial").mkdir()
    (tmp_path / "log.json").unlink()
    made().write(tmp_path)
    assert Log.read(tmp_path).counts() == made().counts()


@pytest.mark.parametrize("name", ["events.parquet", "items.parquet", "users.parquet", "log.json"])
def test_a_log_is_not_written_over_files_that_are_no_log(tmp_path: Path, name: str) -> None:
    EVENTS.to_parquet(tmp_path / name)
    EVENTS.to_csv(tmp_path / "else.csv")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    log = made()
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} ")):
        log.write(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / name).unlink()
    log.write(tmp_path)
    assert (tmp_path / "else.csv").read_bytes() == before[tmp_path / "else.csv"]
    # The user's own file in place of the log's.
    EVENTS.to_parquet(tmp_path / "events.parquet")
    own = (tmp_path / "events.parquet").read_bytes()
    with pytest.raises(Damaged, match=r"events\.parquet is not as it was written"):
        log.write(tmp_path)
    assert (tmp_path / "events.parquet").read_bytes() == own


@pytest.mark.parametrize("limit", [16_000, 500_000])
def test_a_full_disk_for_the_tables_is_told_with_where_they_may_lie(limit: int) -> None:
    events = pd.DataFrame({"user_id": np.arange(100_000), "item_id": np.arange(100_000) % 99})
    connection = connect()
    with largest_file(limit), pytest.raises(StorageError, match=r"cannot store .*set TMPDIR"):
        Log.from_table(events, connection=connection)


@pytest.mark.parametrize(("error", "options", "message"), [
    (DataError, {"rating_threshold": None}, "a log of ratings needs rating_threshold"),
    (DataError, {"item_columns": {}}, "item table: no column 'item_id'.*Set item_columns"),
    (DataError, {"rating_threshold": None, "stage_values": {"x": "clicked"}}, "column 'stage'"),
    (ValueError, {"stage_values": {"1": "bought"}}, "stage_values"),
    (ValueError, {"time_zone": "Mars/Base"}, "time_zone"),
    (ValueError, {"label": {"x": 1.0}, "rating_threshold": 4}, "set one"),
    (ValueError, {"columns": {"event_number": "n"}}, "row order"),
    (ValueError, {"items": None, "item_columns": {}}, "needs"),
    (ValueError, {"user_features": {"x": "text"}}, "needs"),
    (ConfigError, {"stage_values": {1: "clicked"}}, "stage_values.1.*valid string"),
    (ValueError, {"item_features": {"item_id": "numeric"}}, "'item_id' cannot be a feature"),
    (ConfigError, {"earliest_time": "soon"}, "earliest_time: got 'soon'; must be a valid date"),
    (ValueError, {"item_columns": {"item_id": "sku", "title": "nme"}}, "no column 'nme'. Nea"),
    (ConfigError, {"duplicates": "dropp"}, "duplicates: got 'dropp'; must be 'keep'"),
    (ValueError, {"columns": {"usr_id": "user"}}, r"usr_id: .*; did you mean 'user_id'\?$"),
    (ConfigError, {"columns": {"event": "hour"}}, "columns.event: has the types.*event_weights"),
    (ConfigError, {"columns": {"user_id": 0}}, "columns.user_id: got 0; must be a"),
    (ValueError, {"columns": {"user_id": "usr"}}, "no column 'usr'. Nearest: user"),
    (ValueError, {"columns": {"user_id": "user", "device": "devic"}}, "no column 'devic'"),
    (ValueError, {"item_columns": {"item_id": "sku", "titel": "name"}}, "titel: .*'title'"),
    (ValueError, {"item_columns": {"item_id": "skuu"}}, "no column 'skuu'. Nearest: sku"),
    # The events' `columns` has the name that the item table uses.
    (DataError, {"item_columns": {}, "columns": {"user_id": "user", "item_id": "sku"}},
     "item table: no column 'item_id'.*Add item_id=sku to item_columns"),
])  # fmt: skip
def test_what_is_refused(error: type[Exception], options: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        made(EVENTS.assign(hour=1), **options)


@pytest.mark.parametrize(
    ("kind", "hint"),
    [("numeri", "did you mean 'numeric'"), ("colour", "known: .*, numeric, text, timestamp, vec")],
)
def test_an_unknown_kind_of_feature_is_told_the_known_ones(kind: Any, hint: str) -> None:
    with pytest.raises(ValueError, match=f"^Feature 'price' has .*{hint}.* Received: '{kind}'"):
        made(**{"item_features": {"price": kind}})
    with pytest.raises(ConfigError, match=rf"data.user_features.price: got '{kind}'.*{hint}"):
        RunConfig(data={"user_features": {"price": kind}})


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(DataError, match="a DataFrame cannot be read as a table"):
        Log.from_table(pd.DataFrame({"user_id": [1, "a"], "item_id": [1, 2]}))
    with pytest.raises(DataError, match=r"a list cannot be read as a table: .*\w\. Give a path"):
        Log.from_table([1, 2])
    with pytest.raises(ConfigError, match=r"^colums: unknown setting; did you mean 'columns'\?$"):
        Reading(**{"colums": {}})


def test_an_id_that_many_people_share_is_told() -> None:
    def described(num_guests: int, num_users: int) -> str:
        users = [*(f"u{i}" for i in range(num_users)), *["guest"] * num_guests]
        clicks = {"user_id": users, "item_id": range(len(users))}
        return " ".join(Log.from_table(pd.DataFrame(clicks)).describe())

    assert ("guest" in described(150, 500), "guest" in described(4, 20)) == (True, False)
    assert "guest" not in described(150, 9_000)  # 1.6%: a busy person, or a bot.
    assert "user 'guest' has 23.1% of the positives" in described(150, 500)
