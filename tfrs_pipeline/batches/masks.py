"""Whether a candidate is in a row's list, for masks of many rows at once.

`samples/never_negatives.py` decides what the lists hold.
"""

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

Never = Mapping[str, tf.RaggedTensor]
"""Reason -> for each row, the sorted candidates that are never negatives of its query."""


def never_shared(never: Never, columns: tf.Tensor) -> tf.Tensor:
    """Finds which shared columns, [C] int32, are never a row's negative: [n, C] bool."""
    parts = [part for lists in never.values() for part in (lists.values, lists.row_splits)]
    # In NumPy, because TensorFlow's search and scatter take four times as long.
    is_never = tf.numpy_function(contains, [columns, *parts], tf.bool, stateful=False)
    num_rows = next(iter(never.values())).shape[0]
    return tf.ensure_shape(is_never, [num_rows, columns.shape[0]])


def is_member(lists: tf.RaggedTensor, rows: tf.Tensor) -> tf.Tensor:
    """Marks the entries of line i of `rows`, [n, m] int32, that are in sorted list i: [n, m]."""
    # (list, value) pairs as one ascending sequence.
    pairs = lists.value_rowids() * 2**32 + tf.cast(lists.values, tf.int64)
    line = tf.range(tf.shape(rows, tf.int64)[0])[:, tf.newaxis]
    keys = tf.reshape(line * 2**32 + tf.cast(rows, tf.int64), [-1])
    position = tf.searchsorted(pairs, keys)
    padded = tf.concat([pairs, [-1]], axis=0)
    return tf.ensure_shape(
        tf.reshape(tf.gather(padded, position) == keys, tf.shape(rows)), rows.shape
    )


def contains(columns: np.ndarray, *parts: np.ndarray) -> np.ndarray:
    """Marks the columns whose candidate is in a list of the row: [num_rows, num_columns] bool.

    `parts` are the values and the offsets of one or more `RowLists` of `num_rows` lists.

    Example:
        Two rows, whose lists are [3] and [7, 9]:

        >>> contains(np.array([7, 3, 7]), np.array([3, 7, 9]), np.array([0, 1, 3]))
        array([[False,  True, False],
               [ True, False,  True]])
    """
    distinct, column = np.unique(columns, return_inverse=True)
    largest = max(rows.max(initial=0) for rows in (columns, *parts[::2]))
    # The table's column for each candidate, from 1; 0 if the candidate is in no column.
    table_column = np.zeros(largest + 1, np.int32)
    table_column[distinct] = np.arange(1, len(distinct) + 1, dtype=np.int32)
    num_rows, width = len(parts[1]) - 1, len(distinct) + 1
    table = np.zeros(num_rows * width, bool)
    for values, splits in zip(parts[::2], parts[1::2], strict=True):
        first = np.repeat(np.arange(num_rows) * width, np.diff(splits))
        table[first + table_column[values]] = True
    return table.reshape(num_rows, width).take(column + 1, axis=1)
