"""Histories: which of a user's positives come before a query, and so belong to its history."""

from collections.abc import Iterator

import ibis
import ibis.expr.types as ir

from tfrs_pipeline.data import schema
from tfrs_pipeline.data.schema import Source
from tfrs_pipeline.messages import in_percent, printable

# If more than this share of the positives is left without a history, the reasons are mentioned.
_MANY_LOST = 0.1


def whole_seconds(timestamp: ir.Value) -> ir.Value:
    """Returns whole seconds since 1970, int64, rounded down; a cast in DuckDB would round."""
    return timestamp.truncate("s").epoch_seconds().cast("int64")


def query_start(events: ibis.Table, time: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Returns time and number of the first event of each event's request, or its own."""
    number = events["event_number"]
    if "request_id" not in events.columns:
        return time, number
    in_order = ibis.window(group_by=["user_id", "request_id"], order_by=[time, number])
    # Null is no request that events share.
    is_alone = events["request_id"].isnull()
    first = [is_alone.ifelse(value, value.first().over(in_order)) for value in (time, number)]
    return first[0], first[1]


def with_num_before(
    queries: ibis.Table, events: ibis.Table, user: str, ties: schema.TieRule, name: str
) -> ibis.Table:
    """Adds to each query how many `events` of its user come before its request, as column `name`.

    `user` names the column of the user in both. Events have `time` and `event_number`; queries have
    those of their request's first event as `query_time` and `query_number` (see `query_start`).
    """
    # Puts both on one timeline. A query comes before events at the same place, and with the rule
    # "drop" the place is the time alone.
    is_by_number = int(ties != "drop")
    first, number = queries["query_number"] * is_by_number, events["event_number"] * is_by_number
    nulls = {column: ibis.null(dtype) for column, dtype in queries.schema().items()}
    nulls[user] = events[user]
    line = queries.mutate(at=queries["query_time"], at_number=first, is_event=0).union(
        events.select(**nulls, at=events["time"], at_number=number, is_event=1)
    )
    before = ibis.cumulative_window(group_by=user, order_by=["at", "at_number", "is_event"])
    line = line.mutate(**{name: line["is_event"].sum().over(before).cast("int32")})
    return line.filter(line["is_event"] == 0).drop("at", "at_number", "is_event")


def note_lost_histories(events: ibis.Table, ties: schema.TieRule, source: Source) -> Iterator[str]:
    """Notes the columns that leave more than `_MANY_LOST` of the positives without a history.

    These are positives of users who have earlier ones, none of which may count: they have the time
    of this one, and `ties` drops those, or belong to its request.
    """
    keys = schema.order_keys(events)
    start, first = query_start(events, events[keys[0]])
    events = events.mutate(time=events[keys[0]], query_time=start, query_number=first)
    clicks = events.filter(schema.is_positive)
    clicks = clicks.select("user_id", "time", "event_number", "query_time", "query_number")
    clicks = with_num_before(clicks, clicks, "user_id", ties, "num_before")
    in_order = ibis.window(group_by="user_id", order_by=["time", "event_number"])
    # A user's first positive has no history in any case.
    is_lost = (clicks["num_before"] == 0) & (ibis.row_number().over(in_order) > 0)
    clicks = clicks.select(is_lost=is_lost)
    num, num_lost = schema.totals(clicks, n=clicks.count(), lost=clicks["is_lost"].sum()).values()
    if (num_lost or 0) > _MANY_LOST * num:
        causes = ["timestamp"] if ties == "drop" else []
        columns = [name for name in (*causes, "request_id") if name in events.columns]
        names = " or ".join(printable(repr(source.columns.get(name, name))) for name in columns)
        yield (
            f"warning: {source.name}: {num_lost:,} of {num:,} positives "
            f"({in_percent(num_lost, num)}) have no history though their users had clicked before: "
            f"clicks with the same {names} are not in each other's histories, which is right if "
            "they were shown together. A column that numbers visits is session_id, not "
            "request_id; for equal times, see ties"
        )
