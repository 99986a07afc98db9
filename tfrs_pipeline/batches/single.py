"""Positives one by one: each sample is a separate example."""

import numpy as np
import tensorflow as tf

from tfrs_pipeline.batches.batch import Batch
from tfrs_pipeline.batches.examples import Use, blocks, seed_of
from tfrs_pipeline.messages import check_integer
from tfrs_pipeline.negatives.alias import AliasSampler
from tfrs_pipeline.samples.positives import positive_probability
from tfrs_pipeline.samples.store import Samples

INT32_MAX = np.iinfo(np.int32).max


class SinglePositives:
    """Every sample once an epoch, in a random order that the graph computes.

    A batch may span two epochs, so every batch is full. `history_length` is N, the most recent
    history rows per query. With a `rate` by candidate, [num_candidates + 1], an epoch has as many
    draws with replacement: first of a candidate, then of one of its samples. A `ValueError` if
    there are fewer than `batch_size` samples, or 2^31 or more.
    """

    is_fair_draw = True
    has_one_positive = True

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        history_length: int,
        seed: int,
        rate: np.ndarray | None = None,
    ) -> None:
        check_integer(1, batch_size=batch_size)
        if len(samples) < batch_size:
            raise ValueError(
                f"A batch needs {batch_size} positives and the training part has {len(samples)}: "
                "there is no partial batch. Lower batch_size."
            )
        if len(samples) > INT32_MAX:
            raise ValueError(
                f"{len(samples)} samples are more than the {INT32_MAX} that one order holds."
            )
        self.batch_size = batch_size
        self.steps_per_epoch = max(1, round(len(samples) / batch_size))
        self.rate = rate
        row = tf.TensorSpec([batch_size], tf.int32)
        history = tf.TensorSpec([batch_size, history_length], tf.int32)
        self.signature = Batch(row, row, row, history_rows=history)
        if samples.sequence_times is not None:
            times = tf.TensorSpec([batch_size, history_length + 1], tf.float64)
            self.signature = self.signature._replace(history_times=times)
        self._samples = samples
        self._num_samples = len(samples)
        self._history_length = history_length
        self._seed = seed
        self._sampler = None
        if rate is not None:
            self._sampler = AliasSampler(positive_probability(samples.counts, rate))
            self._counts = tf.constant(samples.counts, tf.int64)
            self._first = tf.cumsum(self._counts, exclusive=True)
            self._by_candidate = _sort_by_candidate(samples)

    def choose(self, step: int) -> np.ndarray:
        """Returns [B] int32: samples, or with rates their places in the order of candidates."""
        return self._samples_of(tf.constant(step, tf.int64)).numpy()

    def dataset(self, start_step: int, num_steps: int | None) -> tf.data.Dataset:
        """Returns pairs of a step and its samples."""
        stop = np.iinfo(np.int64).max if num_steps is None else start_step + num_steps
        steps = tf.data.Dataset.range(start_step, stop)
        return steps.map(lambda step: (step, self._samples_of(step)))

    def read(self, chosen: np.ndarray) -> Batch:
        """Reads the chosen samples; see `Examples`."""
        index = chosen if self._sampler is None else self._by_candidate[chosen]
        times = None
        if self._samples.sequence_times is not None:
            times = self._samples.latest_times(index, self._history_length)
        return Batch(
            query_row=self._samples.query_rows[index],
            index=index,
            candidate_row=self._samples.candidate_rows[index],
            history_rows=self._samples.latest(index, self._history_length),
            history_times=times,
        )

    def _samples_of(self, step: tf.Tensor) -> tf.Tensor:
        if self._sampler is not None:
            return self._drawn(self._sampler, seed_of(self._seed, Use.ORDER, step))
        place = step * self.batch_size + tf.range(self.batch_size, dtype=tf.int64)
        index = tf.cast(place % self._num_samples, tf.int32)
        first_epoch = step * self.batch_size // self._num_samples
        # A batch is not larger than an epoch, so it ends in the next epoch at the latest.
        is_next = place // self._num_samples > first_epoch
        this, following = (
            tf.random.experimental.index_shuffle(
                index, seed_of(self._seed, Use.ORDER, epoch), self._num_samples - 1
            )
            for epoch in (first_epoch, first_epoch + 1)
        )
        return tf.where(is_next, following, this)

    def _drawn(self, sampler: AliasSampler, seed: tf.Tensor) -> tf.Tensor:
        """Draws candidates, and a sample of each: [B] int32 places in the order of candidates."""
        seed, within_seed = tf.unstack(tf.random.experimental.stateless_split(seed, 2))
        candidate = sampler.sample(self.batch_size, seed)
        # With 63 bits the remainder is fair to within one in 2^31.
        bits = tf.random.stateless_uniform(
            [self.batch_size], within_seed, minval=None, maxval=None, dtype=tf.int64
        )
        within = (bits & np.iinfo(np.int64).max) % tf.gather(self._counts, candidate)
        return tf.cast(tf.gather(self._first, candidate) + within, tf.int32)


def _sort_by_candidate(samples: Samples) -> np.ndarray:
    """Sorts samples by candidate, a block at a time in memory: [num_samples] int32."""
    place = np.cumsum(samples.counts) - samples.counts
    by_candidate = np.empty(len(samples), np.int32)
    for block in blocks(len(samples)):
        rows = samples.candidate_rows[block]
        order = np.argsort(rows, kind="stable")
        distinct, first, num = np.unique(rows[order], return_index=True, return_counts=True)
        target = np.arange(len(rows)) + np.repeat(place[distinct] - first, num)
        by_candidate[target] = block.start + order
        place[distinct] += num
    return by_candidate
