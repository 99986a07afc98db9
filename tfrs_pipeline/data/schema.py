"""Event, item and user tables: their columns, their checks, their files."""

from __future__ import annotations

import difflib
import enum
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.datatypes as dt
from ibis.backends.duckdb import Backend as DuckDB

from tfrs_pipeline.config import FeatureKind

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Input that does not keep the contract. The message says where, how many rows, what to do."""


class Stage(enum.StrEnum):
    """The furthest stage that an item reached in a request."""

    RETRIEVED = "retrieved"
    """Lost in pre-rank."""
    PRE_RANKED = "pre_ranked"
    """Lost in rank."""
    RANKED = "ranked"
    """Survived rank, was not shown."""
    EXPOSED = "exposed"
    """Shown, not clicked: never a negative of that user."""
    CLICKED = "clicked"
    """Shown and clicked: a positive."""


@dataclass(frozen=True)
class Dropped:
    """Rows that a source or a filter left out.

    Args:
        reason: Why, for a person.
        num_rows: How many, 1 or more.
    """

    reason: str
    num_rows: int


@dataclass(frozen=True)
class Tables:
    """The three tables that every source turns into. Rows have no order of their own.

    Args:
        events: `user_id` and `item_id` (int64 or string), `event_number` (int64, unique: the order
            in the source), `stage` (a `Stage`); optional `timestamp` (UTC), `request_id`, `rank`,
            `score`, `weight`, `part` (the log's own split) and context columns.
        items: One row an id: `item_id` and feature columns. Holds every item of `events`. A column
            `title`, if there is one, is what people are shown.
        users: One row an id: `user_id` and feature columns. Holds every user of `events`.
        item_features: Feature columns of `items` and their kinds: categorical or hashed (string or
            int64), multi_categorical (array<string>), numeric or bucketized (float64), text
            (string), timestamp (UTC), vector (array<float32>, of one length). Nulls are missing
            values.
        user_features: The same of `users`.
        dropped: What the source left out, and why.
    """

    events: ibis.Table
    items: ibis.Table
    users: ibis.Table
    item_features: Mapping[str, FeatureKind] = field(default_factory=dict)
    user_features: Mapping[str, FeatureKind] = field(default_factory=dict)
    dropped: tuple[Dropped, ...] = ()


@dataclass(frozen=True)
class Source:
    """What to call a table and its columns in an error message.

    Args:
        name: A file, or what the table is.
        columns: Canonical column name -> its name in the file, where they differ.
    """

    name: str
    columns: Mapping[str, str] = field(default_factory=dict)

    def column(self, name: str) -> str:
        """Says where a column stands, for the start of a message."""
        return f"{self.name}: column {self.columns.get(name, name)!r}"


def check_tables(tables: Tables) -> None:
    """Checks the contract of `Tables`.

    Raises:
        DataError: Naming table, column, row count and remedy.
    """
    check_events(tables.events, Source("event table"))
    check_entities(tables.items, "item_id", tables.item_features, Source("item table"))
    check_entities(tables.users, "user_id", tables.user_features, Source("user table"))
    for entities, name in ((tables.items, "item_id"), (tables.users, "user_id")):
        num_missing = count_missing(tables.events, entities, name)
        if num_missing:
            raise DataError(
                f"event table: column {name!r}: {num_missing} rows hold an id that the "
                f"{name.removesuffix('_id')} table does not have. Add the ids to it (features may "
                "be null), or drop the events."
            )


def check_events(events: ibis.Table, source: Source, *, requires_positives: bool = True) -> None:
    """Checks an event table by itself.

    Args:
        events: The table.
        source: Its name in messages.
        requires_positives: Whether a table without a positive is refused; a label may still make
            some.

    Raises:
        DataError: On a missing column, a wrong type, an empty table, null or reserved ids, null
            timestamps, weights that are null, negative or not finite, an unknown stage, repeated
            event numbers, or no positive at all.
    """
    for name in ("user_id", "item_id", "event_number", "stage"):
        require_column(events.columns, name, source, "Rename or add it.")
    _check_id_type(events, "user_id", source)
    _check_id_type(events, "item_id", source)
    if not events.schema()["event_number"].is_int64():
        raise DataError(_wrong_type(events, "event_number", "int64", source))
    if not events.schema()["stage"].is_string():
        raise DataError(_wrong_type(events, "stage", "string", source))
    if "timestamp" in events.columns:
        _check_timestamp_type(events, source)
    stages = [str(stage) for stage in Stage]
    counts = _count(
        events,
        num_positives=events["stage"] == Stage.CLICKED.value,
        num_unknown_stages=events["stage"].isnull() | events["stage"].notin(stages),
        **_bad_weight(events, source),
        **{
            f"null {name}": events[name].isnull()
            for name in ("event_number", "timestamp")
            if name in events.columns
        },
    )
    num_rows = counts["num_rows"]
    _refuse_empty(num_rows, source)
    check_ids(events, "user_id", source)
    check_ids(events, "item_id", source)
    for name in ("event_number", "timestamp"):
        if counts.get(f"null {name}"):
            raise DataError(
                f"{source.column(name)} is null in {counts[f'null {name}']} of {num_rows} rows. "
                "Drop these rows, or leave the column out where no time is known."
            )
    if counts["num_unknown_stages"]:
        _refuse_stages(events, counts["num_unknown_stages"], num_rows, source)
    num_distinct = events["event_number"].nunique().to_pyarrow().as_py()
    if num_distinct != num_rows:
        raise DataError(
            f"{source.column('event_number')} holds {num_distinct} different numbers in {num_rows} "
            "rows. It is the order in the source, which breaks ties in time: number the rows."
        )
    if counts.get("bad weight"):
        raise DataError(
            f"{source.column('weight')} is null, negative or not finite in {counts['bad weight']} "
            f"of {num_rows} rows. Give these rows a weight (1 is neutral), or drop them."
        )
    if requires_positives and not counts["num_positives"]:
        raise DataError(
            f"{source.column('stage')}: none of {num_rows} rows is a positive (stage 'clicked'). "
            "Check stage_values, or the rating threshold."
        )


def _bad_weight(events: ibis.Table, source: Source) -> dict[str, ibis.Value]:
    """Names the condition under which an event's weight cannot be used, if there are weights."""
    if "weight" not in events.columns:
        return {}
    weight = events["weight"]
    if not weight.type().is_numeric():
        raise DataError(_wrong_type(events, "weight", "a number", source))
    value = weight.cast("float64")
    return {"bad weight": value.isnull() | (value < 0) | value.isnan() | value.isinf()}


def check_entities(
    table: ibis.Table, id_name: str, features: Mapping[str, FeatureKind], source: Source
) -> None:
    """Checks an item or user table by itself.

    Args:
        table: The table.
        id_name: `item_id` or `user_id`.
        features: Feature columns and their kinds.
        source: Its name in messages.

    Raises:
        DataError: On a missing column, a wrong type, null, reserved or repeated ids, numbers that
            are not finite, or vectors of several lengths.
    """
    require_column(table.columns, id_name, source, "Rename or add it.")
    _check_id_type(table, id_name, source)
    for name, kind in features.items():
        require_column(table.columns, name, source, "List the features under their own names.")
        if not _fits_kind(table.schema()[name], kind):
            raise DataError(_wrong_type(table, name, f"{_KIND_TYPES[kind]} ({kind})", source))
        if kind == "vector":
            _check_vectors(table, name, source)
        elif kind in ("numeric", "bucketized"):
            _refuse_not_finite(table, name, table[name].isinf(), source)
    check_ids(table, id_name, source)
    counts = table.aggregate(num_rows=table.count(), num_ids=table[id_name].nunique())
    row = counts.to_pyarrow().to_pylist()[0]
    if row["num_ids"] != row["num_rows"]:
        raise DataError(
            f"{source.column(id_name)} holds {row['num_ids']} different ids in {row['num_rows']} "
            "rows. One row an id: remove the repeated ones."
        )


def check_ids(table: ibis.Table, name: str, source: Source) -> None:
    """Refuses null and reserved ids (-1 and "" mark empty slots).

    Raises:
        DataError: With the number of rows.
    """
    reserved = -1 if table.schema()[name].is_integer() else ""
    counts = _count(table, null=table[name].isnull(), reserved=table[name] == reserved)
    if counts["null"]:
        raise DataError(
            f"{source.column(name)} is null in {counts['null']} of {counts['num_rows']} rows. "
            "Drop these rows, or give them an id."
        )
    if counts["reserved"]:
        raise DataError(
            f"{source.column(name)} is {reserved!r} in {counts['reserved']} of "
            f"{counts['num_rows']} rows. {reserved!r} is reserved for empty slots: rename the id, "
            "or drop these rows."
        )


def require_column(columns: Collection[str], name: str, source: Source, remedy: str) -> None:
    """Refuses a table without a column.

    Raises:
        DataError: Naming the nearest columns that there are, and the remedy.
    """
    if name in columns:
        return
    near = difflib.get_close_matches(name, columns, n=3, cutoff=0.5)
    hint = f"Nearest: {', '.join(near)}." if near else f"It has: {', '.join(columns)}."
    raise DataError(f"{source.name}: no column {name!r}. {hint} {remedy}")


def count_missing(events: ibis.Table, entities: ibis.Table, name: str) -> int:
    """Counts the events whose id is not in an item or user table.

    Raises:
        DataError: If the ids have different types.
    """
    types = events.schema()[name], entities.schema()[name]
    if types[0].is_string() != types[1].is_string():
        raise DataError(
            f"Column {name!r} is {types[0]} in the event table and {types[1]} in the "
            f"{name.removesuffix('_id')} table. Give both the same type."
        )
    return int(events.anti_join(entities, name).count().to_pyarrow().as_py())


def write_tables(tables: Tables, folder: Path) -> None:
    """Writes `events.parquet`, `items.parquet`, `users.parquet` and `tables.json`.

    Events are written by event number, items and users by id. `tables.json`, with the feature kinds
    and what was dropped, comes last: a folder that has it is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.json").unlink(missing_ok=True)
    tables.events.order_by("event_number").to_parquet(folder / "events.parquet")
    tables.items.order_by("item_id").to_parquet(folder / "items.parquet")
    tables.users.order_by("user_id").to_parquet(folder / "users.parquet")
    about = {
        "item_features": dict(tables.item_features),
        "user_features": dict(tables.user_features),
        "dropped": [asdict(dropped) for dropped in tables.dropped],
    }
    (folder / "tables.json").write_text(json.dumps(about, indent=2), encoding="utf-8")


def read_tables(folder: Path, connection: DuckDB | None = None) -> Tables:
    """Opens what `write_tables` wrote, without loading it.

    Args:
        folder: Where the files are.
        connection: DuckDB connection to open them in; a new one if None.

    Raises:
        DataError: If the folder holds no whole set of tables.
    """
    if not (folder / "tables.json").exists():
        raise DataError(f"{folder} has no tables.json: write_tables did not finish there.")
    connection = connection or ibis.duckdb.connect()
    about: dict[str, Any] = json.loads((folder / "tables.json").read_text(encoding="utf-8"))
    return Tables(
        events=connection.read_parquet(folder / "events.parquet"),
        items=connection.read_parquet(folder / "items.parquet"),
        users=connection.read_parquet(folder / "users.parquet"),
        item_features=about["item_features"],
        user_features=about["user_features"],
        dropped=tuple(Dropped(**dropped) for dropped in about["dropped"]),
    )


_KIND_TYPES: dict[FeatureKind, str] = {
    "categorical": "string or int64",
    "hashed": "string or int64",
    "multi_categorical": "array<string>",
    "numeric": "float64",
    "bucketized": "float64",
    "text": "string",
    "timestamp": "timestamp('UTC')",
    "vector": "array<float32>",
}


def _fits_kind(dtype: dt.DataType, kind: FeatureKind) -> bool:
    if kind in ("categorical", "hashed"):
        return dtype.is_string() or dtype.is_int64()
    if kind == "multi_categorical":
        return isinstance(dtype, dt.Array) and dtype.value_type.is_string()
    if kind == "vector":
        return isinstance(dtype, dt.Array) and dtype.value_type.is_float32()
    if kind == "timestamp":
        return isinstance(dtype, dt.Timestamp) and dtype.timezone == "UTC"
    return dtype.is_float64() if kind in ("numeric", "bucketized") else dtype.is_string()


def _check_vectors(table: ibis.Table, name: str, source: Source) -> None:
    """Refuses vectors of several lengths or with numbers that are not finite, or none at all."""
    vector = table[name]
    is_bad = vector.map(lambda part: part.isnull() | part.isnan() | part.isinf()).anys()
    _refuse_not_finite(table, name, is_bad, source)
    lengths = (
        table.filter(vector.notnull())
        .group_by(length=vector.length())
        .aggregate(num_rows=ibis._.count())
        .order_by(ibis.desc("num_rows"), ibis.desc("length"))
        .to_pyarrow()
        .to_pylist()
    )
    num_rows = table.count().to_pyarrow().as_py()
    if not any(row["length"] for row in lengths):
        raise DataError(
            f"{source.column(name)}: none of {num_rows} rows holds a vector. Name another column, "
            "or leave the feature out."
        )
    if len(lengths) > 1:
        num_other = sum(row["num_rows"] for row in lengths[1:])
        raise DataError(
            f"{source.column(name)} must hold vectors of one length; {lengths[0]['num_rows']} of "
            f"{num_rows} rows have length {lengths[0]['length']}, {num_other} rows another, such "
            f"as {lengths[1]['length']}. Correct them, or leave them null where there is none."
        )


def _refuse_not_finite(table: ibis.Table, name: str, is_bad: ibis.Value, source: Source) -> None:
    counts = _count(table, bad=is_bad)
    if counts["bad"]:
        raise DataError(
            f"{source.column(name)} must hold finite numbers; {counts['bad']} of "
            f"{counts['num_rows']} rows do not (float32 at most, in vectors). Correct them, or "
            "leave them null where there is none."
        )


def _count(table: ibis.Table, **conditions: ibis.Value) -> dict[str, int]:
    counts = {name: condition.sum() for name, condition in conditions.items()}
    row = table.aggregate(num_rows=table.count(), **counts).to_pyarrow().to_pylist()[0]
    return {name: int(value or 0) for name, value in row.items()}


def _check_id_type(table: ibis.Table, name: str, source: Source) -> None:
    dtype = table.schema()[name]
    if not (dtype.is_int64() or dtype.is_string()):
        raise DataError(_wrong_type(table, name, "int64 or string", source))


def _check_timestamp_type(events: ibis.Table, source: Source) -> None:
    dtype = events.schema()["timestamp"]
    if not isinstance(dtype, dt.Timestamp):
        raise DataError(_wrong_type(events, "timestamp", "timestamp('UTC')", source))
    if dtype.timezone != "UTC":
        raise DataError(
            f"{source.column('timestamp')} must be UTC, it is {dtype}. Naive times need the "
            "time zone they are in: pass time_zone='Europe/Berlin', or 'UTC'."
        )


def _wrong_type(table: ibis.Table, name: str, wanted: str, source: Source) -> str:
    num_rows = table.count().to_pyarrow().as_py()
    return (
        f"{source.column(name)} must be {wanted}, it is {table.schema()[name]} ({num_rows} rows). "
        "Cast it, or name another column."
    )


def _refuse_empty(num_rows: int, source: Source) -> None:
    if not num_rows:
        raise DataError(f"{source.name}: 0 rows. Give a file that holds events.")


def _refuse_stages(events: ibis.Table, num_unknown: int, num_rows: int, source: Source) -> None:
    stages = [str(stage) for stage in Stage]
    unknown = events.filter(events["stage"].isnull() | events["stage"].notin(stages))
    values = unknown.select("stage").distinct().limit(10).to_pyarrow()["stage"].to_pylist()
    listed = ", ".join(sorted(repr(value) for value in values))
    raise DataError(
        f"{source.column('stage')}: {num_unknown} of {num_rows} rows hold an unknown stage: "
        f"{listed}. Known: {', '.join(stages)}. Say what each value means: "
        "stage_values={value in the file: stage}."
    )
