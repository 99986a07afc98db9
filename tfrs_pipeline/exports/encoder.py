"""A model's towers behind raw ids, in a graph: the copy that a SavedModel holds.

Everything else embeds raw queries by `search/queries.py`, in NumPy.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features import graph
from tfrs_pipeline.features.encoding import TIMESTAMP, raw_signature
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.raw import NO_TIME
from tfrs_pipeline.model import tf_tables
from tfrs_pipeline.model.exportable import Exportable
from tfrs_pipeline.model.tf_tables import feature_argument, lookup, stored, traced
from tfrs_pipeline.retrieval import HISTORY_TIMESTAMPS
from tfrs_pipeline.samples.store import RowLists
from tfrs_pipeline.search.exclusions import left_out, rule_with
from tfrs_pipeline.search.history_bonus import NUM_LATEST, HistoryBonus, RepeatBonus

EMBEDDINGS = "embed_user", "embed_query", "embed_query_with_features", "embed_candidate"
"""The functions of an `Encoder`, which signatures of an export call too."""


class Encoder(tf.Module):
    """Embeds users, queries and candidates by ids, and holds what each user has clicked.

    Ids are int64 or strings; -1 or "" is an empty slot. Without `user_data` it holds no
    user ids, histories or features; a `ValueError` if the model embeds each user's id.

    Functions of queries take the raw values of request features last (`request_signature`). If the
    model reads times, they also take the request's timestamp and, after a history, its
    history_timestamps [B, L]: seconds since 1970, NaN or absent where unknown.

    Attributes:
        embed_user: user_id [B] -> embeddings [B, D] float32, is_known_user [B] bool and
            num_known_items [B] int32, how many items of the history the training had; all by the
            user's stored history and features. Also `known_items` [B, any], ids to exclude:
            dislikes, and what the user clicked, or saw, if the model excludes it. Absent if the
            model has neither. None without user data.
            With a bonus for what the history makes likely, this and the next two functions also
            return `items_with_bonus` [B, any], distinct ids, and `bonuses` [B, any] float32.
        embed_query: user_id [B], history [B, L] oldest first -> the first three, from this history.
        embed_query_with_features: user_id, history, raw query features -> the same, from these
            features in place of the stored ones; None without query features.
        embed_candidate: item_id [B], raw features -> embeddings [B, D] float32, is_known_item [B]
            bool. An item that training did not have gets the unknown id's embedding.
    """

    def __init__(self, model: Exportable, *, user_data: bool = True) -> None:
        super().__init__(name="encoder")
        model = model if user_data else without_users(model)
        self._model = lambda: model  # A function keeps the model out of the exported objects.
        self._holds_users, self._reads_times = user_data, model.history_times is not None
        self._rule = rule_with(model.exclude, model.bonus)
        self._query_rows = tf_tables.row_table(model.query_ids)
        self._candidate_rows = tf_tables.row_table(model.candidate_ids)
        # Entry 0 holds the empty id, since an empty slot has row 0.
        self._candidate_ids = stored(tf_tables.with_empty(model.candidate_ids))
        self._histories, self._known, self._disliked = (
            [stored(lists.values), stored(lists.offsets)]
            for lists in (model.histories, model.known_positives, model.disliked)
        )
        self._has_dislikes = len(model.disliked.values) > 0
        self._bonus = None if model.bonus is None else GraphBonus(model.bonus)
        self._history_times = None
        if model.history_times is not None:
            self._history_times = stored(np.asarray(model.history_times, float))
        inputs = model.inputs
        self._features = inputs.features
        self._request_signature = inputs.request_signature
        # As an attribute, each table is saved with the module.
        self._resources = [x.graph_resource for side in self._features.values() for x in side]
        embeds: dict[str, Any] = dict.fromkeys(inputs.signatures, self._embed_query)
        embeds["embed_user"] = self._embed_user
        functions = {
            name: traced(embeds[name], [*graph.tensor_specs(specs).values()])
            for name, specs in inputs.signatures.items()
        }
        self.embed_user = functions["embed_user"] if user_data else None
        self.embed_query = functions["embed_query"]
        self.embed_query_with_features = functions.get("embed_query_with_features")
        item_id = tf.TensorSpec([None], tf_tables.id_dtype(model.candidate_ids), "item_id")
        raw = graph.tensor_specs(raw_signature(model.candidate_features)).values()
        self.embed_candidate = traced(self._embed_candidate, [item_id, *raw])
        # Only variables: tracking the layers would export their Keras machinery too.
        self._variables = list(model.variables) if user_data else self._variables_read()

    def _embed_user(self, user_id: tf.Tensor, **raw: tf.Tensor) -> dict[str, tf.Tensor]:
        query_rows, times = lookup(self._query_rows, user_id), None
        if self._history_times is not None:
            times = _lists([self._history_times, self._histories[1]], query_rows)
        embedded = self._embed(query_rows, _lists(self._histories, query_rows), times, raw)
        disliked = [self._disliked] if self._has_dislikes else []
        if not (tables := left_out(self._rule, [self._known], disliked)):
            return embedded
        # Padded once for both, as the service pads them.
        rows = tf.concat([_lists(table, query_rows) for table in tables], axis=1).to_tensor()
        return {**embedded, "known_items": tf.gather(self._candidate_ids, rows)}

    def _embed_query(
        self, user_id: tf.Tensor, history: tf.Tensor, **raw: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        # Rows of known items, most recent first, and their times.
        rows = tf.reverse(lookup(self._candidate_rows, history), axis=[1])
        known, times = tf.ragged.boolean_mask(rows, rows > 0), None
        if self._reads_times:
            # Cut or padded to the width of the history.
            item_times, width = raw[HISTORY_TIMESTAMPS], tf.shape(history)[1]
            missing = [[0, 0], [0, tf.maximum(width - tf.shape(item_times)[1], 0)]]
            item_times = tf.pad(item_times, missing, constant_values=np.nan)[:, :width]
            times = tf.ragged.boolean_mask(tf.reverse(item_times, axis=[1]), rows > 0)
        return self._embed(lookup(self._query_rows, user_id), known, times, raw)

    def _embed(
        self,
        query_rows: tf.Tensor,
        histories: tf.RaggedTensor,
        times: tf.RaggedTensor | None,
        raw: Mapping[str, tf.Tensor],
    ) -> dict[str, tf.Tensor]:
        model = self._model()
        features = self._encoded_features(raw)
        if not self._holds_users:
            features = _missing_features(model, tf.shape(query_rows)[0]) | features
        # Cut and padded to the length of training, so that the graph has one shape.
        length = model.history_length
        recent = histories[:, :length].to_tensor(shape=[None, length])
        arguments = feature_argument(features)
        if times is not None:
            item_times = times[:, :length].to_tensor(np.nan, shape=[None, length])
            arguments["history_times"] = _relative(
                tf.concat([raw[TIMESTAMP][:, tf.newaxis], item_times], axis=1)
            )
        with_bonus = {}
        if self._bonus is not None:
            rows, bonuses = (ragged.to_tensor() for ragged in self._bonus.of(histories))
            ids = tf.gather(self._candidate_ids, rows)
            with_bonus = {"items_with_bonus": ids, "bonuses": bonuses}
        # Counted in dense rows, because summing a ragged tensor would take 5% of a query's time.
        return {
            "embeddings": model.embed_queries(query_rows, recent, **arguments),
            "is_known_user": query_rows > 0,
            "num_known_items": tf.math.count_nonzero(histories.to_tensor(), axis=1, dtype=tf.int32),
            **with_bonus,
        }

    def _encoded_features(self, raw: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Encodes the features of the request and, where the signature has them, of the user."""
        values = {name: raw[spec.name] for name, spec in self._request_signature.items()}
        features = graph.encode_requests(self._features["request"], values)
        # Without the user's features in the signature, the model takes those that it holds.
        if all(spec.name in raw for spec in raw_signature(self._features["query"]).values()):
            features |= _encoded(self._features["query"], raw)
        return features

    def _variables_read(self) -> list[Any]:
        """Returns the model's variables that a function reads: none holds features of users."""
        functions = (self.embed_query, self.embed_query_with_features, self.embed_candidate)
        graphs = [f.get_concrete_function().graph for f in functions if f is not None]
        read = {id(resource) for graph_ in graphs for resource, _ in graph_.captures}
        # Variables and lookup tables name their resource differently.
        return [
            held
            for held in self._model().variables
            if id(held.handle if hasattr(held, "handle") else held.resource_handle) in read
        ]

    def _embed_candidate(self, item_id: tf.Tensor, **raw: tf.Tensor) -> dict[str, tf.Tensor]:
        rows = lookup(self._candidate_rows, item_id)
        features = _encoded(self._features["candidate"], raw)
        return {
            "embeddings": self._model().embed_candidates(rows, **feature_argument(features)),
            "is_known_item": rows > 0,
        }


def without_users(model: Exportable) -> Exportable:
    """Returns a model without ids, histories and features of users.

    Raises a `ValueError` if its embeddings depend on the user's id, all else being equal.
    """
    # Spread over all rows: users without a positive in training have no embedding.
    rows = np.unique(np.linspace(0, len(model.query_ids), 1000, dtype=np.int32))
    history = tf.zeros([len(rows), model.history_length], tf.int32)
    missing = feature_argument(_missing_features(model, len(rows)))
    embedded = model.embed_queries(rows, history, **missing).numpy()
    # Rows of one matrix product may differ in their last bits.
    if not np.allclose(embedded, embedded[:1], rtol=1e-4, atol=1e-5):
        raise ValueError(
            "A model that has learned an embedding of each user cannot be exported without "
            "user data: train it with use_user_id=False (model.use_user_id)."
        )
    lists: Any = dict.fromkeys(("histories", "known_positives", "disliked"), RowLists.empty(1))
    times = None if model.history_times is None else np.zeros(0)
    ids: dict[str, Any] = {"query_ids": model.query_ids[:0], "query_columns": {}}
    return dataclasses.replace(model, **ids, **lists, history_times=times)


def _missing_features(model: Exportable, num_rows: tf.Tensor | int) -> dict[str, tf.Tensor]:
    return {
        feature.name: tf.repeat(feature.missing, num_rows, axis=0)
        for feature in model.query_features
    }


def _encoded(features: Sequence[Feature], raw: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    values = {name: raw[spec.name] for name, spec in raw_signature(features).items()}
    return graph.encode_raw(features, values)


def _relative(times: tf.Tensor) -> tf.Tensor:
    """Counts [B, n] float64 times as `relative_seconds` does: int32."""
    is_known = tf.math.is_finite(times)
    seconds = tf.floor(tf.where(is_known, times, 0.0))
    lowest = tf.constant(-np.inf, tf.float64)
    latest = tf.reduce_max(tf.where(is_known, seconds, lowest), axis=1, keepdims=True)
    relative = tf.maximum(seconds - latest, NO_TIME + 2)
    return tf.cast(tf.where(is_known, relative, NO_TIME), tf.int32)


# A pair of a line and a candidate row becomes one int64, line * _ROWS + row: rows are int32.
_ROWS = 1 << 31


class GraphBonus(tf.Module):
    """What `HistoryBonus` does for each of several histories, in a graph."""

    def __init__(self, bonus: HistoryBonus) -> None:
        super().__init__(name="bonus")
        self._settings = lambda: bonus
        if bonus.neighbours is not None and bonus.graph is not None:
            lists = bonus.graph.neighbours
            self._neighbours = [stored(lists.values), stored(lists.offsets)]
            self._weights = [stored(bonus.graph.weights()), self._neighbours[1]]

    def of(self, histories: tf.RaggedTensor) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
        """Returns the items with a bonus, [B, any] int32 rows, and their bonuses, float32.

        Histories are [B, any] int32 candidate rows, most recent first.
        """
        bonus = self._settings()
        known = tf.ragged.boolean_mask(histories, histories > 0)
        parts = [] if bonus.repeats is None else [_repeats(bonus.repeats, known)]
        if bonus.neighbours is not None:
            latest = known[:, :NUM_LATEST]
            ages = tf.cast(tf.ragged.range(latest.row_lengths()).values, tf.float32)
            lines = tf.cast(latest.value_rowids(), tf.int64)
            near = _lists(self._neighbours, latest.values)
            items = near.value_rowids()
            faded = tf.gather(bonus.neighbours.decay**ages, items)
            numbers = bonus.neighbours.weight * faded * _lists(self._weights, latest.values).values
            pairs = tf.gather(lines, items) * _ROWS + tf.cast(near.values, tf.int64)
            parts.append((pairs, numbers))
        pairs, numbers = (tf.concat(column, axis=0) for column in zip(*parts, strict=True))
        pairs, slots = tf.unique(pairs)
        sums = tf.math.unsorted_segment_sum(numbers, slots, tf.size(pairs))
        order = tf.argsort(pairs)  # By line, which a ragged tensor needs.
        pairs, sums = tf.gather(pairs, order), tf.gather(sums, order)
        num_lines = histories.nrows(tf.int64)
        rows = tf.cast(pairs % _ROWS, tf.int32)
        return tuple(
            tf.RaggedTensor.from_value_rowids(values, pairs // _ROWS, num_lines)
            for values in (rows, sums)
        )


def _repeats(bonus: RepeatBonus, known: tf.RaggedTensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns pairs of a line and a distinct item of its history, and the bonuses."""
    lines = tf.cast(known.value_rowids(), tf.int64)
    ages = tf.cast(tf.ragged.range(known.row_lengths()).values, tf.float32)
    pairs, slots = tf.unique(lines * _ROWS + tf.cast(known.values, tf.int64))
    n = tf.math.unsorted_segment_sum((1 + ages) ** -bonus.forgetting, slots, tf.size(pairs))
    return pairs, bonus.weight * n**bonus.power


def _lists(values_and_offsets: Sequence[tf.Variable], rows: tf.Tensor) -> tf.RaggedTensor:
    values, offsets = values_and_offsets
    return tf.gather(tf.RaggedTensor.from_row_splits(values, offsets, validate=False), rows)
