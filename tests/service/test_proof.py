"""How the answers of a version are compared with the expected ones, in fresh processes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.service.conftest import Exported
from tfrs_pipeline.answers import proof
from tfrs_pipeline.answers.proof import ExportError, difference, prove
from tfrs_pipeline.answers.publish import SAVED_MODEL_PARTS
from tfrs_pipeline.answers.retriever import load

EXPECTED = {
    "candidate_ids": np.array([[5, 3, 8, -1]]),
    "scores": np.array([[0.9, 0.5, 0.5, -np.inf]], np.float32),
    "is_known_user": np.array([True]),
}


TEXTS = {**EXPECTED, "candidate_ids": np.array([["é", "b", "c", ""]], object)}


@pytest.mark.parametrize(
    ("expected", "change", "message"),
    [
        (EXPECTED, {}, ""),
        (EXPECTED, {"scores": np.array([[0.90001, 0.5, 0.5, -np.inf]], np.float32)}, ""),
        # Equal scores may come in either order.
        (EXPECTED, {"candidate_ids": np.array([[5, 8, 3, -1]])}, ""),
        (EXPECTED, {"candidate_ids": np.array([[3, 5, 8, -1]])}, "1 of 4 candidate ids differ"),
        (EXPECTED, {"scores": np.array([[0.91, 0.5, 0.5, -np.inf]], np.float32)}, "scores differ"),
        (EXPECTED, {"scores": np.array([[0.9, 0.5, 0.5, 0.1]], np.float32)}, "scores differ"),
        (EXPECTED, {"scores": np.array([[0.9, 0.5, 0.5, np.nan]], np.float32)}, "scores differ"),
        (EXPECTED, {"is_known_user": np.array([False])}, "is_known_user differ"),
        (EXPECTED, {"candidate_ids": np.array([[5, 3, 8]])}, "(1, 3)"),
        (EXPECTED, {"embeddings": np.zeros((1, 2))}, "instead of"),
        (TEXTS, {}, ""),
        (TEXTS, {"candidate_ids": np.array([["e", "b", "c", ""]], object)}, "1 of 4"),
    ],
)
def test_the_same_answer_and_another(expected: Any, change: Any, message: str) -> None:
    found = difference(expected, {**expected, **change})
    assert message in found
    assert bool(found) == bool(message)


def test_the_last_place_may_tie_with_the_next_one() -> None:
    """An answer of three, where the third and the fourth score alike: only four places show it."""
    scores = np.array([[0.9, 0.7, 0.5, 0.5]], np.float32)
    one, other = (
        {"candidate_ids": np.array([ids]), "scores": scores} for ids in ([5, 3, 8, 2], [5, 3, 2, 8])
    )
    assert not difference(one, other, 3)
    cut = [{name: array[:, :3] for name, array in answer.items()} for answer in (one, other)]
    assert difference(cut[0], cut[1]) == "1 of 3 candidate ids differ"
    wrong = {**other, "candidate_ids": np.array([[5, 4, 2, 8]])}
    assert difference(one, wrong, 3) == "1 of 3 candidate ids differ"


def probes_and_answers(folder: Path, **changes: Any) -> Any:
    """Asks a version in this process; `changes` go to the answer of `retrieve`."""
    model = load(folder)
    arrays = model.inputs.read([{"history": model.candidate_ids()[:3]}])
    inputs = {"retrieve": proof.completed(model.signatures["retrieve"], arrays, 1)}
    answers = {"retrieve": model.engine.answer("retrieve", inputs["retrieve"], exact=True)}
    answers["retrieve"] |= changes
    return inputs, {"": answers}


@pytest.mark.slow
def test_a_fresh_process_without_tensorflow_answers_or_names_the_difference(
    exported: Exported, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported("str", "exact") / "1", tmp_path / "1"))
    for part in SAVED_MODEL_PARTS:  # A version without one, as of a refresh without TensorFlow.
        gone = folder / part
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink(missing_ok=True)
    prove(folder, *probes_and_answers(folder))
    other = {"scores": np.array([[9.0]], np.float32)}
    with pytest.raises(ExportError, match="retrieve: scores differ by up to"):
        prove(folder, *probes_and_answers(folder, **other))


@pytest.mark.nightly
def test_files_around_are_not_imported(
    exported: Exported, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "queue.py").write_text("jobs = []")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    prove(exported("int", "exact") / "1", {}, {"": {}})
