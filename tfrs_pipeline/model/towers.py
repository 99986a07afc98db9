"""The query tower and the candidate tower: an MLP over ids, features and the history."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.layers import layer_name
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.model.history import HistoryEncoder
from tfrs_pipeline.model.randomness import Dropout, Stream, fold, pass_seed, uniform_of_rows
from tfrs_pipeline.model.settings import TwoTowerSettings


class FeatureTable(tf.keras.layers.Layer):
    """Encoded features of a side's rows, as constants of the model; in row 0 all are missing."""

    def __init__(self, corpus: Corpus, side: Literal["query", "candidate"]) -> None:
        super().__init__(name=f"{side}_features", trainable=False)
        num_rows, columns = len(getattr(corpus, f"{side}_ids")) + 1, f"{side}_columns"
        self._columns = {}
        for feature in getattr(corpus, f"{side}_features"):
            # Not constants of the graph, which must not exceed 2 GB.
            missing = feature.missing
            self._columns[feature.name] = variable = self.add_weight(
                name=layer_name(feature.name),
                shape=(num_rows, *missing.shape[1:]),
                dtype=tf.as_dtype(missing.dtype),
                initializer="zeros",
                trainable=False,
            )
            variable.assign(np.concatenate([missing, getattr(corpus, columns)[feature.name]]))
        self.names = frozenset(self._columns)

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
    feature_seed = fold(seed, Stream.FEATURES)
    for i, feature in enumerate(features):
        # Each feature has draws of its own; a slice of a batch has those of the whole.
        is_dropped = uniform_of_rows(rows, fold(feature_seed, i)) < rate
        if feature.missing.ndim == 2:
            is_dropped = is_dropped[:, tf.newaxis]
        dropped[feature.name] = tf.where(is_dropped, feature.missing, encoded[feature.name])
    return dropped


# Inputs besides the features; names of features do not begin with an underscore.
_HISTORY, _ID = "_history", "_id"


class Tower(tf.keras.layers.Layer):
    """Embeds rows and features, and maps them to the shared space.

    The inputs are the id's embedding, the features' vectors and the history's. Features,
    and a history of several vectors, are projected to the size of the output; all are added up. If
    there are hidden layers, an MLP follows, whose last layer is linear.

    There is an embedding of `num_ids` ids and row 0; none if `num_ids` is None. Untrained ids,
    False in `are_trained` [num_ids + 1], use row 0's embedding, which ID dropout trains.

    With the `bias` "id", an output's last entry is a learned number of the id. If the correction is
    "recent", the id's `shift` is added to it outside training. With "ones", for the other tower,
    the last entry is 1.
    """

    def __init__(
        self,
        name: str,
        settings: TwoTowerSettings,
        *,
        features: Sequence[Feature] = (),
        num_ids: int | None = None,
        are_trained: np.ndarray | None = None,
        bias: Literal["id", "ones"] | None = None,
        history: HistoryEncoder | None = None,
    ) -> None:
        super().__init__(name=name)
        if num_ids is None and history is None and not features:
            raise ValueError(f"The {name} has no input: give it an id, a history or a feature.")
        dim = settings.dim
        self.id_embedding = None
        if num_ids is not None:
            self.id_embedding = tf.keras.layers.Embedding(num_ids + 1, dim, name="id")
        self._appends_one = bias == "ones"
        self._bias = self.shift = None
        if bias == "id" and num_ids is not None:
            self._bias = tf.keras.layers.Embedding(num_ids + 1, 1, "zeros", name="bias")
            if settings.correction == "recent":
                self.shift = self.add_weight(
                    "shift", [num_ids + 1], initializer="zeros", trainable=False
                )
        self._id_rows = None
        if are_trained is not None:
            self._id_rows = tf.constant(np.arange(len(are_trained)) * are_trained, tf.int32)
        self._id_dropout = settings.id_dropout
        self.history = history
        self._droppable = tuple(features)
        self._feature_dropout = settings.feature_dropout
        self._features = {feature.name: feature.layer(settings.feature_dim) for feature in features}
        # A history of one vector already has the size of the output.
        projected = [*self._features, *([_HISTORY] if history and history.num_vectors > 1 else [])]
        self._projections = {
            name: tf.keras.layers.Dense(
                dim,
                kernel_initializer=_averaging_kernel if name == _HISTORY else "glorot_uniform",
                name=f"{layer_name(name.removeprefix('_'))}_projection",
            )
            for name in projected
        }
        self._hidden = [tf.keras.layers.Dense(size, "relu") for size in settings.hidden_layers]
        self._output = tf.keras.layers.Dense(dim, name="output") if self._hidden else None
        self._normalize = settings.normalize

    def call(self, inputs: Mapping[str, Any], training: bool = False) -> tf.Tensor:
        """Embeds queries or candidates: [n, dim] float32; with a bias, one entry more.

        See `TwoTowerNetwork` for the inputs; without a `dropout_seed`, training draws a new one.
        """
        seed = pass_seed(training, inputs.get("dropout_seed"))
        features = inputs["features"]
        if seed is not None and self._feature_dropout:
            features = drop_features(
                features, self._droppable, self._feature_dropout, seed, inputs["row"]
            )
        parts = self._embedded(features)
        if self.history is not None:
            dropout = None if seed is None else Dropout(seed, inputs.get("dropout_slice"))
            if "sequence_rows" in inputs:  # Encoded once, for the states of all its places.
                times = inputs.get("sequence_times")
                states = self.history.states(inputs["sequence_rows"], times, dropout)
                states = tf.reshape(states, [-1, states.shape[-1]])
                parts[_HISTORY] = tf.gather(states, inputs["state"])
            else:
                times = inputs.get("history_times")
                parts[_HISTORY] = self.history(inputs["history_rows"], times, dropout)
        rows = inputs["row"]
        if self._id_rows is not None:
            rows = tf.gather(self._id_rows, rows)
        if seed is not None and self._id_dropout:
            drawn = uniform_of_rows(rows, fold(seed, Stream.UNKNOWN_IDS))
            rows = tf.where(drawn < self._id_dropout, 0, rows)
        # Only the id is dropped: features and history have been read by the item's own row above.
        output = self._joined(rows, parts)
        # The bias stays outside of the cosine: it is how popular an item is for everyone.
        if self._normalize:
            output = tf.math.l2_normalize(output, axis=1)
        if self._appends_one:
            return tf.concat([output, tf.ones_like(output[:, :1])], axis=1)
        if self._bias is None:
            return output
        # If the id is dropped, the bias of row 0 is trained.
        bias = self._bias(rows)
        if self.shift is not None and not training:
            bias += tf.gather(self.shift, rows)[:, tf.newaxis]
        return tf.concat([output, bias], axis=1)

    @property
    def has_item_bias(self) -> bool:
        """Whether the last entry of an output is a learned number of the id."""
        return self._bias is not None

    @property
    def id_tables(self) -> list[tf.Variable]:
        """The tower's own tables, with one row per id and row 0."""
        return [layer.embeddings for layer in (self.id_embedding, self._bias) if layer is not None]

    def feature_table(self, name: str) -> tf.Variable | None:
        """The table with a row per code of a feature; None if the feature has no codes."""
        return self._features[name].table

    def vectors(self, rows: tf.Tensor, features: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Embeds candidates as `call` does, without normalisation and dropout: [n, dim]."""
        if self._id_rows is not None:
            rows = tf.gather(self._id_rows, rows)
        return self._joined(rows, self._embedded(features))

    def _embedded(self, features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {name: embed(features[name]) for name, embed in self._features.items()}

    def _joined(self, rows: tf.Tensor, parts: dict[str, tf.Tensor]) -> tf.Tensor:
        """Combines features, history and ids, in this order, into the output."""
        for name, project in self._projections.items():
            parts[name] = project(parts[name])
        if self.id_embedding is not None:
            parts[_ID] = self.id_embedding(rows)
        hidden = tf.add_n(list(parts.values()))
        for layer in self._hidden:
            hidden = layer(hidden)
        return hidden if self._output is None else self._output(hidden)


def _averaging_kernel(shape: Sequence[int], dtype: tf.DType | None = None) -> tf.Tensor:
    """Initialises a projection of joined vectors with their mean: [num_vectors * dim, dim]."""
    # So a history that uses the candidates' vectors starts near its items.
    num_vectors = shape[0] // shape[1]
    return tf.tile(tf.eye(shape[1], dtype=dtype or tf.float32), [num_vectors, 1]) / num_vectors


class ItemVectors(tf.keras.layers.Layer):
    """Embeds the items of a history as the candidate tower does, from id and features."""

    def __init__(self, tower: Tower, table: FeatureTable) -> None:
        super().__init__(name="item_vectors")
        self._tower, self._table = tower, table

    def call(self, rows: tf.Tensor) -> tf.Tensor:
        """Embeds candidate rows of any shape: [..., dim] float32."""
        # A batch's histories repeat popular items, and features make an item's vector expensive.
        distinct, slot = tf.unique(tf.reshape(rows, [-1]))
        vectors = self._tower.vectors(distinct, self._table(distinct))
        return tf.gather(vectors, tf.reshape(slot, tf.shape(rows)))


def candidate_tower(settings: TwoTowerSettings, corpus: Corpus) -> Tower:
    """Makes the built-in candidate tower."""
    return Tower(
        "candidate_tower",
        settings,
        features=corpus.candidate_features,
        num_ids=len(corpus.candidate_ids) if settings.use_candidate_id else None,
        are_trained=None if corpus.is_later is None else ~corpus.is_later,
        bias="id" if settings.candidate_bias else None,
    )


def query_tower(
    settings: TwoTowerSettings,
    corpus: Corpus,
    candidate_tower: tf.keras.layers.Layer,
    candidate_table: FeatureTable,
) -> Tower:
    """Makes the built-in query tower, which may share a built-in candidate tower's item vectors."""
    history = shared = None
    knows_ids = isinstance(candidate_tower, Tower) and candidate_tower.id_embedding is not None
    if settings.share_item_embedding and knows_ids:
        shared = ItemVectors(candidate_tower, candidate_table)
    if settings.history_pooling:
        history = HistoryEncoder(len(corpus.candidate_ids), settings, shared, corpus.has_times)
    return Tower(
        "query_tower",
        settings,
        features=(*corpus.query_features, *corpus.request_features),
        num_ids=len(corpus.query_ids) if settings.use_user_id else None,
        are_trained=corpus.has_positive if settings.use_user_id else None,
        bias="ones" if settings.candidate_bias else None,
        history=history,
    )
