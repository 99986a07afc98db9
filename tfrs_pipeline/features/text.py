"""Texts, such as titles."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from tfrs_pipeline.features.feature import TableColumn
from tfrs_pipeline.features.raw import Column, to_texts
from tfrs_pipeline.features.vocabulary import ValueLists, count_rows, list_length

if TYPE_CHECKING:
    import ibis.expr.types as ir
    import tensorflow as tf

MAX_WORDS = 64


@dataclass(frozen=True)
class Text(ValueLists):
    """Places of a text's lower-case words in the vocabulary. See `ValueLists` for the fields.

    Words are runs of letters, their marks, digits, underscores, and apostrophes within. In scripts
    without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character, with
    its marks, is a word.
    """

    kind: ClassVar[str] = "text"
    column_types = {"string": "string"}
    what_counts = "word that two rows share"

    @classmethod
    def read(cls, column: TableColumn) -> ir.Value:
        """Takes strings as they are."""
        if not column.value.type().is_string():
            raise column.wrong_type("a string")
        return column.value

    @classmethod
    def fit(
        cls,
        name: str,
        column: Column,
        *,
        reference: datetime | None = None,
        min_count: int = 2,
        max_values: int = MAX_WORDS,
    ) -> Self:
        """Takes words of `min_count` rows as the vocabulary; up to `max_values` of a row count."""
        counts, longest = count_rows(column, _words)
        words = tuple(sorted(word for word, count in counts.items() if count >= min_count))
        return cls(name, words, list_length(longest, max_values), longest)

    def encoded(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B, num_values] int32, the known words first."""
        from tfrs_pipeline.features import graph

        return self.known_lists(graph.words_of(raw))


def _words(texts: Column) -> tuple[Any, np.ndarray]:
    import pyarrow as pa
    import tensorflow as tf

    from tfrs_pipeline.features import graph

    words = graph.words_of(tf.constant(to_texts(texts).to_pylist(), tf.string, [len(texts)]))
    values = pa.array(words.flat_values.numpy(), pa.binary()).cast(pa.string())
    return values, words.row_lengths().numpy()
