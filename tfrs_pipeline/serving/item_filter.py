"""The item filter: which candidates have one of the values that a request chooses."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features.categorical import lower_booleans
from tfrs_pipeline.features.raw import has_booleans, padded, to_text_lists
from tfrs_pipeline.model.graph import lookup, row_table, stored


class Allowed(NamedTuple):
    """Which candidates each query may find: those that have one of its values."""

    is_chosen: tf.Tensor  # [B, num_codes] bool; code 0 is no value.
    codes: tf.Tensor  # [num_candidates + 1, P] int32, the values of each row, padded with 0.
    share: tf.Tensor  # [B] float32, rough share of the candidates that may be found.

    def of_queries(self, lines: tf.Tensor) -> "Allowed":
        """Takes the queries with the numbers `lines`, [b]."""
        return Allowed(tf.gather(self.is_chosen, lines), self.codes, tf.gather(self.share, lines))

    def has(self, rows: tf.Tensor) -> tf.Tensor:
        """Returns which rows, [B, n], each query may find: [B, n] bool."""
        codes = tf.gather(self.codes, rows)
        return tf.reduce_any(tf.gather(self.is_chosen, codes, batch_dims=1), axis=2)

    def has_all(self) -> tf.Tensor:
        """Returns which candidates each query may find: [B, num_candidates] bool."""
        # One list position at a time: all at once would take P times the memory.
        places = tf.unstack(self.codes[1:], axis=1)
        is_allowed = tf.gather(self.is_chosen, places[0], axis=1)
        for place in places[1:]:
            is_allowed |= tf.gather(self.is_chosen, place, axis=1)
        return is_allowed


class ItemFilter(tf.Module):
    """Values by which a request may choose items; None and "" mean that an item has none."""

    def __init__(self, name: str, column: Sequence[Any]) -> None:
        super().__init__(name="item_filter")
        lists = padded(*to_text_lists(column)).tolist()
        rows = [[value for value in dict.fromkeys(values) if value] for values in lists]
        values = sorted({value for row in rows for value in row})
        self._column, self._values = name, tuple(values)
        code_of = {value: code for code, value in enumerate(values, 1)}
        codes = np.zeros((len(rows), max([1, *map(len, rows)])), np.int32)
        for line, row in zip(codes, rows, strict=True):
            line[: len(row)] = [code_of[value] for value in row]
        self._table = row_table(np.array(values, object))
        self._codes = stored(np.pad(codes, [[1, 0], [0, 0]]))
        shares = np.bincount(codes.ravel(), minlength=len(values) + 1) / max(1, len(rows))
        self._shares = tf.constant(np.where(np.arange(len(shares)), shares, 0), tf.float32)

    def describe(self) -> dict[str, Any]:
        """Returns the column's name and its distinct values, for the manifest."""
        return {"name": self._column, "values": list(self._values)}

    def choose(self, allowed: tf.Tensor) -> Allowed:
        """Finds candidates with one of the `allowed` values, [B, F]; an empty row allows all."""
        if has_booleans(self._values):
            allowed = lower_booleans(allowed)
        codes = lookup(self._table, allowed)
        num_codes = len(self._values) + 1
        is_chosen = tf.math.bincount(
            codes, minlength=num_codes, maxlength=num_codes, axis=-1, binary_output=True
        )
        # Code 0 is padding or an unknown value, which nobody chooses.
        is_chosen = (is_chosen > 0) & (tf.range(num_codes) > 0)
        # This counts candidates with two of the values twice.
        share = tf.reduce_sum(tf.where(is_chosen, self._shares, 0), axis=1)
        is_any = tf.reduce_all(allowed == "", axis=1)
        share = tf.where(is_any, 1.0, tf.minimum(share, 1))
        return Allowed(is_chosen | is_any[:, tf.newaxis], self._codes, share)
