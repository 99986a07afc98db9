"""Training batches of whole sequences: one pass over a user's items trains all positions.

A sample's history is a beginning of its query's sequence (`Samples`), so that an encoder which
reads a sequence once, each output knowing only what comes before, has the query of every sample in
it. What the positives are compared with, and how it weighs, is as in `TrainingBatches`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from tfrs_pipeline.negatives.batches import Batch, EasySampling, HardSampling
from tfrs_pipeline.negatives.epochs import EpochBatches
from tfrs_pipeline.samples.build import RowLists, Samples

# Windows of like length are batched together, out of this many batches' worth in random order.
BATCHES_PER_POOL = 16


class SequenceBatches(EpochBatches):
    """Builds training batches in which every position of a sequence is a positive.

    A sequence is cut into windows of `history_length` items from its end; a window trains the
    samples whose histories end in it, which it truncates to itself: so the first samples of a later
    window have short histories. Batches hold about `batch_size` positives each, and as many windows
    as it takes; windows of like length come together, which leaves little padding.

    There are no in-batch negatives: a sampler with alpha 1 draws from the same distribution.

    `batch` returns what `TrainingBatches.batch` describes, with P positives (about B), but for
    history_rows, and:
        sequence_rows: [W, L'] int32, the windows, oldest first, padded with 0; L' is the longest
            one's length.
        state: [P] int32, w * (L' + 1) + j where the history is the first j items of window w.

    Args:
        samples: The training samples, of a log with an order.
        batch_size: Positives in a batch, about; twice those of any window is always enough.
        easy_negatives: As for `TrainingBatches`, as the other arguments.
        history_length: L, longest window.
        seed: Of the order and of the draws.
        mask_known_positives: Whether a query's other training positives are left out.
        mask_exposed: Whether a query's exposed and never clicked items are left out.
        hard_share: f in [0, 1).
        hard_negatives: Per stage, its part of the hard share and how many columns to draw.
        positive_weight: [num_candidates + 1] factors for the weights of the samples, by candidate.

    Raises:
        ValueError: If the samples have no order, a batch would be too small for its windows, or as
            for `TrainingBatches`.
    """

    # The windows of a batch.
    _chosen: ClassVar[Any] = tf.TensorSpec([None], tf.int32)

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        easy_negatives: Sequence[EasySampling],
        history_length: int,
        seed: int,
        mask_known_positives: bool = True,
        mask_exposed: bool = True,
        hard_share: float = 0.0,
        hard_negatives: Sequence[HardSampling] = (),
        positive_weight: np.ndarray | None = None,
    ) -> None:
        if samples.num_earlier is None:
            raise ValueError(
                "All positions at once need an order: a history must be a beginning of its user's "
                "sequence. Give the log its order, or train its users as sets (UserSetBatches)."
            )
        super().__init__(
            samples,
            batch_size=batch_size,
            easy_negatives=easy_negatives,
            history_length=history_length,
            seed=seed,
            in_batch=False,
            mask_known_positives=mask_known_positives,
            mask_exposed=mask_exposed,
            hard_share=hard_share,
            hard_negatives=hard_negatives,
            positive_weight=positive_weight,
        )
        windows = _Windows.cut(samples, history_length)
        self._num_positives = np.diff(windows.samples.offsets)
        self._num_batches = self.steps_per_epoch
        longest = int(self._num_positives.max())
        # Else a stretch of that many positives might hold the middle of no window.
        if self._num_batches > 1 and len(samples) / self._num_batches <= longest:
            raise ValueError(
                f"batch_size = {batch_size} is too small: a window trains up to {longest} "
                f"positives (those of one moment share a history). Use {2 * longest} or more, a "
                "shorter history, or training.positions = 'one'."
            )
        self._window_query = tf.constant(windows.query_rows)
        self._window_start = tf.constant(windows.starts)
        self._window_length = tf.constant(windows.lengths)
        self._window_samples = tf.RaggedTensor.from_row_splits(
            windows.samples.values, windows.samples.offsets, validate=False
        )

    def _draw_epoch(self, rng: np.random.Generator) -> list[np.ndarray]:
        order = rng.permutation(len(self._num_positives))
        done = np.cumsum(self._num_positives[order]) - self._num_positives[order] / 2
        pool = done * self._num_batches // (self.num_samples * BATCHES_PER_POOL)
        # Within a pool by length, so that a batch has windows of like length.
        order = order[np.lexsort([self._num_positives[order], pool])]
        done = np.cumsum(self._num_positives[order]) - self._num_positives[order] / 2
        batch = (done * self._num_batches / self.num_samples).astype(np.int64)
        ends = np.searchsorted(batch, np.arange(1, self._num_batches))
        batches = np.split(order.astype(np.int32), ends)
        return [batches[i] for i in rng.permutation(self._num_batches)]

    def _build(self, step: tf.Tensor, chosen: tf.Tensor) -> Batch:
        lists = tf.gather(self._window_samples, chosen)
        index = lists.values
        query_row = tf.gather(self._query_rows, index)
        candidate_row = tf.gather(self._candidate_rows, index)
        starts = tf.gather(self._window_start, chosen)
        lengths = tf.gather(self._window_length, chosen)
        width = tf.reduce_max(lengths)
        place = tf.range(width)[tf.newaxis, :]
        first = tf.gather(self._sequences.row_starts(), tf.gather(self._window_query, chosen))
        source = tf.cast(first, tf.int32) + starts
        is_item = place < lengths[:, tf.newaxis]
        source = source[:, tf.newaxis] + tf.where(is_item, place, 0)
        window = tf.cast(lists.value_rowids(), tf.int32)
        num_read = tf.cast(tf.gather(self._num_earlier, index), tf.int32) - tf.gather(
            starts, window
        )
        return {
            **self._compared(step, index, query_row, candidate_row),
            "sequence_rows": tf.where(is_item, tf.gather(self._sequences.values, source), 0),
            "state": window * (width + 1) + num_read,
        }


class _Windows:
    """Windows of sequences and the samples that each of them trains.

    Args:
        query_rows: [num_windows] int32.
        starts: [num_windows] int32, place of the window's first item in the query's sequence.
        lengths: [num_windows] int32, items that the window reads.
        samples: Per window, its samples.
    """

    def __init__(
        self, query_rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray, samples: RowLists
    ) -> None:
        self.query_rows = query_rows
        self.starts = starts
        self.lengths = lengths
        self.samples = samples

    @classmethod
    def cut(cls, samples: Samples, length: int) -> _Windows:
        """Cuts sequences from their ends, the last window ending with the last history.

        A window that starts at s trains the samples with s < num_earlier <= s + length, the first
        one of a sequence also those with an empty history.
        """
        assert samples.num_earlier is not None
        last = np.zeros(len(samples.sequences), np.int64)
        np.maximum.at(last, samples.query_rows, samples.num_earlier)
        # Windows from the end: number 0 reads up to the last history.
        number = np.maximum(last[samples.query_rows] - samples.num_earlier, 0) // length
        # An empty history begins the window that reads the first item.
        number = np.minimum(number, np.maximum(last[samples.query_rows] - 1, 0) // length)
        key = samples.query_rows.astype(np.int64) << 32 | number
        order = np.lexsort([samples.num_earlier, key])
        distinct, first, counts = np.unique(key[order], return_index=True, return_counts=True)
        query_rows = (distinct >> 32).astype(np.int32)
        end = last[query_rows] - (distinct & 0xFFFFFFFF) * length
        starts = np.maximum(end - length, 0)
        # A window whose last samples fell to a tie reads no further than its own samples do.
        furthest = np.maximum.reduceat(samples.num_earlier[order], first)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(
            query_rows,
            starts.astype(np.int32),
            (furthest - starts).astype(np.int32),
            RowLists(offsets, order.astype(np.int32)),
        )
