"""What each user did until now: the history that a version holds, and the events since."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.model.tf_tables import loaded_rows
from tfrs_pipeline.serving.journal import DISLIKED, Journal
from tfrs_pipeline.serving.signatures import as_ids

# Types of events whose items are excluded from answers, by the training's evaluation.exclude.
_EXCLUDED_TYPES = {
    "clicked": {Stage.CLICKED, DISLIKED},
    "seen": {Stage.CLICKED, Stage.EXPOSED, DISLIKED},
    "none": {DISLIKED},
}


class Recent(NamedTuple):
    """What a user did until now.

    Attributes:
        history: Item ids, oldest first.
        times: Their times in seconds since 1970; NaN where unknown.
        excluded: Ids of items that are excluded from answers.
    """

    history: list[Any]
    times: list[float]
    excluded: list[Any]


class Activity:
    """The users with events, as a loaded version should know them.

    Args:
        journal: The recorded events.
        encoder: The version's `Encoder`, as it was saved, with the stored histories.
        manifest: The version's manifest.
        excludes_known: Whether answers leave out the items that the training knew of the user.
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
        (self._rows, self._starts), (self._known, self._known_starts) = (
            [*map(_content, lists)] for lists in (encoder._histories, encoder._known)
        )
        times = getattr(encoder, "_history_times", None)  # Not saved where it is None.
        self._times = np.full(len(self._rows), np.nan) if times is None else _content(times)
        # Events up to this time, and at it, are in the log that the version was trained on.
        until = manifest.get("histories_until", manifest["items_read"])
        self._until = round(1000 * datetime.fromisoformat(until).timestamp())
        exclude = manifest.get("config", {}).get("evaluation", {}).get("exclude", "clicked")
        self._excluded_types = _EXCLUDED_TYPES[exclude]

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
            clicks = [
                event
                for event in events
                if event.type == Stage.CLICKED and event.time > self._until
            ]
            stored = slice(self._starts[row], self._starts[row + 1])
            known = self._known[self._known_starts[row] : self._known_starts[row + 1]]
            known = known if self._excludes_known else known[:0]
            recent[position] = Recent(
                # Stored histories are most recent first.
                as_ids(self._ids[self._rows[stored][::-1]].tolist())
                + [click.item_id for click in clicks],
                # Whole seconds, as in training.
                self._times[stored][::-1].tolist() + [click.time // 1000 for click in clicks],
                as_ids(self._ids[known].tolist())
                + [event.item_id for event in events if event.type in self._excluded_types],
            )
        return recent


def _content(variable: tf.Variable) -> np.ndarray:
    """Returns the values of a variable; numbers are not copied, since histories may be large."""
    value = variable.read_value()
    return value.numpy() if value.dtype == tf.string else np.asarray(memoryview(value))
