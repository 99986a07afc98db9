"""Loads a SavedModel in a process of its own and compares its answers with recorded ones.

    python -m tfrs_pipeline.serving.check FOLDER PROBE.npz

Exits with 0 if they are the same, else with 1 and the difference on standard error.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from tfrs_pipeline.serving.index import load_scann_ops
from tfrs_pipeline.serving.publish import EXACT_FOLDER

# The reloaded model may run other kernels on another batch shape: same answer, not same bits.
SCORE_TOLERANCE = 1e-4


def differences(folder: str, probe_path: str) -> str:
    """Describes how the reloaded model's answers differ from the probe's; "" if they do not.

    Args:
        folder: Of the SavedModel.
        probe_path: Arrays by "SIGNATURE/input/NAME" and "SIGNATURE/output/NAME".
    """
    with np.load(probe_path) as probe:
        arrays = {tuple(name.split("/", 2)): array for name, array in probe.items()}
    loaded = tf.saved_model.load(folder)
    problems = []
    for signature in dict.fromkeys(name for name, _, _ in arrays):
        function = loaded.signatures[signature]
        specs = function.structured_input_signature[1]
        given, expected = (
            {
                key: array
                for (name, r, key), array in arrays.items()
                if (name, r) == (signature, role)
            }
            for role in ("input", "output")
        )
        answer = function(**{k: tf.constant(x, specs[k].dtype, x.shape) for k, x in given.items()})
        if problem := _difference(expected, {k: x.numpy() for k, x in answer.items()}):
            problems.append(f"{signature}: {problem}")
    return "; ".join(problems)


def _difference(expected: dict[str, np.ndarray], answer: dict[str, np.ndarray]) -> str:
    """Describes how an answer differs; equal scores may come in either order."""
    if set(expected) != set(answer):
        return f"{sorted(answer)} instead of {sorted(expected)}"
    for key, array in answer.items():
        if array.shape != expected[key].shape:
            return f"{key} has shape {array.shape} instead of {expected[key].shape}"
    for key, array in expected.items():
        if array.dtype.kind == "f":
            if not np.allclose(answer[key], array, rtol=0, atol=SCORE_TOLERANCE):
                finite = np.isfinite(array) & np.isfinite(answer[key])
                worst = np.abs(np.where(finite, answer[key] - array, 0)).max(initial=0)
                return f"{key} differ by up to {worst}"
        elif array.dtype == bool and (array != answer[key]).any():
            return f"{key} differ"
    if "candidate_ids" not in expected:
        return ""
    ids, scores = answer["candidate_ids"], expected["scores"]
    if ids.dtype == object:
        ids = np.char.decode(ids.astype(bytes), "utf-8")
    # Ids are compared where the score stands alone.
    is_tied = np.zeros(scores.shape, bool)
    is_close = np.diff(scores, axis=1) > -2 * SCORE_TOLERANCE
    is_tied[:, 1:] |= is_close
    is_tied[:, :-1] |= is_close
    num_other = int(((ids != expected["candidate_ids"]) & ~is_tied & np.isfinite(scores)).sum())
    return f"{num_other} of {ids.size} candidate ids differ" if num_other else ""


def main() -> int:
    """Runs the check of the two paths on the command line."""
    folder, probe_path = sys.argv[1:]
    # Judged by the whole ending: a model or a folder above it may be called "exact" too.
    if Path(folder).parts[-len(EXACT_FOLDER.parts) :] != EXACT_FOLDER.parts:
        try:
            load_scann_ops()
        except ImportError as error:
            print(error, file=sys.stderr)
    problem = differences(folder, probe_path)
    if problem:
        print(problem, file=sys.stderr)
    return int(bool(problem))


if __name__ == "__main__":
    sys.exit(main())
