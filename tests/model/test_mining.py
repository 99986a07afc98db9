"""Hard negatives mined from the model: what is kept, when, and in a training that is stopped."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.damage import damage
from tests.model.conftest import LENGTH, NUM_ITEMS, assert_same, tiny, weights_of
from tests.small_log import Stopped
from tfrs_pipeline import Mined, Popularity, Uniform
from tfrs_pipeline.durable import read_record
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.model.fit import TrainingResult
from tfrs_pipeline.model.fitted import FittedTwoTower
from tfrs_pipeline.model.mining import MinedPools, mine_pools
from tfrs_pipeline.model.queries import retrieval_of_rows

MINED = Mined(share=0.3, num=3, min_rank=4, max_rank=12, max_pool=5, every=2)
# It trains on whole sequences, with dropout of ids and histories.
PLAN = tiny(
    hard=MINED,
    negatives=[Uniform(16), Popularity(16, 0.5)],
    history_pooling=["recency"],
    share_item_embedding=True,
    candidate_bias=True,
    id_dropout=0.1,
    training={"examples": "sequences", "max_epochs": 5},
)


def train(data: TrainingSet, folder: Path, stop_after: int | None = None) -> FittedTwoTower:
    def on_epoch(so_far: TrainingResult) -> None:
        if so_far.num_epochs == stop_after:
            raise Stopped

    return PLAN.fit_samples(data, folder=folder, on_epoch=on_epoch)


pytestmark = pytest.mark.usefixtures("traced_once")


@dataclass(frozen=True)
class Unbroken:
    model: FittedTwoTower
    folder: Path
    weights: list[np.ndarray]  # The network itself is that of later trainings too.


@pytest.fixture(scope="module")
def unbroken(
    data: TrainingSet, tmp_path_factory: pytest.TempPathFactory, traced_once: None
) -> Unbroken:
    folder = tmp_path_factory.mktemp("unbroken")
    model = train(data, folder)
    return Unbroken(model, folder, weights_of(model.network))


def test_the_model_mines_by_its_own_ranking(data: TrainingSet, unbroken: Unbroken) -> None:
    model, samples = unbroken.model, data.samples
    retrieval, mined = retrieval_of_rows(model.network)(), Mined(min_rank=4, max_rank=12)
    pools = mine_pools(retrieval, samples, mined, seed=0, history_length=LENGTH)
    for i, (user, own) in enumerate(zip(samples.query_rows, samples.candidate_rows, strict=True)):
        never = {own, *samples.known_positives[user], *samples.exposed[user]}
        query = {"user_id": 100 + user, "history": 10 * samples.history(i, LENGTH)}
        (ids,), _ = model.retrieve([query], NUM_ITEMS, [[10 * row for row in never]])
        assert sorted(pools[i]) == sorted(ids[4:12] // 10)


def test_a_stopped_one_mines_the_same(
    data: TrainingSet, unbroken: Unbroken, tmp_path: Path
) -> None:
    """Stopped where pools are due, then where they are kept from before; or damaged since."""
    for last in (2, 3):
        with pytest.raises(Stopped):
            train(data, tmp_path / "kept", stop_after=last)
        # Nothing is mined for the first two epochs.
        assert (tmp_path / "kept" / "mined-2.json").exists() == (last > 2)
    # It is mined again of the model that it was of, not of that at which training stopped.
    shutil.copytree(tmp_path / "kept", tmp_path / "damaged")
    damage(tmp_path / "damaged" / "mined-2.values.npy", "flipped")
    for name in ("kept", "damaged"):
        resumed = train(data, tmp_path / name)
        assert resumed.result.resumed_after == (3 if name == "kept" else 0)
        assert_same(weights_of(resumed.network), unbroken.weights)
        kept = {path.name.partition(".")[0] for path in (tmp_path / name).glob("mined-*")}
        assert kept == {"mined-4"}
        reports = [read_record(x / "mined-4.json") for x in (tmp_path / name, unbroken.folder)]
        assert reports[0] == reports[1]
        assert resumed.notes == unbroken.model.notes
    assert resumed.notes[0].startswith("mined after epoch 4: ")
    # Every sample has a pool, so that f is what was asked for.
    assert "effective mean hard share 0.3000, from the first mining on" in resumed.notes


def test_what_was_not_mined_is_said(data: TrainingSet, unbroken: Unbroken) -> None:
    batches = PLAN.batches(data.samples)
    retrieval = retrieval_of_rows(unbroken.model.network)
    before = MinedPools(batches, MINED, make_retrieval=retrieval, history_length=LENGTH, seed=0)
    before.prepare(0)
    assert batches.mean_hard_share == 0
    assert before.describe() == [
        "no hard negatives were mined: training ended within the first 2 epochs (model.hard.every)"
    ]
    # Before the first epoch, and not when the first mining is due.
    with pytest.raises(ValueError, match=r"ranks from 24 on.*24 items.*min_rank"):
        tiny(hard=Mined(min_rank=24, max_rank=80)).fit_samples(data)
