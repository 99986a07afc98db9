"""A log: what happened, to which items, for which users."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import ibis
import numpy as np
from ibis.backends.duckdb import Backend as DuckDB

from tfrs_pipeline.data.contract import check_engine, check_entities, check_events
from tfrs_pipeline.data.describe import describe, listed
from tfrs_pipeline.data.engines import connect, open_parquet, replace, write_parquet
from tfrs_pipeline.data.ids import as_id_array
from tfrs_pipeline.data.parts import Split
from tfrs_pipeline.data.reading import Reading
from tfrs_pipeline.data.requests import check_names, check_request_features
from tfrs_pipeline.data.schema import (
    LISTED,
    DataError,
    Dropped,
    Source,
    SplitKind,
    checked_kinds,
    count_rows,
)
from tfrs_pipeline.data.settings import SplitConfig
from tfrs_pipeline.data.split import split_events
from tfrs_pipeline.data.tables import make_tables
from tfrs_pipeline.durable import part_files, read_record, refuse_others, write_record
from tfrs_pipeline.settings import ConfigError


@dataclass(frozen=True, eq=False)
class Log:
    """What happened: events, and the items and users that they are about.

    Item and user features are static: every event sees the same value, however early it is. A
    column that was made after the events (an item's total clicks, a user's latest country) tells a
    model about the future, and its evaluation comes out better than its service. Give features that
    were known before the first event, or that do not change.

    Use a log, and the parts of its split, in one thread: one connection reads them.

    Args:
        events: `user_id` and `item_id` (int64 or string), `event_number` (int64, unique: the order
            in the source), `stage` (a `Stage`); optional `timestamp` (UTC), `request_id`, `rank`,
            `score`, `weight`, `part` (the log's own split) and context columns. The rows are
            unordered. Events of one user and `request_id` share the moment of the first: in a log
            with an order no history shows one of them to another.
        items: One row an id: `item_id` and feature columns, with every item of `events`. The column
            `title`, if any, is shown to people; `_listed`, if any, marks the items of the item
            table, as opposed to those added from the events.
        users: One row an id: `user_id` and feature columns, with every user of `events`.
        item_features: Feature columns of `items` and their kinds: categorical or hashed (string or
            int64), multi_categorical (array<string>), numeric or bucketized (float64), text
            (string), timestamp (UTC), vector (array<float32>, of one length). Nulls are missing
            values.
        user_features: The same for `users`.
        request_features: Columns of `events` that are known when a request comes (device, place,
            search text), and their kinds. `hour` and `weekday` are made from the timestamp, in UTC,
            if there are no such columns. Never give what is known later, such as a watch time:
            training would see it, and no request can bring it.
        dropped: Events that were dropped when the log was made, and why.
        notes: What else was found then, in lines for a person: events of unknown items, repeated
            ones, missing features.
        is_ordered: Whether `event_number` is an order in time, in a log without timestamps.
        reading: How the tables were read. A table that replaces the items in an export is read in
            the same way.
        part_of: The whole log, if a split made this one.
        later_items: item_id of the items whose first event in any part of the split is later than
            the last event of this part. None in a whole log, and without timestamps, where new and
            rare items look the same.

    Example:
        >>> import pyarrow as pa
        >>> clicks = pa.table({"user": [1, 1, 2], "item_id": ["a", "b", "a"]})
        >>> log = Log.from_table(clicks, reading=Reading(columns={"user_id": "user"}))
        >>> for line in log.describe():
        ...     print(line)
        3 events, 2 items, 2 users
        no timestamps: the order of the rows is taken for that of the events
        dropped nothing
        event table: without stage, rating or label, every row is a click
    """

    events: ibis.Table
    items: ibis.Table
    users: ibis.Table
    item_features: Mapping[str, str] = field(default_factory=dict)
    user_features: Mapping[str, str] = field(default_factory=dict)
    request_features: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[Dropped, ...] = ()
    notes: tuple[str, ...] = ()
    is_ordered: bool = True
    reading: Reading = field(default_factory=Reading)
    part_of: Log | None = None
    later_items: ibis.Table | None = None

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
    ) -> Log:
        """Makes a log of CSV or Parquet.

        Args:
            path: Events: CSV (with a header) or Parquet, a file or a folder of them, read in the
                order of their names. The order of the rows becomes `event_number`. Integer ids stay
                integers; ids in CSV are integers if all are written as such. "7.0" is 7, white
                space around ids is stripped, and "nan", "None" and the like are no ids.
            items: Item table, one row an id: files, or a table as in `from_table`. None makes one
                of the ids alone. A column `title` is kept, feature or not.
            users: The same for users. Users that the table lacks are added.
            item_features: Feature column -> kind (see `Log`).
            user_features: Feature column -> kind.
            request_features: Column of the events, known when the request comes -> kind.
            reading: What columns are called and mean, and what becomes of rows at fault. None is
                `Reading()`.
            connection: Ibis's DuckDB to store the tables in. None opens one in the system's
                temporary folder, so that the tables need not fit in memory.

        Raises:
            DataError: Naming file, column, rows and remedy.
            StorageError: If the tables cannot be stored, such as on a full disk.
            ValueError: If a feature has an unknown kind, or a column a name that no log can have.
        """
        features = checked_kinds(item_features, user_features, request_features)
        reading = reading or Reading()
        tables, dropped, notes = make_tables(
            connection or connect(), path, items, users, features, reading
        )
        return cls(
            *tables,
            *features,
            dropped=dropped,
            notes=notes,
            is_ordered=reading.is_ordered,
            reading=reading,
        )

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
    ) -> Log:
        """Makes a log of tables in memory, or of another engine; arguments are as in `from_files`.

        `events`, `items` and `users` are pandas DataFrames, pyarrow Tables, Ibis tables of any
        backend, or whatever else speaks Arrow. Their rows are copied (`from_ibis` leaves them). The
        order of the rows becomes `event_number`: order an Ibis table first
        (`table.order_by("time")`), since engines keep none.

        Raises:
            DataError: As `from_files`.
            TypeError: If `events` is a path.
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
    ) -> Log:
        """Makes a log of tables where they lie: in DuckDB, or in Spark past one machine.

        Nothing is copied or cleaned: the engine checks that the tables hold what `Log` says, and
        later computes splits and samples. Without an item or user table there are the ids alone;
        ids that only the events have are added with null features. Spark's timestamps are taken as
        UTC.

        Raises:
            DataError: If a table holds something else, naming column, rows and remedy; or lies in
                another engine.
        """
        check_engine(events, items, users)
        features = checked_kinds(item_features, user_features, request_features)
        events = check_events(events, Source("event table"), features[2])
        tables = (
            events,
            check_entities(items, "item_id", events, features[0]),
            check_entities(users, "user_id", events, features[1]),
        )
        return cls(*tables, *features, is_ordered=is_ordered)

    @classmethod
    def read(cls, folder: Path | str, connection: Any = None) -> Log:
        """Opens what `write` wrote, in Ibis's DuckDB (None opens one) or Spark, without loading it.

        Raises:
            DataError: If the folder holds no whole log.
            Damaged: If a file is not as it was written.
        """
        folder = Path(folder)
        if not (folder / "log.json").exists():
            raise DataError(
                f"{folder} has no log.json: writing the log did not finish there. Write it again."
            )
        about = read_record(folder / "log.json")
        about["dropped"] = tuple(Dropped(**dropped) for dropped in about["dropped"])
        about["notes"] = tuple(about["notes"])
        about["reading"] = Reading(**about["reading"])
        connection = connection or connect()
        tables = {name: open_parquet(connection, folder / f"{name}.parquet") for name in _KEYS}
        return cls(**tables, **about)

    def write(self, folder: Path | str) -> None:
        """Writes `events.parquet`, `items.parquet`, `users.parquet` and `log.json`.

        Events are ordered by number, items and users by id. `log.json` comes last: a folder that
        has it is whole. A part becomes a log of its own. A log that is there is replaced once all
        tables are written, even by one made from it; other files stay. Logs and splits that were
        read from the folder then read the new one: call `read` again.

        Raises:
            Damaged: If the folder's log is not as it was written.
            ValueError: If files of these names are not a log: they may be your own.
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
        about = {
            "item_features": dict(self.item_features),
            "user_features": dict(self.user_features),
            "request_features": dict(self.request_features),
            "dropped": [dataclasses.asdict(dropped) for dropped in self.dropped],
            "notes": self.notes,
            "is_ordered": self.is_ordered,
            "reading": self.reading.as_json(),
        }
        files = [file for name in _KEYS for file in part_files(folder / f"{name}.parquet")]
        write_record(record, about, files)
        shutil.rmtree(partial)

    @property
    def whole(self) -> Log:
        """The log that this one is a part of, or itself."""
        return self if self.part_of is None else self.part_of

    def fingerprint(self) -> str:
        """Returns a text that depends on all rows; engines differ, processes do not."""
        hashes = []
        for name in _KEYS:
            table = getattr(self, name)
            row = ibis.struct({column: table[column] for column in sorted(table.columns)})
            # Spark has no aggregate xor; a sum of 31 bits each does not overflow there.
            hashes.append((row.hash() % 2**31).sum().to_pyarrow().as_py())
        return " ".join(f"{int(number or 0):x}" for number in hashes)

    @property
    def listed_ids(self) -> np.ndarray:
        """[n] int64, or object of str: the items of the item table; without one, all items."""
        is_marked = LISTED in self.items.columns
        items = self.items.filter(self.items[LISTED]) if is_marked else self.items
        return as_id_array(items.order_by("item_id")["item_id"].to_pyarrow().to_pylist())

    @property
    def order(self) -> Literal["timestamp", "event_number", "none"]:
        """The column that says which event was earlier, if any does."""
        if "timestamp" in self.events.columns:
            return "timestamp"
        return "event_number" if self.is_ordered else "none"

    def split(
        self,
        kind: SplitKind | None = None,
        *,
        validation: float | datetime | str | None = None,
        test: float | datetime | str | None = None,
        target_share: float = 0.2,
        min_positives: int = 5,
        seed: int = 0,
    ) -> Split[Log]:
        """Splits the log into training, validation and test.

        The options are those of `SplitConfig`, which describes the kinds of splits. Only `time`
        keeps other users' later clicks out of training. In a log without order the last positives
        of a user are drawn at random. There a user's events of an item stay in one part, so that a
        part can be a little larger or smaller than asked for, or empty for a user.

        Args:
            kind: See `SplitConfig.kind`.
            validation: See `SplitConfig.validation`; a moment also as text, such as
                "2024-01-31T00:00:00Z".
            test: The same for the test.
            target_share: See `SplitConfig.target_share`.
            min_positives: See `SplitConfig.min_positives`.
            seed: Seed of the draw of held-out users and, without an order, of positives.

        Returns:
            The split: `train, validation, test = log.split()`. A part without a positive raises a
            `DataError` there: with `validation=0`, take `split.train` and `split.test`.

        Raises:
            DataError: If the log cannot be split so.
            ConfigError: If a share or a number is out of range, or contradicts the kind.
        """
        amounts: dict[str, Any] = {"validation": validation, "test": test}
        kind = kind or ("time" if self.order == "timestamp" else "last_share")
        try:
            config = SplitConfig(
                kind=kind, target_share=target_share, min_positives=min_positives, **amounts
            )
        except ConfigError as error:
            raise ConfigError([(f"split.{x}".rstrip("."), y) for x, y in error.problems]) from None
        events = split_events(self.events, config, seed=seed, is_ordered=self.order != "none")
        return Split(self, events, kind)

    def __repr__(self) -> str:
        # In Spark, counting may take minutes.
        backend = self.events.get_backend().name
        holds = listed(self.counts()) if backend == "duckdb" else f"tables in {backend}"
        features = ", ".join({**self.item_features, **self.user_features})
        return f"Log({holds}; order {self.order}; features {features or 'none'})"

    def counts(self) -> dict[str, int]:
        """Counts the events, items and users."""
        return {name: count_rows(getattr(self, name)) for name in _KEYS}

    def describe(self) -> list[str]:
        """Says what the log holds and what was dropped, in lines for a person."""
        return list(describe(self))


def check_log(train: Any) -> None:
    """Refuses (`TypeError`) to fit to anything but a log, such as a DataFrame or a whole split."""
    if not isinstance(train, Log):
        raise TypeError(
            "fit takes a Log: make one with Log.from_table or Log.from_files, and split it. "
            f"Received: {type(train).__name__}"
        )


# Table -> what its rows are written by.
_KEYS = {"events": "event_number", "items": "item_id", "users": "user_id"}
