"""Raw tables typed and stored without the rows at fault; those of items and of users."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import duckdb
import ibis
import ibis.expr.types as ir
from ibis.backends.duckdb import Backend as DuckDB
from ibis.common.exceptions import TableNotFound

from tfrs_pipeline.data.columns import feature_column, is_integer, to_required_id
from tfrs_pipeline.data.engines import connect
from tfrs_pipeline.data.files import LINES_REMEDY, check_stored, scan
from tfrs_pipeline.data.reading import Reading
from tfrs_pipeline.data.rules import Fault, RawTable, evaluate
from tfrs_pipeline.data.schema import DataError, Dropped, Source, count_rows, require_column
from tfrs_pipeline.features.kinds import KINDS
from tfrs_pipeline.messages import counted, in_percent, printable, suggest


def store_sound(raw: RawTable, columns: Mapping[str, ir.Value], max_bad_share: float) -> ibis.Table:
    """Stores typed columns of the rows that may stay, and counts the others by their first fault.

    Adds to what was dropped of the table, and to its notes which values are taken as missing. A
    `DataError` if there are more of either than `max_bad_share`.
    """
    faults = sorted(raw.faults, key=lambda fault: fault.rule.is_droppable)
    num_rows = raw.num_rows + sum(each.num_rows for each in raw.dropped)
    worst: tuple[bool, int, Fault] | None = None
    for fault, num in zip(faults, evaluate(raw.table, faults).num_bad, strict=True):
        if fault.is_missing and num > max_bad_share * raw.num_rows:
            raise fault.error(raw.table, raw.source, max_bad_share)
        if fault.is_missing and num:
            where = raw.source.column(fault.column)
            raw.notes.append(f"{where} {fault.rule.problem} in {num:,} rows: taken as missing")
        elif num:
            of = printable(repr(raw.source.columns.get(fault.column, fault.column)))
            raw.dropped.append(Dropped(f"column {of} {fault.rule.problem}", num))
            if worst is None or (not fault.rule.is_droppable, num) > worst[:2]:
                worst = (not fault.rule.is_droppable, num, fault)
    is_too_much = sum(each.num_rows for each in raw.dropped) > max_bad_share * num_rows
    if worst is not None and (is_too_much or worst[0]):
        raise worst[2].error(raw.table, raw.source, max_bad_share)
    if is_too_much:
        raise DataError(
            f"{raw.source.name}: {raw.dropped[0].reason} ({raw.dropped[0].num_rows} of {num_rows} "
            f"lines). {LINES_REMEDY}",
            "max_bad_share",
        )
    rows = raw.table
    if worst is not None:
        rows = rows.filter(*(~f.is_bad.fill_null(False) for f in faults if not f.is_missing))
    return store(rows.select(**columns), raw.source)


def load_raw(
    connection: DuckDB,
    source: Any,
    columns: Mapping[str, str],
    features: Mapping[str, str],
    id_name: str,
    remedy: str = "",
    id_of_events: str = "",
) -> RawTable | None:
    """Opens an item or user table; returns None if there is none, and refuses features then.

    `remedy` replaces the advice to set a missing column's name; `id_of_events` is the events'
    column of these ids, which is suggested if this table has it too.
    """
    kind = id_name.removesuffix("_id")
    if source is None:
        if features:
            raise ValueError(
                f"{kind}_features needs {kind}s: the table that holds the features. Received: "
                f"{', '.join(features)}."
            )
        return None
    scanned = scan(connection, source, f"{kind} table")
    shown = ["title"] if id_name == "item_id" and "title" in scanned.columns else []
    setting = f"{kind}_columns"
    used = dict.fromkeys([id_name, *features, *(["title"] if id_name == "item_id" else [])])
    if unused := sorted(set(columns) - set(used)):
        raise DataError(
            f"{setting}.{printable(unused[0])}: nothing reads a column of that name, "
            f"{suggest(unused[0], used)}",
            setting,
        )
    names = {}
    for name in dict.fromkeys([id_name, *features, *shown, *columns]):
        names[name] = columns.get(name, name)
        mend = remedy or f"Set {setting} to say which column is {name}."
        if name == id_name and id_of_events in scanned.columns:
            mend = f"Add {name}={printable(id_of_events)} to {setting}, as in columns."
        require_column(scanned.columns, names[name], Source(scanned.name), mend, setting)
    return replace(scanned.load(names), renaming=setting)


def type_entities(
    raw: RawTable,
    id_name: str,
    *,
    as_integer: bool,
    features: Mapping[str, str],
    reading: Reading,
) -> ibis.Table:
    """Types and stores an item or user table, one row an id: features and a title of items."""
    columns = {id_name: to_required_id(raw, id_name, as_integer=as_integer)}
    type_features(raw, columns, features, reading)
    if "title" in raw and id_name == "item_id":
        columns.setdefault("title", raw.table["title"].cast("string"))
    entities = store_sound(raw, columns, reading.max_bad_share)
    raw.notes.extend(describe_missing(entities, [*columns][1:], raw.source))
    num_rows, num_ids = count_rows(entities), count_rows(entities.select(id_name).distinct())
    if num_ids < num_rows:
        entities = store(entities.distinct(), raw.source)
        num_left = count_rows(entities)
        if num_left != num_ids:
            counts_of = entities.group_by(id_name).agg(num=entities.count())
            repeated = counts_of.filter(counts_of["num"] > 1)[id_name].min().to_pyarrow().as_py()
            raise DataError(
                f"{raw.source.column(id_name)} holds {num_ids} different ids in {num_left} rows "
                f"that differ, such as those of {printable(repr(repeated))}. One row an id: remove "
                "the repeated ones."
            )
        raw.dropped.append(Dropped(f"repeats a row of {raw.source.name}", num_rows - num_ids))
    return entities


def type_features(
    raw: RawTable, columns: dict[str, ir.Value], features: Mapping[str, str], reading: Reading
) -> None:
    """Types features; their unusable values will be missing."""
    num_others = len(raw.faults)
    for name, kind in features.items():
        columns[name] = KINDS[kind].read(feature_column(raw, name, reading))
    raw.faults[num_others:] = [f._replace(is_missing=True) for f in raw.faults[num_others:]]


def describe_missing(table: ibis.Table, columns: Iterable[str], source: Source) -> Iterator[str]:
    """Says which columns have missing values, and in how many rows."""
    nulls = {name: table[name].isnull().sum() for name in columns}
    counts = table.aggregate(_rows=table.count(), **nulls).to_pyarrow().to_pylist()[0]
    num_rows = counts.pop("_rows")
    for name, num in counts.items():
        if num:
            share = in_percent(num, num_rows)
            yield f"{source.column(name)} is missing in {num:,} of {num_rows:,} rows ({share})"


def describe_entities(raw: RawTable) -> list[str]:
    """Says what was dropped from an item or user table and what else was found, in lines."""
    dropped = (f"{counted(each.num_rows, 'row')}: {each.reason}" for each in raw.dropped)
    return [*(f"{raw.source.name}: dropped {each}" for each in dropped), *raw.notes]


def load_items(
    source: Any,
    *,
    is_integer_id: bool,
    item_features: Mapping[str, str],
    reading: Reading,
) -> tuple[ibis.Table, list[str]]:
    """Loads an item table alone, such as today's for a model of last week.

    Ids become integers if the model's are. Returns item_id, the features and, if there is one,
    `title`, by ascending item_id; and what was dropped or is missing, in lines for a person.
    """
    remedy = "Name the columns as the item table of the training did."
    raw = load_raw(connect(), source, reading.item_columns, item_features, "item_id", remedy)
    assert raw is not None
    if is_integer_id and not is_integer(raw, "item_id"):
        raise DataError(
            f"{raw.source.column('item_id')} holds text, and the model's item ids are integers. "
            "Give the ids of the events that it was trained on."
        )
    items = type_entities(
        raw, "item_id", as_integer=is_integer_id, features=item_features, reading=reading
    )
    return items.order_by("item_id"), describe_entities(raw)


def store(expression: ibis.Table, source: Source) -> ibis.Table:
    """Stores an expression as a new table; a `DataError` if the engine refuses it."""
    try:
        connection, name = expression.get_backend(), ibis.util.gen_name("log")
        connection.con.execute(f'CREATE TABLE "{name}" AS {connection.compile(expression)}')
        return connection.table(name)
    except (duckdb.Error, TableNotFound) as error:
        check_stored(error)
        raise DataError(f"{source.name}: {str(error).strip()}") from error
