"""HybridRetrieval against its parent, against slow loops, against the full softmax."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_recommenders as tfrs

from tfrs_pipeline.model.loss import HybridRetrieval

B, C, H, D = 6, 10, 3, 4
RNG = np.random.default_rng(0)
QUERIES = RNG.normal(size=(B, D)).astype(np.float32)
CANDIDATES = RNG.normal(size=(C, D)).astype(np.float32)
HARD = RNG.normal(size=(B, H, D)).astype(np.float32)
WEIGHTS = RNG.random(B).astype(np.float32)
LOG_Q = RNG.normal(size=(B, C)).astype(np.float32)
HARD_LOG_Q = RNG.normal(size=(B, H)).astype(np.float32)
MASK = (RNG.random((B, C)) > 0.3) | np.eye(B, C, dtype=bool)
HARD_MASK = RNG.random((B, H)) > 0.4


def value_and_gradients(task: tfrs.tasks.Retrieval, **options: object) -> list[np.ndarray]:
    queries, candidates = tf.Variable(QUERIES), tf.Variable(CANDIDATES)
    with tf.GradientTape() as tape:
        loss = task(queries, candidates, **options)
    gradients = tape.gradient(loss, [queries, candidates])
    return [loss.numpy(), *(tf.convert_to_tensor(g).numpy() for g in gradients)]


def slow_loss(temperature: float, correct_positive: bool = False) -> float:
    total = 0.0
    for i in range(B):
        logits = []
        for j in range(C):
            logit = QUERIES[i] @ CANDIDATES[j] / temperature
            if j != i or correct_positive:
                logit -= LOG_Q[i, j]
            if MASK[i, j]:
                logits.append((j == i, logit))
        for h in range(H):
            if HARD_MASK[i, h]:
                logits.append((False, QUERIES[i] @ HARD[i, h] / temperature - HARD_LOG_Q[i, h]))
        positive = next(logit for is_own, logit in logits if is_own)
        total += WEIGHTS[i] * (np.log(sum(np.exp(logit) for _, logit in logits)) - positive)
    return total


@pytest.mark.parametrize("correct_positive", [False, True])
def test_loss_matches_a_loop(correct_positive: bool) -> None:
    task = HybridRetrieval(0.5, correct_positive=correct_positive)
    loss = task(
        QUERIES,
        CANDIDATES,
        sample_weight=WEIGHTS,
        log_q=LOG_Q,
        score_mask=MASK,
        hard_embeddings=HARD,
        hard_log_q=HARD_LOG_Q,
        hard_mask=HARD_MASK,
    )
    np.testing.assert_allclose(loss, slow_loss(0.5, correct_positive), rtol=1e-5)


@pytest.mark.parametrize("with_probability", [False, True])
def test_equals_the_parent_inside_its_range(with_probability: bool) -> None:
    options: dict[str, object] = {"sample_weight": WEIGHTS, "score_mask": MASK}
    if with_probability:
        probability = np.linspace(1e-6, 1, C).astype(np.float32)
        options["candidate_sampling_probability"] = tf.constant(probability)
    ours = value_and_gradients(HybridRetrieval(0.7), **options)
    parents = value_and_gradients(tfrs.tasks.Retrieval(temperature=0.7), **options)
    for got, expected in zip(ours, parents, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 9e-7, 1.5])
def test_refuses_probabilities_that_the_parent_would_clip(value: float) -> None:
    probability = np.full(C, 0.1, np.float32)
    probability[3] = value
    with pytest.raises(tf.errors.InvalidArgumentError, match="Pass log_q instead"):
        HybridRetrieval()(
            QUERIES, CANDIDATES, candidate_sampling_probability=tf.constant(probability)
        )


def test_log_q_is_not_clipped() -> None:
    def loss(log_q: float) -> float:
        return float(HybridRetrieval()(QUERIES, CANDIDATES, log_q=tf.fill([C], log_q)))

    # The negatives' logits all rise by 40: so does the loss of each row.
    assert loss(-80.0) - loss(-40.0) == pytest.approx(40 * B, rel=1e-5)


def test_all_candidates_as_columns_is_the_full_softmax() -> None:
    """With every candidate once and log_q = 0 (n(c) = 1) nothing is estimated."""
    loss = HybridRetrieval(0.5)(QUERIES, CANDIDATES, log_q=tf.zeros([C]))
    logits = QUERIES @ CANDIDATES.T / 0.5
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(loss, -np.trace(log_softmax[:, :B]), rtol=1e-5)


def test_masked_columns_get_no_gradient() -> None:
    mask = np.ones((B, C), bool)
    mask[:, 8] = False
    gradients = value_and_gradients(HybridRetrieval(), score_mask=mask, log_q=tf.constant(LOG_Q))
    assert (gradients[2][8] == 0).all()
    assert (gradients[2][7] != 0).any()


def test_a_hard_negative_moves_its_own_row_alone() -> None:
    hard = tf.Variable(HARD)
    options = {"hard_log_q": HARD_LOG_Q, "log_q": tf.constant(LOG_Q)}
    with tf.GradientTape() as tape:
        loss = HybridRetrieval()(
            QUERIES,
            CANDIDATES,
            sample_weight=np.eye(B)[2].astype("f"),
            hard_embeddings=hard,
            **options,
        )
    gradient = tape.gradient(loss, hard).numpy()
    assert (gradient[2] != 0).all()
    assert (np.delete(gradient, 2, axis=0) == 0).all()


def test_own_loss_and_batch_metrics_see_the_same_logits() -> None:
    metric = tf.keras.metrics.TopKCategoricalAccuracy(k=3)
    loss = tf.keras.losses.CategoricalCrossentropy(from_logits=True, reduction="sum")
    task = HybridRetrieval(0.5, loss=loss, batch_metrics=[metric])
    options = {
        "sample_weight": WEIGHTS,
        "log_q": tf.constant(LOG_Q),
        "score_mask": MASK,
        "hard_embeddings": HARD,
        "hard_log_q": HARD_LOG_Q,
        "hard_mask": HARD_MASK,
    }
    np.testing.assert_allclose(task(QUERIES, CANDIDATES, **options), slow_loss(0.5), rtol=1e-5)
    # The share of rows with fewer than three columns above the positive, weighted; by a loop.
    is_near_top = []
    for i in range(B):
        own = QUERIES[i] @ CANDIDATES[i] / 0.5
        shared = QUERIES[i] @ CANDIDATES.T / 0.5 - LOG_Q[i]
        hard = QUERIES[i] @ HARD[i].T / 0.5 - HARD_LOG_Q[i]
        others = [*np.delete(shared, i)[np.delete(MASK[i], i)], *hard[HARD_MASK[i]]]
        is_near_top.append(np.sum(np.array(others) > own) < 3)
    assert 0 < sum(is_near_top) < B
    expected = np.average(is_near_top, weights=WEIGHTS)
    assert metric.result().numpy() == pytest.approx(expected, rel=1e-5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="not both"):
        HybridRetrieval()(
            QUERIES, CANDIDATES, log_q=tf.zeros([C]), candidate_sampling_probability=tf.ones([C])
        )
    with pytest.raises(ValueError, match=r"\[num_candidates\].*\(10, 1\)"):
        HybridRetrieval()(QUERIES, CANDIDATES, candidate_sampling_probability=tf.ones([C, 1]))
    with pytest.raises(ValueError, match="hard_log_q"):
        HybridRetrieval()(QUERIES, CANDIDATES, hard_embeddings=HARD)
    with pytest.raises(ValueError, match="num_hard_negatives"):
        HybridRetrieval(num_hard_negatives=3)


@pytest.mark.parametrize("correct_positive", [False, True])
def test_a_positive_of_its_own_row_is_as_one_on_the_diagonal(correct_positive: bool) -> None:
    """The shared columns without the first B, which hold the positives, against a mask on them."""
    task = HybridRetrieval(0.5, correct_positive=correct_positive)
    own = np.eye(B, C, dtype=bool)
    mask = MASK.copy()
    mask[:, :B] = own[:, :B]
    rest: dict[str, object] = {
        "sample_weight": WEIGHTS,
        "hard_embeddings": HARD,
        "hard_log_q": HARD_LOG_Q,
        "hard_mask": HARD_MASK,
    }
    shared = task(QUERIES, CANDIDATES, log_q=LOG_Q, score_mask=mask, **rest)
    alone = task(
        QUERIES,
        CANDIDATES[B:],
        log_q=LOG_Q[:, B:],
        score_mask=mask[:, B:],
        positive_embeddings=CANDIDATES[:B],
        positive_log_q=np.diag(LOG_Q),
        **rest,
    )
    np.testing.assert_allclose(alone, shared, rtol=1e-6)
    with pytest.raises(ValueError, match="needs positive_log_q"):
        HybridRetrieval(correct_positive=True)(
            QUERIES, CANDIDATES, log_q=LOG_Q, positive_embeddings=CANDIDATES[:B]
        )


def test_bfloat16_products_are_near_those_of_float32() -> None:
    options: dict[str, object] = {"log_q": tf.constant(LOG_Q)}
    exact = value_and_gradients(HybridRetrieval(0.5), **options)
    near = value_and_gradients(HybridRetrieval(0.5, score_dtype=tf.bfloat16), **options)
    # bfloat16 keeps 8 bits: a product is off by up to 2^-8 of the size of its terms.
    bound = 2**-7 * np.abs(QUERIES).max() * np.abs(CANDIDATES).max() * D / 0.5
    assert 0 < abs(near[0] - exact[0]) < B * bound
    for got, expected in zip(near[1:], exact[1:], strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=0.15)


def test_own_loss_sees_positives_of_their_own_row() -> None:
    options: dict[str, object] = {
        "log_q": LOG_Q[:, B:],
        "positive_embeddings": CANDIDATES[:B],
        "hard_embeddings": HARD,
        "hard_log_q": HARD_LOG_Q,
    }
    own_loss = tf.keras.losses.CategoricalCrossentropy(from_logits=True, reduction="sum")
    expected = HybridRetrieval(0.5)(QUERIES, CANDIDATES[B:], **options)
    got = HybridRetrieval(0.5, loss=own_loss)(QUERIES, CANDIDATES[B:], **options)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_weights_in_a_column_are_those_of_the_rows() -> None:
    column = {"sample_weight": WEIGHTS[:, None]}
    ours = value_and_gradients(HybridRetrieval(), **column)
    parents = value_and_gradients(tfrs.tasks.Retrieval(), **column)
    np.testing.assert_allclose(ours[0], parents[0], rtol=1e-5)


def test_ids_of_candidates_that_are_no_positives_are_refused() -> None:
    with pytest.raises(ValueError, match="leave one of the two out"):
        HybridRetrieval()(
            QUERIES, CANDIDATES, candidate_ids=tf.range(C), positive_embeddings=CANDIDATES[:B]
        )


# Several positives a row, and a row with none.
POSITIVE_QUERY = np.array([0, 0, 1, 2, 2, 2, 5, 4])
POSITIVES = RNG.normal(size=(8, D)).astype(np.float32)
POSITIVE_OPTIONS = {
    "positive_log_q": RNG.normal(size=8).astype(np.float32),
    "sample_weight": RNG.random(8).astype(np.float32),
}


@pytest.mark.parametrize("correct_positive", [False, True])
def test_positives_that_share_a_row_are_as_rows_repeated(correct_positive: bool) -> None:
    """The loss and its gradients, in the row's hard negatives too, against a row a positive."""
    task = HybridRetrieval(0.5, correct_positive=correct_positive)

    def gradients(is_repeated: bool) -> list[np.ndarray]:
        variables = [tf.Variable(x) for x in (QUERIES, CANDIDATES, POSITIVES, HARD)]
        with tf.GradientTape() as tape:
            queries, candidates, positives, hard = (tf.identity(x) for x in variables)
            rows = [queries, hard, LOG_Q, MASK, HARD_LOG_Q, HARD_MASK]
            if is_repeated:
                rows = [tf.gather(x, POSITIVE_QUERY) for x in rows]
            queries, hard, log_q, mask, hard_log_q, hard_mask = rows
            loss = task(
                queries,
                candidates,
                positive_embeddings=positives,
                positive_query=None if is_repeated else tf.constant(POSITIVE_QUERY),
                log_q=log_q,
                score_mask=mask,
                hard_embeddings=hard,
                hard_log_q=tf.constant(hard_log_q),
                hard_mask=hard_mask,
                **POSITIVE_OPTIONS,
            )
        return [loss.numpy(), *map(tf.convert_to_tensor, tape.gradient(loss, variables))]

    for got, expected in zip(gradients(False), gradients(True), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_losses_of_positives_that_share_a_row_match_a_loop() -> None:
    total = 0.0
    for p, (row, positive) in enumerate(zip(POSITIVE_QUERY, POSITIVES, strict=True)):
        own = np.float64(QUERIES[row] @ positive / 0.5) - POSITIVE_OPTIONS["positive_log_q"][p]
        others = (QUERIES[row] @ CANDIDATES.T / 0.5 - LOG_Q[row])[MASK[row]]
        loss = np.log(np.exp(own) + np.exp(others).sum()) - own
        total += POSITIVE_OPTIONS["sample_weight"][p] * loss
    options: dict[str, object] = {
        "positive_embeddings": POSITIVES,
        "positive_query": tf.constant(POSITIVE_QUERY),
        "log_q": LOG_Q,
        "score_mask": MASK,
        **POSITIVE_OPTIONS,
    }
    own_loss = tf.keras.losses.CategoricalCrossentropy(from_logits=True, reduction="sum")
    for loss in (None, own_loss):
        task = HybridRetrieval(0.5, loss=loss, correct_positive=True)
        np.testing.assert_allclose(task(QUERIES, CANDIDATES, **options), total, rtol=1e-5)
    with pytest.raises(ValueError, match="positive_query needs the positive_embeddings"):
        HybridRetrieval()(QUERIES, CANDIDATES, positive_query=tf.constant(POSITIVE_QUERY))


@pytest.mark.parametrize(("scale", "expected"), [(1e4, 0.0), (-1e4, 2e4)])
def test_far_logits_and_rows_without_a_column_stay_finite(scale: float, expected: float) -> None:
    """Two positives, of a row with one column whose logit is the opposite, and of one without."""
    query = tf.Variable([[1.0], [0.0]])
    with tf.GradientTape() as tape:
        loss = HybridRetrieval()(
            query,
            tf.constant([[-scale]]),
            positive_embeddings=tf.constant([[scale], [scale]]),
            positive_query=tf.constant([0, 1]),
            score_mask=tf.constant([[True], [False]]),
        )
    assert loss.numpy() == pytest.approx(expected)
    gradient = tf.convert_to_tensor(tape.gradient(loss, query)).numpy()
    np.testing.assert_allclose(gradient, [[-2 * scale if expected else 0.0], [0.0]])
