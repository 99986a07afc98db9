"""A table as it came, the faults found in its rows, and how the sound ones are stored."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import duckdb
import ibis
import ibis.expr.types as ir
from ibis.common.exceptions import TableNotFound

from tfrs_pipeline.data import schema
from tfrs_pipeline.data.engines import check_stored
from tfrs_pipeline.data.rules import LINES_REMEDY, Rule
from tfrs_pipeline.data.schema import DataError, Dropped, Source
from tfrs_pipeline.messages import in_percent, printable


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
    typed; `notes` are for a person; `texts` are id columns that `values.py` cleaned; `renaming` is
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
