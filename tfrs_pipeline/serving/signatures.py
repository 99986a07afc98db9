"""The signatures of an exported model: their names and inputs, and how they are called."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import tensorflow as tf

from tfrs_pipeline.model.graph import empty_id, signature_inputs

AsksBy: TypeAlias = Literal["user", "history", "item"]


@dataclass(frozen=True)
class Retrieval:
    """A signature that retrieves; saved_models/README.md lists the inputs."""

    asks_by: AsksBy
    has_features: bool = False
    is_filtered: bool = False

    @property
    def name(self) -> str:
        """Name of the signature."""
        verb = {"user": "retrieve_user", "history": "retrieve", "item": "similar"}[self.asks_by]
        return f"{verb}{'_with_features' * self.has_features}{'_filtered' * self.is_filtered}"

    @property
    def embed_name(self) -> str:
        """Name of the encoder's function, and of the signature, that embeds its queries."""
        # There is no "embed_item": the index has the vectors.
        side = {"user": "user", "history": "query", "item": "item"}[self.asks_by]
        return f"embed_{side}{'_with_features' * self.has_features}"


_UNFILTERED = (
    *(Retrieval("user"), Retrieval("history"), Retrieval("history", has_features=True)),
    Retrieval("item"),
)
RETRIEVALS = (*_UNFILTERED, *(replace(each, is_filtered=True) for each in _UNFILTERED))
DEFAULT_K = 100


def ask(signature: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Asks a signature of a loaded model."""
    specs = signature_inputs(signature)
    given = {n: tf.constant(array, specs[n].dtype, array.shape) for n, array in inputs.items()}
    return {name: tensor.numpy() for name, tensor in signature(**given).items()}


def completed(
    specs: Mapping[str, tf.TensorSpec], given: Mapping[str, Any], num_rows: Any
) -> dict[str, Any]:
    """Returns all inputs of a signature, in its order; absent ones are missing values, k is 1."""
    inputs = {}
    for name, spec in specs.items():
        if name in given:
            inputs[name] = given[name]
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
