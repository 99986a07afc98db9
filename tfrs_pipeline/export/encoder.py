"""A model's towers behind raw ids, and the inputs that queries become."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from tfrs_pipeline.data.ids import Ids, parse_id
from tfrs_pipeline.features import encoding
from tfrs_pipeline.features.encoding import TIMESTAMP, raw_signature, request_signature
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.kinds import feature_from_dict
from tfrs_pipeline.features.raw import MAX_SECONDS, to_seconds
from tfrs_pipeline.model import tf_tables
from tfrs_pipeline.model.exportable import Exportable
from tfrs_pipeline.model.tf_tables import as_ids, lookup, signature_inputs, stored, traced
from tfrs_pipeline.retrieval import HISTORY_TIMESTAMPS, Query, history_of
from tfrs_pipeline.samples.store import RowLists
from tfrs_pipeline.search.exclusions import left_out, rule_of

EMBEDDINGS = "embed_user", "embed_query", "embed_query_with_features", "embed_candidate"
"""The functions of an `Encoder`, which signatures of an export call too."""
ITEMS_PER_CALL = 8192
# Self-attention over 200 items takes about 1.3 MB a query: four times as many would be most of the
# memory of a training.
QUERIES_PER_CALL = 256


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
            With a repeat bonus, this and the next two functions also return `repeated_items`
            [B, any], the distinct ids of the history, and `bonuses` [B, any] float32.
        embed_query: user_id [B], history [B, L] oldest first -> the first three, from this history.
        embed_query_with_features: user_id, history, raw query features -> the same, from these
            features in place of the stored ones; None without query features.
        embed_candidate: item_id [B], raw features -> embeddings [B, D] float32, is_known_item [B]
            bool. An item that training did not have gets the unknown id's embedding.
    """

    def __init__(self, model: Exportable, *, user_data: bool = True) -> None:
        super().__init__(name="encoder")
        self._model = lambda: model  # A function keeps the model out of the exported objects.
        self._holds_users, self._reads_times = user_data, model.history_times is not None
        user_dtype, item_dtype = map(tf_tables.id_dtype, (model.query_ids, model.candidate_ids))
        query_ids, times = model.query_ids, model.history_times
        histories, known_positives = model.histories, model.known_positives
        disliked = model.disliked if user_data else RowLists.empty(1)
        if not user_data:
            query_ids, times = query_ids[:0], np.zeros(0)
            histories = known_positives = RowLists.empty(1)
        self._query_rows = tf_tables.row_table(query_ids)
        self._candidate_rows = tf_tables.row_table(model.candidate_ids)
        # Entry 0 holds the empty id, since an empty slot has row 0.
        self._candidate_ids = stored(tf_tables.with_empty(model.candidate_ids))
        self._histories, self._known = (
            [stored(lists.values), stored(lists.offsets)] for lists in (histories, known_positives)
        )
        self._disliked: list[tf.Variable] | None = None
        if len(disliked.values):
            self._disliked = [stored(disliked.values), stored(disliked.offsets)]
        self._history_times = stored(np.asarray(times, float)) if self._reads_times else None
        self._query_features = tuple(model.query_features)
        self._request_features = tuple(model.request_features)
        self._candidate_features = tuple(model.candidate_features)
        # As an attribute, each table is saved with the module.
        features = *self._query_features, *self._request_features, *self._candidate_features
        self._resources = [feature.graph_resource for feature in features]
        user_id = tf.TensorSpec([None], user_dtype, "user_id")
        item_id = tf.TensorSpec([None], item_dtype, "item_id")
        query = [user_id, tf.TensorSpec([None, None], item_dtype, "history")]
        if self._reads_times:
            query.append(tf.TensorSpec([None, None], tf.float64, HISTORY_TIMESTAMPS))
        query_features = raw_signature(self._query_features).values()
        candidate_features = raw_signature(self._candidate_features).values()
        self._request_signature = request_signature(
            self._request_features, self._query_features, reads_times=self._reads_times
        )
        request = self._request_signature.values()
        self.embed_user: Any = None
        if user_data:
            self.embed_user = traced(self._embed_user, [user_id, *request])
        self.embed_query = traced(self._embed_query, [*query, *request])
        self.embed_query_with_features = None
        if query_features:
            self.embed_query_with_features = traced(
                self._embed_query, [*query, *query_features, *request]
            )
        self.embed_candidate = traced(self._embed_candidate, [item_id, *candidate_features])
        # Only variables: tracking the layers would export their Keras machinery too.
        self._variables = list(model.variables) if user_data else self._variables_without_users()

    def _embed_user(self, user_id: tf.Tensor, **raw: tf.Tensor) -> dict[str, tf.Tensor]:
        query_rows, times = lookup(self._query_rows, user_id), None
        if self._history_times is not None:
            times = _lists([self._history_times, self._histories[1]], query_rows)
        embedded = self._embed(query_rows, _lists(self._histories, query_rows), times, raw)
        disliked = [] if self._disliked is None else [self._disliked]
        if not (tables := left_out(rule_of(self._model()), [self._known], disliked)):
            return embedded
        items = [self._items_in(table, user_id) for table in tables]
        return {**embedded, "known_items": tf.concat(items, axis=1)}

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
            features = self._missing_features(tf.shape(query_rows)[0]) | features
        # Cut and padded to the length of training, so that the graph has one shape.
        length = model.history_length
        recent = histories[:, :length].to_tensor(shape=[None, length])
        arguments: dict[str, Any] = _feature_argument(features)
        if times is not None:
            item_times = times[:, :length].to_tensor(np.nan, shape=[None, length])
            arguments["history_times"] = tf.concat(
                [raw[TIMESTAMP][:, tf.newaxis], item_times], axis=1
            )
        repeats = {}
        if model.repeat_bonus is not None:
            rows, bonuses = (ragged.to_tensor() for ragged in model.repeat_bonus.of(histories))
            repeated_items = tf.gather(self._candidate_ids, rows)
            repeats = {"repeated_items": repeated_items, "bonuses": bonuses}
        # Counted in dense rows, because summing a ragged tensor would take 5% of a query's time.
        return {
            "embeddings": model.embed_queries(query_rows, recent, **arguments),
            "is_known_user": query_rows > 0,
            "num_known_items": tf.math.count_nonzero(histories.to_tensor(), axis=1, dtype=tf.int32),
            **repeats,
        }

    def _encoded_features(self, raw: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Encodes the features of the request and, where the signature has them, of the user."""
        values = {name: raw[spec.name] for name, spec in self._request_signature.items()}
        features = encoding.encode_requests(self._request_features, values)
        # Without the user's features in the signature, the model takes those that it holds.
        if all(spec.name in raw for spec in raw_signature(self._query_features).values()):
            features |= _encoded(self._query_features, raw)
        return features

    def _missing_features(self, num_rows: tf.Tensor | int) -> dict[str, tf.Tensor]:
        return {
            feature.name: tf.repeat(feature.missing, num_rows, axis=0)
            for feature in self._query_features
        }

    def _variables_without_users(self) -> list[Any]:
        """Returns the model's variables that hold nothing of users.

        Refuses a model whose embeddings depend on the user's id, all else being equal.
        """
        model = self._model()
        # Spread over all rows: users without a positive in training have no embedding.
        rows = np.unique(np.linspace(0, len(model.query_ids), 1000, dtype=np.int32))
        history = tf.zeros([len(rows), model.history_length], tf.int32)
        missing = _feature_argument(self._missing_features(len(rows)))
        embedded = model.embed_queries(rows, history, **missing).numpy()
        # Rows of one matrix product may differ in their last bits.
        if not np.allclose(embedded, embedded[:1], rtol=1e-4, atol=1e-5):
            raise ValueError(
                "A model that has learned an embedding of each user cannot be exported without "
                "user data: train it with use_user_id=False (model.use_user_id)."
            )
        # The model's variables also hold the features of all users, which no function reads now.
        functions = (self.embed_query, self.embed_query_with_features, self.embed_candidate)
        graphs = [f.get_concrete_function().graph for f in functions if f is not None]
        read = {id(resource) for graph_ in graphs for resource, _ in graph_.captures}
        # Variables and lookup tables name their resource differently.
        return [
            held
            for held in model.variables
            if id(held.handle if hasattr(held, "handle") else held.resource_handle) in read
        ]

    def _embed_candidate(self, item_id: tf.Tensor, **raw: tf.Tensor) -> dict[str, tf.Tensor]:
        rows = lookup(self._candidate_rows, item_id)
        features = _encoded(self._candidate_features, raw)
        return {
            "embeddings": self._model().embed_candidates(rows, **_feature_argument(features)),
            "is_known_item": rows > 0,
        }

    def _items_in(self, lists: Sequence[tf.Variable], user_id: tf.Tensor) -> tf.Tensor:
        rows = _lists(lists, lookup(self._query_rows, user_id)).to_tensor()
        return tf.gather(self._candidate_ids, rows)


class SavedEncoder:
    """An exported `Encoder`: it embeds, and tells what it holds of users and items.

    Lists are by the user's row, which `user_rows` returns. Row 0, an unknown user, has empty lists.
    They are read from variables, without a call of the graph.

    Args:
        encoder: The `Encoder`, as `tf.saved_model.load` returns it, or one in memory.

    Attributes:
        user_dtype, item_dtype: The types of the ids, int64 or string.
        users_are_text, items_are_text: Whether they are strings.
    """

    def __init__(self, encoder: Any) -> None:
        # The encoder lacks the functions that its model does not support.
        self._functions = {
            name: function.get_concrete_function()
            for name in EMBEDDINGS
            if (function := getattr(encoder, name, None)) is not None
        }
        specs = self.inputs("embed_query")
        self.user_dtype, self.item_dtype = specs["user_id"].dtype, specs["history"].dtype
        self.users_are_text = self.user_dtype == tf.string
        self.items_are_text = self.item_dtype == tf.string
        self._query_rows, self._candidate_rows = encoder._query_rows, encoder._candidate_rows
        self._candidate_ids = _content(encoder._candidate_ids)
        # Not saved where nobody disliked anything.
        disliked = getattr(encoder, "_disliked", None) or ()
        self._histories, self._known, self._disliked = (
            [*map(_content, lists)] for lists in (encoder._histories, encoder._known, disliked)
        )
        times = getattr(encoder, "_history_times", None)  # Not saved where it is None.
        # A view of one NaN takes no memory, and histories may be large.
        unknown = np.broadcast_to(np.nan, len(self._histories[0]))
        self._times = unknown if times is None else _content(times)

    def inputs(self, name: str) -> dict[str, tf.TensorSpec]:
        """Returns the inputs of a function of the encoder by name."""
        return signature_inputs(self._functions[name])

    def call(self, name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Calls a function of the encoder with those of the arrays that it takes."""
        function = self._functions[name]
        inputs = tf_tables.as_tensors(signature_inputs(function), arrays)
        outputs = tf_tables.call(function, inputs)
        return {key: tensor.numpy() for key, tensor in outputs.items()}

    def embed(self, name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Embeds with a function of the encoder: its answer, ready for `Candidates.search`.

        What differs in length by query comes as a list for each: `known_items`, `repeated_items`
        and `bonuses`, which are padded at the end.
        """
        answer: dict[str, Any] = self.call(name, arrays)
        for key in {"known_items", "repeated_items"} & answer.keys():
            answer[key] = tf_tables.id_lists_of(answer[key])
        if "bonuses" in answer:
            answer["bonuses"] = [*answer["bonuses"]]
        return answer

    def embed_items(
        self, item_ids: Sequence[Any], features: Sequence[Feature], raw: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeds items by the arrays that `raw_columns` makes of their features.

        Returns embeddings [n, D] float32, and is_known_item [n] bool.
        """
        arrays = {"item_id": tf_tables.id_array(item_ids, self.item_dtype)}
        arrays |= _by_input(raw_signature(features), raw)
        # At least one call: without an item, it still gives the number of dimensions.
        blocks = []
        for start in range(0, max(len(item_ids), 1), ITEMS_PER_CALL):
            block = {name: array[start : start + ITEMS_PER_CALL] for name, array in arrays.items()}
            answer = self.call("embed_candidate", block)
            blocks.append((answer["embeddings"], answer["is_known_item"]))
        embeddings, is_known = map(np.concatenate, zip(*blocks, strict=True))
        return embeddings, is_known

    def parse_id(self, text: str, of: Literal["user", "item"] = "item") -> Any:
        """Parses a typed id into the type of the model's ids, or raises a `ValueError`."""
        are_text = self.users_are_text if of == "user" else self.items_are_text
        return parse_id(text, are_text=are_text, of=of)

    def user_ids(self) -> np.ndarray:
        """Returns the ids of all users, in the order of their rows: [n] int64, or bytes."""
        handle = self._query_rows.resource_handle
        ids, rows = tf.raw_ops.LookupTableExportV2(
            table_handle=handle, Tkeys=self.user_dtype, Tvalues=tf.int64
        )
        return ids.numpy()[np.argsort(rows.numpy())]

    def user_rows(self, user_ids: Sequence[Any]) -> list[int]:
        """Looks up users; raises a `ValueError` if an id has another type."""
        return tf_tables.loaded_rows(self._query_rows, user_ids, self.user_dtype).tolist()

    def has_items(self, item_ids: Sequence[Any]) -> np.ndarray:
        """Returns which items the training had, [n] bool; raises as `user_rows`."""
        return tf_tables.loaded_rows(self._candidate_rows, item_ids, self.item_dtype) > 0

    def history(self, row: int) -> list[tuple[Any, float]]:
        """Returns what a user clicked, oldest first, without items that the training did not have.

        With each item comes its time in seconds since 1970; NaN where unknown.
        """
        rows = _entries(self._histories, row)
        times = _entries([self._times, self._histories[1]], row)[rows > 0].tolist()
        return [*zip(self._items(rows), times, strict=True)][::-1]

    def known(self, row: int) -> list[Any]:
        """Returns what a user clicked; if the version was trained with `seen`, what they saw."""
        return self._items(_entries(self._known, row))

    def disliked(self, row: int) -> list[Any]:
        """Returns what a user disliked in the training's log."""
        return self._items(_entries(self._disliked, row)) if self._disliked else []

    def _items(self, rows: np.ndarray) -> list[Any]:
        return as_ids(self._candidate_ids[rows[rows > 0]].tolist())


def _entries(values_and_offsets: Sequence[np.ndarray], row: int) -> np.ndarray:
    values, offsets = values_and_offsets
    return values[offsets[row] : offsets[row + 1]]


def _content(variable: tf.Variable) -> np.ndarray:
    """Returns the values of a variable; numbers are not copied, since histories may be large."""
    value = variable.read_value()
    return value.numpy() if value.dtype == tf.string else np.asarray(memoryview(value))


def _encoded(features: Sequence[Feature], raw: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    values = {name: raw[spec.name] for name, spec in raw_signature(features).items()}
    return encoding.encode_raw(features, values)


def _feature_argument(features: Mapping[str, tf.Tensor]) -> dict[str, Mapping[str, tf.Tensor]]:
    """Returns the argument `features`, or none: without features, functions do not take it."""
    return {"features": features} if features else {}


def embed_queries(
    encoder: Encoder, queries: Sequence[Query], features: Mapping[str, Sequence[Feature]]
) -> np.ndarray:
    """Embeds queries by `user_id`, `history` and `request`: [num_queries, D] float32."""
    blocks, specs = [], signature_inputs(encoder.embed_query)
    # At least one call: without a query, it still gives the number of dimensions.
    for start in range(0, max(len(queries), 1), QUERIES_PER_CALL):
        arrays = query_arrays(specs, features, queries[start : start + QUERIES_PER_CALL])
        inputs = tf_tables.as_tensors(specs, arrays)
        blocks.append(tf_tables.call(encoder.embed_query, inputs)["embeddings"].numpy())
    return np.concatenate(blocks)


def features_of(manifest: Mapping[str, Any]) -> dict[str, tuple[Feature, ...]]:
    """Reads the features of query, request and candidate from a model's manifest."""
    return {
        side: tuple(map(feature_from_dict, manifest.get("features", {}).get(side, ())))
        for side in ("query", "request", "candidate")
    }


def query_arrays(
    specs: Mapping[str, tf.TensorSpec],
    features: Mapping[str, Sequence[Feature]],
    queries: Sequence[Query],
) -> dict[str, np.ndarray]:
    """Makes a signature's inputs of queries: user_id, history and its times, and the request.

    `specs` are the inputs that the signature has, and `features` those of each side.
    """
    arrays = history_arrays(specs, queries)
    if "user_id" in specs:
        users = [query.get("user_id") for query in queries]
        arrays["user_id"] = tf_tables.id_array(users, specs["user_id"].dtype)
    return arrays | request_arrays(specs, features, [query.get("request") for query in queries])


def history_arrays(
    specs: Mapping[str, tf.TensorSpec], queries: Sequence[Query]
) -> dict[str, np.ndarray]:
    """Makes the inputs of a signature that hold histories, and their timestamps."""
    arrays = {}
    if "history" in specs:
        lists = list(map(history_of, queries))
        arrays["history"] = tf_tables.id_rows(lists, specs["history"].dtype)
    if HISTORY_TIMESTAMPS in specs:
        times = item_times(queries)
        values = np.concatenate([np.zeros(0), *times])
        arrays[HISTORY_TIMESTAMPS] = tf_tables.padded(values, times, np.nan)
    return arrays


def request_arrays(
    specs: Mapping[str, tf.TensorSpec],
    features: Mapping[str, Sequence[Feature]],
    requests: Sequence[Mapping[str, Any] | None],
) -> dict[str, np.ndarray]:
    """Makes a signature's inputs of requests: raw features and the timestamp."""
    reads_times = TIMESTAMP in specs
    raw = encoding.raw_requests(features["request"], requests, reads_times=reads_times)
    names = request_signature(features["request"], features["query"], reads_times=reads_times)
    return _by_input(names, raw)


def feature_arrays(features: Sequence[Feature], queries: Sequence[Query]) -> dict[str, np.ndarray]:
    """Makes a signature's inputs of the queries' `features`; a `ValueError` if one is unknown."""
    names = [feature.name for feature in features]
    if not names:
        raise ValueError("The model reads no user features: remove `features` from the queries.")
    if unknown := {name for query in queries for name in query["features"]} - set(names):
        raise ValueError(
            f"The model reads no user feature {', '.join(map(repr, sorted(unknown)))}; known: "
            f"{', '.join(names)}"
        )
    columns = {name: [query["features"].get(name) for query in queries] for name in names}
    raw = encoding.raw_columns(features, columns, len(queries))
    return _by_input(raw_signature(features), raw)


def _by_input(
    specs: Mapping[str, tf.TensorSpec], raw: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Names the arrays of features as the inputs of a signature are named."""
    return {spec.name: raw[name] for name, spec in specs.items()}


def item_times(queries: Sequence[Query]) -> list[np.ndarray]:
    """Returns the times of each query's history: float64 seconds since 1970, NaN if unknown.

    A query's `history_timestamps` are datetimes with a time zone, or seconds since 1970; an unknown
    time is None.

    Example:
        >>> item_times(
        ...     [{"history": [7, 8], "history_timestamps": [86400, 172800]}, {"history": [9]}]
        ... )
        [array([ 86400., 172800.]), array([nan])]
    """
    times = []
    for query in queries:
        num_items = len(history_of(query))
        stamps = query.get(HISTORY_TIMESTAMPS)
        if stamps is None:
            times.append(np.full(num_items, np.nan))
            continue
        if len(stamps) != num_items:
            raise ValueError(
                f"{HISTORY_TIMESTAMPS} must be one time for each item of the history, None where "
                f"unknown. Received: {len(stamps)} times for {num_items} items."
            )
        # None would make objects of the seconds beside it.
        seconds = np.array([np.nan if stamp is None else stamp for stamp in stamps])
        if seconds.dtype.kind not in "iuf":
            seconds = to_seconds(HISTORY_TIMESTAMPS, list(stamps))
        elif (seconds > MAX_SECONDS).any():
            raise ValueError(
                f"{HISTORY_TIMESTAMPS} must be seconds since 1970; divide milliseconds by 1,000. "
                f"Received: {np.nanmax(seconds)}, which is after the year 5000"
            )
        times.append(seconds.astype(np.float64))
    return times


def known_rows(
    encoder: Encoder, queries: Sequence[Query], item_ids: np.ndarray
) -> list[np.ndarray]:
    """Returns the known positives of each query's user, as rows among `item_ids`."""
    saved, items = SavedEncoder(encoder), Ids(item_ids)
    users = saved.user_rows([query.get("user_id") for query in queries])
    return [items.known_rows(saved.known(row)) for row in users]


def join_lines(parts: Sequence[tuple[Sequence[int], Mapping[str, Any]]]) -> dict[str, Any]:
    """Joins what was computed for some lines of a batch each, in the order of the lines."""
    back = np.argsort(np.concatenate([lines for lines, _ in parts]))
    joined: dict[str, Any] = {}
    for name, first in parts[0][1].items():
        values = [part[name] for _, part in parts]
        if isinstance(first, np.ndarray):
            joined[name] = np.concatenate(values)[back]
        else:  # A list for each line, of any length.
            lists = [*itertools.chain.from_iterable(values)]
            joined[name] = [lists[line] for line in back]
    return joined


def _lists(values_and_offsets: Sequence[tf.Variable], rows: tf.Tensor) -> tf.RaggedTensor:
    values, offsets = values_and_offsets
    return tf.gather(tf.RaggedTensor.from_row_splits(values, offsets, validate=False), rows)
