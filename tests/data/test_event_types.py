"""Types of events: positives with weights, exposures, and what is dropped."""

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tests.small_log import column
from tfrs_pipeline import DataError, Log, Reading

WEIGHTS: dict[str, Any] = {"purchase": 5, "click": 1, "view": "exposed"}


def shop(num: int = 400) -> pd.DataFrame:
    """A shop's log without times."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"user_id": rng.integers(1, 9, num), "item_id": rng.integers(1, 6, num)})
    types = rng.choice(["view", "click", "purchase", "scroll"], num, p=[0.5, 0.3, 0.1, 0.1])
    return frame.assign(event=types)


@pytest.mark.parametrize("is_csv", [True, False])
def test_types_become_positives_with_weights_and_exposures(load: Any, is_csv: bool) -> None:
    frame = shop()
    text = frame.replace({"click": " click"}).to_csv(index=False)
    events = text if is_csv else pa.Table.from_pandas(frame)
    log = load(events, event_weights=WEIGHTS)
    kept = frame[frame["event"] != "scroll"]
    assert column(log.events, "event_number") == kept.index.tolist()
    is_shown = kept["event"] == "view"
    assert column(log.events, "stage") == np.where(is_shown, "exposed", "clicked").tolist()
    assert column(log.events, "weight") == np.where(kept["event"] == "purchase", 5.0, 1.0).tolist()
    # Types without a weight are dropped on purpose: max_bad_share does not limit them.
    num = Counter(frame["event"])
    (dropped,) = log.dropped
    assert dropped.reason == "column 'event' is 'scroll', which has no weight"
    assert dropped.num_rows == num["scroll"]
    told = f"purchase {num['purchase']} (positive, weight 5), click {num['click']} (positive, "
    assert told in log.notes[0]
    few = load(events, event_weights={"purchase": 1}, max_bad_share=0)
    assert few.counts()["events"] == num["purchase"]


@pytest.mark.parametrize("has_request", [False, True])
def test_a_type_may_say_not_this(load: Any, has_request: bool) -> None:
    """The dislikes of a visit become one, at its time; the other events merge without them."""
    events = pd.DataFrame({"event": ["view", "report", "click", "report", "purchase", "view"]})
    events = events.assign(user_id=1, item_id=[2, 2, 2, 2, 2, 3])
    events["timestamp"] = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(
        range(6), unit="min"
    )
    events = events.assign(request_id=7) if has_request else events
    log = load(pa.Table.from_pandas(events), event_weights=WEIGHTS | {"report": "disliked"})
    # The first event of a request dates it; of a visit, the first positive stays.
    number = 0 if has_request else 2
    names = ("event_number", "stage", "weight")
    rows = {*zip(*(column(log.events, name) for name in names), strict=True)}
    assert rows == {(number, "clicked", 5.0), (1, "disliked", 1.0), (5, "exposed", 1.0)}
    assert log.positives().count().to_pyarrow().as_py() == 0
    assert "report 2 (disliked)" in log.notes[0]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_of_events_without_a_positive_the_furthest_stage_stays(load: Any, order: list[int]) -> None:
    """An item that was shown is no hard negative, whichever of its events comes first."""
    rows = [(1, 7, "retrieved"), (1, 7, "view"), (1, 7, "ranked")]
    rows = [rows[n] for n in order] + [(1, 8, "retrieved"), (1, 9, "click")]
    events = pd.DataFrame(rows, columns=["user_id", "item_id", "event"]).assign(request_id=5)
    weights = WEIGHTS | {"retrieved": "retrieved", "ranked": "ranked"}
    log = load(pa.Table.from_pandas(events), event_weights=weights)
    stages = dict(zip(column(log.events, "item_id"), column(log.events, "stage"), strict=True))
    assert stages == {7: "exposed", 8: "retrieved", 9: "clicked"}


@pytest.mark.parametrize("space", [" ", "\t", "\n", "\u00a0", "\u3000"])
def test_space_around_a_type_loses_no_row(space: str) -> None:
    types = ["click", f"click{space}", "view", "other", f"{space}view"]
    table = pa.table({"user_id": [1] * 5, "item_id": [1, 2, 3, 4, 5], "event": types})
    log = Log.from_table(table, reading=Reading(event_weights={"click": 1, "view": "exposed"}))
    num_dropped = sum(each.num_rows for each in log.dropped)
    assert log.counts()["events"] + num_dropped == 5
    # The note counts the kept rows by type.
    stages = column(log.events, "stage")
    assert f"click {stages.count('clicked')} (" in log.notes[0]
    assert f"view {stages.count('exposed')} (" in log.notes[0]


def test_merged_events_of_a_request_are_told_apart_from_dropped_ones(load: Any) -> None:
    # Two events have no request.
    events = "1,2,view,\n1,2,click,\n1,2,view,a\n1,2,click,a\n1,3,scroll,a\n"
    log = load(f"user_id,item_id,event,request_id\n{events}", event_weights=WEIGHTS)
    assert column(log.events, "event_number") == [0, 1, 2]
    assert column(log.events, "stage") == ["exposed", "clicked", "clicked"]
    described = str(log.describe())
    assert "dropped 1 of 5 rows\n" in described
    assert "merged 1 row into the strongest event of their item in the same request" in described


def test_a_weight_of_the_event_multiplies_that_of_its_type(load: Any) -> None:
    text = "user_id,item_id,action,amount\n1,2,purchase,3\n1,3,click,90\n1,4,view,\n"
    log = load(text, event_weights=WEIGHTS, columns={"weight": "amount"}, max_weight=20)
    assert column(log.events, "weight") == [15.0, 20.0, 1.0]
    assert "action" not in log.events.columns


@pytest.mark.parametrize("name", ["event", "Event_Type", "action"])
def test_a_column_of_types_is_not_left_unread(load: Any, name: str) -> None:
    text = shop().rename(columns={"event": name}).to_csv(index=False)
    with pytest.raises(DataError, match="event_weights, such as purchase=5 click=1") as raised:
        load(text)
    assert "view=exposed" in str(raised.value)
    assert raised.value.setting == "event_weights"
    assert load(text, event_weights=WEIGHTS).counts()["events"]
    assert name in load(text, columns={name: name}).events.columns
    for other in ("click", range(400)):  # A log of clicks; something else.
        text = shop().assign(event=other).rename(columns={"event": name}).to_csv(index=False)
        assert f"columns not read: {name}" in load(text).notes[0]


def test_columns_that_are_lists_or_records_are_left_unread() -> None:
    table = pa.table({"user_id": [1, 1], "item_id": [2, 3], "a": [["view"], ["buy"]]})
    table = table.append_column("event", pa.array([{"x": 1}, {"x": 2}]))
    assert "columns not read: a, event" in Log.from_table(table).notes[0]


@pytest.mark.parametrize(("options", "message"), [
    ({"event_weights": {"purchse": 5}}, r"event_weights.purchse: no row .* mean 'purchase'\?"),
    ({"event_weights": {"VIEW": 1, "click": 1}}, r"weights.VIEW: no row .* mean 'view'\?"),
    ({"event_weights": {"purchase": 5, "page_view": 1}}, r"page_view: .* mean 'view'\?"),
    ({"event_weights": {"kauf": 5}}, "no row has a type with a weight. The types are click, p"),
    ({"event_weights": {"view": "exposed"}}, "is a positive"),
    ({"event_weights": {"view": "hidden"}}, "above 0, or one of retrieved"),
    ({"event_weights": {"view": "shown"}}, "got 'shown'; must be the weight of a positive"),
    ({"event_weights": {"view": 0}}, "got 0; must be the weight"),
    ({"event_weights": WEIGHTS, "label": {"x": 1}}, "and so does label: set one"),
    ({"event_weights": WEIGHTS, "columns": {"stage": "event"}}, "leave stage out"),
    ({"event_weights": WEIGHTS, "columns": {"event": "what"}}, "no column 'what'"),
    ({"event_weights": WEIGHTS, "request_features": {"event": "categorical"}}, "an outcome"),
    ({"label": {"event": 1}}, "types of events, name its column event"),
    ({"columns": {"stage": "event"}}, "types of events, name the column event"),
])  # fmt: skip
def test_what_is_refused(load: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(shop().to_csv(index=False), **options)


def test_the_column_of_types_must_be_found(load: Any) -> None:
    frame = shop().rename(columns={"event": "what"})
    with pytest.raises(DataError, match=r"none has a usual name.*Add event=COLUMN to columns"):
        load(frame.to_csv(index=False), event_weights=WEIGHTS)
    log = load(frame.to_csv(index=False), event_weights=WEIGHTS, columns={"event": "what"})
    assert log.counts()["events"] == (frame["what"] != "scroll").sum()
    both = frame.assign(action="x", event_type="y").to_csv(index=False)
    with pytest.raises(DataError, match="action and event_type may be it"):
        load(both, event_weights=WEIGHTS)
