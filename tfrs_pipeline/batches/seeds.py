"""Seeds of what a batch draws: each a function of the run's seed, the use and the step or epoch."""

from __future__ import annotations

from enum import IntEnum

import tensorflow as tf


class Use(IntEnum):
    """What a seed is for; draws of one use tell nothing of another's."""

    ORDER = 0
    DROPOUT = 1
    HARD = 2
    SHARED = 3


def seed_of(seed: int, use: Use, key: tf.Tensor) -> tf.Tensor:
    """Derives the seed of a draw, [2] int32, from the run's and a step or epoch, scalar int64."""
    return tf.cast(tf.random.experimental.stateless_fold_in([seed, use], key), tf.int32)
