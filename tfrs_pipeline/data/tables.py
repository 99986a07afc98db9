"""Raw tables turned into the event, item and user table of a log."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import duckdb
import ibis
import ibis.expr.types as ir
from ibis.backends.duckdb import Backend as DuckDB

from tfrs_pipeline.data.columns import (
    Formats,
    RawTable,
    is_integer,
    to_context,
    to_feature,
    to_id,
    to_number,
    to_timestamp,
)
from tfrs_pipeline.data.files import Scan, connect, scan
from tfrs_pipeline.data.labels import relabel
from tfrs_pipeline.data.schema import (
    DataError,
    Dropped,
    Duplicates,
    FeatureKind,
    Refusal,
    Source,
    Stage,
    UnknownItems,
    check_entities,
    check_events,
    count_rows,
    refuse_rows,
    require_column,
)

logger = logging.getLogger(__name__)

_OPTIONAL = ("timestamp", "request_id", "rank", "score", "weight", "part")


@dataclass(frozen=True)
class EventRules:
    """What the rows of an event table mean.

    Args:
        columns: As in `Log.from_files`; so are the other fields.
        rating_threshold: Makes clicks of ratings.
        stage_values: Makes stages of a column's values.
        label: Makes clicks of exposures.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    rating_threshold: float | None = None
    stage_values: Mapping[str, str] = field(default_factory=dict)
    label: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stages = [str(stage) for stage in Stage]
        if wrong := sorted(set(self.stage_values.values()) - set(stages)):
            raise ValueError(f"stage_values must map to {', '.join(stages)}. Received: {wrong}.")
        if "event_number" in self.columns:
            raise ValueError(
                "columns: event_number is made here, of the order of the rows; name the column "
                "otherwise."
            )
        if self.rating_threshold is not None and (self.label or self.stage_values):
            raise ValueError(
                "rating_threshold says what a positive is, and so would label or stage_values: set "
                f"one of them. Received: {self.rating_threshold}, {dict(self.label)} and "
                f"{dict(self.stage_values)}."
            )

    def own_column(self, scanned: Scan) -> str | None:
        """Returns the column that tells what became of an item, stage or rating, if any does."""
        where = Source(scanned.name)

        def has(name: str) -> bool:
            return name in self.columns or name in scanned.columns

        if self.rating_threshold is not None:
            return "rating"
        if has("stage") or self.stage_values:
            return "stage"
        if has("rating") and not self.label:
            raise DataError(
                f"{where.column(self.columns.get('rating', 'rating'))}: a log of ratings needs "
                "rating_threshold, the lowest rating that is a positive. Set it; or rename the "
                "column, if all rows are clicks."
            )
        return None


def load_events(
    connection: DuckDB,
    scanned: Scan,
    rules: EventRules,
    formats: Formats,
    others: Mapping[str, RawTable | None],
) -> ibis.Table:
    """Types, checks and stores an event table; its ids and those of `others` become one type."""
    own = rules.own_column(scanned)
    names = _event_columns(scanned, own, rules)
    raw = scanned.load(connection, names)
    columns: dict[str, ir.Value] = {
        name: _joined_id(raw, others.get(name), name) for name in ("user_id", "item_id")
    }
    if "timestamp" in names:
        columns["timestamp"] = to_timestamp(raw, "timestamp", formats)
    columns["event_number"] = raw.table["_row"]
    columns["stage"] = _stage(raw, own, rules)
    for name in names:
        if name not in columns and (name != own or name in rules.label):
            columns[name] = _other_column(raw, name)
    events = raw.table.select(**columns)
    if rules.label:
        events = relabel(events, rules.label, raw.source)
    events = store(connection, events, raw.source)
    connection.drop_table(raw.table.get_name())
    check_events(events, raw.source)
    return events


def load_raw(
    connection: DuckDB,
    source: Any,
    id_name: str,
    columns: Mapping[str, str],
    features: Mapping[str, FeatureKind],
) -> RawTable | None:
    """Opens an item or user table; None where there is none."""
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
    names = {}
    for name in dict.fromkeys([id_name, *features, *shown, *columns]):
        names[name] = columns.get(name, name)
        remedy = f"Set {kind}_columns to say which column is {name}."
        require_column(scanned.columns, names[name], Source(scanned.name), remedy)
    return scanned.load(connection, names)


def type_entities(
    raw: RawTable,
    id_name: str,
    ids: ir.Value,
    features: Mapping[str, FeatureKind],
    formats: Formats,
) -> ibis.Table:
    """Types and checks an item or user table: id, features and, of items, a column `title`."""
    columns = {id_name: ids}
    for name, kind in features.items():
        columns[name] = to_feature(raw, name, kind, formats)
    if "title" in raw and id_name == "item_id":
        columns.setdefault("title", raw.table["title"].cast("string"))
    entities = raw.table.select(**columns)
    check_entities(entities, id_name, features, raw.source)
    return entities


def load_items(
    source: Any,
    *,
    is_integer_id: bool,
    item_features: Mapping[str, FeatureKind],
    item_columns: Mapping[str, str],
    formats: Formats,
) -> ibis.Table:
    """Loads an item table by itself, such as today's for a model of last week's.

    Args:
        source: As `items` of `Log.from_files`.
        is_integer_id: Whether the ids are integers, as in the events that the model was trained on;
            else they are read as text.
        item_features: Feature column -> kind.
        item_columns: As in `Log.from_files`.
        formats: How values are written.

    Returns:
        item_id, the features, and `title` where there is one, by ascending item_id.

    Raises:
        DataError: Naming source, column, rows and remedy.
    """
    raw = load_raw(connect(), source, "item_id", item_columns, item_features)
    assert raw is not None
    if is_integer_id and not is_integer(raw, "item_id"):
        raise DataError(
            f"{raw.source.column('item_id')} holds text, and the model's item ids are integers. "
            "Give the ids of the events that it was trained on."
        )
    ids = raw.table["item_id"].cast("int64" if is_integer_id else "string")
    return type_entities(raw, "item_id", ids, item_features, formats).order_by("item_id")


def settle_unknown_items(
    events: ibis.Table, items: ibis.Table, source: Source, unknown_items: UnknownItems
) -> tuple[ibis.Table, list[Dropped]]:
    """Keeps, drops or refuses events whose item the item table lacks."""
    if unknown_items == "keep":
        return events, []
    is_unknown = events.anti_join(items, "item_id")
    num_unknown = count_rows(is_unknown)
    if not num_unknown:
        return events, []
    if unknown_items == "error":
        example = is_unknown["item_id"].min().to_pyarrow().as_py()
        raise DataError(
            f"{source.column('item_id')}: {num_unknown} of {count_rows(events)} rows hold an item "
            f"that the item table lacks, such as {example!r}. Add it there, or set unknown_items "
            "to keep (with null features) or drop."
        )
    kept = events.semi_join(items, "item_id")
    return kept, [Dropped("item is not in the item table", num_unknown)]


def settle_duplicates(
    events: ibis.Table, source: Source, duplicates: Duplicates
) -> tuple[ibis.Table, list[Dropped]]:
    """Keeps, drops or refuses events that repeat an earlier one."""
    if duplicates == "keep":
        return events, []
    # An event of the test part is not a repeat of one in the training part.
    keys = ["user_id", "item_id", "timestamp", "stage", "request_id", "part"]
    same = ibis.window(
        group_by=[name for name in keys if name in events.columns], order_by="event_number"
    )
    numbered = events.mutate(_copy=ibis.row_number().over(same))
    num_copies = count_rows(numbered.filter(numbered["_copy"] > 0))
    if not num_copies:
        return events, []
    if duplicates == "error":
        raise DataError(
            f"{source.name}: {num_copies} of {count_rows(events)} rows repeat an earlier one in "
            "user, item, time, stage and request. Remove them, or set duplicates to drop or keep."
        )
    kept = numbered.filter(numbered["_copy"] == 0).drop("_copy")
    return kept, [Dropped("repeats an earlier event", num_copies)]


def add_missing(entities: ibis.Table, events: ibis.Table, id_name: str) -> ibis.Table:
    """Adds the ids of the events that an item or user table lacks, with null features."""
    missing = events.select(id_name).distinct().anti_join(entities, id_name)
    num_missing = count_rows(missing)
    if not num_missing:
        return entities
    logger.warning(
        "%s table: lacks %d ids of the events; added with null features", id_name[:4], num_missing
    )
    nulls = {name: ibis.null(dtype) for name, dtype in entities.schema().items() if name != id_name}
    return entities.union(missing.mutate(**nulls).select(*entities.columns))


def store(connection: DuckDB, expression: ibis.Table, source: Source) -> ibis.Table:
    """Stores an expression as a table of its own; what the engine refuses is a `DataError`."""
    try:
        return connection.create_table(ibis.util.gen_name("log"), expression)
    except duckdb.Error as error:
        raise DataError(f"{source.name}: {str(error).strip()}") from error


def _joined_id(raw: RawTable, other: RawTable | None, name: str) -> ir.Value:
    """Makes ids of a table, in the type that they and another table's have in common."""
    # A list, not a generator: a wrong type in either table is refused.
    are_integers = [is_integer(table, name) for table in (raw, other) if table is not None]
    return raw.table[name].cast("int64" if all(are_integers) else "string")


def _event_columns(scanned: Scan, own: str | None, rules: EventRules) -> dict[str, str]:
    """Returns log's name -> column of the source, of all columns to be taken."""
    required = ["user_id", "item_id", *([own] if own else [])]
    optional = [name for name in _OPTIONAL if name in scanned.columns]
    names = {}
    for name in dict.fromkeys([*required, *optional, *rules.columns, *rules.label]):
        names[name] = rules.columns.get(name, name)
        remedy = f"Set columns to say which column is {name}."
        require_column(scanned.columns, names[name], Source(scanned.name), remedy)
    return names


def _stage(raw: RawTable, own: str | None, rules: EventRules) -> ir.StringValue:
    if own == "stage":
        value = raw.table["stage"].cast("string")
        if not rules.stage_values:
            return value
        cases = [(value == found, stage) for found, stage in rules.stage_values.items()]
        return ibis.cases(*cases, else_=value)
    if own == "rating":
        rating = to_number(raw, "rating")
        remedy = "Drop these rows, or rate them."
        refuse_rows(
            raw.table, raw.source, Refusal("rating", rating.isnull(), "is null or NaN", remedy)
        )
        is_clicked = rating >= rules.rating_threshold
        return is_clicked.ifelse(Stage.CLICKED.value, Stage.EXPOSED.value)
    return ibis.literal((Stage.EXPOSED if rules.label else Stage.CLICKED).value)


def _other_column(raw: RawTable, name: str) -> ir.Value:
    if name == "rank":
        return to_number(raw, name, "int64")
    if name in ("score", "weight"):
        return to_number(raw, name)
    return to_id(raw, name) if name == "request_id" else to_context(raw, name)
