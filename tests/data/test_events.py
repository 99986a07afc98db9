"""Events: their types, stages, times and labels, and what is refused."""

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tests.small_log import column
from tfrs_pipeline import DataError, Log, Reading
from tfrs_pipeline.samples.build import build_samples
from tfrs_pipeline.samples.store import read_samples

CLICKS = "user_id,item_id,timestamp\n7,a,1700000002\n8,b,1700000001\n7,b,1700000000\n"


@pytest.mark.parametrize("dtype", [None, pa.float32(), pa.float64()])
def test_a_rating_at_the_threshold_is_positive(load: Any, dtype: pa.DataType | None) -> None:
    events: Any = "user_id;item_id;rating\n1;2;4\n1;3;4.1\n1;4;4.2\n"
    if dtype:  # 4.1 is 4.0999999 in float32.
        ratings = pa.array([4.0, 4.1, 4.2], dtype)
        events = pa.table({"user_id": [1] * 3, "item_id": [2, 3, 4], "rating": ratings})
    tables = load(events, rating_threshold=4.1)
    assert column(tables.events, "stage") == ["exposed", "clicked", "clicked"]
    assert tables.events.columns == ("user_id", "item_id", "event_number", "stage")
    tables = load(events, rating_threshold=4.2, dislike_threshold=4.1)
    assert column(tables.events, "stage") == ["disliked", "exposed", "clicked"]
    with pytest.raises(ValueError, match=r"got 4.3: needs a rating_threshold that is not below it"):
        load(events, rating_threshold=4.2, dislike_threshold=4.3)


def test_a_funnel_log_with_stages_ranks_and_context(load: Any) -> None:
    text = (
        "user_id,item_id,what,request_id,rank,score,page\n"
        '1,10,buy,r1,0,0.5,"home, top"\n1,11,show,r1,1,0.25,home\n1,12,lost,r1,,,home\n'
    )
    stages = {"buy": "clicked", "show": "exposed", "lost": "pre_ranked"}
    tables = load(text, columns={"stage": "what", "page": "page"}, stage_values=stages)
    assert column(tables.events, "stage") == ["clicked", "exposed", "pre_ranked"]
    assert column(tables.events, "rank") == [0, 1, None]
    assert column(tables.events, "score") == [0.5, 0.25, None]
    assert column(tables.events, "page") == ["home, top", "home", "home"]
    assert column(tables.events, "request_id") == ["r1"] * 3


@pytest.mark.parametrize(
    "ids, expected",
    [
        (["7", "10"], [7, 10]),
        (["007", "7"], ["007", "7"]),
        (["7.0", "8"], [7, 8]),
        (["7.0", " x "], ["7", "x"]),
        ([" a  3", "a 3\t", "a  3"], ["a  3", "a 3", "a  3"]),
        (["99999999999999999999", "7"], ["99999999999999999999", "7"]),
        (["-5", "0"], [-5, 0]),
    ],
)
def test_ids_in_csv_are_integers_if_all_are(load: Any, ids: list[str], expected: list[Any]) -> None:
    tables = load("user_id,item_id\n" + "".join(f"{value},1\n" for value in ids))
    assert column(tables.events, "user_id") == expected


MOMENT = datetime(2024, 1, 31, 12, 0, 0, 500_000, tzinfo=UTC)


@pytest.mark.parametrize(
    "value, options",
    [
        ("1706702400.5", {}),
        ("1706702400500000999", {"timestamp_unit": "ns"}),
        ("2024-01-31 13:00:00.5+01:00", {}),
        ("2024-01-31 13:00:00.5", {"time_zone": "Europe/Berlin"}),
        ("2024-01-31T12:00:00.5", {"time_zone": "UTC"}),
        (pa.array([1706702400500], pa.int64()), {"timestamp_unit": "ms"}),
        (pa.array([MOMENT], pa.timestamp("us", "Asia/Tokyo")), {}),
        (pa.array([MOMENT.replace(tzinfo=None)], pa.timestamp("ns")), {"time_zone": "UTC"}),
    ],
)
def test_timestamps(load: Any, value: str | pa.Array, options: dict[str, str]) -> None:
    assert column(load(of_time(value), **options).events, "timestamp") == [MOMENT]


def of_time(value: str | pa.Array) -> str | pa.Table:
    if isinstance(value, str):
        return f"user_id,item_id,timestamp\n1,2,{value}\n"
    return pa.table({"user_id": [1], "item_id": [2], "timestamp": value})


@pytest.mark.parametrize("days", ["2024-01-31", pa.array([date(2024, 1, 31)])])
def test_dates_are_days_of_utc_unless_a_zone_is_given(load: Any, days: str | pa.Array) -> None:
    events = of_time(days)
    log = load(events)
    assert column(log.events, "timestamp") == [datetime(2024, 1, 31, tzinfo=UTC)]
    assert "column 'timestamp' holds dates: read as days in UTC" in " ".join(log.notes)
    log = load(events, time_zone="Europe/Berlin")
    assert column(log.events, "timestamp") == [datetime(2024, 1, 30, 23, tzinfo=UTC)]
    assert "UTC" not in " ".join(log.notes)


def test_hours_that_a_clock_shows_twice_or_never_are_in_standard_time(load: Any) -> None:
    frame = {"user_id": [1, 2], "item_id": 1, "timestamp": ["2024-10-27 02:30", "2024-03-31 02:30"]}
    log = load(pd.DataFrame(frame).to_csv(index=False), time_zone="Europe/Berlin")
    found = [datetime(2024, *day, 1, 30, tzinfo=UTC) for day in ((10, 27), (3, 31))]
    assert column(log.events, "timestamp") == found


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("USER_ID,ITEM_ID", "'user_id'. Nearest: USER_ID. Set columns"),
        ("user,item_id", "'user_id'. Nearest: user. Set columns"),
        ("customer,sku", "'item_id'. It has: customer, sku. Set columns"),
    ],
)
def test_a_missing_column_is_told_with_what_is_near_or_there(
    load: Any, header: str, message: str
) -> None:
    with pytest.raises(DataError) as refused:
        load(f"{header}\n1,2\n")
    assert f"no column {message}" in str(refused.value)


def test_the_part_that_a_log_names_is_carried_along(load: Any) -> None:
    text = "user_id,item_id,{0}\n1,2,train\n1,3,\n1,2,test\n1,2,test\n"
    for tables in (load(text.format("part")), load(text.format("fold"), columns={"part": "fold"})):
        assert column(tables.events, "part") == ["train", None, "test", "test"]
    dropped = load(text.format("part"), duplicates="drop")
    assert column(dropped.events, "part") == ["train", None, "test"]


def test_what_float32_cannot_tell_apart_is_refused() -> None:
    """Tools that shrink tables store numbers as float32."""
    clicks = {"user_id": [1, 2], "item_id": np.array([2**24 - 1, 5], np.float32)}
    assert sorted(column(Log.from_table(pd.DataFrame(clicks)).events, "item_id")) == [5, 2**24 - 1]
    clicks["item_id"] = np.array([2**24 + 2, 5], np.float32)
    with pytest.raises(DataError, match=r"must be an integer or a string .* in 1 of 2 rows"):
        Log.from_table(pd.DataFrame(clicks))
    times = {"user_id": [1, 2], "item_id": [1, 2], "timestamp": np.array([1.7e9, 2e9], np.float32)}
    with pytest.raises(DataError, match=r"float32 \(2 rows\), .* Store them as int64 or float64"):
        Log.from_table(pd.DataFrame(times))


def test_all_columns_that_are_missing_or_misnamed_are_told_at_once(load: Any) -> None:
    events = "uid,iid,time,hour\n1,2,1700000000,3\n"
    for given, what in (
        ({}, ["no column 'user_id'", "no column 'item_id'", "'time' is not read"]),
        ({"columns": {"user_id": "uid", "h": "houm"}}, ["no column 'item_id'", "'time' is",
         "no column 'houm'. Nearest: hour"]),
        ({"columns": {"uid": "user_id", "item_id": "iid", "timestamp": "time"}},
         ["no column 'user_id'", "Did you mean user_id=uid?"]),
    ):  # fmt: skip
        with pytest.raises(DataError) as refused:
            load(events, **given)
        lines = str(refused.value).splitlines()
        assert len(lines) == len(what)
        assert all(any(each in line for line in lines) for each in what)
        assert refused.value.setting == "columns"
    with pytest.raises(DataError, match=r"\n.*\n"):
        load(CLICKS, items="sku\n2\n", item_features={"a": "text", "b": "text"})


def test_an_empty_request_id_is_none(tmp_path: Path, load: Any) -> None:
    # If '' were a request, all events without an id would share it, and have no history.
    rows = {"user_id": [1] * 4, "item_id": [5, 6, 7, 8], "request_id": ["", "r", " ", None]}
    assert column(load(pa.table(rows)).events, "request_id") == [None, "r", None, None]
    log = load('user_id,item_id,request_id\n1,5,""\n1,6,r\n1,7," "\n1,8,\n')
    assert column(log.events, "request_id") == [None, "r", None, None]
    build_samples(log, tmp_path, seed=0)
    samples = read_samples(tmp_path)
    assert [samples.history(i).tolist() for i in range(4)] == [[], [1], [1, 2], [1, 2, 3]]


def test_an_outcome_without_any_value_in_a_file_or_in_memory_happened_to_nobody(load: Any) -> None:
    columns = {"user_id": [1, 1], "item_id": [5, 6], "added": [1, 0]}
    events = pa.table({**columns, "bought": pa.nulls(2)})
    label = {"added": 1.0, "bought": 2.0}
    for log in (load(events, label=label), Log.from_table(events, reading=Reading(label=label))):
        assert column(log.events, "stage") == ["clicked", "exposed"]


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("user_id,item_id\n1,2\n", {"columns": {"item_id": "film"}}, "no column 'film'"),
        ("user_id,item_id\n", {}, r"events\.csv: 0 rows"),
        ("", {}, r"events\.csv: 0 rows, and no header"),
        ("user_id,item_id,user_id\n1,2,3\n", {}, "Repeated or empty: user_id"),
        ("user_id,item_id\n1,2\n1,2,3,4\n", {}, r"line 3 of .*\(1 of 2 lines\)\. Give"),
        ("user_id,item_id,weight\n1,2,0\n1,3,1\n", {}, r"such as '0' .* a small weight or, with l"),
        ("user_id,item_id\n1,2\n3,4\r\n5,6\n", {}, r"some lines end in .* the same line ending"),
        ("user_id,item_id\r1,2\r3,4\r", {}, r"cannot be read: its lines end in \\r alone"),
        (f"user_id,item_id,{'z' * 140_000}\n1,2,3\n", {}, "its header has a field larger than"),
        ("user_id,item_id\n  ,2\n1,2\n", {}, r"'user_id' is null in 1 of 2 rows"),
        ("user_id,item_id\n,2\n1,2\n", {}, r"events\.csv: column 'user_id' is null in 1 of 2 rows"),
        ("user_id,item_id\n-1,2\n", {}, r"'user_id' is -1 \(reserved .*\) in 1 of 1 rows"),
        (CLICKS.replace("170", "170000"), {}, "look like milliseconds"),
        (CLICKS.replace("170", "170000"), {"timestamp_unit": "us"}, "Set timestamp_unit to ms"),
        (CLICKS, {"timestamp_unit": "ms"}, "look like seconds"),
        (CLICKS.replace("1700000000", "yesterday"), {}, "times and .* 1 of 3 rows, .*'yesterday'"),
        (CLICKS.replace("1700000000", "2024-01-01"), {}, "one way .*'2024-01-01' .first: row 3"),
        (CLICKS.replace("1700000000", ""), {}, "'timestamp' is null in 1 of 3 rows"),
        (
            "user_id,item_id,timestamp\n1,2,2024-01-31 00:00\n1,3,2024-01-31\n",
            {},
            "without a time zone.*2 rows",
        ),
        (
            "user_id,item_id,timestamp\n1,2,2024-01-31 10:00:00\n1,2,2024-01-31T10:00:00Z\n",
            {"time_zone": "UTC"},
            "does not in 1 of 2 rows.* with an offset in all or in none",
        ),
        ("user_id,item_id,timestamp\n1,2,20240131\n", {}, "look like dates"),
        (CLICKS.replace("1700", "2024-01-01 00:0"), {}, "must hold times"),
        ("user_id,item_id,rank\n1,2,1.5\n", {}, "'rank' must hold whole numbers.*'1.5'"),
        ("user_id,item_id,score\n1,2,good\n", {}, "'score' must hold finite .* 1 of 1"),
        ("user_id,item_id,stage\n1,2,liked\n", {}, "such as 'liked' .first: row 1.. Known"),
        ("user_id,item_id,rating\n1,2,3\n", {"rating_threshold": 4}, "none of 1 rows is"),
        ("user_id,item_id,rating\n1,2,\n1,2,5\n", {"rating_threshold": 4}, "null or NaN in 1 of 2"),
        (pa.table({"user_id": [1.5], "item_id": [2]}), {}, r"'user_id' must be an integer .*1\.5"),
        (
            pa.table({"user_id": [1], "item_id": [2], "timestamp": [True]}),
            {},
            "must be a timestamp",
        ),
    ],
)
def test_what_is_refused(load: Any, text: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(text, **options)


# The label: which exposed events are positives, and what they weigh.

COLUMNS: dict[str, list[Any]] = {
    "user_id": [1] * 6,
    "item_id": [1, 2, 3, 4, 5, 6],
    "stage": ["retrieved", "exposed", "exposed", "clicked", "clicked", "exposed"],
    "is_like": [True, True, False, False, None, True],
    "seconds": [90.0, 0.0, 0.0, 12.0, None, 3.5],
    "note": ["a"] * 6,
}


def labelled(label: dict[str, float], **more: list[Any] | None) -> list[tuple[str, float]]:
    columns = {name: values for name, values in (COLUMNS | more).items() if values is not None}
    log = Log.from_table(pa.table(columns), reading=Reading(label=label))
    return list(zip(column(log.events, "stage"), column(log.events, "weight"), strict=True))


def test_a_positive_is_exposed_and_labelled() -> None:
    exposed, clicked, retrieved = ((stage, 1.0) for stage in ("exposed", "clicked", "retrieved"))
    expected = [retrieved, clicked, exposed, exposed, exposed, clicked]
    assert labelled({"is_like": 1.0}) == expected
    # Without stages all rows are exposures.
    assert labelled({"is_like": 1.0}, stage=None) == [clicked, *expected[1:]]


def test_a_weighted_union_adds_what_holds_and_keeps_the_event_weight() -> None:
    found = labelled({"is_like": 1.0, "seconds": 0.5}, weight=[1.0, 1.0, 1.0, 2.0, 1.0, 3.0])
    stages = ["retrieved", "clicked", "exposed", "clicked", "exposed", "clicked"]
    assert found == list(zip(stages, [1.0, 1.0, 1.0, 1.0, 1.0, 4.5], strict=True))


@pytest.mark.parametrize(
    ("label", "more", "message"),
    [
        ({"is_lik": 1.0}, {}, r"'is_lik'.*is_like"),
        ({"note": 1.0}, {}, "'note' must be boolean, or a number .* it is string"),
        ({"nothing": 1.0}, {"nothing": [0] * 6}, "none of 6 rows is a positive"),
        (
            {"seconds": 1.0},
            {"seconds": [1.0, float("nan")] * 3},
            "'seconds' is in the label and no number in 3 of 6 rows, such as nan",
        ),
        ({"is_like": 0.0}, {}, "label.is_like: got 0.0; must be greater"),
        ({0: 1.0}, {}, "label.0.*must be a valid string"),
        ("is_like", {}, "label: got 'is_like'; must be a valid dictionary"),
        ({"stage": 1.0}, {}, "takes outcomes, and stage is not"),
    ],
)
def test_labels_that_are_refused(label: Any, more: Any, message: str) -> None:
    with pytest.raises((DataError, ValueError), match=message):
        labelled(label, **more)
