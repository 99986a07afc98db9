"""Each row's own hard negatives: drawn from its pools, with their masks and their log_q."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import tensorflow as tf

from tfrs_pipeline.batches.examples import Batch
from tfrs_pipeline.batches.guard import Guard, Never
from tfrs_pipeline.batches.row_lists import draw_from_lists
from tfrs_pipeline.batches.seeds import Use, seed_of
from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.negatives.funnel import FunnelLosers
from tfrs_pipeline.negatives.mined import Mined
from tfrs_pipeline.samples.store import RowLists, Samples

HardNegatives: TypeAlias = FunnelLosers | Mined
"""A kind of hard negative: its `share` f, `num` columns for each row and pool, and the `pools` of
the samples to draw from, weighed alike."""


class HardDraws:
    """Draws each row's hard negatives from the pools of its sample.

    A pool that the samples lack is empty until `set_pool`. A `DataError` if losers of the funnel
    are asked for and no sample has one.
    """

    def __init__(self, samples: Samples, hard: HardNegatives, *, seed: int) -> None:
        self.share = hard.share
        self._hard = hard
        self._seed = seed
        self._num_samples = len(samples)
        self._num_possible = samples.num_possible_negatives
        nothing = RowLists.empty(len(samples))
        self.pools = {name: samples.hard_pools.get(name, nothing) for name in hard.pools}
        has_losers = any(len(pool.values) for pool in self.pools.values())
        if isinstance(hard, FunnelLosers) and not has_losers:
            ranked = "; ranked ones need a rank and, without min_rank, a request_id"
            needs = ranked if "ranked" in hard.stages else ""
            raise DataError(
                f"model.hard asks for losers of the stages {', '.join(hard.stages)}, and none of "
                f"{self._num_samples:,} positives has one. The log must hold items of these "
                f"stages, of the same users within window_hours{needs}; or set model.hard to "
                "mined, or to none."
            )

    def set_pool(self, name: str, pool: RowLists) -> None:
        """Replaces a pool that is drawn from, in datasets that are made from now on.

        It holds, per sample, the candidate rows of its hard negatives, in random order. A
        `ValueError` if it is not drawn from, or has no list for each sample.
        """
        if name not in self._hard.pools:
            raise ValueError(
                f"No hard negatives are drawn from a pool {name!r}. Drawn from: "
                f"{', '.join(self._hard.pools)}"
            )
        if len(pool) != self._num_samples:
            raise ValueError(
                f"A pool must hold one list for each of {self._num_samples} samples. "
                f"Received: {len(pool)}"
            )
        # A new dict: a data set goes on with the pools that it was made with.
        self.pools = {**self.pools, name: pool}

    def has_any(self, place: slice) -> np.ndarray:
        """Tells which samples have a hard negative in any pool: [n] bool."""
        ends = slice(place.start + 1, place.stop + 1)
        has_some = [pool.offsets[ends] > pool.offsets[place] for pool in self.pools.values()]
        return np.any(has_some, axis=0)

    def draw(
        self,
        step: tf.Tensor,
        pools: Mapping[str, tf.RaggedTensor],
        candidate_row: tf.Tensor,
        never: Never,
    ) -> Batch:
        """Draws for the [B] samples of a batch from their pools, [B, None] int32 each.

        Returns:
            hard_candidate_row: [B, H] int32, 0 where the row has none in the pool.
            hard_log_q: [B, H] float32, log( H_k / (V * f * w_k) ) (see `mixture`).
            hard_is_counted: [B, H] bool. False: nothing drawn, known positive, exposed item.
            hard_share: [B] float32, the row's f: 0 where it has no hard negative left.
        """
        rows, is_counted, num_left = [], [], []
        for i, (name, pool) in enumerate(pools.items()):
            seed = seed_of(self._seed, Use.HARD, step)
            seed = tf.random.experimental.stateless_fold_in(seed, i)
            drawn = draw_from_lists(pool, self._hard.num, seed)
            # Graphs lose the static shape on the way; the loss wants its rank.
            drawn = tf.ensure_shape(drawn, [candidate_row.shape[0], self._hard.num])
            is_good = (drawn > 0) & (drawn != candidate_row[:, tf.newaxis])
            is_good &= ~Guard.of_own(never, drawn, name)
            rows.append(drawn)
            is_counted.append(is_good)
            num_left.append(tf.math.count_nonzero(is_good, axis=1, dtype=tf.float32))
        left = tf.stack(num_left, axis=1)
        return {
            "hard_candidate_row": tf.concat(rows, axis=1),
            "hard_log_q": tf.repeat(self._log_q(left), self._hard.num, axis=1),
            "hard_is_counted": tf.concat(is_counted, axis=1),
            "hard_share": tf.where(tf.reduce_any(left > 0, axis=1), self.share, 0.0),
        }

    def _log_q(self, num_left: tf.Tensor) -> tf.Tensor:
        """Computes log( H_k / (V * f * w_k) ) of each pool from [B, num_pools] H_k."""
        is_left = tf.cast(num_left > 0, tf.float32)
        pool_share = tf.math.divide_no_nan(is_left, tf.reduce_sum(is_left, axis=1, keepdims=True))
        # -inf * 0 and log 0 stand only in columns that are masked.
        log_q = tf.math.log(num_left) - tf.math.log(self._num_possible * self.share * pool_share)
        return tf.where(num_left > 0, log_q, tf.zeros_like(log_q))
