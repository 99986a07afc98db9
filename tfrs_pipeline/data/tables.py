"""The tables of a log: events, items and users, typed, stored and made consistent."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import ibis
import ibis.expr.types as ir
from ibis.backends.duckdb import Backend as DuckDB

from tfrs_pipeline.data import schema, visits
from tfrs_pipeline.data.columns import entity_columns, with_type_columns
from tfrs_pipeline.data.engines import connect
from tfrs_pipeline.data.events import load_events
from tfrs_pipeline.data.files import scan
from tfrs_pipeline.data.histories import whole_seconds
from tfrs_pipeline.data.raw_table import RawTable, store
from tfrs_pipeline.data.request_features import check_names
from tfrs_pipeline.data.schema import DataError, Dropped, Source, count_rows, is_positive, totals
from tfrs_pipeline.data.settings import Reading
from tfrs_pipeline.data.values import is_integer, to_required_id, type_features
from tfrs_pipeline.messages import counted, in_percent, printable
from tfrs_pipeline.settings import refuse

# If more than this share of the events is of unknown items, something is wrong with the ids.
_MOST_UNKNOWN = 0.5
Features: TypeAlias = Mapping[str, str]
Tables: TypeAlias = tuple[ibis.Table, ibis.Table, ibis.Table]  # Events, items and users.


def make_tables(
    connection: DuckDB,
    source: Any,
    items: Any,
    users: Any,
    features: tuple[Features, Features, Features],
    reading: Reading,
) -> tuple[Tables, dict[str, Any]]:
    """Reads, types and stores consistent tables of a log; arguments as in `Log.from_files`.

    Returns the tables, and the log's `ties`, `dropped` and `notes`.
    """
    item_features, user_features, request_features = features
    refuse(reading.name_problems(request_features))
    scanned = scan(connection, source, "event table")
    reading = with_type_columns(reading, scanned)
    outcomes = (*reading.label, *(["event"] if reading.event_weights else []))
    check_names(request_features, outcomes, reading.columns)
    sources = {"item_id": (items, item_features), "user_id": (users, user_features)}
    raws = {
        name: _load_raw(connection, table, table_features, name, reading)
        for name, (table, table_features) in sources.items()
        if table is not None or table_features
    }
    events, raw = load_events(scanned, reading, request_features, raws)
    tables = {name: events.select(name).distinct() for name in sources}
    for name, entity in raws.items():
        as_integer = events.schema()[name].is_int64()
        tables[name] = _type_entities(entity, name, as_integer, sources[name][1], reading)
        raw.notes.extend(_describe(entity))
        entity.drop()
    num_reasons = len(raw.dropped)
    # Merged before the other steps, so that these count the events that stay.
    if reading.event_weights:
        events = _merge_repeats(events, raw)
    for name, entity in raws.items():
        events = _resolve_unknown(events, raw, name, tables[name], entity.source.name, reading)
    events = _resolve_duplicates(events, raw, reading.duplicates)
    if len(raw.dropped) > num_reasons:
        # Once for all steps above; the ones below read it several times.
        events = store(events, raw.source)
    _check_positives(events, raw.source)
    rule = settle_ties(events, raw, reading.ties)
    # By id, so that a file of the log does not depend on how many threads made it.
    items, users = (
        store(add_missing(table, events, name).order_by(name), raw.source)
        for name, table in tables.items()
    )
    about = {"ties": rule, "dropped": tuple(raw.dropped), "notes": tuple(raw.notes)}
    return (events, items, users), about


def _resolve_duplicates(
    events: ibis.Table, raw: RawTable, duplicates: schema.Duplicates
) -> ibis.Table:
    """Keeps or drops events that repeat an earlier one, such as after a second delivery.

    Returns those kept. Several events of an item in one visit are no repeats; `visits.py` merges
    those.
    """
    # By part too: an event in the test part does not repeat one in the training part. Context and
    # scores are left out, because they may differ between two reports of one event.
    keys = ["user_id", "item_id", "timestamp", "stage", "request_id", "part"]
    keys = [name for name in keys if name in events.columns]
    num_rows, what = count_rows(events), f"in {', '.join(keys)}"
    num_copies = num_rows - count_rows(events.select(*keys).distinct())
    if not num_copies:
        return events
    if duplicates == "keep":
        note = f"{num_copies:,} of {num_rows:,} events repeat an earlier one {what}: kept"
        raw.notes.append(f"{note} (data.duplicates drop leaves them out)")
        return events
    raw.dropped.append(Dropped("repeats an earlier event", num_copies))
    same = ibis.window(group_by=keys, order_by="event_number")
    return events.filter(ibis.row_number().over(same) == 0)


def _merge_repeats(events: ibis.Table, raw: RawTable) -> ibis.Table:
    """Merges the events of an item within a request, then within a visit, and counts them."""
    merges = {"request": visits.merge_requests} if "request_id" in events.columns else {}
    if "session_id" in events.columns:
        column = printable(repr(raw.source.columns.get("session_id", "session_id")))
        merges[f"visit (column {column})"] = visits.merge_visits
    elif "timestamp" in events.columns:
        pause = schema.PAUSE // 60
        merges[f"visit (until {pause} minutes without an event)"] = visits.merge_visits
    events = visits.number_visits(events)
    for where, merge in merges.items():
        num_rows, events = count_rows(events), store(merge(events), raw.source)
        if num := num_rows - count_rows(events):
            reason = f"into the strongest event of their item in the same {where}"
            raw.dropped.append(Dropped(reason, num, is_merged=True))
    return events.drop(visits.STRENGTH, visits.VISIT)


def _check_positives(events: ibis.Table, source: Source) -> None:
    num_rows, num_positives = count_rows(events), count_rows(events.filter(is_positive))
    if not num_rows:
        raise DataError(f"{source.name}: 0 rows. Give a log that holds events.")
    if not num_positives:
        raise DataError(
            f"{source.name}: none of {num_rows} rows is a positive (stage 'clicked'). Check "
            "event_weights, stage_values, rating_threshold or label."
        )


def _resolve_unknown(
    events: ibis.Table,
    raw: RawTable,
    id_name: str,
    entities: ibis.Table,
    table: str,
    reading: Reading,
) -> ibis.Table:
    """Keeps, drops or refuses events whose item or user is not in its table; returns those kept.

    If `unknown_items` is not given, `max_bad_share` limits the events whose id the table spells
    differently, and `_MOST_UNKNOWN` those of unknown items. Below that, items may be delisted.
    Users may all be new.
    """
    kind = id_name.removesuffix("_id")
    unknown = reading.unknown_items if kind == "item" else None
    ids = entities[id_name]
    # Ids that differ in spelling alone are the same to a person, and lost to a join.
    same = entities.group_by(_plain=_plain_id(ids)).agg(_there=ids.min())
    lacking = events.anti_join(entities, id_name)
    lacking = lacking.mutate(_plain=_plain_id(lacking[id_name])).left_join(same, "_plain")
    here, there = lacking[id_name], lacking["_there"]
    num, num_alike, num_ids, first, *spellings = totals(
        lacking,
        num=lacking.count(),
        alike=there.count(),
        ids=here.nunique(),
        first=here.min(),
        here=here.min(where=there.notnull()),
        there=there.argmin(here, where=there.notnull()),
    ).values()
    if not num:
        return events
    num_rows = count_rows(events)
    what = (
        f"{num:,} of {num_rows:,} events ({in_percent(num, num_rows)}) are of "
        f"{counted(num_ids, kind)} that {table} lacks, such as {printable(repr(first))}"
    )
    spelled = f". {_spelled(table, *spellings)}" if num_alike else ""
    is_too_much = num_alike > reading.max_bad_share * num_rows
    # A log has new users every day, but few items that no item table knows.
    is_too_much |= kind == "item" and num > _MOST_UNKNOWN * num_rows
    if unknown == "error" or num == num_rows or (is_too_much and unknown is None):
        other = printable(repr(totals(entities, least=ids.min())["least"]))
        is_choice = kind == "item" and num < num_rows
        remedy = ", or set unknown_items to keep them or to drop them" if is_choice else ""
        raise DataError(
            f"{raw.source.column(id_name)}: {what}{spelled or f', where ids look like {other}'}. "
            f"Add them there, or spell the ids the same in both{remedy}.",
            "unknown_items" if is_choice else f"{kind}_columns",
        )
    if unknown == "drop":
        raw.dropped.append(Dropped(f"{kind} is not in the {kind} table", num))
        return events.semi_join(entities, id_name)
    raw.notes.append(f"{what}: kept, with null features{spelled}")
    return events


def _plain_id(value: ir.Value) -> ir.StringValue:
    """Leaves out what programs change in ids: leading zeros, letter case and spaces."""
    return value.cast("string").lower().re_replace(r"\s+", "").re_replace("^0+", "")


def _spelled(table: str, here: Any, there: Any) -> str:
    """Shows two ids that have the same `_plain_id`."""
    alike = f"{printable(repr(there))} in {table} is {printable(repr(here))} in the log"
    return f"{alike}: leading zeros, letter case or spaces differ"


def add_missing(entities: ibis.Table, events: ibis.Table, id_name: str) -> ibis.Table:
    """Adds the ids of events that an item or user table lacks, with null features.

    For items, the column `LISTED` says whether the table had the item.
    """
    if id_name == "item_id":
        entities = entities.mutate(**{schema.LISTED: True})
    missing = events.select(id_name).distinct().anti_join(entities, id_name)
    added: dict[str, Any] = {name: ibis.null(dtype) for name, dtype in entities.schema().items()}
    added |= {id_name: missing[id_name]}
    if schema.LISTED in added:
        added[schema.LISTED] = ibis.literal(False)
    return entities.union(missing.select(**added))


def _load_raw(
    connection: DuckDB,
    source: Any,
    features: Features,
    id_name: str,
    reading: Reading,
    remedy: str = "",
) -> RawTable:
    """Opens an item or user table; a `ValueError` if there is none for its features.

    `remedy` replaces the advice to name a missing column in `reading`.
    """
    kind = id_name.removesuffix("_id")
    if source is None:
        raise ValueError(
            f"{kind}_features needs {kind}s: the table that holds the features. Received: "
            f"{', '.join(features)}."
        )
    scanned = scan(connection, source, f"{kind} table")
    names = entity_columns(scanned, id_name, features, reading, remedy)
    return scanned.load(names, f"{kind}_columns")


def _type_entities(
    raw: RawTable, id_name: str, as_integer: bool, features: Features, reading: Reading
) -> ibis.Table:
    """Types and stores an item or user table, one row per id: features, and titles of items."""
    columns = {id_name: to_required_id(raw, id_name, as_integer=as_integer)}
    type_features(raw, columns, features, reading)
    if "title" in raw.table.columns and id_name == "item_id":
        columns.setdefault("title", raw.table["title"].cast("string"))
    entities = raw.store_sound(columns, reading.max_bad_share)
    raw.note_missing(entities, [*columns][1:])
    num_rows, num_ids = count_rows(entities), count_rows(entities.select(id_name).distinct())
    if num_ids < num_rows:
        entities = store(entities.distinct(), raw.source)
        num_left = count_rows(entities)
        if num_left != num_ids:
            id_counts = entities.group_by(id_name).agg(num=entities.count())
            repeated = id_counts.filter(id_counts["num"] > 1)[id_name].min().to_pyarrow().as_py()
            raise DataError(
                f"{raw.source.column(id_name)} holds {num_ids} different ids in {num_left} rows "
                f"that differ, such as those of {printable(repr(repeated))}. One row an id: remove "
                "the repeated ones."
            )
        raw.dropped.append(Dropped(f"repeats a row of {raw.source.name}", num_rows - num_ids))
    return entities


def _describe(raw: RawTable) -> list[str]:
    """Describes what was dropped from an item or user table and what else was found, in lines."""
    dropped = (f"{counted(entry.num_rows, 'row')}: {entry.reason}" for entry in raw.dropped)
    return [*(f"{raw.source.name}: dropped {rows}" for rows in dropped), *raw.notes]


def load_items(
    source: Any, *, is_integer_id: bool, item_features: Features, reading: Reading
) -> tuple[ibis.Table, list[str]]:
    """Loads only an item table, such as today's for a model of last week, by ascending item_id.

    Ids become integers if the model's are. The lines say what was dropped or is missing.
    """
    remedy = "Name the columns as the item table of the training did."
    raw = _load_raw(connect(), source, item_features, "item_id", reading, remedy)
    if is_integer_id and not is_integer(raw, "item_id"):
        raise DataError(
            f"{raw.source.column('item_id')} holds text, and the model's item ids are integers. "
            "Give the ids of the events that it was trained on."
        )
    items = _type_entities(raw, "item_id", is_integer_id, item_features, reading)
    return items.order_by("item_id"), _describe(raw)


_STEPS = {"by day": 86_400, "by hour": 3_600, "by minute": 60, "by second": 1}
_DONE: dict[schema.TieRule, str] = {
    "order": "they keep the order of the source",
    "drop": "none is in another's history, as items of one visit",
}


def settle_ties(events: ibis.Table, raw: RawTable, ties: schema.Ties) -> schema.TieRule:
    """Decides the rule if it is "auto", and notes tied positives."""
    if "timestamp" not in events.columns:
        return "drop"
    counts = _measure(events)
    step = next((name for name in _STEPS if not counts[name]), "finer than seconds")
    # If most users have a single time, such as where the number of an order is the user, dropping
    # ties would leave no histories to learn from.
    num_lost = counts["num_first"] - counts["num_users"]
    are_kept = _STEPS.get(step, 0) >= 60 or num_lost > counts["num"] / 2
    rule: schema.TieRule = ties if ties != "auto" else "order" if are_kept else "drop"
    if counts["num_tied"]:
        # About 50% if the source does not sort by item; else its order says nothing of the time.
        num_pairs = max(1, counts["num_up"] + counts["num_down"])
        share = f" (item ids ascend in {counts['num_up'] / num_pairs:.0%} of neighbouring pairs)"
        raw.notes.append(
            f"times {step}; {in_percent(counts['num_tied'], counts['num'])} of the positives have "
            f"the time of another one of their user: {_DONE[rule]}{share if are_kept else ''}"
        )
    return rule


def _measure(events: ibis.Table) -> dict[str, Any]:
    """Counts positives, their users, tied positives, and times that are off a day, an hour, ...

    `num_first` counts positives at the first time of their user; `num_up` and `num_down` count tied
    neighbours whose item ids ascend or descend.
    """
    tied = ["user_id", "timestamp"]
    clicks = events.filter(is_positive(events))
    clicks = clicks.mutate(
        _seconds=whole_seconds(clicks["timestamp"]),
        _num=clicks.count().over(ibis.window(group_by=tied)),
        _last=clicks["item_id"].lag().over(ibis.window(group_by=tied, order_by="event_number")),
        _first=clicks["timestamp"].min().over(ibis.window(group_by="user_id")),
    )
    # The coarsest step at which no time is off is the clock of the log.
    is_fraction = clicks["timestamp"].truncate("s") != clicks["timestamp"]
    sums = {name: is_fraction | (clicks["_seconds"] % step != 0) for name, step in _STEPS.items()}
    sums["num_tied"] = clicks["_num"] > 1
    sums["num_first"] = clicks["timestamp"] == clicks["_first"]
    sums["num_up"] = (clicks["item_id"] > clicks["_last"]).fill_null(False)
    sums["num_down"] = (clicks["item_id"] < clicks["_last"]).fill_null(False)
    counts = {name: value.sum() for name, value in sums.items()}
    num_users = clicks["user_id"].nunique()
    return totals(clicks, num=clicks.count(), num_users=num_users, **counts)
