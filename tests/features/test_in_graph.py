"""Features encode in NumPy what the graph of a SavedModel encodes, and need no TensorFlow."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.features.columns import fit
from tfrs_pipeline.features import graph
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.kinds import KINDS

# What either side might treat differently: spellings of values, cases, marks, spaces, scripts.
PARTS = [
    *("", "a", "b", "M", "7", "7.0", "07.0", "-7.0", "7.00", "7.0\n", "7.5", ".0", "\uff17.0"),
    *("true", "True", "TRUE", "tRUE", " True ", "false", "False", "FALSE"),
    *("İ", "I", "ı", "i\u0307", "I\u0307", "ß", "ẞ", "ΤΕΛΟΣ", "Σ'Α", "Σ\u0301", "ǅ", "ﬁ", "Ꭰ"),  # noqa: RUF001
    *("e\u0301", "\u0301", "हिन्दी", "สวัสดี", "ั", "か\u3099", "ラーメン", "ー", "ｶﾞ", "手机", "\U00030000", "한국어"),
    *("❤\ufe0f", "\ufe0f", "👩\u200d👧", "\U0001f468\U0001f3fd", "\U000e0101", "\u20dd"),
    *(" ", "\t", "\n", "\v", "\f", "\r", "\x1c", "\x85", "\u00a0", "\u2003", "\u3000", "\u200b", "\ufeff", "\0"),
    *("'", "''", "’", "_", "-", ".", "end's", "rock'n'roll", "²", "Ⅷ", "٣"),  # noqa: RUF001
]  # fmt: skip
# TensorFlow treats subnormal numbers as 0, and NumPy does not.
FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, np.nan, np.inf, -np.inf, 1.7e308, -1.7e308, -1e-20, 86_400.0]),
    st.floats(allow_subnormal=False),
    st.floats(-1e10, 1e10, allow_subnormal=False),
    st.integers(-(2**62), 2**62).map(float),
)
TEXTS = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=6).map("".join),
    st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=8),
)


def assert_same(feature: Feature, raw: np.ndarray) -> None:
    encoded = feature.encode(raw)
    tensor = tf.constant(raw, feature.raw_dtype)
    # Eager operations, and a graph that TensorFlow optimizes as it does that of an export.
    spec = graph.tensor_specs({"x": feature.raw_spec})["x"]
    in_graph = tf.function(feature.encode_in_graph, input_signature=[spec])
    for others in (feature.encode_in_graph(tensor).numpy(), in_graph(tensor).numpy()):
        assert encoded.dtype == others.dtype
        if feature.kind != "timestamp":
            np.testing.assert_array_equal(encoded, others)
            continue
        # Logarithm, sine and cosine differ in the last bit of float64: by a rounding in float32,
        # or, near a zero of the sine, by the rounding of an angle of up to 2 pi.
        np.testing.assert_array_equal(np.isnan(encoded), np.isnan(others))
        np.testing.assert_array_max_ulp(*np.where(abs(encoded) < 1e-7, 0, [encoded, others]), 1)
        np.testing.assert_allclose(encoded, others, rtol=1e-6, atol=1e-14)


def raw_values(feature: Any) -> st.SearchStrategy[np.ndarray]:
    """Returns arrays of raw values: none, few or many rows, and lists of any length."""
    if feature.raw_dtype != "string":
        values, dtype = FLOATS, feature.raw_dtype
        if dtype == "float32":
            values = st.floats(width=32, allow_subnormal=False)
    else:
        values, dtype = st.one_of(TEXTS, st.sampled_from(["", *feature.vocabulary])), object

    def as_array(rows_and_width: tuple[list[list[Any]], int]) -> np.ndarray:
        rows, width = rows_and_width
        array = np.array([row[:width] for row in rows], dtype)
        return array.reshape(len(rows), width) if feature.raw_shape else array.reshape(len(rows))

    width = st.integers(0, 5) if feature.raw_shape == (None,) else st.just(1)
    if feature.raw_shape not in ((), (None,)):
        width = st.just(feature.raw_shape[0])
    rows = st.lists(st.lists(values, min_size=5, max_size=5), max_size=6)
    return st.tuples(rows, width).map(as_array)


FIT_ON: dict[str, st.SearchStrategy[list[Any]]] = {
    "multi_categorical": st.lists(st.lists(TEXTS, max_size=5), max_size=6),
    **dict.fromkeys(("categorical", "hashed", "text"), st.lists(TEXTS, max_size=6)),
    **dict.fromkeys(("numeric", "bucketized"), st.lists(FLOATS, max_size=6)),
    "timestamp": st.lists(
        st.integers(-(10**9), 4 * 10**9).map(lambda s: datetime.fromtimestamp(s, UTC)), max_size=6
    ),
    "vector": st.lists(
        st.lists(st.floats(-1e18, 1e18, width=32, allow_subnormal=False), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_arrays_are_encoded_as_tensors_are(kind: str, data: st.DataObject) -> None:
    feature = fit(kind, data.draw(FIT_ON[kind]), max_values=data.draw(st.integers(1, 8)))
    assert_same(feature, data.draw(raw_values(feature)))
