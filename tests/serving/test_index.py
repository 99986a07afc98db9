"""Search structures against exact scoring."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tfrs_pipeline.serving.index import (
    ExactIndex,
    ScannIndex,
    ScannSettings,
    index_recall,
    resolve_index_kind,
)


def clustered(num: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(20, dim))
    points = centres[rng.integers(0, 20, num)] + 0.3 * rng.normal(size=(num, dim))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


EMBEDDINGS, QUERIES = clustered(2000), clustered(50, seed=1)


def exact_order(queries: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(queries @ EMBEDDINGS.T), axis=1, kind="stable")[:, :k]


def test_exact_index_is_a_full_sort() -> None:
    places, scores = ExactIndex(EMBEDDINGS).search(tf.constant(QUERIES), 10)
    np.testing.assert_array_equal(places, exact_order(QUERIES, 10))
    expected = np.take_along_axis(QUERIES @ EMBEDDINGS.T, places.numpy(), axis=1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.parametrize("num_leaves", [1, 45])
def test_scann_that_searches_all_is_exact_search(num_leaves: int) -> None:
    index = ScannIndex(EMBEDDINGS, ScannSettings(num_leaves, num_leaves, len(EMBEDDINGS)))
    places, scores = index.search(tf.constant(QUERIES), 100)
    assert index_recall(places.numpy(), exact_order(QUERIES, 100)) >= 0.999
    # Rescored exactly: the score is the dot product of what was found.
    expected = np.take_along_axis(QUERIES @ EMBEDDINGS.T, places.numpy(), axis=1)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_a_search_can_be_wider_or_narrower_than_the_settings() -> None:
    narrow, wide = ScannSettings(45, 3, 100), ScannSettings(45, 45, 2000)
    index = ScannIndex(EMBEDDINGS, narrow)
    exact = exact_order(QUERIES, 100)

    def recall(*options: int) -> float:
        places, scores = index.search(tf.constant(QUERIES), 100, *options)
        return index_recall(np.where(scores > -np.inf, places, -1), exact)

    assert recall() < recall(45) < recall(45, 2000)
    assert recall() == recall(3, 100)
    index.settings = wide
    assert recall() == recall(45, 2000) >= 0.999
    assert recall(3, 100) < recall()


@pytest.mark.parametrize("num_leaves", [1, 8])
def test_a_saved_index_answers_as_before(num_leaves: int, tmp_path: Path) -> None:
    index = ScannIndex(EMBEDDINGS[:500], ScannSettings(num_leaves, 2, num_reordered=50))
    module = tf.Module()
    module.index = index
    module.search = tf.function(
        index.search,
        input_signature=[tf.TensorSpec([None, 16], tf.float32), tf.TensorSpec([], tf.int32)],
    )
    options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
    tf.saved_model.save(module, str(tmp_path), options=options)
    loaded = tf.saved_model.load(str(tmp_path))
    for found, expected in zip(
        loaded.search(tf.constant(QUERIES), 10), index.search(tf.constant(QUERIES), 10), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_empty_slots_have_no_score() -> None:
    index = ScannIndex(EMBEDDINGS[:40], ScannSettings(8, 1, num_reordered=40))
    _, scores = index.search(tf.constant(QUERIES), 40)
    num_empty = np.isneginf(scores.numpy()).sum(axis=1)
    assert num_empty.any()
    assert not np.isnan(scores.numpy()).any()


def test_two_indexes_in_one_process_do_not_mix() -> None:
    first = ScannIndex(EMBEDDINGS[:500], ScannSettings(5, 5, 500))
    second = ScannIndex(EMBEDDINGS[500:1000], ScannSettings(5, 5, 500))
    for index, points in ((first, EMBEDDINGS[:500]), (second, EMBEDDINGS[500:1000])):
        places, _ = index.search(tf.constant(QUERIES), 1)
        np.testing.assert_array_equal(places[:, 0], (QUERIES @ points.T).argmax(axis=1))


def test_refuses_more_leaves_than_candidates() -> None:
    with pytest.raises(ValueError, match=r"the 40 candidates.*41"):
        ScannIndex(EMBEDDINGS[:40], ScannSettings(41, 1, 10))


def test_auto_takes_exact_search_for_a_small_corpus() -> None:
    assert resolve_index_kind("auto", 19_999) == "exact"
    assert resolve_index_kind("auto", 20_000) == "scann"
    assert resolve_index_kind("scann", 10) == "scann"


def test_index_recall_is_the_share_found() -> None:
    found, exact = np.array([[1, 2, -1], [4, 5, 6]]), np.array([[2, 1, 3], [7, 8, 9]])
    assert index_recall(found, exact) == pytest.approx((2 / 3 + 0) / 2)
