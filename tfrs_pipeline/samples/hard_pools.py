"""Hard negatives from funnel logs: items that lost in pre-rank or in rank.

They come from the positive's own request and, where that has too few, from the same user's recent
requests. The exposure guard stands before them: an item that was exposed to the user and not
clicked, or that the user clicked anywhere in training, is never a negative of that user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import ibis
import numpy as np

from tfrs_pipeline.data.schema import Stage

# Stages whose items lost to the positive. "exposed" is here for showing what it does, no more.
HARD_STAGES = (Stage.RETRIEVED, Stage.PRE_RANKED, Stage.RANKED, Stage.EXPOSED)


@dataclass(frozen=True)
class HardNegativeRules:
    """Which losers are hard negatives of a positive.

    Args:
        stages: Stages to use: retrieved (lost in pre-rank), pre_ranked (lost in rank), ranked (its
            low part).
        min_pool: A stage with fewer losers in the positive's own request takes those of the user's
            recent requests too.
        max_pool: Losers kept per positive and stage, drawn at random.
        window: How far back recent requests may lie.
        bottom_share: Low part of the ranked list: this share of the request's logged ranks.
        min_rank: Low part by rank instead (0 = best): this rank and worse.
        allow_exposed: Whether "exposed" may be a stage.
    """

    stages: Sequence[Stage]
    min_pool: int = 4
    max_pool: int = 100
    window: timedelta = timedelta(days=1)
    bottom_share: float = 0.5
    min_rank: int | None = None
    allow_exposed: bool = False

    def __post_init__(self) -> None:
        if Stage.CLICKED in self.stages:
            raise ValueError("A clicked item is a positive, not a hard negative.")
        if Stage.EXPOSED in self.stages and not self.allow_exposed:
            raise ValueError(
                "Items that were exposed and not clicked are never retrieval negatives: the funnel "
                "liked them enough to show them, and the lack of a click says as much of their "
                "position as of them. They are for ranking. To see what they do to retrieval, set "
                "allow_exposed_as_negatives."
            )
        if not 0 < self.bottom_share <= 1:
            raise ValueError(f"bottom_share must be in (0, 1]. Received: {self.bottom_share}")
        if self.min_pool < 0 or self.max_pool < 1:
            raise ValueError(
                "min_pool must be 0 or more and max_pool 1 or more. "
                f"Received: {self.min_pool} and {self.max_pool}"
            )


def pool_column(stage: Stage) -> str:
    """Names the column that holds the pool of a stage."""
    return f"hard_{stage.value}_rows"


def find_losers(
    events: ibis.Table, rules: HardNegativeRules, known: ibis.Table, exposed: ibis.Table
) -> tuple[ibis.Table, dict[str, int]]:
    """Finds the losers of each request that may be hard negatives, the guard applied.

    Args:
        events: Training events with query_row, candidate_row, stage, time; optional request_id,
            rank.
        rules: Which to take.
        known: (query_row, candidate_row) pairs clicked in training.
        exposed: (query_row, candidate_row) pairs exposed in training and never clicked.

    Returns:
        Table of query_row, candidate_row, stage, time and request_id (null where unknown), and
        counts of the rows removed, by reason.
    """
    if "request_id" not in events.columns:
        events = events.mutate(request_id=ibis.null("int64"))
    pairs = ["query_row", "candidate_row"]
    taken = events.filter(events["stage"].isin([stage.value for stage in rules.stages]))
    removed: dict[str, int] = {}
    if Stage.RANKED in rules.stages:
        taken, removed = _low_part(events, taken, rules)
    losers = taken.select(*pairs, "stage", "time", "request_id")
    removed["clicked by the user in training"] = _num_rows(losers.semi_join(known, pairs))
    losers = losers.anti_join(known, pairs)
    # The stage "exposed" itself is here only where the user insists.
    was_exposed = losers.filter(losers["stage"] == Stage.EXPOSED.value)
    others = losers.filter(losers["stage"] != Stage.EXPOSED.value)
    removed["exposed to the user and not clicked"] = _num_rows(others.semi_join(exposed, pairs))
    return others.anti_join(exposed, pairs).union(was_exposed), removed


def add_pools(
    positives: ibis.Table, losers: ibis.Table, rules: HardNegativeRules, seed: int
) -> ibis.Table:
    """Adds to each positive a list of candidate rows per stage, `pool_column(stage)`.

    Args:
        positives: Rows with query_row, event_number, time and, if logged, request_id.
        losers: From `find_losers`.
        rules: As there.
        seed: Of the draw where a pool exceeds `max_pool`.

    Returns:
        `positives` with one array column per stage; empty or null where there is none.
    """
    has_request = "request_id" in positives.columns
    keyed = positives if has_request else positives.mutate(request_id=ibis.null("int64"))
    keys = keyed.select("event_number", "query_row", "request_id", "time")
    for stage in rules.stages:
        of_stage = losers.filter(losers["stage"] == stage.value)
        pool = _own_request(keys, of_stage).union(_recent_requests(keys, of_stage, rules))
        pool = pool.distinct()
        key = (
            pool["candidate_row"].cast("string")
            + ":"
            + pool["event_number"].cast("string")
            + f":{seed}"
        ).hash()
        lists = pool.group_by("event_number").agg(
            pool=pool["candidate_row"].collect(order_by=[key, pool["candidate_row"]])
        )
        lists = lists.select(
            "event_number", **{pool_column(stage): lists["pool"][: rules.max_pool]}
        )
        positives = positives.left_join(lists, "event_number").drop("event_number_right")
    return positives


def describe_pools(pool_sizes: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Counts, per stage, the samples that have hard negatives and how many these have on average.

    Args:
        pool_sizes: Stage -> [num_samples] sizes.

    Example:
        >>> describe_pools({"retrieved": np.array([0, 2, 4])})
        {'retrieved': {'num_samples': 2, 'mean_pool': 3.0}}
    """
    return {
        stage: {
            "num_samples": int(np.count_nonzero(sizes)),
            "mean_pool": float(sizes.sum() / max(1, np.count_nonzero(sizes))),
        }
        for stage, sizes in pool_sizes.items()
    }


def _low_part(
    events: ibis.Table, taken: ibis.Table, rules: HardNegativeRules
) -> tuple[ibis.Table, dict[str, int]]:
    """Keeps of the `ranked` items those at the low end of their request's ranks."""
    is_ranked = taken["stage"] == Stage.RANKED.value
    ranked, others = taken.filter(is_ranked), taken.filter(~is_ranked)
    if "rank" not in events.columns:
        return others, {"ranked without a rank": _num_rows(ranked)}
    without_request = 0
    without_rank = _num_rows(ranked.filter(ranked["rank"].isnull()))
    ranked = ranked.filter(ranked["rank"].notnull())
    if rules.min_rank is not None:
        low = ranked.filter(ranked["rank"] >= rules.min_rank)
    else:
        # Ranks of the list that was ranked last: those of losers are on another scale.
        last_stages = [Stage.RANKED.value, Stage.EXPOSED.value, Stage.CLICKED.value]
        logged = events.filter(
            events["rank"].notnull()
            & events["request_id"].notnull()
            & events["stage"].isin(last_stages)
        )
        without_request = _num_rows(ranked.filter(ranked["request_id"].isnull()))
        ranked = ranked.filter(ranked["request_id"].notnull())
        by_request = ibis.window(
            group_by=["query_row", "request_id"], order_by=["rank", "event_number"]
        )
        whole = ibis.window(group_by=["query_row", "request_id"])
        # Place among the logged ranks, from 1: share s keeps the last ceil(s * n).
        place = logged.select(
            "event_number",
            place=ibis.row_number().over(by_request) + 1,
            num_ranks=logged.count().over(whole),
        )
        ranked = ranked.inner_join(place, "event_number")
        low = ranked.filter(
            ranked["place"]
            > ranked["num_ranks"] - (rules.bottom_share * ranked["num_ranks"]).ceil()
        )
    removed = {
        "ranked without a rank": without_rank,
        "ranked without a request": without_request,
        "ranked, not in the low part": _num_rows(ranked) - _num_rows(low),
    }
    return others.union(low.select(*others.columns)), removed


def _own_request(keys: ibis.Table, losers: ibis.Table) -> ibis.Table:
    joined = keys.inner_join(losers, ["query_row", "request_id"], rname="{name}_of_loser")
    return joined.select("event_number", "candidate_row")


def _recent_requests(keys: ibis.Table, losers: ibis.Table, rules: HardNegativeRules) -> ibis.Table:
    """Joins positives whose own request has too few with the user's losers in the window."""
    own = _own_request(keys, losers).distinct()
    own_counts = own.group_by("event_number").agg(num_own=own.count())
    counted = keys.left_join(own_counts, "event_number").drop("event_number_right")
    short = counted.filter(ibis.coalesce(counted["num_own"], 0) < rules.min_pool)
    is_recent = [
        short["query_row"] == losers["query_row"],
        losers["time"] <= short["time"],
    ]
    if losers["time"].type().is_timestamp():
        seconds = int(rules.window.total_seconds())
        is_recent.append(losers["time"] >= short["time"] - ibis.interval(seconds=seconds))
    joined = short.inner_join(losers, is_recent, rname="{name}_of_loser")
    return joined.select("event_number", "candidate_row")


def _num_rows(table: ibis.Table) -> int:
    return int(table.count().to_pyarrow().as_py())
