"""The protocol of easy negatives: what is drawn, and how often each candidate is expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tfrs_pipeline.libraries import tf
from tfrs_pipeline.messages import check_integer


@dataclass(frozen=True, eq=False)
class SamplingFrame:
    """The distributions from which negatives are drawn, by candidate row: [num_candidates + 1].

    `counts` are training positives, and `q_positive`, float64, is the distribution from which the
    `batch_size` positives of a batch are drawn; row 0 has unknown items, if batches hold any.
    """

    counts: np.ndarray
    q_positive: np.ndarray
    batch_size: int

    @classmethod
    def of_counts(cls, counts: Sequence[int] | np.ndarray, batch_size: int) -> SamplingFrame:
        """Makes the frame of batches that are a fair draw of the counted positives.

        Unknown items may be in the batch but are never negatives: their columns have a log_q of
        -inf. A `ValueError` if the counts or the size are impossible.
        """
        counts = np.asarray(counts)
        is_count = np.isfinite(counts) & (counts >= 0)
        if counts.ndim != 1 or not is_count.all() or not counts[1:].any():
            raise ValueError(
                "counts must be a finite number for each candidate row, 0 or more, and not all 0 "
                f"beyond row 0, which counts positives of unknown items. Received: {counts}."
            )
        check_integer(1, batch_size=batch_size)
        return cls(counts, counts / counts.sum(), batch_size)

    @property
    def num_candidates(self) -> int:
        """Size of the corpus, without row 0."""
        return len(self.counts) - 1


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


class Negatives(Protocol):
    """A kind of negative that the rows of a batch share.

    Your own kind needs only these two methods: log_q of every column is then right, whatever other
    kinds are in the mixture (see `mixture`).
    """

    def draw(self, frame: SamplingFrame, positive_rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws the candidates of one batch, in the graph, as a function of its arguments.

        Args:
            frame: The corpus and its distributions.
            positive_rows: [B] int32, the positives of the batch.
            seed: [2] int32, for stateless draws.

        Returns:
            [num] int32 candidate rows from 1; row 0 is never drawn. Repeats are allowed.
        """
        ...

    def expected_count(self, frame: SamplingFrame) -> np.ndarray:
        """Computes how many copies of each candidate `draw` is expected to return.

        Returns [num_candidates + 1] float64, 0 at row 0. If these are the rows' positives
        (`InBatch`), a row's own does not count.
        """
        ...
