"""Samples turned into `tf.data` batches: positives, easy negatives, their log_q, the mask.

A training batch is a function of (seed, step) alone: the order of the samples is a permutation
evaluated in the graph, and draws are stateless. The same seed gives the same batches whatever the
parallelism, and a run goes on from any step by starting there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfrs_pipeline.events.schema import Stage
from tfrs_pipeline.samples.builder import RowLists, Samples
from tfrs_pipeline.samples.easy_negatives import AliasSampler
from tfrs_pipeline.samples.mixture import expected_count, log_expected_count
from tfrs_pipeline.samples.popularity import sampling_probability
from tfrs_pipeline.samples.positives import positive_probability

Batch = dict[str, tf.Tensor]

# Samplers of easy negatives: (alpha, num). Of a row's own hard ones: (stage, share, num).
EasySampling = tuple[float, int]
HardSampling = tuple[str, float, int]

# Streams of randomness: the order is keyed by the epoch, the draws by the step; easy sampler i
# uses _EASY_STREAM + i.
_ORDER_STREAM = 0
_DROPOUT_STREAM = 1
_HARD_STREAM = 2
_EASY_STREAM = 3
INT32_MAX = np.iinfo(np.int32).max


class TrainingBatches:
    """Builds the training batches of one mixture of negatives.

    A batch holds B positives and M easy negatives shared by its rows; column j < B of the scores
    is row j's positive, column B + j the easy negative j. Each row may have H hard negatives of its
    own besides.

    Args:
        samples: The training samples.
        batch_size: B. Epochs are strung together, so that every batch is full.
        easy_negatives: Pairs (alpha, num): draw `num` candidates per batch with p(c) ~
            counts(c)^alpha, with replacement. alpha = 0 is uniform.
        history_length: N, most recent history rows per query.
        seed: Of the order and of the draws.
        in_batch: Whether the other rows' positives are negatives.
        mask_known_positives: Whether a query's other training positives are left out.
        mask_exposed: Whether a query's exposed and never clicked items are left out.
        hard_share: f in [0, 1), share of the target's negative weight that the row's own hard
            negatives hold; a row without any has 0.
        hard_negatives: Per stage, its part of the hard share (relative to the other stages in which
            the row has any) and how many columns to draw from its pool.
        positive_rate: [num_candidates + 1] rates at which positives are drawn, by candidate; then
            an epoch is `len(samples)` draws with replacement. None is every sample once an epoch.
        positive_weight: [num_candidates + 1] factors for the weights of the samples, by candidate,
            scaled to a mean of 1 over the samples.

    Raises:
        ValueError: If there are fewer samples than `batch_size`, no negative at all, or hard
            negatives are asked for that the samples do not have.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        easy_negatives: Sequence[EasySampling],
        history_length: int,
        seed: int,
        in_batch: bool = True,
        mask_known_positives: bool = True,
        mask_exposed: bool = True,
        hard_share: float = 0.0,
        hard_negatives: Sequence[HardSampling] = (),
        positive_rate: np.ndarray | None = None,
        positive_weight: np.ndarray | None = None,
    ) -> None:
        if len(samples) < batch_size:
            raise ValueError(
                f"A batch needs {batch_size} positives and the training part has {len(samples)}: "
                "there is no partial batch. Lower training.batch_size."
            )
        if len(samples) > INT32_MAX:
            raise ValueError(
                f"{len(samples)} samples are more than the {INT32_MAX} that one order holds."
            )
        self.num_samples = len(samples)
        self.batch_size = batch_size
        self.history_length = history_length
        self._seed = seed
        self._in_batch = in_batch
        easy = [(sampling_probability(samples.counts, alpha), num) for alpha, num in easy_negatives]
        self.q_positive = positive_probability(samples.counts, positive_rate)
        self.expected_count = expected_count(self.q_positive, batch_size, easy, in_batch=in_batch)
        self._log_expected_count = tf.constant(log_expected_count(self.expected_count))
        self._samplers = [(AliasSampler(probability), num) for probability, num in easy]
        self._query_rows = tf.constant(samples.query_rows)
        self._candidate_rows = tf.constant(samples.candidate_rows)
        weights = samples.weights
        if positive_weight is not None:
            factor = positive_weight[samples.candidate_rows]
            weights = (weights * factor / factor.mean()).astype(np.float32)
        self._weights = tf.constant(weights)
        # Each candidate's share of the positives' weight: of the draws, times their weights.
        per_candidate = np.bincount(
            samples.candidate_rows, weights, minlength=len(samples.counts)
        ) * (1.0 if positive_rate is None else positive_rate)
        self.positive_share = per_candidate / per_candidate.sum()
        self.counts = samples.counts
        self._positive_sampler = None
        if positive_rate is not None:
            rate = positive_rate[samples.candidate_rows]
            self._positive_sampler = AliasSampler(rate / rate.sum())
        self._histories = _ragged(samples.histories)
        self._known_positives = _ragged(samples.known_positives) if mask_known_positives else None
        self._exposed = _ragged(samples.exposed) if mask_exposed else None
        self._num_candidates = len(samples.counts) - 1
        self._hard_share = hard_share
        self._hard = _checked_hard(samples, hard_share, hard_negatives)
        self._hard_pools = [_ragged(samples.hard_pools[stage]) for stage, _, _ in self._hard]
        has_hard = np.zeros(len(samples), bool)
        draws = None if positive_rate is None else positive_rate[samples.candidate_rows]
        for stage, _, _ in self._hard:
            has_hard |= np.diff(samples.hard_pools[stage].offsets) > 0
        self.mean_hard_share = hard_share * float(np.average(has_hard, weights=draws))

    @property
    def steps_per_epoch(self) -> int:
        """Batches per pass over the samples, rounded: epochs do not end with a batch."""
        return max(1, round(self.num_samples / self.batch_size))

    def dataset(self, start_step: int = 0, num_steps: int | None = None) -> tf.data.Dataset:
        """Streams the batches of steps `start_step`, `start_step` + 1, ...

        Args:
            start_step: First step; continuing from it gives what an unbroken run would have seen.
            num_steps: How many batches; endless if None.

        Returns:
            Dataset of the dicts that `batch` describes.
        """
        stop = np.iinfo(np.int64).max if num_steps is None else start_step + num_steps
        steps = tf.data.Dataset.range(start_step, stop)
        batches = steps.map(self.batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        return batches.prefetch(tf.data.AUTOTUNE)

    def batch(self, step: tf.Tensor) -> Batch:
        """Builds the batch of one step.

        Args:
            step: Scalar int64, 0 or more.

        Returns:
            query_row: [B] int32.
            history_rows: [B, N] int32, most recent first, padded with 0.
            candidate_row: [B] int32, the positives.
            weight: [B] float32.
            easy_candidate_row: [M] int32.
            log_q: [1, B + M] float32, log n(c) of the column's candidate (see `mixture`); with hard
                negatives [B, B + M], log( n(c) / (1 - f) ), f being the row's own.
            dropout_seed: [2] int32, for the model's dropout.
            is_counted: [B, B + M] bool. False: accidental hit, known positive, exposed item.
                The row's own positive, on the diagonal, is always True.
            hard_candidate_row: [B, H] int32, with hard negatives, as the rest: 0 where the row has
                none of the stage.
            hard_log_q: [B, H] float32, log( H_k / (V * f * w_k) ).
            hard_is_counted: [B, H] bool. False: nothing drawn, known positive, exposed item.
            hard_share: [B] float32, the row's f.
        """
        index = self._sample_index(step)
        query_row = tf.gather(self._query_rows, index)
        candidate_row = tf.gather(self._candidate_rows, index)
        easy = [
            sampler.sample(num, self._stream(step, _EASY_STREAM + i))
            for i, (sampler, num) in enumerate(self._samplers)
        ]
        easy_row = tf.concat(easy, axis=0) if easy else tf.zeros([0], tf.int32)
        columns = tf.concat([candidate_row, easy_row], axis=0)
        log_q = tf.gather(self._log_expected_count, columns)[tf.newaxis, :]
        hard: Batch = {}
        if self._hard:
            hard = self._hard_negatives(step, index, query_row, candidate_row)
            log_q -= tf.math.log1p(-hard["hard_share"])[:, tf.newaxis]
        return hard | {
            "query_row": query_row,
            "history_rows": _leading(tf.gather(self._histories, index), self.history_length),
            "candidate_row": candidate_row,
            "weight": tf.gather(self._weights, index),
            "easy_candidate_row": easy_row,
            "log_q": log_q,
            "dropout_seed": self._stream(step, _DROPOUT_STREAM),
            "is_counted": self._is_counted(query_row, candidate_row, columns),
        }

    def masked_shares(self, num_steps: int = 5) -> dict[str, float]:
        """Counts why shared columns do not count, over the first batches.

        Args:
            num_steps: Batches to look at.

        Returns:
            By reason, the share of the columns that are not the row's own positive: accidental
            hits (the same candidate again), then known positives, then exposed items.
        """
        masked = {"accidental hits": 0, "known positives": 0, "exposed items": 0}
        num_cells = 0
        for step in range(num_steps):
            batch = self.batch(tf.constant(step, tf.int64))
            columns = tf.concat([batch["candidate_row"], batch["easy_candidate_row"]], axis=0)
            own = tf.eye(self.batch_size, tf.shape(columns)[0], dtype=tf.bool)
            is_left = ~own
            num_cells += int(tf.math.count_nonzero(is_left))
            is_hit = columns[tf.newaxis, :] == batch["candidate_row"][:, tf.newaxis]
            reasons = {"accidental hits": is_hit}
            for name, lists in (
                ("known positives", self._known_positives),
                ("exposed items", self._exposed),
            ):
                if lists is not None:
                    reasons[name] = _contains([tf.gather(lists, batch["query_row"])], columns)
            for name, is_masked in reasons.items():
                masked[name] += int(tf.math.count_nonzero(is_masked & is_left))
                is_left &= ~is_masked
        return {name: count / num_cells for name, count in masked.items()}

    def _sample_index(self, step: tf.Tensor) -> tf.Tensor:
        """Returns the [B] samples of a step: a permutation an epoch, or draws by rate."""
        if self._positive_sampler is not None:
            return self._positive_sampler.sample(self.batch_size, self._stream(step, _ORDER_STREAM))
        place = step * self.batch_size + tf.range(self.batch_size, dtype=tf.int64)
        index = tf.cast(place % self.num_samples, tf.int32)
        first_epoch = step * self.batch_size // self.num_samples
        # A batch is no larger than an epoch, so it reaches into the next one at most.
        is_next = place // self.num_samples > first_epoch
        return tf.where(
            is_next,
            self._shuffled(index, first_epoch + 1),
            self._shuffled(index, first_epoch),
        )

    def _shuffled(self, index: tf.Tensor, epoch: tf.Tensor) -> tf.Tensor:
        seed = self._stream(epoch, _ORDER_STREAM)
        return tf.random.experimental.index_shuffle(index, seed, self.num_samples - 1)

    def _stream(self, key: tf.Tensor, stream: int) -> tf.Tensor:
        seed = tf.random.experimental.stateless_fold_in([self._seed, stream], key)
        return tf.cast(seed, tf.int32)

    def _is_counted(
        self, query_row: tf.Tensor, candidate_row: tf.Tensor, columns: tf.Tensor
    ) -> tf.Tensor:
        is_counted = columns[tf.newaxis, :] != candidate_row[:, tf.newaxis]
        kinds = [lists for lists in (self._known_positives, self._exposed) if lists is not None]
        if kinds:
            is_counted &= ~_contains([tf.gather(lists, query_row) for lists in kinds], columns)
        own = tf.eye(self.batch_size, tf.shape(columns)[0], dtype=tf.bool)
        if not self._in_batch:
            is_counted &= tf.range(tf.shape(columns)[0])[tf.newaxis, :] >= self.batch_size
        return is_counted | own

    def _hard_negatives(
        self, step: tf.Tensor, index: tf.Tensor, query_row: tf.Tensor, candidate_row: tf.Tensor
    ) -> Batch:
        """Draws each row's own hard negatives, stage by stage, with their log_q."""
        rows, is_counted, num_left = [], [], []
        for i, (stage, _, num) in enumerate(self._hard):
            seed = tf.random.experimental.stateless_fold_in(self._stream(step, _HARD_STREAM), i)
            drawn = _draw_from_lists(tf.gather(self._hard_pools[i], index), num, seed)
            # The pools were cleared of these when they were built; a mask does not trust that.
            is_good = (drawn > 0) & (drawn != candidate_row[:, tf.newaxis])
            if self._known_positives is not None:
                is_good &= ~_is_member(tf.gather(self._known_positives, query_row), drawn)
            if self._exposed is not None and stage != Stage.EXPOSED:
                is_good &= ~_is_member(tf.gather(self._exposed, query_row), drawn)
            rows.append(drawn)
            is_counted.append(is_good)
            num_left.append(tf.reduce_sum(tf.cast(is_good, tf.float32), axis=1))
        shares = tf.constant([share for _, share, _ in self._hard], tf.float32)
        left = tf.stack(num_left, axis=1)
        available = tf.where(left > 0, shares, tf.zeros_like(left))
        stage_share = tf.math.divide_no_nan(
            available, tf.reduce_sum(available, axis=1, keepdims=True)
        )
        # -inf * 0 and log 0 stand only in columns that are masked.
        log_q = tf.math.log(left) - tf.math.log(
            self._num_candidates * self._hard_share * stage_share
        )
        log_q = tf.where(left > 0, log_q, tf.zeros_like(log_q))
        has_hard = tf.reduce_any(left > 0, axis=1)
        stage_of_column = np.repeat(np.arange(len(self._hard)), [num for _, _, num in self._hard])
        return {
            "hard_candidate_row": tf.concat(rows, axis=1),
            "hard_log_q": tf.gather(log_q, stage_of_column, axis=1),
            "hard_is_counted": tf.concat(is_counted, axis=1),
            "hard_share": tf.where(has_hard, tf.constant(self._hard_share, tf.float32), 0.0),
        }


def _checked_hard(
    samples: Samples, hard_share: float, hard_negatives: Sequence[HardSampling]
) -> list[HardSampling]:
    if not 0 <= hard_share < 1:
        raise ValueError(f"hard_share must be in [0, 1). Received: {hard_share}")
    if hard_share == 0:
        return []
    used = [sampling for sampling in hard_negatives if sampling[1] > 0 and sampling[2] > 0]
    missing = [stage for stage, _, _ in used if stage not in samples.hard_pools]
    if missing or not used:
        raise ValueError(
            f"hard_share = {hard_share} needs hard negatives of some stage. Asked for: "
            f"{[stage for stage, _, _ in used] or 'none'}; the samples hold: "
            f"{sorted(samples.hard_pools) or 'none'}. Build them with HardNegativeRules."
        )
    return used


def evaluation_batches(
    query_rows: np.ndarray,
    histories: RowLists,
    relevant: RowLists,
    excluded: RowLists,
    *,
    history_length: int,
    batch_size: int = 512,
) -> tf.data.Dataset:
    """Builds the batches that `TwoTowerModel.evaluate` takes.

    Args:
        query_rows: [num_queries] int32.
        histories: Per query, most recent first.
        relevant: Per query, the candidate rows to be found.
        excluded: Per query, the candidate rows left out of the ranking.
        history_length: N.
        batch_size: Queries per batch; the last one may be smaller.

    Returns:
        Dataset of dicts: query_row [b], history_rows [b, N], relevant_rows [b, R] and
        excluded_rows [b, E] int32, padded with 0.
    """
    queries = tf.data.Dataset.from_tensor_slices(
        {
            "query_row": query_rows.astype(np.int32),
            "history_rows": _ragged(histories),
            "relevant_rows": _ragged(relevant),
            "excluded_rows": _ragged(excluded),
        }
    )

    def pad(batch: dict[str, tf.Tensor | tf.RaggedTensor]) -> Batch:
        return {
            "query_row": batch["query_row"],
            "history_rows": _leading(batch["history_rows"], history_length),
            "relevant_rows": batch["relevant_rows"].to_tensor(),
            "excluded_rows": batch["excluded_rows"].to_tensor(),
        }

    return queries.ragged_batch(batch_size).map(pad).prefetch(tf.data.AUTOTUNE)


def _ragged(lists: RowLists) -> tf.RaggedTensor:
    return tf.RaggedTensor.from_row_splits(lists.values, lists.offsets, validate=False)


def _leading(lists: tf.RaggedTensor, length: int) -> tf.Tensor:
    """Returns the first `length` entries of each list, padded with 0: [num_lists, length]."""
    return lists[:, :length].to_tensor(shape=[None, length])


def _draw_from_lists(lists: tf.RaggedTensor, num: int, seed: tf.Tensor) -> tf.Tensor:
    """Draws `num` entries of each list, of random order; 0s from an empty one: [n, num] int32.

    They are consecutive from a random start, around the end: each column is a uniform draw, and
    entries repeat only once all have come, which keeps the mean over them steadier than independent
    draws would.
    """
    lengths = lists.row_lengths()[:, tf.newaxis]
    drawn = tf.random.stateless_uniform([tf.shape(lengths)[0], 1], seed)
    start = tf.cast(drawn * tf.cast(lengths, tf.float32), tf.int64)
    place = (start + tf.range(num, dtype=tf.int64)) % tf.maximum(lengths, 1)
    place += lists.row_starts()[:, tf.newaxis]
    padded = tf.concat([lists.values, [0]], axis=0)
    return tf.where(lengths > 0, tf.gather(padded, place), 0)


def _is_member(lists: tf.RaggedTensor, rows: tf.Tensor) -> tf.Tensor:
    """Tells which entries of line i of `rows`, [n, m] int32, are in list i, sorted: [n, m] bool."""
    # (list, value) pairs as one ascending sequence.
    pairs = lists.value_rowids() * 2**32 + tf.cast(lists.values, tf.int64)
    line = tf.range(tf.shape(rows, tf.int64)[0])[:, tf.newaxis]
    keys = tf.reshape(line * 2**32 + tf.cast(rows, tf.int64), [-1])
    place = tf.searchsorted(pairs, keys)
    padded = tf.concat([pairs, [-1]], axis=0)
    return tf.reshape(tf.gather(padded, place) == keys, tf.shape(rows))


def _contains(kinds: Sequence[tf.RaggedTensor], columns: tf.Tensor) -> tf.Tensor:
    """Tells which columns' candidates are in any of each row's lists.

    Args:
        kinds: One or more [num_rows, None] int32, candidate rows from 1.
        columns: [num_columns] int32, repeats allowed.

    Returns:
        [num_rows, num_columns] bool.
    """
    distinct, _ = tf.unique(tf.sort(columns))
    padded = tf.concat([distinct, [0]], axis=0)
    cells = []
    for lists in kinds:
        place = tf.searchsorted(distinct, lists.values)
        found = tf.where(tf.gather(padded, place) == lists.values)[:, 0]
        row = tf.searchsorted(lists.row_splits, found, side="right", out_type=tf.int32) - 1
        cells.append(tf.stack([tf.gather(place, found), row], axis=1))
    cell = tf.concat(cells, axis=0)
    table = tf.tensor_scatter_nd_update(
        tf.zeros([tf.shape(distinct)[0], kinds[0].nrows(tf.int32)], tf.bool),
        cell,
        tf.ones(tf.shape(cell)[:1], tf.bool),
    )
    # A candidate a line, so that repeats copy whole lines: several times faster than cell by cell.
    return tf.transpose(tf.gather(table, tf.searchsorted(distinct, columns)))
