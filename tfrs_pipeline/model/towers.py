"""The query tower and the candidate tower: an MLP over what the feature spec lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import tensorflow as tf

from tfrs_pipeline.model.feature_layers import (
    FeatureEmbedding,
    FeatureSpec,
    drop_features,
    layer_name,
)
from tfrs_pipeline.model.history import HistoryEncoder
from tfrs_pipeline.model.randomness import Stream, fold, pass_seed

Combination = Literal["concat", "sum"]


class Tower(tf.keras.layers.Layer):
    """Embeds rows and features, and maps them to the shared space.

    The inputs, which are the id's embedding, each feature's and the history's vectors, are joined
    end to end ("concat") and mapped by an MLP whose last layer is linear; or each is brought to the
    size of the output and they are added up ("sum"), with an MLP on top only if it has hidden
    layers.

    Args:
        name: "query_tower" or "candidate_tower".
        embedding_dim: Size of the output, and of the embeddings of ids.
        hidden_layers: Sizes of the MLP's ReLU layers; a linear output layer comes on top.
        features: Features besides the id.
        feature_dim: Embedding size of a feature.
        normalize: Whether the output has length 1.
        feature_dropout: Share of the features that training takes for missing, row by row.
        combination: "concat" or "sum".
        num_ids: Rows of the id embedding besides row 0; None leaves the id out.
        unknown_rate: Share of the ids that training takes for unknown, so that row 0 is trained.
        has_bias: Whether each id has a number of its own besides, the last entry of its output.
        history: History encoder, for the query tower, whose vectors `call` is given.

    Raises:
        ValueError: If the tower would have no input, or a bias without an id.
    """

    def __init__(
        self,
        name: str,
        *,
        embedding_dim: int,
        hidden_layers: Sequence[int],
        features: Sequence[FeatureSpec],
        feature_dim: int,
        normalize: bool,
        feature_dropout: float = 0.0,
        combination: Combination = "concat",
        num_ids: int | None = None,
        unknown_rate: float = 0.0,
        has_bias: bool = False,
        history: HistoryEncoder | None = None,
    ) -> None:
        super().__init__(name=name)
        if num_ids is None and history is None and not features:
            raise ValueError(f"The {name} has no input: give it an id, a history or a feature.")
        if has_bias and num_ids is None:
            raise ValueError(f"The {name} has no id, and a bias is the id's.")
        self.id_embedding = (
            None
            if num_ids is None
            else tf.keras.layers.Embedding(num_ids + 1, embedding_dim, name="id")
        )
        self._bias = (
            tf.keras.layers.Embedding(num_ids + 1, 1, embeddings_initializer="zeros", name="bias")
            if has_bias and num_ids is not None
            else None
        )
        self._unknown_rate = unknown_rate
        self.history = history
        self._specs = tuple(features)
        self._feature_dropout = feature_dropout
        self._features = {spec.name: FeatureEmbedding(spec, feature_dim) for spec in features}
        self._is_sum = combination == "sum"
        # A history of one vector has the size of the output.
        projected = [*self._features, *(["history"] if history and history.num_vectors > 1 else [])]
        self._projections = {
            name: tf.keras.layers.Dense(embedding_dim, name=f"{layer_name(name)}_projection")
            for name in (projected if self._is_sum else [])
        }
        self._hidden = [tf.keras.layers.Dense(size, "relu") for size in hidden_layers]
        self._output = (
            None
            if self._is_sum and not hidden_layers
            else tf.keras.layers.Dense(embedding_dim, name="output")
        )
        self._normalize = normalize

    def call(
        self,
        rows: tf.Tensor,
        features: dict[str, tf.Tensor],
        history: tf.Tensor | None = None,
        training: bool = False,
        dropout_seed: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Embeds queries or candidates.

        Args:
            rows: [n] int32, 0 is unknown.
            features: Encoded features by name.
            history: [n, any] float32, the encoded histories, for a tower with a history.
            training: Whether ids are taken for unknown, and features for missing.
            dropout_seed: [2] int32 that this is a function of; None draws anew each time.

        Returns:
            [n, embedding_dim] float32, of length 1 if `normalize`; with a bias, one entry more.
        """
        seed = pass_seed(training, dropout_seed)
        if seed is not None and self._feature_dropout:
            features = drop_features(features, self._specs, self._feature_dropout, seed)
        parts = {name: embed(features[name]) for name, embed in self._features.items()}
        if self.history is not None:
            parts["history"] = history
        for name, project in self._projections.items():
            parts[name] = project(parts[name])
        known = self._known(rows, seed)
        if self.id_embedding is not None:
            parts["id"] = self.id_embedding(known)
        joined = list(parts.values())
        hidden = tf.add_n(joined) if self._is_sum else tf.concat(joined, axis=1)
        for layer in self._hidden:
            hidden = layer(hidden)
        output = hidden if self._output is None else self._output(hidden)
        if self._normalize:
            output = tf.math.l2_normalize(output, axis=1)
        # That of the unknown where the id is taken for unknown: it is trained with row 0.
        return output if self._bias is None else tf.concat([output, self._bias(known)], axis=1)

    def _known(self, rows: tf.Tensor, seed: tf.Tensor | None) -> tf.Tensor:
        if seed is None or not self._unknown_rate:
            return rows
        drawn = tf.random.stateless_uniform(tf.shape(rows), fold(seed, Stream.UNKNOWN_IDS))
        return tf.where(drawn < self._unknown_rate, 0, rows)
