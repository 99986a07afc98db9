"""What each user did until now: the history that a version holds, and the events since."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.model.tf_tables import as_ids, loaded_rows
from tfrs_pipeline.serving.journal import Journal

# Types of events whose items are excluded from answers, by the training's evaluation.exclude.
# Disliked items always are.
_EXCLUDED_TYPES: dict[str, set[str]] = {
    "clicked": {Stage.CLICKED},
    "seen": {Stage.CLICKED, Stage.EXPOSED},
    "none": set(),
}


class Recent(NamedTuple):
    """What a user did until now.

    Attributes:
        history: Item ids, oldest first, without disliked ones.
        times: Their times in seconds since 1970; NaN where unknown.
        excluded: Ids of items that are excluded from answers, the disliked ones included.
        disliked: Ids of items that the user disliked, before the end of the log or since.
    """

    history: list[Any]
    times: list[float]
    excluded: list[Any]
    disliked: list[Any]


class Activity:
    """The users with events, as a loaded version should know them.

    Args:
        journal: The recorded events.
        encoder: The version's `Encoder`, as it was saved, with the stored histories.
        manifest: The version's manifest.
        excludes_known: Whether answers leave out the items that the user clicked, in the training
            or since.
    """

    def __init__(
        self,
        journal: Journal,
        encoder: Any,
        manifest: Mapping[str, Any],
        *,
        excludes_known: bool = True,
    ) -> None:
        self.journal, self._users = journal, encoder._query_rows
        self._excludes_known = excludes_known
        self._ids = _content(encoder._candidate_ids)  # In row 0 is the empty id.
        self._histories, self._known = (
            [*map(_content, lists)] for lists in (encoder._histories, encoder._known)
        )
        # Not saved where nobody disliked anything.
        self._disliked = [*map(_content, getattr(encoder, "_disliked", None) or ())]
        times = getattr(encoder, "_history_times", None)  # Not saved where it is None.
        self._times = np.full(len(self._histories[0]), np.nan) if times is None else _content(times)
        # Events up to this time, and at it, are in the log that the version was trained on.
        until = manifest.get("histories_until", manifest["items_read"])
        self._until = round(1000 * datetime.fromisoformat(until).timestamp())
        exclude = manifest.get("config", {}).get("evaluation", {}).get("exclude", "clicked")
        # A model that retrieves what the training knew retrieves what was clicked since, too.
        self._excluded_types = _EXCLUDED_TYPES[exclude if excludes_known else "none"]

    def until_now(self, user_ids: Sequence[Any]) -> dict[int, Recent]:
        """Returns what users with events did, by their position among `user_ids`.

        Users without an event are left out: the stored history is all that they did.
        """
        if not (events_by_user := self.journal.of_users(user_ids)):
            return {}
        positions = [position for position, id_ in enumerate(user_ids) if id_ in events_by_user]
        active = [user_ids[position] for position in positions]
        dtype = tf.string if isinstance(active[0], str) else tf.int64
        rows = loaded_rows(self._users, active, dtype).tolist()
        recent = {}
        for position, row in zip(positions, rows, strict=True):
            events = events_by_user[user_ids[position]]
            disliked = self._items(self._disliked, row) if self._disliked else []
            disliked += [event.item_id for event in events if event.type == Stage.DISLIKED]
            offsets = self._histories[1]
            times = self._times[offsets[row] : offsets[row + 1]][::-1].tolist()
            # Stored histories are most recent first.
            clicks = [*zip(self._items(self._histories, row)[::-1], times, strict=True)]
            clicks += [
                # Whole seconds, as in training.
                (event.item_id, event.time // 1000)
                for event in events
                if event.type == Stage.CLICKED and event.time > self._until
            ]
            disliked = [*dict.fromkeys(disliked)]  # Each item once.
            if gone := {*disliked}:
                clicks = [click for click in clicks if click[0] not in gone]
            known = self._items(self._known, row) if self._excludes_known else []
            known += [event.item_id for event in events if event.type in self._excluded_types]
            recent[position] = Recent(
                [item_id for item_id, _ in clicks],
                [time for _, time in clicks],
                known + disliked,
                disliked,
            )
        return recent

    def _items(self, lists: Sequence[np.ndarray], row: int) -> list[Any]:
        """Returns the ids of a user's list, which is stored as rows and offsets."""
        rows, offsets = lists
        return as_ids(self._ids[rows[offsets[row] : offsets[row + 1]]].tolist())


def _content(variable: tf.Variable) -> np.ndarray:
    """Returns the values of a variable; numbers are not copied, since histories may be large."""
    value = variable.read_value()
    return value.numpy() if value.dtype == tf.string else np.asarray(memoryview(value))
