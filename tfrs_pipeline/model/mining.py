"""Pools of hard negatives mined from the model as it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tfrs_pipeline.batches.hybrid import HybridBatches
from tfrs_pipeline.durable import is_whole, naming, read_record, write_record
from tfrs_pipeline.negatives.mined import Mined
from tfrs_pipeline.retrieval import Query, Retriever
from tfrs_pipeline.samples.store import RowLists, Samples

logger = logging.getLogger(__name__)

# A look-up table of a batch: 64 MB.
_CELLS_PER_BATCH = 1 << 26


@dataclass(frozen=True)
class MiningReport:
    """What became of the retrieved items, all samples together.

    Args:
        num_samples: Samples that were mined for.
        num_without: Samples that were left with no hard negative.
        num_retrieved: Items retrieved.
        num_kept: Hard negatives kept.
        dropped: Items dropped by reason, in the order of the filters.
    """

    num_samples: int
    num_without: int
    num_retrieved: int
    num_kept: int
    dropped: dict[str, int]


def mine_pools(
    retriever: Retriever,
    samples: Samples,
    mined: Mined,
    *,
    seed: int | Sequence[int],
    history_length: int | None = None,
    batch_size: int = 1024,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[RowLists, MiningReport]:
    """Mines a pool of hard negatives for every sample.

    Nothing is excluded by the retriever itself: what the filters drop can then be counted.

    Args:
        retriever: Of the current model. Its candidate ids are candidate rows, from 1; it is asked
            with `user_id`, the query row, and `history`, candidate rows, oldest first.
        samples: Training samples.
        mined: Which ranks to keep.
        seed: Of the draw where a pool exceeds `max_pool`, and of the order within a pool.
        history_length: Most recent items of a history in a query; None is all.
        batch_size: Samples a call of the retriever; fewer for a corpus of more than 65,000 items.
        on_progress: Called after each batch with the samples done and their total.

    Returns:
        One list per sample, in the order of `samples`, candidate rows in random order; and the
        counts of what was dropped.

    Raises:
        ValueError: If the corpus has no rank `min_rank`, so that nothing can be kept.
    """
    num_candidates = len(samples.counts) - 1
    if num_candidates <= mined.min_rank:
        raise ValueError(
            f"Mining keeps ranks from {mined.min_rank} on, and the corpus has {num_candidates} "
            "items. Lower model.hard.min_rank."
        )
    masks = (samples.known_positives, samples.exposed)
    num_dropped_at_most = sum(np.diff(lists.offsets)[samples.query_rows] for lists in masks)
    batch_size = min(batch_size, max(1, _CELLS_PER_BATCH // (num_candidates + 1)))
    # Samples that need the same depth together: the deepest of a batch decides for all.
    order = np.argsort(num_dropped_at_most, kind="stable")
    rng = np.random.default_rng(seed)
    pools: list[np.ndarray] = [np.zeros(0, np.int32)] * len(samples)
    dropped: dict[str, int] = {}
    num_retrieved = 0
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        k = min(num_candidates, mined.max_rank + int(num_dropped_at_most[batch].max()))
        queries = [query_of_sample(samples, i, history_length) for i in batch.tolist()]
        rows, _ = retriever.retrieve(queries, k)
        num_retrieved += int(np.count_nonzero(rows > 0))
        is_known, is_exposed = (
            _is_member(lists, samples.query_rows[batch], rows, num_candidates) for lists in masks
        )
        is_known |= rows == samples.candidate_rows[batch][:, np.newaxis]
        left, by_reason = mined.keep(rows > 0, is_known, is_exposed)
        drawn = mined.draw_pools(left, rng)
        for i, row, places in zip(batch.tolist(), rows, drawn, strict=True):
            pools[i] = row[places].astype(np.int32)
        by_reason["beyond the pool's size"] = int(left.sum()) - sum(map(len, drawn))
        dropped = {name: dropped.get(name, 0) + count for name, count in by_reason.items()}
        on_progress(min(start + batch_size, len(order)), len(order))
    pool = RowLists.from_lists(pools)
    num_without = int(np.count_nonzero(np.diff(pool.offsets) == 0))
    return pool, MiningReport(len(samples), num_without, num_retrieved, len(pool.values), dropped)


def query_of_sample(samples: Samples, i: int, history_length: int | None = None) -> Query:
    """Makes the query of a sample for a retriever whose ids are rows."""
    return {"user_id": int(samples.query_rows[i]), "history": samples.history(i, history_length)}


def _is_member(
    lists: RowLists, keys: np.ndarray, rows: np.ndarray, num_candidates: int
) -> np.ndarray:
    """Looks up candidate rows [n, k], 0 where empty, in the lists of keys [n]: [n, k] bool."""
    table = np.zeros((len(keys), num_candidates + 1), bool)
    for line, key in zip(table, keys.tolist(), strict=True):
        line[lists[key]] = True
    return np.take_along_axis(table, np.maximum(rows, 0), axis=1)


class MinedPools:
    """Mines hard negatives every few epochs of a training (see `fit.BeforeEpochs`).

    Args:
        batches: Of the training; they draw from the pool "mined".
        mined: Which ranks to keep, and how often to mine.
        make_retriever: Makes a retriever, whose ids are rows, of the model as it is now.
        history_length: Most recent items of a history in a query.
        seed: Of the draws.
        folder: Where pools are kept, so that a stopped training goes on with the same ones.
        on_progress: Called while mining with the samples done and their total.

    Attributes:
        every: Epochs between two minings.
        reports: Epochs done -> what the mining then kept and dropped.
    """

    def __init__(
        self,
        batches: HybridBatches,
        mined: Mined,
        *,
        make_retriever: Callable[[], Retriever],
        history_length: int,
        seed: int,
        folder: Path | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.every = mined.every
        self._batches = batches
        self._mined = mined
        self._make_retriever = make_retriever
        self._history_length = history_length
        self._seed = seed
        self._folder = folder
        self._on_progress = on_progress
        self.reports: dict[int, MiningReport] = {}
        kept = [] if folder is None else sorted(folder.glob("mined-*.json"))
        for path in kept:
            # A training that is over asks for no more pools: what it had is what it reports.
            if (pool := self._load(int(path.stem.partition("-")[2]))) is not None:
                batches.set_hard_pool("mined", pool)

    def can_go_on(self, epoch: int) -> bool:
        """Whether the pools of the epochs that follow are kept, or to be mined now."""
        due = epoch - epoch % self.every
        return due in (0, epoch) or due in self.reports

    def prepare(self, epoch: int) -> None:
        """Gives the batches the pools of the next epochs: mined now, or kept from before."""
        samples = self._batches.samples
        if epoch == 0:
            nothing = RowLists.from_lists([np.zeros(0, np.int32)] * len(samples))
            self._batches.set_hard_pool("mined", nothing)
            return
        pool = self._load(epoch)
        if pool is None:
            pool, report = mine_pools(
                self._make_retriever(),
                samples,
                self._mined,
                seed=[self._seed, epoch],
                history_length=self._history_length,
                on_progress=self._on_progress,
            )
            self.reports[epoch] = report
            logger.info("mined after epoch %d: %s", epoch, report)
            self._save(epoch, pool)
        self._batches.set_hard_pool("mined", pool)

    def describe(self) -> list[str]:
        """Says what the last mining kept and dropped."""
        if not self.reports:
            return [
                "no hard negatives were mined: training ended within the first "
                f"{self.every} epochs (model.hard.every)"
            ]
        epoch, report = max(self.reports.items())
        reasons = ", ".join(f"{count:,} {why}" for why, count in report.dropped.items() if count)
        return [
            f"mined after epoch {epoch}: {report.num_kept:,} hard negatives for "
            f"{report.num_samples - report.num_without:,} of {report.num_samples:,} positives",
            f"dropped of {report.num_retrieved:,} retrieved: {reasons}",
        ]

    def _load(self, epoch: int) -> RowLists | None:
        if self._folder is None or not is_whole(self._folder / f"mined-{epoch}.json"):
            return None
        report = read_record(self._folder / f"mined-{epoch}.json", check_files=False)
        self.reports[epoch] = MiningReport(**report)
        with np.load(self._folder / f"mined-{epoch}.npz") as saved:
            return RowLists(saved["offsets"], saved["values"])

    def _save(self, epoch: int, pool: RowLists) -> None:
        if self._folder is None:
            return
        path = self._folder / f"mined-{epoch}.npz"
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, offsets=pool.offsets, values=pool.values)
        write_record(path.with_suffix(".json"), asdict(self.reports[epoch]), [path])
        for old in self._folder.glob("mined-*"):
            if old.stem != path.stem:
                old.unlink()
