"""Dirty input is read correctly or refused: it is never misread, and never causes a crash."""

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.dirty_inputs import DIRT, judge, make_case
from tests.small_log import arguments
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import DataError, Dropped

CLICKS = {"user_id": [n % 7 for n in range(40)], "item_id": [n % 9 for n in range(40)]}


def load(more: dict[str, list[Any]] | None = None, **options: Any) -> Log:
    return Log.from_table(pa.table(CLICKS | (more or {})), **arguments(**options))


def seeds_with_every_dirt() -> Iterator[int]:
    """Yields a few seeds that show every kind of dirt, in an answerable case if it allows one."""
    shown: dict[int, set[str]] = {}
    for seed in range(1000):
        case = make_case(seed)
        kinds = [dirt for dirt in DIRT if dirt.must_refuse or not case.must_refuse]
        shown[seed] = {dirt.name for dirt in kinds} & {*case.dirt}
    left = {dirt.name for dirt in DIRT}
    while left:
        seed = max(shown, key=lambda seed: len(left & shown[seed]))
        assert left & shown[seed]
        left -= shown[seed]
        yield seed


def test_no_dirty_input_is_taken_wrong(tmp_path: Path) -> None:
    wrong, answered = [], Counter[str]()
    for seed in seeds_with_every_dirt():
        case = make_case(seed)
        outcome = judge(case, tmp_path / str(seed))
        if outcome.word not in ("right", "refused"):
            wrong.append(f"seed {seed}, {case.form}, {case.dirt}: {outcome}")
        answered[outcome.word] += not case.must_refuse
    assert not wrong, "\n".join(wrong)
    # Refusing is not good enough if the rows can be dropped or the values read.
    assert answered["right"] >= 0.9 * answered.total()


def test_how_many_bad_rows_are_dropped_is_a_setting() -> None:
    times = [1_700_000_000 + n for n in range(36)] + [0, 1, None, 1_700_000_000]
    log, next_day = load({"timestamp": times}), datetime.now(UTC) + timedelta(days=1)
    assert log.dropped == (
        Dropped(f"column 'timestamp' lies outside 1990-01-01 to {next_day:%Y-%m-%d}", 2),
        Dropped("column 'timestamp' is null", 1),
    )
    assert log.describe()[2] == "dropped 3 of 40 rows"
    for share in (0.0, 0.07):
        with pytest.raises(DataError, match=r"in 2 of 40 rows, such as 0, 1 .first: ") as raised:
            load({"timestamp": times}, max_bad_share=share)
        assert raised.value.setting == "earliest_time"
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    assert load({"timestamp": times}, earliest_time=epoch).dropped[0].num_rows == 1
    times[37] = int((datetime.now(UTC) + timedelta(days=2)).timestamp())
    assert load({"timestamp": times}).dropped[0].num_rows == 2


def test_what_is_kept_is_counted_too() -> None:
    items = pa.table({"item_id": [*range(8), 20], "price": [1.0, None, *range(7)]})
    told = " ".join(load(items=items, item_features={"price": "numeric"}).describe())
    assert "item table: column 'price' is missing in 1 of 9 rows (11.1%)" in told
    assert "4 of 40 events (10.0%) are of 1 item that item table lacks, such as 8: kept" in told
    assert "dropped nothing" in told
    # A request feature's missing values are counted like an item feature's, over the kept rows.
    times, pages = [None, *[1_700_000_000] * 39], [None, None, "a", *["b"] * 37]
    asked = {"columns": {"page": "where"}, "request_features": {"page": "categorical"}}
    log = load({"where": pages, "timestamp": times}, **asked)
    assert "event table: column 'where' is missing in 1 of 39 rows (2.6%)" in log.notes
    repeated = {"user_id": [1, 1, 2], "item_id": [1, 1, 1]}
    notes = load({**repeated, "page": [1, 2, 3]}).notes
    assert notes[0] == "event table: columns not read: page"
    assert notes[-1] == "1 of 3 events repeat an earlier one in user_id, item_id, stage: kept"


@pytest.mark.parametrize("name", ["timestmp", "itemid", "_row", "event_number"])
def test_a_name_that_means_something_else_is_no_context(name: str) -> None:
    with pytest.raises(ValueError, match=r"did you mean '(timestamp|item_id)'|rename the column"):
        load({"x": list(range(40))}, columns={name: "x"})


HEADERS = "Stage stages Timestamp time_stamp Request_ID time Date ts created_at"


@pytest.mark.parametrize("header", HEADERS.split())
def test_a_header_that_is_nearly_one_of_the_logs_is_refused(header: str) -> None:
    column = {header: list(range(1_700_000_000, 1_700_000_040))}
    with pytest.raises(DataError, match=rf"column '{header}' is not read; did you mean '"):
        load(column)
    assert load(column, columns={"page": header}).events.columns[-1] == "page"


def test_a_time_by_another_name_is_read_if_it_is_named() -> None:
    header, column = "ts", {"ts": list(range(1_700_000_000, 1_700_000_040))}
    assert "timestamp" in load(column, columns={"timestamp": header}).events.columns
    # Next to a timestamp it is an ordinary column.
    both: dict[str, list[Any]] = {"timestamp": column[header], header: ["late"] * 40}
    assert load(both).notes[0] == f"event table: columns not read: {header}"
    mistyped = {"when": column[header]}
    with pytest.raises(DataError, match=r"columns.time: did you mean 'timestamp'"):
        load(mistyped, columns={"time": "when"})
    assert load(mistyped | {"timestamp": column[header]}, columns={"time": "when"}).is_ordered
