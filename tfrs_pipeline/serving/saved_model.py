"""The exported module, an encoder and an index behind raw ids, and the proof that it works."""

import functools
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features.encoding import raw_signature
from tfrs_pipeline.model import graph
from tfrs_pipeline.model.encoder import Encoder, features_of, query_inputs
from tfrs_pipeline.retrieval import Query
from tfrs_pipeline.serving.graph_index import ExactIndex, ItemFilter, ScannIndex, load_scann_ops
from tfrs_pipeline.serving.searcher import Searcher, in_fresh_process
from tfrs_pipeline.serving.signatures import DEFAULT_K, RETRIEVALS, Retrieval, ask, completed

_EMBEDDINGS = ("embed_user", "embed_query", "embed_query_with_features", "embed_candidate")


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
        self.exact = index.exact if isinstance(index, ScannIndex) else index
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
        embeds = {x: f for x in _EMBEDDINGS if (f := getattr(self.encoder, x, None)) is not None}
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
            exclude = tf.concat([embedded.pop("known_items"), exclude], axis=1)
        # Row 0 is padding, an unknown item, or one that the index does not have.
        excluded = graph.lookup(self._candidate_rows, exclude)
        chosen = None
        if self._item_filter is not None and allowed is not None:
            chosen = self._item_filter.choose(allowed)
        rows, scores = self._index.search(embedded.pop("embeddings"), k, excluded, chosen)
        # The rest says what the encoder knew of the query.
        answer = {"candidate_ids": tf.gather(self._candidate_ids, rows), "scores": scores}
        return {**answer, **embedded}

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


# A reloaded model may run other kernels, so that scores differ in their last bits.
SCORE_TOLERANCE = 1e-4

_Arrays: TypeAlias = dict[str, np.ndarray]
# The inputs and the outputs of each signature.
_Expected: TypeAlias = dict[str, tuple[_Arrays, _Arrays]]


class ExportError(RuntimeError):
    """An export cannot be loaded, or its answers differ from those of the model in memory."""


def prove(
    modules: Mapping[Path, RetrievalModule],
    queries: Sequence[Query],
    item_ids: Sequence[Any],
    manifest: Mapping[str, Any],
) -> None:
    """Checks that a fresh process can load each folder and answers like its module in memory.

    Asks with `queries` and `item_ids`; other inputs have an example value, or are missing.
    """
    values = _example_values(manifest)
    probes: list[tuple[str, bool, _Expected]] = []
    for folder, module in modules.items():
        expected: _Expected = {}
        for name, function in module.exported.items():
            inputs = _inputs(function, queries, item_ids, values)
            sides = inputs, graph.call(function, inputs)
            given, answer = ({key: x.numpy() for key, x in side.items()} for side in sides)
            expected[name] = given, answer
        needs_scann = any(isinstance(part, ScannIndex) for part in module.submodules)
        probes.append((str(folder), needs_scann, expected))
    # Exact modules come first, since they must load without ScaNN's operation.
    probes.sort(key=lambda probe: probe[1])
    done = in_fresh_process(f"{__name__}:answer_probes", stdin=pickle.dumps(probes))
    if done.returncode:
        problems = done.stderr.decode(errors="replace").strip()[-2000:]
        raise ExportError(f"A fresh process could not use the export: {problems}")


def check_operation(index: ScannIndex, searcher: Searcher, queries: np.ndarray) -> None:
    """Checks that ScaNN's operation scores as its searcher does, at every level."""
    for level in index.levels:
        _, scores, _ = searcher.search(queries, level)
        _, others = index.approximate(tf.constant(queries), *astuple(level))
        if problem := difference({"scores": scores}, {"scores": others.numpy()}):
            raise ExportError(
                f"ScaNN's TensorFlow operation does not answer as its searcher does: {problem}"
            )


def _example_values(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns an example value for every feature and the filter, by side and input name.

    "candidate" and "query" are separate, because both may have a feature of the same name.
    """
    query, request, candidate = features_of(manifest).values()
    values = {
        side: {
            spec.name: (*feature.vocabulary, "1")[0] if spec.dtype == tf.string else 1.0
            for feature, spec in zip(features, raw_signature(features).values(), strict=True)
        }
        for side, features in {"candidate": candidate, "query": query + request}.items()
    }
    if manifest["filter"] and manifest["filter"]["values"]:
        values["query"]["allowed"] = manifest["filter"]["values"][0]
    return values


def _inputs(
    function: Any,
    queries: Sequence[Query],
    item_ids: Sequence[Any],
    values: Mapping[str, Mapping[str, Any]],
) -> dict[str, tf.Tensor]:
    specs = graph.signature_inputs(function)
    inputs = {"k": tf.constant(10), **query_inputs(function, queries)}
    num_rows, of_side = len(queries), values["query"]
    if "item_id" in specs:
        num_rows = len(item_ids)
        of_side = values["query" if "k" in specs else "candidate"]  # Similar items have a filter.
        inputs["item_id"] = tf.constant(item_ids, specs["item_id"].dtype)
    for name in specs.keys() & of_side:
        shape = [num_rows, *(size or 1 for size in specs[name].shape[1:])]
        inputs[name] = tf.fill(shape, tf.constant(of_side[name], specs[name].dtype))
    return completed(specs, inputs, num_rows)


def difference(expected: _Arrays, answer: _Arrays) -> str:
    """Describes how an answer differs, or returns ""; ids with equal scores may swap places."""
    shapes, others = ({key: x.shape for key, x in side.items()} for side in (expected, answer))
    if shapes != others:
        return f"shapes {others} instead of {shapes}"
    for key, array in expected.items():
        if array.dtype.kind not in "fb":
            continue
        array, other = array.astype(float), answer[key].astype(float)
        if not np.allclose(other, array, rtol=0, atol=SCORE_TOLERANCE):
            finite = np.isfinite(array) & np.isfinite(other)
            worst = np.abs(other[finite] - array[finite]).max(initial=0)
            return f"{key} differ by up to {worst}"
    if "candidate_ids" not in expected:
        return ""
    scores, is_other = expected["scores"], answer["candidate_ids"] != expected["candidate_ids"]
    # Ids are compared only where neither neighbour has the same score.
    is_close = np.pad(np.diff(scores, axis=1) > -2 * SCORE_TOLERANCE, [[0, 0], [1, 1]])
    is_tied = is_close[:, 1:] | is_close[:, :-1]
    num_other = int((is_other & ~is_tied & np.isfinite(scores)).sum())
    return f"{num_other} of {scores.size} candidate ids differ" if num_other else ""


def answer_probes() -> str | None:
    """Answers the probes on standard input; returns the differences, None if there are none."""
    problems = []
    for folder, needs_scann, expected in pickle.load(sys.stdin.buffer):
        if needs_scann:
            load_scann_ops()
        loaded = tf.saved_model.load(folder)
        for name, (given, outputs) in expected.items():
            if problem := difference(outputs, ask(loaded.signatures[name], given)):
                problems.append(f"{folder}: {name}: {problem}")
    return "\n".join(problems) or None
