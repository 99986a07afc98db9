"""Converts columns of a source to the types of a log, and times in any form to UTC.

CSV columns arrive as text and get a type that fits all of their values: a guess from the first rows
would lose leading zeros and fail late. An unusable value, and NaN, becomes null.
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Literal

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir
import numpy as np

from tfrs_pipeline.data import rules
from tfrs_pipeline.data.ids import NO_ID
from tfrs_pipeline.data.raw_table import RawTable
from tfrs_pipeline.data.rules import Rule
from tfrs_pipeline.data.schema import DataError, TimestampUnit
from tfrs_pipeline.data.settings import Period, Reading
from tfrs_pipeline.features.feature import TableColumn
from tfrs_pipeline.features.kinds import KINDS
from tfrs_pipeline.features.raw import LARGEST_FLOAT32, WHOLE_FLOAT

_MICROSECONDS = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}
_UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
# The size of a number gives its unit: for times from 1973 to 5138, the ranges do not overlap.
_SIZES = {"s": (1.0, 1e11), "ms": (1e11, 1e14), "us": (1e14, 1e17), "ns": (1e17, math.inf)}
# The times that Python can hold in every time zone.
_FIRST, _END = datetime(2, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)
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


def to_timestamp(
    raw: RawTable, column: str, reading: Reading, period: Period | None = None
) -> ir.TimestampValue:
    """Converts numbers, times with an offset, or naive times in a time zone to UTC timestamps.

    A missing time is null. A time outside the period, if one is given, is null and a fault. Dates
    are days of `reading.time_zone`, or of UTC. Raises a `DataError` if the column has another type,
    if most numbers have another unit, or if times have no zone and `reading` names none.
    """
    first, end = period or (_FIRST, _END)
    value = raw.table[column]
    if value.type().is_string():
        value = _read_time(raw, column)
    dtype = value.type()
    if dtype.is_numeric() and not dtype.is_boolean():
        if period and dtype.is_float32():
            raise DataError(
                f"{raw.source.column(column)} holds times as float32 ({raw.num_rows} rows), which "
                "is exact only to about two minutes. Store them as int64 or float64."
            )
        if dtype.is_floating():
            value = value.isnan().ifelse(ibis.null(), value)
        _check_unit(raw, value, column, reading, period)
        time = _from_numbers(value, reading.timestamp_unit)
    elif dtype.is_timestamp() and dtype.timezone is not None:
        time = value.cast(_UTC)
    elif dtype.is_timestamp() or dtype.is_date():
        if reading.time_zone is None and dtype.is_date():
            raw.notes.append(f"{raw.source.column(column)} holds dates: read as days in UTC")
        elif reading.time_zone is None:
            raise DataError(
                f"{raw.source.column(column)} holds times without a time zone "
                f"({raw.num_rows} rows). Set time_zone to the zone of the clock that wrote "
                "them, such as UTC or Europe/Berlin.",
                setting="time_zone",
            )
        # An hour that the clocks show twice, or skip, is read as standard time.
        time = _in_time_zone(ibis.literal(reading.time_zone or "UTC"), value.cast(_NAIVE))
    else:
        raise raw.wrong_type(column, "a timestamp or a number")
    is_within = ((time >= first) & (time < end)).fill_null(False)
    # A feature may be of any year; an event happened while the log was written.
    rule = rules.TIME_OUTSIDE.filled(first=first, end=end) if period else rules.NO_YEAR
    raw.fault(column, value.notnull() & ~is_within, rule)
    return is_within.ifelse(time, ibis.null(_UTC))


def _read_time(raw: RawTable, column: str) -> ir.Value:
    """Reads text in the form of most times: numbers, dates, ISO 8601 with or without offset."""
    value = raw.table[column]
    # A file is written in one way. So all values are counted, and the usual way is the column's;
    # a few values in another way are faults, like values that are no times at all.
    number = value.try_cast("float64")
    text = number.isnull().ifelse(value, ibis.null("string"))  # A failing cast is slow.
    zoned = text.try_cast(_UTC)
    has_offset = text.re_search(r"(Z|UTC|[+-]\d\d(:?\d\d)?)$") & text.contains(":")
    is_time = zoned.notnull()
    ways: dict[str, tuple[ir.Value, ir.BooleanValue]] = {
        "number": (number, number.notnull()),
        "zoned": (zoned, is_time & has_offset),
        "naive": (text.try_cast(_NAIVE), is_time & ~has_offset),
    }
    sums = {name: is_so.sum() for name, (_, is_so) in ways.items()}
    sums["whole"] = is_integer_text(value).sum()
    sums["clock"] = (ways["naive"][1] & text.re_search(r"\d[ tT]+\d")).sum()
    counts = raw.aggregate(**sums)
    usual = max(ways, key=lambda name: counts[name] or 0)
    time, is_usual = ways[usual]
    if usual == "number" and counts["whole"] == counts["number"]:
        time = value.try_cast("int64")  # Nanoseconds exceed the integers that a float holds.
    if usual == "naive" and not counts["clock"]:
        time = time.cast("date")
    raw.fault(column, value.notnull() & ~(number.notnull() | is_time), rules.NOT_A_TIME)
    raw.fault(column, value.notnull() & ~is_usual, rules.TIME_OF_ANOTHER_KIND)
    return is_usual.ifelse(time, ibis.null(time.type()))


def _check_unit(
    raw: RawTable, value: ir.NumericValue, column: str, reading: Reading, period: Period | None
) -> None:
    """Refuses a column if most numbers are in another unit.

    Without a `period` the column is a feature, whose numbers may be years.
    """
    unit = reading.timestamp_unit
    expected = unit or "s"
    number = value.cast("float64")
    size = number.abs()
    finite = (size < math.inf).ifelse(number, ibis.null("float64"))
    sums = {name: ((size >= low) & (size < end)).sum() for name, (low, end) in _SIZES.items()}
    sums |= {"least": finite.min(), "largest": finite.max()}
    sums["dates"] = size.between(19_000_101, 21_001_231).sum()
    counts = {name: count or 0 for name, count in raw.aggregate(**sums).items()}
    least, largest, num_dates = (counts.pop(name) for name in ("least", "largest", "dates"))
    # At a tie, such as a column without a number, the expected unit.
    usual = max(counts, key=lambda name: (counts[name], name == expected))
    problem = ""
    if unit is None and period is None and 1000 <= least <= largest <= 3000:
        # As seconds, all of them would fall into half an hour of 1970.
        problem = (
            "look like years. Make it numeric or bucketized, write dates such as 1999-01-31, or "
            "set timestamp_unit to s if they are seconds."
        )
    elif unit is None and num_dates * 2 > sum(counts.values()):
        problem = (
            "look like dates (YYYYMMDD). Write them as 2024-01-31, or set timestamp_unit to s if "
            "they are seconds."
        )
    elif usual != expected:
        problem = (
            f"must be UTC in {_UNIT_NAMES[expected]} and look like {_UNIT_NAMES[usual]}. Set "
            f"timestamp_unit to {usual}."
        )
    if problem:
        raise DataError(
            f"{raw.source.column(column)} holds numbers from {least:.0f} to {largest:.0f} "
            f"({raw.num_rows} rows), which {problem}",
            "timestamp_unit",
        )


def _from_numbers(value: ir.NumericValue, unit: TimestampUnit | None) -> ir.TimestampValue:
    """Converts numbers to times; null if the year is beyond 9998."""
    factor = _MICROSECONDS[unit or "s"]
    is_time = value.cast("float64").abs() * factor < _END.timestamp() * 1e6
    value = is_time.ifelse(value, ibis.null(value.type()))
    if unit == "ns" and value.type().is_integer():  # A float cannot hold them exactly.
        naive = _from_nanoseconds(value.try_cast("int64")).cast(_NAIVE)
        return _in_time_zone(ibis.literal("UTC"), naive)
    if value.type().is_integer():
        return _from_microseconds(value.cast("int64") * int(factor))
    return _from_microseconds((value.cast("float64") * factor).round().cast("int64"))


def is_integer_text(value: ir.StringValue) -> ir.BooleanValue:
    """Marks text that is written as an int64 ("7", not "007", "7.0" or "+7")."""
    return value == ibis.coalesce(value.try_cast("int64").cast("string"), "")


def is_integer(raw: RawTable, column: str) -> bool:
    """Returns whether ids are kept as int64.

    Text becomes integers only if every value is written as one ("7", not "007" or "+7"), so that
    two ids never merge. "7.0" counts as 7: programs write that if other rows have no id.
    """
    dtype = raw.table[column].type()
    if dtype.is_string():
        return raw.is_text and _read_text(raw, column)[1]
    # An unsigned id may exceed int64; then all of them become text.
    return not dtype.is_uint64() or not raw.has(raw.table[column] > np.iinfo(np.int64).max)


def to_id(raw: RawTable, column: str, *, as_integer: bool) -> ir.Value:
    """Converts ids to int64 or string; a missing one is null."""
    value = raw.table[column]
    dtype = value.type()
    if not (dtype.is_string() or dtype.is_numeric()) or dtype.is_boolean():
        raise raw.wrong_type(column, "an integer or a string")
    if dtype.is_string():
        value, _ = _read_text(raw, column)
    elif not dtype.is_integer():
        whole = value.try_cast("int64")
        # A decimal is exact. A float above these bounds may stand for several integers.
        is_whole = whole.cast(dtype) == value
        if not dtype.is_decimal():
            is_whole &= value.abs() < (2**24 if dtype.is_float32() else 2**53)
        is_number = value.notnull() & ~value.cast("float64").isnan()
        raw.fault(column, is_number & ~is_whole.fill_null(False), rules.NOT_AN_ID)
        value = is_whole.ifelse(whole, ibis.null("int64"))
    return value.cast("int64" if as_integer else "string")


def to_required_id(raw: RawTable, column: str, *, as_integer: bool) -> ir.Value:
    """Converts ids that each row must have to int64 or string.

    A missing id is a fault, and so is the reserved one of empty slots, -1 or "".
    """
    value = to_id(raw, column, as_integer=as_integer)
    reserved = -1 if value.type().is_int64() else ""
    raw.fault(column, value.isnull(), rules.NO_ID)
    raw.fault(column, value == reserved, rules.RESERVED_ID.filled(reserved=reserved))
    if raw.is_text and not as_integer:
        raw.fault(column, value.contains("\n"), rules.ID_OF_LINES)
    return value


def to_number(raw: RawTable, column: str, to: Literal["int64", "float64"] = "float64") -> ir.Value:
    """Converts a column to int64 or finite float64; NaN becomes null."""
    value = raw.table[column]
    if not (value.type().is_numeric() or value.type().is_boolean() or value.type().is_string()):
        raise raw.wrong_type(column, "a number")
    number = value.try_cast("float64")
    is_number = (number.abs() <= LARGEST_FLOAT32).fill_null(False)
    converted = number
    if to == "int64":  # DuckDB would round 1.5 silently.
        converted = value.try_cast("int64")
        is_number &= (number == converted).fill_null(False)
    # NaN is how programs that lack a null write one, so it is no fault.
    is_missing = value.isnull() | number.isnan().fill_null(False)
    rule = rules.NOT_INT64 if to == "int64" else rules.NOT_FLOAT32
    raw.fault(column, ~is_missing & ~is_number, rule)
    return is_number.ifelse(converted, ibis.null(to))


def to_outcome(raw: RawTable, column: str) -> ir.Value:
    """Converts an outcome that may be a label to a boolean or a finite number."""
    value = raw.table[column]
    if value.type().is_boolean():
        return value
    # In CSV an outcome may be written as text; in a typed table, text is something else. There a
    # column without any value has the type string, though.
    may_be_text = raw.is_text or not raw.has(value.notnull())
    if not (value.type().is_numeric() or (value.type().is_string() and may_be_text)):
        raise raw.wrong_type(
            column,
            "boolean, or a number above 0 where the outcome holds (types of events have "
            "event_weights)",
        )
    number = value.try_cast("float64")
    if raw.is_text:
        number = ibis.coalesce(number, value.try_cast("boolean").cast("float64"))
    is_number = (number.abs() <= LARGEST_FLOAT32).fill_null(False)
    raw.fault(column, value.notnull() & ~is_number, rules.NOT_AN_OUTCOME)
    return is_number.ifelse(number, ibis.null("float64"))


def feature_column(raw: RawTable, name: str, reading: Reading) -> TableColumn:
    """Wraps a column for the kind of feature that reads it."""

    def read(what: Literal["id", "number", "time"]) -> ir.Value:
        if what == "id":
            return to_id(raw, name, as_integer=is_integer(raw, name))
        return to_number(raw, name) if what == "number" else to_timestamp(raw, name, reading)

    return TableColumn(
        place=raw.source.column(name),
        value=raw.table[name],
        list_separator=reading.list_separator,
        read=read,
        aggregate=raw.aggregate,
        fault=lambda is_bad, problem, **more: raw.fault(name, is_bad, Rule(problem, **more)),
        refusal=DataError,
        wrong_type=partial(raw.wrong_type, name),
        notes=raw.notes,
    )


def type_features(
    raw: RawTable, columns: dict[str, ir.Value], features: Mapping[str, str], reading: Reading
) -> None:
    """Types feature columns; unusable values will be missing ones."""
    # A bad feature costs a value, not the event: faults from here on make it a missing one.
    num_others = len(raw.faults)
    for name, kind in features.items():
        columns[name] = KINDS[kind].read(feature_column(raw, name, reading))
    raw.faults[num_others:] = [f._replace(is_missing=True) for f in raw.faults[num_others:]]


def _read_text(raw: RawTable, column: str) -> tuple[ir.StringValue, bool]:
    """Cleans text ids (white space, ".0", words for none); says whether all are int64."""
    if column not in raw.texts:
        value = raw.table[column]
        # A column of integers with a missing value is written as floats by pandas: 7.0 is 7.
        text = value.re_replace(WHOLE_FLOAT, r"\1").strip()
        cleaned = text.isin(["", *NO_ID]).ifelse(ibis.null("string"), text)
        is_unclean = (value != value.strip()) | value.endswith(".0") | value.isin(NO_ID)
        is_other = ~is_integer_text(value)
        counts = raw.aggregate(other=is_other.any(), unclean=is_unclean.any())
        if counts["other"] and counts["unclean"]:
            value, counts = cleaned, raw.aggregate(other=(~is_integer_text(cleaned)).any())
        raw.texts[column] = value, not counts["other"]
    return raw.texts[column]
