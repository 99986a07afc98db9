"""Mined hard negatives: who is kept, who is dropped and counted, against a slow loop."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfrs_pipeline.evaluation.topk import ExactRetriever
from tfrs_pipeline.negatives.mined import (
    MiningRules,
    mine_hard_negatives,
)
from tfrs_pipeline.retrieval import Query
from tfrs_pipeline.samples.build import RowLists, Samples

DIM = 8


def make_samples(
    rng: np.random.Generator, *, num_samples: int = 40, num_users: int = 9, num_candidates: int = 60
) -> Samples:
    """Draws samples whose masks are consistent: exposed items are never known positives."""
    query_rows = rng.integers(1, num_users + 1, num_samples)
    candidate_rows = rng.integers(1, num_candidates + 1, num_samples)
    known = [np.unique(candidate_rows[query_rows == user]) for user in range(num_users + 1)]
    exposed = [
        np.setdiff1d(rng.integers(1, num_candidates + 1, rng.integers(0, 15)), clicked)
        for clicked in known
    ]
    exposed[0] = np.zeros(0, int)
    sequences = [candidate_rows[query_rows == user] for user in range(num_users + 1)]
    place = np.array([np.sum(query_rows[:i] == user) for i, user in enumerate(query_rows)])
    return Samples(
        query_rows=query_rows.astype(np.int32),
        candidate_rows=candidate_rows.astype(np.int32),
        weights=np.ones(num_samples, np.float32),
        sequences=RowLists.from_lists(sequences),
        num_earlier=np.minimum(place, 3).astype(np.int32),
        known_positives=RowLists.from_lists(known),
        exposed=RowLists.from_lists(exposed),
        counts=np.bincount(candidate_rows, minlength=num_candidates + 1),
    )


class TableRetriever(ExactRetriever):
    """Embeds a query by its user and history, and remembers what it was asked."""

    def __init__(self, rng: np.random.Generator, num_users: int, num_candidates: int) -> None:
        users = rng.normal(size=(num_users + 1, DIM))
        items = rng.normal(size=(num_candidates + 1, DIM))

        def embed(queries: Sequence[Query]) -> np.ndarray:
            return np.stack(
                [
                    users[query["user_id"]]
                    # Oldest first: a reversed history would embed differently.
                    + sum((0.1 * (i + 1) * items[row] for i, row in enumerate(query["history"])), 0)
                    for query in queries
                ]
            )

        super().__init__(np.arange(1, num_candidates + 1), items[1:], embed)
        self.was_excluded = False

    def retrieve(
        self, queries: Sequence[Query], k: int, exclude: Sequence[Collection[Any]] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        self.was_excluded |= exclude is not None
        return super().retrieve(queries, k, exclude)


def eligible(samples: Samples, retriever: TableRetriever, rules: MiningRules) -> list[set[int]]:
    """Finds what may be kept for each sample, one sample at a time over the whole corpus."""
    result = []
    for i in range(len(samples)):
        user, positive = int(samples.query_rows[i]), int(samples.candidate_rows[i])
        query = {"user_id": user, "history": samples.history(i)}
        rows, scores = retriever.retrieve([query], len(samples.counts) - 1)
        score_of = dict(zip(rows[0].tolist(), scores[0].tolist(), strict=True))
        never = {positive, *samples.known_positives[user], *samples.exposed[user]}
        ranked = [row for row in rows[0].tolist() if row not in never]
        ranked = ranked[rules.min_rank : rules.max_rank]
        if rules.margin is not None:
            ranked = [row for row in ranked if score_of[row] <= score_of[positive] - rules.margin]
        result.append(set(ranked))
    return result


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    min_rank=st.integers(0, 40),
    width=st.integers(1, 60),
    max_pool=st.integers(1, 30),
    margin=st.sampled_from([None, 0.0, 1.5]),
    batch_size=st.integers(1, 50),
)
def test_pools_are_what_a_slow_loop_keeps(
    seed: int, min_rank: int, width: int, max_pool: int, margin: float | None, batch_size: int
) -> None:
    rng = np.random.default_rng(seed)
    samples = make_samples(rng)
    retriever = TableRetriever(rng, 9, 60)
    rules = MiningRules(min_rank, min_rank + width, margin, max_pool)
    pools, report = mine_hard_negatives(retriever, samples, rules, seed=seed, batch_size=batch_size)
    assert len(pools) == len(samples) == report.num_samples
    kept = eligible(samples, retriever, rules)
    for i, expected in enumerate(kept):
        assert len(pools[i]) == min(len(expected), max_pool)
        assert len(set(pools[i].tolist())) == len(pools[i])
        assert set(pools[i].tolist()) <= expected
    assert report.num_kept + report.beyond_pool == sum(map(len, kept))
    assert report.num_without == sum(len(pools[i]) == 0 for i in range(len(samples)))
    assert report.num_retrieved == (
        report.known_positives
        + report.exposed
        + report.better_rank
        + report.worse_rank
        + report.within_margin
        + report.beyond_pool
        + report.num_kept
    )
    assert not retriever.was_excluded  # What is dropped is counted here.


def test_counts_by_reason() -> None:
    # Scores fall with the row. User 1 clicked 1 and 4, was shown 2; its sample's positive is 4.
    samples = Samples(
        query_rows=np.array([1], np.int32),
        candidate_rows=np.array([4], np.int32),
        weights=np.ones(1, np.float32),
        sequences=RowLists.from_lists([np.zeros(0), np.array([1, 4])]),
        num_earlier=np.array([1], np.int32),
        known_positives=RowLists.from_lists([np.zeros(0), np.array([1, 4])]),
        exposed=RowLists.from_lists([np.zeros(0), np.array([2])]),
        counts=np.array([0, 1, 0, 0, 1, 0, 0, 0, 0, 0]),
    )
    retriever = ExactRetriever(
        np.arange(1, 10), -np.arange(9.0)[:, None], lambda queries: np.ones((len(queries), 1))
    )
    # Left: 3 5 6 7 8 9, ranks 0 to 5; scores -2 -4 -5 -6 -7 -8; the positive has -3.
    pools, report = mine_hard_negatives(
        retriever, samples, MiningRules(min_rank=1, max_rank=4, margin=1.5), seed=0
    )
    assert sorted(pools[0].tolist()) == [6, 7]  # 5 scores -4 > -3 - 1.5.
    assert report.as_dict() == {
        "num_samples": 1,
        "num_without": 0,
        "num_retrieved": 7,  # max_rank + 2 known + 1 exposed.
        "known_positives": 2,
        "exposed": 1,
        "better_rank": 1,
        "worse_rank": 0,
        "within_margin": 1,
        "beyond_pool": 0,
        "num_kept": 2,
    }


def test_draw_is_uniform_and_in_random_order() -> None:
    rng = np.random.default_rng(3)
    num = 4000
    samples = make_samples(rng, num_samples=num, num_users=1, num_candidates=60)
    empty = RowLists.from_lists([np.zeros(0), np.zeros(0)])
    samples = Samples(
        **{**vars(samples), "known_positives": empty, "exposed": empty},
    )
    samples.candidate_rows[:] = 60
    # One order for all: rows 1, 2, ..., so ranks 10 to 29 are rows 11 to 30.
    retriever = ExactRetriever(
        np.arange(1, 61), -np.arange(60.0)[:, None], lambda queries: np.ones((len(queries), 1))
    )
    pools, _ = mine_hard_negatives(
        retriever, samples, MiningRules(min_rank=10, max_rank=30, max_pool=5), seed=1
    )
    rows = np.stack([pools[i] for i in range(num)])
    assert set(np.unique(rows).tolist()) == set(range(11, 31))
    for place in range(5):  # Each place of a pool is a uniform draw of the 20.
        counts = np.bincount(rows[:, place] - 11, minlength=20)
        chi_squared = ((counts - num / 20) ** 2 / (num / 20)).sum()
        assert chi_squared < 19 + 5 * np.sqrt(2 * 19)  # 19 degrees of freedom, 5 deviations.


def test_refusals() -> None:
    samples = make_samples(np.random.default_rng(0))
    retriever = TableRetriever(np.random.default_rng(0), 9, 60)
    with pytest.raises(ValueError, match=r"ranks from 60 on.*60 items.*mined_min_rank"):
        mine_hard_negatives(retriever, samples, MiningRules(60, 80), seed=0)
    with pytest.raises(ValueError, match="min_rank < max_rank"):
        MiningRules(5, 5)
    with pytest.raises(ValueError, match="max_pool"):
        MiningRules(max_pool=0)
    with pytest.raises(ValueError, match="margin"):
        MiningRules(margin=-1.0)
