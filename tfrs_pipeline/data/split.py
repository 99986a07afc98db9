"""Splits a log: decides which events train, and which are kept for evaluation.

A split adds or replaces the column `part`: "train", "validation" or "test"; a log's own column may
hold "fold_in" too (history of a held-out user, never trained on). Positives are the events of stage
`clicked`. A user's events are ordered by timestamp and event number; without an order, at random,
with those of one item together.
"""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import ibis
import ibis.expr.types as ir

from tfrs_pipeline.data.engines import random_key
from tfrs_pipeline.data.schema import DataError, count_rows, is_positive, order_keys
from tfrs_pipeline.data.settings import SplitConfig

PARTS = ("train", "validation", "test", "fold_in")
# .07 * 100 is 7.000000000000001 in binary, but its ceiling must be 7.
_CEIL_SLACK = 1e-9


def split_events(
    events: ibis.Table, config: SplitConfig, *, seed: int, is_ordered: bool
) -> ibis.Table:
    """Adds the column `part` (see `Log.split`); `config.kind` must be set."""
    if config.kind == "column":
        return split_by_column(events)
    if config.kind == "time":
        return split_by_time(events, *config.amounts())
    order: list[Any] = order_keys(events)
    if not is_ordered:  # Rows may be sorted by item, so their order would not be a fair draw.
        order = [random_key(events["user_id"], events["item_id"], seed=seed), "item_id"]
    split = split_last(_count_positives(events, config.min_positives, order), config)
    return split.select(*(name for name in events.columns if name != "part"), "part")


def split_by_time(
    events: ibis.Table, validation: float | datetime, test: float | datetime
) -> ibis.Table:
    """Splits at two moments, the same for all users; positives at one moment stay together."""
    if "timestamp" not in events.columns:
        raise DataError(
            "The log has no timestamp, so it cannot be split by time. Set split.kind to "
            "last_share or last_n, which need no time."
        )
    if not (isinstance(validation, datetime) and isinstance(test, datetime)):
        validation, test = _time_cuts(events, validation, test)
    is_train, is_before_test = (
        events["timestamp"] < ibis.literal(moment.astimezone(UTC), type="timestamp('UTC', 6)")
        for moment in (validation, test)
    )
    part = ibis.cases((is_train, "train"), (is_before_test, "validation"), else_="test")
    return events.mutate(part=part)


def split_last(counted: ibis.Table, config: SplitConfig) -> ibis.Table:
    """Splits off each user's last positives: ceil(test n) of n, then ceil(validation m) of m left.

    For the kind "last_n", the amounts are numbers.
    """
    validation, test = config.amounts()
    num_positives, num_so_far = counted["_num_positives"], counted["_num_so_far"]
    if config.kind == "last_n":
        num_before_test = num_positives - test
        num_train = num_before_test - validation
    else:
        num_before_test = num_positives - round_up(num_positives * test)
        num_train = num_before_test - round_up(num_before_test * validation)
    # If a user has too few positives for all parts, events before the first positive still train.
    is_test = num_so_far > ibis.greatest(num_before_test, 0)
    is_validation = num_so_far > ibis.greatest(num_train, 0)
    part = ibis.cases((is_test, "test"), (is_validation, "validation"), else_="train")
    return counted.mutate(part=part)


def split_by_column(events: ibis.Table) -> ibis.Table:
    """Splits by the log's own column `part`; events without a part (null) are dropped.

    Events of the part "fold_in" are history alone: they train nothing, and no query asks for them.
    """
    if "part" not in events.columns:
        raise DataError(
            "The log has no column 'part' to split by. Set columns to say which column it is, or "
            "set split.kind to another kind."
        )
    counts = events.group_by("part").agg(num=events.count(), positives=is_positive(events).sum())
    rows = {row["part"]: row for row in counts.to_pyarrow().to_pylist()}
    num_null = rows.pop(None, {"num": 0})["num"]
    where = "event table: column 'part'"
    if unknown := {value: row["num"] for value, row in rows.items() if value not in PARTS}:
        num_rows = num_null + sum(row["num"] for row in rows.values())
        raise DataError(
            f"{where}: {sum(unknown.values())} of {num_rows} rows hold "
            f"{', '.join(sorted(map(repr, unknown))[:10])}. It must hold "
            f"{', '.join(PARTS)}, or null for events of no part."
        )
    if empty := [part for part in PARTS[:3] if part not in rows or not rows[part]["positives"]]:
        raise DataError(
            f"{where}: no row of the part {' or '.join(empty)} is a positive; {num_null} rows are "
            "null. Mark some, check the label, or set split.kind to another kind."
        )
    return events.filter(events["part"].notnull())


def _time_cuts(
    events: ibis.Table, validation_share: Any, test_share: Any
) -> tuple[datetime, datetime]:
    """Finds the times of the first validation positive and of the first test positive.

    If many share a time, validation starts at the latest time before the test.
    """
    times = events.filter(is_positive).select("timestamp")
    # Shares are of positives: exposures may be a hundred times as many, and differ by day.
    num_positives, time_of = in_order(times)
    num_test = num_in_share(test_share, num_positives)
    num_validation = num_in_share(validation_share, num_positives)
    first_test = num_positives - num_test
    first_validation = first_test - num_validation
    if first_validation < 1:
        raise DataError(
            f"{num_positives} positives leave none to train on after {num_validation} for "
            f"validation and {num_test} for the test. Use smaller shares, or more data."
        )
    begin_test = begin = time_of(first_test)

    def num_before(moment: datetime) -> int:
        return count_rows(times.filter(times["timestamp"] < moment))

    # The test keeps its share; validation gives way if many events share a time.
    if num_validation and (num_earlier := num_before(begin_test)):
        begin = time_of(min(first_validation, num_earlier - 1))
    if not num_before(begin) or (num_validation and begin == begin_test):
        raise DataError(
            f"{num_positives} positives have too few times to split by: {num_before(begin_test)} "
            f"of them come before {begin_test:%Y-%m-%d %H:%M:%S} UTC, where the test begins. Give "
            "a finer timestamp, or set split.kind to last_share."
        )
    return begin, begin_test


def in_order(times: ibis.Table) -> tuple[int, Callable[[int], datetime]]:
    """Counts timestamps, and returns a function that finds the n-th smallest, from 0."""

    def time_of(position: int) -> datetime:
        rows = times.order_by("timestamp").limit(1, offset=position).to_pyarrow()
        return rows["timestamp"][0].as_py().astimezone(UTC)

    return count_rows(times), time_of


def _count_positives(events: ibis.Table, min_positives: int, order: list[Any]) -> ibis.Table:
    """Adds the user's _num_positives, and _num_so_far up to and including the event."""
    positives = is_positive(events).cast("int64")
    # By range, so that events at the same position count each other: no cut splits them.
    so_far = ibis.range_window(preceding=None, following=0, group_by="user_id", order_by=order)
    counted = events.mutate(
        _num_positives=positives.sum().over(ibis.window(group_by="user_id")),
        _num_so_far=positives.sum().over(so_far),
    )
    return counted.filter(counted["_num_positives"] >= min_positives)


def num_in_share(share: float, num: int) -> int:
    """Returns a share of a number, rounded up like `round_up`."""
    return math.ceil(share * num - _CEIL_SLACK)


def round_up(value: ir.NumericValue) -> ir.IntegerValue:
    """Rounds a share of a number up to int64, except for binary rounding errors."""
    return (value - _CEIL_SLACK).ceil().cast("int64")
