"""A log in parts: the training events, and the queries of validation and test."""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

import ibis

from tfrs_pipeline.data.engines import open_parquet, replace, write_parquet
from tfrs_pipeline.data.holdout import EvaluationPart, Holdout, make_holdout
from tfrs_pipeline.data.schema import AskedBy, DataError, SplitKind
from tfrs_pipeline.data.split import COLUMN_PARTS, PARTS, is_positive
from tfrs_pipeline.durable import part_files, read_record, write_record
from tfrs_pipeline.messages import Lines, counted

_MUCH = 0.02  # A part's share that differs by more from what was asked for is mentioned.
LogT = TypeVar("LogT", bound=Any)  # `Log`, whose module imports this one.


@dataclass(frozen=True, eq=False)
class Split(Generic[LogT]):
    """A log in parts; unpacks as train, validation, test.

    `events` are those of `log` without the dropped ones, with a column `part`: "train",
    "validation", "test" or "fold_in", which is the history of held-out users.
    """

    log: LogT
    events: ibis.Table
    kind: SplitKind

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(3))

    def __getitem__(self, place: int) -> Any:
        return getattr(self, ("train", "validation", "test")[place])

    @functools.cached_property
    def train(self) -> LogT:
        """The training events, with the items and users of the whole log."""
        return self._part("train")

    @functools.cached_property
    def before_test(self) -> LogT:
        """All events that may train a model for the test; never those of held-out users."""
        return self.train if self.kind == "held_out_users" else self._part("train", "validation")

    @functools.cached_property
    def validation(self) -> Holdout:
        """The queries of the validation part; see `holdout`."""
        return self.holdout("validation")

    @functools.cached_property
    def test(self) -> Holdout:
        """The queries of the test part, for models trained on `before_test`; see `holdout`."""
        return self.holdout("test")

    def holdout(
        self,
        part: EvaluationPart,
        max_queries: int | None = None,
        seed: int = 0,
        *,
        by: AskedBy = "users",
        trained_on: LogT | None = None,
    ) -> Holdout:
        """Makes the queries of a part: all, or at most `max_queries`, of users drawn at random.

        By "users", each user with a positive in the part has one query for all of these positives,
        with the history before the part. By "requests", each request with a positive in the part
        (without a request_id, each positive) has a query for its positives, with the history up to
        it, as in service; "first_request" and "last_request" take the request of each user's first
        or last positive in the part alone. Rankings exclude what came before the query.

        `trained_on` is the log with the training positives, which define head, torso and tail, and
        which items are new. None is all that may train a model for the part: `train` for
        validation, `before_test` for the test. Raises a `DataError` without a positive, and by
        requests in a log without an order.
        """
        if by != "users" and self.log.order == "none":
            raise DataError(
                "Queries by requests need an order: the log does not say what came before a "
                "request. Use by='users', or give the log timestamps or an order."
            )
        if trained_on is None:
            trained_on = self.train if part == "validation" else self.before_test
        return make_holdout(self.log, self.events, part, trained_on, by, max_queries, seed)

    def report(self) -> dict[str, Any]:
        """Counts events, positives and users (with positives) by part, and what was dropped."""
        events, is_clicked = self.events, is_positive(self.events)
        counts = events.group_by("part").agg(
            num_events=events.count(),
            num_positives=is_clicked.sum(),
            num_users=events["user_id"].nunique(where=is_clicked),
        )
        rows = {row.pop("part"): row for row in counts.to_pyarrow().to_pylist()}
        report: dict[str, Any] = {part: rows[part] for part in PARTS if part in rows}
        before, after = (
            table.aggregate(users=table["user_id"].nunique(), events=table.count()).to_pyarrow()
            for table in (self.log.events, events)
        )
        for name in ("users", "events"):
            report[f"num_{name}_dropped"] = before[name][0].as_py() - after[name][0].as_py()
        return report

    def describe(self, asked: tuple[Any, Any] | None = None) -> Lines:
        """Describes the parts and what was dropped, in lines for a person.

        `asked` are the shares of validation and test that were asked for. By time, the parts may
        have other shares of the positives; a line says so if they do.
        """
        counts = self.report()
        notes = [f"by {self.kind}"]
        for part in PARTS:
            if part in counts:
                row = counts[part]
                notes.append(
                    f"{part}: {counted(row['num_positives'], 'positive')} of "
                    f"{counted(row['num_users'], 'user')}, {counted(row['num_events'], 'event')}"
                )
        if asked is not None and self.kind == "time" and not isinstance(asked[1], datetime):
            nums = [counts.get(x, {"num_positives": 0})["num_positives"] for x in COLUMN_PARTS]
            shares = [x / sum(nums) for x in nums], (1 - sum(asked), *asked)
            if max(abs(a - b) for a, b in zip(*shares, strict=True)) > _MUCH:
                found, meant = (" / ".join(f"{x:.0%}" for x in each) for each in shares)
                notes.append(
                    f"{found} of the positives, not {meant}: those of one moment stay in one part"
                )
        if counts["num_events_dropped"]:
            why = "without a part" if self.kind == "column" else "of users with too few positives"
            notes.append(
                f"dropped {counted(counts['num_events_dropped'], 'event')} {why} "
                f"({counted(counts['num_users_dropped'], 'user')})"
            )
        return Lines(notes)

    def write(self, path: Path) -> None:
        """Writes the events with their parts as Parquet, then a record beside it, as JSON."""
        partial = path.with_name(f"{path.name}.partial")
        write_parquet(self.events, partial)  # The events may come from the file to be replaced.
        path.with_suffix(".json").unlink(missing_ok=True)
        replace(partial, path)
        write_record(path.with_suffix(".json"), {"kind": self.kind}, part_files(path))

    @classmethod
    def read(cls, log: LogT, path: Path) -> "Split[LogT]":
        """Opens a written split of this log without loading it."""
        kind = read_record(path.with_suffix(".json"), check_files=False)["kind"]
        return cls(log, open_parquet(log.events.get_backend(), path), kind)

    def _part(self, *parts: str) -> LogT:
        events = self.events.filter(self.events["part"].isin(parts)).drop("part")
        later = None
        if "timestamp" in events.columns:
            last = events["timestamp"].max().as_scalar()
            items = self.events.group_by("item_id").agg(first=self.events["timestamp"].min())
            later = items.filter(items["first"] > last).select("item_id")
            if self.log.later_items is not None:
                later = later.union(self.log.later_items, distinct=True)
        # Dropped rows and notes belong to the whole log.
        told: dict[str, Any] = {"dropped": (), "notes": (), "part_of": self.log.whole}
        return dataclasses.replace(self.log, events=events, later_items=later, **told)
