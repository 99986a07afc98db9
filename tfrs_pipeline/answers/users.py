"""What each user did until now: the history that a version holds, and the events since."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfrs_pipeline.answers.stored import Stored
from tfrs_pipeline.data.schema import LONGEST_PAUSE, PAUSE, Exclude, Stage
from tfrs_pipeline.records.journal import Journal
from tfrs_pipeline.records.user_events import Event, event_types
from tfrs_pipeline.search.exclusions import KNOWN_STAGES, left_out, left_out_by_history


class UserNow(NamedTuple):
    """A user as they are now.

    Attributes:
        history: Ids of the items that the user clicked, oldest first, without disliked ones.
        times: Their times, [n] float64 seconds since 1970; NaN where unknown.
        known: Ids of items that the version holds as known, and of the events that make an item
            known by its rule; `left_out` decides.
        disliked: Ids of items that the user disliked, before the end of the log or since.
        click_times: When each item of the history was clicked, in the unit of `times`. `times` is
            earlier if a view and a click of one request count as one event.
        is_known: Whether the training, or an event since, had the user.
    """

    history: list[Any]
    times: np.ndarray
    known: list[Any]
    disliked: list[Any]
    click_times: np.ndarray
    is_known: bool


def _once_a_visit(events: Sequence[Event]) -> list[tuple[Event, Event]]:
    """Returns a user's clicks, oldest first, each item once a visit.

    A click is a pair of events: the first one of its request on the item, and the click itself; of
    a click without a request, the click twice. An item that was clicked and then bought is one
    positive, as in a log whose types of events have weights (`data/visits.py`).

    Args:
        events: A user's events, oldest first.
    """
    last: dict[str | None, int] = {}
    num_pauses: Counter[str | None] = Counter()
    # By item and request; an event without a request is alone. The values are the first event, its
    # visit, and the first click.
    firsts: dict[Any, tuple[Event, tuple[str | None, int], Event | None]] = {}
    for number, event in enumerate(events):
        session, second = event.session_id, event.time // 1000
        pause = PAUSE if session is None else LONGEST_PAUSE
        num_pauses[session] += second - last.get(session, second) > pause
        last[session] = second
        is_dislike = event.type == Stage.DISLIKED
        key = (event.request_id, event.item_id, is_dislike) if event.request_id else number
        first, visit, click = firsts.setdefault(key, (event, (session, num_pauses[session]), None))
        if event.type == Stage.CLICKED:
            firsts[key] = first, visit, click or event
    num_by_request = Counter(event.request_id for event, *_ in firsts.values())
    clicks, seen = list[tuple[Event, Event]](), set[tuple[Any, ...]]()
    for event, visit, click in firsts.values():
        if click is not None:
            # As in training, several items of one request are kept apart.
            is_mergeable = not event.request_id or num_by_request[event.request_id] == 1
            if not (is_mergeable and (event.item_id, visit) in seen):
                clicks.append((event, click))
            seen.add((event.item_id, visit))
    return clicks


class Users:
    """The users of a loaded version: what it holds of them, and their events.

    Args:
        stored: What the version holds.
        rule: Which items answers by user id leave out (see `left_out`).
        manifest: The version's manifest.
        folder: The model's folder, with the recorded events; None reads no events.

    Attributes:
        journal: The recorded events; None if none are read.
        until: Milliseconds since 1970: the end of the log that the version was trained on. Clicks
            up to and at this time are in that log, so no history takes them from the journal.
    """

    def __init__(
        self, stored: Stored, rule: Exclude, manifest: Mapping[str, Any], folder: Path | None
    ) -> None:
        self.journal = None if folder is None else Journal(folder)
        self._stored, self._rule = stored, rule
        self._has_visits = bool(event_types(manifest))
        until = manifest.get("histories_until", manifest["items_read"])
        self.until = round(1000 * datetime.fromisoformat(until).timestamp())

    @property
    def are_text(self) -> bool:
        """Whether user ids are texts; else they are integers."""
        return self._stored.users.are_text

    @property
    def has_left_out(self) -> bool:
        """Whether the version itself holds items that answers to some user leave out."""
        return self._rule != "none" or self._stored.has_dislikes

    def now(self, user_ids: Sequence[Any]) -> list[UserNow]:
        """Returns users as they are now; one without a trace has empty lists."""
        rows = self._stored.user_rows(user_ids)
        events_by_user = {} if self.journal is None else self.journal.events_by_user(user_ids)
        pairs = zip(rows, user_ids, strict=True)
        return [self._now(row, events_by_user.get(user_id, ())) for row, user_id in pairs]

    def _now(self, row: int, events: Sequence[Event]) -> UserNow:
        stored, is_known = self._stored, row > 0 or bool(events)
        (history, times), known, disliked = (
            stored.history(row),
            stored.known(row),
            stored.disliked(row),
        )
        if not events:
            return UserNow(history, times, known, disliked, times, is_known)
        # An earlier model of this name may have had item ids of the other type.
        are_text = stored.items.are_text
        events = [event for event in events if isinstance(event.item_id, str) == are_text]
        disliked += [event.item_id for event in events if event.type == Stage.DISLIKED]
        known += [event.item_id for event in events if event.type in KNOWN_STAGES[self._rule]]
        clicks = [(event, event) for event in events if event.type == Stage.CLICKED]
        if self._has_visits:
            clicks = _once_a_visit(events)
        clicks = [pair for pair in clicks if pair[0].time > self.until]
        history += [first.item_id for first, _ in clicks]
        # Whole seconds, as in training.
        click_times = np.append(times, [click.time // 1000 for _, click in clicks])
        times = np.append(times, [first.time // 1000 for first, _ in clicks])
        gone = dict.fromkeys(disliked)  # Each item once.
        is_left = [item_id not in gone for item_id in history]
        history = [*itertools.compress(history, is_left)]
        left = np.array(is_left, bool)
        return UserNow(history, times[left], known, [*gone], click_times[left], is_known)

    def left_out(self, user: UserNow) -> list[Any]:
        """Returns the ids that no answer to a user by id holds."""
        return left_out(self._rule, user.known, user.disliked)

    def history(self, user_id: Any) -> list[Any]:
        """Returns the history of a user until now, most recent first; [] for an unknown user."""
        return self.now([user_id])[0].history[::-1]

    def disliked(self, user_ids: Sequence[Any]) -> list[list[Any]]:
        """Returns what each user disliked until now, in the training's log and in service."""
        return [user.disliked for user in self.now(user_ids)]

    def left_out_by_history(
        self, user_ids: Sequence[Any], histories: Sequence[Sequence[Any]]
    ) -> list[list[Any]]:
        """Returns what answers by a history have to `exclude`, as answers by user id do themselves.

        For each user this is what they disliked and, unless the rule is "none", the history; by the
        rule "seen", also what they have seen. A user whom the training did not have may have seen
        or disliked items in service.
        """
        return [
            left_out_by_history(self._rule, history, user.known, user.disliked)
            for user, history in zip(self.now(user_ids), histories, strict=True)
        ]
