"""Several features at once: their inputs in a signature, and their encoding."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.raw import Column
from tfrs_pipeline.retrieval import HISTORY_TIMESTAMPS

# What a signature may take beside features.
_OTHER_INPUTS = (
    *("user_id", "item_id", "history", HISTORY_TIMESTAMPS),
    *("timestamp", "exclude", "allowed", "k"),
)


def raw_signature(features: Sequence[Feature]) -> dict[str, tf.TensorSpec]:
    """Returns what `encode_raw` takes, by the features' names, in their order.

    Each spec has the name of its input in an exported signature: the feature's, if TensorFlow
    allows it and no other input has it, otherwise one of ASCII letters, digits and underscores.

    Raises:
        ValueError: If two features have the same name.

    Example:
        >>> from tfrs_pipeline.features.numeric import Numeric
        >>> raw_signature([Numeric("release date")])
        {'release date': TensorSpec(shape=(None,), dtype=tf.float64, name='release_date')}
    """
    names = [feature.name for feature in features]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Features must have different names. Received twice: {repeated}.")
    taken = set(_OTHER_INPUTS)
    signature = {}
    for feature in features:
        name = re.sub(r"[^A-Za-z0-9_]", "_", feature.name)
        if not name[:1].isalpha():
            name = f"input_{name}"
        # TensorFlow renames inputs that differ in case alone, and refuses to save them then.
        # A signature's inputs are called by keyword.
        while name.lower() in taken or keyword.iskeyword(name) or name == "self":
            name += "_"
        taken.add(name.lower())
        spec = feature.raw_spec
        signature[feature.name] = tf.TensorSpec(spec.shape, spec.dtype, name)
    return signature


def raw_columns(
    features: Sequence[Feature], columns: Mapping[str, Column], num_rows: int
) -> dict[str, np.ndarray]:
    """Converts columns, by the features' names, to the arrays of `raw_signature`.

    A `ValueError` if a column is missing or does not have `num_rows` rows, or as in `to_raw`.
    """
    _check_given(features, columns)
    for feature in features:
        if (length := len(columns[feature.name])) != num_rows:
            raise ValueError(
                f"Column '{feature.name}' must have {num_rows} rows. Received: {length}."
            )
    return {feature.name: feature.to_raw(columns[feature.name]) for feature in features}


def encode_raw(features: Sequence[Feature], raw: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Encodes the arrays of `raw_signature`; a `ValueError` if a feature is missing."""
    _check_given(features, raw)
    return {feature.name: feature.encode(raw[feature.name]) for feature in features}


def graph_resources(features: Sequence[Feature]) -> dict[str, Any]:
    """Returns what a module that encodes must hold, such as lookup tables, by feature."""
    resources = {feature.name: feature.graph_resource for feature in features}
    return {name: resource for name, resource in resources.items() if resource is not None}


def _check_given(features: Sequence[Feature], given: Mapping[str, Any]) -> None:
    if missing := [feature.name for feature in features if feature.name not in given]:
        raise ValueError(f"Features {missing} are missing. Received: {sorted(given)}.")
