"""A tiny log that a two-tower model can learn: three tastes of users and items."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from tfrs_pipeline import FunnelLosers, InBatch, Log, Split, TrainingSettings, TwoTower, Uniform
from tfrs_pipeline.model.checkpoints import TrainingResult
from tfrs_pipeline.model.corpus import Corpus, TrainingSet
from tfrs_pipeline.model.fitted_model import FittedTwoTower, query_encoder
from tfrs_pipeline.model.network import TwoTowerNetwork

# Two devices, so that a test can train on several.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

# The id of row r is 10 * r for items, 100 + r for users.
NUM_USERS, NUM_ITEMS, NUM_TASTES = 30, 24, 3
LENGTH = 3
REQUEST_FEATURES: Mapping[str, str] = {"device": "categorical", "hour": "numeric"}
LOSERS = FunnelLosers(share=0.3, num=2, stages=("pre_ranked",))


def make_log(request_features: Mapping[str, str] | None = None) -> Log:
    """Returns a log: each user clicks 6 items of one taste; of another, 2 are shown and 3 lose.

    Odd item numbers come with device "app", even ones with "web"; every seventh device is missing.
    """
    rng = np.random.default_rng(0)
    rows = []
    for user in range(NUM_USERS):
        own = 1 + rng.permutation(np.arange(user % NUM_TASTES, NUM_ITEMS, NUM_TASTES))
        others = 1 + rng.permutation(np.arange((user + 1) % NUM_TASTES, NUM_ITEMS, NUM_TASTES))
        for time, item in enumerate(own[:6]):
            rows.append((101 + user, 10 * item, time, "clicked"))
        rows += [(101 + user, 10 * item, 1, "exposed") for item in others[:2]]
        rows += [(101 + user, 10 * item, 1, "pre_ranked") for item in others[2:5]]
    events = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "stage"])
    events["timestamp"] = pd.to_datetime(1_700_000_000 + events["timestamp"], unit="s", utc=True)
    devices = np.array(["web", "app"])[events["item_id"] // 10 % 2]
    events["device"] = [None if i % 7 == 0 else device for i, device in enumerate(devices)]
    items = pd.DataFrame({"item_id": 10 * np.arange(1, NUM_ITEMS + 1)})
    items["genre"] = np.resize(["drama", "comedy", "war"], NUM_ITEMS)
    features: dict[str, Any] = {"request_features": request_features}
    return Log.from_table(events, items=items, item_features={"genre": "categorical"}, **features)


@pytest.fixture(scope="session")
def log() -> Log:
    return make_log()


@pytest.fixture(scope="session")
def split(log: Log) -> Split:
    return log.split("last_n", validation=1, test=1)


@pytest.fixture(scope="session")
def data(split: Split, tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    """120 samples: the first four clicks of each user."""
    return TrainingSet.build(split.train, tmp_path_factory.mktemp("samples"), seed=0, hard=LOSERS)


@pytest.fixture(scope="session")
def requested_split() -> Split:
    return make_log(REQUEST_FEATURES).split("last_n", validation=1, test=1)


@pytest.fixture(scope="session")
def requested(requested_split: Split, tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    folder = tmp_path_factory.mktemp("requested")
    return TrainingSet.build(requested_split.train, folder, seed=0, hard=LOSERS)


def tiny(**changes: Any) -> TwoTower:
    """Returns a model for the tiny log; `training` is a dict of the settings that differ."""
    training = {"batch_size": 32, "monitor": "ndcg@5", "learning_rate": 0.02}
    training |= changes.pop("training", {})
    model = {"dim": 8, "history_length": LENGTH, "negatives": [InBatch(), Uniform(16)]}
    return TwoTower(training=TrainingSettings(**training), **model | changes)


def scores_of(network: TwoTowerNetwork) -> np.ndarray:
    """Returns the scores of all items for three users with the same history."""
    queries = network.embed_queries(tf.constant([1, 2, 0]), tf.constant([[3, 4, 0]] * 3))
    return queries.numpy() @ network.embed_corpus().T


def weights_of(network: TwoTowerNetwork) -> list[np.ndarray]:
    return [weight.copy() for weight in network.get_weights()]


def assert_same(weights: list[np.ndarray], others: list[np.ndarray]) -> None:
    for a, b in zip(weights, others, strict=True):
        np.testing.assert_array_equal(a, b)


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Runs steps without a graph: a few steps take less time than tracing one."""
    tf.config.run_functions_eagerly(True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Even though the `tf.config", UserWarning)
        try:
            yield
        finally:
            tf.config.run_functions_eagerly(False)


@pytest.fixture
def in_eager_steps() -> Iterator[None]:
    with eagerly():
        yield


def untrained(plan: TwoTower, corpus: Corpus, log: Any = None) -> FittedTwoTower:
    """Returns a fitted model that has not trained a single step; an export needs a log."""
    network = plan.build(corpus)
    encoder = query_encoder(network, corpus)
    result = TrainingResult({}, 0, 0.0)
    return FittedTwoTower(plan.settings, plan.training, corpus, network, encoder, result, log)
