"""A run by several workers: if one is killed, the others say so and stop, and all can resume."""

import time
from pathlib import Path

import numpy as np
import pytest

from tests.model.test_distribution import outputs, started
from tests.small_log import event_table, small_config, write
from tfrs_pipeline.config import dump_config, with_settings
from tfrs_pipeline.durable import read_record
from tfrs_pipeline.run.pipeline import run

NUM_EPOCHS = 8  # With fewer, the run may end before the kill.
WAIT_S = 600


def wait_for(path: Path) -> None:
    end = time.monotonic() + WAIT_S
    while not path.exists():
        assert time.monotonic() < end, f"{path} was not written"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("trusted_exports")
def test_a_killed_worker_stops_the_others_and_all_go_on(tmp_path: Path) -> None:
    data = {"path": write(event_table("int"), tmp_path / "events.parquet")}
    training = {"max_epochs": NUM_EPOCHS, "patience": NUM_EPOCHS, "optimizer": "adagrad"}
    training["refit"] = False
    config = small_config(tmp_path, data, training=training)
    settings = tmp_path / "settings.toml"
    settings.write_text(dump_config(config))
    together = tmp_path / "together"
    command = ("tfrs_pipeline.cli", "run", "--config", str(settings), "--run-dir", str(together))

    with started(2, *command) as workers:
        wait_for(together / "checkpoints" / "two_tower" / "selection" / "epoch-1.json")
        workers[1].kill()
        printed = outputs(workers)
    assert workers[0].returncode == 1
    assert "Another of the 2 workers does not answer" in printed[0]
    assert "Start all workers again with the same command" in printed[0]
    assert not (together / "metrics.json").exists()

    with started(2, *command) as workers:
        printed = outputs(workers)
    assert [worker.returncode for worker in workers] == [0, 0], printed
    assert "run folder" in printed[0]
    # Only the chief exports a version; the numbers are those of a run by one process.
    assert [path.name for path in (tmp_path / "saved_models" / "films").iterdir()] == ["1"]
    metrics = read_record(together / "metrics.json")
    config = small_config(tmp_path / "alone", data, training=training)
    alone = run(config, tmp_path / "alone" / "run").metrics
    losses = (x["training"]["two_tower"]["history"]["loss"] for x in (metrics, alone))
    np.testing.assert_allclose(next(losses), next(losses), rtol=1e-4)


@pytest.mark.nightly
@pytest.mark.usefixtures("trusted_exports")
def test_workers_race_together(tmp_path: Path) -> None:
    data = {"path": write(event_table("int"), tmp_path / "events.parquet")}
    given = {"model.negatives": ["uniform:num=32"], "training.optimizer": "adagrad"}
    asked = {"recipes": ["default", "quick"], "fixed": [*given, "model.dim", "training.max_epochs"]}
    config = with_settings(small_config(tmp_path, data), {**given, **asked})
    (tmp_path / "settings.toml").write_text(dump_config(config))
    together = tmp_path / "together"
    flags = ("--config", str(tmp_path / "settings.toml"), "--run-dir", str(together))
    with started(2, "tfrs_pipeline.cli", "run", *flags) as workers:
        printed = outputs(workers)
    assert [worker.returncode for worker in workers] == [0, 0], printed
    race = read_record(together / "metrics.json")["race"]
    alone = run(with_settings(config, {"export.index": "none"}), tmp_path / "alone")
    for name, curve in alone.metrics["race"]["recipes"].items():
        np.testing.assert_allclose(race["recipes"][name]["values"], curve["values"], rtol=0.02)
    assert f"{race['winner']} won" in printed[0]
    # Only the chief measures the baselines.
    assert ["\nbaselines " in text for text in printed] == [True, False]
