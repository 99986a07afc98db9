"""Encoding of feature columns, in memory and in a saved model, and their embedding."""

import math
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.features.columns import EAST, FITTED, NEW, NUM_NEW, fit
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.features import raw
from tfrs_pipeline.features.categorical import Text
from tfrs_pipeline.features.kinds import KINDS, feature_from_dict
from tfrs_pipeline.features.numeric import (
    MAX_BUCKETS,
    MAX_DEVIATIONS,
    Bucketized,
    Numeric,
    Timestamp,
    Vector,
)
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.model.towers import FeatureTable

WIDTHS = dict.fromkeys(KINDS, 4) | {"numeric": 2, "timestamp": 6, "vector": 5}


@pytest.mark.parametrize(
    ("kind", "fitted", "options", "vocabulary", "new", "expected"),
    [
        ("categorical", ["M", "F", None, "M"], {}, "F M", ["F", "M", None, "X"], [1, 2, 0, 0]),
        ("categorical", [7, 2.5, "7", ""], {}, "2.5 7", [7.0, "7", 2.5, 2], [2, 2, 1, 0]),
        ("categorical", [None, ""], {}, "", ["a", None], [0, 0]),
        (
            "multi_categorical",
            [["a", "b", "c"], ["a"], None],
            {"max_values": 2},
            "a b c",
            [["c", "a", "b"], ["b"], [], None, ["", "b"], ["z", "b"]],
            [[3, 1], [2, 0], [0, 0], [0, 0], [2, 0], [2, 0]],
        ),
    ],
)
def test_codes_written_down(
    kind: str, fitted: Any, options: dict[str, Any], vocabulary: str, new: Any, expected: Any
) -> None:
    feature = fit(kind, fitted, **options)
    assert feature.vocabulary == tuple(vocabulary.split())
    assert feature.num_codes == len(feature.vocabulary)
    assert feature.encode_column(new).tolist() == expected


def test_a_word_of_one_text_is_unknown() -> None:
    feature = Text.fit("x", ["the film", "The end", "end it it"])
    assert feature.vocabulary == ("end", "the")
    assert feature.encode_column(["the odd end"]).tolist() == [[2, 1, *[0] * 14]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Schindler's  List! Délicatessen", ["schindler's", "list", "délicatessen"]),
        ("ΟΔΟΣ ΣΟΦΟΣ.", ["οδος", "σοφος"]),
        ("İI ıi", ["ii", "ıi"]),  # noqa: RUF001
        ("c'd 'f' '' rock'n'roll'", ["c'd", "f", "rock'n'roll"]),
        ("a\0B\1c\2D\na", ["a", "b", "c", "d", "a"]),
        ("x² Ⅷ ٣ ж_3-cafe\u0301s हिन्दी", ["x²", "ⅷ", "٣", "ж_3", "cafe\u0301s", "हिन्दी"]),
        (" !?. ", []),
        ("I ❤\ufe0f NY", ["i", "ny"]),
        # Scripts without spaces: a character, with its marks, is a word.
        ("iPhone手机'三_3", ["iphone", "手", "机", "三", "_3"]),
        ("ラーメン。か\u3099き ｶﾞｰ", ["ラー", "メ", "ン", "か\u3099", "き", "ｶﾞｰ"]),
        ("สวัสดี ດີ", ["ส", "วั", "ส", "ดี", "ດີ"]),
        ("សួរ។ ဂလာပါ။", ["សួ", "រ", "ဂ", "လာ", "ပါ"]),
        ("한국어 текст", ["한국어", "текст"]),
    ],
)
def test_words_written_down(text: str, words: list[str]) -> None:
    feature = fit("text", [text])
    assert feature.vocabulary == tuple(sorted(set(words)))
    codes = [feature.vocabulary.index(word) + 1 for word in words]
    # A later text may be longer, and have unknown words.
    later = f"@unheard, {text} of {text}"
    twice = codes + [0] * (feature.num_values - len(codes)), (codes * 2)[: feature.num_values]
    for row, expected in zip(feature.encode_column([text, later]).tolist(), twice, strict=True):
        assert row == expected + [0] * (feature.num_values - len(expected))


@pytest.mark.parametrize(
    ("values", "new", "expected"),
    [
        ([1.0, 2.0, None, 6.0], [3, None, 6], [0, math.nan, 3 / math.sqrt(14 / 3)]),
        ([3.0] * 3, [4], [1]),  # Equal numbers have no scale.
        ([0.1] * 3, [1.1], [1]),  # Their mean is not .1.
        ([1e300, *[-1.0, 1.0] * 4, 0.0], [1e300, 1.0], [3, -1 / 3]),  # Squares would be infinite.
    ],
)
def test_numbers_are_standardised(values: list[Any], new: list[Any], expected: list[Any]) -> None:
    np.testing.assert_allclose(Numeric.fit("price", values).encode_column(new), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["numeric", "timestamp", "vector"])
def test_absurd_values_are_clipped_before_they_drown_the_embedding(kind: str) -> None:
    feature = fit(kind, FITTED[kind])
    raw = np.array([1e300, -1e300, math.inf, 0.0])
    if kind == "vector":
        raw = np.tile(np.clip(raw, -3e38, 3e38)[:, np.newaxis], 3).astype(np.float32)
        raw[2, 0] = np.nan
    encoded = feature.encode(raw)
    assert np.isnan(encoded[2]).all()
    assert np.nanmax(np.abs(encoded)) == MAX_DEVIATIONS
    embedded = feature.layer(4)(encoded).numpy()
    assert np.isfinite(embedded).all()
    assert embedded[:, -1].tolist() == [0, 0, 1, 0]


def test_buckets_of_different_numbers_hold_as_many_each() -> None:
    numbers = np.random.default_rng(0).permutation(3 * MAX_BUCKETS) * 0.1
    codes = Bucketized.fit("x", numbers.tolist()).encode_column(numbers)
    assert np.bincount(codes).tolist() == [0] + [3] * MAX_BUCKETS
    assert (np.diff(codes[np.argsort(numbers)]) >= 0).all()


@given(st.lists(st.sampled_from([None, math.nan, 0.0, 1.0, 2.5, -7.0, 1e300]), max_size=200))
def test_every_bucket_holds_some_of_the_fitted_rows(column: list[float | None]) -> None:
    feature = Bucketized.fit("x", column)
    codes = feature.encode_column(column)
    is_missing = [value is None or math.isnan(value) for value in column]
    assert (codes == 0).tolist() == is_missing
    assert feature.num_codes <= MAX_BUCKETS
    if not all(is_missing):
        assert sorted(set(codes.tolist()) - {0}) == list(range(1, feature.num_codes + 1))


def as_the_calendar_says(moment: datetime, reference: datetime) -> list[float]:
    """Returns the age, hour and weekday of a moment, computed with datetime's own methods."""
    local = moment.astimezone(UTC)
    hour = local.hour + local.minute / 60 + local.second / 3600 + local.microsecond / 3.6e9
    angles = [2 * math.pi * hour / 24, 2 * math.pi * local.weekday() / 7]
    days = max((reference - moment) / timedelta(days=1), 0)
    circle = [f(angle) for angle in angles for f in (math.sin, math.cos)]
    return [math.log(1 + days), *circle]


def test_ages_count_from_the_fitted_reference_and_end_there() -> None:
    end = datetime(2024, 1, 1, tzinfo=UTC)
    column = [end - timedelta(days=days) for days in (10, 1, -3)]
    feature = Timestamp.fit("t", column, reference=end)
    ages = feature.encode_column(column)[:, 0] * feature.scale + feature.mean
    np.testing.assert_allclose(ages, np.log([11, 2, 1]), atol=1e-6)
    later = feature.encode_column([end, end + timedelta(days=900)])
    np.testing.assert_array_equal(later[:, 0], later[::-1, 0])


def test_vectors_have_length_one_on_average() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 7)) * 30
    encoded = Vector.fit("v", [*vectors, None]).encode_column(vectors)
    assert np.sqrt((encoded**2).sum(axis=1).mean()) == pytest.approx(1, rel=1e-6)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(Vector.fit("v", unit).encode_column(unit), unit, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_from_column_to_embedding(kind: str) -> None:
    feature = fit(kind, FITTED[kind])
    encoded = feature.encode_column(NEW[kind])
    (missing,) = feature.missing
    assert encoded.dtype == missing.dtype
    assert encoded.shape == (NUM_NEW, *missing.shape)
    np.testing.assert_array_equal(encoded[1], missing)
    items: Any = {"candidate_features": (feature,), "candidate_columns": {"x": encoded}}
    table = FeatureTable(Corpus(Ids(range(NUM_NEW)), Ids([1]), **items), "candidate")
    rows = table(tf.constant([0, 2, 7, 1]))["x"].numpy()
    np.testing.assert_array_equal(rows, [missing, missing, encoded[6], encoded[0]])
    embedded = feature.layer(4)(tf.constant(encoded)).numpy()
    assert embedded.shape == (NUM_NEW, WIDTHS[kind])
    assert np.isfinite(embedded).all()
    assert feature.encode_column([]).shape == (0, *missing.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_lists_and_arrays_are_one_to_a_feature(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    column = FITTED[kind]
    typed = pa.array(column, pa.timestamp("us", "UTC") if kind == "timestamp" else None)
    chunked = pa.chunked_array([typed[:0], typed[:1], typed[1:]])
    arrays = [typed, chunked, pa.concat_arrays([typed, typed])[len(typed) :]]
    if kind in ("numeric", "bucketized"):
        arrays += [np.array(column, np.float64), pa.array([str(v) if v else v for v in column])]
        assert fit(kind, pa.array([1, 3])) == fit(kind, ["1", 3.0])
    if kind == "categorical":
        arrays += [typed.dictionary_encode(), typed.cast(pa.large_string())]
        arrays += [np.array(column, object)]
        assert fit(kind, pa.array([1.0, 2.5])) == fit(kind, [1.0, 2.5])
    if kind == "vector":
        arrays += [typed.cast(pa.list_(pa.float32(), 3)), typed.cast(pa.large_list(pa.float32()))]
        whole = np.arange(6.0).reshape(2, 3)
        assert fit(kind, whole) == fit(kind, whole.tolist())
    feature = fit(kind, column)
    expected = feature.encode_column(column)
    for rows_per_call in (raw.ROWS_PER_CALL, 3):
        monkeypatch.setattr(raw, "ROWS_PER_CALL", rows_per_call)
        for array in [column, *arrays]:
            assert fit(kind, array) == feature
            np.testing.assert_array_equal(feature.encode_column(array), expected)


# With Hypothesis: features fitted on one column, against a slow way to encode another

MISSING = st.sampled_from([None, math.nan])
VALUES = st.one_of(
    st.sampled_from(["a", "b", "c", "1", ""]), st.text(), st.integers(-3, 3), st.floats(0, 2)
)
# TensorFlow treats subnormal numbers as 0.
FLOATS = st.one_of(st.just(0.0), st.floats(1e-100, 1e100), st.floats(-1e100, -1e-100))
NUMBERS = st.one_of(st.integers(-(2**60), 2**60), FLOATS, st.just(-math.inf))
# Whole minutes: a smaller scale would magnify the rounding of the logarithm.
MINUTES, ZONES = st.integers(-(10**8), 10**8), st.sampled_from([UTC, EAST])
TIMES = st.builds(lambda minutes, zone: datetime.fromtimestamp(60 * minutes, zone), MINUTES, ZONES)
PARTS = st.one_of(st.just(0.0), st.floats(2.0**-50, 2.0**50, width=32))
ENTRIES: dict[str, st.SearchStrategy[Any]] = {
    "categorical": st.one_of(MISSING, VALUES),
    "multi_categorical": st.one_of(MISSING, st.lists(st.one_of(st.none(), VALUES), max_size=5)),
    # Characters that Python's regular expression splits into words in the same way.
    "text": st.one_of(MISSING, st.text("aBé'ßЖ_ .\n1", max_size=12)),
    "numeric": st.one_of(MISSING, NUMBERS),
    "bucketized": st.one_of(MISSING, NUMBERS),
    "timestamp": st.one_of(MISSING, TIMES),
    "vector": st.one_of(MISSING, st.lists(PARTS, min_size=3, max_size=3)),
}


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_written(value: Any) -> str:
    """Writes a value as a log does."""
    text = str(value)
    if isinstance(value, float):
        return re.sub(r"^(-?[0-9]+)\.0$", r"\1", text)
    return text.lower() if text in ("True", "TRUE", "False", "FALSE") else text


def slowly_encoded(feature: Any, value: Any) -> Any:
    """Encodes one value, with Python alone."""
    if is_missing(value) or value == -math.inf:
        return feature.missing[0]
    if feature.kind == "bucketized":
        return 1 + sum(float(value) >= boundary for boundary in feature.boundaries)
    if feature.kind == "numeric":
        return np.clip((float(value) - feature.mean) / feature.scale, -10, 10)
    if feature.kind == "timestamp":
        reference = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=feature.reference)
        age, *circle = as_the_calendar_says(value, reference)
        return [np.clip((age - feature.mean) / feature.scale, -10, 10), *circle]
    if feature.kind == "vector":
        return np.clip(np.array(value) / feature.scale, -10, 10)
    places = {known: i for i, known in enumerate(feature.vocabulary, 1)}
    if feature.kind == "categorical":
        return places.get(as_written(value), 0)
    if feature.kind == "text":
        values = re.findall(r"\w+(?:'+\w+)*", value.lower())
    else:
        values = [as_written(v) for v in value if not is_missing(v) and v != ""]
    codes = [places[v] for v in values if v in places][: feature.num_values]
    return codes + [0] * (feature.num_values - len(codes))


@pytest.mark.parametrize("kind", ENTRIES)
@settings(max_examples=25)
@given(data=st.data())
def test_features_fitted_on_any_column_encode_any_other(kind: str, data: st.DataObject) -> None:
    column, other = (data.draw(st.lists(ENTRIES[kind], max_size=8)) for _ in range(2))
    fitted = [*column, [1.0, 2.0, 2.0]] if kind == "vector" else column
    feature = fit(kind, fitted, max_values=data.draw(st.integers(1, 8)))
    for new in (column, other):
        encoded = feature.encode_column(new)
        expected = [slowly_encoded(feature, value) for value in new]
        # Python may round the logarithm, the sine and the cosine differently.
        atol = 1e-5 if kind == "timestamp" else 1e-30
        shaped = np.reshape(expected, encoded.shape)
        np.testing.assert_allclose(encoded, shaped, rtol=3e-7, atol=atol)


def test_texts_keep_more_values_than_lists_and_tell_what_is_cut() -> None:
    words = [f"w{i}" for i in range(70)]
    widths: dict[str, int] = {"text": 64, "multi_categorical": 16}
    for kind, width in widths.items():
        rows = [words[:40], words, ["new"], []]
        column: list[Any] = [" ".join(row) for row in rows] if kind == "text" else rows
        feature = fit(kind, column[:2])
        codes = feature.encode_column(column)
        assert codes.shape == (4, width)
        for row, code in zip(rows, codes, strict=True):
            known = [feature.vocabulary[i - 1] for i in code if i]
            assert known == [word for word in row[:width] if word != "new"]
        assert feature.num_values == width


@pytest.mark.parametrize(
    ("kind", "column", "message"),
    [
        ("numeric", [1.5, None, "cheap"], "numbers: .*'cheap'.*None for missing"),
        ("numeric", [10**400], "numbers: int too large"),
        ("bucketized", pa.array(["1", "", "3"]), "numbers: .*''"),
        ("timestamp", [None, datetime(2024, 1, 1)], "datetimes with a time zone.* row 1 of 2"),
        ("timestamp", [1_700_000_000], "datetimes with a time zone.*1700000000 in row 0 of 1"),
        ("timestamp", pa.array([datetime(2024, 1, 1)]), "datetimes with a time zone.* row 0 of 1"),
        ("vector", [[1, 2, 3], [1.0, 2.0]], "vectors of 3 .* 1 of 2 rows.* row 1, of length 2"),
        ("vector", pa.array([[1.0, 2.0, 3.0], [1.0], None]), "vectors of 3 .* row 1, of length 1"),
        ("vector", [[1, 2, 3], None, []], "vectors of 3 .* 1 of 3 rows.* row 2, of length 0"),
        ("vector", [[1, 2, math.inf], [1, 2, 3]], "vectors of 3 finite .* 1 of 2 rows.* row 0"),
        ("vector", [[1, 2, 1e39], [1, 2, None]], "vectors of 3 finite float32.* in 2 of 2 rows"),
        ("vector", ["1|2", None, 3], "lists of numbers.*'1'"),
        ("vector", pa.array([["a", "b", "c"]]), "lists of numbers.*'c'"),
    ],
)
def test_columns_that_are_refused(kind: str, column: Any, message: str) -> None:
    feature = fit(kind, FITTED[kind])
    for take in (feature.to_raw, lambda column: fit(kind, column)):
        if kind == "vector" and "of length" in message and take != feature.to_raw:
            continue  # Only the fitted length makes these wrong.
        with pytest.raises(ValueError, match=f"'x' must hold {message}"):
            take(column)


def test_settings_and_vectors_that_make_no_feature() -> None:
    with pytest.raises(ValueError, match=r"of 2 finite.* in 1 of 3 rows.* row 1, of length 1"):
        Vector.fit("x", [[1.0, 2.0], [1.0], [3.0, 4.0]])
    with pytest.raises(ValueError, match=r"'x' must hold vectors\. Received: 2 rows without"):
        Vector.fit("x", [None, None])
    with pytest.raises(TypeError, match="means"):
        feature_from_dict({"name": "x", "kind": "numeric", "means": 1.0})
    for kind in ({"kind": "number"}, {}):
        with pytest.raises(ValueError, match=r"'x' must be one of categorical,.*Received: "):
            feature_from_dict({"name": "x", **kind})
