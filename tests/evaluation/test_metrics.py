import math
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from tfrs_pipeline.evaluation.metrics import QUERY_METRICS, find_hits, query_metrics, set_metrics

Ranking: TypeAlias = tuple[np.ndarray, list[np.ndarray], int]


@st.composite
def rankings(draw: st.DrawFn) -> Ranking:
    """Distinct retrieved rows of a corpus of 10 with empty slots last, and the relevant ones."""
    max_k = draw(st.integers(1, 12))
    num_queries = draw(st.integers(0, 5))
    retrieved, relevant = [], []
    for _ in range(num_queries):
        rows = draw(st.lists(st.integers(1, 10), unique=True, max_size=max_k))
        retrieved.append(rows + [0] * (max_k - len(rows)))
        relevant.append(np.array(draw(st.lists(st.integers(1, 10), unique=True)), np.int32))
    return (
        np.array(retrieved, np.int32).reshape(num_queries, max_k),
        relevant,
        draw(st.integers(1, max_k)),
    )


def pairs_of(relevant: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    queries = np.repeat(np.arange(len(relevant)), [len(rows) for rows in relevant])
    return queries, np.concatenate([*relevant, np.zeros(0, int)])


def slow_metrics(retrieved: list[int], relevant: Any, k: int) -> dict[str, float]:
    """The definitions, one query at a time."""
    if not len(relevant):
        return dict.fromkeys(QUERY_METRICS, math.nan)
    places = [i for i, row in enumerate(retrieved[:k], 1) if row in relevant]
    ideal = sum(1 / math.log2(1 + i) for i in range(1, min(len(relevant), k) + 1))
    return {
        "recall": len(places) / len(relevant),
        "hit_rate": float(bool(places)),
        "ndcg": sum(1 / math.log2(1 + i) for i in places) / ideal,
        "mrr": 1 / places[0] if places else 0.0,
    }


@given(rankings())
def test_metrics_equal_their_definitions(ranking: Any) -> None:
    retrieved, relevant, k = ranking
    is_hit = find_hits(retrieved, *pairs_of(relevant))
    num_relevant = np.array([len(r) for r in relevant], int)
    slow = [
        slow_metrics(rows, set(r.tolist()), k)
        for rows, r in zip(retrieved.tolist(), relevant, strict=True)
    ]
    found = query_metrics(is_hit, num_relevant, k)
    assert tuple(found) == QUERY_METRICS
    for name, values in found.items():
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, [s[name] for s in slow], rtol=1e-12, err_msg=name)


@given(rankings())
def test_a_hit_is_a_row_that_is_relevant_to_its_own_query(ranking: Any) -> None:
    retrieved, relevant, _ = ranking
    expected = [
        [row in set(r.tolist()) for row in rows]
        for rows, r in zip(retrieved.tolist(), relevant, strict=True)
    ]
    assert find_hits(retrieved, *pairs_of(relevant)).tolist() == expected


def test_ndcg_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    num_queries, num_candidates = 40, 60
    scores = rng.permuted(np.tile(np.arange(num_candidates), (num_queries, 1)), axis=1)
    truth = rng.random((num_queries, num_candidates)) < rng.choice([0.02, 0.2, 0.9], (40, 1))
    truth[:, 0] |= ~truth.any(axis=1)
    order = np.argsort(-scores, axis=1)
    is_hit = np.take_along_axis(truth, order, axis=1)
    for k in (1, 5, 60):
        ours = query_metrics(is_hit, truth.sum(axis=1), k)["ndcg"]
        theirs = [ndcg_score(truth[[i]], scores[[i]], k=k) for i in range(num_queries)]
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@given(rankings(), st.lists(st.integers(0, 99), min_size=10, max_size=10), st.integers(0, 1023))
def test_metrics_equal_a_loop_over_slots(ranking: Any, popularity: list[int], part: int) -> None:
    retrieved, _, k = ranking
    in_part = np.array([part >> i & 1 for i in range(10)], bool)
    slots = [row for row in retrieved[:, :k].ravel().tolist() if row and in_part[row - 1]]
    times = [slots.count(row) for row in range(1, 11) if in_part[row - 1]]
    expected = dict.fromkeys(("coverage", "average_popularity", "gini"), math.nan)
    if times:
        expected["coverage"] = len(set(slots)) / len(times)
    if slots:
        expected["average_popularity"] = sum(popularity[row - 1] for row in slots) / len(slots)
        differences = sum(abs(a - b) for a in times for b in times)
        expected["gini"] = differences / (2 * len(times) * len(slots))
    found = set_metrics(retrieved, np.array(popularity), in_part, k)
    assert found == pytest.approx(expected, nan_ok=True, abs=1e-12)
