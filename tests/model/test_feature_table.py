"""Encoded features as constants of a model, and their dropout."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.features.columns import FITTED, fit
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.features.categorical import Categorical
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.kinds import KINDS
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.model.towers import FeatureTable, drop_features

FEATURES: list[Feature] = [fit(kind, FITTED[kind], kind) for kind in KINDS]


def encoded_columns(num_rows: int) -> dict[str, tf.Tensor]:
    """Returns a column for a feature of each kind, without missing values."""
    return {x.name: tf.repeat(np.nan_to_num(x.missing) + 1, num_rows, axis=0) for x in FEATURES}


def is_empty(feature: Feature, values: tf.Tensor) -> np.ndarray:
    same = np.equal(values, feature.missing) | (np.isnan(values) & np.isnan(feature.missing))
    return same.reshape(len(same), -1).all(axis=1)


def test_features_are_dropped_whole_each_and_each_row_by_itself() -> None:
    num_rows, rate = 4000, 0.3
    encoded = encoded_columns(num_rows)
    seed = tf.constant([3, 4])
    dropped = drop_features(encoded, FEATURES, rate, seed, tf.range(num_rows))
    masks = np.array([is_empty(x, dropped[x.name]) for x in FEATURES], float)
    for x, mask in zip(FEATURES, masks, strict=True):
        assert dropped[x.name].dtype == encoded[x.name].dtype
        kept = mask == 0
        np.testing.assert_array_equal(dropped[x.name].numpy()[kept], encoded[x.name].numpy()[kept])
    deviation = math.sqrt(rate * (1 - rate) / num_rows)
    assert np.abs(masks.mean(axis=1) - rate).max() < 4.5 * deviation
    # Masks are independent of each other, of the row before, and of other draws with the seed.
    drawn = tf.random.stateless_uniform([num_rows, 1], seed).numpy()[:, 0] < rate
    others = np.corrcoef([*masks, *masks[:, np.r_[1:num_rows, 0]], drawn]) - np.eye(
        2 * len(FEATURES) + 1
    )
    assert np.abs(others).max() < 5 / math.sqrt(num_rows)


def test_what_is_dropped_is_a_function_of_the_seed() -> None:
    encoded, rows = encoded_columns(200), tf.range(200)
    in_graph = tf.function(lambda seed: drop_features(encoded, FEATURES, 0.5, seed, rows))
    first = drop_features(encoded, FEATURES, 0.5, tf.constant([1, 2]), rows)
    tf.random.set_seed(9)
    eagerly = drop_features(encoded, FEATURES, 0.5, tf.constant([1, 2]), rows)
    for again in (eagerly, in_graph([1, 2])):
        for x in FEATURES:
            np.testing.assert_array_equal(first[x.name], again[x.name])
    for other in ([1, 3], [2, 2], [2, 1]):
        changed = drop_features(encoded, FEATURES, 0.5, tf.constant(other), rows)
        assert (first["categorical"].numpy() != changed["categorical"].numpy()).any()


def test_no_rate_drops_nothing_and_the_full_one_everything() -> None:
    encoded, at = encoded_columns(5), (tf.constant([0, 0]), tf.range(5))
    for which, rate in ((FEATURES, 0.0), ([], 1.0)):
        none = drop_features(encoded, which, rate, *at)
        for name, value in encoded.items():
            np.testing.assert_array_equal(none[name], value)
    some = drop_features(encoded, FEATURES[:1], 1.0, *at)
    assert [is_empty(x, some[x.name]).all() for x in FEATURES] == [
        True,
        *[False] * (len(FEATURES) - 1),
    ]


def test_a_table_refuses_columns_that_do_not_fit() -> None:
    given: Any = {"query_features": (Categorical("gender", ("F", "M")),)}
    corpus = Corpus(Ids([1]), Ids([1, 2]), **given, query_columns={"gender": np.zeros(3, np.int32)})
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        FeatureTable(corpus, "query")
    with pytest.raises(KeyError, match="gender"):
        FeatureTable(replace(corpus, query_columns={}), "query")
