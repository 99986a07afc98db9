"""The exported module: an encoder and an index behind raw ids."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.model import graph
from tfrs_pipeline.model.encoder import Encoder
from tfrs_pipeline.serving.graph_index import ExactIndex, ScannIndex
from tfrs_pipeline.serving.item_filter import ItemFilter
from tfrs_pipeline.serving.signatures import EMBEDDINGS, RETRIEVALS, Retrieval, completed

DEFAULT_K = 100


class RetrievalModule(tf.Module):
    """An encoder, built or loaded, and an index behind raw ids.

    Its signatures are attributes too; saved_models/README.md lists them. Those that retrieve take
    the inputs of the encoder's function for the query, then `exclude`, `k` and `allowed`.
    `candidate_ids` are in the order of the index's embeddings.
    """

    def __init__(
        self,
        encoder: Encoder,
        index: ExactIndex | ScannIndex,
        candidate_ids: np.ndarray,
        item_filter: ItemFilter | None = None,
        has_item_bias: bool = False,
    ) -> None:
        super().__init__(name="retrieval")
        self.encoder = encoder
        self.exact = index.exact
        self._index = index
        self._item_filter = item_filter
        self._has_item_bias = has_item_bias
        self._candidate_rows = graph.row_table(candidate_ids)
        self._candidate_ids = graph.stored(graph.with_empty(candidate_ids))
        self._names: tuple[str, ...] = ()
        self._trace()

    @property
    def exported(self) -> dict[str, Any]:
        """The signatures by name."""
        return {name: getattr(self, name) for name in self._names}

    def _export(self, name: str, function: Any, inputs: Sequence[tf.TensorSpec]) -> None:
        # An attribute can be called on the loaded object too.
        setattr(self, name, graph.traced(function, inputs))
        self._names += (name,)

    def _trace(self) -> None:
        # An encoder lacks the functions that its model does not support.
        embeds = {x: f for x in EMBEDDINGS if (f := getattr(self.encoder, x, None)) is not None}
        queries = {x: [*graph.signature_inputs(f).values()] for x, f in embeds.items()}
        for name, embed in embeds.items():
            self._export(name, functools.partial(_embedded, embed), queries[name])
        item_id = tf.TensorSpec([None], self._candidate_ids.dtype, "item_id")
        queries[Retrieval("item").embed_name] = [item_id]
        exclude = tf.TensorSpec([None, None], self._candidate_ids.dtype, "exclude")
        k = tf.TensorSpec([], tf.int32, "k")
        allowed = tf.TensorSpec([None, None], tf.string, "allowed")
        for retrieval in RETRIEVALS:
            if retrieval.is_filtered and self._item_filter is None:
                continue
            if query := queries.get(retrieval.embed_name):
                inputs = [*query, exclude, k]
                inputs += [allowed] if retrieval.is_filtered else []
                self._export(retrieval.name, functools.partial(self._answer, retrieval), inputs)
        if "embed_user" in embeds:
            user_id = graph.signature_inputs(embeds["embed_user"])["user_id"]
            self._export("serving_default", self._answer_default, [user_id])

    def _answer_default(self, user_id: tf.Tensor) -> dict[str, tf.Tensor]:
        retrieval = Retrieval("user")
        specs = graph.signature_inputs(getattr(self, retrieval.name))
        given = {"user_id": user_id, "k": tf.constant(DEFAULT_K)}
        return self._answer(retrieval, **completed(specs, given, tf.shape(user_id)[0]))

    def _answer(
        self,
        retrieval: Retrieval,
        /,
        exclude: tf.Tensor,
        k: tf.Tensor,
        allowed: tf.Tensor | None = None,
        **query: tf.Tensor,
    ) -> dict[str, tf.Tensor]:
        """Answers queries; empty ids pad `exclude` [B, E], and "" pads `allowed` [B, F]."""
        with tf.control_dependencies([tf.debugging.assert_positive(k, "k must be 1 or more")]):
            k = tf.identity(k)
        if retrieval.asks_by == "item":
            embedded = self._item_queries(**query)
        else:
            embedded = graph.call(getattr(self.encoder, retrieval.embed_name), query)
        # Items of a given history are not excluded, unless `exclude` holds them.
        if "known_items" in embedded:
            exclude = tf.concat([embedded["known_items"], exclude], axis=1)
        # Row 0 is padding, an unknown item, or one that the index does not have.
        excluded = graph.lookup(self._candidate_rows, exclude)
        chosen = None
        if self._item_filter is not None and allowed is not None:
            chosen = self._item_filter.choose(allowed)
        rows, scores = self._index.search(embedded["embeddings"], k, excluded, chosen)
        answer = {"candidate_ids": tf.gather(self._candidate_ids, rows), "scores": scores}
        if retrieval.asks_by != "item":
            answer["is_known_user"] = embedded["is_known_user"]
        return answer

    def _item_queries(self, item_id: tf.Tensor) -> dict[str, tf.Tensor]:
        """Makes queries of items as `LoadedRetriever.similar` does."""
        rows = graph.lookup(self._candidate_rows, item_id)
        unknown = tf.boolean_mask(item_id, rows == 0)
        check = tf.debugging.Assert(
            tf.size(unknown) == 0, ["Not among the model's items:", unknown]
        )
        with tf.control_dependencies([check]):
            vectors = tf.gather(self.exact.embeddings, rows - 1)
        if self._has_item_bias:
            vectors = tf.concat([vectors[:, :-1], tf.ones_like(vectors[:, -1:])], axis=1)
        return {"embeddings": vectors, "known_items": item_id[:, tf.newaxis]}


def _embedded(embed: Callable[..., Any], /, **inputs: tf.Tensor) -> Any:
    return graph.call(embed, inputs)
