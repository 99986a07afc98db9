"""Several replicas train the same weights as one, up to float32 rounding."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.model.conftest import tiny, weights_of
from tests.model.train_together import CASES, train
from tfrs_pipeline.cluster import Worker, this_worker
from tfrs_pipeline.model.corpus import TrainingSet

LIMIT_S = 600


def assert_close(weights: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> None:
    for a, b in zip(weights, others, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def devices() -> tf.distribute.Strategy:
    """Returns one strategy for the process: TensorFlow would mix up the collectives of two."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.mark.parametrize("case", ["hard", pytest.param("sequences", marks=pytest.mark.nightly)])
def test_two_devices_train_as_one(requested: TrainingSet, devices: Any, case: str) -> None:
    alone = tiny(**CASES[case]).fit_samples(requested, max_epochs=2)
    with devices.scope():
        together = tiny(**CASES[case]).fit_samples(requested, max_epochs=2)
    assert together.network.distribute_strategy is devices
    assert_close(weights_of(alone.network), weights_of(together.network))
    assert together.result.history["loss"] == pytest.approx(alone.result.history["loss"], rel=1e-4)
    assert_close([alone.network.embed_corpus()], [together.network.embed_corpus()])


def test_batches_that_were_cut_are_refused(requested: TrainingSet, devices: Any) -> None:
    with devices.scope():
        model = tiny()
        network = model.build(requested.corpus)
        network.compile(optimizer="sgd")
    dataset = model.batches(requested.samples).dataset(num_steps=1)
    with pytest.raises(ValueError, match=r"tf\.distribute has cut.*Train with TwoTower\.fit under"):
        network.fit(dataset, verbose=0)


@contextlib.contextmanager
def started(count: int, *arguments: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts the workers of one cluster on this machine; none outlives the block."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{x.getsockname()[1]}" for x in sockets]
    for x in sockets:
        x.close()
    with contextlib.ExitStack() as stack:
        processes = []
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        for i in range(count):
            config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}}
            env = {**os.environ, "TF_CONFIG": json.dumps(config), "TF_CPP_MIN_LOG_LEVEL": "3"}
            command = [sys.executable, "-m", *arguments]
            processes.append(subprocess.Popen(command, env=env, text=True, **pipes))
            stack.callback(processes[-1].kill)
        yield processes


def outputs(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    return [process.communicate(timeout=LIMIT_S)[0] for process in processes]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("count", "cases"), [(2, [x for x in CASES if x != "mixture"]), (3, ["mixture"])]
)
def test_workers_train_the_weights_of_one(count: int, cases: list[str], tmp_path: Path) -> None:
    folder = str(tmp_path / "together")
    with started(count, "tests.model.train_together", folder, *cases) as workers:
        printed = outputs(workers)
    assert [worker.returncode for worker in workers] == [0] * count, printed
    for case in cases:
        alone = train(case, tmp_path / "alone")
        with np.load(tmp_path / "together" / f"{case}.npz") as together:
            assert_close(weights_of(alone.network), [together[name] for name in together.files])


def test_tf_config_says_who_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = {"chief": ["a:1"], "worker": ["b:1", "c:1"]}

    def read(**config: object) -> Worker:
        monkeypatch.setenv("TF_CONFIG", json.dumps(config))
        return this_worker()

    assert read(cluster=cluster, task={"type": "worker", "index": 1}) == Worker(2, 3)
    assert read(cluster=cluster, task={"type": "chief", "index": "0"}).is_chief
    assert read() == Worker(0, 1)
    for task in ({"type": "worker", "index": 2}, {"type": "ps", "index": 0}, {}):
        with pytest.raises(ValueError, match="which of them this process is"):
            read(cluster=cluster, task=task)
    with pytest.raises(ValueError, match="which of them"):
        read(cluster={**cluster, "ps": ["d:1"]}, task={"type": "chief", "index": 0})
    monkeypatch.setenv("TF_CONFIG", "{")
    with pytest.raises(ValueError, match="Received: "):
        this_worker()
