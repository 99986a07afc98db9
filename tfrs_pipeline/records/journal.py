"""The file of events: an SQLite file beside a model's versions.

It belongs to the model's name. Every version reads it, and takes the events after the end of the
log that it was trained on.
"""

import contextlib
import itertools
import json
import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.durable import Damaged, StorageError
from tfrs_pipeline.records.database import BUSY_SECONDS, Database, Stamp
from tfrs_pipeline.records.settings import MAX_ANSWERS
from tfrs_pipeline.records.user_events import Answer, Event, filled, plain, stripped

logger = logging.getLogger(__name__)

JOURNAL_FILE = "events.sqlite"
RANKS_SEEN = 100  # Items of an answer that count as served: nobody looks further.
# The request_id of a user's answer, and its time in milliseconds.
AnswerKey: TypeAlias = tuple[str, int]

_FORMAT = 1  # Of the tables below. `user_version` says whether rows were dropped.
# In WAL mode, readers and the writer do not wait for each other.
_INSERT = f"""
INSERT OR IGNORE INTO events ({", ".join(Event._fields)}, arrival)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_SAME_EVENT = (
    "SELECT 1 FROM events "
    "WHERE user_id = ? AND type = ? AND time = ? AND item_id = ? AND event IS ?"
)
_MAX_TYPES = 10  # Types of a user's events on an item in one millisecond; more are dropped.
_SCHEMA = f"""
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS events (
    user_id NOT NULL,        -- INTEGER or TEXT; without a type, 7 and '7' differ.
    type TEXT NOT NULL,      -- A stage of a log.
    time INTEGER NOT NULL,   -- Milliseconds since 1970, exact.
    item_id NOT NULL,
    request_id TEXT,         -- Of the answer that it belongs to.
    event_id INTEGER,        -- A hash of the client's id.
    arrival INTEGER NOT NULL,  -- Rises with every event; orders those of one time.
    event TEXT,              -- Its type in the training log; NULL if the stage says it all.
    session_id TEXT,
    weight REAL,             -- An amount, as in the log.
    PRIMARY KEY (user_id, type, time, item_id)
) WITHOUT ROWID;             -- A user's events of a type lie together, so reading them is fast.
-- An index of `events` would also hold each row's key, and take twice as much.
CREATE TABLE IF NOT EXISTS event_ids (id INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS served (
    arrival INTEGER PRIMARY KEY,  -- Rises with every answer, whatever the clock does.
    request_id TEXT NOT NULL,     -- Several answers may have the same: a client chooses it.
    user_id NOT NULL,
    time INTEGER NOT NULL,
    version INTEGER NOT NULL,  -- The one that answered.
    items TEXT NOT NULL        -- JSON: the ids, best first.
);
CREATE INDEX IF NOT EXISTS served_by_user ON served (user_id);
CREATE TRIGGER IF NOT EXISTS event_known BEFORE INSERT ON events
    WHEN NEW.event_id IN (SELECT id FROM event_ids) BEGIN SELECT RAISE(IGNORE); END;
CREATE TRIGGER IF NOT EXISTS event_added AFTER INSERT ON events WHEN NEW.event_id IS NOT NULL
    BEGIN INSERT INTO event_ids VALUES (NEW.event_id); END;
CREATE TRIGGER IF NOT EXISTS event_deleted AFTER DELETE ON events WHEN OLD.event_id IS NOT NULL
    BEGIN DELETE FROM event_ids WHERE id = OLD.event_id; END;
PRAGMA application_id = {_FORMAT};
"""
# Columns that older files lack. The first write adds them; older releases still read the file then.
_ADDED_COLUMNS = {"event": "TEXT", "session_id": "TEXT", "weight": "REAL"}
# The level of a type is its stage's position in the funnel.
_STAGES = [stage.value for stage in Stage]
_LEVELS = "".join(f" WHEN '{stage}' THEN {level}" for level, stage in enumerate(_STAGES))
_STAGE_OF_LEVEL = "".join(f" WHEN {level} THEN '{stage}'" for level, stage in enumerate(_STAGES))
# Columns without an aggregate come from the row with the largest level. Events without a request
# are rows of their own: no text equals a negative number. If several answers of a request have an
# item, events belong to the last one.
_ROWS = f"""
    SELECT served.user_id, item.value AS item_id, time, 0 AS level, request_id,
    item.key + 1 AS rank, 0 AS arrival, row_number() OVER (
        PARTITION BY served.user_id, request_id, item.value ORDER BY served.arrival DESC
    ) AS nth_last, 'retrieved' AS event, NULL AS session_id, NULL AS weight
    FROM served, json_each(served.items) AS item
    UNION ALL
    SELECT user_id, item_id, time, CASE type {_LEVELS} END, request_id, NULL, arrival, 1,
    {{event}}, {{session_id}}, {{weight}} FROM events
"""
_LOG = f"""
SELECT CAST(user_id AS {{user}}), CAST(item_id AS {{item}}), time,
    CASE max(level) {_STAGE_OF_LEVEL} END, coalesce(weight, 1.0), request_id, sum(rank)
FROM ({_ROWS}) GROUP BY user_id, item_id, coalesce(request_id, -time), nth_last
ORDER BY time, user_id, arrival, request_id, 7
"""
# Each event is a row, since its type has a weight. The log's reader merges the events of a visit.
_TYPED_LOG = f"""
SELECT CAST(user_id AS {{user}}), CAST(item_id AS {{item}}), time, event, session_id,
    coalesce(weight, 1.0), request_id, rank_served FROM (
    SELECT *, max(rank) OVER same AS rank_served, max(arrival) OVER same AS latest FROM ({_ROWS})
    WINDOW same AS (PARTITION BY user_id, item_id, coalesce(request_id, -time), nth_last)
) WHERE arrival > 0 OR latest = 0
ORDER BY time, user_id, arrival, request_id, rank_served
"""
# Clicks on items of answers: the version, and the rank from 1. If several answers of a request have
# the item, the last one counts.
_CLICKED = """
SELECT version, clicked.user_id, rank FROM (
    SELECT clicked.user_id, version, item.key + 1 AS rank, max(served.arrival)
    FROM ({clicked}) AS clicked JOIN ({served}) AS served USING (user_id, request_id),
        json_each(served.items) AS item
    WHERE item.value = clicked.item_id
    GROUP BY clicked.user_id, clicked.item_id, clicked.request_id
) AS clicked
"""
_ALL_CLICKED = _CLICKED.format(
    clicked="SELECT DISTINCT user_id, item_id, request_id FROM events "
    f"WHERE type = '{Stage.CLICKED.value}' AND request_id IS NOT NULL",
    served="SELECT * FROM served",
)
# Reads only a user's newest answers, so that a click costs little.
_ONE_CLICKED = _CLICKED.format(
    clicked="SELECT ?1 AS user_id, ?2 AS item_id, ?3 AS request_id",
    served=f"SELECT * FROM served WHERE user_id = ?1 ORDER BY arrival DESC LIMIT {MAX_ANSWERS}",
)
# Models of one name may have had numbers as ids, and later text. SQLite sorts text behind numbers.
_ID_TYPES = """
SELECT typeof(coalesce(max(user_id), 0)), typeof(coalesce(max(item_id), 0)) FROM (
    SELECT user_id, item_id FROM events
    UNION ALL SELECT user_id, json_extract(items, '$[0]') FROM served
)
"""
# What users do. Other stages are a ranker's: its hundreds of events would push these out.
_USER_TYPES = (Stage.CLICKED.value, Stage.EXPOSED.value, Stage.DISLIKED.value)
# A request reads this many of a user's newest events of a type. No person has more; a bot may.
_MAX_EVENTS = 10_000
# While others read SQLite's log of writes, it cannot be cut: number of tries, and seconds between.
_MAX_CUTS, _CUT_SECONDS = 50, 0.1


class Watch:
    """What a server knows of its file of events: each change is a line in the log.

    Attributes:
        unreadable: Why events cannot be read; "" if they can.
        is_rewriting: Whether this process writes the file anew.
    """

    def __init__(self) -> None:
        self.unreadable, self._unwritable, self.is_rewriting = "", "", False
        self._damaged: Stamp | None = None
        self._identity: tuple[Any, ...] | None = None
        self._lock = threading.Lock()

    def refuse(self, stamp: Stamp | None) -> None:
        """Raises `Damaged` before a write to a damaged file.

        Its undamaged pages would still take events, which a restored backup would then lose.
        """
        if stamp is not None and stamp == self._damaged:
            raise Damaged(self.unreadable)

    def failed(self, error: Exception, stamp: Stamp | None, is_writer: bool) -> None:
        """Notes that a read or a write failed."""
        with self._lock:
            if is_writer and isinstance(error, StorageError):
                if self._unwritable != (cause := str(error)):
                    logger.error("%s Until it can be written, events are refused.", cause)
                self._unwritable = cause
                return
            if not self.unreadable:
                logger.error("%s Until then, answers go without events.", error)
                self.unreadable = str(error)
            self._damaged = stamp if isinstance(error, Damaged) else None

    def worked(
        self, stamp: Stamp | None, identity: tuple[Any, ...] | None, is_writer: bool
    ) -> None:
        """Notes that a read or a write worked; another page of the same file may be damaged."""
        with self._lock:
            if self._identity not in (None, identity) and not self.is_rewriting:
                change = "replaced, restored or written anew" if identity else "deleted"
                logger.warning("The file of events was %s.", change)
            self._identity = None if self.is_rewriting else identity
            if self.unreadable and (self._damaged is None or stamp != self._damaged):
                logger.warning("The events can be read again.")
                self.unreadable, self._damaged = "", None
            if is_writer and self._unwritable:
                logger.warning("The events can be written again.")
                self._unwritable = ""


class Journal(Database):
    """The events of all users; see `Database` for what its methods raise.

    After a write, calls `on_click(version, rank)` for each new click on an item of one of the
    user's 1,000 newest recorded answers.
    """

    file_name, schema, formats = JOURNAL_FILE, _SCHEMA, (_FORMAT,)
    what_is_lost = "; its events are then lost, unless `tfrs-pipeline log` wrote them to a file"

    def __init__(
        self,
        folder: Path,
        watch: "Watch | None" = None,
        on_click: Callable[[int, int], object] | None = None,
    ) -> None:
        super().__init__(folder)
        self._watch, self._on_click = watch, on_click
        self._read_columns: tuple[sqlite3.Connection | None, dict[str, str]] = None, {}

    def another(self) -> "Journal":
        """Returns another connection to the file."""
        return Journal(self.path.parent, self._watch)

    @contextlib.contextmanager
    def _opened(self, *, is_writer: bool = False) -> Iterator[sqlite3.Connection | None]:
        if self._watch is None:
            with super()._opened(is_writer=is_writer) as connection:
                yield connection
            return
        stamp = self._stamp()
        if is_writer:
            self._watch.refuse(stamp)
        try:
            with super()._opened(is_writer=is_writer) as connection:
                yield connection
        except (Damaged, StorageError) as error:
            self._watch.failed(error, stamp, is_writer)
            raise
        self._watch.worked(stamp, self._identity, is_writer)

    def write(self, groups: Sequence[Sequence[Event]], answers: Iterable[Answer] = ()) -> list[int]:
        """Writes groups of events, and answers, in one transaction.

        Returns the number of new events of each group. An event is a repeat if the file has its
        `event_id`, or an event of the same user, item, type and millisecond.
        """
        with self.writing() as connection:
            served = (
                (request_id, user_id, answer.time, answer.version, json.dumps(filled(items)))
                for answer in answers
                for request_id, user_id, items in answer.by_query()
            )
            columns = "(request_id, user_id, time, version, items)"
            connection.executemany(f"INSERT INTO served {columns} VALUES (?, ?, ?, ?, ?)", served)
            # Microseconds: fewer than a million events a second arrive.
            arrivals = itertools.count(time.time_ns() // 1000)
            counts, clicked = [], list[tuple[int, Any, int]]()
            for events in groups:
                counts.append(0)
                for event in events:
                    is_new = _insert(connection, event, next(arrivals))
                    counts[-1] += is_new
                    is_click = event.type == Stage.CLICKED and event.request_id is not None
                    if is_new and is_click and self._on_click:
                        key = event.user_id, event.item_id, event.request_id
                        clicked += connection.execute(_ONE_CLICKED, key)
        if self._on_click:
            for version, _, rank in clicked:
                self._on_click(version, rank)
        return counts

    def events_by_user(self, user_ids: Collection[Any]) -> dict[Any, list[Event]]:
        """Reads what users clicked, were shown or disliked, by user, oldest first.

        Users without such an event are left out. Events of one time are in the order of their
        arrival. Of each type, reads a user's newest 10,000. With a `Watch`, returns {} if the file
        cannot be read, so that a server goes on.
        """
        try:
            return self._read_by_user(user_ids)
        except (Damaged, StorageError):
            if self._watch is None:
                raise
            return {}

    def _read_by_user(self, user_ids: Collection[Any]) -> dict[Any, list[Event]]:
        read: dict[Any, list[Event]] = {}
        with self._opened() as connection:
            if connection is None:
                return {}
            columns = ", ".join(self._columns(connection).values())
            query = (
                f"SELECT {columns}, arrival FROM events WHERE user_id = ? AND type = ? "
                "ORDER BY time DESC, arrival DESC LIMIT ?"
            )
            for id_ in dict.fromkeys(user_ids):
                rows: list[Any] = []
                with contextlib.suppress(OverflowError):  # No event has an id beyond 64 bits.
                    for type_ in _USER_TYPES:
                        rows += connection.execute(query, (plain(id_), type_, _MAX_EVENTS))
                if rows:
                    rows.sort(key=lambda row: (row[1], row[-1]))
                    read[id_] = [Event(*row[:-1]) for row in rows]
        return read

    def _columns(self, connection: sqlite3.Connection) -> dict[str, str]:
        """Returns SQL for the fields of an event, by name: NULL if an older file lacks one."""
        if self._read_columns[0] is not connection:  # A change of the tables opens a new one.
            missing = _missing(connection)
            columns = {name: "NULL" if name in missing else name for name in Event._fields}
            self._read_columns = connection, columns
        return self._read_columns[1]

    def problem(self) -> str:
        """Opens the file; returns why a server cannot read events, "" if it can."""
        with contextlib.suppress(Damaged, StorageError), self._opened():
            pass
        return self._watch.unreadable if self._watch else ""

    def clicks_after(
        self, time_: int, arrival: int
    ) -> tuple[dict[Any, Counter[tuple[Any, int]]], int]:
        """Counts the clicks later than a time in milliseconds that came after an arrival.

        Returns the number of clicks by user, then by item and second since 1970, and the newest
        arrival. If the file cannot be read, returns no clicks and the same arrival. The time it
        takes is proportional to the number of all events.
        """
        query = (
            "SELECT user_id, item_id, time, arrival FROM events "
            f"WHERE type = '{Stage.CLICKED.value}' AND time > ? AND arrival > ?"
        )
        clicks: dict[Any, Counter[tuple[Any, int]]] = {}
        newest = arrival
        try:
            with self._opened() as connection:
                rows = connection.execute(query, (time_, arrival)) if connection else ()
                for user_id, item_id, milliseconds, arrived in rows:
                    clicks.setdefault(user_id, Counter())[item_id, milliseconds // 1000] += 1
                    newest = max(newest, arrived)
        except (Damaged, StorageError):  # The next call reads all of them.
            return {}, arrival
        return clicks, newest

    def user_ids(self) -> list[Any]:
        """Reads the ids of all users who did something, ascending; integers come before text."""
        query = f"SELECT DISTINCT user_id FROM events WHERE type IN {_USER_TYPES} ORDER BY user_id"
        with self._opened() as connection:
            return [id_ for (id_,) in (connection.execute(query) if connection else ())]

    def served_to(self, user_id: Any) -> Iterator[tuple[AnswerKey, list[Any]]]:
        """Yields a user's answers, newest arrival first: key, and the ids of its first items."""
        with self._opened() as connection:
            if connection is not None:
                query = "SELECT request_id, time, items FROM served WHERE user_id = ?"
                rows = connection.execute(f"{query} ORDER BY arrival DESC", (user_id,))
                for request_id, time_, items in rows:
                    yield (request_id, time_), json.loads(items)[:RANKS_SEEN]

    def log(
        self, num_rows: int, words: Mapping[str, str] | None = None
    ) -> Iterator[list[tuple[Any, ...]]]:
        """Yields all that is recorded as rows of an event table, in blocks, ordered by time.

        A row is user_id, item_id, milliseconds since 1970, stage, weight, request_id, and rank in
        the answer, from 1. Each item of a request has one row, with its furthest stage and the time
        when it reached that. Served items have the stage "retrieved". If some ids are text, all
        are. Writes after the first block do not show.

        With `words`, each event is a row, and so is a served item without an event. A type and a
        session_id replace the stage. The type is that in the training log; for events without one,
        `words` has it by stage.
        """
        with self._opened() as connection:
            if connection is None:
                return
            user, item = connection.execute(_ID_TYPES).fetchone()
            columns, log = self._columns(connection), _LOG
            if words is not None:
                cases = "".join(f" WHEN '{stage}' THEN '{word}'" for stage, word in words.items())
                event = f"coalesce({columns['event']}, CASE type{cases} END)"
                columns, log = columns | {"event": event}, _TYPED_LOG
            rows = connection.execute(log.format(user=user, item=item, **columns))
            while block := rows.fetchmany(num_rows):
                yield block

    def forget(self, user_ids: Iterable[Any]) -> list[int]:
        """Deletes users' events and answers, also from the file; returns their number by user.

        The file is written anew once, in time proportional to its size. Other writers wait
        meanwhile, and readers do not. If that fails, no query finds the rows, but copies of them
        may still be in the file: delete again.
        """
        counts = []
        with self.writing() as connection:
            for id_ in map(plain, user_ids):
                counts.append(0)
                # Events are recorded without spaces around ids, answers with the id of the request.
                ids = id_, stripped(id_)
                with contextlib.suppress(OverflowError):  # No row has an id beyond 64 bits.
                    for table in ("events", "served"):
                        delete = f"DELETE FROM {table} WHERE user_id IN (?, ?)"
                        counts[-1] += connection.execute(delete, ids).rowcount
        self._rewrite()
        return counts

    def answer_counts(self) -> list[tuple[int, Any, int]]:
        """Counts the answers by version and user: (version, user id, number of answers)."""
        query = "SELECT version, user_id, count(*) FROM served GROUP BY version, user_id"
        with self._opened() as connection:
            return connection.execute(query).fetchall() if connection else []

    def answer_clicks(self) -> list[tuple[int, Any, int]]:
        """Returns (version, user id, rank from 1) of each clicked item of each answer."""
        with self._opened() as connection:
            return connection.execute(_ALL_CLICKED).fetchall() if connection else []

    def has_weights(self) -> bool:
        """Returns whether any event has a weight."""
        with self._opened() as connection:
            if connection is None:
                return False
            weight = self._columns(connection)["weight"]
            query = f"SELECT EXISTS(SELECT 1 FROM events WHERE {weight} IS NOT NULL)"
            return bool(connection.execute(query).fetchone()[0])

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """As `Database.writing`; adds the columns that an older file lacks."""
        with super().writing() as connection:
            for name in _missing(connection):
                connection.execute(f"ALTER TABLE events ADD COLUMN {name} {_ADDED_COLUMNS[name]}")
            yield connection

    def moment(self) -> int:
        """Returns the time after all written events, in microseconds; see `drop_older`."""
        with self.writing():  # Waits for the writer before it.
            return time.time_ns() // 1000

    def drop_older(self, time_: int, arrived_before: int | None = None) -> tuple[int, int]:
        """Deletes what is older than a time in milliseconds since 1970; see `forget`.

        Keeps old events that arrived after `arrived_before`, a `moment`; with None, keeps none.
        Returns the numbers of deleted events and of deleted answers.
        """
        events = "DELETE FROM events WHERE time < ? AND arrival < coalesce(?, arrival + 1)"
        answers = "DELETE FROM served WHERE time < ?"
        with self.writing() as connection:
            num_events = connection.execute(events, [time_, arrived_before]).rowcount
            num_answers = connection.execute(answers, [time_]).rowcount
            if num_events or num_answers:  # In this transaction, so no file with them is replaced.
                connection.execute("PRAGMA user_version = 1")
        self._rewrite()
        return num_events, num_answers

    def has_dropped(self) -> bool:
        """Returns whether `drop_older` has ever deleted something."""
        with self._opened() as connection:
            return bool(connection and connection.execute("PRAGMA user_version").fetchone()[0])

    def _rewrite(self) -> None:
        """Writes the file anew, without a byte of deleted rows; readers do not wait."""
        watch = self._watch or Watch()
        watch.is_rewriting = True
        try:
            self._vacuum()
        finally:
            watch.is_rewriting = False

    def _vacuum(self) -> None:
        with self._opened(is_writer=True) as connection:
            assert connection is not None
            # Free space in the file may hold old copies of rows, also with `secure_delete`. `VACUUM
            # INTO` a second file would not hold up writers. But after its rename over the first,
            # other processes might commit to the old file, and lose what they wrote.
            folder = str(self.path.parent.absolute()).replace("'", "''")
            try:
                # VACUUM makes a copy first: not in TMPDIR, which may be small, or in memory.
                connection.execute(f"PRAGMA temp_store_directory = '{folder}'")
                connection.execute("VACUUM")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
                    raise
                raise StorageError(
                    f"{self.path}: {error}. Rewriting it takes up to "
                    f"{2 * self.path.stat().st_size / 1e6:,.1f} MB more in {self.path.parent}."
                ) from error
            # SQLite's log holds what was written until it is copied into the file and cut. While
            # SQLite waits for readers of the log, nobody can write. So it must not wait; this loop
            # tries again.
            connection.execute("PRAGMA busy_timeout = 0")
            try:
                for _ in range(_MAX_CUTS):
                    is_busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                    if not is_busy:
                        return
                    time.sleep(_CUT_SECONDS)
            finally:
                connection.execute(f"PRAGMA busy_timeout = {round(1000 * BUSY_SECONDS)}")
        raise StorageError(f"{self.path}-wal is being read and may hold events: delete again.")


def _insert(connection: sqlite3.Connection, event: Event, arrival: int) -> bool:
    """Inserts an event; returns whether it is new.

    A click and a purchase of one millisecond have the same key, so each further type is written a
    millisecond later.
    """
    for time_ in range(event.time, event.time + _MAX_TYPES):
        if connection.execute(_INSERT, (*event._replace(time=time_), arrival)).rowcount:
            return True
        key = event.user_id, event.type, time_, event.item_id, event.event
        if connection.execute(_SAME_EVENT, key).fetchone():
            break
    return False


def _missing(connection: sqlite3.Connection) -> list[str]:
    """Returns the columns that an older file lacks."""
    names = {row[1] for row in connection.execute("PRAGMA table_info(events)")}
    return [name for name in _ADDED_COLUMNS if name not in names]
