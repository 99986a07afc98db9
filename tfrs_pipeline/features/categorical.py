"""Categories: one value per row; lists, such as genres; the words of texts, such as titles."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Self

import numpy as np

from tfrs_pipeline.features.feature import Feature, TableColumn
from tfrs_pipeline.features.raw import (
    BOOLEANS,
    WHOLE_FLOAT,
    Column,
    has_booleans,
    in_blocks,
    padded,
    to_text_lists,
    to_texts,
)
from tfrs_pipeline.libraries import ir, pa, tf
from tfrs_pipeline.messages import counted, printable

MIN_BUCKETS, MAX_BUCKETS = 16, 2**20


class Category(Feature):
    """An integer or a string per row, in any encoding; 7 and "7" are one value."""

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
        if dtype.is_string():
            _note_lists(column)
        return column.read("id")


@dataclass(frozen=True)
class Vocabulary(Feature):
    """A feature that encodes a value as its place in a vocabulary, from 1."""

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
        """Returns the code in `there` of each value here."""
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
    """A value's bucket by its hash (FarmHash), the same in every process.

    Example:
        >>> Hashed.fit("sku", ["a", "b"]).encode_column(["a", "b", "new", None])
        array([ 4,  7, 16,  0], dtype=int32)
    """

    num_buckets: int  # A power of two.

    kind: ClassVar[str] = "hashed"

    @classmethod
    def fit(cls, name: str, column: Column, *, reference: datetime | None = None) -> Self:
        """Takes the next power of two above twice the number of values, 2^20 at most.

        Below this limit, at most 4 in 10 values share a bucket with another.
        """
        # A power of two, so that a larger table of a later training splits buckets cleanly.
        wanted = 2 ** (2 * len(count_rows(column)[0]) - 1).bit_length()
        return cls(name, min(max(wanted, MIN_BUCKETS), MAX_BUCKETS))

    @property
    def num_codes(self) -> int:
        """Number of buckets."""
        return self.num_buckets

    def encoded(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B] int32 buckets from 1, 0 where missing."""
        # Keras keeps bucket 0 for the mask.
        # FarmHash is part of the graph, so a server needs no table.
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
    # Counted in Arrow by block, because a column of titles has millions of words.
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
        spellings = "|".join(spelling for spelling in BOOLEANS if spelling.lower() == word)
        texts = tf.strings.regex_replace(texts, f"^({spellings})$", word)
    return texts


MIN_LENGTH = 16

# Words consist of letters with their marks, digits, underscores, and apostrophes inside.
_LETTER = r"\p{L}\p{M}\p{N}_"
_BETWEEN_WORDS = rf"[^{_LETTER}]*[^{_LETTER}'][^{_LETTER}]*|^'+|'+$"
_VARIANTS = r"[\x{FE00}-\x{FE0F}]"  # Marks that choose how an emoji is drawn.
# In scripts without spaces, a character with its marks is a word. Katakana's marks for length and
# voicing are letters in Unicode, so they are listed here.
_UNSPACED = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
    r"[\p{M}ーｰﾞﾟ]*"
)


@dataclass(frozen=True)
class ValueLists(Vocabulary):
    """A feature with any number of values per row; only the first known ones count."""

    num_values: int = 1  # Number of known values that count.
    min_count: ClassVar[int] = 1  # Values in fewer rows are unknown.
    max_values: ClassVar[int]  # The most known values of a row that count.

    @staticmethod
    @abstractmethod
    def split(column: Column) -> tuple[Any, np.ndarray]:
        """Returns all values, an Arrow array of strings, and their number in each row."""

    @classmethod
    def fit(cls, name: str, column: Column, *, reference: datetime | None = None) -> Self:
        """Takes values in `min_count` rows or more; 16 to `max_values` values of a row count."""
        counts, longest = count_rows(column, cls.split)
        vocabulary = sorted(value for value, count in counts.items() if count >= cls.min_count)
        return cls(name, tuple(vocabulary), min(max(longest, MIN_LENGTH), cls.max_values))

    def known_lists(self, lists: tf.RaggedTensor) -> tf.Tensor:
        """Encodes lists: [B, num_values] int32, the known values first, padded with 0."""
        # Lists are cut before they are padded, because one row may have very many values.
        # Unknown values must not take the places of known ones.
        codes = self.codes(lists.values)
        position = tf.where(codes > 0)[:, 0]
        rows = tf.gather(lists.value_rowids(), position)
        known = tf.RaggedTensor.from_value_rowids(
            tf.gather(codes, position), rows, lists.nrows(), validate=False
        )
        return known[:, : self.num_values].to_tensor(shape=[None, self.num_values])


@dataclass(frozen=True)
class MultiCategorical(ValueLists):
    """Places of a list's values in the vocabulary. See `ValueLists` for the fields.

    Example:
        >>> genres = MultiCategorical.fit("genres", [["war", "drama"], ["war"]])
        >>> genres.encode_column([["noir", "war"], None])[:, :2]
        array([[2, 0],
               [0, 0]], dtype=int32)
    """

    kind: ClassVar[str] = "multi_categorical"
    holds_categories = True
    max_values = 16
    split = staticmethod(to_text_lists)

    @classmethod
    def read(cls, column: TableColumn) -> ir.Value:
        """Reads lists, or splits text; refuses text with lists in brackets."""
        dtype = column.value.type()
        parts = column.value
        if dtype.is_array():
            if dtype.value_type.is_nested():
                raise column.wrong_type("a list of texts or numbers")
            parts = parts.cast("array<string>")
        elif dtype.is_string():
            parts = parts.split(column.list_separator)
        else:
            raise column.wrong_type("a list or a string")
        lists = parts.map(lambda part: part.strip()).filter(lambda part: part != "")
        if dtype.is_string():
            _check_texts(column, lists)
        return lists

    @property
    def raw_shape(self) -> tuple[int | None, ...]:
        """A list of any length."""
        return (None,)

    def to_raw(self, column: Column) -> np.ndarray:
        """Returns [n, longest] object of str, padded with ""."""
        return padded(*to_text_lists(column))

    def encoded(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B, num_values] int32 codes, the known ones first."""
        if has_booleans(self.vocabulary):
            raw = lower_booleans(raw)
        return self.known_lists(tf.RaggedTensor.from_tensor(raw))

    @staticmethod
    def from_text(text: str) -> Any:
        """Splits values at commas."""
        return [part.strip() for part in text.split(",")]


def _note_lists(column: TableColumn) -> None:
    """Notes values with the separator of lists: they are read as one category, not as several."""
    is_list = column.value.contains(column.list_separator)
    lists = column.aggregate(num=is_list.sum(), example=column.value.max(where=is_list))
    if num := lists["num"]:
        column.notes.append(
            f"{column.place} holds {column.list_separator!r} in {counted(num, 'row')}, such as "
            f"{printable(repr(lists['example']))}: each is one value. To read it as several, make "
            "it multi_categorical"
        )


def _check_texts(column: TableColumn, lists: ir.ArrayValue) -> None:
    """Refuses text with lists in brackets; notes it if no text has two values."""
    text = column.value.strip()
    is_list = text.re_search(r"^\[[^\]]*\]$")
    totals = column.aggregate(
        num=(text != "").sum(),
        num_lists=is_list.sum(),
        is_parted=(lists.length() > 1).any(),
        example=column.value.max(),
        list_example=column.value.max(where=is_list),
    )
    num, num_lists, is_parted, *examples = totals.values()
    shown, list_shown = (printable(repr(example)) for example in examples)
    if num and 2 * num_lists > num:
        raise column.refusal(
            f"{column.place} holds lists written as text in {counted(num_lists, 'row')}, such as "
            f"{list_shown}. Store them as lists (Parquet, Arrow), or write values without brackets "
            f"and quotes, separated by {column.list_separator!r} (list_separator).",
            "list_separator",
        )
    if num and not is_parted:
        column.notes.append(
            f"{column.place} has one value in each of {counted(num, 'row')}, such as {shown}, as "
            f"no row has a {column.list_separator!r}: if they hold several, set list_separator "
            "(--data.list_separator)"
        )


@dataclass(frozen=True)
class Text(ValueLists):
    """Places of a text's lower-case words in the vocabulary. See `ValueLists` for the fields.

    In scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each
    character with its marks is a word.

    Example:
        >>> title = Text.fit("title", ["The Matrix", "Matrix Reloaded", "The end"])
        >>> title.vocabulary, title.encode_column(["the  MATRIX!"])[:, :3]
        (('matrix', 'the'), array([[2, 1, 0]], dtype=int32))
    """

    kind: ClassVar[str] = "text"
    min_count = 2  # Words in a single row are noise.
    max_values = 64

    @classmethod
    def read(cls, column: TableColumn) -> ir.Value:
        """Takes strings as they are."""
        if not column.value.type().is_string():
            raise column.wrong_type("a string")
        return column.value

    @staticmethod
    def split(column: Column) -> tuple[Any, np.ndarray]:
        """Returns all words, and their number in each row."""
        words = _words(tf.constant(to_texts(column).to_pylist(), tf.string, [len(column)]))
        values = pa.array(words.flat_values.numpy(), pa.binary()).cast(pa.string())
        return values, words.row_lengths().numpy()

    def encoded(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B, num_values] int32, the known words first."""
        return self.known_lists(_words(raw))


def _words(texts: tf.Tensor) -> tf.RaggedTensor:
    """Returns the lower-case words of texts [B], string [B, any]."""
    # İ is replaced first, because its lower case depends on the server's locale.
    steps = (_VARIANTS, ""), (_UNSPACED, r" \0 "), (_BETWEEN_WORDS, " "), ("İ", "I")
    for pattern, by in steps:
        texts = tf.strings.regex_replace(texts, pattern, by)
    return tf.strings.split(tf.strings.lower(tf.strings.lower(texts), encoding="utf-8"))
