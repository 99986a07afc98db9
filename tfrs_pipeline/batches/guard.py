"""The guard of a batch: candidates that must never be a query's negatives, in any column."""

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from tfrs_pipeline.samples.store import RowLists, Samples

KNOWN, EXPOSED = REASONS = "known positives", "exposed items"

Never = Mapping[str, tf.RaggedTensor]
"""Reason -> for each row, the sorted candidates that are never negatives of its query."""


class Guard:
    """Finds the columns that are never negatives of their row's query: known, or exposed."""

    # A user who passes over an exposed item among a few says nothing about retrieval among
    # millions; that is for ranking. Building samples already removes such items from pools; a
    # batch masks them again.
    def __init__(self, samples: Samples) -> None:
        self._never = {KNOWN: samples.known_positives, EXPOSED: samples.exposed}

    def read(self, query_rows: np.ndarray) -> dict[str, RowLists]:
        """Gathers the candidates that are never negatives of queries, [n] int32."""
        return {reason: lists.take(query_rows) for reason, lists in self._never.items()}

    @staticmethod
    def of_shared(never: Never, columns: tf.Tensor) -> tf.Tensor:
        """Finds which shared columns, [C] int32, are never a row's negative: [n, C] bool."""
        kinds = [never[reason] for reason in REASONS]
        parts = [part for lists in kinds for part in (lists.values, lists.row_splits)]
        # In NumPy, because TensorFlow's search and scatter take four times as long.
        found = tf.numpy_function(contains, [columns, *parts], tf.bool, stateful=False)
        return tf.ensure_shape(found, [kinds[0].shape[0], columns.shape[0]])

    @staticmethod
    def of_own(never: Never, rows: tf.Tensor, pool: str) -> tf.Tensor:
        """Finds which of each row's own candidates, [n, H], are never negatives of its query."""
        # A pool of exposed items exists only if `allow_exposed` is set.
        reasons = (KNOWN,) if pool == "exposed" else REASONS
        found = [is_member(never[reason], rows) for reason in reasons]
        return tf.reduce_any(tf.stack(found), axis=0)


def is_member(lists: tf.RaggedTensor, rows: tf.Tensor) -> tf.Tensor:
    """Marks the entries of line i of `rows`, [n, m] int32, that are in sorted list i: [n, m]."""
    # (list, value) pairs as one ascending sequence.
    pairs = lists.value_rowids() * 2**32 + tf.cast(lists.values, tf.int64)
    line = tf.range(tf.shape(rows, tf.int64)[0])[:, tf.newaxis]
    keys = tf.reshape(line * 2**32 + tf.cast(rows, tf.int64), [-1])
    place = tf.searchsorted(pairs, keys)
    padded = tf.concat([pairs, [-1]], axis=0)
    return tf.ensure_shape(tf.reshape(tf.gather(padded, place) == keys, tf.shape(rows)), rows.shape)


def contains(columns: np.ndarray, *parts: np.ndarray) -> np.ndarray:
    """Marks the columns whose candidate is in a list of the row: [num_rows, num_columns] bool.

    `parts` are the values and the offsets of one or more `RowLists` of `num_rows` lists.
    """
    distinct, place = np.unique(columns, return_inverse=True)
    largest = max(rows.max(initial=0) for rows in (columns, *parts[::2]))
    # The table's column for each candidate, from 1; 0 if the candidate is in no column.
    line_of = np.zeros(largest + 1, np.int32)
    line_of[distinct] = np.arange(1, len(distinct) + 1, dtype=np.int32)
    num_rows, width = len(parts[1]) - 1, len(distinct) + 1
    table = np.zeros(num_rows * width, bool)
    for values, splits in zip(parts[::2], parts[1::2], strict=True):
        first = np.repeat(np.arange(num_rows) * width, np.diff(splits))
        table[first + line_of[values]] = True
    return table.reshape(num_rows, width).take(place + 1, axis=1)
