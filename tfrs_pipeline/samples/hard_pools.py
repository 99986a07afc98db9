"""Hard negatives from funnel logs: items that lost in pre-rank or in rank.

The guard has priority: an item that was exposed to the user and not clicked, or that the user
clicked anywhere in training, is never a negative of that user.
"""

import ibis

from tfrs_pipeline.data.engines import random_key
from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.data.split import round_up
from tfrs_pipeline.negatives.hard import FunnelLosers

# Columns that identify a positive, in the order of the samples.
_POSITIVE = ("query_row", "time", "event_number")


def find_losers(
    events: ibis.Table, hard: FunnelLosers, known: ibis.Table, exposed: ibis.Table
) -> ibis.Table:
    """Finds the losers of each request that the guard allows as hard negatives.

    `known` and `exposed` are the pairs of query_row and candidate_row clicked in training, and
    exposed and never clicked. Returns query_row,
    candidate_row, stage, time, event_number and request_id (null if unknown).
    """
    if "request_id" not in events.columns:
        events = events.mutate(request_id=ibis.null("int64"))
    pairs = ["query_row", "candidate_row"]
    taken = events.filter(events["stage"].isin(list(hard.stages)))
    if Stage.RANKED in hard.stages:
        taken = _low_part(events, taken, hard)
    losers = taken.select(*pairs, "stage", "time", "event_number", "request_id")
    losers = losers.anti_join(known, pairs)
    # The stage "exposed" is present only if `allow_exposed` is set.
    was_exposed = losers.filter(losers["stage"] == Stage.EXPOSED.value)
    others = losers.filter(losers["stage"] != Stage.EXPOSED.value)
    return others.anti_join(exposed, pairs).union(was_exposed)


def draw_pools(
    positives: ibis.Table, losers: ibis.Table, hard: FunnelLosers, seed: int
) -> dict[str, ibis.Table]:
    """Draws the pool of each positive: losers of its own request and, if few, of recent ones.

    Recent requests give their `max_pool` latest losers, so that the work grows with a user's
    events, not with their square. Returns, by stage, query_row, time and event_number of the
    positive, candidate_row of the loser, each pair once, and its place in the pool's random order.
    """
    has_request = "request_id" in positives.columns
    keyed = positives if has_request else positives.mutate(request_id=ibis.null("int64"))
    keys = keyed.select(*_POSITIVE, "request_id")
    pools: dict[str, ibis.Table] = {}
    for stage in hard.stages:
        of_stage = losers.filter(losers["stage"] == stage)
        asked = of_stage.select("query_row", "request_id", "candidate_row").distinct()
        pool = keys.inner_join(asked, ["query_row", "request_id"])
        pool = own = pool.select(*_POSITIVE, "candidate_row")
        if hard.min_pool:
            pool = own.union(_recent_requests(keys, own, of_stage, hard)).distinct()
        key = random_key(pool["candidate_row"], pool["event_number"], seed=seed)
        drawn = ibis.window(group_by="event_number", order_by=[key, pool["candidate_row"]])
        pool = pool.mutate(place=ibis.row_number().over(drawn))
        pools[stage] = pool.filter(pool["place"] < hard.max_pool)
    return pools


def _low_part(events: ibis.Table, taken: ibis.Table, hard: FunnelLosers) -> ibis.Table:
    """Keeps only the `ranked` items at the low end of their request's ranks."""
    is_ranked = taken["stage"] == Stage.RANKED.value
    others = taken.filter(~is_ranked)
    if "rank" not in events.columns:
        return others
    ranked = taken.filter(is_ranked & taken["rank"].notnull())
    if hard.min_rank is not None:
        low = ranked.filter(ranked["rank"] >= hard.min_rank)
    else:
        # Only ranks of the last ranked list, because those of other losers have another scale.
        last_stages = [Stage.RANKED.value, Stage.EXPOSED.value, Stage.CLICKED.value]
        is_logged = events["rank"].notnull() & events["request_id"].notnull()
        logged = events.filter(is_logged & events["stage"].isin(last_stages))
        request = ["query_row", "request_id"]
        in_order = ibis.window(group_by=request, order_by=["rank", "event_number"])
        num = logged.count().over(ibis.window(group_by=request))
        # Place among the logged ranks, from 1: share s keeps the last ceil(s * n).
        is_low = ibis.row_number().over(in_order) + 1 > num - round_up(num * hard.bottom_share)
        low = ranked.semi_join(logged.filter(is_low), "event_number")
    return others.union(low)


def _recent_requests(
    keys: ibis.Table, own: ibis.Table, losers: ibis.Table, hard: FunnelLosers
) -> ibis.Table:
    """Joins positives with too few losers to the user's latest losers in the window."""
    has_enough = own.count() >= hard.min_pool
    enough = own.group_by("event_number").having(has_enough).agg(num=own.count())
    # Puts both on one timeline, where a positive comes after losers at the same moment.
    of_losers = losers.select(*_POSITIVE, "candidate_row", is_positive=0)
    asking = keys.anti_join(enough, "event_number")
    asking = asking.select(*_POSITIVE, candidate_row=ibis.null("int32"), is_positive=1)
    line, order = of_losers.union(asking), ["time", "is_positive", "event_number"]
    so_far = ibis.cumulative_window(group_by="query_row", order_by=order)
    line = line.mutate(place=(1 - line["is_positive"]).sum().over(so_far))
    # A positive's latest losers are in its own block of places and in the block before.
    line = line.mutate(block=(line["place"] - 1) // hard.max_pool)
    asking = line.filter((line["is_positive"] == 1) & (line["place"] > 0)).drop("candidate_row")
    asking = asking.union(asking.mutate(block=asking["block"] - 1))
    answer = line.filter(line["is_positive"] == 0).select(
        "query_row", "block", "candidate_row", loser_time="time", loser_place="place"
    )
    joined = asking.inner_join(answer, ["query_row", "block"])
    is_recent = joined["loser_place"] > joined["place"] - hard.max_pool
    is_recent &= joined["loser_place"] <= joined["place"]
    if joined["time"].type().is_timestamp():
        window = ibis.interval(seconds=round(hard.window_hours * 3600))
        is_recent &= joined["loser_time"] >= joined["time"] - window
    return joined.filter(is_recent).select(*_POSITIVE, "candidate_row")
