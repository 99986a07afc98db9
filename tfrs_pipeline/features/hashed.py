"""One value a row, of very many."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from tfrs_pipeline.features.categorical import Category
from tfrs_pipeline.features.raw import Column
from tfrs_pipeline.features.vocabulary import count_rows

if TYPE_CHECKING:
    import tensorflow as tf

MIN_BUCKETS, MAX_BUCKETS = 16, 2**20


@dataclass(frozen=True)
class Hashed(Category):
    """A value's bucket by its hash (FarmHash), the same in every process.

    Args:
        num_buckets: Number of buckets, a power of two.
    """

    num_buckets: int

    kind: ClassVar[str] = "hashed"

    @classmethod
    def fit(cls, name: str, column: Column, *, reference: datetime | None = None) -> Self:
        """Takes the next power of two above twice the number of values.

        A value shares its bucket with another one in at most 4 of 10 cases. More do at the limit
        of 2^20, which keeps the table below 16 MB at 4 dimensions.
        """
        num_values = len(count_rows(column)[0])
        wanted = 2 ** (2 * num_values - 1).bit_length()
        return cls(name, min(max(wanted, MIN_BUCKETS), MAX_BUCKETS))

    @property
    def num_codes(self) -> int:
        """Number of buckets."""
        return self.num_buckets

    def encoded(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B] int32 buckets from 1, 0 where missing."""
        import tensorflow as tf

        from tfrs_pipeline.features import graph

        # Keras keeps bucket 0 for the mask.
        hashing = tf.keras.layers.Hashing(self.num_buckets + 1, mask_value="", dtype="int32")
        return hashing(graph.cleaned(raw))

    def codes_of(self, there: Self) -> np.ndarray:
        """Returns the bucket there of which each bucket here is a part, or which is part of it."""
        return np.concatenate([[0], 1 + np.arange(self.num_buckets) % there.num_buckets])
