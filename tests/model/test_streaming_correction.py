"""log_q from the model's own estimate of how often positives come: batches, model, settings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.negatives.test_batches import (
    NUM_CANDIDATES,
    NUM_QUERIES,
    NUM_SAMPLES,
    SAMPLES,
    batch_list,
)
from tests.negatives.test_hybrid_batches import HARD, HYBRID
from tests.small_log import event_table, small_config, write
from tfrs_pipeline.config import ConfigError, RunConfig
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.model.fit import train
from tfrs_pipeline.model.two_tower import MAX_BUCKETS, TwoTowerModel
from tfrs_pipeline.negatives.batches import TrainingBatches, evaluation_batches, shared_columns
from tfrs_pipeline.run import read_corpus, run, train_model, training_batches
from tfrs_pipeline.samples.build import RowLists, Samples, read_samples
from tfrs_pipeline.samples.positives import power_law_rate
from tfrs_pipeline.samples.streaming import StreamingFrequency

B = 32


def make_batches(samples: Samples = SAMPLES, **options: Any) -> TrainingBatches:
    settings: dict[str, Any] = {
        "batch_size": B,
        "easy_negatives": ((0.0, 12),),
        "history_length": 4,
        "seed": 3,
        "frequency": "streaming",
    }
    return TrainingBatches(samples, **{**settings, **options})


def make_model(**options: Any) -> TwoTowerModel:
    return TwoTowerModel(
        num_queries=NUM_QUERIES,
        num_candidates=NUM_CANDIDATES,
        history_length=4,
        cutoffs=(3, 8),
        **{
            "embedding_dim": 6,
            "temperature": 0.3,
            "use_user_id": True,
            "history_dropout": 0.0,
            "correction": "streaming",
            **options,
        },
    )


def compiled(model: TwoTowerModel, learning_rate: float) -> TwoTowerModel:
    model.compile(optimizer=tf.keras.optimizers.SGD(learning_rate))
    return model


def frequency_of(model: TwoTowerModel) -> StreamingFrequency:
    assert model._frequency is not None
    return model._frequency


def step_of(number: int) -> tf.Tensor:
    return tf.constant(number, tf.int64)


# Batches


@pytest.mark.parametrize("options", [{}, {"easy_negatives": ()}, {"bank_batches": 2}])
def test_batches_do_not_need_counts(options: dict[str, Any]) -> None:
    uncounted = Samples(**{**vars(SAMPLES), "counts": np.zeros_like(SAMPLES.counts)})
    with pytest.raises(ValueError, match="holds no positive"):
        make_batches(uncounted, frequency="counted")
    for expected, got in zip(
        batch_list(make_batches(**options), 4),
        batch_list(make_batches(uncounted, **options), 4),
        strict=True,
    ):
        assert "log_q" not in expected
        assert expected.keys() == got.keys()
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("num_banked", [0, 2])
def test_the_parts_of_the_expected_count(in_batch: bool, num_banked: int) -> None:
    """With the true q they add up to the counted n(c)."""
    if num_banked and not in_batch:
        return
    options: dict[str, Any] = {
        "easy_negatives": ((0.0, 12), (0.0, 3)),
        "in_batch": in_batch,
        "bank_batches": num_banked,
    }
    counted = batch_list(make_batches(frequency="counted", **options), 4)
    q = SAMPLES.counts / SAMPLES.counts.sum()
    for step, batch in enumerate(batch_list(make_batches(**options), 4)):
        draws = (B - 1 if in_batch else 0) + B * min(step, num_banked)
        assert batch["positive_draws"] == draws
        columns = shared_columns(batch).numpy()
        easy = np.where(columns > 0, 15 / NUM_CANDIDATES, 0)
        np.testing.assert_allclose(batch["other_expected_count"], easy[np.newaxis], rtol=1e-6)
        filled = columns > 0
        n = batch["positive_draws"] * q[columns] + batch["other_expected_count"][0]
        np.testing.assert_allclose(
            np.log(n[filled]), counted[step]["log_q"][0, filled], rtol=0, atol=1e-5
        )


def test_hard_negatives_keep_their_own_log_q() -> None:
    options: dict[str, Any] = {"hard_share": 0.4, "hard_negatives": HARD}
    counted = batch_list(make_batches(HYBRID, frequency="counted", **options), 3)
    for batch, expected in zip(
        batch_list(make_batches(HYBRID, **options), 3), counted, strict=True
    ):
        for name in ("hard_candidate_row", "hard_log_q", "hard_is_counted", "hard_share"):
            np.testing.assert_array_equal(batch[name], expected[name])


# The model's log_q


def test_the_loss_is_that_of_a_loop_with_the_estimated_counts() -> None:
    """A second estimator is fed the same positives; hard negatives and a bank stand beside."""
    batches = make_batches(HYBRID, hard_share=0.4, hard_negatives=HARD, bank_batches=2)
    model = compiled(make_model(bank_size=batches.bank_size), 0.0)
    model.fit(batches.dataset(0, 4), verbose=0)
    twin = StreamingFrequency(num_buckets=1000)
    for earlier in batch_list(batches, 4):
        twin.update(earlier["candidate_row"])
    batch = batches.batch(step_of(4))
    twin_q = twin(shared_columns(batch)).numpy()
    n = batch["positive_draws"].numpy() * twin_q + batch["other_expected_count"].numpy()[0]
    queries = model.embed_queries(batch["query_row"], batch["history_rows"]).numpy()
    corpus = np.concatenate([np.zeros((1, 6)), model.embed_corpus()])
    columns = shared_columns(batch).numpy()
    losses = []
    for i, query in enumerate(queries):
        positive = query @ corpus[columns[i]] / 0.3
        total = np.exp(positive)
        for j, column in enumerate(columns):
            if j != i and batch["is_counted"][i, j]:
                weight = (1 - batch["hard_share"][i].numpy()) / n[j]
                total += weight * np.exp(query @ corpus[column] / 0.3)
        for j, row in enumerate(batch["hard_candidate_row"][i].numpy()):
            if batch["hard_is_counted"][i, j]:
                total += np.exp(query @ corpus[row] / 0.3 - batch["hard_log_q"][i, j])
        losses.append(np.log(total) - positive)
    expected = np.average(losses, weights=batch["weight"])
    assert model.compute_loss(batch).numpy() == pytest.approx(expected, rel=1e-5)


def test_a_batch_is_estimated_after_it_was_taken_in() -> None:
    model = make_model()
    for step in range(3):
        batch = make_batches().batch(step_of(step))
        before = model.compute_loss(batch)
        in_training = model.compute_loss(batch, training=True)
        after = model.compute_loss(batch)
        assert in_training.numpy() == pytest.approx(after.numpy(), rel=1e-6)
        assert abs(before.numpy() - after.numpy()) > 1e-3


def test_training_alone_moves_the_estimate_once_a_step() -> None:
    batches = make_batches()
    model = compiled(make_model(), 0.1)
    model.fit(batches.dataset(0, 3), verbose=0)
    twin = StreamingFrequency(num_buckets=1000)
    for earlier in batch_list(batches, 3):
        twin.update(earlier["candidate_row"])
    batch = batches.batch(step_of(3))
    model.compute_loss(batch)
    model(batch)
    found = RowLists.from_lists([np.array([1, 2])] * NUM_QUERIES)
    empty = RowLists.from_lists([np.zeros(0, int)] * NUM_QUERIES)
    rows = np.arange(1, NUM_QUERIES + 1)
    model.evaluate(evaluation_batches(rows, found, found, empty, history_length=4), verbose=0)
    corpus = tf.range(1, NUM_CANDIDATES + 1)
    np.testing.assert_allclose(frequency_of(model)(corpus), twin(corpus), rtol=1e-6)


def test_what_an_in_batch_candidate_weighs_early_in_the_stream() -> None:
    """1 - exp(-q t) of its part, as the model's documentation says; all candidates alike here."""
    rng = np.random.default_rng(0)
    num_candidates, batch_size, num_steps = 3000, 256, 36
    model = TwoTowerModel(
        num_queries=1,
        num_candidates=num_candidates,
        embedding_dim=2,
        history_length=1,
        correction="streaming",
        frequency_learning_rate=1e-6,
    )
    assert frequency_of(model).num_buckets == 2**16
    for step in range(1, num_steps + 1):
        rows = tf.constant(rng.integers(1, num_candidates + 1, batch_size), tf.int32)
        batch = {
            "query_row": tf.zeros([batch_size], tf.int32),
            "history_rows": tf.zeros([batch_size, 1], tf.int32),
            "candidate_row": rows,
            "easy_candidate_row": tf.zeros([0], tf.int32),
            "weight": tf.ones([batch_size]),
            "is_counted": tf.ones([batch_size, batch_size], tf.bool),
            "positive_draws": tf.constant(float(batch_size)),
            "other_expected_count": tf.zeros([1, batch_size]),
        }
        model.compute_loss(batch, training=True)
        if step % 6 == 0:
            log_q = model._log_q(batch)
            assert log_q is not None
            weights = np.exp(-log_q[0].numpy())
            t = step * batch_size
            expected = num_candidates * (1 - np.exp(-t / num_candidates))
            deviation = weights.std() * np.sqrt(batch_size)
            # A hundredth for the end of the batch, where the estimate looks.
            assert abs(weights.sum() - expected) < 4 * deviation + 0.01 * num_candidates


def test_the_estimate_comes_to_what_was_counted() -> None:
    """After 30 epochs, item by item, within five of the estimator's own deviations.

    That is sqrt(a / (2 - a)) for independent draws of a rare item, and an epoch draws without
    replacement, which is steadier.
    """
    batches, rate = make_batches(bank_batches=1), 0.02
    model = make_model(bank_size=B, frequency_learning_rate=rate)
    num_steps = 30 * NUM_SAMPLES // B
    train(model, batches, max_epochs=30)
    assert batches.steps_per_epoch * 30 == pytest.approx(num_steps, rel=0.1)
    batch = batches.batch(step_of(30 * batches.steps_per_epoch))
    counted = make_batches(bank_batches=1, frequency="counted").batch(
        step_of(30 * batches.steps_per_epoch)
    )
    got = model._log_q(batch)
    assert got is not None
    error = (got - counted["log_q"]).numpy()
    deviation = np.sqrt(rate / (2 - rate))
    assert np.abs(error).max() < 5 * deviation
    assert np.abs(error.mean()) < deviation


def test_buckets_follow_the_corpus() -> None:
    def num_buckets(num_candidates: int) -> int:
        model = TwoTowerModel(
            num_queries=1,
            num_candidates=num_candidates,
            embedding_dim=1,
            history_pooling=(),
            use_user_id=True,
            correction="streaming",
        )
        return frequency_of(model).num_buckets

    assert num_buckets(100) == 2**16
    assert num_buckets(2**15) == 2**17
    assert num_buckets(2**15 + 1) == 2**18
    assert num_buckets(2**21) == MAX_BUCKETS


# Its state


class Stopped(Exception):
    """Stands for a kill in the middle of a run."""


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    start = make_model().get_weights()

    def run_to(folder: Path | None, stop_after: int | None = None) -> list[np.ndarray]:
        model = make_model(history_dropout=0.5)
        model.set_weights(start)

        def on_epoch(epoch: int, logs: dict[str, float]) -> None:
            if epoch == stop_after:
                raise Stopped

        train(model, make_batches(), max_epochs=4, checkpoint_folder=folder, on_epoch=on_epoch)
        return model.get_weights()

    unbroken = run_to(None)
    with pytest.raises(Stopped):
        run_to(tmp_path, stop_after=2)
    for expected, got in zip(unbroken, run_to(tmp_path), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("suffix", ["", ".keras"])
def test_saved_and_loaded_by_keras(tmp_path: Path, suffix: str) -> None:
    batches = make_batches()
    model = compiled(make_model(), 0.1)
    model.fit(batches.dataset(0, 3), verbose=0)
    model.save(tmp_path / f"model{suffix}")
    loaded = tf.keras.models.load_model(tmp_path / f"model{suffix}")
    batch = batches.batch(step_of(3))
    assert loaded.compute_loss(batch).numpy() == pytest.approx(
        model.compute_loss(batch).numpy(), rel=1e-6
    )


# Misuse, settings


def test_draws_by_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha = \[0.75\] are drawn by counts.*Use alpha = 0"):
        make_batches(easy_negatives=((0.0, 12), (0.75, 10)))
    with pytest.raises(ValueError, match=r"positive_rate resamples.*frequency = 'counted'"):
        make_batches(positive_rate=power_law_rate(SAMPLES.counts, 0.5))


def test_batches_of_the_other_frequency_are_refused() -> None:
    counted = make_batches(frequency="counted").batch(step_of(0))
    streaming = make_batches().batch(step_of(0))
    with pytest.raises(ValueError, match=r"no 'positive_draws'.*frequency='streaming'"):
        make_model().compute_loss(counted)
    with pytest.raises(ValueError, match=r"no 'log_q'.*frequency='counted'"):
        make_model(correction="mixture").compute_loss(streaming)
    plain = make_model(correction="none")
    np.testing.assert_array_equal(plain.compute_loss(counted), plain.compute_loss(streaming))


def test_settings_that_need_counts_are_refused() -> None:
    streaming = {"correction": "streaming"}
    with pytest.raises(ConfigError) as raised:
        RunConfig(model=streaming, samples={"resampling": "power_law"})
    messages = dict(raised.value.problems)
    assert "got alpha [0.75]" in messages["samples.easy_negatives"]
    assert "use alpha 0 and in_batch" in messages["samples.easy_negatives"]
    assert "needs training counts" in messages["samples.resampling"]
    RunConfig(model=streaming, samples={"easy_negatives": [{"alpha": 0}]})
    with pytest.raises(ConfigError, match="frequency_learning_rate"):
        RunConfig(model={"frequency_learning_rate": 0})


def test_a_run_with_the_streaming_correction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the small log, with a bank: the kept model's log_q is near that of the counts."""
    monkeypatch.setattr("tfrs_pipeline.serving.export._prove", lambda *arguments: None)
    path = write(event_table("str"), tmp_path / "events.parquet")
    config = small_config(
        tmp_path,
        {"source": "events", "path": path},
        samples={"bank_batches": 2},
        model={"correction": "streaming"},
        training={"max_epochs": 6, "refit": False},
        evaluation={"uncorrected": True},
    )
    metrics = run(config, tmp_path / "run").metrics
    assert {"two_tower", "two_tower_uncorrected"} <= metrics["models"].keys()
    samples = read_samples(tmp_path / "run" / "samples" / "final")
    batches = training_batches(config, samples)
    folder = tmp_path / "run" / "samples" / "final"
    model, _ = train_model(
        config,
        config.model,
        read_corpus(Log.read(tmp_path / "run" / "data"), folder),
        batches,
        max_epochs=metrics["training"]["two_tower"]["best_epoch"],
        checkpoint_folder=tmp_path / "run" / "checkpoints" / "two_tower" / "selection",
    )
    step = step_of(3)
    got = model._log_q(batches.batch(step))
    assert got is not None
    counted_config = config.model_copy(
        update={"model": config.model.model_copy(update={"correction": "mixture"})}
    )
    expected = training_batches(counted_config, samples).batch(step)["log_q"]
    assert np.corrcoef(got[0], expected[0])[0, 1] > 0.95
    assert np.abs(got - expected).mean() < 0.15
