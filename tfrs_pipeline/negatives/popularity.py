"""Easy negatives drawn by popularity: p(c) ~ clicks(c)^alpha."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from tfrs_pipeline.messages import check_integer
from tfrs_pipeline.negatives.protocol import SamplingFrame

if TYPE_CHECKING:
    import tensorflow as tf

    from tfrs_pipeline.negatives.alias import AliasSampler


@dataclass(frozen=True)
class Popularity:
    """`num` candidates per batch, p(c) proportional to clicks(c)^alpha, with replacement.

    Args:
        num: Draws per batch, 1 or more, shared by its rows.
        alpha: Exponent of the training clicks, above 0; .75 is word2vec's, 1 draws like in-batch
            negatives. Items without a click are never drawn.

    Raises:
        ValueError: If an argument is out of range.
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
        return _sampler(frame, self.alpha).sample(self.num, seed)

    def expected_count(self, frame: SamplingFrame) -> np.ndarray:
        """Computes num * p(c)."""
        return self.num * sampling_probability(frame.counts, self.alpha)


@functools.lru_cache(maxsize=8)
def _sampler(frame: SamplingFrame, alpha: float) -> AliasSampler:
    """Builds the alias table once for all batches of a frame."""
    from tfrs_pipeline.negatives.alias import AliasSampler

    return AliasSampler(sampling_probability(frame.counts, alpha))


def sampling_probability(counts: np.ndarray, alpha: float) -> np.ndarray:
    """Computes p(c) proportional to counts(c)^alpha over the corpus; row 0 is never drawn.

    alpha = 0 is uniform over every candidate, clicked or not; alpha = 1 is the distribution of
    in-batch negatives; .75 lies between (word2vec; Mikolov et al. 2013).

    Example:
        >>> sampling_probability(np.array([0, 16, 1, 0]), alpha=0.75)
        array([0.        , 0.88888889, 0.11111111, 0.        ])
    """
    # 0^0 is 1, as intended: uniform draws include items without a click.
    mass = np.power(np.asarray(counts, np.float64), alpha)
    mass[0] = 0.0
    return mass / mass.sum()
