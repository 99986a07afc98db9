"""HybridRetrieval against a slow loop, against its parent, against the full softmax."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_recommenders as tfrs
from scipy import stats

from tfrs_pipeline.model.loss import HybridRetrieval

W, C, H, D, P = 6, 10, 3, 4, 8
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


QUERIES, COLUMNS, HARD, POSITIVES = normal(W, D), normal(C, D), normal(W, H, D), normal(P, D)
LOG_Q, HARD_LOG_Q = normal(W, C), normal(W, H)
MASK, HARD_MASK = RNG.random((W, C)) > 0.3, RNG.random((W, H)) > 0.4
WEIGHTS = RNG.random(P).astype(np.float32)
# Some queries have several positives, and query 3 has none.
POSITIVE_QUERY = np.array([0, 0, 1, 2, 2, 2, 5, 4])


def loss_of(**options: Any) -> tf.Tensor:
    return HybridRetrieval()(QUERIES, POSITIVES[:W], negative_embeddings=COLUMNS, **options)


def value_and_gradients(loss: Any, *arrays: np.ndarray) -> list[np.ndarray]:
    variables = [tf.Variable(array) for array in arrays]
    with tf.GradientTape() as tape:
        value = loss(*variables)
    gradients = tape.gradient(value, variables)
    return [value.numpy(), *(tf.convert_to_tensor(gradient).numpy() for gradient in gradients)]


def slow_loss(queries: Any, columns: Any, positives: Any, hard: Any) -> Any:
    """Returns the documented loss, computed one positive and one column at a time."""
    total = 0.0
    for p, w in enumerate(POSITIVE_QUERY):
        own = tf.tensordot(queries[w], positives[p], 1) / 0.5
        sum_exp = tf.exp(own)
        for c in np.flatnonzero(MASK[w]):
            sum_exp += tf.exp(tf.tensordot(queries[w], columns[c], 1) / 0.5 - LOG_Q[w, c])
        for h in np.flatnonzero(HARD_MASK[w]):
            sum_exp += tf.exp(tf.tensordot(queries[w], hard[w, h], 1) / 0.5 - HARD_LOG_Q[w, h])
        total += WEIGHTS[p] * (tf.math.log(sum_exp) - own)
    return total


@pytest.mark.parametrize("repeats_rows", [False, True])
def test_value_and_gradients_are_those_of_a_loop(repeats_rows: bool) -> None:
    """A query has several positives, or its row is repeated for each of them."""

    def loss(queries: Any, columns: Any, positives: Any, hard: Any) -> tf.Tensor:
        of_rows: dict[str, Any] = {
            "query_embeddings": tf.identity(queries),
            "hard_embeddings": hard,
            "log_q": LOG_Q,
            "score_mask": MASK,
            "hard_log_q": HARD_LOG_Q,
            "hard_mask": HARD_MASK,
        }
        if repeats_rows:
            of_rows = {name: tf.gather(rows, POSITIVE_QUERY) for name, rows in of_rows.items()}
        else:
            of_rows["positive_query"] = tf.constant(POSITIVE_QUERY)
        return HybridRetrieval(0.5)(
            candidate_embeddings=positives,
            sample_weight=WEIGHTS,
            negative_embeddings=columns,
            **of_rows,
        )

    arrays = QUERIES, COLUMNS, POSITIVES, HARD
    pairs = zip(*(value_and_gradients(x, *arrays) for x in (loss, slow_loss)), strict=True)
    for ours, slow in pairs:
        np.testing.assert_allclose(ours, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight_shape", [(W,), (W, 1)])
def test_equals_the_task_of_tfrs(weight_shape: tuple[int, ...]) -> None:
    """There the positives are the first columns; here columns and mask are given apart."""
    weights = {"sample_weight": WEIGHTS[:W].reshape(weight_shape)}
    is_own = np.eye(W, C, dtype=bool)

    def ours(queries: Any, columns: Any) -> tf.Tensor:
        mask = {"score_mask": MASK & ~is_own}
        return HybridRetrieval(0.7)(
            queries, columns[:W], negative_embeddings=columns, **weights, **mask
        )

    def of_tfrs(queries: Any, columns: Any) -> tf.Tensor:
        task = tfrs.tasks.Retrieval(temperature=0.7)
        return task(queries, columns, score_mask=MASK | is_own, **weights)

    pairs = zip(*(value_and_gradients(x, QUERIES, COLUMNS) for x in (ours, of_tfrs)), strict=True)
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_that_of_the_corrected_log_q_of_khrylchenko_et_al() -> None:
    """With s the positive's logit and N the sum of exp over corrected columns, P = e^s / (e^s + N).

    Their loss (2025) has no positive in the denominator, and the weight 1 - P, a constant:
    (1 - P) (log N - s), whose gradient is N / (e^s + N) (grad log N - grad s). That of
    log(e^s + N) - s is (e^s grad s + N grad log N) / (e^s + N) - grad s, which is the same.
    """

    def ours(queries: Any, columns: Any, positives: Any) -> tf.Tensor:
        options: dict[str, Any] = {"log_q": LOG_Q, "score_mask": MASK}
        return HybridRetrieval(0.5)(queries, positives, negative_embeddings=columns, **options)

    def theirs(queries: Any, columns: Any, positives: Any) -> tf.Tensor:
        own = tf.reduce_sum(queries * positives, axis=1) / 0.5
        logits = tf.matmul(queries, columns, transpose_b=True) / 0.5 - LOG_Q
        log_sum = tf.reduce_logsumexp(tf.where(MASK, logits, -np.inf), axis=1)
        not_own = tf.stop_gradient(tf.sigmoid(log_sum - own))
        return tf.reduce_sum(not_own * (log_sum - own))

    arrays = QUERIES, COLUMNS, POSITIVES[:W]
    (_, *of_ours), (_, *of_theirs) = (value_and_gradients(x, *arrays) for x in (ours, theirs))
    for got, expected in zip(of_ours, of_theirs, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("expected_count", "weights"),
    [(0.1, (0.095, 0.093)), (2.0, (0.865, 0.499)), (100.0, (1, 0.01))],
)
def test_the_weight_of_an_item_with_the_counts_of_the_batch_as_log_q(
    expected_count: float, weights: tuple[float, float]
) -> None:
    """c columns of an item with log q = scale log c weigh c^(1 - scale) together.

    For c as Poisson draws the mean is 1 - e^-L at scale 1, and E[1 / c; c >= 1] at scale 2, where L
    is the expected count. With log q = log L it is 1.
    """
    copies = np.arange(1, 200)
    copies = copies[stats.poisson.pmf(copies, expected_count) > 1e-7]
    probability = stats.poisson.pmf(copies, expected_count)

    def mean_weight(log_q_of: Any) -> float:
        """The positive's logit is 0, and so are the scores: the loss is log(1 + weight)."""
        zeros = np.zeros((1, D), np.float32)
        losses = [
            HybridRetrieval()(
                zeros,
                zeros,
                negative_embeddings=np.zeros((c, D), np.float32),
                log_q=np.full(c, log_q_of(c), np.float32),
            )
            for c in copies
        ]
        return float(probability @ np.expm1(losses))

    assert mean_weight(lambda c: np.log(expected_count)) == pytest.approx(1, rel=1e-4)
    for scale, weight in zip((1, 2), weights, strict=True):
        found = mean_weight(lambda c, scale=scale: scale * np.log(c))
        assert found == pytest.approx(weight, abs=5e-4)


def test_every_candidate_once_is_the_full_softmax() -> None:
    """n(c) = 1, so log_q = 0 and nothing is estimated."""
    logits = QUERIES @ COLUMNS.T / 0.5
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    task, mask = HybridRetrieval(0.5), ~np.eye(W, C, dtype=bool)
    for correction in ({}, {"log_q": tf.zeros([C])}):
        loss = task(
            QUERIES, COLUMNS[:W], negative_embeddings=COLUMNS, score_mask=mask, **correction
        )
        np.testing.assert_allclose(loss, -np.trace(log_softmax[:, :W]), rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float32"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, tf.bfloat16.as_numpy_dtype])
def test_the_loss_is_computed_in_float32(policy: str, dtype: Any) -> None:
    """This holds for every policy of Keras and every precision of the embeddings."""
    arrays = [array.astype(dtype) for array in (QUERIES, POSITIVES[:W], COLUMNS, HARD)]

    def loss(queries: Any, positives: Any, columns: Any, hard: Any) -> np.ndarray:
        options = {"score_mask": MASK, "log_q": LOG_Q, "hard_log_q": HARD_LOG_Q}
        options |= {"negative_embeddings": columns, "hard_embeddings": hard}
        weights = WEIGHTS[:W].astype(dtype).astype(np.float64)
        return HybridRetrieval(0.5)(queries, positives, sample_weight=weights, **options).numpy()

    expected = loss(*(array.astype(np.float32) for array in arrays))
    tf.keras.mixed_precision.set_global_policy(policy)
    try:
        got = loss(*map(tf.constant, arrays))
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


def test_log_q_is_not_clipped() -> None:
    """The negatives' logits all rise by 40: so does the loss of each row."""
    low, high = (loss_of(log_q=tf.fill([C], x)) for x in (-40.0, -80.0))
    assert float(high - low) == pytest.approx(40 * W, rel=1e-5)


@pytest.mark.parametrize("log_q", [LOG_Q, LOG_Q[0]], ids=["by row", "by column"])
def test_what_no_kind_draws_does_not_count(log_q: np.ndarray) -> None:
    """A log_q of -inf acts as a mask, for shared columns and for each row's hard negatives."""
    is_drawn = np.arange(C) != 3
    assert MASK[:, 3].any()
    never = np.where(is_drawn, log_q, np.float32(-np.inf))
    never_hard = np.where(HARD_MASK, HARD_LOG_Q, np.float32(-np.inf))

    def found(**options: Any) -> list[np.ndarray]:
        def loss(queries: Any, positives: Any, hard: Any) -> tf.Tensor:
            options.update(negative_embeddings=COLUMNS, hard_embeddings=hard)
            return HybridRetrieval(0.5)(queries, positives, **options)

        return value_and_gradients(loss, QUERIES, POSITIVES[:W], HARD)

    got = found(score_mask=MASK, log_q=never, hard_log_q=never_hard)
    is_counted = {"score_mask": MASK & is_drawn, "hard_mask": HARD_MASK}
    expected = found(log_q=log_q, hard_log_q=HARD_LOG_Q, **is_counted)
    for ours, masked in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, masked, rtol=1e-6)


@pytest.mark.parametrize(("scale", "expected"), [(1e4, 0.0), (-1e4, 2e4)])
def test_far_logits_and_rows_without_a_column_stay_finite(scale: float, expected: float) -> None:
    """One row has a column whose logit is minus the positive's; the other has no column."""
    own, columns = tf.constant([[scale], [scale]]), tf.constant([[-scale]])
    options = {"negative_embeddings": columns, "score_mask": tf.constant([[True], [False]])}
    got, gradient = value_and_gradients(
        lambda query: HybridRetrieval()(query, own, **options), np.array([[1.0], [0.0]], np.float32)
    )
    assert got == pytest.approx(expected)
    np.testing.assert_allclose(gradient, [[-2 * scale if expected else 0.0], [0.0]])


@pytest.mark.parametrize("shape", [(), (W,), (W, 1), (C, W), (2, C), (1, W, C)])
def test_a_log_q_that_would_be_broadcast_over_columns_is_refused(shape: tuple[int, ...]) -> None:
    """[W, 1] would shift all logits of a row alike, which corrects nothing."""
    with pytest.raises(ValueError, match=r"log_q must be .* here of \(6, 10\)"):
        loss_of(log_q=tf.zeros(shape))

    # It is also refused in a graph that does not know the shapes yet.
    @tf.function(input_signature=[tf.TensorSpec(None), tf.TensorSpec([None, D])])
    def loss(log_q: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
        log_q = tf.ensure_shape(log_q, [None] * len(shape))
        return HybridRetrieval()(QUERIES, POSITIVES[:W], negative_embeddings=columns, log_q=log_q)

    if shape in ((W,), (W, 1), (C, W), (2, C)):
        with pytest.raises(tf.errors.InvalidArgumentError, match="log_q must be"):
            loss(tf.zeros(shape), COLUMNS)
    if shape == (C, W):
        np.testing.assert_allclose(loss(LOG_Q, COLUMNS), loss_of(log_q=LOG_Q), rtol=1e-6)


def test_refusals() -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"hard_embeddings": HARD}, "hard_embeddings needs hard_log_q"),
        ({"hard_log_q": HARD_LOG_Q}, "hard_log_q.* need.? hard_embeddings"),
        ({"hard_mask": HARD_MASK}, "hard_mask.* need.? hard_embeddings"),
    )
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            loss_of(**options)
    for temperature in (0.0, -0.1, np.nan):
        with pytest.raises(ValueError, match=f"above 0. Received: {temperature}"):
            HybridRetrieval(temperature)


@pytest.mark.parametrize("forms", [
    {"queries": QUERIES[:1]}, {"positives": POSITIVES[:1]}, {"positives": POSITIVES[:W, :1]},
    {"positives": POSITIVES},
    {"queries": QUERIES[:, np.newaxis], "positives": POSITIVES[:W, np.newaxis]},
    {"positives": POSITIVES, "positive_query": np.zeros(1, int)},
    {"positives": POSITIVES[:1], "positive_query": POSITIVE_QUERY},
    {"negatives": COLUMNS[:, :1]}, {"hard": HARD[:1]}, {"hard": HARD[:, :, :1]},
])  # fmt: skip
def test_embeddings_that_would_be_broadcast_are_refused(forms: dict[str, Any]) -> None:
    fitting = {"queries": QUERIES, "positives": POSITIVES[:W], "negatives": COLUMNS, "hard": HARD}

    def loss(given: dict[str, Any]) -> tf.Tensor:
        options = {"hard_embeddings": given["hard"], "hard_log_q": HARD_LOG_Q}
        options["positive_query"] = given.get("positive_query")
        return HybridRetrieval()(
            given["queries"], given["positives"], negative_embeddings=given["negatives"], **options
        )

    given = {name: tf.constant(x) for name, x in {**fitting, **forms}.items()}
    with pytest.raises(ValueError, match=r"Embeddings must be \[W, D\]"):
        loss(given)
    # Also refused in a graph that does not know the sizes; fitting ones give the same number.
    specs = {name: tf.TensorSpec([None] * len(x.shape), x.dtype) for name, x in given.items()}
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        tf.function(loss, input_signature=[specs])(given)
    specs = {name: tf.TensorSpec([None] * np.ndim(x), tf.float32) for name, x in fitting.items()}
    sized = tf.function(loss, input_signature=[specs])(fitting)
    np.testing.assert_allclose(sized, loss(fitting), rtol=1e-6)


@pytest.mark.parametrize("form", [lambda x: x[:, 0], lambda x: x[:, :1], np.transpose])
@pytest.mark.parametrize("name", ["score_mask", "hard_log_q", "hard_mask"])
def test_what_would_be_broadcast_or_reshaped_is_refused(name: str, form: Any) -> None:
    options = {"score_mask": MASK, "hard_log_q": HARD_LOG_Q, "hard_mask": HARD_MASK}
    options |= {"negative_embeddings": COLUMNS, "hard_embeddings": HARD}
    given = tf.constant(form(options[name]))

    @tf.function
    def loss(given: tf.Tensor) -> tf.Tensor:
        return HybridRetrieval()(QUERIES, POSITIVES[:W], **(options | {name: given}))

    with pytest.raises(ValueError, match=rf"{name} must be \[num_rows, "):
        loss(given)
    # It is also refused in a graph that does not know the shape yet.
    unknown = tf.TensorSpec([None] * len(given.shape), given.dtype)
    error = ValueError if len(given.shape) == 1 else tf.errors.InvalidArgumentError
    with pytest.raises(error, match=rf"{name} must be"):
        loss.get_concrete_function(unknown)(given)
