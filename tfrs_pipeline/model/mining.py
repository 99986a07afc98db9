"""Pools of hard negatives, mined from the model while it trains."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tfrs_pipeline.batches.hybrid import HybridBatches
from tfrs_pipeline.data.ids import are_listed
from tfrs_pipeline.durable import naming, read_whole, write_record
from tfrs_pipeline.model.queries import RetrieveRows
from tfrs_pipeline.negatives.hard import Mined
from tfrs_pipeline.samples.columns import map_column
from tfrs_pipeline.samples.store import RowLists, Samples

logger = logging.getLogger(__name__)

# Bounds a batch's look-up table to 64 MB.
_CELLS_PER_BATCH = 1 << 26


def mine_pools(
    retrieve: RetrieveRows,
    samples: Samples,
    mined: Mined,
    *,
    seed: int | Sequence[int],
    history_length: int,
    batch_size: int = 1024,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> RowLists:
    """Mines a pool of hard negatives for every sample, in random order.

    Retrieves once for all samples of a user with the same history. `batch_size` is the number of
    such states per call; it is lower with more than 65,000 items.
    """
    num_candidates = len(samples.counts) - 1
    is_later = np.zeros(num_candidates + 1, bool) if samples.is_later is None else samples.is_later
    batch_size = min(batch_size, max(1, _CELLS_PER_BATCH // (num_candidates + 1)))
    order, first = _by_state(samples)
    rng = np.random.default_rng(seed)
    sizes = np.zeros(len(samples), np.int64)
    kept: list[np.ndarray] = []
    for start in range(0, len(first) - 1, batch_size):
        ends = first[start : start + batch_size + 1]
        batch, states = order[ends[0] : ends[-1]], order[ends[:-1]]
        keys = samples.query_rows[states]
        masks = [lists.take(keys) for lists in (samples.known_positives, samples.exposed)]
        num_masked = int(np.sum([np.diff(x.offsets) for x in masks], axis=0).max())
        k = min(num_candidates, mined.max_rank + num_masked + int(is_later.sum()))
        found = retrieve(keys, samples.latest(states, history_length), k)
        is_known, is_exposed = (are_listed(found, lists, num_candidates) for lists in masks)
        state_of = np.repeat(np.arange(len(states)), np.diff(ends))
        rows = found[state_of]
        is_own = rows == samples.candidate_rows[batch][:, np.newaxis]
        is_never = is_own | (is_known | is_exposed)[state_of] | is_later[rows]
        left = mined.keep((rows > 0) & ~is_never)
        places, sizes[batch] = mined.draw_pools(left, rng)
        is_drawn = np.arange(places.shape[1]) < sizes[batch][:, np.newaxis]
        kept.append(np.take_along_axis(rows, places, axis=1)[is_drawn].astype(np.int32))
        on_progress(int(ends[-1]), len(samples))
    as_mined = RowLists(np.append(0, np.cumsum(sizes[order])), np.concatenate(kept))
    return as_mined.take(np.argsort(order))


def _by_state(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Sorts samples by query state; returns the order, and [num_states + 1] where states begin."""
    # States that mask equally many items stand together: the most of a batch decides its k. Without
    # an order of events, a history is the user's other positives.
    history = samples.candidate_rows if samples.num_earlier is None else samples.num_earlier
    state = samples.query_rows.astype(np.int64) << 32 | history
    depth = sum(
        np.diff(lists.offsets)[samples.query_rows]
        for lists in (samples.known_positives, samples.exposed)
    )
    order = np.lexsort([state, depth])
    is_first = np.append(True, np.diff(state[order]) != 0)
    return order, np.append(np.flatnonzero(is_first), len(order))


@dataclass(eq=False)
class MinedPools:
    """Mines hard negatives every few epochs of a training, for the batches' pool "mined".

    `folder` keeps the last pool for a training that is stopped. `pools` holds what was mined, by
    the number of epochs done then. `on_progress` is called with samples done and in all.
    """

    batches: HybridBatches
    mined: Mined
    make_retrieval: Callable[[], RetrieveRows]
    history_length: int
    seed: int
    folder: Path | None = None
    on_progress: Callable[[int, int], None] = lambda done, total: None
    pools: dict[int, RowLists] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_candidates = len(self.batches.samples.counts) - 1
        if num_candidates <= self.mined.min_rank:
            raise ValueError(
                f"Mining keeps ranks from {self.mined.min_rank} on, and the corpus has "
                f"{num_candidates} items. Lower model.hard.min_rank."
            )
        self.every = self.mined.every
        kept = [] if self.folder is None else sorted(self.folder.glob("mined-*.json"))
        for path in kept:
            # A finished training prepares nothing more, and describes its last pool.
            if (pool := self._load(int(path.stem.partition("-")[2]))) is not None:
                self.batches.set_hard_pool("mined", pool)

    def can_go_on(self, epoch: int) -> bool:
        """Returns whether training can resume after an epoch: its pool is kept or due now."""
        due = epoch - epoch % self.every
        return due in (0, epoch) or due in self.pools

    def prepare(self, epoch: int) -> None:
        """Gives the batches the pool of the next epochs: a kept one, or newly mined."""
        samples = self.batches.samples
        if epoch == 0:
            self.batches.set_hard_pool("mined", RowLists.empty(len(samples)))
            return
        pool = self._load(epoch)
        if pool is None:
            mined = mine_pools(
                self.make_retrieval(),
                samples,
                self.mined,
                seed=[self.seed, epoch],
                history_length=self.history_length,
                on_progress=self.on_progress,
            )
            pool = self._save(epoch, mined)
            self.pools = {epoch: pool}
            logger.info(*self.describe())
        self.batches.set_hard_pool("mined", pool)

    def describe(self) -> list[str]:
        """Says how many hard negatives the last mining found."""
        if not self.pools:
            return [
                "no hard negatives were mined: training ended within the first "
                f"{self.every} epochs (model.hard.every)"
            ]
        epoch, pool = max(self.pools.items())
        num_with = np.count_nonzero(np.diff(pool.offsets))
        return [
            f"mined after epoch {epoch}: {len(pool.values):,} hard negatives for "
            f"{num_with:,} of {len(pool):,} positives"
        ]

    def _load(self, epoch: int) -> RowLists | None:
        if self.folder is None or read_whole(self.folder / f"mined-{epoch}.json") is None:
            return None
        self.pools[epoch] = RowLists(*(map_column(path) for path in self._files(epoch)))
        return self.pools[epoch]

    def _save(self, epoch: int, pool: RowLists) -> RowLists:
        """Writes a pool, if there is a folder, and returns it mapped from there."""
        if self.folder is None:
            return pool
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path, array in zip(self._files(epoch), (pool.offsets, pool.values), strict=True):
                np.save(path, array)
        record = self.folder / f"mined-{epoch}.json"
        write_record(record, {}, self._files(epoch))
        for old in self.folder.glob("mined-*"):
            if old.name.partition(".")[0] != record.stem:
                old.unlink()
        return RowLists(*(map_column(path) for path in self._files(epoch)))

    def _files(self, epoch: int) -> list[Path]:
        assert self.folder is not None
        return [self.folder / f"mined-{epoch}.{name}.npy" for name in ("offsets", "values")]
