"""Dirty input is read correctly or refused: it is never misread, and never causes a crash."""

import csv
import functools
import gzip
import io
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.small_log import arguments
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import DataError, Dropped

CLICKS = {"user_id": [n % 7 for n in range(40)], "item_id": [n % 9 for n in range(40)]}


def load(more: dict[str, list[Any]] | None = None, **options: Any) -> Log:
    return Log.from_table(pa.table(CLICKS | (more or {})), **arguments(**options))


# A clean log, which each test makes dirty; a distinct second for each event.
NUM_ROWS, START, UNITS = 200, 1_672_617_600, {"s": 1, "ms": 1_000, "us": 1_000_000}
TEXT, TYPED = ("csv", "csv.gz"), ("parquet", "pandas")
FORMS = (*TEXT, *TYPED)
NAN, INF, LONG = float("nan"), float("inf"), "x" * 100_000 + "\x1b[2J"
Table = dict[str, list[Any]]
Row = tuple[str, str, int | None, str, float]
# A form of the times, or a column beside ids and times -> how it is read.
READ_AS: dict[str, dict[str, Any]] = {
    "ms": {"timestamp_unit": "ms"},
    "naive": {"time_zone": "UTC"},
    "rating": {"rating_threshold": 4},
    "liked": {"label": {"liked": 1.0}},
}


def moment(seconds: int, way: str) -> Any:
    """Writes a time as a number in a unit, as text, or as a timestamp."""
    stamp = datetime.fromtimestamp(seconds, UTC)
    return seconds * UNITS[way] if way in UNITS else f"{stamp:%F %T}" + "Z" * (way == "zoned")


def clean(ids: str = "int", time: str = "s", more: str = "") -> tuple[Table, list[Row]]:
    """Returns the columns of a clean log, and what a log should make of each row."""
    user, item = ("{}", "{}") if ids == "int" else ("u{}", "i{}")
    numbers = [(1 + n % 7, 1 + n % 9, START + 100 * n) for n in range(NUM_ROWS)]
    rows: list[Row] = [(user.format(u), item.format(i), t, "clicked", 1.0) for u, i, t in numbers]
    as_id: Any = int if ids == "int" else str
    table: Table = {"user_id": [as_id(x[0]) for x in rows], "item_id": [as_id(x[1]) for x in rows]}
    table["timestamp"] = [moment(t, time) for *_, t in numbers]
    values: dict[str, Any] = {"rating": 4, "liked": 1.0, "weight": 1.0}
    columns = {"stage": "clicked", "request_id": 0, "rank": 1}
    if more != "stage":
        columns = {more: values[more]} if more else {}
    return table | {name: [value] * NUM_ROWS for name, value in columns.items()}, rows


def as_csv(table: Mapping[str, list[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(
        ["" if x is None else x for x in row] for row in zip(*table.values(), strict=True)
    )
    return text.getvalue().encode()


def as_table(table: Mapping[str, list[Any]]) -> pa.Table:
    is_large = {n: any(type(x) is int and x >= 2**63 for x in v) for n, v in table.items()}
    return pa.table(
        {n: pa.array(v, pa.uint64() if is_large[n] else None) for n, v in table.items()}
    )


def content(table: Mapping[str, list[Any]], form: str) -> bytes:
    if form == "parquet":
        pq.write_table(as_table(table), sink := io.BytesIO(), row_group_size=20)
        return sink.getvalue()
    return gzip.compress(as_csv(table)) if form == "csv.gz" else as_csv(table)


def read(table: Table, form: str, folder: Path, *, raw: bytes | None = None, **options: Any) -> Log:
    """Writes a table, or the bytes given instead, in a form, and reads it."""
    if form == "pandas":
        return Log.from_table(as_table(table).to_pandas(), **arguments(**options))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"events.{form}"
    path.write_bytes(content(table, form) if raw is None else raw)
    return Log.from_files(path, **arguments(**options))


def rows_of(log: Log) -> list[Row]:
    return [
        (
            str(row["user_id"]),
            str(row["item_id"]),
            row.get("timestamp") and int(row["timestamp"].timestamp()),
            row["stage"],
            row.get("weight", 1.0),
        )
        for row in log.events.order_by("event_number").to_pyarrow().to_pylist()
    ]


def refusal(read_it: Callable[[], Log], *names: str) -> None:
    """Checks that a log is refused in one short line, which names the table and the column."""
    with pytest.raises(DataError) as raised:
        read_it().describe()
    message = str(raised.value)
    assert any(table in message for table in ("event table", "events.", "items.")), message
    assert any(name in message for name in names), message
    assert len(message) <= 1500
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", message)


IMPLAUSIBLE = [0, -5, 3 * 10**10]
DAYS = ["1970-01-01", "0001-01-01", "9999-12-31", "12023-01-01", "2262-04-12", "0044-03-15 (BC)"]
WORDS = ["nan", "None", "NaN", "<NA>", "null"]
NO_TIMES = ["yesterday", "31/01/2023", "2023-13-01", "12:30", "N/A", LONG]
NUMBERS_IN_TEXT = ["inf", "nan", "1e300", "-inf", *NO_TIMES[:5]]
ZONED = [f"{day} 00:00:00Z" for day in DAYS] + ["infinity"]
NAIVE = [f"{day} 00:00:00" for day in DAYS] + ["-infinity"]
WEIGHTS = [None, 0.0, -1.0, INF, NAN, 1e38]
# What the log is like, the values of its dirty cells by column, and the forms that can hold them.
LOST: list[tuple[dict[str, str], dict[str, list[Any]], tuple[str, ...]]] = [
    ({}, {"user_id": [None, -1], "item_id": [None, -1], "timestamp": [None, *IMPLAUSIBLE]}, FORMS),
    ({"ids": "str"}, {"user_id": [None, "", *WORDS], "item_id": [None, "", *WORDS]}, FORMS),
    ({}, {"user_id": WORDS, "timestamp": NUMBERS_IN_TEXT}, ("csv",)),
    ({"ids": "str"}, {"user_id": ["a\nb"]}, ("csv",)),
    ({"time": "ms"}, {"timestamp": [1000 * x for x in IMPLAUSIBLE]}, ("parquet",)),
    ({"time": "zoned"}, {"timestamp": [None, *NO_TIMES, *ZONED]}, ("csv", "parquet")),
    ({"time": "naive"}, {"timestamp": [None, *NO_TIMES, *NAIVE]}, ("csv", "parquet")),
    ({"more": "rating"}, {"rating": [None, "nan", "inf", "good", LONG]}, ("csv",)),
    ({"more": "rating"}, {"rating": [None, NAN]}, TYPED),
    ({"more": "liked"}, {"liked": ["nan", "inf", "maybe"]}, ("csv",)),
    ({"more": "liked"}, {"liked": [NAN, INF]}, ("parquet",)),
    ({"more": "stage"}, {"stage": [None], "rank": ["first", "inf"]}, ("csv",)),
    ({"more": "stage"}, {"stage": [None], "rank": [INF]}, TYPED),
    ({"more": "weight"}, {"weight": [*WEIGHTS, "heavy"]}, ("csv",)),
    ({"more": "weight"}, {"weight": WEIGHTS}, TYPED),
]


@pytest.mark.parametrize(("kind", "bad", "forms"), LOST)
def test_a_bad_cell_costs_its_row_alone(
    tmp_path: Path, kind: dict[str, str], bad: dict[str, list[Any]], forms: tuple[str, ...]
) -> None:
    table, rows = clean(**kind)
    cells = [(column, value) for column, values in bad.items() for value in values]
    for n, (column, value) in enumerate(cells):
        table[column][7 + 9 * n] = value
    rows = [row for n, row in enumerate(rows) if n % 9 != 7 or n >= 9 * len(cells)]
    options = READ_AS.get(kind.get("more") or kind.get("time", ""), {})
    for form in forms:
        log = read(table, form, tmp_path, **options)
        assert rows_of(log) == rows, form
        assert sum(dropped.num_rows for dropped in log.dropped) == len(cells), form


@pytest.mark.parametrize("form", TEXT)
def test_a_bad_line_costs_its_row_alone(tmp_path: Path, form: str) -> None:
    table, rows = clean("str")
    lines = as_csv(table).split(b"\n")
    lines[31], lines[61], lines[91] = lines[31] + b",x", b"1", b"\xff\xfe" + lines[91]
    raw = b"\r\n".join(lines)
    log = read(table, form, tmp_path, raw=gzip.compress(raw) if form == "csv.gz" else raw)
    assert rows_of(log) == [row for n, row in enumerate(rows) if n not in (30, 60, 90)]
    assert sum(dropped.num_rows for dropped in log.dropped) == 3


TEXT_CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "windows line ends": lambda text: text.replace(b"\n", b"\r\n"),
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "empty lines": lambda text: text + b"\n\n",
    "white space around ids": lambda text: re.sub(rb"\n(\w+),(\w+)", rb"\n \1\t, \2\t", text),
    "ids as floats": lambda text: re.sub(rb"\n(\d+),(\d+)", rb"\n\1.0,\2", text, count=30),
}


@pytest.mark.parametrize("change", TEXT_CHANGES.values(), ids=TEXT_CHANGES)
def test_text_is_read_in_any_dress(tmp_path: Path, change: Any) -> None:
    table, rows = clean()
    log = read(table, "csv", tmp_path, raw=change(as_csv(table)))
    assert (rows_of(log), log.dropped) == (rows, ())


@pytest.mark.parametrize("form", FORMS)
def test_what_looks_odd_is_read_as_it_is(tmp_path: Path, form: str) -> None:
    table, rows = clean(more="liked")
    within = ("_row", "_fault", "_copy", "event_number", "num_positives")
    table |= {name: [*range(NUM_ROWS, 0, -1)] for name in within}
    table["liked"][5] = None  # No outcome is no click.
    rows[5] = (*rows[5][:3], "exposed", 1.0)
    if form == "pandas":
        table["user_id"] = [float(x) for x in table["user_id"]]
    else:
        table["user_id"] = [2**63 + n if form == "parquet" else "007" for n in range(NUM_ROWS)]
        rows = [(str(x), *row[1:]) for x, row in zip(table["user_id"], rows, strict=True)]
    # A folder may be named like a column.
    log = read(table, form, tmp_path / "user_id=7", **READ_AS["liked"])
    assert (rows_of(log), log.dropped) == (rows, ())


# Names that look like patterns -> a file that the pattern would match.
MATCHES = {"log[1]": "log1", "a*b": "axb", "who?": "whom", "[a-z]": "q", "{a,b}": "a"}


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    table, rows = clean()
    for name, other in MATCHES.items():
        (tmp_path / f"{other}.csv").write_bytes(as_csv({column: [9] for column in table}))
        (tmp_path / f"{name}.csv").write_bytes(as_csv(table))
        assert rows_of(Log.from_files(tmp_path / f"{name}.csv")) == rows


@pytest.mark.parametrize("form", ["csv", "pandas"])
def test_what_has_no_right_answer_is_refused(tmp_path: Path, form: str) -> None:
    def check(table: Table, *names: str, **options: Any) -> None:
        refusal(lambda: read(table, form, tmp_path, **options), *names)

    table, _ = clean()
    check({("user" if x == "user_id" else x): y for x, y in table.items()}, "user_id")
    check(table | {"USER_ID": [1] * NUM_ROWS}, "USER_ID", "user_id")
    check({name: [] for name in table}, "0 rows")
    check(table, "timestamp", timestamp_unit="us")
    check(clean(time="naive")[0], "timestamp")  # No time zone is given.
    funnel, _ = clean(more="stage")
    for stage in ("liked", "Clicked"):
        check(funnel | {"stage": ["clicked"] * 150 + [stage] * 50}, "stage")


def test_broken_files_are_refused(tmp_path: Path) -> None:
    (table, _), cut = clean(), ("cannot be read", "0 rows")
    for form in ("csv.gz", "parquet"):
        raw = content(table, form)
        for size in (0, len(raw) // 2, len(raw) - 9):
            refusal(functools.partial(read, table, form, tmp_path, raw=raw[:size]), *cut)
    raw = content(table, "csv.gz")
    wrong = raw[:-6] + bytes([raw[-6] ^ 1]) + raw[-5:]
    refusal(lambda: read(table, "csv.gz", tmp_path, raw=wrong), "cannot be read")
    lines = as_csv(table).split(b"\n")
    lines[50] = b'"' + lines[50]  # The quote never closes.
    refusal(lambda: read(table, "csv", tmp_path, raw=b"\n".join(lines)), "line", "user_id")
    twice = as_csv(table).replace(b"item_id", b"user_id", 1)
    refusal(lambda: read(table, "csv", tmp_path, raw=twice), "user_id")


ITEMS: Table = {"item_id": [*range(1, 81)], "price": [n / 2 for n in range(80)]}
ITEMS |= {"kind": [f"k{n % 3}" for n in range(80)], "v": [[float(n), 0.5] for n in range(80)]}
KINDS = {"price": "numeric", "kind": "categorical", "v": "vector"}


def with_items(items: Table, form: str, folder: Path, table: Table, **options: Any) -> Log:
    if form == "csv":
        items = items | {"v": [x and "|".join(map(str, x)) for x in items["v"]]}
    (folder / f"items.{form}").write_bytes(content(items, form))
    path = folder / f"items.{form}"
    return read(table, form, folder, items=path, item_features=KINDS, **options)


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_bad_feature_is_missing_and_a_bad_item_is_no_item(tmp_path: Path, form: str) -> None:
    """A row without an id, and a repeated one, change nothing; ids may be floats."""
    bad: list[tuple[str, Any]] = [("price", None), ("price", INF), ("price", NAN), ("v", None)]
    bad += [("v", [1.0]), ("v", [1.0, NAN]), ("v", [1.0, 2.0, 3.0])]
    bad += [("price", "cheap"), ("price", LONG), ("v", [1, "x"])] if form == "csv" else []
    items = {name: [*cells, cells[0], cells[1]] for name, cells in ITEMS.items()}
    items["item_id"] = [float(x) for x in items["item_id"][:-1]] + [None]
    rows = {
        x: dict(zip(ITEMS, row, strict=True))
        for x, row in enumerate(zip(*ITEMS.values(), strict=True))
    }
    for row, (name, value) in enumerate(bad, 1):
        items[name][row] = value
        rows[row][name] = None
    log = with_items(items, form, tmp_path, clean()[0])
    found = {row["item_id"]: row for row in log.items.to_pyarrow().to_pylist()}
    assert found == {row["item_id"]: row | {"_listed": True} for row in rows.values()}
    items["kind"][-2] = "another"
    refusal(lambda: with_items(items, form, tmp_path, clean()[0]), "item_id")


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
    kept = "1 of 3 events repeat an earlier one in user_id, item_id, stage: kept"
    assert notes[-1] == f"{kept} (data.duplicates drop leaves them out)"


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
