"""The sum of models: its scores are the weighted sum of the members' scores, in every form."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import tfrs_pipeline as tp
from tests.model.conftest import make_log, untrained
from tfrs_pipeline.evaluation.evaluate import Truth, measure_vectors
from tfrs_pipeline.model import fitted_model, sums
from tfrs_pipeline.model.sums import (
    MIN_QUERIES,
    WEIGHTS,
    Choice,
    Projection,
    Vectors,
    choose,
    projection,
)
from tfrs_pipeline.search.history_bonus import HistoryBonus, RepeatBonus

RNG = np.random.default_rng(0)


def vectors(num_queries: int, num_items: int, dim: int, *, has_bias: bool = False) -> Vectors:
    queries, candidates = (
        RNG.normal(size=(num, dim + has_bias)).astype(np.float32)
        for num in (num_queries, num_items)
    )
    if has_bias:
        queries[:, -1] = 1
    return Vectors(queries, candidates, has_bias)


def scores(model: Vectors) -> np.ndarray:
    return model.queries.astype(float) @ model.candidates.T.astype(float)


def test_a_projection_sums_the_weighted_scores_and_the_biases() -> None:
    members = [
        vectors(20, 30, 4),
        vectors(20, 30, 6, has_bias=True),
        vectors(20, 30, 3, has_bias=True),
    ]
    weights = [1.0, 0.3, 2.0]
    joined = projection(members, weights)(members)
    pairs = zip(weights, members, strict=True)
    expected = sum(weight * scores(member) for weight, member in pairs)
    np.testing.assert_allclose(scores(joined), expected, atol=1e-5)
    assert joined.queries.shape == (20, 4 + 6 + 3 + 1)
    # The biases of both members are one bias, the last entry.
    assert joined.has_bias
    np.testing.assert_allclose(joined.queries[:, -1], 1)
    biases = 0.3 * members[1].candidates[:, -1] + 2 * members[2].candidates[:, -1]
    np.testing.assert_allclose(joined.candidates[:, -1], biases, rtol=1e-5)


def test_a_rotation_is_the_best_approximation_of_its_rank() -> None:
    members = [vectors(200, 50, 8), vectors(200, 50, 5)]
    weights = [1.0, 0.6]
    expected = scores(projection(members, weights)(members))
    rotated = projection(members, weights, dim=6)(members)
    assert rotated.queries.shape == (200, 6)
    # Eckart and Young: no matrix of rank 6 is nearer than the truncated decomposition.
    left, values, right = np.linalg.svd(expected)
    best = (left[:, :6] * values[:6]) @ right[:6]
    np.testing.assert_allclose(scores(rotated), best, atol=1e-2 * np.abs(best).max())
    error = np.linalg.norm(expected - scores(rotated))
    assert error <= np.linalg.norm(expected - best) * 1.001


def test_a_rotation_keeps_the_products_of_items() -> None:
    """Similar items are found by them. They must not be on the scale of what users ask for."""
    members = [vectors(200, 50, 8), vectors(200, 50, 5)]
    for member in members:  # As in a trained model, queries differ far more in some dimensions.
        member.queries[:] *= np.geomspace(10, 0.1, member.queries.shape[1])
    joined, rotated = (projection(members, [1.0, 0.6], dim)(members).candidates for dim in (13, 12))
    expected, products = joined @ joined.T, rotated @ rotated.T
    # One of 13 dimensions is missing, so no vector is longer, and little is lost.
    assert (np.diag(products) <= np.diag(expected) * (1 + 1e-5)).all()
    assert np.linalg.norm(products - expected) < 0.3 * np.linalg.norm(expected)
    # What is lost is a vector's part in one direction: a matrix of rank 1.
    left = np.linalg.eigvalsh(expected - products)
    assert np.abs(left[:-1]).max() < 1e-4 * left[-1]


def test_a_rotation_to_all_dimensions_or_more_changes_nothing() -> None:
    members = [vectors(40, 30, 4), vectors(40, 30, 3, has_bias=True)]
    for dim in (8, 99):
        joined = projection(members, [1, 1], dim)(members)
        assert joined.queries.shape == (40, 8)
        np.testing.assert_allclose(scores(joined), sum(map(scores, members)), atol=1e-5)


def test_a_rotation_keeps_the_biases() -> None:
    members = [vectors(99, 30, 8), vectors(99, 30, 8, has_bias=True)]
    rotated = projection(members, [1, 0.5], dim=5)(members)
    assert rotated.queries.shape == (99, 5)
    np.testing.assert_allclose(rotated.queries[:, -1], 1)
    np.testing.assert_allclose(rotated.candidates[:, -1], 0.5 * members[1].candidates[:, -1])


def test_a_rotation_stands_fewer_queries_than_dimensions() -> None:
    """Their moments have no full rank: rounded, they would not be positive definite."""
    members = [vectors(50, 60, 200), vectors(50, 60, 200)]
    members[0].queries[:] += 30  # All queries point one way, as those of a trained model do.
    rotated = projection(members, [1, 1], dim=120)(members)
    expected = sum(map(scores, members))
    np.testing.assert_allclose(scores(rotated), expected, atol=1e-2 * np.abs(expected).max())


def test_a_model_that_scores_all_items_alike_can_be_summed() -> None:
    first = vectors(20, 30, 4)
    flat = Vectors(np.zeros((20, 2), np.float32), np.zeros((30, 2), np.float32))
    joined = projection([first, flat], [1, 1 / flat.spread])([first, flat])
    np.testing.assert_allclose(scores(joined), scores(first), atol=1e-5)
    # Such as iALS where no query has a history: its items have vectors.
    cold = flat._replace(candidates=vectors(20, 30, 2).candidates)
    assert cold.spread == flat.spread == 1
    rotated = projection([first, cold], [1, 1 / cold.spread], dim=4)([first, cold])
    np.testing.assert_allclose(scores(rotated), scores(first), atol=1e-3)


def test_the_spread_is_that_of_a_querys_scores() -> None:
    model = vectors(30, 40, 5)
    assert model.spread == pytest.approx(np.sqrt(scores(model).var(axis=1).mean()), rel=1e-5)


LOG = make_log({"device": "categorical"})


Members: TypeAlias = dict[str, tp.FittedTwoTower]


@pytest.fixture(scope="module")
def members(module_path: Path) -> dict[str, tp.FittedTwoTower]:
    """Models that read different lengths of the history, times and features; one has biases."""
    data = tp.TrainingSet.build(LOG, module_path, seed=0)
    plans = {
        "means": tp.TwoTower(dim=4, history_length=3, seed=1),
        "recent": tp.TwoTower(
            dim=6, history_length=2, history_pooling=["recency"], seed=2, candidate_bias=True
        ),
    }
    built = {name: untrained(plan, data.corpus, LOG) for name, plan in plans.items()}
    tower = built["recent"].network.candidate_tower
    tower._bias.embeddings.assign(RNG.normal(size=tower._bias.embeddings.shape))
    return built


QUERIES: list[dict[str, Any]] = [
    {
        "user_id": 101,
        "history": [10, 40],
        "history_timestamps": [1_700_000_000, 1_700_000_001],
        "request": {"device": "app", "timestamp": datetime.fromtimestamp(1_700_000_009, UTC)},
    },
    {"user_id": 7, "history": [20, 50, 80]},
    {"history": []},
    {"user_id": 103, "request": {"device": "web"}},
]


def member_scores(model: tp.FittedTwoTower) -> np.ndarray:
    return model.query_embeddings(QUERIES) @ model.network.embed_corpus().T


def test_the_scores_of_a_sum_are_the_weighted_sums_of_its_members(members: Members) -> None:
    weights = {"means": 1.0, "recent": 0.6}
    summed = tp.FittedSum.of(members, weights, QUERIES, dim=99)
    spread = {name: member_scores(model).std(axis=1) for name, model in members.items()}
    expected = sum(
        weights[name] / np.sqrt((spread[name] ** 2).mean()) * member_scores(model)
        for name, model in members.items()
    )
    ids, summed_scores = summed.retrieve(QUERIES, k=24)
    for query_scores, line, line_ids in zip(expected, summed_scores, ids, strict=True):
        best = np.argsort(-query_scores, kind="stable")
        assert line_ids.tolist() == summed.candidate_ids[best].tolist()
        np.testing.assert_allclose(line, query_scores[best], rtol=1e-3, atol=1e-4)


def test_a_sum_of_one_model_ranks_as_the_model(members: Members) -> None:
    alone = tp.FittedSum.of({"recent": members["recent"]}, {"recent": 1.0}, QUERIES)
    ids, _ = alone.retrieve(QUERIES, k=24)
    np.testing.assert_array_equal(ids, members["recent"].retrieve(QUERIES, k=24)[0])


@pytest.mark.nightly
def test_a_fresh_process_answers_by_a_sum(members: Members, tmp_path: Path) -> None:
    summed = tp.FittedSum.of(members, {"means": 1.0, "recent": 0.3}, QUERIES, dim=5)
    assert tp.export(summed, tmp_path / "sum", index=tp.Exact(), queries=QUERIES).is_dir()


@pytest.mark.parametrize("dim", [5, None])
@pytest.mark.usefixtures("few_signatures", "trusted_exports")
def test_an_exported_sum_answers_as_in_memory(
    members: Members, tmp_path: Path, dim: int | None
) -> None:
    summed = tp.FittedSum.of(members, {"means": 1.0, "recent": 0.3}, QUERIES, dim)
    folder = tp.export(summed, tmp_path / "sum", index=tp.Exact(), queries=QUERIES)
    model = tp.load(folder)
    expected = summed.retrieve(QUERIES, k=7)
    ids, exported_scores = model.retrieve(QUERIES, k=7)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_allclose(exported_scores, expected[1], rtol=1e-4, atol=1e-5)
    assert model.manifest["has_item_bias"]
    # A new item gets a vector from its features, by the towers of all members.
    vector, is_trained = model.embed_candidates([999], {"genre": ["war"]})
    known, _ = model.embed_candidates([10], {"genre": ["war"]})
    assert vector.shape == known.shape
    assert not is_trained.any()
    assert not np.allclose(vector, known)


def test_models_of_another_log_are_refused(members: Members, tmp_path: Path) -> None:
    other = tp.TwoTower(dim=2)
    log = tp.Log.from_ibis(LOG.events.filter(LOG.events["item_id"] > 100))
    data = tp.TrainingSet.build(log, tmp_path / "samples", seed=0)
    with pytest.raises(ValueError, match=r"the same items: fit other to the log of means.*24"):
        tp.FittedSum.of({**members, "other": untrained(other, data.corpus)}, {}, QUERIES)


# Choosing the weights.
NUM_QUERIES = 600


def chosen(
    members: Mapping[str, Vectors], winner: str, num_queries: int = NUM_QUERIES, **options: Any
) -> Choice:
    """Chooses among members where the relevant item of query i is item i % 50."""
    counts, nothing = np.ones(50, np.int64), [np.zeros(0, np.int64)] * num_queries
    holdout = tp.Holdout(
        user_ids=np.arange(num_queries),
        histories=nothing,
        clicked=nothing,
        seen=nothing,
        relevant=[np.array([i % 50]) for i in range(num_queries)],
        candidate_ids=np.arange(50),
        candidate_counts=counts,
    )
    truth = Truth.of(holdout, "none")
    return choose(
        members,
        truth,
        tp.metric_of(options.get("metric", "ndcg@10")),
        winner=winner,
        max_members=options.get("max_members", 5),
    )


def guess(seed: int, noise: float, num_queries: int = NUM_QUERIES) -> Vectors:
    """Makes a model that ranks the relevant item high, apart from noise that no other one has."""
    rng = np.random.default_rng(seed)
    truth = np.eye(50)[np.arange(num_queries) % 50]
    noisy = truth + noise * rng.normal(size=truth.shape)
    # Any matrix of scores is a product of embeddings: its rows, and the unit vectors.
    return Vectors(noisy.astype(np.float32), np.eye(50, dtype=np.float32))


def test_models_that_err_independently_are_summed() -> None:
    members = {"a": guess(1, 0.6), "b": guess(2, 0.6), "noise": guess(3, 50.0)}
    choice = chosen(members, winner="a")
    assert list(choice.weights) == ["a", "b"]
    assert choice.weights["b"] in WEIGHTS
    assert choice.summed > choice.alone
    assert choice.difference["low"] is not None
    assert choice.difference["low"] > 0
    assert choice.lines()[0].startswith(
        f"the sum 1 a + {choice.weights['b']:g} b: validation ndcg@10"
    )


def test_a_model_is_not_summed_with_noise() -> None:
    choice = chosen({"a": guess(1, 0.3), "noise": guess(3, 50.0)}, winner="a")
    assert choice.weights == {"a": 1.0}
    assert choice.lines() == ["a alone: no sum with another model is better on validation"]


def test_few_queries_choose_no_weight() -> None:
    num = MIN_QUERIES - 1
    choice = chosen({"a": guess(1, 0.6, num), "b": guess(2, 0.6, num)}, "a", num)
    assert choice.weights == {"a": 1.0, "b": 1.0}


def test_a_sum_has_at_most_so_many_members() -> None:
    members = {str(seed): guess(seed, 0.6) for seed in range(4)}
    assert len(chosen(members, winner="0").weights) > 2
    assert len(chosen(members, winner="0", max_members=2).weights) == 2


def test_a_sum_is_chosen_at_the_dimensions_that_it_is_served_with() -> None:
    members = {str(seed): guess(seed, 0.6) for seed in range(3)}
    left, values, right = np.linalg.svd(members["0"].queries, full_matrices=False)
    members["0"] = Vectors(left[:, :5] * values[:5], right[:5].T)  # The winner has 5 dimensions.
    choice = chosen(members, winner="0")
    assert len(choice.weights) > 1
    served = projection(
        [members[name] for name in choice.weights],
        [weight / members[name].spread for name, weight in choice.weights.items()],
        5,
    )([members[name] for name in choice.weights])
    assert served.candidates.shape == (50, 5)
    # A relevant item of query i is i % 50: the DCG of its rank, as in `chosen`.
    scores = served.queries @ served.candidates.T
    own = scores[np.arange(len(scores)), np.arange(len(scores)) % 50]
    ranks = (scores > own[:, np.newaxis]).sum(axis=1)
    gains = np.where(ranks < 10, 1 / np.log2(ranks + 2.0), 0)
    assert choice.summed == pytest.approx(gains.mean())


def ruined_from(num_members: int) -> Callable[..., Projection]:
    """Makes a projection whose rotation keeps nothing of so many members or more."""

    def project(members: Any, weights: Any, dim: int | None = None) -> Projection:
        joined = projection(members, weights)
        is_kept = dim is None or len(members) < num_members
        nothing = [(0 * queries, candidates) for queries, candidates in joined.matrices]
        return joined if is_kept else joined._replace(matrices=nothing)

    return project


def test_a_member_that_the_rotation_cannot_hold_leaves_the_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rotation of two models keeps all, and that of three nothing."""
    members = {str(seed): guess(seed, 0.6) for seed in range(3)}
    assert len(chosen(members, winner="0").weights) == 3
    monkeypatch.setattr(sums, "projection", ruined_from(3))
    choice = chosen(members, winner="0")
    assert len(choice.weights) == 2
    assert choice.summed > choice.alone


def test_a_sum_that_its_rotation_ruins_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotation keeps nothing of what the members know; a model alone is not rotated."""
    members = {"a": guess(1, 0.6), "b": guess(2, 0.6)}
    assert len(chosen(members, winner="a").weights) == 2
    monkeypatch.setattr(sums, "projection", ruined_from(2))
    choice = chosen(members, winner="a")
    assert choice.summed == choice.alone
    assert choice.weights == {"a": 1.0}


def test_the_vectors_of_a_sum_are_measured_as_it_ranks(members: Members) -> None:
    model = tp.FittedSum.of(members, {"means": 1.0, "recent": 0.5}, QUERIES, dim=6)
    assert model.query_embeddings([{}]).shape == (1, 6)
    test = LOG.split("last_n", validation=1, test=1).test
    metric, truth = tp.metric_of("recall@5"), Truth.of(test, "clicked")
    vectors = model.query_embeddings(truth.queries), model.corpus_embeddings()
    by_hand = measure_vectors(*vectors, truth, metric)
    measured = tp.evaluate(model, test, metrics=[metric]).first
    np.testing.assert_array_equal(by_hand, measured.per_query["recall@5"])


def test_a_sum_has_a_bonus_of_its_own(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    _, validation, _ = LOG.split("last_n", validation=1, test=1)
    bonus = HistoryBonus(RepeatBonus(3.0, 0.5, 0.0))
    monkeypatch.setattr(
        fitted_model, "bonus_for", lambda *arguments: bonus if arguments[3] == "none" else None
    )
    summed = tp.FittedSum.of(members, {"means": 1.0, "recent": 0.6}, QUERIES)
    model = summed.with_bonus(validation, "none", seed=0)
    assert model.bonus == bonus
    exported = model.exportable().bonus
    assert exported is not None
    assert exported.repeats == bonus.repeats
    assert summed.with_bonus(validation, "clicked", seed=0).bonus is None
    own = model.retrieve([{"history": [10]}], k=1)[0]
    assert own.tolist() == [[10]]


def test_a_metric_of_all_lists_together_chooses_without_an_interval() -> None:
    members = {"a": guess(1, 0.6, 4), "b": guess(2, 0.6, 4)}
    choice = chosen(members, "a", 4, metric="coverage@5")
    assert choice.difference["low"] is None
    lists = np.argsort(-scores(members["a"]), axis=1)[:, :5]
    assert choice.alone == pytest.approx(len(np.unique(lists)) / 50)
    # A file of JSON has no NaN.
    record = json.loads(json.dumps(dataclasses.asdict(choice), allow_nan=False))
    assert Choice(**record) == choice
