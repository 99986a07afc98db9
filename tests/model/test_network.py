"""The network's loss, recomputed from the samples and the documented arithmetic; its embeddings."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.model.conftest import LENGTH, LOSERS, NUM_ITEMS, scores_of, tiny
from tests.model.test_two_tower import EveryCandidate
from tests.small_batches import as_arrays
from tfrs_pipeline import Batch, Popularity, Samples, TrainingSet, Uniform
from tfrs_pipeline.features.raw import NO_TIME
from tfrs_pipeline.model import tf_tables
from tfrs_pipeline.model.network import TwoTowerNetwork
from tfrs_pipeline.model.towers import FeatureTable, candidate_tower, query_tower

B, TEMPERATURE = 32, 0.4
UNIFORM, POPULAR = Uniform(16), Popularity(8, alpha=1.0)


def slow_loss(network: TwoTowerNetwork, samples: Samples, batch: Batch, num_popular: int) -> float:
    """Returns a batch's mean loss, with queries, weights and masks from the samples themselves."""
    batch = as_arrays(batch)
    counts, corpus = samples.counts, network.embed_corpus()
    n = num_popular * counts / counts.sum() + 16 / NUM_ITEMS
    pairs = np.stack([samples.query_rows, samples.candidate_rows], axis=1).tolist()
    positives = batch.candidate_row.tolist()
    window = np.arange(len(positives)) if batch.positive_query is None else batch.positive_query
    users = batch.query_row[window]
    index = [pairs.index(list(pair)) for pair in zip(users.tolist(), positives, strict=True)]
    if samples.num_earlier is None:  # In sets, a coin decides what is read.
        histories = batch.history_rows[window]
    else:
        histories = samples.latest(np.array(index), network.history_length)
    queries = network.embed_queries(tf.constant(users), tf.constant(histories)).numpy()
    losses, weights = [], []
    for i, w, user, positive, query in zip(
        index, window, users.tolist(), positives, queries, strict=True
    ):
        scores = np.concatenate([[0], corpus @ query / TEMPERATURE])
        never = {positive, *samples.known_positives[user], *samples.exposed[user]}
        drawn = [] if batch.hard is None else batch.hard.candidate_row[w].tolist()
        hard = [row for row in drawn if row not in {0, *never}]
        share = LOSERS.share if hard else 0.0
        own = scores[positive]
        total = np.exp(own)
        for row in batch.shared_row.tolist():
            total += np.exp(scores[row]) * (1 - share) / n[row] * (row not in never)
        for row in hard:
            total += np.exp(scores[row]) * share * NUM_ITEMS / len(hard)
        losses.append(np.log(total) - own)
        weights.append(samples.weights[i])
    return float(np.average(losses, weights=weights))


@pytest.fixture(scope="module")
def weighted(data: TrainingSet) -> TrainingSet:
    """Returns the samples with weights from 1 to 2; exposures and losers stay as they are."""
    weights = np.linspace(1, 2, len(data.samples), dtype=np.float32)
    return dataclasses.replace(data, samples=dataclasses.replace(data.samples, weights=weights))


@pytest.mark.parametrize(("examples", "options"), [
    ("single", {"hard": LOSERS, "history_length": 2}),
    ("sequences", {"hard": LOSERS, "history_pooling": ["recency", "attention"]}),
    ("sets", {"history_pooling": ["mean", "attention"]}),
])  # fmt: skip
def test_the_loss_is_that_of_a_loop(
    weighted: TrainingSet, examples: str, options: dict[str, Any]
) -> None:
    options = {"use_user_id": True, "share_item_embedding": True, **options}
    if examples != "single":
        options["negatives"] = [UNIFORM, POPULAR]
    model = tiny(temperature=TEMPERATURE, training={"examples": examples}, **options)
    samples = weighted.samples
    if examples == "sets":
        samples = dataclasses.replace(samples, num_earlier=None)
    network, batch = model.build(weighted.corpus), model.batches(samples).batch(3)
    assert not batch.is_counted.numpy().all()
    if "hard" in options:
        assert np.count_nonzero(batch.hard.is_counted) > 0
    num_popular = B - 1 if examples == "single" else POPULAR.num
    expected, got = slow_loss(network, samples, batch, num_popular), network.compute_loss(batch)
    assert got.numpy() == pytest.approx(expected, rel=1e-4)
    # Dropout is on only in training, and is a function of the batch.
    trained = [network.compute_loss(batch, training=True).numpy() for _ in range(2)]
    assert trained[0] == trained[1] != got.numpy()
    if batch.history_rows is not None:  # Padding must change nothing.
        more = [[0, 0], [0, 2]]
        wide = batch._replace(history_rows=tf.pad(batch.history_rows, more)[:, :LENGTH])
        if (times := batch.history_times) is not None:
            times = tf.pad(times, more, constant_values=NO_TIME)[:, : LENGTH + 1]
            wide = wide._replace(history_times=times)
        assert network.compute_loss(wide).numpy() == pytest.approx(expected, rel=1e-4)


def test_sampled_gradients_come_to_those_of_the_full_softmax(data: TrainingSet) -> None:
    """The relative error of a mean of thousands of draws is at most 1 / sqrt(6000 / 24)."""
    negatives, tolerance = (Uniform(3000), Popularity(3000, 0.75)), 0.05
    tf.keras.utils.set_random_seed(1)
    network = tiny(negatives=[EveryCandidate()], temperature=TEMPERATURE).build(data.corpus)
    variables = [*network.trainable_variables]

    @functools.cache
    def gradient(kinds: tuple[Any, ...]) -> np.ndarray:
        batch = tiny(negatives=kinds).batches(data.samples).batch(0)
        with tf.GradientTape() as tape:
            loss = network.compute_loss(batch)
        gradients = tape.gradient(loss, variables)
        return np.concatenate([tf.convert_to_tensor(g).numpy().ravel() for g in gradients])

    full, sampled = gradient((EveryCandidate(),)), gradient(negatives)
    assert np.linalg.norm(sampled - full) < tolerance * np.linalg.norm(full)
    few = gradient((Uniform(8),))
    assert np.linalg.norm(few - full) > 2 * tolerance * np.linalg.norm(full)


@pytest.mark.usefixtures("in_eager_steps")
def test_fit_reports_the_weighted_mean_loss_of_the_epoch(weighted: TrainingSet) -> None:
    model = tiny()
    network, batches = model.build(weighted.corpus), model.batches(weighted.samples)
    network.compile(optimizer=tf.keras.optimizers.SGD(0.0))
    losses = [network.compute_loss(batches.batch(i), training=True).numpy() for i in range(3)]
    weights = [batches.batch(i).weight.numpy().sum() for i in range(3)]
    history = network.fit(batches.dataset(0, 3), verbose=0).history
    assert history["loss"][0] == pytest.approx(np.average(losses, weights=weights), rel=1e-5)


def test_corpus_is_embedded_in_blocks(data: TrainingSet, monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny().build(data.corpus)
    at_once = network.embed_candidates(tf.range(1, NUM_ITEMS + 1)).numpy()
    np.testing.assert_allclose(network.embed_corpus(), at_once, rtol=1e-6)
    monkeypatch.setattr(tf_tables, "CORPUS_BLOCK", 7)
    np.testing.assert_allclose(network.embed_corpus(), at_once, rtol=1e-6)


def test_a_bias_is_added_to_the_score(data: TrainingSet) -> None:
    plain, biased = (tiny(candidate_bias=has).build(data.corpus) for has in (False, True))
    bias = np.linspace(-1, 1, NUM_ITEMS + 1).astype(np.float32)[:, None]
    of_plain = {variable.name: variable for variable in plain.weights}
    for variable in biased.weights:
        is_bias = "bias/embeddings" in variable.name
        variable.assign(bias if is_bias else of_plain[variable.name])
    scores, with_bias = map(scores_of, (plain, biased))
    np.testing.assert_allclose(with_bias, scores + bias[1:, 0], rtol=1e-5, atol=1e-6)
    assert biased.embed_corpus().shape == (NUM_ITEMS, 9)


def test_a_shared_embedding_is_read_by_both_towers(data: TrainingSet) -> None:
    """Without candidate ids, histories have a table of their own."""
    for candidate_id in (False, True):
        network = tiny(use_candidate_id=candidate_id).build(data.corpus)
        (table,) = [v for v in network.trainable_variables if v.shape == (NUM_ITEMS + 1, 8)]
        assert ("history_item" in table.name) != candidate_id
    with tf.GradientTape() as tape:
        queries = network.embed_queries(tf.constant([1]), tf.constant([[3, 9, 0]]))
    gradient = tf.convert_to_tensor(tape.gradient(queries, table)).numpy()
    assert set(np.flatnonzero(np.abs(gradient).sum(axis=1))) == {3, 9}


@pytest.mark.parametrize("poolings", [["mean"], ["mean", "recency"]])
@pytest.mark.parametrize("has_other_layers", [False, True])
def test_a_shared_item_is_read_with_its_features(
    data: TrainingSet, has_other_layers: bool, poolings: list[str]
) -> None:
    """A history of one item is embedded as that item: its id, its genre and the layers over both.

    With several poolings, this holds before training.
    """
    options = {"share_item_embedding": True, "history_pooling": poolings}
    network = tiny(**options).build(data.corpus)
    if has_other_layers:  # A query tower that only sums, and a candidate tower with a layer.
        settings = tiny(**{**options, "hidden_layers": [5]}).settings
        table = FeatureTable(data.corpus, "candidate")
        candidate = candidate_tower(settings, data.corpus)
        summing = tiny(**options).settings
        query = query_tower(summing, data.corpus, candidate, table)
        network = TwoTowerNetwork(query, candidate, summing, data.corpus, table, "mixed")
    histories = np.zeros((NUM_ITEMS, LENGTH), np.int32)
    histories[:, 0] = np.arange(1, NUM_ITEMS + 1)
    users = tf.zeros([NUM_ITEMS], tf.int32)
    queries = network.embed_queries(users, tf.constant(histories))
    np.testing.assert_allclose(queries, network.embed_corpus(), rtol=1e-5, atol=1e-6)


def test_without_a_correction_the_logits_stay_as_they_are(data: TrainingSet) -> None:
    model = tiny(hard=LOSERS, correction="none")
    network, batch = model.build(data.corpus), model.batches(data.samples).batch(0)
    assert batch.hard is not None
    hard = batch.hard._replace(log_q=tf.zeros_like(batch.hard.log_q))
    uncorrected = batch._replace(log_q=tf.zeros_like(batch.log_q), hard=hard)
    corrected = tiny(hard=LOSERS).build(data.corpus)
    corrected.set_weights(network.get_weights())
    expected = corrected.compute_loss(uncorrected).numpy()
    assert network.compute_loss(batch).numpy() == pytest.approx(expected, rel=1e-6)
    assert abs(corrected.compute_loss(batch).numpy() - expected) > 0.05


def test_towers_that_do_not_go_together_are_refused(data: TrainingSet) -> None:
    def zeros(*size: int) -> tf.keras.layers.Layer:
        return tf.keras.layers.Lambda(lambda x: tf.zeros([tf.shape(x["row"])[0], *size]))

    three, four, same = zeros(3), zeros(4), r"must return \[n, D\], the same D.*"
    wrong: tuple[tuple[Any, Any, dict[str, Any], str], ...] = (
        (three, four, {}, same + r"\(1, 3\) of the query tower, \(1, 4\) of"),
        (zeros(2, 3), zeros(2, 3), {}, same + r"\(1, 2, 3\)"),
        (zeros(8), None, {"candidate_bias": True}, r"more with .*candidate_bias.* \(1, 9\) of"),
    )
    for query, candidate, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            tiny(query_tower=query, candidate_tower=candidate, **options).build(data.corpus)
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        with pytest.raises(ValueError, match=r"policy float32\. Received: 'mixed_bfloat16'"):
            tiny().build(data.corpus)
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")


@pytest.mark.parametrize(
    ("name", "dtype"), [("query_tower", "float16"), ("candidate_tower", "float64")]
)
def test_towers_must_return_float32(data: TrainingSet, name: str, dtype: str) -> None:
    """A tower may compute in any precision if its last layer returns float32."""

    class Narrow(tf.keras.layers.Layer):
        def __init__(self, last: str) -> None:
            super().__init__(dtype=last)
            self.embedding = tf.keras.layers.Embedding(NUM_ITEMS + 1, 8, dtype=dtype)
            self.last = tf.keras.layers.Dense(8, dtype=last)

        def call(self, inputs: Any, training: bool = False) -> tf.Tensor:
            return self.last(self.embedding(inputs["row"]))

    with pytest.raises(ValueError, match=rf'{name} must .*dtype="float32".*Received: {dtype}'):
        tiny(**{name: Narrow(dtype)}).build(data.corpus)
    network = tiny(**{name: Narrow("float32")}).build(data.corpus)
    assert network.embed_corpus().dtype == np.float32
