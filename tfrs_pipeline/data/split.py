"""Which events train, which are left for evaluation.

Every split adds a column `part` to the event table, or replaces the one that is there: "train",
"validation", "test", or "fold_in" (history of a held-out user: never trained on). Positives are the
events of stage `clicked`. The order of a user's events is by timestamp, ties by event number; by
event number alone where the log has no time. The splits are lazy expressions, run by the backend
that holds the table.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import ibis
import numpy as np
import pyarrow as pa

from tfrs_pipeline.data.schema import DataError, Stage
from tfrs_pipeline.retrieval import Query

logger = logging.getLogger(__name__)

PARTS = ("train", "validation", "test", "fold_in")
COLUMN_PARTS = ("train", "validation", "test")
EvaluationPart = Literal["validation", "test"]

# What a query may know: everything before the user's cut, so for "test" the validation part too.
_PARTS_BEFORE: dict[EvaluationPart, tuple[str, ...]] = {
    "validation": ("train", "fold_in"),
    "test": ("train", "validation", "fold_in"),
}
# .07 * 100 is 7.000000000000001 in binary: its ceiling must be 7.
_CEIL_SLACK = 1e-9


def split_by_time(
    events: ibis.Table, *, validation_start: datetime, test_start: datetime
) -> ibis.Table:
    """Splits at two moments, the same for all users.

    Args:
        events: Event table with timestamps.
        validation_start: First moment of the validation part, with a time zone.
        test_start: First moment of the test part, at or after `validation_start`.

    Returns:
        `events` with `part`; no user is dropped.

    Raises:
        DataError: If the table has no timestamp.
        ValueError: If a moment has no time zone, or they are in the wrong order.
    """
    _require_timestamp(events)
    for moment in (validation_start, test_start):
        if moment.tzinfo is None:
            raise ValueError(f"Give {moment} a time zone, as in datetime(..., tzinfo=UTC).")
    if validation_start > test_start:
        raise ValueError(
            f"validation_start must not be after test_start. Received: {validation_start} and "
            f"{test_start}."
        )
    time = events["timestamp"]
    return events.mutate(
        part=ibis.cases(
            (time < _moment(validation_start), "train"),
            (time < _moment(test_start), "validation"),
            else_="test",
        )
    )


def time_cuts(
    events: ibis.Table, *, validation_share: float, test_share: float
) -> tuple[datetime, datetime]:
    """Finds the moments at which to split by time, from shares of the positives.

    The test part starts with the moment of the first of the last ceil(test_share n) positives, the
    validation part with that of the ceil(validation_share n) before these; positives of the same
    moment are not parted, so a part may hold a few more.

    Args:
        events: Event table with timestamps.
        validation_share: Share of all positives, 0 or more.
        test_share: Share of all positives, above 0; together below 1.

    Returns:
        validation_start, test_start: For `split_by_time`.

    Raises:
        DataError: If the table has no timestamp or too few positives.
        ValueError: If the shares are out of range.
    """
    _require_timestamp(events)
    _check_shares(validation_share, test_share)
    times = events.filter(_is_positive(events)).select("timestamp").order_by("timestamp")
    num_positives = int(times.count().to_pyarrow().as_py())
    num_test = math.ceil(test_share * num_positives - _CEIL_SLACK)
    num_validation = math.ceil(validation_share * num_positives - _CEIL_SLACK)
    first_test = num_positives - num_test
    first_validation = first_test - num_validation
    if first_validation < 1:
        raise DataError(
            f"{num_positives} positives leave none to train on after {num_validation} for "
            f"validation and {num_test} for the test. Use smaller shares, or more data."
        )
    cuts = [times.limit(1, offset=row).to_pyarrow() for row in (first_validation, first_test)]
    validation_start, test_start = (cut["timestamp"][0].as_py().astimezone(UTC) for cut in cuts)
    return validation_start, test_start


def split_last_n(
    events: ibis.Table,
    *,
    num_validation: int = 1,
    num_test: int = 1,
    min_positives: int | None = None,
) -> ibis.Table:
    """Splits off each user's last positives, a fixed number of them.

    Events that are not positives take the part of their place: those after the user's first test
    positive are of the test part, and so on.

    Args:
        events: Event table.
        num_validation: Positives a user for validation, 0 or more.
        num_test: Positives a user for the test, 0 or more.
        min_positives: Users with fewer are dropped, all their events; None means one more than the
            two numbers, so that each user has a positive to train on.

    Returns:
        `events` of the users kept, with `part`.

    Raises:
        ValueError: If a number is negative.
    """
    if min(num_validation, num_test) < 0:
        raise ValueError(
            f"num_validation and num_test must be 0 or more. Received: {num_validation} and "
            f"{num_test}."
        )
    if min_positives is None:
        min_positives = num_validation + num_test + 1
    counted = _count_positives(events, min_positives)
    num_before_test = counted["num_positives"] - num_test
    return _part_by_place(events, counted, num_before_test - num_validation, num_before_test)


def split_last_share(
    events: ibis.Table,
    *,
    validation_share: float = 0.2,
    test_share: float = 0.2,
    min_positives: int = 5,
) -> ibis.Table:
    """Splits off each user's last positives, a share of them.

    Of a user's n positives the last ceil(test_share n) are the test, of the m before them the last
    ceil(validation_share m) the validation part. Other events take the part of their place.

    Args:
        events: Event table.
        validation_share: In [0, 1), of what the test leaves.
        test_share: In [0, 1).
        min_positives: Users with fewer are dropped, all their events.

    Returns:
        `events` of the users kept, with `part`.

    Raises:
        ValueError: If a share is out of range.
    """
    for share in (validation_share, test_share):
        if not 0 <= share < 1:
            raise ValueError(f"A share must be in [0, 1). Received: {share}.")
    counted = _count_positives(events, min_positives)
    num_positives = counted["num_positives"]
    num_before_test = num_positives - _ceil(num_positives * test_share)
    num_train = num_before_test - _ceil(num_before_test * validation_share)
    return _part_by_place(events, counted, num_train, num_before_test)


def split_held_out_users(
    events: ibis.Table,
    *,
    validation_share: float = 0.1,
    test_share: float = 0.1,
    target_share: float = 0.2,
    min_positives: int = 5,
    seed: int = 0,
) -> ibis.Table:
    """Holds out users drawn at random: none of their events is trained on.

    A held-out user's last ceil(target_share n) positives are the ones to find ("validation" or
    "test"); the events before them are "fold_in", the history that a query may show.

    Args:
        events: Event table.
        validation_share: Share of the users, 0 or more.
        test_share: Share of the users, above 0; together below 1.
        target_share: Share of a held-out user's positives, in (0, 1).
        min_positives: Users with fewer are dropped, all their events; 2 or more.
        seed: Of the draw. The same ids and seed give the same users.

    Returns:
        `events` of the users kept, with `part`. The draw itself is made at once.

    Raises:
        ValueError: If a share is out of range.
    """
    _check_shares(validation_share, test_share)
    if not 0 < target_share < 1 or min_positives < 2:
        raise ValueError(
            "target_share must be in (0, 1) and min_positives 2 or more. Received: "
            f"{target_share} and {min_positives}."
        )
    counted = _count_positives(events, min_positives)
    users = counted.select("user_id").distinct().order_by("user_id").to_pyarrow()["user_id"]
    drawn = np.random.default_rng(seed).permutation(len(users))
    num_test = math.ceil(test_share * len(users) - _CEIL_SLACK)
    num_held_out = num_test + math.ceil(validation_share * len(users) - _CEIL_SLACK)
    roles = np.full(len(users), "train", object)
    roles[drawn[:num_held_out]] = "validation"
    roles[drawn[:num_test]] = "test"
    role_table = ibis.memtable(pa.table({"user_id": users, "_role": pa.array(roles, pa.string())}))
    counted = counted.inner_join(role_table, "user_id")
    num_positives = counted["num_positives"]
    is_target = counted["num_so_far"] > num_positives - _ceil(num_positives * target_share)
    is_history = (counted["_role"] != "train") & ~is_target
    part = is_history.ifelse("fold_in", counted["_role"])
    return counted.mutate(part=part).select(*_columns(events), "part")


def split_by_column(events: ibis.Table) -> ibis.Table:
    """Splits as the log itself says, in its column `part`.

    Args:
        events: Event table with `part`: "train", "validation" or "test", or null for events to
            leave out, which are counted in the log. Each part must have events, and there must be
            positives to train on and to test on.

    Returns:
        `events` that have a part. No user is dropped for having few positives: the log has chosen
        its users.

    Raises:
        DataError: If the column is missing, holds other values, lacks a part, or marks no positive
            to train on or to test on.
    """
    if "part" not in events.columns:
        raise DataError(
            "The event table has no column 'part', by which it is to be split. Say which column of "
            "the file it is (columns={'part': ...}), or split otherwise (split_last_share)."
        )
    counts = events.group_by("part").agg(
        num_events=events.count(), num_positives=_is_positive(events).sum()
    )
    rows = {row.pop("part"): row for row in counts.to_pyarrow().to_pylist()}
    num_left_out = rows.pop(None, {"num_events": 0})["num_events"]
    if unknown := [value for value in rows if value not in COLUMN_PARTS]:
        num_unknown = sum(rows[value]["num_events"] for value in unknown)
        listed = ", ".join(sorted(repr(value) for value in unknown)[:10])
        num_events = num_left_out + sum(row["num_events"] for row in rows.values())
        raise DataError(
            f"event table: column 'part': {num_unknown} of {num_events} rows hold {listed}. It "
            f"must hold {', '.join(COLUMN_PARTS)}, or null for events to leave out."
        )
    if missing := [part for part in COLUMN_PARTS if part not in rows]:
        raise DataError(
            f"event table: column 'part': no row is of the part {' or '.join(missing)}; "
            f"{num_left_out} rows are null. Mark some, or split otherwise (split_last_share)."
        )
    if empty := [part for part in ("train", "test") if not rows[part]["num_positives"]]:
        raise DataError(
            f"event table: column 'part': none of the {rows[empty[0]]['num_events']} rows of the "
            f"part {empty[0]} is a positive. Check the label, or mark the rows otherwise."
        )
    if num_left_out:
        logger.info("split by column: left out %d events, whose part is null", num_left_out)
    return events.filter(events["part"].notnull())


def split_report(split: ibis.Table, events: ibis.Table | None = None) -> dict[str, Any]:
    """Counts what is in each part.

    Args:
        split: An event table with `part`.
        events: The table before the split, to count the users that it dropped.

    Returns:
        For each part that has events: num_events, num_positives, num_users. With `events`, also
        num_users_dropped and num_events_dropped.
    """
    _require_part(split)
    counts = split.group_by("part").agg(
        num_events=split.count(),
        num_positives=_is_positive(split).sum(),
        num_users=split["user_id"].nunique(),
    )
    rows = {row.pop("part"): row for row in counts.to_pyarrow().to_pylist()}
    report: dict[str, Any] = {part: rows[part] for part in PARTS if part in rows}
    if events is not None:
        before, after = (
            table.aggregate(users=table["user_id"].nunique(), events=table.count()).to_pyarrow()
            for table in (events, split)
        )
        for name in ("users", "events"):
            report[f"num_{name}_dropped"] = before[name][0].as_py() - after[name][0].as_py()
    return report


@dataclass(frozen=True)
class EvaluationQueries:
    """One query a user, for evaluation: aligned lists, sorted by user id.

    Args:
        user_ids: [num_queries] int64 or object (str).
        histories: Per query, the item ids of the positives before the user's cut, oldest first.
        relevant: Per query, the distinct item ids of the positives to find, 1 or more.
        clicked: Per query, the distinct item ids of `histories`.
        seen: Per query, the distinct item ids clicked or exposed before the cut.
    """

    user_ids: np.ndarray
    histories: list[np.ndarray]
    relevant: list[np.ndarray]
    clicked: list[np.ndarray]
    seen: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.user_ids)

    def as_queries(self) -> list[Query]:
        """Returns what a `Retriever` takes: user_id and history of each query."""
        return [
            {"user_id": user_id, "history": history}
            for user_id, history in zip(self.user_ids.tolist(), self.histories, strict=True)
        ]


def evaluation_queries(split: ibis.Table, part: EvaluationPart) -> EvaluationQueries:
    """Makes the queries of a part: who is asked for, what is known before, what is to be found.

    Args:
        split: An event table with `part`.
        part: "validation" or "test". What is known before a test cut holds the validation part.

    Returns:
        One query for each user with a positive in `part`.

    Raises:
        DataError: If the part has no positive.
    """
    _require_part(split)
    is_target = (split["part"] == part) & _is_positive(split)
    is_before = split["part"].isin(_PARTS_BEFORE[part]) & split["stage"].isin(
        [Stage.CLICKED.value, Stage.EXPOSED.value]
    )
    rows = (
        split.filter(is_target | is_before)
        .semi_join(split.filter(is_target), "user_id")
        .order_by(["user_id", *_order_keys(split)])
        .mutate(is_positive=lambda t: _is_positive(t), is_target=lambda t: t["part"] == part)
        .select("user_id", "item_id", "is_positive", "is_target")
        .to_pyarrow()
    )
    if rows.num_rows == 0:
        raise DataError(
            f"The {part} part has no positive. Make its share larger or the cut earlier, or keep "
            "users with fewer positives: split.min_positives leaves out those with less."
        )
    columns = {name: rows[name].to_numpy() for name in rows.column_names}
    user_ids = columns["user_id"]
    starts = np.flatnonzero(np.concatenate([[True], user_ids[1:] != user_ids[:-1]]))
    is_target_row = columns["is_target"]
    positives_before = columns["is_positive"] & ~is_target_row

    def per_user(keep: np.ndarray) -> list[np.ndarray]:
        ends = np.cumsum(np.add.reduceat(keep.astype(np.int64), starts))
        return np.split(columns["item_id"][keep], ends[:-1])

    histories = per_user(positives_before)
    return EvaluationQueries(
        user_ids=user_ids[starts],
        histories=histories,
        relevant=[np.unique(ids) for ids in per_user(is_target_row)],
        clicked=[np.unique(ids) for ids in histories],
        seen=[np.unique(ids) for ids in per_user(~is_target_row)],
    )


def _is_positive(events: ibis.Table) -> ibis.expr.types.BooleanValue:
    return events["stage"] == Stage.CLICKED.value


def _columns(events: ibis.Table) -> list[str]:
    """Names the columns that a split keeps: a `part` that the log came with gives way to it."""
    return [name for name in events.columns if name != "part"]


def _order_keys(events: ibis.Table) -> list[str]:
    return ["timestamp", "event_number"] if "timestamp" in events.columns else ["event_number"]


def _count_positives(events: ibis.Table, min_positives: int) -> ibis.Table:
    """Adds num_positives of the user and num_so_far, those up to and including the event."""
    is_positive = _is_positive(events).cast("int64")
    so_far = ibis.cumulative_window(group_by="user_id", order_by=_order_keys(events))
    counted = events.mutate(
        num_positives=is_positive.sum().over(ibis.window(group_by="user_id")),
        num_so_far=is_positive.sum().over(so_far),
    )
    # A user without positives has nothing to train on and nothing to find.
    return counted.filter(counted["num_positives"] >= max(min_positives, 1))


def _part_by_place(
    events: ibis.Table, counted: ibis.Table, num_train: ibis.Value, num_before_test: ibis.Value
) -> ibis.Table:
    """Names the part by how many of the user's positives lie at or before the event."""
    # Where a user has too few positives for all parts, what lies before the first is still train.
    part = ibis.cases(
        (counted["num_so_far"] > ibis.greatest(num_before_test, 0), "test"),
        (counted["num_so_far"] > ibis.greatest(num_train, 0), "validation"),
        else_="train",
    )
    return counted.mutate(part=part).select(*_columns(events), "part")


def _ceil(value: ibis.expr.types.NumericValue) -> ibis.expr.types.IntegerValue:
    return (value - _CEIL_SLACK).ceil().cast("int64")


def _moment(moment: datetime) -> ibis.Value:
    return ibis.literal(moment.astimezone(UTC), type="timestamp('UTC', 6)")


def _check_shares(validation_share: float, test_share: float) -> None:
    if validation_share < 0 or test_share <= 0 or validation_share + test_share >= 1:
        raise ValueError(
            "test_share must be above 0, validation_share 0 or more, and both together below 1. "
            f"Received: {test_share} and {validation_share}."
        )


def _require_timestamp(events: ibis.Table) -> None:
    if "timestamp" not in events.columns:
        raise DataError(
            "The event table has no timestamp, so it cannot be split by time. Use split_last_n, "
            "split_last_share or split_held_out_users, which need only an order."
        )


def _require_part(split: ibis.Table) -> None:
    if "part" not in split.columns:
        raise DataError("The event table has no column 'part': split it first (split_last_share).")
