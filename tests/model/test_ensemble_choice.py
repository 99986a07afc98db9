"""Which models are summed on validation, and with which weights."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

import tfrs_pipeline as tp
from tests.model.test_projection import scores
from tfrs_pipeline.evaluation.evaluate import Truth
from tfrs_pipeline.model import ensemble_choice
from tfrs_pipeline.model.ensemble_choice import MIN_QUERIES, WEIGHTS, Choice, choose
from tfrs_pipeline.model.projection import Projection, Vectors, projection

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
    table = served.queries @ served.candidates.T
    relevant_scores = table[np.arange(len(table)), np.arange(len(table)) % 50]
    ranks = (table > relevant_scores[:, np.newaxis]).sum(axis=1)
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
    monkeypatch.setattr(ensemble_choice, "projection", ruined_from(3))
    choice = chosen(members, winner="0")
    assert len(choice.weights) == 2
    assert choice.summed > choice.alone


def test_a_sum_that_its_rotation_ruins_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotation keeps nothing of what the members know; a model alone is not rotated."""
    members = {"a": guess(1, 0.6), "b": guess(2, 0.6)}
    assert len(chosen(members, winner="a").weights) == 2
    monkeypatch.setattr(ensemble_choice, "projection", ruined_from(2))
    choice = chosen(members, winner="a")
    assert choice.summed == choice.alone
    assert choice.weights == {"a": 1.0}


def test_a_metric_of_all_lists_together_chooses_without_an_interval() -> None:
    members = {"a": guess(1, 0.6, 4), "b": guess(2, 0.6, 4)}
    choice = chosen(members, "a", 4, metric="coverage@5")
    assert choice.difference["low"] is None
    lists = np.argsort(-scores(members["a"]), axis=1)[:, :5]
    assert choice.alone == pytest.approx(len(np.unique(lists)) / 50)
    # A file of JSON has no NaN.
    record = json.loads(json.dumps(dataclasses.asdict(choice), allow_nan=False))
    assert Choice(**record) == choice
