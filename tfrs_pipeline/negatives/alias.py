"""Draws from a fixed distribution over the corpus: in the graph, exactly, in constant time.

An inverse CDF in float32 would give the tail of a large corpus probability zero.
"""

from __future__ import annotations

import functools

import numpy as np

from tfrs_pipeline.libraries import tf
from tfrs_pipeline.negatives.protocol import SamplingFrame, sampling_probability


def build_alias_table(probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Builds an alias table of a distribution (Walker 1977), without a loop over rows.

    Slot i yields i with probability accept[i] and alias[i] otherwise, so that

        p(c) = ( accept[c] + sum over slots i with alias[i] = c of (1 - accept[i]) ) / num_rows.

    Example:
        >>> accept, alias = build_alias_table(np.array([0.25, 0.75]))
        >>> accept, alias
        (array([0.5, 1. ], dtype=float32), array([1, 1], dtype=int32))
    """
    probability = np.asarray(probability, np.float64)
    lowest, total = probability.min(), probability.sum()
    if not (lowest >= 0 and np.isclose(total, 1.0, rtol=0, atol=1e-9)):
        received = f"Received: {lowest} and more, sum {total}"
        raise ValueError(f"Probabilities must be 0 or more and sum to 1. {received}")
    mass = probability * len(probability)
    # Rounding may leave no mass at 1 or above.
    is_large = mass >= min(1.0, mass.max())
    small, large = np.flatnonzero(~is_large), np.flatnonzero(is_large)
    # Small rows take what they lack from large ones, in order. Think of all lacking and all spare
    # mass as two lines side by side: a small row takes from the large row beside its start. If it
    # ends beyond that large row, the large row has given too much and takes it from the next one.
    lacking, spare = np.cumsum(1 - mass[small]), np.cumsum(mass[large] - 1)
    alias = np.arange(len(mass), dtype=np.int32)
    begins = np.append(0.0, lacking[:-1])[: len(small)]
    donor = np.searchsorted(spare, begins, side="right")
    # Spare and lacking mass are equal up to rounding, which must not reach beyond the last row.
    alias[small] = large[np.minimum(donor, len(large) - 1)]
    last = np.searchsorted(lacking, spare)  # The row that takes more than the large one has.
    gives_too_much = (last < len(small)) & (np.arange(len(large)) < len(large) - 1)
    accept = np.minimum(mass, 1.0)
    given = np.append(lacking, np.inf)[last] - spare
    accept[large] = np.where(gives_too_much, 1 - given, 1.0)
    alias[large[:-1]] = np.where(gives_too_much[:-1], large[1:], large[:-1])
    return accept.astype(np.float32), alias


class AliasSampler:
    """Draws candidate rows from a distribution (see `build_alias_table`), with replacement."""

    # Thresholds have steps of 2^-23: rows with a mass p(c) V near that are drawn coarsely. Powers
    # of clicks up to 1 stay well above it with fewer than a million clicks per item.

    def __init__(self, probability: np.ndarray) -> None:
        accept, alias = build_alias_table(probability)
        with tf.init_scope():  # The constants must outlive the graph that first needs them.
            self._accept = tf.constant(accept)
            self._alias = tf.constant(alias)
        self._num_rows = len(accept)

    def sample(self, num: int, seed: tf.Tensor) -> tf.Tensor:
        """Draws [num] int32 rows; the seed, [2] int, is as in `tf.random.stateless_uniform`."""
        slot_seed, accept_seed = tf.unstack(tf.random.experimental.stateless_split(seed, 2))
        # int64: the remainder of a 32-bit draw would favour low slots by up to num_rows / 2^32.
        slot = tf.random.stateless_uniform(
            [num], slot_seed, minval=0, maxval=self._num_rows, dtype=tf.int64
        )
        keep = tf.random.stateless_uniform([num], accept_seed) < tf.gather(self._accept, slot)
        return tf.where(keep, tf.cast(slot, tf.int32), tf.gather(self._alias, slot))


@functools.lru_cache(maxsize=16)
def sampler_of(frame: SamplingFrame, alpha: float | None = None) -> AliasSampler:
    """Makes the sampler of counts^alpha, or without `alpha` of positives, once for all batches."""
    probability = frame.q_positive if alpha is None else sampling_probability(frame.counts, alpha)
    return AliasSampler(probability)
