"""Negatives from earlier batches: which they are, what they weigh, whose embeddings they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.negatives.test_batches import (
    NUM_CANDIDATES,
    NUM_QUERIES,
    SAMPLES,
    batch_list,
    make_batches,
)
from tests.small_log import event_table, small_config, write
from tfrs_pipeline.config import ConfigError, SamplesConfig
from tfrs_pipeline.model.embedding_bank import EmbeddingBank
from tfrs_pipeline.model.fit import train
from tfrs_pipeline.model.loss import HybridRetrieval
from tfrs_pipeline.model.two_tower import TwoTowerModel
from tfrs_pipeline.negatives.batches import TrainingBatches, evaluation_batches, shared_columns
from tfrs_pipeline.run import run
from tfrs_pipeline.samples.build import RowLists, Samples
from tfrs_pipeline.samples.popularity import sampling_probability
from tfrs_pipeline.samples.positives import power_law_rate

B, M = 32, 22
Q = SAMPLES.counts / SAMPLES.counts.sum()


def make_model(batches: TrainingBatches, **options: Any) -> TwoTowerModel:
    return TwoTowerModel(
        num_queries=NUM_QUERIES,
        num_candidates=NUM_CANDIDATES,
        history_length=4,
        cutoffs=(3, 8),
        **{
            "embedding_dim": 6,
            "temperature": 0.3,
            "use_user_id": True,
            "bank_size": batches.bank_size,
            **options,
        },
    )


def compiled(model: TwoTowerModel, learning_rate: float) -> TwoTowerModel:
    model.compile(optimizer=tf.keras.optimizers.SGD(learning_rate))
    return model


def bank_of(model: TwoTowerModel) -> EmbeddingBank:
    assert model._bank is not None
    return model._bank


def nothing(num: int) -> RowLists:
    return RowLists.from_lists([np.zeros(0, int)] * num)


# Which candidates


@pytest.mark.parametrize("options", [{}, {"positive_rate": power_law_rate(SAMPLES.counts, 0.6)}])
@pytest.mark.parametrize("num_banked", [1, 3, 6])
def test_the_bank_names_the_positives_of_the_batches_before(
    num_banked: int, options: dict[str, Any]
) -> None:
    """The latest first, as they came, across the ends of epochs; 6 batches are more than one."""
    batches = batch_list(make_batches(bank_batches=num_banked, **options), 12)
    for step, batch in enumerate(batches):
        before = [b["candidate_row"] for b in batches[max(0, step - num_banked) : step]][::-1]
        unfilled = np.zeros((num_banked - len(before)) * B, np.int32)
        np.testing.assert_array_equal(
            batch["bank_candidate_row"], np.concatenate([*before, unfilled])
        )


def test_the_rest_of_a_batch_does_not_depend_on_the_bank() -> None:
    for with_bank, without in zip(
        batch_list(make_batches(bank_batches=2), 4), batch_list(make_batches(), 4), strict=True
    ):
        for name in without.keys() - {"log_q", "is_counted"}:
            np.testing.assert_array_equal(with_bank[name], without[name])
        np.testing.assert_array_equal(with_bank["is_counted"][:, : B + M], without["is_counted"])


def test_a_batch_with_a_bank_is_a_function_of_seed_and_step() -> None:
    unbroken = batch_list(make_batches(bank_batches=3), 8)
    resumed = batch_list(make_batches(bank_batches=3), 3, start=5)
    for expected, got in zip(unbroken[5:], resumed, strict=True):
        assert expected.keys() == got.keys()
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])


# What they weigh, and which count


def test_mask_of_the_bank_matches_a_loop() -> None:
    num_masked = 0
    for step, batch in enumerate(batch_list(make_batches(bank_batches=3), 6)):
        columns = shared_columns(batch).numpy()
        assert len(columns) == B + M + 3 * B
        for i, query in enumerate(batch["query_row"]):
            left_out = {batch["candidate_row"][i], *SAMPLES.known_positives[query]}
            left_out |= set(SAMPLES.exposed[query])
            expected = [
                j == i or (column not in left_out and j < B + M + min(step, 3) * B)
                for j, column in enumerate(columns)
            ]
            assert batch["is_counted"][i].tolist() == expected
            num_masked += expected[B + M :].count(False)
    assert num_masked > 0


def test_log_q_grows_with_the_bank() -> None:
    smoothed = sampling_probability(SAMPLES.counts, 0.75)
    easy = 12 / NUM_CANDIDATES + 10 * smoothed
    batches = make_batches(bank_batches=3)
    for step, batch in enumerate(batch_list(batches, 6)):
        n = (B - 1 + min(step, 3) * B) * Q + easy
        columns = shared_columns(batch).numpy()
        filled = columns > 0
        assert filled.sum() == B + M + min(step, 3) * B
        error = batch["log_q"][0, filled] - np.log(n[columns[filled]])
        assert np.abs(error).max() < 1e-6
        assert np.isfinite(batch["log_q"]).all()
    np.testing.assert_allclose(batches.expected_count[1:], n[1:], rtol=1e-12)


def test_log_q_is_exact_for_rare_items_of_a_large_corpus() -> None:
    """Counts from 1 to 10^7: float32 sums would do, float32 shares of a long table need not."""
    counts = np.concatenate([[0], 10 ** (np.arange(NUM_CANDIDATES) % 8)])
    samples = Samples(**{**vars(SAMPLES), "counts": counts})
    batches = TrainingBatches(
        samples, batch_size=B, easy_negatives=(), history_length=4, seed=3, bank_batches=2
    )
    for step, batch in enumerate(batch_list(batches, 4)):
        columns = shared_columns(batch).numpy()
        columns = columns[columns > 0]
        n = (B - 1 + min(step, 2) * B) * counts / counts.sum()
        error = batch["log_q"][0, : len(columns)] - np.log(n[columns])
        assert np.abs(error).max() < 1e-5


def test_masked_shares_cover_the_full_bank() -> None:
    batches = make_batches(bank_batches=3)
    shares = batches.masked_shares(num_steps=4)
    cells = np.concatenate([batch["is_counted"] for batch in batch_list(batches, 4, start=3)])
    assert sum(shares.values()) * (cells.size - len(cells)) == pytest.approx((~cells).sum())
    assert min(shares.values()) > 0


# Whose embeddings


def test_the_embeddings_are_those_of_the_candidates_named() -> None:
    """At learning rate 0 embeddings stay, so that an order or a batch mixed up must show."""
    batches = make_batches(bank_batches=3, batch_size=30)
    model = compiled(make_model(batches), 0.0)
    for step, batch in enumerate(batches.dataset(0, 7)):
        held = bank_of(model)(batch["bank_candidate_row"]).numpy()
        expected = model.embed_candidates(batch["bank_candidate_row"]).numpy()
        expected[min(step, 3) * 30 :] = 0
        np.testing.assert_allclose(held, expected, atol=1e-6)
        model.train_step(batch)
    assert len(np.unique(model.embed_corpus().round(4), axis=0)) == NUM_CANDIDATES


def test_the_embeddings_are_as_they_were_then() -> None:
    batches = make_batches(bank_batches=2)
    model = compiled(make_model(batches), 0.5)
    step_of = tf.function(model.train_step)
    before: list[np.ndarray] = []
    for batch in batches.dataset(0, 5):
        before.insert(0, model.embed_candidates(batch["candidate_row"]).numpy())
        step_of(batch)
        held = bank_of(model).get_weights()[0]
        expected = np.concatenate([*before[:2], np.zeros((2 * B, 6))])[: 2 * B]
        np.testing.assert_allclose(held, expected, atol=1e-6)
    assert np.abs(before[0] - model.embed_candidates(batch["candidate_row"])).max() > 1e-3


def test_the_loss_is_that_of_a_loop_over_explicit_columns() -> None:
    batches = make_batches(bank_batches=2)
    model = compiled(make_model(batches), 0.0)
    model.fit(batches.dataset(0, 3), epochs=1, verbose=0)
    batch = batches.batch(tf.constant(3, tf.int64))
    queries = model.embed_queries(batch["query_row"], batch["history_rows"]).numpy()
    columns = np.concatenate(
        [batch[f"{kind}candidate_row"] for kind in ("", "easy_", "bank_")], dtype=np.int32
    )
    candidates = model.embed_corpus()[columns - 1]
    losses = []
    for i, query in enumerate(queries):
        positive = query @ candidates[i] / 0.3
        total = np.exp(positive)
        for j, candidate in enumerate(candidates):
            if j != i and batch["is_counted"][i, j]:
                total += np.exp(query @ candidate / 0.3 - batch["log_q"][0, j])
        losses.append(np.log(total) - positive)
    expected = np.average(losses, weights=batch["weight"])
    assert model.compute_loss(batch).numpy() == pytest.approx(expected, rel=1e-5)


def test_no_gradient_flows_into_the_bank() -> None:
    """The same gradient as with the bank's embeddings as plain numbers."""
    batches = make_batches(bank_batches=2)
    model = compiled(make_model(batches), 0.1)
    for batch in batches.dataset(0, 2):
        model.train_step(batch)
    batch = batches.batch(tf.constant(2, tf.int64))
    fixed = tf.constant(bank_of(model).get_weights()[0])
    variables = model.trainable_variables

    def gradients(bank: Any) -> list[np.ndarray]:
        with tf.GradientTape() as tape:
            fresh = tf.concat([batch["candidate_row"], batch["easy_candidate_row"]], axis=0)
            # Copies of a candidate are summed before the tower, as in the model: in another order
            # float32 would differ by more than is allowed here.
            distinct, slot = tf.unique(fresh)
            candidates = tf.gather(model.embed_candidates(distinct), slot)
            loss = HybridRetrieval(0.3)(
                model.embed_queries(batch["query_row"], batch["history_rows"]),
                tf.concat([candidates, bank()], axis=0),
                sample_weight=batch["weight"],
                log_q=batch["log_q"],
                score_mask=batch["is_counted"],
                compute_metrics=False,
            ) / tf.reduce_sum(batch["weight"])
        return [tf.convert_to_tensor(g).numpy() for g in tape.gradient(loss, variables)]

    with tf.GradientTape() as tape:
        loss = model.compute_loss(batch)
    ours = [tf.convert_to_tensor(g).numpy() for g in tape.gradient(loss, variables)]
    for got, expected in zip(ours, gradients(lambda: fixed), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)
    leaky = gradients(lambda: model.embed_candidates(batch["bank_candidate_row"]))
    assert max(np.abs(a - b).max() for a, b in zip(ours, leaky, strict=True)) > 1e-3


# Its state


def test_only_training_moves_the_bank() -> None:
    batches = make_batches(bank_batches=2)
    model = compiled(make_model(batches), 0.1)
    model.fit(batches.dataset(0, 2), verbose=0)
    before = bank_of(model).get_weights()
    model.compute_loss(batches.batch(tf.constant(2, tf.int64)))
    rows = np.arange(1, NUM_QUERIES + 1)
    found = RowLists.from_lists([np.array([1, 2])] * NUM_QUERIES)
    empty = nothing(NUM_QUERIES)
    model.evaluate(evaluation_batches(rows, found, found, empty, history_length=4), verbose=0)
    for got, expected in zip(bank_of(model).get_weights(), before, strict=True):
        np.testing.assert_array_equal(got, expected)


class Stopped(Exception):
    """Stands for a kill in the middle of a run."""


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    start = make_model(make_batches(bank_batches=3)).get_weights()

    def run_to(folder: Path | None, stop_after: int | None = None) -> list[np.ndarray]:
        batches = make_batches(bank_batches=3)
        model = make_model(batches)
        model.set_weights(start)

        def on_epoch(epoch: int, logs: dict[str, float]) -> None:
            if epoch == stop_after:
                raise Stopped

        train(model, batches, max_epochs=4, checkpoint_folder=folder, on_epoch=on_epoch)
        return model.get_weights()

    unbroken = run_to(None)
    with pytest.raises(Stopped):
        run_to(tmp_path, stop_after=2)
    for expected, got in zip(unbroken, run_to(tmp_path), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("suffix", ["", ".keras"])
def test_saved_and_loaded_by_keras(tmp_path: Path, suffix: str) -> None:
    batches = make_batches(bank_batches=2)
    model = compiled(make_model(batches), 0.1)
    model.fit(batches.dataset(0, 3), verbose=0)
    model.save(tmp_path / f"model{suffix}")
    loaded = tf.keras.models.load_model(tmp_path / f"model{suffix}")
    batch = batches.batch(tf.constant(3, tf.int64))
    assert loaded.compute_loss(batch).numpy() == pytest.approx(
        model.compute_loss(batch).numpy(), rel=1e-6
    )


# Misuse


def test_a_bank_of_other_steps_is_refused() -> None:
    batches = make_batches(bank_batches=2)
    model = compiled(make_model(batches), 0.1)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"Begin at step 0 with a new model"):
        model.compute_loss(batches.batch(tf.constant(4, tf.int64)))
    model.fit(batches.dataset(0, 3), verbose=0)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"not trained on the steps"):
        model.fit(batches.dataset(4, 1), verbose=0)
    model.fit(batches.dataset(3, 1), verbose=0)


def test_model_and_batches_must_agree_on_the_bank() -> None:
    plain, banked = make_batches(), make_batches(bank_batches=2)
    step = tf.constant(0, tf.int64)
    with pytest.raises(ValueError, match=r"keeps no bank.*names its entries.*bank_size"):
        make_model(plain).compute_loss(banked.batch(step))
    with pytest.raises(ValueError, match=r"keeps a bank.*names no entries.*bank_size"):
        make_model(banked).compute_loss(plain.batch(step))
    with pytest.raises(ValueError, match=r"name 64 entries.*model keeps 32"):
        make_model(banked, bank_size=32).compute_loss(banked.batch(step))


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"bank_batches = 1 with in_batch = False.*in_batch = True"
    ):
        make_batches(bank_batches=1, in_batch=False)
    with pytest.raises(ValueError, match=r"0 or more. Received: -1"):
        make_batches(bank_batches=-1)
    with pytest.raises(ConfigError, match=r"bank_batches.*got 2 without in_batch"):
        SamplesConfig(bank_batches=2, in_batch=False)


def test_a_run_with_a_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the settings to the batches and the model, the uncorrected twin included."""
    monkeypatch.setattr("tfrs_pipeline.serving.export._prove", lambda *arguments: None)
    path = write(event_table("str"), tmp_path / "events.parquet")
    config = small_config(
        tmp_path,
        {"source": "events", "path": path},
        samples={"bank_batches": 2},
        training={"max_epochs": 3, "refit": False},
        evaluation={"uncorrected": True},
    )
    metrics = run(config, tmp_path / "run").metrics
    assert {"two_tower", "two_tower_uncorrected"} <= metrics["models"].keys()
    scores = [metrics["models"][name]["ndcg@20"]["mean"] for name in ("two_tower", "popularity")]
    assert scores[0] > scores[1]
