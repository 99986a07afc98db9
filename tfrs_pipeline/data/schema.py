"""The words of the tables, and their contract: stages, kinds of features, what is refused.

Ibis is named here in type hints alone: whoever needs only a word does not load it.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import ibis
    import ibis.expr.datatypes as dt
    import ibis.expr.types as ir

FeatureKind: TypeAlias = Literal[
    "categorical",
    "hashed",
    "multi_categorical",
    "text",
    "numeric",
    "bucketized",
    "timestamp",
    "vector",
]
SplitKind: TypeAlias = Literal["time", "last_share", "last_n", "held_out_users", "column"]
Exclude: TypeAlias = Literal["clicked", "seen", "none"]
UnknownItems: TypeAlias = Literal["keep", "drop", "error"]
Duplicates: TypeAlias = Literal["keep", "drop", "error"]
TimestampUnit: TypeAlias = Literal["s", "ms", "us", "ns"]

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
_LARGEST_FLOAT32 = 3.4028234663852886e38


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
    """Rows that a source or a filter dropped.

    Args:
        reason: Why, for a person.
        num_rows: How many, 1 or more.
    """

    reason: str
    num_rows: int


@dataclass(frozen=True)
class Source:
    """What to call a table and its columns in an error message.

    Args:
        name: A file, or what the table is.
        columns: Column name -> its name in the source, where they differ.
    """

    name: str
    columns: Mapping[str, str] = field(default_factory=dict)

    def column(self, name: str) -> str:
        """Says where a column stands, for the start of a message."""
        return f"{self.name}: column {self.columns.get(name, name)!r}"


class Refusal(NamedTuple):
    """A reason to refuse a table: rows that no table may have.

    Args:
        column: The column to name, and to show values of.
        is_bad: True in the rows.
        problem: What is wrong with the column there, such as "is null".
        remedy: What to do.
    """

    column: str
    is_bad: ir.BooleanValue
    problem: str
    remedy: str


def refuse_rows(table: ibis.Table, source: Source, *refusals: Refusal) -> None:
    """Refuses a table that has rows it must not have. All conditions are counted in one pass.

    Raises:
        DataError: For the first condition that any row meets: column, problem, number of rows, a
            few values, remedy.
    """
    sums = {str(i): refusal.is_bad.sum() for i, refusal in enumerate(refusals)}
    counts = table.aggregate(num_rows=table.count(), **sums).to_pyarrow().to_pylist()[0]
    for i, (column, is_bad, problem, remedy) in enumerate(refusals):
        if counts[str(i)]:
            values = table.filter(is_bad).select(column).distinct().limit(5).to_pyarrow()[column]
            listed = ", ".join(sorted(repr(value) for value in values.to_pylist()))
            examples = "" if listed == "None" else f", such as {listed}"
            raise DataError(
                f"{source.column(column)} {problem} in {counts[str(i)]} of {counts['num_rows']} "
                f"rows{examples}. {remedy}"
            )


def require_column(columns: Collection[str], name: str, source: Source, remedy: str) -> None:
    """Refuses a table without a column, naming the nearest that there are, and the remedy."""
    if name in columns:
        return
    near = difflib.get_close_matches(name, columns, n=3, cutoff=0.5)
    hint = f"Nearest: {', '.join(near)}." if near else f"It has: {', '.join(columns)}."
    raise DataError(f"{source.name}: no column {name!r}. {hint} {remedy}")


def wrong_type(table: ibis.Table, column: str, wanted: str, source: Source) -> DataError:
    """Makes the error of a column that has another type than it must have."""
    return DataError(
        f"{source.column(column)} must be {wanted}, it is {table.schema()[column]} "
        f"({count_rows(table)} rows). Cast it, or name another column."
    )


def count_rows(table: ibis.Table) -> int:
    """Counts the rows of a table."""
    return int(table.count().to_pyarrow().as_py())


def check_events(events: ibis.Table, source: Source) -> None:
    """Checks an event table by itself (see `Log`)."""
    for name in ("user_id", "item_id", "event_number", "stage"):
        require_column(events.columns, name, source, "Rename or add it.")
    if not events.schema()["event_number"].is_int64():
        raise wrong_type(events, "event_number", "int64", source)
    if not events.schema()["stage"].is_string():
        raise wrong_type(events, "stage", "string", source)
    if "timestamp" in events.columns and not is_utc(events.schema()["timestamp"]):
        raise wrong_type(events, "timestamp", "timestamp('UTC')", source)
    stages = [str(stage) for stage in Stage]
    row = events.aggregate(
        num_rows=events.count(),
        num_positives=(events["stage"] == Stage.CLICKED.value).sum(),
        num_distinct=events["event_number"].nunique(),
    )
    counts = row.to_pyarrow().to_pylist()[0]
    if not counts["num_rows"]:
        raise DataError(f"{source.name}: 0 rows. Give a log that holds events.")
    refuse_rows(
        events,
        source,
        *_id_refusals(events, "user_id", source),
        *_id_refusals(events, "item_id", source),
        *(
            Refusal(
                name,
                events[name].isnull(),
                "is null",
                "Drop these rows, or omit the column where it is not known.",
            )
            for name in ("event_number", "timestamp")
            if name in events.columns
        ),
        Refusal(
            "stage",
            events["stage"].isnull() | events["stage"].notin(stages),
            "holds an unknown stage",
            f"Known: {', '.join(stages)}. Set stage_values to the stage of each value.",
        ),
        *_weight_refusals(events, source),
    )
    if counts["num_distinct"] != counts["num_rows"]:
        raise DataError(
            f"{source.column('event_number')} holds {counts['num_distinct']} different numbers in "
            f"{counts['num_rows']} rows. It is the order in the source, which breaks ties in time: "
            "number the rows."
        )
    if not counts["num_positives"]:
        raise DataError(
            f"{source.name}: none of {counts['num_rows']} rows is a positive (stage 'clicked'). "
            "Check stage_values, rating_threshold or label."
        )


def check_entities(
    table: ibis.Table, id_name: str, features: Mapping[str, FeatureKind], source: Source
) -> None:
    """Checks an item or user table by itself (see `Log`)."""
    require_column(table.columns, id_name, source, "Rename or add it.")
    refusals = _id_refusals(table, id_name, source)
    for name, kind in features.items():
        require_column(table.columns, name, source, f"Name the columns of {id_name[:4]}_features.")
        if not _fits_kind(table.schema()[name], kind):
            raise wrong_type(table, name, f"{_KIND_TYPES[kind]} ({kind})", source)
        if kind in ("numeric", "bucketized"):
            refusals.append(_not_finite(name, table[name].abs() > _LARGEST_FLOAT32))
        elif kind == "vector":
            refusals.append(
                _not_finite(name, table[name].map(lambda x: x.isnull() | _is_not_finite(x)).anys())
            )
    refuse_rows(table, source, *refusals)
    for name in [name for name, kind in features.items() if kind == "vector"]:
        _check_lengths(table, name, source)
    counts = table.aggregate(num_rows=table.count(), num_ids=table[id_name].nunique())
    row = counts.to_pyarrow().to_pylist()[0]
    if row["num_ids"] != row["num_rows"]:
        raise DataError(
            f"{source.column(id_name)} holds {row['num_ids']} different ids in {row['num_rows']} "
            "rows. One row an id: remove the repeated ones."
        )


def is_utc(dtype: dt.DataType) -> bool:
    """Says whether a column holds timestamps in UTC."""
    return dtype.is_timestamp() and dtype.timezone == "UTC"


def _id_refusals(table: ibis.Table, name: str, source: Source) -> list[Refusal]:
    """Null and reserved ids: -1 and "" mark empty slots."""
    dtype = table.schema()[name]
    if not (dtype.is_int64() or dtype.is_string()):
        raise wrong_type(table, name, "int64 or string", source)
    reserved = -1 if dtype.is_int64() else ""
    remedy = "Drop these rows, or give them an id."
    return [
        Refusal(name, table[name].isnull(), "is null", remedy),
        Refusal(
            name,
            table[name] == reserved,
            f"is {reserved!r}, which is reserved for empty slots,",
            remedy,
        ),
    ]


def _weight_refusals(events: ibis.Table, source: Source) -> list[Refusal]:
    if "weight" not in events.columns:
        return []
    if not events["weight"].type().is_numeric():
        raise wrong_type(events, "weight", "a number", source)
    weight = events["weight"].cast("float64")
    is_bad = weight.isnull() | (weight < 0) | _is_not_finite(weight)
    remedy = "Give these rows a weight (1 is neutral), or drop them."
    return [Refusal("weight", is_bad, "is null, negative or not finite", remedy)]


def _is_not_finite(value: ir.FloatingValue) -> ir.BooleanValue:
    return value.isnan() | value.isinf()


def _not_finite(name: str, is_bad: ir.BooleanValue) -> Refusal:
    return Refusal(
        name,
        is_bad,
        "does not hold finite numbers that float32 can hold",
        "Correct them, or leave them null where there is none.",
    )


def _fits_kind(dtype: dt.DataType, kind: FeatureKind) -> bool:
    if kind in ("categorical", "hashed"):
        return dtype.is_string() or dtype.is_int64()
    if kind == "multi_categorical":
        return dtype.is_array() and dtype.value_type.is_string()
    if kind == "vector":
        return dtype.is_array() and dtype.value_type.is_float32()
    if kind == "timestamp":
        return is_utc(dtype)
    return dtype.is_float64() if kind in ("numeric", "bucketized") else dtype.is_string()


def _check_lengths(table: ibis.Table, name: str, source: Source) -> None:
    """Refuses vectors of several lengths, or none at all."""
    counted = (
        table.filter(table[name].notnull())
        .group_by(length=table[name].length())
        .aggregate(num_rows=lambda t: t.count())
    )
    lengths = counted.to_pyarrow().to_pylist()
    lengths.sort(key=lambda row: (row["num_rows"], row["length"]), reverse=True)
    num_rows = count_rows(table)
    if not any(row["length"] for row in lengths):
        raise DataError(
            f"{source.column(name)}: none of {num_rows} rows holds a vector. Name another column, "
            "or drop the feature."
        )
    if len(lengths) > 1:
        num_other = sum(row["num_rows"] for row in lengths[1:])
        raise DataError(
            f"{source.column(name)} must hold vectors of one length; {lengths[0]['num_rows']} of "
            f"{num_rows} rows have length {lengths[0]['length']}, {num_other} rows another, such "
            f"as {lengths[1]['length']}. Correct them, or leave them null where there is none."
        )
