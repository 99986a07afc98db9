import math
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from tfrs_pipeline.evaluation.metrics import (
    QUERY_METRICS,
    average_popularity,
    coverage,
    find_hits,
    gini,
    ndcg_at_k,
    recommendation_counts_at_k,
)

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
    for name, metric in QUERY_METRICS.items():
        values = metric(is_hit, num_relevant, k)
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
        ours = ndcg_at_k(is_hit, truth.sum(axis=1), k)
        theirs = [ndcg_score(truth[[i]], scores[[i]], k=k) for i in range(num_queries)]
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_refuses_what_would_be_a_wrong_number() -> None:
    hit = np.array([[True, True]])
    for metric in QUERY_METRICS.values():
        with pytest.raises(ValueError, match=r"k must lie in .*k=3"):
            metric(hit, np.array([2]), 3)
        with pytest.raises(ValueError, match="2 hits but 1 relevant"):
            metric(hit, np.array([1]), 1)
        with pytest.raises(ValueError, match="num_queries, max_k"):
            metric(hit, np.array([1, 2]), 1)
        with pytest.raises(ValueError, match="int64"):
            metric(hit.astype(int), np.array([2]), 1)
    with pytest.raises(ValueError, match="queries 0 to 1"):
        find_hits(np.array([[1]]), np.array([0, 1]), np.array([1, 2]))
    with pytest.raises(ValueError, match="rows from 0"):
        find_hits(np.array([[1, 0]]), np.array([0]), np.array([0]))
    with pytest.raises(ValueError, match=r"\(1,\)"):
        find_hits(np.array([1]), np.array([0]), np.array([1]))


def test_recommendation_counts_ignore_empty_slots_and_places_beyond_k() -> None:
    rows = np.array([[1, 3, 2], [3, 0, 0]])
    assert recommendation_counts_at_k(rows, 4, 2).tolist() == [1, 0, 2, 0]
    assert recommendation_counts_at_k(rows, 4, 3).tolist() == [1, 1, 2, 0]
    with pytest.raises(ValueError, match="Received: 3"):
        recommendation_counts_at_k(rows, 2, 1)
    with pytest.raises(ValueError, match="k=4"):
        recommendation_counts_at_k(rows, 4, 4)


counts = st.lists(st.integers(0, 20), max_size=12).map(lambda x: np.array(x, int))


@given(counts)
def test_gini_equals_the_mean_difference_of_all_pairs(times_retrieved: np.ndarray) -> None:
    if not times_retrieved.sum():
        assert math.isnan(gini(times_retrieved))
        return
    n = len(times_retrieved)
    differences = sum(abs(int(a) - int(b)) for a in times_retrieved for b in times_retrieved)
    expected = differences / (2 * n * n * times_retrieved.mean())
    assert gini(times_retrieved) == pytest.approx(expected, abs=1e-12)


@given(counts, st.data())
def test_coverage_and_average_popularity_equal_a_loop_over_slots(
    times_retrieved: np.ndarray, data: st.DataObject
) -> None:
    popularity = np.array([data.draw(st.integers(0, 99)) for _ in times_retrieved], int)
    slots = [row for row, times in enumerate(times_retrieved) for _ in range(times)]
    if len(times_retrieved):
        assert coverage(times_retrieved) == len(set(slots)) / len(times_retrieved)
    else:
        assert math.isnan(coverage(times_retrieved))
    average = average_popularity(times_retrieved, popularity)
    if slots:
        assert average == pytest.approx(sum(int(popularity[s]) for s in slots) / len(slots))
    else:
        assert math.isnan(average)
