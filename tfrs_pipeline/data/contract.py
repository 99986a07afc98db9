"""Checks tables that are a log already, in their engine, without moving a row."""

from collections.abc import Mapping, Sequence
from typing import Any

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.operations as ops
import ibis.expr.types as ir

from tfrs_pipeline.data import rules, schema
from tfrs_pipeline.data.engines import ENGINES
from tfrs_pipeline.data.rules import Fault, evaluate, id_faults, is_usable_weight
from tfrs_pipeline.data.schema import LISTED, DataError, Source, Stage, is_positive, require_all
from tfrs_pipeline.data.tables import add_missing
from tfrs_pipeline.features.feature import ID_TYPES, NUMBER_TYPES, TIME_TYPES
from tfrs_pipeline.features.kinds import KINDS
from tfrs_pipeline.messages import sentence

# Column -> its allowed types -> the type that a log stores.
_EVENT_TYPES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("user_id", "item_id", "request_id"), ID_TYPES),
    **{name: {"integer": "int64"} for name in ("event_number", "rank")},
    **{name: {"string": "string"} for name in ("stage", "part")},
    **dict.fromkeys(("score", "weight"), NUMBER_TYPES),
    "timestamp": TIME_TYPES,
}
_NUMBERED = (
    "It is a distinct int64 for each event, in their order: number the events once, such as by "
    "row_number() OVER (ORDER BY timestamp), and store it."
)
# Required column -> what to do without it.
_REQUIRED = {
    "user_id": "Rename the column that holds the users.",
    "item_id": "Rename the column that holds the items.",
    "event_number": _NUMBERED,
    "stage": f"It is one of {', '.join(Stage)}; in a log of clicks only, 'clicked' everywhere.",
}
_OF_A_CONNECTION = (ops.DatabaseTable, ops.SQLQueryResult, ops.SQLStringView)


def check_engine(events: Any, *others: Any) -> None:
    """Refuses tables not from Ibis (`TypeError`), or not in one supported engine (`DataError`)."""
    for table in (events, *others):
        if table is not None and not isinstance(table, ibis.Table):
            raise TypeError(
                "Log.from_ibis takes tables of Ibis; Log.from_table any others. Received: "
                f"{type(table).__name__}"
            )
    if (engine := events.get_backend().name) not in ENGINES:
        raise DataError(
            f"Samples are made in {' or '.join(ENGINES)}. Received: a table of {engine}. "
            "Log.from_table copies it into DuckDB."
        )
    for table in others:
        # A table in memory belongs to no connection. Two connections may use the same names.
        is_bound = table is not None and table.op().find(_OF_A_CONNECTION)
        if is_bound and table.get_backend() is not events.get_backend():
            raise DataError(
                "The tables of a log must be of one connection. Received: a table of another one "
                "than the events. Open it there, or copy all with Log.from_table."
            )


def check_events(
    events: ibis.Table, source: Source, request_features: Mapping[str, str]
) -> ibis.Table:
    """Checks that a table meets what `Log` says about events; returns it with a log's types."""
    require_all(events.columns, _REQUIRED, source)
    known = {name: KINDS[kind].column_types for name, kind in request_features.items()}
    known |= _EVENT_TYPES
    for name in events.columns:
        if name not in known and (problem := schema.name_problem(name, events.columns)):
            raise DataError(f"{source.column(name)}: {sentence(problem)}")
    types = {name: allowed for name, allowed in known.items() if name in events.columns}
    events = _cast(events, types, source)
    found = _refuse_rows(
        events,
        source,
        _event_faults(events),
        distinct=events["event_number"].nunique(),
        positives=is_positive(events).sum(),
    )
    num_rows, num_distinct, num_positives = found.values()
    if num_rows != num_distinct:
        raise DataError(
            f"{source.column('event_number')} holds {num_distinct} different numbers in {num_rows} "
            f"rows. {_NUMBERED}"
        )
    if not num_positives:
        raise DataError(f"{source.name}: none of {num_rows} rows is a positive (stage 'clicked').")
    return events


def check_entities(
    entities: ibis.Table | None, id_name: str, events: ibis.Table, features: Mapping[str, str]
) -> ibis.Table:
    """Checks an item or user table, or makes one, and adds ids that only the events have."""
    source = Source(f"{id_name.removesuffix('_id')} table")
    if entities is None:
        require_all([id_name], dict.fromkeys(features, "Give the table that holds it."), source)
        return events.select(id_name).distinct()
    kept = [id_name, *features, *(x for x in ("title", LISTED) if x in entities.columns)]
    remedy = "Rename the column that holds it."
    require_all(entities.columns, dict.fromkeys(kept, remedy), source)
    types = {name: KINDS[kind].column_types for name, kind in features.items()}
    types[id_name] = ID_TYPES
    entities = _cast(entities.select(*dict.fromkeys(kept)), types, source)
    of = events.schema()[id_name]
    if entities.schema()[id_name] != of:
        raise DataError(f"{source.column(id_name)} must be {of}, as in the events. Cast it.")
    ids = entities[id_name]
    found = _refuse_rows(entities, source, id_faults(id_name, ids), ids=ids.nunique())
    num_rows, num_ids = found.values()
    if num_ids != num_rows:
        raise DataError(
            f"{source.column(id_name)} holds {num_ids} different ids in {num_rows} rows. One row "
            "an id: remove the repeated ones."
        )
    return add_missing(entities, events, id_name)


def _cast(table: ibis.Table, types: Mapping[str, Mapping[str, str]], source: Source) -> ibis.Table:
    casts = {}
    for name, allowed in types.items():
        dtype = table.schema()[name]
        found = [to for of, to in allowed.items() if getattr(dtype, f"is_{of}")()]
        if not found:
            wanted = " or ".join(allowed)
            raise DataError(f"{source.column(name)} must be {wanted}, it is {dtype}. Cast it.")
        # Spark's naive times are UTC; in other engines they may be in any zone.
        is_naive = isinstance(dtype, dt.Timestamp) and dtype.timezone is None
        if is_naive and table.get_backend().name == "duckdb":
            raise DataError(f"{source.column(name)} has no time zone. Cast it to timestamp('UTC').")
        casts[name] = table[name].cast(found[0])
    return table.mutate(**casts)


def _event_faults(events: ibis.Table) -> list[Fault]:
    faults = [fault for name in ("user_id", "item_id") for fault in id_faults(name, events[name])]
    faults.append(Fault("event_number", events["event_number"].isnull(), rules.NO_EVENT_NUMBER))
    if "timestamp" in events.columns:
        faults.append(Fault("timestamp", events["timestamp"].isnull(), rules.NO_TIME))
    is_stage = events["stage"].isin([str(stage) for stage in Stage]).fill_null(False)
    faults.append(Fault("stage", ~is_stage, rules.NOT_A_STAGE))
    if "request_id" in events.columns and events["request_id"].type().is_string():
        is_empty = (events["request_id"] == "").fill_null(False)
        faults.append(Fault("request_id", is_empty, rules.EMPTY_REQUEST))
    if "weight" in events.columns:
        faults.append(Fault("weight", ~is_usable_weight(events["weight"]), rules.WEIGHT))
    return faults


def _refuse_rows(
    table: ibis.Table, source: Source, faults: Sequence[Fault], **more: ir.Scalar
) -> dict[str, Any]:
    """Raises the `DataError` of the first fault that any row has; returns the aggregates."""
    num_bad, found = evaluate(table, faults, **more)
    for fault, num in zip(faults, num_bad, strict=True):
        if num:
            raise fault.error(table, source)
    return found
