"""Signature inputs and encoding of several features at once, also of requests."""

import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfrs_pipeline.features.feature import Feature, Spec
from tfrs_pipeline.features.numeric import DAY_SECONDS, Timestamp
from tfrs_pipeline.features.raw import Column, to_seconds
from tfrs_pipeline.retrieval import HISTORY_TIMESTAMPS, check_requests

TIMESTAMP = "timestamp"
"""The time of a request, from which hour and weekday come; raw, seconds since 1970."""

# Inputs that a signature may have besides features.
_OTHER_INPUTS = "user_id", "item_id", "history", HISTORY_TIMESTAMPS, TIMESTAMP
# Those of a SavedModel that retrieves.
_SEARCH_INPUTS = "exclude", "allowed", "k"


def raw_signature(features: Sequence[Feature]) -> dict[str, Spec]:
    """Returns the inputs of `encode_raw` by feature, each with a name that a signature allows.

    Example:
        >>> from tfrs_pipeline.features.numeric import Numeric
        >>> raw_signature([Numeric("unit price")])
        {'unit price': Spec(shape=(None,), dtype='float64', name='unit_price')}
    """
    taken = {*_OTHER_INPUTS, *_SEARCH_INPUTS}
    signature = {}
    for feature in features:
        name = re.sub(r"[^A-Za-z0-9_]", "_", feature.name)
        if not name[:1].isalpha():
            name = f"input_{name}"
        # TensorFlow renames inputs that differ only in case, and then refuses to save them.
        # A signature takes its inputs by keyword.
        while name.lower() in taken or keyword.iskeyword(name) or name == "self":
            name += "_"
        taken.add(name.lower())
        if feature.name in signature:
            raise ValueError(f"Features must have different names. Received twice: {feature.name}.")
        signature[feature.name] = feature.raw_spec._replace(name=name)
    return signature


def raw_columns(
    features: Sequence[Feature], columns: Mapping[str, Column], num_rows: int
) -> dict[str, np.ndarray]:
    """Converts columns, by the features' names, to the arrays of `raw_signature`."""
    if missing := [feature.name for feature in features if feature.name not in columns]:
        raise ValueError(f"Features {missing} are missing. Received: {sorted(columns)}.")
    for feature in features:
        if (length := len(columns[feature.name])) != num_rows:
            raise ValueError(
                f"Column '{feature.name}' must have {num_rows} rows. Received: {length}."
            )
    return {feature.name: feature.to_raw(columns[feature.name]) for feature in features}


def encode_raw(features: Sequence[Feature], raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Encodes the arrays of `raw_signature`."""
    return {feature.name: feature.encode(raw[feature.name]) for feature in features}


def request_signature(
    features: Sequence[Feature], others: Sequence[Feature] = (), *, reads_times: bool = False
) -> dict[str, Spec]:
    """Returns the inputs of `encode_requests` by name: the features, and the timestamp if read.

    A model that `reads_times` always reads it. `others` are features in the same signature, so
    that names of inputs do not clash.
    """
    signature = raw_signature([*others, *features])
    specs = {feature.name: signature[feature.name] for feature in features}
    if reads_times or any(feature.is_from_timestamp for feature in features):
        specs[TIMESTAMP] = Spec((None,), "float64", TIMESTAMP)
    return specs


def raw_requests(
    features: Sequence[Feature],
    requests: Sequence[Mapping[str, Any] | None],
    *,
    reads_times: bool = False,
) -> dict[str, np.ndarray]:
    """Converts requests to the arrays of `request_signature`; absent values are missing.

    The timestamp is a `datetime` with a time zone; other keys are ignored.

    Example:
        >>> from tfrs_pipeline.features.numeric import Numeric
        >>> raw_requests([Numeric("hour")], [{"hour": 3, "device": "app"}, None])
        {'hour': array([ 3., nan])}
    """
    # A request may lack any feature: it is then missing, as in training's dropout.
    names = request_signature(features, reads_times=reads_times)
    columns = {name: [(request or {}).get(name) for request in requests] for name in names}
    raw = raw_columns(features, columns, len(requests))
    if TIMESTAMP in columns:
        raw[TIMESTAMP] = to_seconds(TIMESTAMP, columns[TIMESTAMP])
    return raw


def parse_request(features: Sequence[Feature], texts: Mapping[str, str]) -> dict[str, Any]:
    """Parses typed features of a request, and its timestamp.

    Commas separate lists; times are ISO 8601 with a time zone. Raises a `ValueError` if there is no
    such feature, or a value is of the wrong kind.
    """
    known = {feature.name: feature for feature in features}
    # After this check, only the timestamp can be absent from `known`.
    check_requests([texts], known)
    return {name: known.get(name, Timestamp(name)).parse(text) for name, text in texts.items()}


def encode_requests(
    features: Sequence[Feature], raw: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Encodes request features; a missing hour or weekday is taken from the timestamp."""
    filled = dict(raw)
    for feature in features:
        if feature.is_from_timestamp:
            filled[feature.name] = _filled(feature, raw[feature.name], raw[TIMESTAMP])
    return encode_raw(features, filled)


def _filled(feature: Feature, values: np.ndarray, timestamp: np.ndarray) -> np.ndarray:
    """Fills missing values with the hour or weekday of the timestamp."""
    is_known = np.isfinite(timestamp)
    seconds = np.where(is_known, timestamp, 0.0)
    day = np.floor(seconds / DAY_SECONDS)
    # As `at_request` in `data/request_features.py`: 1970 began on a Thursday, and Monday is 0.
    number = np.mod(day + 3, 7)
    if feature.name == "hour":
        number = np.floor((seconds - day * DAY_SECONDS) / 3600)
    if feature.raw_dtype == "string":
        texts = number.astype(int).astype(str).astype(object)
        return np.where((values == "") & is_known, texts, values)
    return np.where(~np.isfinite(values) & is_known, number, values)
