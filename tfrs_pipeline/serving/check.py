"""Loads SavedModels in a fresh process, and compares their answers with recorded ones.

    python -m tfrs_pipeline.serving.check FOLDER...

A folder holds the model and its `probe.npz`. Brute-force fallbacks come first, before ScaNN's op is
loaded. Exits with 0 if all answers are the same, else with 1 and the differences on standard error.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features.encoding import raw_signature
from tfrs_pipeline.model.encoder import features_of, query_inputs
from tfrs_pipeline.model.graph_functions import call, signature_inputs
from tfrs_pipeline.retrieval import Query
from tfrs_pipeline.serving.index import load_scann_ops
from tfrs_pipeline.serving.publish import EXACT_FOLDER
from tfrs_pipeline.serving.saved_model import RetrievalModule
from tfrs_pipeline.serving.signatures import ask, missing_input

# A reloaded model may run other kernels: the same answer, not the same bits.
SCORE_TOLERANCE = 1e-4
PROBE_FILE = "probe.npz"
# Last on the path, so that it hides no module of the standard library.
_PROGRAM = """
import runpy, sys
sys.path.append(sys.argv.pop(1))
runpy.run_module("tfrs_pipeline.serving.check", run_name="__main__", alter_sys=True)
"""


class ExportError(RuntimeError):
    """An export that cannot be loaded or answers otherwise than the model in memory."""


def example_values(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns a value for every feature and the filter, by the name of its input.

    "candidate" and "query" are apart, because both may have a feature of that name.
    """
    sides = features_of(manifest)
    values: dict[str, dict[str, Any]] = {}
    of_query = (*sides["query"], *sides["request"])
    for side, features in (("candidate", sides["candidate"]), ("query", of_query)):
        values[side] = {}
        for feature, spec in zip(features, raw_signature(features).values(), strict=True):
            known = (*feature.known_values, "1")[0]
            values[side][spec.name] = known if spec.dtype == tf.string else 1.0
    if manifest["filter"] and manifest["filter"]["values"]:
        values["query"]["allowed"] = manifest["filter"]["values"][0]
    return values


def _probe(
    function: Any,
    queries: Sequence[Query],
    item_ids: Sequence[Any],
    values: Mapping[str, Mapping[str, Any]],
) -> dict[str, tf.Tensor]:
    """Makes the inputs to ask a signature with."""
    specs = signature_inputs(function)
    inputs = {"k": tf.constant(10), **query_inputs(function, queries)}
    num_rows, of_side = len(queries), values["query"]
    if "item_id" in specs:
        num_rows, of_side = len(item_ids), values["candidate"]
        inputs["item_id"] = tf.constant(item_ids, specs["item_id"].dtype)
    for name, spec in specs.items():
        if name in of_side:
            shape = [num_rows, *(size or 1 for size in spec.shape[1:])]
            inputs[name] = tf.fill(shape, tf.constant(of_side[name], spec.dtype))
        elif name not in inputs:
            inputs[name] = missing_input(spec, num_rows)
    return {name: inputs[name] for name in specs}


def prove(
    modules: Mapping[Path, RetrievalModule],
    queries: Sequence[Query],
    item_ids: Sequence[Any],
    values: Mapping[str, Mapping[str, Any]],
) -> None:
    """Has a fresh process load what was saved, by folder, and answer like the modules in memory.

    Asks with `queries` and `item_ids`; other inputs have their `example_values`, or are missing. An
    `ExportError` if the process fails or an answer differs.
    """
    for folder, module in modules.items():
        arrays: dict[str, np.ndarray] = {}
        for name, function in module.exported.items():
            inputs = _probe(function, queries, item_ids, values)
            outputs = call(function, inputs)
            for role, tensors in (("input", inputs), ("output", outputs)):
                arrays |= {f"{name}/{role}/{key}": _plain(x.numpy()) for key, x in tensors.items()}
        np.savez(folder / PROBE_FILE, allow_pickle=False, **arrays)
    # With -P, a file of the working directory such as queue.py is no module there.
    command = [sys.executable, "-P", "-c", _PROGRAM, str(Path(__file__).parents[2])]
    command += map(str, modules)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for folder in modules:
        (folder / PROBE_FILE).unlink()
    if done.returncode:
        raise ExportError(
            f"A fresh process could not use the export: {done.stderr.strip()[-2000:]}"
        )


def _plain(values: np.ndarray) -> np.ndarray:
    """Decodes byte strings, so that an array can be saved without pickle."""
    if values.dtype != object:
        return values
    return np.char.decode(values.astype(bytes), "utf-8") if values.size else values.astype(str)


def differences(folder: Path) -> str:
    """Describes how a reloaded model's answers differ from its probe; "" if they do not."""
    with np.load(folder / PROBE_FILE) as probe:
        arrays = {tuple(name.split("/", 2)): array for name, array in probe.items()}
    loaded = tf.saved_model.load(str(folder))
    problems = []
    for signature in dict.fromkeys(name for name, _, _ in arrays):
        given, expected = (
            {
                key: array
                for (name, r, key), array in arrays.items()
                if (name, r) == (signature, role)
            }
            for role in ("input", "output")
        )
        if problem := difference(expected, ask(loaded.signatures[signature], given)):
            problems.append(f"{signature}: {problem}")
    return "; ".join(problems)


def difference(expected: dict[str, np.ndarray], answer: dict[str, np.ndarray]) -> str:
    """Describes how an answer differs, "" if it does not; equal scores may be in any order."""
    if set(expected) != set(answer):
        return f"{sorted(answer)} instead of {sorted(expected)}"
    for key, array in answer.items():
        if array.shape != expected[key].shape:
            return f"{key} has shape {array.shape} instead of {expected[key].shape}"
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
    ids, scores = answer["candidate_ids"], expected["scores"]
    if ids.dtype == object:
        ids = np.char.decode(ids.astype(bytes), "utf-8")
    # Ids are compared where no neighbour has the same score.
    is_tied = np.zeros(scores.shape, bool)
    is_close = np.diff(scores, axis=1) > -2 * SCORE_TOLERANCE
    is_tied[:, 1:] |= is_close
    is_tied[:, :-1] |= is_close
    num_other = int(((ids != expected["candidate_ids"]) & ~is_tied & np.isfinite(scores)).sum())
    return f"{num_other} of {ids.size} candidate ids differ" if num_other else ""


def main() -> int:
    """Checks the folders on the command line."""
    problems = []
    for folder in sorted(map(Path, sys.argv[1:]), key=_may_need_scann):
        if _may_need_scann(folder):
            try:
                load_scann_ops()
            except ImportError as error:
                print(error, file=sys.stderr)
        if problem := differences(folder):
            problems.append(f"{folder}: {problem}")
    print(*problems, sep="\n", file=sys.stderr)
    return int(bool(problems))


def _may_need_scann(folder: Path) -> bool:
    # By the whole ending: a model or a folder above may be called "exact" too.
    return folder.parts[-len(EXACT_FOLDER.parts) :] != EXACT_FOLDER.parts


if __name__ == "__main__":
    sys.exit(main())
