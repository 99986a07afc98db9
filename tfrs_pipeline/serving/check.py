"""Loads a SavedModel in a process of its own and compares its answers with recorded ones.

    python -m tfrs_pipeline.serving.check FOLDER PROBE.npz

Exits with 0 if they are the same, else with 1 and the difference on standard error.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from tfrs_pipeline.serving.export import EXACT_TWIN, SCORE_TOLERANCE
from tfrs_pipeline.serving.index import load_scann_ops


def differences(folder: str, probe_path: str) -> str:
    """Describes how the reloaded model's answers differ from the probe's; "" if they do not.

    Equal scores may come in either order: ids are compared where the score stands alone.
    """
    with np.load(probe_path) as probe:
        expected_ids, expected_scores = probe["candidate_ids"], probe["scores"]
        users = tf.constant(probe["user_id"])
    loaded = tf.saved_model.load(folder)
    answer = loaded.signatures["serving_default"](user_id=users)
    scores = answer["scores"].numpy()
    ids = answer["candidate_ids"].numpy()
    if ids.dtype == object:
        ids = np.char.decode(ids.astype(bytes), "utf-8")
    if scores.shape != expected_scores.shape:
        return f"shape {scores.shape} instead of {expected_scores.shape}"
    if not np.allclose(scores, expected_scores, rtol=0, atol=SCORE_TOLERANCE):
        finite = np.isfinite(scores) & np.isfinite(expected_scores)
        worst = np.abs(np.where(finite, scores - expected_scores, 0)).max(initial=0)
        return f"scores differ by up to {worst}"
    is_tied = np.zeros(scores.shape, bool)
    is_close = np.diff(expected_scores, axis=1) > -2 * SCORE_TOLERANCE
    is_tied[:, 1:] |= is_close
    is_tied[:, :-1] |= is_close
    num_other = int(((ids != expected_ids) & ~is_tied & np.isfinite(expected_scores)).sum())
    return f"{num_other} of {ids.size} candidate ids differ" if num_other else ""


def main() -> int:
    """Runs the check of the two paths on the command line."""
    folder, probe_path = sys.argv[1:]
    # Judged by the whole ending: a model or a folder above it may be called "exact" too.
    if Path(folder).parts[-len(EXACT_TWIN.parts) :] != EXACT_TWIN.parts:
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
