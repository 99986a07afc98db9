"""RecFlow: stages and ranks against a slow loop over the rows, and what is refused."""

import logging
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.feather
import pytest

from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.sources.recflow import COLUMNS, ITEM_COLUMNS, USER_COLUMNS
from tfrs_pipeline.sources.recflow import load_recflow as load

FLAGS = [
    "realshow",
    "rerank_pos",
    "rerank_neg",
    "rank_pos",
    "rank_neg",
    "coarse_neg",
    "prerank_neg",
]
OUTCOMES = ["playing_time", "effective_view", "long_view", "like", "follow", "forward", "comment"]
DAY_MS = 86_400_000
START_MS = 1_705_104_000_000  # 2024-01-13, UTC

Row = dict[str, int]


def make_row(**values: int) -> Row:
    """Makes a row without any flag: rows of a published file have all columns."""
    ids = {"request_id": 1, "request_timestamp": START_MS, "user_id": 1, "video_id": 1}
    return {**dict.fromkeys(COLUMNS, 0), **ids, **values}


def make_days(seed: int, num_days: int = 3, num_rows: int = 400) -> list[list[Row]]:
    """Draws days of rows with all kinds of flags, ids met again and again, in no order of time."""
    rng = random.Random(seed)
    days = [
        [
            make_row(
                request_id=rng.randrange(40),
                request_timestamp=START_MS + day * DAY_MS + rng.randrange(50) * 1000 + 7,
                user_id=rng.randrange(6),
                video_id=rng.randrange(25),
                rank_index=rng.randrange(-1, 12),
                rerank_index=rng.randrange(-1, 12),
                **{name: rng.randrange(3) for name in (*ITEM_COLUMNS, *USER_COLUMNS)},
                **{name: int(rng.random() < 0.2) for name in FLAGS},
                **{name: int(rng.random() < 0.5) for name in OUTCOMES},
            )
            for _ in range(num_rows)
        ]
        for day in range(num_days)
    ]
    for row in (row for day in days for row in day):
        # What a row without a flag is of does not enter, nor what an unexposed one says of clicks.
        row["video_id"] = 99 if stage_of(row) is None else row["video_id"]
        row["effective_view"] = row["effective_view"] if row["realshow"] else rng.choice([-1, 1])
    return days


def write(folder: Path, stage: str, days: list[list[Row]], types: Any = None) -> None:
    """Writes a file a day, in small batches, so that a scan of many batches must keep its order."""
    (folder / stage).mkdir(exist_ok=True)
    for day, rows in enumerate(days):
        columns = {
            name: pa.array([row[name] for row in rows], (types or {}).get(name, pa.int64()))
            for name in rows[0]
        }
        pa.feather.write_feather(
            pa.table(columns), folder / stage / f"2024-01-{13 + day}.feather", chunksize=64
        )


def stage_of(row: Row, label: tuple[str, ...] = ("effective_view",)) -> str | None:
    """Says how far an item came, from the furthest stage back."""
    if row["realshow"]:
        return "clicked" if any(row[name] for name in label) else "exposed"
    if row["rerank_pos"] or row["rerank_neg"] or row["rank_pos"]:
        return "ranked"
    if row["rank_neg"] or row["coarse_neg"]:
        return "pre_ranked"
    return "retrieved" if row["prerank_neg"] else None


def rank_of(row: Row) -> int | None:
    if row["realshow"] or row["rerank_pos"] or row["rerank_neg"]:
        index = row["rerank_index"]
    elif row["rank_pos"] or row["rank_neg"]:
        index = row["rank_index"]
    else:
        return None
    return None if index < 0 else index


def expected_events(days: list[list[Row]], label: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = [row for day in days for row in day]
    return [
        {
            "user_id": row["user_id"],
            "item_id": row["video_id"],
            "timestamp": datetime(1970, 1, 1, tzinfo=UTC)
            + timedelta(milliseconds=row["request_timestamp"]),
            "event_number": number,
            "stage": stage_of(row, label),
            "request_id": row["request_id"],
            "rank": rank_of(row),
        }
        for number, row in enumerate(row for row in rows if stage_of(row) is not None)
    ]


def events_of(tables: Log) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tables.events.order_by("event_number").to_pyarrow().to_pylist()
    return found


def test_events_equal_a_loop_over_the_rows(tmp_path: Path) -> None:
    """Of small integers, as the files have them, and with a day that has no rows."""
    days = make_days(0)
    small = dict.fromkeys([*FLAGS, *OUTCOMES, "rank_index", "rerank_index"], pa.int8())
    write(tmp_path, "all_stage", days, small)
    empty = pa.table({name: pa.array([], pa.int64()) for name in COLUMNS})
    pa.feather.write_feather(empty, tmp_path / "all_stage" / "2024-01-01.feather")
    tables = load(tmp_path)
    expected = expected_events(days, ("effective_view",))
    assert events_of(tables) == expected
    (dropped,) = tables.dropped
    assert dropped.num_rows == sum(map(len, days)) - len(expected)
    assert "no flag" in dropped.reason
    # A connection that has loaded it before, such as a file, holds no row twice.
    connection = ibis.duckdb.connect()
    for _ in range(2):
        assert events_of(load(tmp_path, connection=connection)) == expected


def test_a_label_of_several_outcomes_gives_stages_and_weights(tmp_path: Path) -> None:
    days = make_days(2)
    write(tmp_path, "all_stage", days)
    found = events_of(load(tmp_path, label={"like": 2.0, "long_view": 0.5}))
    expected = expected_events(days, ("like", "long_view"))
    rows = [row for day in days for row in day if stage_of(row) is not None]
    for event, wanted, row in zip(found, expected, rows, strict=True):
        weight = 2.0 * row["like"] + 0.5 * row["long_view"]
        assert {name: event[name] for name in wanted} == wanted
        assert event["weight"] == (weight if wanted["stage"] == "clicked" else 1.0)


FURTHEST: list[tuple[list[str], str, int | None]] = [
    (["prerank_neg"], "retrieved", None),
    (["coarse_neg"], "pre_ranked", None),
    (["rank_neg"], "pre_ranked", 30),
    (["rank_pos"], "ranked", 30),
    (["rerank_neg"], "ranked", 4),
    (["rerank_pos"], "ranked", 4),
    (["realshow"], "exposed", 4),
    (["realshow", "prerank_neg"], "exposed", 4),  # Exposed is exposed, whatever else is said.
    (["realshow", "rerank_neg", "rank_neg"], "exposed", 4),
    (["coarse_neg", "prerank_neg"], "pre_ranked", None),
    (["rank_pos", "rank_neg"], "ranked", 30),
]


def test_the_furthest_stage_counts(tmp_path: Path) -> None:
    rows = [
        # Whatever it says of an outcome: without exposure it is no positive.
        make_row(
            video_id=3 + i,
            rank_index=30,
            rerank_index=4,
            **dict.fromkeys(flags, 1),
            **({} if "realshow" in flags else {"effective_view": 1, "like": 1}),
        )
        for i, (flags, _, _) in enumerate(FURTHEST)
    ]
    positive = make_row(video_id=2, realshow=1, effective_view=1, like=1)
    # A row without a flag is no event, and what it says of an outcome or an id does not enter.
    unflagged = make_row(video_id=99, user_id=9, effective_view=-1)
    write(tmp_path, "all_stage", [[*rows, positive, rows[0], unflagged]])
    log = load(tmp_path, duplicates="drop")
    found = [(event["stage"], event["rank"]) for event in events_of(log)]
    assert found == [*((stage, rank) for _, stage, rank in FURTHEST), ("clicked", 0)]
    assert [dropped.num_rows for dropped in log.dropped] == [1, 1]
    assert sorted(log.items.to_pyarrow()["item_id"].to_pylist()) == list(range(2, 14))
    assert log.users.to_pyarrow()["user_id"].to_pylist() == [1]
    liked = [event["stage"] for event in events_of(load(tmp_path, label={"like": 1.0}))]
    assert liked[:-1] == [*(stage for _, stage, _ in FURTHEST), "clicked"]


def test_the_latest_row_describes_an_item_and_a_user(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    days = make_days(3)
    write(tmp_path, "all_stage", days)
    with caplog.at_level(logging.INFO, "tfrs_pipeline"):
        tables = load(
            tmp_path,
            item_features={"author_id": "categorical", "duration": "numeric"},
            user_features={"age": "categorical"},
        )
    for id_column, columns, name, table in (
        ("video_id", ("author_id", "duration"), "videos", tables.items.rename(id="item_id")),
        ("user_id", ("age",), "users", tables.users.rename(id="user_id")),
    ):
        latest: dict[int, tuple[int, list[int]]] = {}
        values: dict[int, set[tuple[int, ...]]] = {}
        for row in (row for day in days for row in day if stage_of(row) is not None):
            time, entry = row["request_timestamp"], [row[column] for column in columns]
            values.setdefault(row[id_column], set()).add(tuple(entry))
            if row[id_column] not in latest or latest[row[id_column]][0] <= time:
                latest[row[id_column]] = (time, entry)
        found = {
            row["id"]: [row[column] for column in columns] for row in table.to_pyarrow().to_pylist()
        }
        assert found == {id_: entry for id_, (_, entry) in latest.items()}
        num_changed = sum(len(entries) > 1 for entries in values.values())
        assert f"{num_changed} of {len(latest)} {name} have rows that differ" in caplog.text
    assert tables.items.schema()["duration"].is_float64()
    assert tables.items.schema()["author_id"].is_int64()


# Which files


def test_all_stage_is_read_before_realshow(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    positive = make_row(realshow=1, effective_view=1)
    write(tmp_path, "realshow", [[positive], [positive], [positive]])
    tables = load(tmp_path)
    assert [event["stage"] for event in events_of(tables)] == ["clicked"] * 3
    assert "no losers" in caplog.text
    write(tmp_path, "all_stage", [[positive, make_row(video_id=5, prerank_neg=1)]])
    (tmp_path / "all_stage" / ".DS_Store").touch()
    # The first day has all stages now, the others still what was shown.
    assert [event["item_id"] for event in events_of(load(tmp_path))] == [1, 5, 1, 1]
    assert "2 days are read from realshow" in caplog.text
    assert "2024-01-14.feather" in caplog.text


def test_files_that_are_no_days_are_refused(tmp_path: Path) -> None:
    (tmp_path / "all_stage").mkdir()
    with pytest.raises(DataError, match=r"no all_stage/YYYY-MM-DD\.feather"):
        load(tmp_path)
    (tmp_path / "all_stage" / "2024-01-13.feather").write_text("user_id\n1\n")
    with pytest.raises(DataError, match=r"2024-01-13\.feather cannot be read as Feather"):
        load(tmp_path)
    (tmp_path / "all_stage" / "2024-01-13.feather").unlink()
    write(tmp_path, "all_stage", [[make_row(realshow=1, effective_view=1)]])
    for name in ("2024-1-13.feather", "2024-02-30.feather", "days.parquet"):
        wrong = tmp_path / "all_stage" / name
        wrong.touch()
        with pytest.raises(DataError, match=rf"{name}: .*2024-01-13\.feather"):
            load(tmp_path)
        wrong.unlink()


# Values


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"rank_neg": 2}, {}, "column 'rank_neg' is not 0 or 1 in 1 of 3 rows"),
        ({"realshow": None}, {}, "column 'realshow' is not 0 or 1 in 1 of 3 rows"),
        ({"realshow": 1, "effective_view": 7}, {}, "'effective_view' is not 0 or 1 in 1 of 3"),
        ({"request_timestamp": START_MS // 1000}, {},
         "'request_timestamp' does not hold milliseconds"),
        ({"video_id": None}, {}, "'video_id' is null in 1 of 3"),
        ({"request_id": None}, {}, "'request_id' is null in 1 of 3"),
        ({"video_id": -1, "realshow": 1}, {},
         r"'video_id' is -1 \(reserved for empty slots\) in 1 of 3 rows"),
        ({}, {"label": {"longview": 1.0}}, "no column 'longview'. Nearest: long_view"),
        ({}, {"label": {"realshow": 1.0}}, "no column 'realshow'"),
        ({}, {"item_features": {"author": "categorical"}},
         "no column 'author'. Nearest: author_id"),
        ({}, {"user_features": {"author_id": "categorical"}}, "no column 'author_id'"),
        ({}, {"item_features": {"author_id": "text"}}, "'author_id' must be a string, it is int64"),
    ],
)  # fmt: skip
def test_values_and_settings_that_are_refused(
    tmp_path: Path, values: Any, options: Any, message: str
) -> None:
    good = make_row(realshow=1, effective_view=1)
    write(tmp_path, "all_stage", [[good, {**good, **values}, good]])
    with pytest.raises(DataError, match=message):
        load(tmp_path, **options)


def test_a_missing_column_and_a_wrong_type_are_refused(tmp_path: Path) -> None:
    row = make_row(realshow=1, effective_view=1)
    write(tmp_path, "all_stage", [[row]], {"age": pa.float64()})
    with pytest.raises(DataError, match=r"column 'age' must be an integer, it is double \(1 rows"):
        load(tmp_path)
    write(tmp_path, "all_stage", [[{k: v for k, v in row.items() if k != "rerank_neg"}]])
    with pytest.raises(DataError, match=r"no column 'rerank_neg'. Nearest: prerank_neg, rank_neg"):
        load(tmp_path)


def test_a_log_without_flags_or_without_positives_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "all_stage", [[make_row(), make_row()]])
    with pytest.raises(DataError, match="none of 2 rows has a flag"):
        load(tmp_path)
    write(tmp_path, "all_stage", [[make_row(realshow=1)]])
    with pytest.raises(DataError, match="none of 1 rows is a positive"):
        load(tmp_path)
