"""The retrieval loss over mixed negatives."""

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from tfrs_pipeline.samples.store import Samples

MASKED_LOGIT = np.finfo(np.float32).min / 100.0


class HybridRetrieval(tfrs.tasks.Retrieval):
    """`tfrs.tasks.Retrieval` with the log_q of any mixture and each row's own columns.

    The loss of a positive is logsumexp(logits) - its logit, over its own logit, those of the shared
    columns and those of its query's hard negatives. A logit is score / temperature - log_q; the
    positive's own stays uncorrected (see `negatives/log_q.py`).

    The parent's `candidate_sampling_probability` is one number for each column, clipped to
    [1e-6, 1], and corrects the positive as well. Here `log_q` may differ by row and is never
    clipped. Each row has its own columns of hard negatives, which takes B * H products, not
    B * B * H. A row may have several positives: each has a separate loss over the same negatives,
    which are scored once.

    It computes in float32, for any precision of the embeddings and any Keras policy. It has no
    metrics, because in-batch ones flatter collapsed embeddings. Use `evaluate`.

    Args:
        temperature: Scores are divided by it; above 0. None is 1.

    A call takes:
        query_embeddings: [W, D] float.
        candidate_embeddings: [P, D], the positives, one per query unless `positive_query` is given.
        sample_weight: [P] or [P, 1], optional.
        negative_embeddings: [C, D], the shared columns. In-batch, these are the positives, with a
            `score_mask` that is False where a column holds the row's own positive.
        score_mask: [W, C] bool, True where a shared column counts. It must be False for columns
            that hold the row's own positive. None counts all.
        log_q: [W, C], [1, C] or [C], subtracted from the logits of the shared columns. A column
            with -inf does not count: no kind of negative draws its candidate, for instance an item
            that is new in validation.
        positive_query: [P] int32 in [0, W), the query of each positive; any number per query.
        hard_embeddings: [W, H, D], each row's own negatives.
        hard_log_q: [W, H], required with `hard_embeddings`; -inf as in `log_q`.
        hard_mask: [W, H] bool, True where a hard negative counts.

    Raises:
        ValueError: If the temperature is not above 0. From a call, if shapes do not fit, or an
            argument comes without the one that it needs.
        tf.errors.InvalidArgumentError: From a call, if shapes that a graph knows only at run time
            do not fit.

    Example:
        In-batch negatives and two easy negatives, all corrected:

        >>> task = HybridRetrieval(temperature=0.1)
        >>> queries, positives, easy = tf.eye(2), tf.eye(2), tf.ones([2, 2])
        >>> loss = task(
        ...     queries,
        ...     positives,
        ...     negative_embeddings=tf.concat([positives, easy], axis=0),
        ...     log_q=tf.math.log([0.7, 0.3, 0.5, 0.5]),
        ...     score_mask=tf.constant([[False, True, True, True], [True, False, True, True]]),
        ... )
        >>> round(float(loss), 3)
        3.219
    """

    def __init__(self, temperature: float | None = None) -> None:
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be above 0. Received: {temperature!r}")
        super().__init__(temperature=temperature)
        self._autocast = False  # Keras would cast the first input under a mixed-precision policy.

    def call(
        self,
        query_embeddings: tf.Tensor,
        candidate_embeddings: tf.Tensor,
        sample_weight: tf.Tensor | None = None,
        *,
        negative_embeddings: tf.Tensor,
        score_mask: tf.Tensor | None = None,
        log_q: tf.Tensor | None = None,
        positive_query: tf.Tensor | None = None,
        hard_embeddings: tf.Tensor | None = None,
        hard_log_q: tf.Tensor | None = None,
        hard_mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Computes the summed loss of a batch; the class describes the arguments.

        Returns:
            Scalar, the weighted sum over positives of logsumexp(logits) - logit of the positive.
            The logits are those of the positive and of its query's negatives.
        """
        queries, positives, negatives, hard = _as_float32(
            query_embeddings, candidate_embeddings, negative_embeddings, hard_embeddings
        )
        log_q, hard_log_q, sample_weight = _as_float32(log_q, hard_log_q, sample_weight)
        axes = "WD", "WD" if positive_query is None else "PD", "CD", "P", "WHD"
        pairs = zip((queries, positives, negatives, positive_query, hard), axes, strict=True)
        message = (
            "Embeddings must be [W, D] of queries, [P, D] of positives, [C, D] of negatives and "
            "[W, H, D] of hard ones; P is W, or the length of positive_query"
        )
        tf.debugging.assert_shapes([pair for pair in pairs if pair[0] is not None], message=message)
        if self._temperature is not None:  # Dividing [W, D] is cheaper than dividing [W, C].
            queries = tf.divide(queries, self._temperature)
        positive_logits = tf.reduce_sum(
            _rows_by_positive(queries, positive_query) * positives, axis=1
        )
        scores = tf.matmul(queries, negatives, transpose_b=True)
        blocks = [_logits(scores, log_q=log_q, score_mask=score_mask)]
        if hard is None:
            if hard_log_q is not None or hard_mask is not None:
                raise ValueError("hard_log_q and hard_mask need hard_embeddings, their negatives.")
        elif hard_log_q is None:
            raise ValueError("hard_embeddings needs hard_log_q; zeros correct nothing.")
        else:
            hard_scores = tf.einsum("wd,whd->wh", queries, hard)
            blocks.append(_logits(hard_scores, hard_log_q=hard_log_q, hard_mask=hard_mask))
        # softplus(n - p) = log(exp(p) + exp(n)) - p for the positive's logit p and the negatives'
        # logsumexp n; it neither overflows nor loses small losses to rounding.
        negative_logits = _rows_by_positive(_log_sum_exp(blocks), positive_query)
        losses = tf.nn.softplus(negative_logits - positive_logits)
        if sample_weight is not None:
            losses *= tf.reshape(sample_weight, tf.shape(losses))
        return tf.reduce_sum(losses)


def _as_float32(*tensors: tf.Tensor | None) -> list[tf.Tensor | None]:
    return [None if tensor is None else tf.cast(tensor, tf.float32) for tensor in tensors]


def _logits(scores: tf.Tensor, **corrections: tf.Tensor | None) -> tf.Tensor:
    """Corrects scores, [W, C], by a log_q, then applies a mask; both are given by name."""
    (log_q_name, log_q), (mask_name, mask) = corrections.items()
    logits = scores
    if log_q is not None:
        if log_q_name == "log_q" and log_q.shape.rank == 1:  # One number for each column.
            log_q = log_q[tf.newaxis, :]
        _check_columns(log_q_name, log_q, scores, is_shared=log_q.shape[:1] == [1])
        # An infinite log_q masks too, or the loss would be NaN.
        logits = logits - tf.where(tf.math.is_inf(log_q), -MASKED_LOGIT, log_q)
    if mask is None:
        return logits
    _check_columns(mask_name, mask, scores)
    return tf.where(mask, logits, MASKED_LOGIT)


def _check_columns(
    name: str, values: tf.Tensor, scores: tf.Tensor, *, is_shared: bool = False
) -> None:
    """Requires the shape of the scores, [W, C]; [1, C] where the rows share the values."""
    # A log_q of [W, 1] would be broadcast without correcting anything.
    message = f"{name} must be [num_rows, num_columns], here of {tuple(scores.shape)}"
    axes = (1, "C") if is_shared and name == "log_q" else "WC"
    tf.debugging.assert_shapes([(scores, "WC"), (values, axes)], message=message)


def _rows_by_positive(rows: tf.Tensor, positive_query: tf.Tensor | None) -> tf.Tensor:
    """Returns the row of each positive's query: all rows in order, or those of `positive_query`."""
    return rows if positive_query is None else tf.gather(rows, positive_query)


def _log_sum_exp(blocks: Sequence[tf.Tensor]) -> tf.Tensor:
    """Computes the logsumexp of each row over [W, any] blocks: [W]."""
    # The blocks are not joined: a copy of the scores would cost half as much again as the rest.
    highest = functools.reduce(tf.maximum, [tf.reduce_max(block, axis=1) for block in blocks])
    # The highest logit cancels out, so no gradient needs to pass through it.
    highest = tf.stop_gradient(highest)
    total = tf.add_n(
        [tf.reduce_sum(tf.exp(block - highest[:, tf.newaxis]), axis=1) for block in blocks]
    )
    return tf.math.log(total) + highest


# Half-lives of a click's weight, as shares of all clicks; with infinity all clicks count alike.
_HALF_LIVES = (*(0.5**k for k in range(1, 11)), np.inf)
# The latest tenth of the clicks, in five slices.
_SLICES = np.linspace(0.9, 1.0, 6)


def popularity_shift(samples: Samples) -> np.ndarray:
    """Computes log(share of the clicks now / share of all clicks): [num_candidates + 1] float32.

    A click loses weight with its age, counted in later clicks, and each of several half-lives
    gives an item another share. Its share now is a weighted mean of these and of a uniform share.
    The weights are those that predict the latest tenth of the clicks best: each fifth of it is
    predicted from the clicks before it, and expectation maximisation finds the weights of highest
    likelihood. The share of all clicks is mixed with the same uniform share. The shift is 0 in row
    0, and everywhere if the log has no timestamps or fewer than 100 clicks.
    """
    num_clicks, num_rows = len(samples), len(samples.counts)
    if samples.sequence_times is None or num_clicks < 100:
        return np.zeros(num_rows, np.float32)
    rows = samples.sequences.values[np.argsort(samples.sequence_times, kind="stable")]

    def shares(num: int) -> np.ndarray:
        """Returns the items' shares of the first `num` clicks, by half-life, then uniform ones."""
        age = np.arange(num, 0, -1) / num_clicks
        kinds = [
            np.bincount(rows[:num], 0.5 ** (age / half_life), num_rows) for half_life in _HALF_LIVES
        ]
        return np.stack(
            [*(counts / counts.sum() for counts in kinds), np.full(num_rows, 1 / num_rows)]
        )

    slices = itertools.pairwise((num_clicks * _SLICES).astype(int))
    likelihoods = np.hstack([shares(start)[:, rows[start:end]] for start, end in slices])
    mixture = np.full(len(likelihoods), 1 / len(likelihoods))
    for _ in range(100):
        joint = mixture[:, np.newaxis] * likelihoods
        # If few items of a large catalog are clicked, the uniform part of the mixture falls to 0,
        # and an unclicked item's shift would be the logarithm of 0 / 0.
        mixture = np.maximum((joint / joint.sum(axis=0)).mean(axis=1), np.finfo(float).tiny)
    now = shares(num_clicks)
    # The last row is uniform, and the one before it counts all clicks alike.
    overall = (1 - mixture[-1]) * now[-2] + mixture[-1] * now[-1]
    shift = np.log(mixture @ now / overall)
    shift[0] = 0.0
    return shift.astype(np.float32)
