"""What each user did until now: the history that a version holds, and the events since."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfrs_pipeline.data.schema import Exclude, Stage
from tfrs_pipeline.export.encoder import SavedEncoder, history_arrays, join_lines
from tfrs_pipeline.model.tf_tables import as_ids
from tfrs_pipeline.retrieval import HISTORY_TIMESTAMPS
from tfrs_pipeline.search.exclusions import KNOWN_STAGES, left_out
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


class Activity:
    """The users with events, as a loaded version should know them.

    Args:
        folder: The model's folder, with the recorded events.
        encoder: What the version holds of its users.
        manifest: The version's manifest.
        rule: Which items a user knows, so that answers leave them out (`rule_of_version`).

    Attributes:
        journal: The recorded events.
        until: Milliseconds since 1970: the end of the log that the version was trained on. Clicks
            up to and at this time are in that log, so no history takes them from the journal.
    """

    def __init__(
        self, folder: Path, encoder: SavedEncoder, manifest: Mapping[str, Any], rule: Exclude
    ) -> None:
        self.journal = Journal(folder)
        self._encoder, self._rule = encoder, rule
        until = manifest.get("histories_until", manifest["items_read"])
        self.until = round(1000 * datetime.fromisoformat(until).timestamp())

    def until_now(self, user_ids: Sequence[Any]) -> dict[int, Recent]:
        """Returns what users with events did, by their position among `user_ids`.

        Users without an event are left out: the stored history is all that they did.
        """
        if not (events_by_user := self.journal.of_users(user_ids)):
            return {}
        positions = [position for position, id_ in enumerate(user_ids) if id_ in events_by_user]
        rows = self._encoder.user_rows([user_ids[position] for position in positions])
        # An earlier model of this name may have had item ids of the other type.
        items_are_text = self._encoder.items_are_text
        recent = {}
        for position, row in zip(positions, rows, strict=True):
            events = [
                event
                for event in events_by_user[user_ids[position]]
                if isinstance(event.item_id, str) == items_are_text
            ]
            disliked = self._encoder.disliked(row)
            disliked += [event.item_id for event in events if event.type == Stage.DISLIKED]
            clicks = self._encoder.history(row)
            clicks += [
                # Whole seconds, as in training.
                (event.item_id, event.time // 1000)
                for event in events
                if event.type == Stage.CLICKED and event.time > self.until
            ]
            gone = dict.fromkeys(disliked)  # Each item once.
            clicks = [click for click in clicks if click[0] not in gone]
            known = self._encoder.known(row)
            known += [event.item_id for event in events if event.type in KNOWN_STAGES[self._rule]]
            recent[position] = Recent(
                [item_id for item_id, _ in clicks],
                [time for _, time in clicks],
                known,
                [*gone],
            )
        return recent

    def embed(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Embeds users as the encoder's `embed_user` does, by what they did until now."""
        users = as_ids(arrays["user_id"].tolist())
        recent = self.until_now(users)
        stored = [line for line in range(len(users)) if line not in recent]
        parts: list[tuple[list[int], dict[str, Any]]] = []
        if stored or not users:  # By the history that the graph holds.
            some = {name: array[stored] for name, array in arrays.items()}
            part = self._encoder.embed("embed_user", some)
            # Absent where the model excludes neither known nor disliked items.
            part.setdefault("known_items", [[] for _ in stored])
            parts.append((stored, part))
        if recent:
            queries = [
                {"history": user.history, HISTORY_TIMESTAMPS: user.times}
                for user in recent.values()
            ]
            some = {name: array[[*recent]] for name, array in arrays.items()}
            some |= history_arrays(self._encoder.inputs("embed_query"), queries)
            part = self._encoder.embed("embed_query", some)
            part["is_known_user"][:] = True
            part["known_items"] = [
                left_out(self._rule, user.known, user.disliked) for user in recent.values()
            ]
            parts.append(([*recent], part))
        return join_lines(parts)
