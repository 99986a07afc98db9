"""Item and user tables: the types of features, ids that a table lacks, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.small_log import CONNECTION, arguments, column
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import DataError, Dropped
from tfrs_pipeline.features.categorical import Categorical


def test_ids_of_two_files_get_one_type(load: Any) -> None:
    tables = load("user_id,item_id\n1,5\n1,6\n", items="item_id,title\n5,Five\nx9,Nine\n")
    assert column(tables.events, "item_id") == ["5", "6"]
    assert column(tables.items, "item_id", "item_id") == ["5", "6", "x9"]


@pytest.mark.parametrize(
    "type_", [pa.float64(), pa.float32(), pa.decimal128(4, 2), pa.string()], ids=str
)
def test_fractions_are_categories_in_every_format(load: Any, type_: pa.DataType) -> None:
    def sizes(items: str | pa.Table) -> list[Any]:
        log = load("user_id,item_id\n1,5\n", items=items, item_features={"size": "categorical"})
        assert not any("taken as missing" in note for note in log.notes)
        return column(log.items, "size", "item_id")

    def table(*values: float | None) -> pa.Table:
        texts = pa.array([None if value is None else str(value) for value in values])
        return pa.table({"item_id": range(5, 5 + len(values)), "size": texts.cast(type_)})

    in_csv = "item_id,size\n5,38.5\n6,38.0\n7,\n8,99.9\n"
    expected = ["38.5", "38", None, "99.9"]
    assert sizes(in_csv) == sizes(table(38.5, 38.0, None, 99.9)) == expected
    # The same values of a request, as Python values.
    feature = Categorical.fit("size", expected)
    asked = [38.5, 38.0, 38, None, np.float32(99.9), 39.5]
    assert feature.encode_column(asked).tolist() == [2, 1, 1, 0, 3, 0]
    # Whole numbers stay the integers that they are without missing values.
    whole = "38" if pa.types.is_string(type_) else 38
    assert sizes(table(38.0, None)) == [whole, None]
    if pa.types.is_float64(type_):
        assert sizes(table(38.5, float("nan"))) == ["38.5", None]


@pytest.mark.parametrize("num_files", [1, 2])
@pytest.mark.parametrize(
    "kind", ["categorical", "multi_categorical", "text", "numeric", "timestamp"]
)
def test_an_empty_parquet_feature_is_missing(tmp_path: Path, kind: Any, num_files: int) -> None:
    """pandas writes an empty column without a type."""
    (tmp_path / "items").mkdir()
    for i in range(num_files):
        table = pa.table({"item_id": [5 + i], "the tags": pa.nulls(1)})
        pq.write_table(table, tmp_path / "items" / f"{i}.parquet")
    events = pa.table({"user_id": [1, 1], "item_id": [5, 6]})
    given: Any = {"item_features": {"the tags": kind}, "connection": CONNECTION}
    for items in (tmp_path / "items", pq.read_table(tmp_path / "items")):
        log = Log.from_table(events, items=items, **given)
        assert column(log.items, "the tags", "item_id") == [None, None]


def test_lists_of_one_value_each_are_told_and_lists_in_brackets_refused(load: Any) -> None:
    def notes(*tags: str, **options: Any) -> list[str]:
        items = "item_id,tags\n5,\n" + "".join(f'{6 + i},"{tag}"\n' for i, tag in enumerate(tags))
        kinds = {"tags": "multi_categorical"}
        log = load("user_id,item_id\n1,5\n", items=items, item_features=kinds, **options)
        return [note for note in log.notes if "one value" in note]

    (note,) = notes("war,drama", "war")
    told = "column 'tags' has one value in each of 2 rows, such as 'war,drama', as no row has a '|'"
    assert told in note
    assert notes("war,drama", "war", list_separator=",") == []
    assert notes("war|drama", "war|") == notes("[war]|[drama]", "war|noir") == []
    assert notes("[war]|[drama]") == []
    assert notes("war|", "[drama]")
    with pytest.raises(DataError, match=r"written as text in 2 rows, such as \"\['war', 'drama'\]"):
        notes("['war', 'drama']", " ['war']")
    with pytest.raises(DataError, match="in 2 rows"):
        notes("['war', 'drama']", "['war']", "noir")


def test_lists_in_parquet_are_stripped_as_text_is(load: Any) -> None:
    items = pa.table({"item_id": [5, 6, 7], "genres": [[" war", "drama "], ["", None], None]})
    log = load("user_id,item_id\n1,5\n", items=items, item_features={"genres": "multi_categorical"})
    assert column(log.items, "genres", "item_id") == [["war", "drama"], [], None]


@pytest.mark.parametrize("text", ["[0.5, -20, 3]", "0.5,-20 ,3", "[ 0.5 -2e1  3.]", " 0.5|-20|3"])
def test_vectors_in_text_are_read_as_programs_write_them(load: Any, text: str) -> None:
    items = f'item_id,v\n5,"{text}"\n6,[]\n7,"[1,2,null]"\n8,2|3|4'
    options = {"item_features": {"v": "vector"}, "max_bad_share": 0.3}
    log = load("user_id,item_id\n1,5\n", items=items, **options)
    assert column(log.items, "v", "item_id") == [[0.5, -20.0, 3.0], None, None, [2.0, 3.0, 4.0]]


def test_items_that_the_item_table_lacks_are_kept_dropped_or_refused(load: Any) -> None:
    text, items = "user_id,item_id\n1,5\n2,99\n2,98\n2,5\n", "item_id,title\n5,Five\n6,Six\n"
    kept = load(text, items=items)
    assert column(kept.items, "title", "item_id") == ["Five", "Six", None, None]
    assert kept.dropped == ()
    dropped = load(text, items=items, unknown_items="drop")
    assert column(dropped.events, "event_number") == [0, 3]
    assert dropped.dropped == (Dropped("item is not in the item table", 2),)
    with pytest.raises(DataError, match=r"events\.csv.*2 of 4 events.*such as 98.*unknown_items"):
        load(text, items=items, unknown_items="error")


@pytest.mark.parametrize(
    ("here", "there"),
    [("0001244", "1244"), ("1244", "0001244"), ("ab-7", "AB-7"), ("AB 7", "AB7"), ("0ab 7", "AB7")],
)
@pytest.mark.parametrize("kind", ["item", "user"])
def test_ids_that_the_table_spells_otherwise_are_named(
    tmp_path: Path, here: str, there: str, kind: str
) -> None:
    other = "user" if kind == "item" else "item"

    def made(num_spelled: int, **options: Any) -> Log:
        ids = [here] * num_spelled + ["x1"] * (10 - num_spelled)
        (tmp_path / "log.csv").write_text(
            "\n".join([f"{kind}_id,{other}_id", *(f"{id_},{n}" for n, id_ in enumerate(ids))])
        )
        (tmp_path / "table.csv").write_text(f"{kind}_id\n{there}\nx1\n")
        table: Any = {f"{kind}s": tmp_path / "table.csv"}
        return Log.from_files(tmp_path / "log.csv", **table, **arguments(**options))

    told = f"table.csv is {here!r} in the log: leading zeros, letter case or spaces"
    notes = made(1).notes
    assert any(f"1 of 10 events (10.0%) are of 1 {kind}" in note for note in notes)
    assert any(told in note for note in notes)
    for num_spelled in (2, 10):
        with pytest.raises(DataError, match=rf"{num_spelled} of 10 events .* lacks") as refused:
            made(num_spelled)
        assert f"'{there}' in " in str(refused.value)
        assert told in str(refused.value)
    assert made(2, max_bad_share=0.3).counts()["events"] == 10
    if kind == "item":  # Whoever says what to do with them is heeded.
        assert any(told in note for note in made(6, unknown_items="keep").notes)
        assert made(6, unknown_items="drop").counts()["events"] == 4


@pytest.mark.parametrize(("num_unknown", "is_refused"), [(5, False), (6, True)])
def test_more_than_half_of_the_events_on_unknown_items_are_refused(
    load: Any, num_unknown: int, is_refused: bool
) -> None:
    items = [90 + n if n < num_unknown else 5 for n in range(10)]
    text = "user_id,item_id\n" + "".join(f"{n},{item}\n" for n, item in enumerate(items))
    if is_refused:
        with pytest.raises(DataError, match=r"6 of 10 events \(60.0%\) are of 6 items") as refused:
            load(text, items="item_id\n5\n6\n")
        assert refused.value.setting == "unknown_items"
    else:
        assert "5 of 10 events" in load(text, items="item_id\n5\n6\n").notes[-1]
    assert load(text, items="item_id\n5\n6\n", unknown_items="keep").counts()["events"] == 10
    # Users may all be new but for one.
    users = pa.table({"user_id": [0]})
    events = pa.table({"user_id": range(10), "item_id": range(10)})
    assert Log.from_table(events, users=users).counts()["users"] == 10


def test_a_category_that_holds_the_separator_of_lists_is_told(load: Any) -> None:
    def notes(text: str, **options: Any) -> list[str]:
        items = f"item_id,path\n5,{text}\n6,Garden\n"
        log = load("user_id,item_id\n1,5\n", items=items, **options)
        return [note for note in log.notes if "is one value" in note]

    (note,) = notes("Sport|Yoga", item_features={"path": "categorical"})
    assert "column 'path' holds '|' in 1 row, such as 'Sport|Yoga'" in note
    assert "multi_categorical" in note
    assert notes("Sport/Yoga", item_features={"path": "categorical"}) == []
    assert notes("Sport/Yoga", item_features={"path": "categorical"}, list_separator="/")
    assert notes("Sport|Yoga", item_features={"path": "multi_categorical"}) == []


VECTOR: dict[str, Any] = {"item_features": {"v": "vector"}}
TIME: dict[str, Any] = {"item_features": {"t": "timestamp"}}
LISTS: dict[str, Any] = {"item_features": {"v": "multi_categorical"}}


@pytest.mark.parametrize("items, options, message", [
    ("film,title\n5,Five\n", {}, r"items\.csv: no column 'item_id'"),
    ("item_id,title\n7,a\n5,a\n5,b\n", {}, r"2 different ids in 3 .* of 5\. One"),
    ("item_id,title\n,a\n5,b\n", {"max_bad_share": 0}, "1 of 2 rows(?!.*max_bad_share)"),
    ("item_id\n5\n", {"item_features": {"genre": "text"}}, "no column 'genre'"),
    ("item_id,p\n5,x\n", {"item_features": {"p": "numeric"}}, "'p' must hold finite numbers"),
    ("item_id\nsku6\n", {"unknown_items": "drop"}, "'5', where ids look like 'sku6'"),
    ("item_id,v\n5,1|2\n6,1;2\n", VECTOR, r"'v' must .* by '\|' .* 1 of 2 rows, such as '1;2'"),
    ("item_id,v\n5,1|\n", VECTOR, "does not in 1 of 1 rows"),
    ("item_id,v\n5,1|2\n6,\n7,1|2|3\n8,2|2\n", VECTOR, r"2 as most, .* 1 of 4 .*'1\|2\|3'"),
    ("item_id,v\n5,1|2\n6,1|nan\n7,inf|1\n8,1e39|1\n", VECTOR, "'v' .* in 3 of 4 rows"),
    (pa.table({"item_id": [5, 6, 7], "v": [[1.0, None], [1e300, 1.0], [1.0, 2.0]]}), VECTOR,
     r"items\.parquet: column 'v' does not hold finite numbers.* in 2 of 3 rows"),
    (pa.table({"item_id": [5], "v": [["1"]]}), VECTOR, "must be a list .* it is array<string>"),
    (pa.table({"item_id": [5, 6], "v": pa.array([[], None], pa.list_(pa.float64()))}), VECTOR,
     r"items\.parquet: column 'v'.*no row holds a vector"),
    (pa.table({"item_id": [5], "v": [[["a"], ["b"]]]}), LISTS, "a list of texts or numbers"),
    (pa.table({"item_id": [5], "v": [[{"a": 1}]]}), LISTS, "a list of texts or numbers"),
    ("item_id,v\n5,\n", VECTOR, "no row holds a vector"),
    ("item_id,p\n5,inf\n", {"item_features": {"p": "numeric"}}, "finite .* in 1 of 1 rows"),
    ("item_id,t\n5,2024-01-31T10:00\n", TIME, r"'t' holds times without a time zone \(1 row"),
    ("item_id,t\n5,1999\n6,\n7,2024\n", TIME, r"1999 to 2024 \(3 rows\), .* like years"),
    ("item_id,t\n5,2024-01-31\n6,10000-01-01\n7,9999-12-31\n8,0044-03-15 (BC)\n9,0002-01-02",
     TIME | {"time_zone": "UTC"}, r"items\.csv: column 't' has no year .* in 3 of 5 rows"),
    (pa.table({"item_id": [5], "c": [[1.5]]}), {"item_features": {"c": "categorical"}}, "must be"),
])  # fmt: skip
def test_refused_item_files(load: Any, items: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        load("user_id,item_id\n1,5\n", items=items, **options)
    assert raised.value.setting != "columns"  # `columns` belongs to the events.
