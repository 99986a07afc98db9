"""Warm starts: weights are carried over by id, not by row; new ids start from the stand-in."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from tests.model.conftest import assert_same, tiny, untrained, weights_of
from tests.small_log import Stopped
from tests.tracing import tracing_once
from tfrs_pipeline import ConfigError, FittedTwoTower, Log, TrainingSet, TwoTower
from tfrs_pipeline.features.kinds import KINDS
from tfrs_pipeline.model.checkpoints import TrainingResult
from tfrs_pipeline.model.optimizer import make_optimizer, slots_of
from tfrs_pipeline.model.settings import TrainingSettings, TwoTowerSettings, shape_settings
from tfrs_pipeline.model.warm_start import WarmStart

NUM_USERS = 20
# The model has two item tables; both are carried over.
MODEL: dict[str, Any] = {"use_user_id": True, "candidate_bias": True, "share_item_embedding": False}
MODEL |= {"id_dropout": 0.3, "training": {"max_epochs": 3}}
YESTERDAY, TODAY = range(10, 34), range(4, 30)  # The items of each day.
Sets: TypeAlias = tuple[TrainingSet, TrainingSet]


def log_of(items: range, first_user: int, names: Sequence[str] = ("genre", "title")) -> Log:
    """Returns a log of these items; today's ids have other rows than yesterday's."""
    rng, users = np.random.default_rng(len(items)), range(first_user, first_user + NUM_USERS)
    pairs = ((user, item) for user in users for item in rng.permutation(list(items))[:8])
    rows = [(f"user {user}", f"item {item}") for user, item in pairs]
    table = pd.DataFrame({"item_id": [f"item {item}" for item in items]})
    # Items 4 and 9 have a genre that sorts first and that yesterday's log did not have.
    table["genre"] = ["action" if item % 5 == 4 and item < 10 else f"g{item % 5}" for item in items]
    table["title"] = [f"word{item % 3} word{item % 2}" for item in items]
    kinds = {"genre": "categorical", "title": "text"}
    features = {name: kinds[name] for name in names}
    events = pd.DataFrame(rows, columns=["user_id", "item_id"])
    return Log.from_table(events, items=table, item_features=features)


@pytest.fixture(scope="module")
def sets(module_path: Path) -> Sets:
    earlier = TrainingSet.build(log_of(YESTERDAY, 0), module_path / "yesterday", seed=0)
    return earlier, TrainingSet.build(log_of(TODAY, 5), module_path / "today", seed=0)


@pytest.fixture(scope="module")
def source(sets: Sets) -> FittedTwoTower:
    return tiny(**MODEL).fit_samples(sets[0])


@pytest.fixture(scope="module")
def started(source: FittedTwoTower, sets: Sets) -> FittedTwoTower:
    """Returns today's model, warm-started from yesterday's, before its first step."""
    return started_from(source, tiny(**MODEL), sets[1])


def started_from(source: FittedTwoTower, plan: TwoTower, data: TrainingSet) -> FittedTwoTower:
    start = WarmStart(source, plan, plan.training, data.corpus)
    model = untrained(plan, data.corpus)
    model.network.compile(optimizer=make_optimizer(plan.training, 1))
    model.network.optimizer.build(model.network.trainable_variables)
    start.apply(model.network)
    return model


def states(model: FittedTwoTower) -> list[list[np.ndarray]]:
    network = model.network
    kept = ([x, *slots_of(network.optimizer, x)] for x in network.trainable_variables)
    return [[variable.numpy() for variable in of_each] for of_each in kept]


def by_id(ids: np.ndarray, table: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(["", *ids.tolist()], table, strict=True))


def id_tables(model: FittedTwoTower) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields every id table and its optimizer state, by id; "" is the unknown id."""
    network, optimizer = model.network, model.network.optimizer
    (query_ids,) = network.query_tower.id_tables
    ids, biases = network.candidate_tower.id_tables
    tables = {"item": ids, "bias": biases, "history": network.query_tower.history.item_table}
    for name, table in {"user": query_ids, **tables}.items():
        states = (table, *slots_of(optimizer, table))
        for kind, values in zip(("weights", "m", "v"), states, strict=True):
            of_rows = model.query_ids if name == "user" else model.candidate_ids
            yield f"{name}/{kind}", by_id(of_rows, values.numpy())


def test_the_same_samples_start_with_the_same_state(source: FittedTwoTower, sets: Sets) -> None:
    again = started_from(source, tiny(**MODEL), sets[0])
    for ours, theirs in zip(states(again), states(source), strict=True):
        assert len(ours) == 3
        assert_same(ours, theirs)
    assert int(again.network.optimizer.iterations) == 3 * (len(sets[0].samples) // 32)


def test_what_is_still_there_keeps_its_state_and_what_is_new_has_the_stand_in(
    source: FittedTwoTower, started: FittedTwoTower
) -> None:
    assert source.candidate_ids.tolist() != started.candidate_ids.tolist()
    before = dict(id_tables(source))
    for name, now in id_tables(started):
        there, kind = before[name], name.partition("/")[2]
        kept, new = there.keys() & now.keys(), now.keys() - there.keys()
        assert len(kept) > 10
        assert len(new) >= 5
        assert there.keys() - now.keys()
        for id_ in kept:
            np.testing.assert_array_equal(now[id_], there[id_], err_msg=f"{name} of {id_}")
        stand_in = there[""] if kind == "weights" else np.zeros_like(there[""])
        for id_ in new:
            if name != "history/weights":
                np.testing.assert_array_equal(now[id_], stand_in, err_msg=f"{name} of {id_}")
    # Nothing trains row 0 of the history's own table: new items begin as in any training.
    history = dict(id_tables(started))["history/weights"]
    assert not np.array_equal(history["item 4"], history["item 5"])
    assert not np.array_equal(history["item 4"], history[""])


def test_embeddings_are_of_the_source(source: FittedTwoTower, started: FittedTwoTower) -> None:
    """Kept ids agree through features and dense layers; new items are embedded as unknown ids."""
    zero = np.zeros((1, 9), np.float32)
    ours, theirs = (
        by_id(model.candidate_ids, np.r_[zero, model.network.embed_corpus()])
        for model in (started, source)
    )
    kept = (ours.keys() & theirs.keys()) - {""}
    assert len(kept) == 20
    for id_ in kept:
        np.testing.assert_allclose(ours[id_], theirs[id_], atol=1e-6)
    new = [f"item {i}" for i in range(5, 9)]
    genre, title = source.corpus.candidate_features
    columns = {"genre": genre.encode_column([f"g{i % 5}" for i in range(5, 9)])}
    columns["title"] = title.encode_column([f"word{i % 3} word{i % 2}" for i in range(5, 9)])
    expected = source.network.embed_candidates(tf.zeros(4, tf.int32), columns).numpy()
    np.testing.assert_allclose([ours[id_] for id_ in new], expected, atol=1e-6)
    queries: Any = [{"user_id": "user 7", "history": ["item 20", "item 12"]}, {}]
    found, expected = (model.query_embeddings(queries) for model in (started, source))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.usefixtures("in_eager_steps")
def test_what_was_carried_over_is_told(source: FittedTwoTower, sets: Sets) -> None:
    training = {"max_epochs": 1, "optimizer": "adagrad", "learning_rate": 1e-9}
    model = tiny(**{**MODEL, "training": training}).fit_samples(sets[1], warm_start=source)
    ours, theirs = (
        by_id(x.candidate_ids, x.network.candidate_tower.id_tables[0].numpy())
        for x in (model, source)
    )
    np.testing.assert_allclose(ours["item 12"], theirs["item 12"], atol=1e-6)
    ids, optimizer = model.notes[:2]
    assert ids == "warm start: 20 items kept, 6 new, 4 gone; 15 users kept, 5 new, 5 gone"
    assert optimizer == "    the optimizer's state starts again: it was lazy_adam, now adagrad"
    assert int(model.network.optimizer.iterations) == len(sets[1].samples) // 32


def test_a_stopped_one_goes_on_bit_for_bit(
    source: FittedTwoTower, sets: Sets, tmp_path: Path
) -> None:
    def stop(so_far: TrainingResult) -> None:
        if so_far.num_epochs == 1:
            raise Stopped

    training = {"max_epochs": 2, "warmup_steps": 3, "decay": "cosine"}

    def fit(**options: Any) -> tuple[FittedTwoTower, list[list[np.ndarray]]]:
        plan = tiny(**{**MODEL, "training": training})
        model = plan.fit_samples(sets[1], warm_start=source, **options)
        return model, [*states(model), weights_of(model.network)]

    with tracing_once():
        whole, expected = fit()
        with pytest.raises(Stopped):
            fit(on_epoch=stop, folder=tmp_path)
        resumed, found = fit(folder=tmp_path)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)
    assert resumed.notes == whole.notes


def test_warm_up_and_decay_begin_anew() -> None:
    settings = TrainingSettings(learning_rate=0.1, warmup_steps=5, decay="cosine")
    schedules = [(x, make_optimizer(settings, 20, x)._learning_rate) for x in (0, 1000)]
    for step in (0, 3, 5, 12, 20):
        rates = [float(schedule(tf.constant(first + step))) for first, schedule in schedules]
        assert rates[0] == pytest.approx(rates[1])


OTHERS: dict[str, Any] = {"dim": 16, "normalize": False, "hidden_layers": (4,), "feature_dim": 5}
OTHERS |= {"use_user_id": True, "use_candidate_id": False, "share_item_embedding": False}
OTHERS |= {"candidate_bias": True, "history_pooling": ("mean", "attention")}
OTHERS |= {"history_length": 4, "attention_blocks": 1}


@pytest.mark.parametrize("name", OTHERS)
def test_another_shape_is_refused_by_name(name: str, sets: Sets) -> None:
    assert {*OTHERS} == {*shape_settings(has_attention=True)}
    has_attention = name not in shape_settings(has_attention=False)
    base = tiny(history_pooling=("attention",) if has_attention else ("mean",))
    other = TwoTowerSettings(**{**dict(base.settings), name: OTHERS[name]})
    with pytest.raises(ConfigError, match=rf"model\.{name}: got .*, where the model to start from"):
        WarmStart(untrained(base, sets[0].corpus), other, base.training, sets[1].corpus)


def test_other_settings_keep_the_weights_their_size(sets: Sets) -> None:
    """The marks are complete: no other setting changes the shape of a tower's variable."""
    base = tiny().settings
    halves = "resampling_exponent id_dropout feature_dropout recency_decay attention_dropout"
    others: dict[str, Any] = dict.fromkeys(halves.split(), 0.5)
    others |= {"temperature": 1.0, "item_init": "svd", "correction": "none"}
    others |= {"history_shrinkage": 2.0}
    others |= {"history_length": 7, "history_dropout": 0.1, "attention_blocks": 5}
    loss_alone = {"negatives", "hard"}
    assert others.keys() | loss_alone | set(shape_settings(has_attention=False)) == set(
        TwoTowerSettings.model_fields
    )
    changed = TwoTowerSettings(**{**base.model_dump(), **others})
    networks = [TwoTower(**dict(x)).build(sets[0].corpus) for x in (base, changed)]
    shapes = [[tuple(variable.shape) for variable in x.trainable_variables] for x in networks]
    assert shapes[0] == shapes[1]


def test_other_features_and_ids_are_refused(
    source: FittedTwoTower, sets: Sets, tmp_path: Path
) -> None:
    events = pd.DataFrame({"user_id": [1] * 39 + [2], "item_id": np.arange(40)})
    data = TrainingSet.build(Log.from_table(events), tmp_path / "numbers", seed=0)
    with pytest.raises(ConfigError) as error:
        tiny(**MODEL).fit_samples(data, warm_start=source)
    features = str(error.value)
    assert re.match("data.item_features: got none, .* genre=categorical title=text$", features)
    numbers = Log.from_table(
        events,
        items=pd.DataFrame({"item_id": np.arange(40), "title": "a", "genre": "b"}),
        item_features={"genre": "categorical", "title": "text"},
    )
    data = TrainingSet.build(numbers, tmp_path / "number", seed=0)
    with pytest.raises(
        ConfigError, match=r"ids are like 0 in the log, and like 'item 10' in the model"
    ):
        tiny(**MODEL).fit_samples(data, warm_start=source)
    log = log_of(TODAY, 5, ("title", "genre"))
    data = TrainingSet.build(log, tmp_path / "order", seed=0)
    with pytest.raises(ConfigError, match=r"got title=text genre=.*: give them in that order"):
        tiny(**MODEL).fit_samples(data, warm_start=source)
    other = TrainingSet.build(log_of(range(50, 70), 0), tmp_path / "other", seed=0)
    with pytest.raises(
        ConfigError, match=r"its model knows no item of this log: ids are like 'item 50' in"
    ):
        tiny(**MODEL).fit_samples(other, warm_start=source)

    class Own(tf.keras.layers.Layer):
        def call(self, inputs: Any, training: bool = False) -> tf.Tensor:
            return tf.ones([tf.shape(inputs["row"])[0], 8])

    own = TwoTower(dim=8, candidate_tower=Own())
    with pytest.raises(ConfigError, match="own towers cannot be carried over"):
        WarmStart(untrained(own, sets[0].corpus), own, own.training, sets[1].corpus)


@pytest.mark.parametrize("kind", ["bucketized", "categorical"])
def test_codes_are_those_of_the_same_values(kind: Any) -> None:
    rng = np.random.default_rng(0)
    for sizes in ((20, 300), (300, 20)):
        columns: list[Any] = [rng.integers(0, 1000, size) for size in sizes]
        if kind == "bucketized":
            columns = [column.astype(float) for column in columns]
        fitted: list[Any] = [KINDS[kind].fit("x", column) for column in columns]
        there, here = fitted
        codes = here.codes_of(there)
        assert len(codes) == here.num_codes + 1
        assert codes[0] == 0
        values = columns[1]
        if kind == "bucketized":
            values = np.array([-1.0, *here.boundaries])  # The lowest value of each bucket.
        ours, theirs = here.encode_column(values), there.encode_column(values)
        np.testing.assert_array_equal(codes[ours], theirs)
