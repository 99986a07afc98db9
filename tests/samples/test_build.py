"""Samples from event tables, against slow loops over the raw events."""

import tempfile
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.samples.build import (
    HistoryOrder,
    RowLists,
    build_samples,
    read_ids,
    read_samples,
)

START = datetime(2024, 1, 1, tzinfo=UTC)
CONNECTION = ibis.duckdb.connect()
STAGES = ("retrieved", "pre_ranked", "ranked", "exposed", "clicked")

# user, item, second, stage, request (None: no request)
Event = tuple[int, int, int, str, int | None]
EVENTS = st.lists(
    st.tuples(
        st.integers(1, 3),
        st.integers(1, 6),
        st.integers(0, 5),
        st.sampled_from(STAGES),
        st.one_of(st.none(), st.integers(0, 2)),
    ),
    min_size=1,
    max_size=40,
).filter(lambda events: any(event[3] == "clicked" for event in events))


def make_tables(events: list[Event], *, with_request: bool = True) -> Log:
    users, items, seconds, stages, requests = zip(*events, strict=True)
    columns: dict[str, Any] = {
        "user_id": pa.array(users, pa.int64()),
        "item_id": pa.array(items, pa.int64()),
        "timestamp": pa.array(
            [START + timedelta(seconds=second) for second in seconds], pa.timestamp("us", "UTC")
        ),
        "event_number": pa.array(range(len(events)), pa.int64()),
        "stage": pa.array(stages, pa.string()),
    }
    if with_request:
        columns["request_id"] = pa.array(requests, pa.int64())

    def create(table: pa.Table) -> ibis.Table:
        return CONNECTION.create_table(ibis.util.gen_name("builder"), table)

    return Log(
        events=create(pa.table(columns)),
        items=create(pa.table({"item_id": pa.array(range(1, 8), pa.int64())})),
        users=create(pa.table({"user_id": pa.array(range(1, 4), pa.int64())})),
    )


def build(
    tables: Log,
    folder: Path,
    *,
    events: ibis.Table | None = None,
    order: HistoryOrder = "timestamp",
) -> list[tuple[int, int, tuple[int, ...]]]:
    """Builds and returns (user, item, history oldest first), sorted; here ids equal rows."""
    build_samples(
        tables,
        tables.events if events is None else events,
        folder,
        seed=0,
        order=order,
    )
    samples = read_samples(folder)
    return sorted(
        (int(query), int(candidate), tuple(samples.history(i).tolist()))
        for i, (query, candidate) in enumerate(
            zip(samples.query_rows, samples.candidate_rows, strict=True)
        )
    )


def slow_histories(events: list[Event], with_request: bool) -> list[Any]:
    """Loops over positives: what was clicked before the request, or the event, began."""
    numbered = [(*event, number) for number, event in enumerate(events)]
    starts: dict[tuple[int, int], int] = {}
    for user, _, second, _, request, _ in numbered:
        if with_request and request is not None:
            key = (user, request)
            starts[key] = min(second, starts.get(key, second))

    def began(event: Any) -> int:
        user, _, second, _, request, _ = event
        return starts[user, request] if with_request and request is not None else second

    positives = [event for event in numbered if event[3] == "clicked"]
    samples = []
    for event in positives:
        earlier = [p for p in positives if p[0] == event[0] and p[2] < began(event)]
        kept = sorted(earlier, key=lambda p: (p[2], p[5]))
        samples.append((event[0], event[1], tuple(p[1] for p in kept)))
    return sorted(samples)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(events=EVENTS, with_request=st.booleans())
def test_histories_counts_and_masks_match_a_loop(
    tmp_path: Path, events: list[Event], with_request: bool
) -> None:
    tables = make_tables(events, with_request=with_request)
    # One folder an example: the fixture's is shared by all of them.
    tmp_path = Path(tempfile.mkdtemp(dir=tmp_path))
    built = build(tables, tmp_path)
    assert built == slow_histories(events, with_request)

    clicked, exposed, counts = defaultdict(set), defaultdict(set), np.zeros(8, np.int64)
    for user, item, _, stage, _ in events:
        if stage == "clicked":
            clicked[user].add(item)
            counts[item] += 1
        if stage == "exposed":
            exposed[user].add(item)
    samples = read_samples(tmp_path)
    np.testing.assert_array_equal(samples.counts, counts)
    for user in (1, 2, 3):
        assert samples.known_positives[user].tolist() == sorted(clicked[user])
        assert samples.exposed[user].tolist() == sorted(exposed[user] - clicked[user])


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(events=EVENTS, cut=st.integers(1, 5))
def test_nothing_after_the_cut_reaches_a_sample_a_count_or_a_mask(
    tmp_path: Path, events: list[Event], cut: int
) -> None:
    if not any(second < cut and stage == "clicked" for _, _, second, stage, _ in events):
        return
    moved = [
        (user, item % 6 + 1, second, "exposed", request) if second >= cut else event
        for event in events
        for user, item, second, _, request in [event]
    ]
    outputs = []
    tmp_path = Path(tempfile.mkdtemp(dir=tmp_path))
    for name, log in (("as_it_was", events), ("future_changed", moved)):
        tables = make_tables(log)
        before = tables.events.filter(tables.events["timestamp"] < START + timedelta(seconds=cut))
        built = build(tables, tmp_path / name, events=before)
        samples = read_samples(tmp_path / name)
        outputs.append(
            (
                built,
                samples.counts.tolist(),
                samples.known_positives.values.tolist(),
                samples.exposed.values.tolist(),
            )
        )
    assert outputs[0] == outputs[1]


def test_an_item_of_the_same_second_or_request_is_not_in_the_history(tmp_path: Path) -> None:
    events: list[Event] = [
        (1, 1, 0, "clicked", 0),
        (1, 2, 3, "clicked", 1),
        (1, 3, 4, "clicked", 1),
        (1, 4, 5, "clicked", None),
        (1, 5, 5, "clicked", None),
    ]
    assert build(make_tables(events), tmp_path) == [
        (1, 1, ()),
        (1, 2, (1,)),
        (1, 3, (1,)),
        (1, 4, (1, 2, 3)),
        (1, 5, (1, 2, 3)),
    ]


def test_order_of_the_log_and_no_order(tmp_path: Path) -> None:
    events: list[Event] = [(1, item, 0, "clicked", None) for item in (3, 1, 2)]
    tables = make_tables(events, with_request=False)
    assert build(tables, tmp_path / "a", order="event_number") == [
        (1, 1, (3,)),
        (1, 2, (3, 1)),
        (1, 3, ()),
    ]
    assert build(tables, tmp_path / "b", order="none") == [
        (1, 1, (3, 2)),
        (1, 2, (3, 1)),
        (1, 3, (1, 2)),
    ]


def test_shards_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    events: list[Event] = [(1, 1 + i % 7, i, "clicked", None) for i in range(60)]
    tables = make_tables(events)
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_samples(tables, tables.events, tmp_path / name, seed=seed)
        table = pq.read_table(sorted((tmp_path / name / "samples").iterdir())[0])
        orders.append(table["num_earlier"].to_pylist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(map(str, orders[0])) == sorted(map(str, orders[2]))


def test_ids_stand_at_their_rows(tmp_path: Path) -> None:
    build(make_tables([(2, 5, 0, "clicked", None)]), tmp_path)
    candidate_ids, query_ids = read_ids(tmp_path)
    assert candidate_ids.tolist() == list(range(1, 8))
    assert query_ids.tolist() == [1, 2, 3]


def test_refuses_a_training_part_without_a_positive(tmp_path: Path) -> None:
    tables = make_tables([(1, 1, 0, "clicked", None), (1, 2, 1, "exposed", None)])
    training = tables.events.filter(tables.events["stage"] == "exposed")
    with pytest.raises(DataError, match="no positive"):
        build(tables, tmp_path, events=training)
    with pytest.raises(FileNotFoundError, match="build_samples"):
        read_samples(tmp_path / "elsewhere")


def test_row_lists() -> None:
    lists = RowLists.from_lists([np.array([3, 1]), np.array([], int), np.array([2])])
    assert len(lists) == 3
    assert [lists[i].tolist() for i in range(3)] == [[3, 1], [], [2]]
    assert len(RowLists.from_lists([])) == 0
