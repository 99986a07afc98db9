"""The text that describes a user's own kinds and towers: it differs wherever they differ."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfrs_pipeline import ConfigError, Popularity, SamplingFrame, TwoTowerSettings
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.model.own import describe_own
from tfrs_pipeline.model.two_tower import TwoTower


class Top:
    def __init__(self, num: int) -> None:
        self.num = num

    def draw(self, frame: SamplingFrame, positive_rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return tf.range(1, self.num + 1)

    def expected_count(self, frame: SamplingFrame) -> np.ndarray:
        rows = np.arange(frame.num_candidates + 1)
        return ((rows > 0) & (rows <= self.num)).astype(float)


class Flat(Popularity):
    """A subclass of a built-in kind that overrides its draw."""

    def draw(self, frame: SamplingFrame, positive_rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return tf.ones([self.num], tf.int32)

    def expected_count(self, frame: SamplingFrame) -> np.ndarray:
        return np.eye(frame.num_candidates + 1)[1] * self.num


class Wide(tf.keras.layers.Layer):
    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table = tf.keras.layers.Embedding(3, width)


def made(width: int, corpus: Corpus) -> tf.keras.layers.Layer:
    return tf.keras.layers.Dense(width)


class Maker:
    def one(self, corpus: Corpus) -> tf.keras.layers.Layer:
        return tf.keras.layers.Dense(2)

    def other(self, corpus: Corpus) -> tf.keras.layers.Layer:
        return tf.keras.layers.Dense(3)


def stacked(width: int) -> tf.keras.layers.Layer:
    """Returns layers whose automatic names Keras numbers, so that they differ between calls."""
    return tf.keras.Sequential([tf.keras.layers.Dense(width)])


def test_another_part_is_another_text() -> None:
    """Names and plain settings are compared, and an equal object has the same text."""
    parts: list[Callable[[], Any]] = [
        lambda: None,
        lambda: made,
        lambda: Maker().one,
        lambda: Maker().other,
        lambda: Wide,
        lambda: Wide(2),
        lambda: functools.partial(made, 2),
        lambda: functools.partial(made, 3),
        lambda: tf.keras.layers.Dense(2),
        lambda: tf.keras.layers.Dense(2, "relu"),
        lambda: stacked(2),
        lambda: stacked(3),
        lambda: Top(1),
        lambda: Top(2),
        lambda: Flat(2),
    ]
    texts = [[describe_own(make()) for make in parts] for _ in range(2)]
    assert texts[0] == texts[1]
    assert len({*texts[0]}) == len(parts)


def test_a_subclass_of_a_kind_is_the_users_own() -> None:
    """Settings cannot describe it."""
    model = TwoTower(negatives=["popularity", Flat(2)])
    assert model.settings.negatives == (Popularity(),)
    assert model.negatives == (Popularity(), Flat(2))
    with pytest.raises(ConfigError, match=r"got Flat\(.*is a subclass.*TwoTower\(negatives="):
        TwoTowerSettings(negatives=(Flat(2),))
