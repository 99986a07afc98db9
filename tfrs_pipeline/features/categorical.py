"""Categories: one value per row; lists, such as genres; the words of texts, such as titles."""

from __future__ import annotations

import functools
import itertools
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable
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
from tfrs_pipeline.libraries import ir, pa, pc, tf
from tfrs_pipeline.messages import counted, printable


@dataclass(frozen=True)
class Vocabulary(Feature):
    """A feature that encodes a value as its place in a vocabulary, from 1."""

    vocabulary: tuple[str, ...] = ()

    @property
    def num_codes(self) -> int:
        """Size of the vocabulary."""
        return len(self.vocabulary)

    @functools.cached_property
    def codes(self) -> dict[str, int]:
        """Code of each value; booleans have that of their other spellings too."""
        codes = {value: code for code, value in enumerate(self.vocabulary, 1)}
        if has_booleans(codes):
            codes.update({spelling: codes.get(spelling.lower(), 0) for spelling in BOOLEANS})
        return codes

    def codes_in_graph(self, values: tf.Tensor) -> tf.Tensor:
        """Looks up values, [n] string: int32, 0 where unknown."""
        if not self.vocabulary:
            return tf.zeros_like(values, tf.int32)
        if has_booleans(self.vocabulary):
            values = lower_booleans_in_graph(values)
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
        return np.array([0, *(there.codes.get(value, 0) for value in self.vocabulary)], np.int64)


@dataclass(frozen=True)
class Categorical(Vocabulary):
    """The place of an integer or a string in the vocabulary; 7 and "7" are one value.

    Example:
        >>> Categorical("gender", ("F", "M")).encode_column(["M", None, "X"])
        array([2, 0, 0], dtype=int32)
    """

    kind: ClassVar[str] = "categorical"
    holds_categories = True
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

    @classmethod
    def fit(cls, name: str, column: Column, *, reference: datetime | None = None) -> Self:
        """Takes all values as the vocabulary."""
        return cls(name, tuple(sorted(count_rows(column)[0])))

    def encoded(self, raw: np.ndarray) -> np.ndarray:
        """Returns [B] int32."""
        return np.fromiter(map(self.codes.get, raw.tolist(), itertools.repeat(0)), np.int32)

    def encoded_in_graph(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B] int32."""
        return self.codes_in_graph(raw)


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


def lower_booleans_in_graph(texts: tf.Tensor) -> tf.Tensor:
    """Rewrites spellings such as True and FALSE in lower case, like `to_text`."""
    for word in ("true", "false"):
        spellings = "|".join(spelling for spelling in BOOLEANS if spelling.lower() == word)
        texts = tf.strings.regex_replace(texts, f"^({spellings})$", word)
    return texts


MIN_LENGTH = 16

# Words consist of letters with their marks, digits, underscores, and apostrophes inside.
# TensorFlow's tables of Unicode lack this block of Chinese characters, which Arrow's have.
_EXTENSION_I = r"\x{2EBF0}-\x{2EE5D}"
_LETTER = r"\p{L}\p{M}\p{N}_" + _EXTENSION_I
_BETWEEN_WORDS = rf"[^{_LETTER}]*[^{_LETTER}'][^{_LETTER}]*|^'+|'+$"
_VARIANT = r"\x{FE00}-\x{FE0F}"  # Marks that choose how an emoji is drawn.
# In scripts without spaces, a character with its marks is a word. Katakana's marks for length and
# voicing are letters in Unicode, so they are listed here.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}" + _EXTENSION_I
_MARK = r"\p{M}ーｰﾞﾟ"


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

    def known_lists(self, values: Iterable[str], lengths: np.ndarray) -> np.ndarray:
        """Encodes concatenated lists: [B, num_values] int32, the known values first, then 0."""
        codes = np.fromiter(map(self.codes.get, values, itertools.repeat(0)), np.int32)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        # Unknown values must not take the places of known ones.
        codes, rows = codes[codes > 0], rows[codes > 0]
        columns = np.arange(len(rows)) - np.searchsorted(rows, np.arange(len(lengths)))[rows]
        fits = columns < self.num_values
        lists = np.zeros((len(lengths), self.num_values), np.int32)
        lists[rows[fits], columns[fits]] = codes[fits]
        return lists

    def known_lists_in_graph(self, lists: tf.RaggedTensor) -> tf.Tensor:
        """Encodes lists: [B, num_values] int32, the known values first, padded with 0."""
        # Lists are cut before they are padded, because one row may have very many values.
        codes = self.codes_in_graph(lists.values)
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
            if dtype.value_type.is_floating():
                parts = parts.map(lambda part: part.re_replace(WHOLE_FLOAT, r"\1"))
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

    def encoded(self, raw: np.ndarray) -> np.ndarray:
        """Returns [B, num_values] int32 codes, the known ones first."""
        return self.known_lists(raw.ravel().tolist(), np.full(len(raw), raw.shape[1]))

    def encoded_in_graph(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B, num_values] int32 codes, the known ones first."""
        return self.known_lists_in_graph(tf.RaggedTensor.from_tensor(raw))

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
        words, lengths = _concatenated_words(to_texts(column).to_pylist())
        return pa.array(words, pa.string()), lengths

    def encoded(self, raw: np.ndarray) -> np.ndarray:
        """Returns [B, num_values] int32, the known words first."""
        return self.known_lists(*_concatenated_words(raw.tolist()))

    def encoded_in_graph(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B, num_values] int32, the known words first."""
        return self.known_lists_in_graph(_words_in_graph(raw))


def _concatenated_words(texts: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """Returns the words of all texts, and their number in each."""
    words = [*map(split_words, texts)]
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    return [*itertools.chain.from_iterable(words)], lengths


def split_words(text: str) -> list[str]:
    """Splits a text into its lower-case words.

    Example:
        >>> split_words("Rock'n'roll: 'LIVE' 手机")
        ["rock'n'roll", 'live', '手', '机']
    """
    # İ is replaced first, because its lower case would be two characters.
    text = text.replace("İ", "I").translate(_CHARACTERS)
    if not text.isascii():
        text = _MARKS.sub(lambda marks: f"{marks[1] or ' ' + marks[0]}\n", text)
        text = text.replace("\v", "").replace("\r", "")
    words = text.lower().split()
    return [word for part in words if (word := part.strip("'"))] if "'" in text else words


class _Characters(dict[int, str]):
    """What `split_words` replaces characters by, by code point; blocks are added when first met.

    Variants are dropped, and what is neither in a word nor an apostrophe becomes a space. A
    character that is a word by itself gets a space before it and a line feed behind it. A mark,
    which belongs to such a word if it follows one, gets a vertical tab before it; if it also is a
    word where it follows none, a carriage return.
    """

    def __missing__(self, point: int) -> str:
        block = range(point - point % _BLOCK, point - point % _BLOCK + _BLOCK)
        characters = [*map(chr, block)]
        # Python has no classes of scripts and marks. With those of RE2, which the graph calls too,
        # both split the same words.
        array = pa.array(characters)
        classes = (
            pc.match_substring_regex(array, f"[{pattern}]").to_pylist()
            for pattern in (_VARIANT, _UNSPACED, _MARK, f"{_LETTER}'")
        )
        for point_, character, is_variant, is_unspaced, is_mark, is_kept in zip(
            block, characters, *classes, strict=True
        ):
            if is_mark:
                character = ("\r" if is_unspaced else "\v") + character
            elif is_unspaced:
                character = f" {character}\n"
            self[point_] = "" if is_variant else character if is_kept else " "
        return self[point]


_BLOCK = 256
_CHARACTERS = _Characters()
_MARKS = re.compile(r"\n((?:[\v\r].)+)|\r.(?:[\v\r].)*")


def _words_in_graph(texts: tf.Tensor) -> tf.RaggedTensor:
    """Returns the lower-case words of texts [B], string [B, any]."""
    # İ is replaced first, because its lower case depends on the server's locale.
    steps = (
        (f"[{_VARIANT}]", ""),
        (f"[{_UNSPACED}][{_MARK}]*", r" \0 "),
        (_BETWEEN_WORDS, " "),
        ("İ", "I"),
    )
    for pattern, by in steps:
        texts = tf.strings.regex_replace(texts, pattern, by)
    return tf.strings.split(tf.strings.lower(tf.strings.lower(texts), encoding="utf-8"))
