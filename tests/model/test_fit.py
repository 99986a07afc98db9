"""Training that stops and goes on, its schedule over two trainings, and what it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.model.conftest import NUM_CANDIDATES, NUM_QUERIES, Problem
from tests.small_log import event_table, small_config, write
from tfrs_pipeline.config import ConfigError, TrainingConfig
from tfrs_pipeline.data.split import Holdout
from tfrs_pipeline.evaluation.evaluate import evaluate, popularity_slices
from tfrs_pipeline.model.fit import train
from tfrs_pipeline.model.queries import exact_retriever
from tfrs_pipeline.model.two_tower import TwoTowerModel
from tfrs_pipeline.negatives.batches import evaluation_batches
from tfrs_pipeline.run import (
    load_data,
    read_corpus,
    split_log,
    train_and_refit,
    training_samples,
)
from tfrs_pipeline.samples.build import RowLists

QUERY_ROWS = range(1, NUM_QUERIES + 1)
SCHEDULE: dict[str, Any] = {
    "optimizer": "lazy_adam",
    "learning_rate": 0.02,
    "warmup_steps": 7,
    "decay": "cosine",
    "decay_to": 0.1,
}


class Stopped(Exception):
    """Stands for a kill in the middle of a run."""


def evaluation_data(problem: Problem) -> tf.data.Dataset:
    known = RowLists.from_lists([problem.samples.known_positives[row] for row in QUERY_ROWS])
    return evaluation_batches(
        np.array(QUERY_ROWS), known, problem.relevant, known, history_length=5, batch_size=7
    )


@pytest.fixture
def run(problem: Problem) -> Callable[..., tuple[TwoTowerModel, dict[str, list[float]]]]:
    start = problem.model().get_weights()

    def run_(
        *, stop_after: int | None = None, max_epochs: int = 5, **options: Any
    ) -> tuple[TwoTowerModel, dict[str, list[float]]]:
        model = problem.model()
        model.set_weights(start)

        def on_epoch(epoch: int, logs: dict[str, float]) -> None:
            if epoch == stop_after:
                raise Stopped

        result = train(
            model, problem.batches(), max_epochs=max_epochs, on_epoch=on_epoch, **options
        )
        return model, result.history

    return run_


Run = Callable[..., tuple[TwoTowerModel, dict[str, list[float]]]]


def assert_same(model: TwoTowerModel, other: TwoTowerModel) -> None:
    pairs = zip(model.trainable_variables, other.trainable_variables, strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_stopped_run_with_a_schedule_goes_on_bit_for_bit(
    run: Run, tmp_path: Path, stop_after: int
) -> None:
    unbroken, history = run(**SCHEDULE)
    with pytest.raises(Stopped):
        run(stop_after=stop_after, checkpoint_folder=tmp_path, **SCHEDULE)
    resumed, resumed_history = run(checkpoint_folder=tmp_path, **SCHEDULE)
    assert_same(unbroken, resumed)
    assert history == resumed_history
    # The step size is where the unbroken run's is: at the end of the decay.
    assert float(resumed.optimizer.learning_rate) == pytest.approx(0.002)
    constant, _ = run(optimizer="lazy_adam", learning_rate=0.02)
    assert any(
        np.any(a != b) for a, b in zip(unbroken.get_weights(), constant.get_weights(), strict=True)
    )


def test_a_second_training_goes_the_way_of_the_first(run: Run, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(stop_after=3, checkpoint_folder=tmp_path, **SCHEDULE)
    chosen, _ = run(max_epochs=3, checkpoint_folder=tmp_path, **SCHEDULE)
    again, _ = run(max_epochs=3, decay_epochs=5, **SCHEDULE)
    assert_same(chosen, again)
    squeezed, _ = run(max_epochs=3, **SCHEDULE)
    pairs = zip(squeezed.trainable_variables, again.trainable_variables, strict=True)
    assert any(np.any(a.numpy() != b.numpy()) for a, b in pairs)


def test_a_warm_up_longer_than_the_training_is_refused(run: Run) -> None:
    # 120 positives in batches of 32: 4 steps an epoch.
    with pytest.raises(ValueError, match="warm-up of 20 steps leaves nothing of 20 steps"):
        run(warmup_steps=20, decay="linear")


def as_queries(problem: Problem) -> Holdout:
    known = [problem.samples.known_positives[row].astype(np.int64) for row in QUERY_ROWS]
    relevant = [problem.relevant[i].astype(np.int64) for i in range(NUM_QUERIES)]
    return Holdout(
        user_ids=np.array(QUERY_ROWS),
        # Oldest first, where a batch holds the most recent one first.
        histories=[rows[::-1] for rows in known],
        relevant=relevant,
        clicked=known,
        seen=known,
        candidate_ids=np.arange(1, len(problem.samples.counts)),
        candidate_counts=problem.samples.counts[1:],
    )


def test_tail_recall_agrees_with_the_evaluation_of_any_retriever(
    run: Run, problem: Problem
) -> None:
    model, _ = run(**SCHEDULE)
    counts = problem.samples.counts[1:]
    before = model.evaluate(evaluation_data(problem), verbose=0, return_dict=True)
    model.report_tail(popularity_slices(counts)["tail"])
    reported = model.evaluate(evaluation_data(problem), verbose=0, return_dict=True)
    ids = np.arange(1, NUM_CANDIDATES + 1)
    measured = evaluate(
        exact_retriever(model, np.arange(1, NUM_QUERIES + 1), ids),
        as_queries(problem),
        exclude="clicked",
        cutoffs=(3, 8),
        num_bootstrap=0,
    ).first
    tail = measured.slices["tail"]
    assert 0 < tail.num_queries < NUM_QUERIES
    for k in (3, 8):
        expected = np.nanmean(tail.per_query[f"recall@{k}"])
        assert reported[f"tail/recall@{k}"] == pytest.approx(expected, abs=1e-6)
        whole = np.mean(measured.per_query[f"recall@{k}"])
        assert reported[f"recall@{k}"] == pytest.approx(whole, abs=1e-6)
        assert abs(expected - whole) > 0.01
    assert {name: reported[name] for name in before} == before
    assert set(reported) == set(model.ranking_metric_names)
    # Another tail, in the graph that is there.
    model.report_tail(np.ones(NUM_CANDIDATES, bool))
    reported = model.evaluate(evaluation_data(problem), verbose=0, return_dict=True)
    assert reported["tail/recall@8"] == pytest.approx(reported["recall@8"], abs=1e-6)
    with pytest.raises(ValueError, match=r"is_tail must be \[24\] bool.*shape \(25,\), int64"):
        model.report_tail(problem.samples.counts)


def test_diagnostics_are_what_the_batch_and_the_tables_hold(problem: Problem) -> None:
    model = problem.model(use_user_id=True, normalize=False)
    batch = problem.batches().batch(tf.constant(2, tf.int64))
    before = [variable.numpy() for variable in model.weights]
    figures = {name: float(value) for name, value in model.diagnose(batch).items()}
    for old, variable in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, variable)
    is_counted = batch["is_counted"].numpy()
    log_q = np.broadcast_to(batch["log_q"], is_counted.shape)
    cells = [log_q[i, j] for i, j in zip(*np.nonzero(is_counted), strict=True)]
    assert figures["log_q/min"] == pytest.approx(min(cells))
    assert figures["log_q/max"] == pytest.approx(max(cells))
    assert figures["masked_share"] == pytest.approx(np.mean(~is_counted), abs=1e-6)
    assert 0 < figures["masked_share"] < 1
    queries = model.embed_queries(batch["query_row"], batch["history_rows"]).numpy()
    assert figures["norm/query"] == pytest.approx(np.sqrt((queries**2).sum(1)).mean(), rel=1e-5)
    corpus = model.embed_corpus()[batch["candidate_row"].numpy() - 1]
    assert figures["norm/candidate"] == pytest.approx(np.sqrt((corpus**2).sum(1)).mean(), rel=1e-5)
    tables = {
        (variable.shape[0], variable.shape[1]): variable.numpy()
        for variable in model.query_tower.trainable_variables
        if variable.shape[0] == NUM_QUERIES + 1
    }
    (table,) = tables.values()
    assert figures["norm/query_tower/id"] == pytest.approx(
        np.sqrt((table**2).sum(1)).mean(), rel=1e-5
    )
    assert "norm/candidate_tower/id" in figures
    assert "norm/query_tower/history_item" in figures


def test_without_a_correction_there_is_no_log_q_to_show(problem: Problem) -> None:
    batch = problem.batches().batch(tf.constant(0, tf.int64))
    figures = problem.model(correction="none").diagnose(batch)
    assert not [name for name in figures if name.startswith("log_q")]
    assert float(figures["norm/query"]) == pytest.approx(1.0, rel=1e-5)


def events(folder: Path) -> dict[str, dict[int, float]]:
    """Reads what TensorBoard would show: name -> epoch -> value."""
    values: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.*")):
        for record in tf.data.TFRecordDataset(str(file)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                values.setdefault(value.tag, {})[event.step] = float(tf.make_ndarray(value.tensor))
    return values


def test_event_files_hold_every_epoch_once_and_change_nothing(
    run: Run, problem: Problem, tmp_path: Path
) -> None:
    options = {**SCHEDULE, "validation": evaluation_data(problem), "monitor": "ndcg@8"}
    options["patience"] = 9
    without, history = run(**options)
    folders = {
        "checkpoint_folder": tmp_path,
        "tensorboard_folder": tmp_path / "tensorboard",
    }
    with pytest.raises(Stopped):
        run(stop_after=2, **folders, **options)
    model, _ = run(**folders, **options)
    assert_same(without, model)
    found = events(tmp_path / "tensorboard")
    assert {tuple(by_epoch) for by_epoch in found.values()} == {(1, 2, 3, 4, 5)}
    for name in ("loss", "val_ndcg@8", "val_recall@3"):
        written = list(found[name.replace("val_", "validation/")].values())
        np.testing.assert_allclose(written, history[name], rtol=1e-6)
    rates = list(found["learning_rate"].values())
    # The warm-up ends in the second epoch.
    assert rates[0] == pytest.approx(0.02 * 4 / 7)
    assert rates[1] == max(rates)
    assert rates[-1] == pytest.approx(0.002)
    assert found["log_q/min"][1] < found["log_q/max"][1]


def test_both_trainings_of_a_run_go_down_the_same_way(tmp_path: Path) -> None:
    path = write(event_table("int"), tmp_path / "ratings.parquet")
    config = small_config(
        tmp_path,
        {"source": "ratings", "path": path, "rating_threshold": 3, "timestamp_unit": "s"},
        training={
            "max_epochs": 6,
            "decay": "linear",
            "decay_to": 0.4,
            "learning_rate": 0.05,
            "tensorboard": True,
        },
    )
    tables = load_data(config.data)
    split = split_log(tables, config.split, config.seed)
    selection, final = (
        training_samples(config, tables, split, parts, tmp_path / str(len(parts)))
        for parts in (("train",), ("train", "validation"))
    )
    corpus = read_corpus(tables, tmp_path / "2")
    queries = split.validation
    # The time is over after the first epoch: it is chosen.
    _, chosen, _ = train_and_refit(
        config,
        corpus,
        selection,
        final,
        queries,
        max_seconds=1e-9,
        folder=tmp_path / "checkpoints",
    )
    first, second = (
        events(tmp_path / "checkpoints" / step / "tensorboard") for step in ("selection", "refit")
    )
    assert chosen.best_epoch == len(chosen.history["loss"]) == 1
    for found in (first, second):
        assert found["learning_rate"] == {1: pytest.approx(0.05 * (1 - 0.6 / 6), rel=1e-5)}
    assert not any(name.startswith("validation") for name in second)
    tail = [first[f"validation/tail/recall@{k}"] for k in config.evaluation.cutoffs]
    assert [list(values.values()) for values in tail] == [
        pytest.approx(chosen.history[f"val_tail/recall@{k}"], rel=1e-6)
        for k in config.evaluation.cutoffs
    ]
    with pytest.raises(ValueError, match="tensorboard writes into the folder of the checkpoints"):
        train_and_refit(config, corpus, selection, final, queries)


def test_settings_that_have_no_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"decay_to: got 0.1 with decay 'none'.*no effect"):
        TrainingConfig(decay_to=0.1)
    assert TrainingConfig(decay="linear", decay_to=0.1).decay_to == 0.1
