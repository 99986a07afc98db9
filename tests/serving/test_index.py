"""Search structures against exact scoring."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfrs_pipeline.serving.index import (
    Exact,
    ExactIndex,
    Scann,
    ScannIndex,
    ScannSettings,
    index_for,
    index_recall,
)


def clustered(num: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(20, dim))
    points = centres[rng.integers(0, 20, num)] + 0.3 * rng.normal(size=(num, dim))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


EMBEDDINGS, QUERIES = clustered(2000), clustered(50, seed=1)


def exact_order(queries: np.ndarray, k: int) -> np.ndarray:
    return 1 + np.argsort(-(queries @ EMBEDDINGS.T), axis=1, kind="stable")[:, :k]


def test_exact_index_is_a_full_sort() -> None:
    nothing = tf.zeros([len(QUERIES), 0], tf.int32)
    rows, scores = ExactIndex(EMBEDDINGS).search(tf.constant(QUERIES), 10, nothing)
    np.testing.assert_array_equal(rows, exact_order(QUERIES, 10))
    expected = np.take_along_axis(QUERIES @ EMBEDDINGS.T, rows.numpy() - 1, axis=1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.parametrize("num_leaves", [1, 45])
def test_scann_that_searches_all_is_exact_search(num_leaves: int) -> None:
    index = ScannIndex(
        ExactIndex(EMBEDDINGS), ScannSettings(num_leaves, num_leaves, len(EMBEDDINGS))
    )
    rows, scores = index.approximate(tf.constant(QUERIES), 100)
    assert index_recall(rows.numpy(), exact_order(QUERIES, 100)) >= 0.999
    # Rescored exactly: the score is the dot product of what was found.
    expected = np.take_along_axis(QUERIES @ EMBEDDINGS.T, rows.numpy() - 1, axis=1)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_a_search_can_be_wider_or_narrower_than_the_settings() -> None:
    narrow, wide = ScannSettings(45, 3, 100), ScannSettings(45, 45, 2000)
    index = ScannIndex(ExactIndex(EMBEDDINGS), narrow)
    exact = exact_order(QUERIES, 100)

    def recall(*options: int) -> float:
        return index_recall(index.approximate(tf.constant(QUERIES), 100, *options)[0], exact)

    assert recall() < recall(45) < recall(45, 2000)
    assert recall() == recall(3, 100)
    index.settings = wide
    assert recall() == recall(45, 2000) >= 0.999
    assert recall(3, 100) < recall()


def test_empty_slots_have_no_score() -> None:
    index = ScannIndex(ExactIndex(EMBEDDINGS[:40]), ScannSettings(8, 1, num_reordered=40))
    rows, scores = (x.numpy() for x in index.approximate(tf.constant(QUERIES), 40))
    assert (rows == 0).any()
    np.testing.assert_array_equal(rows == 0, np.isneginf(scores))


def test_two_indexes_in_one_process_do_not_mix() -> None:
    first = ScannIndex(ExactIndex(EMBEDDINGS[:500]), ScannSettings(5, 5, 500))
    second = ScannIndex(ExactIndex(EMBEDDINGS[500:1000]), ScannSettings(5, 5, 500))
    for index, points in ((first, EMBEDDINGS[:500]), (second, EMBEDDINGS[500:1000])):
        rows, _ = index.approximate(tf.constant(QUERIES), 1)
        np.testing.assert_array_equal(rows[:, 0], 1 + (QUERIES @ points.T).argmax(axis=1))


def test_refuses_more_leaves_than_candidates() -> None:
    with pytest.raises(ValueError, match=r"the 40 candidates.*41"):
        ScannIndex(ExactIndex(EMBEDDINGS[:40]), ScannSettings(41, 1, 10))


def test_exact_search_suits_a_small_corpus() -> None:
    assert index_for(19_999) == Exact()
    assert index_for(20_000, 0.9) == Scann(recall=0.9)


@pytest.mark.parametrize(("change", "message"), [({"recall": 0}, "recall"), ({"k": 0}, "k must")])
def test_an_index_is_checked_when_it_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scann(**change)


def test_index_recall_is_the_share_found() -> None:
    found, exact = np.array([[1, 2, 0], [4, 5, 6]]), np.array([[2, 1, 3], [7, 8, 9]])
    assert index_recall(found, exact) == pytest.approx((2 / 3 + 0) / 2)
