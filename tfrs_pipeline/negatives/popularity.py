"""Easy negatives drawn by popularity: p(c) ~ clicks(c)^alpha."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tfrs_pipeline.features.libraries import tf
from tfrs_pipeline.messages import check_integer
from tfrs_pipeline.negatives.protocol import SamplingFrame, sampling_probability


@dataclass(frozen=True)
class Popularity:
    """`num` candidates per batch, p(c) proportional to clicks(c)^alpha, with replacement.

    `alpha` is above 0; .75 is word2vec's, 1 draws like in-batch negatives. Items without a click
    are never drawn. A `ValueError` if an argument is out of range.
    """

    num: int = 256
    alpha: float = 0.75
    kind: Literal["popularity"] = "popularity"

    def __post_init__(self) -> None:
        check_integer(1, num=self.num)
        if not self.alpha > 0:
            raise ValueError(
                f"alpha must be above 0 (0 would be the kind uniform). Received: {self.alpha}"
            )

    def draw(self, frame: SamplingFrame, positive_rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws [num] candidate rows."""
        from tfrs_pipeline.negatives.alias import sampler_of

        return sampler_of(frame, self.alpha).sample(self.num, seed)

    def expected_count(self, frame: SamplingFrame) -> np.ndarray:
        """Computes num * p(c)."""
        return self.num * sampling_probability(frame.counts, self.alpha)
