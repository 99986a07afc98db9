"""The rows' own hard negatives, drawn from their samples' pools without masked candidates."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tfrs_pipeline.batches.batch import HardColumns, Use, seed_of
from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.messages import check_integer
from tfrs_pipeline.negatives.log_q import hard_log_q
from tfrs_pipeline.negatives.samplers import HardNegatives, Pool
from tfrs_pipeline.samples.never_negatives import is_never, reasons_in
from tfrs_pipeline.samples.store import RowLists, Samples


class HardPool(NamedTuple):
    """The candidates of each sample's hard negatives: list number `key` of a kind's lists.

    Without a key, each sample has its own list in the samples' files. Candidates that are never its
    negatives were removed when the list was built.
    """

    lists: RowLists
    key: np.ndarray | None

    @classmethod
    def checked(
        cls, name: str, pool: Pool, samples: Samples, rng: np.random.Generator
    ) -> "HardPool":
        """Packs a pool that a kind returned; refuses (`ValueError`) one that does not fit."""
        lists, key = pool
        if key is None and any(lists is stored for stored in samples.hard_pools.values()):
            return cls(lists, None)
        # In random order, since a row draws neighbours of a list together.
        packed = RowLists.from_lists([rng.permutation(np.asarray(rows, int)) for rows in lists])
        numbers = np.arange(len(packed)) if key is None else np.asarray(key)
        last, rows = len(samples.counts) - 1, packed.values
        # Here, because what a graph says of an index out of range names no kind and no list.
        if (
            len(numbers) != len(samples)
            or not 0 <= numbers.min() <= numbers.max() < len(packed)
            or not 0 <= rows.min(initial=0) <= rows.max(initial=0) <= last
        ):
            raise ValueError(
                f"Hard negatives {name!r} need lists of candidate rows in 1 .. {last}, and for "
                f"each of {len(samples)} samples the number of one of {len(packed)} lists. "
                f"Received: {lists!r:.200}, {key}"
            )
        return cls(packed, numbers)

    def take(self, index: np.ndarray) -> RowLists:
        """Gathers the candidates of samples, [n] int."""
        return self.lists.take(index if self.key is None else self.key[index])

    def has_any(self) -> np.ndarray:
        """Marks the samples whose list is not empty: [num_samples] bool."""
        has_any = np.diff(self.lists.offsets) > 0
        return has_any if self.key is None else has_any[self.key]


class HardDraws:
    """Draws each row's hard negatives, `num` columns from each pool of its sample.

    The pools have equal weight. A `DataError` if no sample has a candidate, a `ValueError` if the
    kind is not as `HardNegatives` says.
    """

    def __init__(self, samples: Samples, hard: HardNegatives, *, seed: int) -> None:
        check_integer(1, num=hard.num)
        if not 0 < hard.share < 1:
            raise ValueError(f"The share of hard negatives is in (0, 1). Received: {hard.share}")
        self.share, self._num = hard.share, hard.num
        self._samples, self._seed = samples, seed
        rng = np.random.default_rng([seed, Use.HARD])
        pools = hard.pools(samples).items()
        self.pools = {name: HardPool.checked(name, pool, samples, rng) for name, pool in pools}
        if not any(len(pool.lists.values) for pool in self.pools.values()):
            raise DataError(f"{hard}: none of {len(samples):,} positives has a hard negative.")
        self._reasons = {name: reasons_in(name, hard) for name in self.pools}

    def read(self, index: np.ndarray) -> dict[str, RowLists]:
        """Gathers the candidates of samples, [n] int, in each pool."""
        pools = {name: pool.take(index) for name, pool in self.pools.items()}
        for name, lists in pools.items():
            if self.pools[name].key is not None:
                # Left out before the draw: if they were drawn and masked, the few columns left in a
                # row would each weigh more, and so would a masked candidate's neighbours.
                never = is_never(self._samples, index, lists, self._reasons[name])
                pools[name] = lists.where(~never)
        return pools

    def draw(self, step: tf.Tensor, index: tf.Tensor) -> HardColumns:
        """Draws for the samples of a batch, [B] int32."""
        seed = seed_of(self._seed, Use.HARD, step)
        starts = [
            tf.random.stateless_uniform(
                tf.shape(index), tf.random.experimental.stateless_fold_in(seed, i)
            )
            for i in range(len(self.pools))
        ]
        # In NumPy, because that does not copy mapped files.
        rows, is_counted = tf.numpy_function(
            self._draw, [index, *starts], [tf.int32, tf.bool], stateful=False
        )
        # The shapes are lost on the way, and the loss needs them.
        num_pools = len(self.pools)
        shape = [index.shape[0], num_pools * self._num]
        rows, is_counted = (tf.ensure_shape(x, shape) for x in (rows, is_counted))
        by_pool = tf.reshape(is_counted, [-1, num_pools, self._num])
        left = tf.math.count_nonzero(by_pool, axis=2, dtype=tf.float32)
        log_q = hard_log_q(left, self.share, self._samples.num_possible_negatives)
        return HardColumns(
            candidate_row=rows,
            log_q=tf.ensure_shape(tf.repeat(log_q, self._num, axis=1), shape),
            is_counted=is_counted,
            share=tf.where(tf.reduce_any(left > 0, axis=1), self.share, 0.0),
        )

    def _draw(self, index: np.ndarray, *starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draws from each pool, from its `starts`, [B] in [0, 1): rows and masks, [B, H] each."""
        samples, rows, is_counted = self._samples, [], []
        for (name, lists), start in zip(self.read(index).items(), starts, strict=True):
            drawn = draw_from_lists(lists, self._num, start)
            by_row = RowLists(np.arange(len(index) + 1) * self._num, drawn.ravel())
            never = is_never(samples, index, by_row, self._reasons[name]).reshape(drawn.shape)
            rows.append(drawn)
            is_counted.append((drawn > 0) & ~never)
        return np.concatenate(rows, axis=1), np.concatenate(is_counted, axis=1)


def draw_from_lists(lists: RowLists, num: int, start: np.ndarray) -> np.ndarray:
    """Draws `num` entries of each list, which is in random order; 0s if empty: [n, num] int32.

    Takes consecutive entries from a random start, [n] float32 in [0, 1), wrapping around. Each
    column is a uniform draw. Entries repeat only after all have come: their mean varies less than
    with independent draws.

    Example:
        >>> lists = RowLists.from_lists([[4, 5, 6], []])
        >>> draw_from_lists(lists, 4, np.array([0.4, 0.9], np.float32))
        array([[5, 6, 4, 5],
               [0, 0, 0, 0]], dtype=int32)
    """
    lengths = np.diff(lists.offsets)[:, np.newaxis]
    first = (start[:, np.newaxis] * lengths.astype(np.float32)).astype(np.int64)
    position = (first + np.arange(num)) % np.maximum(lengths, 1) + lists.offsets[:-1, np.newaxis]
    padded = np.append(lists.values, np.int32(0))
    return np.where(lengths > 0, padded[position], 0)
