from typing import Any

import numpy as np
import pytest
import scipy.sparse

from tfrs_pipeline.evaluation.baselines import (
    EaseRetriever,
    IalsRetriever,
    PopularityRetriever,
    interaction_matrix,
)


def random_interactions(
    num_users: int, num_candidates: int, seed: int = 0, density: float = 0.2
) -> scipy.sparse.csr_matrix:
    dense = np.random.default_rng(seed).random((num_users, num_candidates)) < density
    return scipy.sparse.csr_matrix(dense.astype(np.float32))


def test_interactions_mark_each_pair_once() -> None:
    users = np.array(["v", "u", "v", "v"])
    items = np.array([30, 10, 30, 20])
    matrix = interaction_matrix(users, items, [10, 20, 30])
    assert matrix.toarray().tolist() == [[1, 0, 0], [0, 1, 1]]


def test_interactions_refuse_items_outside_the_corpus() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 events .*first 11"):
        interaction_matrix(np.array([1, 1]), np.array([10, 11]), [10])
    with pytest.raises(ValueError, match="1 and 2 rows"):
        interaction_matrix(np.array([1]), np.array([10, 11]), [10])


def test_popularity_ranks_by_users_and_breaks_ties_by_order() -> None:
    dense = np.array([[1, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]])
    retriever = PopularityRetriever.fit(scipy.sparse.csr_matrix(dense), ["d", "c", "b", "a"])
    ids, scores = retriever.retrieve([{}, {}], 3, [[], ["a", "unheard of"]])
    assert ids.tolist() == [["a", "c", "d"], ["c", "d", "b"]]
    assert scores.tolist() == [[3, 2, 1], [2, 1, 0]]


def test_popularity_keeps_apart_counts_that_float32_cannot() -> None:
    dense = scipy.sparse.csr_matrix(np.ones((1, 2), np.float32))
    corpus = PopularityRetriever.fit(dense, [1, 2]).corpus
    retriever = PopularityRetriever(corpus, np.array([2**24, 2**24 + 1]))
    assert retriever.retrieve([{}], 2)[0].tolist() == [[2, 1]]


def test_ease_equals_a_ridge_regression_of_each_column_on_the_others() -> None:
    matrix = random_interactions(60, 9)
    dense = matrix.toarray().astype(np.float64)
    weights = EaseRetriever.fit(matrix, np.arange(9), l2=3.0).weights
    for column in range(9):
        others = np.delete(np.arange(9), column)
        x = dense[:, others]
        slow = np.linalg.solve(x.T @ x + 3.0 * np.eye(8), x.T @ dense[:, column])
        np.testing.assert_allclose(weights[others, column], slow, rtol=1e-5, atol=1e-7)
        assert weights[column, column] == 0


def test_ease_scores_a_history_by_the_sum_of_its_weights() -> None:
    retriever = EaseRetriever.fit(random_interactions(60, 9), np.arange(100, 109), l2=3.0)
    # Repeats in a history count once, as in the fit; 999 is not in the corpus.
    ids, scores = retriever.retrieve([{"history": [103, 107, 103, 999]}], 9)
    expected = retriever.weights[3] + retriever.weights[7]
    np.testing.assert_allclose(scores[0], np.sort(expected)[::-1], rtol=1e-6)
    np.testing.assert_array_equal(ids[0], 100 + np.argsort(-expected, kind="stable"))


def test_ease_refuses_a_corpus_that_would_not_fit_memory() -> None:
    matrix = scipy.sparse.csr_matrix((1, 50_000))
    with pytest.raises(ValueError, match=r"30 GB of memory.*use IalsRetriever"):
        EaseRetriever.fit(matrix, np.arange(50_000))


def test_ials_users_solve_their_least_squares() -> None:
    matrix = random_interactions(80, 20)
    retriever = IalsRetriever.fit(
        matrix, np.arange(20), num_factors=4, regularization=2.0, alpha=5.0, num_threads=1
    )
    items = retriever._model.item_factors.astype(np.float64)
    history = [3, 11, 12]
    clicked = np.isin(np.arange(20), history).astype(float)
    confidence = np.where(clicked, 5.0, 1.0)
    gram = (items * confidence[:, None]).T @ items + 2.0 * np.eye(4)
    user = np.linalg.solve(gram, items.T @ (confidence * clicked))
    ids, scores = retriever.retrieve([{"history": history}], 20)
    np.testing.assert_allclose(scores[0], (items @ user)[ids[0]], rtol=1e-3, atol=1e-5)


def test_ials_depends_on_its_seed_not_on_the_number_of_threads() -> None:
    matrix = random_interactions(80, 20)
    options: dict[str, Any] = {
        "num_factors": 4,
        "regularization": 1.0,
        "alpha": 5.0,
        "num_iterations": 3,
    }
    one, two, other = (
        IalsRetriever.fit(matrix, np.arange(20), seed=seed, num_threads=threads, **options)
        for seed, threads in ((0, 1), (0, 2), (1, 1))
    )
    query = [{"history": [1, 2]}]
    np.testing.assert_array_equal(one.retrieve(query, 20)[1], two.retrieve(query, 20)[1])
    assert not np.array_equal(one.retrieve(query, 20)[1], other.retrieve(query, 20)[1])


def test_ials_takes_blas_threads_out_of_its_way(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    # The library warns of BLAS threads once a process.
    monkeypatch.setattr("implicit.utils._checked_blas_config", False)
    IalsRetriever.fit(random_interactions(8, 5), np.arange(5), num_factors=2, num_threads=1)
    assert not [w for w in recwarn if "BLAS" in str(w.message)]


@pytest.mark.parametrize("retriever", [PopularityRetriever, EaseRetriever, IalsRetriever])
def test_fit_refuses_interactions_that_are_not_zero_or_one(retriever: Any) -> None:
    with pytest.raises(ValueError, match=r"Received values 1.0 to 2.0"):
        retriever.fit(scipy.sparse.csr_matrix([[1.0, 2.0]]), [1, 2])
    with pytest.raises(ValueError, match=r"\[num_users, 3\]"):
        retriever.fit(scipy.sparse.csr_matrix([[1.0, 1.0]]), [1, 2, 3])
    with pytest.raises(ValueError, match="ndarray"):
        retriever.fit(np.ones((1, 2)), [1, 2])


def test_fit_leaves_its_input_alone_and_ignores_stored_zeros() -> None:
    matrix = scipy.sparse.csr_matrix(([1, 0, 1], ([0, 0, 1], [0, 1, 0])), (2, 2))
    retriever = PopularityRetriever.fit(matrix, [1, 2])
    assert retriever.candidate_counts.tolist() == [2, 0]
    assert matrix.nnz == 3


def test_fit_refuses_settings_out_of_range() -> None:
    matrix = random_interactions(8, 5)
    with pytest.raises(ValueError, match="l2 must be above 0"):
        EaseRetriever.fit(matrix, np.arange(5), l2=0)
    with pytest.raises(ValueError, match="alpha=0"):
        IalsRetriever.fit(matrix, np.arange(5), alpha=0)


@pytest.mark.parametrize("retriever", [EaseRetriever, IalsRetriever])
def test_a_query_without_history_is_refused_and_an_empty_history_is_not(retriever: Any) -> None:
    fitted = retriever.fit(random_interactions(30, 5), np.arange(5))
    with pytest.raises(ValueError, match=r"pass \[\].*'user_id'"):
        fitted.retrieve([{"user_id": 1}], 1)
    ids, scores = fitted.retrieve([{"history": []}], 3)
    assert ids.tolist() == [[0, 1, 2]]
    assert scores.tolist() == [[0, 0, 0]]
