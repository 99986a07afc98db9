"""The only map between ids and rows."""

import itertools
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

NO_ID = ("nan", "NaN", "None", "NaT", "<NA>", "null", "NULL")
"""How tables write a missing id as text."""
MAX_ID_CHARACTERS = 1000
"""Longest text that a service takes as an id."""


class Ids:
    """Distinct ids in order, from row 1 to row n. Row 0 is "unknown" and the empty slot everywhere.

    `values` are the [n] ids, int64 or object holding str: the id of row r is at r - 1. `empty_id`,
    -1 or "", is the reserved id of row 0. Raises a `ValueError` if an id is reserved, occurs twice,
    or is neither an integer nor a string, or if there are no ids.

    Example:
        >>> items = Ids(["b", "a"])
        >>> items.rows(["a", "zebra"])
        array([2, 0], dtype=int32)
    """

    def __init__(self, ids: Collection[Any] | np.ndarray) -> None:
        values = as_id_array(ids)
        if not len(values):
            raise ValueError("Needs at least one id. Received: none.")
        self.are_text = values.dtype != np.int64
        self.empty_id: int | str = "" if self.are_text else -1
        # The id of every row, including row 0.
        self._by_row = np.concatenate([np.array([self.empty_id], values.dtype), values])
        self.values = self._by_row[1:]
        if not self.are_text:
            order = np.argsort(values)
            self._sorted, self._sorted_rows = values[order], (order + 1).astype(np.int32)
        self._refuse_reserved_and_repeated()

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, values: Iterable[Any] | np.ndarray) -> np.ndarray:
        """Looks up the rows of ids: [num_values] int32 in their order, 0 where unknown."""
        values = values.ravel() if isinstance(values, np.ndarray) else list(values)
        if not self.are_text:
            array = np.asarray(values)
            # Sorted numbers take a fraction of a dictionary's memory, and are as fast for many ids.
            # An empty list becomes an array of floats.
            if array.dtype.kind == "i" or not array.size:
                positions = np.minimum(np.searchsorted(self._sorted, array), len(self) - 1)
                is_known = self._sorted[positions] == array
                return np.where(is_known, self._sorted_rows[positions], np.int32(0))
        # Strings, or values some of which are not ids at all.
        listed = values.tolist() if isinstance(values, np.ndarray) else values
        return np.fromiter(map(self._row_of.get, listed, itertools.repeat(0)), np.int32)

    def rows_by_list(self, lists: Sequence[Collection[Any]]) -> list[np.ndarray]:
        """Looks up the known rows of each list of ids, in their order: int32.

        All in one look-up, because one for each list takes ten times longer.
        """
        # An empty list may be a float array, which would turn all ids into floats.
        values = [self.values[:0], *(as_id_array(ids) for ids in lists if len(ids))]
        parts = np.split(
            self.rows(np.concatenate(values)), np.cumsum([len(ids) for ids in lists], dtype=int)
        )
        return [rows[rows > 0] for rows in parts[: len(lists)]]  # After the last, nothing is left.

    def known_rows(self, values: Iterable[Any] | np.ndarray) -> np.ndarray:
        """Looks up the distinct rows of the known ids: int32, ascending."""
        rows = np.unique(self.rows(values))
        return rows[rows > 0]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Looks up the ids of rows of any shape; a `ValueError` if one is out of range."""
        rows = np.asarray(rows)
        if rows.size and not 0 <= rows.min() <= rows.max() <= len(self):
            raise ValueError(
                f"Rows must lie in [0, {len(self)}]. Received: {rows.min()} to {rows.max()}."
            )
        return self._by_row[rows]

    @cached_property
    def _row_of(self) -> dict[Any, int]:
        return dict(zip(self.values.tolist(), range(1, len(self) + 1), strict=True))

    def _refuse_reserved_and_repeated(self) -> None:
        if np.any(self.values == self.empty_id):
            raise ValueError(
                f"Id {self.empty_id!r} is reserved for empty slots. Use another one instead."
            )
        num_distinct = len(self._row_of) if self.are_text else len(np.unique(self._sorted))
        if num_distinct < len(self):
            # A dict keeps the last of equal keys.
            listed = enumerate(self.values.tolist(), 1)
            first = next(id_ for row, id_ in listed if self._row_of[id_] != row)
            raise ValueError(
                f"{len(self) - num_distinct} ids occur more than once, first {first!r}. Each must "
                "be listed once."
            )


def parse_id(text: str, *, are_text: bool, of: str = "item") -> int | str:
    """Parses an id that is typed or stands in an address; a `ValueError` if it is none.

    An integer has ASCII digits alone: `int` also reads "4_2", "+42" and the digits of all scripts.

    Example:
        >>> parse_id("42", are_text=False), parse_id("42", are_text=True)
        (42, '42')
    """
    check_length(text)
    if are_text:
        return text
    if not re.fullmatch("-?[0-9]+", text):
        raise ValueError(f"This model's {of} ids are integers. Received: {text!r}")
    return int(text)


def check_length(id_: str) -> None:
    """Raises a `ValueError` if a text is too long for an id of a request."""
    if len(id_) > MAX_ID_CHARACTERS:
        raise ValueError(
            f"An id has {MAX_ID_CHARACTERS:,} characters at most. Received: {len(id_):,} of them, "
            f"{id_[:40]!r}..."
        )


def as_id_array(ids: Collection[Any] | np.ndarray) -> np.ndarray:
    """Converts ids to int64, or object holding str; a `ValueError` if they are neither."""
    array = ids if isinstance(ids, np.ndarray) else np.array(list(ids), dtype=object)
    if array.ndim != 1:
        raise ValueError(f"Ids must be one-dimensional. Received: `ids.shape` = {array.shape}.")
    if array.dtype.kind == "i":
        return array.astype(np.int64)
    values = array.tolist()
    types = set(map(type, values))
    if types and all(issubclass(kind, str) for kind in types):
        return np.array(values, dtype=object)
    if all(issubclass(kind, int | np.integer) and kind is not bool for kind in types):
        return np.array(values, dtype=np.int64)
    raise ValueError(
        "Ids must be all integers or all strings: cast them to one of the two. "
        f"Received: {', '.join(sorted(kind.__name__ for kind in types))}."
    )


def are_listed(rows: np.ndarray, lists: Iterable[np.ndarray], highest: int) -> np.ndarray:
    """Returns which rows, [num_lines, any], are in their line's list: bool of the same shape.

    Lists hold rows up to `highest`, in any order.
    """
    marks = np.zeros(rows.shape, bool)
    is_in_list = np.zeros(highest + 1, bool)  # Shared by all lines: lists are short, a corpus long.
    for line_marks, line_rows, listed in zip(marks, rows, lists, strict=True):
        is_in_list[listed] = True
        line_marks[:] = is_in_list[line_rows]
        is_in_list[listed] = False
    return marks
