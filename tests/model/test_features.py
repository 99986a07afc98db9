"""Encoding of feature columns and their embedding."""

import json
import logging
import math
from dataclasses import asdict
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, get_args

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tfrs_pipeline.config import FeatureKind
from tfrs_pipeline.model.features import (
    MAX_BUCKETS,
    MAX_HASH_BUCKETS,
    Feature,
    FeatureEmbedding,
    FeatureSpec,
    FeatureTable,
    drop_features,
    weighted_mean,
)

MOMENTS = [
    datetime(2024, 3, 1, 6, 30, tzinfo=UTC),
    None,
    datetime(2021, 12, 31, 23, 59, 59, 500_000, tzinfo=UTC),
    datetime(1965, 1, 1, 12, tzinfo=UTC),
]
COLUMNS: dict[FeatureKind, list[Any]] = {
    "categorical": ["M", None, "F", "M"],
    "hashed": ["x", None, 7, "é"],
    "multi_categorical": [["a", "b", "c"], None, ["b"], []],
    "text": ["The end", None, "the film", ""],
    "numeric": [1.5, None, -2.0, 1e9],
    "bucketized": [1.5, None, -2.0, 0.1],
    "timestamp": MOMENTS,
    "vector": [[0.5, -1.0, 2.0], None, [0.0, 0.0, 0.1], [3.0, 1.0, 1.0]],
}
# The same kinds on a new item: values that no fitted column held.
UNSEEN: dict[FeatureKind, Any] = {
    "categorical": "X",
    "hashed": "new",
    "multi_categorical": ["z"],
    "text": "unheard",
    "numeric": -1e6,
    "bucketized": -1e6,
    "timestamp": datetime(2031, 1, 1, tzinfo=UTC),
    "vector": [9.0, 9.0, 9.0],
}
WIDTHS = dict.fromkeys(get_args(FeatureKind), 4) | {"numeric": 2, "timestamp": 6, "vector": 5}


def test_categorical_codes_start_at_one_and_unknown_is_zero() -> None:
    feature = Feature.fit("gender", "categorical", ["M", "F", None, "M"])
    assert feature.vocabulary == ("F", "M")
    assert feature.encode(["F", "M", None, "X"]).tolist() == [1, 2, 0, 0]
    assert feature.spec.size == 3


def test_rare_values_are_unknown() -> None:
    feature = Feature.fit("word", "text", ["the film", "The end", "end it"], min_count=2)
    assert feature.vocabulary == ("end", "the")
    assert feature.encode(["the odd end"]).tolist() == [[2, 0]]


def test_text_keeps_apostrophes_and_letters_of_any_language() -> None:
    feature = Feature.fit("title", "text", ["Schindler's  List!", "Délicatessen"])
    assert feature.vocabulary == ("délicatessen", "list", "schindler's")


def test_lists_are_padded_and_cut() -> None:
    feature = Feature.fit(
        "genres", "multi_categorical", [["a", "b", "c"], ["a"], None], max_values=2
    )
    assert feature.encode([["c", "a", "b"], ["b"], [], None]).tolist() == [
        [3, 1],
        [2, 0],
        [0, 0],
        [0, 0],
    ]


def test_numeric_is_standardised_and_missing_is_nan() -> None:
    values = [1.0, 2.0, None, 6.0]
    feature = Feature.fit("price", "numeric", values)
    encoded = feature.encode(values)
    assert np.nanmean(encoded) == pytest.approx(0, abs=1e-6)
    assert np.nanstd(encoded) == pytest.approx(1, abs=1e-6)
    assert np.isnan(encoded[2])


@pytest.mark.parametrize("value", [3.0, 0.1])  # The mean of three times .1 is not .1.
def test_equal_numbers_have_no_scale(value: float) -> None:
    feature = Feature.fit("x", "numeric", [value] * 3)
    assert feature.encode([value + 1]).tolist() == [1.0]


# Bucketized


def test_buckets_of_different_numbers_hold_as_many_each() -> None:
    numbers = np.random.default_rng(0).permutation(3 * MAX_BUCKETS) * 0.1
    codes = Feature.fit("x", "bucketized", numbers.tolist()).encode(numbers)
    assert np.bincount(codes).tolist() == [0] + [3] * MAX_BUCKETS
    order = np.argsort(numbers)
    assert (np.diff(codes[order]) >= 0).all()


@given(st.lists(st.sampled_from([None, math.nan, 0.0, 1.0, 2.5, -7.0, 1e300]), max_size=200))
def test_every_bucket_holds_some_of_the_fitted_rows(column: list[float | None]) -> None:
    feature = Feature.fit("x", "bucketized", column)
    codes = feature.encode(column)
    is_missing = [value is None or math.isnan(value) for value in column]
    assert codes.dtype == np.int32
    assert (codes == 0).tolist() == is_missing
    assert feature.spec.size <= MAX_BUCKETS + 1
    if not all(is_missing):
        assert sorted(set(codes.tolist()) - {0}) == list(range(1, feature.spec.size))


def test_numbers_that_were_never_seen_fall_into_the_bucket_around_them() -> None:
    feature = Feature.fit("x", "bucketized", [*[0.0] * 90, *range(1, 11)])
    low, *boundaries = 0.0, *feature.boundaries
    for code, start in enumerate([low, *boundaries], 1):
        assert feature.encode([start, start + 1e-9]).tolist() == [code, code]
    assert feature.encode([-5.0, 1e9, -math.inf, math.inf, None]).tolist() == [
        *(1, feature.spec.size - 1, 1, feature.spec.size - 1, 0),
    ]


# Hashed


def test_hashes_are_the_same_in_every_process() -> None:
    # Written down once: whoever loads a model later must find the same buckets. FarmHash
    # fingerprints modulo 2^40, of which 2^20 is a divisor.
    full = np.array([436859794915, 143324147990, 987519208641])
    for num_buckets in (16, 2**20):
        feature = Feature("x", "hashed", num_buckets=num_buckets)
        assert feature.encode(["a", "b", "é"]).tolist() == (1 + full % num_buckets).tolist()
        seven, also_seven, missing, empty = feature.encode([7, "7", None, ""])
        assert seven == also_seven
        assert missing == empty == 0


def test_hashed_values_spread_over_the_buckets() -> None:
    values = [f"author {i}" for i in range(20_000)]
    feature = Feature.fit("author", "hashed", values)
    num_buckets = feature.num_buckets
    assert num_buckets == 2**16
    codes = feature.encode(values)
    assert codes.min() >= 1
    assert codes.max() < feature.spec.size == num_buckets + 1
    # Of n values in m buckets, m (1 - (1 - 1/m)^n) buckets are met; the deviation is below sqrt(n).
    expected = num_buckets * (1 - (1 - 1 / num_buckets) ** len(values))
    assert abs(len(np.unique(codes)) - expected) < 4 * math.sqrt(len(values))
    unseen = feature.encode([f"other {i}" for i in range(20_000)])
    assert unseen.min() >= 1
    assert abs(unseen.mean() - num_buckets / 2) < 4 * num_buckets / math.sqrt(12 * len(values))


@pytest.mark.parametrize(("num_distinct", "num_buckets"), [(0, 16), (8, 16), (9, 32), (1000, 2048)])
def test_there_are_twice_as_many_buckets_as_values(num_distinct: int, num_buckets: int) -> None:
    column = [*range(num_distinct), *range(num_distinct), None]
    assert Feature.fit("x", "hashed", column).num_buckets == num_buckets <= MAX_HASH_BUCKETS


# Timestamps


def as_the_calendar_says(moment: datetime, reference: datetime) -> list[float]:
    """Age, hour and weekday of a moment, by way of datetime's own methods."""
    local = moment.astimezone(UTC)
    hour = local.hour + local.minute / 60 + local.second / 3600 + local.microsecond / 3.6e9
    angles = [2 * math.pi * hour / 24, 2 * math.pi * local.weekday() / 7]
    days = max((reference - moment) / timedelta(days=1), 0)
    circle = [f(angle) for angle in angles for f in (math.sin, math.cos)]
    return [math.log(1 + days), *circle]


def test_times_are_encoded_as_the_calendar_says() -> None:
    east = timezone(timedelta(hours=9))
    start = datetime(2023, 5, 1, tzinfo=east)
    column = [start + timedelta(hours=31 * i, seconds=7.25 * i) for i in range(40)]
    column += [moment for moment in MOMENTS if moment is not None]
    encoded = Feature.fit("t", "timestamp", column).encode([*column, None])
    expected = np.array([as_the_calendar_says(moment, max(column)) for moment in column])
    expected[:, 0] = (expected[:, 0] - expected[:, 0].mean()) / expected[:, 0].std()
    assert encoded.dtype == np.float32
    np.testing.assert_allclose(encoded[:-1], expected, atol=2e-6)
    assert np.isnan(encoded[-1]).all()


def test_ages_count_from_the_fitted_reference_and_end_there() -> None:
    end = datetime(2024, 1, 1, tzinfo=UTC)
    column = [end - timedelta(days=10), end - timedelta(days=1), end + timedelta(days=3)]
    feature = Feature.fit("t", "timestamp", column, reference=end)
    ages = feature.encode(column)[:, 0] * feature.scale + feature.mean
    np.testing.assert_allclose(ages, np.log([11, 2, 1]), atol=1e-6)
    later = feature.encode([end, end + timedelta(days=900)])
    np.testing.assert_array_equal(later[:, 0], later[::-1, 0])
    alone = feature.encode(column[:1])
    np.testing.assert_array_equal(alone, feature.encode(column)[:1])


def test_a_reference_before_all_times_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    known = [moment for moment in MOMENTS if moment is not None]
    with caplog.at_level(logging.WARNING):
        Feature.fit("t", "timestamp", MOMENTS)
        Feature.fit("t", "timestamp", MOMENTS, reference=sorted(known)[1])
        assert not caplog.records
        early = Feature.fit("up", "timestamp", MOMENTS, reference=min(known) - timedelta(days=1))
    assert "'up': no time is before 1964-12-31" in caplog.text
    assert early.encode(MOMENTS)[[0, 2, 3], 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["numeric", "bucketized"])
def test_only_numbers_are_taken(kind: Any) -> None:
    message = r"'price' must hold numbers\. Received: 'cheap' in row 2 of 3; None is missing"
    with pytest.raises(ValueError, match=message):
        Feature.fit("price", kind, [1.5, None, "cheap"])
    feature = Feature.fit("price", kind, [1.5, None, "2.5"])
    assert feature.encode([2.5]).tolist() == feature.encode(["2.5"]).tolist()
    with pytest.raises(ValueError, match=message):
        feature.encode([1.5, None, "cheap"])


def test_only_times_with_a_zone_are_taken() -> None:
    feature = Feature.fit("t", "timestamp", MOMENTS)
    for value in (datetime(2024, 1, 1), 1_700_000_000, "2024-01-01"):
        with pytest.raises(
            ValueError, match=r"'t' must hold datetimes with a time zone.* row 1 of 2"
        ):
            feature.encode([None, value])


# Vectors


def test_vectors_keep_their_directions_and_have_length_one_on_average() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 7)) * 30
    feature = Feature.fit("v", "vector", [*vectors.tolist(), None])
    encoded = feature.encode([*vectors, None])
    assert encoded.dtype == np.float32
    lengths = np.linalg.norm(encoded[:-1], axis=1)
    assert np.sqrt((lengths**2).mean()) == pytest.approx(1, rel=1e-6)
    np.testing.assert_allclose(
        encoded[:-1] / lengths[:, None],
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        atol=1e-6,
    )
    assert np.isnan(encoded[-1]).all()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(Feature.fit("v", "vector", unit).encode(unit), unit, atol=1e-6)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[1.0, 2.0], [1.0], [3.0, 4.0]], "length 2. Received: 1 of 3 rows of another.*such as 1"),
        ([[1.0, 2.0], None, []], "1 of 3 rows of another length, such as 0"),
        ([[1.0, math.inf], [1.0, 2.0]], "finite float32 numbers. Received: others in 1 of 2 rows"),
        ([[1.0, math.nan], None], "others in 1 of 2 rows"),
        ([[1e39], [1.0]], "others in 1 of 2 rows"),
        ([[1.0, None], [1.0, 2.0]], "others in 1 of 2 rows"),
        ([None, None], "vectors. Received: 2 rows without"),
        (["1|2", None, 3], "vectors. Received: 2 of 3 rows that are none, such as '1\\|2'"),
    ],
)
def test_vectors_that_are_refused(column: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"'v' must hold.*{message}"):
        Feature.fit("v", "vector", column)


def test_vectors_of_new_items_must_be_as_long_as_the_fitted_ones() -> None:
    feature = Feature.fit("v", "vector", [[1.0, 2.0]])
    assert np.isnan(feature.encode([None])).tolist() == [[True, True]]
    with pytest.raises(ValueError, match=r"length 2\. Received: 1 of 2 rows of another length"):
        feature.encode([[1.0, 2.0, 3.0], None])


def test_vectors_are_mapped_linearly_and_missing_ones_to_zeros() -> None:
    feature = Feature.fit("v", "vector", [[3.0, 0.0, 4.0], None])
    layer = FeatureEmbedding(feature.spec, 2)
    values = feature.encode([[3.0, 0.0, 4.0], None, [1.0, 1.0, 1.0]])
    out = layer(tf.constant(values)).numpy()
    (kernel,) = layer.trainable_variables
    np.testing.assert_allclose(out[[0, 2], :2], values[[0, 2]] @ kernel.numpy(), rtol=1e-5)
    assert out[:, 2].tolist() == [0, 1, 0]
    assert out[1].tolist() == [0, 0, 1]
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(tf.constant(values)) ** 2)
    assert np.isfinite(tape.gradient(loss, kernel).numpy()).all()


# Every kind


@pytest.mark.parametrize("kind", get_args(FeatureKind))
def test_each_kind_from_column_to_embedding(kind: FeatureKind) -> None:
    column = COLUMNS[kind]
    feature = Feature.fit("x", kind, column)
    encoded = feature.encode([*column, UNSEEN[kind]])
    missing = feature.spec.empty(3)
    assert encoded.dtype == missing.dtype
    assert encoded.shape == (5, *missing.shape[1:])
    np.testing.assert_array_equal(encoded[1], missing[0])
    table = FeatureTable([feature.spec], 6, name="items")
    table.assign({"x": encoded})
    rows = table(tf.constant([0, 2, 5, 1]))["x"].numpy()
    np.testing.assert_array_equal(rows, [missing[0], missing[0], encoded[4], encoded[0]])
    layer = FeatureEmbedding(feature.spec, 4)
    embedded = layer(tf.constant(encoded)).numpy()
    assert embedded.shape == (5, WIDTHS[kind])
    assert np.isfinite(embedded).all()
    assert feature.encode([]).shape == (0, *missing.shape[1:])


@pytest.mark.parametrize("kind", get_args(FeatureKind))
def test_a_feature_survives_json_and_encodes_the_same(kind: FeatureKind) -> None:
    feature = Feature.fit("x", kind, COLUMNS[kind])
    back = Feature.from_dict(json.loads(json.dumps(feature.to_dict())))
    assert back == feature
    assert hash(back) == hash(feature)
    column = [*COLUMNS[kind], UNSEEN[kind]]
    np.testing.assert_array_equal(back.encode(column), feature.encode(column))
    assert FeatureSpec(**json.loads(json.dumps(asdict(feature.spec)))) == feature.spec


def test_specs_and_features_of_older_models_load() -> None:
    spec = {"name": "genres", "kind": "multi_categorical", "size": 5, "num_values": 3}
    assert asdict(FeatureSpec(**spec)) == spec  # type: ignore[arg-type]
    old = {"name": "g", "kind": "categorical", "vocabulary": ["a"], "num_values": 1}
    assert Feature.from_dict(old) == Feature("g", "categorical", ("a",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "x", "kind": "numeric", "means": 1.0}, "has no means. Known:.*'mean'"),
        ({"name": "x"}, "needs kind. Received"),
        ({"name": "x", "kind": "number"}, "'x' must be one of categorical,.*Received: 'number'"),
    ],
)
def test_settings_that_make_no_feature(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Feature.from_dict(settings)


def test_columns_without_a_value_encode_as_missing() -> None:
    for kind in set(get_args(FeatureKind)) - {"vector"}:
        feature = Feature.fit("x", kind, [None, None])
        np.testing.assert_array_equal(feature.encode([None]), feature.spec.empty(1))
        assert FeatureEmbedding(feature.spec, 4)(feature.encode([UNSEEN[kind]])).shape[0] == 1


# Dropping features


def encoded_columns(num_rows: int) -> tuple[list[FeatureSpec], dict[str, tf.Tensor]]:
    """A feature of each kind, none of whose rows is missing."""
    specs: list[FeatureSpec] = []
    features: dict[str, tf.Tensor] = {}
    for kind, column in COLUMNS.items():
        feature = Feature.fit(kind, kind, column)
        specs.append(feature.spec)
        features[kind] = tf.constant(np.repeat(feature.encode(column[:1]), num_rows, axis=0))
    return specs, features


def is_empty(spec: FeatureSpec, values: tf.Tensor) -> np.ndarray:
    same = np.equal(values, spec.empty(1)) | (np.isnan(values) & np.isnan(spec.empty(1)))
    return same.reshape(len(same), -1).all(axis=1)


def test_features_are_dropped_whole_each_and_each_row_by_itself() -> None:
    num_rows, rate = 4000, 0.3
    specs, features = encoded_columns(num_rows)
    dropped = drop_features(features, specs, rate, tf.constant([3, 4]))
    masks = np.array([is_empty(spec, dropped[spec.name]) for spec in specs], float)
    for spec, mask in zip(specs, masks, strict=True):
        assert dropped[spec.name].dtype == features[spec.name].dtype
        kept = mask == 0
        np.testing.assert_array_equal(
            dropped[spec.name].numpy()[kept], features[spec.name].numpy()[kept]
        )
    deviation = math.sqrt(rate * (1 - rate) / num_rows)
    assert np.abs(masks.mean(axis=1) - rate).max() < 4.5 * deviation
    others = np.corrcoef(masks) - np.eye(len(masks))
    assert np.abs(others).max() < 4.5 / math.sqrt(num_rows)
    next_rows = [np.corrcoef(mask[1:], mask[:-1])[0, 1] for mask in masks]
    assert np.abs(next_rows).max() < 4.5 / math.sqrt(num_rows)


def test_what_is_dropped_is_a_function_of_the_seed() -> None:
    specs, features = encoded_columns(200)
    in_graph = tf.function(lambda seed: drop_features(features, specs, 0.5, seed))
    first = drop_features(features, specs, 0.5, tf.constant([1, 2]))
    tf.random.set_seed(9)
    for again in (drop_features(features, specs, 0.5, tf.constant([1, 2])), in_graph([1, 2])):
        for spec in specs:
            np.testing.assert_array_equal(first[spec.name], again[spec.name])
    for other in ([1, 3], [2, 2], [2, 1]):
        changed = drop_features(features, specs, 0.5, tf.constant(other))
        assert (
            is_empty(specs[0], first["categorical"]) != is_empty(specs[0], changed["categorical"])
        ).any()


def test_draws_are_apart_from_others_of_the_same_seed() -> None:
    specs, features = encoded_columns(4000)
    seed = tf.constant([5, 6])
    is_dropped = is_empty(specs[0], drop_features(features, specs[:1], 0.5, seed)["categorical"])
    drawn = tf.random.stateless_uniform([4000, 1], seed).numpy()[:, 0] < 0.5
    assert abs(np.corrcoef(is_dropped, drawn)[0, 1]) < 4.5 / math.sqrt(4000)


def test_no_rate_drops_nothing_and_the_full_one_everything() -> None:
    specs, features = encoded_columns(5)
    seed = tf.constant([0, 0])
    for none in (drop_features(features, specs, 0.0, seed), drop_features(features, [], 1.0, seed)):
        assert all(none[name] is value for name, value in features.items())
    everything = drop_features(features, specs, 1.0, seed)
    assert all(is_empty(spec, everything[spec.name]).all() for spec in specs)
    some = drop_features(features, specs[:1], 1.0, seed)
    assert [is_empty(spec, some[spec.name]).any() for spec in specs] == [True, *[False] * 7]


def test_a_rate_out_of_range_and_a_missing_feature_are_refused() -> None:
    specs, features = encoded_columns(2)
    seed = tf.constant([0, 0])
    for rate in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="`rate` must be from 0 to 1"):
            drop_features(features, specs, rate, seed)
    with pytest.raises(ValueError, match=r"\['hashed'\] are missing"):
        drop_features({"text": features["text"]}, [specs[1], specs[3]], 0.5, seed)


def test_padding_does_not_enter_the_mean() -> None:
    feature = Feature.fit("genres", "multi_categorical", [["a", "b", "c"]])
    layer = FeatureEmbedding(feature.spec, 4)
    short, long = layer(tf.constant([[2, 0, 0]])), layer(tf.constant([[2, 2, 2]]))
    np.testing.assert_allclose(short, long, rtol=1e-6)
    np.testing.assert_array_equal(layer(tf.constant([[0, 0, 0]])), np.zeros((1, 4)))


def test_numeric_embedding_flags_missing_values() -> None:
    layer = FeatureEmbedding(Feature("x", "numeric").spec, 4)
    assert layer(tf.constant([0.5, np.nan])).numpy().tolist() == [[0.5, 0.0], [0.0, 1.0]]


def test_weighted_mean_matches_a_loop() -> None:
    rng = np.random.default_rng(0)
    vectors, weights = rng.normal(size=(3, 4, 2)), rng.random((3, 4))
    weights[1] = 0
    expected = [
        np.average(v, axis=0, weights=w) if w.any() else np.zeros(2)
        for v, w in zip(vectors, weights, strict=True)
    ]
    np.testing.assert_allclose(weighted_mean(tf.constant(vectors), tf.constant(weights)), expected)


def test_table_holds_row_zero_as_missing() -> None:
    feature = Feature.fit("gender", "categorical", ["M", "F"])
    table = FeatureTable([feature.spec], 3, name="users")
    table.assign({"gender": feature.encode(["M", "F"])})
    assert table(tf.constant([2, 0, 1]))["gender"].numpy().tolist() == [1, 0, 2]
    with pytest.raises(ValueError, match=r"shape \(2,\).*\(3,\)"):
        table.assign({"gender": np.zeros(3, np.int32)})
    with pytest.raises(ValueError, match="'gender' is missing"):
        table.assign({})
