"""Towers: what they read, how they join it, the row of the unknown, the bias."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfrs_pipeline.model.feature_layers import FeatureSpec
from tfrs_pipeline.model.towers import Tower


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


def test_a_sum_adds_up_what_the_tower_reads() -> None:
    features = [FeatureSpec("genre", "categorical", size=5, num_values=1)]
    tower = make_tower(features=features, combination="sum", normalize=False)
    both = tower(tf.constant([2, 3]), {"genre": tf.constant([1, 4])}).numpy()
    table = {v.shape[0]: v.numpy() for v in tower.trainable_variables if "embeddings" in v.name}
    (kernel,) = (v.numpy() for v in tower.trainable_variables if "kernel" in v.name)
    expected = table[7][[2, 3]] + table[5][[1, 4]] @ kernel
    np.testing.assert_allclose(both, expected, rtol=1e-5, atol=1e-6)


def test_unknown_rate_trains_row_zero_and_leaves_the_rest_alone() -> None:
    tower = make_tower(unknown_rate=0.25, normalize=False)
    rows = tf.constant(np.tile(np.arange(1, 7), 1000), tf.int32)
    known, unknown = tower(rows, {}).numpy(), tower(tf.zeros([1], tf.int32), {}).numpy()
    seed = tf.constant([5, 6])
    trained = tower(rows, {}, training=True, dropout_seed=seed).numpy()
    is_unknown = np.isclose(trained, unknown).all(axis=1)
    np.testing.assert_allclose(trained[~is_unknown], known[~is_unknown], rtol=1e-5)
    assert abs(is_unknown.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 6000)
    again = tower(rows, {}, training=True, dropout_seed=seed).numpy()
    np.testing.assert_array_equal(trained, again)


def test_feature_dropout_is_a_missing_feature_in_training_alone() -> None:
    spec = FeatureSpec("genre", "categorical", size=5, num_values=1)
    tower = make_tower(features=[spec], num_ids=None, feature_dropout=0.3, normalize=False)
    rows, genre = tf.zeros([4000], tf.int32), tf.fill([4000], 3)
    with_genre, without = (
        tower(rows[:1], {"genre": tf.constant([code])}).numpy() for code in (3, 0)
    )
    trained = tower(rows, {"genre": genre}, training=True, dropout_seed=tf.constant([1, 2])).numpy()
    is_dropped = np.isclose(trained, without).all(axis=1)
    np.testing.assert_allclose(trained[~is_dropped], np.repeat(with_genre, sum(~is_dropped), 0))
    assert abs(is_dropped.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4000)
    np.testing.assert_allclose(tower(rows[:9], {"genre": genre[:9]}), np.repeat(with_genre, 9, 0))


def test_an_unknown_id_has_the_bias_of_the_unknown() -> None:
    tower = make_tower(has_bias=True, unknown_rate=0.5)
    tower(tf.range(7), {})
    (bias,) = (v for v in tower.trainable_variables if v.shape == (7, 1))
    bias.assign(np.arange(7.0)[:, None] + 1)
    rows = tf.constant([3] * 200)
    trained = tower(rows, {}, training=True, dropout_seed=tf.constant([1, 2])).numpy()
    is_unknown = trained[:, -1] == 1
    assert set(trained[~is_unknown, -1]) == {4.0}
    assert 50 < is_unknown.sum() < 150
    unknown = tower(tf.constant([0]), {}).numpy()
    np.testing.assert_allclose(trained[is_unknown], np.repeat(unknown, sum(is_unknown), 0))


def test_a_bias_is_the_ids_and_begins_at_zero() -> None:
    tower = make_tower(has_bias=True)
    plain = make_tower()
    embedded = tower(tf.range(7), {}).numpy()
    assert embedded.shape == (7, plain(tf.range(7), {}).shape[1] + 1)
    np.testing.assert_array_equal(embedded[:, -1], np.zeros(7))
    with pytest.raises(ValueError, match="a bias is the id's"):
        make_tower(has_bias=True, num_ids=None, features=[FeatureSpec("x", "numeric", 1, 1)])
