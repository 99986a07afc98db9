"""Seeds of what training drops at random: one per batch, from which each use derives its own."""

from __future__ import annotations

from enum import IntEnum

import tensorflow as tf

# Rows that are a multiple of this apart share what is drawn for them in a batch.
ROWS_DRAWN = 2**14


class Stream(IntEnum):
    """What a batch's seed is used for; draws of one use are independent of another's."""

    HISTORY = 1
    ATTENTION = 2
    UNKNOWN_IDS = 3
    FEATURES = 4
    CANDIDATES = 5
    REQUESTS = 6
    GAPS = 7


def pass_seed(training: bool, dropout_seed: tf.Tensor | None) -> tf.Tensor | None:
    """Returns the seed of a pass: None outside training, a new one if none is given."""
    if not training:
        return None
    if dropout_seed is not None:
        return dropout_seed
    return tf.random.uniform([2], maxval=tf.int32.max, dtype=tf.int32)


def fold(seed: tf.Tensor, number: int) -> tf.Tensor:
    """Derives a seed from a seed and a number, such as a `Stream`: [2] int32."""
    return tf.cast(tf.random.experimental.stateless_fold_in(seed, int(number)), tf.int32)


def uniform_of_rows(rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draws a number in [0, 1) for each of [n] int32 rows, a function of the row and the seed.

    It does not depend on the rest of the batch: slices have the draws of the whole, and a row that
    comes twice has one draw.
    """
    return tf.gather(tf.random.stateless_uniform([ROWS_DRAWN], seed), rows % ROWS_DRAWN)


def uniform_of_slice(
    shape: tf.Tensor, seed: tf.Tensor, dropout_slice: tf.Tensor | None
) -> tf.Tensor:
    """Draws numbers in [0, 1) for the lines of a batch, or for a slice what the whole has there.

    Lines are the first dimension of `shape`. `dropout_slice`, [2] int32, is the number of the first
    line in the whole batch, and the number of the batch's lines; None is a whole batch.
    """
    if dropout_slice is None:
        return tf.random.stateless_uniform(shape, seed)
    first, num_lines = dropout_slice[0], dropout_slice[1]
    whole = tf.random.stateless_uniform(tf.concat([[num_lines], shape[1:]], axis=0), seed)
    return whole[first : first + shape[0]]
