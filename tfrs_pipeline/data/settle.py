"""Events settled with the item and user table: unknown ids, repeated events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import ibis
from ibis.backends.duckdb import Backend as DuckDB

from tfrs_pipeline.data.events import load_events
from tfrs_pipeline.data.files import scan
from tfrs_pipeline.data.reading import Reading
from tfrs_pipeline.data.requests import check_names
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
from tfrs_pipeline.data.tables import (
    check_account,
    describe_dropped,
    load_raw,
    store,
    type_entities,
)
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
    entities = {
        "item_id": (items, reading.item_columns, item_features),
        "user_id": (users, reading.user_columns, user_features),
    }
    raws = {
        name: load_raw(connection, *entity, name, id_of_events=reading.columns.get(name, ""))
        for name, entity in entities.items()
    }
    events, dropped, notes = load_events(scanned, reading, request_features, raws)
    sources = {"events": Source(scanned.name, reading.columns)}
    tables = {}
    for name, raw in raws.items():
        if raw is None:
            tables[name] = events.select(name).distinct()
            continue
        tables[name], lost, noted = type_entities(
            raw,
            name,
            as_integer=events.schema()[name].is_int64(),
            features=entities[name][2],
            reading=reading,
        )
        notes += describe_dropped(raw.source, lost) + noted
        sources[name] = raw.source
        raw.drop()
    settled, repeated, noted = settle(events, tables, sources, reading)
    return settled, (*dropped, *repeated), (*notes, *noted)


def settle(
    events: ibis.Table,
    entities: Mapping[str, ibis.Table],
    sources: Mapping[str, Source],
    reading: Reading,
) -> tuple[Tables, list[Dropped], list[str]]:
    """Settles unknown ids and repeated events, and stores the tables.

    Returns events, items and users; what was dropped of the events; and notes for a person.
    """
    source = sources["events"]
    num_in = num_rows = count_rows(events)
    dropped: list[Dropped] = []
    notes: list[str] = []
    for name in ("item_id", "user_id"):
        if name in sources:
            unknown = reading.unknown_items if name == "item_id" else "keep"
            table = (entities[name], sources[name].name)
            events, told = _settle_unknown(events, source, *table, name, unknown, num_rows)
            if isinstance(told, Dropped):
                dropped.append(told)
                num_rows -= told.num_rows
            elif told:
                notes.append(told)
    events, told = _settle_duplicates(events, source, reading.duplicates, num_rows)
    if isinstance(told, Dropped):
        dropped.append(told)
    elif told:
        notes.append(told)
    if dropped:
        events = store(events, source)
    counts = events.aggregate(rows=events.count(), positives=is_positive(events).sum())
    num_left, num_positives = counts.to_pyarrow().to_pylist()[0].values()
    check_account(source, num_in, num_left, dropped)
    if not num_left:
        raise DataError(f"{source.name}: 0 rows. Give a log that holds events.")
    if not num_positives:
        raise DataError(
            f"{source.name}: none of {num_left} rows is a positive (stage 'clicked'). Check "
            "stage_values, rating_threshold or label."
        )
    items, users = (
        store(add_missing(entities[name], events, name).order_by(name), source)
        for name in ("item_id", "user_id")
    )
    return (events, items, users), dropped, notes


def _settle_unknown(
    events: ibis.Table,
    source: Source,
    entities: ibis.Table,
    table: str,
    id_name: str,
    unknown: UnknownItems,
    num_rows: int,
) -> tuple[ibis.Table, Dropped | str]:
    """Keeps, drops or refuses events whose item or user its table lacks.

    Returns the events that are kept, and what was dropped, or a note for a person.
    """
    where, kind = source.column(id_name), id_name.removesuffix("_id")
    lacking = events.anti_join(entities, id_name)
    lacks = lacking.aggregate(
        num=lacking.count(), ids=lacking[id_name].nunique(), first=lacking[id_name].min()
    )
    num, num_ids, first = lacks.to_pyarrow().to_pylist()[0].values()
    if not num:
        return events, ""
    example = printable(repr(first))
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
        kept = events.semi_join(entities, id_name)
        return kept, Dropped(f"{kind} is not in the {kind} table", num)
    return events, (
        f"{num:,} of {num_rows:,} events ({in_percent(num, num_rows)}) are of "
        f"{counted(num_ids, kind)} that {table} lacks, such as {example}: kept, with null features"
    )


def _settle_duplicates(
    events: ibis.Table, source: Source, duplicates: Duplicates, num_rows: int
) -> tuple[ibis.Table, Dropped | str]:
    """Keeps, drops or refuses events that repeat an earlier one; returns as `_settle_unknown`."""
    # An event of the test part is not a repeat of one in the training part.
    keys = ["user_id", "item_id", "timestamp", "stage", "request_id", "part"]
    keys = [name for name in keys if name in events.columns]
    num_copies = num_rows - count_rows(events.select(*keys).distinct())
    what = f"in {', '.join(keys)}"
    if num_copies and duplicates == "error":
        raise DataError(
            f"{source.name}: {num_copies} of {num_rows} rows repeat an earlier one {what}. Remove "
            "them, or set duplicates to drop or keep.",
            "duplicates",
        )
    if num_copies and duplicates == "drop":
        same = ibis.window(group_by=keys, order_by="event_number")
        numbered = events.mutate(_copy=ibis.row_number().over(same))
        kept = numbered.filter(numbered["_copy"] == 0).drop("_copy")
        return kept, Dropped("repeats an earlier event", num_copies)
    note = f"{num_copies:,} of {num_rows:,} events repeat an earlier one {what}: kept"
    return events, note if num_copies else ""


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
