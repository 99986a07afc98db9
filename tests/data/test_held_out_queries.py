"""A sample of a holdout's queries; `test_slow_evaluator.py` tests holdouts of all queries."""

import numpy as np
import pyarrow as pa
import pytest

from tfrs_pipeline import DataError, Log, Reading
from tfrs_pipeline.data import held_out_queries


def test_some_queries_are_whole_users_and_others_are_not_read() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"user_id": user, "item_id": place, "part": "train" if place < 5 else "test"}
        for user in range(40)
        for place in range(5 + int(rng.integers(1, 6)))
    ]
    rows.append({"user_id": 0, "item_id": 1, "part": "validation"})
    split = Log.from_table(pa.Table.from_pylist(rows)).split("column")
    every = split.holdout("test", by="requests")
    some = split.holdout("test", 30, by="requests", seed=3)
    assert len(some) == 30 < len(every) == some.num_sampled_from
    # The seed decides which users are drawn. Each has all its queries, but the last is cut short.
    num_of = dict(zip(*np.unique(every.user_ids, return_counts=True), strict=True))
    num_found = dict(zip(*np.unique(some.user_ids, return_counts=True), strict=True))
    assert sum(num_of[user] for user in num_found) - 30 < max(num_of.values())
    assert {*num_found} != {*split.holdout("test", 30, by="requests", seed=4).user_ids.tolist()}
    assert len(split.holdout("test", 40)) == 40


def test_a_log_without_an_order_has_no_history_up_to_a_request() -> None:
    events = {"user_id": [1, 1, 1], "item_id": [1, 2, 3], "part": ["train", "validation", "test"]}
    log = Log.from_table(pa.table(events), reading=Reading(is_ordered=False))
    with pytest.raises(DataError, match="need an order"):
        log.split("column").holdout("test", by="requests")


def test_a_user_whose_histories_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They grow with the square of the user's events, as those of an id that all guests share."""
    users = ["guest"] * 30 + ["a", "b"] * 5 + ["a"]
    parts = ["train"] * 20 + ["test"] * 10 + ["train"] * 6 + ["test"] * 4 + ["validation"]
    events = {"user_id": users, "item_id": range(41), "part": parts}
    split = Log.from_table(pa.table(events)).split("column")
    # 20 events are before the first of the 10 queries, 29 before the last.
    num_before = sum(range(20, 30))
    monkeypatch.setattr(held_out_queries, "_MOST_OF_ONE", num_before)
    assert len(split.holdout("test", by="requests")) == 14
    monkeypatch.setattr(held_out_queries, "_MOST_OF_ONE", num_before - 1)
    with pytest.raises(DataError, match=r"'guest' has 10 positives in the test part, with 245 ev"):
        split.holdout("test", by="requests")
    assert len(split.holdout("test", by="users")) == 3
