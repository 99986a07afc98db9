"""In-batch negatives: the positives of the other rows of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tfrs_pipeline.features.libraries import tf
from tfrs_pipeline.negatives.protocol import SamplingFrame


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
        from tfrs_pipeline.negatives.alias import sampler_of

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


def counts_as_in_batch(kind: object) -> bool:
    """Returns whether a kind has the expected count of `InBatch`; a subclass may have another."""
    return getattr(type(kind), "expected_count", None) is InBatch.expected_count
