"""Easy negatives drawn uniformly from the whole corpus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tfrs_pipeline.features.libraries import tf
from tfrs_pipeline.messages import check_integer
from tfrs_pipeline.negatives.protocol import SamplingFrame


@dataclass(frozen=True)
class Uniform:
    """`num` candidates per batch, 1 or more, all of the corpus equally likely, with replacement."""

    num: int = 256
    kind: Literal["uniform"] = "uniform"

    def __post_init__(self) -> None:
        check_integer(1, num=self.num)

    def draw(self, frame: SamplingFrame, positive_rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws [num] candidate rows."""
        # int64: the remainder of a 32-bit draw would favour low rows by up to size / 2^32.
        rows = tf.random.stateless_uniform(
            [self.num], seed, minval=1, maxval=frame.num_candidates + 1, dtype=tf.int64
        )
        return tf.cast(rows, tf.int32)

    def expected_count(self, frame: SamplingFrame) -> np.ndarray:
        """Computes num / num_candidates for every candidate."""
        count = np.full(frame.num_candidates + 1, self.num / frame.num_candidates)
        count[0] = 0.0
        return count
