"""The text that describes a user's own kinds and towers: it differs wherever they differ."""

import functools
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfrs_pipeline import ConfigError, InBatch, Popularity, SamplingFrame, TwoTowerSettings
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


def test_another_kind_or_tower_is_another_text() -> None:
    frame = SamplingFrame.of_counts([0, 3, 1, 2], 4)

    def told(num: int, tower: object) -> str:
        return str(describe_own([InBatch(), Top(num)], {"query_tower": tower}, frame))

    towers: list[Any] = [None, made, lambda corpus: made(2, corpus)]
    towers.append(lambda corpus: made(3, corpus))  # A lambda's source is its line.
    towers += [Wide(2), *(functools.partial(made, width) for width in (2, 3))]
    towers += [Maker().one, Maker().other, Wide, Maker]
    towers += [tf.keras.layers.Dense(2), tf.keras.layers.Dense(2, "relu"), stacked(2), stacked(3)]
    texts = [told(num, tower) for num in (1, 2) for tower in towers]
    assert len(set(texts)) == len(texts)
    # An equal object, as another process would make it, has the same text.
    assert told(1, Wide(2)) == texts[4]
    assert told(2, stacked(3)) == texts[-1]
    assert told(2, functools.partial(made, 2)) == texts[len(towers) + 5]
    # A subclass is the user's own code, which settings do not describe.
    assert "Flat " in str(describe_own([Flat(2)], {"query_tower": None}, frame))
    model = TwoTower(negatives=["popularity", Flat(2)])
    assert model.settings.negatives == (Popularity(),)
    assert model.negatives == (Popularity(), Flat(2))
    with pytest.raises(ConfigError, match=r"got Flat\(.*is a subclass.*TwoTower\(negatives="):
        TwoTowerSettings(negatives=(Flat(2),))
    nothing = describe_own([InBatch()], {"query_tower": None}, frame)
    assert nothing == {"own_negatives": [], "query_tower": None}
