"""Columns that nobody asked for are not left unread if they hold times or outcomes."""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tests.small_log import column
from tfrs_pipeline import DataError, Log, Reading


def test_a_time_is_not_left_unread(load: Any) -> None:
    text = "user_id,item_id,Date\n1,2,2024-01-31\n"
    with pytest.raises(DataError, match="'Date' is not read; did you mean 'timestamp'") as raised:
        load(text)
    assert raised.value.setting == "columns"
    # Next to a time it is an ordinary column.
    text = "user_id,item_id,timestamp,date\n1,2,1700000000,2024-01-31\n"
    assert "columns not read: date" in load(text).notes[0]


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


def test_rows_that_were_looked_at_are_read_all_the_same(load: Any) -> None:
    lines = [f"{user},{user % 7},x" for user in range(3000)]
    lines[10] = "1"
    log = load("\n".join(["user_id,item_id,place", *lines]))
    assert [each.num_rows for each in log.dropped] == [1]
    assert log.counts()["events"] == 2999
    kinds = {"label": [0, 1, 1] * 1000, "action": ["view", "buy", "buy"] * 1000}
    events = pa.table({"user_id": range(3000), "item_id": range(3000), **kinds})
    stream = pa.RecordBatchReader.from_batches(events.schema, events.to_batches(100))
    assert Log.from_table(stream).counts()["events"] == 3000
