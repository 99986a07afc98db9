"""What an encoder holds of users and items, as it was given, without a call of its graph."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

from tfrs_pipeline import Exportable
from tfrs_pipeline.exports.encoder import Encoder, SavedEncoder, known_rows
from tfrs_pipeline.samples.store import RowLists


def encoder(**changes: Any) -> Encoder:
    """Makes an encoder of users 30 and 10, and of items a, b and c."""
    vectors = tf.Variable(np.eye(4, dtype=np.float32))

    def lists(*rows_by_user: list[int]) -> RowLists:
        return RowLists.from_lists([np.array(rows, np.int32) for rows in ([], *rows_by_user)])

    model = Exportable(
        embed_queries=lambda query_rows, history_rows, **_: tf.gather(vectors, history_rows[:, 0]),
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
    return Encoder(model, **changes)


def test_lists_are_those_of_each_user() -> None:
    saved = SavedEncoder(encoder())
    assert saved.user_ids().tolist() == [30, 10]
    assert saved.user_rows([10, 99, None, 30]) == [2, 0, 0, 1]
    assert saved.history(1) == [("a", 7.0), ("b", 9.0)]
    ((item, time),) = saved.history(2)
    assert item == "c"
    assert np.isnan(time)
    assert [saved.known(row) for row in range(3)] == [[], ["a", "b"], ["c"]]
    assert [saved.disliked(row) for row in range(3)] == [[], ["c"], []]
    assert saved.history(0) == []
    assert saved.has_items(["b", "z", None]).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="ids are integers"):
        saved.user_rows(["10"])


def test_known_items_have_their_rows_among_those_of_an_index() -> None:
    queries = [{"user_id": 10}, {}, {"user_id": 30}]
    rows = known_rows(encoder(), queries, np.array(["c", "b"], object))
    assert [query_rows.tolist() for query_rows in rows] == [[1], [], [2]]


def test_without_user_data_nobody_is_known() -> None:
    saved = SavedEncoder(encoder(user_data=False))
    assert saved.user_ids().tolist() == []
    assert saved.user_rows([30]) == [0]
    assert (saved.history(0), saved.known(0), saved.disliked(0)) == ([], [], [])
    assert saved.has_items(["b"]).tolist() == [True]
