"""The signatures of an exported model: what they take, and how they are asked with arrays."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.model.tf_tables import empty_id, signature_inputs

SIMILAR = "similar"
# Signatures that retrieve, and those that embed their queries; saved_models/README.md lists the
# inputs. `similar` embeds by itself: the index has the vectors of its items.
RETRIEVALS = {
    "retrieve_user": "embed_user",
    "retrieve": "embed_query",
    "retrieve_with_features": "embed_query_with_features",
    SIMILAR: SIMILAR,
}
# The server also answers these names with a filter, for models that have one.
FILTERED = "_filtered"
DEFAULT_SIGNATURE = "serving_default"
DEFAULT_K = 100


def ask(signature: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Asks a signature of a loaded model, with the inputs that it takes."""
    # With a shape, because an empty array of text has none of its own.
    tensors = {
        name: tf.constant(inputs[name], spec.dtype, inputs[name].shape)
        for name, spec in signature_inputs(signature).items()
    }
    return {name: tensor.numpy() for name, tensor in signature(**tensors).items()}


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


def id_lists_of(ids: np.ndarray) -> list[list[Any]]:
    """Returns the ids in each row of [n, any] padded ids from a graph, where text is bytes."""
    if ids.dtype.kind == "i":
        return [row[row != -1].tolist() for row in ids]
    return [as_ids(id_ for id_ in row if id_ != b"") for row in ids.tolist()]


def as_ids(values: Iterable[Any]) -> list[Any]:
    """Returns the ids of a graph as Python's: text is text, not bytes."""
    return [id_.decode(errors="replace") if isinstance(id_, bytes) else id_ for id_ in values]
