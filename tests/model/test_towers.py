"""Towers: masks, padding, the empty history."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfrs_pipeline.model.towers import HistoryEncoder, Tower


def make_encoder(**options: Any) -> HistoryEncoder:
    settings: dict[str, Any] = {
        "poolings": ("mean", "recency"),
        "recency_decay": 0.5,
        "dropout": 0.5,
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


def test_dropout_is_a_function_of_its_seed_and_of_training() -> None:
    encoder = make_encoder()
    rows = tf.constant(np.random.default_rng(0).integers(1, 10, (200, 8)))

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


def make_tower(**options: Any) -> Tower:
    settings: dict[str, Any] = {
        "embedding_dim": 4,
        "hidden_layers": (),
        "features": (),
        "feature_dim": 2,
        "normalize": True,
        "num_ids": 6,
    }
    return Tower("tower", **{**settings, **options})


def test_normalised_output_has_length_one() -> None:
    embedded = make_tower()(tf.range(7), {})
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, rtol=1e-5)
    free = make_tower(normalize=False)(tf.range(7), {})
    assert np.abs(np.linalg.norm(free, axis=1) - 1).max() > 0.1


def test_a_tower_needs_an_input() -> None:
    with pytest.raises(ValueError, match="has no input"):
        make_tower(num_ids=None)
