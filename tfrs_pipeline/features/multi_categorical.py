"""Several values a row, such as genres."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tfrs_pipeline.features.feature import TableColumn
from tfrs_pipeline.features.raw import Column, has_booleans, padded, to_text_lists
from tfrs_pipeline.features.vocabulary import ValueLists
from tfrs_pipeline.messages import counted, printable

if TYPE_CHECKING:
    import ibis.expr.types as ir
    import tensorflow as tf


@dataclass(frozen=True)
class MultiCategorical(ValueLists):
    """Places of a list's values in the vocabulary. See `ValueLists` for the fields.

    Example:
        >>> genres = MultiCategorical.fit("genres", [["war", "drama"], ["war"]])
        >>> raw = genres.to_raw([["noir", "war"], None])
        >>> raw
        array([['noir', 'war'], ['', '']], dtype=object)
        >>> genres.encode(raw).numpy()[:, :2]
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
        if column.value.type().is_array():
            return column.value.cast("array<string>")
        if not column.value.type().is_string():
            raise column.wrong_type("a list or a string")
        stripped = column.value.split(column.list_separator).map(lambda part: part.strip())
        lists = stripped.filter(lambda part: part != "")
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
        """Returns [B, num_values] int32, the known ones first."""
        import tensorflow as tf

        from tfrs_pipeline.features import graph

        if has_booleans(self.vocabulary):
            raw = graph.lower_booleans(raw)
        return self.known_lists(tf.RaggedTensor.from_tensor(raw))

    def storable(self, values: list[Any]) -> list[Any]:
        """Returns lists, also of a single value."""
        return [[value] if isinstance(value, str) else value for value in values]

    @staticmethod
    def from_text(text: str) -> Any:
        """Splits values with commas between them."""
        return [part.strip() for part in text.split(",")]


def _check_texts(column: TableColumn, lists: ir.ArrayValue) -> None:
    """Refuses text with lists in brackets, and notes if no text has two values."""
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
            f"{column.place} holds lists written as text in {num_lists} of {column.num_rows} rows, "
            f"such as {list_shown}. Store them as lists (Parquet, Arrow), or write values without "
            f"brackets and quotes, separated by {column.list_separator!r} (list_separator).",
            "list_separator",
        )
    if num and not is_parted:
        column.notes.append(
            f"{column.place} has one value in each of {counted(num, 'row')}, such as {shown}, as "
            f"no row has a {column.list_separator!r}: if they hold several, set list_separator "
            "(--data.list_separator)"
        )
