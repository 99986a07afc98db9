"""Files and folders: what is read, in what order, and what is refused."""

import gzip
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.small_log import column
from tfrs_pipeline import DataError, Log, Reading


def test_a_folder_is_read_in_the_order_of_names_and_rows(tmp_path: Path) -> None:
    num_rows = 50_000  # Several row groups.
    for suffix in ("csv", "csv.gz", "parquet"):
        folder = tmp_path / suffix
        folder.mkdir()
        (folder / "_SUCCESS").touch()
        for part, start in (("b", num_rows), ("a", 0)):
            rows = pd.DataFrame({"user_id": 1, "item_id": range(start, start + num_rows)})
            if suffix == "parquet":
                rows.to_parquet(folder / f"{part}.parquet", row_group_size=8_000)
            else:
                rows.to_csv(folder / f"{part}.{suffix}", index=False)
        assert column(Log.from_files(folder).events, "item_id") == list(range(2 * num_rows))


def test_paths_that_are_refused(tmp_path: Path) -> None:
    def refuses(path: Path, message: str) -> None:
        with pytest.raises(DataError, match=message):
            Log.from_files(path)

    refuses(tmp_path / "none.csv", "does not exist")
    refuses(tmp_path, "It holds 0 files")
    (tmp_path / "a.csv").write_text("user_id,item_id\n1,2\n")
    (tmp_path / "b.csv").write_text("item_id,user_id\n1,2\n")
    refuses(tmp_path, r"b\.csv has another header than a\.csv")
    (tmp_path / "b.csv").rename(tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text("user_id,item_id\n1,2\n")
    refuses(
        tmp_path,
        r"of one kind: .*It holds 3 files, 1 of another kind: b\.parquet\.$",
    )
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "a.jsonl").touch()
    refuses(tmp_path / "json", r"It holds 1 file, 1 of .* DuckDB converts JSON: COPY")
    refuses(tmp_path / "b.parquet", r"b\.parquet cannot be read")


@pytest.fixture
def closed() -> Iterator[Path]:
    """Returns a folder, for a user who is not root: root may read everything."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    # Loads all modules: another user may not read those of this Python.
    (folder / "a.csv").write_text("user_id,item_id\n1,2\n")
    Log.from_files(folder)
    if is_root := os.getuid() == 0:
        os.setresuid(65534, 65534, 0)
    yield folder
    if is_root:
        os.setresuid(0, 0, 0)
    (folder / "sub").chmod(0o777)
    shutil.rmtree(folder)


CLOSED = [("sub", 0o000), ("sub", 0o444), ("sub", 0o111), ("sub/b.csv", 0o000)]


@pytest.mark.parametrize(("locked", "mode"), CLOSED)
@pytest.mark.parametrize("is_file", [True, False])
def test_what_may_not_be_read_is_named(closed: Path, locked: str, mode: int, is_file: bool) -> None:
    """Folders that may not be listed, or not be entered, and a file within one."""
    (closed / "sub").mkdir()
    (closed / "sub" / "b.csv").write_text("user_id,item_id\n1,2\n")
    (closed / locked).chmod(mode)
    if is_file and mode == 0o111:
        return  # Whoever knows the name may read the file.
    with pytest.raises(DataError, match=rf"{locked}.* may not be read: permission denied\. Allow"):
        Log.from_files(closed / "sub" / "b.csv" if is_file else closed)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_linked_folders_and_files_are_read_once(tmp_path: Path, suffix: str) -> None:
    log, elsewhere = tmp_path / "log", tmp_path / "elsewhere"
    (log / "deep").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    files = (log / "a", log / "deep" / "b", elsewhere / "c", elsewhere / "deep" / "d")
    for number, file in enumerate(files):
        rows = pd.DataFrame({"user_id": [number, number], "item_id": [1, 2]})
        getattr(rows, f"to_{suffix}")(file.with_suffix(f".{suffix}"), index=False)
    (log / "link").symlink_to("../elsewhere")
    (log / "loop").symlink_to("..")  # A folder above, in which the log lies.
    (log / "deep" / "loop").symlink_to(log)
    (elsewhere / "again").symlink_to(elsewhere / "deep")
    (log / f"z.{suffix}").symlink_to(elsewhere / f"c.{suffix}")
    found = sorted(column(Log.from_files(log).events, "user_id"))
    assert found == [0, 0, 1, 1, 2, 2, 3, 3]
    (log / f"gone.{suffix}").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=rf"gone\.{suffix} links to nothing"):
        Log.from_files(log)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
def test_a_byte_that_is_not_utf8_costs_its_line_in_any_column(
    tmp_path: Path, place: int, suffix: str
) -> None:
    """Whether the column is read or not, and wherever it stands."""
    names = ["user_id", "item_id", "timestamp"]
    names.insert(place, "note")
    lines = [
        ",".join(
            {"note": "caf\xe9" if row == 200 else "x"}.get(name, str(1_700_000_000 + row))
            for name in names
        )
        for row in range(400)
    ]
    text = "\n".join([",".join(names), *lines, ""]).encode("latin-1")
    path = tmp_path / f"log.{suffix}"
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    for columns in ({}, {"note": "note"}):
        log = Log.from_files(path, reading=Reading(columns=columns))
        (dropped,) = log.dropped
        assert (dropped.num_rows, log.counts()["events"]) == (1, 399)
        assert f"line 202 of log.{suffix}" in dropped.reason
        assert 1_700_000_200 not in column(log.events, "user_id")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "log.csv").write_bytes("user_id,item_id\n1,2\n".encode(encoding))
    with pytest.raises(
        DataError, match=r"log.csv cannot be read: .* Give (CSV in UTF-8|UTF-8 CSV)"
    ):
        Log.from_files(tmp_path / "log.csv")


@pytest.mark.parametrize("first, second", [("a", "b"), ("b", "a")])
def test_parquet_of_different_columns_is_refused(tmp_path: Path, first: str, second: str) -> None:
    # With the columns of the file without stages, the events of the funnel would be clicks.
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
    reading = Reading(columns={"device": "device", "v": "v"}, max_bad_share=0.2)
    log = Log.from_files(tmp_path, reading=reading)
    names = ("item_id", "rank", "device", "v", "stage")
    found = zip(*(column(log.events, name) for name in names), strict=True)
    of_day = dict(zip(days, expected, strict=True))
    assert [*found] == [row for day in "abc" for row in of_day[day]]


@pytest.mark.parametrize(
    ("values", "others", "message"),
    [
        (["1"], [1], "b.parquet has other types .* incompatible types: string vs int64"),
        ([1.5], ["1"], "b.parquet .* item_id has incompatible types: double vs string"),
        ([True], [1], "b.parquet .* item_id has incompatible types: bool vs int64"),
        ([None], ["1"], "c.parquet .* item_id has incompatible types: string vs int64"),
        # As a double it would be another id.
        ([1.0], [2**53 + 1], "'item_id' must be an integer or a string and is not in 1 of 3 rows"),
    ],
)
def test_different_types(
    tmp_path: Path, values: list[Any], others: list[Any], message: str
) -> None:
    for name, items in (("a", values), ("b", others), ("c", [1])):
        pq.write_table(pa.table({"user_id": [1], "item_id": items}), tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=message):
        Log.from_files(tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
@pytest.mark.parametrize("megabytes", [3, 34])
def test_no_long_line_is_lost_without_a_word(tmp_path: Path, suffix: str, megabytes: int) -> None:
    # DuckDB drops a line beyond its buffer of 32 MB, and its reject table says nothing.
    lines = [f"{row},{row},x" for row in range(200)]
    lines.insert(100, f"7,7,{'y' * megabytes * 1_000_000}")
    text = "\n".join(["user_id,item_id,note", *lines, ""]).encode()
    path = tmp_path / f"log.{suffix}"
    path.write_bytes(gzip.compress(text, 1) if suffix.endswith("gz") else text)
    with pytest.raises(DataError, match=f"log.{suffix} cannot be read: (a line is longer|Maxi)"):
        Log.from_files(path)


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


def test_a_table_of_delta_lake_is_refused(tmp_path: Path) -> None:
    """Its folder still has the files whose rows were deleted."""
    (tmp_path / "clicks" / "_delta_log").mkdir(parents=True)
    pq.write_table(pa.table({"user_id": [1], "item_id": [2]}), tmp_path / "clicks" / "a.parquet")
    with pytest.raises(DataError, match=r"clicks is a table of Delta Lake: .* delta_scan"):
        Log.from_files(tmp_path)
