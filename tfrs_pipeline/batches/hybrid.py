"""Hybrid batches: positives, easy and hard negatives, the log_q of every column, the masks.

A batch is a function of (seed, step), with any parallelism, and a run can start at any step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.batches.batch import Batch, Examples, Slices, Use, seed_of
from tfrs_pipeline.batches.hard import HardDraws
from tfrs_pipeline.batches.masks import contains
from tfrs_pipeline.messages import check_integer
from tfrs_pipeline.negatives.log_q import Mixture
from tfrs_pipeline.negatives.samplers import HardNegatives, InBatch, Negatives, SamplingFrame
from tfrs_pipeline.samples import never_negatives
from tfrs_pipeline.samples.store import Samples, positive_probability


class HybridBatches:
    """Builds the training batches of one mixture of negatives.

    Args:
        samples: The training samples.
        examples: Which positives are batched: `SinglePositives`, `WholeSequences` or `UserSets`.
        negatives: Kinds of negatives that the rows of a batch share, one or more.
        hard: The kind of each row's own hard negatives; None draws none.
        seed: Seed of the draws.
        positive_weight: [num_candidates + 1] factors for the weights of the samples, by candidate,
            scaled to a mean of 1 over the samples.

    Attributes:
        steps_per_epoch: Batches per pass over the samples.
        frame: The distributions from which negatives are drawn.
        expected_count: [num_candidates + 1] float64, n(c).
        hard: What hard negatives are drawn from; None without them.
        never: Reason for a mask -> per query row, the candidates that it masks.

    Raises a `ValueError` if the examples conflict with in-batch or hard negatives, or as `Mixture`
    does, and a `DataError` if no positive has a hard negative of the kind.

    Example:
        >>> from tfrs_pipeline.batches.examples import SinglePositives
        >>> from tfrs_pipeline.negatives.samplers import Uniform
        >>> samples = Samples.from_pairs([1, 1, 2], [1, 2, 3], num_queries=2, num_candidates=9)
        >>> examples = SinglePositives(samples, batch_size=2, history_length=4, seed=0)
        >>> batches = HybridBatches(samples, examples, [InBatch(), Uniform(5)], seed=0)
        >>> batch = next(iter(batches.dataset()))
        >>> len(batch.candidate_row), len(batch.shared_row)
        (2, 7)
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
        name = type(examples).__name__
        if not examples.is_fair_draw and any(isinstance(kind, InBatch) for kind in negatives):
            raise ValueError(
                "In-batch negatives need batches that are a fair draw of the positives, and "
                f"{name} puts all positives of a user together. Use popularity with alpha 1 in "
                "place of in_batch: it draws from the same distribution."
            )
        if not examples.has_one_positive and (hard is not None or samples.request_columns):
            raise ValueError(
                f"{name} gives a query many positives, and hard negatives and request features "
                "belong to one. Leave them out, or set training.examples to 'single'."
            )
        self.samples = samples
        self.examples = examples
        self.steps_per_epoch = examples.steps_per_epoch
        self._seed = seed
        q_positive = positive_probability(samples.counts, examples.rate)
        # n(c) follows from how positives are drawn, not from their weights.
        self.frame = SamplingFrame(samples.counts, q_positive, examples.batch_size)
        self._mixture = Mixture(negatives, self.frame)
        self.expected_count = self._mixture.expected_count
        self._factor = None
        if positive_weight is not None:
            self._factor = positive_weight / np.average(positive_weight, weights=samples.counts)
        self.never = never_negatives.by_query(samples)
        self._is_later = None if samples.is_later is None else tf.constant(samples.is_later)
        self.hard = None if hard is None else HardDraws(samples, hard, seed=seed)

    @property
    def mean_hard_share(self) -> float:
        """Mean of f over the drawn samples; a sample with empty pools has 0."""
        if self.hard is None:
            return 0.0
        has_any = np.any([pool.has_any() for pool in self.hard.pools.values()], axis=0)
        # A candidate's rate is divided evenly among its samples.
        sample_rate = self.frame.q_positive / np.maximum(self.samples.counts, 1)
        share = sample_rate[self.samples.candidate_rows[has_any]].sum()
        return float(self.hard.share * share)

    def dataset(
        self, start_step: int = 0, num_steps: int | None = None, slices: Slices | None = None
    ) -> tf.data.Dataset:
        """Returns a dataset of the batches of `num_steps` steps, or endless, from `start_step` on.

        Batches are the same as in an uninterrupted run. With `slices`, they replace their batch.
        """
        chosen = self.examples.dataset(start_step, num_steps)
        if slices is not None:
            chosen = slices.each(chosen)
        build = functools.partial(self._build, slices=slices)
        # Deterministic: a batch is a function of its step, so parallel work may not reorder them.
        batches = chosen.map(build, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        options = tf.data.Options()
        # The thread that tunes a pipeline wakes up after .01, .02, .04, ..., 60 seconds. TensorFlow
        # means to wake it when an iterator is deleted, but often fails to, and then waits for it: a
        # training of 11 seconds ended 10 seconds late. Without it, as many batches are built at the
        # same time as there are cores, up to 16.
        options.autotune.enabled = False
        return batches.prefetch(tf.data.AUTOTUNE).with_options(options)

    def batch(self, step: int) -> Batch:
        """Builds the batch of one step, an integer from 0, outside a graph."""
        check_integer(0, step=step)
        return self._build(tf.constant(step, tf.int64), self.examples.choose(step))

    @tf.autograph.experimental.do_not_convert
    def _build(
        self,
        step: tf.Tensor,
        chosen: object,
        number: tf.Tensor | None = None,
        *,
        slices: Slices | None = None,
    ) -> Batch:
        batch = in_graph(self._read, chosen, self._types)
        # Each use has a seed of its own, so that one more draw does not change the others.
        shared = self._mixture.draw(batch.candidate_row, seed_of(self._seed, Use.SHARED, step))
        dropout_seed = seed_of(self._seed, Use.DROPOUT, step)
        batch = batch._replace(shared_row=shared, dropout_seed=dropout_seed)
        if self.hard is not None:
            batch = batch._replace(hard=self.hard.draw(step, batch.index))
        if slices is not None:
            # Cut before the masks are made, which are much of the work.
            batch = slices.take(number, batch)
        share = None if batch.hard is None else batch.hard.share[:, tf.newaxis]
        columns = batch.shared_row
        # In NumPy, because TensorFlow's search and scatter take four times as long.
        is_counted = tf.numpy_function(
            self._may_be_negative, [batch.query_row, columns], tf.bool, stateful=False
        )
        is_counted = tf.ensure_shape(is_counted, [batch.query_row.shape[0], columns.shape[0]])
        if self._is_later is not None:
            is_counted &= ~tf.gather(self._is_later, columns)
        if self.examples.has_one_positive:  # Others' positives are among their known ones.
            is_counted &= columns[tf.newaxis, :] != batch.candidate_row[:, tf.newaxis]
        log_q = self._mixture.log_q(columns[tf.newaxis, :], share)
        return batch._replace(log_q=log_q, is_counted=is_counted)

    def _read(self, chosen: Any) -> Batch:
        batch = self.examples.read(chosen)
        index = batch.index
        columns = self.samples.request_columns
        requests: Any = {name: column[index] for name, column in columns.items()} or None
        return batch._replace(weight=self._weights(index), requests=requests)

    @functools.cached_property
    def _types(self) -> Batch:
        batch = self.examples.signature
        num = batch.index.shape[0]
        requests: Any = {
            name: tf.TensorSpec([num, *column.shape[1:]], column.dtype)
            for name, column in self.samples.request_columns.items()
        } or None
        return batch._replace(weight=tf.TensorSpec([num], tf.float32), requests=requests)

    def _may_be_negative(self, query_rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Marks which columns, [C], are in no list of a query, [W]: [W, C] bool."""
        # Each query is looked up once: one with very many events may fill much of a batch.
        distinct, slot = np.unique(query_rows, return_inverse=True)
        lists = [lists.take(distinct) for lists in self.never.values()]
        return (~contains(columns, lists))[slot]

    def _weights(self, index: np.ndarray | slice) -> np.ndarray:
        weights = self.samples.weights[index]
        if self._factor is None:
            return weights
        return (weights * self._factor[self.samples.candidate_rows[index]]).astype(np.float32)


def in_graph(read: Callable[[Any], Batch], chosen: Any, types: Batch) -> Batch:
    """Calls `read`, a function of NumPy, in a graph: takes the chosen tensors and returns tensors.

    In NumPy, because that does not copy mapped files. `types` are those of the result.
    """
    # A graph passes flat lists of arrays alone, so both structures are taken apart and put together
    # again, each in its own order.

    def call(*arrays: np.ndarray) -> list[np.ndarray]:
        parts = tf.nest.flatten(read(tf.nest.pack_sequence_as(chosen, arrays)))
        return [array for array in parts if array is not None]

    specs = tf.nest.flatten(types)
    dtypes = [spec.dtype for spec in specs if spec is not None]
    tensors = iter(tf.numpy_function(call, tf.nest.flatten(chosen), dtypes))
    # `numpy_function` loses the shapes, which the loss checks.
    shaped = [
        None if spec is None else tf.ensure_shape(next(tensors), spec.shape) for spec in specs
    ]
    return tf.nest.pack_sequence_as(types, shaped)
