"""One column of a source turned into the type that the log has: the only place for times.

CSV columns arrive as text and are typed here, by all of their values: a sniffer that looks at the
first rows loses leading zeros and fails late. NaN is a missing value: it becomes null.
"""

from __future__ import annotations

import zoneinfo
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir

from tfrs_pipeline.data.schema import (
    DataError,
    FeatureKind,
    Refusal,
    Source,
    TimestampUnit,
    count_rows,
    refuse_rows,
    wrong_type,
)

_MICROSECONDS = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}
# A time of 1973 or later, as a number, tells its unit: the four ranges do not overlap until 5138.
_UNIT_BELOW = ((1e11, "s"), (1e14, "ms"), (1e17, "us"), (float("inf"), "ns"))
_UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_NAIVE = dt.Timestamp(scale=6)
_UTC = dt.Timestamp(timezone="UTC", scale=6)
_WHOLE = r"^-?(0|[1-9][0-9]*)(\.0)?$"


@ibis.udf.scalar.builtin(name="make_timestamptz", signature=((dt.int64,), _UTC))
def _from_microseconds(microseconds: ir.IntegerValue) -> ir.TimestampValue:
    """DuckDB's own function."""


@ibis.udf.scalar.builtin(name="make_timestamp_ns", signature=((dt.int64,), dt.Timestamp(scale=9)))
def _from_nanoseconds(nanoseconds: ir.IntegerValue) -> ir.TimestampValue:
    """DuckDB's own function."""


@ibis.udf.scalar.builtin(name="timezone", signature=((dt.string, _NAIVE), _UTC))
def _in_time_zone(time_zone: ir.StringValue, time: ir.TimestampValue) -> ir.TimestampValue:
    """DuckDB's own function."""


@dataclass(frozen=True)
class Formats:
    """How values are written where their type does not say it.

    Args:
        timestamp_unit: What numbers count since 1970; None means seconds.
        time_zone: Of times without one, such as "Europe/Berlin"; None refuses them.
        list_separator: Between the values of a multi_categorical or vector feature in a string.
    """

    timestamp_unit: TimestampUnit | None = None
    time_zone: str | None = None
    list_separator: str = "|"

    def __post_init__(self) -> None:
        try:
            zoneinfo.ZoneInfo(self.time_zone or "UTC")
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(
                f"time_zone must be one of the tz database, such as Europe/Berlin. Received: "
                f"{self.time_zone!r}."
            ) from error


@dataclass(frozen=True)
class RawTable:
    """A table as it came.

    Args:
        table: A DuckDB table under the log's names, and `_row`: the order in the source, from 0.
        source: Its names in messages.
        is_text: Whether every column is a string that may stand for another type (CSV).
    """

    table: ibis.Table
    source: Source
    is_text: bool

    def __contains__(self, column: str) -> bool:
        return column in self.table.columns

    def wrong_type(self, column: str, wanted: str) -> DataError:
        """Makes the error of a column of a wrong type."""
        return wrong_type(self.table, column, wanted, self.source)

    def refuse_unread(self, column: str, is_unread: ir.BooleanValue, what: str) -> None:
        """Refuses a column with values that cannot be read as what they must be."""
        remedy = "Correct them, or name another column."
        refusal = Refusal(column, is_unread, f"must hold {what} and does not", remedy)
        refuse_rows(self.table, self.source, refusal)


def is_integer(raw: RawTable, column: str) -> bool:
    """Tells whether ids are kept as int64.

    Text is an integer only if every value is written as one is ("7", not "007", "7.0" or "+7"), so
    that no two ids fall together.
    """
    value = raw.table[column]
    if value.type().is_integer():
        return True
    if not value.type().is_string():
        raise raw.wrong_type(column, "an integer or a string")
    return raw.is_text and not _any(raw, value != _as_integer_text(value))


def to_id(raw: RawTable, column: str) -> ir.Value:
    """Makes int64 or string of an id."""
    return raw.table[column].cast("int64" if is_integer(raw, column) else "string")


def to_timestamp(raw: RawTable, column: str, formats: Formats) -> ir.TimestampValue:
    """Makes UTC timestamps of numbers, of times with an offset, or of naive ones in a time zone."""
    value = raw.table[column]
    if value.type().is_string():
        value = _read_time(raw, column)
    dtype = value.type()
    if dtype.is_numeric():
        time = _from_numbers(raw, value, column, formats.timestamp_unit)
    elif dtype.is_timestamp() and dtype.timezone is not None:
        time = value.cast(_UTC)
    elif dtype.is_timestamp() or dtype.is_date():
        if formats.time_zone is None:
            raise DataError(
                f"{raw.source.column(column)} holds times without a time zone "
                f"({count_rows(raw.table)} rows). Set time_zone to where they were read off the "
                "clock: UTC, or Europe/Berlin."
            )
        time = _in_time_zone(ibis.literal(formats.time_zone), value.cast(_NAIVE))
    else:
        raise raw.wrong_type(column, "a timestamp or a number")
    earliest, end = (datetime(year, 1, 1, tzinfo=UTC) for year in (2, 9999))
    # What no calendar of Python holds, such as a database's infinity.
    is_far = (time < earliest) | (time >= end)
    raw.refuse_unread(column, is_far, "times of the years 2 to 9998")
    return time


def to_number(raw: RawTable, column: str, to: Literal["int64", "float64"] = "float64") -> ir.Value:
    """Makes int64 or float64 of a column; NaN is null."""
    value = raw.table[column]
    if not (value.type().is_numeric() or value.type().is_boolean() or value.type().is_string()):
        raise raw.wrong_type(column, "a number")
    number = value.try_cast("float64")
    is_unread = value.notnull() & number.isnull()
    if to == "int64":  # DuckDB rounds 1.5 without a word.
        converted = value.try_cast("int64")
        is_unread |= number.notnull() & ~number.isnan() & (number != converted).fill_null(True)
    else:
        converted = number
    raw.refuse_unread(column, is_unread, "whole numbers" if to == "int64" else "numbers")
    return number.isnan().ifelse(ibis.null(to), converted)


def to_context(raw: RawTable, column: str) -> ir.Value:
    """Keeps a column's type; text becomes int64 or float64 where every value is such a number."""
    value = raw.table[column]
    if not raw.is_text:
        return value
    return _number_of_text(raw, value)


def to_feature(raw: RawTable, column: str, kind: FeatureKind, formats: Formats) -> ir.Value:
    """Gives a feature column the type of its kind (see `Log`)."""
    if kind in ("numeric", "bucketized"):
        return to_number(raw, column)
    if kind in ("categorical", "hashed"):
        return _to_category(raw, column)
    if kind == "multi_categorical":
        return _to_categories(raw, column, formats.list_separator)
    if kind == "vector":
        return _to_vector(raw, column, formats.list_separator)
    if kind == "timestamp":
        time = to_timestamp(raw, column, formats)
        if formats.timestamp_unit is None:
            _refuse_years(raw, time, column)
        return time
    value = raw.table[column]
    if not value.type().is_string():
        raise raw.wrong_type(column, "a string")
    return value


def _to_category(raw: RawTable, column: str) -> ir.Value:
    """Makes int64 or string of a category.

    Whole numbers that were written as floats ("9.0"), because others are missing, are integers.
    """
    value = raw.table[column]
    dtype = value.type()
    if dtype.is_floating():
        value = value.isnan().ifelse(ibis.null(), value)
        if _any(raw, value != value.round()):
            raise raw.wrong_type(column, "an integer or a string")
        return value.cast("int64")
    if raw.is_text and not _any(raw, ~value.re_search(_WHOLE)):
        integer = value.re_replace(r"\.0$", "").try_cast("int64")
        if not _any(raw, value.notnull() & integer.isnull()):
            return integer
    if dtype.is_integer():
        return value.cast("int64")
    if dtype.is_string() or dtype.is_boolean():
        return value.cast("string")
    raise raw.wrong_type(column, "an integer or a string")


def _to_categories(raw: RawTable, column: str, list_separator: str) -> ir.Value:
    value = raw.table[column]
    if value.type().is_array():
        return value.cast("array<string>")
    if value.type().is_string():
        stripped = value.split(list_separator).map(lambda part: part.strip())
        return stripped.filter(lambda part: part != "")
    raise raw.wrong_type(column, "a list or a string")


def _to_vector(raw: RawTable, column: str, list_separator: str) -> ir.Value:
    """Makes lists of float32; what cannot be one becomes a null in the list, for the checks."""
    value = raw.table[column]
    dtype = value.type()
    if dtype.is_array() and dtype.value_type.is_numeric():
        return value.cast(dt.Array(dtype.value_type)).map(lambda part: part.try_cast("float32"))
    if not dtype.is_string():
        raise raw.wrong_type(column, "a list of numbers or a string")
    parts = value.split(list_separator).map(lambda part: part.strip())
    is_unread = parts.map(lambda part: part.try_cast("float64").isnull()).anys()
    raw.refuse_unread(
        column, is_unread, f"numbers separated by {list_separator!r} (list_separator)"
    )
    return parts.map(lambda part: part.try_cast("float32"))


def _as_integer_text(value: ir.StringValue) -> ir.StringValue:
    """Writes the value as int64 is written; "" where it is none, so that it differs."""
    return ibis.coalesce(value.try_cast("int64").cast("string"), "")


def _number_of_text(raw: RawTable, value: ir.StringValue) -> ir.Value:
    if not _any(raw, value != _as_integer_text(value)):
        return value.cast("int64")
    number = value.try_cast("float64")
    return value if _any(raw, value.notnull() & number.isnull()) else number


def _read_time(raw: RawTable, column: str) -> ir.Value:
    """Reads times written as text: numbers, or ISO 8601 with an offset in all rows or in none."""
    value = raw.table[column]
    number = _number_of_text(raw, value)
    if number.type().is_numeric():
        return number
    zoned = value.try_cast(_UTC)
    is_no_time = value.notnull() & zoned.isnull()
    raw.refuse_unread(column, is_no_time & value.try_cast("float64").isnull(), "times")
    raw.refuse_unread(column, is_no_time, "times written one way")
    has_offset = value.re_search(r"(Z|UTC|[+-]\d\d(:?\d\d)?)$") & value.contains(":")
    if not _any(raw, ~has_offset):
        return zoned
    if _any(raw, has_offset):
        remedy = "The others have one: write all of them the same way."
        refuse_rows(raw.table, raw.source, Refusal(column, ~has_offset, "has no offset", remedy))
    return value.try_cast(_NAIVE)


def _from_numbers(
    raw: RawTable, value: ir.NumericValue, column: str, unit: TimestampUnit | None
) -> ir.TimestampValue:
    if value.type().is_floating():
        value = value.isnan().ifelse(ibis.null(), value)
    found = raw.table.aggregate(largest=value.abs().max()).to_pyarrow()["largest"][0].as_py()
    largest = float(found or 0)
    where = f"{raw.source.column(column)} holds numbers up to {largest:.0f}"
    if unit is None and 19_000_101 <= largest <= 21_001_231:
        raise DataError(
            f"{where} ({count_rows(raw.table)} rows), which look like dates (YYYYMMDD). Write "
            "them as 2024-01-31, or set timestamp_unit to s if they are seconds."
        )
    looks_like = next(name for below, name in _UNIT_BELOW if largest < below)
    if largest and looks_like != (unit or "s"):
        raise DataError(
            f"{where} ({count_rows(raw.table)} rows), which must be UTC in "
            f"{_UNIT_NAMES[unit or 's']} and look like {_UNIT_NAMES[looks_like]}. Set "
            f"timestamp_unit to {looks_like}."
        )
    if unit == "ns" and value.type().is_integer():  # Past the whole numbers that a float holds.
        naive = _from_nanoseconds(value.cast("int64")).cast(_NAIVE)
        return _in_time_zone(ibis.literal("UTC"), naive)
    factor = _MICROSECONDS[unit or "s"]
    if value.type().is_integer():
        return _from_microseconds(value.cast("int64") * int(factor))
    return _from_microseconds((value.cast("float64") * factor).round().cast("int64"))


def _refuse_years(raw: RawTable, time: ir.TimestampValue, column: str) -> None:
    """Refuses years read as seconds, which all fall into the same half hour of 1970."""
    row = raw.table.aggregate(first=time.min(), last=time.max()).to_pyarrow().to_pylist()[0]
    if row["first"] is None:
        return
    first, last = (int(row[name].timestamp()) for name in ("first", "last"))
    if first >= 1000 and last <= 3000:
        raise DataError(
            f"{raw.source.column(column)} holds numbers from {first} to {last} "
            f"({count_rows(raw.table)} rows), which look like years. Make it numeric or "
            "bucketized, write dates such as 1999-01-31, or set timestamp_unit to s if they are "
            "seconds."
        )


def _any(raw: RawTable, condition: ir.BooleanValue) -> bool:
    return bool(raw.table.aggregate(found=condition.any()).to_pyarrow()["found"][0].as_py())
