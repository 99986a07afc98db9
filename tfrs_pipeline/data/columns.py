"""One column of a file turned into the type that the tables have.

CSV columns arrive as text (`is_text`) and are typed here, by all of their values: a sniffer that
looks at the first rows loses leading zeros and fails late.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir

from tfrs_pipeline.data.schema import DataError, FeatureKind, Source

TimestampUnit = Literal["s", "ms", "us", "ns"]
MILLISECONDS = (10**11, 10**14 - 1)
"""First and last number that is read as a time in milliseconds: of 1973 to 5138."""

_MICROSECONDS = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}
# A time of 1973 or later, as a number, tells its unit: the four ranges do not overlap until 5138.
_UNIT_BELOW = ((1e11, "s"), (1e14, "ms"), (1e17, "us"), (float("inf"), "ns"))
_UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_NAIVE = dt.Timestamp(scale=6)
_UTC = dt.Timestamp(timezone="UTC", scale=6)


@ibis.udf.scalar.builtin(name="make_timestamptz", signature=((dt.int64,), _UTC))
def _from_microseconds(microseconds: ir.IntegerValue) -> ir.TimestampValue:
    """DuckDB's own function."""


@ibis.udf.scalar.builtin(name="make_timestamp_ns", signature=((dt.int64,), dt.Timestamp(scale=9)))
def _from_nanoseconds(nanoseconds: ir.IntegerValue) -> ir.TimestampValue:
    """DuckDB's own function."""


@ibis.udf.scalar.builtin(name="timezone", signature=((dt.string, _NAIVE), _UTC))
def _in_time_zone(time_zone: ir.StringValue, time: ir.TimestampValue) -> ir.TimestampValue:
    """DuckDB's own function."""


def is_integer_id(table: ibis.Table, column: str, source: Source, *, is_text: bool) -> bool:
    """Tells whether ids are kept as int64.

    Text is an integer only if every value is written as one is ("7", not "007", "7.0" or "+7"), so
    that no two ids fall together.

    Raises:
        DataError: If the column is neither integer nor string.
    """
    dtype = table.schema()[column]
    if dtype.is_integer():
        return True
    if not dtype.is_string():
        raise DataError(_wrong_type(table, column, "an integer or a string", source))
    return is_text and _count(table, table[column] != _as_integer_text(table[column])) == 0


def convert_timestamp(
    table: ibis.Table,
    column: str,
    source: Source,
    *,
    is_text: bool,
    unit: TimestampUnit | None,
    time_zone: str | None,
) -> ir.TimestampValue:
    """Makes a UTC timestamp of numbers, of times with an offset, or of naive ones in a time zone.

    Args:
        table: The table that holds the column.
        column: Its name there.
        source: For messages.
        is_text: Whether strings may stand for other types (CSV).
        unit: What numbers count since 1970; None means seconds.
        time_zone: Where naive times were read off the clock, such as "Europe/Berlin"; None refuses
            them.

    Raises:
        DataError: If the type is another one, numbers look like another unit, naive times come
            without a time zone, or a value cannot be read.
    """
    value = table[column]
    if is_text:
        value = _type_time(table, column, source)
    dtype = value.type()
    if dtype.is_numeric():
        return _from_numbers(table, value, column, source, unit)
    if isinstance(dtype, dt.Timestamp) and dtype.timezone is not None:
        return value.cast(_UTC)
    if dtype.is_timestamp() or dtype.is_date():
        if time_zone is None:
            raise DataError(
                f"{source.name}: column {column!r} holds times without a time zone "
                f"({count_rows(table)} rows). Say where they were read off the clock: "
                "time_zone='UTC', or 'Europe/Berlin'."
            )
        return _in_time_zone(ibis.literal(time_zone), value.cast(_NAIVE))
    raise DataError(_wrong_type(table, column, "a timestamp or a number", source))


def convert_number(
    table: ibis.Table, column: str, source: Source, to: Literal["int64", "float64"] = "float64"
) -> ir.Value:
    """Makes int64 or float64 of a column.

    Raises:
        DataError: If it has another type, or values that are not numbers.
    """
    value = table[column]
    if not (value.type().is_numeric() or value.type().is_boolean() or value.type().is_string()):
        raise DataError(_wrong_type(table, column, "a number", source))
    converted = value.try_cast(to)
    is_unread = value.notnull() & converted.isnull()
    if to == "int64":  # DuckDB rounds 1.5 without a word.
        is_unread = is_unread | (value.try_cast("float64") != converted)
    what = "whole numbers" if to == "int64" else "numbers"
    _refuse_unread(table, column, is_unread, what, source)
    return converted


def convert_context(table: ibis.Table, column: str, *, is_text: bool) -> ir.Value:
    """Keeps a column's type; text becomes int64 or float64 where every value is such a number."""
    value = table[column]
    if not is_text:
        return value
    if _count(table, value != _as_integer_text(value)) == 0:
        return value.cast("int64")
    as_number = value.try_cast("float64")
    has_text = _count(table, value.notnull() & as_number.isnull()) > 0
    return value if has_text else as_number


def convert_feature(
    table: ibis.Table,
    column: str,
    kind: FeatureKind,
    source: Source,
    *,
    is_text: bool,
    list_separator: str,
    timestamp_unit: TimestampUnit | None = None,
    time_zone: str | None = None,
) -> ir.Value:
    """Gives a feature column the type of its kind (see `Tables`).

    Args:
        table: The table that holds the column.
        column: Its name there.
        kind: What it becomes.
        source: For messages.
        is_text: Whether strings may stand for other types (CSV).
        list_separator: Parts the values of a multi_categorical or vector feature written in one
            string.
        timestamp_unit: Of a timestamp feature, as `unit` of `convert_timestamp`.
        time_zone: Likewise.

    Raises:
        DataError: If the column's type does not fit the kind, or a value cannot be read.
    """
    if kind in ("numeric", "bucketized"):
        return convert_number(table, column, source)
    if kind in ("categorical", "hashed"):
        return _convert_category(table, column, source, is_text=is_text)
    if kind == "multi_categorical":
        return _convert_categories(table, column, source, list_separator)
    if kind == "vector":
        return _convert_vector(table, column, source, list_separator)
    if kind == "timestamp":
        time = convert_timestamp(
            table, column, source, is_text=is_text, unit=timestamp_unit, time_zone=time_zone
        )
        _refuse_far_times(table, time, column, source)
        if timestamp_unit is None:
            _refuse_years(table, time, column, source)
        return time
    value = table[column]
    if not value.type().is_string():
        raise DataError(_wrong_type(table, column, "a string", source))
    return value


def _convert_category(table: ibis.Table, column: str, source: Source, *, is_text: bool) -> ir.Value:
    value = table[column]
    dtype = value.type()
    if is_text:
        is_integer = is_integer_id(table, column, source, is_text=True)
        return value.cast("int64") if is_integer else value
    if dtype.is_integer():
        return value.cast("int64")
    if dtype.is_string() or dtype.is_boolean():
        return value.cast("string")
    raise DataError(_wrong_type(table, column, "an integer or a string", source))


def _convert_categories(
    table: ibis.Table, column: str, source: Source, list_separator: str
) -> ir.Value:
    value = table[column]
    if isinstance(value.type(), dt.Array):
        return value.cast("array<string>")
    if value.type().is_string():
        stripped = value.split(list_separator).map(lambda part: part.strip())
        return stripped.filter(lambda part: part != "")
    raise DataError(_wrong_type(table, column, "a list or a string", source))


def _convert_vector(
    table: ibis.Table, column: str, source: Source, list_separator: str
) -> ir.Value:
    """Makes lists of float32; what cannot be one becomes a null in the list, for the checks."""
    value = table[column]
    dtype = value.type()
    if isinstance(dtype, dt.Array) and dtype.value_type.is_numeric():
        return value.cast(dt.Array(dtype.value_type)).map(lambda part: part.try_cast("float32"))
    if not dtype.is_string():
        raise DataError(_wrong_type(table, column, "a list of numbers or a string", source))
    parts = value.split(list_separator).map(lambda part: part.strip())
    is_unread = parts.map(lambda part: part.try_cast("float64").isnull()).anys()
    what = f"numbers separated by {list_separator!r} (list_separator)"
    _refuse_unread(table, column, is_unread, what, source)
    return parts.map(lambda part: part.try_cast("float32"))


def _as_integer_text(value: ir.StringValue) -> ir.StringValue:
    """Writes the value as int64 is written; "" where it is none, so that it differs."""
    return ibis.coalesce(value.try_cast("int64").cast("string"), "")


def _type_time(table: ibis.Table, column: str, source: Source) -> ir.Value:
    value = table[column]
    number = convert_context(table, column, is_text=True)
    if number.type().is_numeric():
        return number
    has_offset = value.re_search(r"(Z|UTC|[+-]\d\d(:?\d\d)?)$") & value.contains(":")
    zoned = value.try_cast(_UTC)
    is_no_time = value.notnull() & zoned.isnull()
    is_no_number = value.try_cast("float64").isnull()
    _refuse_unread(table, column, is_no_time & is_no_number, "times", source)
    _refuse_unread(table, column, is_no_time, "times written one way", source)
    num_naive = _count(table, ~has_offset)
    if num_naive == 0:
        return zoned
    if _count(table, has_offset):
        raise DataError(
            f"{source.name}: column {column!r} holds {num_naive} times without an offset among "
            f"{count_rows(table)} rows, the others have one. Write all of them the same way."
        )
    return value.try_cast(_NAIVE)


def _from_numbers(
    table: ibis.Table, value: ir.NumericValue, column: str, source: Source, unit: str | None
) -> ir.TimestampValue:
    if value.type().is_floating():
        value = value.isnan().ifelse(ibis.null(), value)
    largest = float(table.aggregate(largest=value.abs().max()).to_pyarrow()[0][0].as_py() or 0)
    where = f"{source.name}: column {column!r}"
    if unit is None and 19_000_101 <= largest <= 21_001_231:
        raise DataError(
            f"{where} holds numbers up to {largest:.0f} ({count_rows(table)} rows), which look "
            "like dates (YYYYMMDD). Write them as 2024-01-31, or pass timestamp_unit='s' if they "
            "are seconds."
        )
    looks_like = next(name for below, name in _UNIT_BELOW if largest < below)
    if largest and looks_like != (unit or "s"):
        raise DataError(
            f"{where} must be UTC in {_UNIT_NAMES[unit or 's']}. Largest value {largest:.2g} "
            f"({count_rows(table)} rows) looks like {_UNIT_NAMES[looks_like]}: pass "
            f"timestamp_unit={looks_like!r}."
        )
    if unit == "ns" and value.type().is_integer():  # Past the whole numbers that a float holds.
        return _in_time_zone(
            ibis.literal("UTC"), _from_nanoseconds(value.cast("int64")).cast(_NAIVE)
        )
    factor = _MICROSECONDS[unit or "s"]
    if value.type().is_integer():
        return _from_microseconds(value.cast("int64") * int(factor))
    return _from_microseconds((value.cast("float64") * factor).round().cast("int64"))


def _refuse_far_times(
    table: ibis.Table, time: ir.TimestampValue, column: str, source: Source
) -> None:
    """Refuses times that no calendar of Python holds, such as a database's infinity."""
    earliest, end = (datetime(year, 1, 1, tzinfo=UTC) for year in (2, 9999))
    num_far = _count(table, (time < earliest) | (time >= end))
    if num_far:
        raise DataError(
            f"{source.name}: column {column!r} must hold times of the years 2 to 9998; {num_far} "
            f"of {count_rows(table)} rows do not. Leave the time empty where it is not known."
        )


def _refuse_years(table: ibis.Table, time: ir.TimestampValue, column: str, source: Source) -> None:
    """Refuses years read as seconds, which all fall into the same half hour of 1970."""
    row = table.aggregate(first=time.min(), last=time.max()).to_pyarrow().to_pylist()[0]
    if row["first"] is None:
        return
    first, last = (int(row[name].timestamp()) for name in ("first", "last"))
    if first >= 1000 and last <= 3000:
        raise DataError(
            f"{source.name}: column {column!r} holds numbers from {first} to {last} "
            f"({count_rows(table)} rows), which look like years. Make it numeric or bucketized, "
            "write dates such as 1999-01-31, or pass timestamp_unit='s' if they are seconds."
        )


def _refuse_unread(
    table: ibis.Table, column: str, is_unread: ir.BooleanValue, what: str, source: Source
) -> None:
    num_unread = _count(table, is_unread)
    if num_unread:
        example = table.filter(is_unread).limit(1).to_pyarrow()[column][0].as_py()
        raise DataError(
            f"{source.name}: column {column!r} must hold {what}; {num_unread} of "
            f"{count_rows(table)} rows do not, such as {example!r}. Correct them, or name another "
            "column."
        )


def _wrong_type(table: ibis.Table, column: str, wanted: str, source: Source) -> str:
    return (
        f"{source.name}: column {column!r} must be {wanted}, it is {table.schema()[column]} "
        f"({count_rows(table)} rows). Cast it, or name another column."
    )


def _count(table: ibis.Table, condition: ir.BooleanValue) -> int:
    return int(table.filter(condition).count().to_pyarrow().as_py())


def count_rows(table: ibis.Table) -> int:
    """Counts the rows of a table, for messages."""
    return int(table.count().to_pyarrow().as_py())
