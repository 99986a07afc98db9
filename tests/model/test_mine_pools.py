"""Mined hard negatives: who is kept, who is dropped and counted, against a slow loop."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small_batches import make_samples
from tfrs_pipeline.evaluation.topk import ExactRetriever
from tfrs_pipeline.model.mining import MiningReport, mine_pools
from tfrs_pipeline.negatives.mined import Mined
from tfrs_pipeline.retrieval import Query
from tfrs_pipeline.samples.store import RowLists, Samples

NUM_USERS, NUM_ITEMS, DIM = 9, 60, 8


def small_samples(seed: int) -> Samples:
    return make_samples(seed, num_samples=40, num_queries=NUM_USERS, num_candidates=NUM_ITEMS)


class TableRetriever(ExactRetriever):
    """Embeds a query by its user and history, and remembers what it was asked."""

    def __init__(self, rng: np.random.Generator) -> None:
        users = rng.normal(size=(NUM_USERS + 1, DIM))
        items = rng.normal(size=(NUM_ITEMS + 1, DIM))

        def embed(queries: Sequence[Query]) -> np.ndarray:
            return np.stack(
                [
                    users[query["user_id"]]
                    # Oldest first: a reversed history would embed differently.
                    + sum((0.1 * (i + 1) * items[row] for i, row in enumerate(query["history"])), 0)
                    for query in queries
                ]
            )

        super().__init__(np.arange(1, NUM_ITEMS + 1), items[1:], embed)
        self.was_excluded = False

    def retrieve(
        self, queries: Sequence[Query], k: int, exclude: Sequence[Collection[Any]] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        self.was_excluded |= exclude is not None
        return super().retrieve(queries, k, exclude)


def eligible(samples: Samples, retriever: TableRetriever, mined: Mined, i: int) -> set[int]:
    """Finds what may be kept for a sample, over the whole corpus."""
    user, positive = int(samples.query_rows[i]), int(samples.candidate_rows[i])
    query = {"user_id": user, "history": samples.history(i, 3)}
    (ranked,), _ = retriever.retrieve([query], NUM_ITEMS)
    never = {positive, *samples.known_positives[user], *samples.exposed[user]}
    left = [row for row in ranked.tolist() if row not in never]
    return set(left[mined.min_rank : mined.max_rank])


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    min_rank=st.integers(0, 40),
    width=st.integers(1, 60),
    max_pool=st.integers(1, 30),
    batch_size=st.integers(1, 50),
)
def test_pools_are_what_a_slow_loop_keeps(
    seed: int, min_rank: int, width: int, max_pool: int, batch_size: int
) -> None:
    samples = small_samples(seed)
    retriever = TableRetriever(np.random.default_rng(seed))
    mined = Mined(min_rank=min_rank, max_rank=min_rank + width, max_pool=max_pool)
    pools, report = mine_pools(
        retriever, samples, mined, seed=seed, history_length=3, batch_size=batch_size
    )
    assert not retriever.was_excluded  # What is dropped is counted here.
    assert len(pools) == len(samples) == report.num_samples
    num_eligible = 0
    for i in range(len(samples)):
        expected = eligible(samples, retriever, mined, i)
        num_eligible += len(expected)
        assert len(pools[i]) == min(len(expected), max_pool)
        assert len(set(pools[i].tolist())) == len(pools[i])
        assert set(pools[i].tolist()) <= expected
    assert report.num_kept + report.dropped["beyond the pool's size"] == num_eligible
    assert report.num_without == sum(len(pools[i]) == 0 for i in range(len(samples)))
    assert report.num_retrieved == report.num_kept + sum(report.dropped.values())


def falling_scores(num_items: int) -> ExactRetriever:
    """Ranks rows 1, 2, ... for everybody."""
    embeddings = -np.arange(float(num_items))[:, np.newaxis]
    return ExactRetriever(
        np.arange(1, num_items + 1), embeddings, lambda queries: np.ones((len(queries), 1))
    )


def test_counts_by_reason() -> None:
    # User 1 clicked 1 and 4, was shown 2. Left: 3 5 6 7 8 9, ranks 0 to 5.
    samples = dataclasses.replace(
        Samples.from_pairs([1, 1], [1, 4], num_queries=1, num_candidates=9),
        exposed=RowLists.from_lists([np.zeros(0), np.array([2])]),
    )
    pools, report = mine_pools(
        falling_scores(9), samples, Mined(min_rank=1, max_rank=4, max_pool=2), seed=0
    )
    assert set(pools[0].tolist()) <= {5, 6, 7}
    assert report == MiningReport(
        num_samples=2,
        num_without=0,
        num_retrieved=14,  # Of each sample max_rank + 2 known + 1 exposed.
        num_kept=4,
        dropped={
            "known positives": 4,
            "exposed and not clicked": 2,
            "of a better rank": 2,
            "of a worse rank": 0,
            "beyond the pool's size": 2,
        },
    )


def test_draw_is_uniform_and_in_random_order() -> None:
    num = 4000
    samples = Samples.from_pairs([1] * num, [60] * num, num_queries=1, num_candidates=60)
    # Ranks 10 to 29 are rows 11 to 30.
    pools, _ = mine_pools(
        falling_scores(60), samples, Mined(min_rank=10, max_rank=30, max_pool=5), seed=1
    )
    rows = np.stack([pools[i] for i in range(num)])
    assert set(np.unique(rows).tolist()) == set(range(11, 31))
    for place in range(5):  # Each place of a pool is a uniform draw of the 20.
        counts = np.bincount(rows[:, place] - 11, minlength=20)
        chi_squared = ((counts - num / 20) ** 2 / (num / 20)).sum()
        assert chi_squared < 19 + 5 * np.sqrt(2 * 19)  # 19 degrees of freedom, 5 deviations.


def test_a_corpus_without_such_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ranks from 60 on.*60 items.*min_rank"):
        mine_pools(falling_scores(60), small_samples(0), Mined(min_rank=60, max_rank=80), seed=0)
