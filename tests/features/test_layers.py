"""Embedding of encoded features."""

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features.layers import CodeEmbedding, FlaggedNumbers, weighted_mean


def test_padding_does_not_enter_the_mean() -> None:
    layer = CodeEmbedding("genres", 4, 4)
    short, long = layer(tf.constant([[2, 0, 0]])), layer(tf.constant([[2, 2, 2]]))
    np.testing.assert_allclose(short, long, rtol=1e-6)
    np.testing.assert_array_equal(layer(tf.constant([[0, 0, 0]])), np.zeros((1, 4)))


def test_numeric_embedding_flags_missing_values() -> None:
    layer = FlaggedNumbers("x")
    assert layer(tf.constant([0.5, np.nan])).numpy().tolist() == [[0.5, 0.0], [0.0, 1.0]]


def test_vectors_are_mapped_linearly_and_missing_ones_to_zeros() -> None:
    layer = FlaggedNumbers("v", 2)
    values = np.array([[3.0, 0.0, 4.0], [np.nan] * 3, [1.0, 1.0, 1.0]], np.float32)
    with tf.GradientTape() as tape:
        out = layer(tf.constant(values))
        loss = tf.reduce_sum(out**2)
    (kernel,) = layer.trainable_variables
    np.testing.assert_allclose(out.numpy()[[0, 2], :2], values[[0, 2]] @ kernel.numpy(), rtol=1e-5)
    assert out[:, 2].numpy().tolist() == [0, 1, 0]
    assert out[1].numpy().tolist() == [0, 0, 1]
    assert np.isfinite(tape.gradient(loss, kernel).numpy()).all()


def test_weighted_mean_matches_a_loop() -> None:
    rng = np.random.default_rng(0)
    vectors, weights = rng.normal(size=(3, 4, 2)), rng.random((3, 4))
    weights[1] = 0
    expected = [
        np.average(v, axis=0, weights=w) if w.any() else np.zeros(2)
        for v, w in zip(vectors, weights, strict=True)
    ]
    np.testing.assert_allclose(weighted_mean(tf.constant(vectors), tf.constant(weights)), expected)
