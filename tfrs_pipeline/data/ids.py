"""Raw candidate ids and their row numbers, translated both ways."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np


class CandidateIds:
    """The ids of a corpus in its order, which breaks ties; a row is a place in that order, from 0.

    There is no row for "unknown" here: -1 stands for it, and for an empty slot.

    Args:
        ids: [num_candidates] distinct integers or strings. -1 and "" are reserved for empty slots.

    Attributes:
        ids: [num_candidates] int64, or object holding str.
        empty_id: -1 or "", by the type of `ids`.

    Raises:
        ValueError: If an id is reserved, occurs twice, or is neither an integer nor a string, or if
            there are none.

    Example:
        >>> corpus = CandidateIds(["b", "a"])
        >>> corpus.rows(["a", "zebra"])
        array([ 1, -1], dtype=int32)
        >>> corpus.take(np.array([[1, -1]]))
        array([['a', '']], dtype=object)
    """

    def __init__(self, ids: Collection[Any] | np.ndarray) -> None:
        self.ids = as_id_array(ids)
        if not len(self.ids):
            raise ValueError("A corpus needs at least one candidate. Received: no candidate ids.")
        self.empty_id: int | str = -1 if self.ids.dtype == np.int64 else ""
        self._row_of: dict[Any, int] = {id_: row for row, id_ in enumerate(self.ids.tolist())}
        if self.empty_id in self._row_of:
            raise ValueError(
                f"Candidate id {self.empty_id!r} (row {self._row_of[self.empty_id]}) is reserved "
                "for empty slots. Give that candidate another id."
            )
        if len(self._row_of) < len(self.ids):
            row = next(i for i, id_ in enumerate(self.ids.tolist()) if self._row_of[id_] != i)
            raise ValueError(
                f"{len(self.ids) - len(self._row_of)} candidate ids occur more than once, first "
                f"{self.ids.tolist()[row]!r}. A corpus lists each candidate once."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: Iterable[Any] | np.ndarray) -> np.ndarray:
        """Looks up the rows of ids, in their order: [num_ids] int32, -1 where unknown."""
        values = ids.ravel().tolist() if isinstance(ids, np.ndarray) else ids
        row_of = self._row_of
        return np.fromiter((row_of.get(id_, -1) for id_ in values), np.int32)

    def known_rows(self, ids: Iterable[Any] | np.ndarray) -> np.ndarray:
        """Looks up ids, leaving out unknown ones and repeats: int32 rows, ascending."""
        rows = np.unique(self.rows(ids))
        return rows[rows >= 0]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Looks up the ids of rows of any shape; -1 gives the empty id."""
        return np.where(rows >= 0, self.ids[rows], np.array(self.empty_id, self.ids.dtype))


def as_id_array(ids: Collection[Any] | np.ndarray) -> np.ndarray:
    """Turns ids into the two forms used throughout: int64, or object holding str.

    Raises:
        ValueError: If the ids are neither all integers nor all strings, or not one-dimensional.
    """
    array = ids if isinstance(ids, np.ndarray) else np.array(list(ids), dtype=object)
    if array.ndim != 1:
        raise ValueError(f"Ids must be one-dimensional. Received: `ids.shape` = {array.shape}.")
    if array.dtype.kind == "i":
        return array.astype(np.int64)
    values = array.tolist()
    if all(isinstance(id_, str) for id_ in values) and values:
        return np.array(values, dtype=object)
    if all(isinstance(id_, int | np.integer) and not isinstance(id_, bool) for id_ in values):
        return np.array(values, dtype=np.int64)
    kinds = sorted({type(id_).__name__ for id_ in values})
    raise ValueError(
        "Ids must be all integers or all strings: cast them to one of the two. "
        f"Received: {', '.join(kinds)}."
    )
