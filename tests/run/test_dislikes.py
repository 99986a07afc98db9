"""A log with reports goes through a run, the service and back into a log."""

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tests.service.running_server import PREDICT, Running, retrieve_user, send
from tests.small_log import Watched, small_config, write
from tfrs_pipeline import Log, Reading
from tfrs_pipeline.answers.publish import MANIFEST_FILE
from tfrs_pipeline.answers.retriever import load
from tfrs_pipeline.durable import read_record
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.pipeline import run
from tfrs_pipeline.run.training import split_in, trained_in

pytestmark = pytest.mark.usefixtures("quick_runs")
NUM_USERS, NUM_ITEMS = 60, 40


def reported_log() -> pd.DataFrame:
    """Makes a log in which users report items that they were shown, or clicked before or later."""
    rng = np.random.default_rng(3)
    num = 30 * NUM_USERS
    frame = pd.DataFrame({"user_id": 1 + rng.integers(0, NUM_USERS, num)})
    # Users like the items that are near them.
    frame["item_id"] = (frame["user_id"] + rng.integers(0, 15, num)) % NUM_ITEMS
    frame["event"] = rng.choice(["click", "view", "report"], num, p=[0.6, 0.3, 0.1])
    return frame.assign(timestamp=1_700_000_000 + 3600 * np.arange(num))


def test_a_reported_item_never_comes_back(tmp_path: Path, command: Any) -> None:
    frame = reported_log()
    path = write(pa.Table.from_pandas(frame, preserve_index=False), tmp_path / "events.csv")
    weights = {"click": 1, "view": "exposed", "report": "disliked"}
    config = small_config(
        tmp_path,
        {"path": path, "event_weights": weights},
        split={"kind": "time"},
        # Even where rankings exclude nothing else, and there may be a repeat bonus.
        evaluation={"exclude": "none", "cutoffs": [5, 20], "baselines": ["repeats"]},
        training={"max_epochs": 1, "refit": False},
        export={"index": "exact"},
    )
    result = run(config, tmp_path / "run", progress=(watched := Watched()))
    split, model = split_in(RunFolder(result.folder)), trained_in(result.folder)
    assert model is not None

    # Counted and told.
    gone: dict[int, set[int]] = defaultdict(set)
    for user, item in frame[frame["event"] == "report"][["user_id", "item_id"]].to_numpy():
        gone[user].add(item)
    pairs = {
        (part, stage): [*zip(rows["user_id"], rows["item_id"], strict=True)]
        for (part, stage), rows in split.events.to_pandas().groupby(["part", "stage"])
    }
    reported, clicks = {*pairs["train", "disliked"]}, pairs["train", "clicked"]
    num_lost = sum(pair in reported for pair in clicks)
    assert result.export_folder is not None
    samples = read_record(result.export_folder / MANIFEST_FILE)["counts"]
    assert samples["num_disliked"] == len(reported) > 50
    assert samples["num_disliked_clicks"] == num_lost > 20
    assert samples["num_samples"] == len(clicks) - num_lost
    told = "\n".join(watched.reports["data"].notes)
    assert f"report {(frame['event'] == 'report').sum()} (disliked)" in told
    assert f"{sum(map(len, gone.values()))} pairs of a user and an item that the user disl" in told
    notes = "\n".join(result.metrics["notes"]["samples"])
    assert f"{len(reported)} items of a user, never shown to them again; {num_lost} clicks" in notes

    # In memory: what was reported before the test is excluded, and nothing to find is reported.
    test = split.test
    excluded = test.excluded("none")
    reported |= {*pairs["validation", "disliked"]}
    assert excluded is not None
    ids, _ = model.retrieve(test.as_queries(), NUM_ITEMS, excluded)
    for user, relevant, not_shown, answer in zip(
        test.user_ids.tolist(), test.relevant, excluded, ids.tolist(), strict=True
    ):
        assert {*not_shown.tolist()} == {item for owner, item in reported if owner == user}
        assert not {*relevant.tolist()} & gone[user]
        assert not {*answer} & {*not_shown.tolist()}

    # In service, also what was reported in the test part.
    loaded = load(config.model_folder)
    users = [*range(1, NUM_USERS + 1)]
    ids, _, _ = loaded.retrieve_user(users, NUM_ITEMS)
    for user, answer in zip(users, ids.tolist(), strict=True):
        assert {*answer}.isdisjoint(gone[user])
        assert {*loaded.users.history(user)}.isdisjoint(gone[user])
        assert {*loaded.users.disliked([user])[0]} == gone[user]
    with Running(config.model_folder, takes_writes=True, record_share=1) as server:
        first = server.predict(**retrieve_user([7], [[]], NUM_ITEMS))["outputs"]["candidate_ids"]
        new, clicked, *_ = first[0]
        assert {*first[0]}.isdisjoint(gone[7])
        done = (new, "click", 1), (new, "dislike", 2), (clicked, "click", 3)
        now = time.time()
        events = [
            {"user_id": 7, "item_id": item, "type": kind, "time": now + second}
            for item, kind, second in done
        ]
        assert send(server, {"events": events}).is_success
        request = retrieve_user([7], [[]], NUM_ITEMS)
        (answer,) = server.post(PREDICT, json=request).json()["outputs"]["candidate_ids"]
        assert {*answer}.isdisjoint({*gone[7], new})

    # The log of the service says so in the words of the model's own log.
    assert command("log", config.model_folder, "--out", tmp_path / "log.parquet").code == 0
    reading = Reading(event_weights=weights)
    log = Log.from_files(tmp_path / "log.parquet", reading=reading)
    assert log.disliked is not None
    assert log.disliked.to_pyarrow().to_pylist() == [{"user_id": 7, "item_id": new}]
    assert "1 pair of a user and an item that the user disliked" in str(log.describe())
    assert log.positives()["item_id"].to_pyarrow().to_pylist() == [clicked]
