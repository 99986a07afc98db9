"""What each user did until now: the history that a version holds, and the events since."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfrs_pipeline.data.schema import Exclude, Stage
from tfrs_pipeline.search.exclusions import KNOWN_STAGES, left_out, left_out_by_history
from tfrs_pipeline.search.queries import History
from tfrs_pipeline.service.stored import Stored
from tfrs_pipeline.service.user_events import Journal


class Recent(NamedTuple):
    """What a user did until now.

    Attributes:
        history: Item ids, oldest first, without disliked ones.
        times: Their times in seconds since 1970; NaN where unknown.
        known: Ids of items that the version holds as known, and of the events that make an item
            known by its rule; `left_out` decides.
        disliked: Ids of items that the user disliked, before the end of the log or since.
    """

    history: list[Any]
    times: list[float]
    known: list[Any]
    disliked: list[Any]


class UserState(NamedTuple):
    """A user as a query by user id needs it.

    Attributes:
        history: The items that training had, most recent first.
        left_out: Ids of items that no answer holds.
        is_known: Whether the training, or an event since, had the user.
    """

    history: History
    left_out: list[Any]
    is_known: bool


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
        until = manifest.get("histories_until", manifest["items_read"])
        self.until = round(1000 * datetime.fromisoformat(until).timestamp())

    @property
    def has_left_out(self) -> bool:
        """Whether the version itself holds items that answers to some user leave out."""
        return self._rule != "none" or self._stored.has_dislikes

    def states(self, user_ids: Sequence[Any]) -> list[UserState]:
        """Returns users as they are now."""
        stored, recent = self._stored, self.until_now(user_ids)
        states = []
        for position, row in enumerate(stored.user_rows(user_ids)):
            if (now := recent.get(position)) is None:
                known = [] if self._rule == "none" else stored.known(row)
                without = left_out(self._rule, known, stored.disliked(row))
                states.append(UserState(stored.history_rows(row), without, row > 0))
                continue
            rows = stored.items.rows(now.history)[::-1]
            times = np.array(now.times, np.float64)[::-1]
            history = History(rows[rows > 0], times[rows > 0] if stored.reads_times else None)
            without = left_out(self._rule, now.known, now.disliked)
            states.append(UserState(history, without, is_known=True))
        return states

    def until_now(self, user_ids: Sequence[Any]) -> dict[int, Recent]:
        """Returns what users with events did, by their position among `user_ids`.

        Users without an event are left out: the stored history is all that they did.
        """
        if self.journal is None or not (events_by_user := self.journal.of_users(user_ids)):
            return {}
        positions = [position for position, id_ in enumerate(user_ids) if id_ in events_by_user]
        rows = self._stored.user_rows([user_ids[position] for position in positions])
        # An earlier model of this name may have had item ids of the other type.
        items_are_text = self._stored.items.are_text
        recent = {}
        for position, row in zip(positions, rows, strict=True):
            events = [
                event
                for event in events_by_user[user_ids[position]]
                if isinstance(event.item_id, str) == items_are_text
            ]
            disliked = self._stored.disliked(row)
            disliked += [event.item_id for event in events if event.type == Stage.DISLIKED]
            clicks = self._stored.history(row)
            clicks += [
                # Whole seconds, as in training.
                (event.item_id, event.time // 1000)
                for event in events
                if event.type == Stage.CLICKED and event.time > self.until
            ]
            gone = dict.fromkeys(disliked)  # Each item once.
            clicks = [click for click in clicks if click[0] not in gone]
            known = self._stored.known(row)
            known += [event.item_id for event in events if event.type in KNOWN_STAGES[self._rule]]
            recent[position] = Recent(
                [item_id for item_id, _ in clicks],
                [time for _, time in clicks],
                known,
                [*gone],
            )
        return recent

    def history(self, user_id: Any) -> list[Any]:
        """Returns the history of a user until now, most recent first; [] for an unknown user."""
        if now := self.until_now([user_id]):
            return now[0].history[::-1]
        (row,) = self._stored.user_rows([user_id])
        return [item_id for item_id, _ in self._stored.history(row)][::-1]

    def disliked(self, user_ids: Sequence[Any]) -> list[list[Any]]:
        """Returns what each user disliked until now, in the training's log and in service."""
        return [disliked for _, disliked in self._known_and_disliked(user_ids)]

    def left_out_by_history(
        self, user_ids: Sequence[Any], histories: Sequence[Sequence[Any]]
    ) -> list[list[Any]]:
        """Returns what answers by a history have to `exclude`, as answers by user id do themselves.

        For each user this is what they disliked and, unless the rule is "none", the history; by the
        rule "seen", also what they have seen. A user whom the training did not have may have seen
        or disliked items in service.
        """
        pairs = zip(histories, self._known_and_disliked(user_ids), strict=True)
        return [left_out_by_history(self._rule, history, *lists) for history, lists in pairs]

    def _known_and_disliked(self, user_ids: Sequence[Any]) -> list[tuple[list[Any], list[Any]]]:
        recent = self.until_now(user_ids)
        return [
            (recent[line].known, recent[line].disliked)
            if line in recent
            else (self._stored.known(row), self._stored.disliked(row))
            for line, row in enumerate(self._stored.user_rows(user_ids))
        ]
