"""Numbers in buckets of as many rows each, for effects that are not linear."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from tfrs_pipeline.features.numeric import Number
from tfrs_pipeline.features.raw import Column, to_numbers

if TYPE_CHECKING:
    import tensorflow as tf

MAX_BUCKETS = 32


@dataclass(frozen=True)
class Bucketized(Number):
    """A number's bucket between quantiles of the column, in float64.

    Args:
        boundaries: Lowest value of each bucket but the first, ascending.
    """

    boundaries: tuple[float, ...] = ()

    kind: ClassVar[str] = "bucketized"

    @classmethod
    def fit(cls, name: str, column: Column, *, reference: datetime | None = None) -> Self:
        """Takes quantiles of the finite numbers, so that each bucket holds some."""
        numbers = to_numbers(name, column)
        known = numbers[np.isfinite(numbers)]
        if len(known) == 0:
            return cls(name)
        shares = np.arange(1, MAX_BUCKETS) / MAX_BUCKETS
        # "higher" picks a number of the column, which opens its bucket; none opens at the lowest.
        quantiles = np.unique(np.quantile(known, shares, method="higher"))
        return cls(name, tuple(quantiles[quantiles > known.min()].tolist()))

    @property
    def num_codes(self) -> int:
        """Number of buckets."""
        return len(self.boundaries) + 1

    def encoded(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B] int32 buckets from 1, 0 where missing or infinite."""
        import tensorflow as tf

        codes = 1 + tf.searchsorted(tf.constant(self.boundaries, tf.float64), raw, side="right")
        return tf.where(tf.math.is_finite(raw), codes, 0)

    def codes_of(self, there: Self) -> np.ndarray:
        """Returns the bucket there that holds the lowest value of each bucket here."""
        lowest = np.array([-np.inf, *self.boundaries])
        return np.concatenate([[0], 1 + np.searchsorted(there.boundaries, lowest, side="right")])
