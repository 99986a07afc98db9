"""What users disliked, in the log or in service, is never answered to them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from tests.serving.conftest import make_served
from tests.serving.test_journal import by_history, by_user, event
from tfrs_pipeline import Exact, export, load, recommend
from tfrs_pipeline.model.repeats import RepeatBonus
from tfrs_pipeline.samples.store import RowLists

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")
ROW = 3  # Of the user that these tests ask for.
DISLIKED = [*range(20, 26), 60]  # Rows of what it disliked in the log.


@pytest.mark.parametrize("bonus", [None, RepeatBonus(0.5, 0.5, 0.0)])
def test_what_was_disliked_never_comes_back(tmp_path: Path, bonus: Any) -> None:
    served = make_served("str")
    lists = [np.array(DISLIKED if row == ROW else [], int) for row in range(7)]
    model = served.exportable()
    gone = {*served.candidate_ids[np.array(DISLIKED) - 1].tolist()} - {*served.known(ROW)}
    lists[ROW] = np.setdiff1d(DISLIKED, served.clicks[ROW])  # Else they were no clicks.
    disliking = dataclasses.replace(model, disliked=RowLists.from_lists(lists), repeat_bonus=bonus)
    export(disliking, tmp_path / "films", index=Exact())
    retriever, user = load(tmp_path / "films"), served.query_ids[ROW - 1]
    other, known = served.query_ids[ROW], served.known(ROW)
    assert [{*ids} for ids in retriever.disliked_items([other, user])] == [set(), gone]
    # A model with a bonus retrieves the known items, but never these.
    left_out = gone if bonus else gone | {*known}
    assert by_user(retriever, user).keys() == {*served.candidate_ids} - left_out
    assert gone < by_user(retriever, other).keys() | {*served.known(ROW + 1)}
    # In the graph, as TensorFlow Serving answers.
    inputs = {"user_id": tf.constant([user]), "k": tf.constant(60)}
    inputs["exclude"] = tf.zeros([1, 0], tf.string)
    answer = retriever.saved_model.signatures["retrieve_user"](**inputs)["candidate_ids"].numpy()
    assert {id_.decode() for id_ in answer[0] if id_} == {*served.candidate_ids} - left_out

    # A dislike in service is the same: an item of the history leaves it, and is not shown either.
    first, *history = known
    later = next(id_ for id_ in served.candidate_ids.tolist() if id_ not in {*known, *gone})
    retriever.record([event(user, first, "dislike"), event(user, later, "dislike")])
    retriever.record([event(user, sorted(gone)[0]), event(user, later)])  # Clicks change nothing.
    gone |= {first, later}
    assert {*retriever.disliked_items([user])[0]} == gone
    assert retriever.stored_history(user) == history[::-1]
    expected = by_history(retriever, user, history, gone if bonus else gone | {*known})
    assert by_user(retriever, user) == pytest.approx(expected, abs=1e-5)
    # The best of all users, whether a user's history is stored or given.
    for users in (None, pa.table({"user_id": [user], "history": [history]})):
        recommend(retriever, tmp_path / "best.parquet", users=users, k=60)
        table = pq.read_table(tmp_path / "best.parquet").to_pylist()
        items = {row["item_id"] for row in table if row["user_id"] == user}
        # A model with a bonus recommends items of the history again, as it serves them.
        assert items == {*served.candidate_ids} - gone - (set() if bonus else {*history})


def test_clicks_since_the_training_come_back_where_known_items_do(tmp_path: Path) -> None:
    served = make_served("int")
    model = dataclasses.replace(served.exportable(), excludes_known=False)
    export(model, tmp_path / "films", index=Exact())
    retriever, user, known = load(tmp_path / "films"), served.query_ids[ROW - 1], served.known(ROW)
    clicked, disliked = (id_ for id_ in served.candidate_ids[-5:].tolist()[:2])
    assert not {clicked, disliked} & {*known}
    retriever.record([event(user, clicked), event(user, disliked, "dislike")])
    assert by_user(retriever, user).keys() == {*served.candidate_ids} - {disliked}


def test_an_export_without_dislikes_is_as_it_was(int_folder: Path) -> None:
    """Nothing of them is in the graph, so versions of earlier releases load in the same way."""
    retriever = load(int_folder)
    encoder = retriever.saved_model.encoder
    assert getattr(encoder, "_disliked", None) is None
    assert getattr(encoder, "disliked_items", None) is None
    assert retriever.disliked_items([100, 5]) == [[], []]
