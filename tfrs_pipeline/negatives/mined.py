"""Hard negatives mined from a model, for logs that hold no losers of a funnel.

The current model retrieves for the query of every sample. Known positives and exposed items are
dropped, and of what is left the ranks from a to b are kept: the top is full of items that the user
would like and has not met, which would be false negatives. They enter the loss as any hard
negatives do (see `mixture`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from tfrs_pipeline.retrieval import Query, Retriever
from tfrs_pipeline.samples.build import RowLists, Samples

# Beside the stages of the funnel: where a pool was mined from a model.
MINED = "mined"

# A look-up table of a batch: 64 MB.
_CELLS_PER_BATCH = 1 << 26
# What drops items, in this order.
_FILTERS = (
    "known_positives",
    "exposed",
    "better_rank",
    "worse_rank",
    "within_margin",
    "beyond_pool",
)


@dataclass(frozen=True)
class MiningRules:
    """Which retrieved items are hard negatives.

    Args:
        min_rank: Best rank to keep, 0 being the top, counted once known positives and exposed items
            are out.
        max_rank: First rank not to keep.
        margin: Drop items that score above the positive's score less this margin, in the
            retriever's scores (cosines, for normalized towers); None keeps them.
        max_pool: Items kept for a sample, at most, drawn at random.

    Raises:
        ValueError: If the ranks are not in order, or margin or max_pool is out of range.
    """

    min_rank: int = 100
    max_rank: int = 500
    margin: float | None = None
    max_pool: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.min_rank < self.max_rank:
            raise ValueError(
                "Mined ranks must be 0 <= min_rank < max_rank. "
                f"Received: {self.min_rank} and {self.max_rank}"
            )
        if self.max_pool < 1:
            raise ValueError(f"max_pool must be 1 or more. Received: {self.max_pool}")
        if self.margin is not None and self.margin < 0:
            raise ValueError(f"margin must be 0 or more. Received: {self.margin}")


@dataclass(frozen=True)
class MiningReport:
    """What became of the retrieved items, all samples together.

    Args:
        num_samples: Samples that were mined for.
        num_without: Samples that were left with no hard negative.
        num_retrieved: Items retrieved.
        known_positives: Dropped: the sample's own positive and the user's other training positives.
        exposed: Dropped: exposed to the user in training and never clicked.
        better_rank: Dropped: ranked above `min_rank`.
        worse_rank: Dropped: ranked at `max_rank` or below, retrieved to make up for the dropped.
        within_margin: Dropped: scoring too near to the positive, or above it.
        beyond_pool: Left out by the draw of `max_pool`.
        num_kept: Hard negatives kept.
    """

    num_samples: int
    num_without: int
    num_retrieved: int
    known_positives: int
    exposed: int
    better_rank: int
    worse_rank: int
    within_margin: int
    beyond_pool: int
    num_kept: int

    def as_dict(self) -> dict[str, int]:
        """Returns the counts for JSON."""
        return asdict(self)


def mine_hard_negatives(
    retriever: Retriever,
    samples: Samples,
    rules: MiningRules,
    *,
    seed: int | Sequence[int],
    history_length: int | None = None,
    batch_size: int = 1024,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[RowLists, MiningReport]:
    """Mines a pool of hard negatives for every sample.

    Nothing is left out by the retriever itself: what the filters drop can then be counted.

    Args:
        retriever: Of the current model. Its candidate ids are candidate rows, from 1; it is asked
            with `user_id`, the query row, and `history`, candidate rows, oldest first.
        samples: Training samples.
        rules: Which ranks to keep.
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
    if num_candidates <= rules.min_rank:
        raise ValueError(
            f"Mining keeps ranks from {rules.min_rank} on, and the corpus has {num_candidates} "
            "items. Lower samples.mined_min_rank."
        )
    num_dropped_at_most = sum(
        np.diff(lists.offsets)[samples.query_rows]
        for lists in (samples.known_positives, samples.exposed)
    )
    batch_size = min(batch_size, max(1, _CELLS_PER_BATCH // (num_candidates + 1)))
    # Samples that need the same depth together: the deepest of a batch decides for all.
    order = np.argsort(num_dropped_at_most, kind="stable")
    rng = np.random.default_rng(seed)
    pools: list[np.ndarray] = [np.zeros(0, np.int32)] * len(samples)
    total = np.zeros(len(_FILTERS), np.int64)
    num_retrieved = 0
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        k = min(num_candidates, rules.max_rank + int(num_dropped_at_most[batch].max()))
        queries = [query_of_sample(samples, i, history_length) for i in batch.tolist()]
        rows, scores = retriever.retrieve(queries, k)
        is_found = rows > 0
        num_retrieved += int(is_found.sum())
        left, dropped = _kept(
            rows,
            scores,
            samples.candidate_rows[batch],
            _is_member(samples.known_positives, samples.query_rows[batch], rows, num_candidates),
            _is_member(samples.exposed, samples.query_rows[batch], rows, num_candidates),
            rules,
        )
        drawn = _drawn(left, rules.max_pool, rng)
        for i, row, places in zip(batch.tolist(), rows, drawn, strict=True):
            pools[i] = row[places]
        total += [*dropped, int(left.sum()) - sum(map(len, drawn))]
        on_progress(min(start + batch_size, len(order)), len(order))
    mined = RowLists.from_lists(pools)
    sizes = np.diff(mined.offsets)
    report = MiningReport(
        num_samples=len(samples),
        num_without=int(np.count_nonzero(sizes == 0)),
        num_retrieved=num_retrieved,
        num_kept=len(mined.values),
        **dict(zip(_FILTERS, total.tolist(), strict=True)),
    )
    return mined, report


def query_of_sample(samples: Samples, i: int, history_length: int | None = None) -> Query:
    """Makes the query of a sample for a retriever whose ids are rows."""
    return {"user_id": int(samples.query_rows[i]), "history": samples.history(i, history_length)}


def _kept(
    rows: np.ndarray,
    scores: np.ndarray,
    positive_rows: np.ndarray,
    is_known: np.ndarray,
    is_exposed: np.ndarray,
    rules: MiningRules,
) -> tuple[np.ndarray, list[int]]:
    """Applies the filters in turn: [b, k] bool, and how many each one dropped."""
    is_own = rows == positive_rows[:, np.newaxis]
    left = rows > 0
    dropped = []

    def drop(is_dropped: np.ndarray) -> None:
        nonlocal left
        dropped.append(int(np.count_nonzero(left & is_dropped)))
        left = left & ~is_dropped

    drop(is_known | is_own)
    drop(is_exposed)
    rank = np.cumsum(left, axis=1) - 1
    drop(rank < rules.min_rank)
    drop(rank >= rules.max_rank)
    if rules.margin is None:
        dropped.append(0)
    else:
        # A positive that was not retrieved scores no higher than anything that was.
        own_score = np.where(
            is_own.any(axis=1), np.where(is_own, scores, -np.inf).max(axis=1), -np.inf
        )
        drop(scores > own_score[:, np.newaxis] - rules.margin)
    return left, dropped


def _drawn(is_left: np.ndarray, max_pool: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Draws up to `max_pool` places of each line of a mask, in random order."""
    # What is not left sorts last.
    keys = np.where(is_left, rng.random(is_left.shape, np.float32), np.float32(2))
    num = np.minimum(is_left.sum(axis=1), max_pool)
    if max_pool < keys.shape[1]:
        lowest = np.argpartition(keys, max_pool, axis=1)[:, :max_pool]
    else:
        lowest = np.broadcast_to(np.arange(keys.shape[1]), keys.shape)
    in_order = np.argsort(np.take_along_axis(keys, lowest, axis=1), axis=1)
    places = np.take_along_axis(lowest, in_order, axis=1)
    return [line[:n] for line, n in zip(places, num.tolist(), strict=True)]


def _is_member(
    lists: RowLists, keys: np.ndarray, rows: np.ndarray, num_candidates: int
) -> np.ndarray:
    """Looks up candidate rows [n, k], -1 where empty, in the lists of keys [n]: [n, k] bool."""
    table = np.zeros((len(keys), num_candidates + 1), bool)
    for line, key in zip(table, keys.tolist(), strict=True):
        line[lists[key]] = True
    return np.take_along_axis(table, np.maximum(rows, 0), axis=1)
