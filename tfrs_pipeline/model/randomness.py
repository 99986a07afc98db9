"""Seeds of what training drops at random: one a batch, and one of its own for each use."""

from __future__ import annotations

from enum import IntEnum

import tensorflow as tf


class Stream(IntEnum):
    """What a batch's seed is used for; draws of one use tell nothing of another's."""

    HISTORY = 1
    ATTENTION = 2
    UNKNOWN_IDS = 3
    FEATURES = 4
    CANDIDATES = 5


def pass_seed(training: bool, dropout_seed: tf.Tensor | None) -> tf.Tensor | None:
    """Returns the seed of a pass: none outside training, a new one where none is given."""
    if not training:
        return None
    if dropout_seed is not None:
        return dropout_seed
    return tf.random.uniform([2], maxval=tf.int32.max, dtype=tf.int32)


def fold(seed: tf.Tensor, number: int) -> tf.Tensor:
    """Derives a seed from a seed and a number, such as a `Stream`: [2] int32."""
    return tf.cast(tf.random.experimental.stateless_fold_in(seed, int(number)), tf.int32)
