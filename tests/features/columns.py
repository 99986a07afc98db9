"""Columns of every kind, to fit features on and to encode."""

import json
import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfrs_pipeline.features.categorical import MultiCategorical, Text
from tfrs_pipeline.features.encoding import raw_columns
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.kinds import KINDS, feature_from_dict

EAST = timezone(timedelta(hours=5, minutes=30))
MOMENTS = [
    datetime(2024, 3, 1, 6, 30, tzinfo=UTC),
    None,
    datetime(2021, 12, 31, 23, 59, 59, 500_000, tzinfo=EAST),
    datetime(1965, 1, 1, 12, tzinfo=UTC),
]
FITTED: dict[str, list[Any]] = {
    "categorical": ["M", None, "F", "Ünïcode"],
    "multi_categorical": [["a", "b", "c"], None, ["b", "日本"], []],
    "text": ["The end's near", None, "ΤΕΛΟΣ: the FILM", ""],
    "numeric": [1.5, None, -2.0, 1e4],
    "bucketized": [1.5, None, -2.0, 0.1],
    "timestamp": MOMENTS,
    "vector": [[0.5, -1.0, 2.0], None, [0.0, 0.0, 0.125], [3.0, 1.0, 1.0]],
}
# Known, missing, empty, unknown and extreme values, and values of other types.
NEW: dict[str, list[Any]] = {
    "categorical": ["Ünïcode", None, "", "M", math.nan, "m", 7],
    "multi_categorical": [["c", "new", "日本"], None, [], ["", "a", None], ["b"] * 6, "a", ("7",)],
    "text": ["the film, the end's", None, "", "!?", "τελοσ ΤΕΛΟΣ", "NEAR\0END'S", 7],
    "numeric": [1.5, None, math.nan, math.inf, -1e300, -0.0, 7],
    "bucketized": [1.5, None, math.nan, -math.inf, 1e300, 0.1, 7],
    "timestamp": [
        MOMENTS[0],
        None,
        math.nan,
        datetime(2031, 1, 1, tzinfo=EAST),
        datetime(1969, 12, 31, 23, 59, 59, tzinfo=EAST),
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(2, 1, 1, tzinfo=UTC),
    ],
    "vector": [
        [0.5, -1.0, 2.0],
        None,
        math.nan,
        np.ones(3),
        (0, 0, 0),
        [1e38, -1e-9, 1],
        [1, 2, 3],
    ],
}
NUM_NEW = 7


def fit(kind: str, column: Any, name: str = "x", max_values: int | None = None) -> Any:
    """Fits a feature; a word that only one text has is known too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "min_count", 1)
        for cls in (Text, MultiCategorical):
            patch.setattr(cls, "max_values", max_values or cls.max_values)
        return KINDS[kind].fit(name, column)


def fitted_features() -> list[Feature]:
    """Returns one feature of each kind, after a round trip through JSON."""
    features = [fit(kind, FITTED[kind], f"a_{kind}", max_values=3) for kind in KINDS]
    back = [feature_from_dict(json.loads(json.dumps(feature.to_dict()))) for feature in features]
    assert set(back) == set(features)
    return back


def new_columns() -> dict[str, list[Any]]:
    return {f"a_{kind}": NEW[kind] for kind in KINDS}


def new_tensors() -> dict[str, tf.Tensor]:
    """Returns raw values in the form that the functions of a loaded model take."""
    features = fitted_features()
    raw = raw_columns(features, {**new_columns(), "other": []}, NUM_NEW)
    return {f.name: tf.constant(raw[f.name], f.raw_spec.dtype) for f in features}
