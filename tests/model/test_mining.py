"""Hard negatives mined from the model: what is kept, when, and in a training that is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.damage import damage
from tests.model.conftest import LENGTH, NUM_ITEMS, Stopped, assert_same, tiny, weights_of
from tfrs_pipeline.durable import read_record
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.model.fit import TrainingResult
from tfrs_pipeline.model.mining import MinedPools, mine_pools
from tfrs_pipeline.model.two_tower import TwoTower
from tfrs_pipeline.negatives.mined import Mined
from tfrs_pipeline.negatives.popularity import Popularity
from tfrs_pipeline.negatives.uniform import Uniform

MINED = Mined(share=0.3, num=3, min_rank=4, max_rank=12, max_pool=5, every=2)


def make_model(**options: Any) -> TwoTower:
    """Whole sequences read by self-attention, with dropout of every kind."""
    return tiny(
        **{
            "hard": MINED,
            "negatives": [Uniform(16), Popularity(16, 0.5)],
            "history_pooling": ["attention"],
            "attention_blocks": 1,
            "share_item_embedding": True,
            "candidate_bias": True,
            "id_dropout": 0.1,
            "training": {"examples": "sequences", "max_epochs": 5},
            **options,
        }
    )


@pytest.fixture(scope="module")
def unbroken(data: TrainingSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[TwoTower, Path]:
    folder = tmp_path_factory.mktemp("unbroken")
    return make_model().fit_samples(data, folder=folder), folder


def reports_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("mined-*.json")
    return {path.stem: read_record(path)}


def test_a_stopped_training_mines_what_an_unbroken_one_does(
    data: TrainingSet, unbroken: tuple[TwoTower, Path], tmp_path: Path
) -> None:
    """Stopped where pools are due, then where they are kept from before."""
    model, folder = unbroken

    for last in (2, 3):

        def stop(so_far: TrainingResult, last: int = last) -> None:
            if so_far.num_epochs == last:
                raise Stopped

        with pytest.raises(Stopped):
            make_model().fit_samples(data, folder=tmp_path, on_epoch=stop)
        # Nothing is mined for the first two epochs.
        assert (tmp_path / "mined-2.json").exists() == (last > 2)
    resumed = make_model().fit_samples(data, folder=tmp_path)
    assert_same(weights_of(resumed.network), weights_of(model.network))
    assert reports_in(tmp_path) == reports_in(folder)
    assert {path.name.partition(".")[0] for path in tmp_path.glob("mined-*")} == {"mined-4"}
    assert resumed.notes == model.notes
    assert resumed.notes[0].startswith("mined after epoch 4: ")
    # Every sample has a pool, so that f is what was asked for.
    assert "effective mean hard share 0.3000" in resumed.notes


def test_a_damaged_pool_is_mined_again(
    data: TrainingSet, unbroken: tuple[TwoTower, Path], tmp_path: Path
) -> None:
    """Of the model that it was mined from, which is not the one at which training stopped."""

    def stop(so_far: TrainingResult) -> None:
        if so_far.num_epochs == 3:
            raise Stopped

    with pytest.raises(Stopped):
        make_model().fit_samples(data, folder=tmp_path, on_epoch=stop)
    damage(tmp_path / "mined-2.values.npy", "flipped")
    resumed = make_model().fit_samples(data, folder=tmp_path)
    assert_same(weights_of(resumed.network), weights_of(unbroken[0].network))
    assert resumed.notes == unbroken[0].notes


def test_the_model_mines_by_its_own_ranking(
    data: TrainingSet, unbroken: tuple[TwoTower, Path]
) -> None:
    model, samples = unbroken[0], data.samples
    pools, _ = mine_pools(
        model._row_retrieval(), samples, Mined(min_rank=4, max_rank=12), seed=0,
        history_length=LENGTH,
    )  # fmt: skip
    for i, (user, own) in enumerate(zip(samples.query_rows, samples.candidate_rows, strict=True)):
        never = {own, *samples.known_positives[user], *samples.exposed[user]}
        query = {"user_id": 100 + user, "history": 10 * samples.history(i, LENGTH)}
        (ids,), _ = model.retrieve([query], NUM_ITEMS, [[10 * row for row in never]])
        assert sorted(pools[i]) == sorted(ids[4:12] // 10)


def test_what_was_not_mined_is_said(data: TrainingSet, unbroken: tuple[TwoTower, Path]) -> None:
    batches = make_model().batches(data.samples)
    before = MinedPools(
        batches,
        MINED,
        make_retrieval=unbroken[0]._row_retrieval,
        history_length=LENGTH,
        seed=0,
    )
    before.prepare(0)
    assert batches.mean_hard_share == 0
    assert before.describe() == [
        "no hard negatives were mined: training ended within the first 2 epochs (model.hard.every)"
    ]
    assert tiny()._mining(batches, None, lambda *task: None) is None
