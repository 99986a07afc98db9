"""Ids as tensors: as callers give them, and the tables of their rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.retrieval import check_ids
from tfrs_pipeline.serving.signatures import empty_id


def id_dtype(ids: np.ndarray) -> tf.DType:
    """Returns the type in which ids enter the graph: int64 or string."""
    return tf.int64 if ids.dtype == np.int64 else tf.string


def id_list(ids: Sequence[Any], dtype: tf.DType) -> tf.Tensor:
    """Makes ids a tensor [n]; None is the empty id. A `ValueError` if one is not of the type."""
    check_ids([ids], are_text=dtype == tf.string)
    return tf.constant([_in_graph(id_, dtype) for id_ in ids], dtype, [len(ids)])


def id_lists(lists: Sequence[Collection[Any]], dtype: tf.DType) -> tf.Tensor:
    """Makes lists of ids a tensor [n, any], padded with the empty id; otherwise as `id_list`."""
    check_ids(lists, are_text=dtype == tf.string)
    known = [[_in_graph(id_, dtype) for id_ in ids] for ids in lists]
    return tf.ragged.constant(known, dtype, ragged_rank=1).to_tensor(empty_id(dtype))


def _in_graph(id_: Any, dtype: tf.DType) -> Any:
    """Returns an id that the graph takes: of those beyond int64, no model has one."""
    is_beyond = dtype == tf.int64 and id_ is not None and not -(2**63) <= id_ < 2**63
    return empty_id(dtype) if id_ is None or is_beyond else id_


def with_empty(ids: np.ndarray) -> tf.Tensor:
    """Returns [n + 1] ids by row, the empty id in row 0."""
    dtype = id_dtype(ids)
    return tf.constant([empty_id(dtype), *ids.tolist()], dtype)


def stored(values: Any) -> tf.Variable:
    """Makes a variable of what never changes.

    A constant would be written into the graph, which must not exceed 2 GB: histories of many users
    do, and ids of many items.
    """
    return tf.Variable(values, trainable=False)


def row_table(ids: np.ndarray) -> tf.lookup.experimental.MutableHashTable:
    """Makes the table of rows 1, 2, ... by id; whatever else has row 0.

    It never changes, but is of the kind whose entries are saved with the variables (see `stored`).
    """
    dtype = id_dtype(ids)
    table = tf.lookup.experimental.MutableHashTable(dtype, tf.int64, default_value=0)
    table.insert(tf.constant(ids.tolist(), dtype), tf.range(1, len(ids) + 1, dtype=tf.int64))
    return table


def lookup(table: tf.lookup.experimental.MutableHashTable, ids: tf.Tensor) -> tf.Tensor:
    """Looks up rows: int32, of the shape of `ids`."""
    # Such a table tells nothing of the shape.
    return tf.ensure_shape(tf.cast(table.lookup(ids), tf.int32), ids.shape)
