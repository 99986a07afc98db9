"""Mined hard negatives in training: renewed from the model, kept for a training that is stopped."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.small_log import event_table, small_config, write
from tfrs_pipeline.config import ConfigError, RunConfig, with_settings
from tfrs_pipeline.data.split import Holdout
from tfrs_pipeline.model.mining import MinedPools
from tfrs_pipeline.model.queries import exact_retriever
from tfrs_pipeline.model.two_tower import TwoTowerModel
from tfrs_pipeline.negatives.batches import TrainingBatches
from tfrs_pipeline.run import (
    Corpus,
    load_data,
    mined_pools,
    read_corpus,
    split_log,
    train_model,
    training_batches,
    training_samples,
)
from tfrs_pipeline.samples.build import RowLists, Samples

MIN_RANK, MAX_RANK = 10, 30


@dataclass(frozen=True)
class Ready:
    """A log of ratings, ready to train on."""

    config: RunConfig
    samples: Samples
    corpus: Corpus
    validation: Holdout


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    folder = tmp_path_factory.mktemp("log")
    path = write(event_table("int"), folder / "ratings.parquet")
    data = {"source": "ratings", "path": path, "rating_threshold": 3, "timestamp_unit": "s"}
    config = small_config(
        folder,
        data,
        samples={
            "history_length": 10,
            "easy_negatives": [{"alpha": 0, "num": 32}],
            "hard_share": 0.2,
            "hard_negatives": [{"stage": "mined", "num": 4}],
            "hard_max_pool": 6,
            "mined_min_rank": MIN_RANK,
            "mined_max_rank": MAX_RANK,
            "mined_every": 2,
        },
        training={"max_epochs": 6},
    )
    tables = load_data(config.data)
    split = split_log(tables, config.split, config.seed)
    samples = training_samples(config, tables, split, ("train",), folder / "samples")
    corpus = read_corpus(tables, folder / "samples")
    return Ready(config, samples, corpus, split.validation)


class Stopped(Exception):
    """In the middle of a training."""


def trained(
    log: Ready, num_epochs: int, folder: Path | None = None, stop_after: int | None = None
) -> tuple[TwoTowerModel, TrainingBatches, MinedPools]:
    batches = training_batches(log.config, log.samples)
    mining = mined_pools(log.config, log.corpus, batches, folder=folder)
    assert mining is not None

    def on_epoch(epoch: int, logs: dict[str, float]) -> None:
        if epoch == stop_after:
            raise Stopped

    model, _ = train_model(
        log.config,
        log.config.model,
        log.corpus,
        batches,
        max_epochs=num_epochs,
        before_epochs=mining,
        checkpoint_folder=folder,
        on_epoch=on_epoch,
    )
    return model, batches, mining


def test_first_epochs_have_none_and_later_ones_those_of_the_model_then(log: Ready) -> None:
    model, batches, mining = trained(log, 2)
    assert batches.mean_hard_share == 0
    assert mining.reports == {}
    # The pools of epochs 3 and 4 are what the model of epoch 2 ranks from 10 to 29.
    _, batches, mining = trained(log, 4)
    assert set(mining.reports) == {2}
    assert batches.mean_hard_share == pytest.approx(0.2)
    rows = np.arange(1, len(log.corpus.candidate_ids) + 1)
    retriever = exact_retriever(model, np.arange(1, len(log.corpus.query_ids) + 1), rows)
    for batch in batches.dataset(50, 2):
        hard = batch["hard_candidate_row"].numpy()
        assert batch["hard_is_counted"].numpy().all()
        for user, history, own, drawn in zip(
            batch["query_row"].numpy().tolist(),
            batch["history_rows"].numpy(),
            batch["candidate_row"].numpy(),
            hard,
            strict=True,
        ):
            left_out = [*log.samples.known_positives[user], *log.samples.exposed[user], own]
            query = {"user_id": user, "history": history[history > 0][::-1]}
            ranking, _ = retriever.retrieve([query], MAX_RANK, [left_out])
            assert set(drawn.tolist()) <= set(ranking[0, MIN_RANK:].tolist())


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_a_stopped_training_ends_as_an_unbroken_one(
    log: Ready, tmp_path: Path, stop_after: int
) -> None:
    unbroken, _, reports = trained(log, 5)
    with pytest.raises(Stopped):
        trained(log, 5, tmp_path, stop_after)
    resumed, _, kept = trained(log, 5, tmp_path)
    for a, b in zip(unbroken.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert kept.reports == reports.reports
    assert set(kept.reports) == {2, 4}
    saved = json.loads((tmp_path / "mining.json").read_text())
    assert saved["4"] == kept.reports[4].as_dict()
    assert len(list(tmp_path.glob("mined-*.npz"))) == 1


def test_a_pool_is_replaced_for_its_own_stage_alone(log: Ready) -> None:
    batches = training_batches(log.config, log.samples)
    pool = RowLists.from_lists([np.array([3, 5])] * len(log.samples))
    with pytest.raises(ValueError, match="No hard negatives of stage 'ranked'"):
        batches.set_hard_pool("ranked", pool)
    with pytest.raises(ValueError, match=f"each of {len(log.samples)} samples. Received: 1"):
        batches.set_hard_pool("mined", RowLists.from_lists([np.array([3])]))
    batches.set_hard_pool("mined", pool)
    (batch,) = batches.dataset(0, 1)
    assert set(np.unique(batch["hard_candidate_row"])) == {3, 5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples.hard_negatives": [{"stage": "ranked"}]}, r"'ranked'.*no losers.*mined_1_100"),
        ({"samples.mined_max_rank": 10}, "mined_max_rank: got 10; must be above mined_min_rank"),
        ({"samples.mined_margin": -1}, "mined_margin"),
        ({"training.max_epochs": 2}, "mined_every: got 2.*nothing would be mined"),
    ],
)
def test_settings_that_cannot_be(log: Ready, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_settings(log.config, settings)


def test_the_preset_mines(log: Ready) -> None:
    config = with_settings(log.config, {"samples.preset": "mined_1_100"})
    assert config.samples.hard_share == 0.01
    assert [sampler.stage for sampler in config.samples.hard_negatives] == ["mined"]


def test_nothing_is_mined_where_nothing_is_asked_for(log: Ready) -> None:
    config = with_settings(log.config, {"samples.hard_share": 0})
    assert mined_pools(config, log.corpus, training_batches(config, log.samples)) is None


def test_a_corpus_without_such_ranks_is_refused(log: Ready) -> None:
    config = with_settings(
        log.config, {"samples.mined_min_rank": 100, "samples.mined_max_rank": 200}
    )
    batches = training_batches(config, log.samples)
    mining = mined_pools(config, log.corpus, batches)
    with pytest.raises(ValueError, match=r"ranks from 100 on.*80 items"):
        train_model(config, config.model, log.corpus, batches, max_epochs=3, before_epochs=mining)
