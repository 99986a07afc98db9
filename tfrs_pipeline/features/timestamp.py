"""Moments: their age, hour and weekday."""

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Self

import numpy as np

from tfrs_pipeline.features.feature import TIME_TYPES, Feature, TableColumn
from tfrs_pipeline.features.libraries import ir, tf
from tfrs_pipeline.features.numeric import moments, standardised, where_finite
from tfrs_pipeline.features.raw import Column, to_seconds

DAY_SECONDS = 86_400.0


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
    def read(cls, column: TableColumn) -> "ir.Value":
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

    def encoded(self, raw: "tf.Tensor") -> "tf.Tensor":
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
    def from_text(text: str) -> Any:
        """Converts a time in ISO 8601 with its zone."""
        time = datetime.fromisoformat(text)
        if time.tzinfo is None:
            raise ValueError(f"it has no zone: write {time.isoformat()}Z if it is UTC")
        return time
