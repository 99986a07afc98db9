"""The item graph of a version, moved by the clicks recorded since."""

import time
from collections import defaultdict

import numpy as np

from tfrs_pipeline.answers.users import Users
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.search.item_graph import KINDS, ItemGraph

# A look at the events may take one part in this many of a process's time.
_SHARE = 20
_USERS_PER_READ = 1000


class LiveGraph(ItemGraph):
    """What people took near each item until now, for items that the training had.

    A click counts from the next `catch_up` on. Two things wait until the version is loaded again:
    the clicks of a deleted user are taken back, and a click that arrived after a later one of its
    user counts before that one. A graph of live clicks keeps all neighbours.
    """

    def __init__(self, graph: ItemGraph, users: Users, items: Ids) -> None:
        super().__init__(graph.kind, graph.neighbours, graph.counts, graph.totals.copy())
        self._users, self._items, self._nearness = users, items, KINDS[graph.kind]
        # Neighbours and counts of the items that have clicks since the training.
        self._moved: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._arrival, self._next_look = 0, 0.0

    def counts_of(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows of an item's neighbours, [any] int32, and their counts, float32."""
        moved = self._moved.get(row)
        return super().counts_of(row) if moved is None else moved

    def catch_up(self) -> None:
        """Counts the clicks that were recorded since the last look."""
        begun = time.monotonic()
        if self._users.journal is None or begun < self._next_look:
            return
        clicks, arrival = self._users.journal.clicks_after(self._users.until, self._arrival)
        # A model of this name may have had user ids of the other type.
        are_text = self._users.are_text
        ids = [user_id for user_id in clicks if isinstance(user_id, str) == are_text]
        for start in range(0, len(ids), _USERS_PER_READ):
            users = ids[start : start + _USERS_PER_READ]
            near: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
            for user_id, user in zip(users, self._users.now(users), strict=True):
                rows = self._items.rows(user.history).tolist()
                seconds = np.nan_to_num(user.click_times).astype(int).tolist()
                keys, new = [*zip(user.history, seconds, strict=True)], clicks[user_id]
                for place in reversed(range(len(keys))):  # Of equal keys, the last ones are new.
                    if new[keys[place]]:
                        new[keys[place]] -= 1
                        self._count(rows, place, near)
            for row, counts in near.items():
                self._move(row, counts)
        self._arrival = arrival
        ended = time.monotonic()
        self._next_look = ended + _SHARE * (ended - begun)

    def _count(self, rows: list[int], place: int, near: dict[int, dict[int, float]]) -> None:
        """Counts the click at a place of a history, oldest first, after those before it."""
        later = rows[place]
        for steps, earlier in enumerate(reversed(rows[:place]), 1):
            if steps > self._nearness.window:
                break
            if earlier and later and earlier != later:
                near[earlier][later] += 1 / steps
                if not self._nearness.is_directed:
                    near[later][earlier] += 1 / steps

    def _move(self, row: int, more: dict[int, float]) -> None:
        rows, counts = self.counts_of(row)
        every = np.concatenate([rows, np.fromiter(more, np.int32, len(more))])
        distinct, slots = np.unique(every, return_inverse=True)
        numbers = np.concatenate([counts, np.fromiter(more.values(), np.float32, len(more))])
        # One assignment, since others may read meanwhile.
        self._moved[row] = distinct, np.bincount(slots, numbers).astype(np.float32)
        self.totals[row] += sum(more.values())
