"""A log: what happened, to which items, for which users."""

import dataclasses
import shutil
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import ibis
import numpy as np
from ibis.backends.duckdb import Backend as DuckDB

from tfrs_pipeline.data import requests, schema
from tfrs_pipeline.data.contract import check_engine, check_entities, check_events
from tfrs_pipeline.data.engines import connect, open_parquet, replace, write_parquet
from tfrs_pipeline.data.ids import as_id_array
from tfrs_pipeline.data.requests import check_names, check_request_features
from tfrs_pipeline.data.schema import is_positive
from tfrs_pipeline.data.settings import Reading, SplitConfig
from tfrs_pipeline.data.split import Split, split_events
from tfrs_pipeline.data.tables import make_tables, settle_ties
from tfrs_pipeline.durable import part_files, read_record, refuse_others, write_record
from tfrs_pipeline.messages import Lines, counted
from tfrs_pipeline.settings import ConfigError

# Table -> the column that its rows are ordered by in a file.
_KEYS = {"events": "event_number", "items": "item_id", "users": "user_id"}
# With this many positives, a hundredth with more than this share of the weight is mentioned.
_MANY, _MUCH_WEIGHT = 200, 0.5


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
        item_features: Feature columns of `items` and their kinds: categorical or hashed (string or
            int64), multi_categorical (array<string>), numeric or bucketized (float64), text
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
            histories; else the smaller `event_number` counts as earlier ("random" has shuffled
            these numbers). See `Reading.ties`.
        reading: How the tables were read. The item table of a later refresh is read like that.
        part_of: The whole log, if a split made this one.
        later_items: item_id of the items whose first event in any part of the split is later than
            the last event of this part. None in a whole log, and without timestamps.
        items_read: When the tables began to be read. An export does not count earlier live writes
            of its items.

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
        check_names(self.request_features, self.user_features)
        check_request_features(self.events, self.request_features)

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
        began, connection = datetime.now(UTC), connection or connect()
        tables, found = make_tables(connection, path, items, users, features, reading)
        found |= {"is_ordered": reading.is_ordered, "reading": reading, "items_read": began}
        return cls(*tables, *features, **found)

    @classmethod
    def from_table(
        cls,
        events: Any,
        *,
        items: Any = None,
        users: Any = None,
        item_features: Mapping[str, str] | None = None,
        user_features: Mapping[str, str] | None = None,
        request_features: Mapping[str, str] | None = None,
        reading: Reading | None = None,
        connection: DuckDB | None = None,
    ) -> "Log":
        """Makes a log from tables in memory, or in another engine; see `from_files` for arguments.

        `events`, `items` and `users` are pandas DataFrames, pyarrow Tables, Ibis tables of any
        backend, or other Arrow-compatible tables. Their rows are copied (`from_ibis` does not). The
        row order becomes `event_number`: order an Ibis table first (`table.order_by("time")`),
        since engines keep no order.
        """
        if isinstance(events, str | Path):
            raise TypeError(f"A path is for Log.from_files. Received: {events!r}.")
        return cls.from_files(
            events,
            items=items,
            users=users,
            item_features=item_features,
            user_features=user_features,
            request_features=request_features,
            reading=reading,
            connection=connection,
        )

    @classmethod
    def from_ibis(
        cls,
        events: ibis.Table,
        *,
        items: ibis.Table | None = None,
        users: ibis.Table | None = None,
        item_features: Mapping[str, str] | None = None,
        user_features: Mapping[str, str] | None = None,
        request_features: Mapping[str, str] | None = None,
        is_ordered: bool = True,
        ties: schema.Ties = "auto",
    ) -> "Log":
        """Makes a log from tables in place: in DuckDB, or in Spark for more than one machine.

        Nothing is copied or cleaned: the engine checks that the tables hold what `Log` says, and
        later computes splits and samples. A missing item or user table is replaced by the ids;
        ids that only the events have are added with null features. Spark's timestamps are taken as
        UTC. A `DataError` names the table, column and rows that break this contract.
        """
        check_engine(events, items, users)
        features = schema.checked_kinds(item_features, user_features, request_features)
        events = check_events(events, schema.Source("event table"), features[2])
        items = check_entities(items, "item_id", events, features[0])
        users = check_entities(users, "user_id", events, features[1])
        events, rule, notes = settle_ties(events, ties)
        return cls(events, items, users, *features, notes=notes, is_ordered=is_ordered, ties=rule)

    @classmethod
    def read(cls, folder: Path | str, connection: Any = None, *, check_files: bool = True) -> "Log":
        """Opens a written log in an Ibis DuckDB (None opens one) or Spark, without loading it.

        A `DataError` if the folder holds no complete log, `Damaged` if a file has changed; without
        `check_files`, for a log that was written just now, its tables are not looked at.
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
        record.unlink(missing_ok=True)
        for name in _KEYS:
            replace(partial / f"{name}.parquet", folder / f"{name}.parquet")
        kept = ("item_features", "user_features", "request_features", "notes", "is_ordered", "ties")
        about = {name: getattr(self, name) for name in kept}
        about["dropped"] = [dataclasses.asdict(dropped) for dropped in self.dropped]
        about["reading"] = self.reading.as_json()
        about["items_read"] = self.items_read.isoformat()
        files = [file for name in _KEYS for file in part_files(folder / f"{name}.parquet")]
        write_record(record, about, files)
        shutil.rmtree(partial)

    @property
    def whole(self) -> "Log":
        """The log that this one is a part of, or itself."""
        return self if self.part_of is None else self.part_of

    def fingerprint(self) -> str:
        """Returns a text that depends on all rows; it differs by engine, not by process."""
        hashes = []
        for table in (self.events, self.items, self.users):
            row = ibis.struct({column: table[column] for column in sorted(table.columns)})
            # Spark has no aggregate xor; a sum of 31-bit hashes does not overflow there.
            hashes.append((row.hash() % 2**31).sum().to_pyarrow().as_py())
        return " ".join(f"{int(number or 0):x}" for number in hashes)

    @property
    def listed_ids(self) -> np.ndarray:
        """[n] int64, or object of str: the items of the item table, or all if there is none."""
        is_marked = schema.LISTED in self.items.columns
        items = self.items.filter(self.items[schema.LISTED]) if is_marked else self.items
        return as_id_array(items.order_by("item_id")["item_id"].to_pyarrow().to_pylist())

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
        target_share: float = 0.2,
        min_positives: int = 5,
        seed: int = 0,
    ) -> Split["Log"]:
        """Splits the log into training, validation and test, as `SplitConfig` says.

        Only `time` keeps other users' later clicks out of training. In a log without order, a
        user's "last" positives are drawn at random. A user's events of one item then stay in one
        part, so that a part can be a little larger or smaller than asked for, or empty for a user.
        A moment may be text, such as "2024-01-31T00:00:00Z". The seed draws held-out users and,
        without an order, positives. `train, validation, test = log.split()` raises a `DataError`
        if a part has no positive: with `validation=0`, use `split.train` and `split.test`.

        Raises a `DataError` if the log cannot be split in this way, and a `ConfigError` if a share
        or a number is out of range or contradicts the kind.
        """
        given: dict[str, Any] = {"validation": validation, "test": test}
        given |= {"target_share": target_share, "min_positives": min_positives}
        kind = kind or ("time" if self.order == "timestamp" else "last_share")
        try:
            config = SplitConfig(kind=kind, **given)
        except ConfigError as error:
            raise ConfigError([(f"split.{x}".rstrip("."), y) for x, y in error.problems]) from None
        events = split_events(self.events, config, seed=seed, is_ordered=self.order != "none")
        return Split(self, events, kind)

    def __repr__(self) -> str:
        # In Spark, counting may take minutes.
        backend = self.events.get_backend().name
        holds = _listed(self.counts()) if backend == "duckdb" else f"tables in {backend}"
        features = ", ".join({**self.item_features, **self.user_features})
        return f"Log({holds}; order {self.order}; features {features or 'none'})"

    def counts(self) -> dict[str, int]:
        """Counts the events, items and users."""
        return {name: schema.count_rows(getattr(self, name)) for name in _KEYS}

    def describe(self) -> Lines:
        """Describes what the log holds and what was dropped, in lines."""
        return Lines(_described(self))


def check_log(train: Any) -> None:
    """Refuses (`TypeError`) anything but a log to fit to, such as a DataFrame or a whole split."""
    if not isinstance(train, Log):
        raise TypeError(
            "fit takes a Log: make one with Log.from_table or Log.from_files, and split it. "
            f"Received: {type(train).__name__}"
        )


def _described(log: Log) -> Iterator[str]:
    counts = log.counts()
    yield _listed(counts)
    if log.order == "timestamp":
        yield from _describe_times(log.events)
    elif log.order == "event_number":
        yield "no timestamps: the row order is taken as the event order"
    if "weight" in log.events.columns:
        yield from _describe_weights(log.events)
    if log.part_of is not None:
        yield "a part of a log: the whole log's description says what was dropped"
        return
    num_dropped = sum(each.num_rows for each in log.dropped if not each.is_merged)
    num_read = counts["events"] + sum(each.num_rows for each in log.dropped)
    dropped = f"{num_dropped:,} of {counted(num_read, 'row')}" if num_dropped else "nothing"
    yield f"dropped {dropped}"
    for each in log.dropped:
        rows = counted(each.num_rows, "row")
        yield f"merged {rows} {each.reason}" if each.is_merged else f"dropped {rows}: {each.reason}"
    yield from log.notes
    source = schema.Source("event table", log.reading.columns)
    if log.order != "none":
        yield from requests.note_lost_histories(log.events, log.ties, source)
    yield from requests.note_leaks(log.events, log.request_features, source)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(counted(count, name[:-1]) for name, count in counts.items())


def _describe_times(events: ibis.Table) -> Iterator[str]:
    times = events["timestamp"]
    days = events.group_by(day=(times.epoch_seconds() / 86_400).floor().cast("int64"))
    of_days = days.agg(num=is_positive(events).sum(), first=times.min(), last=times.max())
    found = of_days.order_by("day").to_pyarrow()
    first, last = found["first"][0].as_py(), found["last"][-1].as_py()
    # A wrong unit shows here.
    yield f"from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC"
    of_day = dict(zip(found["day"].to_pylist(), found["num"].to_pylist(), strict=True))
    counts = [of_day.get(day, 0) for day in range(min(of_day), max(of_day) + 1)]
    if len(counts) >= 3:  # A broken day shows here.
        lowest = min(counts)
        when = date(1970, 1, 1) + timedelta(min(of_day) + counts.index(lowest))
        yield (
            f"positives a day: median {statistics.median_low(counts):,}, lowest {lowest:,} on "
            f"{when}, {counts[-1]:,} on the last day"
        )


def _describe_weights(events: ibis.Table) -> Iterator[str]:
    weight = events.filter(is_positive)["weight"]
    summary = {"least": weight.min(), "most": weight.max(), "high": weight.quantile(0.99)}
    least, most, high, num = schema.totals(weight.as_table(), **summary, n=weight.count()).values()
    if least == most:
        return
    yield (
        f"weights of positives from {least:g} to {most:g}: they weigh the loss; metrics and "
        "baselines count every positive once"
    )
    share = (weight.sum(where=weight > high) / weight.sum()).to_pyarrow().as_py()
    if num >= _MANY and share is not None and share > _MUCH_WEIGHT:
        yield (
            f"a hundredth of the positives, those above {high:g}, holds {share:.0%} of the weight: "
            "max_weight limits each"
        )
