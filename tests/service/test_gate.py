"""The version in service is asked as in service, even if a run's data differs from its own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import tfrs_pipeline as tp
from tests.model.conftest import eagerly
from tests.service.conftest import Exported
from tfrs_pipeline.durable import write_record
from tfrs_pipeline.run.gate import IN_SERVICE, version_in_service, worse_than_version

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")


@pytest.mark.parametrize(
    ("kind", "first", "others"), [("str", "film-é-0", [1, 2]), ("int", 3, ["3", "10"])]
)
def test_ids_of_another_type(exported: Exported, kind: str, first: Any, others: list[Any]) -> None:
    ids = np.array(others, np.int64 if kind == "str" else object)
    with pytest.raises(ValueError, match="has none of the 2 items of this run") as error:
        version_in_service(exported(kind, "exact"), ids)
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
    served = version_in_service(tmp_path / "m", now.listed_ids, log=now)
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
    """They are given as in requests, whatever their type; without the log they are missing."""
    log = log_of([0, 1, 2], "numeric")
    tp.export(model, tmp_path / "m", index=tp.Exact(), user_data=user_data)
    queries: list[tp.Query] = [{"user_id": user, "history": [1, 2]} for user in (7, 3, 9, 0, 2)]
    expected_ids, expected = model.retrieve(queries, 10)
    served = version_in_service(tmp_path / "m", log.listed_ids, log=log)
    assert served is not None
    ids, scores = served.retrieve(queries, 10)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert ids.tolist() == expected_ids.tolist()
    alone = version_in_service(tmp_path / "m", log.listed_ids)
    assert alone is not None
    assert np.allclose(alone.retrieve(queries, 10)[1], expected, atol=1e-5) == user_data
