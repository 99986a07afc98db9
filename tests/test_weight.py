"""The benchmark of what a service costs: what it calls a difference, a ratio and a model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.scripts import script

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def weight(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return script(BENCHMARKS / "weight.py")


@pytest.mark.parametrize(
    "ids, scores, num_ids_differ, num_beyond_ties, largest",
    [
        ([1, 2, 3, -1], [0.9, 0.5, 0.5, -np.inf], 0, 0, 0.0),
        ([1, 3, 2, -1], [0.9, 0.5, 0.5, -np.inf], 2, 0, 0.0),  # Tied within the list,
        ([1, 2, 4, -1], [0.9, 0.5, 0.5, -np.inf], 1, 0, 0.0),  # and at its end.
        ([1, 4, 2, -1], [0.9, 0.6, 0.5, -np.inf], 2, 1, 0.0),  # 4 is none of the best.
        ([2, 3, 4, -1], [0.5, 0.5, 0.4, -np.inf], 3, 2, 0.0),  # 1 is missing, and 4 is too low.
        ([1, 2, 3, -1], [0.8, 0.5, 0.5, -np.inf], 0, 0, 0.1),
    ],
)
def test_ids_differ_by_ties_or_beyond_them(
    weight: Any,
    ids: list[int],
    scores: list[float],
    num_ids_differ: int,
    num_beyond_ties: int,
    largest: float,
) -> None:
    compared = dict.fromkeys(("num_answers", "num_ids_differ", "num_beyond_ties"), 0)
    compared["largest_score_difference"] = 0
    saved = np.array([[1, 2, 3, -1]]), np.array([[0.9, 0.5, 0.5, -np.inf]])
    weight._compare(compared, np.array([ids]), np.array([scores]), *saved)
    assert list(compared.values()) == pytest.approx([1, num_ids_differ, num_beyond_ties, largest])


def test_a_ratio_is_the_median_over_the_rounds(weight: Any) -> None:
    pairs = {"this": [1.0, 4.0, 9.0], "against": [4.0, 2.0, 3.0]}
    rounds = {side: [{"seconds": x, "failed": 0} for x in xs] for side, xs in pairs.items()}
    seconds, failed = weight.summary(rounds).values()
    assert seconds == {"this": 4, "against": 3, "rounds": pairs, "ratio": 2}  # Of .25, 2 and 3.
    assert "ratio" not in failed
    alone = weight.summary({"this": rounds["this"], "against": [{}]})  # `equal`, of an older one.
    assert alone["seconds"] == {"this": 4, "rounds": {"this": pairs["this"]}}


def test_users_of_the_generated_model_stay_in_a_cluster(weight: Any) -> None:
    model = weight.Clusters(1000, 0, num_users=300, history_length=8)
    clusters = [int(title.split()[-1]) for title in model.items["title"].to_pylist()]
    histories, known = list(model.histories), list(model.known_positives)
    assert len(histories[0]) == len(known[0]) == 0
    for history, positives in zip(histories[1:], known[1:], strict=True):
        assert len(history) == 8
        assert len({clusters[row - 1] for row in history}) == 1
        assert positives.tolist() == sorted(set(history.tolist()))
    found = model.embed_queries(None, histories[7][np.newaxis]).numpy()[0]
    mean = model.table.numpy()[histories[7]].mean(axis=0)
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), rtol=1e-5)
