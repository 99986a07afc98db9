"""What users disliked is never answered to them, and what they know as the rule says."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from tests.exports.saved import ask_saved_model, decoded
from tests.service.conftest import make_served
from tests.service.running_server import Running, retrieve_user
from tests.service.test_user_events import by_history, by_user, event
from tfrs_pipeline import Exact, LoadedRetriever, export, load, recommend
from tfrs_pipeline.exports.encoder import Encoder
from tfrs_pipeline.exports.graph_index import ExactIndex
from tfrs_pipeline.exports.saved_model import RetrievalModule
from tfrs_pipeline.samples.store import RowLists
from tfrs_pipeline.search.exclusions import rule_with
from tfrs_pipeline.search.history_bonus import HistoryBonus, NeighbourBonus, RepeatBonus

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")
ROW = 3  # Of the user that these tests ask for.
DISLIKED = [*range(20, 26), 60]  # Rows of what it disliked in the log.
REPEATS = HistoryBonus(RepeatBonus(0.5, 0.5, 0.0))
NEIGHBOURS = HistoryBonus(neighbours=NeighbourBonus("what came next", 3.0, 0.7))


@pytest.mark.parametrize("bonus", [None, REPEATS, NEIGHBOURS])
def test_what_was_disliked_never_comes_back(tmp_path: Path, bonus: Any) -> None:
    served = make_served("str")
    lists = [np.array(DISLIKED if row == ROW else [], int) for row in range(7)]
    model = served.exportable()
    gone = {*served.candidate_ids[np.array(DISLIKED) - 1].tolist()} - {*served.known(ROW)}
    lists[ROW] = np.setdiff1d(DISLIKED, served.clicks[ROW])  # Else they were no clicks.
    disliking = dataclasses.replace(model, disliked=RowLists.from_lists(lists), bonus=bonus)
    export(disliking, tmp_path / "films", index=Exact())
    retriever, user = load(tmp_path / "films"), served.query_ids[ROW - 1]
    other, known = served.query_ids[ROW], served.known(ROW)
    assert [{*ids} for ids in retriever.users.disliked([other, user])] == [set(), gone]
    # A model with a bonus of them retrieves the known items, but never these.
    left_out = gone if bonus is REPEATS else gone | {*known}
    assert by_user(retriever, user).keys() == {*served.candidate_ids} - left_out
    assert gone < by_user(retriever, other).keys() | {*served.known(ROW + 1)}
    # A dislike in service is the same: an item of the history leaves it, and is not shown either.
    first, *history = known
    later = next(id_ for id_ in served.candidate_ids.tolist() if id_ not in {*known, *gone})
    retriever.record([event(user, first, "dislike"), event(user, later, "dislike")])
    retriever.record([event(user, sorted(gone)[0]), event(user, later)])  # Clicks change nothing.
    gone |= {first, later}
    assert {*retriever.users.disliked([user])[0]} == gone
    assert retriever.users.history(user) == history[::-1]
    expected = by_history(retriever, user, history, gone if bonus is REPEATS else gone | {*known})
    assert by_user(retriever, user) == pytest.approx(expected, abs=1e-5)


def is_id(slot: Any) -> bool:
    return slot not in ("", -1)


def asked_in_all_ways(
    retriever: LoadedRetriever, module: RetrievalModule, user: Any, history: list[Any], command: Any
) -> dict[str, list[Any]]:
    """Asks in every way for all items that a user may be shown: their ids, best first, by way."""
    folder = retriever.folder.parent
    dtype = tf.string if retriever.stored.users.are_text else tf.int64
    users, exclude = tf.constant([user], dtype), tf.zeros([1, 0], dtype)
    query = {"user_id": user, "history": history}
    left_out = retriever.left_out([query])
    lists = {
        "by user id": retriever.retrieve_user([user], 60)[0],
        "by history": retriever.retrieve([query], 60, left_out)[0],
        "in memory": decoded(module.retrieve_user(users, exclude, 60)["candidate_ids"].numpy()),
        "SavedModel": ask_saved_model(
            retriever.folder, "retrieve_user", {"user_id": [user], "k": 60}, 1
        )["candidate_ids"],
    }
    with Running(folder) as server:
        outputs = server.predict(**retrieve_user([user], [[]], 60))["outputs"]
        lists["server"] = np.array(outputs["candidate_ids"], object)
    answers = {way: [*filter(is_id, ids[0].tolist())] for way, ids in lists.items()}
    for way, more in {"recommend": {}, "recommend by history": {"history": [history]}}.items():
        table, path = pa.table({"user_id": [user], **more}), folder.with_name("best.parquet")
        recommend(retriever, path, users=table, k=60)
        answers[way] = pq.read_table(path)["item_id"].to_pylist()
    for way, flags in {"query": (), "query by history": ("--history", *history)}.items():
        done = command("query", folder, "--user", user, *flags, "-k", 60, "--json")
        answers[way] = [item["item_id"] for item in json.loads(done.out)["items"]]
    return answers


@pytest.mark.parametrize(
    ("ids", "exclude", "bonus"),
    [
        ("int", "clicked", None),
        ("str", "seen", None),
        ("int", "none", None),
        ("str", "clicked", REPEATS),
        ("int", "seen", NEIGHBOURS),
    ],
)
def test_all_ways_of_asking_leave_out_the_same(
    tmp_path: Path, command: Any, ids: str, exclude: str, bonus: Any
) -> None:
    served = make_served(ids)
    user, known = served.query_ids.tolist()[ROW - 1], served.known(ROW)
    items = {*served.candidate_ids.tolist()}
    rows = np.setdiff1d(np.arange(1, 61), served.clicks[ROW])[-8:]
    disliked, (later, shown, clicked) = rows[:5], served.candidate_ids[rows[5:] - 1].tolist()
    model = dataclasses.replace(
        served.exportable(),
        disliked=RowLists.from_lists([disliked[: 5 * (row == ROW)] for row in range(7)]),
        bonus=bonus,
        exclude=exclude,
    )
    folder = export(model, tmp_path / "films", index=Exact())
    index = ExactIndex(served.model.embed_corpus())
    asked = load(folder), RetrievalModule(Encoder(model), index, served.candidate_ids), user
    gone = {*served.candidate_ids[disliked - 1]}
    leaves_out_known = exclude != "none" and bonus is not REPEATS
    gone |= {*known} if leaves_out_known else set()

    answers = asked_in_all_ways(*asked, known, command)
    assert {*answers["by user id"]} == items - gone
    for way, answer in answers.items():
        assert answer == answers["by user id"], way

    # In service: one item of the history is disliked, and one outside it; others are only shown,
    # or clicked, after which they are left out where known items are.
    types = {known[0]: "dislike", later: "dislike", shown: "view", clicked: "click"}
    asked[0].record([event(user, item, type_) for item, type_ in types.items()])
    gone |= {known[0], later, *([clicked] if leaves_out_known else [])}
    answers = asked_in_all_ways(*asked, [*known[1:], clicked], command)
    del answers["in memory"], answers["SavedModel"]  # They know no events.
    for way, answer in answers.items():
        assert {*answer} == items - gone - ({shown} if exclude == "seen" else set()), way
        assert answer == [id_ for id_ in answers["by history"] if id_ in {*answer}], way


def test_an_export_without_dislikes_leaves_none_out(int_folder: Path) -> None:
    retriever = load(int_folder)
    assert not retriever.stored.has_dislikes
    assert retriever.users.disliked([100, 5]) == [[], []]


def test_a_repeat_bonus_needs_the_users_items() -> None:
    rules: Any = ("clicked", "seen", "none")
    assert [rule_with(rule, REPEATS) for rule in rules] == ["none"] * 3
    for bonus in (None, NEIGHBOURS):
        assert [rule_with(rule, bonus) for rule in rules] == [*rules]


def test_an_unknown_rule_is_refused_when_it_is_given() -> None:
    """Otherwise the first answer to a user with an event would fail."""
    model = make_served("int").exportable()
    for wrong in ("clicks", False, None):
        with pytest.raises(ValueError, match=r"exclude must be one of clicked, seen, none\. Got"):
            dataclasses.replace(model, exclude=wrong)
