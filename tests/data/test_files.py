"""A user's own files: what is read, in what order and type, and what is refused."""

import gzip
import os
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.small_log import arguments
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.reading import Reading
from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.features.categorical import Categorical
from tfrs_pipeline.samples.build import build_samples
from tfrs_pipeline.samples.store import read_samples

CLICKS = "user_id,item_id,timestamp\n7,a,1700000002\n8,b,1700000001\n7,b,1700000000\n"
NAMES = {"user_id": "uid", "item_id": "movie"}


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Writes events (and items) given as text or a table, and makes a log of the files."""

    def run(text: str | pa.Table, items: str | pa.Table | None = None, **options: Any) -> Log:
        paths: dict[str, Path] = {}
        for name, content in (("events", text), ("items", items)):
            if isinstance(content, str):
                paths[name] = tmp_path / f"{name}.csv"
                paths[name].write_text(content, encoding="utf-8")
            elif content is not None:
                paths[name] = tmp_path / f"{name}.parquet"
                pq.write_table(content, paths[name])
        made = arguments(items=paths.get("items"), **options)
        return Log.from_files(paths["events"], **made)

    return run


def column(table: ibis.Table, name: str, order: str = "event_number") -> list[Any]:
    values: list[Any] = table.order_by(order)[name].to_pyarrow().to_pylist()
    return values


def test_clicks(load: Any) -> None:
    tables = load(CLICKS)
    assert column(tables.events, "user_id") == [7, 8, 7]
    assert column(tables.events, "item_id") == ["a", "b", "b"]
    assert column(tables.events, "event_number") == [0, 1, 2]
    assert column(tables.events, "timestamp")[2] == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert column(tables.events, "stage") == ["clicked"] * 3
    assert column(tables.items, "item_id", "item_id") == ["a", "b"]
    assert column(tables.users, "user_id", "user_id") == [7, 8]
    assert tables.dropped == ()


def test_ratings_below_the_threshold_are_exposures(load: Any) -> None:
    text = "uid;movie;stars\n1;2;3.5\n1;3;4\n1;4;4.5\n"
    tables = load(text, columns=NAMES | {"rating": "stars"}, rating_threshold=4)
    assert column(tables.events, "stage") == ["exposed", "clicked", "clicked"]
    assert "timestamp" not in tables.events.columns
    assert "rating" not in tables.events.columns


@pytest.mark.parametrize("dtype", [pa.float32(), pa.float64()])
def test_a_rating_at_the_threshold_is_a_positive_in_any_precision(
    load: Any, dtype: pa.DataType
) -> None:
    # 4.1 is 4.0999999 in float32.
    ratings = pa.array([4.0, 4.1, 4.2], dtype)
    events = pa.table({"user_id": [1] * 3, "item_id": [2, 3, 4], "rating": ratings})
    tables = load(events, rating_threshold=4.1)
    assert column(tables.events, "stage") == ["exposed", "clicked", "clicked"]


def test_a_funnel_log_with_stages_ranks_and_context(load: Any) -> None:
    text = (
        "user_id,item_id,what,request_id,rank,score,page\n"
        '1,10,buy,r1,0,0.5,"home, top"\n1,11,show,r1,1,0.25,home\n1,12,lost,r1,,,home\n'
    )
    tables = load(
        text,
        columns={"stage": "what", "page": "page"},
        stage_values={"buy": "clicked", "show": "exposed", "lost": "pre_ranked"},
    )
    assert column(tables.events, "stage") == ["clicked", "exposed", "pre_ranked"]
    assert column(tables.events, "rank") == [0, 1, None]
    assert column(tables.events, "score") == [0.5, 0.25, None]
    assert column(tables.events, "page") == ["home, top", "home", "home"]
    assert column(tables.events, "request_id") == ["r1"] * 3


def test_a_folder_is_read_in_the_order_of_names_and_rows(tmp_path: Path) -> None:
    num_rows = 50_000  # Several row groups.
    for suffix in ("csv", "parquet"):
        folder = tmp_path / suffix
        folder.mkdir()
        (folder / "_SUCCESS").touch()
        for part, start in (("b", num_rows), ("a", 0)):
            rows = pa.table({"user_id": [1] * num_rows, "item_id": range(start, start + num_rows)})
            if suffix == "csv":
                lines = [f"1,{item}" for item in range(start, start + num_rows)]
                (folder / f"{part}.csv").write_text("\n".join(["user_id,item_id", *lines]))
            else:
                pq.write_table(rows, folder / f"{part}.parquet", row_group_size=8_000)
        tables = Log.from_files(folder)
        events = tables.events
        assert events.count().to_pyarrow().as_py() == 2 * num_rows
        is_moved = events["item_id"] != events["event_number"]
        assert events.filter(is_moved).count().to_pyarrow().as_py() == 0


@pytest.mark.parametrize(
    "ids, expected",
    [
        (["7", "10"], [7, 10]),
        (["7", "x"], ["7", "x"]),
        (["007", "7"], ["007", "7"]),
        (["7.0", "8"], [7, 8]),
        (["7.0", " x "], ["7", "x"]),
        (["99999999999999999999", "7"], ["99999999999999999999", "7"]),
        (["-5", "0"], [-5, 0]),
    ],
)
def test_ids_in_csv_are_integers_only_if_all_are_written_so(
    load: Any, ids: list[str], expected: list[Any]
) -> None:
    tables = load("user_id,item_id\n" + "".join(f"{value},1\n" for value in ids))
    assert column(tables.events, "user_id") == expected


def test_white_space_around_ids_is_stripped(load: Any) -> None:
    log = load("user_id,item_id\n1, a  3\n 2 ,a 3\n3,b \n 4,b\n5,a  3\n")
    assert column(log.events, "user_id") == [1, 2, 3, 4, 5]
    assert column(log.events, "item_id") == ["a  3", "a 3", "b", "b", "a  3"]
    table = Log.from_table(pa.table({"user_id": ["u", "v"], "item_id": [" a", "a"]}))
    assert column(table.items, "item_id", "item_id") == ["a"]


def test_ids_of_two_files_get_one_type(load: Any) -> None:
    tables = load("user_id,item_id\n1,5\n1,6\n", items="item_id,title\n5,Five\nx9,Nine\n")
    assert column(tables.events, "item_id") == ["5", "6"]
    assert column(tables.items, "item_id", "item_id") == ["5", "6", "x9"]


MOMENT = datetime(2024, 1, 31, 12, 0, 0, 500_000, tzinfo=UTC)


@pytest.mark.parametrize(
    "value, options",
    [
        ("1706702400.5", {}),
        ("1706702400500", {"timestamp_unit": "ms"}),
        ("1706702400500000", {"timestamp_unit": "us"}),
        ("1706702400500000999", {"timestamp_unit": "ns"}),
        ("2024-01-31T12:00:00.5Z", {}),
        ("2024-01-31 13:00:00.5+01:00", {}),
        ("2024-01-31 13:00:00.5", {"time_zone": "Europe/Berlin"}),
        ("2024-01-31T12:00:00.5", {"time_zone": "UTC"}),
        (pa.array([1706702400500], pa.int64()), {"timestamp_unit": "ms"}),
        (pa.array([1706702400.5], pa.float64()), {}),
        (pa.array([MOMENT], pa.timestamp("us", "Asia/Tokyo")), {}),
        (pa.array([MOMENT.replace(tzinfo=None)], pa.timestamp("ns")), {"time_zone": "UTC"}),
    ],
)
def test_timestamps(load: Any, value: str | pa.Array, options: dict[str, str]) -> None:
    events: str | pa.Table = f"user_id,item_id,timestamp\n1,2,{value}\n"
    if not isinstance(value, str):
        events = pa.table({"user_id": [1], "item_id": [2], "timestamp": value})
    assert column(load(events, **options).events, "timestamp") == [MOMENT]


ITEMS = "movie,title,genres,price,year\n5,Five,a|b | c,1.5,1999\n6,,,,\n"
KINDS = {"genres": "multi_categorical", "price": "numeric", "year": "categorical"}


def test_features_get_the_type_of_their_kind(load: Any) -> None:
    tables = load(
        "uid,movie\n1,5\n1,6\n",
        items=ITEMS,
        columns=NAMES,
        item_columns={"item_id": "movie"},
        item_features=KINDS,
    )
    assert tables.items.order_by("item_id").drop("_listed").to_pyarrow().to_pylist() == [
        {"item_id": 5, "genres": ["a", "b", "c"], "price": 1.5, "year": 1999, "title": "Five"},
        {"item_id": 6, "genres": None, "price": None, "year": None, "title": None},
    ]
    assert tables.item_features == KINDS


def test_features_in_parquet(load: Any) -> None:
    items = pa.table({"item_id": [5], "g": [[1, 2]], "p": [3], "c": [True], "t": ["x"]})
    kinds = {"g": "multi_categorical", "p": "numeric", "c": "categorical", "t": "text"}
    tables = load("user_id,item_id\n1,5\n", items=items, item_features=kinds)
    assert tables.items.drop("_listed").to_pyarrow().to_pylist() == [
        {"item_id": 5, "g": ["1", "2"], "p": 3.0, "c": "true", "t": "x"}
    ]


@pytest.mark.parametrize("kind", ["categorical", "hashed"])
@pytest.mark.parametrize(
    "type_", [pa.float64(), pa.float32(), pa.decimal128(4, 2), pa.string()], ids=str
)
def test_fractions_are_categories_and_one_in_every_format(
    load: Any, type_: pa.DataType, kind: str
) -> None:
    def sizes(items: str | pa.Table) -> list[Any]:
        log = load("user_id,item_id\n1,5\n", items=items, item_features={"size": kind})
        assert not any("taken as missing" in note for note in log.notes)
        found: list[Any] = log.items.order_by("item_id")["size"].to_pyarrow().to_pylist()
        return found

    def table(*values: float | None) -> pa.Table:
        texts = [None if value is None else str(value) for value in values]
        of_type = pa.array(texts).cast(type_)
        return pa.table({"item_id": [5 + i for i in range(len(values))], "size": of_type})

    in_csv = "item_id,size\n5,38.5\n6,38.0\n7,\n8,99.9\n"
    expected = ["38.5", "38", None, "99.9"]
    assert sizes(in_csv) == sizes(table(38.5, 38.0, None, 99.9)) == expected
    # Of a request, as a Python value.
    feature = Categorical.fit("size", expected)
    asked = [38.5, 38.0, 38, None, "38.0", np.float32(99.9), 39.5]
    assert feature.encode_column(asked).tolist() == [2, 1, 1, 0, 1, 3, 0]
    # Whole ones are the integers that they are without missing values.
    whole = "38" if pa.types.is_string(type_) else 38
    assert sizes(table(38.0, None)) == [whole, None]
    if pa.types.is_float64(type_):
        assert sizes(table(38.5, float("nan"))) == ["38.5", None]


@pytest.mark.parametrize("num_files", [1, 2])
@pytest.mark.parametrize(
    "kind", ["categorical", "hashed", "multi_categorical", "text", "numeric", "timestamp"]
)
def test_a_feature_without_any_value_in_parquet_is_missing(
    tmp_path: Path, kind: Any, num_files: int
) -> None:
    """As pandas writes it: without a type."""
    (tmp_path / "items").mkdir()
    for i in range(num_files):
        table = pa.table({"item_id": [5 + i], "the tags": pa.nulls(1)})
        pq.write_table(table, tmp_path / "items" / f"{i}.parquet")
    events = pa.table({"user_id": [1, 1], "item_id": [5, 6]})
    for items in (tmp_path / "items", pq.read_table(tmp_path / "items")):
        log = Log.from_table(events, items=items, item_features={"the tags": kind})
        assert log.items["the tags"].to_pyarrow().to_pylist() == [None, None]


def test_an_outcome_without_any_value_in_a_file_or_in_memory_happened_to_nobody(load: Any) -> None:
    columns = {"user_id": [1, 1], "item_id": [5, 6], "added": [1, 0]}
    events = pa.table({**columns, "bought": pa.nulls(2)})
    label = {"added": 1.0, "bought": 2.0}
    for log in (load(events, label=label), Log.from_table(events, reading=Reading(label=label))):
        assert column(log.events, "stage") == ["clicked", "exposed"]


def test_lists_of_one_value_each_are_told_and_lists_in_brackets_refused(load: Any) -> None:
    def notes(*tags: str, **options: Any) -> list[str]:
        items = "item_id,tags\n5,\n" + "".join(f'{6 + i},"{tag}"\n' for i, tag in enumerate(tags))
        kinds = {"tags": "multi_categorical"}
        log = load("user_id,item_id\n1,5\n", items=items, item_features=kinds, **options)
        return [note for note in log.notes if "one value" in note]

    (note,) = notes("war,drama", "war")
    assert note.endswith(
        "items.csv: column 'tags' has one value in each of 2 rows, such as 'war,drama', as no row "
        "has a '|': if they hold several, set list_separator (--data.list_separator)"
    )
    assert notes("war,drama", "war", list_separator=",") == []
    assert notes("war|drama", "war|") == notes("[war]|[drama]", "war|noir") == []
    assert notes("[war]|[drama]") == []
    assert notes("war|", "[drama]")
    with pytest.raises(
        DataError,
        match=r"items\.csv: column 'tags' holds lists written as text in 2 rows, such as "
        r"\"\['war', 'drama'\]\"\. Store them as lists",
    ):
        notes("['war', 'drama']", " ['war']")
    with pytest.raises(DataError, match="in 2 rows"):
        notes("['war', 'drama']", "['war']", "noir")


NOON = datetime(2024, 1, 31, 12, tzinfo=UTC)
MORE_KINDS = {"when": "timestamp", "v": "vector", "price": "bucketized", "author": "hashed"}
IN_ORDER = ("item_id", "when", "v", "price", "author")


def load_more(load: Any, table: str | pa.Table, **options: Any) -> list[dict[str, Any]]:
    tables = load("user_id,item_id\n1,5\n1,9\n", items=table, item_features=MORE_KINDS, **options)
    items = tables.items.drop("_listed")
    assert items.columns == IN_ORDER
    assert str(items.schema()["when"]).startswith("timestamp('UTC'")
    assert str(items.schema()["v"]) == "array<float32>"
    rows: list[dict[str, Any]] = items.order_by("item_id").to_pyarrow().to_pylist()
    assert rows[-1] == dict.fromkeys(IN_ORDER) | {"item_id": 9}  # Of the events alone.
    return rows[:-1]


@pytest.mark.parametrize(
    "moment, options",
    [
        ("1706702400", {}),
        ("1706702400000", {"timestamp_unit": "ms"}),
        ("2024-01-31T12:00:00Z", {}),
        ("2024-01-31 13:00:00", {"time_zone": "Europe/Berlin"}),
    ],
)
def test_times_vectors_buckets_and_hashes_in_csv(
    load: Any, moment: str, options: dict[str, str]
) -> None:
    items = f"item_id,when,v,price,author\n5,{moment},0.5| -2e1|3,1.5,007\n6,,,,\n"
    assert load_more(load, items, **options) == [
        {"item_id": 5, "when": NOON, "v": [0.5, -20.0, 3.0], "price": 1.5, "author": "007"},
        dict.fromkeys(IN_ORDER) | {"item_id": 6},
    ]


@pytest.mark.parametrize(
    "moment, type_, options",
    [
        (pa.array([NOON, None], pa.timestamp("ms", "Asia/Tokyo")), pa.list_(pa.float32()), {}),
        (pa.array([datetime(2024, 1, 31, 12), None]), pa.list_(pa.float64(), 2),
         {"time_zone": "UTC"}),
        (pa.array([1_706_702_400, None]), pa.large_list(pa.int16()), {}),
    ],
)  # fmt: skip
def test_times_vectors_buckets_and_hashes_in_parquet(
    load: Any, moment: pa.Array, type_: pa.DataType, options: dict[str, str]
) -> None:
    columns = {"item_id": [5, 6], "when": moment, "v": pa.array([[4, -2], None], type_)}
    items = pa.table(columns | {"price": [3, None], "author": [11, None]})
    assert load_more(load, items, **options) == [
        {"item_id": 5, "when": NOON, "v": [4.0, -2.0], "price": 3.0, "author": 11},
        dict.fromkeys(IN_ORDER) | {"item_id": 6},
    ]


@pytest.mark.parametrize("column_type", [pa.float64(), pa.string()])
def test_lists_of_nothing_but_nulls_are_no_vectors(load: Any, column_type: pa.DataType) -> None:
    items = pa.table({"item_id": [5, 6], "v": pa.array([[], None], pa.list_(column_type))})
    message = "no row holds a vector" if column_type == pa.float64() else "must be a list"
    with pytest.raises(DataError, match=rf"items\.parquet: column 'v'.*{message}"):
        load("user_id,item_id\n1,5\n", items=items, item_features={"v": "vector"})


def test_items_that_the_item_table_lacks_are_kept_dropped_or_refused(load: Any) -> None:
    text, items = "user_id,item_id\n1,5\n2,99\n2,98\n2,5\n", "item_id,title\n5,Five\n6,Six\n"
    kept = load(text, items=items)
    assert column(kept.items, "title", "item_id") == ["Five", "Six", None, None]
    assert kept.dropped == ()
    dropped = load(text, items=items, unknown_items="drop")
    assert column(dropped.events, "event_number") == [0, 3]
    assert [(each.reason, each.num_rows) for each in dropped.dropped] == [
        ("item is not in the item table", 2)
    ]
    with pytest.raises(DataError, match=r"events\.csv.*2 of 4 rows.*such as 98.*unknown_items"):
        load(text, items=items, unknown_items="error")


def test_users_that_the_user_table_lacks_are_kept(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id\n1,5\n2,5\n")
    (tmp_path / "u.csv").write_text("user_id,age\n2,30\n3,40\n")
    tables = Log.from_files(
        tmp_path / "e.csv", users=tmp_path / "u.csv", user_features={"age": "numeric"}
    )
    assert column(tables.users, "age", "user_id") == [None, 30.0, 40.0]


def test_duplicates_are_kept_dropped_or_refused(load: Any) -> None:
    text = "user_id,item_id,timestamp\n1,5,1700000000\n1,5,1700000009\n1,5,1700000000\n"
    assert column(load(text).events, "event_number") == [0, 1, 2]
    dropped = load(text, duplicates="drop")
    assert column(dropped.events, "event_number") == [0, 1]
    assert dropped.dropped[0].num_rows == 1
    with pytest.raises(DataError, match="1 of 3 rows repeat an earlier one"):
        load(text, duplicates="error")


def test_zipped_files_windows_line_ends_and_byte_order_marks(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "e.csv.gz", "wb") as opened:
        opened.write("\ufeffuser_id\titem_id\r\n1\té\r\n".encode())
    tables = Log.from_files(tmp_path / "e.csv.gz")
    assert column(tables.events, "user_id") == [1]
    assert column(tables.events, "item_id") == ["é"]


def test_the_part_that_a_log_names_is_carried_along(load: Any) -> None:
    text = "user_id,item_id,{0}\n1,2,train\n1,3,\n1,2,test\n1,2,test\n"
    for tables in (load(text.format("part")), load(text.format("fold"), columns={"part": "fold"})):
        assert column(tables.events, "part") == ["train", None, "test", "test"]
    dropped = load(text.format("part"), duplicates="drop")
    assert column(dropped.events, "part") == ["train", None, "test"]


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("uid,item_id\n1,2\n", {}, "no column 'user_id'. Nearest: uid.*Set columns"),
        ("user_id,item_id\n1,2\n", {"columns": {"item_id": "film"}}, "no column 'film'"),
        ("user_id,item_id\n", {}, r"events\.csv: 0 rows"),
        ("", {}, r"events\.csv: 0 rows, and no header"),
        ("user_id,item_id,user_id\n1,2,3\n", {}, "Repeated or empty: user_id"),
        ("user_id,item_id\n1,2\n1,2,3,4\n", {}, r"line 3 of .*\(1 of 2 lines\)\. Give"),
        ("user_id,item_id\n1,2\n3,4\r\n5,6\n", {}, "line 3 .* another line ending"),
        ("user_id,item_id\r\n1,2\n3,4", {}, r"line 2 of events\.csv has another line ending"),
        ("user_id,item_id\n,2\n1,2\n", {}, r"events\.csv: column 'user_id' is null in 1 of 2 rows"),
        ("user_id,item_id\n-1,2\n", {}, r"'user_id' is -1 \(reserved .*\) in 1 of 1 rows"),
        (CLICKS.replace("170", "170000"), {}, "look like milliseconds"),
        (CLICKS.replace("170", "170000"), {"timestamp_unit": "us"}, "Set timestamp_unit to ms"),
        (CLICKS, {"timestamp_unit": "ms"}, "look like seconds"),
        (CLICKS.replace("1700000000", "yesterday"), {}, "times and .* 1 of 3 rows, .*'yesterday'"),
        (CLICKS.replace("1700000000", "2024-01-01"), {}, "one way .*'2024-01-01' .first: row 3"),
        (CLICKS.replace("1700000000", ""), {}, "'timestamp' is null in 1 of 3 rows"),
        ("user_id,item_id,timestamp\n1,2,2024-01-31\n", {}, "without a time zone.*1 rows"),
        ("user_id,item_id,timestamp\n1,2,2024-01-31 10:00:00\n1,2,2024-01-31T10:00:00Z\n",
         {"time_zone": "UTC"}, "does not in 1 of 2 rows.* with an offset in all or in none"),
        ("user_id,item_id,timestamp\n1,2,20240131\n", {}, "look like dates"),
        (CLICKS.replace("1700", "2024-01-01 00:0"), {}, "must hold times"),
        ("user_id,item_id,rank\n1,2,1.5\n", {}, "'rank' must hold whole numbers.*'1.5'"),
        ("user_id,item_id,score\n1,2,good\n", {}, "'score' must hold finite .* 1 of 1"),
        ("user_id,item_id,stage\n1,2,liked\n", {}, "such as 'liked' .first: row 1.. Known"),
        ("user_id,item_id,rating\n1,2,3\n", {"rating_threshold": 4}, "none of 1 rows is"),
        ("user_id,item_id,rating\n1,2,\n1,2,5\n", {"rating_threshold": 4}, "null or NaN in 1 of 2"),
        (pa.table({"user_id": [1.5], "item_id": [2]}), {}, r"'user_id' must be an integer .*1\.5"),
        (pa.table({"user_id": [1], "item_id": [2], "timestamp": [True]}), {},
         "'timestamp' must be a timestamp"),
    ],
)  # fmt: skip
def test_what_is_refused(load: Any, text: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(text, **options)


VECTOR: dict[str, Any] = {"item_features": {"v": "vector"}}
TIME: dict[str, Any] = {"item_features": {"t": "timestamp"}}


@pytest.mark.parametrize(
    "items, options, message",
    [
        ("film,title\n5,Five\n", {}, r"items\.csv: no column 'item_id'"),
        ("item_id,title\n7,a\n5,a\n5,b\n", {}, r"2 different ids in 3 .* of 5\. One"),
        ("item_id,title\n,a\n5,b\n", {"max_bad_share": 0}, "1 of 2 rows(?!.*max_bad_share)"),
        ("item_id\n5\n", {"item_features": {"genre": "text"}}, "no column 'genre'"),
        ("item_id,p\n5,x\n", {"item_features": {"p": "numeric"}}, "'p' must hold finite numbers"),
        ("item_id\nsku6\n", {"unknown_items": "drop"}, "none of 1 .*like 'sku6', not '5'"),
        ("item_id,v\n5,1|2\n6,1;2\n", VECTOR, r"'v' must .* by '\|' .* 1 of 2 rows, such as '1;2'"),
        ("item_id,v\n5,1|\n", VECTOR, "does not in 1 of 1 rows"),
        ("item_id,v\n5,1|2\n6,\n7,1|2|3\n8,2|2\n", VECTOR, r"2 as most, .* 1 of 4 .*'1\|2\|3'"),
        ("item_id,v\n5,1|2\n6,1|nan\n7,inf|1\n8,1e39|1\n", VECTOR, "'v' .* in 3 of 4 rows"),
        (pa.table({"item_id": [5, 6, 7], "v": [[1.0, None], [1e300, 1.0], [1.0, 2.0]]}), VECTOR,
         r"items\.parquet: column 'v' does not hold finite numbers.* in 2 of 3 rows"),
        (pa.table({"item_id": [5], "v": [["1"]]}), VECTOR, "must be a list .* it is array<string>"),
        ("item_id,v\n5,\n", VECTOR, "no row holds a vector"),
        ("item_id,p\n5,inf\n", {"item_features": {"p": "numeric"}}, "finite .* in 1 of 1 rows"),
        ("item_id,t\n5,2024-01-31\n", TIME, r"'t' holds times without a time zone \(1 rows\)"),
        ("item_id,t\n5,1999\n6,\n7,2024\n", TIME, r"1999 to 2024 \(3 rows\), .* like years"),
        ("item_id,t\n5,2024-01-31\n6,10000-01-01\n7,9999-12-31\n8,0044-03-15 (BC)\n9,0002-01-02",
         TIME | {"time_zone": "UTC"}, r"items\.csv: column 't' has no year .* in 3 of 5 rows"),
        (pa.table({"item_id": [5], "c": [[1.5]]}), {"item_features": {"c": "hashed"}}, "must be"),
    ],
)  # fmt: skip
def test_item_files_that_are_refused(
    load: Any, items: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as raised:
        load("user_id,item_id\n1,5\n", items=items, **options)
    assert raised.value.setting != "columns"  # Those of the events.


UNMAPPED = {
    "reached": (["Clicked", "exposed", " recalled"], "holds stages, .* of Clicked, recalled to "),
    # One known stage tells that the others are stages by a team's own names.
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
    with pytest.raises(DataError, match=f"'{name}' (holds an unknown stage|holds times without)"):
        load(events, columns=mended)


@pytest.mark.parametrize(("num_unreadable", "holds_times"), [(1, True), (2, False)])
def test_times_are_told_among_a_few_that_are_none(
    load: Any, num_unreadable: int, holds_times: bool
) -> None:
    days = [f"2024-01-{i + 1:02}" for i in range(20)]
    days[:num_unreadable] = [f"unknown {i}" for i in range(num_unreadable)]
    events = pa.table({"user_id": range(20), "item_id": range(20), "moment": days})
    if holds_times:
        with pytest.raises(DataError, match="'moment' is not read and holds times"):
            load(events)
    else:
        assert "columns not read: moment" in load(events).notes[0]


def test_what_only_looks_like_stages_or_times_is_left_unread(load: Any) -> None:
    # Beside a stage and a time they are columns like others, and so are those that hold more.
    text = "user_id,item_id,stage,timestamp,a,b\n1,2,clicked,1700000000,clicked,2024-01-31\n"
    assert "columns not read: a, b" in load(text).notes[0]
    text = "user_id,item_id,a,b,c\n1,2,just clicked,2024-01-31,\n1,3,bought,soon,\n"
    assert "columns not read: a, b, c" in load(text).notes[0]
    searches = [f"1,{n},search {n}\n" for n in range(101)]
    assert (
        "columns not read: a"
        in load("user_id,item_id,a\n1,2,clicked\n" + "".join(searches)).notes[0]
    )
    labelled = load("user_id,item_id,like,a\n1,2,1,clicked\n", label={"like": 1})
    assert "columns not read: a" in labelled.notes[0]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("clicked", [0, 1]),
        ("Click", [1.0, 0.0, None]),
        ("is_click", [True, False]),
        ("is_clicked", ["0"] * 2000 + ["1"]),
        ("label", ["false", "true", ""]),
        # What did not happen is left empty.
        ("is_click", ["1", ""]),
        ("is_click", ["1"] * 2000 + [""]),
        ("clicked", [1, None]),
        ("label", [None, True]),
        ("click", ["Y", "N"]),
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
    # A way out; and what is no outcome: of one value, of others, called otherwise.
    assert name in load(events(name, values), columns={name: name}).events.columns
    for other in ([1] * 3, ["Y"] * 2, [0, None], ["0", "1", "2"], [0.0, 0.5, 1.0]):
        assert f"columns not read: {name}" in load(events(name, other)).notes[0]
    assert "columns not read: seen" in load(events("seen", values)).notes[0]
    # Beside a rating it is a column like others.
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
    events = pa.table({"user_id": range(3000), "item_id": range(3000), "a": ["clicked"] * 3000})
    stream = pa.RecordBatchReader.from_batches(events.schema, events.to_batches(100))
    assert Log.from_table(stream).counts()["events"] == 3000


def test_paths_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        Log.from_files(tmp_path / "none.csv")
    with pytest.raises(DataError, match="It holds 0 files"):
        Log.from_files(tmp_path)
    (tmp_path / "a.csv").write_text("user_id,item_id\n1,2\n")
    (tmp_path / "b.csv").write_text("item_id,user_id\n1,2\n")
    with pytest.raises(DataError, match=r"b\.csv has another header than a\.csv"):
        Log.from_files(tmp_path)
    (tmp_path / "b.csv").rename(tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text("user_id,item_id\n1,2\n")
    message = r"files of one kind: .*It holds 3 files, 1 of another kind: b\.parquet\."
    with pytest.raises(DataError, match=message):
        Log.from_files(tmp_path)
    with pytest.raises(DataError, match=r"b\.parquet cannot be read"):
        Log.from_files(tmp_path / "b.parquet")


@pytest.mark.parametrize("locked", ["log", "b.parquet", "b.csv"])
def test_a_denied_permission_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: str
) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).with_suffix(Path(locked).suffix or ".csv").touch()
    # Not by the mode of a file: root may read every one.
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.R_OK or path.name != locked)
    with pytest.raises(DataError, match=rf"{locked} may not be read: permission denied\. Allow it"):
        Log.from_files(folder)


@pytest.mark.parametrize("first, second", [("a", "b"), ("b", "a")])
def test_parquet_whose_files_have_different_columns_is_refused(
    tmp_path: Path, first: str, second: str
) -> None:
    # Read by the columns of one file, the other's funnel would be clicks.
    pq.write_table(pa.table({"user_id": [1], "item_id": [2]}), tmp_path / f"{first}.parquet")
    of_funnel = pa.table({"item_id": [3], "stage": ["exposed"], "user_id": [1]})
    pq.write_table(of_funnel, tmp_path / f"{second}.parquet")
    message = r"b\.parquet has other columns than a\.parquet: only one of them has stage\."
    with pytest.raises(DataError, match=message):
        Log.from_files(tmp_path)


@pytest.mark.parametrize("days", ["abc", "bca", "cab"])
def test_types_that_pandas_varies_from_day_to_day_are_one(tmp_path: Path, days: str) -> None:
    rows = pd.DataFrame({"user_id": [1, 2], "item_id": [2**53 - 1, 4], "rank": [0, 1]})
    tables = (
        rows.assign(device="phone", v=[[0.5], [1.0]], stage="clicked"),
        rows.assign(device=None, v=None, stage="clicked", rank=[7, None]),
        rows.assign(device=["tv", None], v=[[0.5], None], stage="exposed", item_id=[3.0, None]),
    )
    expected: tuple[list[Any], ...] = (
        [(2**53 - 1, 0, "phone", [0.5], "clicked"), (4, 1, "phone", [1.0], "clicked")],
        [(2**53 - 1, 7, None, None, "clicked"), (4, None, None, None, "clicked")],
        [(3, 0, "tv", [0.5], "exposed")],
    )
    for day, table in zip(days, tables, strict=True):
        table.to_parquet(tmp_path / f"{day}.parquet", index=False)
    log = Log.from_files(
        tmp_path, reading=Reading(columns={"device": "device", "v": "v"}, max_bad_share=0.2)
    )
    names = ("item_id", "rank", "device", "v", "stage")
    found = zip(*(column(log.events, name) for name in names), strict=True)
    of_day = dict(zip(days, expected, strict=True))
    assert [*found] == [row for day in "abc" for row in of_day[day]]


def test_what_float32_cannot_tell_apart_is_refused() -> None:
    """As tools that shrink tables make it."""
    clicks = {"user_id": [1, 2], "item_id": np.array([2**24 - 1, 5], np.float32)}
    assert sorted(column(Log.from_table(pd.DataFrame(clicks)).events, "item_id")) == [5, 2**24 - 1]
    clicks["item_id"] = np.array([2**24 + 2, 5], np.float32)
    with pytest.raises(DataError, match=r"must be an integer or a string .* in 1 of 2 rows"):
        Log.from_table(pd.DataFrame(clicks))
    times = {"user_id": [1, 2], "item_id": [1, 2], "timestamp": np.array([1.7e9, 2e9], np.float32)}
    with pytest.raises(DataError, match=r"float32 \(2 rows\), .* Store them as int64 or float64"):
        Log.from_table(pd.DataFrame(times))


@pytest.mark.parametrize(
    ("values", "others", "message"),
    [
        (
            ["1"],
            [1],
            "b.parquet has other types .* item_id has incompatible types: string vs int64",
        ),
        ([1.5], ["1"], "b.parquet .* item_id has incompatible types: double vs string"),
        ([True], [1], "b.parquet .* item_id has incompatible types: bool vs int64"),
        ([None], ["1"], "c.parquet .* item_id has incompatible types: string vs int64"),
        # As a double it would be another id.
        ([1.0], [2**53 + 1], "'item_id' must be an integer or a string and is not in 1 of 3 rows"),
    ],
)
def test_parquet_whose_files_have_different_types_is_refused(
    tmp_path: Path, values: list[Any], others: list[Any], message: str
) -> None:
    for name, items in (("a", values), ("b", others), ("c", [1])):
        pq.write_table(pa.table({"user_id": [1], "item_id": items}), tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=message):
        Log.from_files(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"stage_values": {"1": "bought"}},
        {"time_zone": "Mars/Base"},
        {"label": {"x": 1.0}, "rating_threshold": 4},
        {"columns": {"event_number": "n"}},
        {"item_features": {"x": "text"}},
        {"user_features": {"x": "text"}},
    ],
)
def test_arguments_that_contradict_each_other(tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "a.csv").write_text("user_id,item_id\n1,2\n")
    with pytest.raises(ValueError, match=r"time_zone|stage_values|made here|needs|set one"):
        Log.from_files(tmp_path / "a.csv", **arguments(**options))


def test_an_empty_request_id_is_none(tmp_path: Path, load: Any) -> None:
    # As one request, all events without would have been asked for at once, without a history.
    rows = {"user_id": [1] * 4, "item_id": [5, 6, 7, 8], "request_id": ["", "r", " ", None]}
    assert column(load(pa.table(rows)).events, "request_id") == [None, "r", None, None]
    log = load('user_id,item_id,request_id\n1,5,""\n1,6,r\n1,7," "\n1,8,\n')
    assert column(log.events, "request_id") == [None, "r", None, None]
    build_samples(log, tmp_path, seed=0)
    samples = read_samples(tmp_path)
    assert [samples.history(i).tolist() for i in range(4)] == [[], [1], [1, 2], [1, 2, 3]]


def test_a_date_in_the_names_of_folders_may_be_context(tmp_path: Path) -> None:
    for day in ("2024-01-31", "2024-02-01"):
        (tmp_path / f"day={day}").mkdir()
        (tmp_path / f"day={day}" / "a.csv").write_text("user_id,item_id\n1,2\n")
    log = Log.from_files(tmp_path, reading=Reading(columns={"day": "day"}))
    assert column(log.events, "day") == [date(2024, 1, 31), date(2024, 2, 1)]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_only_folders_below_what_is_named_make_columns(tmp_path: Path, suffix: str) -> None:
    rows = pd.DataFrame({"user_id": [1, 2], "item_id": [3, 4]})
    for stage in ("clicked", "exposed"):
        folder = tmp_path / "log" / f"stage={stage}"
        folder.mkdir(parents=True)
        getattr(rows, f"to_{suffix}")(folder / f"a.{suffix}", index=False)
    events = Log.from_files(tmp_path / "log").events.to_pandas()
    assert events["user_id"].tolist() == [1, 2, 1, 2]
    assert events["stage"].tolist() == ["clicked", "clicked", "exposed", "exposed"]
    above = (tmp_path / "log").rename(tmp_path / "user_id=7")
    with pytest.raises(DataError, match="user_id=7, which would be read as a column"):
        Log.from_files(above)
    file = above / "stage=exposed" / f"a.{suffix}"
    events = Log.from_files(file).events.to_pandas()
    assert (events["user_id"].tolist(), set(events["stage"])) == ([1, 2], {"clicked"})
    getattr(rows.drop(columns="user_id"), f"to_{suffix}")(file, index=False)
    with pytest.raises(DataError, match="no column 'user_id'"):
        Log.from_files(file)
