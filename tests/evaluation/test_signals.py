"""What a log rewards, on made-up logs where the answer is known."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tfrs_pipeline import Log, signals


def log_of(histories: Iterable[Sequence[int]], times: Any = None, **options: Any) -> Log:
    """Makes a log with one history per user; `times` holds the times of all rows."""
    rows = [(user, item) for user, history in enumerate(histories) for item in history]
    events = pd.DataFrame(rows, columns=["user_id", "item_id"])
    if times is not None:
        events["timestamp"] = pd.to_datetime(times, unit="s", utc=True)
    return Log.from_table(events, **options)


def test_trend_compares_the_latest_clicks_with_all_before() -> None:
    histories = [[0] * 60 + [1] * 40, range(2, 100)]
    log = log_of(histories, times=10**9 + np.r_[0:100, np.zeros(98)])
    found = signals(log)["trend"]
    assert (found.value, found.beside) == (1, 0)


def test_trend_equals_a_loop_over_the_clicks_in_their_order() -> None:
    rng = np.random.default_rng(0)
    items, times = rng.integers(0, 400, 2003) ** 2 // 400, rng.permutation(2003)
    clicks = items[np.argsort(times)].tolist()
    before, latest = clicks[:-200], clicks[-200:]
    recent, shares = before[-200:], []
    for first in (lambda item: recent.count(item), lambda item: 0):
        top = sorted(set(clicks), key=lambda item: (-first(item), -before.count(item), item))
        top = top[: -(-len(set(clicks)) // 100)]
        shares.append(sum(item in top for item in latest) / 200)
    found = signals(log_of([items.tolist()], times=10**9 + times))["trend"]
    assert [found.value, found.beside] == pytest.approx(shares)
    assert shares[0] != shares[1]


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


def test_a_log_without_times_has_no_trend_and_one_without_clicks_nothing() -> None:
    log = log_of([range(20)])
    assert [signal.name for signal in signals(log)] == ["repeats", "top 1%", "top 10%", "history"]
    nothing = dataclasses.replace(log, events=log.events.filter(log.events["item_id"] < 0))
    assert not list(signals(nothing))


def test_signals_show_as_a_table_in_a_notebook_and_in_print() -> None:
    found = signals(log_of([range(4), range(2)]))
    header, *rows = repr(found).splitlines()
    assert header.split() == ["signal", "value", "beside", "meaning"]
    assert [row.partition("  ")[0] for row in rows] == [signal.name for signal in found]
    assert str(found) == repr(found)
