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
        (86_400, "ascending", "order", ["times by day", "ascend in 100%"]),
        (3_600, "descending", "order", ["times by hour", "ascend in 0%"]),
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


def test_users_with_one_time_each_keep_histories() -> None:
    # Twenty orders, each a user with a time of its own, to the second.
    rows = [(user, item, 7 * user) for user, item, _ in by_day("as it is")]
    log = made(rows, step=1)
    assert log.ties == "order"
    holdout = log.split("last_n", min_positives=3).holdout("test", by="requests")
    num_clicks = {user: sum(row[0] == user for row in rows) for user in range(20)}
    for user, history in zip(holdout.user_ids.tolist(), holdout.histories, strict=True):
        assert len(history) == num_clicks[user] - 1
    # With a second visit as large as the first, less than half of the clicks would be lost.
    visits = rows + [(user, item, 7 * user + 1) for user, item, _ in rows]
    assert made(visits, step=1).ties == "drop"
    assert made(rows, "drop", step=1).ties == "drop"


def test_a_log_without_ties_has_no_note_on_them() -> None:
    log = made([(1, 1, 0), (1, 2, 1), (2, 3, 0)])
    assert not [note for note in log.describe() if "have the time of another" in note]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(*COLUMNS), min_size=1, max_size=40))
def test_events_keep_the_order_of_the_source(rows: list[Any]) -> None:
    events = made(rows, "order").events
    names = ("user_id", "item_id", "request_id", "event_number")
    kept = zip(*(column(events, name) for name in names), strict=True)
    source = [(*row[:2], row[3], number) for number, row in enumerate(rows)]
    assert sorted(kept, key=lambda row: row[3]) == source


def test_the_rule_is_kept_with_the_log_and_asked_of_tables_of_a_log(tmp_path: Path) -> None:
    log = made(by_day("ascending"))
    log.write(tmp_path)
    back = Log.read(tmp_path)
    assert back.ties == log.ties == "order"
    assert back.notes == log.notes
    assert column(back.events, "item_id") == column(log.events, "item_id")
    assert Log.from_ibis(log.events).ties == "order"
    assert Log.from_ibis(log.events, ties="drop").ties == "drop"
    assert made(by_day("ascending"), "drop").split().train.ties == "drop"
