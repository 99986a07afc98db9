"""Numbers, standardised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from tfrs_pipeline.features.feature import NUMBER_TYPES, Feature, TableColumn
from tfrs_pipeline.features.raw import Column, to_numbers

if TYPE_CHECKING:
    import ibis.expr.types as ir
    import tensorflow as tf


class Number(Feature):
    """A number a row, however it is encoded."""

    column_types = NUMBER_TYPES
    raw_dtype = "float64"
    how_typed = "a number: write one"
    example = "1.5"
    takes_whole_numbers = True

    @classmethod
    def read(cls, column: TableColumn) -> ir.Value:
        """Reads finite numbers."""
        return column.number()

    def to_raw(self, column: Column) -> np.ndarray:
        """Returns [n] float64, NaN where missing."""
        return to_numbers(self.name, column)

    @staticmethod
    def from_text(text: str) -> Any:
        """Converts a typed number."""
        return float(text)


@dataclass(frozen=True)
class Numeric(Number):
    """A number, less the mean, divided by the standard deviation.

    It is clipped to 10 deviations on either side, so that no absurd value drowns a tower. Keras'
    `Normalization` computes in float32, too coarse for counts above 16 million, and raises
    deviations below 1e-7 to that.

    Args:
        mean: Mean of the column.
        scale: Standard deviation of the column.
        spread: Length of the shortest interval that holds three in four values, in deviations.
    """

    mean: float = 0.0
    scale: float = 1.0
    spread: float = 0.0

    kind: ClassVar[str] = "numeric"
    names_elsewhere = ("number", "float", "double", "integer", "int", "real")
    is_embedded = False

    @classmethod
    def fit(cls, name: str, column: Column, *, reference: datetime | None = None) -> Self:
        """Computes mean and standard deviation."""
        numbers = to_numbers(name, column)
        mean, scale = moments(numbers)
        return cls(name, mean, scale, _spread(numbers) / scale)

    def encoded(self, raw: tf.Tensor) -> tf.Tensor:
        """Returns [B] float32, NaN where missing or infinite."""
        from tfrs_pipeline.features import graph

        return graph.where_finite(raw, graph.standardised(raw - self.mean, self.scale))

    def describe(self, encoded: np.ndarray) -> Iterator[str]:
        """Says if far values hide the differences between the others."""
        # Equal values, as most of a rare flag are, are well told from the others.
        if 0 < self.spread < 1e-3:
            yield (
                "three in four values are within a thousandth of a standard deviation of each "
                "other, beside far ones: bucketized tells them apart"
            )

    def describe_change(self, there: Self) -> str:
        """Says if the scale is another one."""
        return describe_move((there.mean, there.scale), (self.mean, self.scale))


def moments(numbers: np.ndarray) -> tuple[float, float]:
    """Returns mean and standard deviation of the finite numbers, 0 and 1 if there is none."""
    known = numbers[np.isfinite(numbers)]
    if len(known) == 0:
        return 0.0, 1.0
    size = float(np.abs(known).max()) or 1.0  # Squares of large numbers are infinite.
    # Rounding gives equal numbers a deviation just above 0, and every other one a huge value.
    scale = size * float((known / size).std()) if known.min() < known.max() else 1.0
    return size * float((known / size).mean()), scale or 1.0


def describe_move(there: tuple[float, float], here: tuple[float, float]) -> str:
    """Says if a mean moved by half a scale or more, or a scale to less than half or over twice."""
    (old_mean, old_scale), (mean, scale) = there, here
    if abs(mean - old_mean) <= old_scale / 2 and 0.5 <= scale / old_scale <= 2:
        return ""
    return (
        "read on another scale, which changes what was learned of it: mean "
        f"{old_mean:.4g} there, {mean:.4g} here; scale {old_scale:.4g} there, {scale:.4g} here"
    )


def _spread(numbers: np.ndarray) -> float:
    """Returns the length of the shortest interval that holds three in four finite numbers."""
    known = np.sort(numbers[np.isfinite(numbers)])
    if len(known) == 0:
        return 0.0
    num = len(known) - len(known) // 4
    with np.errstate(over="ignore"):
        return float((known[num - 1 :] - known[: len(known) - num + 1]).min())
