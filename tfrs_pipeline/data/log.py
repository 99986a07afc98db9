"""A log: what happened, to which items, for which users."""

import dataclasses
import functools
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import ibis
import numpy as np
from ibis.backends.duckdb import Backend as DuckDB

from tfrs_pipeline.data import request_features, schema
from tfrs_pipeline.data.engines import connect, open_parquet, write_parquet
from tfrs_pipeline.data.held_out_queries import EvaluationPart, Holdout, make_holdout
from tfrs_pipeline.data.histories import note_lost_histories
from tfrs_pipeline.data.ids import as_id_array
from tfrs_pipeline.data.schema import is_positive
from tfrs_pipeline.data.settings import Reading, SplitConfig
from tfrs_pipeline.data.split import PARTS, split_events
from tfrs_pipeline.data.tables import make_tables
from tfrs_pipeline.durable import read_record, refuse_others, replacing, write_record
from tfrs_pipeline.messages import Lines, counted, in_percent

# Table -> the column that its rows are ordered by in a file.
_KEYS = {"events": "event_number", "items": "item_id", "users": "user_id"}
# A user with more than this share of the positives, and this many times the mean of all users, may
# be an id that many people share.
_MUCH_OF_ONE, _TIMES_THE_MEAN = 0.05, 100
_NUMBERED = (
    "It is a distinct int64 for each event, in their order: number the events once, such as by "
    "row_number() OVER (ORDER BY timestamp), and store it."
)
# Column that an event table of `Log.from_ibis` must have -> what to do without it.
_REQUIRED = {
    "event_number": _NUMBERED,
    "stage": f"It is one of {', '.join(schema.Stage)}; in a log of clicks alone, always 'clicked'.",
}


class LogOptions(TypedDict, total=False):
    """The keyword arguments of `Log.from_files`, which explains them."""

    items: Any
    users: Any
    item_features: Mapping[str, str] | None
    user_features: Mapping[str, str] | None
    request_features: Mapping[str, str] | None
    reading: Reading | None
    connection: DuckDB | None


@dataclass(frozen=True, eq=False)
class Log:
    """Events, and the items and users that they are about.

    Item and user features are static: every event sees the same value, however early it is. A
    column made after the events (an item's total clicks, a user's latest country) leaks the future
    into the model, so that it evaluates better than it serves.

    Use a log, and the parts of its split, in one thread: one connection reads them.

    Args:
        events: `user_id` and `item_id` (int64 or string), `event_number` (int64, unique: the order
            in the source), `stage` (a `Stage`); optional `timestamp` (UTC), `request_id`, `rank`,
            `score`, `weight`, `part` (the log's own split) and context columns. The rows are
            unordered. Events of one user and `request_id` share the first one's moment: in an
            ordered log, none of them is in another's history.
        items: One row per id: `item_id` and feature columns, for every item of `events`. The column
            `title`, if any, is shown to people. `_listed`, if any, is True for items of the item
            table and False for those added from the events.
        users: One row per id: `user_id` and feature columns, for every user of `events`.
        item_features: Feature columns of `items` and their kinds: categorical (string or int64),
            multi_categorical (array<string>), numeric or bucketized (float64), text
            (string), timestamp (UTC), vector (array<float32>, of one length). Nulls are missing
            values.
        user_features: The same for `users`.
        request_features: Columns of `events` that are known when a request comes (device, place,
            search text), and their kinds. `hour` and `weekday` are made from the timestamp, in UTC,
            if there are no such columns. Never give what is known only later, such as a watch time:
            training would see it, but no request can bring it.
        dropped: Events that were dropped when the log was made, and why.
        notes: Other findings from then, in lines for a person.
        is_ordered: In a log without timestamps, whether `event_number` is the order in time.
        ties: With timestamps, "drop" if a user's events at the same time are not in each other's
            histories; else the smaller `event_number` counts as earlier. See `Reading.ties`.
        reading: How the tables were read. The item table of a later refresh is read like that.
        part_of: The whole log, if a split made this one.
        later_items: item_id of the items whose first event in any part of the split is later than
            the last event of this part. None in a whole log, and without timestamps.
        items_read: When the reading of the tables began. In an export, earlier live writes of an
            item in them do not count.

    Example:
        >>> import pyarrow as pa
        >>> clicks = pa.table({"user": [1, 1, 2], "item_id": ["a", "b", "a"]})
        >>> log = Log.from_table(clicks, reading=Reading(columns={"user_id": "user"}))
        >>> log.describe()
        3 events, 2 items, 2 users
        no timestamps: the row order is taken as the event order
        dropped nothing
        event table: without stage, rating or label, every row is a click
    """

    events: ibis.Table
    items: ibis.Table
    users: ibis.Table
    item_features: Mapping[str, str] = field(default_factory=dict)
    user_features: Mapping[str, str] = field(default_factory=dict)
    request_features: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[schema.Dropped, ...] = ()
    notes: tuple[str, ...] = ()
    is_ordered: bool = True
    ties: schema.TieRule = "drop"
    reading: Reading = field(default_factory=Reading)
    part_of: "Log | None" = None
    later_items: ibis.Table | None = None
    items_read: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        request_features.check_names(self.request_features, self.user_features)
        request_features.check_request_features(self.events, self.request_features)

    @classmethod
    def from_files(
        cls,
        path: Path | str,
        *,
        items: Any = None,
        users: Any = None,
        item_features: Mapping[str, str] | None = None,
        user_features: Mapping[str, str] | None = None,
        request_features: Mapping[str, str] | None = None,
        reading: Reading | None = None,
        connection: DuckDB | None = None,
    ) -> "Log":
        """Makes a log from CSV or Parquet.

        Args:
            path: Events: CSV (with a header) or Parquet, a file or a folder of files, read in the
                order of their names. The row order becomes `event_number`. Integer ids stay
                integers; ids in CSV are integers if all are written as integers. "7.0" is 7, white
                space around ids is stripped, and "nan", "None" and the like are missing ids.
            items: Item table, one row per id: files, or a table as in `from_table`. None makes one
                with the ids only. A column `title` is kept, whether it is a feature or not.
            users: The same for users. Users that the table lacks are added.
            item_features: Feature column -> kind (see `Log`).
            user_features: Feature column -> kind.
            request_features: Column of the events, known when the request comes -> kind.
            reading: The names and meanings of columns, and what happens to bad rows.
            connection: Ibis DuckDB connection that stores the tables. None opens one in the
                system's temporary folder, so that the tables need not fit in memory.

        Raises:
            DataError: If the tables break the contract; it names file, column, rows and remedy.
            StorageError: If the tables cannot be stored, such as on a full disk.
            ValueError: If a feature has an unknown kind, or a column has a reserved name.
        """
        features = schema.checked_kinds(item_features, user_features, request_features)
        reading = reading or Reading()
        # Taken before the reading: a live write during it is later than these tables.
        began, connection = datetime.now(UTC), connection or connect()
        tables, about = make_tables(connection, path, items, users, features, reading)
        about |= {"is_ordered": reading.is_ordered, "reading": reading, "items_read": began}
        return cls(*tables, *features, **about)

    @classmethod
    def from_table(cls, events: Any, **options: Unpack[LogOptions]) -> "Log":
        """Makes a log from tables in memory, or in another engine; see `from_files` for arguments.

        `events`, `items` and `users` are pandas DataFrames, pyarrow Tables, Ibis tables of any
        backend, or other Arrow-compatible tables. Their rows are copied. The row
        order becomes `event_number`: order an Ibis table first (`table.order_by("time")`),
        since engines keep no order.
        """
        return cls.from_files(events, **options)

    @classmethod
    def from_ibis(
        cls,
        events: ibis.Table,
        *,
        is_ordered: bool = True,
        ties: schema.Ties = "auto",
        **options: Unpack[LogOptions],
    ) -> "Log":
        """Makes a log from tables of Ibis that are a log already, such as those of Spark.

        The events have what `Log` says, and any other column is context. `event_number` gives their
        order, because engines keep none: number the events once, and store the number. Arrow brings
        the rows into DuckDB, as in `from_table`, but no row is dropped: a `DataError` names the
        table, the column and the rows that a log cannot hold. Spark's timestamps are taken as UTC.
        """
        for name in ("items", "users"):
            options[name] = _in_utc(options.get(name))
        events, items = _in_utc(events), options["items"]
        schema.require_all(events.columns, _REQUIRED, schema.Source("event table"))
        num_rows, number = schema.count_rows(events), events["event_number"]
        if num_rows != (num_distinct := number.nunique().to_pyarrow().as_py()):
            raise schema.DataError(
                f"event table: column 'event_number' holds {num_distinct} different numbers in "
                f"{num_rows} rows. {_NUMBERED}"
            )
        if items is not None and schema.LISTED in items.columns:  # The items of another log.
            options["items"] = items.filter(items[schema.LISTED])
        columns = {name: name for name in events.columns if name != "event_number"}
        # A log has no bad rows: the first one is an error.
        options["reading"] = Reading(
            columns=columns, is_ordered=is_ordered, ties=ties, max_bad_share=0
        )
        return cls.from_files(events.order_by("event_number").drop("event_number"), **options)

    @classmethod
    def read(
        cls, folder: Path | str, connection: DuckDB | None = None, *, check_files: bool = True
    ) -> "Log":
        """Opens a written log in an Ibis DuckDB (None opens one), without loading it.

        Raises a `DataError` if the folder holds no complete log, and `Damaged` if a file has
        changed. Without `check_files` that is not checked: right for a log that was just written.
        """
        folder = Path(folder)
        if not (folder / "log.json").exists():
            raise schema.DataError(
                f"{folder} has no log.json: writing the log did not finish there. Write it again."
            )
        about = read_record(folder / "log.json", check_files=check_files)
        about["dropped"] = tuple(schema.Dropped(**dropped) for dropped in about["dropped"])
        about["notes"] = tuple(about["notes"])
        about["reading"] = Reading(**about["reading"])
        about["items_read"] = datetime.fromisoformat(about["items_read"])
        connection = connection or connect()
        tables = {name: open_parquet(connection, folder / f"{name}.parquet") for name in _KEYS}
        return cls(**tables, **about)

    def write(self, folder: Path | str) -> None:
        """Writes `events.parquet`, `items.parquet`, `users.parquet` and `log.json`.

        `log.json` comes last: a folder with it is complete. A part of a log becomes a separate log.
        An existing log is replaced once all tables are written, even by one made from it. Logs and
        splits that were read from the folder would then read the new files: call `read` again.
        `Damaged` if the folder's log has changed; a `ValueError` if its files are not a log's.
        """
        folder = Path(folder)
        record, partial = folder / "log.json", folder / "log.partial"
        if record.exists():
            read_record(record)
        else:
            refuse_others([folder / f"{name}.parquet" for name in _KEYS], partial)
        partial.mkdir(parents=True, exist_ok=True)
        for name, key in _KEYS.items():
            write_parquet(getattr(self, name).order_by(key), partial / f"{name}.parquet")
        # From here on the folder is incomplete until the new record is written.
        record.unlink(missing_ok=True)
        for name in _KEYS:
            os.replace(partial / f"{name}.parquet", folder / f"{name}.parquet")
        kept = ("item_features", "user_features", "request_features", "notes", "is_ordered", "ties")
        about = {name: getattr(self, name) for name in kept}
        about["dropped"] = [dataclasses.asdict(dropped) for dropped in self.dropped]
        about["reading"] = self.reading.as_json()
        about["items_read"] = self.items_read.isoformat()
        write_record(record, about, [folder / f"{name}.parquet" for name in _KEYS])
        shutil.rmtree(partial)

    @property
    def whole(self) -> "Log":
        """The log that this one is a part of, or itself."""
        return self if self.part_of is None else self.part_of

    def fingerprint(self) -> str:
        """Returns a text that depends on all rows."""
        hashes = []
        for table in (self.events, self.items, self.users):
            # By name, because a file may give the columns back in another order.
            row = ibis.struct({column: table[column] for column in sorted(table.columns)})
            # A sum does not depend on the order of the rows; 31-bit hashes do not overflow it.
            hashes.append((row.hash() % 2**31).sum().to_pyarrow().as_py())
        return " ".join(f"{int(number or 0):x}" for number in hashes)

    @property
    def listed_ids(self) -> np.ndarray:
        """[n] int64, or object of str: the items of the item table, or all if there is none."""
        is_marked = schema.LISTED in self.items.columns
        items = self.items.filter(self.items[schema.LISTED]) if is_marked else self.items
        return as_id_array(items.order_by("item_id")["item_id"].to_pyarrow().to_pylist())

    @functools.cached_property
    def disliked(self) -> ibis.Table | None:
        """`user_id` and `item_id` of what users disliked, each pair once; None if there is none."""
        if self.part_of is not None and self.part_of.disliked is None:
            return None
        pairs = schema.disliked_pairs(self.events)
        return pairs if schema.count_rows(pairs.limit(1)) else None

    def positives(self, events: ibis.Table | None = None) -> ibis.Table:
        """The clicks, of the log or among some of its events, that train a model.

        Left out are those on items that their user dislikes in this log, before or after the click.
        A part of a split knows the dislikes of that part alone, never a later one.
        """
        clicks = (self.events if events is None else events).filter(is_positive)
        return schema.without_disliked(clicks, self.disliked)

    @property
    def order(self) -> Literal["timestamp", "event_number", "none"]:
        """The column that orders events in time, if any does."""
        if "timestamp" in self.events.columns:
            return "timestamp"
        return "event_number" if self.is_ordered else "none"

    def split(
        self,
        kind: schema.SplitKind | None = None,
        *,
        validation: float | datetime | str | None = None,
        test: float | datetime | str | None = None,
        min_positives: int = 5,
        seed: int = 0,
    ) -> "Split":
        """Splits the log into training, validation and test, as `SplitConfig` says.

        Only `time` keeps other users' later clicks out of training. In a log without order, a
        user's "last" positives are drawn at random. A user's events of one item then stay in one
        part, so that a part can be a little larger or smaller than asked for, or empty for a user.
        A moment may be text, such as "2024-01-31T00:00:00Z". The seed draws these positives.
        `train, validation, test = log.split()` raises a `DataError` if a part has no positive: with
        `validation=0`, use `split.train` and `split.test`.

        Raises a `DataError` if the log cannot be split in this way, and a `ConfigError` if a share
        or a number is out of range or contradicts the kind.
        """
        amounts: dict[str, Any] = {"validation": validation, "test": test}
        # By time wherever it is known: no other split keeps the future out of training.
        kind = kind or ("time" if self.order == "timestamp" else "last_share")
        config = SplitConfig(kind=kind, **amounts, min_positives=min_positives)
        events = split_events(self.events, config, seed=seed, is_ordered=self.order != "none")
        return Split(self, events, kind)

    def __repr__(self) -> str:
        features = ", ".join({**self.item_features, **self.user_features})
        return f"Log({_listed(self.counts())}; order {self.order}; features {features or 'none'})"

    def counts(self) -> dict[str, int]:
        """Counts the events, items and users."""
        return {name: schema.count_rows(getattr(self, name)) for name in _KEYS}

    def describe(self) -> Lines:
        """Describes what the log holds and what was dropped, in lines."""
        return Lines(_described(self))


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """A log in parts; unpacks as the tuple (train, validation, test).

    `events` are those of `log` without the dropped ones, with the column `part`: "train",
    "validation", "test" or "fold_in" (see `SplitConfig`).
    """

    log: Log
    events: ibis.Table
    kind: schema.SplitKind

    def __repr__(self) -> str:
        return f"Split(by {self.kind}, of {self.log!r})"

    def __iter__(self) -> Iterator[Any]:
        # One at a time: a part without a positive is an error only where it is asked for.
        for name in ("train", "validation", "test"):
            yield getattr(self, name)

    @functools.cached_property
    def train(self) -> Log:
        """The training events, with the items and users of the whole log."""
        return self._part("train")

    @functools.cached_property
    def before_test(self) -> Log:
        """All events that may train a model for the test."""
        return self._part("train", "validation")

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
        by: schema.AskedBy = "users",
        trained_on: Log | None = None,
    ) -> Holdout:
        """Makes the queries of a part: all, or at most `max_queries`, of users drawn at random.

        By "users", each user with a positive in the part has one query for all of these positives,
        with the history before the part. By "requests", each request with a positive in the part
        (without a request_id, each positive) has a query for its positives, with the history up to
        it, as in service. Rankings exclude what came before the query. A click on an item that its
        user dislikes, in the part or an earlier one, is nothing to find.

        `trained_on` is the log with the training positives, which define head, torso and tail, and
        which items are new. None is all that may train a model for the part: `train` for
        validation, `before_test` for the test. Raises a `DataError` if there is no positive, or
        if queries by request are asked of a log without an order.
        """
        if by != "users" and self.log.order == "none":
            raise schema.DataError(
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
            schema.totals(table, users=table["user_id"].nunique(), events=table.count())
            for table in (self.log.events, events)
        )
        return report | {f"num_{name}_dropped": num - after[name] for name, num in before.items()}

    def describe(self) -> Lines:
        """Describes the parts and what was dropped, in lines for a person."""
        counts = self.report()
        notes = [f"by {self.kind}"]
        for part in PARTS:
            if part in counts:
                row = counts[part]
                notes.append(
                    f"{part}: {counted(row['num_positives'], 'positive')} of "
                    f"{counted(row['num_users'], 'user')}, {counted(row['num_events'], 'event')}"
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
        record = path.with_suffix(".json")
        with replacing(path) as partial:  # The events may come from the file to be replaced.
            write_parquet(self.events, partial)
            record.unlink(missing_ok=True)
        write_record(record, {"kind": self.kind}, [path])

    @classmethod
    def read(cls, log: Log, path: Path) -> "Split":
        """Opens a written split of this log without loading it."""
        kind = read_record(path.with_suffix(".json"), check_files=False)["kind"]
        return cls(log, open_parquet(log.events.get_backend(), path), kind)

    def _part(self, *parts: str) -> Log:
        events = self.events.filter(self.events["part"].isin(parts)).drop("part")
        later = None
        if "timestamp" in events.columns:
            # As of the part's end these items did not exist, so they are no one's negatives.
            last = events["timestamp"].max().as_scalar()
            items = self.events.group_by("item_id").agg(first=self.events["timestamp"].min())
            later = items.filter(items["first"] > last).select("item_id")
            if self.log.later_items is not None:
                later = later.union(self.log.later_items, distinct=True)
        # Dropped rows and notes belong to the whole log.
        whole_fields: dict[str, Any] = {"dropped": (), "notes": (), "part_of": self.log.whole}
        return dataclasses.replace(self.log, events=events, later_items=later, **whole_fields)


def check_log(train: Any) -> None:
    """Refuses (`TypeError`) anything but a log to fit to, such as a DataFrame or a whole split."""
    if not isinstance(train, Log):
        raise TypeError(
            "fit takes a Log: make one with Log.from_table or Log.from_files, and split it. "
            f"Received: {type(train).__name__}"
        )


def _in_utc(table: Any) -> ibis.Table | None:
    """Marks the times of Spark, which are in UTC; a `TypeError` for a table that is not Ibis'."""
    if table is None:
        return None
    if not isinstance(table, ibis.Table):
        raise TypeError(
            "Log.from_ibis takes tables of Ibis; Log.from_table any others. Received: "
            f"{type(table).__name__}"
        )
    if table.get_backend().name != "pyspark":
        return table
    times = [name for name, dtype in table.schema().items() if dtype.is_timestamp()]
    return table.cast(dict.fromkeys(times, "timestamp('UTC', 6)"))


def _described(log: Log) -> Iterator[str]:
    counts = log.counts()
    yield _listed(counts)
    if log.order == "timestamp":
        yield from _describe_times(log.events)
    elif log.order == "event_number":
        yield "no timestamps: the row order is taken as the event order"
    if log.disliked is not None:
        clicks, positives = log.events.filter(is_positive), log.positives()
        num_lost = schema.count_rows(clicks) - schema.count_rows(positives)
        lost = f"; the positives lack {counted(num_lost, 'click')} on them" if num_lost else ""
        yield (
            f"{counted(schema.count_rows(log.disliked), 'pair')} of a user and an item that the "
            f"user disliked: never shown to them{lost}"
        )
    if log.part_of is not None:
        yield "a part of a log: the whole log's description says what was dropped"
        return
    # Merged rows are not dropped: one event stands for all of them.
    num_dropped = sum(entry.num_rows for entry in log.dropped if not entry.is_merged)
    num_read = counts["events"] + sum(entry.num_rows for entry in log.dropped)
    dropped = f"{num_dropped:,} of {counted(num_read, 'row')}" if num_dropped else "nothing"
    yield f"dropped {dropped}"
    for entry in log.dropped:
        rows = counted(entry.num_rows, "row")
        merged, dropped = f"merged {rows} {entry.reason}", f"dropped {rows}: {entry.reason}"
        yield merged if entry.is_merged else dropped
    yield from log.notes
    yield from _note_shared_id(log.positives())
    source = schema.Source("event table", log.reading.columns)
    if log.order != "none":
        yield from note_lost_histories(log.events, log.ties, source)
    yield from request_features.note_leaks(log.events, log.request_features, source)


def _note_shared_id(positives: ibis.Table) -> Iterator[str]:
    """Notes a user who has many of the positives, as an id that all guests share does."""
    by_user = positives.group_by("user_id").agg(num=ibis._.count())
    totals = schema.totals(by_user, users=by_user.count(), num=by_user["num"].sum())
    num = totals["num"] or 0
    for user in by_user.order_by(ibis.desc("num"), "user_id").limit(1).to_pyarrow().to_pylist():
        share = user["num"] / num
        if share > _MUCH_OF_ONE and share * totals["users"] > _TIMES_THE_MEAN:
            yield (
                f"warning: user {user['user_id']!r:.80} has {in_percent(user['num'], num)} of the "
                "positives: if that id stands for many people, such as guests, leave its rows out, "
                "or give each visit an id of its own"
            )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(counted(count, name[:-1]) for name, count in counts.items())


def _describe_times(events: ibis.Table) -> Iterator[str]:
    times = events["timestamp"]
    days = events.group_by(day=(times.epoch_seconds() / 86_400).floor().cast("int64"))
    by_day = days.agg(num=is_positive(events).sum(), first=times.min(), last=times.max())
    rows = by_day.order_by("day").to_pyarrow()
    first, last = rows["first"][0].as_py(), rows["last"][-1].as_py()
    # Shown first, because a wrong time zone or unit is seen at once here.
    yield f"from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC"
    num_by_day = dict(zip(rows["day"].to_pylist(), rows["num"].to_pylist(), strict=True))
    counts = [num_by_day.get(day, 0) for day in range(min(num_by_day), max(num_by_day) + 1)]
    # A day on which logging failed shows as the lowest. Of one or two days, neither says anything.
    if len(counts) >= 3:
        lowest = min(counts)
        when = date(1970, 1, 1) + timedelta(min(num_by_day) + counts.index(lowest))
        yield (
            f"positives a day: median {statistics.median_low(counts):,}, lowest {lowest:,} on "
            f"{when}, {counts[-1]:,} on the last day"
        )
