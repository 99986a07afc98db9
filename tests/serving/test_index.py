"""Search structures against exact scoring."""

import numpy as np
import pytest
import tensorflow as tf

from tfrs_pipeline.serving.index import Auto, Exact, ExactIndex, Scann, ScannIndex


def clustered(num: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(20, dim))
    points = centres[rng.integers(0, 20, num)] + 0.3 * rng.normal(size=(num, dim))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


EMBEDDINGS, QUERIES = clustered(2000), clustered(50, seed=1)


def exact_order(queries: np.ndarray, k: int) -> np.ndarray:
    return 1 + np.argsort(-(queries @ EMBEDDINGS.T), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("num_leaves", [1, 45])
def test_scann_that_searches_all_is_exact_search(num_leaves: int) -> None:
    index = ScannIndex(ExactIndex(EMBEDDINGS), num_leaves)
    rows, scores = index.approximate(tf.constant(QUERIES), 100, num_leaves, len(EMBEDDINGS))
    assert np.mean(np.sort(rows) == np.sort(exact_order(QUERIES, 100))) >= 0.999
    # Rescored exactly: the score is the dot product of what was found.
    expected = np.take_along_axis(QUERIES @ EMBEDDINGS.T, rows.numpy() - 1, axis=1)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_a_wider_search_finds_more() -> None:
    index = ScannIndex(ExactIndex(EMBEDDINGS), 45)
    exact = exact_order(QUERIES, 100)

    def num_found(*options: int) -> int:
        rows = index.approximate(tf.constant(QUERIES), 100, *options)[0]
        return sum(len(np.intersect1d(a, b)) for a, b in zip(rows, exact, strict=True))

    assert num_found(3, 100) < num_found(45, 100) < num_found(45, 2000)


def test_empty_slots_have_no_score() -> None:
    index = ScannIndex(ExactIndex(EMBEDDINGS[:40]), 8)
    rows, scores = (x.numpy() for x in index.approximate(tf.constant(QUERIES), 40, 1, 40))
    assert (rows == 0).any()
    np.testing.assert_array_equal(rows == 0, np.isneginf(scores))


def test_two_indexes_in_one_process_do_not_mix() -> None:
    first = ScannIndex(ExactIndex(EMBEDDINGS[:500]), 5)
    second = ScannIndex(ExactIndex(EMBEDDINGS[500:1000]), 5)
    for index, points in ((first, EMBEDDINGS[:500]), (second, EMBEDDINGS[500:1000])):
        rows, _ = index.approximate(tf.constant(QUERIES), 1, 5, 500)
        np.testing.assert_array_equal(rows[:, 0], 1 + (QUERIES @ points.T).argmax(axis=1))


def test_exact_search_suits_a_small_corpus() -> None:
    assert Auto(0.9).choose(19_999) == Exact()
    assert Auto(0.9).choose(20_000) == Scann(recall=0.9)


def test_an_index_is_checked_when_it_is_named() -> None:
    for kind in (Scann, Auto):
        with pytest.raises(ValueError, match="recall"):
            kind(recall=0)
