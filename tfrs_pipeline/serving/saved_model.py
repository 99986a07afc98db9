"""What is served: an encoder and an index behind raw ids, as one TensorFlow module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.model.features import Feature
from tfrs_pipeline.serving.encoder import (
    Encoder,
    id_dtype,
    lookup,
    row_table,
    stored,
    with_empty,
)
from tfrs_pipeline.serving.index import ExactIndex, ScannIndex

DEFAULT_K = 100


@dataclass(frozen=True)
class ItemFilter:
    """Values by which a request may choose items, such as their genres.

    Args:
        name: Of the item column.
        values: Per candidate, its values as text; none is fine.
    """

    name: str
    values: Sequence[Sequence[str]]

    @classmethod
    def of_column(cls, name: str, column: Sequence[Any]) -> ItemFilter:
        """Makes a filter of a column of values or of lists of values; None and "" are none."""
        lists = Feature(name, "multi_categorical").to_raw(column).tolist()
        return cls(name, [[value for value in dict.fromkeys(values) if value] for values in lists])

    def describe(self) -> dict[str, Any]:
        """Returns name and distinct values, for the manifest."""
        return {"name": self.name, "values": sorted({v for values in self.values for v in values})}


class RetrievalModule(tf.Module):
    """An encoder and an index behind raw ids.

    Signatures, ids in the types of the logs (int64 or string; -1 or "" is an empty slot):

    - `serving_default(user_id [B])`: the best 100 by the user's stored history, the user's known
      positives left out.
    - `retrieve_user(user_id [B], exclude [B, E], k [])`: the same with a k and more to leave out.
    - `retrieve(user_id [B], history [B, L], exclude [B, E], k [])`: by a history given with the
      query, oldest first; nothing is left out but `exclude`.
    - `retrieve_with_features(...)`, for a model with user features: as `retrieve`, with the raw
      value of each feature beside, instead of the stored ones (see `Feature`). An input is
      called as the column, where that can be the name of an input: "release date" is
      `release_date`; the manifest has them all.
    - `retrieve_user_filtered(..., allowed [B, F])`, `retrieve_filtered` and
      `retrieve_with_features_filtered`, where there is an item filter: of the items that have one
      of the values alone; a list without values allows every item. They score every item, however
      the index is built.
    - `embed_user(user_id [B])`, `embed_query(user_id [B], history [B, L])` and, for a model with
      user features, `embed_query_with_features`: embeddings [B, D] float32 and is_known_user [B].
    - `embed_candidate(item_id [B], ...)`, with the raw value of each item feature beside:
      embeddings [B, D] float32 and is_known_item [B]. The score of a query and a candidate is the
      dot product of their embeddings.

    Those that retrieve return `candidate_ids` [B, k], `scores` [B, k] float32 (-inf in empty
    slots), best first, and `is_known_user` [B] bool. Unknown items in `history` and `exclude` are
    ignored.

    Args:
        encoder: `Encoder`, or what one was loaded as.
        index: Over the candidates' embeddings.
        exact: Exact search over the same: what falls short of k is answered by it.
        candidate_ids: [num_candidates] item ids, in the order of the embeddings.
        item_filter: Values that requests may filter by.
    """

    def __init__(
        self,
        encoder: Encoder,
        index: ExactIndex | ScannIndex,
        exact: ExactIndex,
        *,
        candidate_ids: np.ndarray,
        item_filter: ItemFilter | None = None,
    ) -> None:
        super().__init__(name="retrieval")
        self.encoder = encoder
        self.exact = exact
        self._index = index
        self._num_candidates = len(candidate_ids)
        self._candidate_rows = row_table(candidate_ids)
        self._id_dtype = id_dtype(candidate_ids)
        self._candidate_ids = stored(with_empty(candidate_ids))
        self._allowed_table: tf.lookup.experimental.MutableHashTable | None = None
        if item_filter is not None:
            self._set_filter(item_filter)
        self._trace()

    def _set_filter(self, item_filter: ItemFilter) -> None:
        known = item_filter.describe()["values"]
        code = {value: i for i, value in enumerate(known, 1)}
        width = max([1, *map(len, item_filter.values)])
        codes = np.zeros((self._num_candidates, width), np.int32)
        for i, values in enumerate(item_filter.values):
            codes[i, : len(values)] = [code[value] for value in values]
        self._allowed_table = row_table(np.array(known, object))
        self._num_codes = len(known)
        # By place in the list: a request gathers [B, num_candidates] at a time.
        self._codes = [stored(column) for column in codes.T]

    @property
    def exported(self) -> dict[str, Any]:
        """The signatures, by name."""
        return {name: getattr(self, name) for name in self._names}

    def _export(self, **functions: Any) -> None:
        """Adds signatures; as attributes they are callable on the loaded object too."""
        for name, function in functions.items():
            setattr(self, name, function)
        self._names += tuple(functions)

    def _trace(self) -> None:
        self._names: tuple[str, ...] = ()
        self._user_id = _input_signature(self.encoder.embed_user)[0]
        self._history = tf.TensorSpec([None, None], self._id_dtype, "history")
        self._exclude = tf.TensorSpec([None, None], self._id_dtype, "exclude")
        self._allowed = tf.TensorSpec([None, None], tf.string, "allowed")
        self._k = tf.TensorSpec([], tf.int32, "k")
        self._trace_retrieval()
        self._trace_embedding()
        if self._allowed_table is not None:
            self._trace_filtered()
        # A function that is None is not saved.
        if getattr(self.encoder, "embed_query_with_features", None) is not None:
            self._trace_with_features()

    def _trace_retrieval(self) -> None:
        @tf.function(input_signature=[self._user_id])
        def serving_default(user_id: tf.Tensor) -> dict[str, tf.Tensor]:
            nothing = tf.zeros([tf.shape(user_id)[0], 0], self._id_dtype)
            return self._retrieve_user(user_id, nothing, tf.constant(DEFAULT_K))

        @tf.function(input_signature=[self._user_id, self._exclude, self._k])
        def retrieve_user(
            user_id: tf.Tensor, exclude: tf.Tensor, k: tf.Tensor
        ) -> dict[str, tf.Tensor]:
            return self._retrieve_user(user_id, exclude, k)

        @tf.function(input_signature=[self._user_id, self._history, self._exclude, self._k])
        def retrieve(
            user_id: tf.Tensor, history: tf.Tensor, exclude: tf.Tensor, k: tf.Tensor
        ) -> dict[str, tf.Tensor]:
            return self._answer(self.encoder.embed_query(user_id, history), exclude, k)

        self._export(serving_default=serving_default, retrieve_user=retrieve_user)
        self._export(retrieve=retrieve)

    def _trace_embedding(self) -> None:
        @tf.function(input_signature=[self._user_id])
        def embed_user(user_id: tf.Tensor) -> dict[str, tf.Tensor]:
            return self.encoder.embed_user(user_id)

        @tf.function(input_signature=[self._user_id, self._history])
        def embed_query(user_id: tf.Tensor, history: tf.Tensor) -> dict[str, tf.Tensor]:
            return self.encoder.embed_query(user_id, history)

        def embed_candidate(
            item_id: tf.Tensor, features: dict[str, tf.Tensor]
        ) -> dict[str, tf.Tensor]:
            return self.encoder.embed_candidate(item_id, features)

        item_id, features = _input_signature(self.encoder.embed_candidate)
        self._export(embed_user=embed_user, embed_query=embed_query)
        self._export(embed_candidate=_traced(embed_candidate, [item_id], features))

    def _trace_filtered(self) -> None:
        @tf.function(input_signature=[self._user_id, self._exclude, self._allowed, self._k])
        def retrieve_user_filtered(
            user_id: tf.Tensor, exclude: tf.Tensor, allowed: tf.Tensor, k: tf.Tensor
        ) -> dict[str, tf.Tensor]:
            return self._retrieve_user(user_id, exclude, k, allowed)

        @tf.function(
            input_signature=[self._user_id, self._history, self._exclude, self._allowed, self._k]
        )
        def retrieve_filtered(
            user_id: tf.Tensor,
            history: tf.Tensor,
            exclude: tf.Tensor,
            allowed: tf.Tensor,
            k: tf.Tensor,
        ) -> dict[str, tf.Tensor]:
            return self._answer(self.encoder.embed_query(user_id, history), exclude, k, allowed)

        self._export(retrieve_user_filtered=retrieve_user_filtered)
        self._export(retrieve_filtered=retrieve_filtered)

    def _trace_with_features(self) -> None:
        by_features: Any = self.encoder.embed_query_with_features

        def embed_query_with_features(
            user_id: tf.Tensor, history: tf.Tensor, features: dict[str, tf.Tensor]
        ) -> dict[str, tf.Tensor]:
            return by_features(user_id, history, features)

        def retrieve_with_features(
            user_id: tf.Tensor,
            history: tf.Tensor,
            exclude: tf.Tensor,
            k: tf.Tensor,
            features: dict[str, tf.Tensor],
            allowed: tf.Tensor | None = None,
        ) -> dict[str, tf.Tensor]:
            return self._answer(by_features(user_id, history, features), exclude, k, allowed)

        features = _input_signature(by_features)[-1]
        query = [self._user_id, self._history]
        asked = [*query, self._exclude, self._k]
        self._export(
            embed_query_with_features=_traced(embed_query_with_features, query, features),
            retrieve_with_features=_traced(retrieve_with_features, asked, features),
        )
        if self._allowed_table is not None:
            self._export(
                retrieve_with_features_filtered=_traced(
                    retrieve_with_features, [*asked, self._allowed], features
                )
            )

    def _retrieve_user(
        self,
        user_id: tf.Tensor,
        exclude: tf.Tensor,
        k: tf.Tensor,
        allowed: tf.Tensor | None = None,
    ) -> dict[str, tf.Tensor]:
        excluded = tf.concat([self.encoder.known_items(user_id), exclude], axis=1)
        return self._answer(self.encoder.embed_user(user_id), excluded, k, allowed)

    def _answer(
        self,
        query: dict[str, tf.Tensor],
        exclude: tf.Tensor,
        k: tf.Tensor,
        allowed: tf.Tensor | None = None,
    ) -> dict[str, tf.Tensor]:
        """Answers embedded queries; `exclude` [B, E] and `allowed` [B, F] are padded with ""."""
        with tf.control_dependencies([tf.debugging.assert_positive(k, "k must be 1 or more")]):
            k = tf.identity(k)
        embeddings = query["embeddings"]
        # Rows; 0 is padding, an unknown item, or one that the index does not have.
        excluded = tf.sort(lookup(self._candidate_rows, exclude), axis=1)
        if allowed is not None:
            rows, scores = self._search_exact(embeddings, excluded, k, self._is_allowed(allowed))
        elif isinstance(self._index, ExactIndex):
            rows, scores = self._search_exact(embeddings, excluded, k)
        else:
            rows, scores = self._search(embeddings, excluded, k)
        missing = k - tf.shape(rows)[1]
        rows = tf.pad(rows, [[0, 0], [0, missing]])
        scores = tf.pad(scores, [[0, 0], [0, missing]], constant_values=-np.inf)
        return {
            "candidate_ids": tf.gather(self._candidate_ids, rows),
            "scores": scores,
            "is_known_user": query["is_known_user"],
        }

    def _is_allowed(self, allowed: tf.Tensor) -> tf.Tensor:
        """Tells which candidates have one of the values of a query: [B, num_candidates] bool."""
        codes = lookup(self._allowed_table, allowed)
        cells = tf.where(codes > 0)
        cells = tf.stack([cells[:, 0], tf.cast(tf.gather_nd(codes, cells), tf.int64)], axis=1)
        # Code 0 is padding, here of the candidates' values: nobody's choice.
        is_chosen = (
            tf.scatter_nd(
                cells,
                tf.ones([tf.shape(cells)[0]], tf.int32),
                tf.cast([tf.shape(allowed)[0], self._num_codes + 1], tf.int64),
            )
            > 0
        )
        has_filter = tf.reduce_any(allowed != "", axis=1, keepdims=True)
        is_allowed = tf.gather(is_chosen, self._codes[0], axis=1)
        for column in self._codes[1:]:
            is_allowed |= tf.gather(is_chosen, column, axis=1)
        return is_allowed | ~has_filter

    def _search(
        self, embeddings: tf.Tensor, excluded: tf.Tensor, k: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Over-fetches, drops the excluded; where fewer are left than there should be, exactly."""
        num_excluded = _num_distinct(excluded)
        # The maximum of no queries is the lowest int32.
        most_excluded = tf.maximum(tf.reduce_max(num_excluded), 0)
        width = tf.minimum(k + most_excluded, self._num_candidates)
        places, scores = self._index.search(embeddings, width)
        rows = tf.where(scores > -np.inf, places + 1, 0)
        scores = tf.where(_is_in_sorted(rows, excluded) | (rows == 0), -np.inf, scores)
        depth = tf.minimum(k, tf.shape(scores)[1])
        top_scores, order = tf.math.top_k(scores, depth)
        top_rows = tf.where(top_scores > -np.inf, tf.gather(rows, order, batch_dims=1), 0)
        num_found = tf.reduce_sum(tf.cast(top_rows > 0, tf.int32), axis=1)
        is_short = num_found < tf.minimum(k, self._num_candidates - num_excluded)
        return tf.cond(
            tf.reduce_any(is_short),
            lambda: self._search_exact(embeddings, excluded, k),
            lambda: (top_rows, top_scores),
        )

    def _search_exact(
        self,
        embeddings: tf.Tensor,
        excluded: tf.Tensor,
        k: tf.Tensor,
        is_allowed: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        scores = self.exact.scores(embeddings)
        if is_allowed is not None:
            scores = tf.where(is_allowed, scores, -np.inf)
        cells = tf.where(excluded > 0)
        columns = tf.cast(tf.gather_nd(excluded, cells), tf.int64) - 1
        cells = tf.stack([cells[:, 0], columns], axis=1)
        lowest = tf.fill([tf.shape(cells)[0]], tf.constant(-np.inf, tf.float32))
        scores = tf.tensor_scatter_nd_update(scores, cells, lowest)
        top_scores, places = tf.math.top_k(scores, tf.minimum(k, self._num_candidates))
        return tf.where(top_scores > -np.inf, places + 1, 0), top_scores


def _input_signature(function: Any) -> Sequence[Any]:
    """Returns the positional inputs of a function with one signature, made here or loaded."""
    if hasattr(function, "input_signature"):
        return function.input_signature
    (concrete,) = function.concrete_functions
    return concrete.structured_input_signature[0]


def _traced(
    function: Callable[..., Any],
    specs: Sequence[tf.TensorSpec],
    features: Mapping[str, tf.TensorSpec],
) -> Any:
    """Traces a function whose last argument is features, each an input of its own."""
    inputs = {spec.name: spec for spec in [*specs, *features.values()]}

    def with_inputs(**values: tf.Tensor) -> Any:
        own = {spec.name: values[spec.name] for spec in specs}
        return function(
            **own, features={name: values[spec.name] for name, spec in features.items()}
        )

    return tf.function(with_inputs).get_concrete_function(**inputs)


def _num_distinct(rows: tf.Tensor) -> tf.Tensor:
    """Counts each line's distinct rows above 0; `rows` is sorted, [B, E] -> [B]."""
    first = tf.concat([tf.ones_like(rows[:, :1], tf.bool), rows[:, 1:] != rows[:, :-1]], axis=1)
    return tf.reduce_sum(tf.cast(first & (rows > 0), tf.int32), axis=1)


def _is_in_sorted(rows: tf.Tensor, sorted_rows: tf.Tensor) -> tf.Tensor:
    """Tells which of `rows` [B, n] are in the same line of `sorted_rows` [B, E]."""
    # A last column that equals nothing keeps the lookup in range, also when E is 0.
    last = tf.fill([tf.shape(rows)[0], 1], tf.int32.max)
    lines = tf.concat([sorted_rows, last], axis=1)
    return tf.gather(lines, tf.searchsorted(lines, rows), batch_dims=1) == rows
