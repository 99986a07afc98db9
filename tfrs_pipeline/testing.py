"""Checks for the tests of those who write their own parts."""

import numpy as np
import tensorflow as tf

from tfrs_pipeline.negatives.samplers import Negatives, SamplingFrame


def check_draws(kind: Negatives, frame: SamplingFrame, num_batches: int = 200) -> None:
    """Checks that a kind of negative draws each candidate as often as its `expected_count` says.

    If it does not, log_q is wrong without an error: the loss still falls. The positives of each
    batch are drawn from `frame`. A kind that returns these positives, as `InBatch` does, expects
    the copies in the columns of other rows, which is not what this function counts.

    Args:
        kind: The kind, whose draws must be a function of their seed.
        frame: A small corpus with uneven counts, such as `SamplingFrame.of_counts(range(50), 64)`.
        num_batches: Batches that are drawn; 200 notice a count that is half or twice too large.

    Raises:
        AssertionError: If the counts are impossible, if draws are no vector of integers, if one is
            no candidate that the kind expects, or if a candidate's mean copies are more than six
            standard errors from its expected count.

    Example:
        >>> from tfrs_pipeline.negatives.samplers import Uniform
        >>> check_draws(Uniform(32), SamplingFrame.of_counts(range(50), batch_size=64))
    """
    expected, rng = np.asarray(kind.expected_count(frame), float), np.random.default_rng(0)
    are_counts = np.isfinite(expected).all() and (expected >= 0).all() and expected[0] == 0
    assert (len(expected), are_counts) == (frame.num_candidates + 1, True), (
        f"{kind}: expected_count must return a finite number, 0 or more, for each of "
        f"{frame.num_candidates + 1} candidate rows, 0 at row 0. Received: {expected}"
    )
    share = frame.q_positive[1:] / frame.q_positive[1:].sum()
    copies = np.zeros((num_batches, len(expected)))
    for i in range(num_batches):
        positives = 1 + rng.choice(frame.num_candidates, frame.batch_size, p=share)
        drawn = np.asarray(kind.draw(frame, tf.constant(positives, tf.int32), tf.constant([0, i])))
        shape = f"draw must return a vector of integers, not {drawn.dtype} of shape {drawn.shape}"
        assert (drawn.ndim, drawn.dtype.kind) == (1, "i"), f"{kind}: {shape}"
        is_expected = np.isin(drawn, np.flatnonzero(expected))
        assert is_expected.all(), f"{kind}: drew {drawn[~is_expected][0]}, which it expects 0 times"
        copies[i] = np.bincount(drawn, minlength=len(expected))
    # A kind may draw a candidate in many copies or none, so its own deviation counts if larger.
    error = np.maximum(copies.std(axis=0), np.sqrt(expected)) / np.sqrt(num_batches)
    mean = copies.mean(axis=0)
    row = int(np.argmax(np.abs(mean - expected) - 6 * error))
    assert abs(mean[row] - expected[row]) <= 6 * error[row], (
        f"{kind}: expects {expected[row]:.4g} copies of candidate {row}, and drew {mean[row]:.4g}"
    )
