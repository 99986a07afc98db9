"""Lists of candidate rows in the graph: membership, draws."""

from __future__ import annotations

from collections.abc import Sequence

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
    distinct, _ = tf.unique(tf.sort(columns))
    padded = tf.concat([distinct, [0]], axis=0)
    cells = []
    for lists in kinds:
        place = tf.searchsorted(distinct, lists.values)
        found = tf.where(tf.gather(padded, place) == lists.values)[:, 0]
        row = tf.searchsorted(lists.row_splits, found, side="right", out_type=tf.int32) - 1
        cells.append(tf.stack([tf.gather(place, found), row], axis=1))
    cell = tf.concat(cells, axis=0)
    table = tf.tensor_scatter_nd_update(
        tf.zeros([tf.shape(distinct)[0], kinds[0].nrows(tf.int32)], tf.bool),
        cell,
        tf.ones(tf.shape(cell)[:1], tf.bool),
    )
    # A candidate a line, so that repeats copy whole lines: several times faster than cell by cell.
    return tf.transpose(tf.gather(table, tf.searchsorted(distinct, columns)))
