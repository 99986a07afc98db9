"""A thread that writes events and answers, so that many clients share one wait for the disk."""

import contextlib
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from tfrs_pipeline.records.journal import RANKS_SEEN, AnswerKey, Journal
from tfrs_pipeline.records.settings import MAX_ANSWERS, Lately
from tfrs_pipeline.records.user_events import Answer, Event, filled

_MAX_TAKEN = 500  # Requests that are written in one transaction.
# No client waits for an answer's record. So a record waits this long for others, to share a write.
# If this many entries wait, it is dropped.
_ANSWER_SECONDS, _MAX_WAITING = 1.0, 10_000


class _Group(NamedTuple):
    events: Sequence[Event]
    done: "Future[int]"


class _Deletion(NamedTuple):
    user_id: Any
    done: "Future[int]"


_Entry: TypeAlias = _Group | _Deletion | Answer | None


class Recorder:
    """Writes events and answers, and deletes those of a user, in a thread.

    After a failed write, calls `on_lost` with the number of answers that it lost.

    All entries that arrive during a write go into the next one. It waits for the disk once, however
    many clients it confirms.
    """

    def __init__(
        self, journal: Journal, on_lost: Callable[[int], object] = lambda num: None
    ) -> None:
        self.journal, self._on_lost = journal, on_lost
        self._thread_local = threading.local()
        self._queue: queue.SimpleQueue[_Entry] = queue.SimpleQueue()
        # By user, the answers in the queue, in their order.
        self._waiting: dict[Any, dict[AnswerKey, np.ndarray]] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def submit(self, events: Sequence[Event]) -> "Future[int]":
        """Queues events; the result is the number of new ones, once all are on disk."""
        return self._queued(_Group(events, Future()))

    def forget(self, user_id: Any) -> "Future[int]":
        """Queues a deletion, also of a user's entries that still wait; see `Journal.forget`."""
        return self._queued(_Deletion(user_id, Future()))

    def _queued(self, entry: _Group | _Deletion) -> "Future[int]":
        # From now on it cannot be cancelled: a client that leaves changes nothing.
        entry.done.set_running_or_notify_cancel()
        self._queue.put(entry)
        return entry.done

    def keep(self, answer: Answer) -> bool:
        """Queues what was served, to be on disk in a second or so.

        Returns whether there was room: with 10,000 entries waiting, the answer is dropped.
        """
        if has_room := self._queue.qsize() < _MAX_WAITING:
            with self._lock:
                for request_id, user_id, items in answer.by_query():
                    waiting = self._waiting.setdefault(user_id, {})
                    waiting.setdefault((request_id, answer.time), items)
            self._queue.put(answer)
        return has_room

    def served_lately(self, user_ids: Sequence[Any], lately: Lately, most: int) -> list[list[Any]]:
        """Returns the distinct ids of items that each user was served lately, newest answer first.

        Answers that are not yet written count too. Of an answer, its first 100 items count. Reading
        ends after `most` items of a user, repeated ones included.
        """
        read = {id_: self._served_lately(id_, lately, most) for id_ in dict.fromkeys(user_ids)}
        return [[*dict.fromkeys(read[id_])][:most] for id_ in user_ids]

    def _served_lately(self, user_id: Any, lately: Lately, most: int) -> list[Any]:
        since = time.time() * 1000 - lately.hours * 3_600_000 if lately.hours else math.inf
        with self._lock:  # First, since an answer is written before it stops waiting.
            newest = reversed(self._waiting.get(user_id, {}).items())
            waiting = dict(itertools.islice(newest, MAX_ANSWERS))
        # A connection of each thread waits for no write and for no other query.
        if not hasattr(self._thread_local, "reader"):
            self._thread_local.reader = self.journal.another()
        written = self._thread_local.reader.served_to(user_id)
        ids: list[Any] = []
        with contextlib.closing(written):
            answers = itertools.chain(
                ((key, filled(items[:RANKS_SEEN])) for key, items in waiting.items()),
                ((key, items) for key, items in written if key not in waiting),
            )
            for num, ((_, time_), items) in enumerate(itertools.islice(answers, MAX_ANSWERS)):
                if len(ids) >= most or (num >= lately.answers and time_ <= since):
                    break
                ids += items
        return ids

    def close(self) -> None:
        """Writes what is queued, then ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        answers: list[Answer] = []
        is_open, deadline = True, 0.0
        while is_open:
            entries: list[_Entry] = []
            wait = max(deadline - time.monotonic(), 0) if answers else None
            with contextlib.suppress(queue.Empty):
                entries.append(self._queue.get(timeout=wait))
                while len(entries) < _MAX_TAKEN:
                    entries.append(self._queue.get_nowait())
            is_open = None not in entries
            if not answers:
                deadline = time.monotonic() + _ANSWER_SECONDS
            answers += [entry for entry in entries if isinstance(entry, Answer)]
            groups = [entry for entry in entries if isinstance(entry, _Group)]
            deletions = [entry for entry in entries if isinstance(entry, _Deletion)]
            is_due = time.monotonic() >= deadline or len(answers) >= _MAX_TAKEN
            if groups or deletions or is_due or not is_open:
                self._write(groups, answers)
                answers = []
            if deletions:  # After the write, so that they reach what was queued before them.
                _confirm(deletions, self.journal.forget, [entry.user_id for entry in deletions])

    def _write(self, groups: Sequence[_Group], answers: Sequence[Answer]) -> None:
        if not groups and not answers:
            return
        events = [group.events for group in groups]
        error = _confirm(groups, self.journal.write, events, answers)
        if error and answers:
            self._on_lost(len(answers))
        with self._lock:
            for answer in answers:
                for request_id, user_id, _ in answer.by_query():
                    waiting = self._waiting.get(user_id, {})
                    waiting.pop((request_id, answer.time), None)
                    if not waiting:
                        self._waiting.pop(user_id, None)


def _confirm(
    entries: Sequence[_Group | _Deletion], work: Callable[..., list[int]], *arguments: Any
) -> Exception | None:
    """Does the work; gives each entry's future its count, or the error of the work.

    Returns the error, or None.
    """
    try:
        counts = work(*arguments)
    except Exception as error:  # The thread must go on: the next write may succeed.
        for entry in entries:
            entry.done.set_exception(error)
        return error
    for entry, count in zip(entries, counts, strict=True):
        entry.done.set_result(count)
    return None
