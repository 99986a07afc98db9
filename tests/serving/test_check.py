"""How a reloaded model's answers are compared with the expected ones."""

from pathlib import Path

import numpy as np
import pytest

from tfrs_pipeline.serving.check import difference, prove

EXPECTED = {
    "candidate_ids": np.array([[5, 3, 8, -1]]),
    "scores": np.array([[0.9, 0.5, 0.5, -np.inf]], np.float32),
    "is_known_user": np.array([True]),
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"scores": np.array([[0.90001, 0.5, 0.5, -np.inf]], np.float32)},
        # Equal scores may come in either order.
        {"candidate_ids": np.array([[5, 8, 3, -1]])},
    ],
)
def test_the_same_answer(change: dict[str, np.ndarray]) -> None:
    assert difference(EXPECTED, {**EXPECTED, **change}) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate_ids": np.array([[3, 5, 8, -1]])}, "1 of 4 candidate ids differ"),
        ({"scores": np.array([[0.91, 0.5, 0.5, -np.inf]], np.float32)}, "scores differ by up to"),
        ({"scores": np.array([[0.9, 0.5, 0.5, 0.1]], np.float32)}, "scores differ"),
        ({"scores": np.array([[0.9, 0.5, 0.5, np.nan]], np.float32)}, "scores differ"),
        ({"is_known_user": np.array([False])}, "is_known_user differ"),
        ({"candidate_ids": np.array([[5, 3, 8]])}, "(1, 3)"),
        ({"embeddings": np.zeros((1, 2))}, "instead of"),
    ],
)
def test_another_answer(change: dict[str, np.ndarray], message: str) -> None:
    assert message in difference(EXPECTED, {**EXPECTED, **change})


def test_text_ids_are_compared() -> None:
    expected = {**EXPECTED, "candidate_ids": np.array([["é".encode(), b"b", b"c", b""]], object)}
    other = np.array([[b"e", b"b", b"c", b""]], object)
    assert difference(expected, dict(expected)) == ""
    assert "1 of 4" in difference(expected, {**expected, "candidate_ids": other})


@pytest.mark.slow
def test_the_check_imports_no_files_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("jobs = []")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    prove({}, [], [], {})
