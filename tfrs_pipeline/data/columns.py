"""Converts columns of a source to the types of a log.

CSV columns arrive as text and get a type that fits all of their values: a guess from the first rows
would lose leading zeros and fail late. An unusable value, and NaN, becomes null.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import ibis
import ibis.expr.types as ir
import numpy as np

from tfrs_pipeline.data import rules
from tfrs_pipeline.data.ids import NO_ID
from tfrs_pipeline.data.reading import Reading
from tfrs_pipeline.data.rules import RawTable, Rule, id_faults
from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.data.times import is_integer_text, refuse_years, to_timestamp
from tfrs_pipeline.features.feature import TableColumn
from tfrs_pipeline.features.kinds import KINDS
from tfrs_pipeline.features.raw import LARGEST_FLOAT32, WHOLE_FLOAT


def is_integer(raw: RawTable, column: str) -> bool:
    """Returns whether ids are kept as int64.

    Text becomes integers only if every value is written as one ("7", not "007" or "+7"), so that
    two ids never merge. "7.0" counts as 7: programs write it so if other rows have no id.
    """
    dtype = raw.table[column].type()
    if dtype.is_string():
        return raw.is_text and _read_text(raw, column)[1]
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
    """Converts ids that each row must have to int64 or string; see `id_faults`."""
    value = to_id(raw, column, as_integer=as_integer)
    for fault in id_faults(column, value):
        raw.fault(*fault[:3])
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
    is_missing = value.isnull() | number.isnan().fill_null(False)
    rule = rules.NOT_INT64 if to == "int64" else rules.NOT_FLOAT32
    raw.fault(column, ~is_missing & ~is_number, rule)
    return is_number.ifelse(converted, ibis.null(to))


def to_outcome(raw: RawTable, column: str) -> ir.Value:
    """Converts an outcome that may be a label to a boolean or a finite number."""
    value = raw.table[column]
    if value.type().is_boolean():
        return value
    # In a typed table, a column without any value has the type string.
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


def to_context(raw: RawTable, column: str) -> ir.Value:
    """Keeps a column's type, but converts text to int64 or float64 if every value is one."""
    value = raw.table[column]
    # Columns from folders named COLUMN=VALUE may have other types.
    if not (raw.is_text and value.type().is_string()):
        return value
    if not raw.has(~is_integer_text(value)):
        return value.cast("int64")
    number = value.try_cast("float64")
    return value if raw.has(value.notnull() & number.isnull()) else number


def feature_column(raw: RawTable, name: str, reading: Reading) -> TableColumn:
    """Wraps a column for the kind of feature that reads it."""

    def read(what: Literal["id", "number", "time"]) -> ir.Value:
        if what == "id":
            return to_id(raw, name, as_integer=is_integer(raw, name))
        if what == "number":
            return to_number(raw, name)
        moment = to_timestamp(raw, name, reading)
        if reading.timestamp_unit is None:
            refuse_years(raw, moment, name)
        return moment

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
    num_others = len(raw.faults)
    for name, kind in features.items():
        columns[name] = KINDS[kind].read(feature_column(raw, name, reading))
    raw.faults[num_others:] = [f._replace(is_missing=True) for f in raw.faults[num_others:]]


def _read_text(raw: RawTable, column: str) -> tuple[ir.StringValue, bool]:
    """Cleans text ids (white space, ".0", words for none); says whether all are int64."""
    if column not in raw.texts:
        value = raw.table[column]
        text = value.re_replace(WHOLE_FLOAT, r"\1").strip()
        cleaned = text.isin(NO_ID).ifelse(ibis.null("string"), text)
        is_unclean = (value != value.strip()) | value.endswith(".0") | value.isin(NO_ID)
        found = raw.aggregate(other=(~is_integer_text(value)).any(), unclean=is_unclean.any())
        is_other = found["other"]
        if is_other and found["unclean"]:
            value, is_other = cleaned, raw.has(~is_integer_text(cleaned))
        raw.texts[column] = value, not is_other
    return raw.texts[column]
