"""Training batches from a stream of positives that never ends, without a pass to count them.

`TrainingBatches` knows every sample beforehand: it shuffles them, counts them, and holds each
query's known positives. Here positives come one by one, in the order of time, each with what it
brings. The share of a candidate among them is left to the model's `StreamingFrequency`:

    examples = tf.data.Dataset.from_generator(
        read_positives,  # yields {"query_row": 12, "candidate_row": 7, "history_rows": [4, 9]}
        output_signature={
            "query_row": tf.TensorSpec([], tf.int32),
            "candidate_row": tf.TensorSpec([], tf.int32),
            "history_rows": tf.TensorSpec([None], tf.int32),
        },
    )
    batches = stream_batches(
        examples,
        num_candidates=num_candidates,
        batch_size=1024,
        num_uniform=512,
        history_length=50,
        seed=7,
    )
    model = TwoTowerModel(..., num_candidates=num_candidates, correction="streaming")
    model.compile(optimizer=...)
    model.fit(batches, steps_per_epoch=1000, epochs=...)

The estimate is a part of the model and of its checkpoints. To go on after a stop at step s, restore
the model and pass `start_step=s` with the examples from number s * batch_size on. Count by steps
that were trained: more than that has been read ahead.

In-batch negatives are taken for fair draws of the positives. Where a query's positives come in
bursts, several of them meet in a batch: those of a known query do not count against each other, but
what one query likes is too frequent among the negatives of that batch. `examples.shuffle` over some
batches' worth spreads them.
"""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

from tfrs_pipeline.negatives.batches import INT32_MAX, Batch, contains, leading

# Streams of randomness, both keyed by the step.
_DROPOUT_STREAM = 0
_UNIFORM_STREAM = 1

# Rank and dtype of what an example holds.
_REQUIRED = {
    "query_row": (0, tf.int32),
    "candidate_row": (0, tf.int32),
    "history_rows": (1, tf.int32),
}
_OPTIONAL = {"weight": (0, tf.float32), "excluded_rows": (1, tf.int32)}


def stream_batches(
    examples: tf.data.Dataset,
    *,
    num_candidates: int,
    batch_size: int,
    num_uniform: int,
    history_length: int,
    seed: int,
    in_batch: bool = True,
    start_step: int = 0,
) -> tf.data.Dataset:
    """Turns single positives into training batches for a model that estimates their frequency.

    A batch holds B = `batch_size` positives, in their order, and M = `num_uniform` easy negatives
    shared by its rows; column j < B of the scores is row j's positive, column B + j the easy
    negative j. It is a function of its examples, the seed and its step. Examples that do not fill a
    batch wait for more, and are dropped if the stream ends.

    The model takes n(c), the expected copies of a column's candidate (see `mixture`), as

        n(c) = positive_draws * q_hat(c) + other_expected_count(c)

    with q_hat from `StreamingFrequency`, which it updates with `candidate_row`.

    Args:
        examples: Dataset of dicts: query_row, int32, 0 is unknown; candidate_row, int32 in
            1 .. num_candidates; history_rows, [any] int32, most recent first, 0 is padding;
            optionally weight, float32, 1 if missing; optionally excluded_rows, [any] int32, never
            negatives of this query: its known positives, what was exposed and not clicked. Other
            keys are left out.
        num_candidates: Corpus size, row 0 not counted.
        batch_size: B.
        num_uniform: M, drawn uniformly from the corpus, with replacement.
        history_length: N, most recent history rows per query.
        seed: Of the draws.
        in_batch: Whether the other rows' positives are negatives.
        start_step: Number of the first batch; `examples` must then begin with example number
            start_step * batch_size.

    Returns:
        Dataset of dicts:
            query_row: [B] int32.
            history_rows: [B, N] int32, most recent first, padded with 0.
            candidate_row: [B] int32, the positives.
            weight: [B] float32.
            easy_candidate_row: [M] int32.
            positive_draws: Scalar float32: B - 1, or 0 without in-batch negatives.
            other_expected_count: [1, B + M] float32: M / num_candidates.
            dropout_seed: [2] int32, for the model's dropout.
            is_counted: [B, B + M] bool. False: accidental hit, another positive of the same known
                query in the batch, item of the history (as given, not only the N latest), excluded
                item. The row's own positive, on the diagonal, is always True.

    Raises:
        ValueError: If an argument is out of range, there is no negative at all, or an example lacks
            a key or has another shape or dtype.
        tf.errors.InvalidArgumentError: From the dataset, if a candidate or history row is outside
            the corpus.

    Example:
        >>> examples = tf.data.Dataset.from_tensors(
        ...     {"query_row": 1, "candidate_row": 2, "history_rows": [5, 3]}
        ... ).repeat()
        >>> batches = stream_batches(
        ...     examples, num_candidates=9, batch_size=2, num_uniform=3, history_length=4, seed=0
        ... )
        >>> batch = next(iter(batches))
        >>> batch["history_rows"].numpy()
        array([[5, 3, 0, 0],
               [5, 3, 0, 0]], dtype=int32)
        >>> float(batch["positive_draws"]), batch["other_expected_count"].shape
        (1.0, TensorShape([1, 5]))
    """
    _check_sizes(num_candidates, batch_size, num_uniform, history_length, start_step, in_batch)
    _check_examples(examples.element_spec)

    def batch(step: tf.Tensor, rows: Mapping[str, tf.Tensor | tf.RaggedTensor]) -> Batch:
        history = _as_lists(rows["history_rows"])
        in_corpus = [
            _assert_in_corpus("candidate_row", rows["candidate_row"], 1, num_candidates),
            _assert_in_corpus("history_rows", history.values, 0, num_candidates),
        ]
        with tf.control_dependencies(in_corpus):
            positive = tf.identity(rows["candidate_row"])
        easy = _uniform_rows(num_uniform, num_candidates, _stream(seed, _UNIFORM_STREAM, step))
        excluded = [history]
        if "excluded_rows" in rows:
            excluded.append(_as_lists(rows["excluded_rows"]))
        num_columns = batch_size + num_uniform
        return {
            "query_row": rows["query_row"],
            "history_rows": leading(history, history_length),
            "candidate_row": positive,
            "weight": rows.get("weight", tf.ones([batch_size], tf.float32)),
            "easy_candidate_row": easy,
            "positive_draws": tf.constant(batch_size - 1 if in_batch else 0, tf.float32),
            "other_expected_count": tf.fill([1, num_columns], num_uniform / num_candidates),
            "dropout_seed": _stream(seed, _DROPOUT_STREAM, step),
            "is_counted": _is_counted(rows["query_row"], positive, easy, excluded, in_batch),
        }

    # Batched before anything is done: a map over single examples would take most of the time.
    batches = (
        examples.ragged_batch(batch_size, drop_remainder=True)
        .enumerate(start_step)
        .map(batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    )
    return batches.prefetch(tf.data.AUTOTUNE)


def _is_counted(
    query_row: tf.Tensor,
    candidate_row: tf.Tensor,
    easy_row: tf.Tensor,
    excluded: list[tf.RaggedTensor],
    in_batch: bool,
) -> tf.Tensor:
    """Tells which shared columns count for which row: [B, B + M] bool."""
    batch_size, num_columns = len(candidate_row), len(candidate_row) + len(easy_row)
    own = tf.eye(batch_size, num_columns, dtype=tf.bool)
    columns = tf.concat([candidate_row, easy_row], axis=0)
    is_counted = ~contains([_positives_in_batch(query_row, candidate_row), *excluded], columns)
    if not in_batch:
        is_counted &= tf.range(num_columns)[tf.newaxis, :] >= batch_size
    return is_counted | own


def _positives_in_batch(query_row: tf.Tensor, candidate_row: tf.Tensor) -> tf.RaggedTensor:
    """Lists each row's positive and, if its query is known, those of its query's other rows.

    Returns:
        [B, None] int32.
    """
    # Each unknown query is one of its own.
    key = tf.where(query_row > 0, query_row, -1 - tf.range(len(query_row)))
    order = tf.argsort(key)
    ascending = tf.gather(key, order)
    first = tf.searchsorted(ascending, key)
    end = tf.searchsorted(ascending, key, side="right")
    place = tf.ragged.range(first, end)
    return place.with_values(tf.gather(candidate_row, tf.gather(order, place.values)))


def _uniform_rows(num: int, num_candidates: int, seed: tf.Tensor) -> tf.Tensor:
    # int64: the remainder of a 32-bit draw would favour low rows by up to num_candidates / 2^32.
    drawn = tf.random.stateless_uniform(
        [num], seed, minval=1, maxval=num_candidates + 1, dtype=tf.int64
    )
    return tf.cast(drawn, tf.int32)


def _stream(seed: int, stream: int, step: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.random.experimental.stateless_fold_in([seed, stream], step), tf.int32)


def _as_lists(rows: tf.Tensor | tf.RaggedTensor) -> tf.RaggedTensor:
    """Returns [B, None]; examples whose lists all have one known length were batched dense."""
    return rows if isinstance(rows, tf.RaggedTensor) else tf.RaggedTensor.from_tensor(rows)


def _assert_in_corpus(name: str, rows: tf.Tensor, first: int, num_candidates: int) -> tf.Operation:
    message = (
        f"{name} must lie in {first} .. {num_candidates}, the corpus that stream_batches was "
        "made for. Leave out positives of unknown items, and give 0 for unknown history items."
    )
    is_inside = (rows >= first) & (rows <= num_candidates)
    outside = tf.boolean_mask(rows, ~is_inside)
    return tf.debugging.Assert(tf.reduce_all(is_inside), [message, "Received:", outside])


def _check_sizes(
    num_candidates: int,
    batch_size: int,
    num_uniform: int,
    history_length: int,
    start_step: int,
    in_batch: bool,
) -> None:
    for name, value, least in (
        ("num_candidates", num_candidates, 1),
        ("batch_size", batch_size, 1),
        ("num_uniform", num_uniform, 0),
        ("history_length", history_length, 1),
        ("start_step", start_step, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be {least} or more. Received: {value}")
    if num_candidates > INT32_MAX:
        raise ValueError(f"num_candidates must fit int32. Received: {num_candidates}")
    if num_uniform == 0 and not (in_batch and batch_size > 1):
        raise ValueError(
            "No shared column can be a negative: use in_batch with a batch_size of 2 or more, or "
            f"num_uniform. Received: batch_size = {batch_size}, in_batch = {in_batch}"
        )


def _check_examples(element_spec: Mapping[str, tf.TypeSpec]) -> None:
    if not isinstance(element_spec, Mapping):
        raise ValueError(f"An example must be a dict of tensors. Received: {element_spec}")
    missing = sorted(_REQUIRED.keys() - element_spec.keys())
    if missing:
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
