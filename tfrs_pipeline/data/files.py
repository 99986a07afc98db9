"""A user's own files: CSV or Parquet, one file or a folder, turned into the three tables."""

from __future__ import annotations

import csv
import gzip
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import duckdb
import ibis
import ibis.expr.types as ir
from ibis.backends.duckdb import Backend as DuckDB

from tfrs_pipeline.data.columns import (
    TimestampUnit,
    convert_context,
    convert_feature,
    convert_number,
    convert_timestamp,
    is_integer_id,
)
from tfrs_pipeline.data.schema import (
    DataError,
    Dropped,
    FeatureKind,
    Source,
    Stage,
    Tables,
    check_entities,
    check_events,
    count_missing,
    require_column,
)

logger = logging.getLogger(__name__)

EventKind = Literal["events", "clicks", "ratings"]
UnknownItems = Literal["keep", "drop", "error"]
Duplicates = Literal["keep", "drop", "error"]

_CSV_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_OWN_COLUMN: dict[EventKind, str | None] = {"events": "stage", "clicks": None, "ratings": "rating"}
_OPTIONAL = ("timestamp", "request_id", "rank", "score", "weight", "part")
_MADE_HERE = ("event_number",)


@dataclass(frozen=True)
class File:
    """What one path holds, as a DuckDB table."""

    name: str
    table: ibis.Table  # all columns of the file, and _row: the order in it, from 0
    path: Path
    is_text: bool  # CSV: every column is a string yet

    @property
    def columns(self) -> list[str]:
        """Column names of the file, in its order."""
        return [name for name in self.table.columns if name != "_row"]


def load_tables(
    events_path: Path,
    *,
    kind: EventKind,
    columns: Mapping[str, str] | None = None,
    rating_threshold: float | None = None,
    stage_values: Mapping[str, str] | None = None,
    timestamp_unit: TimestampUnit | None = None,
    time_zone: str | None = None,
    items_path: Path | None = None,
    users_path: Path | None = None,
    item_features: Mapping[str, FeatureKind] | None = None,
    user_features: Mapping[str, FeatureKind] | None = None,
    list_separator: str = "|",
    unknown_items: UnknownItems = "keep",
    duplicates: Duplicates = "keep",
    requires_positives: bool = True,
    connection: DuckDB | None = None,
) -> Tables:
    """Loads an event log, a click log, or ratings.

    Files of a folder are read in the order of their names. The order of the rows becomes
    `event_number`. Integer ids stay integers; ids in CSV are integers if all are written as such.

    Args:
        events_path: CSV (with a header) or Parquet; a file or a folder of them.
        kind: "events" has a stage column, "clicks" holds clicks alone, "ratings" has a rating
            column: at or above the threshold is clicked, below it exposed (never a negative).
        columns: Canonical name -> column in the file. A column called by its canonical name needs
            no entry. A name of your own makes a context column; `part` is the log's own split (see
            `split.split_by_column`).
        rating_threshold: Lowest rating that is a positive; for ratings.
        stage_values: Value in the stage column -> stage, where they differ.
        timestamp_unit: What numeric timestamps count since 1970, those of features too; None means
            seconds.
        time_zone: Of timestamps without one, those of features too; None refuses them.
        items_path: Item table, one row an id; its id column is named as in the events, or item_id.
            None makes one of the ids alone. A column `title` is kept, feature or not.
        users_path: The same of users. Users that it lacks are kept, with null features.
        item_features: Feature column -> kind.
        user_features: Feature column -> kind.
        list_separator: Parts the values of multi_categorical and vector features in a string.
        unknown_items: Events whose item is not in the item table: keep them (the item is added with
            null features), drop them, or refuse.
        duplicates: Events equal in user, item, time, stage, request and part: keep all, drop all
            but the first, or refuse.
        requires_positives: Whether a log without a click is refused; a label may still make some.
        connection: DuckDB connection for the tables; a new one, in memory, if None.

    Returns:
        Tables that keep the contract; `dropped` counts what was left out.

    Raises:
        DataError: Naming file, column, row count and remedy.
        ValueError: If the arguments contradict each other.
    """
    connection = connection or connect()
    columns, stage_values = dict(columns or {}), dict(stage_values or {})
    item_features, user_features = dict(item_features or {}), dict(user_features or {})
    _check_arguments(kind, columns, rating_threshold, stage_values, items_path, item_features)
    _check_user_arguments(users_path, user_features)
    file = open_file(connection, Path(events_path))
    item_file = open_file(connection, Path(items_path)) if items_path else None
    user_file = open_file(connection, Path(users_path)) if users_path else None
    names = _name_columns(file, kind, columns)
    source = Source(str(file.path), names)
    item_id, other_item_id = _matching_ids(file, item_file, "item_id", source)
    user_id, other_user_id = _matching_ids(file, user_file, "user_id", source)

    converted: dict[str, ir.Value] = {"user_id": user_id, "item_id": item_id}
    if "timestamp" in names:
        converted["timestamp"] = convert_timestamp(
            file.table,
            names["timestamp"],
            source,
            is_text=file.is_text,
            unit=timestamp_unit,
            time_zone=time_zone,
        )
    converted["event_number"] = file.table["_row"]
    converted["stage"] = _stage(file, kind, source, rating_threshold, stage_values)
    for name in names:
        if name not in converted and not (name == "rating" and kind == "ratings"):
            converted[name] = _other_column(file, name, source)
    events = store(connection, file.table.select(**converted), source)
    check_events(events, source, requires_positives=requires_positives)

    items, users = (
        read_entities(
            opened,
            ids,
            id_name,
            features,
            events,
            list_separator,
            timestamp_unit=timestamp_unit,
            time_zone=time_zone,
        )
        for opened, ids, id_name, features in (
            (item_file, other_item_id, "item_id", item_features),
            (user_file, other_user_id, "user_id", user_features),
        )
    )
    tables = finish_tables(
        connection,
        Tables(events, items, users, item_features, user_features),
        source,
        items_path=items_path,
        users_path=users_path,
        unknown_items=unknown_items,
        duplicates=duplicates,
        requires_positives=requires_positives,
    )
    for opened in (file, item_file, user_file):
        if opened is not None:
            connection.drop_table(opened.name)
    return tables


def load_items(
    path: str | Path,
    *,
    is_integer: bool,
    item_features: Mapping[str, FeatureKind],
    id_column: str = "item_id",
    list_separator: str = "|",
    timestamp_unit: TimestampUnit | None = None,
    time_zone: str | None = None,
) -> ibis.Table:
    """Loads an item table by itself, such as today's for a model of last week's.

    Args:
        path: CSV or Parquet, one row an id.
        is_integer: Whether the ids are integers, as in the events that the model was trained on;
            else they are read as text.
        item_features: Feature column -> kind.
        id_column: Where the ids stand, if not in item_id.
        list_separator: Parts the values of multi_categorical and vector features in a string.
        timestamp_unit: Of timestamp features, as in `load_tables`.
        time_zone: Likewise.

    Returns:
        item_id, the features, and `title` where the file has one, by ascending item_id.

    Raises:
        DataError: Naming file, column, row count and remedy.
    """
    connection = connect()
    file = open_file(connection, Path(path))
    source = Source(str(file.path))
    column = id_column if id_column in file.columns else "item_id"
    require_column(
        file.columns, column, source, f"Ids must stand in a column {id_column!r} or 'item_id'."
    )
    if is_integer and not is_integer_id(file.table, column, source, is_text=file.is_text):
        raise DataError(
            f"{source.column(column)} holds text, and the model's item ids are integers. "
            "Give the ids of the events that it was trained on."
        )
    ids = file.table[column].cast("int64" if is_integer else "string")
    items = read_entities(
        file,
        ids,
        "item_id",
        item_features,
        file.table,
        list_separator,
        timestamp_unit=timestamp_unit,
        time_zone=time_zone,
    )
    return items.order_by("item_id")


def connect() -> DuckDB:
    """Opens a DuckDB in memory, without the progress bar that it would write to the output."""
    connection = ibis.duckdb.connect()
    shown = connection.con.execute("SELECT current_setting('enable_progress_bar')").fetchone()
    if shown and shown[0]:  # In Jupyter without ipywidgets it is off, and may not even be set.
        connection.con.execute("SET enable_progress_bar = false")
    return connection


def finish_tables(
    connection: DuckDB,
    tables: Tables,
    source: Source,
    *,
    items_path: Path | None,
    users_path: Path | None,
    unknown_items: UnknownItems = "keep",
    duplicates: Duplicates = "keep",
    requires_positives: bool = True,
) -> Tables:
    """Makes a source's tables keep the contract: what every source does last.

    Events of unknown items and repeated events are settled, ids that the item and user tables lack
    are added with null features, and all of it is stored.

    Args:
        connection: Where the tables are, and where the finished ones are stored.
        tables: Checked events, and item and user tables that may lack ids of the events; `dropped`
            is what the source left out so far.
        source: The events' name in messages.
        items_path: The file of the item table, for messages; None if there is none.
        users_path: The same of users.
        unknown_items: As in `load_tables`.
        duplicates: As in `load_tables`.
        requires_positives: As in `load_tables`.

    Returns:
        Tables that keep the contract; `dropped` counts all that was left out.

    Raises:
        DataError: If unknown items or duplicates are refused, or nothing is left.
    """
    events = tables.events
    kept, unknown = _settle_unknown_items(events, tables.items, source, unknown_items)
    kept, repeated = _settle_duplicates(kept, source, duplicates)
    dropped = (*tables.dropped, *unknown, *repeated)
    for reason in dropped:
        logger.info("%s: dropped %d events: %s", source.name, reason.num_rows, reason.reason)
    if unknown or repeated:
        kept = store(connection, kept, source)
        check_events(kept, source, requires_positives=requires_positives)
    items = _add_missing(tables.items, kept, "item_id", items_path)
    users = _add_missing(tables.users, kept, "user_id", users_path)
    return Tables(
        events=kept,
        items=store(connection, items.order_by("item_id"), source),
        users=store(connection, users.order_by("user_id"), source),
        item_features=tables.item_features,
        user_features=tables.user_features,
        dropped=dropped,
    )


def _check_arguments(
    kind: EventKind,
    columns: Mapping[str, str],
    rating_threshold: float | None,
    stage_values: Mapping[str, str],
    items_path: Path | None,
    item_features: Mapping[str, FeatureKind],
) -> None:
    if kind not in _OWN_COLUMN:
        raise ValueError(f"kind must be one of {', '.join(_OWN_COLUMN)}. Received: {kind!r}.")
    if (kind == "ratings") != (rating_threshold is not None):
        raise ValueError(
            "rating_threshold goes with kind='ratings', which needs it: the lowest rating that is "
            f"a positive. Received: kind={kind!r}, rating_threshold={rating_threshold}."
        )
    if stage_values and kind != "events":
        raise ValueError(f"stage_values goes with kind='events'. Received: kind={kind!r}.")
    stages = [str(stage) for stage in Stage]
    if wrong := sorted(set(stage_values.values()) - set(stages)):
        raise ValueError(f"stage_values must map to {', '.join(stages)}. Received: {wrong}.")
    if wrong := sorted(set(columns) & set(_MADE_HERE)):
        raise ValueError(f"columns: {', '.join(wrong)} is made here; name the column otherwise.")
    if item_features and items_path is None:
        raise ValueError("item_features needs items_path: the file that holds the features.")


def _check_user_arguments(
    users_path: Path | None, user_features: Mapping[str, FeatureKind]
) -> None:
    if user_features and users_path is None:
        raise ValueError("user_features needs users_path: the file that holds the features.")


def open_file(connection: DuckDB, path: Path) -> File:
    """Opens a path as one DuckDB table; rows are numbered in the order of files and rows.

    Raises:
        DataError: If it cannot be read.
    """
    paths, is_text = _list_files(path)
    name = ibis.util.gen_name("file")
    reader = csv_scan(paths)[1] if is_text else f"read_parquet({_quote_all(paths)})"
    try:
        # A row number without an order runs in the order of the scan, on one thread.
        connection.con.execute(
            f'CREATE TEMP TABLE "{name}" AS '
            f"SELECT *, row_number() OVER () - 1 AS _row FROM {reader}"
        )
    except duckdb.Error as error:
        raise DataError(
            f"{path} cannot be read: {str(error).strip()} Give CSV with a header, or Parquet."
        ) from error
    return File(name, connection.table(name, database="temp.main"), path, is_text)


def csv_scan(paths: list[Path]) -> tuple[list[str], str]:
    """Returns the columns of CSV files, and SQL that scans the files in this order, all as text.

    Raises:
        DataError: If the headers differ, or one cannot be read.
    """
    header, delimiter = _read_header(paths)
    types = ", ".join(f"{_quote(name)}: 'VARCHAR'" for name in header)
    return header, (
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
    is_csv = [each.name.lower().endswith(_CSV_SUFFIXES) for each in paths]
    is_parquet = [each.name.lower().endswith((".parquet", ".pq")) for each in paths]
    if not paths or not (all(is_csv) or all(is_parquet)):
        raise DataError(
            f"{path} must be, or hold, files of one kind: {', '.join(_CSV_SUFFIXES)}, or .parquet. "
            f"It holds {len(paths)} files: {', '.join(each.name for each in paths[:5])}."
        )
    return paths, is_csv[0]


def _read_header(paths: list[Path]) -> tuple[list[str], str]:
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


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _quote_all(paths: list[Path]) -> str:
    return "[" + ", ".join(_quote(str(path)) for path in paths) + "]"


def _name_columns(file: File, kind: EventKind, columns: Mapping[str, str]) -> dict[str, str]:
    """Returns canonical name -> column in the file, of all columns to be taken."""
    own = _OWN_COLUMN[kind]
    required = ["user_id", "item_id"] + ([own] if own else [])
    for name in dict.fromkeys([*required, *columns]):
        remedy = f"Say which column it is: columns={{{name!r}: ...}}."
        require_column(file.columns, columns.get(name, name), Source(str(file.path)), remedy)
    optional = [name for name in _OPTIONAL if name in file.columns]
    wanted = dict.fromkeys([*required, *optional, *columns])
    if kind == "clicks":
        wanted.pop("stage", None)
    return {name: columns.get(name, name) for name in wanted}


def _matching_ids(
    file: File, other: File | None, name: str, source: Source
) -> tuple[ir.Value, ir.Value | None]:
    """Returns the ids of the events, and of the item or user file, in one type."""
    column = source.columns[name]
    is_integer = is_integer_id(file.table, column, source, is_text=file.is_text)
    if other is None:
        return file.table[column].cast("int64" if is_integer else "string"), None
    other_source = Source(str(other.path))
    other_column = column if column in other.columns else name
    remedy = f"Its ids must stand in a column {column!r} or {name!r}."
    require_column(other.columns, other_column, other_source, remedy)
    is_integer &= is_integer_id(other.table, other_column, other_source, is_text=other.is_text)
    to = "int64" if is_integer else "string"
    return file.table[column].cast(to), other.table[other_column].cast(to)


def _stage(
    file: File,
    kind: EventKind,
    source: Source,
    rating_threshold: float | None,
    stage_values: Mapping[str, str],
) -> ir.StringValue:
    if kind == "clicks":
        return ibis.literal(Stage.CLICKED.value)
    if kind == "events":
        value = file.table[source.columns["stage"]].cast("string")
        if not stage_values:
            return value
        cases = [(value == found, stage) for found, stage in stage_values.items()]
        return ibis.cases(*cases, else_=value)
    column = source.columns["rating"]
    rating = convert_number(file.table, column, source)
    counts = file.table.aggregate(num_rows=file.table.count(), num_null=rating.isnull().sum())
    row = counts.to_pyarrow().to_pylist()[0]
    if row["num_null"]:
        raise DataError(
            f"{source.column('rating')} is null in {row['num_null']} of {row['num_rows']} rows. "
            "Drop these rows, or rate them."
        )
    is_clicked = rating >= rating_threshold
    return is_clicked.ifelse(Stage.CLICKED.value, Stage.EXPOSED.value)


def _other_column(file: File, name: str, source: Source) -> ir.Value:
    column = source.columns[name]
    if name == "rank":
        return convert_number(file.table, column, source, to="int64")
    if name in ("score", "weight"):
        return convert_number(file.table, column, source)
    if name == "request_id":
        is_integer = is_integer_id(file.table, column, source, is_text=file.is_text)
        return file.table[column].cast("int64" if is_integer else "string")
    return convert_context(file.table, column, is_text=file.is_text)


def read_entities(
    file: File | None,
    ids: ir.Value | None,
    id_name: str,
    features: Mapping[str, FeatureKind],
    events: ibis.Table,
    list_separator: str,
    *,
    timestamp_unit: TimestampUnit | None = None,
    time_zone: str | None = None,
) -> ibis.Table:
    """Makes an item or user table of a file, or of the ids in the events where there is none.

    Args:
        file: Holds the features; None if there is no such file.
        ids: The file's ids, as the events have them.
        id_name: `item_id` or `user_id`.
        features: Feature column -> kind.
        events: The events.
        list_separator: Parts the values of multi_categorical and vector features in a string.
        timestamp_unit: Of timestamp features, as in `load_tables`.
        time_zone: Likewise.

    Returns:
        The id, the features and, of items, a column `title` where the file has one; checked.

    Raises:
        DataError: Naming file, column and remedy.
    """
    if file is None or ids is None:
        return events.select(id_name).distinct()
    source = Source(str(file.path))
    columns = {id_name: ids}
    for name, kind in features.items():
        require_column(file.columns, name, source, "List the features under their own names.")
        columns[name] = convert_feature(
            file.table,
            name,
            kind,
            source,
            is_text=file.is_text,
            list_separator=list_separator,
            timestamp_unit=timestamp_unit,
            time_zone=time_zone,
        )
    if "title" in file.columns and id_name == "item_id":
        columns.setdefault("title", file.table["title"].cast("string"))
    entities = file.table.select(**columns)
    check_entities(entities, id_name, features, source)
    return entities


def _add_missing(
    entities: ibis.Table, events: ibis.Table, id_name: str, path: Path | None
) -> ibis.Table:
    if path is None:
        return entities
    missing = events.select(id_name).distinct().anti_join(entities, id_name)
    num_missing = int(missing.count().to_pyarrow().as_py())
    if not num_missing:
        return entities
    logger.warning("%s: lacks %d ids of the events; added with null features", path, num_missing)
    nulls = {name: ibis.null(dtype) for name, dtype in entities.schema().items() if name != id_name}
    return entities.union(missing.mutate(**nulls).select(*entities.columns))


def _settle_unknown_items(
    events: ibis.Table, items: ibis.Table, source: Source, unknown_items: UnknownItems
) -> tuple[ibis.Table, list[Dropped]]:
    num_unknown = count_missing(events, items, "item_id")
    if not num_unknown or unknown_items == "keep":
        return events, []
    if unknown_items == "error":
        num_rows = events.count().to_pyarrow().as_py()
        example = events.anti_join(items, "item_id")["item_id"].min().to_pyarrow().as_py()
        raise DataError(
            f"{source.column('item_id')}: {num_unknown} of {num_rows} rows hold an item that the "
            f"item table lacks, such as {example!r}. Add it there, or pass unknown_items='keep' "
            "(with null features) or 'drop'."
        )
    dropped = [Dropped("item is not in the item table", num_unknown)]
    return events.semi_join(items, "item_id"), dropped


def _settle_duplicates(
    events: ibis.Table, source: Source, duplicates: Duplicates
) -> tuple[ibis.Table, list[Dropped]]:
    if duplicates == "keep":
        return events, []
    # An event of the test part is not a repeat of one in the training part.
    keys = ["user_id", "item_id", "timestamp", "stage", "request_id", "part"]
    same = ibis.window(
        group_by=[name for name in keys if name in events.columns], order_by="event_number"
    )
    numbered = events.mutate(_copy=ibis.row_number().over(same))
    num_copies = int((numbered["_copy"] > 0).sum().to_pyarrow().as_py() or 0)
    if not num_copies:
        return events, []
    if duplicates == "error":
        num_rows = events.count().to_pyarrow().as_py()
        raise DataError(
            f"{source.name}: {num_copies} of {num_rows} rows repeat an earlier one in user, item, "
            "time, stage and request. Remove them, or pass duplicates='drop' or 'keep'."
        )
    return numbered.filter(numbered["_copy"] == 0).drop("_copy"), [
        Dropped("repeats an earlier event", num_copies)
    ]


def store(connection: DuckDB, expression: ibis.Table, source: Source) -> ibis.Table:
    """Stores an expression as a table of its own.

    Raises:
        DataError: If the engine fails, with its message.
    """
    try:
        return connection.create_table(ibis.util.gen_name("tables"), expression)
    except duckdb.Error as error:
        raise DataError(f"{source.name}: {str(error).strip()}") from error
