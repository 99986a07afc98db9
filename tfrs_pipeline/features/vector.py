"""Vectors from another model."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Self

import numpy as np

from tfrs_pipeline.features.feature import Feature, TableColumn
from tfrs_pipeline.features.numeric import finite, standardised
from tfrs_pipeline.features.raw import LARGEST_FLOAT32, Column, is_missing, list_lengths, typed
from tfrs_pipeline.libraries import ibis, ir, pa, tf


@dataclass(frozen=True)
class Vector(Feature):
    """A list of numbers, divided by one scale so that the root mean square length is 1.

    Numbers are clipped to 10 typical lengths.
    """

    num_values: int
    scale: float = 1.0  # Root mean square of the vectors' lengths.

    kind: ClassVar[str] = "vector"
    names_elsewhere = ("embedding", "floats")
    column_types = {"array": "array<float32>"}
    raw_dtype = "float32"
    example = "1,2,3"

    @classmethod
    def read(cls, column: TableColumn) -> "ir.Value":
        """Reads lists of float32; other lengths than the most common one are faults.

        In text, brackets may surround numbers that `list_separator`, commas or spaces separate.
        """
        value, dtype = column.value, column.value.type()
        if dtype.is_string():
            inner = value.re_replace(r"^\s*\[|\]\s*$", "").strip().nullif("")
            parts = inner.contains(column.list_separator).ifelse(
                inner.split(column.list_separator), inner.re_split(r"\s*,\s*|\s+")
            )
            numbers = parts.map(lambda part: part.strip().try_cast("float64"))
            is_unread = numbers.map(lambda number: number.isnull()).anys()
            shown = f"{column.list_separator!r} (list_separator), commas or spaces"
            problem = f"must hold numbers separated by {shown} and does not"
            column.fault(is_unread, problem, setting="list_separator")
        elif dtype.is_array() and dtype.value_type.is_numeric():
            numbers = value.cast("array<float64>")
        else:
            raise column.wrong_type("a list of numbers or a string")
        is_finite = numbers.map(lambda x: (x.abs() <= LARGEST_FLOAT32).fill_null(False)).alls()
        mend = {"remedy": "Correct them, or leave them null where there is none.", "setting": ""}
        column.fault(~is_finite, "does not hold finite numbers that float32 can hold", **mend)
        length = is_finite.ifelse(numbers.length(), ibis.null("int64")).nullif(0)
        found = column.aggregate(usual=length.mode(), is_faulty=(~is_finite).any())
        usual = found["usual"]
        if usual is None and not found["is_faulty"]:
            raise column.refusal(
                f"{column.place}: no row holds a vector. Name another column, or drop the feature."
            )
        problem = f"must hold vectors of one length, {usual} as most, and does not"
        column.fault(length != usual, problem, **mend)
        return (length == usual).ifelse(numbers, ibis.null("array<float64>")).cast("array<float32>")

    @classmethod
    def fit(cls, name: str, column: Column, *, reference: datetime | None = None) -> Self:
        """Takes the most common length of lists, and the root mean square of their norms."""
        vectors = _to_vectors(name, column)
        squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
        return cls(name, vectors.shape[1], float(np.sqrt(np.nanmean(squares))) or 1.0)

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """The length."""
        return (self.num_values,)

    def to_raw(self, column: Column) -> np.ndarray:
        """Returns [n, num_values] float32, NaN in missing rows."""
        return _to_vectors(self.name, column, self.num_values)

    def encoded(self, raw: "tf.Tensor") -> "tf.Tensor":
        """Returns [B, num_values] float32, NaN in rows with a missing or infinite number."""
        is_known = tf.reduce_all(tf.math.is_finite(raw), axis=1, keepdims=True)
        return tf.where(is_known, standardised(raw, self.scale), np.float32(np.nan))

    @property
    def had_values(self) -> bool:
        """True: a column without any vector cannot be fitted."""
        return True

    @staticmethod
    def from_text(text: str) -> Any:
        """Converts numbers separated by commas."""
        return [finite(number) for number in text.strip(" []").split(",")]


def _to_vectors(name: str, column: Column, length: int | None = None) -> np.ndarray:
    """Returns [n, length] float32, NaN in missing rows; the default length is the most common."""
    must_hold, num_rows = f"Feature '{name}' must hold", len(column)
    column, of_numbers = typed(column), pa.list_(pa.float32())
    try:
        if isinstance(column, pa.Array):
            lists = column.cast(of_numbers, safe=False)
        else:
            lists = pa.array([None if is_missing(row) else row for row in column], of_numbers)
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
