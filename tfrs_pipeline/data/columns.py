"""Which column of a file is which of the log's: named in `Reading`, or recognised.

- A column has the log's name, or `Reading.columns` (`item_columns`, `user_columns`) names it.
- The type of an event and its session may have a usual name instead (`with_type_columns`).
- A column that is left over and is named as one that the log lacks is refused: if a time, a label
  or the types of events are overlooked, the log silently becomes another kind of log. The error
  names the setting that reads the column, and the setting that keeps it as an ordinary one.

`Scan.load` then renames while it reads. `schema.name_problem` says which names are allowed.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence

from tfrs_pipeline.data import rules, schema
from tfrs_pipeline.data.files import Scan
from tfrs_pipeline.data.request_features import is_from_timestamp
from tfrs_pipeline.data.schema import DataError, Source
from tfrs_pipeline.data.settings import Reading
from tfrs_pipeline.messages import printable, suggest

_OPTIONAL = ("timestamp", "request_id", "rank", "score", "weight", "part")
# Usual names elsewhere: of event types, sessions (the likeliest first), times and outcomes.
_NOUNS = ("event", "action", "behavior", "behaviour", "interaction")
_TYPES = {"event_name", "activity", *_NOUNS} | {f"{noun}_type" for noun in _NOUNS}
_SESSIONS = ("session_id", "session", "visit_id", "visit")
_TIMES = ("time", "date", "datetime", "ts", "created_at", "event_time", "time_ms")
_OUTCOMES = ("clicked", "click", "is_click", "is_clicked", "label")

_MOST_TYPES = 50  # A column with more values does not hold types.
# An outcome that did not happen is often left empty.
_NO, _YES = {"0", "0.0", "false", "n", "no", "nan", ""}, {"1", "1.0", "true", "y", "yes"}


def with_type_columns(reading: Reading, scanned: Scan) -> Reading:
    """Adds the columns of the event's type and session to `columns`, if there are `event_weights`.

    Both are found by usual names. A column to which `columns` gives a meaning is no session.
    """
    if not reading.event_weights:
        return reading
    columns = dict(reading.columns)
    usual = [name for name in scanned.columns if name.lower() in _TYPES]
    if "event" not in columns and len(usual) != 1:
        what = f"{' and '.join(usual)} may be it" if usual else "none has a usual name"
        raise DataError(
            f"{scanned.name}: event_weights needs the column of event types: {what}. It has: "
            f"{printable(', '.join(scanned.columns), 300)}. Add event=COLUMN to columns.",
            "columns",
        )
    columns.setdefault("event", "".join(usual[:1]))
    unnamed = {name.lower(): name for name in scanned.columns if name not in columns.values()}
    for name in filter(unnamed.__contains__, _SESSIONS):
        columns.setdefault("session_id", unnamed[name])
    return reading.model_copy(update={"columns": columns})


def stage_column(reading: Reading, scanned: Scan) -> str | None:
    """Returns the column that stages are made from, or None; a `DataError` for ratings alone."""
    named = {*reading.columns, *scanned.columns}
    if reading.rating_threshold is not None:
        return "rating"
    if reading.event_weights:
        return "event"
    if "stage" in named or reading.stage_values:
        return "stage"
    if "rating" in named and not reading.label:
        column = Source(scanned.name).column(reading.columns.get("rating", "rating"))
        raise DataError(
            f"{column}: a log of ratings needs rating_threshold, the lowest rating that is a "
            "positive. Set it; or rename the column, if all rows are clicks.",
            "rating_threshold",
        )
    return None


def event_columns(
    scanned: Scan, stages_in: str | None, reading: Reading, request_features: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """Returns the columns to read, by the log's names, and the unread ones."""
    required = ["user_id", "item_id", *([stages_in] if stages_in else [])]
    optional = [name for name in _OPTIONAL if name in scanned.columns]
    in_events = (*reading.columns, *scanned.columns)
    requested = [name for name in request_features if not is_from_timestamp(name, in_events)]
    used = dict.fromkeys([*required, *optional, *reading.columns, *reading.label, *requested])
    names = {name: reading.columns.get(name, name) for name in used}
    unread = [column for column in scanned.columns if column not in names.values()]
    # The log's columns that this table has nowhere. Only they can be meant by another name.
    absent = {*schema.LOG_COLUMNS} - {*names} - {*scanned.columns}
    if stages_in or reading.label:
        absent -= {"stage", "rating"}
    source = Source(scanned.name)
    problems = [
        f"columns.{name}: {problem}"
        for name, column in reading.columns.items()
        if (problem := _name_problem(name, column, scanned, absent))
    ]
    problems += [
        f"{source.column(column)} is not read; did you mean {near!r}? Set columns to say which "
        f"column is {near}, or rename it."
        for column in unread
        if (near := _log_name(column, absent))
    ]
    remedies = {file: f"Set columns to say which column is {name}." for name, file in names.items()}
    schema.require_all(scanned.columns, remedies, source, "columns", problems)
    if "stage" in absent:
        _refuse_overlooked(scanned, unread)
    return names, unread


def _name_problem(name: str, column: str, scanned: Scan, absent: Collection[str]) -> str:
    """Returns why the entry `name`=`column` of `Reading.columns` is a slip, or ""."""
    is_swapped = name in scanned.columns and column not in scanned.columns
    if is_swapped and column in schema.LOG_COLUMNS:
        return f"a name of the log comes first. Did you mean {column}={name}?"
    if name.lower() in _TIMES and "timestamp" in absent:
        return (
            "did you mean 'timestamp'? The log has none. To keep it as a column that is not a "
            "time, give it another name."
        )
    return ""


def entity_columns(
    scanned: Scan, id_name: str, features: Collection[str], reading: Reading, remedy: str = ""
) -> dict[str, str]:
    """Returns the columns of an item or user table to read, by the log's names.

    `remedy` replaces the advice to name a missing column in `reading`.
    """
    setting = f"{id_name.removesuffix('_id')}_columns"
    columns: Mapping[str, str] = getattr(reading, setting)
    shown = ["title"] if id_name == "item_id" else []
    used = dict.fromkeys([id_name, *features, *shown])
    if unused := sorted(set(columns) - set(used)):
        raise DataError(
            f"{setting}.{printable(unused[0])}: nothing reads a column of that name, "
            f"{suggest(unused[0], used)}",
            setting,
        )
    # A title is read if there is one; all else is required.
    there = {*scanned.columns, *columns, *features}
    names = {name: columns.get(name, name) for name in used if name in there or name not in shown}
    remedies = {
        column: remedy or f"Set {setting} to say which column is {name}."
        for name, column in names.items()
    }
    events_column = reading.columns.get(id_name, "")
    if events_column in scanned.columns and not remedy:
        mend = f"Add {id_name}={printable(events_column)} to {setting}, as in columns."
        remedies[names[id_name]] = mend
    schema.require_all(scanned.columns, remedies, Source(scanned.name), setting)
    return names


def _log_name(column: str, absent: Collection[str]) -> str:
    """Returns the absent column of the log whose name this one resembles, or ""."""
    near = difflib.get_close_matches(column.lower(), absent, n=1, cutoff=0.85)
    usual = ["timestamp"] if "timestamp" in absent and column.lower() in _TIMES else []
    return next(iter([*near, *usual]), "")


def _refuse_overlooked(scanned: Scan, unread: Sequence[str]) -> None:
    """Refuses (`DataError`) unread columns that are named as outcomes or types of events.

    Only if the values differ too: otherwise all rows are alike, and may be clicks.
    """
    for column in unread:
        is_type = column.lower() in _TYPES
        if not is_type and column.lower() not in _OUTCOMES:
            continue
        values, name = scanned.texts(column, _MOST_TYPES + 1), printable(column)
        where = f"{Source(scanned.name).column(column)} is not read and holds"
        otherwise = f"{name}={name} to columns, if it is a column like others."
        lower = {value.lower() for value in values}
        if not is_type and lower & _NO and lower & _YES:
            raise DataError(
                f"{where} 1 (or true, or yes) in some rows and 0 or nothing in others, and the log "
                "has no stage, rating or label: every row would be a click. Add "
                f"{name}=1 to label; or {otherwise}",
                "label",
            )
        types = [value for value in values if value and value[0] not in "[{"]
        if is_type and 1 < len(types) <= _MOST_TYPES:
            raise DataError(
                f"{where} {len(types)} types of events ({printable(', '.join(types), 200)}): every "
                f"row would be a click. {rules.SET_WEIGHTS} (a number is the weight of a positive; "
                f"exposed was only shown; other types are dropped); or add {otherwise}",
                "event_weights",
            )
