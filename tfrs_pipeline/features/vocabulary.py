"""Features with a vocabulary, and lists of its values."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.raw import Column, in_blocks, to_texts
from tfrs_pipeline.messages import counted, kept_new_gone

if TYPE_CHECKING:
    import tensorflow as tf

MIN_LENGTH = 16


@dataclass(frozen=True)
class Vocabulary(Feature):
    """A feature whose values have codes by their place in a vocabulary, from 1."""

    vocabulary: tuple[str, ...] = ()

    @property
    def num_codes(self) -> int:
        """Size of the vocabulary."""
        return len(self.vocabulary)

    @property
    def known_values(self) -> tuple[str, ...]:
        """The vocabulary."""
        return self.vocabulary

    def codes(self, values: tf.Tensor) -> tf.Tensor:
        """Looks up values, [n] string: int32, 0 where unknown."""
        import tensorflow as tf

        if not self.vocabulary:
            return tf.zeros_like(values, tf.int32)
        return tf.cast(self._lookup(values), tf.int32)

    @functools.cached_property
    def _lookup(self) -> tf.keras.layers.StringLookup:
        import tensorflow as tf

        # What is unknown has the code of the empty string, which no vocabulary holds.
        vocabulary = np.array(self.vocabulary, object)
        return tf.keras.layers.StringLookup(vocabulary=vocabulary, oov_token="")

    @property
    def graph_resource(self) -> Any:
        """The lookup table."""
        return self._lookup.lookup_table if self.vocabulary else None

    def codes_of(self, there: Self) -> np.ndarray:
        """Returns the code there of each value here."""
        codes = {value: code for code, value in enumerate(there.vocabulary, 1)}
        return np.array([0, *(codes.get(value, 0) for value in self.vocabulary)], np.int64)

    def describe_change(self, there: Self) -> str:
        """Says how many values are kept, new and gone."""
        if not (self.vocabulary or there.vocabulary):
            return ""
        num_kept = int(np.count_nonzero(self.codes_of(there)))
        return kept_new_gone("values", num_kept, len(self.vocabulary), len(there.vocabulary))


@dataclass(frozen=True)
class ValueLists(Vocabulary):
    """A feature with any number of values a row, of which the first known ones count.

    Args:
        num_values: Number of known values that count.
        longest: Number of values in the column's longest row.
    """

    num_values: int = 1
    longest: int = 0

    what_counts: ClassVar[str] = "value"
    """What to call a known value in messages."""
    min_count: ClassVar[int] = 1
    """Values of fewer rows are unknown."""
    max_values: ClassVar[int]
    """The most known values of a row that count."""

    @staticmethod
    @abstractmethod
    def split(column: Column) -> tuple[Any, np.ndarray]:
        """Returns all values, an Arrow array of strings, and their number in each row."""

    @classmethod
    def fit(cls, name: str, column: Column, *, reference: datetime | None = None) -> Self:
        """Takes values of `min_count` rows; as many of a row count as the longest has.

        At least 16 count, because longer lists can come later, and at most `max_values`.
        """
        counts, longest = count_rows(column, cls.split)
        vocabulary = sorted(value for value, count in counts.items() if count >= cls.min_count)
        num_values = min(max(longest, MIN_LENGTH), cls.max_values)
        return cls(name, tuple(vocabulary), num_values, longest)

    def known_lists(self, lists: tf.RaggedTensor) -> tf.Tensor:
        """Encodes lists: [B, num_values] int32, the known values first, padded with 0."""
        import tensorflow as tf

        # Not padded before they are cut: one row may have very many values.
        codes = self.codes(lists.values)
        place = tf.where(codes > 0)[:, 0]
        rows = tf.gather(lists.value_rowids(), place)
        known = tf.RaggedTensor.from_value_rowids(
            tf.gather(codes, place), rows, lists.nrows(), validate=False
        )
        return known[:, : self.num_values].to_tensor(shape=[None, self.num_values])

    def describe(self, encoded: np.ndarray) -> Iterator[str]:
        """Says how many rows have no known value, and whether any was cut."""
        if num_without := int(np.count_nonzero(~encoded.any(axis=1))):
            yield f"{num_without:,} of {counted(len(encoded), 'row')} have no {self.what_counts}"
        if self.longest > self.num_values:
            yield f"of up to {self.longest:,} the first {self.num_values} count"


def count_rows(
    column: Column, split: Callable[[Column], tuple[Any, np.ndarray]] | None = None
) -> tuple[dict[str, int], int]:
    """Counts the rows of each value, and the values of the longest row.

    `split` makes a block of rows an Arrow array of all values and their number in each row; if
    None, every row is a value.
    """
    import pyarrow as pa

    counts, longest = [], 0
    for block in in_blocks(column):
        if split is None:
            values = to_texts(block)
            lengths = np.ones(len(values), np.int64)
        else:
            values, lengths = split(block)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        pairs = pa.table({"row": rows, "value": values}).group_by(["row", "value"]).aggregate([])
        counts.append(pairs.group_by("value").aggregate([("row", "count")]))
        longest = max(longest, int(lengths.max(initial=0)))
    total = pa.concat_tables(counts).group_by("value").aggregate([("row_count", "sum")])
    values, numbers = total["value"].to_pylist(), total["row_count_sum"].to_pylist()
    return {v: n for v, n in zip(values, numbers, strict=True) if v}, longest


def takes_whole_floats(vocabulary: Collection[str]) -> bool:
    """Returns whether 7.0, as a table with missing values writes 7, means the value 7."""
    return not any(value.endswith(".0") for value in vocabulary)
