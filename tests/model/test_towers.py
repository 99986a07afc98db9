"""Towers: what they read, how they combine it, the row of unknown ids, the bias."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfrs_pipeline.features.categorical import Categorical
from tfrs_pipeline.model.history import HistoryEncoder
from tfrs_pipeline.model.settings import TwoTowerSettings
from tfrs_pipeline.model.towers import Tower

GENRE = Categorical("genre", tuple("abcd"))
SEED = tf.constant([5, 6])


def make_tower(**options: Any) -> Tower:
    reads: dict[str, Any] = {"features": (), "num_ids": 6, "bias": None, "history": None}
    reads |= {name: options.pop(name) for name in reads.keys() & options.keys()}
    small = {"dim": 4, "feature_dim": 2, "normalize": False, "id_dropout": 0.0}
    return Tower("tower", TwoTowerSettings(**{**small, **options}), **reads)


def embed(
    tower: Tower, rows: Any, genre: Any = None, training: bool = False, seed: tf.Tensor = SEED
) -> np.ndarray:
    inputs = {"row": tf.constant(rows, tf.int32), "features": {}, "dropout_seed": seed}
    if genre is not None:
        inputs["features"] = {"genre": tf.constant(genre)}
    return tower(inputs, training=training).numpy()


def test_normalised_output_has_length_one() -> None:
    normalised, free = (embed(make_tower(normalize=x), range(7)) for x in (True, False))
    np.testing.assert_allclose(np.linalg.norm(normalised, axis=1), 1, rtol=1e-5)
    assert np.abs(np.linalg.norm(free, axis=1) - 1).max() > 0.1


def test_a_sum_adds_up_what_the_tower_reads() -> None:
    tower = make_tower(features=[GENRE])
    both = embed(tower, [2, 3], [1, 4])
    table = {v.shape[0]: v.numpy() for v in tower.trainable_variables if "embeddings" in v.name}
    (kernel,) = (v.numpy() for v in tower.trainable_variables if "kernel" in v.name)
    expected = table[7][[2, 3]] + table[5][[1, 4]] @ kernel
    np.testing.assert_allclose(both, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["id", "history"])
def test_a_feature_called_as_another_input_is_read_beside_it(name: str) -> None:
    settings = TwoTowerSettings(dim=4, history_pooling=("mean", "recency"), history_dropout=0)
    history = HistoryEncoder(6, settings)
    spec = Categorical(name, tuple("abcd"))
    tower = make_tower(num_ids=6, features=[spec], history=history)

    def embedded(row: int, code: int, item: int) -> np.ndarray:
        inputs = {"row": tf.constant([row]), "features": {name: tf.constant([code])}}
        output = tower(inputs | {"history_rows": tf.constant([[item, 0]])})
        return np.asarray(output)

    first = embedded(1, 1, 1)
    for changed in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        assert np.abs(embedded(*changed) - first).max() > 1e-4, changed


def test_id_dropout_trains_the_unknown_id_and_its_bias_and_leaves_the_rest_alone() -> None:
    tower = make_tower(id_dropout=0.25, bias="id", num_ids=6000)
    rows = np.arange(1, 6001)
    begin = embed(tower, rows)
    assert begin.shape == (6000, 5)
    np.testing.assert_array_equal(begin[:, -1], np.zeros(6000))
    (bias,) = (v for v in tower.trainable_variables if v.shape == (6001, 1))
    bias.assign(np.arange(6001.0)[:, None] + 1)
    known, unknown = embed(tower, rows), embed(tower, [0])
    trained = embed(tower, rows, training=True)
    is_unknown = np.isclose(trained, unknown).all(axis=1)
    np.testing.assert_allclose(trained[~is_unknown], known[~is_unknown], rtol=1e-5)
    assert abs(is_unknown.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 6000)
    assert (embed(tower, rows, training=True, seed=SEED + 1) != trained).any()
    # What is dropped depends on the row, not on its place in the batch.
    np.testing.assert_array_equal(embed(tower, rows[::-1][:50], training=True), trained[::-1][:50])


def test_feature_dropout_is_a_missing_feature_in_training_alone() -> None:
    tower = make_tower(features=[GENRE], num_ids=None, feature_dropout=0.3)
    rows, genre = np.arange(4000), np.full(4000, 3)
    with_genre, without = (embed(tower, [0], [code]) for code in (3, 0))
    trained = embed(tower, rows, genre, training=True)
    is_dropped = np.isclose(trained, without).all(axis=1)
    np.testing.assert_allclose(trained[~is_dropped], np.repeat(with_genre, sum(~is_dropped), 0))
    assert abs(is_dropped.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4000)
    np.testing.assert_allclose(embed(tower, rows[:9], genre[:9]), np.repeat(with_genre, 9, 0))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="has no input"):
        make_tower(num_ids=None)
