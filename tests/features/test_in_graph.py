"""Features encode in NumPy what the graph of a SavedModel encodes, and need no TensorFlow."""

import pickle
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.features.columns import FITTED, NEW, fit
from tfrs_pipeline.features import categorical, encoding, graph
from tfrs_pipeline.features.categorical import Categorical
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.kinds import KINDS
from tfrs_pipeline.features.numeric import Numeric

# What either side might treat differently: spellings of values, cases, marks, spaces, scripts.
PARTS = [
    *("", "a", "b", "M", "7", "7.0", "07.0", "-7.0", "7.00", "7.0\n", "7.5", ".0", "\uff17.0"),
    *("true", "True", "TRUE", "tRUE", " True ", "false", "False", "FALSE"),
    *("İ", "I", "ı", "i\u0307", "I\u0307", "ß", "ẞ", "ΤΕΛΟΣ", "Σ'Α", "Σ\u0301", "ǅ", "ﬁ", "Ꭰ"),  # noqa: RUF001
    *("e\u0301", "\u0301", "हिन्दी", "สวัสดี", "ั", "か\u3099", "ラーメン", "ー", "ｶﾞ"),
    *("手机", "\U00030000", "한국어"),
    *("❤\ufe0f", "\ufe0f", "👩\u200d👧", "\U0001f468\U0001f3fd", "\U000e0101", "\u20dd"),
    *(" ", "\t", "\n", "\v", "\f", "\r", "\0", "\x1c", "\x85"),
    *("\u00a0", "\u2003", "\u3000", "\u200b", "\ufeff"),
    *("'", "''", "’", "_", "-", ".", "end's", "rock'n'roll", "²", "Ⅷ", "٣"),  # noqa: RUF001
]  # fmt: skip
# Unicode 14 gave these a lower case (Glagolitic, Latin, Vithkuqi); TensorFlow's tables are older.
NEW_CAPITALS = {*"\u2c2f\ua7c0\ua7d0\ua7d6\ua7d8", *map(chr, range(0x10570, 0x10596))}
# TensorFlow treats subnormal numbers as 0, and NumPy does not: so tiny that means, differences or
# scales are subnormal, a number has other codes.
FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, np.nan, np.inf, -np.inf, 1.7e308, -1.7e308, -1e-20, 86_400.0]),
    st.floats().filter(lambda x: not 0 < abs(x) < 1e-150),
    st.floats(-1e10, 1e10).filter(lambda x: not 0 < abs(x) < 1e-150),
    st.integers(-(2**62), 2**62).map(float),
)
TEXTS = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=6).map("".join),
    st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=8),
).filter(lambda text: NEW_CAPITALS.isdisjoint(text))


def assert_same(feature: Feature, raw: np.ndarray) -> None:
    encoded = feature.encode(raw)
    tensor = tf.constant(raw, feature.raw_dtype)
    # Eager operations, and a graph that TensorFlow optimizes as it does that of an export.
    spec = graph.tensor_specs({"x": feature.raw_spec})["x"]
    in_graph = tf.function(feature.encode_in_graph, input_signature=[spec])
    for others in (feature.encode_in_graph(tensor).numpy(), in_graph(tensor).numpy()):
        assert encoded.dtype == others.dtype
        # Equal, but for subnormal float32 results.
        rtol, atol = 0.0, float(np.finfo(np.float32).tiny)
        if feature.kind == "timestamp":
            # Logarithm, sine and cosine differ in the last bit of float64: by a rounding in
            # float32, or, near a zero of the sine, by the rounding of an angle of up to 2 pi.
            rtol, atol = 2.0**-23, 1e-14
        np.testing.assert_allclose(encoded, others, rtol=rtol, atol=atol)


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


COORDINATES = st.one_of(st.just(0.0), st.floats(2.0**-60, 2.0**60, width=32))
FIT_ON: dict[str, st.SearchStrategy[list[Any]]] = {
    "multi_categorical": st.lists(st.lists(TEXTS, max_size=5), max_size=6),
    **dict.fromkeys(("categorical", "text"), st.lists(TEXTS, max_size=6)),
    **dict.fromkeys(("numeric", "bucketized"), st.lists(FLOATS, max_size=6)),
    "timestamp": st.lists(
        st.integers(-(10**9), 4 * 10**9).map(lambda s: datetime.fromtimestamp(s, UTC)), max_size=6
    ),
    "vector": st.lists(
        st.lists(COORDINATES, min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_arrays_are_encoded_as_tensors_are(kind: str, data: st.DataObject) -> None:
    feature = fit(kind, data.draw(FIT_ON[kind]), max_values=data.draw(st.integers(1, 8)))
    assert_same(feature, data.draw(raw_values(feature)))


START = r"""
import importlib.abc, pickle, sys
class Refusal(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("tensorflow", "tf_keras", "keras"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Refusal())
data = pickle.load(sys.stdin.buffer)
"""
END = "sys.stdout.buffer.write(pickle.dumps(result))"


def without_tensorflow(program: str, data: Any) -> Any:
    """Runs a program, which makes `result` of `data`, where TensorFlow cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", f"{START}{program}\n{END}"],
        input=pickle.dumps(data),
        check=True,
        stdout=subprocess.PIPE,
    )
    return pickle.loads(done.stdout)


SPLIT = """
from tfrs_pipeline.features.categorical import split_words
result = [*map(split_words, data)]
"""


def test_every_character_is_split_into_words_as_in_a_graph() -> None:
    # Between and after these, Unicode has assigned none but for private use.
    points = *range(0xD800), *range(0xF900, 0x33500), *range(0xE0000, 0xE0200)
    characters = [character for character in map(chr, points) if character not in NEW_CAPITALS]
    # After a letter, after a character that is a word, between spaces, and before a letter.
    texts = [
        " ".join(f"a{x} 手{x} {x} {x}b" for x in characters[start : start + 1000])
        for start in range(0, len(characters), 1000)
    ]
    expected = categorical._words_in_graph(tf.constant(texts))
    # Where TensorFlow is loaded first, Arrow calls TensorFlow's RE2, with its tables of Unicode.
    for words, others in zip(without_tensorflow(SPLIT, texts), expected, strict=True):
        assert words == [word.decode() for word in others.numpy()]


HOURS = Categorical("hour", tuple(map(str, range(24))), is_from_timestamp=True)
NUMBERS = Numeric("hour", is_from_timestamp=True), Numeric("weekday", is_from_timestamp=True)


@pytest.mark.parametrize("features", [(HOURS,), NUMBERS], ids=["text", "numbers"])
def test_a_timestamp_fills_arrays_as_it_fills_tensors(features: Any) -> None:
    moments = np.arange(-(10**9), 4 * 10**9, 3600 * 7919, dtype=float)
    moments = np.concatenate([moments, moments + 3599.999, moments // 86_400 * 86_400, [np.nan]])
    raw = encoding.raw_requests(features, [{}] * len(moments)) | {encoding.TIMESTAMP: moments}
    for feature in features:  # One request in ten says it itself.
        raw[feature.name][::10] = "3" if feature.raw_dtype == "string" else 3.0
    specs = graph.tensor_specs(encoding.request_signature(features))
    encode = tf.function(
        lambda tensors: graph.encode_requests(features, tensors), input_signature=[specs]
    )
    others = encode({name: tf.constant(values) for name, values in raw.items()})
    for name, encoded in encoding.encode_requests(features, raw).items():
        assert len(np.unique(encoded[:-1])) >= 7
        np.testing.assert_array_equal(encoded, others[name])


def test_another_shape_is_refused() -> None:
    for kind, raw in (("vector", np.zeros((2, 4))), ("numeric", np.zeros((2, 1)))):
        with pytest.raises(ValueError, match=r"'x' must have the shape \(None.*Received: \(2, "):
            fit(kind, FITTED[kind]).encode(raw)


PROGRAM = """
from tfrs_pipeline.features.encoding import encode_requests, parse_request, raw_requests
from tfrs_pipeline.features.kinds import KINDS, feature_from_dict
fitted, new = data
result = {}
for kind, cls in KINDS.items():
    feature = feature_from_dict(cls.fit(kind, fitted[kind]).to_dict())
    typed = parse_request([feature], {kind: feature.example or "a"})
    assert feature.had_values in (True, False) and len(feature.missing) == 1
    encode_requests([feature], raw_requests([feature], [typed, None]))
    assert len(feature.unknown(feature.to_raw(new[kind]))) == len(new[kind])
    result[kind] = feature.encode_column(new[kind])
"""


def test_a_process_without_tensorflow_fits_and_encodes() -> None:
    known = {**FITTED, "text": [*FITTED["text"], "the film"]}
    for kind, encoded in without_tensorflow(PROGRAM, (known, NEW)).items():
        expected = KINDS[kind].fit(kind, known[kind]).encode_column(NEW[kind])
        np.testing.assert_array_equal(encoded, expected)
