"""The rows' own hard negatives, drawn from their samples' pools without masked candidates."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tfrs_pipeline.batches.batch import HardColumns, Use, seed_of
from tfrs_pipeline.batches.masks import Never, is_member
from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.messages import check_integer, sentence
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
        rows, last = packed.values, len(samples.counts) - 1
        is_list = (numbers >= 0) & (numbers < len(packed))
        if numbers.shape != (len(samples),) or numbers.dtype.kind not in "iu" or not is_list.all():
            raise ValueError(
                f"Hard negatives {name!r} need the number of a list for each of {len(samples)} "
                f"samples, below the {len(packed)} lists. Received: {numbers}"
            )
        if rows.size and not 1 <= rows.min() <= rows.max() <= last:
            raise ValueError(
                f"Hard negatives {name!r} must be candidate rows in 1 .. {last}: row 0 is "
                f"'unknown'. Received: {rows.min()} to {rows.max()}"
            )
        return cls(packed, numbers)

    def take(self, index: np.ndarray) -> RowLists:
        """Gathers the candidates of samples, [n] int."""
        return self.lists.take(index if self.key is None else self.key[index])

    def has_any(self, samples: slice) -> np.ndarray:
        """Marks the samples whose list is not empty: [n] bool."""
        index = np.arange(samples.start, samples.stop) if self.key is None else self.key[samples]
        return self.lists.offsets[index + 1] > self.lists.offsets[index]


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
        pools = hard.pools(samples)
        try:
            self.pools = {
                name: HardPool.checked(name, pool, samples, rng) for name, pool in pools.items()
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{sentence(str(error))} `pools` must return {{name: (lists, numbers)}}: a list of "
                f"[n] int arrays of candidate rows, and [{len(samples)}] int, the list of each "
                f"sample, or None if each has its own. Received: {pools!r:.200}"
            ) from error
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
            drawn = draw_from_lists(pool, self._num, seed)
            # A graph loses the static shape on the way, and the loss needs the rank.
            drawn = tf.ensure_shape(drawn, [candidate_row.shape[0], self._num])
            is_good = (drawn > 0) & (drawn != candidate_row[:, tf.newaxis])
            for reason in self._reasons[name]:
                is_good &= ~is_member(never[reason], drawn)
            rows.append(drawn)
            is_counted.append(is_good)
            num_left.append(tf.math.count_nonzero(is_good, axis=1, dtype=tf.float32))
        left = tf.stack(num_left, axis=1)
        log_q = hard_log_q(left, self.share, self._samples.num_possible_negatives)
        return HardColumns(
            candidate_row=tf.concat(rows, axis=1),
            log_q=tf.repeat(log_q, self._num, axis=1),
            is_counted=tf.concat(is_counted, axis=1),
            share=tf.where(tf.reduce_any(left > 0, axis=1), self.share, 0.0),
        )


def draw_from_lists(lists: tf.RaggedTensor, num: int, seed: tf.Tensor) -> tf.Tensor:
    """Draws `num` entries of each list, which is in random order; 0s if empty: [n, num] int32.

    Example:
        >>> lists = RowLists.from_lists([np.array([4, 5, 6]), np.array([], int)])
        >>> ragged = tf.RaggedTensor.from_row_splits(lists.values, lists.offsets)
        >>> draw_from_lists(ragged, 4, tf.constant([0, 1])).numpy()
        array([[4, 5, 6, 4],
               [0, 0, 0, 0]], dtype=int32)
    """
    # Takes consecutive entries from a random start, wrapping around. Each column is a uniform draw.
    # Entries repeat only after all have come: their mean varies less than with independent draws.
    lengths = lists.row_lengths()[:, tf.newaxis]
    drawn = tf.random.stateless_uniform([tf.shape(lengths)[0], 1], seed)
    start = tf.cast(drawn * tf.cast(lengths, tf.float32), tf.int64)
    position = (start + tf.range(num, dtype=tf.int64)) % tf.maximum(lengths, 1)
    position += lists.row_starts()[:, tf.newaxis]
    padded = tf.concat([lists.values, [0]], axis=0)
    return tf.where(lengths > 0, tf.gather(padded, position), 0)
