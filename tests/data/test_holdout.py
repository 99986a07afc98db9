"""Queries as a server is asked: one for each request, from the history up to it."""

from collections import defaultdict
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.small_log import column
from tfrs_pipeline.data.engines import connect
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.reading import Reading
from tfrs_pipeline.data.schema import DataError, TieRule

START = datetime(2024, 1, 1, tzinfo=UTC)
CONNECTION = connect()
# user, item, time, is clicked, request (None: no request), part
ROWS = st.lists(
    st.tuples(
        st.integers(1, 3),
        st.integers(1, 9),
        st.integers(0, 4),
        st.booleans(),
        st.one_of(st.none(), st.integers(0, 2)),
        st.sampled_from(["train", "validation", "test"]),
    ),
    min_size=1,
    max_size=50,
).map(
    lambda rows: [*rows, *((9, 1, 0, True, None, part) for part in ("train", "test", "validation"))]
)


def made(rows: list[Any], ties: TieRule, has_time: bool = True, has_request: bool = True) -> Log:
    users, items, times, clicked, requests, parts = zip(*rows, strict=True)
    columns: dict[str, Any] = {"user_id": users, "item_id": items, "part": parts}
    columns["stage"] = ["clicked" if is_clicked else "exposed" for is_clicked in clicked]
    columns["place"] = [float(number) for number in range(len(rows))]
    if has_time:
        moments = [START + timedelta(days=time) for time in times]
        columns["timestamp"] = pa.array(moments, pa.timestamp("us", "UTC"))
    if has_request:
        columns["request_id"] = pa.array(requests, pa.int64())
    return Log.from_table(
        pa.table(columns),
        reading=Reading(ties=ties),
        request_features={"place": "numeric"},
        connection=CONNECTION,
    )


def slow_queries(log: Log, part: str, ties: TieRule, has_time: bool) -> list[tuple[Any, ...]]:
    """Loops over the targets of each request, and over all that its user saw before it began."""
    names = ["user_id", "item_id", "stage", "event_number", "part", "place"]
    names += [name for name in ("timestamp", "request_id") if name in log.events.columns]
    events = [
        dict(zip(names, values, strict=True))
        for values in zip(*(column(log.events, name) for name in names), strict=True)
    ]

    def moment(event: dict[str, Any]) -> tuple[Any, ...]:
        if not has_time:
            return (event["event_number"],)
        return event["timestamp"], 0 if ties == "drop" else event["event_number"]

    def in_order(event: dict[str, Any]) -> tuple[Any, ...]:
        return event.get("timestamp", START), event["event_number"]

    known = {"validation": ("train", "validation"), "test": ("train", "validation", "test")}[part]
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in sorted(events, key=in_order):
        request = event.get("request_id")
        if event["part"] == part and event["stage"] == "clicked":
            alone = ("alone", event["event_number"])
            groups[event["user_id"], alone if request is None else request].append(event)
    found = []
    for (user, request), targets in groups.items():
        own = [x for x in events if x["user_id"] == user and x.get("request_id") == request]
        start = min(map(moment, own or targets))
        before = [x for x in events if x["user_id"] == user and moment(x) < start]
        before = [x for x in sorted(before, key=in_order) if x["part"] in known]
        clicked = [x["item_id"] for x in before if x["stage"] == "clicked"]
        found.append(
            (
                user,
                sorted({x["item_id"] for x in targets}),
                clicked,
                sorted({*clicked}),
                sorted({x["item_id"] for x in before}),
                targets[0]["place"],
            )
        )
    return sorted(found)


@settings(max_examples=12, deadline=None)
@given(
    rows=ROWS,
    ties=st.sampled_from(["order", "random", "drop"]),
    has_time=st.booleans(),
    has_request=st.booleans(),
    part=st.sampled_from(["validation", "test"]),
)
@example(
    # Without a request, each target is a query, also of those that no rule puts in order.
    rows=[
        (1, 1, 0, True, None, "train"),
        (1, 2, 1, True, None, "test"),
        (1, 3, 1, True, None, "test"),
        (2, 1, 0, True, None, "validation"),
    ],
    ties="drop",
    has_time=True,
    has_request=False,
    part="test",
)
def test_queries_match_a_loop(
    rows: list[Any], ties: TieRule, has_time: bool, has_request: bool, part: Any
) -> None:
    log = made(rows, ties, has_time, has_request)
    split = log.split("column")
    asked = split.holdout(part, by="requests")
    assert asked.user_ids.tolist() == sorted(asked.user_ids.tolist())
    assert asked.requests is not None
    lists = (asked.relevant, asked.histories, asked.clicked, asked.seen)
    found = [
        (user, *(of_query.tolist() for of_query in of_queries), request["place"])
        for user, *of_queries, request in zip(
            asked.user_ids.tolist(), *lists, asked.requests, strict=True
        )
    ]
    assert sorted(found) == slow_queries(log, part, ties, has_time)
    assert (asked.times is None) == (not has_time)
    for history, times in zip(asked.histories, asked.history_times or asked.histories, strict=True):
        assert len(times) == len(history)
        assert not has_time or np.all(np.diff(times) >= 0)


def test_some_queries_are_whole_users_and_others_are_not_read() -> None:
    rng = np.random.default_rng(0)
    rows = [
        (user, int(rng.integers(9)), day, True, None, "train" if day < 5 else "test")
        for user in range(40)
        for day in range(5 + int(rng.integers(1, 6)))
    ]
    split = made([*rows, (0, 1, 9, True, None, "validation")], "order").split("column")
    every = split.holdout("test", by="requests")
    some = split.holdout("test", 30, by="requests", seed=3)
    assert len(some) == 30 < len(every) == some.num_sampled_from
    # Which users were drawn depends on the seed, and each has all its queries but for the last cut.
    num_of = dict(zip(*np.unique(every.user_ids, return_counts=True), strict=True))
    num_found = dict(zip(*np.unique(some.user_ids, return_counts=True), strict=True))
    assert sum(num_of[user] for user in num_found) - 30 < max(num_of.values())
    assert {*num_found} != {*split.holdout("test", 30, by="requests", seed=4).user_ids.tolist()}
    assert len(split.holdout("test", 40)) == 40


def test_a_log_without_an_order_has_no_history_up_to_a_request() -> None:
    events = {"user_id": [1, 1, 1], "item_id": [1, 2, 3], "part": ["train", "validation", "test"]}
    log = Log.from_table(pa.table(events), reading=Reading(is_ordered=False))
    with pytest.raises(DataError, match="need an order"):
        log.split("column").holdout("test", by="requests")
