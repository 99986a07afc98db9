"""Several values per row: lists, such as genres, and the words of texts, such as titles."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Self

import numpy as np

from tfrs_pipeline.features.categorical import Vocabulary, count_rows, lower_booleans
from tfrs_pipeline.features.feature import TableColumn
from tfrs_pipeline.features.raw import Column, has_booleans, padded, to_text_lists, to_texts
from tfrs_pipeline.libraries import ir, pa, tf
from tfrs_pipeline.messages import counted, printable

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
        codes = self.codes(lists.values)
        place = tf.where(codes > 0)[:, 0]
        rows = tf.gather(lists.value_rowids(), place)
        known = tf.RaggedTensor.from_value_rowids(
            tf.gather(codes, place), rows, lists.nrows(), validate=False
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
    names_elsewhere = ("list", "array", "set", "tags", "categories")
    column_types = {"array": "array<string>"}
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


def _check_texts(column: TableColumn, lists: ir.ArrayValue) -> None:
    """Refuses text with lists in brackets; notes it if no text has two values."""
    text = column.value.strip()
    is_list = text.re_search(r"^\[[^\]]*\]$")
    found = column.aggregate(
        num=(text != "").sum(),
        num_lists=is_list.sum(),
        is_parted=(lists.length() > 1).any(),
        example=column.value.max(),
        list_example=column.value.max(where=is_list),
    )
    num, num_lists, is_parted, *examples = found.values()
    shown, list_shown = (printable(repr(x)) for x in examples)
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
    """

    kind: ClassVar[str] = "text"
    column_types = {"string": "string"}
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
