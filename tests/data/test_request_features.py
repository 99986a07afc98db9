"""Request features: their values at an event, and in the queries of a holdout."""

import dataclasses
import functools
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.small_log import arguments, column
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.request_features import at_request
from tfrs_pipeline.data.schema import DataError

FEATURES = {name: "categorical" for name in ("device", "speed", "hour", "weekday")}
FEATURES["speed"] = "numeric"
NUM = 200
START = datetime(2024, 2, 26, 22, tzinfo=UTC)  # A Monday, at the end of a February of 29 days.


@functools.cache
def rows() -> list[dict[str, Any]]:
    """Returns events of requests that take up to two hours; each event has its own device."""
    rng = np.random.default_rng(0)
    starts = [START + timedelta(minutes=float(x)) for x in rng.integers(0, 20_000, NUM)]
    return [
        {
            "user_id": int(rng.integers(12)),
            "item_id": int(rng.integers(30)),
            "request_id": [None, number // 3][int(number % 5 > 0)],
            "timestamp": starts[number // 3] + timedelta(minutes=float(rng.integers(120))),
            "device": [None, "web", "app"][rng.integers(3)],
            "speed": float(rng.integers(9)),
        }
        for number in range(NUM)
    ]


def made(table: list[dict[str, Any]], features: dict[str, str], **options: Any) -> Log:
    table_of = pa.Table.from_pylist(table)
    return Log.from_table(table_of, request_features=features, **arguments(**options))


@pytest.fixture(scope="module")
def log() -> Log:
    return made(rows(), FEATURES)


def expected(number: int) -> dict[str, Any]:
    """Returns the request features of an event, with hour and weekday by Python's calendar."""
    event = rows()[number]
    request = event["request_id"], event["user_id"]
    same = [x for x in rows() if event["request_id"] and (x["request_id"], x["user_id"]) == request]
    time = min(x["timestamp"] for x in [event, *same])
    own = {"device": event["device"], "speed": event["speed"]}
    return {**own, "hour": time.hour, "weekday": time.weekday()}


def test_hour_and_weekday_are_those_of_the_start_of_the_request(log: Log) -> None:
    values = log.events.select("event_number", **at_request(log.events, log.request_features))
    for row in values.to_pyarrow().to_pylist():
        assert expected(row.pop("event_number")) == row
    assert not {"hour", "weekday"} & set(log.events.columns)


def test_a_column_of_the_log_is_not_made_of_the_timestamp() -> None:
    table = [{**row, "hour": f"local {number % 24}"} for number, row in enumerate(rows())]
    log = made(table, {"hour": "categorical"})
    values = log.events.select("event_number", **at_request(log.events, log.request_features))
    assert column(values, "hour") == [row["hour"] for row in table]


def test_a_query_asks_with_the_request_of_its_first_positive(log: Log) -> None:
    split = log.split("last_share", validation=0.2, test=0.3)
    test = split.holdout("test")
    events = rows()
    order = sorted(range(NUM), key=lambda i: (events[i]["timestamp"], i))
    parts = split.events.select("event_number", "part").to_pandas().set_index("event_number")
    assert test.requests is not None
    for query, request in zip(test.as_queries(), test.requests, strict=True):
        theirs = [i for i in order if events[i]["user_id"] == query["user_id"]]
        first = next(i for i in theirs if parts["part"].get(i) == "test")
        assert request == expected(first)
        assert query["request"] == {**request, "timestamp": events[first]["timestamp"]}
    drawn, sampled = split.holdout("test", 5, seed=1), test.sample(5, seed=2)
    of_user = dict(zip(test.user_ids.tolist(), test.requests, strict=True))
    for part in (drawn, sampled):
        assert part.requests == [of_user[user] for user in part.user_ids.tolist()]


def test_a_written_log_keeps_its_request_features(log: Log, tmp_path: Path) -> None:
    log.write(tmp_path)
    again = Log.read(tmp_path)
    assert dict(again.request_features) == FEATURES
    assert again.split().test.requests == log.split().test.requests


def test_what_cannot_be_read_is_missing_and_counted() -> None:
    table = [{**row, "speed": "fast" if i == 7 else "3"} for i, row in enumerate(rows())]
    log = made(table, {"speed": "numeric"}, columns={"place": "device"})
    assert column(log.events, "speed") == [None if i == 7 else 3.0 for i in range(NUM)]
    assert not log.dropped
    assert any("'speed'" in note and "1 rows: taken as missing" in note for note in log.notes)
    assert "place" in log.events.columns
    table = [{**row, "speed": "fast"} for row in table]
    with pytest.raises(DataError, match=r"\(0.1\) of the values are taken as missing instead"):
        made(table, {"speed": "numeric"})


LABEL, USERS = {"is_click": 1.0}, pa.table({"user_id": range(12), "device": ["web"] * 12})
OF_USERS = {"users": USERS, "user_features": {"device": "categorical"}}
# Outcomes stay outcomes under other names: place is the rank, reached is the stage.
RENAMED = {"rank": "place", "stage": "reached", "is_click": "liked", "level": "reached"}


@pytest.mark.parametrize(("name", "kind", "options", "message"), [
    *((name, "numeric", {}, rf"request_features.{name}: .*known")
      for name in ("rank", "weight", "stage", "event_number", "timestamp", "_wait")),
    ("is_click", "numeric", {"label": LABEL}, "an outcome or a user feature"),
    ("wat", "numeric", {}, "no column 'wat'. Nearest: wait"),
    ("wait", "number", {}, "'wait' has .*'number'"),
    ("device", "categorical", OF_USERS, "request_features.device: is one of .* a user feature"),
    *((name, "categorical", {"columns": RENAMED, "label": LABEL}, f"{name}: is read as {own},")
      for name, own in (("place", "rank"), ("reached", "stage"), ("level", "stage"))),
    ("liked", "numeric", {"columns": RENAMED, "label": LABEL}, "is read as is_click, .* outc"),
])  # fmt: skip
def test_a_feature_that_no_request_can_bring_is_refused(
    name: str, kind: str, options: dict[str, Any], message: str
) -> None:
    more = {"is_click": 1.0, "wait": 2.0}
    if "columns" in options:
        more = {"place": 1, "reached": "clicked", "liked": 1.0}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=message):
        made([{**row, **more} for row in rows()], {name: kind}, **options)


def test_names_that_differ_in_case_alone_are_refused() -> None:
    """An engine treats them as equal, so samples would lose the log's own weights or stages."""
    table = [{**row, "Seconds": 1.0, "Is_Target": 2.0} for row in rows()]
    for name in ("Weight", "WEIGHT", "Part", "Stage"):
        own = name.casefold()
        renamed = [{k: v for k, v in row.items() if k != own} | {name: 2.0} for row in table]
        with pytest.raises(ValueError, match=rf"request_features.{name}: differs .* in case"):
            made(renamed, {name: "numeric"})
    with pytest.raises(ValueError, match=r"request_features.hour: differs from Hour in case"):
        made(table, {"Hour": "numeric", "hour": "numeric"})
    told = r"columns.WEIGHT: differs from the log's own .*'weight'.* write weight=WEIGHT in columns"
    with pytest.raises(ValueError, match=told):
        made(table, {}, columns={"WEIGHT": "Seconds"})
    # The names of a query's internal columns are allowed.
    split = made(table, {"Seconds": "numeric", "Is_Target": "numeric"}).split("last_n")
    requests = split.test.requests or []
    assert {tuple(request.values()) for request in requests} == {(1.0, 2.0)}


def test_a_feature_may_have_another_name_in_the_log() -> None:
    """Its column may even have the name of one of the log's own that is read from elsewhere."""
    columns = {"device": "rank", "rank": "place", "timestamp": "at"}
    table = [{columns.get(x, x): y for x, y in row.items()} | {"place": 1} for row in rows()]
    found = made(table, FEATURES, columns=columns).split().test.requests
    assert found == made(rows(), FEATURES).split().test.requests


@pytest.mark.parametrize("is_rising", [True, False])
def test_request_numbers_that_start_again_are_told(is_rising: bool) -> None:
    """Twenty users ask once a day, for ten days; each request has two clicks."""
    table = [
        {
            "user_id": user,
            "item_id": 20 * day + 2 * user + n,
            "request_id": 1 + day * is_rising,
            "timestamp": START + timedelta(days=day, seconds=n),
        }
        for user in range(20)
        for day in range(10)
        for n in range(2)
    ]
    found = [line for line in made(table, {}).describe() if line.startswith("warning: ")]
    # The second click of the first request is rightly without a history: one in twenty.
    of_all = "380 of 400 positives (95.0%) have no history though their users had clicked before"
    assert [of_all in line for line in found] == ([] if is_rising else [True])
    advice = "the same 'timestamp' or 'request_id' .* visits is session_id, not request_id"
    assert all(re.search(advice, line) for line in found)


def leaking(num: int, odd: int, value: Any, clicked: Any, kind: str) -> list[str]:
    """Describes a log of exposures and as many clicks, whose value `odd` exposures have too."""
    table = [
        {
            "user_id": number % 7,
            "item_id": number,
            "timestamp": START + timedelta(minutes=number),
            "clicked": number % 2,
            "watched": clicked if number % 2 or number < 2 * odd else value,
        }
        for number in range(2 * num)
    ]
    log = made(table, {"watched": kind}, label={"clicked": 1})
    return [line for line in log.describe() if line.startswith("warning: ")]


@pytest.mark.parametrize(
    ("value", "clicked", "kind"),
    [(0.0, 31.5, "numeric"), (None, 31.5, "numeric"), ("", "long", "categorical"),
     (None, "long", "categorical"), ("none", "long", "categorical"), (-1, 5, "bucketized")],
)  # fmt: skip
def test_a_feature_that_is_constant_without_a_click_is_told(
    value: Any, clicked: Any, kind: str
) -> None:
    (told,) = leaking(40, 1, value, clicked, kind)
    assert "column 'watched' is" in told
    assert "in 97.5% of the events that are no positives, but in 0.0% of the positives" in told
    # Known before the click: other exposures have it too, or the clicks have the usual value.
    assert leaking(40, 3, value, clicked, kind) == []
    assert leaking(40, 0, clicked, clicked, kind) == []


def test_a_log_without_times_has_no_hour(log: Log) -> None:
    table = [{"user_id": row["user_id"], "item_id": row["item_id"]} for row in rows()]
    with pytest.raises(DataError, match=r"'hour' is among .* no timestamp to make it from"):
        made(table, {"hour": "categorical"})
    with pytest.raises(DataError, match=r"'weekday' .* cannot be text. Make it one of categ"):
        made(rows(), {"weekday": "text"})
    in_place = Log.from_ibis(log.events, request_features=FEATURES)
    assert in_place.split().test.requests == log.split().test.requests
    with pytest.raises(DataError, match="'device' must hold finite numbers"):
        Log.from_ibis(log.events, request_features={"device": "numeric"})
    with pytest.raises(DataError, match="no column 'place'"):
        dataclasses.replace(log, request_features={"place": "text"})
