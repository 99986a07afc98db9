"""Embedding of encoded features."""

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features.layers import CodeEmbedding, FlaggedNumbers


def test_a_list_is_the_mean_of_its_values_without_padding() -> None:
    layer = CodeEmbedding("genres", 4, 5)
    embedded = layer(tf.constant([[2, 0, 0], [3, 1, 3], [0, 0, 0]]))
    table = layer.table.numpy()
    expected = [table[2], (2 * table[3] + table[1]) / 3, np.zeros(5)]
    np.testing.assert_allclose(embedded, expected, rtol=1e-6)


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
