"""Feature columns turned into arrays, and arrays into embedding inputs.

A column is encoded once, with NumPy, into int32 or float32 arrays; the layers see arrays only, so
that corpus features can be constants gathered by row in the graph.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.config import FeatureKind

_TOKEN = re.compile(r"\w+(?:'\w+)?", re.UNICODE)
MAX_VALUES = 16


@dataclass(frozen=True)
class Feature:
    """How one column is encoded.

    Args:
        name: Column name.
        kind: categorical, multi_categorical, text (a bag of lower-case word tokens) or numeric.
        vocabulary: Known values; value i is encoded as i + 1, 0 is unknown or missing.
        num_values: Longest list kept (multi_categorical and text).
        mean: Of a numeric column.
        scale: Standard deviation of a numeric column.
    """

    name: str
    kind: FeatureKind
    vocabulary: tuple[str, ...] = ()
    num_values: int = 1
    mean: float = 0.0
    scale: float = 1.0

    @classmethod
    def fit(
        cls,
        name: str,
        kind: FeatureKind,
        column: Sequence[Any],
        *,
        min_count: int = 1,
        max_values: int = MAX_VALUES,
    ) -> Feature:
        """Learns the encoding of a column.

        Args:
            name: Column name.
            kind: Feature kind.
            column: One entry a row: a value, a list of values (multi_categorical), or None.
            min_count: Values of fewer rows are unknown.
            max_values: Longest list to keep.
        """
        if kind == "numeric":
            numbers = np.asarray([np.nan if v is None else v for v in column], np.float64)
            known = numbers[np.isfinite(numbers)]
            if len(known) == 0:
                return cls(name, kind)
            return cls(name, kind, mean=float(known.mean()), scale=float(known.std()) or 1.0)
        rows = [_values(kind, value) for value in column]
        counts = Counter(value for row in rows for value in set(row))
        vocabulary = tuple(sorted(v for v, count in counts.items() if count >= min_count))
        longest = max((len(row) for row in rows), default=1)
        return cls(name, kind, vocabulary, num_values=max(1, min(longest, max_values)))

    def encode(self, column: Sequence[Any]) -> np.ndarray:
        """Encodes a column.

        Args:
            column: As in `fit`; unknown values are fine.

        Returns:
            [n] int32 (categorical), [n, num_values] int32 padded with 0 (multi_categorical, text)
            or [n] float32, standardised, NaN where missing (numeric).
        """
        if self.kind == "numeric":
            numbers = np.asarray([np.nan if v is None else v for v in column], np.float64)
            return ((numbers - self.mean) / self.scale).astype(np.float32)
        index = {value: i + 1 for i, value in enumerate(self.vocabulary)}
        codes = np.zeros((len(column), self.num_values), np.int32)
        for i, value in enumerate(column):
            known = [index.get(v, 0) for v in _values(self.kind, value)][: self.num_values]
            codes[i, : len(known)] = known
        return codes[:, 0] if self.kind == "categorical" else codes

    @property
    def spec(self) -> FeatureSpec:
        """What a layer needs to know of the feature."""
        return FeatureSpec(self.name, self.kind, len(self.vocabulary) + 1, self.num_values)


@dataclass(frozen=True)
class FeatureSpec:
    """Shape of an encoded feature: `size` codes, 0 included, and `num_values` per row."""

    name: str
    kind: FeatureKind
    size: int
    num_values: int

    def empty(self, num_rows: int) -> np.ndarray:
        """Returns the encoding of `num_rows` missing values."""
        if self.kind == "numeric":
            return np.full(num_rows, np.nan, np.float32)
        shape = (num_rows,) if self.kind == "categorical" else (num_rows, self.num_values)
        return np.zeros(shape, np.int32)


def _values(kind: FeatureKind, value: Any) -> list[str]:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return []
    if kind == "text":
        return _TOKEN.findall(str(value).lower())
    if kind == "multi_categorical":
        values: Iterable[Any] = [value] if isinstance(value, str) else value
        return [str(v) for v in values if v is not None]
    return [str(value)]


class FeatureTable(tf.keras.layers.Layer):
    """Encoded features of every row, constant in the model and gathered by row.

    Args:
        specs: The features.
        num_rows: Rows, row 0 "unknown" included.
    """

    def __init__(self, specs: Sequence[FeatureSpec], num_rows: int, name: str) -> None:
        super().__init__(name=name, trainable=False)
        self._columns = {
            spec.name: self.add_weight(
                name=spec.name,
                shape=spec.empty(num_rows).shape,
                dtype=tf.float32 if spec.kind == "numeric" else tf.int32,
                initializer=tf.constant_initializer(spec.empty(1).ravel()[0]),
                trainable=False,
            )
            for spec in specs
        }

    def assign(self, columns: dict[str, np.ndarray]) -> None:
        """Sets the features.

        Args:
            columns: Per feature, the encoded rows 1, 2, ...; row 0 stays "missing".

        Raises:
            ValueError: If a feature is missing or has the wrong shape.
        """
        for name, variable in self._columns.items():
            if name not in columns:
                raise ValueError(f"Feature '{name}' is missing. Received: {sorted(columns)}")
            expected = (variable.shape[0] - 1, *variable.shape[1:])
            if columns[name].shape != expected:
                raise ValueError(
                    f"Feature '{name}' must have shape {expected}. Received: {columns[name].shape}"
                )
            first = variable[:1].numpy()
            variable.assign(np.concatenate([first, columns[name]]))

    def call(self, rows: tf.Tensor) -> dict[str, tf.Tensor]:
        """Gathers the features of `rows`, [n] int32."""
        return {name: tf.gather(column, rows) for name, column in self._columns.items()}


class FeatureEmbedding(tf.keras.layers.Layer):
    """Embeds one encoded feature.

    Categorical: an embedding, code 0 included. Multi-valued and text: the mean of the embeddings
    of the codes other than 0, the zero vector where there is none. Numeric: the value and whether
    it is missing.

    Args:
        spec: The feature.
        dim: Embedding size (not used by numeric features).
    """

    def __init__(self, spec: FeatureSpec, dim: int) -> None:
        super().__init__(name=f"{spec.name}_embedding")
        self._kind = spec.kind
        if spec.kind != "numeric":
            self._embedding = tf.keras.layers.Embedding(spec.size, dim, name=spec.name)

    def call(self, values: tf.Tensor) -> tf.Tensor:
        """Embeds `values`, [n] or [n, num_values]; returns [n, dim] ([n, 2] if numeric)."""
        if self._kind == "numeric":
            is_missing = tf.math.is_nan(values)
            filled = tf.where(is_missing, tf.zeros_like(values), values)
            return tf.stack([filled, tf.cast(is_missing, tf.float32)], axis=1)
        embedded = self._embedding(values)
        if self._kind == "categorical":
            return embedded
        return weighted_mean(embedded, tf.cast(values > 0, tf.float32))


def weighted_mean(vectors: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Computes the weighted mean over the second axis, zero where no weight is positive.

    Args:
        vectors: [n, m, d].
        weights: [n, m], 0 or more.

    Returns:
        [n, d].
    """
    total = tf.reduce_sum(weights, axis=1, keepdims=True)
    return tf.math.divide_no_nan(tf.einsum("nmd,nm->nd", vectors, weights), total)
