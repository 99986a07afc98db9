"""Splits: parts against a slow loop, and nothing after a user's cut before it."""

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.data.split import (
    EvaluationPart,
    evaluation_queries,
    split_by_column,
    split_by_time,
    split_held_out_users,
    split_last_n,
    split_last_share,
    split_report,
    time_cuts,
)

START = datetime(2024, 1, 1, tzinfo=UTC)
CONNECTION = ibis.duckdb.connect()

Event = tuple[int, int, int, str]  # user, item, second, stage


def make_events(rows: list[Event], *, with_time: bool = True) -> ibis.Table:
    users, items, seconds, stages = zip(*rows, strict=True)
    columns: dict[str, Any] = {
        "user_id": pa.array(users, pa.int64()),
        "item_id": pa.array(items, pa.int64()),
        "timestamp": pa.array(
            [START + timedelta(seconds=second) for second in seconds], pa.timestamp("us", "UTC")
        ),
        "event_number": pa.array(range(len(rows)), pa.int64()),
        "stage": pa.array(stages, pa.string()),
    }
    if not with_time:
        del columns["timestamp"]
    # Stored backwards: no result may hang on how the rows lie in the table.
    backwards = pa.table(columns).take(list(reversed(range(len(rows)))))
    return CONNECTION.create_table(ibis.util.gen_name("split"), backwards)


def parts(split: ibis.Table) -> dict[int, str]:
    """Returns event number -> part."""
    table = split.select("event_number", "part").to_pyarrow()
    return dict(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))


def one_user(stages: str) -> ibis.Table:
    """Makes a log of one user, one event a second: c is clicked, e exposed, r ranked."""
    names = {"c": "clicked", "e": "exposed", "r": "ranked"}
    return make_events([(1, i, i, names[stage]) for i, stage in enumerate(stages)])


def part_letters(split: ibis.Table) -> str:
    return "".join(
        part[:2] if part == "train" else part[0] for _, part in sorted(parts(split).items())
    )


# Random logs of few items and seconds: ties everywhere. Each user is a case.
LOGS = st.lists(
    st.tuples(
        st.integers(1, 5),
        st.integers(0, 9),
        st.integers(0, 6),
        st.sampled_from(["clicked", "clicked", "exposed", "ranked", "retrieved"]),
    ),
    min_size=1,
    max_size=60,
)


def by_user(rows: list[Event]) -> dict[int, list[int]]:
    """Returns user -> event numbers in the user's order, by a plain sort."""
    order = sorted(range(len(rows)), key=lambda number: (rows[number][2], number))
    return {user: [n for n in order if rows[n][0] == user] for user in {row[0] for row in rows}}


def slow_parts(
    rows: list[Event], count: Callable[[int], tuple[int, int]], min_positives: int
) -> dict[int, str]:
    """Walks over each user's events; `count` gives the positives up to each cut."""
    expected = {}
    for numbers in by_user(rows).values():
        num_positives = sum(rows[n][3] == "clicked" for n in numbers)
        if num_positives < max(min_positives, 1):
            continue
        num_train, num_before_test = count(num_positives)
        passed, part = 0, "train"
        for number in numbers:
            if rows[number][3] == "clicked":
                passed += 1
                if passed > num_before_test:
                    part = "test"
                elif passed > num_train:
                    part = "validation"
            expected[number] = part
    return expected


@settings(max_examples=25, deadline=None)
@given(LOGS, st.integers(0, 2), st.integers(0, 2), st.integers(0, 5))
def test_last_n_is_what_a_slow_loop_gives(
    rows: list[Event], num_validation: int, num_test: int, min_positives: int
) -> None:
    split = split_last_n(
        make_events(rows),
        num_validation=num_validation,
        num_test=num_test,
        min_positives=min_positives,
    )
    expected = slow_parts(
        rows, lambda n: (n - num_test - num_validation, n - num_test), min_positives
    )
    assert parts(split) == expected


@settings(max_examples=25, deadline=None)
@given(LOGS, st.integers(0, 9), st.integers(0, 9), st.integers(0, 5))
def test_last_share_is_what_a_slow_loop_gives(
    rows: list[Event], validation_tenths: int, test_tenths: int, min_positives: int
) -> None:
    def count(num_positives: int) -> tuple[int, int]:
        num_before_test = num_positives - math.ceil(Fraction(test_tenths, 10) * num_positives)
        num_validation = math.ceil(Fraction(validation_tenths, 10) * num_before_test)
        return num_before_test - num_validation, num_before_test

    split = split_last_share(
        make_events(rows),
        validation_share=validation_tenths / 10,
        test_share=test_tenths / 10,
        min_positives=min_positives,
    )
    assert parts(split) == slow_parts(rows, count, min_positives)


def all_splits(events: ibis.Table) -> dict[str, ibis.Table]:
    return {
        "last_n": split_last_n(events),
        "last_share": split_last_share(events, min_positives=3),
        "held_out": split_held_out_users(
            events, validation_share=0.3, test_share=0.4, min_positives=2
        ),
        "time": split_by_time(
            events,
            validation_start=START + timedelta(seconds=3),
            test_start=START + timedelta(seconds=5),
        ),
    }


# A dozen queries an example: shrinking a failure would take minutes.
@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(LOGS)
def test_nothing_after_a_users_cut_reaches_train_or_a_history(rows: list[Event]) -> None:
    events = make_events(rows)
    later = {"train": 0, "fold_in": 0, "validation": 1, "test": 2}
    for name, split in all_splits(events).items():
        assigned = parts(split)
        for numbers in by_user(rows).values():
            places = [later[assigned[n]] for n in numbers if n in assigned]
            assert places == sorted(places), name
        for part in ("validation", "test"):
            check_queries_by_a_loop(rows, split, assigned, part)


def check_queries_by_a_loop(
    rows: list[Event], split: ibis.Table, assigned: dict[int, str], part: EvaluationPart
) -> None:
    expected = {}
    for user, numbers in by_user(rows).items():
        targets = [n for n in numbers if assigned.get(n) == part and rows[n][3] == "clicked"]
        if not targets:
            continue
        known = {"train", "fold_in"} | ({"validation"} if part == "test" else set())
        before = [n for n in numbers if assigned.get(n) in known]
        assert all(numbers.index(n) < numbers.index(targets[0]) for n in before)
        expected[user] = (
            [rows[n][1] for n in before if rows[n][3] == "clicked"],
            sorted({rows[n][1] for n in targets}),
            sorted({rows[n][1] for n in before if rows[n][3] in ("clicked", "exposed")}),
        )
    if not expected:
        with pytest.raises(DataError, match="has no positive"):
            evaluation_queries(split, part)
        return
    queries = evaluation_queries(split, part)
    assert queries.user_ids.tolist() == sorted(expected)
    for i, user in enumerate(sorted(expected)):
        history, relevant, seen = expected[user]
        assert queries.histories[i].tolist() == history
        assert queries.relevant[i].tolist() == relevant
        assert queries.clicked[i].tolist() == sorted(set(history))
        assert queries.seen[i].tolist() == seen


def test_other_events_take_the_part_of_their_place() -> None:
    split = split_last_n(one_user("ececeece"), num_validation=1, num_test=1)
    assert part_letters(split) == "trtrtrvvvtt"


def test_the_share_is_counted_from_the_end_and_rounded_up() -> None:
    # ceil(.2 * 6) = 2 are the test, ceil(.2 * 4) = 1 of the four left is the validation part.
    assert part_letters(split_last_share(one_user("cccccc"))) == "tr" * 3 + "v" + "tt"


def test_float_noise_does_not_round_up() -> None:
    assert (0.1 + 0.2) * 10 > 3
    split = split_last_share(one_user("c" * 10), validation_share=0, test_share=0.1 + 0.2)
    assert split_report(split)["test"]["num_positives"] == 3
    assert 0.07 * 100 > 7
    _, test_start = time_cuts(one_user("c" * 100), validation_share=0, test_share=0.07)
    assert test_start == START + timedelta(seconds=93)


def test_a_query_knows_what_lies_before_its_part_and_nothing_else() -> None:
    split = split_last_n(one_user("cecrcec"), num_validation=1, num_test=1)
    validation, test = (evaluation_queries(split, part) for part in ("validation", "test"))
    assert (validation.histories[0].tolist(), test.histories[0].tolist()) == ([0, 2], [0, 2, 4])
    assert (validation.seen[0].tolist(), test.seen[0].tolist()) == ([0, 1, 2], [0, 1, 2, 4, 5])
    assert (validation.relevant[0].tolist(), test.relevant[0].tolist()) == ([4], [6])


def test_ties_in_time_are_broken_by_the_order_in_the_source() -> None:
    events = make_events([(1, item, 0, "clicked") for item in (5, 3, 4)])
    queries = evaluation_queries(split_last_n(events), "test")
    assert queries.histories[0].tolist() == [5, 3]
    assert queries.relevant[0].tolist() == [4]


def test_without_time_the_order_in_the_source_counts() -> None:
    events = make_events([(1, 5, 9, "clicked"), (1, 3, 1, "clicked")], with_time=False)
    queries = evaluation_queries(split_last_n(events, num_validation=0), "test")
    assert (queries.histories[0].tolist(), queries.relevant[0].tolist()) == ([5], [3])


def test_users_with_few_positives_are_dropped_and_counted() -> None:
    events = make_events(
        [(1, i, i, "clicked") for i in range(5)]
        + [(2, i, i, "clicked") for i in range(4)]
        + [(3, 1, 1, "exposed")]
    )
    split = split_last_share(events)
    assert split_report(split, events) == {
        "train": {"num_events": 3, "num_positives": 3, "num_users": 1},
        "validation": {"num_events": 1, "num_positives": 1, "num_users": 1},
        "test": {"num_events": 1, "num_positives": 1, "num_users": 1},
        "num_users_dropped": 2,
        "num_events_dropped": 5,
    }


def test_by_time_all_users_share_the_cuts() -> None:
    events = make_events(
        [(user, user, second, "clicked") for user in (1, 2) for second in (1, 2, 3)]
    )
    split = split_by_time(
        events,
        validation_start=START + timedelta(seconds=2),
        test_start=START + timedelta(seconds=3),
    )
    assert part_letters(split) == "trvttrvt"
    moved = START.astimezone(tz=None)  # the same moments, said in another zone
    same = split_by_time(
        events,
        validation_start=moved + timedelta(seconds=2),
        test_start=moved + timedelta(seconds=3),
    )
    assert parts(same) == parts(split)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=10, max_size=40))
def test_time_cuts_leave_the_shares_after_them(seconds: list[int]) -> None:
    events = make_events([(1, 1, second, "clicked") for second in seconds])
    validation_start, test_start = time_cuts(events, validation_share=0.1, test_share=0.2)
    times = sorted(START + timedelta(seconds=second) for second in seconds)
    num_test = math.ceil(Fraction(2, 10) * len(times))
    assert test_start == times[-num_test]
    assert validation_start == times[-num_test - math.ceil(Fraction(1, 10) * len(times))]


def test_held_out_users_are_never_trained_on() -> None:
    rows: list[Event] = [(user, i, i, "clicked") for user in range(20) for i in range(10)]
    split = split_held_out_users(
        make_events(rows), validation_share=0.1, test_share=0.2, target_share=0.3, seed=4
    )
    users_of = {
        part: set(split.filter(split["part"] == part)["user_id"].to_pyarrow().to_pylist())
        for part in ("train", "validation", "test", "fold_in")
    }
    assert {part: len(users) for part, users in users_of.items()} == {
        "train": 14,
        "validation": 2,
        "test": 4,
        "fold_in": 6,
    }
    assert users_of["fold_in"] == users_of["validation"] | users_of["test"]
    assert not users_of["train"] & users_of["fold_in"]
    queries = evaluation_queries(split, "test")
    assert all(history.tolist() == list(range(7)) for history in queries.histories)
    assert all(relevant.tolist() == [7, 8, 9] for relevant in queries.relevant)


def test_the_draw_of_held_out_users_follows_the_seed() -> None:
    events = make_events([(user, i, i, "clicked") for user in range(30) for i in range(5)])
    first, again, other = (parts(split_held_out_users(events, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_string_ids_stay_strings() -> None:
    events = make_events([(user, i, i, "clicked") for user in (2, 10) for i in range(4)])
    events = events.mutate(
        user_id="u" + events["user_id"].cast("string"), item_id=events["item_id"].cast("string")
    )
    queries = evaluation_queries(split_last_n(events), "test")
    assert queries.user_ids.tolist() == ["u10", "u2"]
    assert queries.as_queries()[0]["user_id"] == "u10"
    assert list(queries.as_queries()[0]["history"]) == ["0", "1", "2"]
    assert queries.relevant[1].tolist() == ["3"]


def test_columns_of_the_events_are_kept_and_only_part_is_added() -> None:
    events = make_events([(1, i, i, "clicked") for i in range(6)]).mutate(page=ibis.literal("home"))
    for name, split in all_splits(events).items():
        assert split.columns == (*events.columns, "part"), name


def with_parts(rows: list[Event], names: list[str | None], **options: Any) -> ibis.Table:
    """Makes a log whose own column says which part each row is of."""
    events = make_events(rows, **options)
    own = pa.table({"event_number": range(len(rows)), "part": pa.array(names, pa.string())})
    return events.inner_join(
        CONNECTION.create_table(ibis.util.gen_name("part"), own), "event_number"
    )


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.integers(0, 2**32 - 1))
def test_the_log_itself_says_which_part(seed: int) -> None:
    """Against a loop: parts as they are, and all that is not later known to a test query."""
    rng = np.random.default_rng(seed)
    rows: list[Event] = [(u, i, 0, s) for u, i in ((1, 1), (2, 2)) for s in ("clicked", "exposed")]
    names: list[str | None] = ["train", "validation", "test", "train"]
    rows[2] = (2, 2, 0, "clicked")
    for _ in range(40):
        stage = ("clicked", "exposed", "retrieved")[rng.integers(3)]
        rows.append((int(rng.integers(4)), int(rng.integers(9)), int(rng.integers(9)), stage))
        names.append((None, "train", "validation", "test")[rng.integers(4)])
    events = with_parts(rows, names)
    split = split_by_column(events)
    assert parts(split) == {i: name for i, name in enumerate(names) if name is not None}
    assert split.columns == events.columns
    report = split_report(split, events)
    assert report["num_events_dropped"] == names.count(None)
    assert report["test"]["num_events"] == names.count("test")
    queries = evaluation_queries(split, "test")
    in_order = sorted(range(len(rows)), key=lambda i: (rows[i][2], i))
    known = [i for i in in_order if names[i] in ("train", "validation")]
    for user, history, relevant, seen in zip(
        queries.user_ids, queries.histories, queries.relevant, queries.seen, strict=True
    ):
        own = [rows[i] for i in known if rows[i][0] == user]
        assert history.tolist() == [item for _, item, _, stage in own if stage == "clicked"]
        assert set(seen.tolist()) == {item for _, item, _, stage in own if stage != "retrieved"}
        found = {
            row[1]
            for row, name in zip(rows, names, strict=True)
            if (row[0], row[3], name) == (user, "clicked", "test")
        }
        assert set(relevant.tolist()) == found


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train", "validation", "dev", "test"], "1 of 4 rows hold 'dev'. It must hold train, v"),
        (["train", "validation", "fold_in", None], "1 of 4 rows hold 'fold_in'"),
        (["train", "train", "test", None], "no row is of the part validation; 1 rows are null"),
        (["train", "validation", "train", None], "no row is of the part test"),
        (["train", "validation", "validation", "test"], "none of the 1 rows of the part test is"),
        (["validation", "test", "test", "train"], "none of the 1 rows of the part train is"),
    ],
)
def test_a_column_that_is_no_split_is_refused(names: list[str | None], message: str) -> None:
    rows = [(1, i, i, "clicked") for i in range(3)]
    with pytest.raises(DataError, match=message):
        split_by_column(with_parts([*rows, (1, 3, 3, "exposed")], names))


def test_a_log_without_the_column_is_refused() -> None:
    with pytest.raises(DataError, match=r"no column 'part'.*columns=.*split_last_share"):
        split_by_column(one_user("ccc"))


def test_another_split_takes_the_place_of_the_column() -> None:
    rows: list[Event] = [(user, i, i, "clicked") for user in range(10) for i in range(6)]
    without = make_events(rows)
    events = with_parts(rows, ["test"] * len(rows))
    for (name, split), (_, wanted) in zip(
        all_splits(events).items(), all_splits(without).items(), strict=True
    ):
        assert sorted(split.columns) == sorted(events.columns), name
        assert parts(split) == parts(wanted), name


@pytest.mark.parametrize(
    "split",
    [
        lambda e: split_last_share(e, test_share=1.0),
        lambda e: split_last_n(e, num_test=-1),
        lambda e: split_held_out_users(e, test_share=0.6, validation_share=0.4),
        lambda e: split_held_out_users(e, target_share=0),
        lambda e: split_by_time(e, validation_start=datetime(2024, 1, 1), test_start=START),
        lambda e: split_by_time(e, validation_start=START + timedelta(seconds=1), test_start=START),
        lambda e: time_cuts(e, validation_share=0.1, test_share=0.0),
    ],
)
def test_settings_out_of_range_are_refused(split: Callable[[ibis.Table], Any]) -> None:
    with pytest.raises(ValueError, match=r"Received|time zone"):
        split(one_user("cccccc"))


def test_what_cannot_be_split_says_what_else_to_do() -> None:
    events = make_events([(1, 1, 1, "clicked")], with_time=False)
    with pytest.raises(DataError, match=r"no timestamp.*split_last_share"):
        time_cuts(events, validation_share=0.1, test_share=0.1)
    with pytest.raises(DataError, match="split it first"):
        evaluation_queries(events, "test")
    with pytest.raises(DataError, match="leave none to train on"):
        time_cuts(one_user("c"), validation_share=0.1, test_share=0.1)


def test_histories_are_arrays_even_when_empty() -> None:
    events = make_events([(1, 1, 1, "clicked"), (2, 1, 9, "clicked")])
    cut = START + timedelta(seconds=5)
    queries = evaluation_queries(
        split_by_time(events, validation_start=cut, test_start=cut), "test"
    )
    assert queries.user_ids.tolist() == [2]
    assert queries.histories[0].dtype == np.int64
    assert len(queries.histories[0]) == len(queries.seen[0]) == 0
