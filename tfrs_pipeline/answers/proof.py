"""The proof that a version answers alike from its files, in fresh processes."""

import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from tfrs_pipeline.answers.signatures import completed, numpy_type
from tfrs_pipeline.features.encoding import raw_signature
from tfrs_pipeline.features.feature import Feature, Spec
from tfrs_pipeline.retrieval import Query
from tfrs_pipeline.search.queries import QueryInputs
from tfrs_pipeline.search.searcher import in_fresh_process

# A reloaded model may run other kernels, so that scores differ in their last bits.
SCORE_TOLERANCE = 1e-4
# Places of an answer whose ids are compared.
PLACES = 10

Answers: TypeAlias = Mapping[str, Mapping[str, np.ndarray]]
"""The inputs, or the outputs, of each signature."""


class ExportError(RuntimeError):
    """An export cannot be loaded, or its answers differ from those of the model in memory."""


def probes_of(
    signatures: Mapping[str, Mapping[str, Spec]],
    inputs: QueryInputs,
    queries: Sequence[Query],
    item_ids: Sequence[Any],
) -> dict[str, dict[str, np.ndarray]]:
    """Makes inputs of each signature, of queries and items.

    Each feature has a value that it knows, so that lookups are checked too.
    """
    items = _examples(inputs.features["candidate"], len(item_ids))
    examples = _examples([*inputs.features["query"], *inputs.features["request"]], len(queries))
    arrays = inputs.read([{**query, "features": None} for query in queries])
    probes = {}
    for name, specs in signatures.items():
        if "item_id" in specs:
            ids = np.array(item_ids, numpy_type(specs["item_id"].dtype))
            known, num_rows = {**items, "item_id": ids}, len(item_ids)
        else:
            known, num_rows = {**arrays, **examples}, len(queries)
        # One more than are compared, which may tie with the last of them.
        k = np.int32(PLACES + 1)
        probes[name] = completed(specs, {**known, "k": k}, num_rows)
    return probes


def _examples(features: Sequence[Feature], num_rows: int) -> dict[str, np.ndarray]:
    """Makes inputs of a value that each feature knows, by the name of the input."""
    inputs = {}
    for feature, spec in zip(features, raw_signature(features).values(), strict=True):
        value = (*feature.vocabulary, "1")[0] if spec.dtype == "string" else 1.0
        shape = [num_rows, *(size or 1 for size in spec.shape[1:])]
        inputs[spec.name] = np.full(shape, value, numpy_type(spec.dtype))
    return inputs


def prove(folder: Path, probes: Answers, expected: Mapping[str, Answers]) -> None:
    """Checks that fresh processes answer the probes from a version's files as expected.

    `expected` has the answers of the SavedModel, "", and of others by their folder in the
    version's. A process that cannot import TensorFlow answers as the first of them, which searches
    exactly, unless a tower needs TensorFlow. Raises an `ExportError`.
    """
    exact = expected[""]
    light = {name: (inputs, exact[name]) for name, inputs in probes.items() if name in exact}
    _ask(f"{__name__}:answer_light_probes", folder, light)
    if (folder / "saved_model.pb").exists():
        by_part = {
            part: {name: (probes[name], answers[name]) for name in answers}
            for part, answers in expected.items()
        }
        _ask("tfrs_pipeline.exports.saved_model:answer_graph_probes", folder, by_part)


def _ask(function: str, folder: Path, expected: Any) -> None:
    done = in_fresh_process(function, stdin=pickle.dumps((str(folder), expected)))
    if done.returncode:
        problems = done.stderr.decode(errors="replace").strip()[-2000:]
        raise ExportError(f"A fresh process could not use the export: {problems}")


def answer_light_probes() -> str | None:
    """Answers the probes on standard input as a service does; returns how answers differ, or None.

    TensorFlow cannot be imported meanwhile, unless LiteRT cannot run a tower of the version.
    """
    folder, expected = pickle.load(sys.stdin.buffer)
    from tfrs_pipeline.answers.retriever import load
    from tfrs_pipeline.answers.towers import needs_tensorflow

    if not needs_tensorflow(Path(folder)):
        sys.modules["tensorflow"] = None  # type: ignore[assignment]
    model = load(folder, live=False)
    problems = []
    for name, (inputs, outputs) in expected.items():
        exact = {"exact": True} if "k" in inputs else {}
        if problem := difference(outputs, model.engine.answer(name, inputs, **exact), PLACES):
            problems.append(f"{name}: {problem}")
    return "\n".join(problems) or None


def difference(
    expected: Mapping[str, np.ndarray],
    answer: Mapping[str, np.ndarray],
    places: int | None = None,
) -> str:
    """Describes how an answer differs, or returns ""; ids with equal scores may swap places.

    Ids are compared in the first `places` of an answer, None in all. An id in the last place of an
    answer may also have swapped with one that just missed it, which only a longer answer shows.
    """
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
    is_wrong = (is_other & ~is_tied & np.isfinite(scores))[:, :places]
    num_wrong = int(is_wrong.sum())
    return f"{num_wrong} of {is_wrong.size} candidate ids differ" if num_wrong else ""
