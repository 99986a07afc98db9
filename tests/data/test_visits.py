"""Several events of an item within a visit are one, and nothing else of the visit changes.

A slow loop over rows says which events are merged, into what, and what each positive's history is.
"""

from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.small_log import column
from tfrs_pipeline import Log, Reading
from tfrs_pipeline.data.engines import connect
from tfrs_pipeline.data.schema import Ties
from tfrs_pipeline.samples.build import build_samples

START = datetime(2024, 5, 6, 8, tzinfo=UTC)
# In the order of strength. No product of a weight and an amount below is that of another pair.
WEIGHTS: dict[str, Any] = {"purchase": 5, "cart": 3, "click": 1, "view": "exposed"}
AMOUNTS = (1.0, 7.0, 100.0)
CONNECTION = connect()


class Event(NamedTuple):
    user: int
    item: int
    minute: int
    kind: str
    session: int | None = None
    request: int | None = None
    amount: float = 1.0

    @property
    def weight(self) -> float | None:
        """The weight of a positive; nothing reads that of another event."""
        return None if self.kind == "view" else WEIGHTS[self.kind] * self.amount


class Row(NamedTuple):
    """An event of the log that was made."""

    number: int
    user: int
    item: int
    minute: int
    request: int | None
    stage: str
    weight: float | None


def made(
    events: list[Event], ties: Ties = "drop", without: tuple[str, ...] = (), **options: Any
) -> Log:
    frame = pd.DataFrame(events).drop(columns=[*without])
    names = {"user": "user_id", "item": "item_id", "kind": "event", "request": "request_id"}
    names |= {"session": "session_id"}
    frame["timestamp"] = [START + timedelta(minutes=event.minute) for event in events]
    if "minute" in without:
        frame = frame.drop(columns="timestamp")
    frame = frame.rename(columns=names).convert_dtypes()
    columns = {} if "amount" in without else {"weight": "amount"}
    reading = Reading(event_weights=WEIGHTS, columns=columns, ties=ties, **options)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    return Log.from_table(table, reading=reading, connection=CONNECTION)


def rows(log: Log) -> list[Row]:
    names = ["event_number", "user_id", "item_id", "timestamp", "request_id", "stage", "weight"]
    found = log.events.order_by("event_number").to_pyarrow().to_pylist()
    for row in found:
        row["weight"] = row["weight"] if row["stage"] == "clicked" else None
    for row in found:
        row["timestamp"] = int((row["timestamp"] - START).total_seconds()) // 60
    return [Row(*map(row.get, names)) for row in found]


def visits_of(events: list[Event], has_sessions: bool) -> dict[int, Any]:
    """Names the visit of each event: its user, session, and the pauses before it."""
    last: dict[Any, int] = {}
    pauses: dict[Any, int] = defaultdict(int)
    visits = {}
    for number in sorted(range(len(events)), key=lambda n: (events[n].minute, n)):
        event = events[number]
        session = event.session if has_sessions else None
        key = event.user, session
        longest = 30 if session is None else 24 * 60
        pauses[key] += event.minute - last.get(key, event.minute) > longest
        last[key] = event.minute
        visits[number] = (*key, pauses[key])
    return visits


def by_hand(events: list[Event], has_sessions: bool, has_requests: bool) -> tuple[list[Row], int]:
    """Merges events one by one; returns the rows that are left, and how many were merged."""

    def strongest(numbers: list[int], stands_for: dict[int, int]) -> int:
        of_types = [*WEIGHTS]
        return min(
            (stands_for[number] for number in numbers),
            key=lambda n: (of_types.index(events[n].kind), -events[n].amount, n),
        )

    def in_time(number: int) -> tuple[int, int]:
        return events[number].minute, number

    request = {n: event.request if has_requests else None for n, event in enumerate(events)}
    by_request: dict[Any, list[int]] = defaultdict(list)
    for number, event in enumerate(events):
        by_request[event.user, event.item, request[number]].append(number)
    stands_for = {number: number for number in range(len(events))}  # The event with its type.
    for number in sorted(stands_for, key=in_time):
        if number in stands_for and request[number] is not None:
            of = events[number].user, events[number].item, request[number]
            same = [other for other in by_request[of] if other in stands_for]
            stands_for[number] = strongest(same, stands_for)
            for other in same:
                if other != number:
                    del stands_for[other]
    visits = visits_of(events, has_sessions)
    groups: dict[Any, list[int]] = defaultdict(list)
    in_request: dict[Any, int] = defaultdict(int)
    for number in stands_for:
        groups[visits[number], events[number].item].append(number)
        in_request[events[number].user, request[number]] += 1
    for numbers in groups.values():
        first = min(numbers, key=lambda n: (events[stands_for[n]].kind == "view", *in_time(n)))
        merged = [
            number
            for number in numbers
            if number != first
            and (request[number] is None or in_request[events[number].user, request[number]] == 1)
        ]
        stands_for[first] = strongest([first, *merged], stands_for)
        for number in merged:
            del stands_for[number]
    left = [
        Row(
            number,
            events[number].user,
            events[number].item,
            events[number].minute,
            request[number],
            "exposed" if events[strong].kind == "view" else "clicked",
            events[strong].weight,
        )
        for number, strong in sorted(stands_for.items())
    ]
    return left, len(events) - len(left)


def histories(left: list[Row], ties: Ties) -> dict[int, list[int]]:
    """Collects the items that each positive's query may know, by its number."""
    found = {}
    by_user: dict[int, list[Row]] = defaultdict(list)
    for row in left:
        by_user[row.user].append(row)
    for row in left:
        if row.stage == "clicked":
            theirs = by_user[row.user]
            request = [x for x in theirs if x.request is not None and x.request == row.request] or [
                row
            ]
            start = min((x.minute, 0 if ties == "drop" else x.number) for x in request)
            found[row.number] = [
                x.item
                for x in sorted(theirs, key=lambda x: (x.minute, x.number))
                if x.stage == "clicked" and (x.minute, 0 if ties == "drop" else x.number) < start
            ]
    return found


def built_histories(log: Log, folder: Path) -> dict[int, list[int]]:
    """Reads the histories of training, in the order of the samples."""
    build_samples(log, folder, seed=0)
    samples = pq.read_table(folder / "samples.parquet").to_pylist()
    items = pq.read_table(folder / "corpus.parquet")["item_id"].to_pylist()
    positives = log.events.filter(log.events["stage"] == "clicked")
    order = positives.order_by(["user_id", "timestamp", "event_number"])
    numbers = order["event_number"].to_pyarrow().to_pylist()
    sequences: dict[int, list[int]] = defaultdict(list)
    for sample in samples:
        sequences[sample["query_row"]].append(items[sample["candidate_row"] - 1])
    return {
        number: sequences[sample["query_row"]][: sample["num_earlier"]]
        for number, sample in zip(numbers, samples, strict=True)
    }


def random_events(num_users: int = 250, seed: int = 0) -> list[Event]:
    """Draws the events of many users. Each is a case of its own, since nothing crosses users."""
    rng = np.random.default_rng(seed)
    # Pauses of half an hour and of a day are among the differences, and so are those just longer.
    minutes = (0, 1, 5, 29, 30, 31, 60, 61, 120, 1_440, 1_441, 1_500, 2_941, 4_000)
    return [
        Event(
            user=int(rng.integers(num_users)),
            item=int(rng.integers(1, 4)),
            minute=int(rng.choice(minutes)),
            kind=str(rng.choice([*WEIGHTS])),
            session=(None, 1, 2)[rng.integers(3)],
            request=(None, None, 1, 2)[rng.integers(4)],
            amount=float(rng.choice(AMOUNTS)),
        )
        for _ in range(12 * num_users)
    ]


@pytest.mark.parametrize("without", ["", "session", "request", "session request"])
@pytest.mark.parametrize("ties", ["drop", "order"])
def test_merged_events_and_histories_are_those_of_a_slow_loop(
    tmp_path: Path, ties: Ties, without: str
) -> None:
    events = random_events()
    left, num_merged = by_hand(events, "session" not in without, "request" not in without)
    log = made(events, ties, tuple(without.split()))
    assert rows(log) == left
    assert sum(each.num_rows for each in log.dropped) == num_merged > 100
    assert built_histories(log, tmp_path) == histories(left, ties)


@pytest.mark.parametrize("name", ["session_id", "Session", "visit_id", "VISIT"])
def test_a_session_is_found_by_its_usual_name(name: str) -> None:
    events = [Event(1, 1, 0, "click", 1), Event(1, 1, 300, "purchase", 1), Event(1, 2, 9, "click")]
    frame = pd.DataFrame(events).rename(columns={"session": name, "user": "user_id"})
    frame = frame.rename(columns={"item": "item_id", "kind": "event"})
    frame["timestamp"] = [START + timedelta(minutes=event.minute) for event in events]
    options: Any = {"event_weights": WEIGHTS}
    log = Log.from_table(frame, reading=Reading(**options))
    assert (
        f"merged 1 row into the strongest event of their item in the same visit (column '{name}"
        in (str(log.describe()))
    )
    assert column(log.events, "weight") == [5.0, 1.0]
    # Another column may be named instead. With "amount", no two events of an item are one visit.
    apart = Log.from_table(
        frame.assign(other=range(3)), reading=Reading(**options, columns={"session_id": "other"})
    )
    assert apart.dropped == ()
    # Without types of events, nothing is merged.
    clicks = Log.from_table(frame.drop(columns="event"))
    assert clicks.dropped == ()


def test_an_event_of_the_test_is_not_merged_into_one_of_the_training() -> None:
    frame = pd.DataFrame({"user_id": [1] * 4, "item_id": [1, 1, 2, 2], "event": ["click"] * 4})
    frame["session_id"] = 1
    frame["part"] = ["train", "test", "train", "train"]
    log = Log.from_table(frame, reading=Reading(event_weights={"click": 1}))
    assert column(log.events, "event_number") == [0, 1, 2]


def test_without_times_and_sessions_every_event_stands_alone() -> None:
    events = [Event(1, 1, 0, "click", 1), Event(1, 1, 1, "cart", 1), Event(1, 1, 2, "cart")]
    assert made(events, without=("minute", "session", "request", "amount")).dropped == ()
    assert len(column(made(events, without=("minute", "request", "amount")).events, "item_id")) == 2


@pytest.mark.parametrize("is_last", [True, False])
def test_equal_times_that_empty_histories_are_told(is_last: bool) -> None:
    """Each user has three clicks in one second, and a fourth: in it, or later."""
    times = [START + timedelta(seconds=0 if n < 3 or not is_last else 60) for n in range(4)] * 50
    table = pa.table({
        "user_id": [user for user in range(50) for _ in range(4)],
        "item_id": [*range(200)],
        "timestamp": pa.array(times, pa.timestamp("us", "UTC")),
    })  # fmt: skip
    log = Log.from_table(table, reading=Reading(ties="drop"))
    (told,) = [line for line in log.describe() if line.startswith("warning: ")]
    num = 100 if is_last else 150
    assert f"{num} of 200 positives ({num / 200:.1%}) have no history" in told
    assert "clicks with the same 'timestamp' are not in" in told
    (same,) = [
        line for line in Log.from_ibis(log.events, ties="drop").describe() if "warning: " in line
    ]
    assert same == told
    ordered = Log.from_table(table, reading=Reading(ties="order"))
    assert not [line for line in ordered.describe() if line.startswith("warning: ")]
