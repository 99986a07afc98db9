"""Layers that embed encoded features."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features.kinds import FeatureKind

_NUMBERS: tuple[FeatureKind, ...] = ("numeric", "timestamp", "vector")  # Float32, NaN if missing.
_LISTS: tuple[FeatureKind, ...] = ("multi_categorical", "text")


@dataclass(frozen=True)
class FeatureSpec:
    """Shape of an encoded feature: `size` codes, 0 included, and `num_values` per row."""

    name: str
    kind: FeatureKind
    size: int
    num_values: int

    def empty(self, num_rows: int) -> np.ndarray:
        """Returns the encoding of `num_rows` missing values."""
        has_list = self.kind in _LISTS or self.kind in ("timestamp", "vector")
        shape = (num_rows, self.num_values) if has_list else (num_rows,)
        if self.kind in _NUMBERS:
            return np.full(shape, np.nan, np.float32)
        return np.zeros(shape, np.int32)


def layer_name(column: str) -> str:
    """Returns a name that TensorFlow takes for a layer: the column's, where it can be.

    Example:
        >>> layer_name("year"), layer_name("release date")
        ('year', 'xrelease_date_9cebf073')
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", column)
    if name == column and name[:1].isalnum():
        return name
    return f"x{name}_{zlib.crc32(column.encode()):08x}"


class FeatureEmbedding(tf.keras.layers.Layer):
    """Embeds one encoded feature, in `dim` numbers if it is no numeric or timestamp one.

    Categorical, hashed and bucketized: an embedding, code 0 included. Multi-valued and text: the
    mean of the embeddings of the codes other than 0, the zero vector where there is none. Numeric
    and timestamp: the values. Vector: a trained linear map of it. These three have zeros where the
    value is missing, and say in one more column whether it is.
    """

    def __init__(self, spec: FeatureSpec, dim: int) -> None:
        name = layer_name(spec.name)
        super().__init__(name=f"{name}_embedding")
        self._kind = spec.kind
        if spec.kind == "vector":
            # Without a bias, so that a missing vector is mapped to zeros.
            self._projection = tf.keras.layers.Dense(dim, use_bias=False, name=name)
        elif spec.kind not in _NUMBERS:
            self._embedding = tf.keras.layers.Embedding(spec.size, dim, name=name)

    @property
    def table(self) -> tf.Variable | None:
        """The table with a row a code; None if the feature is numbers."""
        return None if self._kind in _NUMBERS else self._embedding.embeddings

    def call(self, values: tf.Tensor) -> tf.Tensor:
        """Embeds [n] or [n, num_values] values, as `Feature.encode` returns them.

        They become [n, dim] float32; [n, dim + 1] if vector, [n, 2] if numeric, [n, 6] if
        timestamp.
        """
        if self._kind in _NUMBERS:
            return self._flagged(values[:, tf.newaxis] if self._kind == "numeric" else values)
        embedded = self._embedding(values)
        if self._kind in _LISTS:
            return weighted_mean(embedded, tf.cast(values > 0, tf.float32))
        return embedded

    def _flagged(self, values: tf.Tensor) -> tf.Tensor:
        """Fills missing rows with zeros, maps vectors, and appends whether the row was missing."""
        is_missing = tf.math.is_nan(values[:, :1])
        filled = tf.where(is_missing, tf.zeros_like(values), values)
        if self._kind == "vector":
            filled = self._projection(filled)
        return tf.concat([filled, tf.cast(is_missing, tf.float32)], axis=1)


def weighted_mean(vectors: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Computes the mean of [n, m, d] vectors by [n, m] weights: [n, d], 0 where all weights are."""
    total = tf.reduce_sum(weights, axis=1, keepdims=True)
    summed = tf.reduce_sum(vectors * weights[:, :, tf.newaxis], axis=1)
    return tf.math.divide_no_nan(summed, total)
