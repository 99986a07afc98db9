"""Times of events: what a model with attention learns from them, and which models ignore them."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from tests.model.conftest import assert_same, tiny, untrained, weights_of
from tfrs_pipeline import (
    Batch,
    ConfigError,
    Exact,
    Log,
    Split,
    TrainingSet,
    Uniform,
    evaluate,
    export,
    load,
)
from tfrs_pipeline.features.raw import relative_seconds
from tfrs_pipeline.model.fitted_model import FittedTwoTower
from tfrs_pipeline.model.warm_start import WarmStart

NUM_ITEMS = 12
HOUR, WEEK = timedelta(hours=1), timedelta(weeks=1)
ATTENTION: dict[str, Any] = {"history_pooling": ("attention",), "negatives": [Uniform(16)]}


def make_events(seed: int = 0) -> pd.DataFrame:
    """Items with even numbers are clicked within hours of the last click, odd ones after weeks."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(60):
        time = pd.Timestamp("2024-01-01", tz="UTC")
        for _ in range(7):
            is_late = rng.random() < 0.5
            time += (WEEK if is_late else HOUR) * rng.uniform(0.5, 2)
            rows.append((user, 2 * rng.integers(0, NUM_ITEMS // 2) + is_late, time))
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])


@pytest.fixture(scope="module")
def split() -> Split:
    return Log.from_table(make_events()).split("last_n", validation=1, test=1)


@pytest.fixture(scope="module")
def timed(split: Split, module_path: Path) -> TrainingSet:
    return TrainingSet.build(split.train, module_path, seed=0)


@pytest.fixture(scope="module")
def model(timed: TrainingSet, split: Split) -> FittedTwoTower:
    training = {"examples": "sequences", "max_epochs": 45, "patience": 45}
    plan = tiny(**ATTENTION, history_length=5, training=training)
    return plan.fit_samples(timed, split.validation)


def test_a_requests_time_decides_what_is_retrieved(model: FittedTwoTower, split: Split) -> None:
    last = make_events()["timestamp"].max()
    margins = []
    for since in (HOUR, WEEK, None):
        request = {} if since is None else {"timestamp": last + since}
        times = [last - i * HOUR for i in range(9)]
        timed = ((x, times[: len(x)][::-1]) for x in split.validation.histories)
        queries = [{"history": x, "history_timestamps": y, "request": request} for x, y in timed]
        ids, scores = model.retrieve(queries, k=NUM_ITEMS)
        if since is not None:
            assert np.mean(ids[:, :4] % 2 == (since == WEEK)) > 0.8
        margins.append(np.mean(scores[ids % 2 == 1]) - np.mean(scores[ids % 2 == 0]))
    # Without a time, the margin lies between the two.
    assert margins[0] < margins[2] < margins[1]


@pytest.mark.usefixtures("trusted_exports", "few_signatures")
def test_a_shrinkage_moves_a_short_history_towards_none(split: Split, tmp_path: Path) -> None:
    """It is a mean of two answers, weighted by known items, in memory and in an export."""
    data = TrainingSet.build(split.train, tmp_path / "samples", seed=0)
    poolings = {"history_pooling": ["recency", "attention"], "use_user_id": True}
    plans = [tiny(**poolings, history_length=3, history_shrinkage=m) for m in (None, 2.0)]
    plain, shrunk = (untrained(plan, data.corpus) for plan in plans)
    gaps = plain.network.query_tower.history.attention.gap_vectors
    gaps.assign(tf.random.stateless_normal(gaps.shape, [1, 2]))
    shrunk.network.set_weights(plain.network.get_weights())
    histories: list[list[int]] = [[5, 4, 3, 2, 1], [1], [99, 1], [99], []]
    queries: list[dict[str, Any]] = [
        {"user_id": 3, "history": x, "history_timestamps": [1e9 + 60.0 * i for i in range(len(x))]}
        for x in histories
    ]
    own, empty = (
        plain.query_embeddings(asked) for asked in (queries, [{"user_id": 3, "history": []}] * 5)
    )
    n = np.array([[3], [1], [1], [0], [0]])  # Known items that are read.
    expected = (n * own + 2 * empty) / (n + 2)
    assert np.abs(expected - own)[:3].max(axis=1).min() > 0.01
    found = shrunk.query_embeddings(queries)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    folder = export(replace(shrunk, log=split.train), tmp_path / "model", index=Exact())
    np.testing.assert_allclose(load(folder).embed_queries(queries), found, rtol=1e-4, atol=1e-6)
    # Training does not see it.
    batch = plans[0].batches(data.samples).batch(0)
    losses = [float(model.network.compute_loss(batch)) for model in (plain, shrunk)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("form", ["history", "sequence"])
def test_seconds_count_whenever_they_are(timed: TrainingSet, form: str) -> None:
    network = untrained(tiny(**ATTENTION, history_length=3), timed.corpus).network
    gaps = network.query_tower.history.attention.gap_vectors
    gaps.assign(tf.random.stateless_normal(gaps.shape, [1, 2]))
    row, rows = tf.constant([1]), tf.constant([[3, 2, 1]])
    since = {"history": [[64.0, 61.0, 50.0, 0.0]], "sequence": [[0.0, 50.0, 61.0, 64.0]]}[form]

    def embedded(start: float = 0.0, shift: int = 0, scale: int = 1) -> np.ndarray:
        times = tf.constant(relative_seconds(scale * np.array(since) + start) + shift)
        if form == "history":
            return network.embed_queries(row, rows, history_times=times).numpy()
        batch = Batch(row, sequence_rows=rows, sequence_times=times, state=tf.constant([3]))
        return network._queries(batch).numpy()

    # Only the gaps matter. Numbers as large as 1.7e9 are 128 seconds apart in float32.
    for shift in (0, -1_700_000_000):
        np.testing.assert_allclose(embedded(1.7e9, shift), embedded(), rtol=1e-5)
    assert np.abs(embedded(scale=50) - embedded()).max() > 1e-3


def test_validation_asks_as_evaluation_does(model: FittedTwoTower, split: Split) -> None:
    measured = evaluate(model, split.validation, cutoffs=(5,), num_bootstrap=0).first
    best = max(model.result.history["val_ndcg@5"])
    assert measured.overall.intervals["ndcg@5"].mean == pytest.approx(best, rel=1e-6)
    blind = replace(split.validation, times=None, history_times=None)
    without = evaluate(model, blind, cutoffs=(5,), num_bootstrap=0).first
    assert without.overall.intervals["ndcg@5"].mean < best - 0.05
    # In a sample of the queries, each keeps its own times.
    asked = {query["user_id"]: str(query) for query in split.validation.as_queries()}
    for query in split.validation.sample(5).as_queries():
        assert str(query) == asked[query["user_id"]]


def test_a_query_comes_when_its_first_positive_does(split: Split) -> None:
    events = make_events()
    for query in split.test.as_queries():
        of_user = events.loc[events["user_id"] == query["user_id"], "timestamp"]
        assert query["request"] == {"timestamp": of_user.iloc[-1].floor("s")}
        seconds = of_user.iloc[:-1].map(pd.Timestamp.timestamp) // 1
        assert query["history_timestamps"].tolist() == seconds.tolist()


def test_who_reads_no_times_is_as_without(timed: TrainingSet) -> None:
    corpus = replace(timed.corpus, has_times=False)
    plain = TrainingSet(
        replace(timed.samples, sequence_times=None), corpus, timed.report, timed.log
    )
    by_sets = {"history_pooling": ("attention", "recency"), "training": {"examples": "sets"}}
    for options in ({"history_pooling": ("mean",)}, by_sets):
        weights = []
        for data in (timed, plain):
            model = tiny(negatives=[Uniform(16)], **options)
            tf.keras.utils.set_random_seed(0)
            network = model.build(data.corpus)
            assert not network.reads_times
            batch = model.batches(data.samples).batch(0)
            assert batch.history_times is batch.sequence_times is None
            weights.append(weights_of(network))
        assert_same(*weights)


def test_a_log_by_order_alone_has_no_times(tmp_path: Path) -> None:
    log = Log.from_table(make_events().drop(columns="timestamp"))
    split = log.split("last_n", validation=1, test=1)
    data = TrainingSet.build(split.train, tmp_path, seed=0)
    assert data.samples.sequence_times is None
    assert not tiny(**ATTENTION).build(data.corpus).reads_times
    assert split.test.times is None
    assert all(query.keys() == {"user_id", "history"} for query in split.test.as_queries())


def test_a_warm_start_has_times_on_both_sides(timed: TrainingSet) -> None:
    both = timed.corpus, replace(timed.corpus, has_times=False)
    for (there, here), whose in ((both, "that"), (both[::-1], "this")):
        plan = tiny(**ATTENTION)
        with pytest.raises(ConfigError, match=f"warm_start: {whose} model reads times and th"):
            WarmStart(untrained(plan, there), plan, plan.training, here)
