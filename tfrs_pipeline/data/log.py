"""A log: what happened, to which items, for which users."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import ibis
import ibis.expr.operations as ops
import numpy as np
from ibis.backends.duckdb import Backend as DuckDB

from tfrs_pipeline.data.contract import check_entities, check_events
from tfrs_pipeline.data.engines import ENGINES, connect, open_parquet, replace, write_parquet
from tfrs_pipeline.data.events import EventRules, load_events
from tfrs_pipeline.data.files import scan
from tfrs_pipeline.data.ids import as_id_array
from tfrs_pipeline.data.parts import Split
from tfrs_pipeline.data.requests import (
    check_names,
    check_request_features,
    describe_long_requests,
)
from tfrs_pipeline.data.schema import (
    LISTED,
    DataError,
    Dropped,
    Duplicates,
    Source,
    SplitKind,
    TimestampUnit,
    UnknownItems,
    check_choice,
    check_columns,
    check_kinds,
    count_rows,
)
from tfrs_pipeline.data.settle import settle
from tfrs_pipeline.data.split import is_positive, read_amount, split_events
from tfrs_pipeline.data.tables import MAX_BAD_SHARE, describe_dropped, load_raw, type_entities
from tfrs_pipeline.data.times import Formats, make_period
from tfrs_pipeline.durable import part_files, read_record, refuse_others, write_record
from tfrs_pipeline.features.kinds import FeatureKind
from tfrs_pipeline.messages import counted, printable, suggest


@dataclass(frozen=True, eq=False)
class Log:
    """What happened: events, and the items and users that they are about.

    Item and user features are static: one value an item or user, which every event sees, however
    early. A column that was made after the events (an item's clicks in all, a user's latest
    country) tells a model of the past what only the future knew, and makes its evaluation better
    than its service will be. Give features that were known before the first event, or that do not
    change.

    A log, with the parts that a split makes of it, is for one thread: all read by one connection.
    Give each thread a log of its own.

    Args:
        events: `user_id` and `item_id` (int64 or string), `event_number` (int64, unique: the order
            in the source), `stage` (a `Stage`); optional `timestamp` (UTC), `request_id`, `rank`,
            `score`, `weight`, `part` (the log's own split) and context columns. Rows have no order
            of their own. Events of one user and `request_id` were asked for at one moment, that of
            the first: in a log with an order no history shows one of them to another.
        items: One row an id: `item_id` and feature columns. Holds every item of `events`. A column
            `title`, if there is one, is what people are shown; `_listed`, if there is one, tells
            the items of the item table from those that were added to it from the events.
        users: One row an id: `user_id` and feature columns. Holds every user of `events`.
        item_features: Feature columns of `items` and their kinds: categorical or hashed (string or
            int64), multi_categorical (array<string>), numeric or bucketized (float64), text
            (string), timestamp (UTC), vector (array<float32>, of one length). Nulls are missing
            values.
        user_features: The same of `users`.
        request_features: Columns of `events` that are known when a request comes (device, place,
            search text), and their kinds, likewise. `hour` and `weekday` are made of the timestamp,
            in UTC, where there are no such columns. What is known later, such as a watch time or
            any other outcome, must not be here: training would see it, and no request can bring it.
        dropped: Events that were dropped in the making, and why.
        notes: What else was found in the making, in lines for a person: events of unknown items,
            repeated ones, missing features.
        is_ordered: Whether `event_number` is an order in time, in a log without timestamps.
        item_reading: How the item table was read, as options of `from_files`; a table that replaces
            it in an export is read likewise.
        part_of: The log that this one is a part of, if a split made it.
        later_items: item_id, of the items whose first event in any part of the split is later than
            the last event of this one: new to whoever trains on it. None in a whole log, and in one
            without timestamps, where a new item and a rare one cannot be told apart.

    Example:
        >>> import pyarrow as pa
        >>> clicks = pa.table({"user": [1, 1, 2], "item_id": ["a", "b", "a"]})
        >>> log = Log.from_table(clicks, columns={"user_id": "user"})
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
    item_features: Mapping[str, FeatureKind] = field(default_factory=dict)
    user_features: Mapping[str, FeatureKind] = field(default_factory=dict)
    request_features: Mapping[str, FeatureKind] = field(default_factory=dict)
    dropped: tuple[Dropped, ...] = ()
    notes: tuple[str, ...] = ()
    is_ordered: bool = True
    item_reading: Mapping[str, Any] = field(default_factory=dict)
    part_of: Log | None = None
    later_items: ibis.Table | None = None

    def __post_init__(self) -> None:
        check_names(self.request_features, self.user_features)
        check_request_features(self.events, self.request_features)

    @classmethod
    def from_files(
        cls,
        path: Any,
        *,
        items: Any = None,
        users: Any = None,
        columns: Mapping[str, str] | None = None,
        item_columns: Mapping[str, str] | None = None,
        user_columns: Mapping[str, str] | None = None,
        item_features: Mapping[str, FeatureKind] | None = None,
        user_features: Mapping[str, FeatureKind] | None = None,
        request_features: Mapping[str, FeatureKind] | None = None,
        rating_threshold: float | None = None,
        stage_values: Mapping[str, str] | None = None,
        label: Mapping[str, float] | None = None,
        timestamp_unit: TimestampUnit | None = None,
        time_zone: str | None = None,
        list_separator: str = "|",
        unknown_items: UnknownItems = "keep",
        duplicates: Duplicates = "keep",
        is_ordered: bool = True,
        earliest_time: datetime | None = None,
        max_bad_share: float = MAX_BAD_SHARE,
        connection: DuckDB | None = None,
    ) -> Log:
        """Makes a log of CSV or Parquet.

        What the log holds shows in the settings and its columns. `rating_threshold` makes it one of
        ratings: at or above it is clicked, below it exposed (never a negative). Else a column
        `stage` makes it the log of a funnel. Else a `label` makes it one of exposures. Else all
        rows are clicks.

        Args:
            path: Events: CSV (with a header) or Parquet, a file or a folder of them, read in the
                order of their names. The order of the rows becomes `event_number`. Integer ids stay
                integers; ids in CSV are integers if all are written as such. "7.0" is 7, white
                space around ids is stripped, and "nan", "None" and the like are no ids.
            items: Item table, one row an id; likewise files, or a table as in `from_table`. None
                makes one of the ids alone. A column `title` is kept, feature or not.
            users: The same of users.
            columns: The log's name -> column in the events. A column called by its name needs no
                entry. Another name makes a context column, unless it is nearly one of the log's;
                `part` is the log's own split.
            item_columns: The same of the item table, such as {"item_id": "sku"}.
            user_columns: The same of the user table.
            item_features: Feature column -> kind (see `Log`).
            user_features: Feature column -> kind.
            request_features: Column of the events, known when the request comes -> kind.
            rating_threshold: Lowest rating that is a positive.
            stage_values: Value in the stage column -> stage, where they differ.
            label: Column -> weight: an exposed event is a positive if any of the columns holds (is
                true, or above 0), and weighs the sum of those that do.
            timestamp_unit: What numeric timestamps count since 1970, those of features too; None
                means seconds.
            time_zone: Of timestamps without one, those of features too; None refuses them.
            list_separator: Between values of multi_categorical and vector features in a string.
            unknown_items: Events whose item is not in the item table: "keep" (the item is added
                with null features), "drop", or "error". Users that the user table lacks are kept.
            duplicates: Events equal in user, item, time, stage, request and part: "keep" all,
                "drop" all but the first, or "error".
            is_ordered: Whether the order of the rows is the order of the events, where there are no
                timestamps.
            earliest_time: Events before it have no time, such as 0 in place of none; UTC if it has
                no zone. None means 1990. Nor have events of more than a day from now.
            max_bad_share: Share of a table's rows that may be dropped because something that they
                must have is missing or cannot be read, and of its features that may be missing for
                that; more is refused, with 0 all. A whole row of CSV, ids, a time, a rating, stage,
                outcome or weight is what an event must have, an item or user its id.
            connection: Ibis's DuckDB to store the tables in. None opens one in the system's
                temporary folder, so that the tables need not fit in memory.

        Raises:
            DataError: Naming file, column, rows and remedy.
            StorageError: If the tables cannot be stored, such as on a full disk.
            TypeError: If a column is not named by a string.
            ValueError: If an argument is none of its choices, or arguments contradict each other.
        """
        item_features, user_features = dict(item_features or {}), dict(user_features or {})
        request_features = dict(request_features or {})
        check_columns(columns=columns, item_columns=item_columns, user_columns=user_columns)
        check_choice("unknown_items", unknown_items, UnknownItems)
        check_choice("duplicates", duplicates, Duplicates)
        if timestamp_unit is not None:
            check_choice("timestamp_unit", timestamp_unit, TimestampUnit)
        check_kinds(item_features, user_features, request_features)
        rules = EventRules(
            columns or {},
            rating_threshold,
            stage_values or {},
            label or {},
            make_period(earliest_time),
            max_bad_share,
            request_features,
        )
        formats = Formats(timestamp_unit, time_zone, list_separator)
        connection = connection or connect()
        scanned = scan(connection, path, "event table")
        raws = {
            name: load_raw(
                connection, table, name, renamed, features, id_of_events=rules.columns.get(name, "")
            )
            for name, table, renamed, features in (
                ("item_id", items, item_columns or {}, item_features),
                ("user_id", users, user_columns or {}, user_features),
            )
        }
        events, dropped, notes = load_events(scanned, rules, formats, raws)
        sources = {"events": Source(scanned.name, dict(rules.columns))}
        tables = {}
        for name, features in (("item_id", item_features), ("user_id", user_features)):
            raw = raws[name]
            if raw is None:
                tables[name] = events.select(name).distinct()
                continue
            tables[name], lost, noted = type_entities(
                raw,
                name,
                as_integer=events.schema()[name].is_int64(),
                features=features,
                formats=formats,
                max_bad_share=max_bad_share,
            )
            notes += describe_dropped(raw.source, lost) + noted
            sources[name] = raw.source
            raw.drop()
        settled, repeated, noted = settle(
            events, tables, sources, unknown_items=unknown_items, duplicates=duplicates
        )
        return cls(
            *settled,
            item_features,
            user_features,
            request_features,
            dropped=(*dropped, *repeated),
            notes=(*notes, *noted),
            is_ordered=is_ordered,
            item_reading={
                "item_columns": dict(item_columns or {}),
                "max_bad_share": max_bad_share,
                **dataclasses.asdict(formats),
            },
        )

    @classmethod
    def from_table(cls, events: Any, **options: Any) -> Log:
        """Makes a log of tables in memory, or of another engine's.

        Args:
            events: A pandas DataFrame, a pyarrow Table, an Ibis table of any backend, or whatever
                else speaks Arrow; its rows are copied (`from_ibis` leaves them). The order of the
                rows becomes `event_number`: order an Ibis table first (`table.order_by("time")`),
                since engines keep none.
            **options: Those of `from_files`; `items` and `users` may be such tables too.

        Raises:
            DataError: As `from_files`.
            TypeError: If `events` is a path, or an option unknown.
        """
        if isinstance(events, str | Path):
            raise TypeError(f"A path is for Log.from_files. Received: {events!r}.")
        known = list(inspect.signature(cls.from_files).parameters)[1:]
        if unknown := [name for name in options if name not in known]:
            hint = suggest(unknown[0], known)
            raise TypeError(f"Log.from_table has no option {unknown[0]!r}; {hint}")
        return cls.from_files(events, **options)

    @classmethod
    def from_ibis(
        cls,
        events: ibis.Table,
        *,
        items: ibis.Table | None = None,
        users: ibis.Table | None = None,
        item_features: Mapping[str, FeatureKind] | None = None,
        user_features: Mapping[str, FeatureKind] | None = None,
        request_features: Mapping[str, FeatureKind] | None = None,
        is_ordered: bool = True,
    ) -> Log:
        """Makes a log of tables where they lie: in DuckDB, or in Spark past one machine.

        Nothing is copied or cleaned: the tables hold what `Log` says of them, which the engine
        checks. Splits and samples are then computed and written by the same engine. An item or user
        table that is None is one of the ids alone; ids of events that it lacks are added, with null
        features. Spark's timestamps are UTC, whatever their session says.

        Raises:
            DataError: If a table does not hold it, naming column, rows and remedy; or is of another
                engine.
        """
        if not isinstance(events, ibis.Table):
            raise TypeError(
                "Log.from_ibis takes tables of Ibis; Log.from_table any others. Received: "
                f"{type(events).__name__}"
            )
        if (engine := events.get_backend().name) not in ENGINES:
            raise DataError(
                f"Samples are made in {' or '.join(ENGINES)}. Received: a table of {engine}. "
                "Log.from_table copies it into DuckDB."
            )
        for table in (events, items, users):
            _check_connection(table, events)
        item_features, user_features = dict(item_features or {}), dict(user_features or {})
        request_features = dict(request_features or {})
        check_kinds(item_features, user_features, request_features)
        events = check_events(events, Source("event table"), request_features)
        return cls(
            events,
            check_entities(items, "item_id", events, item_features),
            check_entities(users, "user_id", events, user_features),
            item_features,
            user_features,
            request_features,
            is_ordered=is_ordered,
        )

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
        connection = connection or connect()
        tables = {name: open_parquet(connection, folder / f"{name}.parquet") for name in _KEYS}
        return cls(**tables, **about)

    def write(self, folder: Path | str) -> None:
        """Writes `events.parquet`, `items.parquet`, `users.parquet` and `log.json`.

        Events are written by event number, items and users by id. `log.json`, with the feature
        kinds and what was dropped, comes last: a folder that has it is whole. A part is written as
        a log of its own. The log that a folder holds is replaced, also by one made of it, once all
        tables are written; other files stay. Logs and splits that were read from it then read the
        new one: call `read` again.

        Raises:
            Damaged: If the folder's log is not as it was written.
            ValueError: If the folder holds such files that are no log: they may be your own.
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
            "item_reading": dict(self.item_reading),
        }
        files = [file for name in _KEYS for file in part_files(folder / f"{name}.parquet")]
        write_record(record, about, files)
        shutil.rmtree(partial)

    @property
    def whole(self) -> Log:
        """The log that this one is a part of: all that has happened."""
        return self if self.part_of is None else self.part_of

    def fingerprint(self) -> str:
        """Tells one log from another by what its tables hold, which its engine reads once.

        The same rows give the same text in every process, by one engine; another's differs.
        """
        hashes = []
        for name in _KEYS:
            table = getattr(self, name)
            row = ibis.struct({column: table[column] for column in sorted(table.columns)})
            # Spark has no exclusive or of many; a sum of so few bits is not too large for it.
            hashes.append((row.hash() % 2**31).sum().to_pyarrow().as_py())
        return " ".join(f"{int(number or 0):x}" for number in hashes)

    @property
    def listed_ids(self) -> np.ndarray:
        """[n] int64, or object of str: the items of the item table; all where there is none."""
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
        """Splits the log into what trains, what validates and what tests.

        | kind | what tests | users without enough positives |
        |---|---|---|
        | time | all that came after a moment, the same for all users | kept |
        | last_share | the last share of each user's positives | dropped |
        | last_n | each user's last few positives | dropped |
        | held_out_users | the last positives of users that training never saw | dropped |
        | column | what the log's own column `part` says: train, validation, test or null | kept |

        Only `time` keeps a user's training from other users' later clicks. In a log without any
        order the last positives of a user are some drawn at random. A user's events of an item stay
        in one part, so that a part may hold a few more or fewer than asked for, and of a user of
        few items none.

        Args:
            kind: None: time in a log with timestamps, else last_share.
            validation: A share of the positives (of what the test leaves of each user's, for
                last_share; of the users, for held_out_users), a number of positives a user (for
                last_n), or the moment at which validation starts, with a time zone, also as text
                such as "2024-01-31T00:00:00Z" (for time). None: .05, or 1.
            test: The same of the test. None: .1, or 1.
            target_share: Share of a held-out user's last positives that is to be found.
            min_positives: Users with fewer are dropped, all their events.
            seed: Of the draw of held-out users, and of positives where there is no order.

        Returns:
            The split, which unpacks: `train, validation, test = log.split()`. A part without a
            positive is a `DataError` there; ask for `split.train` and `split.test` alone where
            `validation` is 0.

        Raises:
            DataError: If the log cannot be split so.
            ValueError: If a share or a number is out of range.
        """
        kind = kind or ("time" if self.order == "timestamp" else "last_share")
        check_choice("split.kind", kind, SplitKind)
        events = split_events(
            self.events,
            kind,
            validation=read_amount("validation", validation),
            test=read_amount("test", test),
            target_share=target_share,
            min_positives=min_positives,
            seed=seed,
            is_ordered=self.order != "none",
        )
        return Split(self, events, kind)

    def __repr__(self) -> str:
        # Elsewhere to count may be a job of minutes.
        backend = self.events.get_backend().name
        holds = _listed(self.counts()) if backend == "duckdb" else f"tables in {backend}"
        features = ", ".join({**self.item_features, **self.user_features})
        return f"Log({holds}; order {self.order}; features {features or 'none'})"

    def counts(self) -> dict[str, int]:
        """Counts the events, items and users."""
        return {name: count_rows(getattr(self, name)) for name in _KEYS}

    def describe(self) -> list[str]:
        """Says what the log holds and what was dropped, in lines for a person."""
        counts = self.counts()
        notes = [_listed(counts)]
        if self.order == "timestamp":
            times = self.events["timestamp"]
            days = self.events.group_by(day=(times.epoch_seconds() / 86_400).floor().cast("int64"))
            num = is_positive(self.events).sum()
            of_days = days.agg(num=num, first=times.min(), last=times.max())
            found = of_days.order_by("day").to_pyarrow()
            first, last = found["first"][0].as_py(), found["last"][-1].as_py()
            # A wrong unit shows here.
            notes.append(f"from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC")
            notes += _describe_days(*(found[name].to_pylist() for name in ("day", "num")))
            notes += describe_long_requests(self.events)
        elif self.order == "event_number":
            notes.append("no timestamps: the order of the rows is taken for that of the events")
        if "weight" in self.events.columns:
            weight = self.events.filter(is_positive)["weight"]
            least, most = (x.to_pyarrow().as_py() for x in (weight.min(), weight.max()))
            if least != most:
                notes.append(
                    f"weights of positives from {least:g} to {most:g}: they weigh the loss; "
                    "metrics and baselines count every positive once"
                )
        if self.part_of is not None:
            return [*notes, "a part of a log: what was dropped in the making is told by the whole"]
        notes += _describe_users(self.events)
        num_dropped = sum(each.num_rows for each in self.dropped)
        num_read = counts["events"] + num_dropped
        dropped = f"{num_dropped:,} of {counted(num_read, 'row')}" if num_dropped else "nothing"
        notes.append(f"dropped {dropped}")
        notes += [f"dropped {counted(d.num_rows, 'row')}: {d.reason}" for d in self.dropped]
        return [*notes, *self.notes]


_OF_A_CONNECTION = (ops.DatabaseTable, ops.SQLQueryResult, ops.SQLStringView)


def _check_connection(table: Any, events: ibis.Table) -> None:
    """Refuses (`DataError`) a table of another connection, whose names may be the same."""
    if table is None or table is events:
        return
    if not isinstance(table, ibis.Table):
        raise TypeError(f"Log.from_ibis takes tables of Ibis. Received: {type(table).__name__}")
    # A table in memory is of no connection.
    if table.op().find(_OF_A_CONNECTION) and table.get_backend() is not events.get_backend():
        raise DataError(
            "The tables of a log must be of one connection, that of the events. Received: one of "
            "another. Open both there, or copy them with Log.from_table."
        )


def check_log(train: Any) -> None:
    """Refuses (`TypeError`) to fit to what is no log, such as a DataFrame or a whole split."""
    if not isinstance(train, Log):
        raise TypeError(
            "fit takes a Log: make one with Log.from_table or Log.from_files, and split it. "
            f"Received: {type(train).__name__}"
        )


# Above these shares `describe` tells: of users with a single positive, of positives of one user.
_MOST_USERS = 0.5
_LARGE_SHARE = 0.1
_FEW_USERS = 100  # Of fewer each has a large share.

# Table -> what its rows are written by.
_KEYS = {"events": "event_number", "items": "item_id", "users": "user_id"}


def _describe_days(days: Sequence[int], positives: Sequence[int]) -> Iterator[str]:
    """Says how many positives the days since 1970 have, so that a broken one shows."""
    of_day = dict(zip(days, positives, strict=True))
    counts = [of_day.get(day, 0) for day in range(days[0], days[-1] + 1)]
    if len(counts) < 3:
        return
    lowest = min(counts)
    when = date(1970, 1, 1) + timedelta(days[0] + counts.index(lowest))
    yield (
        f"positives a day: {statistics.median_low(counts):,} by median, {lowest:,} on {when} at "
        f"the lowest, {counts[-1]:,} on the last day"
    )


def _describe_users(events: ibis.Table) -> Iterator[str]:
    """Says if most users have a single positive, and if one has a large share of all positives."""
    positives = events.filter(is_positive)
    users = positives.group_by("user_id").agg(num=positives.count())
    counts = users.agg(
        users=users.count(),
        single=(users["num"] == 1).sum(),
        total=users["num"].sum(),
        most=users["num"].max(),
    )
    (found,) = counts.to_pyarrow().to_pylist()
    num_users, num_single = found["users"], found["single"]
    total, most = found["total"], found["most"]
    if not num_users:
        return
    if num_single > _MOST_USERS * num_users:
        yield f"{num_single:,} of {counted(num_users, 'user')} with positives have a single one"
    if num_users >= _FEW_USERS and most > _LARGE_SHARE * total:
        user = users.filter(users["num"] == most)["user_id"].min().to_pyarrow().as_py()
        yield f"{most / total:.0%} of the positives are of one user, {printable(repr(user))}"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(counted(count, name[:-1]) for name, count in counts.items())
