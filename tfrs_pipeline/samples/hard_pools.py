"""Hard negatives from funnel logs: items that lost in pre-rank or in rank.

They come from the positive's own request and, where that has too few, from the same user's recent
requests. The exposure guard stands before them: an item that was exposed to the user and not
clicked, or that the user clicked anywhere in training, is never a negative of that user.
"""

from __future__ import annotations

from collections.abc import Mapping

import ibis
import numpy as np

from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.negatives.funnel import FunnelLosers
from tfrs_pipeline.samples.store import pool_column


def find_losers(
    events: ibis.Table, hard: FunnelLosers, known: ibis.Table, exposed: ibis.Table
) -> tuple[ibis.Table, dict[str, int]]:
    """Finds the losers of each request that may be hard negatives, the guard applied.

    Args:
        events: Training events with query_row, candidate_row, stage, time; optional request_id,
            rank.
        hard: Which to take.
        known: (query_row, candidate_row) pairs clicked in training.
        exposed: (query_row, candidate_row) pairs exposed in training and never clicked.

    Returns:
        Table of query_row, candidate_row, stage, time and request_id (null where unknown), and
        counts of the rows removed, by reason.
    """
    if "request_id" not in events.columns:
        events = events.mutate(request_id=ibis.null("int64"))
    pairs = ["query_row", "candidate_row"]
    taken = events.filter(events["stage"].isin(list(hard.stages)))
    removed: dict[str, int] = {}
    if Stage.RANKED in hard.stages:
        taken, removed = _low_part(events, taken, hard)
    losers = taken.select(*pairs, "stage", "time", "request_id")
    removed["clicked by the user in training"] = _num_rows(losers.semi_join(known, pairs))
    losers = losers.anti_join(known, pairs)
    # The stage "exposed" itself is here only where it is allowed by `allow_exposed`.
    was_exposed = losers.filter(losers["stage"] == Stage.EXPOSED.value)
    others = losers.filter(losers["stage"] != Stage.EXPOSED.value)
    removed["exposed to the user and not clicked"] = _num_rows(others.semi_join(exposed, pairs))
    return others.anti_join(exposed, pairs).union(was_exposed), removed


def add_pools(
    positives: ibis.Table, losers: ibis.Table, hard: FunnelLosers, seed: int
) -> ibis.Table:
    """Adds to each positive a list of candidate rows per stage, `pool_column(stage)`.

    Args:
        positives: Rows with query_row, event_number, time and, if logged, request_id.
        losers: From `find_losers`.
        hard: As there.
        seed: Of the draw where a pool exceeds `max_pool`.

    Returns:
        `positives` with one array column per stage; empty or null where there is none.
    """
    has_request = "request_id" in positives.columns
    keyed = positives if has_request else positives.mutate(request_id=ibis.null("int64"))
    keys = keyed.select("event_number", "query_row", "request_id", "time")
    for stage in hard.stages:
        of_stage = losers.filter(losers["stage"] == stage)
        pool = _own_request(keys, of_stage).union(_recent_requests(keys, of_stage, hard))
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
        lists = lists.select("event_number", **{pool_column(stage): lists["pool"][: hard.max_pool]})
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
    events: ibis.Table, taken: ibis.Table, hard: FunnelLosers
) -> tuple[ibis.Table, dict[str, int]]:
    """Keeps of the `ranked` items those at the low end of their request's ranks."""
    is_ranked = taken["stage"] == Stage.RANKED.value
    ranked, others = taken.filter(is_ranked), taken.filter(~is_ranked)
    if "rank" not in events.columns:
        return others, {"ranked without a rank": _num_rows(ranked)}
    without_request = 0
    without_rank = _num_rows(ranked.filter(ranked["rank"].isnull()))
    ranked = ranked.filter(ranked["rank"].notnull())
    if hard.min_rank is not None:
        low = ranked.filter(ranked["rank"] >= hard.min_rank)
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
            ranked["place"] > ranked["num_ranks"] - (hard.bottom_share * ranked["num_ranks"]).ceil()
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


def _recent_requests(keys: ibis.Table, losers: ibis.Table, hard: FunnelLosers) -> ibis.Table:
    """Joins positives whose own request has too few with the user's losers in the window."""
    own = _own_request(keys, losers).distinct()
    own_counts = own.group_by("event_number").agg(num_own=own.count())
    counted = keys.left_join(own_counts, "event_number").drop("event_number_right")
    short = counted.filter(ibis.coalesce(counted["num_own"], 0) < hard.min_pool)
    is_recent = [
        short["query_row"] == losers["query_row"],
        losers["time"] <= short["time"],
    ]
    if losers["time"].type().is_timestamp():
        seconds = round(hard.window_hours * 3600)
        is_recent.append(losers["time"] >= short["time"] - ibis.interval(seconds=seconds))
    joined = short.inner_join(losers, is_recent, rname="{name}_of_loser")
    return joined.select("event_number", "candidate_row")


def _num_rows(table: ibis.Table) -> int:
    return int(table.count().to_pyarrow().as_py())
