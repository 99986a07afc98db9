"""What is served: an encoder and an index behind raw ids, as one TensorFlow module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.vocabulary import has_booleans, lower_booleans
from tfrs_pipeline.serving.encoder import Encoder, signature_inputs, traced
from tfrs_pipeline.serving.id_tensors import empty_id, lookup, row_table, stored, with_empty
from tfrs_pipeline.serving.index import Allowed, ExactIndex, ScannIndex

DEFAULT_K = 100


class ItemFilter(tf.Module):
    """Values by which a request may choose items, such as their genres.

    `column`, of this name, has a value or a list of values per candidate; None and "" are none.
    """

    def __init__(self, name: str, column: Sequence[Any]) -> None:
        super().__init__(name="item_filter")
        lists = Feature(name, "multi_categorical").to_raw(column).tolist()
        rows = [[value for value in dict.fromkeys(values) if value] for values in lists]
        values = sorted({value for row in rows for value in row})
        self._column, self._values = name, tuple(values)
        code_of = {value: code for code, value in enumerate(values, 1)}
        codes = np.zeros((len(rows), max([1, *map(len, rows)])), np.int32)
        for line, row in zip(codes, rows, strict=True):
            line[: len(row)] = [code_of[value] for value in row]
        self._table = row_table(np.array(values, object))
        self._codes = stored(np.pad(codes, [[1, 0], [0, 0]]))
        shares = np.bincount(codes.ravel(), minlength=len(values) + 1) / max(1, len(rows))
        self._shares = tf.constant(np.where(np.arange(len(shares)), shares, 0), tf.float32)

    def describe(self) -> dict[str, Any]:
        """Returns name and distinct values, for the manifest."""
        return {"name": self._column, "values": list(self._values)}

    def choose(self, allowed: tf.Tensor) -> Allowed:
        """Tells which candidates each query may have: those with one of its values.

        `allowed` are [B, F] values, padded with ""; a query without any may have every candidate.
        """
        if has_booleans(self._values):
            allowed = lower_booleans(allowed)
        codes = lookup(self._table, allowed)
        num_codes = len(self._values) + 1
        is_chosen = tf.math.bincount(
            codes, minlength=num_codes, maxlength=num_codes, axis=-1, binary_output=True
        )
        # Code 0 is padding, here and of the candidates' values, or unknown: nobody's choice.
        is_chosen = (is_chosen > 0) & (tf.range(num_codes) > 0)
        # Those with two of the values are counted twice.
        share = tf.reduce_sum(tf.where(is_chosen, self._shares, 0), axis=1)
        is_any = tf.reduce_all(allowed == "", axis=1)
        share = tf.where(is_any, 1.0, tf.minimum(share, 1))
        return Allowed(is_chosen | is_any[:, tf.newaxis], self._codes, share)


class RetrievalModule(tf.Module):
    """An encoder and an index behind raw ids.

    saved_models/README.md lists its signatures. They are attributes too, called by position in the
    order of that list. Given features and what a request brings (`request_signature`) come before
    `exclude`, or last where there is none; `serving_default` takes nothing of a request. Where the
    model reads times, signatures with a history take `history_timestamps` [B, L] after these:
    float64 seconds since 1970, NaN where not known. A model without users has none of
    `serving_default`, `retrieve_user...` and `embed_user`.

    Args:
        encoder: `Encoder`, or what one was loaded as.
        index: Over the candidates' embeddings.
        candidate_ids: [num_candidates] item ids, in the order of the embeddings.
        item_filter: Values that requests may filter by.
    """

    def __init__(
        self,
        encoder: Encoder,
        index: ExactIndex | ScannIndex,
        candidate_ids: np.ndarray,
        item_filter: ItemFilter | None = None,
    ) -> None:
        super().__init__(name="retrieval")
        self.encoder = encoder
        self.exact = index.exact
        self._index = index
        self._item_filter = item_filter
        self._candidate_rows = row_table(candidate_ids)
        self._candidate_ids = stored(with_empty(candidate_ids))
        self._names: tuple[str, ...] = ()
        self._trace()

    @property
    def exported(self) -> dict[str, Any]:
        """The signatures, by name."""
        return {name: getattr(self, name) for name in self._names}

    def _export(
        self, name: str, function: Callable[..., Any], inputs: Sequence[tf.TensorSpec]
    ) -> None:
        """Adds a signature; as an attribute it is callable on the loaded object too."""
        setattr(self, name, traced(function, inputs))
        self._names += (name,)

    def _trace(self) -> None:
        exclude = tf.TensorSpec([None, None], self._candidate_ids.dtype, "exclude")
        allowed = tf.TensorSpec([None, None], tf.string, "allowed")
        k = tf.TensorSpec([], tf.int32, "k")
        for embed_name, name in (
            ("embed_user", "retrieve_user"),
            ("embed_query", "retrieve"),
            ("embed_query_with_features", "retrieve_with_features"),
        ):
            # One that is None is not saved.
            embed = getattr(self.encoder, embed_name, None)
            if embed is None:
                continue
            query = list(signature_inputs(embed).values())
            self._export(embed_name, functools.partial(_by_position, embed), query)
            answer = functools.partial(self._answer, embed)
            self._export(name, answer, [*query, exclude, k])
            if self._item_filter is not None:
                self._export(f"{name}_filtered", answer, [*query, exclude, k, allowed])
        embed = self.encoder.embed_candidate
        item = list(signature_inputs(embed).values())
        self._export("embed_candidate", functools.partial(_by_position, embed), item)
        if "retrieve_user" in self._names:
            user_id, *_ = signature_inputs(self.encoder.embed_user).values()
            self._export("serving_default", self._answer_default, [user_id])

    def _answer_default(self, user_id: tf.Tensor) -> dict[str, tf.Tensor]:
        embed, num_queries = self.encoder.embed_user, tf.shape(user_id)[0]
        nothing = tf.zeros([num_queries, 0], self._candidate_ids.dtype)
        _, *request = signature_inputs(embed).values()
        missing = {spec.name: missing_input(spec, num_queries) for spec in request}
        return self._answer(embed, nothing, tf.constant(DEFAULT_K), user_id=user_id, **missing)

    def _answer(
        self,
        embed: Callable[..., dict[str, tf.Tensor]],
        /,
        exclude: tf.Tensor,
        k: tf.Tensor,
        allowed: tf.Tensor | None = None,
        **query: tf.Tensor,
    ) -> dict[str, tf.Tensor]:
        """Answers queries; `exclude` [B, E] and `allowed` [B, F] are padded with ""."""
        if "history" not in query:  # By what is known of the user, who knows these items.
            exclude = tf.concat([self.encoder.known_items(query["user_id"]), exclude], axis=1)
        with tf.control_dependencies([tf.debugging.assert_positive(k, "k must be 1 or more")]):
            k = tf.identity(k)
        embedded = embed(*query.values())
        # Row 0 is padding, an unknown item, or one that the index does not have.
        excluded = lookup(self._candidate_rows, exclude)
        chosen = None
        if self._item_filter is not None and allowed is not None:
            chosen = self._item_filter.choose(allowed)
        rows, scores = self._index.search(embedded["embeddings"], k, excluded, chosen)
        return {
            "candidate_ids": tf.gather(self._candidate_ids, rows),
            "scores": scores,
            "is_known_user": embedded["is_known_user"],
        }


def _by_position(function: Callable[..., Any], /, **inputs: tf.Tensor) -> Any:
    return function(*inputs.values())


def missing_input(spec: tf.TensorSpec, num_rows: int) -> tf.Tensor:
    """Makes an input that says nothing: empty ids, empty lists, missing features; a k of 1.

    `num_rows` are the queries or items, without meaning to a k.
    """
    if spec.shape.rank == 0:
        return tf.constant(1, spec.dtype)
    shape = [num_rows, *(size or 0 for size in spec.shape[1:])]
    return tf.fill(shape, tf.constant(missing_value(spec.dtype), spec.dtype))


def missing_value(dtype: tf.DType) -> Any:
    """Returns the value of an input that says nothing: NaN, an empty string, or the empty id."""
    if dtype.is_floating:
        return np.nan
    return b"" if dtype == tf.string else empty_id(dtype)
