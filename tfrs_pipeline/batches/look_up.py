"""NumPy in the graph: reads of arrays that lie in files, where tensors would be copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from tfrs_pipeline.samples.store import RowLists

Found: TypeAlias = dict[str, Any]
"""Arrays, and `RowLists`, by name."""


def lists_of(num_lists: int | None) -> tf.RaggedTensorSpec:
    """Describes lists of candidate rows."""
    return tf.RaggedTensorSpec([num_lists, None], tf.int32, row_splits_dtype=tf.int64)


def ragged(lists: RowLists) -> tf.RaggedTensor:
    """Returns lists as a tensor."""
    return tf.RaggedTensor.from_row_splits(lists.values, lists.offsets, validate=False)


def look_up(
    read: Callable[[Any], Found], chosen: Any, signature: Mapping[str, tf.TypeSpec]
) -> dict[str, Any]:
    """Reads arrays at places that are tensors.

    `read` is given `chosen`, a structure of tensors, as arrays, and returns arrays and lists by
    name; `signature` has their types, those of lists as of `lists_of`. Returns them as tensors, the
    lists as ragged ones.
    """

    def call(*arrays: np.ndarray) -> list[np.ndarray]:
        found = read(tf.nest.pack_sequence_as(chosen, arrays))
        parts = []
        for name in signature:
            part = found[name]
            parts += [part.offsets, part.values] if isinstance(part, RowLists) else [part]
        return parts

    specs = [spec for whole in signature.values() for spec in _parts(whole)]
    tensors = tf.numpy_function(call, tf.nest.flatten(chosen), [spec.dtype for spec in specs])
    parts = iter(
        tf.ensure_shape(tensor, spec.shape) for tensor, spec in zip(tensors, specs, strict=True)
    )
    return {
        name: tf.RaggedTensor.from_row_splits(
            row_splits=next(parts), values=next(parts), validate=False
        )
        if isinstance(spec, tf.RaggedTensorSpec)
        else next(parts)
        for name, spec in signature.items()
    }


def _parts(spec: tf.TypeSpec) -> list[tf.TensorSpec]:
    if not isinstance(spec, tf.RaggedTensorSpec):
        return [spec]
    num_lists = spec.shape[0]
    num_offsets = None if num_lists is None else num_lists + 1
    return [tf.TensorSpec([num_offsets], tf.int64), tf.TensorSpec([None], tf.int32)]
