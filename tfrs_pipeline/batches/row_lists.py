"""Lists of candidate rows in the graph: membership, draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf


def draw_from_lists(lists: tf.RaggedTensor, num: int, seed: tf.Tensor) -> tf.Tensor:
    """Draws `num` entries of each list, of random order; 0s from an empty one: [n, num] int32.

    They are consecutive from a random start, around the end: each column is a uniform draw, and
    entries repeat only once all have come, which keeps the mean over them steadier than independent
    draws would.
    """
    lengths = lists.row_lengths()[:, tf.newaxis]
    drawn = tf.random.stateless_uniform([tf.shape(lengths)[0], 1], seed)
    start = tf.cast(drawn * tf.cast(lengths, tf.float32), tf.int64)
    place = (start + tf.range(num, dtype=tf.int64)) % tf.maximum(lengths, 1)
    place += lists.row_starts()[:, tf.newaxis]
    padded = tf.concat([lists.values, [0]], axis=0)
    return tf.where(lengths > 0, tf.gather(padded, place), 0)


def is_member(lists: tf.RaggedTensor, rows: tf.Tensor) -> tf.Tensor:
    """Tells which entries of line i of `rows`, [n, m] int32, are in list i, sorted: [n, m] bool."""
    # (list, value) pairs as one ascending sequence.
    pairs = lists.value_rowids() * 2**32 + tf.cast(lists.values, tf.int64)
    line = tf.range(tf.shape(rows, tf.int64)[0])[:, tf.newaxis]
    keys = tf.reshape(line * 2**32 + tf.cast(rows, tf.int64), [-1])
    place = tf.searchsorted(pairs, keys)
    padded = tf.concat([pairs, [-1]], axis=0)
    return tf.ensure_shape(tf.reshape(tf.gather(padded, place) == keys, tf.shape(rows)), rows.shape)


def contains(kinds: Sequence[tf.RaggedTensor], columns: tf.Tensor) -> tf.Tensor:
    """Tells which columns' candidates are in any of each row's lists: [num_rows, num_columns] bool.

    `kinds` are one or more [num_rows, None] int32, candidate rows from 1; columns may repeat.
    """
    # In NumPy, since TensorFlow's search and scatter take four times as long.
    parts = [part for lists in kinds for part in (lists.values, lists.row_splits)]
    found = tf.numpy_function(_contains, [columns, *parts], tf.bool, stateful=False)
    return tf.ensure_shape(found, [kinds[0].shape[0], columns.shape[0]])


def _contains(columns: np.ndarray, *parts: np.ndarray) -> np.ndarray:
    distinct, place = np.unique(columns, return_inverse=True)
    largest = max(rows.max(initial=0) for rows in (columns, *parts[::2]))
    # Of each candidate its line in the table, from 1; 0 for one that is in no column.
    line_of = np.zeros(largest + 1, np.int32)
    line_of[distinct] = np.arange(1, len(distinct) + 1, dtype=np.int32)
    num_rows, width = len(parts[1]) - 1, len(distinct) + 1
    table = np.zeros(num_rows * width, bool)
    for values, splits in zip(parts[::2], parts[1::2], strict=True):
        first = np.repeat(np.arange(num_rows) * width, np.diff(splits))
        table[first + line_of[values]] = True
    return table.reshape(num_rows, width).take(place + 1, axis=1)
