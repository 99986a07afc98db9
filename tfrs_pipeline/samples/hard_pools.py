"""Hard negatives from funnel logs: items that lost in pre-rank or in rank.

The guard has priority: an item that was exposed to the user and not clicked, or that the user
clicked anywhere in training, is never a negative of that user.
"""

import ibis

from tfrs_pipeline.data.engines import random_key
from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.data.split import round_up
from tfrs_pipeline.negatives.hard import FunnelLosers

MAX_POOL = 100
"""Most losers that are kept for a positive and stage."""

# Columns that identify a positive, in the order of the samples, and those that identify a request.
_POSITIVE = ("query_row", "time", "event_number")
_REQUEST = ["query_row", "query_time", "request"]


def find_losers(
    events: ibis.Table, hard: FunnelLosers, known: ibis.Table, exposed: ibis.Table
) -> ibis.Table:
    """Finds the losers of each request that the guard allows as hard negatives.

    `known` and `exposed` are the pairs of query_row and candidate_row clicked in training, and
    exposed and never clicked. Returns candidate_row, stage, and the request in three columns.
    """
    pairs = ["query_row", "candidate_row"]
    events = _with_request(events)
    taken = events.filter(events["stage"].isin(list(hard.stages)))
    if Stage.RANKED in hard.stages:
        taken = _low_part(events, taken, hard)
    losers = taken.select("candidate_row", "stage", *_REQUEST).anti_join(known, pairs)
    # The stage "exposed" is present only if `allow_exposed` is set.
    was_exposed = losers.filter(losers["stage"] == Stage.EXPOSED.value)
    others = losers.filter(losers["stage"] != Stage.EXPOSED.value)
    return others.anti_join(exposed, pairs).union(was_exposed)


def draw_pools(
    positives: ibis.Table, losers: ibis.Table, hard: FunnelLosers, seed: int
) -> dict[str, ibis.Table]:
    """Draws the pool of each positive from the losers of its own request.

    Returns, by stage, query_row, time and event_number of the positive, candidate_row of the loser,
    each pair once, and its place in the pool's random order.
    """
    keys = _with_request(positives).select(*dict.fromkeys([*_POSITIVE, *_REQUEST]))
    pools: dict[str, ibis.Table] = {}
    for stage in hard.stages:
        of_stage = losers.filter(losers["stage"] == stage)
        pool = keys.inner_join(of_stage.select(*_REQUEST, "candidate_row").distinct(), _REQUEST)
        pool = pool.select(*_POSITIVE, "candidate_row")
        key = random_key(pool["candidate_row"], pool["event_number"], seed=seed)
        drawn = ibis.window(group_by="event_number", order_by=[key, pool["candidate_row"]])
        pool = pool.mutate(place=ibis.row_number().over(drawn))
        pools[stage] = pool.filter(pool["place"] < MAX_POOL)
    return pools


def _with_request(events: ibis.Table) -> ibis.Table:
    """Adds the id of the request as text: "" without one, so that the time alone identifies it."""
    has_ids = "request_id" in events.columns
    named = events["request_id"].cast("string") if has_ids else ibis.null("string")
    return events.mutate(request=ibis.coalesce(named, ""))


def _low_part(events: ibis.Table, taken: ibis.Table, hard: FunnelLosers) -> ibis.Table:
    """Keeps only the `ranked` items at the low end of their request's ranks."""
    is_ranked = taken["stage"] == Stage.RANKED.value
    others = taken.filter(~is_ranked)
    if "rank" not in events.columns:
        return others
    # Only ranks of the last ranked list, because those of other losers have another scale.
    last_stages = [Stage.RANKED.value, Stage.EXPOSED.value, Stage.CLICKED.value]
    logged = events.filter(events["rank"].notnull() & events["stage"].isin(last_stages))
    in_order = ibis.window(group_by=_REQUEST, order_by=["rank", "event_number"])
    num = logged.count().over(ibis.window(group_by=_REQUEST))
    # Place among the logged ranks, from 1: share s keeps the last ceil(s * n).
    is_low = ibis.row_number().over(in_order) + 1 > num - round_up(num * hard.bottom_share)
    return others.union(taken.filter(is_ranked).semi_join(logged.filter(is_low), "event_number"))
