"""Whole sequences: one pass over a user's items trains all positions (sequence-level training).

A causal encoder, whose outputs depend only on earlier items, gives the query of every sample.
"""

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from tfrs_pipeline.batches.batch import Batch
from tfrs_pipeline.batches.examples import EpochExamples
from tfrs_pipeline.messages import check_integer
from tfrs_pipeline.samples.store import RowLists, Samples, offsets_of, padded_lines

# Windows of similar length are batched together, within this many batches in random order.
BATCHES_PER_POOL = 16


class WholeSequences(EpochExamples):
    """Every position of a sequence is a positive.

    A sequence is cut into windows of `history_length` items from its end. A window trains the
    samples whose histories end in it, and cuts these at its start, so that the first samples of a
    later window have short histories. Windows of similar length are batched together.

    Batches have P = W positives (about B). Instead of history_rows they have sequence_rows, state
    and, for a log with timestamps, sequence_times (see `Batch`). A `ValueError` if the samples have
    no order, or a batch would be too small for its windows; twice a window's maximum suffices.
    """

    has_one_positive = True

    def __init__(
        self, samples: Samples, *, batch_size: int, history_length: int, seed: int
    ) -> None:
        check_integer(1, batch_size=batch_size, history_length=history_length)
        if samples.num_earlier is None:
            raise ValueError(
                "Whole sequences need an order: a history must be a prefix of its user's "
                "sequence. Give the log its order, or train its users as sets."
            )
        windows = _Windows.cut(samples, history_length)
        row, rows = tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, None], tf.int32)
        self.signature = Batch(row, row, row, sequence_rows=rows, state=row)
        if samples.sequence_times is not None:
            times = tf.TensorSpec([None, None], tf.float64)
            self.signature = self.signature._replace(sequence_times=times)
        steps = max(1, round(len(samples) / batch_size))
        super().__init__(batch_size=batch_size, steps_per_epoch=steps, seed=seed, drawn=row)
        self._num_samples = len(samples)
        self._num_positives = np.diff(windows.samples.offsets)
        longest = int(self._num_positives.max())
        # Otherwise that many positives in a row might not hold the middle of any window.
        if self.steps_per_epoch > 1 and len(samples) / self.steps_per_epoch <= longest:
            raise ValueError(
                f"training.batch_size = {batch_size} is too small: a window trains up to {longest} "
                f"positives (those of one moment share a history). Use {2 * longest} or more, a "
                "shorter history, or training.examples = 'single'."
            )
        self._samples = samples
        self._windows = windows

    def draw_epoch(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Draws the windows of each batch, [S] int32."""
        order = rng.permutation(len(self._num_positives))
        done = np.cumsum(self._num_positives[order]) - self._num_positives[order] / 2
        pool = done * self.steps_per_epoch // (self._num_samples * BATCHES_PER_POOL)
        # Sorted by length within a pool, so that a batch has windows of similar length.
        order = order[np.lexsort([self._num_positives[order], pool])]
        done = np.cumsum(self._num_positives[order]) - self._num_positives[order] / 2
        batch = (done * self.steps_per_epoch / self._num_samples).astype(np.int64)
        ends = np.searchsorted(batch, np.arange(1, self.steps_per_epoch))
        batches = np.split(order.astype(np.int32), ends)
        return [batches[i] for i in rng.permutation(self.steps_per_epoch)]

    def read(self, chosen: np.ndarray) -> Batch:
        """Reads windows; see the class."""
        samples, windows = self._samples, self._windows
        assert samples.num_earlier is not None
        of_windows = windows.samples.take(chosen)
        index = of_windows.values
        starts, lengths = windows.starts[chosen], windows.lengths[chosen]
        width = lengths.max()
        first = samples.sequences.offsets[windows.query_rows[chosen]] + starts
        window = np.repeat(np.arange(len(chosen), dtype=np.int32), np.diff(of_windows.offsets))
        num_read = samples.num_earlier[index] - starts[window]
        if (times := samples.sequence_times) is not None:
            # A window ends with its last history; the next event is the query with that history.
            times = padded_lines(times, first, lengths + 1, width + 1, missing=np.nan)
        return Batch(
            query_row=samples.query_rows[index],
            index=index,
            candidate_row=samples.candidate_rows[index],
            sequence_rows=padded_lines(samples.sequences.values, first, lengths, width),
            sequence_times=times,
            state=window * (width + 1) + num_read,
        )


@dataclass(frozen=True)
class _Windows:
    """Windows of sequences, and the samples that each trains; arrays are [num_windows] int32."""

    query_rows: np.ndarray
    starts: np.ndarray  # Place of each one's first item in the query's sequence.
    lengths: np.ndarray  # Number of items that each reads.
    samples: RowLists

    @classmethod
    def cut(cls, samples: Samples, length: int) -> "_Windows":
        """Cuts sequences from their ends, the last window ending with the last history."""
        # A window that starts at s trains the samples with s < num_earlier <= s + length; the first
        # window of a sequence also trains those with an empty history.
        assert samples.num_earlier is not None
        last = np.zeros(len(samples.sequences), np.int64)
        np.maximum.at(last, samples.query_rows, samples.num_earlier)
        # Windows are numbered from the end: number 0 reads up to the last history.
        number = np.maximum(last[samples.query_rows] - samples.num_earlier, 0) // length
        # An empty history begins the window that reads the first item.
        number = np.minimum(number, np.maximum(last[samples.query_rows] - 1, 0) // length)
        key = samples.query_rows.astype(np.int64) << 32 | number
        order = np.lexsort([samples.num_earlier, key])
        distinct, first, counts = np.unique(key[order], return_index=True, return_counts=True)
        query_rows = (distinct >> 32).astype(np.int32)
        end = last[query_rows] - (distinct & 0xFFFFFFFF) * length
        starts = np.maximum(end - length, 0)
        # If a tie moves a window's last samples elsewhere, it reads only as far as its own samples.
        furthest = np.maximum.reduceat(samples.num_earlier[order], first)
        lengths = (furthest - starts).astype(np.int32)
        lists = RowLists(offsets_of(counts), order.astype(np.int32))
        return cls(query_rows, starts.astype(np.int32), lengths, lists)
