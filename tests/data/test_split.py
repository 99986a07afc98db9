"""Splits: parts equal those of a slow loop, and no later event gets before a user's cut."""

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tests.evaluation.test_slow_evaluator import Row, check_holdout, queries_of
from tests.small_log import column, in_ibis
from tfrs_pipeline import ConfigError, DataError, Log, Split
from tfrs_pipeline.data.held_out_queries import EvaluationPart

START = datetime(2024, 1, 1, tzinfo=UTC)
SHOWN = ("clicked", "exposed")
Event = tuple[int, int, int, str]  # user, item, second, stage


def make_log(
    rows: list[Event], *, with_time: bool = True, parts: list[str | None] | None = None
) -> Log:
    users, items, seconds, stages = zip(*rows, strict=True)
    columns: dict[str, Any] = {"user_id": users, "item_id": items, "stage": stages}
    columns["event_number"] = range(len(rows))
    if with_time:
        times = [START + timedelta(seconds=second) for second in seconds]
        columns["timestamp"] = pa.array(times, pa.timestamp("us", "UTC"))
    if parts is not None:
        columns["part"] = pa.array(parts, pa.string())
    # Stored backwards: no result may depend on the order of rows in the table.
    events = in_ibis(pa.table(columns).take(list(reversed(range(len(rows))))))
    return Log(events, events.select("item_id").distinct(), events.select("user_id").distinct())


def parts_of(split: Split) -> dict[int, str]:
    """Returns event number -> part."""
    return dict(
        zip(column(split.events, "event_number"), column(split.events, "part"), strict=True)
    )


def one_user(stages: str) -> Log:
    """Makes a log of one user, one event a second: c is clicked, e exposed, r ranked."""
    names = {"c": "clicked", "e": "exposed", "r": "ranked"}
    return make_log([(1, i, i, names[stage]) for i, stage in enumerate(stages)])


def letters(split: Split) -> str:
    short = {"train": "t", "validation": "v", "test": "x"}
    return "".join(short[part] for _, part in sorted(parts_of(split).items()))


def random_rows(seed: int, num_users: int = 40, num_rows: int = 400) -> list[Event]:
    """Makes events with few items and seconds, so ties are everywhere. Each user is a case."""
    rng = np.random.default_rng(seed)
    stages = rng.choice(
        ["clicked", "exposed", "ranked", "retrieved"], num_rows, p=[0.4, *[0.2] * 3]
    )
    # Some users have many events, and some have few.
    users = 1 + (num_users * rng.random(num_rows) ** 2).astype(int)
    columns = users, rng.integers(0, 10, num_rows), rng.integers(0, 7, num_rows), stages
    return list(zip(*(column.tolist() for column in columns), strict=True))


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


@pytest.mark.parametrize(
    ("validation", "test", "min_positives"), [(1, 2, 1), (3, 0, 2), (0, 9, 1), (7, 6, 5), (9, 3, 3)]
)
def test_splits_by_place_equal_a_slow_loop(validation: int, test: int, min_positives: int) -> None:
    rows = random_rows(10 * validation + test)
    log = make_log(rows)

    def by_share(num_positives: int) -> tuple[int, int]:
        num_before_test = num_positives - math.ceil(Fraction(test, 10) * num_positives)
        num_validation = math.ceil(Fraction(validation, 10) * num_before_test)
        return num_before_test - num_validation, num_before_test

    split = log.split(
        "last_share", validation=validation / 10, test=test / 10, min_positives=min_positives
    )
    assert parts_of(split) == slow_parts(rows, by_share, min_positives)
    m, n = validation // 3, test // 3
    split = log.split("last_n", validation=m, test=n, min_positives=min_positives)
    assert parts_of(split) == slow_parts(rows, lambda p: (p - n - m, p - n), min_positives)


def all_splits(log: Log) -> dict[str, Split]:
    validation, test = (START + timedelta(seconds=second) for second in (3, 5))
    return {
        "last_n": log.split("last_n", min_positives=3),
        "last_share": log.split("last_share", validation=0.2, test=0.2, min_positives=3),
        "time": log.split("time", validation=validation, test=test),
    }


@pytest.mark.parametrize(("num_users", "num_rows"), [(40, 400), (3, 5)])
def test_nothing_after_a_cut_reaches_train_or_a_history(num_users: int, num_rows: int) -> None:
    rows = random_rows(1, num_users, num_rows)
    later = {"train": 0, "validation": 1, "test": 2}
    for name, split in all_splits(make_log(rows)).items():
        assigned = parts_of(split)
        for numbers in by_user(rows).values():
            places = [later[assigned[n]] for n in numbers if n in assigned]
            assert places == sorted(places), name
        for part in ("validation", "test"):
            check_holdout_by_a_loop(rows, split, assigned, part)


def check_holdout_by_a_loop(
    rows: list[Event], split: Split, assigned: dict[int, str], part: EvaluationPart
) -> None:
    """Checks a holdout by the slow evaluator's loops."""
    shown = {n: of for n, of in assigned.items() if rows[n][3] in SHOWN}
    known = [Row(*rows[n][:4], None, x, n) for n, x in shown.items()]
    queries = [*queries_of(known, part, "users", "order")]
    if not queries:
        without = "In Python, split.train and split.test do" if part == "validation" else "$"
        with pytest.raises(DataError, match=rf"has no positive.* split.min_positives\. ?{without}"):
            getattr(split, part)
        return
    holdout = getattr(split, part)
    check_holdout(holdout, queries, has_time=True)
    trains = {"train", "validation"} if part == "test" else {"train"}
    assert holdout.candidate_ids.tolist() == sorted({row[1] for row in rows})
    train_alone = split.holdout(part, trained_on=split.train).candidate_counts
    for counts, parts in ((holdout.candidate_counts, trains), (train_alone, {"train"})):
        clicks = [rows[n] for n, of in assigned.items() if of in parts]
        trained = [item for _, item, _, stage in clicks if stage == "clicked"]
        assert counts.tolist() == [trained.count(i) for i in holdout.candidate_ids]


def test_the_parts_of_a_log_unpack_and_remember_the_whole() -> None:
    log = make_log([(user, i, i, "clicked") for user in (1, 2) for i in range(20)])
    train, validation, test = split = log.split()
    assert (split.train, split.validation, split.test) == (train, validation, test)
    assert split.kind == "time"  # The default for a log with timestamps.
    assert repr(split) == f"Split(by time, of {log!r})"
    for part, names in ((train, {"train"}), (split.before_test, {"train", "validation"})):
        expected = {n for n, of in parts_of(split).items() if of in names}
        assert set(part.events.to_pyarrow()["event_number"].to_pylist()) == expected
        assert (part.whole, part.items) == (log, log.items)
        # A part does not know what was dropped when the log was made.
        assert part.dropped == part.notes == ()
    assert train.split().train.whole is log.whole is log
    assert (len(validation), len(test)) == (2, 2)


@pytest.mark.parametrize("kind", ["time", "last_share", "last_n"])
def test_later_items_begin_after_the_last_event_of_a_part(kind: Any) -> None:
    options = {"validation": 2, "test": 2} if kind == "last_n" else {"validation": 0.2, "test": 0.3}
    rng = np.random.default_rng(0)
    # An item lives for a while; some users are dropped.
    drawn = enumerate(random_rows(0))
    rows = [(user, x // 20 + int(rng.integers(5)), x, stage) for x, (user, _, _, stage) in drawn]
    split = make_log(rows).split(kind, **options, min_positives=3)
    first: dict[int, int] = {}
    for number in sorted(parts_of(split)):
        first.setdefault(rows[number][1], rows[number][2])
    for log in (split.train, split.before_test):
        numbers = log.events.to_pyarrow()["event_number"].to_pylist()
        last = max(rows[number][2] for number in numbers)
        assert log.later_items is not None
        found = set(log.later_items["item_id"].to_pyarrow().to_pylist())
        assert found == {item for item, second in first.items() if second > last}
        assert found or kind != "time"
    assert split.log.later_items is None
    without_time = make_log(rows, with_time=False)
    assert without_time.split("last_share", min_positives=3).train.later_items is None


@pytest.mark.parametrize("tenth", [np.float32(0.1), np.float64(0.1), Decimal("0.1"), "0.1"])
def test_a_share_of_another_type_is_no_zero(tenth: Any) -> None:
    split = one_user("c" * 100).split("last_share", validation=tenth, test=tenth)
    report = split.report()
    found = [report[part]["num_events"] for part in ("train", "validation", "test")]
    assert found == [81, 9, 10]


def test_float_noise_does_not_round_up() -> None:
    assert (0.1 + 0.2) * 10 > 3
    split = one_user("c" * 10).split("last_share", validation=0, test=0.1 + 0.2)
    assert split.report()["test"]["num_positives"] == 3
    assert 0.07 * 100 > 7
    split = one_user("c" * 100).split("time", validation=0, test=0.07)
    assert split.report()["test"]["num_positives"] == 7


def test_without_time_the_order_in_the_source_counts() -> None:
    log = make_log([(1, 5, 9, "clicked"), (1, 3, 1, "clicked")], with_time=False)
    split = log.split(validation=0, test=0.5, min_positives=1)
    assert split.kind == "last_share"
    assert (split.test.histories[0].tolist(), split.test.relevant[0].tolist()) == ([5], [3])


@pytest.mark.parametrize("kind", ["last_share", "last_n"])
def test_without_any_order_the_last_are_drawn_at_random(kind: Any) -> None:
    """Rows lie in order of items, so the last are no sample: the draw must not depend on it."""
    rng = np.random.default_rng(0)
    num_users, num_items = 60, 50
    pairs = [(user, item) for user in range(num_users) for item in range(num_items)]
    options: Any = {"validation": 0.1, "test": 0.2}
    if kind == "last_n":
        options = {"validation": 5, "test": 10}

    def parts(rows: list[tuple[int, int]], seed: int = 0) -> dict[tuple[int, int], str]:
        log = make_log([(*pair, 0, "clicked") for pair in rows], with_time=False)
        split = replace(log, is_ordered=False).split(kind, **options, seed=seed)
        pairs = zip(*(column(split.events, name) for name in ("user_id", "item_id")), strict=True)
        return dict(zip(pairs, column(split.events, "part"), strict=True))

    found = parts(pairs)
    assert parts([pairs[i] for i in rng.permutation(len(pairs))]) == found
    assert parts(pairs, seed=1) != found
    testing = [pair for pair, part in found.items() if part == "test"]
    users = {user for user, _ in testing}
    assert len(users) == num_users
    assert len(testing) == 10 * num_users
    # Items drawn at random are uniform in 0 .. 49: the mean of n is within 4 deviations.
    deviation = num_items / math.sqrt(12 * len(testing))
    assert abs(np.mean([item for _, item in testing]) - 24.5) < 4 * deviation
    for user in users:
        keys = {item: f"0:{user}:{item}".encode() for item in range(num_items)}
        order = sorted(keys, key=lambda item: md5(keys[item]).hexdigest()[:12])
        assert {item for other, item in testing if other == user} == set(order[-10:])


@pytest.mark.parametrize("kind", ["last_share", "last_n"])
def test_without_any_order_a_users_events_of_an_item_stay_in_one_part(kind: Any) -> None:
    rows = random_rows(0)  # Most pairs of user and item have several events, clicked or not.
    log = replace(make_log(rows, with_time=False), is_ordered=False)
    options: dict[str, Any] = {} if kind == "last_n" else {"validation": 0.2, "test": 0.3}
    found = parts_of(log.split(kind, **options, min_positives=2))
    of_pair = {rows[number][:2]: part for number, part in found.items()}
    assert found == {number: of_pair[rows[number][:2]] for number in found}
    assert len(of_pair) < len(found) / 1.5
    assert set(of_pair.values()) >= {"train", "test"}
    if kind != "last_n":
        return
    for user in {user for user, _ in of_pair}:
        items = {item for other, item in of_pair if other == user}
        clicks = [item for other, item, _, stage in rows if (other, stage) == (user, "clicked")]
        passed = 0
        for item in sorted(items, key=lambda i: md5(f"0:{user}:{i}".encode()).hexdigest()[:12]):
            passed += clicks.count(item)
            places = {len(clicks): "test", len(clicks) - 1: "validation"}
            assert of_pair[user, item] == places.get(passed, "train")


def test_users_with_few_positives_are_dropped_and_counted(tmp_path: Path) -> None:
    clicks = [(user, i, i, "clicked") for user, num in ((1, 5), (2, 4)) for i in range(num)]
    log = make_log([*clicks, (3, 1, 1, "exposed")])
    split = log.split("last_share", validation=0.2, test=0.2)
    split.write(tmp_path / "split.parquet")
    Split.read(log, tmp_path / "split.parquet").write(tmp_path / "split.parquet")
    one = {"num_events": 1, "num_positives": 1, "num_users": 1}
    train = {"num_events": 3, "num_positives": 3, "num_users": 1}
    dropped = {"num_users_dropped": 2, "num_events_dropped": 5}
    for each in (split, Split.read(log, tmp_path / "split.parquet")):
        assert each.report() == {"train": train, "validation": one, "test": one, **dropped}
    assert split.describe()[-1] == "dropped 5 events of users with too few positives (2 users)"
    # The users of a part are those of its positives.
    exposed = [(1, 20, 9, "exposed"), (3, 21, 9, "exposed"), (4, 22, 9, "ranked")]
    clicks = [(user, 10 + user, second, "clicked") for user in (1, 2) for second in (1, 2, 8)]
    log = make_log([*clicks, *exposed])
    moments = [START + timedelta(seconds=second) for second in (2, 8)]
    split = log.split("time", validation=moments[0], test=moments[1])
    assert split.report()["test"] == {"num_events": 5, "num_positives": 2, "num_users": 2}


def test_a_log_of_dates_is_split_between_them() -> None:
    """If a part's share lies within one date, the parts are made of whole dates."""
    days = np.repeat(np.arange(8), 10 * (1 + np.arange(8)))
    times = pd.to_datetime("2024-01-01", utc=True) + pd.to_timedelta(days, unit="D")
    events = pd.DataFrame({"user_id": np.arange(len(days)) % 20, "item_id": np.arange(len(days))})
    log = Log.from_table(events.assign(timestamp=times))
    split = log.split("time", validation=0.05, test=0.1)
    parts = split.events.to_pandas()
    found = parts.groupby("part")["timestamp"].agg(lambda x: sorted({t.day for t in x}))
    assert found.to_dict() == {"train": [1, 2, 3, 4, 5, 6], "validation": [7], "test": [8]}
    for num_days in (1, 2):
        few = Log.from_table(events.assign(timestamp=times)[days >= 8 - num_days])
        with pytest.raises(DataError, match=r"too few times to split by: (0|70) of them come bef"):
            few.split("time", validation=0.05, test=0.1)
    assert len(few.split("time", validation=0, test=0.1).test.user_ids) == 20


def test_by_time_all_users_share_the_cuts() -> None:
    log = make_log([(user, user, second, "clicked") for user in (1, 2) for second in (1, 2, 3)])
    moments = [START + timedelta(seconds=second) for second in (2, 3)]
    moved = [moment.astimezone(tz=None) for moment in moments]
    for validation, test in (moments, moved, (moved[0].isoformat(), moments[1])):
        assert letters(log.split("time", validation=validation, test=test)) == "tvxtvx"


@pytest.mark.parametrize("num", [10, 23, 40])
def test_time_leaves_the_shares_after_its_cuts(num: int) -> None:
    seconds = np.random.default_rng(num).integers(0, 31, num).tolist()
    log = make_log([(1, 1, second, "clicked") for second in seconds])
    times = sorted(seconds)
    num_test = math.ceil(Fraction(2, 10) * len(times))
    test = times[-num_test]
    validation = times[-num_test - math.ceil(Fraction(1, 10) * len(times))]
    if validation == test:  # It begins at the last time before the test.
        validation = max(second for second in seconds if second < test)
    expected = ["x" if s >= test else "v" if s >= validation else "t" for s in seconds]
    assert letters(log.split("time", validation=0.1, test=0.2)) == "".join(expected)


def test_a_column_may_hold_out_users_whose_earlier_events_are_history_alone() -> None:
    def part(user: int, item: int) -> str:
        held_out = {0: "validation", 1: "test", 2: "test"}
        return "train" if user not in held_out else held_out[user] if item > 6 else "fold_in"

    pairs = [(user, item) for user in range(9) for item in range(10)]
    rows: list[Event] = [(user, item, item, "clicked") for user, item in pairs]
    split = make_log(rows, parts=[part(*pair) for pair in pairs]).split("column")
    assert set(column(split.train.events, "user_id")) == set(range(3, 9))
    assert not {*column(split.before_test.events, "user_id")} & {1, 2}
    assert split.test.user_ids.tolist() == [1, 2]
    assert all(history.tolist() == list(range(7)) for history in split.test.histories)
    assert all(relevant.tolist() == [7, 8, 9] for relevant in split.test.relevant)
    assert split.test.candidate_counts.tolist() == [6] * 7 + [7] * 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train", "validation", "dev", "test"], "1 of 4 rows hold 'dev'. It must hold train, v"),
        (["train", "train", "test", None], "of the part validation is a positive; 1 rows are"),
        (["train", "validation", "validation", "test"], "no row of the part test is a positive"),
        (["validation", "test", "test", "train"], "no row of the part train is a positive"),
    ],
)
def test_a_column_that_is_no_split_is_refused(names: list[str | None], message: str) -> None:
    rows: list[Event] = [(1, i, i, "clicked") for i in range(3)]
    with pytest.raises(DataError, match=message):
        make_log([*rows, (1, 3, 3, "exposed")], parts=names).split("column")


def test_another_split_takes_the_place_of_the_column_and_keeps_all_others() -> None:
    rows: list[Event] = [(user, i, i, "clicked") for user in range(10) for i in range(6)]
    without, log = make_log(rows), make_log(rows, parts=["test"] * len(rows))
    for (name, split), wanted in zip(
        all_splits(log).items(), all_splits(without).values(), strict=True
    ):
        assert set(split.events.columns) == {*log.events.columns}, name
        assert set(wanted.events.columns) == {*without.events.columns, "part"}, name
        assert parts_of(split) == parts_of(wanted), name


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *(("last_share", {"test": test}) for test in (1.0, math.nan)),
        *(("time", {"test": test}) for test in (math.nan, START, 0.0)),
        *(("last_n", {"test": test}) for test in (math.inf, -1, 0.2, START, True)),
        ("last_n", {"validation": START, "test": START}),
        ("time", {"test": 0.6, "validation": 0.4}),
        ("time", {"validation": datetime(2024, 1, 1), "test": START}),
        ("time", {"validation": START + timedelta(seconds=1), "test": START}),
        ("time", {"validation": "2024-01-01", "test": START}),
        ("time", {"validation": START, "test": "yesterday"}),
        ("time", {"validation": START.date(), "test": START.date()}),
        ("column", {"validation": 0.5}),
        ("held_out_users", {}),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, options: dict[str, Any]) -> None:
    said = r"^\w+: got .*(must|leave|only|write)|give .* both"
    with pytest.raises(ConfigError, match=said):
        one_user("cccccc").split(kind, **options)


def test_what_cannot_be_split_says_what_else_to_do() -> None:
    with pytest.raises(DataError, match=r"no timestamp.*split\.kind to last_share"):
        make_log([(1, 1, 1, "clicked")], with_time=False).split("time")
    with pytest.raises(DataError, match=r"no column 'part'.*columns.*split\.kind"):
        one_user("ccc").split("column")
    days: list[Any] = [START.date(), START.date().isoformat()]
    for day in days:
        with pytest.raises(ValueError, match=f"write {START.date()}T00:00:00Z"):
            one_user("ccc").split("time", validation=day, test=day)
    with pytest.raises(DataError, match="leave none to train on"):
        one_user("c").split()


def test_candidates_are_counted_whatever_a_feature_is_called() -> None:
    clicks = pa.table({"user_id": [1] * 6, "item_id": [5, 5, 6, 5, 6, 7]})
    items = pa.table({"item_id": [5, 6, 7], "count": [70.0, None, 90.0]})
    log = Log.from_table(clicks, items=items, item_features={"count": "numeric"})
    test = log.split("last_n").test
    assert test.candidate_ids.tolist() == [5, 6, 7]
    assert test.candidate_counts.tolist() == [3, 2, 0]
