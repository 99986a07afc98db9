"""The order of a user's events at equal times: decided once, when a log is made."""

from typing import Any

import ibis

from tfrs_pipeline.data.engines import random_key
from tfrs_pipeline.data.requests import whole_seconds
from tfrs_pipeline.data.schema import TieRule, Ties
from tfrs_pipeline.data.split import is_positive
from tfrs_pipeline.messages import in_percent

_STEPS = {"by day": 86_400, "by hour": 3_600, "by minute": 60, "by second": 1}
# If the source sorts by item, the share of ascending item ids is farther from one half than this
# bias, and than this many standard errors.
_MIN_BIAS, _MIN_ERRORS = 0.1, 4
_DONE: dict[TieRule, str] = {
    "order": "they keep the order of the source",
    "random": "their order is drawn at random",
    "drop": "none is in another's history, as items of one visit",
}


def settle_ties(events: ibis.Table, ties: Ties) -> tuple[ibis.Table, TieRule, tuple[str, ...]]:
    """Decides the rule if it is "auto", redraws numbers for "random", and notes tied positives."""
    if "timestamp" not in events.columns:
        return events, "drop", ()
    found = _measure(events)
    step = next((name for name in _STEPS if not found[name]), "finer than seconds")
    num_pairs = max(1, found["num_up"] + found["num_down"])
    bias = abs(found["num_up"] - found["num_down"]) / (2 * num_pairs)
    is_sorted = bias > max(_MIN_BIAS, _MIN_ERRORS * 0.5 / num_pairs**0.5)
    why, rule = "", ties if ties != "auto" else "drop"
    if _STEPS.get(step, 0) >= 60:
        why = f" (item ids ascend in {found['num_up'] / num_pairs:.0%} of neighbouring pairs)"
        rule = ties if ties != "auto" else "random" if is_sorted else "order"
    note = (
        f"times {step}; {in_percent(found['num_tied'], found['num'])} of the positives have the "
        f"time of another one of their user: {_DONE[rule]}{why}"
    )
    events = _redrawn(events) if rule == "random" else events
    return events, rule, (note,) if found["num_tied"] else ()


def _measure(events: ibis.Table) -> dict[str, Any]:
    """Counts positives: all, tied ones, tied pairs by item id, and times that are no whole step."""
    tied = ["user_id", "timestamp"]
    clicks = events.filter(is_positive(events))
    clicks = clicks.mutate(
        _seconds=whole_seconds(clicks["timestamp"]),
        _num=clicks.count().over(ibis.window(group_by=tied)),
        _last=clicks["item_id"].lag().over(ibis.window(group_by=tied, order_by="event_number")),
    )
    is_fraction = clicks["timestamp"].truncate("s") != clicks["timestamp"]
    sums = {name: is_fraction | (clicks["_seconds"] % of != 0) for name, of in _STEPS.items()}
    sums["num_tied"] = clicks["_num"] > 1
    sums["num_up"] = (clicks["item_id"] > clicks["_last"]).fill_null(False)
    sums["num_down"] = (clicks["item_id"] < clicks["_last"]).fill_null(False)
    counts = {name: value.sum() for name, value in sums.items()}
    return dict(clicks.aggregate(num=clicks.count(), **counts).to_pyarrow().to_pylist()[0])


def _redrawn(events: ibis.Table) -> ibis.Table:
    """Permutes the event numbers of a user's events at equal times; requests stay together."""
    tied, number = ["user_id", "timestamp"], events["event_number"]
    keys = [own := random_key(number, seed=0), number]
    if "request_id" in events.columns:  # Another seed: the two never have the same key.
        keys.insert(0, ibis.coalesce(random_key(events["request_id"], seed=1), own))
    drawn, place = (
        ibis.row_number().over(ibis.window(group_by=tied, order_by=order))
        for order in (keys, number)
    )
    numbers = events.select(*tied, _place=place, _number=number)
    joined = events.mutate(_place=drawn).inner_join(numbers, [*tied, "_place"])
    return joined.mutate(event_number=joined["_number"]).select(*events.columns)
