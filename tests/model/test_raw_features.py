"""Raw values encoded in the graph: the same as `Feature.encode`."""

import json
import keyword
import math
import os
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tfrs_pipeline.config import FeatureKind
from tfrs_pipeline.model.features import Feature
from tfrs_pipeline.model.raw_features import RawFeatures, raw_columns

FLOAT64_ROUNDING = 2.0**-52
# TensorFlow's threads take smaller float32 numbers for 0.
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
EAST = timezone(timedelta(hours=5, minutes=30))
# Of Unicode 15.1, which RE2 does not know and Python from 3.13 does.
TOO_NEW = range(0x2EBF0, 0x2EE5E)

FITTED: dict[FeatureKind, list[Any]] = {
    "categorical": ["M", None, "F", 7, 2.5, "Ünïcode"],
    "hashed": ["x", None, 7, "é"],
    "multi_categorical": [["a", "b", "c"], None, ["b", 7]],
    "text": ["The end's near", None, "ΤΕΛΟΣ: the FILM", "İstanbul"],
    "numeric": [1.5, None, -2.0, 1e4],
    "bucketized": [1.5, None, -2.0, 0.1, 3, 3, 8],
    "timestamp": [datetime(2024, 3, 1, tzinfo=UTC), None, datetime(2021, 12, 31, 7, tzinfo=EAST)],
    "vector": [[0.5, -1.0, 2.0], None, [0.0, 0.0, 0.1]],
}
NEW: dict[FeatureKind, list[Any]] = {
    "categorical": ["M", None, "X", "F", math.nan, "7", 7, "2.5", "Ünïcode", "m"],
    "hashed": ["x", None, "é", 7, "7", math.nan, "never seen", "x", "x ", 0.5],
    "multi_categorical": [
        *(["c", "new", "b", "a"], [], None, ["b", "b", "b", "b", "a"], "a", [None, "a"]),
        *(["", "a"], ("7", 7), math.nan, [""]),
    ],
    "text": [
        *("the film, the end's near", "", None, "!?", "İSTANBUL istanbul", "Τέλος ΤΕΛΟΣ τελος"),
        *("END'S'FILM the\0end\1film", " ".join(["film"] * 30), 7, math.nan),
    ],
    "numeric": [1.5, None, math.nan, math.inf, -math.inf, 0, -0.0, 1e300, 0.1, 7],
    "bucketized": [1.5, None, math.nan, math.inf, -math.inf, 0.1, 0.1 - 1e-9, -7, 3, 8],
    "timestamp": [
        *(datetime(2024, 3, 1, tzinfo=UTC), None, datetime(1969, 12, 31, 23, 59, 59, tzinfo=EAST)),
        *(datetime(2031, 1, 1, tzinfo=EAST), datetime(1970, 1, 1, tzinfo=UTC), math.nan),
        *(datetime(2023, 5, day, 12, tzinfo=UTC) for day in range(1, 5)),
    ],
    "vector": [
        *([0.5, -1.0, 2.0], None, np.ones(3), (0, 0, 0), math.nan, [1e9, -1e-9, 1.0]),
        *([0.1 * i, 0.2, 0.3] for i in range(4)),
    ],
}
KINDS = get_args(FeatureKind)


def fitted_features() -> list[Feature]:
    """One feature a kind, after a way through JSON."""
    features = [Feature.fit(f"a_{kind}", kind, FITTED[kind], max_values=3) for kind in KINDS]
    return [Feature.from_dict(json.loads(json.dumps(feature.to_dict()))) for feature in features]


def new_columns() -> dict[str, list[Any]]:
    return {f"a_{kind}": NEW[kind] for kind in KINDS}


def tolerance(feature: Feature, expected: np.ndarray) -> np.ndarray | float:
    """Largest difference that the rounding of other libraries' functions explains.

    Without such functions both sides take the same steps in IEEE arithmetic: no difference. Two
    libraries' logarithms, sines and cosines are at most some float64 roundings apart; 4 are
    allowed. An age is then (log - mean) / scale, which divides the log's difference by the scale;
    log = age * scale + mean. What remains may tip the rounding to float32.
    """
    if feature.kind != "timestamp":
        return SMALLEST_NORMAL
    size = np.ones(expected.shape)
    size[:, 0] = np.abs(expected[:, 0]) + abs(feature.mean) / feature.scale
    return (
        4 * FLOAT64_ROUNDING * size
        + np.spacing(np.abs(expected), dtype=np.float32)
        + SMALLEST_NORMAL
    )


def assert_same(feature: Feature, encoded: tf.Tensor, column: Sequence[Any]) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # What is too large for float32, infinite.
        expected = feature.encode(column)
    actual = encoded.numpy()
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if expected.dtype == np.int32:
        np.testing.assert_array_equal(actual, expected)
        return
    is_finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~is_finite], expected[~is_finite])
    expected, actual = np.where(is_finite, [expected, actual], np.float32(0)).astype(np.float64)
    assert (np.abs(actual - expected) <= tolerance(feature, expected)).all(), (actual, expected)


def assert_encodes_the_same(feature: Feature, column: Sequence[Any]) -> None:
    raw = raw_columns([feature], {feature.name: column}, len(column))
    assert_same(feature, RawFeatures([feature])(raw)[feature.name], column)


class Served(tf.Module):
    """What an export would hold: the features, behind a traced function."""

    def __init__(self, features: Sequence[Feature]) -> None:
        super().__init__()
        self.raw_features = RawFeatures(features)
        self.encode = tf.function(
            lambda raw: self.raw_features(raw), input_signature=[self.raw_features.signature]
        )

    def save(self, folder: Path) -> None:
        tf.saved_model.save(self, str(folder), signatures={"encode": self.encode})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    Served(fitted_features()).save(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return tf.saved_model.load(str(folder))


def tensors(features: Sequence[Feature], columns: dict[str, Any], num_rows: int) -> dict[str, Any]:
    """Raw values as the functions of a loaded model take them."""
    signature = RawFeatures(features).signature
    raw = raw_columns(features, columns, num_rows)
    return {name: tf.constant(values, signature[name].dtype) for name, values in raw.items()}


# By example


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(kind: FeatureKind) -> None:
    feature = Feature.fit("x", kind, FITTED[kind], max_values=3)
    assert_encodes_the_same(feature, FITTED[kind])
    assert_encodes_the_same(feature, NEW[kind])
    assert_encodes_the_same(feature, [None])
    assert_encodes_the_same(feature, [])
    for value in NEW[kind]:
        assert_encodes_the_same(feature, [value])


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"vector"}))
def test_features_of_columns_without_a_value(kind: FeatureKind) -> None:
    assert_encodes_the_same(Feature.fit("x", kind, [None, None]), NEW[kind])


def test_the_signature_and_what_fits_it() -> None:
    features = fitted_features()
    expected: dict[FeatureKind, tuple[list[int | None], tf.DType]] = {
        "categorical": ([None], tf.string),
        "hashed": ([None], tf.string),
        "multi_categorical": ([None, None], tf.string),
        "text": ([None], tf.string),
        "numeric": ([None], tf.float64),
        "bucketized": ([None], tf.float64),
        "timestamp": ([None], tf.float64),
        "vector": ([None, 3], tf.float32),
    }
    signature = RawFeatures(features).signature
    raw = raw_columns(features, {**new_columns(), "other": []}, 10)
    assert list(signature) == list(raw) == [feature.name for feature in features]
    for kind, (shape, dtype) in expected.items():
        name = f"a_{kind}"
        assert signature[name] == tf.TensorSpec(shape, dtype, name)
        assert signature[name].shape.is_compatible_with(raw[name].shape)
        assert raw[name].dtype == (object if dtype == tf.string else dtype.as_numpy_dtype)
        assert dtype != tf.string or all(type(value) is str for value in raw[name].flat)


def test_raw_values_written_down() -> None:
    raw = raw_columns(fitted_features(), new_columns(), 10)
    assert raw["a_categorical"][:5].tolist() == ["M", "", "X", "F", ""]
    assert raw["a_multi_categorical"][[0, 1, 5]].tolist() == [
        ["c", "new", "b", "a", ""],
        [""] * 5,
        ["a"] + [""] * 4,
    ]
    assert raw["a_text"][:4].tolist() == ["the film, the end's near", "", "", "!?"]
    assert raw["a_timestamp"][[2, 4]].tolist() == [-1 - 5.5 * 3600, 0]
    assert raw["a_vector"][0].tolist() == [0.5, -1.0, 2.0]
    for name in ("a_numeric", "a_bucketized", "a_timestamp", "a_vector"):
        assert np.isnan(raw[name][1]).all()


def test_codes_written_down() -> None:
    feature = Feature("genres", "multi_categorical", ("a", "b", "c"), num_values=3)
    encode = RawFeatures([feature])
    raw = tf.constant([["x", "c", "", "a"], ["b", "b", "", ""], ["", "", "", "a"]])
    assert encode({"genres": raw})["genres"].numpy().tolist() == [[0, 3, 0], [2, 2, 0], [0, 0, 0]]
    assert encode({"genres": raw[:, :1]})["genres"].numpy().tolist() == [
        [0] * 3,
        [2, 0, 0],
        [0] * 3,
    ]
    assert encode({"genres": raw[:, :0]})["genres"].numpy().tolist() == [[0] * 3] * 3


def test_the_empty_string_is_missing() -> None:
    hashed = Feature("h", "hashed", num_buckets=16)
    assert RawFeatures([hashed])({"h": ["", "a"]})["h"].numpy().tolist() == [
        0,
        *hashed.encode(["a"]),
    ]
    assert hashed.encode([""]).tolist() == [0]
    known = Feature.fit("c", "categorical", ["", "a"])
    assert known.vocabulary == ("a",)
    assert known.encode(["", None, "a"]).tolist() == [0, 0, 1]
    assert RawFeatures([known])({"c": ["", "a"]})["c"].numpy().tolist() == [0, 1]
    several = Feature.fit("g", "multi_categorical", [["", "a"], [""]])
    assert several.encode([["", "a"], [""]]).tolist() == [[1], [0]]


def test_what_is_not_finite_is_missing_where_python_refuses_it() -> None:
    vector = Feature.fit("v", "vector", [[3.0, 4.0]])
    time = Feature.fit("t", "timestamp", FITTED["timestamp"])
    encoded = RawFeatures([vector, time])(
        {
            "v": [[math.nan, 1.0], [1.0, math.inf], [3.0, 4.0]],
            "t": np.array([math.inf, -math.inf, 0.0]),
        }
    )
    assert np.isnan(encoded["v"]).all(axis=1).tolist() == [True, True, False]
    assert np.isnan(encoded["t"]).all(axis=1).tolist() == [True, True, False]
    assert np.isfinite(encoded["t"][2]).all()


# With Hypothesis: features fitted on one column, applied to another

CHARACTERS = st.characters(exclude_categories=("Cn", "Cs")).filter(lambda c: ord(c) not in TOO_NEW)
# Often what is special: words' apostrophes, sigmas and what they look past, delimiters, NUL.
TEXTS = st.text(st.one_of(st.sampled_from("aBΣσςİIı'’.:_ \0\1\2\n²Ⅷǅé\u0301\u00ad"), CHARACTERS))  # noqa: RUF001
MISSING = st.sampled_from([None, math.nan])
VALUES = st.one_of(
    st.sampled_from(["a", "b", "c", "1"]),
    TEXTS.filter(bool),
    st.integers(-3, 3),
    st.booleans(),
    st.floats(allow_nan=False),
)
LISTS = st.one_of(MISSING, VALUES, st.lists(st.one_of(st.none(), VALUES), max_size=6)).map(
    # A value alone is one only if it is a string.
    lambda value: value if isinstance(value, (list, str)) or value != value else None
)
# So that no difference of two of them is too small to be a normal float64.
NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 2.5, math.inf, -math.inf]),
    st.floats(1e-100, 1e100),
    st.floats(-1e100, -1e-100),
    st.integers(-(2**60), 2**60),
)
ZONES = st.sampled_from([UTC, EAST, timezone(timedelta(hours=-8))])
TIMES = st.one_of(
    st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=ZONES),
    st.datetimes(datetime(2020, 1, 1), datetime(2024, 1, 1), timezones=ZONES),
    st.integers(-10_000, 40_000).map(
        lambda days: datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days)
    ),
)
PARTS = st.one_of(
    st.just(0.0), st.floats(2.0**-50, 2.0**50, width=32), st.floats(-1.0, -0.5, width=32)
)
VECTORS = st.lists(PARTS, min_size=3, max_size=3)
ENTRIES: dict[FeatureKind, st.SearchStrategy[Any]] = {
    "categorical": st.one_of(MISSING, VALUES),
    "hashed": st.one_of(MISSING, VALUES),
    "multi_categorical": LISTS,
    "text": st.one_of(MISSING, TEXTS, VALUES),
    "numeric": st.one_of(MISSING, NUMBERS),
    "bucketized": st.one_of(MISSING, NUMBERS),
    "timestamp": st.one_of(MISSING, TIMES),
    "vector": st.one_of(MISSING, VECTORS, VECTORS.map(np.array)),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(data=st.data())
def test_features_fitted_on_any_column(kind: FeatureKind, data: st.DataObject) -> None:
    columns = st.lists(ENTRIES[kind], max_size=8)
    column = data.draw(columns)
    fitted = [*column, [1.0, 2.0, 2.0]] if kind == "vector" else column
    max_values = data.draw(st.integers(1, 8))
    feature = Feature.fit("x", kind, fitted, max_values=max_values)
    # What was fitted is all known: words that were split otherwise would not be.
    assert_encodes_the_same(feature, column)
    assert_encodes_the_same(feature, data.draw(columns))


@settings(max_examples=60)
@given(data=st.data())
def test_a_loaded_model_encodes_any_rows(loaded: Any, data: st.DataObject) -> None:
    features = fitted_features()
    num_rows = data.draw(st.integers(0, 4))
    columns = {
        feature.name: data.draw(
            st.lists(
                st.one_of(ENTRIES[feature.kind], st.sampled_from(NEW[feature.kind])),
                min_size=num_rows,
                max_size=num_rows,
            )
        )
        for feature in features
    }
    encoded = loaded.encode(tensors(features, columns, num_rows))
    for feature in features:
        assert_same(feature, encoded[feature.name], columns[feature.name])


# Text


def test_every_character_is_lowered_and_split_as_python_does() -> None:
    known = [
        chr(code)
        for code in range(sys.maxunicode + 1)
        if code not in TOO_NEW and unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")
    ]
    # By itself, and around sigmas of which some end a word, as far as the character lets them.
    lines = [f"{c} aΣ{c}Σa {c}Σ a'{c}" for c in known]
    column = ["|".join(lines[i : i + 10]) for i in range(0, len(lines), 10)]
    feature = Feature.fit("x", "text", column, max_values=100)
    assert len(feature.vocabulary) > 100_000
    assert_encodes_the_same(feature, column)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ΟΔΟΣ ΣΟΦΟΣ. Σ ΑΣ'Α ΑΣ'", ["οδος", "σοφος", "σ", "ασ'α", "ας"]),  # noqa: RUF001
        ("ΣΣΣΣ ΑΣΣΣ", ["σσσς", "ασσς"]),
        # The lower case of İ is an i with a combining dot, which is no letter.
        ("İI ıi", ["i", "i", "ıi"]),  # noqa: RUF001
        ("a''b c'd'e 'f'", ["a", "b", "c'd", "e", "f"]),
        ("a\0B\1c\2D", ["a", "b", "c", "d"]),
        ("x² Ⅷ ٣ 三_3", ["x²", "ⅷ", "٣", "三_3"]),
        ("cafe\u0301s", ["cafe", "s"]),
    ],
)
def test_words_written_down(text: str, words: list[str]) -> None:
    feature = Feature("x", "text", tuple(dict.fromkeys([*words, "other"])), num_values=6)
    codes = [feature.places[word] for word in words]
    encoded = RawFeatures([feature])({"x": [text]})["x"].numpy()
    assert encoded.tolist() == [codes + [0] * (6 - len(codes))]
    assert feature.encode([text]).tolist() == encoded.tolist()


# Saved models


def test_a_loaded_model_encodes_the_same(loaded: Any) -> None:
    features, columns = fitted_features(), new_columns()
    raw = tensors(features, columns, 10)
    signature = loaded.signatures["encode"]
    assert set(signature.structured_input_signature[1]) == set(columns)
    for encoded in (loaded.encode(raw), signature(**raw)):
        assert set(encoded) == set(columns)
        for feature in features:
            assert_same(feature, encoded[feature.name], columns[feature.name])


def test_a_graph_divides_as_python_does(loaded: Any) -> None:
    # Multiplied by a rounded reciprocal instead, almost half of the vectors' numbers differ.
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {name: [None] * 1000 for name in new_columns()}
    columns["a_numeric"] = rng.normal(size=1000)
    columns["a_vector"] = list(rng.normal(size=(1000, 3)))
    features = fitted_features()
    encoded = loaded.encode(tensors(features, columns, 1000))
    for feature in features:
        assert_same(feature, encoded[feature.name], columns[feature.name])


def test_a_batch_equals_its_single_rows(loaded: Any) -> None:
    features = fitted_features()
    whole = loaded.encode(tensors(features, new_columns(), 10))
    for row in range(10):
        columns = {name: column[row : row + 1] for name, column in new_columns().items()}
        single = loaded.encode(tensors(features, columns, 1))
        for name, encoded in single.items():
            np.testing.assert_array_equal(encoded[0], whole[name][row])


def test_names_that_no_signature_can_have_are_replaced(tmp_path: Path) -> None:
    names = ["release date", "release_date", "Übersicht", "a", "A", "2nd", "_x", "a/b", "日", "月"]
    names += ["class", "self", "k", "user_id"]
    features = [Feature("x", "hashed", num_buckets=64)] + [
        Feature(name, "hashed", num_buckets=64) for name in names
    ]
    served = Served(features)
    served.save(tmp_path)
    inputs = [spec.name for spec in served.raw_features.signature.values()]
    # What takes the features by keyword can be called with these.
    assert all(name.isidentifier() and not keyword.iskeyword(name) for name in inputs)
    assert not {"self", "k", "user_id"} & set(inputs)
    signature = tf.saved_model.load(str(tmp_path)).signatures["encode"]
    assert set(signature.structured_input_signature[1]) == set(inputs)
    assert [inputs[0], *inputs[4:6]] == ["x", "a", "A_"]
    values = [f"value {i}" for i in range(len(inputs))]
    encoded = signature(
        **{name: tf.constant([value]) for name, value in zip(inputs, values, strict=True)}
    )
    for feature, value in zip(features, values, strict=True):
        assert encoded[feature.name].numpy() == feature.encode([value])


PROGRAM = r"""
import sys
import numpy as np
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
with np.load(sys.argv[2], allow_pickle=True) as raw:
    encoded = model.encode({name: tf.constant(raw[name].tolist(), dtype)
                            for name, dtype in zip(raw, sys.argv[4:], strict=True)})
np.savez(sys.argv[3], **{name: values.numpy() for name, values in encoded.items()})
assert not [name for name in sys.modules if name.startswith("tfrs_pipeline")]
assert tf.strings.lower(["I"], encoding="utf-8").numpy()[0].decode() == "\u0131"
"""


@pytest.mark.slow
def test_a_bare_process_of_another_locale_encodes_the_same(folder: Path, tmp_path: Path) -> None:
    features, columns = fitted_features(), new_columns()
    raw = raw_columns(features, columns, 10)
    np.savez(tmp_path / "raw.npz", allow_pickle=True, **raw)
    dtypes = [spec.dtype.name for spec in RawFeatures(features).signature.values()]
    paths = [str(folder), str(tmp_path / "raw.npz"), str(tmp_path / "encoded.npz")]
    subprocess.run(
        [sys.executable, "-c", PROGRAM, *paths, *dtypes],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "LC_ALL": "tr_TR.UTF-8"},
    )
    with np.load(tmp_path / "encoded.npz") as encoded:
        for feature in features:
            values = tf.constant(encoded[feature.name])
            assert_same(feature, values, columns[feature.name])


# What is refused


@pytest.mark.parametrize(
    ("kind", "column", "message"),
    [
        ("timestamp", [datetime(2024, 1, 1)], "'x' must hold datetimes with a time zone"),
        ("timestamp", [1.7e9], "'x' must hold datetimes with a time zone"),
        ("vector", [[1.0, 2.0]], "'x' must hold vectors of length 3"),
        ("vector", [[1.0, 2.0, math.inf]], "'x' must hold finite float32 numbers"),
        ("numeric", [1.0, 2.0], "'x' must have 1 rows. Received: 2"),
    ],
)
def test_columns_that_are_refused(kind: FeatureKind, column: list[Any], message: str) -> None:
    feature = Feature.fit("x", kind, FITTED[kind])
    with pytest.raises(ValueError, match=message):
        raw_columns([feature], {"x": column}, 1)


def test_what_is_missing_is_named() -> None:
    features = fitted_features()
    columns: dict[str, Any] = {**new_columns(), "other": [0] * 10}
    raw = tensors(features, columns, 10)
    del columns["a_text"], raw["a_text"]
    message = r"\['a_text'\] are missing. Received: \['a_bucketized', 'a_categorical', "
    with pytest.raises(ValueError, match=message):
        raw_columns(features, columns, 10)
    with pytest.raises(ValueError, match=message):
        RawFeatures(features)(raw)


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match=r"Received twice: \['x'\]"):
        RawFeatures([Feature("x", "numeric"), Feature("x", "categorical")])


def test_there_may_be_no_feature() -> None:
    assert RawFeatures([])({}) == raw_columns([], {}, 3) == {}
