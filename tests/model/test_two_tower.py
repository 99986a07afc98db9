"""The facade: fitting and retrieval; own towers and negatives; what an export asks for."""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import tfrs_pipeline as tp
from tests.model.conftest import LENGTH, NUM_ITEMS, NUM_TASTES, NUM_USERS, tiny
from tests.tracing import tracing_once
from tfrs_pipeline import ConfigError, DataError, FunnelLosers, InBatch, Log, TwoTower, messages
from tfrs_pipeline.model import fit
from tfrs_pipeline.model.corpus import Corpus, TrainingSet

EASY = [tp.Uniform(16), tp.Popularity(16, 1.0)]


@dataclass(frozen=True)
class EveryCandidate:
    """An own kind that draws the whole corpus once, so that the loss is the full softmax."""

    def draw(self, frame: tp.SamplingFrame, positive_rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return tf.range(1, frame.num_candidates + 1)

    def expected_count(self, frame: tp.SamplingFrame) -> np.ndarray:
        return np.minimum(np.arange(frame.num_candidates + 1.0), 1.0)


@dataclass(frozen=True)
class Weighed(EveryCandidate):
    """An own kind with an array, so that two objects of it cannot be compared."""

    weights: np.ndarray


class OwnCandidates(tf.keras.layers.Layer):
    """A trainable vector for each item of a corpus."""

    def __init__(self, corpus: Corpus, dim: int = 6) -> None:
        super().__init__()
        self.table = tf.keras.layers.Embedding(len(corpus.candidate_ids) + 1, dim)

    def call(self, inputs: dict[str, Any], training: bool = False) -> tf.Tensor:
        assert set(inputs["features"]) == {"genre"}
        return self.table(inputs["row"])


class OwnQueries(tf.keras.layers.Layer):
    """The sum of the history's vectors; rows are hashed, so it fits any corpus."""

    def __init__(self) -> None:
        super().__init__()
        self.table = tf.keras.layers.Embedding(64, 6)

    def call(self, inputs: dict[str, Any], training: bool = False) -> tf.Tensor:
        vectors = self.table(inputs["history_rows"] % 64)
        is_item = (inputs["history_rows"] > 0)[:, :, tf.newaxis]
        return tf.reduce_sum(self.masked(vectors, is_item), axis=1)

    @tf.function  # Without it, a tower may not branch on tensors.
    def masked(self, vectors: tf.Tensor, is_item: tf.Tensor) -> tf.Tensor:
        if tf.reduce_any(is_item):
            return tf.where(is_item, vectors, 0.0)
        return tf.zeros_like(vectors)


def share_of_own_taste(model: tp.FittedTwoTower) -> float:
    """Returns the share of each user's top two new items that match the taste: 1/9 at random."""
    known_positives = model.exportable().known_positives
    known = [10 * known_positives[row] for row in range(1, NUM_USERS + 1)]
    queries = [{"user_id": 101 + i, "history": ids} for i, ids in enumerate(known)]
    # 2 of the 18 items left are of the own taste; training used them as this user's negatives.
    ids, _ = model.retrieve(queries, 2, [list(x) for x in known])
    return float(np.mean(np.arange(NUM_USERS) % NUM_TASTES == (ids // 10 - 1).T % NUM_TASTES))


SHARES: list[float] = []


@pytest.fixture(scope="module")
def fitted(data: TrainingSet, split: tp.Split) -> tp.FittedTwoTower:
    """Returns the model of seed 0; puts the `share_of_own_taste` of all three seeds into SHARES."""
    training = {"max_epochs": 12, "learning_rate": 0.05}
    with tracing_once():
        for seed in (2, 1, 0):
            plan = tiny(use_user_id=True, seed=seed, training=training)
            model = plan.fit_samples(data, split.validation)
            SHARES.append(share_of_own_taste(model))
    return model


@pytest.mark.parametrize(("examples", "options"), [
    ("sequences", {"negatives": EASY, "history_pooling": ["recency"]}),
    ("sets", {"negatives": EASY}),
    ("single", {"negatives": [EveryCandidate()], "query_tower": OwnQueries(),
     "candidate_tower": OwnCandidates, "temperature": 1.0}),
], ids=["sequences", "sets", "own towers and negatives"])  # fmt: skip
def test_every_way_learns_the_tastes(
    log: Log, data: TrainingSet, examples: str, options: dict[str, Any]
) -> None:
    training = {"examples": examples, "max_epochs": 20, "learning_rate": 0.05}
    model = tiny(training=training, **options).fit_samples(data)
    assert share_of_own_taste(model) > 0.6
    assert isinstance(model.network.query_tower, OwnQueries) == (examples == "single")
    losses = model.result.history["loss"]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.3


def test_fit_finds_the_users_tastes(fitted: tp.FittedTwoTower) -> None:
    """The mean of three seeds: for one seed, the share of the 60 items found varies by 1/20."""
    assert np.mean(SHARES) > 0.9
    assert repr(tiny()) == "TwoTower(dim 8, negatives InBatch, Uniform)"
    assert repr(FunnelLosers()) in repr(tiny(hard=FunnelLosers()))
    assert repr(fitted) == f"FittedTwoTower(dim 8, {NUM_ITEMS} items, {NUM_USERS} users)"


def test_scores_are_the_products_of_embeddings(fitted: tp.FittedTwoTower) -> None:
    """`test_retriever_contract.py` tests the contract of all retrievers."""
    queries: list[Any] = [{"user_id": 101, "history": [10, 40, 70, 100]}, {"user_id": 7}, {}]
    embedded = fitted.query_embeddings(queries) @ fitted.network.embed_corpus().T
    ids, scores = fitted.retrieve(queries, NUM_ITEMS)
    np.testing.assert_array_equal(ids, 10 * (np.argsort(-embedded, axis=1) + 1))
    np.testing.assert_allclose(scores, -np.sort(-embedded, axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(embedded[1], embedded[2])  # An unknown user, and no user.


def test_what_an_export_asks_for_is_of_the_whole_log(fitted: tp.FittedTwoTower, log: Log) -> None:
    events = log.events.to_pandas().sort_values("timestamp", kind="stable")
    clicks = events[events["stage"] == "clicked"]
    exported = fitted.exportable()
    assert len(exported.histories) == len(exported.known_positives) == NUM_USERS + 1
    assert not len(exported.histories[0])
    for row, user in enumerate(exported.query_ids, 1):
        rows = clicks["item_id"][clicks["user_id"] == user].to_numpy() // 10
        assert len(rows) == 6  # Including those of validation and test.
        np.testing.assert_array_equal(exported.histories[row], rows[::-1])
        np.testing.assert_array_equal(exported.known_positives[row], np.sort(rows))
    np.testing.assert_array_equal(exported.query_ids, 101 + np.arange(NUM_USERS))
    np.testing.assert_array_equal(exported.candidate_ids, 10 * np.arange(1, NUM_ITEMS + 1))
    assert exported.items["item_id"].to_pylist() == exported.candidate_ids.tolist()
    assert (exported.reading, exported.items_read) == (log.reading, log.items_read)
    assert [feature.name for feature in exported.candidate_features] == ["genre"]
    assert (exported.query_features, exported.history_length) == ((), LENGTH)
    rows, network = tf.range(1, NUM_ITEMS + 1), fitted.network
    np.testing.assert_allclose(exported.embed_candidates(rows), network.embed_corpus(), rtol=1e-6)
    query = exported.embed_queries(tf.constant([1]), tf.constant([[7, 4, 0]]))
    by_id = fitted.query_embeddings([{"user_id": 101, "history": [40, 70]}])
    np.testing.assert_allclose(query, by_id, rtol=1e-6)
    # The feature is read: another value gives another embedding.
    other = {"genre": tf.roll(network.candidate_table(rows)["genre"], 1, axis=0)}
    assert (exported.embed_candidates(rows, other) != exported.embed_candidates(rows)).numpy().any()
    held = {id(variable) for variable in exported.variables}
    assert {id(variable) for variable in network.trainable_variables} <= held


@pytest.mark.usefixtures("in_eager_steps")
def test_a_plan_is_fitted_several_times(
    log: Log, data: TrainingSet, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"max_epochs": 1, "validation_users": 7}
    query = [{"user_id": 101, "history": [40, 70]}]
    plan = tiny(training=training)
    first = plan.fit_samples(data)
    before = first.query_embeddings(query)
    assert "epoch" not in capsys.readouterr().err  # Stderr is not a terminal.
    other = log.split("last_n", validation=2, test=2)
    monkeypatch.setattr(messages, "SECONDS_BETWEEN_LINES", 0.0)  # As if an epoch took long.
    again = plan.fit(other.train, other.validation, folder=tmp_path, verbose=True)
    loss, printed = again.result.history["loss"][0], capsys.readouterr().err
    assert f"epoch 1/1: loss {loss:.3f}, validation ndcg@5 " in printed
    told = re.findall(r"epoch 1: (\d+)/(\d+) steps", printed)
    assert told == [(str(step + 1), str(len(told))) for step in range(len(told))] != []
    assert again.exportable().items.num_rows == other.train.items.count().to_pyarrow().as_py()
    rows = again.network.embed_queries(tf.constant([1]), tf.constant([[7, 4, 0]]))
    np.testing.assert_allclose(again.query_embeddings(query), rows, rtol=1e-6)
    assert np.abs(again.query_embeddings(query) - before).max() > 1e-3
    np.testing.assert_array_equal(first.query_embeddings(query), before)
    # Validation ranks a sample of the users.
    sample = other.validation.sample(7, plan.seed)
    assert len(sample) == 7
    measured = tp.evaluate(again, sample, cutoffs=(5, 100), num_bootstrap=0).first
    expected = measured.overall.intervals["ndcg@5"].mean
    assert again.result.history["val_ndcg@5"] == [pytest.approx(expected)]
    # A new plan gives the same: nothing of the first fit is left. It finds samples and checkpoints.
    new = tiny(training=training).fit(other.train, other.validation, folder=tmp_path)
    np.testing.assert_array_equal(new.query_embeddings(query), again.query_embeddings(query))
    assert new.result.history == again.result.history


@pytest.mark.usefixtures("in_eager_steps")
def test_a_folder_is_refused_to_another_training(log: Log, tmp_path: Path) -> None:
    training, other = {"max_epochs": 1}, log.split("last_n", validation=2, test=2)
    again = tiny(training=training).fit(other.train, other.validation, folder=tmp_path)
    # Changes to the plan, and to what it is fitted to.
    otherwise: tuple[tuple[dict[str, Any], dict[str, Any], str], ...] = (
        ({"training": {**training, "learning_rate": 0.5}}, {}, "learning_rate: 0.02, now 0.5"),
        ({"temperature": 0.9}, {}, "temperature: .*, now 0.9"),
        ({"seed": 9}, {}, "seed: 0, now 9"),
        ({"query_tower": OwnQueries()}, {}, "query_tower: None, now 'OwnQueries'"),
        (
            {"negatives": [*TwoTower().negatives, EveryCandidate()]},
            {},
            r"own_negatives: \[\], now \['EveryCandidate'\]",
        ),
        ({}, {"train": log}, "log: "),
        ({}, {"validation": None}, r"validation: '[0-9a-f]+', now None"),
        ({}, {"validation": other.test}, r"validation: '[0-9a-f]+', now '"),
        ({}, {"exclude": "none"}, "exclude: 'clicked', now 'none'"),
        ({}, {"warm_start": again}, "warm_start: False, now True"),
    )
    for changes, options, differ in otherwise:
        given = {"train": other.train, "validation": other.validation, "folder": str(tmp_path)}
        with pytest.raises(ValueError, match=rf"made of something else \(.*{differ}"):
            tiny(**{"training": training, **changes}).fit(**given | options)
    warm: dict[str, Any] = {"folder": tmp_path / "warm", "warm_start": again}
    for _ in range(2):
        tiny(training=training).fit(other.train, **warm)


@pytest.mark.usefixtures("in_eager_steps", "trusted_exports", "few_signatures")
def test_users_without_a_positive_are_answered_as_unknown_ones(tmp_path: Path) -> None:
    """Users who occur only in the test or in exposures have a row that nothing has trained."""
    rows = [(user, item, "clicked") for user in range(1, 9) for item in range(user, user + 4)]
    rows += [(user, 3, "exposed") for user in (0, 20)]
    log = Log.from_table(pd.DataFrame(rows, columns=["user_id", "item_id", "stage"]))
    model = tiny(use_user_id=True, training={"max_epochs": 1, "batch_size": 8}).fit(log)
    users = [{"user_id": user} for user in (99, 0, 20, 1, 2)]
    found = model.query_embeddings(users)
    np.testing.assert_array_equal(found[1:3], found[[0, 0]])
    assert np.abs(found[3:] - found[0]).max(axis=1).min() > 1e-3
    # If a query has a history, the history decides.
    by_history = model.query_embeddings([{"user_id": u, "history": [4]} for u in (20, 99)])
    np.testing.assert_array_equal(by_history[0], by_history[1])
    assert np.abs(by_history[0] - found[0]).max() > 1e-3
    # So does an export; it needs user data, although the first user has no embedding.
    loaded = tp.load(tp.export(model, tmp_path / "m", index=tp.Exact()))
    asked: list[Any] = [{**user, "history": [4]} for user in users]
    found = model.query_embeddings(asked)
    assert np.abs(found[3] - found[0]).max() > 1e-3
    np.testing.assert_allclose(loaded.embed_queries(asked), found, atol=1e-5)
    with pytest.raises(ValueError, match="use_user_id=False"):
        tp.export(model, tmp_path / "left_out", user_data=False)


@pytest.mark.usefixtures("in_eager_steps")
def test_an_order_that_the_log_has_not_is_told() -> None:
    clicks = pd.DataFrame({"user_id": np.arange(40) % 5, "item_id": np.arange(40) % 9})
    training = {"max_epochs": 1}
    log = Log.from_table(clicks, reading=tp.Reading(is_ordered=False))
    for pooling in (["recency", "mean"], ["mean"]):
        notes = tiny(history_pooling=pooling, training=training).fit(log).notes
        told = "model.history_pooling recency reads the order of a history, and the log has none"
        assert any(note.startswith(told) for note in notes) == ("recency" in pooling)


def test_settings_are_given_by_name_or_as_a_table() -> None:
    settings = tp.TwoTowerSettings(dim=32, temperature=0.2, hard={"kind": "funnel"})
    model = TwoTower(**{**dict(settings), "dim": 16, "negatives": ["uniform:num=5"]})
    assert (model.settings.dim, model.settings.temperature) == (16, 0.2)
    assert model.settings.hard == settings.hard
    assert model.negatives == model.settings.negatives == (tp.Uniform(5),)
    # Own kinds are kept apart from the settings, which can be written to a file.
    own = TwoTower(negatives=[EveryCandidate(), InBatch()])
    assert own.negatives == (InBatch(), EveryCandidate())
    assert own.settings.negatives == (InBatch(),)
    two = [Weighed(np.ones(3)), Weighed(np.arange(3))]
    assert [id(kind) for kind in TwoTower(negatives=two).negatives] == [id(kind) for kind in two]
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        TwoTower(temprature=0.1)
    names = set(inspect.signature(TwoTower).parameters)
    assert names > {*tp.TwoTowerSettings.model_fields, "training", "query_tower", "seed", "name"}


@pytest.mark.parametrize(
    ("tower", "received"),
    [(lambda corpus: None, "None, from <function"), (keras.layers.Dense(4), "<Dense ")],
    ids=["a function without return", "a layer of Keras 3"],
)
@pytest.mark.parametrize("name", ["query_tower", "candidate_tower"])
def test_own_towers_are_checked(data: TrainingSet, name: str, tower: Any, received: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a layer of tf.keras.*: {received}"):
        tiny(**{name: tower}).build(data.corpus)


class OfSequences(OwnQueries):
    """Sums, for each position, the prefix of the sequence that is its history."""

    def call(self, inputs: dict[str, Any], training: bool = False) -> tf.Tensor:
        if "sequence_rows" not in inputs:
            return super().call(inputs)
        vectors = self.table(inputs["sequence_rows"])
        is_item = tf.cast(inputs["sequence_rows"] > 0, tf.float32)[:, :, tf.newaxis]
        sums = tf.cumsum(tf.pad(vectors * is_item, [[0, 0], [1, 0], [0, 0]]), axis=1)
        return tf.gather(tf.reshape(sums, [-1, 6]), inputs["state"])


def test_an_own_tower_that_does_not_read_sequences_is_refused_when_built(data: TrainingSet) -> None:
    training = {"examples": "sequences", "batch_size": 64}
    options: dict[str, Any] = {"candidate_tower": OwnCandidates, "negatives": EASY}
    with pytest.raises(KeyError, match="history_rows") as error:
        tiny(query_tower=OwnQueries(), training=training, **options).build(data.corpus)
    assert "gives the query_tower sequence_rows and state" in error.value.__notes__[0]
    tiny(query_tower=OfSequences(), training=training, **options).build(data.corpus)

    class Misspelt(OfSequences):
        def call(self, inputs: dict[str, Any], training: bool = False) -> tf.Tensor:
            return super().call(inputs["features"]["colour"] and inputs)

    with pytest.raises(KeyError, match="colour"):
        tiny(query_tower=Misspelt(), training=training, **options).build(data.corpus)


@pytest.mark.usefixtures("in_eager_steps")
def test_an_own_layer_is_of_one_training(data: TrainingSet) -> None:
    layer = OwnQueries()
    options: dict[str, Any] = {"candidate_tower": OwnCandidates, "training": {"max_epochs": 1}}
    options["resampling_exponent"] = 0.5
    plan = tiny(query_tower=layer, **options)
    plan.build(data.corpus)  # Building is not training, and neither is a refused training.
    with pytest.raises(DataError, match="losers"):
        tiny(query_tower=layer, hard=FunnelLosers(stages=("ranked",)), **options).fit_samples(data)
    model = plan.fit_samples(data)
    with pytest.raises(TypeError, match="warm_start must be a fitted TwoTower"):
        plan.fit_samples(data, warm_start=plan)
    before = model.query_embeddings([{"history": [40]}])
    for again in (plan, tiny(query_tower=layer, **options)):
        with pytest.raises(ValueError, match=r"query_tower <.*was given to a training before"):
            again.fit_samples(data)
    np.testing.assert_array_equal(model.query_embeddings([{"history": [40]}]), before)
    # A frozen layer does not change, and a function makes a new layer each time.
    layer.trainable = False
    again.fit_samples(data)
    np.testing.assert_array_equal(model.query_embeddings([{"history": [40]}]), before)
    made = tiny(query_tower=lambda corpus: OwnQueries(), **options)
    assert [made.fit_samples(data).result.num_epochs for _ in range(2)] == [1, 1]


@pytest.mark.usefixtures("in_eager_steps")
def test_a_log_below_one_batch_trains_in_smaller_ones(data: TrainingSet) -> None:
    model = tiny(training={"batch_size": 1024, "max_epochs": 1})
    notes = model.fit_samples(data).notes
    assert any("120 positives fill no batch" in note and "of 8" in note for note in notes)
    assert model.batches(data.samples).steps_per_epoch == 15


def test_settings_that_cannot_be() -> None:
    half = SimpleNamespace(draw=lambda: None)
    for wrong, named in (
        ({"optimizer": "adam"}, r"of the training: training=tp\.\w+\(optimizer='adam'\)$"),
        ({"negatives": []}, "negatives: got .*needs one kind or more"),
        ({"negatives": [half]}, "is not a kind: it has no expected_count. A kind here"),
        ({"negatives": [tp.Uniform]}, "is a class: give an object of it"),
        ({"seed": -1}, "^seed: got -1"),
        ({"training": {"max_epochs": 0}}, r"training\.max_epochs: got 0"),
        ({"hidden_layers": True}, "^hidden_layers: got True"),
    ):
        with pytest.raises(ConfigError, match=named):
            TwoTower(**wrong)
    # A single value may stand for a list of one.
    alone: Any = {"hidden_layers": 8, "history_pooling": "mean", "negatives": InBatch()}
    listed: Any = {name: (value,) for name, value in alone.items()}
    assert TwoTower(**alone).settings == TwoTower(**listed).settings


def test_a_hard_share_that_few_positives_can_have_is_told(tmp_path: Path) -> None:
    rows = [(user, item, 1_700_000_000 + user, "clicked") for user in range(10) for item in (7, 8)]
    for num_losers, is_told in ((10, False), (2, True)):
        losers = [(user, 9, 1_700_000_000 + user, "retrieved") for user in range(num_losers)]
        columns = ["user_id", "item_id", "timestamp", "stage"]
        log = Log.from_table(pd.DataFrame([*rows, *losers], columns=columns))
        plan = tiny(hard=FunnelLosers(share=0.4), training={"batch_size": 4})
        data = TrainingSet.build(log, tmp_path / str(num_losers), seed=0, hard=plan.hard)
        batches = plan.batches(data.samples)
        *_, note = fit.describe_data(data, batches, plan.settings, plan.training)
        assert note.startswith(f"effective mean hard share {0.4 * num_losers / 10:.4f}")
        assert note.endswith(" for the 0.4 asked for: few positives have losers in their request "
                             "(docs/guides/events.md)") == is_told  # fmt: skip


def test_data_that_cannot_be_trained_on(tmp_path: Path) -> None:
    clicks = Log.from_table(pd.DataFrame({"user_id": [1, 1, 2], "item_id": [7, 8, 7]}))
    # A comparison asks for the losers of every stage, even if some plans use none.
    data = TrainingSet.build(clicks, tmp_path, seed=0, hard=FunnelLosers())
    for hard, told in (
        (FunnelLosers(), r"losers of the stages retrieved.* exactly its time\. .*; or set"),
        (FunnelLosers(stages=("ranked",)), "a ranked one also needs a rank"),
    ):
        with pytest.raises(DataError, match=told):
            tiny(hard=hard, training={"batch_size": 3}).batches(data.samples)
    with pytest.raises(TypeError, match=r"make one with Log.from_table.* Received: DataFrame"):
        tiny().fit(pd.DataFrame({"user_id": [1], "item_id": [2]}))
    with pytest.raises(TypeError, match=r"needs a Holdout.* Received: Log"):
        tiny().fit(clicks, clicks)
    given: Any = {key: [np.array([7])] for key in ("histories", "relevant", "clicked", "seen")}
    again = tp.Holdout(**given, user_ids=[1], candidate_ids=[7, 8], candidate_counts=[2, 1])
    with pytest.raises(ValueError, match=r"Nothing to measure.*less \(evaluation.exclude\)"):
        tiny(training={"batch_size": 3}).fit(clicks, again, folder=tmp_path / "new")
    assert not (tmp_path / "new" / "checkpoints").exists()
    # Users who clicked or saw every item have no negatives, unless exposures are allowed.
    everything = pd.DataFrame({"user_id": [1, 1, 2, 2], "item_id": [7, 8, 7, 8]})
    funnel = Log.from_table(everything.assign(stage=["clicked"] * 3 + ["exposed"]))
    # A user who clicked nothing does not count.
    with_another = Log.from_table(everything, users=pd.DataFrame({"user_id": [1, 2, 3]}))
    for log in (Log.from_table(everything), funnel, with_another):
        with pytest.raises(DataError, match="in the training part clicked or saw every item"):
            tiny(training={"batch_size": 2}).fit(log)
    exposed = FunnelLosers(stages=("exposed",), allow_exposed=True)
    TrainingSet.build(funnel, tmp_path / "funnel", seed=0).check_negatives_left(exposed)
