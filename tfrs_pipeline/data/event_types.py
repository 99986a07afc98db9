"""Types of events, such as view, click and purchase: positives with weights, or only shown."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import ibis
import ibis.expr.types as ir

from tfrs_pipeline.data.files import Scan
from tfrs_pipeline.data.rules import RawTable
from tfrs_pipeline.data.schema import DataError, Dropped, Source, Stage
from tfrs_pipeline.data.settings import Reading
from tfrs_pipeline.messages import printable

NAMES = (
    *("event", "event_type", "event_name", "action", "action_type", "behavior", "behavior_type"),
    *("behaviour", "behaviour_type", "interaction", "interaction_type", "activity"),
)
"""Usual names of a column of event types."""

_MOST_TYPES = 50  # A column with more values does not hold types.
_MOST_TOLD = 10
# Parts of usual names, and the suggested weight; the first part that fits counts.
_USUAL = {
    **dict.fromkeys(("purchase", "buy", "order", "transaction"), "5"),
    **dict.fromkeys(("remove", "unlike", "dislike"), ""),
    **dict.fromkeys(("cart", "basket", "fav", "wish", "like"), "3"),
    **dict.fromkeys(("click", "play", "open"), "1"),
    **dict.fromkeys(("view", "impression", "show", "expos", "pv"), "exposed"),
}


def with_event_column(reading: Reading, scanned: Scan) -> Reading:
    """Adds the column of event types to `columns`, if there are weights and one usual name."""
    if not reading.event_weights or "event" in reading.columns:
        return reading
    found = [name for name in scanned.columns if name.lower() in NAMES]
    if len(found) != 1:
        what = f"{' and '.join(found)} may be it" if found else "none has a usual name"
        listed = printable(", ".join(scanned.columns), 300)
        raise DataError(
            f"{scanned.name}: event_weights needs the column of event types: {what}. It has: "
            f"{listed}. Add event=COLUMN to columns.",
            "columns",
        )
    return reading.model_copy(update={"columns": {**reading.columns, "event": found[0]}})


def keep_weighted(raw: RawTable, weights: Mapping[str, object]) -> tuple[RawTable, list[Dropped]]:
    """Deletes the rows of types without a weight; returns the table and what was deleted.

    A `DataError` if `weights` names a type that no row has but resembles another: a typing error.
    """
    typed = raw.table.select(name=_text(raw))
    found = typed.group_by("name").agg(num=typed.count()).to_pyarrow().to_pylist()
    counts = {row["name"]: row["num"] for row in found if row["name"] is not None}
    others = {name: num for name, num in counts.items() if name not in weights}
    for name in weights:
        if name not in counts and (near := difflib.get_close_matches(name, others, n=1)):
            raise DataError(
                f"event_weights.{printable(name)}: no row has this type; did you mean "
                f"{printable(repr(near[0]))}?",
                "event_weights",
            )
    told = (
        f"{printable(name)} {counts.get(name, 0):,} "
        f"({meaning if meaning == 'exposed' else f'positive, weight {meaning:g}'})"
        for name, meaning in weights.items()
    )
    raw.notes.append(f"{raw.source.column('event')}: {', '.join(told)}")
    unweighted = raw.table.filter(~_text(raw).isin([*weights])).select("_row")
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


def stage_and_weight(
    raw: RawTable, weights: Mapping[str, object]
) -> tuple[ir.StringValue, ir.FloatingValue]:
    """Returns the stage and the weight of each event; an exposed one weighs 1."""
    value = _text(raw)
    # As text, because DuckDB reads the literal 1.0 as a decimal.
    positive = {name: str(weight) for name, weight in weights.items() if weight != "exposed"}
    stage = value.isin([*positive]).ifelse(Stage.CLICKED.value, Stage.EXPOSED.value)
    weight = value.cases(*positive.items(), else_="1") if positive else ibis.literal("1")
    return stage, weight.cast("float64")


def strongest(events: ibis.Table) -> ibis.Table:
    """Keeps one event of each user and item in a request: the positive of the largest weight.

    Without a positive it is the first event. Events without a request are all kept.
    """
    keys = [x for x in ("user_id", "item_id", "request_id", "part") if x in events.columns]
    is_shown = (events["stage"] == Stage.EXPOSED.value).cast("int8")
    order = [is_shown, events["weight"].desc(), events["event_number"]]
    place = ibis.row_number().over(ibis.window(group_by=keys, order_by=order))
    return events.filter((place == 0) | events["request_id"].isnull())


def refuse_unread(scanned: Scan, unread: Iterable[str]) -> None:
    """Refuses (`DataError`) an unread column of event types, in a log whose rows are all clicks."""
    for name in (name for name in unread if name.lower() in NAMES):
        types = [text for text in scanned.values(name, _MOST_TYPES + 1) if text]
        if 1 < len(types) <= _MOST_TYPES:
            column, listed = printable(name), printable(", ".join(types), 200)
            raise DataError(
                f"{Source(scanned.name).column(name)} is not read and holds {len(types)} types of "
                f"events ({listed}): every row would be a click. Set event_weights, such as "
                f"{printable(suggested(types), 200)} (a number is the weight of a positive; "
                "exposed was only shown; other types are dropped); or add "
                f"{column}={column} to columns, if it is a column like others.",
                "event_weights",
            )


def suggested(types: Iterable[str]) -> str:
    """Suggests weights for types by their names; a view is an exposure if there are clicks."""
    meanings = {
        name: next((of for part, of in _USUAL.items() if part in name.lower()), "")
        for name in types
    }
    if "1" not in meanings.values():
        meanings = {name: of.replace("exposed", "1") for name, of in meanings.items()}
    strongest_first = filter(None, dict.fromkeys(_USUAL.values()))
    known = [f"{x}={of}" for of in strongest_first for x in meanings if meanings[x] == of]
    return " ".join(known) or "purchase=5 click=1"


def _text(raw: RawTable) -> ir.StringValue:
    return raw.table["event"].cast("string").strip()
