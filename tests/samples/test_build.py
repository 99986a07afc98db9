"""Samples from event tables, against slow loops over the raw events."""

import tempfile
from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.small_log import in_ibis
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import DataError, TieRule
from tfrs_pipeline.samples.build import build_samples
from tfrs_pipeline.samples.latest_histories import latest_histories
from tfrs_pipeline.samples.store import Samples, read_ids, read_samples

START = datetime(2024, 1, 1, tzinfo=UTC)
NUM_USERS = 12
TIE_RULES: tuple[TieRule, ...] = ("drop", "order")
STAGES = ("retrieved", "pre_ranked", "ranked", "exposed", "clicked")

# user, item, second, stage, request (None: no request)
Event = tuple[int, int, int, str, int | None]
NUMBERS: Any = map(st.integers, (1, 1, 0), (NUM_USERS, 6, 5))
EVENT = st.tuples(*NUMBERS, st.sampled_from(STAGES), st.sampled_from([None, 0, 1, 2]))
EVENTS = st.lists(EVENT, min_size=1, max_size=160).filter(lambda x: "clicked" in {e[3] for e in x})


def make_log(
    events: list[Event], *, without: Collection[str] = (), ties: TieRule = "drop", **columns: Any
) -> Log:
    """Makes a log of users 1 to 12 and items 1 to 7, so that ids equal rows."""
    users, items, seconds, stages, requests = zip(*events, strict=True)
    times = [START + timedelta(seconds=second) for second in seconds]
    columns |= {"user_id": users, "item_id": items, "stage": stages}
    columns["event_number"] = range(len(events))
    columns["timestamp"] = pa.array(times, pa.timestamp("us", "UTC"))
    columns["request_id"] = pa.array(requests, pa.int64())
    return Log(
        events=in_ibis({name: values for name, values in columns.items() if name not in without}),
        items=in_ibis({"item_id": range(1, 8)}),
        users=in_ibis({"user_id": range(1, NUM_USERS + 1)}),
        ties=ties,
    )


def build(log: Log, folder: Path) -> list[tuple[int, int, tuple[int, ...]]]:
    """Builds and returns (user, item, history oldest first), sorted."""
    build_samples(log, folder, seed=0)
    samples = read_samples(folder)
    pairs = zip(samples.query_rows.tolist(), samples.candidate_rows.tolist(), strict=True)
    return sorted((q, c, tuple(samples.history(i).tolist())) for i, (q, c) in enumerate(pairs))


def slow_histories(events: list[Event], has_request: bool, ties: TieRule) -> list[Any]:
    """Loops over positives and lists the clicks before the request began, or before the event."""
    # When each event happened, and where it stands among those of its second.
    moments = [(event[2], 0 if ties == "drop" else place) for place, event in enumerate(events)]
    starts: dict[tuple[int, int | None], tuple[int, int]] = {}
    for (user, _, _, _, request), moment in zip(events, moments, strict=True):
        starts[user, request] = min(moment, starts.get((user, request), moment))
    samples = []
    clicks = [pair for pair in zip(events, moments, strict=True) if pair[0][3] == "clicked"]
    for (user, item, _, _, request), moment in clicks:
        began = moment if request is None or not has_request else starts[user, request]
        earlier = [pair for pair in clicks if pair[0][0] == user and pair[1] < began]
        earlier.sort(key=lambda pair: pair[1])  # Stable: ties in the order of the log.
        samples.append((user, item, tuple(click[1] for click, _ in earlier)))
    return sorted(samples)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, has_request=st.booleans(), ties=st.sampled_from(TIE_RULES))
@example(
    # A request's query comes before all of its events, and after whatever precedes them.
    events=[
        (1, 2, 3, "clicked", None),
        (1, 3, 3, "exposed", 1),
        (1, 4, 3, "clicked", None),
        (1, 5, 3, "clicked", 1),
        (1, 2, 4, "exposed", None),
    ],
    has_request=True,
    ties="order",
)
@example(
    # Clicks of the same request, or of the same second, are not in the history.
    events=[(1, 2, 3, "clicked", 1), (1, 3, 4, "clicked", 1), (1, 4, 4, "clicked", None)],
    has_request=True,
    ties="drop",
)
def test_samples_match_a_loop(
    tmp_path: Path, events: list[Event], has_request: bool, ties: TieRule
) -> None:
    # Each example has a folder of its own, because all examples share the fixture's.
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    log = make_log(events, without=() if has_request else ("request_id",), ties=ties)
    assert build(log, folder) == slow_histories(events, has_request, ties)

    clicked, exposed, counts = defaultdict(list), defaultdict(set), np.zeros(8, np.int64)
    seconds = defaultdict(list)
    for user, item, second, stage, _ in sorted(events, key=lambda event: event[2]):
        if stage == "clicked":
            clicked[user].append(item)
            seconds[user].append(second)
            counts[item] += 1
        if stage == "exposed":
            exposed[user].add(item)
    samples = read_samples(folder)
    np.testing.assert_array_equal(samples.counts, counts)
    for user in range(1, NUM_USERS + 1):
        assert samples.known_positives[user].tolist() == sorted(set(clicked[user]))
        assert samples.exposed[user].tolist() == sorted(exposed[user] - set(clicked[user]))
    # A query's time is the time of the first click that is not in its history.
    start = int(START.timestamp())
    query_times = samples.latest_times(np.arange(len(samples)), 4)
    assert samples.num_earlier is not None
    for i, latest in enumerate(query_times - start):
        times = seconds[samples.query_rows[i]][: samples.num_earlier[i] + 1][::-1][:5]
        np.testing.assert_array_equal(latest, [*times, *[np.nan] * (5 - len(times))])
    # Histories at the end of the log, for a model that knows users 2 to 5 and items 1 to 5.
    histories, known, item_times = latest_histories(log, Ids(range(2, 6)), Ids(range(1, 6)))
    for row, user in enumerate((0, 2, 3, 4, 5)):
        items = [item if item <= 5 else 0 for item in clicked[user]]
        assert histories[row].tolist() == items[::-1]
        assert known[row].tolist() == sorted(set(items) - {0})
        of_user = slice(*histories.offsets[row : row + 2])
        assert item_times is not None
        assert (item_times[of_user] - start).tolist() == seconds[user][::-1]


def test_order_of_the_log_and_no_order(tmp_path: Path) -> None:
    events: list[Event] = [(1, item, 0, "clicked", None) for item in (3, 1, 2, 1)]
    events.append((2, 7, 0, "clicked", None))
    in_order = [(1, 1, (3,)), (1, 1, (3, 1, 2)), (1, 2, (3, 1)), (1, 3, ()), (2, 7, ())]
    of_sets = [(1, 1, (3, 2)), (1, 1, (3, 2)), (1, 2, (3, 1, 1)), (1, 3, (1, 2, 1)), (2, 7, ())]
    for is_ordered, expected in ((True, in_order), (False, of_sets)):
        log = replace(make_log(events, without=["timestamp", "request_id"]), is_ordered=is_ordered)
        assert build(log, tmp_path / str(is_ordered)) == expected
    assert build_samples(log, tmp_path / "False", seed=0)["num_empty_histories"] == 1


def test_samples_stand_by_query_and_time_and_are_rebuilt(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    seconds, users = rng.permutation(60).tolist(), rng.integers(1, 4, 60).tolist()
    pairs = list(zip(users, seconds, strict=True))
    events: list[Event] = [(user, 1 + x % 7, x, "clicked", None) for user, x in pairs]
    log = make_log(events, weight=pa.array(np.array(seconds) / 8))
    tables = log.events.get_backend().list_tables()
    for _ in range(2):
        build_samples(log, tmp_path, seed=0)
        samples = read_samples(tmp_path)
        # Each sample keeps its own item and its own weight, which is its time here.
        times = (samples.weights * 8).astype(int)
        assert list(zip(samples.query_rows.tolist(), times.tolist(), strict=True)) == sorted(pairs)
        np.testing.assert_array_equal(samples.candidate_rows, 1 + times % 7)
        assert log.events.get_backend().list_tables() == tables


def test_ids_stand_at_their_rows_and_the_report_counts(tmp_path: Path) -> None:
    log = make_log([(2, 5, 0, "clicked", None), (2, 6, 0, "exposed", None)])
    report = build_samples(log, tmp_path, seed=0)
    found = [ids.values.tolist() for ids in read_ids(tmp_path)]
    assert found == [list(range(1, 8)), list(range(1, NUM_USERS + 1))]
    ones = ("num_samples", "num_empty_histories", "num_known_positives", "num_exposed")
    of_items = {"num_candidates": 7, "num_candidates_without_count": 6}
    assert report == {**dict.fromkeys(ones, 1), **of_items, "num_queries": NUM_USERS}


def test_refuses_a_log_without_a_positive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no positive"):
        build(make_log([(1, 2, 1, "exposed", None)]), tmp_path)
    assert not (tmp_path / "report.json").exists()
    with pytest.raises(FileNotFoundError, match="build_samples"):
        read_samples(tmp_path / "elsewhere")


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), max_size=30))
def test_samples_from_pairs_match_a_loop(pairs: list[tuple[int, int]]) -> None:
    queries, candidates = [q for q, _ in pairs], [c for _, c in pairs]
    samples = Samples.from_pairs(queries, candidates, num_queries=5, num_candidates=7)
    for i, (query, candidate) in enumerate(pairs):
        assert (samples.query_rows[i], samples.candidate_rows[i]) == (query, candidate)
        history = [c for q, c in pairs[:i] if q == query]
        assert samples.history(i).tolist() == history
    for query in range(6):
        known = {c for q, c in pairs if q == query}
        assert samples.known_positives[query].tolist() == sorted(known)
        assert samples.exposed[query].tolist() == []
    assert samples.counts.tolist() == [candidates.count(row) for row in range(8)]


def test_pairs_out_of_range_are_refused() -> None:
    for pairs, found in (
        (([0, 1], [1, 2]), r"to 2\. Received: \[0 1\]"),
        (([1, 2], [1, 4]), r"to 3\. Received: \[1 4\]"),
        (([1, 2], [1]), r"one length .*\[1 2\]"),
        (([1, 2], [1.0, 2.7]), r"integers .*\[1\. +2\.7\]"),
    ):
        with pytest.raises(ValueError, match=found):
            Samples.from_pairs(*pairs, num_queries=2, num_candidates=3)
