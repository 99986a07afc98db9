"""Tables of an engine that are a log already: checked where they lie, none of their rows moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.operations as ops

from tfrs_pipeline.data.engines import ENGINES
from tfrs_pipeline.data.schema import (
    LISTED,
    WEIGHT_FAULT,
    DataError,
    Refusal,
    Source,
    Stage,
    count_rows,
    id_refusals,
    is_usable_weight,
    name_problem,
    refuse_rows,
    require_column,
)
from tfrs_pipeline.data.settle import add_missing
from tfrs_pipeline.data.split import is_positive
from tfrs_pipeline.features.feature import ID_TYPES, NUMBER_TYPES, TIME_TYPES
from tfrs_pipeline.features.kinds import KINDS, FeatureKind
from tfrs_pipeline.messages import sentence

# Type of a column -> what a log stores it as.
_EVENT_TYPES: dict[str, dict[str, str]] = {
    "user_id": ID_TYPES,
    "item_id": ID_TYPES,
    "event_number": {"integer": "int64"},
    "stage": {"string": "string"},
    "timestamp": TIME_TYPES,
    "request_id": ID_TYPES,
    "rank": {"integer": "int64"},
    "score": NUMBER_TYPES,
    "weight": NUMBER_TYPES,
    "part": {"string": "string"},
}
_REQUIRED = ("user_id", "item_id", "event_number", "stage")

_OF_A_CONNECTION = (ops.DatabaseTable, ops.SQLQueryResult, ops.SQLStringView)


def check_engine(events: Any, *others: Any) -> None:
    """Refuses tables that are not Ibis's (`TypeError`), or not of one engine here (`DataError`)."""
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
        # A table in memory belongs to no connection. Names may be the same in two of them.
        is_bound = table is not None and table.op().find(_OF_A_CONNECTION)
        if is_bound and table.get_backend() is not events.get_backend():
            raise DataError(
                "The tables of a log must be of one connection, that of the events. Received: one "
                "of another. Open both there, or copy them with Log.from_table."
            )


def check_events(
    events: ibis.Table, source: Source, request_features: Mapping[str, FeatureKind]
) -> ibis.Table:
    """Checks that a table holds what `Log` says of events, else raises a `DataError`.

    Returns the table, its columns cast to the types of a log where no value changes by it.
    """
    for name in _REQUIRED:
        require_column(events.columns, name, source, _remedy(name))
    known = {
        **{name: KINDS[kind].column_types for name, kind in request_features.items()},
        **_EVENT_TYPES,
    }
    for name in events.columns:
        if name not in known and (problem := name_problem(name, events.columns)):
            raise DataError(f"{source.column(name)}: {sentence(problem)}")
    types = {name: allowed for name, allowed in known.items() if name in events.columns}
    events = _cast(events, types, source)
    refuse_rows(events, source, *_event_refusals(events))
    numbers = events.aggregate(rows=events.count(), distinct=events["event_number"].nunique())
    num_rows, num_distinct = numbers.to_pyarrow().to_pylist()[0].values()
    if num_rows != num_distinct:
        raise DataError(
            f"{source.column('event_number')} holds {num_distinct} different numbers in {num_rows} "
            f"rows. {_remedy('event_number')}"
        )
    if not count_rows(events.filter(is_positive)):
        raise DataError(f"{source.name}: none of {num_rows} rows is a positive (stage 'clicked').")
    return events


def check_entities(
    entities: ibis.Table | None,
    id_name: str,
    events: ibis.Table,
    features: Mapping[str, FeatureKind],
) -> ibis.Table:
    """Checks an item or user table, None makes one, and adds the ids that only the events have."""
    source = Source(f"{id_name.removesuffix('_id')} table")
    if entities is None:
        for name in features:
            require_column([id_name], name, source, "Give the table that holds it.")
        return events.select(id_name).distinct()
    kept = [id_name, *features, *(x for x in ("title", LISTED) if x in entities.columns)]
    for name in kept:
        require_column(entities.columns, name, source, "Rename the column that holds it.")
    types = {id_name: ID_TYPES} | {
        name: KINDS[kind].column_types for name, kind in features.items()
    }
    entities = _cast(entities.select(*dict.fromkeys(kept)), types, source)
    of = events.schema()[id_name]
    if entities.schema()[id_name] != of:
        raise DataError(f"{source.column(id_name)} must be {of}, as in the events. Cast it.")
    refuse_rows(entities, source, *id_refusals(id_name, entities[id_name]))
    num_rows, num_ids = count_rows(entities), count_rows(entities.select(id_name).distinct())
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
        # Spark calls its UTC moments so; those of other engines may be of any zone.
        is_naive = isinstance(dtype, dt.Timestamp) and dtype.timezone is None
        if is_naive and table.get_backend().name == "duckdb":
            raise DataError(f"{source.column(name)} has no time zone. Cast it to timestamp('UTC').")
        casts[name] = table[name].cast(found[0])
    return table.mutate(**casts)


def _event_refusals(events: ibis.Table) -> Iterable[Refusal]:
    for name in ("user_id", "item_id"):
        yield from id_refusals(name, events[name])
    for name in ("event_number", "timestamp"):
        if name in events.columns:
            yield Refusal(name, events[name].isnull(), "is null", "Give these rows one.")
    stages = [str(stage) for stage in Stage]
    is_stage = events["stage"].isin(stages).fill_null(False)
    yield Refusal("stage", ~is_stage, "holds no stage", f"Known: {', '.join(stages)}.")
    if "request_id" in events.columns and events["request_id"].type().is_string():
        is_empty = (events["request_id"] == "").fill_null(False)
        yield Refusal("request_id", is_empty, "is ''", "Make it null where there is no request.")
    if "weight" in events.columns:
        yield Refusal("weight", ~is_usable_weight(events["weight"]), *WEIGHT_FAULT)


def _remedy(name: str) -> str:
    if name == "event_number":
        return (
            "It is an int64 of its own for every event, in their order: number them once and store "
            "it, such as by row_number() OVER (ORDER BY timestamp)."
        )
    if name == "stage":
        return f"It is one of {', '.join(Stage)}; of clicks alone, 'clicked' everywhere."
    return f"Rename the column that holds the {name.removesuffix('_id')}s."
