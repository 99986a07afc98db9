"""The model as a Keras user meets it: fit, evaluate, save, load; and the loss it minimises."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.model.conftest import NUM_CANDIDATES, NUM_QUERIES, Problem
from tfrs_pipeline.data.split import Holdout
from tfrs_pipeline.evaluation.evaluate import evaluate
from tfrs_pipeline.model.fit import train
from tfrs_pipeline.model.queries import exact_retriever, history_rows
from tfrs_pipeline.model.two_tower import TwoTowerModel
from tfrs_pipeline.negatives.batches import TrainingBatches, evaluation_batches
from tfrs_pipeline.negatives.sequences import SequenceBatches
from tfrs_pipeline.negatives.user_sets import UserSetBatches
from tfrs_pipeline.samples.build import RowLists

QUERY_ROWS = range(1, NUM_QUERIES + 1)


def evaluation_data(problem: Problem) -> tf.data.Dataset:
    known = RowLists.from_lists([problem.samples.known_positives[row] for row in QUERY_ROWS])
    return evaluation_batches(
        np.array(QUERY_ROWS), known, problem.relevant, known, history_length=5, batch_size=7
    )


def test_fit_learns_and_reports_the_mean_loss_of_the_epoch(problem: Problem) -> None:
    model = problem.model()
    model.compile(optimizer=tf.keras.optimizers.Adam(0.01))
    batches = problem.batches()
    before = model.evaluate(evaluation_data(problem), verbose=0, return_dict=True)
    twin = problem.model()
    twin.set_weights(model.get_weights())
    twin.compile(optimizer=tf.keras.optimizers.Adam(0.01))
    expected = [
        twin.fit(batches.dataset(step, 1), verbose=0).history["loss"][0] for step in range(3)
    ]
    history = model.fit(batches.dataset(0, 3), verbose=0).history
    assert history["loss"][0] == pytest.approx(np.mean(expected), rel=1e-5)
    model.fit(batches.dataset(3, 60), epochs=1, verbose=0)
    after = model.evaluate(evaluation_data(problem), verbose=0, return_dict=True)
    assert set(after) == {"recall@3", "ndcg@3", "recall@8", "ndcg@8"}
    assert after["recall@8"] > 0.9 > before["recall@8"] + 0.2


def test_evaluate_agrees_with_the_evaluation_room(problem: Problem) -> None:
    model = problem.model()
    model.compile()
    got = model.evaluate(evaluation_data(problem), verbose=0, return_dict=True)
    candidate_ids = np.arange(1, NUM_CANDIDATES + 1) * 10
    known = [problem.samples.known_positives[row] * 10 for row in QUERY_ROWS]
    queries = Holdout(
        user_ids=np.array(QUERY_ROWS),
        histories=[ids[::-1] for ids in known],
        relevant=[problem.relevant[row - 1] * 10 for row in QUERY_ROWS],
        clicked=known,
        seen=known,
        candidate_ids=candidate_ids,
        candidate_counts=problem.samples.counts[1:],
    )
    result = evaluate(
        exact_retriever(model, np.array(QUERY_ROWS), candidate_ids),
        queries,
        cutoffs=(3, 8),
    ).first
    for name, value in got.items():
        assert value == pytest.approx(result.overall.intervals[name].mean, abs=1e-6)


def test_loss_subtracts_log_q_and_drops_masked_columns(problem: Problem) -> None:
    """Recomputes a batch's loss from the embeddings, one row at a time."""
    model = problem.model(temperature=0.2)
    batch = next(iter(problem.batches().dataset(0, 1)))
    queries = model.embed_queries(batch["query_row"], batch["history_rows"]).numpy()
    columns = np.concatenate([batch["candidate_row"], batch["easy_candidate_row"]])
    candidates = model.embed_corpus()[columns - 1]
    losses = []
    for i, query in enumerate(queries):
        logits = query @ candidates.T / 0.2
        corrected = logits - batch["log_q"].numpy()[0]
        corrected[i] = logits[i]
        kept = corrected[batch["is_counted"].numpy()[i]]
        losses.append(np.log(np.exp(kept).sum()) - logits[i])
    assert model.compute_loss(batch).numpy() == pytest.approx(np.mean(losses), rel=1e-5)
    plain = problem.model(temperature=0.2, correction="none")
    plain.set_weights(model.get_weights())
    assert abs(plain.compute_loss(batch).numpy() - np.mean(losses)) > 0.1


@pytest.mark.parametrize("poolings", [("mean", "recency"), ("attention",)])
@pytest.mark.parametrize("correct_positive", [False, True])
def test_all_positions_have_the_loss_of_single_positives(
    problem: Problem, poolings: tuple[str, ...], correct_positive: bool
) -> None:
    """One pass over the sequences against one query a positive, each with its own history."""
    model = problem.model(
        history_pooling=poolings, temperature=0.2, correct_positive=correct_positive
    )
    samples = problem.samples
    batches = SequenceBatches(
        samples, batch_size=40, easy_negatives=[(0.0, 16)], history_length=5, seed=1
    )
    batch = batches.batch(0)
    history = {
        (int(samples.query_rows[i]), int(samples.candidate_rows[i])): samples.history(i)
        for i in range(len(samples))
    }
    pairs = zip(batch["query_row"].numpy(), batch["candidate_row"].numpy(), strict=True)
    rows = np.stack([history_rows(history[int(q), int(c)], 5) for q, c in pairs])
    queries = model.embed_queries(batch["query_row"], tf.constant(rows)).numpy()
    corpus = model.embed_corpus()
    columns = batch["easy_candidate_row"].numpy()
    losses = []
    for i, query in enumerate(queries):
        own = query @ corpus[batch["candidate_row"][i] - 1] / 0.2
        if correct_positive:
            own -= np.log(16 / corpus.shape[0])
        logits = query @ corpus[columns - 1].T / 0.2 - batch["log_q"].numpy()[0]
        kept = logits[batch["is_counted"].numpy()[i]]
        losses.append(np.log(np.exp(own) + np.exp(kept).sum()) - own)
    assert model.compute_loss(batch).numpy() == pytest.approx(np.mean(losses), rel=1e-4)


def set_batch(problem: Problem) -> dict[str, tf.Tensor]:
    samples = dataclasses.replace(problem.samples, num_earlier=None)
    batches = UserSetBatches(
        samples,
        batch_size=32,
        easy_negatives=[(0.0, 10), (0.5, 6)],
        history_length=2,
        seed=1,
        positive_weight=np.linspace(1, 2, NUM_CANDIDATES + 1),
    )
    return batches.batch(1)


@pytest.mark.parametrize("poolings", [("mean", "recency"), ("attention",)])
@pytest.mark.parametrize("correct_positive", [False, True])
def test_users_as_sets_have_the_loss_of_single_positives(
    problem: Problem, poolings: tuple[str, ...], correct_positive: bool
) -> None:
    """The loss, its gradients and the diagnosis, against a query of its own for each positive."""
    model = problem.model(
        history_pooling=poolings,
        temperature=0.2,
        correct_positive=correct_positive,
        share_item_embedding=True,
        use_user_id=True,
    )
    batch = set_batch(problem)
    of_positive = batch["positive_query"]
    assert len(of_positive) > len(batch["query_row"])
    repeated = {name: value for name, value in batch.items() if name != "positive_query"}
    for name in ("query_row", "history_rows", "is_counted"):
        repeated[name] = tf.gather(batch[name], of_positive)
    losses, gradients = [], []
    for inputs in (batch, repeated):
        with tf.GradientTape() as tape:
            losses.append(model.compute_loss(inputs))
        gradients.append(tape.gradient(losses[-1], model.trainable_variables))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    for got, expected in zip(*gradients, strict=True):
        if expected is not None:
            np.testing.assert_allclose(
                tf.convert_to_tensor(got), tf.convert_to_tensor(expected), rtol=1e-4, atol=1e-6
            )
    whole, single = model.diagnose(batch), model.diagnose(repeated)
    assert whole["masked_share"] > 0
    for name in single.keys() - {"norm/query"}:
        np.testing.assert_allclose(whole[name], single[name], rtol=1e-6)


@pytest.mark.parametrize("poolings", [("mean", "recency"), ("attention",)])
def test_histories_may_be_as_wide_as_the_longest_or_padded(
    problem: Problem, poolings: tuple[str, ...]
) -> None:
    model = problem.model(history_pooling=poolings)
    batch = set_batch(problem)
    for rows in (batch["history_rows"], batch["history_rows"][:, :0]):
        padded = tf.pad(rows, [[0, 0], [0, 5 - rows.shape[1]]])
        narrow, wide = (model.compute_loss({**batch, "history_rows": x}) for x in (rows, padded))
        np.testing.assert_allclose(narrow, wide, rtol=1e-6)


def test_a_bias_is_added_to_the_score(problem: Problem) -> None:
    plain, biased = (problem.model(candidate_bias=has_bias) for has_bias in (False, True))
    bias = np.linspace(-1, 1, 25).astype(np.float32)[:, None]
    of_plain = {variable.name: variable for variable in plain.weights}
    for variable in biased.weights:
        if "bias/embeddings" in variable.name:
            variable.assign(bias)
        elif "corpus_embeddings" not in variable.name:  # One entry longer, and filled anew.
            variable.assign(of_plain[variable.name])
    pairs = {
        "query_row": tf.constant([1, 2, 0]),
        "history_rows": tf.constant([[3, 4, 0, 0, 0]] * 3),
        "candidate_row": tf.constant([7, 24, 1]),
    }
    np.testing.assert_allclose(biased(pairs), plain(pairs) + bias[[7, 24, 1], 0], rtol=1e-5)
    assert biased.embed_corpus().shape == (24, 9)


def test_a_shared_embedding_is_read_by_both_towers(problem: Problem) -> None:
    model = problem.model(share_item_embedding=True)
    tables = [v for v in model.trainable_variables if v.shape == (25, 8)]
    assert len(tables) == 1
    batch = problem.batches().batch(tf.constant(0, tf.int64))
    rows = batch["history_rows"]
    with tf.GradientTape() as tape:
        queries = model.embed_queries(batch["query_row"], rows)
    gradient = tf.convert_to_tensor(tape.gradient(queries, tables[0])).numpy()
    assert set(np.flatnonzero(np.abs(gradient).sum(axis=1))) == set(np.unique(rows)) - {0}


def test_weights_scale_the_rows(problem: Problem) -> None:
    model = problem.model()
    batch = dict(next(iter(problem.batches().dataset(0, 1))))
    whole = model.compute_loss(batch)
    batch["weight"] = tf.one_hot(4, 32)
    one = model.compute_loss(batch)
    batch["weight"] = tf.ones(32) - tf.one_hot(4, 32)
    rest = model.compute_loss(batch)
    assert 32 * whole.numpy() == pytest.approx(one.numpy() + 31 * rest.numpy(), rel=1e-5)


@pytest.mark.parametrize("suffix", ["", ".keras"])
def test_saved_and_loaded_by_keras(problem: Problem, tmp_path: Path, suffix: str) -> None:
    model = problem.model()
    model.compile(optimizer=tf.keras.optimizers.Adam(0.01))
    model.fit(problem.batches().dataset(0, 4), epochs=1, verbose=0)
    model.save(tmp_path / f"model{suffix}")
    loaded = tf.keras.models.load_model(tmp_path / f"model{suffix}")
    assert isinstance(loaded, TwoTowerModel)
    np.testing.assert_allclose(loaded.embed_corpus(), model.embed_corpus(), rtol=1e-6)
    pairs = {
        "query_row": tf.constant([1, 0]),
        "history_rows": tf.constant([[3, 4, 0, 0, 0]] * 2),
        "candidate_row": tf.constant([7, 8]),
    }
    np.testing.assert_allclose(loaded(pairs), model(pairs), rtol=1e-6)


def test_saved_by_tf_saved_model(problem: Problem, tmp_path: Path) -> None:
    model = problem.model()
    tf.saved_model.save(model, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    rows = tf.constant([[1, 2, 0, 0, 0]])
    answer = loaded.signatures["serving_default"](
        query_row=tf.constant([1]), history_rows=rows, candidate_row=tf.constant([5])
    )
    expected = model(
        {"query_row": tf.constant([1]), "history_rows": rows, "candidate_row": tf.constant([5])}
    )
    np.testing.assert_allclose(next(iter(answer.values())), expected, rtol=1e-6)


def test_training_keeps_the_best_epoch_and_stops(problem: Problem) -> None:
    model = problem.model()
    result = train(
        model,
        problem.batches(),
        max_epochs=30,
        optimizer="adam",
        learning_rate=0.02,
        validation=evaluation_data(problem),
        monitor="ndcg@8",
        patience=2,
    )
    values = result.history["val_ndcg@8"]
    assert result.best_epoch == int(np.argmax(values)) + 1
    assert len(values) == min(30, result.best_epoch + 2)
    kept = model.evaluate(evaluation_data(problem), verbose=0, return_dict=True)
    assert kept["ndcg@8"] == pytest.approx(max(values), abs=1e-6)
    with pytest.raises(ValueError, match="Cannot monitor 'ndcg@9'"):
        train(
            model,
            problem.batches(),
            max_epochs=1,
            validation=evaluation_data(problem),
            monitor="ndcg@9",
        )


class Stopped(Exception):
    """Stands for a kill in the middle of a run."""


@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "lazy_adam"])
@pytest.mark.parametrize("positions", ["one", "all"])
def test_a_stopped_run_goes_on_bit_for_bit(
    problem: Problem, tmp_path: Path, optimizer: str, positions: str
) -> None:
    options: dict[str, Any] = {}
    batches: TrainingBatches = problem.batches()
    if positions == "all":
        options = {
            "history_pooling": ("mean", "attention"),
            "unknown_rate": 0.1,
            "feature_dropout": 0.2,
            "share_item_embedding": True,
            "candidate_bias": True,
        }
        batches = SequenceBatches(
            problem.samples, batch_size=32, easy_negatives=[(0.5, 16)], history_length=5, seed=1
        )
    start = problem.model(**options).get_weights()

    def run(folder: Path | None, stop_after: int | None = None) -> list[np.ndarray]:
        model = problem.model(**options)
        model.set_weights(start)

        def on_epoch(epoch: int, logs: dict[str, float]) -> None:
            if epoch == stop_after:
                raise Stopped

        train(
            model,
            batches,
            max_epochs=5,
            optimizer=optimizer,  # type: ignore[arg-type]
            checkpoint_folder=folder,
            on_epoch=on_epoch,
        )
        return model.get_weights()

    unbroken = run(None)
    with pytest.raises(Stopped):
        run(tmp_path, stop_after=2)
    resumed = run(tmp_path)
    again = run(tmp_path)
    for expected, got, kept in zip(unbroken, resumed, again, strict=True):
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(kept, expected)
