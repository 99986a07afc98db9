"""Dropping and embedding of encoded features."""

import math
from typing import get_args

import numpy as np
import pytest
import tensorflow as tf

from tfrs_pipeline.features.kinds import FeatureKind
from tfrs_pipeline.features.layers import FeatureEmbedding, FeatureSpec, weighted_mean
from tfrs_pipeline.model.feature_table import FeatureTable, drop_features

# Dropping features


SPECS = [
    FeatureSpec(kind, kind, size=5, num_values=3 if kind in ("text", "vector") else 1)
    for kind in get_args(FeatureKind)
]


def encoded_columns(num_rows: int) -> dict[str, tf.Tensor]:
    """A feature of each kind, none of whose rows is missing."""
    return {spec.name: tf.constant(np.nan_to_num(spec.empty(num_rows)) + 1) for spec in SPECS}


def is_empty(spec: FeatureSpec, values: tf.Tensor) -> np.ndarray:
    same = np.equal(values, spec.empty(1)) | (np.isnan(values) & np.isnan(spec.empty(1)))
    return same.reshape(len(same), -1).all(axis=1)


def test_features_are_dropped_whole_each_and_each_row_by_itself() -> None:
    num_rows, rate = 4000, 0.3
    features = encoded_columns(num_rows)
    seed = tf.constant([3, 4])
    dropped = drop_features(features, SPECS, rate, seed, tf.range(num_rows))
    masks = np.array([is_empty(spec, dropped[spec.name]) for spec in SPECS], float)
    for spec, mask in zip(SPECS, masks, strict=True):
        assert dropped[spec.name].dtype == features[spec.name].dtype
        kept = mask == 0
        np.testing.assert_array_equal(
            dropped[spec.name].numpy()[kept], features[spec.name].numpy()[kept]
        )
    deviation = math.sqrt(rate * (1 - rate) / num_rows)
    assert np.abs(masks.mean(axis=1) - rate).max() < 4.5 * deviation
    # Nor do they depend on one another, on the row before, or on what else the seed is used for.
    drawn = tf.random.stateless_uniform([num_rows, 1], seed).numpy()[:, 0] < rate
    others = np.corrcoef([*masks, *masks[:, np.r_[1:num_rows, 0]], drawn]) - np.eye(17)
    assert np.abs(others).max() < 5 / math.sqrt(num_rows)


def test_what_is_dropped_is_a_function_of_the_seed() -> None:
    features, rows = encoded_columns(200), tf.range(200)
    in_graph = tf.function(lambda seed: drop_features(features, SPECS, 0.5, seed, rows))
    first = drop_features(features, SPECS, 0.5, tf.constant([1, 2]), rows)
    tf.random.set_seed(9)
    for again in (drop_features(features, SPECS, 0.5, tf.constant([1, 2]), rows), in_graph([1, 2])):
        for spec in SPECS:
            np.testing.assert_array_equal(first[spec.name], again[spec.name])
    for other in ([1, 3], [2, 2], [2, 1]):
        changed = drop_features(features, SPECS, 0.5, tf.constant(other), rows)
        assert (first["categorical"].numpy() != changed["categorical"].numpy()).any()


def test_no_rate_drops_nothing_and_the_full_one_everything() -> None:
    features, rows = encoded_columns(5), tf.range(5)
    seed = tf.constant([0, 0])
    for specs, rate in ((SPECS, 0.0), ([], 1.0)):
        none = drop_features(features, specs, rate, seed, rows)
        assert all(none[name] is value for name, value in features.items())
    some = drop_features(features, SPECS[:1], 1.0, seed, rows)
    assert [is_empty(spec, some[spec.name]).all() for spec in SPECS] == [True, *[False] * 7]


# Layers


def test_padding_does_not_enter_the_mean() -> None:
    layer = FeatureEmbedding(FeatureSpec("genres", "multi_categorical", 4, 3), 4)
    short, long = layer(tf.constant([[2, 0, 0]])), layer(tf.constant([[2, 2, 2]]))
    np.testing.assert_allclose(short, long, rtol=1e-6)
    np.testing.assert_array_equal(layer(tf.constant([[0, 0, 0]])), np.zeros((1, 4)))


def test_numeric_embedding_flags_missing_values() -> None:
    layer = FeatureEmbedding(FeatureSpec("x", "numeric", 1, 1), 4)
    assert layer(tf.constant([0.5, np.nan])).numpy().tolist() == [[0.5, 0.0], [0.0, 1.0]]


def test_vectors_are_mapped_linearly_and_missing_ones_to_zeros() -> None:
    layer = FeatureEmbedding(FeatureSpec("v", "vector", 1, 3), 2)
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


def test_a_table_refuses_columns_that_do_not_fit() -> None:
    table = FeatureTable([FeatureSpec("gender", "categorical", 3, 1)], 3, name="users")
    with pytest.raises(ValueError, match=r"shape \(2,\).*\(3,\)"):
        table.assign({"gender": np.zeros(3, np.int32)})
    with pytest.raises(ValueError, match="'gender' is missing"):
        table.assign({})
