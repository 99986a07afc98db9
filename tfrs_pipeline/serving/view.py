"""What a search over candidates sees, while others change them."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.serving.index import Level
from tfrs_pipeline.serving.searcher import Searcher

_NEVER = np.iinfo(np.int64).max
# Arrays that grow reserve this factor, and this many rows more.
_GROWTH, _LEAST_ROOM = 1.25, 1024


@dataclass(frozen=True)
class View:
    """What a search sees: neither rows beyond `num_rows`, nor removals after `num_changes`."""

    corpus: Ids
    # By row from 1; place 0 is the empty slot. The ends of the arrays are reserved for new rows.
    ids: np.ndarray
    vectors: np.ndarray  # Without place 0: row r is at r - 1.
    codes: np.ndarray | None
    removed_by: np.ndarray | None  # Number of the change that did; None if none ever did.
    searcher: Searcher | None
    levels: tuple[Level, ...]
    num_rows: int
    num_removed: int = 0
    num_changes: int = 0
    # The rows after the corpus, by id. Later views share it, so it may hold rows beyond `num_rows`.
    new_rows: dict[Any, list[int]] = field(default_factory=dict)

    @property
    def num_candidates(self) -> int:
        """Number of rows that are not removed."""
        return self.num_rows - self.num_removed

    def rows_of(self, ids: Collection[Any]) -> np.ndarray:
        """Returns all rows that ids have or had: [any] int32, ascending."""
        rows = self.corpus.known_rows(ids)
        if not self.new_rows:
            return rows
        more = [row for id_ in set(ids) for row in self._new_rows_of(id_)]
        return np.union1d(rows, np.array(more, np.int32))

    def row_of(self, id_: Any) -> int:
        """Returns the row that an id has now, 0 if it is no candidate."""
        row = max(self._new_rows_of(id_), default=0) or int(self.corpus.rows([id_])[0])
        return row if row and not self.is_removed(np.array([row]))[0] else 0

    def _new_rows_of(self, id_: Any) -> list[int]:
        return [row for row in self.new_rows.get(id_, ()) if row <= self.num_rows]

    def is_removed(self, rows: np.ndarray) -> np.ndarray:
        """Returns which rows, [n], are removed: [n] bool."""
        if self.removed_by is None:
            return np.zeros(len(rows), bool)
        return self.removed_by[rows] <= self.num_changes


def with_room(view: View, num: int, width: int, *, removes: bool) -> View:
    """Makes room for `num` new rows with `width` codes each; copies arrays that have to grow."""
    capacity = len(view.ids) - 1
    if view.num_rows + num > capacity or not view.vectors.flags.writeable:
        capacity = round(_GROWTH * (view.num_rows + num)) + _LEAST_ROOM
    parts: dict[str, Any] = {}
    if removes and view.removed_by is None:
        parts["removed_by"] = np.full(capacity + 1, _NEVER)
    for name in ("ids", "vectors", "codes", "removed_by"):
        array: np.ndarray | None = getattr(view, name)
        if array is None:
            continue
        shape = [capacity + (name != "vectors"), *array.shape[1:]]
        if name == "codes":
            shape[1] = max(shape[1], width)
        if tuple(shape) != array.shape:
            fill = _NEVER if name == "removed_by" else "" if array.dtype == object else 0
            parts[name] = grown = np.full(shape, fill, array.dtype)
            grown[tuple(map(slice, array.shape))] = array
    return replace(view, **parts)
