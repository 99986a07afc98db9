"""Converts columns of Python, NumPy or Arrow values to the arrays that features encode.

Typed arrays are converted at once, lists value by value.
"""

from collections.abc import Collection, Iterable, Iterator
from datetime import datetime
from typing import Any, TypeAlias

import numpy as np

from tfrs_pipeline.libraries import pa, pc

# A sequence, a NumPy array, or an Arrow array, chunked or not; Arrow has no type hints.
Column: TypeAlias = Any

BOOLEANS = ("True", "TRUE", "False", "FALSE")
"""How tables in CSV write booleans; JSON and Arrow write true and false."""
WHOLE_FLOAT = r"^\s*(-?(?:0|[1-9][0-9]*))\.0\s*$"
"""How programs write a whole number in a column with missing values."""
LARGEST_FLOAT32 = 3.4028234663852886e38
MAX_SECONDS = 1e11  # Larger numbers must be milliseconds.
NO_TIME = -(2**31)
"""An unknown time among `relative_seconds`."""
ROWS_PER_CALL = 65_536
_TICKS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def in_blocks(column: Column) -> Iterator[Column]:
    """Cuts a column into blocks of bounded size; an empty one is one block."""
    for start in range(0, max(len(column), 1), ROWS_PER_CALL):
        yield column[start : start + ROWS_PER_CALL]


def has_booleans(values: Collection[str]) -> bool:
    """Returns whether true or false is among the values; BOOLEANS are other spellings."""
    return "true" in values or "false" in values


def to_text(value: Any) -> str:
    """Returns `str(value)`: whole floats without .0, booleans, also as text, in lower case."""
    text = str(value)
    if isinstance(value, float | np.floating):
        return text.removesuffix(".0")
    return text.lower() if text in BOOLEANS else text


def to_texts(column: Column) -> Any:
    """Returns an Arrow array of the `to_text` of each value, "" where it is missing.

    Example:
        >>> to_texts([True, 7, None, "x"]).to_pylist()
        ['true', '7', '', 'x']
    """
    column = typed(column)
    if not isinstance(column, pa.Array):
        return pa.array(["" if is_missing(v) else to_text(v) for v in column], pa.string())
    if pa.types.is_floating(column.type):
        # Arrow formats floats differently from Python: format each distinct value here.
        encoded = column.dictionary_encode()
        texts = to_texts(encoded.dictionary.to_pylist())
        return texts.take(encoded.indices).fill_null("")
    texts = column.cast(pa.string()).fill_null("")
    is_boolean = pc.is_in(texts, pa.array(BOOLEANS))
    lower = pc.utf8_lower(texts.filter(is_boolean))
    return pc.replace_with_mask(texts, is_boolean, lower) if len(lower) else texts


def to_text_lists(column: Column) -> tuple[Any, np.ndarray]:
    """Returns the values of lists, an Arrow array of strings, and their number in each row.

    Missing values and empty strings within a list are dropped. A single value is a list of one.
    """
    column = typed(column)
    if not isinstance(column, pa.Array):
        rows = [
            list(row) if isinstance(row, Iterable) and not isinstance(row, str | bytes) else [row]
            for row in column
        ]
        values = to_texts([value for row in rows for value in row])
        lengths = np.array([len(row) for row in rows], np.int64)
    elif isinstance(column, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        values, lengths = to_texts(column.flatten()), list_lengths(column)
    else:
        values, lengths = to_texts(column), np.ones(len(column), np.int64)
    is_known = pc.not_equal(values, "")
    rows = np.repeat(np.arange(len(lengths)), lengths)[is_known.to_numpy(zero_copy_only=False)]
    return values.filter(is_known), np.bincount(rows, minlength=len(lengths))


def padded(values: Any, lengths: np.ndarray) -> np.ndarray:
    """Puts concatenated lists into rows: [n, longest] object array, padded with ""."""
    width = int(lengths.max(initial=0))
    rows = np.full((len(lengths), width), "", object)
    rows[np.arange(width) < lengths[:, np.newaxis]] = values.to_numpy(zero_copy_only=False)
    return rows


def to_numbers(name: str, column: Column) -> np.ndarray:
    """Returns [n] float64, NaN where missing; a `ValueError` if an entry is not a number.

    Example:
        >>> to_numbers("price", ["1.5", None, 2])
        array([1.5, nan, 2. ])
    """
    column = typed(column)
    if isinstance(column, pa.Array):
        try:
            return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        except pa.ArrowException:
            column = column.to_pylist()
    values = (np.nan if value is None else value for value in column)
    try:
        return np.fromiter(values, np.float64, len(column))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"Feature '{name}' must hold numbers: {error}. Correct it, or use None for missing."
        ) from None


def to_seconds(name: str, column: Column) -> np.ndarray:
    """Returns [n] float64 seconds since 1970 (UTC) of datetimes with a zone, NaN where missing."""
    column = typed(column)
    if isinstance(column, pa.Array):
        if pa.types.is_timestamp(column.type) and column.type.tz is not None:
            ticks = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
            return ticks / _TICKS[column.type.unit]
        column = column.to_pylist()
    seconds = np.full(len(column), np.nan)
    for i, value in enumerate(column):
        if is_missing(value):
            continue
        if not isinstance(value, datetime) or value.tzinfo is None:
            remedy = "Say which zone it is in: value.replace(tzinfo=...)."
            if not isinstance(value, datetime):
                remedy = "Convert text with datetime.fromisoformat(value)."
            raise ValueError(
                f"Feature '{name}' must hold datetimes with a time zone. Received: {value!r} in "
                f"row {i} of {len(column)}. {remedy}"
            )
        seconds[i] = value.timestamp()
    return seconds


def relative_seconds(times: np.ndarray) -> np.ndarray:
    """Counts times from the latest of their row: [n, any] int32, 0 or less, `NO_TIME` if unknown.

    Towers read times so, since they compare them with each other alone: a difference of whole
    seconds is exact, and LiteRT computes no float64. More than 68 years count as 68.

    Args:
        times: [n, any] seconds since 1970; NaN is unknown.

    Example:
        >>> relative_seconds(np.array([[1e9, 1e9 - 60, np.nan]]))
        array([[          0,         -60, -2147483648]], dtype=int32)
    """
    is_known = ~np.isnan(times)
    latest = np.max(times, axis=1, keepdims=True, initial=-np.inf, where=is_known)
    seconds = np.where(is_known, np.floor(times) - np.floor(latest), NO_TIME)
    return np.maximum(seconds, np.where(is_known, NO_TIME + 2, NO_TIME)).astype(np.int32)


def to_vectors(name: str, column: Column, length: int | None = None) -> np.ndarray:
    """Returns [n, length] float32, NaN in missing rows; the default length is the most common.

    Example:
        >>> to_vectors("image", [[1, 2], None])
        array([[ 1.,  2.],
               [nan, nan]], dtype=float32)
    """
    must_hold, num_rows = f"Feature '{name}' must hold", len(column)
    column, number_lists = typed(column), pa.list_(pa.float32())
    try:
        if isinstance(column, pa.Array):
            lists = column.cast(number_lists, safe=False)
        else:
            lists = pa.array([None if is_missing(row) else row for row in column], number_lists)
    except pa.ArrowException as error:
        raise ValueError(f"{must_hold} lists of numbers, or None: {error}.") from None
    is_given, lengths = lists.is_valid().to_numpy(zero_copy_only=False), list_lengths(lists)
    if length is None:
        length = int(np.bincount(lengths[is_given], minlength=1).argmax())
        if not length:
            raise ValueError(f"{must_hold} vectors. Received: {num_rows} rows without.")
    fits = is_given & (lengths == length)
    vectors = np.full((num_rows, length), np.nan, np.float32)
    vectors[fits] = lists.filter(fits).flatten().to_numpy(zero_copy_only=False).reshape(-1, length)
    is_bad = is_given & ~np.isfinite(vectors).all(axis=1)
    if is_bad.any():
        row = int(is_bad.argmax())
        raise ValueError(
            f"{must_hold} vectors of {length} finite float32 numbers, or None: it is missing. "
            f"Received: others in {is_bad.sum()} of {num_rows} rows, such as row {row}, of length "
            f"{lengths[row]}."
        )
    return vectors


def typed(column: Column) -> Any:
    """Converts a typed column to an Arrow array; returns lists and object arrays unchanged."""
    if isinstance(column, pa.ChunkedArray):
        return column.combine_chunks()
    if not isinstance(column, np.ndarray) or column.dtype == object:
        return column
    # One route for all typed data: NumPy, Arrow and pandas become Arrow.
    values = pa.array(column.ravel(), from_pandas=True)
    if column.ndim == 1:
        return values
    return pa.FixedSizeListArray.from_arrays(values, column.shape[1])


def list_lengths(lists: Any) -> np.ndarray:
    """Returns the lengths of an Arrow array of lists, [n] int64, 0 where missing."""
    return pc.list_value_length(lists).fill_null(0).to_numpy().astype(np.int64)


def is_missing(value: Any) -> bool:
    """Returns whether a value is None, NaN, or a missing value of pandas."""
    if value is None or hasattr(value, "__len__"):
        return value is None
    # NaN and pandas's NaT differ from themselves; for NA the comparison is neither true nor false.
    differs = value != value
    return differs is not False and (not isinstance(differs, bool | np.bool_) or bool(differs))
