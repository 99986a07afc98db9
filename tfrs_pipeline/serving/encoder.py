"""The towers of a trained model behind raw ids: what stays when the items are exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.model.features import Feature, encode_raw, lookup_tables, raw_signature
from tfrs_pipeline.model.two_tower import TwoTowerModel
from tfrs_pipeline.samples.build import RowLists


class Encoder(tf.Module):
    """Embeds users, queries and candidates, and knows what each user has clicked.

    It speaks of ids alone, in the types of the logs (int64 or string; -1 or "" is an empty slot),
    so that an index over other items than those of the training can stand beside it. An `Encoder`
    that was saved within a module and loaded is called in the same way: every function keeps its
    input signature.

    Args:
        model: Trained model.
        query_ids: [num_queries] user ids, in the order of the model's rows.
        candidate_ids: [num_candidates] item ids, likewise.
        histories: Per query row from 0, candidate rows, most recent first.
        known_positives: Per query row from 0, candidate rows.
        query_features: Those of the model's query tower, in its order.
        candidate_features: Those of its candidate tower.

    Attributes:
        embed_user: user_id [B] -> embeddings [B, D] float32, is_known_user [B] bool: by the user's
            stored history and features.
        embed_query: user_id [B], history [B, L] oldest first -> the same, by that history.
        embed_query_with_features: user_id, history, raw features by name (see `Feature`) -> the
            same, by these features instead of the stored ones; None without query features.
        embed_candidate: item_id [B], raw features by name -> embeddings [B, D] float32,
            is_known_item [B] bool. An item that the training did not have is embedded by its
            features and the unknown id's embedding.
        known_items: user_id [B] -> [B, any] ids of the user's known positives.
    """

    def __init__(
        self,
        model: TwoTowerModel,
        *,
        query_ids: np.ndarray,
        candidate_ids: np.ndarray,
        histories: RowLists,
        known_positives: RowLists,
        query_features: Sequence[Feature] = (),
        candidate_features: Sequence[Feature] = (),
    ) -> None:
        super().__init__(name="encoder")
        # Variables alone: tracking the layers would export their Keras machinery too.
        self._variables = [
            *model.query_table.variables,
            *model.query_tower.variables,
            *model.candidate_tower.variables,
        ]
        self._model = _Untracked(model)
        self._query_rows = row_table(query_ids)
        self._candidate_rows = row_table(candidate_ids)
        self._user_dtype, self._item_dtype = id_dtype(query_ids), id_dtype(candidate_ids)
        # Place 0 holds the empty id: an empty slot has row 0.
        self._candidate_ids = stored(with_empty(candidate_ids))
        self._histories = [stored(histories.values), stored(histories.offsets)]
        self._known = [stored(known_positives.values), stored(known_positives.offsets)]
        self._query_features = tuple(query_features)
        self._candidate_features = tuple(candidate_features)
        # As attributes they are saved with the module.
        self._query_vocabularies = lookup_tables(query_features)
        self._candidate_vocabularies = lookup_tables(candidate_features)
        self._trace()

    def _trace(self) -> None:
        user_id = tf.TensorSpec([None], self._user_dtype, "user_id")
        history = tf.TensorSpec([None, None], self._item_dtype, "history")
        item_id = tf.TensorSpec([None], self._item_dtype, "item_id")
        query_features = raw_signature(self._query_features)

        @tf.function(input_signature=[user_id])
        def embed_user(user_id: tf.Tensor) -> dict[str, tf.Tensor]:
            query_rows = lookup(self._query_rows, user_id)
            return self._embed(query_rows, _lists(self._histories, query_rows), None)

        @tf.function(input_signature=[user_id, history])
        def embed_query(user_id: tf.Tensor, history: tf.Tensor) -> dict[str, tf.Tensor]:
            return self._embed(lookup(self._query_rows, user_id), self._known_rows(history), None)

        @tf.function(input_signature=[user_id, history, query_features])
        def embed_query_with_features(
            user_id: tf.Tensor, history: tf.Tensor, features: dict[str, tf.Tensor]
        ) -> dict[str, tf.Tensor]:
            encoded = encode_raw(self._query_features, features)
            query_rows = lookup(self._query_rows, user_id)
            return self._embed(query_rows, self._known_rows(history), encoded)

        @tf.function(input_signature=[item_id, raw_signature(self._candidate_features)])
        def embed_candidate(
            item_id: tf.Tensor, features: dict[str, tf.Tensor]
        ) -> dict[str, tf.Tensor]:
            rows = lookup(self._candidate_rows, item_id)
            encoded = encode_raw(self._candidate_features, features)
            embeddings = self._model.value.embed_candidates(rows, encoded)
            return {"embeddings": embeddings, "is_known_item": rows > 0}

        @tf.function(input_signature=[user_id])
        def known_items(user_id: tf.Tensor) -> tf.Tensor:
            rows = _lists(self._known, lookup(self._query_rows, user_id)).to_tensor()
            return tf.gather(self._candidate_ids, rows)

        self.embed_user = embed_user
        self.embed_query = embed_query
        self.embed_query_with_features = embed_query_with_features if query_features else None
        self.embed_candidate = embed_candidate
        self.known_items = known_items

    def _known_rows(self, history: tf.Tensor) -> tf.RaggedTensor:
        """Turns histories, oldest first, into rows of known items, most recent first."""
        rows = tf.reverse(lookup(self._candidate_rows, history), axis=[1])
        return tf.ragged.boolean_mask(rows, rows > 0)

    def _embed(
        self,
        query_rows: tf.Tensor,
        histories: tf.RaggedTensor,
        features: dict[str, tf.Tensor] | None,
    ) -> dict[str, tf.Tensor]:
        model = self._model.value
        length = model.history_length
        recent = histories[:, :length].to_tensor(shape=[None, length])
        return {
            "embeddings": model.embed_queries(query_rows, recent, features),
            "is_known_user": query_rows > 0,
        }


def _lists(values_and_offsets: Sequence[tf.Variable], rows: tf.Tensor) -> tf.RaggedTensor:
    """Gathers the lists of rows."""
    values, offsets = values_and_offsets
    return tf.gather(tf.RaggedTensor.from_row_splits(values, offsets, validate=False), rows)


class _Untracked:
    """Keeps a model out of the exported object graph."""

    def __init__(self, value: TwoTowerModel) -> None:
        self.value = value


def id_dtype(ids: np.ndarray) -> tf.DType:
    """Returns the type in which ids enter the graph: int64 or string."""
    return tf.int64 if ids.dtype == np.int64 else tf.string


def empty_id(dtype: tf.DType) -> Any:
    """Returns the id of an empty slot: -1 or ""."""
    return -1 if dtype == tf.int64 else ""


def with_empty(ids: np.ndarray) -> tf.Tensor:
    """Returns [n + 1] ids by row, the empty id in row 0."""
    dtype = id_dtype(ids)
    return tf.constant([empty_id(dtype), *ids.tolist()], dtype)


def stored(values: Any) -> tf.Variable:
    """Makes a variable of what never changes.

    A constant would be written into the graph, which must not exceed 2 GB: histories of many users
    do, and ids of many items.
    """
    return tf.Variable(values, trainable=False)


def row_table(ids: np.ndarray) -> tf.lookup.experimental.MutableHashTable:
    """Makes the table of rows 1, 2, ... by id; whatever else has row 0.

    It never changes, but is of the kind whose entries are saved with the variables (see `stored`).
    """
    dtype = id_dtype(ids)
    table = tf.lookup.experimental.MutableHashTable(dtype, tf.int64, default_value=0)
    table.insert(tf.constant(ids.tolist(), dtype), tf.range(1, len(ids) + 1, dtype=tf.int64))
    return table


def lookup(table: tf.lookup.experimental.MutableHashTable, ids: tf.Tensor) -> tf.Tensor:
    """Looks up rows: int32, of the shape of `ids`."""
    # Such a table tells nothing of the shape.
    return tf.ensure_shape(tf.cast(table.lookup(ids), tf.int32), ids.shape)
