"""Encoding of several features in the graph of a SavedModel, as `encoding.py` does in NumPy."""

from collections.abc import Mapping, Sequence

import tensorflow as tf

from tfrs_pipeline.features.encoding import TIMESTAMP
from tfrs_pipeline.features.feature import Feature, Spec
from tfrs_pipeline.features.numeric import DAY_SECONDS


def tensor_specs(specs: Mapping[str, Spec]) -> dict[str, tf.TensorSpec]:
    """Converts the inputs of a signature to TensorFlow's class."""
    return {
        key: tf.TensorSpec(spec.shape, tf.as_dtype(spec.dtype), spec.name)
        for key, spec in specs.items()
    }


def encode_raw(
    features: Sequence[Feature], tensors: Mapping[str, tf.Tensor]
) -> dict[str, tf.Tensor]:
    """Encodes tensors of `raw_signature`."""
    return {feature.name: feature.encode_in_graph(tensors[feature.name]) for feature in features}


def encode_requests(
    features: Sequence[Feature], tensors: Mapping[str, tf.Tensor]
) -> dict[str, tf.Tensor]:
    """Encodes request features as `encoding.encode_requests` does."""
    filled = dict(tensors)
    for feature in features:
        if feature.is_from_timestamp:
            filled[feature.name] = _filled(feature, tensors[feature.name], tensors[TIMESTAMP])
    return encode_raw(features, filled)


def _filled(feature: Feature, values: tf.Tensor, timestamp: tf.Tensor) -> tf.Tensor:
    values = tf.convert_to_tensor(values, feature.raw_spec.dtype)
    timestamp = tf.convert_to_tensor(timestamp, tf.float64)
    is_known = tf.math.is_finite(timestamp)
    seconds = tf.where(is_known, timestamp, tf.zeros_like(timestamp))
    day = tf.floor(seconds / DAY_SECONDS)
    number = tf.math.floormod(day + 3, 7)
    if feature.name == "hour":
        number = tf.floor((seconds - day * DAY_SECONDS) / 3600)
    if values.dtype == tf.string:
        text = tf.strings.as_string(tf.cast(number, tf.int32))
        return tf.where((values == "") & is_known, text, values)
    return tf.where(~tf.math.is_finite(values) & is_known, number, values)
