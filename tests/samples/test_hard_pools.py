"""Hard negatives from logs, against a slow loop; the rules that refuse."""

from datetime import UTC, datetime, timedelta
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pytest

from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.samples.hard_pools import (
    HardNegativeRules,
    add_pools,
    find_losers,
    pool_column,
)

START = datetime(2024, 1, 1, tzinfo=UTC)
CONNECTION = ibis.duckdb.connect()
STAGES = [stage.value for stage in Stage]


def random_log(seed: int, *, num_requests: int = 25) -> list[dict[str, Any]]:
    """Makes a log of requests, an hour apart at most, items of every stage, ranks for some."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    hour = 0.0
    for request in range(num_requests):
        hour += float(rng.choice([0.0, 0.3, 1.0]))
        user = int(rng.integers(1, 4))
        items = rng.permutation(np.arange(1, 31))[: rng.integers(4, 14)]
        stages = rng.choice(STAGES, len(items), p=[0.3, 0.3, 0.2, 0.1, 0.1])
        ranked = [i for i, stage in enumerate(stages) if stage in ("ranked", "exposed", "clicked")]
        ranks: dict[int, int] = dict(zip(rng.permutation(ranked).tolist(), range(99), strict=False))
        for i, (item, stage) in enumerate(zip(items.tolist(), stages.tolist(), strict=True)):
            has_rank = i in ranks and rng.random() < 0.9
            # Losers may carry the rank that the stage before gave them: another scale.
            lost_rank = int(rng.integers(50)) if i not in ranks and rng.random() < 0.5 else None
            rows.append(
                {
                    "query_row": user,
                    "candidate_row": item,
                    "stage": stage,
                    "time": START + timedelta(hours=hour),
                    "request_id": request,
                    "rank": ranks[i] if has_rank else lost_rank,
                    "event_number": len(rows),
                }
            )
    return rows


def as_table(rows: list[dict[str, Any]], *, drop: tuple[str, ...] = ()) -> ibis.Table:
    schema = pa.schema(
        [
            ("query_row", pa.int32()),
            ("candidate_row", pa.int32()),
            ("stage", pa.string()),
            ("time", pa.timestamp("us", "UTC")),
            ("request_id", pa.int64()),
            ("rank", pa.int32()),
            ("event_number", pa.int64()),
        ]
    )
    table = pa.Table.from_pylist(rows, schema).drop_columns(list(drop))
    return CONNECTION.create_table(ibis.util.gen_name("hard"), table)


def run(
    rows: list[dict[str, Any]], rules: HardNegativeRules, *, drop: tuple[str, ...] = ()
) -> tuple[dict[int, dict[str, list[int]]], dict[str, int]]:
    """Returns event number of the positive -> stage -> pool, and the counts removed."""
    events = as_table(rows, drop=drop)
    known = events.filter(events["stage"] == "clicked").select("query_row", "candidate_row")
    exposed = events.filter(events["stage"] == "exposed").select("query_row", "candidate_row")
    known = known.distinct()
    exposed = exposed.distinct().anti_join(known, ["query_row", "candidate_row"])
    losers, removed = find_losers(events, rules, known, exposed)
    positives = events.filter(events["stage"] == "clicked")
    table = add_pools(positives, losers, rules, seed=0).to_pyarrow().to_pylist()
    pools = {
        row["event_number"]: {stage.value: row[pool_column(stage)] or [] for stage in rules.stages}
        for row in table
    }
    return pools, removed


def slow_pools(
    rows: list[dict[str, Any]], rules: HardNegativeRules
) -> dict[int, dict[str, set[int]]]:
    clicked = {(r["query_row"], r["candidate_row"]) for r in rows if r["stage"] == "clicked"}
    exposed = {(r["query_row"], r["candidate_row"]) for r in rows if r["stage"] == "exposed"}

    def is_low(row: dict[str, Any]) -> bool:
        if row["rank"] is None:
            return False
        if rules.min_rank is not None:
            return bool(row["rank"] >= rules.min_rank)
        ranks = sorted(
            r["rank"]
            for r in rows
            if r["request_id"] == row["request_id"]
            and r["rank"] is not None
            and r["stage"] in ("ranked", "exposed", "clicked")
        )
        num_low = int(np.ceil(rules.bottom_share * len(ranks)))
        return row["rank"] in ranks[len(ranks) - num_low :]

    def usable(row: dict[str, Any], stage: str) -> bool:
        pair = (row["query_row"], row["candidate_row"])
        if row["stage"] != stage or pair in clicked:
            return False
        if stage != "exposed" and pair in exposed:
            return False
        return stage != "ranked" or is_low(row)

    pools = {}
    for positive in rows:
        if positive["stage"] != "clicked":
            continue
        of_stage = {}
        for stage in rules.stages:
            losers = [r for r in rows if usable(r, stage.value)]
            losers = [r for r in losers if r["query_row"] == positive["query_row"]]
            own = {r["candidate_row"] for r in losers if r["request_id"] == positive["request_id"]}
            if len(own) < rules.min_pool:
                own |= {
                    r["candidate_row"]
                    for r in losers
                    if positive["time"] - rules.window <= r["time"] <= positive["time"]
                }
            of_stage[stage.value] = own
        pools[positive["event_number"]] = of_stage
    return pools


RULES = {
    "losers": HardNegativeRules([Stage.RETRIEVED, Stage.PRE_RANKED], window=timedelta(hours=2)),
    "own request only": HardNegativeRules([Stage.PRE_RANKED], min_pool=0),
    "low part by share": HardNegativeRules([Stage.RANKED], bottom_share=0.3),
    "low part by rank": HardNegativeRules([Stage.RANKED, Stage.RETRIEVED], min_rank=2),
    "exposed, insisted on": HardNegativeRules([Stage.EXPOSED, Stage.RETRIEVED], allow_exposed=True),
}


@pytest.mark.parametrize("name", RULES)
def test_pools_match_a_loop(name: str) -> None:
    num_found = 0
    for seed in range(4):
        rows = random_log(seed)
        pools, _ = run(rows, RULES[name])
        expected = slow_pools(rows, RULES[name])
        assert {k: {s: set(p) for s, p in v.items()} for k, v in pools.items()} == expected
        assert all(len(p) == len(set(p)) for v in pools.values() for p in v.values())
        num_found += sum(len(p) for v in pools.values() for p in v.values())
    assert num_found > 20


def test_what_the_guard_removes_is_counted() -> None:
    rows = random_log(1)
    clicked = {(r["query_row"], r["candidate_row"]) for r in rows if r["stage"] == "clicked"}
    exposed = {(r["query_row"], r["candidate_row"]) for r in rows if r["stage"] == "exposed"}
    losers = [
        (r["query_row"], r["candidate_row"]) for r in rows if r["stage"] in ("retrieved", "ranked")
    ]
    rules = HardNegativeRules([Stage.RETRIEVED, Stage.RANKED], min_rank=0)
    _, removed = run(rows, rules)
    without_rank = [r for r in rows if r["stage"] == "ranked" and r["rank"] is None]
    losers = [
        (r["query_row"], r["candidate_row"])
        for r in rows
        if r["stage"] in ("retrieved", "ranked") and r not in without_rank
    ]
    assert removed == {
        "ranked without a rank": len(without_rank),
        "ranked without a request": 0,
        "ranked, not in the low part": 0,
        "clicked by the user in training": sum(pair in clicked for pair in losers),
        "exposed to the user and not clicked": sum(
            pair in exposed and pair not in clicked for pair in losers
        ),
    }
    assert min(removed["clicked by the user in training"], len(without_rank)) > 0


def test_without_a_rank_nothing_ranked_is_used() -> None:
    pools, removed = run(random_log(0), RULES["low part by share"], drop=("rank",))
    assert all(not pool["ranked"] for pool in pools.values())
    assert removed["ranked without a rank"] > 0


def test_without_requests_the_window_serves() -> None:
    rows = random_log(2)
    pools, _ = run(rows, RULES["losers"], drop=("request_id",))
    without = [{**row, "request_id": -i} for i, row in enumerate(rows, 1)]
    expected = slow_pools(without, RULES["losers"])
    assert {k: {s: set(p) for s, p in v.items()} for k, v in pools.items()} == expected


def test_large_pools_are_thinned_at_random_and_by_the_seed() -> None:
    rows = [
        {
            "query_row": 1,
            "candidate_row": item,
            "stage": "clicked" if item == 1 else "retrieved",
            "time": START,
            "request_id": 0,
            "rank": None,
            "event_number": item,
        }
        for item in range(1, 200)
    ]
    rules = HardNegativeRules([Stage.RETRIEVED], max_pool=50)
    pool = run(rows, rules)[0][1]["retrieved"]
    assert len(set(pool)) == 50
    assert pool == run(rows, rules)[0][1]["retrieved"]
    # 50 of 198 in any order: about a quarter are of the first quarter.
    assert 3 <= sum(item < 50 for item in pool) <= 25


def test_exposed_items_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"never retrieval negatives.*allow_exposed_as_negatives"):
        HardNegativeRules([Stage.EXPOSED])
    with pytest.raises(ValueError, match="a positive"):
        HardNegativeRules([Stage.CLICKED])
    with pytest.raises(ValueError, match="bottom_share"):
        HardNegativeRules([Stage.RANKED], bottom_share=0)
