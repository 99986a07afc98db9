"""log_q of every column of a batch: what each sampled negative weighs.

The loss of one positive c+ of query x, with corpus size V, excluded items E(x) (c+ itself, the
other known positives, the exposed items), hard share f and pool shares w_k, aims at

    -s(x, c+) + log( exp s(x, c+) + (1-f) * sum over c not in E(x) of exp s(x, c)
                     + f * V * sum_k w_k * mean over h in hard_k(x) of exp s(x, h) ).

Both sums are estimated from sampled columns with the logit s - log_q:

    the row's own positive                 0
    a shared column holding candidate c    log( n(c) / (1-f) )
    one of H_k own hard negatives          log( H_k / (V * f * w_k) )

n(c) is the expected number of copies of c among the shared columns, whichever kind drew them: a
column does not remember its kind, and need not. Then the expectation of the sum over columns is
the sum over the corpus.

Where counts are unknown or drift, q_positive(c) is an estimate of the model's own
(`StreamingFrequency`): n(c) = (B - 1) * q(c) + the other kinds' terms; the rest of the table stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfrs_pipeline.negatives.in_batch import InBatch
from tfrs_pipeline.negatives.protocol import Negatives, SamplingFrame


class Mixture:
    """Kinds of shared negatives drawn together, and the log_q of what they draw.

    Args:
        negatives: The kinds.
        frame: What they draw from.

    Attributes:
        expected_count: [num_candidates + 1] float64, n(c).

    Raises:
        ValueError: As `expected_count`.

    Example:
        The negatives of a batch for a loss of one's own, of items counted 3 and 1 times:

        >>> from tfrs_pipeline.negatives.in_batch import InBatch
        >>> from tfrs_pipeline.negatives.uniform import Uniform
        >>> mixture = Mixture([InBatch(), Uniform(2)], SamplingFrame.of_counts([0, 3, 1], 5))
        >>> rows = mixture.draw(tf.constant([1, 1, 2, 1, 1]), seed=[7, 0])
        >>> rows.shape, mixture.log_q(tf.constant([1, 2])).numpy().round(3)
        (TensorShape([7]), array([1.386, 0.693], dtype=float32))
    """

    def __init__(self, negatives: Sequence[Negatives], frame: SamplingFrame) -> None:
        self._negatives = tuple(negatives)
        self._frame = frame
        self.expected_count = expected_count(self._negatives, frame)
        # Nothing is clipped: log 0 can only meet a candidate that no kind draws.
        with np.errstate(divide="ignore"):
            self._log_count = tf.constant(np.log(self.expected_count), tf.float32)

    def draw(self, positive_rows: tf.Tensor, seed: tf.Tensor | Sequence[int]) -> tf.Tensor:
        """Draws the shared negatives of a batch.

        Args:
            positive_rows: [B] int32, the positives of the batch.
            seed: [2] int32; the draw is a function of it, a kind's draws apart from another's.

        Returns:
            [C] int32 candidate rows, kind by kind. A row must mask those that are its own positive.
        """
        return draw_all(self._negatives, self._frame, positive_rows, seed)

    def log_q(self, candidate_rows: tf.Tensor) -> tf.Tensor:
        """Looks up log n(c) of candidates, float32 of the shape of `candidate_rows`."""
        return tf.gather(self._log_count, candidate_rows)


def expected_count(negatives: Sequence[Negatives], frame: SamplingFrame) -> np.ndarray:
    """Computes n(c), the expected copies of candidate c among a row's shared columns.

    Args:
        negatives: The kinds in use.
        frame: What they draw from.

    Returns:
        [num_candidates + 1] float64, the sum over the kinds. 0 where none can draw the candidate.

    Raises:
        ValueError: If a kind's counts do not match the corpus, are negative or not finite, or give
            row 0 a count; if there is no negative at all.

    Example:
        >>> from tfrs_pipeline.negatives.in_batch import InBatch
        >>> from tfrs_pipeline.negatives.uniform import Uniform
        >>> frame = SamplingFrame(np.array([0, 3, 1]), np.array([0, 0.75, 0.25]), batch_size=5)
        >>> expected_count([InBatch(), Uniform(2)], frame)
        array([0., 4., 2.])
    """
    total = _summed(negatives, frame)
    _refuse_no_negative(bool(total.any()))
    return total


def expected_count_in_parts(
    negatives: Sequence[Negatives], frame: SamplingFrame
) -> tuple[int, np.ndarray]:
    """Splits n(c) where q_positive is yet to be estimated: n(c) = draws * q_positive(c) + other(c).

    Args:
        negatives: The kinds in use.
        frame: What they draw from; its q_positive is not read.

    Returns:
        Positives of other rows that a row meets; the other kinds' [num_candidates + 1] float64.

    Raises:
        ValueError: As `expected_count`.

    Example:
        >>> from tfrs_pipeline.negatives.uniform import Uniform
        >>> frame = SamplingFrame(np.zeros(3), np.zeros(3), batch_size=5)
        >>> expected_count_in_parts([InBatch(), Uniform(2)], frame)
        (4, array([0., 1., 1.]))
    """
    others = [kind for kind in negatives if not isinstance(kind, InBatch)]
    draws = (frame.batch_size - 1) * (len(negatives) - len(others))
    other = _summed(others, frame)
    _refuse_no_negative(draws > 0 or bool(other.any()))
    return draws, other


def _summed(negatives: Sequence[Negatives], frame: SamplingFrame) -> np.ndarray:
    total = np.zeros(frame.num_candidates + 1)
    for kind in negatives:
        count = np.asarray(kind.expected_count(frame), np.float64)
        if count.shape != total.shape:
            raise ValueError(
                f"{kind}: expected_count must return a number for each of {len(total)} candidate "
                f"rows. Received: shape {count.shape}"
            )
        if count[0] != 0 or not (np.isfinite(count).all() and (count >= 0).all()):
            raise ValueError(
                f"{kind}: expected_count must return finite numbers, 0 or more, with 0 at row 0. "
                f"Received: {count.min()} to {count.max()}, {count[0]} at row 0"
            )
        total += count
    return total


def _refuse_no_negative(has_some: bool) -> None:
    if not has_some:
        raise ValueError(
            "No shared column can be a negative: use in-batch negatives with a batch of 2 or "
            "more, or an easy kind such as uniform."
        )


def draw_all(
    negatives: Sequence[Negatives],
    frame: SamplingFrame,
    positive_rows: tf.Tensor,
    seed: tf.Tensor | Sequence[int],
) -> tf.Tensor:
    """Draws from each kind; see `Mixture.draw`."""
    drawn = [
        kind.draw(
            frame,
            positive_rows,
            tf.cast(tf.random.experimental.stateless_fold_in(seed, i), tf.int32),
        )
        for i, kind in enumerate(negatives)
    ]
    return tf.concat(drawn, axis=0)
