"""The kinds of negatives that rows share: the batch's own positives, uniform, by popularity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tfrs_pipeline.libraries import tf
from tfrs_pipeline.messages import check_integer
from tfrs_pipeline.negatives.alias import sampler_of
from tfrs_pipeline.negatives.protocol import SamplingFrame, sampling_probability


@dataclass(frozen=True)
class InBatch:
    """The other rows' positives: free, and drawn by popularity, p(c) ~ clicks(c)^1.

    Without the log_q correction they penalise popular items too much.
    """

    kind: Literal["in_batch"] = "in_batch"

    def draw(self, frame: SamplingFrame, positive_rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Returns the batch's positives, [B]; a row's own is masked as an accidental hit.

        An unknown item, row 0, fills a column that does not count. A smaller batch, such as a
        dataset's last, is filled up with draws from q_positive, so that its rows expect as many
        copies as others. A larger one raises a `ValueError`, or a `tf.errors.InvalidArgumentError`.
        """
        num_rows = positive_rows.shape[0]
        if num_rows == frame.batch_size:
            return positive_rows
        message = (
            f"The frame, and log_q with it, is for batches of {frame.batch_size} positives or "
            "fewer. Make a frame of the batch's size"
        )
        if num_rows is not None and num_rows > frame.batch_size:
            raise ValueError(f"{message}. Received: {num_rows}")
        num_rows = tf.shape(positive_rows)[0]
        check = tf.debugging.assert_less_equal(num_rows, frame.batch_size, message)
        with tf.control_dependencies([check]):
            num_missing = frame.batch_size - num_rows
        return tf.concat([positive_rows, sampler_of(frame).sample(num_missing, seed)], axis=0)

    def expected_count(self, frame: SamplingFrame) -> np.ndarray:
        """Computes (B - 1) * q_positive(c), 0 at row 0, since a row meets the others' positives."""
        count = (frame.batch_size - 1) * frame.q_positive
        count[0] = 0.0
        return count


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
        return sampler_of(frame, self.alpha).sample(self.num, seed)

    def expected_count(self, frame: SamplingFrame) -> np.ndarray:
        """Computes num * p(c)."""
        return self.num * sampling_probability(frame.counts, self.alpha)


def counts_as_in_batch(kind: object) -> bool:
    """Returns whether a kind has the expected count of `InBatch`; a subclass may have another."""
    return getattr(type(kind), "expected_count", None) is InBatch.expected_count
