"""Request features on their way from raw values to the query tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features.encoding import encode_raw, raw_columns, raw_signature
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.raw import to_seconds
from tfrs_pipeline.features.timestamp import DAY_SECONDS

TIMESTAMP = "timestamp"
"""What a request may bring in place of its hour and weekday, in seconds since 1970 in the graph."""


def request_signature(
    features: Sequence[Feature], others: Sequence[Feature] = (), *, reads_times: bool = False
) -> dict[str, tf.TensorSpec]:
    """Returns what `encode_requests` takes, by name: the features, and the timestamp if it is read.

    Where the model `reads_times`, it is read whatever the features. `others` are features of the
    same signature, whose inputs have other names.
    """
    signature = raw_signature([*others, *features])
    specs = {feature.name: signature[feature.name] for feature in features}
    if reads_times or any(feature.is_from_timestamp for feature in features):
        specs[TIMESTAMP] = tf.TensorSpec([None], tf.float64, TIMESTAMP)
    return specs


def raw_requests(
    features: Sequence[Feature],
    requests: Sequence[Mapping[str, Any] | None],
    *,
    reads_times: bool = False,
) -> dict[str, np.ndarray]:
    """Makes requests the arrays of `request_signature`; what is not there is missing.

    The timestamp is a `datetime` with a time zone; other keys are ignored. A `ValueError` as of
    `Feature.to_raw`.
    """

    def column(name: str) -> list[Any]:
        return [(request or {}).get(name) for request in requests]

    columns = {feature.name: column(feature.name) for feature in features}
    raw = raw_columns(features, columns, len(requests))
    if TIMESTAMP in request_signature(features, reads_times=reads_times):
        raw[TIMESTAMP] = to_seconds(TIMESTAMP, column(TIMESTAMP))
    return raw


def encode_requests(
    features: Sequence[Feature], raw: Mapping[str, tf.Tensor]
) -> dict[str, tf.Tensor]:
    """Encodes request features as `Feature.encode` does, within a graph too.

    An hour or weekday that is missing is the timestamp's.
    """
    filled = dict(raw)
    for feature in features:
        if feature.is_from_timestamp:
            filled[feature.name] = _filled(feature, raw[feature.name], raw[TIMESTAMP])
    return encode_raw(features, filled)


def _filled(feature: Feature, given: tf.Tensor, timestamp: tf.Tensor) -> tf.Tensor:
    """Takes what a timestamp tells where nothing is given."""
    given = tf.convert_to_tensor(given, feature.raw_spec.dtype)
    timestamp = tf.convert_to_tensor(timestamp, tf.float64)
    is_known = tf.math.is_finite(timestamp)
    seconds = tf.where(is_known, timestamp, tf.zeros_like(timestamp))
    day = tf.floor(seconds / DAY_SECONDS)
    # As `data.requests.at_request`: 1970 began on a Thursday, and Monday is 0.
    number = tf.math.floormod(day + 3, 7)
    if feature.name == "hour":
        number = tf.floor((seconds - day * DAY_SECONDS) / 3600)
    if given.dtype == tf.string:
        text = tf.strings.as_string(tf.cast(number, tf.int32))
        return tf.where((given == "") & is_known, text, given)
    return tf.where(~tf.math.is_finite(given) & is_known, number, given)
