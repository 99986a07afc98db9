"""Events at equal times: what a log finds, what it does, and that every engine does the same."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small_log import column
from tfrs_pipeline.data.engines import connect
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import Ties
from tfrs_pipeline.data.settings import Reading

START = datetime(2024, 1, 1, tzinfo=UTC)
CONNECTION = connect()
COLUMNS: Any = (*map(st.integers, (1, 1, 0), (3, 9, 2)), st.sampled_from([None, 0, 1]))


def made(rows: Sequence[tuple[Any, ...]], ties: Ties = "auto", step: float = 86_400) -> Log:
    """Makes a log of (user, item, number of the step, request) in this order."""
    users, items, steps, *requests = zip(*rows, strict=True)
    times = [START + timedelta(seconds=step * number) for number in steps]
    columns: dict[str, Any] = {"user_id": users, "item_id": items}
    columns["timestamp"] = pa.array(times, pa.timestamp("us", "UTC"))
    if requests:
        columns["request_id"] = pa.array(requests[0], pa.int64())
    return Log.from_table(pa.table(columns), reading=Reading(ties=ties), connection=CONNECTION)


def by_day(order: str, num: int = 600) -> list[tuple[int, Any, int]]:
    """Returns events of 20 users on 9 days, in the order of the file."""
    rng = np.random.default_rng(0)
    items = [f"i{item:03}" for item in rng.integers(0, 500, num)]
    if order in ("ascending", "descending"):
        items.sort(reverse=order == "descending")
    return [(int(rng.integers(20)), item, int(rng.integers(9))) for item in items]


@pytest.mark.parametrize(
    ("step", "order", "rule", "words"),
    [
        (86_400, "as it is", "order", ["times by day", "order of the source"]),
        (86_400, "ascending", "random", ["times by day", "ascend in 100%"]),
        (3_600, "descending", "random", ["times by hour", "ascend in 0%"]),
        (60, "as it is", "order", ["times by minute"]),
        (1, "ascending", "drop", ["times by second", "one visit"]),
        (0.25, "as it is", "drop", ["finer than seconds"]),
    ],
)
def test_the_rule_follows_from_clock(step: float, order: str, rule: str, words: list[str]) -> None:
    rows = by_day(order)
    log = made(rows, step=step)
    assert log.ties == rule
    found = [note for note in log.describe() if "have the time of another" in note]
    together: dict[Any, int] = defaultdict(int)
    for user, _, day in rows:
        together[user, day] += 1
    num_tied = sum(num for num in together.values() if num > 1)
    assert f"{num_tied / len(rows):.1%} of the positives" in found[0]
    assert all(word in found[0] for word in words)


@pytest.mark.parametrize("order", ["as it is", "ascending"])
def test_users_with_one_time_each_keep_histories(order: str) -> None:
    # Twenty orders, each a user with a time of its own, to the second.
    rows = [(user, item, 7 * user) for user, item, _ in by_day(order)]
    log = made(rows, step=1)
    assert log.ties == ("order" if order == "as it is" else "random")
    holdout = log.split("last_n", min_positives=3).holdout("test", by="requests")
    num_clicks = {user: sum(row[0] == user for row in rows) for user in range(20)}
    for user, history in zip(holdout.user_ids.tolist(), holdout.histories, strict=True):
        assert len(history) == num_clicks[user] - 1
    # With a second visit as large as the first, less than half of the clicks would be lost.
    visits = rows + [(user, item, 7 * user + 1) for user, item, _ in rows]
    assert made(visits, step=1).ties == "drop"
    assert made(rows, "drop", step=1).ties == "drop"


def test_few_ties_show_no_order_by_item_and_none_are_not_told() -> None:
    log = made([(1, 1, 0), (1, 2, 0), (1, 3, 0), (2, 1, 1)])
    assert log.ties == "order"
    log = made([(1, 1, 0), (1, 2, 1), (2, 3, 0)])
    assert not [note for note in log.describe() if "have the time of another" in note]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(*COLUMNS), min_size=1, max_size=40))
def test_numbers_are_redrawn_within_equal_times_alone(rows: list[Any]) -> None:
    drawn = made(rows, "random").events
    names = ("user_id", "item_id", "timestamp", "request_id")
    now = list(zip(*(column(drawn, name) for name in names), strict=True))
    assert column(drawn, "event_number") == list(range(len(rows)))
    groups: dict[Any, list[Any]] = defaultdict(list)
    for (user, item, day, request), found in zip(rows, now, strict=True):
        time = START + timedelta(days=day)
        assert found[::2] == (user, time)  # Only events of that time may take this place.
        groups[user, time].append((item, request))
    for key, before in groups.items():
        after = [(item, request) for user, item, time, request in now if (user, time) == key]
        assert sorted(after, key=repr) == sorted(before, key=repr)
        requests = [request for _, request in after]
        for request in {*requests} - {None}:
            places = [place for place, own in enumerate(requests) if own == request]
            assert places == list(range(places[0], places[-1] + 1))


def test_an_order_by_item_is_gone_and_the_draw_is_the_same_again() -> None:
    rows = by_day("ascending")
    items = column(made(rows).events, "item_id")
    assert items == column(made(rows).events, "item_id") != [item for _, item, _ in rows]
    assert made(rows, "random").ties == "random"
    again = made([(user, item, day) for (user, _, day), item in zip(rows, items, strict=True)])
    assert again.ties == "order"


def test_the_rule_is_kept_with_the_log_and_asked_of_tables_of_a_log(tmp_path: Path) -> None:
    log = made(by_day("ascending"))
    log.write(tmp_path)
    back = Log.read(tmp_path)
    assert back.ties == log.ties == "random"
    assert back.notes == log.notes
    assert column(back.events, "item_id") == column(log.events, "item_id")
    table = made(by_day("ascending"), "order").events
    copied = Log.from_ibis(table)
    assert copied.ties == "random"
    assert column(copied.events, "item_id") == column(log.events, "item_id")
    assert Log.from_ibis(table, ties="drop").ties == "drop"
    assert log.split().train.ties == "random"
