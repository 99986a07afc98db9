"""The rows' own hard negatives, and the candidates that are never negatives of a row."""

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from tfrs_pipeline.batches.batch import HardColumns, Use, seed_of
from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.negatives.kinds import FunnelLosers
from tfrs_pipeline.negatives.mixture import hard_log_q
from tfrs_pipeline.samples.store import RowLists, Samples

# A user who passes over an exposed item among a few says nothing about retrieval among millions;
# that is for ranking. Building samples removes such items from pools; a batch masks them too.
KNOWN, EXPOSED = REASONS = "known positives", "exposed items"

Never = Mapping[str, tf.RaggedTensor]
"""Reason -> for each row, the sorted candidates that are never negatives of its query."""


def never_shared(never: Never, columns: tf.Tensor) -> tf.Tensor:
    """Finds which shared columns, [C] int32, are never a row's negative: [n, C] bool."""
    parts = [part for lists in never.values() for part in (lists.values, lists.row_splits)]
    # In NumPy, because TensorFlow's search and scatter take four times as long.
    found = tf.numpy_function(contains, [columns, *parts], tf.bool, stateful=False)
    return tf.ensure_shape(found, [never[KNOWN].shape[0], columns.shape[0]])


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


class HardDraws:
    """Draws each row's hard negatives, `num` columns from each stage's pool of its sample.

    The stages have equal weight. A `DataError` if no sample has a loser of these stages.
    """

    def __init__(self, samples: Samples, hard: FunnelLosers, *, seed: int) -> None:
        self.share = hard.share
        self._hard = hard
        self._seed = seed
        self._num_possible = samples.num_possible_negatives
        nothing = RowLists.empty(len(samples))
        self.pools: dict[str, RowLists] = {
            stage: samples.hard_pools.get(stage, nothing) for stage in hard.stages
        }
        if not any(len(pool.values) for pool in self.pools.values()):
            ranked = "; a ranked one also needs a rank" if "ranked" in hard.stages else ""
            raise DataError(
                f"model.hard asks for losers of the stages {', '.join(hard.stages)}, and none of "
                f"{len(samples):,} positives has one. A loser has the positive's user and its "
                f"request_id, or without a request_id exactly its time{ranked}. If a click is "
                "logged later than its request, give request_id; or set model.hard to none."
            )

    def draw(
        self,
        step: tf.Tensor,
        pools: Mapping[str, tf.RaggedTensor],
        candidate_row: tf.Tensor,
        never: Never,
    ) -> HardColumns:
        """Draws for the [B] samples of a batch from their pools, [B, None] int32 each."""
        rows, is_counted, num_left = [], [], []
        for i, (name, pool) in enumerate(pools.items()):
            seed = seed_of(self._seed, Use.HARD, step)
            seed = tf.random.experimental.stateless_fold_in(seed, i)
            drawn = draw_from_lists(pool, self._hard.num, seed)
            # A graph loses the static shape on the way, and the loss needs the rank.
            drawn = tf.ensure_shape(drawn, [candidate_row.shape[0], self._hard.num])
            is_good = (drawn > 0) & (drawn != candidate_row[:, tf.newaxis])
            # A pool of exposed items exists only if `allow_exposed` is set.
            for reason in (KNOWN,) if name == "exposed" else REASONS:
                is_good &= ~is_member(never[reason], drawn)
            rows.append(drawn)
            is_counted.append(is_good)
            num_left.append(tf.math.count_nonzero(is_good, axis=1, dtype=tf.float32))
        left = tf.stack(num_left, axis=1)
        log_q = hard_log_q(left, self.share, self._num_possible)
        return HardColumns(
            candidate_row=tf.concat(rows, axis=1),
            log_q=tf.repeat(log_q, self._hard.num, axis=1),
            is_counted=tf.concat(is_counted, axis=1),
            share=tf.where(tf.reduce_any(left > 0, axis=1), self.share, 0.0),
        )


def draw_from_lists(lists: tf.RaggedTensor, num: int, seed: tf.Tensor) -> tf.Tensor:
    """Draws `num` entries of each list, which is in random order; 0s if empty: [n, num] int32."""
    # Takes consecutive entries from a random start, wrapping around. Each column is a uniform draw.
    # Entries repeat only after all have come: their mean varies less than with independent draws.
    lengths = lists.row_lengths()[:, tf.newaxis]
    drawn = tf.random.stateless_uniform([tf.shape(lengths)[0], 1], seed)
    start = tf.cast(drawn * tf.cast(lengths, tf.float32), tf.int64)
    place = (start + tf.range(num, dtype=tf.int64)) % tf.maximum(lengths, 1)
    place += lists.row_starts()[:, tf.newaxis]
    padded = tf.concat([lists.values, [0]], axis=0)
    return tf.where(lengths > 0, tf.gather(padded, place), 0)
