"""Turns a raw table into the event table of a log."""

import difflib
import itertools
from collections.abc import Mapping
from dataclasses import replace

import ibis
import ibis.expr.types as ir
import numpy as np

from tfrs_pipeline.data import rules, schema, values
from tfrs_pipeline.data.columns import event_columns, stage_column
from tfrs_pipeline.data.files import Scan
from tfrs_pipeline.data.raw_table import RawTable, store
from tfrs_pipeline.data.schema import DataError, Dropped, Stage
from tfrs_pipeline.data.settings import Reading
from tfrs_pipeline.data.visits import STRENGTH
from tfrs_pipeline.messages import printable

_MOST_LISTED = 10


def load_events(
    scanned: Scan,
    reading: Reading,
    request_features: Mapping[str, str],
    others: Mapping[str, RawTable],
) -> tuple[ibis.Table, RawTable]:
    """Types and stores an event table; its ids get the same type as those of `others`.

    Returns the events without bad rows, and the raw table, whose rows are deleted by then.
    """
    stages_in = stage_column(reading, scanned)
    names, unread = event_columns(scanned, stages_in, reading, request_features)
    raw, dropped_types = scanned.load(names), list[Dropped]()
    if stages_in == "event":
        raw, dropped_types = _keep_weighted(raw, reading.event_weights)
    if unread:
        raw.notes.append(f"{scanned.name}: columns not read: {printable(', '.join(unread), 300)}")
    if stages_in is None and not reading.label:
        raw.notes.append(f"{scanned.name}: without stage, rating or label, every row is a click")
    typed: dict[str, ir.Value] = {}
    for name in ("user_id", "item_id"):
        tables = [raw, *([others[name]] if name in others else [])]
        # A list, not a generator, so that a wrong type in either table is refused.
        as_integer = all([values.is_integer(table, name) for table in tables])
        typed[name] = values.to_required_id(raw, name, as_integer=as_integer)
    if "timestamp" in names:
        typed["timestamp"] = values.to_timestamp(raw, "timestamp", reading, reading.period())
        raw.fault("timestamp", typed["timestamp"].isnull(), rules.NO_TIME)
    # The order of the rows decides where times are equal, or missing in the whole log.
    typed["event_number"] = raw.table["_row"]
    typed["stage"] = _stage(raw, stages_in, reading)
    requests = {name: kind for name, kind in request_features.items() if name in names}
    values.type_features(raw, typed, requests, reading)
    for name in names:
        if name in reading.label:
            typed[name] = values.to_outcome(raw, name)
        elif name not in typed and name not in (stages_in, "weight"):
            typed[name] = _other_column(raw, name)
    if reading.label:
        # After the stages: a label judges what a funnel exposed.
        typed["stage"], typed["weight"] = _judged_by_label(typed, reading.label)
    elif reading.event_weights:
        meanings = reading.event_weights.items()
        weights = [(name, _double(1 if isinstance(what, str) else what)) for name, what in meanings]
        # Before amounts multiply it: of the events in a visit, the type decides, then the amount.
        typed["weight"] = typed[STRENGTH] = _event_types(raw).cases(*weights, else_=_double(1))
    if "weight" in names:
        weight = _weights(raw, typed["stage"], reading.max_weight)
        typed["weight"] = weight * typed["weight"] if "weight" in typed else weight
    events = raw.store_sound(typed, reading.max_bad_share)
    # Added only now, because types without a weight do not count towards max_bad_share.
    raw.dropped.extend(dropped_types)
    raw.note_missing(events, requests)
    raw.drop()
    return events, raw


def _keep_weighted(raw: RawTable, weights: Mapping[str, object]) -> tuple[RawTable, list[Dropped]]:
    """Leaves out the rows of types without a weight; returns the rest, and what was left out.

    A `DataError` if `weights` names a type that no row has but resembles another: a typing error.
    """
    types = _event_types(raw)
    rows = raw.table.filter(types.notnull()).group_by(name=types).agg(num=ibis._.count())
    rows = rows.order_by(ibis.desc("num"), "name").to_pyarrow().to_pydict()
    counts = dict(zip(rows["name"], rows["num"], strict=True))
    others = {name: num for name, num in counts.items() if name not in weights}
    by_case = {name.lower(): name for name in others}
    for name in (name for name in weights if name not in counts):
        # purchse is near purchase, and page_view contains view.
        parts = [other for other in by_case if other in name.lower() or name.lower() in other]
        if near := difflib.get_close_matches(name.lower(), by_case, n=1) or parts:
            raise DataError(
                f"event_weights.{printable(name)}: no row has this type; did you mean "
                f"{printable(repr(by_case[near[0]]))}?",
                "event_weights",
            )
    if counts and not counts.keys() & weights.keys():
        raise DataError(
            f"{raw.source.column('event')}: no row has a type with a weight. The types are "
            f"{printable(', '.join(sorted(counts)), 200)}. {rules.SET_WEIGHTS}.",
            "event_weights",
        )
    meanings = (
        f"{printable(name)} {counts.get(name, 0):,} "
        f"({meaning if isinstance(meaning, str) else f'positive, weight {meaning:g}'})"
        for name, meaning in weights.items()
    )
    raw.notes.append(f"{raw.source.column('event')}: {', '.join(meanings)}")
    column = printable(repr(raw.source.columns.get("event", "event")))
    dropped = [
        Dropped(f"column {column} is {printable(repr(name))}, which has no weight", num)
        for name, num in itertools.islice(others.items(), _MOST_LISTED)
    ]
    if num_rest := sum(itertools.islice(others.values(), _MOST_LISTED, None)):
        dropped.append(Dropped(f"column {column} is of another type without a weight", num_rest))
    # A row without a type is a fault of the table, which is counted later.
    kept = store(raw.table.filter(types.isin([*weights]) | types.isnull()), raw.source)
    raw.drop()
    return replace(raw, table=kept, num_rows=raw.num_rows - sum(others.values())), dropped


def _event_types(raw: RawTable) -> ir.StringValue:
    return raw.table["event"].cast("string").strip()


def _stage(raw: RawTable, stages_in: str | None, reading: Reading) -> ir.StringValue:
    """Returns the stage of each event, before a label decides."""
    if stages_in == "stage":
        value = stage = raw.table["stage"].cast("string")
        if reading.stage_values:
            stage = value.cases(*reading.stage_values.items(), else_=value)
        raw.fault("stage", value.isnull(), rules.NO_STAGE)
        raw.fault("stage", stage.notin([str(stage) for stage in Stage]), rules.UNKNOWN_STAGE)
        return stage
    if stages_in == "rating":
        rating = values.to_number(raw, "rating")
        raw.fault("rating", rating.isnull(), rules.NO_RATING)
        # 4.1 in float32 is below 4.1 in float64.
        stored = np.float32 if raw.table["rating"].type().is_float32() else np.float64
        limits = reading.rating_threshold, reading.dislike_threshold
        lowest, disliked = (_double(stored(-np.inf if low is None else low)) for low in limits)
        stage = (rating >= lowest).ifelse(Stage.CLICKED.value, Stage.EXPOSED.value)
        return (rating < disliked).ifelse(Stage.DISLIKED.value, stage)
    if stages_in == "event":
        raw.fault("event", raw.table["event"].isnull(), rules.NO_TYPE)
        meanings = reading.event_weights.items()
        clicked = Stage.CLICKED.value
        stages = [(name, what if isinstance(what, str) else clicked) for name, what in meanings]
        return _event_types(raw).cases(*stages, else_=Stage.EXPOSED.value)
    return ibis.literal((Stage.EXPOSED if reading.label else Stage.CLICKED).value)


def _double(number: float | np.floating) -> ir.FloatingValue:
    # DuckDB reads the literal 1.0 as a decimal, and Ibis drops a cast to the type it assumes.
    return ibis.literal(str(float(number))).cast("float64")


def _judged_by_label(
    typed: Mapping[str, ir.Value], label: Mapping[str, float]
) -> tuple[ir.StringValue, ir.FloatingValue]:
    """Returns stages and weights: exposed events become positives if an outcome of the label holds.

    An outcome holds if it is true or above 0. Clicked events for which none holds become `exposed`;
    events that were never exposed keep their stage. The weights of all outcomes that hold add up;
    what is no positive weighs 1.
    """
    stage = typed["stage"]
    weight = _double(0)
    for name, amount in label.items():
        outcome = typed[name]
        holds = outcome if outcome.type().is_boolean() else outcome > 0
        weight += ibis.coalesce(holds, False).ifelse(_double(amount), 0.0)
    was_exposed = stage.isin([Stage.EXPOSED.value, Stage.CLICKED.value])
    new_stage = (weight > 0).ifelse(Stage.CLICKED.value, Stage.EXPOSED.value)
    is_weighed = was_exposed & (weight > 0)
    return was_exposed.ifelse(new_stage, stage), is_weighed.ifelse(weight, 1.0)


def _weights(raw: RawTable, stage: ir.StringValue, max_weight: float | None) -> ir.FloatingValue:
    """Makes weights. Only those of positives are used; an unusable weight elsewhere becomes 1."""
    value = raw.table["weight"]
    if not (value.type().is_numeric() or value.type().is_string()):
        raise raw.wrong_type("weight", "a number")
    weight = value.try_cast("float64")
    is_usable = weight.between(schema.MIN_WEIGHT, schema.MAX_WEIGHT).fill_null(False)
    raw.fault("weight", (stage == Stage.CLICKED.value) & ~is_usable, rules.WEIGHT)
    if max_weight is not None:
        weight = ibis.least(weight, max_weight)
    return is_usable.ifelse(weight, 1.0)


def _other_column(raw: RawTable, name: str) -> ir.Value:
    if name == "rank":
        return values.to_number(raw, name, "int64")
    if name == "score":
        return values.to_number(raw, name)
    if name in ("request_id", "session_id"):
        value = values.to_id(raw, name, as_integer=values.is_integer(raw, name))
        # An empty id counts as missing, or all events without one would share a request.
        return value.strip().nullif("") if value.type().is_string() else value
    return raw.table[name]
