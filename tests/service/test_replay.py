"""What an evaluation by request measures is what the server gives, to the last digit."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import tfrs_pipeline as tp
from tests.model.conftest import eagerly
from tests.scripts import script
from tests.service.running_server import Running, send
from tfrs_pipeline.model.fitted_model import excluding

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")
replaying = script(Path(__file__).parents[2] / "benchmarks" / "replay.py")
START = datetime(2026, 3, 1, 7, 59, 30, tzinfo=UTC)
NUM_USERS, NUM_ITEMS, NUM_EVENTS, K = 12, 40, 60, 20


def events(*, has_requests: bool, dislikes: float = 0.0) -> pa.Table:
    """Makes a log in which times are whole seconds, often equal; or requests, which overlap."""
    rng, rows = np.random.default_rng(0), list[dict[str, Any]]()
    # Users that the training does not know come last.
    for user in range(NUM_USERS):
        first = 3000 if user >= NUM_USERS - 3 else 0
        request, start = 0, float(first)
        for item in rng.integers(NUM_ITEMS, size=NUM_EVENTS).tolist():
            if rng.random() < 0.4:
                request, start = request + 1, start + float(rng.exponential(120))
            row: dict[str, Any] = {"user_id": f"user {user}", "item_id": f"film {item}"}
            row["stage"] = "clicked" if rng.random() < 0.6 else "exposed"
            if dislikes and rng.random() < dislikes:
                row["stage"] = "disliked"
            # A click comes up to minutes after the request, perhaps after the next one.
            after = rng.exponential(60) if has_requests else 0
            seconds = start + after if has_requests else round(start)
            row["timestamp"] = START + timedelta(seconds=seconds)
            if has_requests:
                row |= {"request_id": f"{user}/{request}", "device": "tv" if request % 3 else "pc"}
            rows.append(row)
    # The server takes the same event of the same millisecond for a repeat.
    rows = [*{(row["user_id"], row["item_id"], row["timestamp"]): row for row in rows}.values()]
    order = sorted(range(len(rows)), key=lambda line: rows[line]["timestamp"])
    return pa.Table.from_pylist([rows[line] for line in order])


@pytest.mark.parametrize(
    "kind", ["ties are left out", "ties in order", "requests and times", "seen"]
)
def test_the_server_gives_what_the_evaluation_measures(kind: str, tmp_path: Path) -> None:
    has_requests, changes = kind == "requests and times", dict[str, Any]()
    if has_requests:
        changes["history_pooling"] = ("attention",)
    log = tp.Log.from_table(
        events(has_requests=has_requests),
        request_features={"device": "categorical", "hour": "numeric"} if has_requests else {},
        reading=tp.Reading(ties="order" if kind == "ties in order" else "auto"),
    )
    split = log.split("time", validation=0, test=0.4)
    training = tp.TrainingSettings(max_epochs=2, batch_size=64, learning_rate=0.05)
    plan = tp.TwoTower(dim=8, history_length=8, training=training, **changes)
    with eagerly():
        model = plan.fit(split.before_test)
    test, num_told = split.holdout("test", by="requests"), 0
    exclude: Any = "seen" if kind == "seen" else "clicked"
    of_that_day = replaying.as_of_test(model)
    exported = excluding(of_that_day.exportable(), of_that_day.log, exclude)
    folder = tp.export(exported, tmp_path / "films", index=tp.Exact()).parent
    with Running(folder, takes_writes=True) as running:

        def ask(user: Any, request: Mapping[str, Any]) -> list[Any]:
            inputs = {"user_id": [user], "exclude": [[""]], "k": K}
            if has_requests:
                inputs |= {name: [request[name]] for name in ("device", "hour")}
                inputs["timestamp"] = [request["timestamp"].timestamp()]
            answer = running.predict(signature_name="retrieve_user", inputs=inputs)
            return answer["outputs"]["candidate_ids"][0]

        def tell(told: list[dict[str, Any]]) -> None:
            nonlocal num_told
            num_told += send(running, {"events": told}).json()["num_new"]

        asked, answers = replaying.replay(split, test, ask, tell)
    assert (
        num_told == split.events.filter(split.events["part"] == "test").count().to_pyarrow().as_py()
    )
    # A request that began before the test is not asked.
    assert 90 < len(asked) < len(test) if has_requests else len(asked) == len(test)
    compared = replaying.compare(model, asked, answers, K, exclude)
    assert set(compared["num_unequal"].values()) == {0}
    assert 0 < compared["means"][f"ndcg@{K}"][0] < 1


def test_service_leaves_out_what_the_test_leaves_out(tmp_path: Path) -> None:
    """Also what the log has shown, if the rule says so, and dislikes by each rule."""
    split = tp.Log.from_table(events(has_requests=False, dislikes=0.05)).split(
        "time", validation=0, test=0.4
    )
    with eagerly():
        plan = tp.TwoTower(dim=4, training=tp.TrainingSettings(max_epochs=1, batch_size=64))
        model = replaying.as_of_test(plan.fit(split.before_test))
    test, items = split.holdout("test"), {*model.candidate_ids.tolist()}
    sizes = []
    for rule in ("clicked", "seen", "none"):
        exported = excluding(model.exportable(), model.log, rule)
        loaded = tp.load(tp.export(exported, tmp_path / rule, index=tp.Exact()))
        ids, _, _ = loaded.retrieve_user(test.user_ids.tolist(), NUM_ITEMS)
        excluded = test.excluded(rule)
        assert excluded is not None
        for answer, not_shown in zip(ids.tolist(), excluded, strict=True):
            assert items - {*answer} == {*not_shown.tolist()} & items, rule
        sizes.append(sum(map(len, excluded)))
    clicked, seen, none = sizes
    assert seen > clicked > none > 0
