"""One value per row: from a vocabulary, or one of very many."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Self

import numpy as np

from tfrs_pipeline.features.feature import ID_TYPES, Feature, TableColumn
from tfrs_pipeline.features.raw import (
    BOOLEANS,
    WHOLE_FLOAT,
    Column,
    has_booleans,
    in_blocks,
    to_text_lists,
)
from tfrs_pipeline.libraries import ir, pa, tf

MIN_BUCKETS, MAX_BUCKETS = 16, 2**20


class Category(Feature):
    """An integer or a string per row, in any encoding; 7 and "7" are one value."""

    column_types = ID_TYPES
    takes_whole_numbers = True

    @classmethod
    def read(cls, column: TableColumn) -> ir.Value:
        """Reads ids; booleans and fractions become text, written as in CSV."""
        value, dtype = column.value, column.value.type()
        if dtype.is_boolean():
            return value.cast("string")
        if dtype.is_floating() or dtype.is_decimal():
            is_fraction = value.try_cast("int64").cast("float64") != value.cast("float64")
            if column.aggregate(found=is_fraction.any())["found"]:
                number = value.cast("float64") if dtype.is_decimal() else value
                return number.cast("string").re_replace(WHOLE_FLOAT, r"\1").nullif("nan")
        return column.read("id")


@dataclass(frozen=True)
class Vocabulary(Feature):
    """A feature whose values' codes are their places in a vocabulary, from 1."""

    vocabulary: tuple[str, ...] = ()

    @property
    def num_codes(self) -> int:
        """Size of the vocabulary."""
        return len(self.vocabulary)

    def codes(self, values: tf.Tensor) -> tf.Tensor:
        """Looks up values, [n] string: int32, 0 where unknown."""
        if not self.vocabulary:
            return tf.zeros_like(values, tf.int32)
        return tf.cast(self._lookup(values), tf.int32)

    @functools.cached_property
    def _lookup(self) -> tf.keras.layers.StringLookup:
        # Unknown values get the code of the empty string, which no vocabulary holds.
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


@dataclass(frozen=True)
class Categorical(Category, Vocabulary):
    """A value's place in the vocabulary.

    Example:
        >>> Categorical("gender", ("F", "M")).encode_column(["M", None, "X"])
        array([2, 0, 0], dtype=int32)
    """

    kind: ClassVar[str] = "categorical"
    names_elsewhere = ("category", "string", "str", "object", "enum", "id", "boolean", "bool")
    holds_categories = True

    @classmethod
    def fit(cls, name: str, column: Column, *, reference: datetime | None = None) -> Self:
        """Takes all values as the vocabulary."""
        return cls(name, tuple(sorted(count_rows(column)[0])))

    def encoded(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B] int32."""
        return self.codes(cleaned(raw, self.vocabulary))


@dataclass(frozen=True)
class Hashed(Category):
    """A value's bucket by its hash (FarmHash), the same in every process."""

    num_buckets: int  # A power of two.

    kind: ClassVar[str] = "hashed"

    @classmethod
    def fit(cls, name: str, column: Column, *, reference: datetime | None = None) -> Self:
        """Takes the next power of two above twice the number of values, 2^20 at most.

        Below this limit, at most 4 in 10 values share a bucket with another.
        """
        wanted = 2 ** (2 * len(count_rows(column)[0]) - 1).bit_length()
        return cls(name, min(max(wanted, MIN_BUCKETS), MAX_BUCKETS))

    @property
    def num_codes(self) -> int:
        """Number of buckets."""
        return self.num_buckets

    def encoded(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B] int32 buckets from 1, 0 where missing."""
        # Keras keeps bucket 0 for the mask.
        hashing = tf.keras.layers.Hashing(self.num_buckets + 1, mask_value="", dtype="int32")
        return hashing(cleaned(raw))

    def codes_of(self, there: Self) -> np.ndarray:
        """Returns, for each bucket here, the bucket there that contains it or is part of it."""
        return np.concatenate([[0], 1 + np.arange(self.num_buckets) % there.num_buckets])


def count_rows(
    column: Column, split: Callable[[Column], tuple[Any, np.ndarray]] = to_text_lists
) -> tuple[dict[str, int], int]:
    """Counts the rows of each value, and the values of the longest row.

    `split` turns a block of rows into an Arrow array of all values, and their number in each row.
    """
    counts, longest = [], 0
    for block in in_blocks(column):
        values, lengths = split(block)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        pairs = pa.table({"row": rows, "value": values}).group_by(["row", "value"]).aggregate([])
        counts.append(pairs.group_by("value").aggregate([("row", "count")]))
        longest = max(longest, int(lengths.max(initial=0)))
    total = pa.concat_tables(counts).group_by("value").aggregate([("row_count", "sum")])
    values, numbers = total["value"].to_pylist(), total["row_count_sum"].to_pylist()
    return {v: n for v, n in zip(values, numbers, strict=True) if v}, longest


def cleaned(texts: tf.Tensor, vocabulary: Collection[str] = ()) -> tf.Tensor:
    """Rewrites spaces, 7.0 and True as a log does, unless the vocabulary distinguishes them."""
    if all(value == value.strip() for value in vocabulary):
        texts = tf.strings.strip(texts)
    # Tables write 7 as 7.0 in a column with missing values.
    if not any(value.endswith(".0") for value in vocabulary):
        texts = tf.strings.regex_replace(texts, r"^(-?[0-9]+)\.0$", r"\1")
    return lower_booleans(texts) if not vocabulary or has_booleans(vocabulary) else texts


def lower_booleans(texts: tf.Tensor) -> tf.Tensor:
    """Rewrites spellings such as True and FALSE in lower case, like `to_text`."""
    for word in ("true", "false"):
        spellings = "|".join(x for x in BOOLEANS if x.lower() == word)
        texts = tf.strings.regex_replace(texts, f"^({spellings})$", word)
    return texts
