"""Training batches from a stream of positives that never ends, without a pass to count them.

`HybridBatches` knows every sample beforehand: it shuffles them, counts them, and holds each query's
known positives. Here positives come one by one, in the order of time, each with what it brings. The
share of a candidate among them is left to the model's `StreamingFrequency`, which is part of its
checkpoints. To go on after a stop at step s, restore the model and pass `start_step=s` with the
examples from number s * batch_size on. Count by steps that were trained: more than that has been
read ahead.

In-batch negatives are assumed to be fair draws of the positives. Where a query's positives come in
bursts, several of them meet in a batch: those of a known query do not count against each other, but
what one query likes is too frequent among the negatives of that batch. `examples.shuffle` over some
batches' worth spreads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfrs_pipeline.batches.examples import Batch
from tfrs_pipeline.batches.row_lists import contains
from tfrs_pipeline.batches.seeds import Use, seed_of
from tfrs_pipeline.negatives.mixture import Mixture
from tfrs_pipeline.negatives.protocol import Negatives, SamplingFrame

# Rank and dtype of what an example holds.
_REQUIRED = {
    "query_row": (0, tf.int32),
    "candidate_row": (0, tf.int32),
    "history_rows": (1, tf.int32),
}
_OPTIONAL = {"weight": (0, tf.float32), "excluded_rows": (1, tf.int32)}


def stream_batches(
    examples: tf.data.Dataset,
    negatives: Sequence[Negatives],
    *,
    num_candidates: int,
    batch_size: int,
    history_length: int,
    seed: int,
    start_step: int = 0,
) -> tf.data.Dataset:
    """Turns single positives into training batches for a model that estimates their frequency.

    A batch holds `batch_size` positives, in their order, and is a function of its examples, the
    seed and its step. Examples that do not fill a batch wait for more, and are dropped if the
    stream ends.

    Args:
        examples: Dataset of dicts: query_row, int32, 0 is unknown; candidate_row, int32 in
            1 .. num_candidates; history_rows, [any] int32, most recent first, 0 is padding;
            optionally weight, float32, 1 if missing; optionally excluded_rows, [any] int32, never
            negatives of this query: its known positives, what was exposed and not clicked. Other
            keys are ignored.
        negatives: Kinds of shared negatives that need no counts, such as `InBatch` and `Uniform`.
        num_candidates: Corpus size, row 0 not counted.
        batch_size: B.
        history_length: N, most recent history rows per query.
        seed: Of the draws.
        start_step: Number of the first batch; `examples` must then begin with example number
            start_step * batch_size.

    Returns:
        Dataset of the dicts that `HybridBatches.batch` describes, with the parts of n(c). Columns
        that do not count are, besides accidental hits: another positive of the same known query in
        the batch, an item of the history (as given, not only the N latest), an excluded item.

    Raises:
        ValueError: If there is no negative at all, a kind needs counts or its expected ones are
            wrong, or an example lacks a key or has another shape or dtype.
        tf.errors.InvalidArgumentError: From the dataset, if a candidate or history row is outside
            the corpus.

    Example:
        >>> from tfrs_pipeline.negatives.in_batch import InBatch
        >>> from tfrs_pipeline.negatives.uniform import Uniform
        >>> examples = tf.data.Dataset.from_tensors(
        ...     {"query_row": 1, "candidate_row": 2, "history_rows": [5, 3]}
        ... ).repeat()
        >>> batches = stream_batches(
        ...     examples,
        ...     [InBatch(), Uniform(3)],
        ...     num_candidates=9,
        ...     batch_size=2,
        ...     history_length=4,
        ...     seed=0,
        ... )
        >>> batch = next(iter(batches))
        >>> batch["history_rows"].numpy()
        array([[5, 3, 0, 0],
               [5, 3, 0, 0]], dtype=int32)
        >>> float(batch["in_batch_draws"]), batch["other_expected_count"].shape
        (1.0, TensorShape([1, 5]))
    """
    _check_examples(examples.element_spec)
    no_counts = np.zeros(num_candidates + 1)
    mixture = Mixture(negatives, SamplingFrame(no_counts, no_counts, batch_size))
    other_count = tf.constant(mixture.other_expected_count, tf.float32)

    def batch(step: tf.Tensor, rows: Mapping[str, tf.Tensor | tf.RaggedTensor]) -> Batch:
        history = _as_lists(rows["history_rows"])
        latest = history[:, :history_length]
        in_corpus = [
            _assert_in_corpus("candidate_row", rows["candidate_row"], 1, num_candidates),
            _assert_in_corpus("history_rows", history.values, 0, num_candidates),
        ]
        with tf.control_dependencies(in_corpus):
            positives = tf.identity(rows["candidate_row"])
        columns = mixture.draw(positives, seed_of(seed, Use.SHARED, step))
        masked = [_positives_in_batch(rows["query_row"], positives), history]
        if "excluded_rows" in rows:
            masked.append(_as_lists(rows["excluded_rows"]))
        return {
            "query_row": rows["query_row"],
            "history_rows": latest.to_tensor(shape=[None, history_length]),
            "candidate_row": positives,
            "weight": rows.get("weight", tf.ones([batch_size], tf.float32)),
            "shared_row": columns,
            "in_batch_draws": tf.constant(mixture.in_batch_draws, tf.float32),
            "other_expected_count": tf.gather(other_count, columns)[tf.newaxis, :],
            "is_counted": ~contains(masked, columns),
            "dropout_seed": seed_of(seed, Use.DROPOUT, step),
        }

    # Batched before anything is done: a map over single examples would take most of the time.
    batches = (
        examples.ragged_batch(batch_size, drop_remainder=True)
        .enumerate(start_step)
        .map(batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    )
    return batches.prefetch(tf.data.AUTOTUNE)


def _positives_in_batch(query_row: tf.Tensor, candidate_row: tf.Tensor) -> tf.RaggedTensor:
    """Lists each row's positive and, if its query is known, those of its query's other rows."""
    # Each unknown query is one of its own.
    key = tf.where(query_row > 0, query_row, -1 - tf.range(len(query_row)))
    order = tf.argsort(key)
    ascending = tf.gather(key, order)
    first = tf.searchsorted(ascending, key)
    end = tf.searchsorted(ascending, key, side="right")
    place = tf.ragged.range(first, end)
    return place.with_values(tf.gather(candidate_row, tf.gather(order, place.values)))


def _as_lists(rows: tf.Tensor | tf.RaggedTensor) -> tf.RaggedTensor:
    """Returns [B, None]; examples whose lists all have one known length were batched dense."""
    return rows if isinstance(rows, tf.RaggedTensor) else tf.RaggedTensor.from_tensor(rows)


def _assert_in_corpus(name: str, rows: tf.Tensor, first: int, num_candidates: int) -> tf.Operation:
    message = (
        f"{name} must lie in {first} .. {num_candidates}, the corpus that stream_batches was "
        "made for. Drop positives of unknown items, and give 0 for unknown history items."
    )
    is_inside = (rows >= first) & (rows <= num_candidates)
    outside = tf.boolean_mask(rows, ~is_inside)
    return tf.debugging.Assert(tf.reduce_all(is_inside), [message, "Received:", outside])


def _check_examples(element_spec: Mapping[str, tf.TypeSpec]) -> None:
    if not isinstance(element_spec, Mapping):
        raise ValueError(f"An example must be a dict of tensors. Received: {element_spec}")
    if missing := sorted(_REQUIRED.keys() - element_spec.keys()):
        raise ValueError(f"An example must hold {missing}. Received: {sorted(element_spec)}")
    for name, (rank, dtype) in (_REQUIRED | _OPTIONAL).items():
        if name not in element_spec:
            continue
        spec = element_spec[name]
        if spec.shape.rank not in (None, rank) or spec.dtype != dtype:
            raise ValueError(
                f"'{name}' of a single example must be {dtype.name} of rank {rank}. "
                f"Received: {spec.dtype.name} of shape {spec.shape}"
            )
