"""Pools of mined hard negatives, renewed from the model as it trains."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tfrs_pipeline.model.two_tower import TwoTowerModel
from tfrs_pipeline.negatives.batches import TrainingBatches
from tfrs_pipeline.negatives.mined import (
    MINED,
    MiningReport,
    MiningRules,
    mine_hard_negatives,
)
from tfrs_pipeline.retrieval import Retriever
from tfrs_pipeline.samples.build import RowLists

logger = logging.getLogger(__name__)


class MinedPools:
    """Mines hard negatives every few epochs of a training (see `training.BeforeEpochs`).

    The first epochs have none: a model that has learned nothing ranks at random, and f is 0 in rows
    without a hard negative.

    Args:
        batches: Of the training; they draw from the stage "mined".
        rules: Which ranks to keep.
        every: Epochs between two minings.
        make_retriever: Makes the model of the moment a retriever whose ids are rows.
        seed: Of the draws.
        folder: Where pools are kept, so that a stopped training goes on with the same ones.
        on_progress: Called while mining with the samples done and their total.

    Attributes:
        reports: Epochs done -> what the mining then kept and dropped.
    """

    def __init__(
        self,
        batches: TrainingBatches,
        rules: MiningRules,
        *,
        every: int,
        make_retriever: Callable[[TwoTowerModel], Retriever],
        seed: int,
        folder: Path | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.every = every
        self._batches = batches
        self._rules = rules
        self._make_retriever = make_retriever
        self._seed = seed
        self._folder = folder
        self._on_progress = on_progress
        self.reports: dict[int, MiningReport] = {}
        if folder is not None and (folder / "mining.json").exists():
            saved = json.loads((folder / "mining.json").read_text())
            self.reports = {int(epoch): MiningReport(**report) for epoch, report in saved.items()}
            # A training that is over asks for no more pools: what it had is what it reports.
            if (pool := self._load(max(self.reports))) is not None:
                batches.set_hard_pool(MINED, pool)

    def prepare(self, model: TwoTowerModel, epoch: int) -> None:
        """Gives the batches the pools of the next epochs: mined now, or kept from before."""
        if epoch == 0:
            nothing = RowLists.from_lists([np.zeros(0, np.int32)] * self._batches.num_samples)
            self._batches.set_hard_pool(MINED, nothing)
            return
        pool = self._load(epoch)
        if pool is None:
            pool, report = mine_hard_negatives(
                self._make_retriever(model),
                self._batches.samples,
                self._rules,
                seed=[self._seed, epoch],
                history_length=self._batches.history_length,
                on_progress=self._on_progress,
            )
            self.reports[epoch] = report
            logger.info("mined after epoch %d: %s", epoch, report)
            self._save(epoch, pool)
        self._batches.set_hard_pool(MINED, pool)

    def _path(self, epoch: int) -> Path | None:
        return None if self._folder is None else self._folder / f"mined-{epoch}.npz"

    def _load(self, epoch: int) -> RowLists | None:
        path = self._path(epoch)
        if path is None or not path.exists():
            return None
        with np.load(path) as saved:
            return RowLists(saved["offsets"], saved["values"])

    def _save(self, epoch: int, pool: RowLists) -> None:
        path = self._path(epoch)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob("mined-*.npz"):
            old.unlink()
        reports = {str(number): report.as_dict() for number, report in self.reports.items()}
        _replace(path.parent / "mining.json", json.dumps(reports, indent=2).encode())
        partial = path.with_suffix(".partial")
        with partial.open("wb") as opened:
            np.savez(opened, offsets=pool.offsets, values=pool.values)
        os.replace(partial, path)


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
