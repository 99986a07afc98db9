"""Turns a raw table into the event table of a log."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from tfrs_pipeline.data import columns, event_types, rules, schema
from tfrs_pipeline.data.files import Scan
from tfrs_pipeline.data.requests import is_from_timestamp
from tfrs_pipeline.data.rules import RawTable, is_usable_weight
from tfrs_pipeline.data.schema import DataError, Dropped, Source, Stage, require_all
from tfrs_pipeline.data.settings import Reading
from tfrs_pipeline.data.visits import STRENGTH
from tfrs_pipeline.messages import printable

_NUM_LOOKED_AT = 1000
_MOST_STAGES = 100  # A column with more values is free text.
_ISO_TIME = re.compile(r"\d{4}-\d\d-\d\d([ tT]\d|$)")
_MOST_TYPES = 50  # A column with more values does not hold types.
_MOST_TOLD = 10
_OUTCOMES = ("clicked", "click", "is_click", "is_clicked", "label")
# An outcome that did not happen is often left empty.
_NO, _YES = {"0", "0.0", "false", "n", "no", "nan", ""}, {"1", "1.0", "true", "y", "yes"}
# Usual names elsewhere for the columns `timestamp` and `request_id`.
_TIMES = ("time", "date", "datetime", "ts", "created_at", "event_time", "time_ms")
_REQUESTS = ("search_id", "query_id", "impression_id", "req_id", "list_id", "slate_id", "feed_id")
_OPTIONAL = ("timestamp", "request_id", "rank", "score", "weight", "part")


def stage_column(reading: Reading, scanned: Scan) -> str | None:
    """Returns the column that stages are made from, or None; a `DataError` for ratings alone."""
    given = {*reading.columns, *scanned.columns}
    if reading.rating_threshold is not None:
        return "rating"
    if reading.event_weights:
        return "event"
    if "stage" in given or reading.stage_values:
        return "stage"
    if "rating" in given and not reading.label:
        column = Source(scanned.name).column(reading.columns.get("rating", "rating"))
        raise DataError(
            f"{column}: a log of ratings needs rating_threshold, the lowest rating that is a "
            "positive. Set it; or rename the column, if all rows are clicks.",
            "rating_threshold",
        )
    return None


def load_events(
    scanned: Scan,
    reading: Reading,
    request_features: Mapping[str, str],
    others: Mapping[str, RawTable | None],
) -> tuple[ibis.Table, RawTable]:
    """Types and stores an event table; its ids get the same type as those of `others`.

    Returns the events without bad rows, and the raw table, whose rows are deleted by then.
    """
    stages_in = stage_column(reading, scanned)
    names, unread = _event_columns(scanned, stages_in, reading, request_features)
    raw, of_other_types = scanned.load(names), list[Dropped]()
    if stages_in == "event":
        raw, of_other_types = _keep_weighted(raw, reading.event_weights)
    typed: dict[str, ir.Value] = {}
    if unread:
        hint = "" if "request_id" in names else _request_hint(unread)
        listed = printable(", ".join(unread), 300)
        raw.notes.append(f"{scanned.name}: columns not read: {listed}{hint}")
    if stages_in is None and not reading.label:
        raw.notes.append(f"{scanned.name}: without stage, rating or label, every row is a click")
    for name in ("user_id", "item_id"):
        tables = [table for table in (raw, others[name]) if table is not None]
        # A list, not a generator, so that a wrong type in either table is refused.
        as_integer = all([columns.is_integer(table, name) for table in tables])
        typed[name] = columns.to_required_id(raw, name, as_integer=as_integer)
    if "timestamp" in names:
        typed["timestamp"] = columns.to_timestamp(raw, "timestamp", reading, reading.period())
        raw.fault("timestamp", typed["timestamp"].isnull(), rules.NO_TIME)
    typed["event_number"] = raw.table["_row"]
    typed["stage"], weight = _stage_and_weight(raw, stages_in, reading)
    requests = {name: kind for name, kind in request_features.items() if name in names}
    columns.type_features(raw, typed, requests, reading)
    for name in names:
        if name in reading.label:
            typed[name] = columns.to_outcome(raw, name)
            if "weight" not in names and not typed[name].type().is_boolean():
                _note_amounts(raw, name, typed[name])
        elif name not in typed and name not in (stages_in, "weight"):
            typed[name] = _other_column(raw, name)
    if reading.label:
        typed["stage"], weight = _relabel(typed, reading.label)
    strength = weight
    if "weight" in names:
        weight = weight * _weight(raw, typed["stage"], reading.max_weight)
    if reading.event_weights:
        typed[STRENGTH] = strength
    if reading.label or reading.event_weights or "weight" in names:
        typed["weight"] = weight
    events = raw.store_sound(typed, reading.max_bad_share)
    raw.dropped.extend(of_other_types)
    raw.note_missing(events, requests)
    raw.drop()
    return events, raw


def _event_columns(
    scanned: Scan, stages_in: str | None, reading: Reading, request_features: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """Returns the columns to read, by the log's names, and the unread ones."""
    required = ["user_id", "item_id", *([stages_in] if stages_in else [])]
    optional = [name for name in _OPTIONAL if name in scanned.columns]
    given = (*reading.columns, *scanned.columns)
    requested = [name for name in request_features if not is_from_timestamp(name, given)]
    used = dict.fromkeys([*required, *optional, *reading.columns, *reading.label, *requested])
    names = {name: reading.columns.get(name, name) for name in used}
    source = Source(scanned.name)
    remedies = {x: f"Set columns to say which column is {name}." for name, x in names.items()}
    problems = [
        f"columns.{name}: did you mean {column!r}? A column that keeps its name needs no entry."
        for name, column in names.items()
        if name not in (*schema.LOG_COLUMNS, "session_id") and _is_mistyped(name, column)
    ]
    problems += [
        f"columns.{name}: a name of the log comes first. Did you mean {column}={name}?"
        for name, column in reading.columns.items()
        if column in schema.LOG_COLUMNS and {name, column} & {*scanned.columns} == {name}
    ]
    absent = set(schema.LOG_COLUMNS) - set(names) - set(scanned.columns)
    if stages_in or reading.label:
        absent -= {"stage", "rating"}
    # A log whose stage or time is overlooked would silently become another kind of log.
    problems += [
        f"columns.{name}: did you mean 'timestamp'? The log has none. To keep it as a column that "
        "is not a time, give it another name."
        for name in reading.columns
        if name in _TIMES and "timestamp" in absent
    ]
    unread = [column for column in scanned.columns if column not in names.values()]
    for column in unread:
        near = difflib.get_close_matches(column.lower(), absent, n=1, cutoff=0.85)
        if not near and "timestamp" in absent and column.lower() in _TIMES:
            near = ["timestamp"]
        if near:
            problems.append(
                f"{source.column(column)} is not read; did you mean {near[0]!r}? Set columns to "
                f"say which column is {near[0]}, or rename it."
            )
    require_all(scanned.columns, remedies, source, "columns", problems)
    if absent & {"stage", "timestamp"}:
        _refuse_values(scanned, unread, absent)
    if "stage" in absent:
        _refuse_clicks(scanned, unread)
    return names, unread


def _refuse_values(scanned: Scan, unread: list[str], absent: Collection[str]) -> None:
    """Refuses unread columns that hold stages or times, if the log has none.

    A column holds stages if any row has a known stage and its first rows have few distinct values:
    teams add stages of their own. It holds times if over .9 of its first values are times.
    """
    rows = scanned.first_rows(unread, _NUM_LOOKED_AT)
    stages = {str(stage) for stage in Stage}
    texts = {
        column.name: {text.strip() for text in rows[column.name].unique().drop_null().to_pylist()}
        for column in rows.schema
        if pa.types.is_string(column.type)
    }
    few = [name for name, found in texts.items() if len(found - {""}) <= _MOST_STAGES]
    of_stages = scanned.holding(few, stages) if "stage" in absent else []
    for name, dtype in zip(rows.schema.names, rows.schema.types, strict=True):
        found = texts.get(name, set()) - {""}
        is_time = pa.types.is_timestamp(dtype) or pa.types.is_date(dtype)
        is_time |= sum(map(bool, map(_ISO_TIME.match, found))) > 0.9 * len(found)
        means = "stage" if name in of_stages else "timestamp" if is_time else ""
        if means in absent:
            holds = "stages" if means == "stage" else "times"
            column = printable(name)
            others = printable(", ".join(sorted(found - stages)), 100) if means == "stage" else ""
            others_too = f" and the stages of {others} to stage_values" if others else ""
            raise DataError(
                f"{Source(scanned.name).column(name)} is not read and holds {holds}, and the log "
                f"has no {means}. Add {means}={column} to columns{others_too}; or "
                f"{column}={column}, if it is a column like others.",
                "columns",
            )


def _refuse_clicks(scanned: Scan, unread: Sequence[str]) -> None:
    """Refuses (`DataError`) unread outcomes and types of events, if every row would be a click.

    A column with a usual name is an outcome if it holds 0 and 1, and its first rows nothing else.
    It has types of events if it has 2 to 50 values, and a usual name or such values.
    """
    rows = scanned.first_rows(unread, _NUM_LOOKED_AT)
    plain = [column.name for column in rows.schema if not pa.types.is_nested(column.type)]
    for name in plain:
        first = rows[name].unique().drop_null().to_pylist()
        is_usual, is_text = name.lower() in event_types.NAMES, pa.types.is_string(rows[name].type)
        has_types = is_usual or (is_text and event_types.are_types(first))
        if not has_types and name.lower() not in _OUTCOMES:
            continue
        column, values = printable(name), scanned.values(name, _MOST_TYPES + 1)
        found, types = {value.lower() for value in values}, [value for value in values if value]
        # An odd value, such as "unknown", may come later.
        are_both = {str(value).strip().lower() for value in first} <= _NO | _YES
        is_outcome = found & _NO and found & _YES and are_both
        if name.lower() in _OUTCOMES and is_outcome:
            holds = (
                "1 (or true, or yes) in some rows and 0 or nothing in others, and the log has no "
                "stage, rating or label"
            )
            add, setting = f"Add {column}=1 to label; or", "label"
        elif has_types and 1 < len(types) <= _MOST_TYPES:
            holds = f"{len(types)} types of events ({printable(', '.join(types), 200)})"
            add = (
                f"{'Set' if is_usual else f'Add event={column} to columns and set'} event_weights, "
                f"such as {printable(event_types.suggested(types), 200)} (a "
                "number is the weight of a positive; exposed was only shown; other types are "
                "dropped); or add"
            )
            setting = "event_weights"
        else:
            continue
        raise DataError(
            f"{Source(scanned.name).column(name)} is not read and holds {holds}: every row would "
            f"be a click. {add} {column}={column} to columns, if it is a column like others.",
            setting,
        )


def _request_hint(unread: Iterable[str]) -> str:
    """Suggests the unread columns that may number requests, by their names."""
    return "".join(
        f"; if {printable(name)} numbers lists, and the rows of each were shown together, add "
        f"request_id={printable(name)} to columns"
        for name in unread
        if name.lower() in _REQUESTS
    )


def _is_mistyped(name: str, column: str) -> bool:
    """Returns whether a name is nearly another; other case or punctuation alone is fine."""
    plain, other = ("".join(filter(str.isalnum, each.casefold())) for each in (name, column))
    return plain != other and bool(difflib.get_close_matches(plain, [other], cutoff=0.85))


def _keep_weighted(raw: RawTable, weights: Mapping[str, object]) -> tuple[RawTable, list[Dropped]]:
    """Deletes the rows of types without a weight; returns the table and what was deleted.

    A `DataError` if `weights` names a type that no row has but resembles another: a typing error.
    """
    typed = raw.table.select(name=_event_types(raw))
    found = typed.group_by("name").agg(num=typed.count()).to_pyarrow().to_pylist()
    counts = {row["name"]: row["num"] for row in found if row["name"] is not None}
    others = {name: num for name, num in counts.items() if name not in weights}
    by_case = {name.lower(): name for name in others}
    for name in weights:
        parts = [each for each in by_case if each in name.lower() or name.lower() in each]
        near = difflib.get_close_matches(name.lower(), by_case, n=1) or parts
        if name not in counts and near:
            raise DataError(
                f"event_weights.{printable(name)}: no row has this type; did you mean "
                f"{printable(repr(by_case[near[0]]))}?",
                "event_weights",
            )
    if counts and not counts.keys() & weights.keys():
        raise DataError(
            f"{raw.source.column('event')}: no row has a type with a weight. The types are "
            f"{printable(', '.join(sorted(counts)), 200)}. Set event_weights, such as "
            f"{printable(event_types.suggested(counts), 200)}.",
            "event_weights",
        )
    told = (
        f"{printable(name)} {counts.get(name, 0):,} "
        f"({meaning if meaning == 'exposed' else f'positive, weight {meaning:g}'})"
        for name, meaning in weights.items()
    )
    raw.notes.append(f"{raw.source.column('event')}: {', '.join(told)}")
    unweighted = raw.table.filter(~_event_types(raw).isin([*weights])).select("_row")
    raw.table.get_backend().con.execute(
        f'DELETE FROM "{raw.table.get_name()}" '
        f"WHERE _row IN ({ibis.to_sql(unweighted, dialect='duckdb')})"
    )
    column = printable(repr(raw.source.columns.get("event", "event")))
    ranked = sorted(others.items(), key=lambda pair: -pair[1])
    listed = {name.casefold(): name for name in weights}
    dropped = []
    for name, num in ranked[:_MOST_TOLD]:
        same = listed.get(name.casefold())
        but = "" if same is None else f" ({printable(repr(same))} has, so write both the same)"
        what = f"column {column} is {printable(repr(name))}, which has no weight{but}"
        dropped.append(Dropped(what, num))
    if num_rest := sum(num for _, num in ranked[_MOST_TOLD:]):
        dropped.append(Dropped(f"column {column} is of another type without a weight", num_rest))
    return replace(raw, num_rows=raw.num_rows - sum(others.values())), dropped


def _event_types(raw: RawTable) -> ir.StringValue:
    return raw.table["event"].cast("string").strip()


def _stage_and_weight(
    raw: RawTable, stages_in: str | None, reading: Reading
) -> tuple[ir.StringValue, ir.FloatingValue]:
    """Returns the stage and the weight of each event; an exposed one weighs 1."""
    neutral = ibis.literal(1.0)
    if stages_in == "stage":
        value = stage = raw.table["stage"].cast("string")
        if reading.stage_values:
            stage = value.cases(*reading.stage_values.items(), else_=value)
        raw.fault("stage", value.isnull(), rules.NO_STAGE)
        raw.fault("stage", stage.notin([str(each) for each in Stage]), rules.UNKNOWN_STAGE)
        return stage, neutral
    if stages_in == "rating":
        rating = columns.to_number(raw, "rating")
        raw.fault("rating", rating.isnull(), rules.NO_RATING)
        lowest = ibis.literal(float(reading.rating_threshold or 0))
        if raw.table["rating"].type().is_float32():  # 4.1 in float32 is below 4.1 in float64.
            lowest = lowest.cast("float32").cast("float64")
        return (rating >= lowest).ifelse(Stage.CLICKED.value, Stage.EXPOSED.value), neutral
    if stages_in == "event":
        raw.fault("event", raw.table["event"].isnull(), rules.NO_TYPE)
        value, weights = _event_types(raw), reading.event_weights
        # As text, because DuckDB reads the literal 1.0 as a decimal.
        positive = {name: str(weight) for name, weight in weights.items() if weight != "exposed"}
        stage = value.isin([*positive]).ifelse(Stage.CLICKED.value, Stage.EXPOSED.value)
        weight = value.cases(*positive.items(), else_="1") if positive else ibis.literal("1")
        return stage, weight.cast("float64")
    return ibis.literal((Stage.EXPOSED if reading.label else Stage.CLICKED).value), neutral


def _relabel(
    typed: Mapping[str, ir.Value], label: Mapping[str, float]
) -> tuple[ir.StringValue, ir.FloatingValue]:
    """Returns stages and weights: exposed events become positives if a label column holds.

    A column holds if it is true or above 0. Clicked events for which none holds become `exposed`;
    events that were never exposed keep their stage. Weights add up over the columns that hold.
    """
    terms = []
    for name, weight in label.items():
        column = typed[name]
        holds = column if column.type().is_boolean() else column > 0
        # DuckDB reads the literal 1.0 as a decimal, and Ibis drops a cast to the type it assumes.
        as_double = ibis.literal(str(float(weight))).cast("float64")
        terms.append(ibis.coalesce(holds, False).ifelse(as_double, 0.0))
    weight = sum(terms)
    stage, is_labelled = typed["stage"], weight > 0
    was_exposed = stage.isin([Stage.EXPOSED.value, Stage.CLICKED.value])
    new_stage = is_labelled.ifelse(Stage.CLICKED.value, Stage.EXPOSED.value)
    return was_exposed.ifelse(new_stage, stage), (was_exposed & is_labelled).ifelse(weight, 1.0)


def _note_amounts(raw: RawTable, name: str, outcome: ir.Value) -> None:
    """Notes that a label of amounts, such as seconds, is taken as yes or no."""
    above = outcome > 0
    low, high = raw.aggregate(low=outcome.min(where=above), high=outcome.max(where=above)).values()
    if low != high:
        column = printable(raw.source.columns.get(name, name))
        raw.notes.append(
            f"{raw.source.column(name)} is in the label with numbers from {low:g} to {high:g}: all "
            f"above 0 weigh the same. To weigh each by its number, add weight={column} to columns; "
            f"for a threshold, set rating={column} there and rating_threshold instead of the label"
        )


def _weight(raw: RawTable, stage: ir.StringValue, max_weight: float | None) -> ir.FloatingValue:
    """Makes weights. Only those of positives are used; an unusable weight elsewhere becomes 1."""
    value = raw.table["weight"]
    if not (value.type().is_numeric() or value.type().is_string()):
        raise raw.wrong_type("weight", "a number")
    weight = value.try_cast("float64")
    is_usable = is_usable_weight(weight)
    raw.fault("weight", (stage == Stage.CLICKED.value) & ~is_usable, rules.WEIGHT)
    if max_weight is not None:
        weight = ibis.least(weight, max_weight)
    return is_usable.ifelse(weight, 1.0)


def _other_column(raw: RawTable, name: str) -> ir.Value:
    if name == "rank":
        return columns.to_number(raw, name, "int64")
    if name == "score":
        return columns.to_number(raw, name)
    if name in ("request_id", "session_id"):
        value = columns.to_id(raw, name, as_integer=columns.is_integer(raw, name))
        # An empty id counts as missing, or all events without one would share a request.
        return value.strip().nullif("") if value.type().is_string() else value
    return columns.to_context(raw, name)
