from typing import Any, TypeAlias

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tfrs_pipeline.exports.graph_index import ExactIndex
from tfrs_pipeline.search import topk
from tfrs_pipeline.search.topk import ExactRetriever, top_k_in_blocks

Problem: TypeAlias = tuple[np.ndarray, int, list[np.ndarray], int]


def slow_top_k(scores: Any, k: int, exclude_rows: list[np.ndarray]) -> list[list[int]]:
    """Sorts everything, stably, one query at a time."""
    answers = []
    for query_scores, excluded in zip(scores, exclude_rows, strict=True):
        left = [row for row, x in enumerate(query_scores, 1) if row not in excluded and x > -np.inf]
        best = sorted(left, key=lambda row: -query_scores[row - 1])[:k]
        answers.append(best + [0] * (k - len(best)))
    return answers


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    num_queries = draw(st.integers(0, 6))
    num_candidates = draw(st.integers(1, 12))
    # Few distinct values, so that most answers turn on ties.
    value = st.sampled_from([-np.inf, -2.5, -1.0, -0.0, 0.0, 1.0, 3.0, np.inf])
    scores = [[draw(value) for _ in range(num_candidates)] for _ in range(num_queries)]
    some_rows = st.lists(st.integers(1, num_candidates), max_size=num_candidates)
    excluded = [np.array(draw(some_rows), np.int32) for _ in range(num_queries)]
    array = np.array(scores, np.float32).reshape(num_queries, num_candidates)
    return array, draw(st.integers(1, 15)), excluded, draw(st.integers(1, 7))


@given(problems())
def test_equals_a_stable_sort_of_everything(problem: Any) -> None:
    scores, k, excluded, block_size = problem
    before = scores.copy()
    asked = []

    def score_block(block: slice) -> np.ndarray:
        asked.append(block.stop - block.start)
        return scores[block]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "_SCORES_PER_BLOCK", block_size * scores.shape[1])
        rows, top_scores = top_k_in_blocks(score_block, len(scores), scores.shape[1], k, excluded)
    assert sum(asked) == len(scores)
    assert max(asked, default=0) <= block_size
    assert rows.tolist() == slow_top_k(scores, k, excluded)
    assert rows.dtype == np.int32
    assert top_scores.dtype == np.float32
    assert rows.shape == top_scores.shape == (len(scores), k)
    found = np.take_along_axis(scores, np.maximum(rows, 1) - 1, axis=1)
    np.testing.assert_array_equal(top_scores, np.where(rows > 0, found, -np.inf))
    np.testing.assert_array_equal(scores, before)


@pytest.mark.parametrize(
    ("scores", "message"),
    [([[np.nan, 1.0]], "1 of 2 scores are NaN"), ([[0, 0, 0]], r"\(1, 2\).*\(1, 3\)")],
)
def test_refuses_scores_that_cannot_be_ranked(scores: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_k_in_blocks(lambda _: np.array(scores), 1, 2, k=1)


def in_graph(scores: np.ndarray, k: int, exclude_rows: np.ndarray) -> tuple[Any, Any]:
    queries = tf.eye(len(scores))
    return ExactIndex(scores.T).search(queries, tf.constant(k), tf.constant(exclude_rows))


@pytest.mark.parametrize(
    ("k", "excluded", "rows"),
    [
        (2, [[0, 0]] * 2, [[2, 3], [1, 2]]),  # Ties in row order, also at the last place.
        (3, [[2, 2], [0, 1]], [[3, 4, 1], [2, 3, 4]]),  # Repeats do nothing.
        (6, [[1, 2], [0, 0]], [[3, 4, 0, 0, 0, 0], [1, 2, 3, 4, 0, 0]]),
        (1, np.zeros([2, 0]), [[2], [1]]),
    ],
)
def test_the_graph_has_the_same_rule(k: int, excluded: Any, rows: Any) -> None:
    scores = np.array([[-1.5, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    found, top_scores = in_graph(scores, k, np.array(excluded, np.int32))
    np.testing.assert_array_equal(found, rows)
    assert found.dtype == np.int32
    by_row = np.concatenate([np.full([2, 1], -np.inf), scores], axis=1)
    np.testing.assert_array_equal(top_scores, np.take_along_axis(by_row, np.array(rows), axis=1))


def test_exact_retriever_refuses_shapes_that_do_not_match() -> None:
    with pytest.raises(ValueError, match=r"must be \[2, dim\]"):
        ExactRetriever([1, 2], np.zeros((3, 4)), lambda _: np.zeros((1, 4)))
    retriever = ExactRetriever([1, 2], np.zeros((2, 4)), lambda _: np.zeros((1, 4)))
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(1, 2\)"):
        retriever.retrieve([{}] * 3, 1)
