"""Samples turned into `tf.data` batches: positives, easy negatives, their log_q, the mask.

A training batch is a function of (seed, step) alone: the order of the samples is a permutation
evaluated in the graph, and draws are stateless. The same seed gives the same batches whatever the
parallelism, and a run goes on from any step by starting there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import tensorflow as tf

from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.negatives.alias import AliasSampler
from tfrs_pipeline.negatives.mixture import expected_count, log_expected_count
from tfrs_pipeline.samples.build import RowLists, Samples
from tfrs_pipeline.samples.popularity import sampling_probability
from tfrs_pipeline.samples.positives import positive_probability

Batch = dict[str, tf.Tensor]

# Samplers of easy negatives: (alpha, num). Of a row's own hard ones: (stage, share, num).
EasySampling = tuple[float, int]
HardSampling = tuple[str, float, int]
Frequency = Literal["counted", "streaming"]

# Streams of randomness: the order is keyed by the epoch, the draws by the step; easy sampler i
# uses _EASY_STREAM + i.
_ORDER_STREAM = 0
_DROPOUT_STREAM = 1
_HARD_STREAM = 2
_EASY_STREAM = 3
INT32_MAX = np.iinfo(np.int32).max


class TrainingBatches:
    """Builds the training batches of one mixture of negatives.

    A batch holds B positives and M easy negatives shared by its rows; shared column j < B of the
    scores is row j's positive, column B + j the easy negative j. Without in-batch negatives the
    positives are no shared columns: each row has its own, and column j is the easy negative j. With
    `bank_batches` = K the positives of the K batches before follow as K * B more columns, whose
    embeddings the model has kept (Wang et al. 2021, "Cross-Batch Negative Sampling for Training
    Two-Tower Recommenders"): which candidates they are is a function of (seed, step) too. Each row
    may have H hard negatives of its own besides.

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
        bank_batches: K, earlier batches whose positives are negatives too; 0 is none.
        frequency: Where the share of a candidate among the positives comes from: "counted" from the
            samples, or "streaming" from the model's own estimate. Then batches hold the other parts
            of n(c) instead of log_q, and the samples' counts are not used.

    Attributes:
        q_positive: [num_candidates + 1] float64, the distribution that positives are drawn from,
            counted from the samples.
        expected_count: [num_candidates + 1] float64, n(c) once the bank is full, by `q_positive`.
        positive_share: [num_candidates + 1] float64, each candidate's share of the positives'
            weight: of the draws, times their weights.
        counts: [num_candidates + 1] training positives, those of the samples; with frequency
            "streaming" counted from them.

    Raises:
        ValueError: If there are fewer samples than `batch_size`, no negative at all, hard negatives
            are asked for that the samples do not have, a bank without in-batch negatives, or draws
            that need counts with a "streaming" frequency.
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
        bank_batches: int = 0,
        frequency: Frequency = "counted",
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
        _check_bank(bank_batches, in_batch)
        counts = samples.counts
        if frequency == "streaming":
            _check_streaming(easy_negatives, positive_rate)
            counts = np.bincount(samples.candidate_rows, minlength=len(samples.counts))
        self.samples = samples
        self.num_samples = len(samples)
        self.batch_size = batch_size
        self.bank_size = bank_batches * batch_size
        self._bank_batches = bank_batches
        self._frequency = frequency
        self.history_length = history_length
        self._seed = seed
        self._in_batch = in_batch
        easy = [(sampling_probability(counts, alpha), num) for alpha, num in easy_negatives]
        self.q_positive = positive_probability(counts, positive_rate)
        self.expected_count = expected_count(
            self.q_positive, batch_size, easy, in_batch=in_batch, bank_size=self.bank_size
        )
        self._log_expected_count = tf.constant(log_expected_count(self.expected_count))
        # n(c) in parts, for where draws change with the step, or q_positive with the model.
        self._easy_count = tf.constant(
            sum((num * probability for probability, num in easy), np.zeros(len(counts)))
        )
        self._q_positive = tf.constant(self.q_positive)
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
        self.counts = counts
        self._positive_sampler = None
        if positive_rate is not None:
            rate = positive_rate[samples.candidate_rows]
            self._positive_sampler = AliasSampler(rate / rate.sum())
        self._sequences = _ragged(samples.sequences)
        self._num_earlier = (
            None if samples.num_earlier is None else tf.constant(samples.num_earlier, tf.int64)
        )
        self._known_positives = _ragged(samples.known_positives) if mask_known_positives else None
        self._exposed = _ragged(samples.exposed) if mask_exposed else None
        self._left_out = [
            lists for lists in (self._known_positives, self._exposed) if lists is not None
        ]
        self._num_candidates = len(samples.counts) - 1
        self._hard_share = hard_share
        self._hard = _checked_hard(samples, hard_share, hard_negatives)
        self._hard_pools: dict[str, tf.RaggedTensor] = {}
        self._has_hard: dict[str, np.ndarray] = {}
        self._draw_rate = None if positive_rate is None else positive_rate[samples.candidate_rows]
        for stage, _, _ in self._hard:
            self.set_hard_pool(stage, samples.hard_pools[stage])

    def set_hard_pool(self, stage: str, pool: RowLists) -> None:
        """Replaces the pools of a stage, in datasets that are made from now on.

        Args:
            stage: One of those that the batches draw from.
            pool: Per sample, the candidate rows of its hard negatives, in random order.

        Raises:
            ValueError: If the batches do not draw from this stage, or the lists are not one a
                sample.
        """
        if stage not in [known for known, _, _ in self._hard]:
            raise ValueError(
                f"No hard negatives of stage {stage!r} are drawn. "
                f"Drawn: {[known for known, _, _ in self._hard] or 'none'}"
            )
        if len(pool) != self.num_samples:
            raise ValueError(
                f"A pool must hold one list for each of {self.num_samples} samples. "
                f"Received: {len(pool)}"
            )
        self._hard_pools[stage] = _ragged(pool)
        self._has_hard[stage] = np.diff(pool.offsets) > 0

    @property
    def mean_hard_share(self) -> float:
        """Mean of f over the samples as they are drawn: it is 0 where a sample has no pool."""
        if not self._has_hard:
            return 0.0
        has_hard = np.any(list(self._has_hard.values()), axis=0)
        return self._hard_share * float(np.average(has_hard, weights=self._draw_rate))

    @property
    def positives_per_epoch(self) -> float:
        """Positives that an epoch trains, on average."""
        return self.num_samples

    @property
    def steps_per_epoch(self) -> int:
        """Batches per pass over the samples, rounded: epochs do not end with a batch."""
        return max(1, round(self.positives_per_epoch / self.batch_size))

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
            bank_candidate_row: [K * B] int32, with a bank: the positives of step - 1, then those of
                step - 2, ...; 0 for steps before 0. C = B + M + K * B in all that follows, or M
                without in-batch negatives.
            log_q: [1, C] float32, log n(c) of the column's candidate (see `mixture`), the bank's
                term as far as it is filled; 0 where it is not. With hard negatives [B, C],
                log( n(c) / (1 - f) ), f being the row's own. Not with frequency "streaming".
            positive_log_q: [B] float32, without in-batch negatives: what log_q would be in a shared
                column of the row's positive.
            positive_draws: Scalar float32, with frequency "streaming": B - 1 in-batch negatives and
                the filled entries of the bank, so that n(c) = positive_draws * q_hat(c) +
                other_expected_count.
            other_expected_count: [1, C] float32, with frequency "streaming": the easy samplers'
                expected copies of the column's candidate.
            dropout_seed: [2] int32, for the model's dropout.
            is_counted: [B, C] bool. False: accidental hit, known positive, exposed item, entry of
                the bank that is not filled. The row's own positive, on the diagonal of the in-batch
                columns, is always True.
            hard_candidate_row: [B, H] int32, with hard negatives, as the rest: 0 where the row has
                none of the stage.
            hard_log_q: [B, H] float32, log( H_k / (V * f * w_k) ).
            hard_is_counted: [B, H] bool. False: nothing drawn, known positive, exposed item.
            hard_share: [B] float32, the row's f.
        """
        index = self._sample_index(step)
        query_row = tf.gather(self._query_rows, index)
        candidate_row = tf.gather(self._candidate_rows, index)
        return {
            **self._compared(step, index, query_row, candidate_row),
            "history_rows": self._histories(index, query_row, candidate_row),
        }

    def _compared(
        self, step: tf.Tensor, index: tf.Tensor, query_row: tf.Tensor, candidate_row: tf.Tensor
    ) -> Batch:
        """Builds all of a batch but the histories, from the samples at `index`, [B].

        `query_row` are the queries of the rows of `is_counted`, which `_is_counted` makes.
        """
        easy = [
            sampler.sample(num, self._stream(step, _EASY_STREAM + i))
            for i, (sampler, num) in enumerate(self._samplers)
        ]
        batch: Batch = {
            "query_row": query_row,
            "candidate_row": candidate_row,
            "weight": tf.gather(self._weights, index),
            "easy_candidate_row": tf.concat(easy, axis=0) if easy else tf.zeros([0], tf.int32),
            "dropout_seed": self._stream(step, _DROPOUT_STREAM),
        }
        if not self._in_batch:
            # No term of n(c) but the easy samplers', which do not change with the step.
            batch["positive_log_q"] = tf.gather(self._log_expected_count, candidate_row)
        if self._bank_batches:
            batch["bank_candidate_row"] = self._bank_rows(step)
        if self._hard:
            batch |= self._hard_negatives(step, index, query_row, candidate_row)
            if not self._in_batch:
                batch["positive_log_q"] -= tf.math.log1p(-batch["hard_share"])
        columns = shared_columns(batch)
        batch["is_counted"] = self._is_counted(query_row, candidate_row, columns)
        if self._frequency == "streaming":
            batch["positive_draws"] = tf.cast(self._positive_draws(step), tf.float32)
            easy_count = tf.cast(tf.gather(self._easy_count, columns), tf.float32)
            batch["other_expected_count"] = easy_count[tf.newaxis, :]
            return batch
        batch["log_q"] = self._log_q(step, columns)[tf.newaxis, :]
        if self._hard:
            batch["log_q"] -= tf.math.log1p(-batch["hard_share"])[:, tf.newaxis]
        return batch

    def masked_shares(self, num_steps: int = 5) -> dict[str, float]:
        """Counts why shared columns do not count, over the first batches that have a full bank.

        Args:
            num_steps: Batches to look at.

        Returns:
            By reason, the share of the columns that are not the row's own positive: accidental
            hits (the same candidate again), then known positives, then exposed items.
        """
        masked = {"accidental hits": 0, "known positives": 0, "exposed items": 0}
        num_cells = 0
        for step in range(self._bank_batches, self._bank_batches + num_steps):
            batch = self.batch(tf.constant(step, tf.int64))
            columns, query_row = shared_columns(batch), batch["query_row"]
            if "positive_query" in batch:  # Counted once a positive, as without it.
                query_row = tf.gather(query_row, batch["positive_query"])
            is_left = ~self._is_own(query_row, columns)
            num_cells += int(tf.math.count_nonzero(is_left))
            is_hit = columns[tf.newaxis, :] == batch["candidate_row"][:, tf.newaxis]
            reasons = {"accidental hits": is_hit}
            for name, lists in (
                ("known positives", self._known_positives),
                ("exposed items", self._exposed),
            ):
                if lists is not None:
                    reasons[name] = self._holds([lists], query_row, columns)
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

    def _histories(
        self, index: tf.Tensor, query_row: tf.Tensor, candidate_row: tf.Tensor
    ) -> tf.Tensor:
        """Returns the latest of each sample's history: [B, N] int32, most recent first."""
        sequences, length = self._sequences, self.history_length
        start = tf.gather(sequences.row_starts(), query_row)[:, tf.newaxis]
        if self._num_earlier is not None:
            num_known = tf.gather(self._num_earlier, index)[:, tf.newaxis]
            steps_ago = tf.range(1, length + 1, dtype=tf.int64)
            place = start + num_known - steps_ago
            is_known = steps_ago <= num_known
            return tf.where(is_known, tf.gather(sequences.values, tf.maximum(place, start)), 0)
        # Without an order: the rest of the sequence, copies of the positive left out.
        lists = tf.gather(sequences, query_row)
        is_other = lists.with_values(lists.values != tf.repeat(candidate_row, lists.row_lengths()))
        others = tf.reverse(tf.ragged.boolean_mask(lists, is_other), axis=[1])
        return leading(others, length)

    def _bank_rows(self, step: tf.Tensor) -> tf.Tensor:
        """Returns the positives of the K steps before, the latest step first: [K * B] int32."""
        batches = []
        for age in range(1, self._bank_batches + 1):
            index = self._sample_index(tf.maximum(step - age, 0))
            batches.append(tf.where(step >= age, tf.gather(self._candidate_rows, index), 0))
        return tf.concat(batches, axis=0)

    def _positive_draws(self, step: tf.Tensor) -> tf.Tensor:
        """Counts the shared columns that are positives of other rows: scalar float64."""
        filled = self.batch_size * tf.minimum(step, self._bank_batches)
        return tf.cast(filled + (self.batch_size - 1 if self._in_batch else 0), tf.float64)

    def _log_q(self, step: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
        """Computes log n(c) of each column's candidate, 0 in unfilled ones: [C] float32."""
        if not self._bank_batches:
            return tf.gather(self._log_expected_count, columns)
        # In float64, as the table of logs was made, which is for a full bank alone.
        count = tf.gather(self._easy_count, columns)
        count += self._positive_draws(step) * tf.gather(self._q_positive, columns)
        return tf.cast(tf.math.log(tf.where(columns > 0, count, 1.0)), tf.float32)

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
        if self._left_out:
            is_counted &= ~self._holds(self._left_out, query_row, columns)
        if self._bank_batches:
            is_counted &= columns > 0
        return is_counted | self._is_own(query_row, columns) if self._in_batch else is_counted

    def _holds(
        self, kinds: Sequence[tf.RaggedTensor], query_row: tf.Tensor, columns: tf.Tensor
    ) -> tf.Tensor:
        """Tells which columns are in a list of the row's query, of any kind: [B, C] bool."""
        return contains([tf.gather(lists, query_row) for lists in kinds], columns)

    def _is_own(self, query_row: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
        """Tells which shared columns are the row's own positive: [B, C] bool."""
        shape = [tf.shape(query_row)[0], tf.shape(columns)[0]]
        return tf.eye(*shape, dtype=tf.bool) if self._in_batch else tf.zeros(shape, tf.bool)

    def _hard_negatives(
        self, step: tf.Tensor, index: tf.Tensor, query_row: tf.Tensor, candidate_row: tf.Tensor
    ) -> Batch:
        """Draws each row's own hard negatives, stage by stage, with their log_q."""
        rows, is_counted, num_left = [], [], []
        for i, (stage, _, num) in enumerate(self._hard):
            seed = tf.random.experimental.stateless_fold_in(self._stream(step, _HARD_STREAM), i)
            drawn = _draw_from_lists(tf.gather(self._hard_pools[stage], index), num, seed)
            # Graphs lose the static shape on the way; the loss wants its rank.
            drawn = tf.ensure_shape(drawn, [index.shape[0], num])
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


def shared_columns(batch: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """Lists the candidates of a batch's shared columns, in the order of the scores.

    Args:
        batch: As `TrainingBatches.batch` describes.

    Returns:
        [C] int32: B positives if they are in-batch negatives, M easy negatives, then the bank's
        entries, if there are any.
    """
    names = ["easy_candidate_row", "bank_candidate_row"]
    if has_in_batch(batch):
        names.insert(0, "candidate_row")
    return tf.concat([batch[name] for name in names if name in batch], axis=0)


def has_in_batch(batch: Mapping[str, tf.Tensor]) -> bool:
    """Tells whether a batch's positives are shared columns, negatives of the other rows."""
    return "positive_log_q" not in batch


def _check_bank(bank_batches: int, in_batch: bool) -> None:
    if bank_batches < 0:
        raise ValueError(f"bank_batches must be 0 or more. Received: {bank_batches}")
    if bank_batches and not in_batch:
        raise ValueError(
            f"bank_batches = {bank_batches} with in_batch = False: a bank adds older positives of "
            "the same distribution as the batch's own, which cost nothing and are up to date. Use "
            "in_batch = True, or bank_batches = 0."
        )


def _check_streaming(
    easy_negatives: Sequence[EasySampling], positive_rate: np.ndarray | None
) -> None:
    counting = [alpha for alpha, _ in easy_negatives if alpha > 0]
    if counting:
        raise ValueError(
            f"Easy negatives with alpha = {counting} are drawn by counts, which a streaming "
            "frequency does without. Use alpha = 0 (uniform) and in_batch, whose negatives are as "
            "popular as the positives."
        )
    if positive_rate is not None:
        raise ValueError(
            "positive_rate resamples positives by their counts, which a streaming frequency does "
            "without. Leave it out, or use frequency = 'counted'."
        )


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
            "history_rows": leading(batch["history_rows"], history_length),
            "relevant_rows": batch["relevant_rows"].to_tensor(),
            "excluded_rows": batch["excluded_rows"].to_tensor(),
        }

    return queries.ragged_batch(batch_size).map(pad).prefetch(tf.data.AUTOTUNE)


def _ragged(lists: RowLists) -> tf.RaggedTensor:
    return tf.RaggedTensor.from_row_splits(lists.values, lists.offsets, validate=False)


def leading(lists: tf.RaggedTensor, length: int) -> tf.Tensor:
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
    return tf.ensure_shape(tf.reshape(tf.gather(padded, place) == keys, tf.shape(rows)), rows.shape)


def contains(kinds: Sequence[tf.RaggedTensor], columns: tf.Tensor) -> tf.Tensor:
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
