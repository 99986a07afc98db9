"""How a reloaded model's answers are compared with the expected ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tfrs_pipeline.service.proof import ExportError, difference, prove

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


@pytest.mark.nightly
def test_files_around_are_not_imported(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "queue.py").write_text("jobs = []")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(ExportError, match="No exported model"):
        prove(here, {}, {"": {}})
