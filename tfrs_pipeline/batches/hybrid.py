"""Hybrid batches: positives, easy and hard negatives, the log_q of every column, the masks.

A batch is a function of (seed, step) alone: the order of the samples is one, and draws are
stateless. The same seed gives the same batches whatever the parallelism, and a run goes on from any
step by starting there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.batches.examples import REQUEST, Batch, Examples, blocks
from tfrs_pipeline.batches.guard import REASONS, Guard, Never
from tfrs_pipeline.batches.hard import HardDraws, HardNegatives
from tfrs_pipeline.batches.look_up import Found, lists_of, look_up, ragged
from tfrs_pipeline.batches.row_lists import contains
from tfrs_pipeline.batches.seeds import Use, seed_of
from tfrs_pipeline.batches.slices import Slices
from tfrs_pipeline.messages import check_integer
from tfrs_pipeline.negatives.in_batch import InBatch, counts_as_in_batch
from tfrs_pipeline.negatives.mixture import Mixture
from tfrs_pipeline.negatives.protocol import Negatives, SamplingFrame
from tfrs_pipeline.samples.positives import positive_probability
from tfrs_pipeline.samples.store import RowLists, Samples

_LATER = "items that came later"


class HybridBatches:
    """Builds the training batches of one mixture of negatives.

    A batch holds P positives of W queries (W = P = B unless a query has several), C negatives that
    its rows share and, with hard negatives, H of each row's own.

    Args:
        samples: The training samples.
        examples: Which positives come together: `SinglePositives`, `WholeSequences` or `UserSets`.
        negatives: Kinds of shared negatives, one or more.
        hard: Hard negatives of each row's own; None draws none.
        seed: Of the draws.
        positive_weight: [num_candidates + 1] factors for the weights of the samples, by candidate,
            scaled to a mean of 1 over the samples.

    Attributes:
        negatives: The kinds of shared negatives.
        frame: What they are drawn from.
        expected_count: [num_candidates + 1] float64, n(c).
        positive_share: [num_candidates + 1] float64, each candidate's share of the positives'
            weight: of the draws, times their weights.

    Raises:
        ValueError: If there is no negative at all, a kind's expected counts are wrong, or the
            examples do not go with in-batch or hard negatives.
        DataError: If `hard` asks for losers of the funnel and no positive has any.

    Example:
        The batches as they are, for a training loop of one's own:

        >>> from tfrs_pipeline.batches.single import SinglePositives
        >>> from tfrs_pipeline.negatives.uniform import Uniform
        >>> samples = Samples.from_pairs([1, 1, 2], [1, 2, 3], num_queries=2, num_candidates=9)
        >>> examples = SinglePositives(samples, batch_size=2, history_length=4, seed=0)
        >>> batches = HybridBatches(samples, examples, [InBatch(), Uniform(5)], seed=0)
        >>> batch = next(iter(batches.dataset()))
        >>> {name: tuple(batch[name].shape) for name in ("candidate_row", "shared_row", "log_q")}
        {'candidate_row': (2,), 'shared_row': (7,), 'log_q': (1, 7)}
    """

    def __init__(
        self,
        samples: Samples,
        examples: Examples,
        negatives: Sequence[Negatives],
        *,
        hard: HardNegatives | None = None,
        seed: int,
        positive_weight: np.ndarray | None = None,
    ) -> None:
        has_in_batch = any(isinstance(kind, InBatch) for kind in negatives)
        if has_in_batch and not examples.is_fair_draw:
            raise ValueError(
                "In-batch negatives need batches that are a fair draw of the positives, and "
                f"{type(examples).__name__} puts all positives of a user together. Use popularity "
                "with alpha 1 in place of in_batch: it draws from the same distribution."
            )
        if hard is not None and not examples.has_one_positive:
            raise ValueError(
                f"{type(examples).__name__} gives a query many positives, and hard negatives are "
                "those of one. Set hard to none, or training.examples to 'single'."
            )
        if samples.request_columns and not examples.has_one_positive:
            raise ValueError(
                f"{type(examples).__name__} gives a query many positives, and request features are "
                "those of one. Leave request_features out, or set training.examples to 'single'."
            )
        self.samples = samples
        self.examples = examples
        self.negatives = tuple(negatives)
        self._num_in_batch = sum(map(counts_as_in_batch, self.negatives))
        self._seed = seed
        q_positive = positive_probability(samples.counts, examples.rate)
        self.frame = SamplingFrame(samples.counts, q_positive, examples.batch_size)
        self._mixture = Mixture(self.negatives, self.frame)
        self.expected_count = self._mixture.expected_count
        self._factor = None
        if positive_weight is not None:
            mean = np.average(positive_weight, weights=samples.counts)
            self._factor = positive_weight / mean
        self.positive_share = self._positive_share()
        self._guard = Guard(samples)
        self._is_later = None if samples.is_later is None else tf.constant(samples.is_later)
        self._hard = None if hard is None else HardDraws(samples, hard, seed=seed)

    def set_hard_pool(self, name: str, pool: RowLists) -> None:
        """Replaces a pool of hard negatives; see `HardDraws.set_pool`."""
        if self._hard is None:
            raise ValueError(
                f"These batches draw no hard negatives: give them `hard`. Received: pool {name!r}"
            )
        self._hard.set_pool(name, pool)

    @property
    def num_unreachable(self) -> int:
        """Candidates that no kind can draw, without those that came later and do not count."""
        is_never = self.expected_count[1:] <= 0
        if self.samples.is_later is not None:
            is_never &= ~self.samples.is_later[1:]
        return int(is_never.sum())

    @property
    def mean_hard_share(self) -> float:
        """Mean of f over the samples as they are drawn: it is 0 where a sample has no pool."""
        if self._hard is None:
            return 0.0
        rate = self.examples.rate
        total = drawn = 0.0
        for place in blocks(len(self.samples)):
            has_any = self._hard.has_any(place)
            rows = self.samples.candidate_rows[place]
            rates = np.ones(len(rows)) if rate is None else rate[rows]
            total += rates.sum()
            drawn += rates[has_any].sum()
        return self._hard.share * drawn / total

    @property
    def steps_per_epoch(self) -> int:
        """Batches per pass over the samples."""
        return self.examples.steps_per_epoch

    def dataset(
        self, start_step: int = 0, num_steps: int | None = None, slices: Slices | None = None
    ) -> tf.data.Dataset:
        """Streams the batches of steps `start_step`, `start_step` + 1, ...

        Args:
            start_step: First step; continuing from it gives what an unbroken run would have seen.
            num_steps: How many batches; endless if None.
            slices: These of each batch, one after the other, instead of the whole.

        Returns:
            Dataset of the dicts that `batch` describes.
        """
        chosen = self.examples.dataset(start_step, num_steps)
        if slices is not None:
            chosen = slices.each(chosen)
        build = functools.partial(self._build, slices=slices)
        batches = chosen.map(build, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        return batches.prefetch(tf.data.AUTOTUNE)

    def batch(self, step: int) -> Batch:
        """Builds the batch of one step, 0 or more, outside a graph.

        Returns:
            What `Examples.read` describes, but for index, and:
            weight: [P] float32.
            request <name>: [W] or [W, any], each request feature of the samples, encoded.
            shared_row: [C] int32, candidates of the shared columns, kind by kind.
            log_q: [1, C] float32, log n(c) of the column's candidate (see `mixture`); with hard
                negatives [W, C], log( n(c) / (1 - f) ), f being the row's own.
            is_counted: [W, C] bool. False: accidental hit (a row's own in-batch column is one),
                known positive, exposed item, item that came after the training.
            hard_candidate_row, hard_log_q, hard_is_counted, hard_share: See `HardDraws.draw`.
            dropout_seed: [2] int32, for the model's dropout.

        Raises:
            ValueError: If `step` is no whole number or below 0.
        """
        check_integer(0, step=step)
        return self._build(tf.constant(step, tf.int64), self.examples.choose(step))

    def _build(
        self,
        step: tf.Tensor,
        chosen: object,
        number: tf.Tensor | None = None,
        *,
        slices: Slices | None = None,
    ) -> Batch:
        hard = self._hard
        pools = {} if hard is None else hard.pools
        batch = look_up(functools.partial(self._read, pools), chosen, self._signature)
        del batch["index"]
        positives = batch["candidate_row"]
        of_samples = {name: batch.pop(f"pool {name}") for name in pools}
        never: Never = {reason: batch.pop(reason) for reason in REASONS}
        slot = batch.pop("slot")
        batch["shared_row"] = self._mixture.draw(positives, seed_of(self._seed, Use.SHARED, step))
        batch["dropout_seed"] = seed_of(self._seed, Use.DROPOUT, step)
        if hard is not None:
            batch |= hard.draw(step, of_samples, positives, _of_rows(never, slot))
        if slices is not None:
            # Cut before the masks are made, which are much of the work.
            batch, never, slot = _cut(batch, never, slot, slices, number)
        batch["is_counted"] = self._is_counted(batch, never, slot)
        batch["log_q"] = self._log_q(batch)
        return batch

    def _read(self, pools: Mapping[str, RowLists], chosen: Any) -> Found:
        """Gathers all that a batch needs of the samples' arrays, in NumPy."""
        found = self.examples.read(chosen)
        index = found["index"]
        found["weight"] = self._weights(index)
        # Each query is looked up once: one of very many events may hold much of a batch.
        keys, found["slot"] = np.unique(found["query_row"], return_inverse=True)
        found |= {f"pool {name}": pool.take(index) for name, pool in pools.items()}
        columns = self.samples.request_columns.items()
        found |= {f"{REQUEST}{name}": column[index] for name, column in columns}
        return found | self._guard.read(keys)

    @functools.cached_property
    def _signature(self) -> dict[str, tf.TypeSpec]:
        """Types of what `_read` returns."""
        signature: dict[str, tf.TypeSpec] = dict(self.examples.signature)
        num_positives = signature["index"].shape[0]
        signature["weight"] = tf.TensorSpec([num_positives], tf.float32)
        for name, column in self.samples.request_columns.items():
            shape = [num_positives, *column.shape[1:]]
            signature[f"{REQUEST}{name}"] = tf.TensorSpec(shape, column.dtype)
        signature["slot"] = tf.TensorSpec(signature["query_row"].shape, tf.int64)
        if self._hard is not None:
            pools = (f"pool {name}" for name in self._hard.pools)
            signature |= dict.fromkeys(pools, lists_of(num_positives))
        return signature | dict.fromkeys(REASONS, lists_of(None))

    def _log_q(self, batch: Batch) -> tf.Tensor:
        """Computes log_q of the shared columns."""
        log_q = self._mixture.log_q(batch["shared_row"])[tf.newaxis, :]
        if "hard_share" in batch:
            log_q -= tf.math.log1p(-batch["hard_share"])[:, tf.newaxis]
        return log_q

    def _is_counted(self, batch: Batch, never: Never, slot: tf.Tensor) -> tf.Tensor:
        columns = batch["shared_row"]
        is_counted = tf.gather(~Guard.of_shared(never, columns), slot)
        if self._is_later is not None:
            is_counted &= ~tf.gather(self._is_later, columns)
        if not self.examples.has_one_positive:  # Its positives are among its known ones.
            return is_counted
        return is_counted & (columns[tf.newaxis, :] != batch["candidate_row"][:, tf.newaxis])

    def _weights(self, index: np.ndarray | slice) -> np.ndarray:
        """Gathers the weights of samples: [n] float32."""
        weights = self.samples.weights[index]
        if self._factor is None:
            return weights
        return (weights * self._factor[self.samples.candidate_rows[index]]).astype(np.float32)

    def _positive_share(self) -> np.ndarray:
        share = np.zeros(len(self.samples.counts))
        for place in blocks(len(self.samples)):
            rows = self.samples.candidate_rows[place]
            share += np.bincount(rows, self._weights(place), len(share))
        if self.examples.rate is not None:
            share *= self.examples.rate
        return share / share.sum()

    def masked_shares(self, num_steps: int = 5) -> dict[str, float]:
        """Counts why shared columns do not count, over the first batches.

        Returns:
            By reason, the share of the columns: accidental hits (the same candidate again, a row's
            own in-batch column not counted), known positives, exposed items, items that came later.
        """
        masked = dict.fromkeys(("accidental hits", *REASONS), 0)
        if self._is_later is not None:
            masked[_LATER] = 0
        num_cells = 0
        for step in range(num_steps):
            batch = self.batch(step)
            columns, query_row = batch["shared_row"], batch["query_row"]
            if "positive_query" in batch:  # Counted once a positive, as without it.
                query_row = tf.gather(query_row, batch["positive_query"])
            is_hit = columns[tf.newaxis, :] == batch["candidate_row"][:, tf.newaxis]
            is_left = tf.ones_like(is_hit)
            never = self._guard.read(query_row.numpy())
            found = {"accidental hits": is_hit}
            found |= {reason: contains([ragged(never[reason])], columns) for reason in REASONS}
            if self._is_later is not None:
                found[_LATER] = tf.gather(self._is_later, columns)[tf.newaxis, :]
            for name, is_masked in found.items():
                masked[name] += int(tf.math.count_nonzero(is_masked & is_left))
                is_left &= ~is_masked
            num_own = len(batch["candidate_row"]) * self._num_in_batch
            masked["accidental hits"] -= num_own
            num_cells += int(tf.size(is_hit)) - num_own
        return {name: count / num_cells for name, count in masked.items()}


def _of_rows(never: Never, slot: tf.Tensor) -> Never:
    """Gathers lists of distinct queries for the rows of a batch."""
    return {reason: tf.gather(lists, slot) for reason, lists in never.items()}


def _cut(
    batch: Batch, never: Never, slot: tf.Tensor, slices: Slices, number: tf.Tensor
) -> tuple[Batch, Never, tf.Tensor]:
    """Cuts a slice off a batch, and what is never a negative of its queries with it."""
    batch = slices.take(number, {**batch, "slot": slot}, {"slot"})
    kept, slot = tf.unique(batch.pop("slot"))
    return batch, _of_rows(never, kept), slot
