"""Compares evaluation, from the rows of a log to its numbers, with plain Python loops over users.

The loops use neither NumPy nor the package: they read the rows, ask as the protocol says, rank all
items and count. From the log they take only its rule for equal times.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tfrs_pipeline import Holdout, Log, Query, Reading, evaluate
from tfrs_pipeline.data.engines import connect
from tfrs_pipeline.data.schema import AskedBy, Exclude, Ties
from tfrs_pipeline.evaluation.results import EvaluationResult

CONNECTION = connect()
BEFORE = {"validation": ["train"], "test": ["train", "validation"]}
PARTS = ("all", "head", "torso", "tail")
QUERY_METRICS = ["recall", "hit_rate", "ndcg", "mrr"]
SET_METRICS = ["coverage", "average_popularity"]
Score = Callable[[list[int], int], int]


class Row(NamedTuple):
    user: int
    item: int
    day: int
    stage: str
    request: int | None
    part: str
    line: int

    @property
    def is_click(self) -> bool:
        return self.stage == "clicked"


class Asked(NamedTuple):
    user: int
    history: list[int]
    wanted: set[int]
    clicked: set[int]
    seen: set[int]
    disliked: set[int]
    first: int  # The line of the first event to find.


def disliked_in(rows: list[Row]) -> set[tuple[int, int]]:
    return {(row.user, row.item) for row in rows if row.stage == "disliked"}


def in_time(row: Row) -> tuple[int, int]:
    return row.day, row.line


def queries_of(rows: list[Row], part: str, by: AskedBy, rule: str) -> Iterator[Asked]:
    """Yields one query per user, or one for each, the first or the last request of a user."""
    for user in sorted({row.user for row in rows}):
        own = sorted((row for row in rows if row.user == user), key=in_time)
        own = [row for row in own if row.part in [*BEFORE[part], part]]
        gone = disliked_in(own)
        targets = [
            row
            for row in own
            if row.part == part and row.is_click and (row.user, row.item) not in gone
        ]
        if not targets:
            continue
        if by == "users":
            before = [row for row in own if row.part != part]
            first = targets[0].request
            known = [row for row in before if first is None or row.request != first]
            yield asked(user, known, before, targets)
            continue
        groups: list[list[Row]] = []
        for target in targets:
            same = [x for x in groups if x[0].request == target.request is not None]
            if same:
                same[0].append(target)
            else:
                groups.append([target])
        for group in groups:
            page = [x for x in rows if x.user == user and x.request == group[0].request is not None]
            start = min([*group, *page], key=in_time)
            same_day = [row for row in own if row.day == start.day and row.line < start.line]
            before = [row for row in own if row.day < start.day]
            before += same_day if rule != "drop" else []
            yield asked(user, before, before, group)


def asked(user: int, known: list[Row], before: list[Row], to_find: list[Row]) -> Asked:
    clicked = [row for row in before if row.is_click]
    disliked = [row for row in before if row.stage == "disliked"]
    sets: Any = ({row.item for row in rows} for rows in (to_find, clicked, before, disliked))
    gone = {row.item for row in disliked}
    history = [row.item for row in known if row.is_click and row.item not in gone]
    return Asked._make([user, history, *sets, to_find[0].line])


def best(score: Score, history: list[int], items: Collection[int], k: int) -> list[int]:
    return sorted(items, key=lambda item: (-score(history, item), item))[:k]


def slices_of(counts: dict[int, int]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {"head": set(), "torso": set(), "tail": set()}
    held, total = 0, sum(counts.values())
    for item in sorted(counts, key=lambda item: (-counts[item], item)):
        if 2 * held < total or (held == 0 and total == 0):
            found["head" if total else "tail"].add(item)
        else:
            found["torso" if 10 * held < 8 * total else "tail"].add(item)
        held += counts[item]
    return found


def of_query(ranking: list[int], wanted: set[int], k: int) -> dict[str, float]:
    if not wanted:
        return dict.fromkeys(QUERY_METRICS, math.nan)
    places = [place for place, item in enumerate(ranking[:k], 1) if item in wanted]
    ideal = sum(1 / math.log2(1 + place) for place in range(1, min(k, len(wanted)) + 1))
    return {
        "recall": len(places) / len(wanted),
        "hit_rate": 1.0 if places else 0.0,
        "ndcg": sum(1 / math.log2(1 + place) for place in places) / ideal,
        "mrr": 1 / places[0] if places else 0.0,
    }


def of_all(
    rankings: list[list[int]], part: set[int], counts: dict[int, int], k: int
) -> dict[str, float]:
    if not part:
        return dict.fromkeys(SET_METRICS, math.nan)
    shown = [item for ranking in rankings for item in ranking[:k] if item in part]
    times = [shown.count(item) for item in part]
    return {
        "coverage": sum(x > 0 for x in times) / len(times),
        "average_popularity": sum(counts[x] for x in shown) / len(shown) if shown else math.nan,
    }


def measure_slowly(
    asked: list[Asked], exclude: Exclude, counts: dict[int, int], score: Score, ks: Sequence[int]
) -> dict[str, Any]:
    """Returns the per-query values by part and metric, the set metrics, and the counts."""
    slices = slices_of(counts)
    values: dict[str, dict[str, list[float]]] = {part: {} for part in PARTS}
    names = ("skipped", "excluded", "unknown", "unclicked", "empty")
    rankings, num = [], dict.fromkeys(names, 0)
    to_find: list[int] = []
    for query in asked:
        gone = {"clicked": query.clicked, "seen": query.seen, "none": set[int]()}[exclude]
        gone = gone | query.disliked
        wanted = query.wanted - gone
        num["excluded"] += len(query.wanted & gone)
        if not wanted:
            num["skipped"] += 1
            continue
        num["unknown"] += sum(item not in counts for item in wanted)
        num["unclicked"] += sum(counts.get(item, 0) == 0 for item in wanted)
        num["empty"] += not query.history
        to_find += [counts.get(item, 0) for item in wanted]
        rankings.append(best(score, query.history, counts.keys() - gone, max(ks)))
        of_part = {"all": wanted} | {name: wanted & items for name, items in slices.items()}
        for part, in_part in of_part.items():
            for k in ks:
                for name, value in of_query(rankings[-1], in_part, k).items():
                    values[part].setdefault(f"{name}@{k}", []).append(value)
    together: dict[str, dict[str, float]] = {}
    for part, items in {"all": {*counts}, **slices}.items():
        by_k = {k: of_all(rankings, items, counts, k) for k in ks}
        together[part] = {f"{name}@{k}": x for k, of_k in by_k.items() for name, x in of_k.items()}
    popularity = sum(to_find) / len(to_find) if to_find else math.nan
    return {"values": values, "together": together, "num": num, "popularity": popularity}


class Plain:
    """A retriever that ranks by a score of the history, one query at a time."""

    def __init__(self, score: Score, items: list[int]) -> None:
        self.score, self.items = score, items

    def retrieve(self, queries: Sequence[Query], k: int, exclude: Any = None) -> Any:
        ids, scores = np.full((len(queries), k), -1), np.full((len(queries), k), -np.inf)
        for i, query in enumerate(queries):
            history = [int(item) for item in query["history"]]
            left = {*self.items} - (set() if exclude is None else {*map(int, exclude[i])})
            for place, item in enumerate(best(self.score, history, left, k)):
                ids[i, place], scores[i, place] = item, self.score(history, item)
        return ids, scores


def by_last(history: list[int], item: int) -> int:
    return (3 * item + 5 * sum(history[-2:]) + len(history)) % 7


def by_number(history: list[int], item: int) -> int:
    return (4 * item) % 9 // 2


def equal(found: EvaluationResult, slow: dict[str, Any]) -> None:
    names = ("skipped", "relevant_excluded", "relevant_unknown", "relevant_unclicked")
    num = [getattr(found, f"num_{name}") for name in (*names, "empty_histories")]
    assert num == list(slow["num"].values())
    assert found.relevant_popularity == pytest.approx(slow["popularity"], abs=1e-9)
    parts = {"all": found.overall, **found.slices}
    assert set(parts) == set(PARTS)
    for name, part in parts.items():
        for metric, values in slow["values"][name].items():
            known = [x for x in values if not math.isnan(x)]
            mean = math.fsum(known) / len(known) if known else math.nan
            assert part.intervals[metric].mean == pytest.approx(mean, abs=1e-9, nan_ok=True)
            own = sorted(x for x in part.per_query[metric].tolist() if not math.isnan(x))
            assert own == pytest.approx(sorted(known), abs=1e-9)
        together = slow["together"][name]
        assert dict(part.set_metrics) == pytest.approx(together, abs=1e-9, nan_ok=True)


def read(rows: list[Any], ties: Ties, has_time: bool, has_request: bool) -> tuple[Log, list[Row]]:
    users, items, days, stages, requests, parts = zip(*rows, strict=True)
    columns: dict[str, Any] = {"user_id": users, "item_id": items, "part": parts}
    columns["stage"] = stages
    columns["line"] = range(len(rows))
    if has_time:
        moments = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=day) for day in days]
        columns["timestamp"] = pa.array(moments, pa.timestamp("us", "UTC"))
    else:  # Without times, the lines give the order.
        days = tuple(range(len(rows)))
    if has_request:
        columns["request_id"] = pa.array(requests, pa.int64())
    else:
        requests = (None,) * len(rows)
    table = pa.table(columns)
    features = {"line": "numeric"}
    reading = Reading(ties=ties)
    log = Log.from_table(table, reading=reading, request_features=features, connection=CONNECTION)
    read = zip(users, items, days, stages, requests, parts, strict=True)
    return log, [Row._make([*row, line]) for line, row in enumerate(read)]


def check_holdout(holdout: Holdout, queries: list[Asked], has_time: bool) -> None:
    """Compares queries; each has the request features, if any, of its first event to find."""
    nothing = [np.zeros(0, int)] * len(holdout)
    disliked = holdout.disliked or nothing
    lists = holdout.relevant, holdout.histories, holdout.clicked, holdout.seen, disliked
    assert holdout.user_ids.tolist() == sorted(query.user for query in queries)
    zipped = zip(holdout.user_ids.tolist(), *lists, strict=True)
    found = [(user, *(ids.tolist() for ids in of_query)) for user, *of_query in zipped]
    asked = sorted(
        (
            x.user,
            sorted(x.wanted),
            x.history,
            *map(sorted, (x.clicked, x.seen, x.disliked)),
            x.first,
        )
        for x in queries
    )
    if holdout.requests is not None:
        lines = [request["line"] for request in holdout.requests]
        found = [(*query, line) for query, line in zip(found, lines, strict=True)]
    assert sorted(found) == [query[: len(found[0])] for query in asked]
    assert (holdout.times is None) == (not has_time)
    if has_time:
        for history, times in zip(holdout.histories, holdout.history_times or (), strict=True):
            assert len(times) == len(history)
            assert np.all(np.diff(times) >= 0)


ALL_PARTS = ("train", "validation", "test")
NUMBERS: Any = map(st.integers, (1, 1, 0), (3, 9, 3))
STAGES = st.sampled_from(["clicked", "clicked", "exposed", "disliked"])
REQUESTS: Any = st.sampled_from([None, None, 0, 1])
ROWS = st.lists(
    st.tuples(*NUMBERS, STAGES, REQUESTS, st.sampled_from(ALL_PARTS)), min_size=10, max_size=40
).map(lambda rows: [*rows, *((9, 1, 0, "clicked", None, part) for part in ALL_PARTS)])


@pytest.mark.parametrize("by", ["users", "requests"])
@settings(max_examples=10, deadline=None)
@given(
    rows=ROWS,
    ties=st.sampled_from(["auto", "order", "drop"]),
    has_time=st.sampled_from([True, True, False]),
    has_request=st.sampled_from([True, True, False]),
    part=st.sampled_from(["validation", "test"]),
    exclude=st.sampled_from(["clicked", "seen", "none"]),
    missing=st.sets(st.integers(2, 9), max_size=3),
    longest=st.integers(3, 11),
)
@example(  # One item to find, clicked twice at one time.
    rows=[(9, 1, day, "clicked", None, ALL_PARTS[day]) for day in (0, 1, 2, 2)],
    ties="order",
    has_time=True,
    has_request=False,
    part="test",
    exclude="none",
    missing=set(),
    longest=3,
)
def test_every_protocol_tie_rule_and_metric_is_what_loops_say(
    by: AskedBy,
    rows: list[Any],
    ties: Ties,
    has_time: bool,
    has_request: bool,
    part: Any,
    exclude: Exclude,
    missing: set[int],
    longest: int,
) -> None:
    log, read_rows = read(rows, ties, has_time, has_request)
    holdout = log.split("column").holdout(part, by=by)
    queries = [*queries_of(read_rows, part, by, log.ties)]
    check_holdout(holdout, queries, has_time)
    counts = {row.item: 0 for row in read_rows if row.item not in missing}
    trained_on = [row for row in read_rows if row.part in BEFORE[part]]
    gone = disliked_in(trained_on)
    for row in trained_on:
        if row.is_click and row.item in counts and (row.user, row.item) not in gone:
            counts[row.item] += 1
    items = sorted(counts)
    pairs = zip(holdout.candidate_ids.tolist(), holdout.candidate_counts.tolist(), strict=True)
    known = dict(pairs)
    assert counts == {item: known[item] for item in items}
    numbers = np.array([counts[item] for item in items])
    others: dict[str, Any] = {"candidate_counts": numbers, "exposure": None}
    holdout = dataclasses.replace(holdout, candidate_ids=np.array(items), **others)
    scores, ks = {"by_last": by_last, "by_number": by_number}, (2, longest)
    slow = {x: measure_slowly(queries, exclude, counts, score, ks) for x, score in scores.items()}
    models: dict[str, Any] = {name: Plain(score, items) for name, score in scores.items()}
    measured: dict[str, Any] = {"exclude": exclude, "cutoffs": (2, longest), "num_bootstrap": 0}
    if slow["by_last"]["num"]["skipped"] == len(queries):
        with pytest.raises(ValueError, match="Nothing to measure"):
            evaluate(models, holdout, **measured)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{evaluate.__module__}.QUERIES_PER_CALL", 2)
        found = evaluate(models, holdout, **measured)
    for name, result in found.results.items():
        equal(result, slow[name])
    for name, interval in found.differences["by_number"].items():
        part, _, metric = ("all/" * ("/" not in name) + name).partition("/")
        pair = (slow[model]["values"][part][metric] for model in scores)
        gaps = [b - a for a, b in zip(*pair, strict=True) if not math.isnan(a)]
        expected = math.fsum(gaps) / len(gaps) if gaps else math.nan
        assert interval.mean == pytest.approx(expected, abs=1e-9, nan_ok=True)
