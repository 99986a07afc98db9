"""Histories: masks, padding, the empty history, and every position of a sequence at once."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfrs_pipeline.model.history import HistoryEncoder, SelfAttention

ALL = ("mean", "recency", "attention")


def make_encoder(**options: Any) -> HistoryEncoder:
    settings: dict[str, Any] = {
        "poolings": ("mean", "recency"),
        "recency_decay": 0.5,
        "dropout": 0.5,
        "max_length": 8,
        "attention_heads": 1,
    }
    return HistoryEncoder(9, 3, **{**settings, **options})


def embedding_table(encoder: HistoryEncoder) -> tf.Variable:
    encoder(tf.zeros([1, 1], tf.int32))
    return next(v for v in encoder.trainable_variables if v.shape == (10, 3))


def test_history_is_pooled_as_a_loop_would() -> None:
    encoder = make_encoder()
    pooled = encoder(tf.constant([[4, 2, 7, 0]])).numpy()[0]
    table = embedding_table(encoder).numpy()
    rows = table[[4, 2, 7]]
    np.testing.assert_allclose(pooled[:3], rows.mean(axis=0), rtol=1e-5)
    # The most recent item comes first and weighs most.
    np.testing.assert_allclose(pooled[3:], np.average(rows, axis=0, weights=[4, 2, 1]), rtol=1e-5)


def test_padding_changes_nothing() -> None:
    encoder = make_encoder()
    np.testing.assert_allclose(
        encoder(tf.constant([[4, 2, 0, 0, 0]])), encoder(tf.constant([[4, 2]])), rtol=1e-6
    )


def test_an_empty_history_has_a_vector_that_learns() -> None:
    encoder = make_encoder()
    with tf.GradientTape() as tape:
        pooled = encoder(tf.constant([[0, 0], [3, 0]]))
        loss = tf.reduce_sum(pooled[0])
    empty = next(v for v in encoder.trainable_variables if "empty_history" in v.name)
    np.testing.assert_array_equal(pooled[0], empty)
    assert (tape.gradient(loss, empty).numpy() == 1).all()


@pytest.mark.parametrize("poolings", [("mean", "recency"), ("attention",)])
def test_dropout_is_a_function_of_its_seed_and_of_training(poolings: tuple[str, ...]) -> None:
    encoder = make_encoder(poolings=poolings)
    rows = tf.constant(np.random.default_rng(0).integers(1, 10, (200, 8)), tf.int32)

    def encode(seed: list[int]) -> np.ndarray:
        return encoder(rows, training=True, dropout_seed=tf.constant(seed)).numpy()

    np.testing.assert_array_equal(encode([1, 2]), encode([1, 2]))
    assert (encode([1, 2]) != encode([1, 3])).any()
    assert (encode([1, 2]) != encoder(rows).numpy()).any()
    np.testing.assert_array_equal(encoder(rows, training=False), encoder(rows))


def test_dropout_drops_its_share() -> None:
    encoder = make_encoder(poolings=("mean",), dropout=0.3)
    empty = encoder(tf.zeros([1, 3], tf.int32)).numpy()
    # Row i's embedding is its indicator: a pooled vector shows what was kept.
    embedding_table(encoder).assign(np.eye(10, 3, k=-1))
    rows = tf.constant(np.tile([1, 2, 3], (4000, 1)))
    pooled = encoder(rows, training=True, dropout_seed=tf.constant([0, 1])).numpy()
    is_empty = (pooled == empty).all(axis=1)
    share = (pooled[~is_empty] > 0).sum() / rows.shape.num_elements()
    # 4 standard errors of 12,000 draws.
    assert abs(share - 0.7) < 4 * np.sqrt(0.7 * 0.3 / 12_000)
    assert abs(is_empty.mean() - 0.3**3) < 4 * np.sqrt(0.027 / 4000)


def random_sequences(lengths: list[int], width: int) -> np.ndarray:
    rows = np.random.default_rng(1).integers(1, 10, (len(lengths), width)).astype(np.int32)
    return np.where(np.arange(width) < np.array(lengths)[:, None], rows, 0)


@pytest.mark.parametrize("pooling", ALL)
def test_each_state_is_the_encoding_of_its_beginning(pooling: str) -> None:
    encoder = make_encoder(poolings=(pooling,))
    lengths = [8, 3, 0, 5]
    sequences = random_sequences(lengths, 8)
    states = encoder.states(tf.constant(sequences)).numpy()
    for sequence, length, of_sequence in zip(sequences, lengths, states, strict=True):
        for j in range(length + 1):
            latest_first = np.zeros((1, 8), np.int32)
            latest_first[0, :j] = sequence[:j][::-1]
            alone = encoder(tf.constant(latest_first)).numpy()[0]
            np.testing.assert_allclose(of_sequence[j], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ALL)
def test_a_state_does_not_know_what_comes_after(pooling: str) -> None:
    encoder = make_encoder(poolings=(pooling,))
    rows = random_sequences([8], 8)
    changed = rows.copy()
    changed[0, 5] = rows[0, 5] % 9 + 1
    before, after = (encoder.states(tf.constant(x)).numpy()[0] for x in (rows, changed))
    np.testing.assert_array_equal(before[:6], after[:6])
    assert (before[6:] != after[6:]).any(axis=1).all()


@pytest.mark.parametrize("pooling", ALL)
def test_states_drop_items_in_training_alone(pooling: str) -> None:
    encoder = make_encoder(poolings=(pooling,), attention_dropout=0.0, dropout=0.5)
    rows = tf.constant(random_sequences([8] * 50, 8))
    seed = tf.constant([3, 1])
    trained = encoder.states(rows, training=True, dropout_seed=seed).numpy()
    np.testing.assert_array_equal(
        trained, encoder.states(rows, training=True, dropout_seed=seed).numpy()
    )
    # A state after one item equals that of none, or its own: the item is dropped, or kept.
    whole = encoder.states(rows).numpy()
    is_kept = np.isclose(trained[:, 1], whole[:, 1], rtol=1e-4, atol=1e-5).all(axis=1)
    assert 0.2 < is_kept.mean() < 0.8
    if pooling != "attention":
        is_empty = np.isclose(trained[:, 1], whole[:, 0]).all(axis=1)
        assert (is_kept ^ is_empty).all()


def test_attention_is_that_of_a_loop() -> None:
    """One block and two heads, computed with NumPy from the layer's own weights."""
    layer = SelfAttention(4, max_length=5, num_blocks=1, num_heads=2, dropout=0.3)
    vectors = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    got = layer(tf.constant(vectors)).numpy()
    for variable in layer.trainable_variables:  # No zeros and ones that hide a missing term.
        variable.assign(variable + tf.random.stateless_normal(variable.shape, [1, 2], stddev=0.3))
    got = layer(tf.constant(vectors)).numpy()
    block = {name: [w.numpy() for w in part.weights] for name, part in layer._blocks[0].items()}

    def norm(x: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
        gamma, beta = weights
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * gamma + beta

    def dense(x: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
        return x @ weights[0] + weights[1]

    for sequence, expected in zip(vectors, got, strict=True):
        start = layer._start.numpy()[0]
        hidden = np.concatenate([start, sequence * 2.0]) + layer._positions.numpy()[:4]
        projected = dense(norm(hidden, block["attention_norm"]), block["query_key_value"])
        query, key, value = projected[:, :4], projected[:, 4:8], projected[:, 8:]
        attended = np.zeros((4, 4))
        for head in (slice(0, 2), slice(2, 4)):
            for j in range(4):
                weights = np.exp(key[: j + 1, head] @ query[j, head] / np.sqrt(2))
                attended[j, head] = weights / weights.sum() @ value[: j + 1, head]
        hidden = hidden + dense(attended, block["attended"])
        inner = np.maximum(dense(norm(hidden, block["mlp_norm"]), block["hidden"]), 0)
        hidden = hidden + dense(inner, block["output"])
        weights = [w.numpy() for w in layer._norm.weights]
        np.testing.assert_allclose(norm(hidden, weights), expected, rtol=1e-3, atol=1e-4)


def test_heads_must_divide_the_embedding() -> None:
    with pytest.raises(ValueError, match="must divide the embedding size 3"):
        make_encoder(poolings=("attention",), attention_heads=2)


def test_one_pass_drops_an_item_for_every_pooling_or_for_none() -> None:
    encoder = make_encoder(poolings=ALL, attention_dropout=0.0)
    rows = tf.constant([[0] * 8, *([[4] + [0] * 7] * 99)])
    pooled = encoder(rows, training=True, dropout_seed=tf.constant([1, 5])).numpy()
    is_same = [
        np.isclose(pooled[1:, part], pooled[:1, part]).all(axis=1)
        for part in (slice(0, 3), slice(3, 6))
    ]
    whole = encoder(rows).numpy()[1:]
    attention_is_whole = np.isclose(pooled[1:, 6:], whole[:, 6:], atol=1e-5).all(axis=1)
    np.testing.assert_array_equal(is_same[0], is_same[1])
    np.testing.assert_array_equal(is_same[0], ~attention_is_whole)
    assert 20 < is_same[0].sum() < 80


def test_a_history_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="8 items at most"):
        make_encoder(poolings=("attention",)).states(tf.ones([1, 9], tf.int32))
