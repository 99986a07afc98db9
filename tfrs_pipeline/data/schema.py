"""The words of the tables, and their contract: stages, kinds of features, what is refused.

Ibis is named here in type hints alone: whoever needs only a word does not load it.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

from tfrs_pipeline.features.kinds import FeatureKind, kind_problem
from tfrs_pipeline.messages import printable, sentence

if TYPE_CHECKING:
    import ibis
    import ibis.expr.types as ir

SplitKind: TypeAlias = Literal["time", "last_share", "last_n", "held_out_users", "column"]
Exclude: TypeAlias = Literal["clicked", "seen", "none"]
UnknownItems: TypeAlias = Literal["keep", "drop", "error"]
Duplicates: TypeAlias = Literal["keep", "drop", "error"]
TimestampUnit: TypeAlias = Literal["s", "ms", "us", "ns"]


# Column of a log's items: whether the item table has the item, or only the events.
LISTED = "_listed"
LOG_COLUMNS = (
    "user_id",
    "item_id",
    "timestamp",
    "stage",
    "rating",
    "request_id",
    "rank",
    "score",
    "weight",
    "part",
)
"""Columns of an event table that mean something to a log; any other one is context."""


TIMES_ELSEWHERE = ("time", "date", "datetime", "ts", "created_at", "event_time", "time_ms")
"""What others call the column `timestamp`."""


MIN_WEIGHT, MAX_WEIGHT = 1e-9, 1e9
WEIGHT_FAULT = (
    f"is not a number from {MIN_WEIGHT:.0e} to {MAX_WEIGHT:.0e}",
    "Give these rows a weight (1 is neutral).",
)
"""What is wrong with a weight that `is_usable_weight` refuses, and what to do."""


class DataError(ValueError):
    """Input that does not keep the contract. The message says where, how many rows, what to do.

    `setting` is the argument of `Log.from_files` that mends it, if one does: the message calls it
    by that name, and who knows it by another can add theirs.
    """

    def __init__(self, message: str, setting: str = "") -> None:
        super().__init__(message)
        self.setting = setting


class Stage(enum.StrEnum):
    """The furthest stage that an item reached in a request."""

    RETRIEVED = "retrieved"
    """Lost in pre-rank."""
    PRE_RANKED = "pre_ranked"
    """Lost in rank."""
    RANKED = "ranked"
    """Survived rank, was not shown."""
    EXPOSED = "exposed"
    """Shown, not clicked: never a negative of that user."""
    CLICKED = "clicked"
    """Shown and clicked: a positive."""


@dataclass(frozen=True)
class Dropped:
    """Rows that a source or a filter dropped: why, for a person, and how many."""

    reason: str
    num_rows: int


@dataclass(frozen=True)
class Source:
    """What to call a table in a message, and its columns where they have another name there."""

    name: str
    columns: Mapping[str, str] = field(default_factory=dict)

    def column(self, name: str) -> str:
        """Says where a column stands, for the start of a message."""
        return f"{self.name}: column {printable(repr(self.columns.get(name, name)))}"


class Refusal(NamedTuple):
    """What is wrong with rows of a table.

    Args:
        column: The column to name, and to show values of.
        is_bad: True in the rows.
        problem: What is wrong with the column there, such as "is null".
        remedy: What to do.
        setting: The argument of `Log.from_files` that mends it, if any.
        is_droppable: Whether a few such rows may be dropped: not where all could be mended alike.
    """

    column: str
    is_bad: ir.BooleanValue
    problem: str
    remedy: str
    setting: str = ""
    is_droppable: bool = True

    def error(
        self,
        table: ibis.Table,
        source: Source,
        max_bad_share: float = 0,
        becomes: str = "rows are dropped",
    ) -> DataError:
        """Makes the error: column, problem, number of rows, a few values, remedy.

        If up to `max_bad_share` may be bad, `becomes` says what becomes of them.
        """
        bad = table.filter(self.is_bad)
        value = table[self.column]
        first = {"first": table["_row"].min()} if "_row" in table.columns else {}
        row = bad.aggregate(num=bad.count(), **first).to_pyarrow().to_pylist()[0]
        text = bad.select(text=value.cast("string").left(100)).distinct().limit(3).to_pyarrow()
        values = sorted(value for value in text["text"].to_pylist() if value is not None)
        if value.type().is_string():
            values = [repr(value) for value in values]
        examples = f", such as {', '.join(map(printable, values))}" if values else ""
        place = f" (first: row {row['first'] + 1})" if first else ""
        instead = ""
        if max_bad_share and self.is_droppable:
            instead = f" Up to max_bad_share ({max_bad_share:g}) of the {becomes} instead."
        return DataError(
            f"{source.column(self.column)} {self.problem} in {row['num']} of {count_rows(table)} "
            f"rows{examples}{place}. {self.remedy}{instead}",
            self.setting,
        )


@dataclass(frozen=True)
class RawTable:
    """A table as it came: a DuckDB table under the log's names, and `_row`, its order from 0.

    `is_text` says whether every column is a string that may stand for another type (CSV). `dropped`
    is what could not even be read as a row, `faults` what is wrong with values, in the order in
    which these were typed; `texts` are columns of ids as `columns.py` has read them; `renaming` is
    the argument of `Log.from_files` that names its columns.
    """

    table: ibis.Table
    source: Source
    num_rows: int
    is_text: bool
    dropped: tuple[Dropped, ...] = ()
    faults: list[Refusal] = field(default_factory=list)
    texts: dict[str, tuple[ir.StringValue, bool, int]] = field(default_factory=dict)
    renaming: str = "columns"

    def __contains__(self, column: str) -> bool:
        return column in self.table.columns

    def drop(self) -> None:
        """Deletes the table from its database."""
        self.table.get_backend().drop_table(self.table.get_name())

    def wrong_type(self, column: str, wanted: str) -> DataError:
        """Makes the error of a column of a wrong type."""
        return DataError(
            f"{self.source.column(column)} must be {wanted}, it is {self.table.schema()[column]} "
            f"({self.num_rows} rows). Cast it, or name another column.",
            self.renaming,
        )

    def has(self, condition: ir.BooleanValue) -> bool:
        """Says whether a condition is true in any row."""
        found = self.table.aggregate(found=condition.any())
        return bool(found.to_pyarrow()["found"][0].as_py())

    def fault(
        self,
        column: str,
        is_bad: ir.BooleanValue,
        problem: str,
        remedy: str = "Correct them, or name another column.",
        setting: str | None = None,
    ) -> None:
        """Notes what is wrong with a column, and in which rows; None is the name of the column."""
        setting = self.renaming if setting is None else setting
        self.faults.append(Refusal(column, is_bad, problem, remedy, setting))


def is_usable_weight(weight: ir.NumericValue) -> ir.BooleanValue:
    """Says which weights may train: those that float32 neither loses nor fails to add up."""
    return weight.between(MIN_WEIGHT, MAX_WEIGHT).fill_null(False)


def id_refusals(name: str, value: ir.Value, setting: str = "") -> Iterator[Refusal]:
    """Yields what an id that each row must have cannot be: null, or -1 or "" (empty slots)."""
    reserved = -1 if value.type().is_int64() else ""
    is_reserved = (value == reserved).fill_null(False)
    problem = f"is {reserved!r} (reserved for empty slots)"
    yield Refusal(name, value.isnull(), "is null", "Give these rows an id.", setting)
    yield Refusal(name, is_reserved, problem, "Give these rows an id.", setting)


def refuse_rows(table: ibis.Table, source: Source, *refusals: Refusal) -> None:
    """Refuses a table (`DataError`) for the first condition that any row meets, all in one pass."""
    found = {str(i): refusal.is_bad.any() for i, refusal in enumerate(refusals)}
    is_found = table.aggregate(**found).to_pyarrow().to_pylist()[0]
    for i, refusal in enumerate(refusals):
        if is_found[str(i)]:
            raise refusal.error(table, source)


def checked_kinds(
    items: Mapping[str, FeatureKind] | None,
    users: Mapping[str, FeatureKind] | None,
    requests: Mapping[str, FeatureKind] | None,
) -> tuple[dict[str, FeatureKind], dict[str, FeatureKind], dict[str, FeatureKind]]:
    """Returns the features of items, users and requests; a `ValueError` if one cannot be."""
    tables = dict(items or {}), dict(users or {}), dict(requests or {})
    for own_id, features in zip(("item_id", "user_id"), tables, strict=False):
        if own_id in features:
            raise ValueError(
                f"{own_id!r} is no feature of its own table: what a model learns of an id is a "
                "setting (use_candidate_id, use_user_id). To read it otherwise, copy the column."
            )
    for name, kind in (pair for table in tables for pair in table.items()):
        if problem := kind_problem(kind):
            raise ValueError(f"Feature {name!r} has {sentence(problem)} Received: {kind!r}.")
    return tables


def check_choice(name: str, value: str, choices: Any) -> None:
    """Refuses (`ValueError`) a value that is none of a `Literal`'s."""
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}. Received: {value}.")


def case_problem(name: str) -> str:
    """Says which of a log's own columns an engine takes a name for, as cases are one to it."""
    lower = name.casefold()
    if lower == name or lower not in (*LOG_COLUMNS, "event_number"):
        return ""
    return f"differs from the log's own column {lower!r} in case alone; name the column otherwise"


def name_problem(name: str, columns: Collection[str] = ()) -> str:
    """Says why a log cannot call a column so; "" if it can, as one of its own or as context.

    Beside the log's own column, of `columns`, a name that is nearly that is no mistake.
    """
    if name == "event_number":
        return "is made here, of the order of the rows; name the column otherwise"
    if name.startswith("_"):
        return "must not begin with '_'; name the column otherwise"
    if problem := case_problem(name):
        return problem
    near = difflib.get_close_matches(name, LOG_COLUMNS, n=1, cutoff=0.7)
    if name not in LOG_COLUMNS and near and near[0] not in columns:
        return f"unknown column; did you mean {near[0]!r}?"
    return ""


def part_problems(kind: str | None, validation: Any, test: Any) -> Iterator[tuple[str, str]]:
    """Yields why these cannot be the parts of a split: the name of one, and what is wrong."""
    given = {"validation": validation, "test": test}
    for name, value in given.items():
        if kind == "column" and value is not None:
            yield (
                name,
                f"got {value} with kind 'column': the log's own column says it; leave it out",
            )
            continue
        if isinstance(value, datetime) and value.tzinfo is None:
            text = value.isoformat()
            yield name, f"got {text} without a time zone; write {text}Z if it is UTC"
        if isinstance(value, datetime) and kind not in (None, "time"):
            yield name, f"got a moment with kind {kind!r}: only with 'time'"
    if len({isinstance(value, datetime) for value in given.values()}) > 1:
        yield "", "give moments for both validation and test, or for neither"


def require_column(
    columns: Collection[str], name: str, source: Source, remedy: str, setting: str = ""
) -> None:
    """Refuses a table without a column, naming the nearest that there are, and the remedy."""
    if name in columns:
        return
    near = difflib.get_close_matches(name, columns, n=3, cutoff=0.5)
    hint = f"{'Nearest' if near else 'It has'}: {printable(', '.join(near or columns), 300)}."
    raise DataError(f"{source.name}: no column {printable(repr(name))}. {hint} {remedy}", setting)


def count_rows(table: ibis.Table) -> int:
    """Counts the rows of a table."""
    return int(table.count().to_pyarrow().as_py())
