"""The retrieval loss over mixed negatives."""

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from tfrs_pipeline.samples.store import Samples

# The range that tfrs.tasks.Retrieval clips candidate_sampling_probability to.
PARENT_PROBABILITY_RANGE = (1e-6, 1.0)
MASKED_LOGIT = np.finfo(np.float32).min / 100.0


class HybridRetrieval(tfrs.tasks.Retrieval):
    """`tfrs.tasks.Retrieval` with the log_q of any mixture, and hard negatives for each row.

    The parent's `candidate_sampling_probability` is one number per column, clipped to [1e-6, 1],
    and corrects the positive as well. Here `log_q` may differ by row, is never clipped, and the
    row's own positive keeps its uncorrected logit. Each row has its own columns of hard negatives,
    which takes B * H products, not B * B * H. A row may have several positives: each has a separate
    loss over the same negatives, which are scored once.

    It computes in float32, for any precision of the embeddings and any Keras policy. It has no
    metrics, because in-batch ones flatter collapsed embeddings. Use `evaluate`.

    Args:
        temperature: Scores are divided by it; above 0.

    A call takes:
        query_embeddings: [W, D] float.
        candidate_embeddings: [P, D], the positives, one per query unless `positive_query` is given.
            Without `negative_embeddings` they are the shared columns too, as in the parent: more
            candidates may follow them, and the diagonal is masked.
        sample_weight: [P] or [P, 1], optional.
        candidate_sampling_probability: [C] in [1e-6, 1], in place of `negative_embeddings` and
            `log_q`: as in the parent, it corrects the positive too.
        score_mask: [W, C] bool, True where a shared column counts. With `negative_embeddings`, it
            must be False for columns that hold the row's own positive.
        negative_embeddings: [C, D], the shared columns.
        log_q: [W, C], [1, C] or [C], subtracted from the logits of the shared columns. A column
            with -inf does not count: no kind of negative draws its candidate, for instance an item
            that is new in validation.
        positive_query: [P] int32 in [0, W), the query of each positive; any number per query. It
            needs `negative_embeddings`.
        hard_embeddings: [W, H, D], each row's own negatives.
        hard_log_q: [W, H], required with `hard_embeddings`; -inf as in `log_q`.
        hard_mask: [W, H] bool, True where a hard negative counts.
        compute_metrics, compute_batch_metrics: Ignored; callers of the parent pass them.

    Raises:
        ValueError: If the temperature is not above 0. From a call, if both corrections are given,
            shapes do not fit, or an argument comes without the one that it needs.
        tf.errors.InvalidArgumentError: From a call, if a sampling probability leaves [1e-6, 1], or
            if shapes that a graph knows only at run time do not fit.

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
        candidate_sampling_probability: tf.Tensor | None = None,
        score_mask: tf.Tensor | None = None,
        *,
        negative_embeddings: tf.Tensor | None = None,
        log_q: tf.Tensor | None = None,
        positive_query: tf.Tensor | None = None,
        hard_embeddings: tf.Tensor | None = None,
        hard_log_q: tf.Tensor | None = None,
        hard_mask: tf.Tensor | None = None,
        compute_metrics: bool = True,
        compute_batch_metrics: bool = True,
    ) -> tf.Tensor:
        """Computes the summed loss of a batch; the class describes the arguments.

        Returns:
            Scalar, the weighted sum over positives of logsumexp(logits) - logit of the positive.
            The logits are those of the positive and of its query's negatives.
        """
        queries, positives, negatives, hard = _as_float32(
            query_embeddings, candidate_embeddings, negative_embeddings, hard_embeddings
        )
        probability, log_q, hard_log_q, sample_weight = _as_float32(
            candidate_sampling_probability, log_q, hard_log_q, sample_weight
        )
        if self._temperature is not None:  # Dividing [W, D] is cheaper than dividing [W, C].
            queries = queries / self._temperature
        parents_log_q = None
        if probability is not None:
            log_q = parents_log_q = _parents_log_q(probability, log_q, negatives)
        if negatives is None:
            negatives = positives
            positives, score_mask = _split_columns(queries, positives, score_mask, positive_query)
        _check_embeddings(queries, positives, positive_query, negatives, hard)
        own = tf.reduce_sum(_of_positives(queries, positive_query) * positives, axis=1)
        if parents_log_q is not None:
            own = own - parents_log_q[: tf.shape(own)[0]]
        scores = tf.matmul(queries, negatives, transpose_b=True)
        blocks = [_logits(scores, log_q=log_q, score_mask=score_mask)]
        blocks += _hard_logits(queries, hard, hard_log_q, hard_mask)
        # log(exp(own) + exp(others)) - own.
        losses = tf.nn.softplus(_of_positives(_log_sum_exp(blocks), positive_query) - own)
        if sample_weight is not None:  # The parent takes [P, 1] too.
            losses *= tf.reshape(sample_weight, tf.shape(losses))
        return tf.reduce_sum(losses)


def _parents_log_q(
    probability: tf.Tensor, log_q: tf.Tensor | None, negatives: tf.Tensor | None
) -> tf.Tensor:
    if log_q is not None or negatives is not None:
        raise ValueError(
            "candidate_sampling_probability is the parent's form, without negative_embeddings and "
            "log_q: pass log_q alone."
        )
    if probability.shape.rank != 1:
        raise ValueError(
            "candidate_sampling_probability must be [num_candidates]. "
            f"Received: shape {probability.shape}"
        )
    low, high = PARENT_PROBABILITY_RANGE
    message = (
        f"candidate_sampling_probability leaves [{low}, {high}], where "
        "tfrs.tasks.Retrieval would clip it. Pass log_q instead."
    )
    checks = [
        tf.debugging.assert_greater_equal(probability, low, message),
        tf.debugging.assert_less_equal(probability, high, message),
    ]
    with tf.control_dependencies(checks):
        return tf.math.log(probability)


def _split_columns(
    queries: tf.Tensor,
    columns: tf.Tensor,
    score_mask: tf.Tensor | None,
    positive_query: tf.Tensor | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the positives among the parent's columns, and a mask that is False at them."""
    if positive_query is not None:
        raise ValueError(
            "positive_query needs negative_embeddings: which columns are a query's own is unknown "
            "if the positives themselves are the shared columns. Pass the columns, and a "
            "score_mask that is False at each query's own positives."
        )
    positives = columns[: tf.shape(queries)[0]]
    num_rows = tf.shape(positives)[0]
    if score_mask is None:
        score_mask = tf.ones([num_rows, tf.shape(columns)[0]], tf.bool)
    return positives, tf.linalg.set_diag(score_mask, tf.zeros([num_rows], tf.bool))


def _hard_logits(
    queries: tf.Tensor, hard: tf.Tensor | None, log_q: tf.Tensor | None, mask: tf.Tensor | None
) -> list[tf.Tensor]:
    if hard is None:
        if log_q is not None or mask is not None:
            raise ValueError("hard_log_q and hard_mask need hard_embeddings, their negatives.")
        return []
    if log_q is None:
        raise ValueError("hard_embeddings needs hard_log_q; zeros correct nothing.")
    scores = tf.einsum("wd,whd->wh", queries, hard)
    return [_logits(scores, hard_log_q=log_q, hard_mask=mask)]


def _check_embeddings(
    queries: tf.Tensor,
    positives: tf.Tensor,
    positive_query: tf.Tensor | None,
    negatives: tf.Tensor,
    hard: tf.Tensor | None,
) -> None:
    axes = "WD", "WD" if positive_query is None else "PD", "CD", "P", "WHD"
    given = zip((queries, positives, negatives, positive_query, hard), axes, strict=True)
    message = (
        "Embeddings must be [W, D] of queries, [P, D] of positives, [C, D] of negatives and "
        "[W, H, D] of hard ones; P is W, or the length of positive_query"
    )
    tf.debugging.assert_shapes([x for x in given if x[0] is not None], message=message)


def _as_float32(*given: tf.Tensor | None) -> list[tf.Tensor | None]:
    return [None if x is None else tf.cast(x, tf.float32) for x in given]


def _logits(scores: tf.Tensor, **given: tf.Tensor | None) -> tf.Tensor:
    """Corrects scores, [W, C], by a log_q, then applies a mask; both are given by name."""
    (log_q_name, log_q), (mask_name, mask) = given.items()
    logits = scores
    if log_q is not None:
        log_q = _checked(log_q_name, log_q, logits, may_be_shared=log_q_name == "log_q")
        # An infinite log_q masks too, or the loss would be NaN.
        logits = logits - tf.where(tf.math.is_inf(log_q), -MASKED_LOGIT, log_q)
    if mask is None:
        return logits
    return tf.where(_checked(mask_name, mask, logits), logits, MASKED_LOGIT)


def _checked(
    name: str, given: tf.Tensor, logits: tf.Tensor, *, may_be_shared: bool = False
) -> tf.Tensor:
    """Requires the logits' shape [W, C] or, if it may be shared by all rows, [C] or [1, C]."""
    # A log_q of [W, 1] would be broadcast without correcting anything.
    given, message = tf.convert_to_tensor(given), f"{name} must be [num_rows, num_columns]"
    shape, wanted = given.shape, logits.shape
    allowed = [wanted]
    if may_be_shared:
        allowed += [wanted[1:], [1, wanted[1]]]
        message = f"{message}, [1, num_columns] or [num_columns]"
    if shape.rank is None or not any(map(shape.is_compatible_with, allowed)):
        raise ValueError(f"{message}, here of {tuple(wanted)}. Received: shape {shape}")
    received, rows = tf.shape(given), tf.shape(logits)[:1]
    if may_be_shared and shape.rank == 2:
        rows = tf.where(received[0] == 1, 1, rows)
    expected = tf.concat([rows, tf.shape(logits)[1:]], axis=0)[-shape.rank :]
    with tf.control_dependencies([tf.debugging.assert_equal(received, expected, message)]):
        return tf.identity(given)


def _of_positives(rows: tf.Tensor, positive_query: tf.Tensor | None) -> tf.Tensor:
    """Returns the row of each positive's query: all rows in order, or those of `positive_query`."""
    return rows if positive_query is None else tf.gather(rows, positive_query)


def _log_sum_exp(blocks: Sequence[tf.Tensor]) -> tf.Tensor:
    """Computes the logsumexp of each row over [W, any] blocks: [W]."""
    # The blocks are not joined: a copy of the scores would cost half as much again as the rest.
    highest = functools.reduce(tf.maximum, [tf.reduce_max(block, axis=1) for block in blocks])
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

    An item's share now is a mixture of its shares with several half-lives, counted in clicks, and
    a uniform share; the share of all clicks is mixed with the same uniform share. Expectation
    maximisation finds the weights with the highest likelihood of the latest tenth of the clicks,
    each slice given the clicks before it. The shift is 0 in row 0, and everywhere if the log has no
    timestamps or fewer than 100 clicks.
    """
    num_clicks, num_rows = len(samples), len(samples.counts)
    if samples.sequence_times is None or num_clicks < 100:
        return np.zeros(num_rows, np.float32)
    rows = samples.sequences.values[np.argsort(samples.sequence_times, kind="stable")]

    def shares(num: int) -> np.ndarray:
        """Returns the items' shares of the first `num` clicks, by half-life, then uniform ones."""
        age = np.arange(num, 0, -1) / num_clicks
        kinds = [np.bincount(rows[:num], 0.5 ** (age / x), num_rows) for x in _HALF_LIVES]
        return np.stack(
            [*(counts / counts.sum() for counts in kinds), np.full(num_rows, 1 / num_rows)]
        )

    slices = itertools.pairwise((num_clicks * _SLICES).astype(int))
    likelihoods = np.hstack([shares(start)[:, rows[start:end]] for start, end in slices])
    mixture = np.full(len(likelihoods), 1 / len(likelihoods))
    for _ in range(100):
        joint = mixture[:, np.newaxis] * likelihoods
        mixture = (joint / joint.sum(axis=0)).mean(axis=1)
    now = shares(num_clicks)
    of_all = (1 - mixture[-1]) * now[-2] + mixture[-1] * now[-1]
    shift = np.log(mixture @ now / of_all)
    shift[0] = 0.0
    return shift.astype(np.float32)
