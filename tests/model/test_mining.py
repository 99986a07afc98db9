"""Hard negatives mined from the model: what is kept, when, and in a training that is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.damage import damage
from tests.model.conftest import LENGTH, NUM_ITEMS, Stopped, assert_same, tiny, weights_of
from tfrs_pipeline.durable import read_record
from tfrs_pipeline.model import mining
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.model.mining import MinedPools, MiningReport, mine_pools, query_of_sample
from tfrs_pipeline.model.two_tower import TwoTower
from tfrs_pipeline.negatives.mined import Mined
from tfrs_pipeline.negatives.popularity import Popularity
from tfrs_pipeline.negatives.uniform import Uniform
from tfrs_pipeline.retrieval import Retriever

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

        def stop(epoch: int, logs: dict[str, float], last: int = last) -> None:
            if epoch == last:
                raise Stopped

        with pytest.raises(Stopped):
            make_model().fit_samples(data, folder=tmp_path, on_epoch=stop)
        # Nothing is mined for the first two epochs.
        assert (tmp_path / "mined-2.json").exists() == (last > 2)
    resumed = make_model().fit_samples(data, folder=tmp_path)
    assert_same(weights_of(resumed.network), weights_of(model.network))
    assert reports_in(tmp_path) == reports_in(folder)
    assert {path.name for path in tmp_path.glob("mined-*")} == {"mined-4.npz", "mined-4.json"}
    assert resumed.notes == model.notes
    assert resumed.notes[0].startswith("mined after epoch 4: ")
    # Every sample has a pool, so that f is what was asked for.
    assert "effective mean hard share 0.3000" in resumed.notes


def test_a_damaged_pool_is_mined_again(
    data: TrainingSet, unbroken: tuple[TwoTower, Path], tmp_path: Path
) -> None:
    """Of the model that it was mined from, which is not the one at which training stopped."""

    def stop(epoch: int, logs: dict[str, float]) -> None:
        if epoch == 3:
            raise Stopped

    with pytest.raises(Stopped):
        make_model().fit_samples(data, folder=tmp_path, on_epoch=stop)
    damage(tmp_path / "mined-2.npz", "flipped")
    resumed = make_model().fit_samples(data, folder=tmp_path)
    assert_same(weights_of(resumed.network), weights_of(unbroken[0].network))
    assert resumed.notes == unbroken[0].notes


def slow_pools(retriever: Retriever, data: TrainingSet) -> list[list[int]]:
    samples, pools = data.samples, []
    for i, (user, own) in enumerate(zip(samples.query_rows, samples.candidate_rows, strict=True)):
        never = {own, *samples.known_positives[user], *samples.exposed[user]}
        query = {"user_id": user, "history": samples.history(i, LENGTH)}
        (ranking,), _ = retriever.retrieve([query], NUM_ITEMS)
        pools.append([row for row in ranking if row not in never][4:12])
    return pools


def test_pools_are_what_a_slow_loop_keeps(
    data: TrainingSet, unbroken: tuple[TwoTower, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the model's own ranking, in blocks, with and without a limit on the pool."""
    retriever, samples = unbroken[0]._retriever_of_rows(), data.samples
    expected = slow_pools(retriever, data)
    assert {len(pool) for pool in expected} == {8}
    whole = Mined(min_rank=4, max_rank=12)
    pools, report = mine_pools(retriever, samples, whole, seed=0, history_length=LENGTH)
    for i, pool in enumerate(expected):
        assert sorted(pools[i]) == sorted(pool)
    monkeypatch.setattr(mining, "_CELLS_PER_BATCH", 7 * (NUM_ITEMS + 1))
    done: list[int] = []
    limited, report = mine_pools(
        retriever,
        samples,
        MINED,
        seed=[0, 2],
        history_length=LENGTH,
        on_progress=lambda n, total: done.append(n),
    )
    assert done == [*range(7, 120, 7), 120]
    for i, pool in enumerate(expected):
        assert len(set(limited[i])) == 5
        assert set(limited[i]) <= set(pool)
    known, exposed = 4 * 120, 2 * 120
    assert report == MiningReport(
        num_samples=120,
        num_without=0,
        num_retrieved=report.num_retrieved,
        num_kept=5 * 120,
        dropped={
            "known positives": report.dropped["known positives"],
            "exposed and not clicked": report.dropped["exposed and not clicked"],
            "of a better rank": 4 * 120,
            "of a worse rank": report.dropped["of a worse rank"],
            "beyond the pool's size": 3 * 120,
        },
    )
    # What is retrieved beyond the deepest rank covers every item that may be dropped.
    assert 0 < report.dropped["known positives"] <= known
    assert 0 < report.dropped["exposed and not clicked"] <= exposed
    assert report.num_retrieved == report.num_kept + sum(report.dropped.values())


def test_a_query_holds_the_latest_of_what_the_sample_knew(data: TrainingSet) -> None:
    i = int(np.flatnonzero(data.samples.num_earlier == 3)[0])
    user = int(data.samples.query_rows[i])
    sequence = data.samples.sequences[user]
    for length, expected in ((2, sequence[1:3]), (None, sequence[:3])):
        query = query_of_sample(data.samples, i, length)
        assert query["user_id"] == user
        np.testing.assert_array_equal(query["history"], expected)
    assert data.samples.candidate_rows[i] == sequence[3]


def test_what_cannot_be_mined_is_refused_or_said(
    data: TrainingSet, unbroken: tuple[TwoTower, Path]
) -> None:
    deep = Mined(min_rank=NUM_ITEMS, max_rank=200)
    with pytest.raises(ValueError, match=r"ranks from 24 on.*24 items. Lower model.hard.min_rank"):
        mine_pools(unbroken[0]._retriever_of_rows(), data.samples, deep, seed=0)
    batches = make_model().batches(data.samples)
    before = MinedPools(
        batches,
        MINED,
        make_retriever=unbroken[0]._retriever_of_rows,
        history_length=LENGTH,
        seed=0,
    )
    before.prepare(0)
    assert batches.mean_hard_share == 0
    assert before.describe() == [
        "no hard negatives were mined: training ended within the first 2 epochs (model.hard.every)"
    ]
    assert tiny()._mining(batches, None, lambda task, done, total: None) is None
