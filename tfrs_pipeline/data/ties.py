"""Which of a user's events at equal times comes first: found once, when a log is made."""

from typing import Any

import ibis

from tfrs_pipeline.data.engines import random_key
from tfrs_pipeline.data.requests import whole_seconds
from tfrs_pipeline.data.schema import TieRule, Ties
from tfrs_pipeline.data.split import is_positive
from tfrs_pipeline.messages import in_percent

_STEPS = {"day": 86_400, "hour": 3_600, "minute": 60, "second": 1}
# A share of ascending item ids so far from one half is an order by item, not by time.
_MAX_BIAS = 0.1
# With so many standard errors, chance does not look like an order by item.
_NUM_ERRORS = 4


def settle_ties(events: ibis.Table, ties: Ties) -> tuple[ibis.Table, TieRule, tuple[str, ...]]:
    """Decides what `Reading.ties` leaves open, and redraws event numbers if the rule is "random".

    Returns the events, the rule, and what was found and done, in a line for a person if any
    positive shares its time with another one of its user.
    """
    if "timestamp" not in events.columns:
        return events, "drop", ()
    found = _measure(events)
    step = next((name for name in _STEPS if not found[name]), "fraction of a second")
    num, num_pairs = found["num"], (found["up"] or 0) + (found["down"] or 0)
    share = (found["up"] or 0) / max(1, num_pairs)
    least = max(_MAX_BIAS, _NUM_ERRORS * 0.5 / max(1, num_pairs) ** 0.5)
    is_sorted = abs(share - 0.5) > least
    rule: TieRule
    rising = f"the item ids of {share:.0%} of such neighbours ascend"
    if ties != "auto":
        rule, why = ties, "as ties says"
    elif step not in ("day", "hour", "minute"):
        rule, why = "drop", "as items of one visit"
    elif is_sorted:
        rule, why = "random", f"because the source sorts them by item: {rising}"
    else:
        rule, why = "order", f"as in the source, which does not sort them by item: {rising}"
    if not found["tied"]:
        return events, rule, ()
    done = {
        "order": "the earlier ones are in the histories of the later ones",
        "random": "they are put into a random order",
        "drop": "they are not in each other's histories",
    }[rule]
    note = (
        f"times in steps of a {step}; {in_percent(found['tied'], num)} of the positives share "
        f"theirs with another of their user: {done}, {why}"
    )
    return (_redrawn(events) if rule == "random" else events), rule, (note,)


def _measure(events: ibis.Table) -> dict[str, Any]:
    """Counts positives: all, those not at a whole step, tied ones, and neighbours by item id."""
    clicks = events.filter(is_positive(events))
    time, item = clicks["timestamp"], clicks["item_id"]
    tied = ["user_id", "timestamp"]
    clicks = clicks.mutate(
        _seconds=whole_seconds(time),
        _is_fraction=time.truncate("s") != time,
        _num=clicks.count().over(ibis.window(group_by=tied)),
        _previous=item.lag().over(ibis.window(group_by=tied, order_by="event_number")),
    )
    off = {
        name: (clicks["_is_fraction"] | (clicks["_seconds"] % seconds != 0)).sum()
        for name, seconds in _STEPS.items()
    }
    found = clicks.aggregate(
        num=clicks.count(),
        tied=(clicks["_num"] > 1).sum(),
        up=(clicks["item_id"] > clicks["_previous"]).sum(),
        down=(clicks["item_id"] < clicks["_previous"]).sum(),
        **off,
    )
    return dict(found.to_pyarrow().to_pylist()[0])


def _redrawn(events: ibis.Table) -> ibis.Table:
    """Permutes the event numbers of a user's events at equal times; requests stay together."""
    tied, number = ["user_id", "timestamp"], events["event_number"]
    own = random_key(number, seed=0)
    keys = [own, number]
    if "request_id" in events.columns:
        together = random_key(events["request_id"], seed=1)  # Never the key of an event number.
        keys.insert(0, ibis.coalesce(together, own))
    drawn = ibis.row_number().over(ibis.window(group_by=tied, order_by=keys))
    place = ibis.row_number().over(ibis.window(group_by=tied, order_by=number))
    numbers = events.select(*tied, _place=place, _number=number)
    joined = events.mutate(_place=drawn).inner_join(numbers, [*tied, "_place"])
    return joined.mutate(event_number=joined["_number"]).select(*events.columns)
