"""Draws from a fixed distribution over the corpus: in the graph, exactly, in constant time.

An alias table (Walker 1977; Vose 1991) spends one integer and one float draw on each negative,
whatever the size of the corpus. An inverse CDF in float32 would give the tail of a large corpus
probability zero.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf


def build_alias_table(probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Builds Vose's alias table of a distribution.

    Slot i yields i with probability accept[i] and alias[i] otherwise, so that

        p(c) = ( accept[c] + sum over slots i with alias[i] = c of (1 - accept[i]) ) / num_rows.

    Args:
        probability: [num_rows] float64, 0 or more, sum 1.

    Returns:
        `accept`, [num_rows] float32 in [0, 1], and `alias`, [num_rows] int32.

    Raises:
        ValueError: If a value is negative or not finite, or the sum is not 1.

    Example:
        >>> accept, alias = build_alias_table(np.array([0.25, 0.75]))
        >>> accept, alias
        (array([0.5, 1. ], dtype=float32), array([1, 1], dtype=int32))
    """
    probability = np.asarray(probability, np.float64)
    if not (np.isfinite(probability).all() and (probability >= 0).all()):
        raise ValueError(
            "Probabilities must be finite and 0 or more. Received: "
            f"{probability.min()} to {probability.max()}"
        )
    if not np.isclose(probability.sum(), 1.0, rtol=0, atol=1e-9):
        raise ValueError(f"Probabilities must sum to 1. Received: {probability.sum()!r}")
    num_rows = len(probability)
    # Python lists: element access is several times faster than NumPy's in this loop.
    mass = (probability * num_rows).tolist()
    alias = list(range(num_rows))
    small = [i for i, m in enumerate(mass) if m < 1.0]
    large = [i for i, m in enumerate(mass) if m >= 1.0]
    while small and large:
        needy, donor = small.pop(), large[-1]
        alias[needy] = donor
        mass[donor] -= 1.0 - mass[needy]
        if mass[donor] < 1.0:
            small.append(large.pop())
    # What is left over differs from 1 by rounding alone; only a row of probability 0 must not be
    # handed out for it.
    top = int(np.argmax(probability))
    for i in small + large:
        if probability[i] > 0:
            mass[i] = 1.0
        else:
            mass[i], alias[i] = 0.0, top
    return np.asarray(mass, np.float32), np.asarray(alias, np.int32)


class AliasSampler:
    """Draws candidate rows from a distribution as of `build_alias_table`, with replacement.

    The same seed gives the same rows, on any number of threads.
    """

    def __init__(self, probability: np.ndarray) -> None:
        accept, alias = build_alias_table(probability)
        with tf.init_scope():  # Outlives the graph that first asks for it.
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
        threshold = tf.random.stateless_uniform([num], accept_seed)
        keep = threshold < tf.gather(self._accept, slot)
        return tf.where(keep, tf.cast(slot, tf.int32), tf.gather(self._alias, slot))
