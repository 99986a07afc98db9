"""Texts, such as titles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tfrs_pipeline.features.feature import TableColumn
from tfrs_pipeline.features.raw import Column, to_texts
from tfrs_pipeline.features.vocabulary import ValueLists

if TYPE_CHECKING:
    import ibis.expr.types as ir
    import tensorflow as tf


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
    min_count = 2  # Words of a single row are noise.
    max_values = 64

    @classmethod
    def read(cls, column: TableColumn) -> ir.Value:
        """Takes strings as they are."""
        if not column.value.type().is_string():
            raise column.wrong_type("a string")
        return column.value

    @staticmethod
    def split(column: Column) -> tuple[Any, np.ndarray]:
        """Returns all words, an Arrow array, and their number in each row."""
        import pyarrow as pa
        import tensorflow as tf

        from tfrs_pipeline.features import graph

        texts = tf.constant(to_texts(column).to_pylist(), tf.string, [len(column)])
        words = graph.words_of(texts)
        values = pa.array(words.flat_values.numpy(), pa.binary()).cast(pa.string())
        return values, words.row_lengths().numpy()

    def encoded(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B, num_values] int32, the known words first."""
        from tfrs_pipeline.features import graph

        return self.known_lists(graph.words_of(raw))
