"""In-batch negatives: the positives of the other rows of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from tfrs_pipeline.negatives.protocol import SamplingFrame

if TYPE_CHECKING:
    import tensorflow as tf


@dataclass(frozen=True)
class InBatch:
    """The other rows' positives: free, and as popular as the positives are, p(c) ~ clicks(c)^1.

    Without the correction by log_q they punish popular items too much.
    """

    kind: Literal["in_batch"] = "in_batch"

    def draw(self, frame: SamplingFrame, positive_rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Returns the batch's positives; a row's own is masked as an accidental hit."""
        return positive_rows

    def expected_count(self, frame: SamplingFrame) -> np.ndarray:
        """Computes (B - 1) * q_positive(c): a row meets the positives of the others."""
        return (frame.batch_size - 1) * frame.q_positive
