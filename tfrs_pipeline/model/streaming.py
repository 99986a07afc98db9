"""How often each candidate comes as a positive, estimated from the stream itself.

The correction of sampled negatives needs q(c), the share of candidate c among the positives. Counts
give it where the data are at rest. Where they never end, or drift, it is estimated from the gaps
between a candidate's occurrences (Yi et al. 2019, "Sampling-Bias-Corrected Neural Modeling for
Large Corpus Item Recommendations", algorithm 2), with these differences:

- Gaps are counted in examples, not in steps. In steps they give the probability to occur in a
  batch, which a popular candidate has close to 1 whatever its q(c).
- Not a moving mean of gaps, but the ratio of two decayed sums, the number of gaps N over the
  examples that they span S. It needs no start value, and a batch in which a candidate occurs ten
  times counts as ten gaps.
- The gap that is still open belongs to the examples spanned. So a candidate that no longer comes
  loses its frequency, and one that came once, early, does not look popular.
- A second pair of sums with a short memory tells when a candidate has become many times as
  frequent. A mean of gaps is slow to see that: one old gap of 10^8 examples outweighs a thousand
  new ones of a hundred.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features.vocabulary import bucket_count

NUM_HASHES = 2
# The short memory, of some seven batches in which the candidate occurs: a frequency that it puts at
# RISE times the long memory's is adopted. By simulation with exponential gaps, one a batch, and a
# learning rate of .01: by chance that happens once in 10^6 occurrences; after a first gap of 10^3
# to 10^9 times the mean, the estimate is within a factor of 2 after 90 occurrences and within 10%
# after 200, where it would take 900 and 1,100.
RECENT_RATE = 0.15
RISE = 4.0


class StreamingFrequency(tf.keras.layers.Layer):
    """Estimates q(c), the share of each candidate among the positives, from a stream of them.

    A candidate's estimate is

        q(c) = N / (S + examples since its last occurrence)

    For each batch in which it occurs, N and S are multiplied by 1 - learning_rate, then N grows by
    the number of its occurrences and S by the gaps that they end, in examples; the first gap
    begins with the stream. Between occurrences they rest, so that a rare candidate remembers as
    many occurrences as a common one, over more examples. The sums are kept in buckets: each
    candidate has one in every hash array, and its estimate is the smallest of theirs, since sharing
    a bucket can only make a candidate look more frequent.

    What to expect:

    - Spread: the relative standard deviation is sqrt(a / ((2 - a) * k)), with a = learning_rate
      and k the mean number of occurrences in a batch that has any: 7.1% at a = .01 for a rare
      candidate, 2.2% for one that comes ten times a batch. The bias is +a/2 just after an
      occurrence and -a/2 at a random moment.
    - Memory: after a change of q(c), the old frequency keeps a share of (1 - a)^m in S after m
      batches with an occurrence; 1% after 460. A rise by more than RISE is taken over at once, as
      soon as the last 1 / RECENT_RATE such batches show it. A fall needs no occurrence: the open
      gap alone lowers the estimate.
    - Never seen: 1 / (clock + 1), no more than any candidate that has been seen; 1 before the first
      update. An estimate is never 0, and never above 1.
    - Collisions: a hash array adds the frequencies of the others in the bucket, 1 / num_buckets on
      average. Take a few times as many buckets as candidates.

    The state, 24 bytes for each of num_buckets * NUM_HASHES, is in weights: checkpoints hold it.
    The clock counts in int64; float32 would stop at 16.7 million.

    Args:
        num_buckets: Buckets in each hash array, 1 or more.
        learning_rate: a, above 0 and at most 1: weight of the latest batch.

    Example:
        >>> frequency = StreamingFrequency(1000)
        >>> for _ in range(300):
        ...     frequency.update(tf.constant([7, 7, 2, 7]))
        >>> frequency(tf.constant([7, 2, 5])).numpy().round(4)
        array([0.75  , 0.2494, 0.0008], dtype=float32)
    """

    def __init__(self, num_buckets: int, learning_rate: float = 0.01) -> None:
        # With a dtype: a mixed precision policy would have the sums read as float16.
        super().__init__(name="streaming_frequency", trainable=False, dtype=tf.float32)
        self.num_buckets = num_buckets
        self.learning_rate = learning_rate
        # A recent memory longer than the long one would undo what that has learnt of a fall.
        recent_rate = max(RECENT_RATE, learning_rate)
        self._kept = tf.constant([1 - learning_rate] * 2 + [1 - recent_rate] * 2, tf.float32)
        num_cells = num_buckets * NUM_HASHES
        self._clock = self._state("clock", [], tf.int64)
        # The place in the stream, from 1, of the last occurrence; 0 if there was none.
        self._last_seen = self._state("last_seen", [num_cells], tf.int64)
        # N and S of the long memory, then of the recent one, side by side to be read at once.
        self._sums = self._state("sums", [num_cells, 4], tf.float32)

    @classmethod
    def of_corpus(cls, num_candidates: int) -> StreamingFrequency:
        """Makes one in which few candidates share a bucket, of 3 MB to 200 MB."""
        return cls(bucket_count(num_candidates, per_value=4, low=2**16, high=2**22))

    def update(self, candidate_rows: tf.Tensor) -> None:
        """Takes in the next batch of positives, and moves the clock on by as many examples.

        They are [n] integers in the order of the stream, repeats and n = 0 allowed. Row 0 is a
        candidate like any other.
        """
        num_rows = tf.shape(candidate_rows, tf.int64)[0]
        place = self._clock + 1 + tf.range(num_rows)
        cell, slot, count = tf.unique_with_counts(tf.reshape(self._cells(candidate_rows), [-1]))
        last = tf.math.unsorted_segment_max(tf.tile(place, [NUM_HASHES]), slot, tf.shape(cell)[0])
        # The gaps from the last occurrence before the batch to the last one in it add up to the
        # distance of these two, wherever the others lie.
        gaps = tf.cast(last - tf.gather(self._last_seen, cell), tf.float32)
        added = tf.stack([tf.cast(count, tf.float32), gaps], axis=1)
        sums = tf.gather(self._sums, cell) * self._kept + tf.tile(added, [1, 2])
        num, span, recent_num, recent_span = tf.unstack(sums, axis=1)
        is_risen = recent_num * span > RISE * num * recent_span
        sums = tf.where(is_risen[:, tf.newaxis], tf.tile(sums[:, 2:], [1, 2]), sums)
        self._sums.scatter_update(tf.IndexedSlices(sums, cell))
        self._last_seen.scatter_update(tf.IndexedSlices(last, cell))
        self._clock.assign_add(num_rows)

    def call(self, candidate_rows: tf.Tensor) -> tf.Tensor:
        """Estimates the frequency of candidates as of the last update: float32 in (0, 1].

        Rows are int32 or int64 of any shape, which is that of the estimates.
        """
        estimate = self._estimates(self._cells(tf.reshape(candidate_rows, [-1])))
        return tf.reshape(tf.reduce_min(estimate, axis=0), tf.shape(candidate_rows))

    def take_over(self, other: StreamingFrequency, rows: np.ndarray) -> None:
        """Takes over what another stream has shown, whose rows were others.

        `rows`, [num_candidates + 1], has for every row here that of the candidate there, 0 if it is
        new. A candidate brings the bucket in which it looked least frequent, the one that the
        fewest others shared. Where two of them meet in a bucket, that of the more frequent one
        stands.
        """
        kept = np.flatnonzero(rows)
        cells = other._cells(tf.constant(rows[kept], tf.int32))
        estimates = other._estimates(cells).numpy()
        order = np.argsort(estimates.min(axis=0), kind="stable")  # The last one written stands.
        cells = cells.numpy()[estimates.argmin(axis=0), np.arange(len(kept))][order]
        own_cells = self._cells(tf.constant(kept[order], tf.int32)).numpy()
        for own, theirs in ((self._sums, other._sums), (self._last_seen, other._last_seen)):
            values, found = own.numpy(), theirs.numpy()[cells]
            for of_hash in own_cells:
                values[of_hash] = found
            own.assign(values)
        self._clock.assign(other._clock)

    def _estimates(self, cells: tf.Tensor) -> tf.Tensor:
        """Estimates by each hash array alone: [NUM_HASHES, n] float32."""
        num, span, _, _ = tf.unstack(tf.gather(self._sums, cells), axis=2)
        open_gap = tf.cast(self._clock - tf.gather(self._last_seen, cells), tf.float32)
        unseen = 1.0 / tf.cast(self._clock + 1, tf.float32)
        return tf.where(num > 0, tf.math.divide_no_nan(num, span + open_gap), unseen)

    def _cells(self, rows: tf.Tensor) -> tf.Tensor:
        """Returns the place of each row's bucket in each hash array: [NUM_HASHES, n] int64."""
        text = tf.strings.as_string(rows)
        return tf.stack(
            [
                tf.strings.to_hash_bucket_strong(text, self.num_buckets, key=[i, i])
                + i * self.num_buckets
                for i in range(NUM_HASHES)
            ]
        )

    def _state(self, name: str, shape: list[int], dtype: tf.DType) -> tf.Variable:
        return self.add_weight(
            name=name, shape=shape, dtype=dtype, initializer="zeros", trainable=False
        )
