"""Encoded features as constants of a model, and their dropout in training."""

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.layers import layer_name
from tfrs_pipeline.model.randomness import Stream, fold, uniform_of_rows


class FeatureTable(tf.keras.layers.Layer):
    """Encoded features of every row, including row 0 ("unknown"), as constants of the model."""

    def __init__(self, features: Sequence[Feature], num_rows: int, name: str) -> None:
        super().__init__(name=name, trainable=False)
        self._columns = {}
        for feature in features:
            missing = feature.missing
            self._columns[feature.name] = self.add_weight(
                name=layer_name(feature.name),
                shape=(num_rows, *missing.shape[1:]),
                dtype=tf.as_dtype(missing.dtype),
                initializer=tf.constant_initializer(missing.flat[0]),
                trainable=False,
            )

    @property
    def names(self) -> frozenset[str]:
        """Names of the features."""
        return frozenset(self._columns)

    def assign(self, columns: Mapping[str, np.ndarray]) -> None:
        """Sets the encoded rows 1, 2, ... of each feature; row 0 stays missing."""
        for name, variable in self._columns.items():
            variable.assign(np.concatenate([variable[:1], columns[name]]))

    def call(self, rows: tf.Tensor) -> dict[str, tf.Tensor]:
        """Gathers the features of `rows`, [n] int32."""
        return {name: tf.gather(column, rows) for name, column in self._columns.items()}


def drop_features(
    encoded: Mapping[str, tf.Tensor],
    features: Sequence[Feature],
    rate: float,
    seed: tf.Tensor,
    rows: tf.Tensor,
) -> dict[str, tf.Tensor]:
    """Sets encoded features to missing at random, independently by feature and row, at a `rate`.

    So a model does not rely on a single feature, and learns what a missing one means. `seed` is [2]
    int32; `rows`, [n] int32, are the rows that have these features.
    """
    dropped = dict(encoded)
    if not features or not rate:
        return dropped
    own_seed = fold(seed, Stream.FEATURES)
    for i, feature in enumerate(features):
        is_dropped = uniform_of_rows(rows, fold(own_seed, i)) < rate
        if feature.missing.ndim == 2:
            is_dropped = is_dropped[:, tf.newaxis]
        dropped[feature.name] = tf.where(is_dropped, feature.missing, encoded[feature.name])
    return dropped
