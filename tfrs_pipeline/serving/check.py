"""Loads SavedModels in a fresh process, and compares their answers with expected ones."""

import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features.encoding import raw_signature
from tfrs_pipeline.model.encoder import features_of, query_inputs
from tfrs_pipeline.model.graph import call, signature_inputs
from tfrs_pipeline.retrieval import Query
from tfrs_pipeline.serving.graph_index import ScannIndex, load_scann_ops
from tfrs_pipeline.serving.saved_model import RetrievalModule
from tfrs_pipeline.serving.searcher import Searcher, in_fresh_process
from tfrs_pipeline.serving.signatures import ask, completed

# A reloaded model may run other kernels, so that scores differ in their last bits.
SCORE_TOLERANCE = 1e-4

_Arrays: TypeAlias = dict[str, np.ndarray]
# The inputs and the outputs of each signature.
_Expected: TypeAlias = dict[str, tuple[_Arrays, _Arrays]]


class ExportError(RuntimeError):
    """An export cannot be loaded, or its answers differ from those of the model in memory."""


def example_values(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns an example value for every feature and the filter, by side and input name.

    "candidate" and "query" are separate, because both may have a feature of the same name.
    """
    sides = features_of(manifest)
    values: dict[str, dict[str, Any]] = {"candidate": {}, "query": {}}
    for side, of_side in values.items():
        features = sides[side] + (sides["request"] if side == "query" else ())
        for feature, spec in zip(features, raw_signature(features).values(), strict=True):
            known = (*feature.vocabulary, "1")[0]
            of_side[spec.name] = known if spec.dtype == tf.string else 1.0
    if manifest["filter"] and manifest["filter"]["values"]:
        values["query"]["allowed"] = manifest["filter"]["values"][0]
    return values


def prove(
    modules: Mapping[Path, RetrievalModule],
    queries: Sequence[Query],
    item_ids: Sequence[Any],
    values: Mapping[str, Mapping[str, Any]],
) -> None:
    """Checks that a fresh process can load each folder and answers like its module in memory.

    Asks with `queries` and `item_ids`; other inputs are filled from `values`, or are missing.
    """
    probes: list[tuple[str, bool, _Expected]] = []
    for folder, module in modules.items():
        expected: _Expected = {}
        for name, function in module.exported.items():
            inputs = _inputs(function, queries, item_ids, values)
            sides = inputs, call(function, inputs)
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


def _inputs(
    function: Any,
    queries: Sequence[Query],
    item_ids: Sequence[Any],
    values: Mapping[str, Mapping[str, Any]],
) -> dict[str, tf.Tensor]:
    specs = signature_inputs(function)
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
    is_tied = np.zeros(scores.shape, bool)
    is_close = np.diff(scores, axis=1) > -2 * SCORE_TOLERANCE
    is_tied[:, 1:] |= is_close
    is_tied[:, :-1] |= is_close
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
