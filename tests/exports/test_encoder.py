"""What the graph of a SavedModel holds of users and items, as it was given."""

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

from tests.exports.saved import decoded
from tfrs_pipeline import Exportable
from tfrs_pipeline.exports.encoder import Encoder
from tfrs_pipeline.features.raw import relative_seconds
from tfrs_pipeline.samples.store import RowLists


def lists(*rows_by_user: list[int]) -> RowLists:
    return RowLists.from_lists([np.array(rows, np.int32) for rows in ([], *rows_by_user)])


def model() -> Exportable:
    """Makes a model of users 30 and 10, and of items a, b and c, which returns what it reads."""
    vectors = tf.Variable(np.eye(4, dtype=np.float32))

    def embed_queries(query_rows: Any, history_rows: Any, history_times: Any = None) -> Any:
        if history_times is None:
            return tf.gather(vectors, history_rows[:, 0])
        read = [history_rows, history_times]
        return tf.cast(tf.concat(read, axis=1), tf.float32)

    return Exportable(
        embed_queries=embed_queries,
        embed_candidates=lambda rows: tf.gather(vectors, rows),
        variables=[vectors],
        items=pa.table({"item_id": ["a", "b", "c"]}),
        query_ids=np.array([30, 10]),
        history_length=2,
        # Most recent first; in row 0 are items that the training did not have.
        histories=lists([2, 0, 1], [3]),
        known_positives=lists([1, 2], [3]),
        disliked=lists([3], []),
        history_times=np.array([9.0, 8.0, 7.0, np.nan]),
    )


def test_lists_are_those_of_each_user() -> None:
    encoder: Any = Encoder(model())
    answer = encoder.embed_user(
        tf.constant([30, 10, 99], tf.int64), tf.constant([19.5, np.nan, 4], tf.float64)
    )
    assert decoded(answer["known_items"].numpy()).tolist() == [
        ["a", "b", "c"],
        ["c", "", ""],
        ["", "", ""],
    ]
    assert answer["is_known_user"].numpy().tolist() == [True, True, False]
    assert answer["embeddings"].numpy()[:, :2].tolist() == [[2, 1], [3, 0], [0, 0]]
    times = relative_seconds(np.array([[19.5, 9, 7], [np.nan] * 3, [4, np.nan, np.nan]]))
    np.testing.assert_array_equal(answer["embeddings"].numpy()[:, 2:], times.astype(np.float32))
    assert answer["num_known_items"].numpy().tolist() == [2, 1, 0]


def test_a_given_history_has_its_times_relative_to_the_latest() -> None:
    encoder: Any = Encoder(model())
    history = tf.constant([["a", "z", "b", "c"], ["c", "", "", ""]])
    times = tf.constant([[50.5, 60, 70, np.nan], [9, np.nan, np.nan, np.nan]], tf.float64)
    now = tf.constant([np.nan, 12.9], tf.float64)
    answer = encoder.embed_query(tf.constant([30, 99], tf.int64), history, times, now)
    expected = relative_seconds(np.array([[np.nan, np.nan, 70], [12.9, 9, np.nan]]))
    read = answer["embeddings"].numpy()
    assert read[:, :2].tolist() == [[3, 2], [3, 0]]
    np.testing.assert_array_equal(read[:, 2:], expected.astype(np.float32))
    # Fewer or more times than items.
    short = encoder.embed_query(tf.constant([30, 99], tf.int64), history, times[:, :1], now)
    wide = tf.pad(times, [[0, 0], [0, 3]], constant_values=1.0)
    long = encoder.embed_query(tf.constant([30, 99], tf.int64), history, wide, now)
    np.testing.assert_array_equal(long["embeddings"], read)
    assert (short["embeddings"].numpy()[0, 2:] == np.float32(-(2**31))).all()


def test_without_user_data_nobody_is_known() -> None:
    encoder: Any = Encoder(model(), user_data=False)
    assert encoder.embed_user is None
    held = [variable.numpy() for variable in encoder.variables]
    assert not any(30 in array for array in held if array.dtype.kind == "i")
    nothing = tf.constant([np.nan], tf.float64)
    answer = encoder.embed_query(
        tf.constant([30], tf.int64), tf.constant([["b"]]), nothing[:, tf.newaxis], nothing
    )
    assert set(answer) == {"embeddings", "is_known_user", "num_known_items"}
    assert answer["is_known_user"].numpy().tolist() == [False]
    assert answer["embeddings"].numpy()[0, 0] == 2


@pytest.mark.parametrize(("exclude", "known"), [("none", False), ("clicked", True), ("seen", True)])
def test_known_items_are_absent_by_a_rule_that_leaves_none_out(exclude: Any, known: bool) -> None:
    without = dataclasses.replace(model(), exclude=exclude, disliked=RowLists.empty(0))
    encoder: Any = Encoder(without)
    answer = encoder.embed_user(tf.constant([10], tf.int64), tf.constant([1.0], tf.float64))
    assert ("known_items" in answer) == known
