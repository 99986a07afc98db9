"""Events settled with the item and user table: unknown ids, repeated events."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import ibis
from ibis.backends.duckdb import Backend as DuckDB

from tfrs_pipeline.data.events import load_events
from tfrs_pipeline.data.files import scan
from tfrs_pipeline.data.reading import Reading
from tfrs_pipeline.data.requests import check_names
from tfrs_pipeline.data.rules import RawTable
from tfrs_pipeline.data.schema import (
    LISTED,
    DataError,
    Dropped,
    Duplicates,
    Source,
    UnknownItems,
    count_rows,
)
from tfrs_pipeline.data.split import is_positive
from tfrs_pipeline.data.tables import describe_entities, load_raw, store, type_entities
from tfrs_pipeline.messages import counted, in_percent, printable
from tfrs_pipeline.settings import refuse

Features: TypeAlias = Mapping[str, str]
Tables: TypeAlias = tuple[ibis.Table, ibis.Table, ibis.Table]
"""Events, items and users."""


def make_tables(
    connection: DuckDB,
    source: Any,
    items: Any,
    users: Any,
    features: tuple[Features, Features, Features],
    reading: Reading,
) -> tuple[Tables, tuple[Dropped, ...], tuple[str, ...]]:
    """Reads, types, settles and stores the tables of a log; arguments as in `Log.from_files`.

    `features` are those of items, users and requests. Returns the tables; what was dropped of the
    events; and notes for a person.
    """
    item_features, user_features, request_features = features
    check_names(request_features, reading.label, reading.columns)
    refuse(reading.name_problems(request_features))
    scanned = scan(connection, source, "event table")
    given = {
        "item_id": (items, reading.item_columns, item_features),
        "user_id": (users, reading.user_columns, user_features),
    }
    raws = {
        name: load_raw(connection, *of_table, name, id_of_events=reading.columns.get(name, ""))
        for name, of_table in given.items()
    }
    events, raw = load_events(scanned, reading, request_features, raws)
    tables = {}
    for name, entity in raws.items():
        tables[name] = events.select(name).distinct()
        if entity is not None:
            as_integer = events.schema()[name].is_int64()
            tables[name] = type_entities(
                entity, name, as_integer=as_integer, features=given[name][2], reading=reading
            )
            raw.notes.extend(describe_entities(entity))
            entity.drop()
    num_reasons = len(raw.dropped)
    for name, entity in raws.items():
        if entity is not None:
            unknown = reading.unknown_items if name == "item_id" else "keep"
            events = _settle_unknown(events, raw, name, tables[name], entity.source.name, unknown)
    events = _settle_duplicates(events, raw, reading.duplicates)
    if len(raw.dropped) > num_reasons:
        events = store(events, raw.source)
    _check_positives(events, raw.source)
    whole = (add_missing(table, events, name).order_by(name) for name, table in tables.items())
    items, users = (store(table, raw.source) for table in whole)
    return (events, items, users), tuple(raw.dropped), tuple(raw.notes)


def _check_positives(events: ibis.Table, source: Source) -> None:
    counts = events.aggregate(rows=events.count(), positives=is_positive(events).sum())
    num_rows, num_positives = counts.to_pyarrow().to_pylist()[0].values()
    if not num_rows:
        raise DataError(f"{source.name}: 0 rows. Give a log that holds events.")
    if not num_positives:
        raise DataError(
            f"{source.name}: none of {num_rows} rows is a positive (stage 'clicked'). Check "
            "stage_values, rating_threshold or label."
        )


def _settle_unknown(
    events: ibis.Table,
    raw: RawTable,
    id_name: str,
    entities: ibis.Table,
    table: str,
    unknown: UnknownItems,
) -> ibis.Table:
    """Keeps, drops or refuses events whose item or user its table lacks; returns those kept."""
    where, kind = raw.source.column(id_name), id_name.removesuffix("_id")
    lacking = events.anti_join(entities, id_name)
    lacks = lacking.aggregate(
        num=lacking.count(), ids=lacking[id_name].nunique(), first=lacking[id_name].min()
    )
    num, num_ids, first = lacks.to_pyarrow().to_pylist()[0].values()
    if not num:
        return events
    example, num_rows = printable(repr(first)), count_rows(events)
    if num == num_rows:
        other = printable(repr(entities[id_name].min().to_pyarrow().as_py()))
        raise DataError(
            f"{where}: none of {num_rows} rows holds one of the {kind}s of {table}, whose ids "
            f"look like {other}, not {example}. Set columns or {kind}_columns to the same ids.",
            f"{kind}_columns",
        )
    if unknown == "error":
        raise DataError(
            f"{where}: {num} of {num_rows} rows hold a {kind} that {table} lacks, such as "
            f"{example}. Add it there, or set unknown_items to keep (with null features) or drop.",
            "unknown_items",
        )
    if unknown == "drop":
        raw.dropped.append(Dropped(f"{kind} is not in the {kind} table", num))
        return events.semi_join(entities, id_name)
    raw.notes.append(
        f"{num:,} of {num_rows:,} events ({in_percent(num, num_rows)}) are of "
        f"{counted(num_ids, kind)} that {table} lacks, such as {example}: kept, with null features"
    )
    return events


def _settle_duplicates(events: ibis.Table, raw: RawTable, duplicates: Duplicates) -> ibis.Table:
    """Keeps, drops or refuses events that repeat an earlier one; returns those kept."""
    # An event of the test part is not a repeat of one in the training part.
    keys = ["user_id", "item_id", "timestamp", "stage", "request_id", "part"]
    keys = [name for name in keys if name in events.columns]
    num_rows, what = count_rows(events), f"in {', '.join(keys)}"
    num_copies = num_rows - count_rows(events.select(*keys).distinct())
    if not num_copies:
        return events
    if duplicates == "error":
        raise DataError(
            f"{raw.source.name}: {num_copies} of {num_rows} rows repeat an earlier one {what}. "
            "Remove them, or set duplicates to drop or keep.",
            "duplicates",
        )
    if duplicates == "keep":
        note = f"{num_copies:,} of {num_rows:,} events repeat an earlier one {what}: kept"
        raw.notes.append(note)
        return events
    raw.dropped.append(Dropped("repeats an earlier event", num_copies))
    same = ibis.window(group_by=keys, order_by="event_number")
    numbered = events.mutate(_copy=ibis.row_number().over(same))
    return numbered.filter(numbered["_copy"] == 0).drop("_copy")


def add_missing(entities: ibis.Table, events: ibis.Table, id_name: str) -> ibis.Table:
    """Adds the ids of events that an item or user table lacks, with null features.

    The column `LISTED` of items says whether the table had the item.
    """
    missing = events.select(id_name).distinct().anti_join(entities, id_name)
    added: dict[str, Any] = {
        name: ibis.null(dtype) for name, dtype in entities.schema().items() if name != id_name
    }
    if id_name == "item_id":
        if LISTED not in entities.columns:
            entities = entities.mutate(**{LISTED: True})
        added[LISTED] = ibis.literal(False)
    return entities.union(missing.mutate(**added).select(*entities.columns))
