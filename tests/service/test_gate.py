"""The version in service is asked as in service, even if a run's data differs from its own."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import tfrs_pipeline as tp
from tests.model.conftest import eagerly
from tests.search.test_item_graph import weights_by_hand
from tests.service.conftest import Exported
from tfrs_pipeline.durable import write_record
from tfrs_pipeline.run.gate import IN_SERVICE, version_in_service, worse_than_version
from tfrs_pipeline.search.history_bonus import HistoryBonus, NeighbourBonus, RepeatBonus
from tfrs_pipeline.search.item_graph import KINDS

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")


@pytest.mark.parametrize(
    ("kind", "first", "others"), [("str", "film-é-0", [1, 2]), ("int", 3, ["3", "10"])]
)
def test_ids_of_another_type(exported: Exported, kind: str, first: Any, others: list[Any]) -> None:
    ids = np.array(others, np.int64 if kind == "str" else object)
    with pytest.raises(ValueError, match="has none of the 2 items of this run") as error:
        version_in_service(exported(kind, "exact"), ids, whole(log_of([0, 1, 2], "numeric")))
    assert f"its ids are like {first!r}, these like {others[0]!r}" in str(error.value)


@pytest.mark.parametrize("gain", [0.5, 0.0, -0.5])
def test_one_query_cannot_pass_the_gate(gain: float, tmp_path: Path) -> None:
    (tmp_path / "3").mkdir()
    write_record(tmp_path / "3" / "manifest.json", {"exclude": "clicked"})
    interval = tp.Interval(gain, np.nan, np.nan)
    first = SimpleNamespace(
        overall=SimpleNamespace(intervals={"ndcg@9": interval}),
        user_ids=np.array([1]),
        exclude="clicked",
    )
    evaluation: Any = SimpleNamespace(
        first=first,
        asked_by="requests",
        results={IN_SERVICE: first},
        differences={IN_SERVICE: {"ndcg@9": interval}},
    )
    is_worse, text = worse_than_version(evaluation, "ndcg@9", tmp_path)
    assert (is_worse, text.partition(".")[0]) == (
        True,
        "One test query cannot tell which model is better",
    )
    # The version in service offers clicked items again, and the new one would not.
    write_record(tmp_path / "3" / "manifest.json", {"exclude": "none"})
    _, other = worse_than_version(evaluation, "ndcg@9", tmp_path)
    told = ", both with evaluation.exclude clicked; that version has none."
    assert (told in text, other) == (False, text.removesuffix(".") + told)


def log_of(slots: Any, kind: str) -> tp.Log:
    """Makes a log with features of users and of requests; the request's slot has a given kind."""
    users = pd.DataFrame({"user_id": range(8), "seg": [*"aabb"] * 2, "age": [*range(7), None]})
    users["tags"] = [[tag] * (tag != "b") for tag in users["seg"]]
    of_users: Any = {"seg": "categorical", "age": "numeric", "tags": "multi_categorical"}
    clicks = pd.DataFrame({"user_id": np.arange(40) % 10, "item_id": np.arange(40) // 4})
    clicks["slot"], clicks["words"] = np.array(slots)[np.arange(40) % 3], [["x"], ["y", "z"]] * 20
    asked: Any = {"slot": kind, "words": "multi_categorical"}
    return tp.Log.from_table(clicks, users=users, user_features=of_users, request_features=asked)


def whole(log: tp.Log) -> Any:
    """Makes a split whose test does not matter."""
    return SimpleNamespace(log=log, before_test=log)


@pytest.fixture(scope="module")
def model() -> tp.FittedTwoTower:
    training = tp.TrainingSettings(batch_size=8, max_epochs=2, learning_rate=0.1)
    plan = tp.TwoTower(dim=4, negatives=["uniform:num=8"], training=training)
    with eagerly():
        return plan.fit(log_of([0, 1, 2], "numeric"))


@pytest.mark.nightly
def test_a_request_feature_of_another_kind_by_now_says_nothing(
    model: tp.FittedTwoTower, tmp_path: Path
) -> None:
    held_out: list[Any] = [{"history": [1], "request": {"words": x}} for x in ("x", ["x", "y"])]
    tp.export(model, tmp_path / "m", index=tp.Exact(), queries=held_out)
    now = log_of(["night", "noon", "day"], "categorical")
    served = version_in_service(tmp_path / "m", now.listed_ids, whole(now))
    assert served is not None
    for words in ({}, {"words": "x"}):
        asked: list[Any] = [{"history": [1], "request": {**words, "slot": "night"}}]
        expected = model.retrieve([{"history": [1], "request": {**words, "slot": None}}], 5)
        found = served.retrieve(asked, 5)
        assert found[0].tolist() == expected[0].tolist()
        np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


@pytest.mark.parametrize("user_data", [pytest.param(True, marks=pytest.mark.nightly), False])
def test_users_have_their_features_in_a_version_without_user_data(
    model: tp.FittedTwoTower, user_data: bool, tmp_path: Path
) -> None:
    """Features are read from the log, as in requests, whatever their type."""
    log = log_of([0, 1, 2], "numeric")
    tp.export(model, tmp_path / "m", index=tp.Exact(), user_data=user_data)
    queries: list[tp.Query] = [{"user_id": user, "history": [1, 2]} for user in (7, 3, 9, 0, 2)]
    expected_ids, expected = model.retrieve(queries, 10)
    served = version_in_service(tmp_path / "m", log.listed_ids, whole(log))
    assert served is not None
    ids, scores = served.retrieve(queries, 10)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert ids.tolist() == expected_ids.tolist()
    lacking = dataclasses.replace(log, user_features={})
    alone = version_in_service(tmp_path / "m", log.listed_ids, whole(lacking))
    assert alone is not None
    assert np.allclose(alone.retrieve(queries, 10)[1], expected, atol=1e-5) == user_data


NUM_CLICKS, NUM_ITEMS = 8, 12


@pytest.fixture(scope="module")
def clicks() -> np.ndarray:
    """The items that each of ten users clicked, in order: [10, NUM_CLICKS]."""
    return np.random.default_rng(5).integers(0, NUM_ITEMS, (10, NUM_CLICKS))


@pytest.fixture(scope="module")
def ordered(clicks: np.ndarray) -> tp.Log:
    users = np.repeat(np.arange(len(clicks)), NUM_CLICKS)
    events = pd.DataFrame({"user_id": users, "item_id": clicks.ravel()})
    events["timestamp"] = pd.to_datetime(10**9 + 60 * np.arange(clicks.size), unit="s", utc=True)
    return tp.Log.from_table(events)


@pytest.fixture(scope="module")
def of_whole_log(ordered: tp.Log) -> tp.FittedTwoTower:
    training = tp.TrainingSettings(batch_size=8, max_epochs=1, history_bonus=False)
    with eagerly():
        return tp.TwoTower(dim=4, training=training).fit(ordered)


def scores_of(retriever: Any, history: list[int]) -> np.ndarray:
    """Returns the scores of all items, by id."""
    (ids,), (scores,) = retriever.retrieve([{"history": history}], NUM_ITEMS)
    assert sorted(ids.tolist()) == [*range(NUM_ITEMS)]
    return scores[np.argsort(ids)]


@pytest.mark.parametrize("kind", [*KINDS])
def test_the_graph_of_the_version_in_service_does_not_know_the_test(
    clicks: np.ndarray,
    ordered: tp.Log,
    of_whole_log: tp.FittedTwoTower,
    kind: str,
    tmp_path: Path,
) -> None:
    """A version of this very log has the test in its graph, and would repeat it."""
    bonus = HistoryBonus(RepeatBonus(2.0, 0.5, 0.0), NeighbourBonus(kind, 30.0, 0.5))
    served = dataclasses.replace(of_whole_log.exportable(), bonus=bonus)
    tp.export(served, tmp_path / "m", index=tp.Exact())
    split = ordered.split("last_n", validation=1, test=1)
    version = version_in_service(tmp_path / "m", ordered.listed_ids, split)
    own = tp.load(tmp_path / "m")
    rows = 1 + clicks[:, ::-1]  # Most recent first.
    before, whole = (weights_by_hand(part.tolist(), kind) for part in (rows[:, 1:], rows))
    assert before != whole
    for line in clicks.tolist():
        history = line[:-1]
        dots = scores_of(of_whole_log, history)
        for retriever, weights in ((version, before), (own, whole)):
            expected = dots.copy()
            for item in history:
                expected[item] = dots[item] + 2.0 * history.count(item) ** 0.5
            for age, item in enumerate(reversed(history)):
                for row, weight in weights.get(item + 1, {}).items():
                    expected[row - 1] += 30.0 * 0.5**age * weight
            np.testing.assert_allclose(scores_of(retriever, history), expected, rtol=1e-4)


def test_a_version_that_only_repeats_is_measured_with_its_bonus(
    ordered: tp.Log, of_whole_log: tp.FittedTwoTower, tmp_path: Path
) -> None:
    repeats = HistoryBonus(RepeatBonus(5.0, 0.5, 0.5))
    served = dataclasses.replace(of_whole_log.exportable(), bonus=repeats)
    tp.export(served, tmp_path / "m", index=tp.Exact())
    split = ordered.split("last_n", validation=1, test=1)
    version = version_in_service(tmp_path / "m", ordered.listed_ids, split)
    expected = scores_of(of_whole_log, [3, 7, 3])
    expected[3] += 5.0 * (1 + 3**-0.5) ** 0.5
    expected[7] += 5.0 * (2**-0.5) ** 0.5
    np.testing.assert_allclose(scores_of(version, [3, 7, 3]), expected, rtol=1e-4)
