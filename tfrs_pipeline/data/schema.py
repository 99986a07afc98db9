"""The vocabulary of the tables: stages, columns, and which names are allowed."""

import difflib
import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tfrs_pipeline.features.kinds import kind_problem
from tfrs_pipeline.libraries import ibis, ir
from tfrs_pipeline.messages import beside, printable, sentence

SplitKind: TypeAlias = Literal["time", "last_share", "last_n", "column"]
AskedBy: TypeAlias = Literal["users", "requests"]
Exclude: TypeAlias = Literal["clicked", "seen", "none"]
UnknownItems: TypeAlias = Literal["keep", "drop", "error"]
Duplicates: TypeAlias = Literal["keep", "drop"]
TimestampUnit: TypeAlias = Literal["s", "ms", "us", "ns"]
TieRule: TypeAlias = Literal["order", "drop"]
Ties: TypeAlias = Literal["auto", TieRule]

ASKED: Mapping[AskedBy, str] = {"users": "by user", "requests": "by request"}
"""How a holdout asks, in words: what has a query (see `Split.holdout`)."""

# Column of a log's items: True if the item table has the item, False if only the events do.
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
PAIR = ["user_id", "item_id"]

PAUSE = 1_800
"""Seconds without an event that end a visit without a session id: usual in web analytics."""
LONGEST_PAUSE = 86_400
"""Seconds without an event after which a session id means a new session: shops reuse them."""
MIN_WEIGHT, MAX_WEIGHT = 1e-9, 1e9
"""The range of weights that float32 can hold and add up."""


class DataError(ValueError):
    """Input that breaks the contract. The message says where, how many rows, and what to do.

    `setting` names the option that fixes it, if any: the command line adds its flag.
    """

    def __init__(self, message: str, setting: str = "") -> None:
        super().__init__(message)
        self.setting = setting


class Stage(enum.StrEnum):
    """The furthest stage that an item reached in a request."""

    RETRIEVED = "retrieved"  # Lost in pre-rank.
    PRE_RANKED = "pre_ranked"  # Lost in rank.
    RANKED = "ranked"  # Survived rank, was not shown.
    EXPOSED = "exposed"  # Shown, not clicked: never a negative of that user.
    CLICKED = "clicked"  # Shown and clicked: a positive.
    DISLIKED = "disliked"  # Its user said "not this": never a positive, never shown to them again.


SEEN = Stage.CLICKED, Stage.EXPOSED, Stage.DISLIKED
"""The stages of items that their user has seen."""


@dataclass(frozen=True)
class Dropped:
    """Rows that were dropped, or merged into others: why, for a person, and how many."""

    reason: str
    num_rows: int
    is_merged: bool = False


@dataclass(frozen=True)
class Source:
    """The name of a table in messages, and the names of its renamed columns."""

    name: str
    columns: Mapping[str, str] = field(default_factory=dict)

    def column(self, name: str) -> str:
        """Names a column and its table, for the start of a message."""
        return f"{self.name}: column {printable(repr(self.columns.get(name, name)))}"


def checked_kinds(
    items: Mapping[str, str] | None,
    users: Mapping[str, str] | None,
    requests: Mapping[str, str] | None,
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Returns the features of items, users and requests; a `ValueError` if one is invalid."""
    tables = dict(items or {}), dict(users or {}), dict(requests or {})
    for id_name, features in zip(("item_id", "user_id"), tables, strict=False):
        if id_name in features:
            raise ValueError(
                f"{id_name!r} cannot be a feature of its own table: a setting (use_candidate_id, "
                "use_user_id) decides whether a model learns ids. To use it anyway, copy it."
            )
    for name, kind in (pair for table in tables for pair in table.items()):
        if problem := kind_problem(kind):
            raise ValueError(f"Feature {name!r} has {sentence(problem)} Received: {kind!r}.")
    return tables


def case_problem(name: str) -> str:
    """Describes a clash with a log's own column for an engine, which ignores case; "" if none."""
    lower = name.casefold()
    if lower == name or lower not in (*LOG_COLUMNS, "event_number"):
        return ""
    remedy = f"rename the column or, if it is that one, write {lower}={name} in columns"
    return f"differs from the log's own column {lower!r} only in case; {remedy}"


def name_problem(name: str, columns: Collection[str] = ()) -> str:
    """Returns why `name` is not allowed as a column next to `columns`, or "".

    Example:
        >>> name_problem("timestmp")
        "unknown column; did you mean 'timestamp'?"
    """
    if name == "event_number":
        return "is reserved for the row order; rename the column"
    if name.startswith("_"):
        return "must not begin with '_'; rename the column"
    if problem := case_problem(name):
        return problem
    near = difflib.get_close_matches(name, LOG_COLUMNS, n=1, cutoff=0.7)
    if name not in LOG_COLUMNS and near and near[0] not in columns:
        return f"unknown column; did you mean {near[0]!r}?"
    return ""


def denied(path: Path | str) -> DataError:
    """Returns the error for a file or folder that this user may not read."""
    remedy = "Allow it to the user that runs this, or name files that may be read."
    return DataError(f"{path} may not be read: permission denied. {remedy}")


def check_exists(path: Path) -> None:
    """Refuses a missing file or folder, and suggests a neighbour."""
    try:
        exists = path.exists()
    except PermissionError as error:  # A folder above it is closed.
        raise denied(path) from error
    if not exists:
        what = "links to nothing" if path.is_symlink() else "does not exist"
        remedy = "Give a CSV or Parquet file, or a folder of them."
        raise DataError(f"{path} {what}.{beside(path)} {remedy}")


def require_all(
    columns: Collection[str],
    remedies: Mapping[str, str],
    source: Source,
    setting: str = "",
    others: Iterable[str] = (),
) -> None:
    """Refuses a table that lacks columns, in a line each; `others` are its further problems."""
    missing = []
    for name in (name for name in remedies if name not in columns):
        by_case = {column.lower(): column for column in columns}
        near = [by_case[match] for match in difflib.get_close_matches(name.lower(), by_case)]
        hint = ("Nearest: " if near else "It has: ") + printable(", ".join(near or columns), 300)
        missing.append(
            f"{source.name}: no column {printable(repr(name))}. {hint}. {remedies[name]}"
        )
    if lines := [*missing, *others]:
        raise DataError("\n".join(lines), setting)


def count_rows(table: "ibis.Table") -> int:
    """Counts the rows of a table."""
    return int(table.count().to_pyarrow().as_py())


def totals(table: "ibis.Table", **values: "ir.Scalar") -> dict[str, Any]:
    """Computes aggregates over the rows of a table, by name."""
    return dict(table.aggregate(**values).to_pyarrow().to_pylist()[0])


def is_positive(events: "ibis.Table") -> "ir.BooleanValue":
    """Marks the events that are positives."""
    return events["stage"] == Stage.CLICKED.value


def is_dislike(events: "ibis.Table") -> "ir.BooleanValue":
    """Marks the events that say "not this"."""
    return events["stage"] == Stage.DISLIKED.value


def was_shown(events: "ibis.Table") -> "ir.BooleanValue":
    """Marks the events whose item the user saw: clicked, passed over or disliked."""
    return events["stage"].isin([stage.value for stage in SEEN])


def disliked_pairs(events: "ibis.Table", pair: Sequence[str] = PAIR) -> "ibis.Table":
    """Returns the users and items of the dislikes among the events, each pair once."""
    return events.filter(is_dislike).select(*pair).distinct()


def without_disliked(clicks: "ibis.Table", disliked: "ibis.Table | None") -> "ibis.Table":
    """Leaves out clicks on disliked pairs: a dislike beats a click, before or after it.

    Which dislikes count depends on what may be known, so the caller gives their pairs: for the
    positives of a log, or of a part that trains, those among the same events; for the targets of an
    evaluation, those in their part and earlier ones. A history lacks what was disliked before its
    query (`make_holdout`).
    """
    return clicks if disliked is None else clicks.anti_join(disliked, disliked.columns)


def order_keys(events: "ibis.Table") -> list[str]:
    """Names the columns that order a user's events."""
    return ["timestamp", "event_number"] if "timestamp" in events.columns else ["event_number"]
