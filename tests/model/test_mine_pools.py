"""Mined hard negatives: who is kept, who is dropped and counted, against a slow loop."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small_batches import make_samples
from tfrs_pipeline.model.mining import mine_pools
from tfrs_pipeline.negatives.hard import Mined
from tfrs_pipeline.samples.store import RowLists, Samples

NUM_USERS, NUM_ITEMS, DIM = 9, 60, 8


def small_samples(seed: int) -> Samples:
    return make_samples(seed, num_samples=40, num_queries=NUM_USERS, num_candidates=NUM_ITEMS)


class TableRetrieval:
    """Ranks by a query's user and history, and remembers for whom it was asked."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._users = rng.normal(size=(NUM_USERS + 1, DIM))
        self._items = rng.normal(size=(NUM_ITEMS + 1, DIM))
        self.asked: list[tuple[int, ...]] = []

    def rank(self, user: int, history: Sequence[int]) -> list[int]:
        """Ranks the corpus for a user and a history, most recent first."""
        # By its place: a reversed history would rank otherwise.
        read = sum((0.1 * (i + 1) * self._items[row] for i, row in enumerate(history)), 0)
        scores = self._items[1:] @ (self._users[user] + read)
        return (1 + np.argsort(-scores)).tolist()

    def __call__(self, query_rows: np.ndarray, history_rows: np.ndarray, k: int) -> np.ndarray:
        found = np.zeros((len(query_rows), k), np.int32)
        for line, user, history in zip(found, query_rows, history_rows, strict=True):
            read = history[history > 0].tolist()
            self.asked.append((user, *read))
            line[:] = self.rank(user, read)[:k]
        return found


def eligible(samples: Samples, retrieval: TableRetrieval, mined: Mined, i: int) -> set[int]:
    """Finds what may be kept for a sample, over the whole corpus."""
    user, positive = int(samples.query_rows[i]), int(samples.candidate_rows[i])
    ranked = retrieval.rank(user, samples.history(i, NUM_ITEMS)[::-1].tolist())
    never = {positive, *samples.known_positives[user], *samples.exposed[user]}
    left = [row for row in ranked if row not in never]
    return set(left[mined.min_rank : mined.max_rank])


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    min_rank=st.integers(0, 40),
    width=st.integers(1, 60),
    max_pool=st.integers(1, 30),
    batch_size=st.integers(1, 50),
    is_ordered=st.booleans(),
)
def test_pools_are_what_a_slow_loop_keeps(
    seed: int, min_rank: int, width: int, max_pool: int, batch_size: int, is_ordered: bool
) -> None:
    samples = small_samples(seed)
    if not is_ordered:
        samples = dataclasses.replace(samples, num_earlier=None)
    retrieval = TableRetrieval(np.random.default_rng(seed))
    mined = Mined(min_rank=min_rank, max_rank=min_rank + width, max_pool=max_pool)
    pools = mine_pools(
        retrieval, samples, mined, seed=seed, history_length=NUM_ITEMS, batch_size=batch_size
    )
    # Once for each user and history; of what is left without the positive, some are alike.
    assert len(retrieval.asked) == len(set(retrieval.asked)) or not is_ordered
    assert len(retrieval.asked) <= len(samples)
    assert len(pools) == len(samples)
    for i in range(len(samples)):
        expected = eligible(samples, retrieval, mined, i)
        assert len(pools[i]) == min(len(expected), max_pool)
        assert len(set(pools[i].tolist())) == len(pools[i])
        assert set(pools[i].tolist()) <= expected


def mined_by_row(samples: Samples, mined: Mined) -> RowLists:
    """Mines by a retrieval that ranks rows 1, 2, ... for everybody."""

    def retrieve(query_rows: np.ndarray, history_rows: np.ndarray, k: int) -> np.ndarray:
        return np.tile(np.arange(1, k + 1), (len(query_rows), 1))

    return mine_pools(retrieve, samples, mined, seed=0, history_length=3)


def test_ranks_count_what_may_be_a_negative() -> None:
    """Of items 1 to 9, user 1 clicked 1 and was shown 2; 4 and 9 came later, if any."""
    plain = dataclasses.replace(
        Samples.from_pairs([1], [1], num_queries=1, num_candidates=9),
        exposed=RowLists.from_lists([np.zeros(0), np.array([2])]),
    )
    later = dataclasses.replace(plain, is_later=np.isin(np.arange(10), [4, 9]))
    # Left are 3 to 9, and 3 5 6 7 8: ranks from 0.
    for samples, kept in ((plain, [4, 5, 6]), (later, [5, 6, 7])):
        pools = mined_by_row(samples, Mined(min_rank=1, max_rank=4, max_pool=9))
        assert sorted(pools[0].tolist()) == kept


def test_draw_is_uniform_and_in_random_order() -> None:
    num = 4000
    samples = Samples.from_pairs([1] * num, [60] * num, num_queries=1, num_candidates=60)
    # Ranks 10 to 29 are rows 11 to 30.
    pools = mined_by_row(samples, Mined(min_rank=10, max_rank=30, max_pool=5))
    rows = np.stack([pools[i] for i in range(num)])
    assert set(np.unique(rows).tolist()) == set(range(11, 31))
    for place in range(5):  # Each place of a pool is a uniform draw of the 20.
        counts = np.bincount(rows[:, place] - 11, minlength=20)
        chi_squared = ((counts - num / 20) ** 2 / (num / 20)).sum()
        assert chi_squared < 19 + 5 * np.sqrt(2 * 19)  # 19 degrees of freedom, 5 deviations.
