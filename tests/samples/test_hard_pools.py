"""Hard negatives from funnel logs, against a slow loop."""

import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pytest

from tests.small_log import in_ibis
from tfrs_pipeline.data.histories import query_start
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.negatives.samplers import FunnelLosers
from tfrs_pipeline.samples.build import MAX_POOL, build_samples, draw_pools, find_losers
from tfrs_pipeline.samples.store import read_samples

START = datetime(2024, 1, 1, tzinfo=UTC)
STAGES = [stage.value for stage in Stage]
LAST_LIST = ("ranked", "exposed", "clicked", "disliked")


def random_log(seed: int, *, num_requests: int = 50) -> list[dict[str, Any]]:
    """Makes requests at most an hour apart, with items of every stage and ranks for some."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    hour = 0.0
    for request in range(num_requests):
        hour += float(rng.choice([0.0, 0.3, 1.0]))
        user = int(rng.integers(1, 4))
        items = rng.permutation(np.arange(1, 31))[: rng.integers(4, 14)]
        stages = rng.choice(STAGES, len(items), p=[0.3, 0.25, 0.2, 0.1, 0.1, 0.05])
        ranked = [i for i, stage in enumerate(stages) if stage in LAST_LIST]
        ranks: dict[int, int] = dict(zip(rng.permutation(ranked).tolist(), range(99), strict=False))
        for i, (item, stage) in enumerate(zip(items.tolist(), stages.tolist(), strict=True)):
            has_rank = i in ranks and rng.random() < 0.9
            # Losers may carry the rank of the stage before, which is on another scale.
            lost_rank = int(rng.integers(50)) if i not in ranks and rng.random() < 0.5 else None
            row = {"query_row": user, "candidate_row": item, "stage": stage, "request_id": request}
            row |= {"time": START + timedelta(hours=hour), "event_number": len(rows)}
            rows.append(row | {"rank": ranks[i] if has_rank else lost_rank})
    return rows


def as_table(rows: list[dict[str, Any]], *, drop: tuple[str, ...] = ()) -> ibis.Table:
    types = dict.fromkeys(("query_row", "candidate_row", "rank"), pa.int32())
    types |= dict.fromkeys(("request_id", "event_number"), pa.int64())
    schema = pa.schema(types | {"stage": pa.string(), "time": pa.timestamp("us", "UTC")})
    return in_ibis(pa.Table.from_pylist(rows, schema).drop_columns(list(drop)))


# Event number of the positive -> stage -> pool.
Pools = dict[int, dict[str, list[int]]]


def run(rows: list[dict[str, Any]], hard: FunnelLosers, *, drop: tuple[str, ...] = ()) -> Pools:
    """Returns event number of the positive -> stage -> pool."""
    events = as_table(rows, drop=drop).mutate(user_id=ibis._["query_row"])
    events = events.mutate(query_time=query_start(events, events["time"])[0])
    pairs = ("query_row", "candidate_row")
    known = events.filter(events["stage"] == "clicked").select(*pairs).distinct()
    was_shown = events["stage"].isin(["exposed", "disliked"])
    exposed = events.filter(was_shown).select(*pairs).distinct()
    losers = find_losers(events, hard, known, exposed.anti_join(known, pairs))
    positives = events.filter(events["stage"] == "clicked")
    numbers = positives["event_number"].to_pyarrow().to_pylist()
    pools: Pools = {number: {stage: [] for stage in hard.stages} for number in numbers}
    for stage, pool in draw_pools(positives, losers, hard, seed=0).items():
        for row in pool.order_by("candidate_row").to_pyarrow().to_pylist():
            pools[row["event_number"]][stage].append(row["candidate_row"])
    return pools


def pairs_of(rows: list[dict[str, Any]], stage: str) -> set[tuple[int, int]]:
    return {(r["query_row"], r["candidate_row"]) for r in rows if r["stage"] == stage}


def as_sets(pools: Pools) -> dict[int, dict[str, set[int]]]:
    assert all(len(p) == len(set(p)) for of_stage in pools.values() for p in of_stage.values())
    return {k: {stage: set(p) for stage, p in of_stage.items()} for k, of_stage in pools.items()}


def slow_pools(rows: list[dict[str, Any]], hard: FunnelLosers) -> dict[int, dict[str, set[int]]]:
    clicked = pairs_of(rows, "clicked")
    exposed = pairs_of(rows, "exposed") | pairs_of(rows, "disliked")

    def is_low(row: dict[str, Any]) -> bool:
        if row["rank"] is None:
            return False
        same = [r for r in rows if r["request_id"] == row["request_id"] and r["rank"] is not None]
        ranks = sorted(r["rank"] for r in same if r["stage"] in LAST_LIST)
        num_low = int(np.ceil(hard.bottom_share * len(ranks)))
        return row["rank"] in ranks[len(ranks) - num_low :]

    def usable(row: dict[str, Any], stage: str) -> bool:
        pair = (row["query_row"], row["candidate_row"])
        if row["stage"] != stage or pair in clicked | (exposed if stage != "exposed" else set()):
            return False
        return stage != "ranked" or is_low(row)

    pools: dict[int, dict[str, set[int]]] = {}
    for positive in rows:
        if positive["stage"] != "clicked":
            continue
        of_stage: dict[str, set[int]] = {}
        for stage in hard.stages:
            losers = [r for r in rows if usable(r, stage)]
            losers = [r for r in losers if r["query_row"] == positive["query_row"]]
            key = "time" if positive["request_id"] is None else "request_id"
            losers = [r for r in losers if (r["request_id"] is None) == (key == "time")]
            of_stage[stage] = {r["candidate_row"] for r in losers if r[key] == positive[key]}
        pools[positive["event_number"]] = of_stage
    return pools


LOSERS: dict[str, FunnelLosers] = {
    "of both stages": FunnelLosers(stages=("retrieved", "pre_ranked")),
    "low part by share": FunnelLosers(stages=("ranked",), bottom_share=0.3),
    "exposed, insisted on": FunnelLosers(stages=("exposed", "retrieved"), allow_exposed=True),
}


@pytest.mark.parametrize("name", LOSERS)
def test_pools_match_a_loop(name: str) -> None:
    rows = random_log(6, num_requests=30)
    pools = as_sets(run(rows, LOSERS[name]))
    assert pools == slow_pools(rows, LOSERS[name])
    assert sum(len(p) for of_stage in pools.values() for p in of_stage.values()) > 10


def test_without_ranks_no_ranked_item_is_a_loser() -> None:
    pools = run(random_log(0), LOSERS["low part by share"], drop=("rank",))
    assert all(not pool["ranked"] for pool in pools.values())


def test_without_a_request_id_the_time_tells_the_request() -> None:
    rows, hard = random_log(0), LOSERS["of both stages"]
    without = [{**row, "request_id": None} for row in rows]
    by_moment = slow_pools(without, hard)
    assert as_sets(run(rows, hard, drop=("request_id",))) == by_moment
    assert as_sets(run(without, hard)) == by_moment != slow_pools(rows, hard)
    some = [row if row["request_id"] % 3 else {**row, "request_id": None} for row in rows]
    assert as_sets(run(some, hard)) == slow_pools(some, hard)


def test_large_pools_are_thinned_at_random_and_by_the_seed() -> None:
    row = {"query_row": 1, "stage": "retrieved", "time": START, "request_id": 0, "rank": None}
    rows = [{**row, "candidate_row": item, "event_number": item} for item in range(1, 200)]
    rows[0]["stage"] = "clicked"
    hard = FunnelLosers(stages=("retrieved",))
    pool = run(rows, hard)[1]["retrieved"]
    assert len(set(pool)) == MAX_POOL
    assert pool == run(rows, hard)[1]["retrieved"]
    # About a quarter of the pool comes from the first quarter of the 198 losers.
    assert 10 <= sum(item < 50 for item in pool) <= 40


def test_a_low_part_is_no_item_larger_than_its_share() -> None:
    """.07 * 100 is 7.000000000000001 in binary."""
    row = {"query_row": 1, "stage": "ranked", "time": START, "request_id": 0}
    rows = [{**row, "candidate_row": n + 1, "event_number": n, "rank": n} for n in range(100)]
    rows[0]["stage"] = "clicked"
    pools = run(rows, FunnelLosers(stages=("ranked",), bottom_share=0.07))
    assert pools[0]["ranked"] == [94, 95, 96, 97, 98, 99, 100]


def test_pools_are_written_in_random_order(tmp_path: Path) -> None:
    """A batch draws neighbours in a pool, and neighbours by id may be much alike."""
    pairs = itertools.product(range(30), range(41))
    stages = ["clicked", *["retrieved"] * 40]
    rows = [{"user_id": user, "item_id": item, "stage": stages[item]} for user, item in pairs]
    table = pa.Table.from_pylist([{**row, "request_id": row["user_id"]} for row in rows])
    # The report counts removed losers. User 0 has two: an item exposed elsewhere, and a click.
    again = {**rows[0], "item_id": 41, "request_id": 99, "stage": "exposed"}
    more = [again, {**again, "request_id": 0, "stage": "retrieved"}]
    more.append({**more[1], "item_id": 0})
    table = pa.concat_tables([table, pa.Table.from_pylist(more, table.schema)])
    hard = FunnelLosers(stages=("retrieved",))
    report = build_samples(Log.from_table(table), tmp_path, seed=0, hard=hard)
    assert report["num_losers_removed"] == 2
    pools = read_samples(tmp_path).hard_pools["retrieved"]
    in_order = [pools[i] for i in range(len(pools))]
    assert all(sorted(pool) == list(range(2, 42)) for pool in in_order)
    # Of the 30 * 39 neighbours, about 2 in 40 also have adjacent rows.
    is_next = np.concatenate([np.abs(np.diff(pool)) == 1 for pool in in_order])
    assert 20 <= is_next.sum() <= 110
    # Many different items come first in a pool.
    assert len({pool[0] for pool in in_order}) > 12
