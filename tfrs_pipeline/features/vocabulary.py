"""The values of a column: its words, how often each comes, and how many buckets hash them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import tensorflow as tf

from tfrs_pipeline.features.raw import BOOLEANS, Column, to_text_lists, to_texts

if TYPE_CHECKING:
    from tfrs_pipeline.features.kinds import FeatureKind

_ROWS_PER_CALL = 65_536
# Letters with their marks, digits and underscores make words, and apostrophes within them.
_LETTER = r"\p{L}\p{M}\p{N}_"
_BETWEEN_WORDS = rf"[^{_LETTER}]*[^{_LETTER}'][^{_LETTER}]*|^'+|'+$"
_VARIANTS = r"[\x{FE00}-\x{FE0F}]"  # Marks that choose how an emoji is drawn.
# Scripts without spaces between words: a character is one, with its marks, of which Unicode counts
# those of Katakana that lengthen or voice it among the letters.
_UNSPACED = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
    r"[\p{M}ーｰﾞﾟ]*"
)


def in_blocks(column: Column) -> Iterator[Column]:
    """Cuts a column, so that what is made of it at once stays small; an empty one is one block."""
    for start in range(0, max(len(column), 1), _ROWS_PER_CALL):
        yield column[start : start + _ROWS_PER_CALL]


def words_of(texts: tf.Tensor) -> tf.RaggedTensor:
    """Returns the lower-case words of texts [B], string [B, any].

    Of scripts without spaces, such as Chinese and Thai, each character is a word.
    """
    # These letters first: what is the lower case of an I depends on the server's locale.
    steps = (_VARIANTS, ""), (_UNSPACED, r" \0 "), (_BETWEEN_WORDS, " "), ("İ", "I")
    for pattern, by in steps:
        texts = tf.strings.regex_replace(texts, pattern, by)
    return tf.strings.split(tf.strings.lower(tf.strings.lower(texts), encoding="utf-8"))


def has_booleans(values: Collection[str]) -> bool:
    """Tells whether true or false is among values: then BOOLEANS are these (`lower_booleans`)."""
    return "true" in values or "false" in values


def lower_booleans(texts: tf.Tensor) -> tf.Tensor:
    """Writes BOOLEANS as `to_text` does: those that reach a graph as they stand in a table."""
    for word in ("true", "false"):
        spellings = "|".join(x for x in BOOLEANS if x.lower() == word)
        texts = tf.strings.regex_replace(texts, f"^({spellings})$", word)
    return texts


def count_values(kind: FeatureKind, column: Column) -> tuple[dict[str, int], int]:
    """Counts the rows of each value, and the values of the longest row."""
    counts, longest = [], 0
    for block in in_blocks(column):
        if kind == "text":
            words = words_of(tf.constant(to_texts(block).to_pylist(), tf.string, [len(block)]))
            values = pa.array(words.flat_values.numpy(), pa.binary()).cast(pa.string())
            lengths = words.row_lengths().numpy()
        elif kind == "multi_categorical":
            values, lengths = to_text_lists(block)
        else:
            values = to_texts(block)
            lengths = np.ones(len(values), np.int64)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        pairs = pa.table({"row": rows, "value": values}).group_by(["row", "value"]).aggregate([])
        counts.append(pairs.group_by("value").aggregate([("row", "count")]))
        longest = max(longest, int(lengths.max(initial=0)))
    total = pa.concat_tables(counts).group_by("value").aggregate([("row_count", "sum")])
    values, numbers = total["value"].to_pylist(), total["row_count_sum"].to_pylist()
    return {v: n for v, n in zip(values, numbers, strict=True) if v}, longest


def bucket_count(num_values: int, *, per_value: int, low: int, high: int) -> int:
    """Returns a power of two: the next above `per_value` * `num_values`, from `low` to `high`.

    Example:
        >>> bucket_count(100, per_value=2, low=16, high=2**20)
        256
    """
    wanted = 2 ** (per_value * num_values - 1).bit_length()
    return min(max(wanted, low), high)
