"""The contract of the three tables: what is refused, and what a file keeps."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pytest

from tfrs_pipeline.data.schema import (
    DataError,
    Dropped,
    Tables,
    check_tables,
    read_tables,
    write_tables,
)

EVENTS: dict[str, Any] = {
    "user_id": [7, 7, 8],
    "item_id": ["a", "b", "a"],
    "timestamp": [datetime(2024, 1, day, tzinfo=UTC) for day in (3, 1, 2)],
    "event_number": [0, 1, 2],
    "stage": ["clicked", "exposed", "pre_ranked"],
}


def make_tables(**changes: Any) -> Tables:
    """Small valid tables; `changes` replace event columns, None takes one away."""
    columns = {name: value for name, value in (EVENTS | changes).items() if value is not None}
    items = pa.table(
        {
            "item_id": ["b", "a"],
            "title": ["Bee", None],
            "genres": pa.array([["x", "y"], None], pa.list_(pa.string())),
            "price": [1.5, None],
            "added": [datetime(2023, 5, 1, tzinfo=UTC), None],
            "vector": pa.array([[1.0, 2.0], None], pa.list_(pa.float32())),
        }
    )
    return Tables(
        events=ibis.memtable(pa.table(columns)),
        items=ibis.memtable(items),
        users=ibis.memtable(pa.table({"user_id": [8, 7], "age": [30, None]})),
        item_features={
            "title": "text",
            "genres": "multi_categorical",
            "price": "numeric",
            "added": "timestamp",
            "vector": "vector",
        },
        user_features={"age": "hashed"},
        dropped=(Dropped("no id", 3),),
    )


def test_valid_tables_pass_with_and_without_time() -> None:
    check_tables(make_tables())
    check_tables(make_tables(timestamp=None))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"item_id": None, "items_id": ["a", "b", "a"]}, "no column 'item_id'. Nearest: items_id"),
        (
            {"user_id": [7.0, 7.0, 8.0]},
            r"'user_id' must be int64 or string, it is float64 .*3 rows",
        ),
        ({"user_id": [7, None, 8]}, "'user_id' is null in 1 of 3 rows"),
        ({"user_id": [7, -1, -1]}, "'user_id' is -1 in 2 of 3 rows. -1 is reserved"),
        ({"item_id": ["a", "", "a"]}, "'item_id' is '' in 1 of 3 rows. '' is reserved"),
        ({"timestamp": [datetime(2024, 1, 1)] * 3}, "must be UTC.*time_zone"),
        ({"timestamp": [1, 2, 3]}, "'timestamp' must be timestamp"),
        ({"timestamp": [None, *EVENTS["timestamp"][:2]]}, "'timestamp' is null in 1 of 3 rows"),
        ({"stage": ["clicked", "seen", None]}, "2 of 3 rows hold an unknown stage: 'seen', None"),
        ({"stage": ["exposed"] * 3}, "none of 3 rows is a positive"),
        ({"event_number": [0, 1, 1]}, "2 different numbers in 3 rows"),
        ({"item_id": ["a", "c", "c"]}, "2 rows hold an id that the item table does not have"),
        ({"user_id": [7, 9, 8]}, "1 rows hold an id that the user table does not have"),
        ({"user_id": ["7", "7", "8"]}, "string in the event table and int64 in the user table"),
    ],
)
def test_event_tables_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_tables(make_tables(**changes))


def test_empty_events_are_refused() -> None:
    tables = make_tables()
    none = tables.events.filter(tables.events["user_id"] == 0)
    with pytest.raises(DataError, match="event table: 0 rows"):
        check_tables(dataclasses.replace(tables, events=none))


@pytest.mark.parametrize(
    "items, features, message",
    [
        ({"item_id": ["a", "b", "a"]}, {}, "2 different ids in 3 rows"),
        ({"item_id": ["a", "b", None]}, {}, "'item_id' is null in 1 of 3 rows"),
        (
            {"item_id": ["a", "b"], "p": [1, 2]},
            {"p": "numeric"},
            r"'p' must be float64 \(numeric\)",
        ),
        ({"item_id": ["a", "b"], "g": ["x", "y"]}, {"g": "multi_categorical"}, "array<string>"),
        ({"item_id": ["a", "b"], "t": [1, 2]}, {"t": "text"}, "'t' must be string"),
        ({"item_id": ["a", "b"], "c": [1.0, 2.0]}, {"c": "categorical"}, "string or int64"),
        ({"item_id": ["a", "b"], "c": [1.0, 2.0]}, {"c": "hashed"}, r"int64 \(hashed\)"),
        ({"item_id": ["a", "b"], "p": [1, 2]}, {"p": "bucketized"}, "'p' must be float64"),
        (
            {"item_id": ["a", "b"], "when": [datetime(2024, 1, 1), None]},
            {"when": "timestamp"},
            r"'when' must be timestamp\('UTC'\) \(timestamp\), it is timestamp",
        ),
        ({"item_id": ["a", "b"], "v": [[1.0], None]}, {"v": "vector"}, "must be array<float32>"),
        (
            {"item_id": ["a", "b"], "v": pa.array([[1.0], [1.0, 2.0]], pa.list_(pa.float32()))},
            {"v": "vector"},
            "item table: column 'v' must hold vectors of one length; 1 of 2 rows have length 2",
        ),
        ({"item_id": ["a", "b"]}, {"title": "text"}, "item table: no column 'title'"),
    ],
)
def test_item_tables_that_are_refused(
    items: dict[str, Any], features: dict[str, Any], message: str
) -> None:
    tables = dataclasses.replace(
        make_tables(), items=ibis.memtable(pa.table(items)), item_features=features
    )
    with pytest.raises(DataError, match=message):
        check_tables(tables)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    tables = make_tables(event_number=[2, 0, 1])
    write_tables(tables, tmp_path)
    back = read_tables(tmp_path)
    check_tables(back)
    assert back.events.to_pyarrow()["event_number"].to_pylist() == [0, 1, 2]
    assert back.items.to_pyarrow()["item_id"].to_pylist() == ["a", "b"]
    assert back.users.to_pyarrow()["user_id"].to_pylist() == [7, 8]
    for name in ("events", "items", "users"):
        before, after = getattr(tables, name), getattr(back, name)
        key = after.columns[0] if name != "events" else "event_number"
        assert after.schema() == before.schema()
        assert after.to_pyarrow().to_pylist() == before.order_by(key).to_pyarrow().to_pylist()
    assert back.item_features == tables.item_features
    assert back.user_features == tables.user_features
    assert back.dropped == tables.dropped


def test_a_folder_that_was_not_finished_is_refused(tmp_path: Path) -> None:
    write_tables(make_tables(), tmp_path)
    (tmp_path / "tables.json").unlink()
    with pytest.raises(DataError, match=r"no tables\.json"):
        read_tables(tmp_path)
