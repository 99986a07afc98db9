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
        for name in sorted(signature):  # The order in which `tf.nest` goes through a dict.
            part = found[name]
            parts += [part.values, part.offsets] if isinstance(part, RowLists) else [part]
        return parts

    specs = tf.nest.flatten(signature, expand_composites=True)
    tensors = tf.numpy_function(call, tf.nest.flatten(chosen), [spec.dtype for spec in specs])
    shaped = [tf.ensure_shape(x, spec.shape) for x, spec in zip(tensors, specs, strict=True)]
    return tf.nest.pack_sequence_as(signature, shaped, expand_composites=True)
