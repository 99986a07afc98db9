"""One column of a source turned into the type that the log has.

CSV columns arrive as text and are typed here, by all of their values: a sniffer that looks at the
first rows loses leading zeros and fails late. A value that cannot be used becomes null and is a
fault of its table (`RawTable.fault`); `tables.py` counts the faults, and drops or refuses. NaN is a
missing value: it becomes null.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import ibis
import ibis.expr.types as ir

from tfrs_pipeline.data.reading import Reading
from tfrs_pipeline.data.schema import DataError, RawTable, id_refusals
from tfrs_pipeline.data.times import is_integer_text, refuse_years, to_timestamp
from tfrs_pipeline.features.kinds import FeatureKind
from tfrs_pipeline.messages import counted, printable

_LARGEST_INT64 = 2**63 - 1
_LARGEST_FLOAT32 = 3.4028234663852886e38
# How programs write an id that is missing, or a whole number in a column where others are.
_NO_ID = ("nan", "NaN", "None", "NaT", "<NA>", "null", "NULL")
_FEW = 0.1
_WHOLE_FLOAT = r"^\s*(-?(?:0|[1-9][0-9]*))\.0\s*$"


def is_integer(raw: RawTable, column: str) -> bool:
    """Tells whether ids are kept as int64.

    Text is an integer only if every value is written as one is ("7", not "007" or "+7"), so that no
    two ids fall together; "7.0" is how programs write 7 where other rows have none.
    """
    dtype = raw.table[column].type()
    if dtype.is_string():
        return raw.is_text and _read_text(raw, column)[1]
    return not dtype.is_uint64() or not raw.has(raw.table[column] > _LARGEST_INT64)


def describe_ids(raw: RawTable, column: str) -> Iterator[str]:
    """Says that white space was stripped, and that a few odd ids have made text of integers."""
    if not raw.table[column].type().is_string():
        return
    value, _, num_spaced = _read_text(raw, column)
    if num_spaced:
        yield (
            f"{raw.source.column(column)} has white space around ids in {num_spaced:,} of "
            f"{raw.num_rows:,} rows: stripped"
        )
    if not raw.is_text or is_integer(raw, column):
        return
    is_odd = ~is_integer_text(value)
    found = raw.table.aggregate(num=is_odd.sum(), example=value.min(where=is_odd))
    num, example = found.to_pyarrow().to_pylist()[0].values()
    if num <= _FEW * raw.num_rows:
        yield (
            f"{raw.source.column(column)} is no integer in {num:,} of {raw.num_rows:,} rows, such "
            f"as {printable(repr(example))}: all ids are kept as text"
        )


def to_id(raw: RawTable, column: str, *, as_integer: bool) -> ir.Value:
    """Makes int64 or string of an id; null where there is none."""
    value = raw.table[column]
    dtype = value.type()
    if not (dtype.is_string() or dtype.is_numeric()) or dtype.is_boolean():
        raise raw.wrong_type(column, "an integer or a string")
    if dtype.is_string():
        value, *_ = _read_text(raw, column)
    elif not dtype.is_integer():
        whole = value.try_cast("int64")
        # A decimal is exact; of larger floats it is not known which number was meant.
        is_whole = whole.cast(dtype) == value
        if not dtype.is_decimal():
            is_whole &= value.abs() < (2**24 if dtype.is_float32() else 2**53)
        is_number = value.notnull() & ~value.cast("float64").isnan()
        raw.fault(
            column,
            is_number & ~is_whole.fill_null(False),
            "must be an integer or a string and is not",
        )
        value = is_whole.ifelse(whole, ibis.null("int64"))
    return value.cast("int64" if as_integer else "string")


def to_required_id(raw: RawTable, column: str, *, as_integer: bool) -> ir.Value:
    """Makes int64 or string of an id that each row must have; see `id_refusals`."""
    value = to_id(raw, column, as_integer=as_integer)
    raw.faults.extend(id_refusals(column, value, raw.renaming))
    if raw.is_text and not as_integer:
        problem = "runs over several lines"
        raw.fault(column, value.contains("\n"), problem, "Close the quotes before it.")
    return value


def to_number(raw: RawTable, column: str, to: Literal["int64", "float64"] = "float64") -> ir.Value:
    """Makes int64 or finite float64 of a column; NaN is null."""
    value = raw.table[column]
    if not (value.type().is_numeric() or value.type().is_boolean() or value.type().is_string()):
        raise raw.wrong_type(column, "a number")
    number = value.try_cast("float64")
    is_number = (number.abs() <= _LARGEST_FLOAT32).fill_null(False)
    converted = number
    if to == "int64":  # DuckDB rounds 1.5 without a word.
        converted = value.try_cast("int64")
        is_number &= (number == converted).fill_null(False)
    is_missing = value.isnull() | number.isnan().fill_null(False)
    what = "whole numbers" if to == "int64" else "finite numbers that float32 can hold"
    raw.fault(column, ~is_missing & ~is_number, f"must hold {what} and does not")
    return is_number.ifelse(converted, ibis.null(to))


def to_outcome(raw: RawTable, column: str) -> ir.Value:
    """Makes a boolean, or a finite number, of an outcome that may be a label."""
    value = raw.table[column]
    if value.type().is_boolean():
        return value
    # In a table with types, a column without any value is a string.
    may_be_text = raw.is_text or not raw.has(value.notnull())
    if not (value.type().is_numeric() or (value.type().is_string() and may_be_text)):
        raise raw.wrong_type(column, "boolean, or a number above 0 where the outcome holds")
    number = value.try_cast("float64")
    if raw.is_text:
        number = ibis.coalesce(number, value.try_cast("boolean").cast("float64"))
    is_number = (number.abs() <= _LARGEST_FLOAT32).fill_null(False)
    remedy = "Leave it null where the outcome does not hold."
    problem = "is in the label and no number"
    raw.fault(column, value.notnull() & ~is_number, problem, remedy, "label")
    return is_number.ifelse(number, ibis.null("float64"))


def to_context(raw: RawTable, column: str) -> ir.Value:
    """Keeps a column's type; text becomes int64 or float64 where every value is such a number."""
    value = raw.table[column]
    # Folders named COLUMN=VALUE make columns that are no text.
    if not (raw.is_text and value.type().is_string()):
        return value
    if not raw.has(~is_integer_text(value)):
        return value.cast("int64")
    number = value.try_cast("float64")
    return value if raw.has(value.notnull() & number.isnull()) else number


def to_feature(raw: RawTable, column: str, kind: FeatureKind, reading: Reading) -> ir.Value:
    """Gives a feature column the type of its kind (see `Log`)."""
    value = raw.table[column]
    if kind in ("numeric", "bucketized"):
        return to_number(raw, column)
    if kind in ("categorical", "hashed"):
        if value.type().is_boolean():
            return value.cast("string")
        if (value.type().is_floating() or value.type().is_decimal()) and raw.has(
            value.try_cast("int64").cast("float64") != value.cast("float64")
        ):
            # As text in CSV: an id would have to be whole.
            number = value.cast("float64") if value.type().is_decimal() else value
            return number.cast("string").re_replace(_WHOLE_FLOAT, r"\1").nullif("nan")
        return to_id(raw, column, as_integer=is_integer(raw, column))
    if kind == "multi_categorical":
        return _to_categories(raw, column, reading.list_separator)
    if kind == "vector":
        return _to_vector(raw, column, reading.list_separator)
    if kind == "timestamp":
        time = to_timestamp(raw, column, reading)
        if reading.timestamp_unit is None:
            refuse_years(raw, time, column)
        return time
    if not value.type().is_string():
        raise raw.wrong_type(column, "a string")
    return value


def _to_categories(raw: RawTable, column: str, list_separator: str) -> ir.Value:
    value = raw.table[column]
    if value.type().is_array():
        return value.cast("array<string>")
    if value.type().is_string():
        stripped = value.split(list_separator).map(lambda part: part.strip())
        return stripped.filter(lambda part: part != "")
    raise raw.wrong_type(column, "a list or a string")


def describe_categories(raw: RawTable, column: str, list_separator: str) -> Iterator[str]:
    """Says if no row of a text column has two values; refuses (`DataError`) lists in brackets."""
    value = raw.table[column]
    if not value.type().is_string():
        return
    text = value.strip()
    is_list = text.re_search(r"^\[[^\]]*\]$")
    found = raw.table.aggregate(
        num=(text != "").sum(),
        num_lists=is_list.sum(),
        is_parted=(_to_categories(raw, column, list_separator).length() > 1).any(),
        example=value.max(),
        list_example=value.max(where=is_list),
    )
    num, num_lists, is_parted, *examples = found.to_pyarrow().to_pylist()[0].values()
    where, (shown, list_shown) = raw.source.column(column), (printable(repr(x)) for x in examples)
    if num and 2 * num_lists > num:
        raise DataError(
            f"{where} holds lists written as text in {num_lists} of {raw.num_rows} rows, such as "
            f"{list_shown}. Store them as lists (Parquet, Arrow), or write values without brackets "
            f"and quotes, separated by {list_separator!r} (list_separator).",
            "list_separator",
        )
    if num and not is_parted:
        yield (
            f"{where} has one value in each of {counted(num, 'row')}, such as {shown}, as no row "
            f"has a {list_separator!r}: if they hold several, set list_separator "
            "(--data.list_separator)"
        )


def _to_vector(raw: RawTable, column: str, list_separator: str) -> ir.Value:
    """Makes lists of float32, all of the length that most have."""
    value = raw.table[column]
    dtype = value.type()
    if dtype.is_string():
        parts = value.split(list_separator).map(lambda part: part.strip())
        numbers = parts.map(lambda part: part.try_cast("float64"))
        is_unread = numbers.map(lambda number: number.isnull()).anys()
        problem = f"must hold numbers separated by {list_separator!r} (list_separator) and does not"
        raw.fault(column, is_unread, problem, setting="list_separator")
    elif dtype.is_array() and dtype.value_type.is_numeric():
        numbers = value.cast("array<float64>")
    else:
        raise raw.wrong_type(column, "a list of numbers or a string")
    is_finite = numbers.map(lambda x: (x.abs() <= _LARGEST_FLOAT32).fill_null(False)).alls()
    problem = "does not hold finite numbers that float32 can hold"
    remedy = "Correct them, or leave them null where there is none."
    raw.fault(column, ~is_finite, problem, remedy, "")
    length = is_finite.ifelse(numbers.length(), ibis.null("int64")).nullif(0)
    found = raw.table.aggregate(usual=length.mode()).to_pyarrow()["usual"][0].as_py()
    if found is None and not raw.has(~is_finite):
        raise DataError(
            f"{raw.source.column(column)}: none of {raw.num_rows} rows holds a vector. "
            "Name another column, or drop the feature."
        )
    problem = f"must hold vectors of one length, {found} as most, and does not"
    raw.fault(column, length != found, problem, remedy, "")
    return (length == found).ifelse(numbers.cast("array<float32>"), ibis.null("array<float32>"))


def _read_text(raw: RawTable, column: str) -> tuple[ir.StringValue, bool, int]:
    """Takes what programs add off ids: white space around them, ".0", words for a missing one.

    Returns the text, whether all of it is written as int64 is, and in how many rows there was such
    white space.
    """
    if column not in raw.texts:
        value = raw.table[column]
        text = value.re_replace(_WHOLE_FLOAT, r"\1").strip()
        cleaned = text.isin(_NO_ID).ifelse(ibis.null("string"), text)
        is_spaced = value != value.strip()
        found = raw.table.aggregate(
            is_other=(~is_integer_text(value)).any(),
            is_unclean=(is_spaced | value.endswith(".0") | value.isin(_NO_ID)).any(),
            num_spaced=is_spaced.sum(),
        )
        is_other, is_unclean, num_spaced = found.to_pyarrow().to_pylist()[0].values()
        if is_other and is_unclean:
            value, is_other = cleaned, raw.has(~is_integer_text(cleaned))
        raw.texts[column] = value, not is_other, num_spaced or 0
    return raw.texts[column]
