"""Opens the sources of a log: CSV or Parquet, a file or a folder, or a table in memory."""

import collections
import contextlib
import csv
import glob
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet
from duckdb import DuckDBPyRelation as Relation
from ibis.backends.duckdb import Backend as DuckDB
from ibis.common.exceptions import TableNotFound

from tfrs_pipeline.data.engines import check_stored
from tfrs_pipeline.data.raw_table import RawTable
from tfrs_pipeline.data.rules import LINES_REMEDY
from tfrs_pipeline.data.schema import DataError, Dropped, Source, check_exists, count_rows, denied
from tfrs_pipeline.messages import counted, printable, sentence

_LONGEST_HEADER = 1 << 20
# DuckDB silently drops a line longer than its buffer of 32 MB. Such a line fills at least one of
# the file's blocks of half that size.
_BLOCK = 1 << 24
_CSV_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
# Faults for which DuckDB skips a single line; an open quote may take any number of others with it.
_SEPARATE = ("MISSING COLUMNS", "TOO MANY COLUMNS", "INVALID ENCODING")


@dataclass(frozen=True)
class Scan:
    """A table whose columns are known but whose rows are not read yet.

    If it `is_csv`, its columns are strings, and DuckDB puts the lines that it cannot read into
    `rejects`. A stream can be read only once.
    """

    connection: DuckDB
    name: str
    source: Relation | ibis.Table
    is_csv: bool = False
    rejects: str = ""
    is_stream: bool = False

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns."""
        return self.source.columns

    def texts(self, column: str, most: int) -> list[str]:
        """Returns the first `most` distinct texts of a column, sorted; none of a stream.

        Null is "". `load` reads the rows again.
        """
        if self.is_stream:
            return []
        text = f"coalesce(CAST({quoted(column)} AS VARCHAR), '')"
        with self._reading():
            rows = self._open([column]).project(f"trim({text}) AS text").distinct().limit(most)
            return sorted(text.strip() for (text,) in rows.fetchall())

    def load(self, names: Mapping[str, str], renaming: str = "columns") -> RawTable:
        """Reads columns, once, and counts broken lines; `names` maps new names to those here.

        `renaming` is the option of `Reading` that names them.
        """
        if inner := [name for name in names if name.startswith("_")]:
            raise DataError(
                f"{self.name}: a column cannot be called {printable(inner[0])}: names with '_' in "
                "front are internal. Rename it with columns, item_columns or user_columns.",
                "columns",
            )
        table = ibis.util.gen_name("raw")
        columns = [f"{quoted(column)} AS {quoted(name)}" for name, column in names.items()]
        # A row number without ORDER BY follows the order of the scan, on one thread.
        projection = ", ".join([*columns, "row_number() OVER () - 1 AS _row"])
        with self._reading():
            self._open(dict.fromkeys(names.values())).project(projection).create(table)
            raw = self.connection.table(table)  # A full disk may show only here.
        renamed = {name: column for name, column in names.items() if name != column}
        source, is_text = Source(self.name, renamed), self.is_csv
        return RawTable(raw, source, count_rows(raw), is_text, self._dropped(), renaming=renaming)

    def _open(self, columns: Iterable[str]) -> Relation:
        """Opens the rows of some columns, in order."""
        if not isinstance(self.source, ibis.Table):
            return self.source
        # Opened only when it is read, because an engine may allow a single open query.
        rows = self.source.select(*columns)
        if rows.get_backend() is self.connection:
            return self.connection.con.sql(self.connection.compile(rows))
        return self.connection.con.from_arrow(rows.to_pyarrow_batches())

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        if self.is_csv:
            # DuckDB skips columns that the query does not use, and then fails on a line that is bad
            # in one of them ("INTERNAL Error"). To read all costs little: the line is split anyway.
            self.connection.con.execute("SET disabled_optimizers = 'unused_columns'")
        try:
            yield
        except (duckdb.Error, TableNotFound) as error:
            raise _unreadable(self.name, error, is_csv=self.is_csv) from error
        finally:
            if self.is_csv:
                self.connection.con.execute("RESET disabled_optimizers")

    def _dropped(self) -> list[Dropped]:
        """Counts the skipped lines; refuses those that may hide others."""
        sql = (
            f"SELECT line, file_path, error_type, error_message FROM {self.rejects} "
            f"JOIN {self.rejects}_files USING (scan_id, file_id) ORDER BY file_path, line"
        )
        faults = self.connection.con.sql(sql).fetchall() if self.rejects else []
        for line, path, kind, message in faults:
            # How many rows such a line hides is not known, so it cannot be counted as dropped.
            if kind not in _SEPARATE:
                reason = f"{message} (line {line})"
                raise DataError(f"{path} cannot be read: {printable(reason, 300)} {LINES_REMEDY}")
        if not faults:
            return []
        line, path, _, message = faults[0]
        where = f"first: line {line} of {Path(path).name}"
        num_lines = len({(path, line) for line, path, _, _ in faults})
        return [Dropped(f"unreadable line: {printable(message, 60)} ({where})", num_lines)]


def scan(connection: DuckDB, source: Any, name: str) -> Scan:
    """Opens a source of rows: a file, the files of a folder in the order of names, or a table.

    `source` is a path (never a pattern) to CSV with a header or to Parquet, or a table: pandas,
    pyarrow, Ibis of any backend, or any other Arrow-compatible one, which messages call `name`.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        paths, is_text = _list_files(path)
        try:
            return (_scan_csv if is_text else _scan_parquet)(connection, path, paths)
        except duckdb.Error as error:
            raise _unreadable(path, error, is_csv=is_text) from error
    if isinstance(source, ibis.Table):
        return Scan(connection, name, source)
    try:
        # A stream stays one: it may be larger than memory, and can be read only once.
        is_stream = isinstance(source, pa.RecordBatchReader)
        arrow = source if is_stream else _plain_table(pa.table(source))
        _check_names(name, arrow.schema.names)
        relation = connection.con.from_arrow(arrow)
    except DataError:
        raise
    except (pa.ArrowException, TypeError, ValueError, duckdb.Error) as error:
        raise DataError(
            f"{name}: a {type(source).__name__} cannot be read as a table: "
            f"{sentence(printable(str(error), 300))} Give a path, a pandas DataFrame whose columns "
            "hold one type each, a pyarrow Table or an Ibis table."
        ) from error
    return Scan(connection, name, relation, is_stream=is_stream)


def _plain_table(table: pa.Table) -> pa.Table:
    """Casts columns that DuckDB cannot take to types with the same values."""
    for i, column in enumerate(table.schema):
        values, dtype = table[i], column.type
        if pa.types.is_dictionary(dtype) and isinstance(dtype.value_type, pa.BaseExtensionType):
            # For example the intervals of `pandas.cut`, on which DuckDB would crash.
            chunks = [chunk.dictionary_decode().storage for chunk in values.chunks]
            values = pa.chunked_array(chunks, dtype.value_type.storage_type)
        elif pa.types.is_float16(dtype):
            values = values.cast(pa.float32())
        elif pa.types.is_list(dtype) and pa.types.is_float16(dtype.value_type):
            values = values.cast(pa.list_(pa.float32()))
        elif pa.types.is_null(dtype):
            values = values.cast(pa.string())
        if values.type != dtype:
            table = table.set_column(i, column.name, values)
    return table


def _scan_csv(connection: DuckDB, path: Path, paths: Sequence[Path]) -> Scan:
    """Opens CSV files in the given order, with all columns as text."""
    header, delimiter = _read_header(path, paths)
    types = ", ".join(f"{_quote(column)}: 'VARCHAR'" for column in header)
    rejects = ibis.util.gen_name("bad")
    # With "auto", DuckDB takes a "?" in a file name as its end.
    are_zipped = {_is_zipped(path) for path in paths}
    compression = "auto" if len(are_zipped) > 1 else "gzip" if True in are_zipped else "none"
    # Without detection: a guess from the first rows would take 007 for 7. The types come later.
    relation = connection.con.sql(
        f"SELECT * FROM read_csv({_quote_all(paths)}, columns={{{types}}}, "
        f"delim={_quote(delimiter)}, header=true, auto_detect=false, quote='\"', escape='\"', "
        f"hive_partitioning={_is_partitioned(path, paths)}, compression='{compression}', "
        f"store_rejects=true, rejects_table='{rejects}', rejects_scan='{rejects}_files')"
    )
    return Scan(connection, str(path), relation, is_csv=True, rejects=rejects)


def _scan_parquet(connection: DuckDB, path: Path, paths: Sequence[Path]) -> Scan:
    """Opens Parquet files; reads their footers, and refuses files with different columns."""
    common: pa.Schema | None = None
    for file in paths:
        try:
            schema = pyarrow.parquet.read_schema(file)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{file} cannot be read: {sentence(printable(str(error), 200))} Write it again as "
                "Parquet."
            ) from error
        _check_names(file, schema.names, _folders(path, file))
        # Dictionaries and large strings are ways to store a type, not other types.
        schema = pa.schema([pa.field(column.name, _plain(column.type)) for column in schema])
        common = schema if common is None else common
        # Otherwise columns that the first file lacks would silently be left out.
        if odd := sorted({*common.names} ^ {*schema.names}):
            raise DataError(
                f"{file} has other columns than {paths[0].name}: only one of them has "
                f"{printable(', '.join(odd), 200)}. Give the files of a folder the same columns."
            )
        try:
            # Permissive: a column without a value, or of integers in some files, is no other type.
            common = pa.unify_schemas([common, schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(
                f"{file} has other types than the files before it: "
                f"{sentence(printable(str(error), 200))} Give the files of a folder the same types."
            ) from error
    assert common is not None
    hive = f"hive_partitioning={_is_partitioned(path, paths)}"
    # By name, a column gets a type that fits the values of all files, not the first file's type.
    rows = f"read_parquet({_quote_all(paths)}, union_by_name=true, {hive})"
    # A column without any value has no type and would become integers; see `_plain_table`.
    names = [quoted(column.name) for column in common if pa.types.is_null(column.type)]
    as_text = ", ".join(f"CAST({name} AS VARCHAR) AS {name}" for name in names)
    replaced = f"REPLACE ({as_text})" if names else ""
    relation = connection.con.sql(f"SELECT * {replaced} FROM {rows}")
    return Scan(connection, str(path), relation)


def _plain(dtype: pa.DataType) -> pa.DataType:
    """Returns the logical type of a column's values, however they are stored."""
    if pa.types.is_dictionary(dtype):
        return _plain(dtype.value_type)
    return pa.string() if pa.types.is_large_string(dtype) else dtype


def _folders(path: Path, file: Path) -> list[str]:
    """Returns the folders COLUMN=VALUE between the user's path and a file; each makes a column."""
    parts = file.relative_to(path).parent.parts if path in file.parents else ()
    return [part for part in parts if "=" in part]


def _is_partitioned(path: Path, paths: Sequence[Path]) -> bool:
    if not any(_folders(path, file) for file in paths):
        return False
    # DuckDB looks at the folders above the user's path, too.
    if above := [part for part in path.absolute().parts if "=" in part]:
        raise DataError(
            f"{path} lies in {printable(above[0])}, which would be read as a column, as the "
            "folders in it are. Name that folder without '=', or read the files one by one."
        )
    return True


def _check_names(name: str | Path, columns: Sequence[str], folders: Sequence[str] = ()) -> None:
    """Refuses column names that are equal but for case, which a database treats as one."""
    named = [*columns, *{part.partition("=")[0] for part in folders}]
    counts = collections.Counter(column.casefold() for column in named)
    if repeated := sorted({part for part in named if counts[part.casefold()] > 1 or not part}):
        raise DataError(
            f"{name} must name each column once, in its folders' names too. Repeated or empty: "
            f"{printable(', '.join(repeated) or 'a column without a name', 200)}. Rename them."
        )


def _unreadable(name: str | Path, error: Exception, *, is_csv: bool) -> DataError:
    check_stored(error)
    # Only the first line: the others name options of DuckDB's reader, which are not settings here.
    # DuckDB's own reason, shortened: it says what is wrong, and the remedy says what to do.
    reason = printable(str(error).strip().partition("\n")[0], 300)
    if "invalid state" in reason:  # DuckDB's words for mixed line endings.
        reason = "some lines end in \\r\\n and others in \\n alone."
    remedy = f" {LINES_REMEDY}" if is_csv else ""
    return DataError(f"{name} cannot be read: {reason}{remedy}")


def _list_files(path: Path) -> tuple[list[Path], bool]:
    """Returns the files of a path, by name, and whether they are CSV."""
    check_exists(path)
    paths = _files_below(path) if path.is_dir() else [path]
    for file in (path, *paths):
        if not os.access(file, os.R_OK):
            raise denied(file)
    csv = [file for file in paths if file.name.lower().endswith(_CSV_SUFFIXES)]
    parquet = [file for file in paths if file.name.lower().endswith((".parquet", ".pq"))]
    # The kind of most files is what the folder is meant to hold; the others are named.
    usual = max(csv, parquet, key=len)
    odd = sorted({*paths} - {*usual})
    if odd or not paths:
        listed = ", ".join(file.name for file in odd[:5])
        names = f", {len(odd)} of another kind: {listed}" if odd else ""
        remedy = ""
        if {".json", ".jsonl", ".ndjson"} & {file.suffix for file in odd}:
            remedy = " DuckDB converts JSON: COPY (FROM 'clicks.jsonl') TO 'clicks.parquet'."
        raise DataError(
            f"{path} must be, or hold, files of one kind: {', '.join(_CSV_SUFFIXES)}, or .parquet. "
            f"It holds {counted(len(paths), 'file')}{names}.{remedy}"
        )
    return paths, usual is csv


def _files_below(path: Path) -> list[Path]:
    """Lists the files in a folder and its subfolders, by name; links are followed.

    A file or folder that several links lead to is listed once, so a link to a folder above it does
    no harm. A link to nothing, or a folder that may not be listed, is a `DataError`: otherwise its
    rows would be missing silently.
    """

    def refuse(error: OSError) -> None:
        raise denied(error.filename) from error

    files, seen = list[Path](), {os.path.realpath(path)}
    for folder, folders, names in os.walk(path, onerror=refuse, followlinks=True):
        if "_delta_log" in folders:
            raise DataError(
                f"{folder} is a table of Delta Lake: its files also hold rows that were deleted. "
                "Write what it holds now as Parquet, for instance with DuckDB's delta_scan, and "
                "give that."
            )
        new = []
        # Engines leave _SUCCESS, ._x.crc and the like beside their output.
        for name in sorted(name for name in (*folders, *names) if name[0] not in "._"):
            real = os.path.realpath(Path(folder, name))
            new += [] if real in seen else [name]
            seen.add(real)
        folders[:] = [name for name in folders if name in new]
        files += [Path(folder, name) for name in names if name in new]
    # Checked here, because DuckDB's message would not say that it is a link.
    for file in files:
        check_exists(file)
    return sorted(files)


def _read_header(source: Path, paths: Sequence[Path]) -> tuple[list[str], str]:
    """Reads the column names, and the delimiter, from the first lines of CSV files."""
    lines = []
    for path in paths:
        try:
            _refuse_long_lines(path)
            with _open(path) as opened:
                # A limit, because a file that is not text may have no line end.
                lines.append(opened.readline(_LONGEST_HEADER).decode("utf-8-sig").rstrip("\r\n"))
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            whole = ", and the whole of the zipped file" if _is_zipped(path) else ""
            remedy = f"Give UTF-8 CSV with a header{whole}."
            raise DataError(f"{path} cannot be read: {error}. {remedy}") from error
        if not lines[-1].strip():
            raise DataError(f"{path}: 0 rows, and no header. Give a file that holds events.")
        if lines[-1] != lines[0]:
            first, other = (printable(repr(line)) for line in (lines[0], lines[-1]))
            raise DataError(
                f"{path} has another header than {paths[0].name}: {other}, not {first}. Give the "
                "files of a folder the same columns."
            )
    # Names of columns rarely hold delimiters, as values do, so the header alone decides.
    delimiter = max(",;\t|", key=lines[0].count)
    try:
        header = [name.strip() for name in next(csv.reader([lines[0]], delimiter=delimiter))]
    except csv.Error as error:
        reason = "its lines end in \\r alone" if "\r" in lines[0] else f"its header has a {error}"
        raise DataError(f"{paths[0]} cannot be read: {reason}. {LINES_REMEDY}") from error
    for path in paths:
        _check_names(path, header, _folders(source, path))
    return header, delimiter


def _refuse_long_lines(path: Path) -> None:
    """Refuses (`DataError`) lines that DuckDB drops; looks at the start of each block of a file.

    A zipped file is read whole, since DuckDB accepts truncated files and skips checksums.
    """
    with _open(path) as opened:
        start, part = 0, b"-"
        while part:
            opened.seek(start)
            end, start = start + _BLOCK, start + _BLOCK
            while (part := opened.read(min(1 << 16, end - opened.tell()))) and b"\n" not in part:
                if opened.tell() == end:
                    raise DataError(
                        f"{path} cannot be read: a line is longer than {_BLOCK >> 20} MB. "
                        f"{LINES_REMEDY}"
                    )


def _is_zipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    return (gzip.open if _is_zipped(path) else open)(path, "rb")


def quoted(column: str) -> str:
    """Returns the name of a column for SQL."""
    return '"' + column.replace('"', '""') + '"'


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _quote_all(paths: Sequence[Path]) -> str:
    # DuckDB would read some paths as patterns.
    return "[" + ", ".join(_quote(glob.escape(str(path))) for path in paths) + "]"
