"""What a log rewards, on made-up logs where the answer is known."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tfrs_pipeline import Log, Reading, signals

RNG = np.random.default_rng(0)


def log_of(histories: Iterable[Sequence[int]], times: Any = None, **options: Any) -> Log:
    """Makes a log with one history per user; `times` holds the times of all rows."""
    rows = [(user, item) for user, history in enumerate(histories) for item in history]
    events = pd.DataFrame(rows, columns=["user_id", "item_id"])
    if times is not None:
        events["timestamp"] = pd.to_datetime(times, unit="s", utc=True)
    return Log.from_table(events, **options)


def walks(length: int, num_streams: int = 1) -> list[list[int]]:
    """Makes 300 histories, each taking turns between streams that walk a circle of 200 items."""
    starts = RNG.integers(0, 200, (300, num_streams))
    return [[(s[i % num_streams] + i) % 200 for i in range(length)] for s in starts.tolist()]


def shuffled(histories: list[list[int]]) -> list[list[int]]:
    return [RNG.permutation(history).tolist() for history in histories]


def test_order_is_told_from_none() -> None:
    histories = walks(8)
    found = signals(log_of(histories))["order"]
    assert found.value == 1
    assert found.beside == pytest.approx(0.55, abs=0.2)
    without = signals(log_of(shuffled(histories)))["order"]
    assert without.value == pytest.approx(without.beside, abs=0.15)


def test_a_hit_is_among_the_ten_that_followed_most_often_ties_in_random_order() -> None:
    histories = RNG.integers(0, 40, (80, 7)).tolist()
    items = np.unique(np.concatenate(histories))
    popular = np.array([sum(h[:-1].count(item) for h in histories) for item in items])
    hits = []
    for *_, last, target in histories:
        pairs = [pair for h in histories for pair in pairwise(h[:-1])]
        num = np.array([pairs.count((last, item)) for item in items])
        scores = (num + 100 * popular / popular.sum()).round(9)
        own = scores[items == target]
        above, level = np.sum(scores > own), np.sum(scores == own)
        hits.append(min(1, max(0, (10 - above) / level)))
    assert signals(log_of(histories))["order"].value == pytest.approx(np.mean(hits))


def test_trend_compares_the_latest_clicks_with_all_before() -> None:
    histories = [[0] * 60 + [1] * 40, range(2, 100)]
    log = log_of(histories, times=10**9 + np.r_[0:100, np.zeros(98)])
    found = signals(log)["trend"]
    assert (found.value, found.beside) == (1, 0)


@pytest.mark.parametrize(
    ("histories", "name", "value", "beside"),
    [
        ([[1, 1, 2, 2], [3, 4, 4, 3]], "repeats", 0.5, None),
        ([range(5), range(5)], "repeats", 0, None),
        ([[0] * 101, range(100)], "top 1%", 102 / 201, 0.01),
        ([[0] * 101, range(100)], "top 10%", 111 / 201, 0.1),
        ([range(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 30)], "history", 5, 9),
    ],
)
def test_counts(histories: Any, name: str, value: float, beside: float | None) -> None:
    found = signals(log_of(histories))[name]
    assert found.value == pytest.approx(value)
    assert found.beside == beside


def test_items_of_the_last_request_are_not_what_was_known_before_it() -> None:
    """All clicks of a user are in one request, so that there is no history before it."""
    rows = pd.DataFrame({"user_id": np.arange(60) // 6, "item_id": np.arange(60) % 6})
    names = [signal.name for signal in signals(Log.from_table(rows.assign(request_id="a")))]
    assert "order" not in names
    assert "repeats" in names


def test_shuffling_takes_nothing_from_the_last_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last request each user clicks an item and its twin, which reveal each other."""
    monkeypatch.setattr("tfrs_pipeline.evaluation.signals._MAX_HELD_OUT", 100)
    before, item = RNG.integers(0, 60, (2, 400))
    users, requests = np.repeat(np.arange(400), 3), ["a", "b", "b"] * 400
    rows = pd.DataFrame({"user_id": users, "request_id": requests})
    rows["item_id"] = np.stack([before, 100 + item, 200 + item], axis=1).ravel()
    beside = signals(Log.from_table(rows))["order"].beside
    assert beside is not None
    assert beside < 0.4


def test_a_log_without_order_has_no_signals_of_order() -> None:
    names = [x.name for x in signals(log_of(walks(8), reading=Reading(is_ordered=False)))]
    assert names == ["repeats", "top 1%", "top 10%", "history"]


def test_a_large_log_is_read_for_some_users(monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_of([[1, 2]] * 100 + [[3, 4, 3, 4]] * 100)
    some = signals(log, max_positives=300)
    assert some["repeats"].value == pytest.approx(1 / 3, abs=0.1)
    assert some["repeats"].value != signals(log)["repeats"].value
    assert some == signals(log, max_positives=300)


def test_signals_show_as_a_table_in_a_notebook_and_in_print() -> None:
    found = signals(log_of(walks(4)))
    header, *rows = repr(found).splitlines()
    assert header.split() == ["signal", "value", "beside", "meaning"]
    assert [row.partition("  ")[0] for row in rows] == [signal.name for signal in found]
    assert str(found) == repr(found)
