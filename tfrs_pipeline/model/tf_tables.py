"""Ids as tensors, tables from ids to rows, and functions with named inputs in a saved graph."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.search.queries import FEATURE, HISTORY_TIMES, INPUT, Arrays, Tower

# Candidates embedded in one call, when the whole corpus is embedded.
CORPUS_BLOCK = 65_536


def id_dtype(ids: np.ndarray) -> tf.DType:
    """Returns the type in which ids enter the graph: int64 or string."""
    return tf.int64 if ids.dtype == np.int64 else tf.string


def with_empty(ids: np.ndarray) -> tf.Tensor:
    """Returns [n + 1] ids by row, the empty id, -1 or "", in row 0."""
    dtype = id_dtype(ids)
    return tf.constant([-1 if dtype == tf.int64 else "", *ids.tolist()], dtype)


def stored(values: Any) -> tf.Variable:
    """Makes a variable of values that never change."""
    # Constants are part of the graph, which must not exceed 2 GB; ids and histories may.
    return tf.Variable(values, trainable=False)


def row_table(ids: np.ndarray) -> tf.lookup.experimental.MutableHashTable:
    """Makes the table of rows 1, 2, ... by id; all other ids have row 0.

    Example:
        >>> row_table(np.array([30, 10])).lookup(tf.constant([10, 99], tf.int64)).numpy()
        array([2, 0])
    """
    # It never changes, but only a mutable table is saved with the variables, not in the graph.
    dtype = id_dtype(ids)
    table = tf.lookup.experimental.MutableHashTable(dtype, tf.int64, default_value=0)
    table.insert(tf.constant(ids.tolist(), dtype), tf.range(1, len(ids) + 1, dtype=tf.int64))
    return table


def lookup(table: tf.lookup.experimental.MutableHashTable, ids: tf.Tensor) -> tf.Tensor:
    """Looks up rows: int32, of the shape of `ids`."""
    # A mutable table loses the shape.
    return tf.ensure_shape(tf.cast(table.lookup(ids), tf.int32), ids.shape)


def feature_argument(features: Mapping[str, tf.Tensor]) -> dict[str, Any]:
    """Returns the argument `features`, or none: without features, functions do not take it."""
    return {"features": features} if features else {}


def traced(function: Callable[..., Any], specs: Sequence[tf.TensorSpec]) -> tf.function:
    """Makes a graph of a function of named inputs, for `call`."""
    # By position: the name of a feature may not be a Python name.
    names = [spec.name for spec in specs]
    # AutoGraph would rewrite the source of all that is called, which takes seconds of a process.
    return tf.function(
        lambda *values: function(**dict(zip(names, values, strict=True))),
        input_signature=specs,
        autograph=False,
    )


def tower_function(
    embed: Callable[..., tf.Tensor], inputs: Mapping[str, tuple[Sequence[int | None], str]]
) -> tf.function:
    """Makes a graph of an embedding function of an `Exportable`, for encoded inputs by name.

    It takes the inputs in their order, [B, ...] each, and returns [B, D] float32.
    """
    specs = [
        tf.TensorSpec([None, *shape], dtype, INPUT.format(number))
        for number, (shape, dtype) in enumerate(inputs.values())
    ]

    def flat(*values: tf.Tensor) -> tf.Tensor:
        by_name = dict(zip(inputs, values, strict=True))
        features = {
            name.removeprefix(FEATURE): value
            for name, value in by_name.items()
            if name.startswith(FEATURE)
        }
        rows = [by_name[name] for name in inputs if name.endswith("_rows")]
        named = feature_argument(features)
        if HISTORY_TIMES in by_name:  # Without times, functions do not take that one either.
            named[HISTORY_TIMES] = by_name[HISTORY_TIMES]
        return embed(*rows, **named)

    # AutoGraph would rewrite the source of all that is called, which takes seconds of a process.
    return tf.function(flat, input_signature=specs, autograph=False)


def tower_of(
    embed: Callable[..., tf.Tensor], inputs: Mapping[str, tuple[Sequence[int | None], str]]
) -> Tower:
    """Makes a `Tower` of an embedding function of an `Exportable`."""
    function = tower_function(embed, inputs)

    def embedded(arrays: Arrays) -> np.ndarray:
        values: np.ndarray = function(*(tf.constant(arrays[name]) for name in inputs)).numpy()
        return values

    return embedded


def signature_inputs(function: Any) -> dict[str, tf.TensorSpec]:
    """Returns the inputs of a `traced` function or a signature by name, in order."""
    if hasattr(function, "get_concrete_function"):
        function = function.get_concrete_function()
    positional, named = function.structured_input_signature
    return {spec.name: spec for spec in positional} | dict(named)


def as_tensors(
    specs: Mapping[str, tf.TensorSpec], arrays: Mapping[str, np.ndarray]
) -> dict[str, tf.Tensor]:
    """Makes the inputs that a signature takes of those arrays that it has a name for."""
    # With a shape, because an empty array of text has none of its own.
    return {
        name: tf.constant(arrays[name], spec.dtype, arrays[name].shape)
        for name, spec in specs.items()
        if name in arrays
    }


def call(function: Any, inputs: Mapping[str, tf.Tensor]) -> Any:
    """Calls a `traced` function, also a loaded one, with the inputs that it takes."""
    return function(*(inputs[name] for name in signature_inputs(function)))


def embed_corpus(embed: Callable[[tf.Tensor], tf.Tensor], num_candidates: int) -> np.ndarray:
    """Embeds candidate rows 1, 2, ... by a function of [n] int32 rows: [num_candidates, D]."""
    # In blocks: the inner layers of a tower need many times the memory of its output.
    rows = np.arange(1, num_candidates + 1, dtype=np.int32)
    starts = range(0, num_candidates, CORPUS_BLOCK)
    blocks = [embed(tf.constant(rows[start : start + CORPUS_BLOCK])).numpy() for start in starts]
    return np.concatenate(blocks)
