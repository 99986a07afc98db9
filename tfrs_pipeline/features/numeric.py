"""Numbers and times: standardised, or in buckets for non-linear effects."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar, Self

import numpy as np

from tfrs_pipeline.features.feature import NUMBER_TYPES, TIME_TYPES, Feature, TableColumn
from tfrs_pipeline.features.raw import Column, to_numbers, to_seconds
from tfrs_pipeline.libraries import ir, tf

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
    column_types = NUMBER_TYPES
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
    """

    mean: float = 0.0
    scale: float = 1.0

    kind: ClassVar[str] = "numeric"
    names_elsewhere = ("number", "float", "double", "integer", "int", "real")
    is_embedded = False

    @classmethod
    def fit(cls, name: str, column: Column, *, reference: datetime | None = None) -> Self:
        """Computes mean and standard deviation."""
        return cls(name, *moments(to_numbers(name, column)))

    def encoded(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B] float32, NaN where missing or infinite."""
        return where_finite(raw, standardised(raw - self.mean, self.scale))


@dataclass(frozen=True)
class Bucketized(Number):
    """A number's bucket between quantiles of the column, in float64."""

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

    def encoded(self, raw: tf.Tensor) -> tf.Tensor:
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
    names_elsewhere = ("time", "date", "datetime")
    column_types = TIME_TYPES
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

    def encoded(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B, 5] float32: age, sine and cosine of the hour, then of the weekday."""
        age = tf.math.log1p(tf.maximum(self.reference - raw, 0.0) * (1 / DAY_SECONDS))
        values = [standardised(age - self.mean, self.scale)]
        of_day = tf.math.floormod(raw, DAY_SECONDS)
        # 1970 began on a Thursday. A weekday is one point on its circle at any hour.
        of_week = tf.math.floormod(raw - of_day + 3 * DAY_SECONDS, 7 * DAY_SECONDS)
        for angle in (of_day * (2 * np.pi / DAY_SECONDS), of_week * (2 * np.pi / 7 / DAY_SECONDS)):
            values += [tf.cast(tf.sin(angle), tf.float32), tf.cast(tf.cos(angle), tf.float32)]
        return where_finite(raw[:, tf.newaxis], tf.stack(values, axis=1))

    @property
    def had_values(self) -> bool:
        """Whether the column had a time; the reference does not come from the column."""
        return dataclasses.replace(self, reference=0.0) != self.fit(self.name, [None])

    @staticmethod
    def from_text(text: str) -> datetime:
        """Converts a time in ISO 8601 with its zone."""
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


def standardised(values: tf.Tensor, scale: float) -> tf.Tensor:
    """Divides by a scale other than 0, clips, and returns float32."""
    # A graph would turn `/` into a multiplication by the reciprocal, which rounds differently.
    scaled = tf.math.divide_no_nan(values, tf.constant(scale, values.dtype))
    return tf.cast(tf.clip_by_value(scaled, -MAX_DEVIATIONS, MAX_DEVIATIONS), tf.float32)


def where_finite(raw: tf.Tensor, encoded: tf.Tensor) -> tf.Tensor:
    """Returns the encoded values, with NaN where the raw value is missing or infinite."""
    return tf.where(tf.math.is_finite(raw), encoded, np.float32(np.nan))
