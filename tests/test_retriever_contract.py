"""The contract of every retriever, on data whose best answer is known.

To test another retriever, add a line to FACTORIES: (problem) -> Retriever.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pytest

import tfrs_pipeline as tp
from tfrs_pipeline import Ease, Ials, ItemKnn, MostPopular, Query, Retriever, Transitions
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.evaluation.interactions import Interactions, Sequences
from tfrs_pipeline.model.checkpoints import TrainingResult
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.model.fitted_model import query_encoder
from tfrs_pipeline.search.topk import ExactRetriever

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")
NUM_USERS, NUM_CANDIDATES = 300, 24
HISTORY_LENGTH = 10
# Rows (from 1) of candidates that are made equal to others of their community.
TWIN_ROWS, TWINS_OF = [4, 23, 14, 20], [10, 5, 6, 6]


@dataclass(frozen=True)
class Problem:
    """Two communities of users: one clicks even candidates only, the other odd ones.

    clicks: [NUM_USERS, NUM_CANDIDATES] bool; candidate_ids: [NUM_CANDIDATES]; network: over the
    rows of both; folder: for exports.
    """

    clicks: np.ndarray
    candidate_ids: np.ndarray
    network: tp.TwoTowerNetwork
    folder: Path

    @functools.cached_property
    def interactions(self) -> Interactions:
        users, columns = np.nonzero(self.clicks)
        return Interactions.from_rows(Ids(self.candidate_ids), users, columns + 1)

    @functools.cached_property
    def exported(self) -> Path:
        """Exports with ScaNN for integer ids, exact search for text ids; returns the folder."""
        network, items = self.network, pa.table({"item_id": self.candidate_ids.tolist()})
        towers = network.embed_queries, network.embed_candidates, network.variables
        of = {"query_ids": np.arange(NUM_USERS), "history_length": HISTORY_LENGTH}
        served = tp.Exportable(*towers, items=items, **of)
        # Recall 1, because the contract is about exact answers.
        index = tp.Scann(recall=1.0) if self.candidate_ids.dtype == np.int64 else tp.Exact()
        return tp.export(served, self.folder / "model", index=index).parent


PLAN = tp.TwoTower(dim=8, history_length=HISTORY_LENGTH)


def make_network() -> tp.TwoTowerNetwork:
    """Makes a network whose items point roughly the same way by community; some are equal."""
    network = PLAN.build(Corpus(Ids(np.arange(NUM_CANDIDATES)), Ids(np.arange(NUM_USERS))))
    vectors = np.random.default_rng(4).normal(scale=0.2, size=(NUM_CANDIDATES + 1, 8))
    vectors[1:, :2] += np.eye(2)[np.arange(NUM_CANDIDATES) % 2]
    vectors[TWIN_ROWS] = vectors[TWINS_OF]
    network.candidate_tower.id_embedding.embeddings.assign(vectors)
    return network


Queries: TypeAlias = list[Query]
Factory: TypeAlias = Callable[[Problem], Retriever]


def exact(problem: Problem) -> Retriever:
    """Scores by dot products of one-hot communities: integers, with many ties."""
    community = np.arange(NUM_CANDIDATES) % 2
    embeddings = np.eye(2)[community] * (1 + np.arange(NUM_CANDIDATES) // 8)[:, None]
    items = problem.interactions.items

    def embed_queries(queries: Sequence[Query]) -> np.ndarray:
        rows = [items.known_rows(query.get("history", ())) for query in queries]
        return np.array([np.eye(2)[community[of_query - 1]].sum(axis=0) for of_query in rows])

    return ExactRetriever(problem.candidate_ids, embeddings, embed_queries)


def transitions(problem: Problem) -> Retriever:
    users, columns = np.nonzero(problem.clicks)
    order = np.lexsort((np.random.default_rng(3).random(len(users)), users))
    clicks = users[order], columns[order] + 1, np.ones(len(users), bool)
    return Transitions().fit(Sequences(problem.interactions.items, *clicks))


def two_tower(problem: Problem) -> Retriever:
    corpus, network = Corpus(Ids(problem.candidate_ids), Ids(np.arange(NUM_USERS))), problem.network
    encoder, result = query_encoder(network, corpus), TrainingResult({}, 0, 0.0)
    no_log: Any = None
    return tp.FittedTwoTower(PLAN.settings, PLAN.training, corpus, network, encoder, result, no_log)


def fallback(problem: Problem) -> Retriever:
    if problem.candidate_ids.dtype != np.int64:
        pytest.skip("exact search has no fallback")
    return tp.load(problem.exported, exact=True)


FACTORIES: dict[str, Factory] = {
    "exact": exact,
    "popularity": lambda problem: MostPopular().fit(problem.interactions),
    "transitions": transitions,
    "itemknn": lambda problem: ItemKnn().fit(problem.interactions),
    "ease": lambda problem: Ease(l2=10.0).fit(problem.interactions),
    "ials": lambda problem: Ials(2, regularization=1.0, alpha=5.0).fit(problem.interactions),
    "two_tower": two_tower,
    "exported": lambda problem: tp.load(problem.exported),
    "fallback": fallback,
}
NEEDS_HISTORY = {"transitions", "itemknn", "ease", "ials"}
KNOWS_USERS = {"two_tower", "exported", "fallback"}  # And request features.
HAS_TIES = {"exact", "transitions", *KNOWS_USERS}


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Problem]:
    """Returns a problem for each type of ids; all retrievers share it, and its one export."""
    rng = np.random.default_rng(0)
    user_community = np.arange(NUM_USERS) % 2
    clicks = rng.random((NUM_USERS, NUM_CANDIDATES)) < 0.3
    clicks &= np.arange(NUM_CANDIDATES) % 2 == user_community[:, None]
    numbers = np.random.default_rng(1).permutation(1000)[:NUM_CANDIDATES] + 1
    ids = {"int": numbers, "str": np.array([f"i{n}" for n in numbers], object)}
    network = make_network()
    return {
        kind: Problem(clicks, x, network, tmp_path_factory.mktemp("exports"))
        for kind, x in ids.items()
    }


@pytest.fixture(scope="module", params=["int", "str"])
def problem(request: pytest.FixtureRequest, problems: dict[str, Problem]) -> Problem:
    return problems[request.param]


@pytest.fixture(scope="module")
def ids(problem: Problem) -> np.ndarray:
    return problem.candidate_ids


@pytest.fixture(scope="module", params=FACTORIES)
def factory(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def retriever(factory: str, problem: Problem) -> Retriever:
    return FACTORIES[factory](problem)


@pytest.fixture
def queries(ids: np.ndarray) -> Queries:
    rng = np.random.default_rng(2)
    histories = [rng.choice(ids[i % 2 :: 2], size=1 + i % 4, replace=False) for i in range(9)]
    return [{"user_id": i, "history": h.tolist()} for i, h in enumerate([*histories, ids[:0]])]


def test_ranks_the_whole_corpus_best_first_ties_by_its_order(
    factory: str, retriever: Retriever, ids: np.ndarray, queries: Queries
) -> None:
    assert isinstance(retriever, Retriever)
    found, scores = retriever.retrieve(queries, NUM_CANDIDATES)
    assert found.shape == scores.shape == (len(queries), NUM_CANDIDATES)
    assert found.dtype == ids.dtype
    assert scores.dtype == np.float32
    # Transitions order their corpus by popularity, so that names break no ties.
    corpus = getattr(retriever, "items", Ids(ids))
    assert factory == "transitions" or corpus.values.tolist() == ids.tolist()
    for rows, of_query in zip(map(corpus.rows, found), scores.tolist(), strict=True):
        assert sorted(rows) == list(range(1, NUM_CANDIDATES + 1))
        pairs = list(zip(np.negative(of_query), rows, strict=True))
        assert pairs == sorted(pairs)
        if factory in HAS_TIES:
            assert len(set(of_query)) < len(of_query)


def test_finds_the_community_of_the_history(
    factory: str, retriever: Retriever, ids: np.ndarray, queries: Queries
) -> None:
    if factory == "popularity":
        pytest.skip("gives everyone the same")
    found, _ = retriever.retrieve(queries[:-1], 8)
    for i, ranking in enumerate(found.tolist()):
        assert set(ranking) <= set(ids[i % 2 :: 2].tolist())


def test_excluded_go_and_nothing_else_moves(retriever: Retriever, queries: Queries) -> None:
    everything, all_scores = retriever.retrieve(queries, NUM_CANDIDATES)
    # Each query excludes its own best, third, and one far down; the last one excludes none.
    excluded = [ranking[[0, 2, 15]].tolist() for ranking in everything[:-1]] + [[]]
    kinds = (list, set, tuple, np.array)
    collections: list[Collection[Any]] = [kinds[i % 4](gone) for i, gone in enumerate(excluded)]
    found, scores = retriever.retrieve(queries, 10, collections)
    for i, gone in enumerate(excluded):
        is_left = ~np.isin(everything[i], gone)
        assert found[i].tolist() == everything[i][is_left][:10].tolist()
        np.testing.assert_array_equal(scores[i], all_scores[i][is_left][:10])


def test_unknown_ids_change_nothing(
    retriever: Retriever, ids: np.ndarray, queries: Queries
) -> None:
    stranger: Any = 10_001 if ids.dtype == np.int64 else "never seen"
    strange = [{**q, "history": [stranger, *q["history"], stranger]} for q in queries]
    found = retriever.retrieve(strange, 5, [[stranger]] * len(queries))
    for got, expected in zip(found, retriever.retrieve(queries, 5), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_k_beyond_what_is_left(retriever: Retriever, ids: np.ndarray, queries: Queries) -> None:
    excluded = [ids[: 4 + i] for i in range(len(queries))]
    found, scores = retriever.retrieve(queries, NUM_CANDIDATES + 5, excluded)
    for i in range(len(queries)):
        num_left = NUM_CANDIDATES - (4 + i)
        assert set(found[i, :num_left].tolist()) == set(ids[4 + i :].tolist())
        assert np.all(np.isfinite(scores[i, :num_left]))
        assert found[i, num_left:].tolist() == [Ids(ids).empty_id] * (9 + i)
        assert np.all(scores[i, num_left:] == -np.inf)


def test_a_batch_equals_its_single_calls(
    retriever: Retriever, ids: np.ndarray, queries: Queries
) -> None:
    """Each call also asks for another k: fewer results are the beginning of more."""
    excluded = [ids[i : i + 3] for i in range(len(queries))]
    found, scores = retriever.retrieve(queries, 6, excluded)
    for i, query in enumerate(queries):
        alone, alone_scores = retriever.retrieve([query], 2 + i, [excluded[i]])
        np.testing.assert_array_equal(alone[0, :6], found[i, : 2 + i])
        # Matrix products round differently by shape.
        np.testing.assert_allclose(alone_scores[0, :6], scores[i, : 2 + i], rtol=1e-5, atol=1e-6)


def test_a_query_without_a_history(factory: str, retriever: Retriever) -> None:
    if factory in NEEDS_HISTORY:
        with pytest.raises(ValueError, match=r"query\['history'\]: pass \[\]"):
            retriever.retrieve([{"user_id": 3}], 4)
        return
    bare: Queries = [{}, {"history": []}]
    answers = [retriever.retrieve([query], 4) for query in bare]
    for without, with_empty in zip(*answers, strict=True):
        np.testing.assert_array_equal(without, with_empty)


def test_what_is_refused(factory: str, retriever: Retriever, ids: np.ndarray) -> None:
    item, another = ids[:2].tolist()
    kind, other = ("integers", "7") if ids.dtype == np.int64 else ("strings", 7)
    of_other_type = rf"This model's ids are {kind}. Received: {other!r}"
    refused: list[tuple[Any, str]] = [
        ({"history": [item]}, r"Queries come in a list, also a single one: \[\{"),
        ([[item]], r"A query is a mapping, .* Received: \["),
        ([{"histroy": [item]}], r"Unknown key 'histroy' in a query; did you mean 'history'\?"),
        ([{"history": [item], 3: 4}], "Unknown key '3' in a query"),
        ([{"history": item}], rf"history .* must be a list.*; did you mean \[{item!r}\]"),
        ([{"history": ids[0]}], "history of a query must be a list"),
        ([{"history": [item, None, another, other]}], of_other_type),
        ([{"history": np.array([other, item], object)}], of_other_type),
        ([{"history": [[item]]}], f"This model's ids are {kind}"),
        ([{"history": [item], "request": "tv"}], "'request' of a query is a mapping.*'tv'"),
        ([{"history": [item], "features": ["tv"]}], "'features' of a query is a mapping"),
    ]
    if factory in KNOWS_USERS:
        refused += [
            ([{"history": [item], "user_id": "7"}], "ids are integers. Received: '7'"),
            ([{"request": {"timestmp": None}}], "reads no .*'timestmp'; did you mean 'timestamp'"),
        ]
    for asked, message in refused:
        with pytest.raises(ValueError, match=message):
            retriever.retrieve(asked, 2)
        if isinstance(asked, list):  # Also among other queries.
            with pytest.raises(ValueError, match=message):
                retriever.retrieve([{"history": [item]}] * 3 + asked, 2)
    wrong: list[tuple[Any, str]] = [
        ([[item], [item, other]], of_other_type),
        ([[], {other}], of_other_type),
        ([iter([item]), []], "exclude for a query must be a list or another"),
        ([[], item], rf"exclude for a query must be a list.*did you mean \[{item!r}\]"),
    ]
    for exclude, message in wrong:
        with pytest.raises(ValueError, match=message):
            retriever.retrieve([{"history": [item]}] * 2, 2, exclude)
    with pytest.raises(ValueError, match=r"1 .*for 2 queries"):
        retriever.retrieve([{"history": [item]}] * 2, 2, [[item]])
    number: Any
    for number in (0, 2.5, "5", True, 2**31):
        with pytest.raises(ValueError, match=rf"k must be .*Received: {number!r}"):
            retriever.retrieve([{"history": [item]}], number)


def test_what_is_known_but_empty_changes_nothing(retriever: Retriever, ids: np.ndarray) -> None:
    nobody, none = retriever.retrieve([], 4)
    assert nobody.shape == none.shape == (0, 4)
    assert nobody.dtype == ids.dtype
    histories = [ids[:3].tolist(), ids[:3], ids[:0], np.array([]), [], tuple(ids[:2])]
    nothing: dict[str, Any] = {"user_id": None, "features": None, "request": {"timestamp": None}}
    queries: Queries = [{"history": history} for history in histories]
    expected = retriever.retrieve(queries, 5)
    times = [{"history_timestamps": [None] * len(history)} for history in histories]
    beside = [{**query, **nothing, **x} for query, x in zip(queries, times, strict=True)]
    beside[1]["request"] = None
    five: Any = np.int64(5)
    for found, of_each in zip(retriever.retrieve(beside, five), expected, strict=True):
        np.testing.assert_array_equal(found, of_each)
