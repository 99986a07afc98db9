"""Numbers, times and vectors: standardised, or in buckets for non-linear effects."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Self

import numpy as np

from tfrs_pipeline.features.feature import Feature, TableColumn
from tfrs_pipeline.features.raw import LARGEST_FLOAT32, Column, to_numbers, to_seconds, to_vectors
from tfrs_pipeline.libraries import ibis, ir, tf

MAX_BUCKETS = 32
MAX_DEVIATIONS = 10.0
DAY_SECONDS = 86_400.0


def finite(text: str) -> float:
    """Converts a typed number; a `ValueError` if it is not a finite number."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("it is not finite")
    return number


class Number(Feature):
    """A number per row, in any encoding."""

    from_text = staticmethod(finite)
    raw_dtype = "float64"
    example = "1.5"
    takes_whole_numbers = True

    @classmethod
    def read(cls, column: TableColumn) -> ir.Value:
        """Reads finite numbers."""
        return column.read("number")

    def to_raw(self, column: Column) -> np.ndarray:
        """Returns [n] float64, NaN where missing."""
        return to_numbers(self.name, column)


@dataclass(frozen=True)
class Numeric(Number):
    """A number minus the mean, divided by the standard deviation, clipped to 10 deviations.

    Keras's `Normalization` computes in float32, too coarse for counts above 16 million, and raises
    deviations below 1e-7 to 1e-7.

    Example:
        >>> price = Numeric.fit("price", [1.0, 3.0, None])
        >>> price.encode_column([1.0, 3.0, 5.0, None])
        array([-1.,  1.,  3., nan], dtype=float32)
    """

    mean: float = 0.0
    scale: float = 1.0

    kind: ClassVar[str] = "numeric"
    is_embedded = False

    @classmethod
    def fit(cls, name: str, column: Column, *, reference: datetime | None = None) -> Self:
        """Computes mean and standard deviation."""
        return cls(name, *moments(to_numbers(name, column)))

    def encoded(self, raw: np.ndarray) -> np.ndarray:
        """Returns [B] float32, NaN where missing or infinite."""
        encoded = standardised(raw - self.mean, self.scale)
        return np.where(np.isfinite(raw), encoded, np.float32(np.nan))

    def encoded_in_graph(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B] float32, NaN where missing or infinite."""
        encoded = standardised_in_graph(raw - self.mean, self.scale)
        return tf.where(tf.math.is_finite(raw), encoded, np.float32(np.nan))


@dataclass(frozen=True)
class Bucketized(Number):
    """A number's bucket between quantiles of the column, in float64.

    Example:
        >>> Bucketized.fit("price", [1, 2, 3, 1000]).encode_column([0, 2, 2.5, 10**6, None])
        array([1, 2, 2, 4, 0], dtype=int32)
    """

    boundaries: tuple[float, ...] = ()  # Lowest value of each bucket but the first, ascending.

    kind: ClassVar[str] = "bucketized"

    @classmethod
    def fit(cls, name: str, column: Column, *, reference: datetime | None = None) -> Self:
        """Takes quantiles of the finite numbers, so that each bucket holds some."""
        numbers = to_numbers(name, column)
        known = numbers[np.isfinite(numbers)]
        if len(known) == 0:
            return cls(name)
        shares = np.arange(1, MAX_BUCKETS) / MAX_BUCKETS
        # "higher" picks a number from the column, so no bucket is empty; none starts at the lowest.
        quantiles = np.unique(np.quantile(known, shares, method="higher"))
        return cls(name, tuple(quantiles[quantiles > known.min()].tolist()))

    @property
    def num_codes(self) -> int:
        """Number of buckets."""
        return len(self.boundaries) + 1

    def encoded(self, raw: np.ndarray) -> np.ndarray:
        """Returns [B] int32 buckets from 1, 0 where missing or infinite."""
        codes = 1 + np.searchsorted(self.boundaries, raw, side="right")
        return np.where(np.isfinite(raw), codes, 0).astype(np.int32)

    def encoded_in_graph(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B] int32 buckets from 1, 0 where missing or infinite."""
        codes = 1 + tf.searchsorted(tf.constant(self.boundaries, tf.float64), raw, side="right")
        return tf.where(tf.math.is_finite(raw), codes, 0)

    def codes_of(self, there: Self) -> np.ndarray:
        """Returns the bucket there that holds the lowest value of each bucket here."""
        lowest = np.array([-np.inf, *self.boundaries])
        return np.concatenate([[0], 1 + np.searchsorted(there.boundaries, lowest, side="right")])


@dataclass(frozen=True)
class Timestamp(Feature):
    """A moment's age, and its hour and weekday in UTC, each a point on a circle.

    The age is log(1 + days before `reference`), at least 0, standardised.
    """

    mean: float = 0.0  # Of the column's ages.
    scale: float = 1.0
    reference: float = 0.0  # In seconds since 1970.

    kind: ClassVar[str] = "timestamp"
    raw_dtype = "float64"
    example = "2026-01-31T08:00Z"
    is_embedded = False
    is_time = True

    @classmethod
    def read(cls, column: TableColumn) -> ir.Value:
        """Reads moments in UTC."""
        return column.read("time")

    @classmethod
    def fit(cls, name: str, column: Column, *, reference: datetime | None = None) -> Self:
        """Standardises ages, which count back from the reference; None is the latest time."""
        seconds = to_seconds(name, column)
        known = seconds[~np.isnan(seconds)]
        start = float(known.max()) if len(known) else 0.0
        if reference is not None:
            start = float(to_seconds(name, [reference])[0])
        mean, scale = moments(np.log1p(np.maximum(start - known, 0.0) / DAY_SECONDS))
        return cls(name, mean, scale, start)

    def to_raw(self, column: Column) -> np.ndarray:
        """Returns [n] float64 seconds since 1970, NaN where missing."""
        return to_seconds(self.name, column)

    def encoded(self, raw: np.ndarray) -> np.ndarray:
        """Returns [B, 5] float32: age, sine and cosine of the hour, then of the weekday."""
        age = np.log1p(np.maximum(self.reference - raw, 0.0) * (1 / DAY_SECONDS))
        # The logarithm makes a day matter more for new items than for old ones.
        values = [standardised(age - self.mean, self.scale)]
        in_day = np.mod(raw, DAY_SECONDS)
        # 1970 began on a Thursday. A weekday is one point on its circle at any hour.
        in_week = np.mod(raw - in_day + 3 * DAY_SECONDS, 7 * DAY_SECONDS)
        for angle in (in_day * (2 * np.pi / DAY_SECONDS), in_week * (2 * np.pi / 7 / DAY_SECONDS)):
            values += [np.sin(angle), np.cos(angle)]
        is_finite = np.isfinite(raw[:, np.newaxis])
        return np.where(is_finite, np.stack(values, axis=1, dtype=np.float32), np.float32(np.nan))

    def encoded_in_graph(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B, 5] float32, as `encoded` does."""
        age = tf.math.log1p(tf.maximum(self.reference - raw, 0.0) * (1 / DAY_SECONDS))
        values = [standardised_in_graph(age - self.mean, self.scale)]
        in_day = tf.math.floormod(raw, DAY_SECONDS)
        in_week = tf.math.floormod(raw - in_day + 3 * DAY_SECONDS, 7 * DAY_SECONDS)
        for angle in (in_day * (2 * np.pi / DAY_SECONDS), in_week * (2 * np.pi / 7 / DAY_SECONDS)):
            values += [tf.cast(tf.sin(angle), tf.float32), tf.cast(tf.cos(angle), tf.float32)]
        is_finite = tf.math.is_finite(raw[:, tf.newaxis])
        return tf.where(is_finite, tf.stack(values, axis=1), np.float32(np.nan))

    @property
    def had_values(self) -> bool:
        """Whether the column had a time; the reference does not come from the column."""
        return dataclasses.replace(self, reference=0.0) != self.fit(self.name, [None])

    @staticmethod
    def from_text(text: str) -> datetime:
        """Converts a time in ISO 8601 with its zone."""
        if "\0" in text:  # It would end the text for `fromisoformat`.
            raise ValueError(f"Invalid isoformat string: {text!r}")
        time = datetime.fromisoformat(text)
        if time.tzinfo is None:
            raise ValueError(f"it has no zone: write {time.isoformat()}Z if it is UTC")
        return time


def moments(numbers: np.ndarray) -> tuple[float, float]:
    """Returns the mean and standard deviation of the finite numbers; 0 and 1 if there are none."""
    known = numbers[np.isfinite(numbers)]
    if len(known) == 0:
        return 0.0, 1.0
    size = float(np.abs(known).max()) or 1.0  # Squares of large numbers would be infinite.
    # Rounding may give equal numbers a deviation just above 0, and so other numbers huge values.
    scale = size * float((known / size).std()) if known.min() < known.max() else 1.0
    return size * float((known / size).mean()), scale or 1.0


def standardised(values: np.ndarray, scale: float) -> np.ndarray:
    """Divides by a scale other than 0, clips, and returns float32."""
    scaled = values / values.dtype.type(scale)
    return np.clip(scaled, -MAX_DEVIATIONS, MAX_DEVIATIONS).astype(np.float32)


def standardised_in_graph(values: tf.Tensor, scale: float) -> tf.Tensor:
    """Does the same to a tensor."""
    # A graph would turn `/` into a multiplication by the reciprocal, which rounds differently.
    scaled = tf.math.divide_no_nan(values, tf.constant(scale, values.dtype))
    return tf.cast(tf.clip_by_value(scaled, -MAX_DEVIATIONS, MAX_DEVIATIONS), tf.float32)


@dataclass(frozen=True)
class Vector(Feature):
    """A list of numbers, divided by one scale so that the root mean square length is 1.

    Numbers are clipped to 10 typical lengths.

    Example:
        >>> image = Vector.fit("image", [[3.0, 4.0], None, [0.0, 5.0]])
        >>> image.encode_column([[3.0, 4.0], None])
        array([[0.6, 0.8],
               [nan, nan]], dtype=float32)
    """

    num_values: int
    scale: float = 1.0  # Root mean square of the vectors' lengths.

    kind: ClassVar[str] = "vector"
    raw_dtype = "float32"
    example = "1,2,3"

    @classmethod
    def read(cls, column: TableColumn) -> ir.Value:
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
        is_finite = numbers.map(lambda n: (n.abs() <= LARGEST_FLOAT32).fill_null(False)).alls()
        mend = {"remedy": "Correct them, or leave them null where there is none.", "setting": ""}
        column.fault(~is_finite, "does not hold finite numbers that float32 can hold", **mend)
        length = is_finite.ifelse(numbers.length(), ibis.null("int64")).nullif(0)
        lengths = column.aggregate(usual=length.mode(), is_faulty=(~is_finite).any())
        usual = lengths["usual"]
        if usual is None and not lengths["is_faulty"]:
            raise column.refusal(
                f"{column.place}: no row holds a vector. Name another column, or drop the feature."
            )
        problem = f"must hold vectors of one length, {usual} as most, and does not"
        column.fault(length != usual, problem, **mend)
        return (length == usual).ifelse(numbers, ibis.null("array<float64>")).cast("array<float32>")

    @classmethod
    def fit(cls, name: str, column: Column, *, reference: datetime | None = None) -> Self:
        """Takes the most common length of lists, and the root mean square of their norms."""
        # One scale for all entries keeps the angles between vectors.
        vectors = to_vectors(name, column)
        squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
        return cls(name, vectors.shape[1], float(np.sqrt(np.nanmean(squares))) or 1.0)

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """The length."""
        return (self.num_values,)

    def to_raw(self, column: Column) -> np.ndarray:
        """Returns [n, num_values] float32, NaN in missing rows."""
        return to_vectors(self.name, column, self.num_values)

    def encoded(self, raw: np.ndarray) -> np.ndarray:
        """Returns [B, num_values] float32, NaN in rows with a missing or infinite number."""
        is_known = np.isfinite(raw).all(axis=1, keepdims=True)
        return np.where(is_known, standardised(raw, self.scale), np.float32(np.nan))

    def encoded_in_graph(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B, num_values] float32, NaN in rows with a missing or infinite number."""
        is_known = tf.reduce_all(tf.math.is_finite(raw), axis=1, keepdims=True)
        return tf.where(is_known, standardised_in_graph(raw, self.scale), np.float32(np.nan))

    @property
    def had_values(self) -> bool:
        """True: a column without any vector cannot be fitted."""
        return True

    @staticmethod
    def from_text(text: str) -> Any:
        """Converts numbers separated by commas."""
        return [finite(number) for number in text.strip(" []").split(",")]
