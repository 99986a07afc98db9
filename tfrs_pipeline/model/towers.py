"""The query tower and the candidate tower: an MLP over what the feature spec lists."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from tfrs_pipeline.model.features import FeatureEmbedding, FeatureSpec, weighted_mean


class HistoryEncoder(tf.keras.layers.Layer):
    """Pools the embeddings of a query's history.

    Each pooling gives one vector: "mean", or "recency", whose weights fall by `recency_decay` a
    step from the most recent item. A history with nothing left has a learned vector per pooling.

    Args:
        num_candidates: Candidates, row 0 not counted.
        dim: Embedding size.
        poolings: Any of "mean" and "recency".
        recency_decay: Weight of an item relative to the one after it, in (0, 1].
        dropout: Share of the items dropped at random in training.
    """

    def __init__(
        self,
        num_candidates: int,
        dim: int,
        *,
        poolings: Sequence[str],
        recency_decay: float,
        dropout: float,
    ) -> None:
        super().__init__(name="history")
        self._embedding = tf.keras.layers.Embedding(num_candidates + 1, dim, name="history_item")
        self._poolings = tuple(poolings)
        self._recency_decay = recency_decay
        self._dropout = dropout
        self._empty = self.add_weight(
            name="empty_history", shape=[len(self._poolings) * dim], initializer="uniform"
        )

    def call(
        self,
        history_rows: tf.Tensor,
        training: bool = False,
        dropout_seed: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Encodes histories.

        Args:
            history_rows: [B, N] int32, most recent first, 0 is padding.
            training: Whether items are dropped.
            dropout_seed: [2] int32 that the dropout is a function of; None draws anew each time.

        Returns:
            [B, num_poolings * dim] float32.
        """
        is_kept = history_rows > 0
        if training and self._dropout:
            shape = tf.shape(history_rows)
            drawn = (
                tf.random.uniform(shape)
                if dropout_seed is None
                else tf.random.stateless_uniform(shape, dropout_seed)
            )
            is_kept &= drawn >= self._dropout
        vectors = self._embedding(history_rows)
        kept = tf.cast(is_kept, tf.float32)
        steps_ago = tf.range(tf.shape(history_rows)[1], dtype=tf.float32)
        weights = {"mean": kept, "recency": kept * self._recency_decay**steps_ago}
        pooled = [weighted_mean(vectors, weights[pooling]) for pooling in self._poolings]
        is_empty = ~tf.reduce_any(is_kept, axis=1, keepdims=True)
        return tf.where(is_empty, self._empty, tf.concat(pooled, axis=1))


class Tower(tf.keras.layers.Layer):
    """Embeds rows and features, and maps them to the shared space with an MLP.

    Args:
        name: "query_tower" or "candidate_tower".
        embedding_dim: Size of the output, and of the embeddings of ids.
        hidden_layers: Sizes of the MLP's ReLU layers; the output layer comes on top.
        features: Features besides the id.
        feature_dim: Embedding size of a feature.
        normalize: Whether the output has length 1.
        num_ids: Rows of the id embedding besides row 0; None leaves the id out.
        history: History encoder, for the query tower.

    Raises:
        ValueError: If the tower would have no input.
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
        num_ids: int | None = None,
        history: HistoryEncoder | None = None,
    ) -> None:
        super().__init__(name=name)
        if num_ids is None and history is None and not features:
            raise ValueError(f"The {name} has no input: give it an id, a history or a feature.")
        self._id_embedding = (
            None
            if num_ids is None
            else tf.keras.layers.Embedding(num_ids + 1, embedding_dim, name="id")
        )
        self._history = history
        self._features = {spec.name: FeatureEmbedding(spec, feature_dim) for spec in features}
        self._hidden = [tf.keras.layers.Dense(size, "relu") for size in hidden_layers]
        self._output = tf.keras.layers.Dense(embedding_dim, name="output")
        self._normalize = normalize

    def call(
        self,
        rows: tf.Tensor,
        features: dict[str, tf.Tensor],
        history_rows: tf.Tensor | None = None,
        training: bool = False,
        dropout_seed: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Embeds queries or candidates.

        Args:
            rows: [n] int32, 0 is unknown.
            features: Encoded features by name.
            history_rows: [n, N] int32, for a tower with a history.
            training: Whether dropout is on.
            dropout_seed: [2] int32, for a tower with a history.

        Returns:
            [n, embedding_dim] float32, of length 1 if `normalize`.
        """
        parts = [embed(features[name]) for name, embed in self._features.items()]
        if self._id_embedding is not None:
            parts.append(self._id_embedding(rows))
        if self._history is not None:
            parts.append(self._history(history_rows, training=training, dropout_seed=dropout_seed))
        hidden = tf.concat(parts, axis=1)
        for layer in self._hidden:
            hidden = layer(hidden)
        output = self._output(hidden)
        return tf.math.l2_normalize(output, axis=1) if self._normalize else output
