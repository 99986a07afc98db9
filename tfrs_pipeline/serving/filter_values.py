"""The item filter over candidates in memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfrs_pipeline.features.raw import has_booleans, to_text, to_text_lists


class FilterValues:
    """The values by which requests may choose candidates, and how often each occurs.

    `values` have the codes 1, 2, ...; new values get the next ones. `codes` are those of all rows.
    """

    def __init__(self, values: Sequence[str], codes: np.ndarray) -> None:
        self.code_of = {value: code for code, value in enumerate(values, 1)}
        self._counts = np.bincount(codes.ravel(), minlength=len(values) + 1)

    def encode(self, column: Sequence[Any]) -> np.ndarray:
        """Returns the codes of new rows' values, [n, any] int32 padded with 0; learns new ones."""
        texts, lengths = to_text_lists(column)
        flat = np.array(
            [self.code_of.setdefault(x, len(self.code_of) + 1) for x in texts.to_pylist()], np.int32
        )
        rows = np.zeros((len(lengths), max(1, lengths.max(initial=0))), np.int32)
        rows[np.arange(rows.shape[1]) < lengths[:, np.newaxis]] = flat
        counts = np.bincount(rows.ravel(), minlength=len(self.code_of) + 1)
        counts[: len(self._counts)] += self._counts
        self._counts = counts
        return rows

    def choose(self, values: Iterable[Any], num_rows: int) -> "Chosen | None":
        """Chooses candidates with one of the values; None, which allows all, if there are none."""
        texts = [value for value in values if value not in ("", b"")]
        if not texts:
            return None
        counts, table = self._counts, np.zeros(len(self.code_of) + 1, bool)
        lower = has_booleans(self.code_of)
        for text in texts:
            table[self.code_of.get(to_text(text) if lower else text, 0)] = True
        table[0] = False  # Padding, and values that no item has.
        # This counts candidates with two of the values twice.
        share = counts[table[: len(counts)].nonzero()].sum() / max(1, num_rows)
        return Chosen(table, min(1.0, float(share)))


@dataclass(frozen=True)
class Chosen:
    """Which codes a query allows, [num_codes + 1] bool, and the rough share of their candidates."""

    table: np.ndarray
    share: float

    def has(self, codes: np.ndarray) -> np.ndarray:
        """Returns which rows' codes, [n, P], are chosen: [n] bool."""
        # A column at a time: all at once would take P times the memory.
        found = self.table[codes[:, 0]]
        for column in codes.T[1:]:
            found |= self.table[column]
        return found
