"""What users did in service: an SQLite file beside a model's versions.

It belongs to the model's name: every version reads it, and takes the events after the end of the
log that it was trained on.
"""

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
import pydantic
from pydantic import BeforeValidator, ConfigDict, FailFast, Field, TypeAdapter, create_model

from tfrs_pipeline.data.ids import NO_ID
from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.durable import StorageError
from tfrs_pipeline.features.numeric import Timestamp
from tfrs_pipeline.serving.store import Database

JOURNAL_FILE = "events.sqlite"
DISLIKED = "disliked"
# What clients call events -> the stage as in a log, or a dislike.
TYPES: Mapping[str, str] = {
    "click": Stage.CLICKED,
    "view": Stage.EXPOSED,
    "dislike": DISLIKED,
    DISLIKED: DISLIKED,
    **{stage.value: stage.value for stage in Stage},
}

_SCHEMA = """
PRAGMA journal_mode = WAL;  -- Readers and the writer do not wait for each other.
CREATE TABLE IF NOT EXISTS events (
    user_id NOT NULL,        -- INTEGER or TEXT; without a type, 7 and '7' differ.
    time INTEGER NOT NULL,   -- Milliseconds since 1970, exact.
    item_id NOT NULL,
    type TEXT NOT NULL,      -- A stage of a log, or 'disliked'.
    request_id TEXT,         -- Of the answer that it belongs to.
    event_id TEXT UNIQUE,    -- The client's own.
    PRIMARY KEY (user_id, time, item_id, type)
) WITHOUT ROWID;             -- The events of a user lie together, so that reading them is fast.
"""
# The newest events of a user that a request reads: a bound for what is not a person.
_MAX_EVENTS = 10_000
_DAY_MS = 86_400_000
_MAX_GROUPS = 500  # Requests that are written in one transaction.


class Event(NamedTuple):
    """What a user did with an item; see the table. `time` is in milliseconds since 1970."""

    user_id: Any
    time: int
    item_id: Any
    type: str
    request_id: str | None
    event_id: str | None


class Journal(Database):
    """The events of all users; see `Database` for what its methods raise."""

    file_name, schema = JOURNAL_FILE, _SCHEMA
    what_is_lost = "; its events are then lost"

    def write(self, groups: Sequence[Sequence[Event]]) -> list[int]:
        """Writes groups of events in one transaction; returns how many of each were new.

        An event is not new if its event_id is there, or the same type of event of the same user,
        item and millisecond.
        """
        insert = f"INSERT OR IGNORE INTO events VALUES ({', '.join('?' * len(Event._fields))})"
        with self.writing() as connection:
            return [connection.executemany(insert, events).rowcount for events in groups]

    def of_users(self, user_ids: Collection[Any]) -> dict[Any, list[Event]]:
        """Reads the events of users, oldest first; those without one are left out."""
        query = "SELECT * FROM events WHERE user_id = ? ORDER BY time DESC, item_id DESC LIMIT ?"
        with self._opened() as connection:
            if connection is None:
                return {}
            read = {
                id_: connection.execute(query, (id_, _MAX_EVENTS)).fetchall()
                for id_ in dict.fromkeys(user_ids)
            }
        return {id_: [*map(Event._make, rows[::-1])] for id_, rows in read.items() if rows}

    def forget(self, user_id: Any) -> int:
        """Deletes a user's events, also from the file; returns how many there were.

        The file is written anew, in time proportional to its size; other writers wait meanwhile.
        """
        if isinstance(user_id, int) and not -(2**63) <= user_id < 2**63:
            return 0  # No event has it.
        with self.writing() as connection:
            deleted = connection.execute("DELETE FROM events WHERE user_id = ?", [user_id])
        with self._opened() as connection:
            assert connection is not None
            # Free space in the file may hold old copies of rows, also with `secure_delete`.
            connection.execute("VACUUM")
            # The log holds what was written until it is copied into the file and cut.
            is_busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if is_busy:
            raise StorageError(f"{self.path}-wal is being read and may hold events: delete again.")
        return int(deleted.rowcount)


class Recorder:
    """Writes events in a thread: all that came during a write go into the next one together.

    One write waits for the disk once, however many clients it confirms.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._groups: queue.SimpleQueue[tuple[Sequence[Event], Future[int]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="events", daemon=True).start()

    def submit(self, events: Sequence[Event]) -> "Future[int]":
        """Returns the number of new events, once all are on disk."""
        done: Future[int] = Future()
        # From now on it cannot be cancelled: a client that leaves changes nothing.
        done.set_running_or_notify_cancel()
        self._groups.put((events, done))
        return done

    def _work(self) -> None:
        while True:
            taken = [self._groups.get()]
            with contextlib.suppress(queue.Empty):
                while len(taken) < _MAX_GROUPS:
                    taken.append(self._groups.get_nowait())
            try:
                counts = self.journal.write([events for events, _ in taken])
            except Exception as error:  # For those who wait; the next write may succeed.
                for _, done in taken:
                    done.set_exception(error)
            else:
                for (_, done), count in zip(taken, counts, strict=True):
                    done.set_result(count)


def check_events(
    events: Sequence[Mapping[str, Any]], *, users_are_text: bool, items_are_text: bool
) -> list[Event]:
    """Reads events as clients write them; a `ValueError` names the first that is wrong.

    Each has `user_id`, `item_id` and `type`, a key of `TYPES`; and may have `time`, a datetime with
    a zone, ISO 8601, or seconds since 1970 (default: now), `request_id` and `event_id`.
    """
    if isinstance(events, Mapping):
        raise ValueError(f"Events come in a list, also a single one: [{dict(events)!r:.200}]")
    try:
        checked = _reader(users_are_text, items_are_text).validate_python(list(events))
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        number, *path = problem["loc"]
        if not path:
            wanted = f"Event {number} must be an object, with user_id, item_id and type"
        elif problem["type"] == "extra_forbidden":
            wanted = f"Event {number}: unknown {path[0]!r}; it has {', '.join(Event._fields)}"
        else:
            wanted = f"Event {number}: {path[0]}: {problem['msg'].removeprefix('Value error, ')}"
        raise ValueError(f"{wanted}. Received: {problem['input']!r:.200}") from None
    now = time.time_ns() // 1_000_000
    return [Event(**{**vars(x), "time": now if x.time is None else x.time}) for x in checked]


def _milliseconds(value: Any) -> int:
    if isinstance(value, str):
        value = Timestamp.from_text(value)
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError("needs a time zone")
        value = value.timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e14:
        raise ValueError("takes seconds since 1970, or ISO 8601 with a time zone")
    if (milliseconds := round(1000 * value)) > time.time_ns() // 1_000_000 + _DAY_MS:
        raise ValueError("is more than a day from now; give seconds since 1970, not milliseconds")
    return milliseconds


def _type(value: Any) -> str:
    if not isinstance(value, str) or value not in TYPES:
        raise ValueError(f"must be one of {', '.join(TYPES)}")
    return TYPES[value]


def _id(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    value = value.strip() if isinstance(value, str) else value
    if value in ("", -1, *NO_ID):
        raise ValueError("is not an id")
    return value


_Text: TypeAlias = Annotated[str, Field(strict=True, min_length=1, max_length=200)]
_TextId: TypeAlias = Annotated[str, Field(strict=True, max_length=1000), BeforeValidator(_id)]
_IntegerId: TypeAlias = Annotated[
    int, Field(strict=True, ge=-(2**63), lt=2**63), BeforeValidator(_id)
]


@functools.cache
def _reader(users_are_text: bool, items_are_text: bool) -> TypeAdapter[Any]:
    event: Any = create_model(
        "event",
        __config__=ConfigDict(extra="forbid"),
        user_id=_TextId if users_are_text else _IntegerId,
        item_id=_TextId if items_are_text else _IntegerId,
        type=Annotated[str, BeforeValidator(_type)],
        time=(Annotated[int, BeforeValidator(_milliseconds)] | None, None),
        request_id=(_Text | None, None),
        event_id=(_Text | None, None),
    )
    # A hostile list of wrong events would otherwise become as many errors.
    return TypeAdapter(Annotated[list[event], FailFast()])
