"""Encoding of feature columns and their embedding."""

import numpy as np
import pytest
import tensorflow as tf

from tfrs_pipeline.model.features import Feature, FeatureEmbedding, FeatureTable, weighted_mean


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
    assert Feature.fit("x", "numeric", [3.0, 3.0]).encode([4.0]).tolist() == [1.0]


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
