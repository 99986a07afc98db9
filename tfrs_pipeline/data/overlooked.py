"""Refuses unread columns that look like ones that the log lacks: a table of guesses.

If a stage, time or label is overlooked, the log silently becomes another kind of log. So a column
that looks like a missing one is refused. The error names the setting that reads the column, and the
setting that keeps it as an ordinary one.
"""

import difflib
import itertools
import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, TypeAlias

from tfrs_pipeline.data import event_types
from tfrs_pipeline.data.files import Scan, quoted, text_of
from tfrs_pipeline.data.schema import DataError, Source, Stage
from tfrs_pipeline.messages import printable

_NUM_LOOKED_AT = 1000
_MOST_STAGES = 100  # A column with more values is free text.
_MOST_TYPES = 50  # A column with more values does not hold types.
_ISO_TIME = re.compile(r"\d{4}-\d\d-\d\d([ tT]\d|$)")
_STAGES = frozenset(str(stage) for stage in Stage)
# An outcome that did not happen is often left empty.
_NO, _YES = {"0", "0.0", "false", "n", "no", "nan", ""}, {"1", "1.0", "true", "y", "yes"}
# Usual names elsewhere of outcomes, and of the column `timestamp`.
_OUTCOMES = ("clicked", "click", "is_click", "is_clicked", "label")
_TIMES = ("time", "date", "datetime", "ts", "created_at", "event_time", "time_ms")
# What a column holds and what would read it, in words; None if it is like any other.
Guess: TypeAlias = tuple[str, str] | None


class Unread(NamedTuple):
    """An unread column: its name, DuckDB's name of its type, and the texts in its first rows."""

    name: str
    type: str
    first: set[str]
    has_stage: bool = False  # In any row.

    @property
    def is_text(self) -> bool:
        """Whether it holds text."""
        return self.type.startswith(("VARCHAR", "ENUM"))


def is_time(name: str) -> bool:
    """Returns whether a column of this name usually holds times."""
    return name.lower() in _TIMES


def log_name(column: str, absent: Collection[str]) -> str:
    """Returns the absent column of the log whose name this one resembles, or ""."""
    near = difflib.get_close_matches(column.lower(), absent, n=1, cutoff=0.85)
    usual = ["timestamp"] if "timestamp" in absent and is_time(column) else []
    return next(iter([*near, *usual]), "")


def refuse(scanned: Scan, unread: Sequence[str], absent: Collection[str]) -> None:
    """Refuses (`DataError`) unread columns that look like one of the log's `absent` ones."""
    guesses = [guess for guess in _GUESSES if guess[0] in absent]
    columns = _look(scanned, unread) if guesses else []
    for (_, look, setting), column in itertools.product(guesses, columns):
        if guess := look(scanned, column):
            name, (holds, remedy) = printable(column.name), guess
            raise DataError(
                f"{Source(scanned.name).column(column.name)} is not read and holds {holds}. "
                f"{remedy} {name}={name} to columns, if it is a column like others.",
                setting,
            )


def _look(scanned: Scan, names: Sequence[str]) -> list[Unread]:
    """Reads the types and first values of columns, and looks for stages in all rows of some.

    Nested columns are left out.
    """
    tests = ", ".join(
        f"any_value(typeof({quoted(name)})), list(DISTINCT {text_of(name)})" for name in names
    )
    rows = scanned.fetch(names, lambda rows: rows.limit(_NUM_LOOKED_AT).aggregate(tests))
    values = iter(rows[0] if rows else ())  # Type and texts in turn; nothing from a stream.
    columns = [
        Unread(name, type_ or "", {text.strip() for text in texts or ()})
        for name, type_, texts in zip(names, values, values, strict=False)
        if not (type_ or "").startswith(("STRUCT", "MAP", "UNION")) and "[" not in (type_ or "")
    ]
    # Only columns that may hold stages are read to their end: one query over few columns.
    few = [
        column.name
        for column in columns
        if column.is_text and len(column.first - {""}) <= _MOST_STAGES
    ]
    listed = ", ".join(f"'{stage}'" for stage in _STAGES)
    tests = ", ".join(f"bool_or(lower({text_of(name)}) IN ({listed}))" for name in few)
    rows = scanned.fetch(few, lambda rows: rows.aggregate(tests))
    with_stage = set(itertools.compress(few, rows[0] if rows else ()))
    return [column._replace(has_stage=column.name in with_stage) for column in columns]


def _stages(_: Scan, column: Unread) -> Guess:
    """Guesses stages if any row has a known stage, and the first rows have few distinct values.

    Unknown stages may be among them, because teams add their own.
    """
    others = printable(", ".join(sorted(column.first - _STAGES - {""})), 100)
    and_others = f" and the stages of {others} to stage_values" if others else ""
    name = printable(column.name)
    guess = "stages, and the log has no stage", f"Add stage={name} to columns{and_others}; or"
    return guess if column.has_stage else None


def _times(_: Scan, column: Unread) -> Guess:
    """Guesses times by the column's type, or if over .9 of its first values are times."""
    texts = column.first - {""} if column.is_text else set()
    has_type = column.type.startswith(("TIMESTAMP", "DATE"))
    if has_type or sum(map(bool, map(_ISO_TIME.match, texts))) > 0.9 * len(texts):
        remedy = f"Add timestamp={printable(column.name)} to columns; or"
        return "times, and the log has no timestamp", remedy
    return None


def _outcome(scanned: Scan, column: Unread) -> Guess:
    """Guesses an outcome by a usual name and both values; later rows may hold others too."""
    first = {text.lower() for text in column.first}
    if column.name.lower() not in _OUTCOMES or not first <= _NO | _YES:
        return None
    values = {value.lower() for value in _values(scanned, column)}
    holds = (
        "1 (or true, or yes) in some rows and 0 or nothing in others, and the log has no stage, "
        "rating or label: every row would be a click"
    )
    remedy = f"Add {printable(column.name)}=1 to label; or"
    return (holds, remedy) if values & _NO and values & _YES else None


def _types(scanned: Scan, column: Unread) -> Guess:
    """Guesses types if there are few, and their column's name or a view and a purchase tell."""
    is_usual = column.name.lower() in event_types.NAMES
    if not is_usual and not (column.is_text and event_types.are_types(column.first)):
        return None
    types = [value for value in _values(scanned, column) if value]
    if not 1 < len(types) <= _MOST_TYPES:
        return None
    listed, weights = printable(", ".join(types), 200), printable(event_types.suggested(types), 200)
    named = "Set" if is_usual else f"Add event={printable(column.name)} to columns and set"
    return (
        f"{len(types)} types of events ({listed}): every row would be a click",
        f"{named} event_weights, such as {weights} (a number is the weight of a positive; exposed "
        "was only shown; other types are dropped); or add",
    )


def _values(scanned: Scan, column: Unread) -> list[str]:
    """Returns the distinct texts of all rows, sorted, or the first `_MOST_TYPES` + 1 that come."""
    query = f"{text_of(column.name)} AS text"
    rows = scanned.fetch(
        [column.name], lambda rows: rows.project(query).distinct().limit(_MOST_TYPES + 1)
    )
    return sorted(text for (text,) in rows)


# The column that the log must lack -> what an unread column may be instead, and the setting for it.
_GUESSES: tuple[tuple[str, Callable[[Scan, Unread], Guess], str], ...] = (
    ("stage", _stages, "columns"),
    ("timestamp", _times, "columns"),
    ("stage", _outcome, "label"),
    ("stage", _types, "event_weights"),
)
