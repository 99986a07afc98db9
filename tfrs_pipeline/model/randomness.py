"""Seeds of training's dropout: one per batch, from which each use derives its own."""

from enum import IntEnum
from typing import NamedTuple

import tensorflow as tf

# Rows that differ by a multiple of this share their draws in a batch.
ROWS_DRAWN = 2**14


class Stream(IntEnum):
    """The uses of a batch's seed; their draws are independent of each other."""

    HISTORY = 1
    ATTENTION = 2
    UNKNOWN_IDS = 3
    FEATURES = 4
    CANDIDATES = 5
    REQUESTS = 6
    GAPS = 7


def pass_seed(training: bool, dropout_seed: tf.Tensor | None) -> tf.Tensor | None:
    """Returns the seed of a pass: None outside training, or a new one if none is given."""
    if not training:
        return None
    if dropout_seed is not None:
        return dropout_seed
    return tf.random.uniform([2], maxval=tf.int32.max, dtype=tf.int32)


def fold(seed: tf.Tensor, number: int) -> tf.Tensor:
    """Derives a seed from a seed and a number, such as a `Stream`: [2] int32."""
    return tf.cast(tf.random.experimental.stateless_fold_in(seed, int(number)), tf.int32)


def uniform_of_rows(rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draws a number in [0, 1) for each of [n] int32 rows, as a function of row and seed."""
    # It does not depend on the rest of the batch, so slices have the draws of the whole.
    return tf.gather(tf.random.stateless_uniform([ROWS_DRAWN], seed), rows % ROWS_DRAWN)


class Dropout(NamedTuple):
    """Draws what training drops in a batch; in a slice, the same as in the whole batch.

    `part` is the `dropout_slice` of a `Batch`.
    """

    seed: tf.Tensor
    part: tf.Tensor | None = None

    def of(self, number: int) -> "Dropout":
        """Derives the draws of one use (see `fold`)."""
        return Dropout(fold(self.seed, number), self.part)

    def uniform(self, shape: tf.Tensor) -> tf.Tensor:
        """Draws numbers in [0, 1), with lines along the first dimension of `shape`."""
        if self.part is None:
            return tf.random.stateless_uniform(shape, self.seed)
        # Draws the whole and cuts it: a slice alone cannot know the position of its draws.
        first, num_lines = self.part[0], self.part[1]
        whole = tf.random.stateless_uniform(tf.concat([[num_lines], shape[1:]], axis=0), self.seed)
        return whole[first : first + shape[0]]
