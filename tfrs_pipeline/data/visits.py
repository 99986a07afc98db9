"""Visits: the events of a user on an item within a visit are one event, of the strongest type.

A view, a cart and a purchase of an item within minutes are one decision. Kept apart, the purchase
would be a positive whose history ends with its own item, and training would reward repeating the
last click. The other items of the visit stay in each other's histories.
"""

from typing import Any

import ibis
import ibis.expr.types as ir

from tfrs_pipeline.data.histories import whole_seconds
from tfrs_pipeline.data.schema import (
    LONGEST_PAUSE,
    PAUSE,
    Stage,
    is_dislike,
    is_positive,
    order_keys,
)

STRENGTH = "_strength"
"""Column of a log of types: the weight of an event's type, before its amount multiplies it."""
VISIT = "_visit"
"""Column of `number_visits`."""


def number_visits(events: ibis.Table) -> ibis.Table:
    """Adds the column `VISIT`, the same for the events of a user's visit; null for none.

    A visit is a session (column `session_id`). Events without one are a visit until a `PAUSE`.
    """
    sessions = [name for name in ("session_id",) if name in events.columns]
    session = events["session_id"].cast("string") if sessions else ibis.null("string")
    if "timestamp" not in events.columns:
        return events.mutate(**{VISIT: session})
    by, in_order = ["user_id", *sessions], order_keys(events)
    seconds = whole_seconds(events["timestamp"])
    # Shops reuse session numbers, so a long pause begins another visit in any case.
    pause = seconds - seconds.lag().over(ibis.window(group_by=by, order_by=in_order))
    is_new = pause > session.isnull().ifelse(PAUSE, LONGEST_PAUSE)
    events = events.mutate(_starts=is_new.fill_null(False).cast("int64"), **{VISIT: session})
    so_far = ibis.cumulative_window(group_by=by, order_by=in_order)
    number = events["_starts"].sum().over(so_far).cast("string")
    return events.mutate(**{VISIT: events[VISIT].fill_null("") + ":" + number}).drop("_starts")


def merge_requests(events: ibis.Table) -> ibis.Table:
    """Merges the events of a user on an item in a request into the first one.

    The first event of each request stays, so that no request moves.
    """
    return _merge(events, "request_id", order_keys(events), ibis.literal(True))


def merge_visits(events: ibis.Table) -> ibis.Table:
    """Merges the events of a user on an item in a visit into the first positive, or the first.

    An event that shares its request with other events stays. A request begins with its first event:
    without it, the request would begin later, and its histories would hold more.
    """
    is_mergeable: ir.BooleanValue = ibis.literal(True)
    if "request_id" in events.columns:
        num = events.count().over(ibis.window(group_by=["user_id", "request_id"]))
        is_mergeable = events["request_id"].isnull() | (num == 1)
    return _merge(events, VISIT, [~is_positive(events), *order_keys(events)], is_mergeable)


def _merge(
    events: ibis.Table, group: str, order: list[Any], is_mergeable: ir.BooleanValue
) -> ibis.Table:
    """Merges the events of a user on an item, with one value of `group`, into the first one.

    `is_mergeable` marks the events that may be merged. The first event in `order` keeps its time,
    number, request and context, and gets stage and weight of the strongest: the furthest stage,
    then the strongest type, then the largest amount of that type. Events without a value of `group`
    are kept. Dislikes are merged among themselves alone, so that they keep their time.
    """
    # An event of the test is never merged into one of the training.
    keys: list[Any] = [
        name for name in ("user_id", "item_id", group, "part") if name in events.columns
    ]
    keys.append(is_dislike(ibis._))
    position = ibis.row_number().over(ibis.window(group_by=keys, order_by=order))
    is_merged = (position > 0) & is_mergeable & events[group].notnull()
    events = events.mutate(_is_merged=is_merged, _is_first=position == 0)
    level = events["stage"].cases(*((stage.value, n) for n, stage in enumerate(Stage)))
    strength = [
        ~(events["_is_first"] | events["_is_merged"]),
        ibis.desc(level),
        *(events[name].desc() for name in (STRENGTH, "weight")),
        events["event_number"],
    ]
    strongest_first = ibis.window(group_by=keys, order_by=strength)
    strongest = {
        name: events["_is_first"].ifelse(events[name].first().over(strongest_first), events[name])
        for name in ("stage", STRENGTH, "weight")
    }
    kept = events.mutate(**strongest).filter(~events["_is_merged"])
    return kept.drop("_is_first", "_is_merged")
