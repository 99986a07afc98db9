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

from tfrs_pipeline.export.encoder import EMBEDDINGS, Encoder, query_arrays
from tfrs_pipeline.export.graph_index import (
    ExactIndex,
    ScannIndex,
    load_scann_ops,
    search_with_bonuses,
)
from tfrs_pipeline.features.encoding import raw_signature
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.graph import tensor_specs
from tfrs_pipeline.model import tf_tables
from tfrs_pipeline.model.tf_tables import as_tensors, completed, signature_inputs
from tfrs_pipeline.retrieval import Query
from tfrs_pipeline.search.searcher import Searcher, in_fresh_process
from tfrs_pipeline.service.publish import DEFAULT_K, DEFAULT_SIGNATURE, RETRIEVALS, SIMILAR


class RetrievalModule(tf.Module):
    """An encoder, built or loaded, and an index behind raw ids.

    Its signatures are attributes too; saved_models/README.md lists them. Those that retrieve take
    the inputs of the encoder's function for the query, then `exclude` and `k`. `candidate_ids` are
    in the order of the index's embeddings.
    """

    def __init__(
        self,
        encoder: Encoder,
        index: ExactIndex | ScannIndex,
        candidate_ids: np.ndarray,
        has_item_bias: bool = False,
    ) -> None:
        super().__init__(name="retrieval")
        self.encoder, self.index = encoder, index
        self._has_item_bias = has_item_bias
        self._candidate_rows = tf_tables.row_table(candidate_ids)
        self._candidate_ids = tf_tables.stored(tf_tables.with_empty(candidate_ids))
        self._names: tuple[str, ...] = ()
        self._trace()

    @property
    def exported(self) -> dict[str, Any]:
        """The signatures by name."""
        return {name: getattr(self, name) for name in self._names}

    def _export(self, name: str, function: Any, inputs: Sequence[tf.TensorSpec]) -> None:
        # An attribute can be called on the loaded object too.
        setattr(self, name, tf_tables.traced(function, inputs))
        self._names += (name,)

    def _trace(self) -> None:
        item_id = tf.TensorSpec([None], self._candidate_ids.dtype, "item_id")
        exclude = tf.TensorSpec([None, None], self._candidate_ids.dtype, "exclude")
        k = tf.TensorSpec([], tf.int32, "k")
        # How queries become embeddings, and the inputs for it, by the name in RETRIEVALS.
        embeds: dict[str, Callable[..., Any]] = {SIMILAR: self._item_queries}
        inputs = {SIMILAR: [item_id]}
        for name in EMBEDDINGS:
            # An encoder lacks the functions that its model does not support.
            if (function := getattr(self.encoder, name, None)) is not None:
                embeds[name] = functools.partial(_embedded, function)
                inputs[name] = [*signature_inputs(function).values()]
                self._export(name, embeds[name], inputs[name])
        for name, embed_name in RETRIEVALS.items():
            if embed_name in embeds:
                answer = functools.partial(self._answer, embeds[embed_name])
                self._export(name, answer, [*inputs[embed_name], exclude, k])
        if "embed_user" in embeds:
            self._export(DEFAULT_SIGNATURE, self._answer_default, inputs["embed_user"][:1])

    def _answer_default(self, user_id: tf.Tensor) -> dict[str, tf.Tensor]:
        # Request features and times are missing.
        known = {"user_id": user_id, "k": tf.constant(DEFAULT_K)}
        specs = signature_inputs(self.retrieve_user)
        return tf_tables.call(self.retrieve_user, completed(specs, known, tf.shape(user_id)[0]))

    def _answer(
        self, embed: Callable[..., Any], /, exclude: tf.Tensor, k: tf.Tensor, **query: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Answers queries; empty ids pad `exclude` [B, E]."""
        with tf.control_dependencies([tf.debugging.assert_positive(k, "k must be 1 or more")]):
            k = tf.identity(k)
        embedded = dict(embed(**query))
        # Items of a given history are not excluded, unless `exclude` holds them.
        if "known_items" in embedded:
            exclude = tf.concat([embedded.pop("known_items"), exclude], axis=1)
        # Row 0 is padding, an unknown item, or one that the index does not have.
        excluded = tf_tables.lookup(self._candidate_rows, exclude)
        vectors = embedded.pop("embeddings")
        if "bonuses" in embedded:
            repeated = tf_tables.lookup(self._candidate_rows, embedded.pop("repeated_items"))
            rows, scores = search_with_bonuses(
                self.index, vectors, k, excluded, repeated, embedded.pop("bonuses")
            )
        else:
            rows, scores = self.index.search(vectors, k, excluded)
        # The rest says what the encoder knew of the query.
        return {
            "candidate_ids": tf.gather(self._candidate_ids, rows),
            "scores": scores,
            **embedded,
        }

    def _item_queries(self, item_id: tf.Tensor) -> dict[str, tf.Tensor]:
        """Makes queries of items as `LoadedRetriever.similar` does."""
        rows = tf_tables.lookup(self._candidate_rows, item_id)
        unknown = tf.boolean_mask(item_id, rows == 0)
        check = tf.debugging.Assert(
            tf.size(unknown) == 0, ["Not among the model's items:", unknown]
        )
        with tf.control_dependencies([check]):
            vectors = tf.gather(self.index.embeddings, rows - 1)
        if self._has_item_bias:
            vectors = tf.concat([vectors[:, :-1], tf.ones_like(vectors[:, -1:])], axis=1)
        return {"embeddings": vectors, "known_items": item_id[:, tf.newaxis]}


def _embedded(embed: Callable[..., Any], /, **inputs: tf.Tensor) -> Any:
    return tf_tables.call(embed, inputs)


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
    features: Mapping[str, Sequence[Feature]],
) -> None:
    """Checks that a fresh process can load each folder and answers like its module in memory.

    The probes are `queries` and `item_ids`. Each of `features` has a value that it knows, so that
    lookups are checked too. Exact modules must come first: the process then shows that they load
    without ScaNN's operation.
    """
    item_examples = _examples(features.get("candidate", ()), len(item_ids))
    query_examples = _examples(
        [*features.get("query", ()), *features.get("request", ())], len(queries)
    )
    probes: list[tuple[str, bool, _Expected]] = []
    for folder, module in modules.items():
        expected: _Expected = {}
        for name, function in module.exported.items():
            specs = signature_inputs(function)
            if (item_id := specs.get("item_id")) is not None:
                known = {**item_examples, "item_id": tf.constant(item_ids, item_id.dtype)}
            else:
                arrays = query_arrays(specs, features, queries)
                known = {**as_tensors(specs, arrays), **query_examples}
            num_rows = len(queries) if item_id is None else len(item_ids)
            inputs = completed(specs, {**known, "k": tf.constant(10)}, num_rows)
            expected[name] = _arrays(inputs), _arrays(tf_tables.call(function, inputs))
        probes.append((str(folder), isinstance(module.index, ScannIndex), expected))
    done = in_fresh_process(f"{__name__}:answer_probes", stdin=pickle.dumps(probes))
    if done.returncode:
        problems = done.stderr.decode(errors="replace").strip()[-2000:]
        raise ExportError(f"A fresh process could not use the export: {problems}")


def _examples(features: Sequence[Feature], num_rows: int) -> dict[str, tf.Tensor]:
    """Makes inputs of a value that each feature knows, by the name of the input."""
    inputs = {}
    specs = tensor_specs(raw_signature(features)).values()
    for feature, spec in zip(features, specs, strict=True):
        value = (*feature.vocabulary, "1")[0] if spec.dtype == tf.string else 1.0
        shape = [num_rows, *(size or 1 for size in spec.shape[1:])]
        inputs[spec.name] = tf.fill(shape, tf.constant(value, spec.dtype))
    return inputs


def _arrays(tensors: Mapping[str, tf.Tensor]) -> _Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def check_operation(index: ScannIndex, searcher: Searcher, queries: np.ndarray) -> None:
    """Checks that ScaNN's operation scores as its searcher does, at every level."""
    for level in index.levels:
        _, scores, _ = searcher.search(queries, level)
        _, others = index.approximate(tf.constant(queries), *astuple(level))
        if problem := difference({"scores": scores}, {"scores": others.numpy()}):
            raise ExportError(
                f"ScaNN's TensorFlow operation does not answer as its searcher does: {problem}"
            )


def difference(expected: _Arrays, answer: _Arrays) -> str:
    """Describes how an answer differs, or returns ""; ids with equal scores may swap places."""
    shapes, others = (
        {key: array.shape for key, array in arrays.items()} for arrays in (expected, answer)
    )
    if shapes != others:
        return f"shapes {others} instead of {shapes}"
    for key, array in expected.items():
        # Floats and booleans. Ids follow below, where ties are allowed.
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
    # Ids are compared only where neither neighbour has the same score. The tolerance is twice that
    # of a score, because both of them may be off.
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
        for name, (inputs, outputs) in expected.items():
            signature = loaded.signatures[name]
            tensors = as_tensors(signature_inputs(signature), inputs)
            if problem := difference(outputs, _arrays(signature(**tensors))):
                problems.append(f"{folder}: {name}: {problem}")
    return "\n".join(problems) or None
