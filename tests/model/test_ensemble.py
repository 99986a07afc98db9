"""The sum of models: its scores are the weighted sum of the members' scores, in every form."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import tfrs_pipeline as tp
from tests.model.conftest import make_log, untrained
from tfrs_pipeline.evaluation.evaluate import Truth, measure_vectors
from tfrs_pipeline.model import fitted_model
from tfrs_pipeline.search.history_bonus import HistoryBonus, RepeatBonus

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
    tower._bias.embeddings.assign(
        np.random.default_rng(0).normal(size=tower._bias.embeddings.shape)
    )
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
        fitted_model, "bonus_for", lambda *arguments: bonus if arguments[2] == "none" else None
    )
    summed = tp.FittedSum.of(members, {"means": 1.0, "recent": 0.6}, QUERIES)
    model = summed.with_bonus(validation, "none", seed=0)
    assert model.bonus == bonus
    exported = model.exportable().bonus
    assert exported is not None
    assert exported.repeats == bonus.repeats
    assert summed.with_bonus(validation, "clicked", seed=0).bonus is None
    ids = model.retrieve([{"history": [10]}], k=1)[0]
    assert ids.tolist() == [[10]]
