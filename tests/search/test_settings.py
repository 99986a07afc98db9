"""Search structures against exact scoring."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from scann.scann_ops.py import scann_ops_pybind

from tfrs_pipeline.exports.graph_index import ExactIndex, ScannIndex
from tfrs_pipeline.exports.saved_model import ExportError, check_operation
from tfrs_pipeline.search.candidates import Candidates
from tfrs_pipeline.search.searcher import Searcher, build_in_subprocess
from tfrs_pipeline.search.settings import Auto, Exact, Level, Scann


def clustered(num: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(20, dim))
    points = centres[rng.integers(0, 20, num)] + 0.3 * rng.normal(size=(num, dim))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


EMBEDDINGS, QUERIES = clustered(2000), clustered(50, seed=1)


def exact_order(queries: np.ndarray, k: int) -> np.ndarray:
    return 1 + np.argsort(-(queries @ EMBEDDINGS.T), axis=1, kind="stable")[:, :k]


@pytest.fixture(scope="module", params=[1, 45])
def searcher(request: pytest.FixtureRequest) -> Searcher:
    return Searcher.build(EMBEDDINGS, request.param)


def in_graph(searcher: Searcher, folder: Path, *levels: Level) -> ScannIndex:
    searcher.save(folder)
    return ScannIndex(ExactIndex(EMBEDDINGS), folder, levels)


def test_scann_that_searches_all_is_exact_search(searcher: Searcher) -> None:
    rows, scores, num_rows = searcher.search(QUERIES, Level(100, 45, len(EMBEDDINGS)))
    assert num_rows == len(EMBEDDINGS)
    assert np.mean(np.sort(rows) == np.sort(exact_order(QUERIES, 100))) >= 0.999
    # Rescored exactly: the score is the dot product of what was found.
    expected = np.take_along_axis(QUERIES @ EMBEDDINGS.T, rows - 1, axis=1)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_the_operation_and_a_loaded_copy_answer_like_the_searcher(
    searcher: Searcher, tmp_path: Path
) -> None:
    # A saved index may be moved, as a new version is once it is complete.
    graph = in_graph(searcher, tmp_path / "partial")
    copy = Searcher.load((tmp_path / "partial").rename(tmp_path / "moved"))
    plain = scann_ops_pybind.load_searcher(str(tmp_path / "moved"))  # Without this package.
    for options in ((100, 45, 2000), (100, 3, 100), (500, 20, 700)):
        rows, scores, _ = searcher.search(QUERIES, Level(*options))
        for other in (
            graph.approximate(tf.constant(QUERIES), *options),
            copy.search(QUERIES, Level(*options)),
        ):
            np.testing.assert_array_equal(other[0], rows)
            np.testing.assert_array_equal(other[1], scores)
        depth, leaves, reordered = options
        indices, _ = plain.search_batched(QUERIES, depth, reordered, leaves)
        np.testing.assert_array_equal(indices[rows > 0] + 1, rows[rows > 0])


@pytest.mark.parametrize("num_excluded", [0, 20, 200, 1500])
def test_a_saved_model_and_the_server_answer_alike(
    searcher: Searcher, tmp_path: Path, num_excluded: int
) -> None:
    """Where both answer: any k and exclusions, without a filter, before items change."""
    levels = [Level(128, 9, 256), Level(512, 20, 1024)]
    scann, exact = in_graph(searcher, tmp_path, *levels), ExactIndex(EMBEDDINGS)
    server = Candidates(np.arange(1, len(EMBEDDINGS) + 1), EMBEDDINGS, searcher, levels)
    excluded = exact_order(QUERIES, num_excluded).astype(np.int32)
    for k in (1, 60, 400, 1990):
        for index, is_exact in ((scann, False), (exact, True)):
            expected, scores = server.search(QUERIES, k, list(excluded), exact=is_exact)
            rows, found_scores = index.search(tf.constant(QUERIES), k, tf.constant(excluded))
            np.testing.assert_allclose(found_scores, scores, rtol=1e-4, atol=1e-5)
            # The empty id is -1, and equal scores may swap places.
            is_same = np.maximum(expected, 0) == rows.numpy()
            assert is_same.mean() > 0.999
            assert not np.isin(rows[0], excluded[0][excluded[0] > 0]).any()


def test_an_operation_that_answers_otherwise_is_refused(searcher: Searcher, tmp_path: Path) -> None:
    other = Searcher.build(EMBEDDINGS[::-1].copy(), 45)
    check_operation(in_graph(searcher, tmp_path, Level(50, 45, 2000)), searcher, QUERIES)
    with pytest.raises(ExportError, match="does not answer as its searcher"):
        check_operation(in_graph(searcher, tmp_path, Level(50, 2, 60)), other, QUERIES)


def test_an_index_built_in_another_process_finds_the_same() -> None:
    with pytest.raises(RuntimeError, match="learns its hashing from 16 candidates or more"):
        build_in_subprocess(EMBEDDINGS[:3], 1)
    apart, here = build_in_subprocess(EMBEDDINGS, 45), Searcher.build(EMBEDDINGS, 45)
    for found, expected in zip(
        *(searcher.search(QUERIES, Level(50, 9, 200)) for searcher in (apart, here)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_empty_slots_have_no_score() -> None:
    rows, scores, _ = Searcher.build(EMBEDDINGS[:40], 8).search(QUERIES, Level(40, 1, 40))
    assert (rows == 0).any()
    np.testing.assert_array_equal(rows == 0, np.isneginf(scores))


def test_searches_go_on_while_another_thread_adds() -> None:
    searcher, found = Searcher.build(EMBEDDINGS[:1000], 20), []

    def search() -> None:
        for _ in range(300):
            rows, _, num_rows = searcher.search(QUERIES[:1], Level(10, 20, 100))
            found.append(rows.max() <= num_rows)

    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            pool.submit(search)
        for start in range(1000, 2000, 8):
            searcher.add(EMBEDDINGS[start : start + 8])
    assert found == [True] * 900
    rows, _, num_rows = searcher.search(QUERIES, Level(100, 20, 2000))
    assert num_rows == 2000
    assert np.mean(np.sort(rows) == np.sort(exact_order(QUERIES, 100))) >= 0.999


def test_exact_search_suits_a_small_corpus() -> None:
    assert Auto(0.9).choose(19_999) == Exact()
    assert Auto(0.9).choose(20_000) == Scann(recall=0.9)


def test_a_recall_of_0_is_refused() -> None:
    for kind in (Scann, Auto):
        with pytest.raises(ValueError, match="recall"):
            kind(recall=0)
