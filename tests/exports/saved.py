"""Asks a SavedModel, which nothing in the package reads, as TensorFlow Serving does."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.model.tf_tables import as_tensors, completed, signature_inputs
from tfrs_pipeline.service.signatures import numpy_type


@functools.lru_cache(maxsize=3)
def saved_model(folder: Path) -> Any:
    """Loads the SavedModel of a version."""
    return tf.saved_model.load(str(folder))


def ask_saved_model(
    folder: Path, name: str, known: Mapping[str, Any], num_rows: int
) -> dict[str, np.ndarray]:
    """Returns the answer of a signature, texts as `str`; inputs that are not given are missing."""
    signature = saved_model(folder).signatures[name]
    specs = signature_inputs(signature)
    arrays = {
        name: np.asarray(values, numpy_type(specs[name].dtype.name))
        for name, values in known.items()
        if name in specs
    }
    answer = signature(**completed(specs, as_tensors(specs, arrays), num_rows))
    return {name: decoded(tensor.numpy()) for name, tensor in answer.items()}


def decoded(array: np.ndarray) -> np.ndarray:
    """Returns an array whose texts are `str`, not bytes."""
    if array.dtype != object:
        return array
    return np.array([x.decode() for x in array.ravel()], object).reshape(array.shape)
