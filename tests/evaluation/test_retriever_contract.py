"""What every retriever owes its callers, on data whose best answer is known.

A retriever joins by a line in FACTORIES: (interactions, candidate_ids) -> Retriever.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import numpy as np
import pytest
import scipy.sparse

from tfrs_pipeline.evaluation.baselines import EaseRetriever, IalsRetriever, PopularityRetriever
from tfrs_pipeline.evaluation.topk import ExactRetriever
from tfrs_pipeline.retrieval import Query, Retriever

NUM_CANDIDATES = 24
Factory: TypeAlias = Callable[[scipy.sparse.csr_matrix, np.ndarray], Retriever]


def exact(interactions: scipy.sparse.csr_matrix, candidate_ids: np.ndarray) -> Retriever:
    """Dot products of one-hot communities, so that scores are whole and ties many."""
    community = np.arange(NUM_CANDIDATES) % 2
    embeddings = np.eye(2)[community] * (1 + np.arange(NUM_CANDIDATES) // 8)[:, None]
    row_of = {id_: row for row, id_ in enumerate(candidate_ids)}

    def query_fn(queries: Sequence[Query]) -> np.ndarray:
        return np.array(
            [
                np.eye(2)[[community[row_of[i]] for i in q["history"] if i in row_of]].sum(axis=0)
                for q in queries
            ]
        )

    return ExactRetriever(candidate_ids, embeddings, query_fn)


def popularity(interactions: scipy.sparse.csr_matrix, candidate_ids: np.ndarray) -> Retriever:
    return PopularityRetriever.fit(interactions, candidate_ids)


def ease(interactions: scipy.sparse.csr_matrix, candidate_ids: np.ndarray) -> Retriever:
    return EaseRetriever.fit(interactions, candidate_ids, l2=10.0)


def ials(interactions: scipy.sparse.csr_matrix, candidate_ids: np.ndarray) -> Retriever:
    return IalsRetriever.fit(
        interactions, candidate_ids, num_factors=2, regularization=1.0, alpha=5.0
    )


FACTORIES: list[Factory] = [exact, popularity, ease, ials]
IGNORES_HISTORY = {popularity}


@pytest.fixture(scope="module")
def interactions() -> scipy.sparse.csr_matrix:
    """Two communities of users: one clicks even candidates only, the other odd ones."""
    rng = np.random.default_rng(0)
    user_community = np.arange(300) % 2
    clicks = rng.random((300, NUM_CANDIDATES)) < 0.3
    clicks &= np.arange(NUM_CANDIDATES) % 2 == user_community[:, None]
    return scipy.sparse.csr_matrix(clicks.astype(np.float32))


@pytest.fixture(scope="module", params=["int", "str"])
def ids(request: pytest.FixtureRequest) -> np.ndarray:
    numbers = np.random.default_rng(1).permutation(1000)[:NUM_CANDIDATES] + 1
    return numbers if request.param == "int" else np.array([f"i{n}" for n in numbers], object)


@pytest.fixture(scope="module", params=FACTORIES, ids=lambda factory: factory.__name__)
def factory(request: pytest.FixtureRequest) -> Factory:
    return request.param


@pytest.fixture(scope="module")
def retriever(
    factory: Factory, interactions: scipy.sparse.csr_matrix, ids: np.ndarray
) -> Retriever:
    return factory(interactions, ids)


@pytest.fixture
def queries(ids: np.ndarray) -> list[Query]:
    rng = np.random.default_rng(2)
    histories = [rng.choice(ids[i % 2 :: 2], size=1 + i % 4, replace=False) for i in range(9)]
    return [{"user_id": i, "history": h.tolist()} for i, h in enumerate([*histories, ids[:0]])]


def unknown(ids: np.ndarray) -> Any:
    return 10_001 if ids.dtype == np.int64 else "never seen"


def empty(ids: np.ndarray) -> Any:
    return -1 if ids.dtype == np.int64 else ""


def test_is_a_retriever(retriever: Retriever) -> None:
    assert isinstance(retriever, Retriever)


def test_shapes_types_and_order(
    retriever: Retriever, ids: np.ndarray, queries: list[Query]
) -> None:
    found, scores = retriever.retrieve(queries, 7)
    assert found.shape == scores.shape == (len(queries), 7)
    assert found.dtype == ids.dtype
    assert scores.dtype == np.float32
    assert np.all(scores[:, 1:] <= scores[:, :-1])


def test_every_candidate_comes_once(
    retriever: Retriever, ids: np.ndarray, queries: list[Query]
) -> None:
    found, _ = retriever.retrieve(queries, NUM_CANDIDATES)
    for ranking in found:
        assert sorted(ranking.tolist()) == sorted(ids.tolist())


def test_ties_are_broken_by_corpus_order(
    retriever: Retriever, ids: np.ndarray, queries: list[Query]
) -> None:
    row_of = {id_: row for row, id_ in enumerate(ids.tolist())}
    found, scores = retriever.retrieve(queries, NUM_CANDIDATES)
    for ranking, ranking_scores in zip(found.tolist(), scores.tolist(), strict=True):
        pairs = [(-score, row_of[id_]) for id_, score in zip(ranking, ranking_scores, strict=True)]
        assert pairs == sorted(pairs)


def test_finds_the_community_of_the_history(
    factory: Factory, retriever: Retriever, ids: np.ndarray, queries: list[Query]
) -> None:
    if factory in IGNORES_HISTORY:
        pytest.skip("gives everyone the same")
    found, _ = retriever.retrieve(queries[:-1], 8)
    for i, ranking in enumerate(found.tolist()):
        assert set(ranking) <= set(ids[i % 2 :: 2].tolist())


def test_k_is_a_prefix_of_a_larger_k(retriever: Retriever, queries: list[Query]) -> None:
    few, few_scores = retriever.retrieve(queries, 3)
    many, many_scores = retriever.retrieve(queries, 12)
    np.testing.assert_array_equal(few, many[:, :3])
    np.testing.assert_array_equal(few_scores, many_scores[:, :3])


@pytest.mark.parametrize("collection", [list, set, tuple, np.array])
def test_excluded_are_left_out_and_nothing_else_moves(
    retriever: Retriever, queries: list[Query], collection: Callable[[list[Any]], Collection[Any]]
) -> None:
    everything, all_scores = retriever.retrieve(queries, NUM_CANDIDATES)
    # Each query its own: the best, the third, and one far down; none for the last query.
    excluded = [ranking[[0, 2, 15]].tolist() for ranking in everything[:-1]] + [[]]
    found, scores = retriever.retrieve(queries, 10, [collection(e) for e in excluded])
    for i, gone in enumerate(excluded):
        is_left = ~np.isin(everything[i], gone)
        assert found[i].tolist() == everything[i][is_left][:10].tolist()
        np.testing.assert_array_equal(scores[i], all_scores[i][is_left][:10])


def test_unknown_ids_change_nothing(
    retriever: Retriever, ids: np.ndarray, queries: list[Query]
) -> None:
    stranger = unknown(ids)
    strange = [{**q, "history": [stranger, *q["history"], stranger]} for q in queries]
    found, scores = retriever.retrieve(strange, 5, [[stranger]] * len(queries))
    expected, expected_scores = retriever.retrieve(queries, 5)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(scores, expected_scores)


def test_k_beyond_what_is_left_gives_empty_slots_last(
    retriever: Retriever, ids: np.ndarray, queries: list[Query]
) -> None:
    excluded = [ids[: 4 + i] for i in range(len(queries))]
    found, scores = retriever.retrieve(queries, NUM_CANDIDATES + 5, excluded)
    for i in range(len(queries)):
        num_left = NUM_CANDIDATES - (4 + i)
        assert set(found[i, :num_left].tolist()) == set(ids[4 + i :].tolist())
        assert np.all(np.isfinite(scores[i, :num_left]))
        assert found[i, num_left:].tolist() == [empty(ids)] * (9 + i)
        assert np.all(scores[i, num_left:] == -np.inf)


def test_a_batch_equals_its_single_calls(
    retriever: Retriever, ids: np.ndarray, queries: list[Query]
) -> None:
    excluded = [ids[i : i + 3] for i in range(len(queries))]
    found, scores = retriever.retrieve(queries, 6, excluded)
    for i, query in enumerate(queries):
        alone, alone_scores = retriever.retrieve([query], 6, [excluded[i]])
        np.testing.assert_array_equal(alone[0], found[i])
        # Matrix products round differently by shape.
        np.testing.assert_allclose(alone_scores[0], scores[i], rtol=1e-5, atol=1e-6)


def test_asking_twice_gives_the_same(retriever: Retriever, queries: list[Query]) -> None:
    for first, second in zip(
        retriever.retrieve(queries, 6), retriever.retrieve(queries, 6), strict=True
    ):
        np.testing.assert_array_equal(first, second)


def test_no_queries_give_no_rows(retriever: Retriever, ids: np.ndarray) -> None:
    found, scores = retriever.retrieve([], 4)
    assert found.shape == scores.shape == (0, 4)
    assert found.dtype == ids.dtype


def test_refuses_k_below_one(retriever: Retriever, queries: list[Query]) -> None:
    with pytest.raises(ValueError, match="k"):
        retriever.retrieve(queries, 0)


def test_refuses_exclusions_that_do_not_match_the_queries(
    retriever: Retriever, ids: np.ndarray, queries: list[Query]
) -> None:
    with pytest.raises(ValueError, match=r"1 .*for 10 queries"):
        retriever.retrieve(queries, 3, [[ids[0]]])
