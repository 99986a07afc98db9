"""Ids as tensors, tables from ids to rows, and functions with named inputs in a saved graph."""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.retrieval import check_ids

# Candidates embedded in one call, when the whole corpus is embedded.
CORPUS_BLOCK = 65_536


def id_dtype(ids: np.ndarray) -> tf.DType:
    """Returns the type in which ids enter the graph: int64 or string."""
    return tf.int64 if ids.dtype == np.int64 else tf.string


def empty_id(dtype: tf.DType) -> Any:
    """Returns the id of an empty slot: -1 or ""."""
    return -1 if dtype == tf.int64 else ""


def id_array(ids: Sequence[Any], dtype: tf.DType) -> np.ndarray:
    """Makes an array of ids, [n] int64, or texts as objects; None is the empty id.

    Raises a `ValueError` if one has another type than the graph's `dtype`.
    """
    check_ids([ids], are_text=dtype == tf.string)
    return _ids_in_graph(ids, dtype)


def id_rows(lists: Sequence[Collection[Any]], dtype: tf.DType) -> np.ndarray:
    """Makes an array [n, longest] of lists of ids, padded with the empty id; see `id_array`.

    Example:
        >>> id_rows([[7, 8], [], [9]], tf.int64)
        array([[ 7,  8],
               [-1, -1],
               [ 9, -1]])
    """
    check_ids(lists, are_text=dtype == tf.string)
    values = _ids_in_graph(list(itertools.chain.from_iterable(lists)), dtype)
    return padded(values, lists, empty_id(dtype))


def padded(values: np.ndarray, lists: Sequence[Collection[Any]], default: Any) -> np.ndarray:
    """Puts the concatenated values of lists into rows [n, longest], padded at the end."""
    # In NumPy: a ragged tensor outside a graph takes a millisecond.
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    rows = np.full((len(lists), lengths.max(initial=0)), default, values.dtype)
    rows[np.arange(rows.shape[1]) < lengths[:, np.newaxis]] = values
    return rows


def _ids_in_graph(ids: Sequence[Any], dtype: tf.DType) -> np.ndarray:
    """Returns ids as a graph takes them; None and integers beyond int64 become the empty id."""
    if dtype == tf.string:
        return np.array(["" if id_ is None else id_ for id_ in ids], object)
    array = np.asarray(ids)
    if array.dtype.kind != "i":
        fits = [id_ is not None and -(2**63) <= id_ < 2**63 for id_ in ids]
        pairs = zip(ids, fits, strict=True)
        array = np.array([id_ if fit else empty_id(dtype) for id_, fit in pairs], np.int64)
    return array


def id_lists_of(ids: np.ndarray) -> list[list[Any]]:
    """Returns the ids in each row of [n, any] padded ids from a graph, where text is bytes."""
    if ids.dtype.kind == "i":
        return [row[row != -1].tolist() for row in ids]
    return [as_ids(id_ for id_ in row if id_ != b"") for row in ids.tolist()]


def as_ids(values: Iterable[Any]) -> list[Any]:
    """Returns the ids of a graph as Python's: text is text, not bytes."""
    return [id_.decode(errors="replace") if isinstance(id_, bytes) else id_ for id_ in values]


def with_empty(ids: np.ndarray) -> tf.Tensor:
    """Returns [n + 1] ids by row, the empty id in row 0."""
    dtype = id_dtype(ids)
    return tf.constant([empty_id(dtype), *ids.tolist()], dtype)


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


def loaded_rows(table: Any, ids: Sequence[Any], dtype: tf.DType) -> np.ndarray:
    """Looks up rows in a `row_table` of a loaded model: [n] int64."""
    # A loaded table has a handle and no methods.
    rows = tf.raw_ops.LookupTableFindV2(
        table_handle=table.resource_handle,
        keys=tf.constant(id_array(ids, dtype), dtype, [len(ids)]),
        default_value=tf.constant(0, tf.int64),
    )
    return rows.numpy()


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


def signature_inputs(function: Any) -> dict[str, tf.TensorSpec]:
    """Returns the inputs of a `traced` function or a signature by name, in order."""
    if hasattr(function, "get_concrete_function"):
        function = function.get_concrete_function()
    positional, named = function.structured_input_signature
    return {spec.name: spec for spec in positional} | dict(named)


def completed(
    specs: Mapping[str, tf.TensorSpec], known: Mapping[str, Any], num_rows: Any
) -> dict[str, Any]:
    """Returns all inputs of a signature, in its order; absent ones are missing values, k is 1."""
    inputs = {}
    for name, spec in specs.items():
        if name in known:
            inputs[name] = known[name]
        elif spec.shape.rank == 0:
            inputs[name] = tf.constant(1, spec.dtype)
        else:
            shape = [num_rows, *(size or 0 for size in spec.shape[1:])]
            inputs[name] = tf.fill(shape, tf.constant(missing_value(spec.dtype), spec.dtype))
    return inputs


def missing_value(dtype: tf.DType) -> Any:
    """Returns the missing value of a type: NaN, an empty string, or the empty id."""
    if dtype.is_floating:
        return np.nan
    return b"" if dtype == tf.string else empty_id(dtype)


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
