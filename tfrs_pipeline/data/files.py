"""Opens what a log is made of: CSV or Parquet, a file or a folder, or a table in memory."""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import ibis
import pyarrow as pa
from ibis.backends.duckdb import Backend as DuckDB

from tfrs_pipeline.data.columns import RawTable
from tfrs_pipeline.data.schema import DataError, Source

_CSV_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


def connect() -> DuckDB:
    """Opens a DuckDB in memory, without the progress bar that it would write to the output."""
    connection = ibis.duckdb.connect()
    shown = connection.con.execute("SELECT current_setting('enable_progress_bar')").fetchone()
    if shown and shown[0]:  # In Jupyter without ipywidgets it is off, and may not even be set.
        connection.con.execute("SET enable_progress_bar = false")
    return connection


@dataclass(frozen=True)
class Scan:
    """A table whose columns are known and whose rows are not read yet.

    Args:
        name: In messages: the path, or what the table is.
        columns: Names of its columns.
        is_text: Whether every column is a string (CSV).
        open: Makes the rows of some columns, in their order.
    """

    name: str
    columns: Sequence[str]
    is_text: bool
    open: Callable[[list[str]], duckdb.DuckDBPyRelation]

    def load(self, connection: DuckDB, names: Mapping[str, str]) -> RawTable:
        """Reads the columns that are wanted, once: name that a column gets -> its name here."""
        table = ibis.util.gen_name("raw")
        columns = [f'"{_double(column)}" AS "{_double(name)}"' for name, column in names.items()]
        # A row number without an order runs in the order of the scan, on one thread.
        projection = ", ".join([*columns, "row_number() OVER () - 1 AS _row"])
        try:
            self.open(list(dict.fromkeys(names.values()))).project(projection).create(table)
        except duckdb.Error as error:
            raise _unreadable(self.name, error) from error
        renamed = {name: column for name, column in names.items() if name != column}
        return RawTable(connection.table(table), Source(self.name, renamed), self.is_text)


def scan(connection: DuckDB, source: Any, name: str) -> Scan:
    """Opens a source of rows.

    Args:
        connection: Where the rows will be read.
        source: A path to CSV (with a header) or Parquet, a file or a folder, whose files are read
            in the order of their names; a list of such files; or a table: pandas, pyarrow, Ibis of
            any backend, or whatever else speaks Arrow.
        name: What the table is, in messages about one in memory.
    """
    if isinstance(source, str | Path):
        return _scan_files(connection, Path(source), *_list_files(Path(source)))
    if isinstance(source, list) and source and all(isinstance(each, Path) for each in source):
        return _scan_files(connection, source[0].parent, source, _is_csv(source[0]))
    try:
        if isinstance(source, ibis.Table):
            # Opened when it is read: an engine may know one open query alone.
            return Scan(
                name,
                source.columns,
                False,
                lambda columns: connection.con.from_arrow(
                    source.select(*columns).to_pyarrow_batches()
                ),
            )
        arrow = source if isinstance(source, pa.RecordBatchReader) else pa.table(source)
        return _scan_relation(name, connection.con.from_arrow(arrow), False)
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, ValueError, duckdb.Error) as error:
        raise DataError(
            f"{name}: a {type(source).__name__} cannot be read as a table: {error}. Give a path, a "
            "pandas DataFrame whose columns hold one type each, a pyarrow Table or an Ibis table."
        ) from error


def _scan_files(connection: DuckDB, path: Path, paths: Sequence[Path], is_text: bool) -> Scan:
    reader = _csv_sql(paths) if is_text else f"read_parquet({_quote_all(paths)})"
    try:
        return _scan_relation(str(path), connection.con.sql(f"SELECT * FROM {reader}"), is_text)
    except duckdb.Error as error:
        raise _unreadable(path, error) from error


def _scan_relation(name: str, relation: duckdb.DuckDBPyRelation, is_text: bool) -> Scan:
    return Scan(name, relation.columns, is_text, lambda columns: relation)


def _unreadable(name: str | Path, error: duckdb.Error) -> DataError:
    # DuckDB goes on with options of its reader, which are not settings here.
    reason = re.split(r"\s*\nPossible fixes:", str(error))[0].strip()
    return DataError(
        f"{name} cannot be read: {reason}\nGive CSV with a header, the same number of fields and "
        "the same line ending in each line, and quotes that close; or Parquet."
    )


def _csv_sql(paths: Sequence[Path]) -> str:
    """Writes SQL that scans the files in this order, all columns as text."""
    header, delimiter = _read_header(paths)
    types = ", ".join(f"{_quote(name)}: 'VARCHAR'" for name in header)
    return (
        f"read_csv({_quote_all(paths)}, columns={{{types}}}, delim={_quote(delimiter)}, "
        "header=true, auto_detect=false, quote='\"', escape='\"')"
    )


def _list_files(path: Path) -> tuple[list[Path], bool]:
    """Lists the files of a path, by name, and tells whether they are CSV."""
    if not path.exists():
        raise DataError(f"{path} does not exist. Give a CSV or Parquet file, or a folder of them.")
    if path.is_dir():
        below = (each.relative_to(path) for each in path.rglob("*") if each.is_file())
        # Engines leave _SUCCESS, ._x.crc and the like beside their output.
        visible = [each for each in below if not any(p[0] in "._" for p in each.parts)]
        paths = [path / each for each in sorted(visible)]
    else:
        paths = [path]
    is_csv = [_is_csv(each) for each in paths]
    is_parquet = [each.name.lower().endswith((".parquet", ".pq")) for each in paths]
    if not paths or not (all(is_csv) or all(is_parquet)):
        raise DataError(
            f"{path} must be, or hold, files of one kind: {', '.join(_CSV_SUFFIXES)}, or .parquet. "
            f"It holds {len(paths)} files: {', '.join(each.name for each in paths[:5])}."
        )
    return paths, is_csv[0]


def _is_csv(path: Path) -> bool:
    return path.name.lower().endswith(_CSV_SUFFIXES)


def _read_header(paths: Sequence[Path]) -> tuple[list[str], str]:
    """Reads the column names, and the delimiter, from the first lines of CSV files."""
    lines = []
    for path in paths:
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rt", encoding="utf-8-sig", newline="") as opened:
                lines.append(opened.readline().rstrip("\r\n"))
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path} cannot be read: {error}. Give UTF-8 CSV with a header."
            ) from error
        if not lines[-1].strip():
            raise DataError(f"{path}: 0 rows, and no header. Give a file that holds events.")
        if lines[-1] != lines[0]:
            raise DataError(
                f"{path} has another header than {paths[0].name}: {lines[-1]!r}, not "
                f"{lines[0]!r}. Give the files of a folder the same columns."
            )
    delimiter = max(",;\t|", key=lines[0].count)
    header = next(csv.reader([lines[0]], delimiter=delimiter))
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated or "" in header:
        raise DataError(
            f"{paths[0]}: the first line must name each column once. Repeated or empty: "
            f"{', '.join(repeated) or 'a column without a name'}."
        )
    return header, delimiter


def _double(name: str) -> str:
    return name.replace('"', '""')


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _quote_all(paths: Sequence[Path]) -> str:
    return "[" + ", ".join(_quote(str(path)) for path in paths) + "]"
