"""Asks a SavedModel, which nothing in the package reads, as TensorFlow Serving does."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.answers.signatures import completed, numpy_type
from tfrs_pipeline.features.feature import Spec
from tfrs_pipeline.model.tf_tables import as_tensors, signature_inputs


@functools.lru_cache(maxsize=3)
def saved_model(folder: Path) -> Any:
    """Loads the SavedModel of a version."""
    return tf.saved_model.load(str(folder))


def ask_saved_model(
    folder: Path, name: str, known: Mapping[str, Any], num_rows: int
) -> dict[str, np.ndarray]:
    """Returns the answer of a signature, texts as `str`; inputs that are not given are missing."""
    return ask_signature(saved_model(folder).signatures[name], known, num_rows)


def ask_signature(signature: Any, known: Mapping[str, Any], num_rows: int) -> dict[str, np.ndarray]:
    """Does so of a signature."""
    specs = signature_inputs(signature)
    plain = {name: Spec(tuple(spec.shape), spec.dtype.name) for name, spec in specs.items()}
    arrays = {
        name: np.asarray(values, numpy_type(plain[name].dtype))
        for name, values in known.items()
        if name in specs
    }
    answer = signature(**as_tensors(specs, completed(plain, arrays, num_rows)))
    return {name: decoded(tensor.numpy()) for name, tensor in answer.items()}


def decoded(array: np.ndarray) -> np.ndarray:
    """Returns an array whose texts are `str`, not bytes."""
    if array.dtype != object:
        return array
    return np.array([x.decode() for x in array.ravel()], object).reshape(array.shape)
