"""The rules for rows of a table: one line each, all evaluated in one pass.

Each kind of feature adds its own rules (`features/`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import duckdb
import ibis
import ibis.expr.types as ir
from ibis.common.exceptions import TableNotFound

from tfrs_pipeline.data import schema
from tfrs_pipeline.data.engines import check_stored
from tfrs_pipeline.data.schema import MAX_WEIGHT, MIN_WEIGHT, DataError, Dropped, Source, Stage
from tfrs_pipeline.messages import in_percent, printable

LINES_REMEDY = (
    "Give CSV in UTF-8 with a header, the same number of fields and the same line ending in each "
    "line, and quotes that close; or Parquet."
)


class Rule(NamedTuple):
    """What is wrong with a value (the message puts the column first), and what to do.

    `setting` is the option of `Reading` that fixes it, if any; None is the one that names columns.
    A few such rows may be dropped if the rule `is_droppable`; others need a setting or a fix.
    """

    problem: str
    remedy: str = "Correct them, or name another column."
    setting: str | None = None
    is_droppable: bool = True

    def filled(self, **words: object) -> "Rule":
        """Fills in the blanks of the problem."""
        return self._replace(problem=self.problem.format(**words))


_ID, _TIME = "Give these rows an id.", "Give these rows a time, or omit the column if unknown."
_STAGES = f"Known: {', '.join(Stage)}."
_ONE_WAY = "Write all of them the same way, with an offset in all or in none."

NO_ID = Rule("is null", _ID)
RESERVED_ID = Rule("is {reserved!r} (reserved for empty slots)", _ID)
NOT_AN_ID = Rule("must be an integer or a string and is not")
ID_OF_LINES = Rule("runs over several lines", "Close the quotes before it.")
NO_TIME = Rule("is null", _TIME)
NOT_A_TIME = Rule(
    "must hold times and does not",
    "Write them like 2026-01-31 09:30:00, or as numbers since 1970; or name another column.",
)
TIME_OF_ANOTHER_KIND = Rule("must hold times written one way and does not", _ONE_WAY, "")
TIME_IN_ANOTHER_UNIT = Rule(
    "holds times in another unit among {unit}", "Write all of them in one unit.", "", False
)
TIME_OUTSIDE = Rule(
    "lies outside {first:%Y-%m-%d} to {end:%Y-%m-%d}",
    "Correct them, or set earliest_time.",
    "earliest_time",
)
NO_YEAR = Rule("has no year of 2 to 9998", "Correct them.", "")
NO_STAGE = Rule("is null", "Give these rows a stage.")
NO_TYPE = Rule("is null", "Give these rows a type of event.")
UNKNOWN_STAGE = Rule(
    "holds an unknown stage",
    f"{_STAGES} Set stage_values to the stage of each value; if they are types of events, name the "
    "column event, and set event_weights.",
    "stage_values",
    False,
)
NO_RATING = Rule("is null or NaN", "Rate these rows.")
NOT_AN_OUTCOME = Rule(
    "is in the label and no number",
    "Leave it null where the outcome does not hold. If it holds types of events, set event_weights "
    "(such as purchase=5 view=exposed) instead.",
    "label",
)
WEIGHT = Rule(
    f"is not a number from {MIN_WEIGHT:.0e} to {MAX_WEIGHT:.0e}",
    "Give these rows a weight (1 is neutral). A positive of weight 0 would train nothing: leave it "
    "out, give it a small weight or, with label, make it an exposed one.",
)
NOT_INT64 = Rule("must hold whole numbers and does not")
NOT_FLOAT32 = Rule(
    "must hold finite numbers that float32 can hold and does not",
    "Write them with a decimal point and no comma, or name another column.",
)


class Fault(NamedTuple):
    """A rule, and where a table breaks it: in a dropped row, or a value that becomes missing."""

    column: str
    is_bad: ir.BooleanValue
    rule: Rule
    is_missing: bool = False


def count_bad(table: ibis.Table, faults: Sequence[Fault]) -> list[int]:
    """Counts the bad rows by fault, in one pass.

    A dropped row counts only for its first fault; a value that becomes missing counts for each.
    """
    rows = table.mutate(**{f"_bad_{i}": f.is_bad.fill_null(False) for i, f in enumerate(faults)})
    sums, is_dropped = {}, ibis.literal(False)
    for i, fault in enumerate(faults):
        is_bad = rows[f"_bad_{i}"]
        sums[f"_num_{i}"] = (is_bad if fault.is_missing else is_bad & ~is_dropped).sum()
        if not fault.is_missing:
            is_dropped |= is_bad
    return [num or 0 for num in schema.totals(rows, **sums).values()] if sums else []


@dataclass(frozen=True)
class RawTable:
    """A table as it came: a DuckDB table with the log's names, and `_row`, its order from 0.

    `is_text` says whether columns are strings that may stand for other types (CSV). `dropped`
    counts lines that could not be read; `faults` are bad values, in the order in which columns were
    typed; `notes` are for a person; `texts` are id columns that `columns.py` cleaned; `renaming` is
    the option of `Reading` that names its columns.
    """

    table: ibis.Table
    source: Source
    num_rows: int
    is_text: bool
    dropped: list[Dropped]
    notes: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    texts: dict[str, tuple[ir.StringValue, bool]] = field(default_factory=dict)
    renaming: str = "columns"

    def drop(self) -> None:
        """Deletes the table from its database."""
        self.table.get_backend().drop_table(self.table.get_name())

    def wrong_type(self, column: str, wanted: str) -> DataError:
        """Makes the error for a column of the wrong type."""
        return DataError(
            f"{self.source.column(column)} must be {wanted}, it is {self.table.schema()[column]} "
            f"({self.num_rows} rows). Cast it, or name another column.",
            self.renaming,
        )

    def aggregate(self, **values: ir.Scalar) -> dict[str, Any]:
        """Computes aggregates over the rows, by name."""
        return schema.totals(self.table, **values)

    def has(self, condition: ir.BooleanValue) -> bool:
        """Returns whether a condition is true in any row."""
        return bool(condition.any().to_pyarrow().as_py())

    def fault(self, column: str, is_bad: ir.BooleanValue, rule: Rule) -> None:
        """Records in which rows a column breaks a rule."""
        if rule.setting is None:
            rule = rule._replace(setting=self.renaming)
        self.faults.append(Fault(column, is_bad, rule))

    def store_sound(self, columns: Mapping[str, ir.Value], max_bad_share: float) -> ibis.Table:
        """Stores typed columns of the sound rows; the others are `dropped`, by their first fault.

        Raises a `DataError` if more than `max_bad_share` of the rows, or of a column, is bad.
        """
        # Rules whose rows may not be dropped come first, so that a row counts for these.
        faults = sorted(self.faults, key=lambda fault: fault.rule.is_droppable)
        # Lines that could not be read are rows too: the limit is for all that is dropped.
        num_rows = self.num_rows + sum(entry.num_rows for entry in self.dropped)
        breaches: list[tuple[bool, int, Fault]] = []  # Those that drop rows.
        for fault, num in zip(faults, count_bad(self.table, faults), strict=True):
            if fault.is_missing and num > max_bad_share * self.num_rows:
                raise self._error(fault, max_bad_share)
            if fault.is_missing and num:
                where = self.source.column(fault.column)
                self.notes.append(f"{where} {fault.rule.problem} in {num:,} rows: taken as missing")
            elif num:
                column = printable(repr(self.source.columns.get(fault.column, fault.column)))
                self.dropped.append(Dropped(f"column {column} {fault.rule.problem}", num))
                breaches.append((not fault.rule.is_droppable, num, fault))
        is_too_much = sum(entry.num_rows for entry in self.dropped) > max_bad_share * num_rows
        rows = self.table
        if breaches:
            # The message names the fault that explains most rows.
            is_refused, _, worst = max(breaches, key=lambda breach: breach[:2])
            if is_too_much or is_refused:
                raise self._error(worst, max_bad_share)
            rows = rows.filter(*(~f.is_bad.fill_null(False) for f in faults if not f.is_missing))
        elif is_too_much:
            first = self.dropped[0]
            raise DataError(
                f"{self.source.name}: {first.reason} ({first.num_rows} of {num_rows} lines). "
                f"{LINES_REMEDY}",
                "max_bad_share",
            )
        return store(rows.select(**columns), self.source)

    def _error(self, fault: Fault, max_bad_share: float) -> DataError:
        """Makes the error: column, problem, number of rows, a few values, the first row, remedy."""
        rule, value, instead = fault.rule, self.table[fault.column], ""
        bad = self.table.filter(fault.is_bad)
        # Three short values show the kind of mistake; a bad file may hold values of any length.
        text = bad.select(text=value.cast("string").left(100)).distinct().limit(3).to_pyarrow()
        values = sorted(value for value in text["text"].to_pylist() if value is not None)
        shown = map(repr, values) if value.type().is_string() else values
        examples = f", such as {', '.join(map(printable, shown))}" if values else ""
        num_bad, first_row = schema.totals(bad, num=bad.count(), row=bad["_row"].min()).values()
        if max_bad_share and rule.is_droppable:
            becomes = "values are taken as missing" if fault.is_missing else "rows are dropped"
            instead = f" Up to max_bad_share ({max_bad_share:g}) of the {becomes} instead."
        return DataError(
            f"{self.source.column(fault.column)} {rule.problem} in {num_bad} of {self.num_rows} "
            f"rows{examples} (first: row {first_row + 1}). {rule.remedy}{instead}",
            rule.setting or "",
        )

    def note_missing(self, table: ibis.Table, columns: Iterable[str]) -> None:
        """Notes which columns of a typed table have missing values, and in how many rows."""
        nulls = {name: table[name].isnull().sum() for name in columns}
        counts = schema.totals(table, _rows=table.count(), **nulls)
        num_rows = counts.pop("_rows")
        for name, num in counts.items():
            if num:
                where, share = self.source.column(name), in_percent(num, num_rows)
                self.notes.append(f"{where} is missing in {num:,} of {num_rows:,} rows ({share})")


def store(expression: ibis.Table, source: Source) -> ibis.Table:
    """Stores an expression as a new table; raises a `DataError` if the engine refuses it."""
    try:
        connection, name = expression.get_backend(), ibis.util.gen_name("log")
        connection.con.execute(f'CREATE TABLE "{name}" AS {connection.compile(expression)}')
        return connection.table(name)
    except (duckdb.Error, TableNotFound) as error:
        check_stored(error)
        raise DataError(f"{source.name}: {str(error).strip()}") from error
