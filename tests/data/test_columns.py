"""Columns that nobody asked for are not left unread if they hold stages, times or outcomes."""

from datetime import date
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tests.small_log import column
from tfrs_pipeline import DataError, Log, Reading

UNMAPPED = {
    "reached": (["Clicked", "exposed", " recalled"], "holds stages, .* of Clicked, recalled to "),
    # One known stage shows that the other values are a team's own names of stages.
    "found": (["shown", None, "clicked"], "holds stages, .*Add stage=found .* of shown to stage_v"),
    "at": (["2024-01-31", "2024-02-01T10:00Z", ""], "holds times, .*Add timestamp=at to columns"),
    "day": ([date(2024, 1, 31), date(2024, 2, 1), None], "holds times, .*Add timestamp=day"),
}


@pytest.mark.parametrize("is_csv", [True, False])
@pytest.mark.parametrize("name", UNMAPPED)
def test_stages_and_times_are_not_left_unread(load: Any, name: str, is_csv: bool) -> None:
    values, message = UNMAPPED[name]
    events: Any = pa.table({"user_id": [1, 2, 3], "item_id": [4, 5, 6], name: values})
    if is_csv:
        events = events.to_pandas().to_csv(index=False)
    with pytest.raises(DataError, match=f"column '{name}' is not read and {message}") as raised:
        load(events)
    assert raised.value.setting == "columns"
    assert name in load(events, columns={name: name}).events.columns
    mended = {"timestamp" if "times" in message else "stage": name}
    # Read as what it is, its unknown stage or its row without a time is reported.
    with pytest.raises(DataError, match=f"'{name}' (holds an unknown stage|must hold t|is null)"):
        load(events, columns=mended)


@pytest.mark.parametrize(("num_unreadable", "holds_times"), [(1, True), (2, False)])
def test_times_are_told_among_others(load: Any, num_unreadable: int, holds_times: bool) -> None:
    days = [f"2024-01-{i + 1:02}" for i in range(20)]
    days[:num_unreadable] = [f"unknown {i}" for i in range(num_unreadable)]
    events = pa.table({"user_id": range(20), "item_id": range(20), "moment": days})
    if holds_times:
        with pytest.raises(DataError, match="'moment' is not read and holds times"):
            load(events)
    else:
        assert "columns not read: moment" in load(events).notes[0]


def test_what_only_looks_like_stages_or_times_is_left_unread(load: Any) -> None:
    # Next to a stage and a time they are ordinary columns, like those that also hold other values.
    text = "user_id,item_id,stage,timestamp,a,b\n1,2,clicked,1700000000,clicked,2024-01-31\n"
    assert "columns not read: a, b" in load(text).notes[0]
    text = "user_id,item_id,a,b,c\n1,2,just clicked,2024-01-31,\n1,3,done,soon,\n"
    assert "columns not read: a, b, c" in load(text).notes[0]
    text = "user_id,item_id,a\n1,2,clicked\n" + "".join(f"1,{n},search {n}\n" for n in range(101))
    assert "columns not read: a" in load(text).notes[0]
    labelled = load("user_id,item_id,like,a\n1,2,1,clicked\n", label={"like": 1})
    assert "columns not read: a" in labelled.notes[0]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Click", [1.0, 0.0, None]),
        ("is_click", [True, False]),
        ("is_clicked", ["0"] * 2000 + ["1"]),
        ("label", ["false", "true", ""]),
        # What did not happen is left empty.
        ("is_click", ["1"] * 2000 + [""]),
        ("clicked", [1, None]),
        # One odd value, late.
        ("is_click", ["0", "1"] * 600 + ["unknown"]),
        ("Label", ["", "Yes", "no"]),
    ],
)
def test_a_label_that_was_forgotten_is_refused(load: Any, name: str, values: list[Any]) -> None:
    def events(name: str, values: list[Any]) -> str | pa.Table:
        if isinstance(values[0], str):  # A CSV.
            lines = [f"{i},{i},{value}\n" for i, value in enumerate(values)]
            return f"user_id,item_id,{name}\n{''.join(lines)}"
        ids = range(len(values))
        return pa.table({"user_id": ids, "item_id": ids, name: values})

    message = rf"'{name}' is not read and holds 1 .*Add {name}=1 to label; or {name}={name} "
    with pytest.raises(DataError, match=message) as raised:
        load(events(name, values))
    assert raised.value.setting == "label"
    labelled = load(events(name, values), label={name: 1})
    is_click = [value in (1, "1", "true", "Y", "Yes") for value in values]
    assert column(labelled.events, "stage").count("clicked") == sum(is_click)
    # Not outcomes: columns with a single value, or with another name.
    for other in ([1] * 3, ["Y"] * 2, [0, None]):
        assert f"columns not read: {name}" in load(events(name, other)).notes[0]
    assert "columns not read: seen" in load(events("seen", values)).notes[0]
    # Next to a rating it is an ordinary column.
    text = f"user_id,item_id,rating,{name}\n1,2,4,1\n1,3,4,0\n"
    assert f"columns not read: {name}" in load(text, rating_threshold=3).notes[0]


def test_a_label_of_pandas_has_nan_where_it_does_not_hold() -> None:
    events = pd.DataFrame({"user_id": [1, 2], "item_id": [1, 2], "clicked": [1.0, np.nan]})
    with pytest.raises(DataError, match="'clicked' is not read and holds 1"):
        Log.from_table(events)
    log = Log.from_table(events, reading=Reading(label={"clicked": 1}))
    assert column(log.events, "stage") == ["clicked", "exposed"]


def test_a_stage_is_found_in_any_row(load: Any) -> None:
    reached = ["recalled"] * 3000 + ["clicked"]
    events = pa.table({"user_id": range(3001), "item_id": range(3001), "reached": reached})
    with pytest.raises(DataError, match=r"'reached' is not read and holds stages, .* of recalled"):
        load(events)


def test_rows_that_were_looked_at_are_read_all_the_same(load: Any) -> None:
    lines = [f"{user},{user % 7},x" for user in range(3000)]
    lines[10] = "1"
    log = load("\n".join(["user_id,item_id,place", *lines]))
    assert [each.num_rows for each in log.dropped] == [1]
    assert log.counts()["events"] == 2999
    kinds = {"a": ["clicked"] * 3000, "action": ["view", "buy", "buy"] * 1000}
    events = pa.table({"user_id": range(3000), "item_id": range(3000), **kinds})
    stream = pa.RecordBatchReader.from_batches(events.schema, events.to_batches(100))
    assert Log.from_table(stream).counts()["events"] == 3000
