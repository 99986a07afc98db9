"""Items that came after the training: new to the model, even if its corpus lists them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import tfrs_pipeline as tp
from tests.model.conftest import tiny
from tests.small_batches import as_arrays, assert_same_batches
from tfrs_pipeline import Log, Popularity, TrainingSet, Uniform

LATER, DEAD = 777, 888
EASY = [Uniform(16), Popularity(16, 1.0)]


@pytest.fixture(scope="module")
def train() -> Log:
    """Returns a log's training part; item 777 has its first event in the test, 888 has none."""
    events = pd.DataFrame({"user_id": np.arange(120) % 10, "item_id": np.arange(120) % 17})
    events["timestamp"] = pd.to_datetime(1_700_000_000 + np.arange(120), unit="s", utc=True)
    events["part"] = np.where(np.arange(120) < 100, "train", "test")
    events.loc[110, "part"] = "validation"
    events.loc[115, "item_id"] = LATER
    items = pd.DataFrame({"item_id": [*range(17), LATER, DEAD]})
    items["kind"] = ["a", "b", "c"] * 5 + ["a", "b", "z", "a"]
    log = Log.from_table(events, items=items, item_features={"kind": "categorical"})
    return log.split("column").train


@pytest.fixture(scope="module")
def data(train: Log, module_path: Path) -> TrainingSet:
    return TrainingSet.build(train, module_path, seed=0)


def row_of(data: TrainingSet, item: int) -> int:
    return int(data.corpus.candidate_ids.rows([item])[0])


def embedded(model: tp.FittedTwoTower, data: TrainingSet, item: int) -> list[np.ndarray]:
    """Returns an item's embedding, and that of an unknown item with the same features."""
    network, row = model.network, tf.constant([row_of(data, item)])
    own, features = network.embed_candidates(row), network.candidate_table(row)
    return [own.numpy(), network.embed_candidates(tf.constant([0]), features).numpy()]


@pytest.mark.parametrize("examples", ["single", "sequences", "sets"])
def test_they_are_nobodys_negatives_and_all_else_stays(data: TrainingSet, examples: str) -> None:
    model = tiny(negatives=EASY, training={"examples": examples})
    batches = model.batches(data.samples)
    whole = model.batches(replace(data.samples, is_later=None))
    later, num_drawn, num_dead = row_of(data, LATER), 0, 0
    for step in range(20):
        batch, before = (as_arrays(x.batch(step)) for x in (batches, whole))
        is_later, counted = batch.shared_row == later, batch.is_counted
        assert not counted[:, is_later].any()
        assert before.is_counted[:, is_later].all()
        num_drawn += is_later.sum()
        num_dead += counted[:, batch.shared_row == row_of(data, DEAD)].sum()
        np.testing.assert_array_equal(counted[:, ~is_later], before.is_counted[:, ~is_later])
        assert_same_batches(*([x._replace(is_counted=None)] for x in (batch, before)))
    assert min(num_drawn, num_dead) > 0


def test_a_category_that_only_they_have_is_unknown(data: TrainingSet) -> None:
    (kind,) = data.corpus.candidate_features
    assert kind.vocabulary == ("a", "b", "c")
    assert data.corpus.candidate_columns["kind"][row_of(data, LATER) - 1] == 0


@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.nightly)])
@pytest.mark.usefixtures("in_eager_steps", "trusted_exports", "few_signatures")
def test_they_are_embedded_as_an_item_that_nobody_knows(
    train: Log, data: TrainingSet, shared: bool, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"candidate_bias": True, "share_item_embedding": shared}
    plan = tiny(negatives=EASY, **settings, training={"max_epochs": 2})
    model = plan.fit_samples(data)
    came_later = "1 item came after the training: new to it, and nobody's negatives"
    assert came_later in model.notes
    for item, is_unknown in ((LATER, True), (DEAD, False)):
        own, unknown = embedded(model, data, item)
        assert (own == unknown).all() if is_unknown else np.abs(own - unknown).max() > 1e-3
    # The export does the same, and so does an unknown item that is embedded by its features.
    loaded = tp.load(tp.export(model, tmp_path / "m", index=tp.Exact()))
    live, _ = loaded.embed_candidates([LATER, 999], {"kind": ["z", "z"]})
    np.testing.assert_allclose(live[0], live[1], atol=1e-6)
    place = list(loaded.candidate_ids()).index(LATER)
    np.testing.assert_allclose(loaded.candidate_embeddings()[place], live[1], atol=1e-6)
    query: Any = [{"user_id": 1, "history": [3, LATER]}]
    ids, scores = loaded.retrieve(query, 19)
    expected_ids, expected = model.retrieve(query, 19)
    assert ids.tolist() == expected_ids.tolist()
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.nightly
@pytest.mark.usefixtures("in_eager_steps")
def test_a_warm_start_takes_them_for_new(train: Log, data: TrainingSet, tmp_path: Path) -> None:
    source = tiny(negatives=EASY, training={"max_epochs": 2}).fit_samples(data)
    whole = TrainingSet.build(train.whole, tmp_path / "whole", seed=0)
    assert whole.corpus.is_later is None
    still = {"max_epochs": 1, "learning_rate": 1e-30}
    model = tiny(negatives=EASY, training=still).fit_samples(whole, warm_start=source)
    table = model.network.candidate_tower.id_embedding.embeddings.numpy()
    before = source.network.candidate_tower.id_embedding.embeddings.numpy()
    later, dead = row_of(data, LATER), row_of(data, DEAD)
    np.testing.assert_allclose(table[later], before[0], atol=1e-6)
    np.testing.assert_allclose(table[dead], before[dead], atol=1e-6)
    assert "items kept, 1 new, 0 gone" in "".join(model.notes)
    # An item known from an earlier log is not new, even if it comes only later in this log.
    knows = tiny(negatives=EASY, training={"max_epochs": 2}).fit_samples(whole)
    again = tiny(negatives=EASY, training=still).fit_samples(data, warm_start=knows)
    towers = (x.network.candidate_tower for x in (again, knows))
    ours, theirs = (tower.id_embedding(tf.constant([later])) for tower in towers)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    own, unknown = embedded(again, data, LATER)
    assert np.abs(own - unknown).max() > 1e-3
