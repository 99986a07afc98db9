"""Item embeddings that begin with an SVD of the clicks: the factors, and what they are added to."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.model.conftest import NUM_ITEMS, NUM_TASTES, assert_same, tiny, weights_of
from tests.model.test_two_tower import OwnCandidates
from tfrs_pipeline import ConfigError, TrainingSet, TwoTowerNetwork
from tfrs_pipeline.model.warm_start import item_factors
from tfrs_pipeline.samples.store import RowLists

STILL = {"max_epochs": 1, "learning_rate": 1e-30}


def random_clicks(num_users: int, num_items: int, seed: int) -> RowLists:
    """Returns a few items for each user; the first user and the last item have no click."""
    rng = np.random.default_rng(seed)
    lists = [np.sort(1 + rng.permutation(num_items - 1)[:n]) for n in rng.integers(1, 6, num_users)]
    return RowLists.from_lists([np.zeros(0, np.int32), *lists])


@pytest.mark.parametrize(("dim", "rank"), [(5, 5), (40, 11)])
def test_factors_are_those_of_a_dense_decomposition(dim: int, rank: int) -> None:
    clicked = random_clicks(num_users=30, num_items=12, seed=0)
    dense = np.zeros((31, 12))
    for user in range(31):
        dense[user, clicked[user] - 1] = 1
    num_of_user, num_of_item = dense.sum(axis=1), dense.sum(axis=0)
    dense /= np.maximum(1, np.outer(num_of_user, num_of_item)) ** 0.4
    _, values, vectors = np.linalg.svd(dense)
    expected = vectors[:rank].T * values[:rank] ** 2
    expected /= np.linalg.norm(expected[num_of_item > 0], axis=1).mean()
    factors = item_factors(clicked, 12, dim)
    assert factors.shape == (13, dim)
    assert factors.dtype == np.float32
    # The sign and order of singular vectors are arbitrary, so products of items are compared.
    np.testing.assert_allclose(factors[1:] @ factors[1:].T, expected @ expected.T, atol=1e-5)
    assert not factors[0].any()
    assert not factors[:, rank:].any()
    np.testing.assert_allclose(factors[12], 0, atol=1e-6)


def test_clicks_with_fewer_directions_than_factors_give_the_same_ones_each_time() -> None:
    """With equal users and unclicked items, the decomposition has to restart at random."""
    thrice = [random_clicks(num_users=20, num_items=41, seed=seed) for seed in (0, 0, 1)]
    lists = [clicked[user] for clicked in thrice for user in range(21)]
    first, *others = (item_factors(RowLists.from_lists(lists), 60, 50) for _ in range(4))
    assert np.linalg.matrix_rank(first) < 50
    for other in others:
        np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize("lists", [[], [[]], [[], [1]], [[], [], []]])
def test_clicks_too_few_to_decompose(lists: list[Any]) -> None:
    assert not item_factors(RowLists.from_lists(lists), 1, 4).any()
    assert np.isfinite(item_factors(RowLists.from_lists(lists), 3, 4)).all()


def tables(network: TwoTowerNetwork) -> list[np.ndarray]:
    own = network.query_tower.history.item_table
    shared = network.candidate_tower.id_embedding.embeddings
    return [table.numpy() for table in (shared, own) if table is not None]


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.usefixtures("in_eager_steps")
def test_they_are_added_to_every_table_of_items(data: TrainingSet, is_shared: bool) -> None:
    plans = (
        tiny(item_init=x, share_item_embedding=is_shared, training=STILL) for x in ("random", "svd")
    )
    random, begun = (tables(plan.fit_samples(data).network) for plan in plans)
    assert len(begun) == 2 - is_shared
    factors = item_factors(data.samples.known_positives, NUM_ITEMS, 8)
    for before, after in zip(random, begun, strict=True):
        np.testing.assert_allclose(after - before, factors, atol=1e-6)
    # Items of one taste have the same users, so they are near each other before any training.
    unit = begun[0][1:] / np.linalg.norm(begun[0][1:], axis=1, keepdims=True)
    near = np.argsort(-(unit @ unit.T), axis=1)[:, 1:4] % NUM_TASTES
    assert (near == np.arange(NUM_ITEMS)[:, np.newaxis] % NUM_TASTES).mean() > 0.95


@pytest.mark.usefixtures("in_eager_steps")
def test_stopped_trainings_and_warm_starts_go_on(data: TrainingSet, tmp_path: Path) -> None:
    """This includes the popularity shift of `correction="recent"`, which is not trained."""
    settings = {"item_init": "svd", "correction": "recent", "candidate_bias": True}
    plan = tiny(**settings)
    whole = plan.fit_samples(data, max_epochs=2)
    plan.fit_samples(data, max_epochs=1, folder=tmp_path)
    resumed = plan.fit_samples(data, max_epochs=2, folder=tmp_path)
    assert resumed.result.resumed_after == 1
    assert_same(weights_of(whole.network), weights_of(resumed.network))
    warm = tiny(**settings, training=STILL).fit_samples(data, warm_start=whole)
    for before, after in zip(tables(whole.network), tables(warm.network), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-6)


@pytest.mark.usefixtures("in_eager_steps")
def test_own_towers_keep_what_they_begin_with(data: TrainingSet) -> None:
    own: dict[str, Any] = {"item_init": "svd", "training": STILL}
    own["candidate_tower"] = lambda corpus: OwnCandidates(corpus, 8)
    model = tiny(**own).fit_samples(data)
    factors = item_factors(data.samples.known_positives, NUM_ITEMS, 8)
    history = model.network.query_tower.history.item_table.numpy()
    assert np.abs(history - factors).max() < 0.06  # The size of the random start.
    assert np.abs(model.network.candidate_tower.table.embeddings.numpy()).max() < 0.06
    plan = tiny(**own, history_pooling=(), use_user_id=True)
    with pytest.raises(ConfigError, match=r"model\.item_init: got 'svd', and no built-in tower"):
        plan.fit_samples(data)
