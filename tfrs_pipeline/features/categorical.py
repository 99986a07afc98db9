"""One value a row, of a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Self

from tfrs_pipeline.features.feature import ID_TYPES, Feature, TableColumn
from tfrs_pipeline.features.raw import WHOLE_FLOAT, Column, to_texts
from tfrs_pipeline.features.vocabulary import Vocabulary, count_rows

if TYPE_CHECKING:
    import ibis.expr.types as ir
    import tensorflow as tf


class Category(Feature):
    """An integer or a string a row, however it is encoded; 7 and "7" are one value."""

    column_types = ID_TYPES
    takes_whole_numbers = True

    @classmethod
    def read(cls, column: TableColumn) -> ir.Value:
        """Reads ids; booleans and fractions as text, written as in CSV."""
        value, dtype = column.value, column.value.type()
        if dtype.is_boolean():
            return value.cast("string")
        if dtype.is_floating() or dtype.is_decimal():
            is_fraction = value.try_cast("int64").cast("float64") != value.cast("float64")
            if column.aggregate(found=is_fraction.any())["found"]:
                number = value.cast("float64") if dtype.is_decimal() else value
                return number.cast("string").re_replace(WHOLE_FLOAT, r"\1").nullif("nan")
        return column.id()

    def storable(self, values: list[Any]) -> list[Any]:
        """Returns texts, None where missing."""
        return [text or None for text in to_texts(values).to_pylist()]


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
        from tfrs_pipeline.features import graph

        return self.codes(graph.cleaned(raw, self.vocabulary))
