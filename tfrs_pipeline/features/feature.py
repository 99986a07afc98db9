"""The interface of every kind of feature."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np

from tfrs_pipeline.features.raw import Column, in_blocks, to_texts
from tfrs_pipeline.libraries import ir, tf


class Spec(NamedTuple):
    """Shape and dtype of an array of raw values, and its name in a signature."""

    shape: tuple[int | None, ...]  # None is any size.
    dtype: str  # string, int64, int32, float64, float32 or bool; NumPy holds strings as objects.
    name: str = ""


@dataclass(frozen=True)
class TableColumn:
    """A column of a raw table (CSV, Parquet, Arrow), as `data` passes it to a kind."""

    place: str  # Table and name of the column, to start messages with.
    value: ir.Value  # The column as it came.
    list_separator: str  # Between the values of lists that are stored as text.
    # Reads ids (int64 if all are integers, otherwise string), finite float64 numbers, or UTC times.
    read: Callable[[Literal["id", "number", "time"]], ir.Value]
    aggregate: Callable[..., Mapping[str, Any]]  # Computes aggregates, by keyword, over the rows.
    fault: Callable[..., None]  # Takes (condition, problem, remedy=, setting=); marks bad values.
    refusal: Callable[..., Exception]  # Takes (message, setting); makes an unusable column's error.
    wrong_type: Callable[[str], Exception]  # Takes the wanted type; makes the error for another.
    notes: list[str]  # Lines for the user.


@dataclass(frozen=True)
class Feature(ABC):
    """A column and its encoding. Each kind is a frozen dataclass with its own fields, in `KINDS`.

    A value takes three forms. `read` gives the column its type in a log; `to_raw` turns that into
    an array, with "" or NaN where the value is missing; `encoded` turns the array into what the
    layer embeds. Only a SavedModel encodes tensors: `encoded_in_graph` returns the same values.
    """

    name: str  # Of the column.
    is_from_timestamp: bool = field(default=False, kw_only=True)  # The request's hour or weekday.

    kind: ClassVar[str]  # Name of the kind in settings.
    raw_dtype: ClassVar[str] = "string"  # That of a `Spec`: string, float32 or float64.
    example: ClassVar[str] = ""  # A typed value, for error messages and the served page.
    holds_categories: ClassVar[bool] = False  # A refresh counts the unknown ones.
    takes_whole_numbers: ClassVar[bool] = False  # Whether the hour can be of this kind.
    is_embedded: ClassVar[bool] = True  # Whether the layer maps a row to `feature_dim` numbers.
    is_time: ClassVar[bool] = False  # Whether raw values are seconds since 1970.
    vocabulary = tuple[str, ...]()  # The values that have separate codes, in their order.

    @classmethod
    @abstractmethod
    def read(cls, column: TableColumn) -> ir.Value:
        """Gives a column of a raw table the type that a log stores."""

    @classmethod
    @abstractmethod
    def fit(cls, name: str, column: Column, *, reference: datetime | None = None) -> Self:
        """Learns the encoding of a column, one entry per row, where None or NaN is missing.

        Ages count back from `reference`. A `ValueError` if an entry does not fit the kind.
        """

    def to_raw(self, column: Column) -> np.ndarray:
        """Converts a column to the array that `encode` takes: by default [n] str, "" if missing."""
        return np.asarray(to_texts(column).to_numpy(zero_copy_only=False), object)

    @abstractmethod
    def encoded(self, raw: np.ndarray) -> np.ndarray:
        """Encodes an array of `raw_spec`. See `encode`."""

    @abstractmethod
    def encoded_in_graph(self, raw: tf.Tensor) -> tf.Tensor:
        """Encodes a tensor of `raw_spec` as `encoded` does an array."""

    @property
    def raw_shape(self) -> tuple[int | None, ...]:
        """Shape of a row's raw value; None is a list of any length."""
        return ()

    @property
    def num_codes(self) -> int | None:
        """The largest code, if values are encoded as codes from 1; None if they are numbers."""
        return None

    def layer(self, dim: int) -> tf.keras.layers.Layer:
        """Makes the layer that embeds encoded values: [n] or [n, m] become [n, d] float32."""
        from tfrs_pipeline.features.layers import CodeEmbedding, FlaggedNumbers

        if self.num_codes is not None:
            return CodeEmbedding(self.name, 1 + self.num_codes, dim)
        return FlaggedNumbers(self.name, dim if self.is_embedded else None)

    @property
    def raw_spec(self) -> Spec:
        """Shape and dtype of the input of `encode`."""
        return Spec((None, *self.raw_shape), self.raw_dtype)

    @functools.cached_property
    def missing(self) -> np.ndarray:
        """The encoding of one row without a value, [1] or [1, m]."""
        shape = [1, *(1 if x is None else x for x in self.raw_shape)]
        values: np.ndarray = np.full(shape, "" if self.raw_dtype == "string" else np.nan)
        return self.encode(values)

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Encodes raw values, [B] or [B, any], as codes or numbers, [B] or [B, m].

        Texts are `str`, not bytes. Codes are int32, 0 where missing or unknown; numbers are
        float32, NaN where missing. A `ValueError` if the shape is not that of `raw_spec`.
        """
        raw = np.asarray(raw, object if self.raw_dtype == "string" else self.raw_dtype)
        shape = self.raw_spec.shape
        if len(shape) != raw.ndim or any(
            size not in (None, received) for size, received in zip(shape, raw.shape, strict=True)
        ):
            raise ValueError(
                f"Raw values of feature '{self.name}' must have the shape {shape}. Received: "
                f"{raw.shape}."
            )
        with np.errstate(all="ignore"):  # Infinite and missing numbers are values like others.
            return self.encoded(raw)

    def encode_in_graph(self, raw: tf.Tensor) -> tf.Tensor:
        """Encodes a tensor of raw values as `encode` does an array."""
        spec = self.raw_spec
        raw = tf.convert_to_tensor(raw, spec.dtype)
        return self.encoded_in_graph(tf.ensure_shape(raw, spec.shape))

    def encode_column(self, column: Column) -> np.ndarray:
        """Encodes a column with `to_raw` and `encode`, in blocks of rows."""
        # In blocks, because text takes many times its size while it is encoded.
        blocks = [self.encode(self.to_raw(block)) for block in in_blocks(column)]
        return np.concatenate(blocks)

    def unknown(self, raw: np.ndarray) -> np.ndarray:
        """Marks rows whose values training did not know, which count as missing: [n] bool.

        `raw` is what `to_raw` returns. A row without a value is not marked.
        """
        if self.num_codes is None or self.raw_dtype != "string":
            return np.zeros(len(raw), bool)
        # Code 0 is both missing and unknown; the raw value tells which.
        is_value, is_code = raw != "", self.encode(raw) > 0
        has_value, is_known = (
            np.any(mask, axis=tuple(range(1, mask.ndim))) for mask in (is_value, is_code)
        )
        return np.logical_and(has_value, np.logical_not(is_known))

    @property
    def graph_resource(self) -> Any:
        """A resource that an encoding `tf.Module` must hold, such as a lookup table, or None."""
        return None

    @property
    def had_values(self) -> bool:
        """Whether the fitted column had any value, as far as the encoding shows."""
        return self != self.fit(self.name, [None])

    def codes_of(self, there: Self) -> np.ndarray:
        """Returns each code's counterpart in another model; 0 if it has none."""
        return np.arange(1 + (self.num_codes or 0))

    @staticmethod
    def from_text(text: str) -> Any:
        """Converts a typed value; raises a `ValueError` if it does not fit the kind."""
        return text

    def parse(self, text: str) -> Any:
        """Converts a typed value; the `ValueError` shows how to write one."""
        try:
            return self.from_text(text)
        except ValueError as error:
            raise ValueError(
                f"{self.name} ({self.kind}) is written like {self.example}. Received: {text!r} "
                f"({error})"
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """Returns the feature as a JSON-compatible dict; `feature_from_dict` restores it."""
        return {"kind": self.kind, **dataclasses.asdict(self)}
