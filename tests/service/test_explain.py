"""Why an item is in an answer or not: the same by brute force, for every item of every user."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.service.conftest import NUM_CANDIDATES, NUM_QUERIES, Served, make_served
from tests.service.running_server import Running
from tests.service.test_history_bonus import (  # noqa: F401
    bonus,
    loaded,
    model_folder,
    repeating,
)
from tests.service.test_user_events import event
from tfrs_pipeline import LoadedRetriever, explain, load
from tfrs_pipeline.answers.explain import MAX_LEFT_OUT

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")
K = 7
EXPLAIN = "/v1/models/films:explain"


def exact_ranking(model: LoadedRetriever, query: dict[str, Any], **options: Any) -> list[Any]:
    """Lists all items that an answer may hold, best first, by an exact search."""
    (ids,) = model.engine.search(
        model.engine.embed("embed_query", model.inputs.read([query])),
        NUM_CANDIDATES,
        **{"exclude": None, "allowed": None, **options},
        exact=True,
    )["candidate_ids"]
    return [id_ for id_ in ids.tolist() if id_ not in (-1, "")]


def score_of(model: LoadedRetriever, query: dict[str, Any], item: Any) -> float:
    ids, scores = model.retrieve([query], NUM_CANDIDATES)
    return float(scores[0][ids[0].tolist().index(item)])


def test_every_pair_is_explained_as_by_brute_force(served: Served, loaded: LoadedRetriever) -> None:  # noqa: F811
    verdicts = set()
    for user in range(NUM_QUERIES):
        user_id, history = served.query_ids[user : user + 1].tolist()[0], served.known(user + 1)
        query = {"user_id": user_id, "history": loaded.users.history(user_id)[::-1]}
        left_out = loaded.users.left_out(loaded.users.now([user_id])[0])
        exclude = served.candidate_ids[[1, 2]].tolist()
        left = exact_ranking(loaded, query, exclude=[[*left_out, *exclude]], allowed=[["a"]])
        everything = exact_ranking(loaded, query)
        answer = loaded.retrieve_user([user_id], K, [exclude], allowed=[["a"]])[0][0].tolist()
        allowed = {
            item
            for item, genres in zip(served.candidate_ids.tolist(), served.genres, strict=True)
            if "a" in genres
        }
        for item in served.candidate_ids.tolist():
            why = explain(loaded, item, user_id=user_id, k=K, exclude=exclude, allowed=["a"])
            verdicts.add(why.verdict)
            if item not in allowed:
                assert why.verdict == "filtered"
            elif item in [*exclude, *left_out]:
                rule = "exclude" if item in exclude else "clicked"
                assert (why.verdict, why.rule) == ("excluded", rule)
            else:
                assert why.verdict == {True: "found"}.get(
                    item in answer, "missed" if left.index(item) < K else "outranked"
                )
                assert why.rank == left.index(item) + 1
                if why.rank <= K:
                    assert why.gap is None or why.gap >= 0
            assert why.score == pytest.approx(score_of(loaded, query, item), abs=1e-5)
        assert {id_ for id_, _ in why.history} <= set(history)
        assert len(everything) == NUM_CANDIDATES
    assert verdicts >= {"filtered", "outranked", "found"}


def test_what_each_item_of_the_history_adds(served: Served, loaded: LoadedRetriever) -> None:  # noqa: F811
    user_id = served.query_ids[-1:].tolist()[0]
    history = loaded.users.history(user_id)[::-1]
    assert len(set(history)) > 5
    target = served.candidate_ids[:1].tolist()[0]
    why = explain(loaded, target, user_id=user_id, k=K)
    assert [id_ for id_, _ in why.history] == list(dict.fromkeys(history[::-1]))
    whole = score_of(loaded, {"user_id": user_id, "history": history}, target)
    for id_, change in why.history:
        rest = [other for other in history if other != id_]
        without = score_of(loaded, {"user_id": user_id, "history": rest}, target)
        assert change == pytest.approx(whole - without, abs=1e-5)
    # A query with the same history says the same.
    by_query = explain(loaded, target, query={"user_id": user_id, "history": history}, k=K)
    assert dict(by_query.history) == pytest.approx(dict(why.history), abs=1e-6)
    assert by_query.score == pytest.approx(why.score, abs=1e-6)


def test_the_bonus_is_told_apart(served: Served, loaded: LoadedRetriever) -> None:  # noqa: F811
    user_id = served.query_ids[-1:].tolist()[0]
    bonuses = loaded.engine.embed("embed_user", loaded.inputs.read([{"user_id": user_id}]))
    rows, numbers = bonuses["with_bonus"][0]
    by_item = dict(zip(loaded.stored.items.take(rows).tolist(), numbers.tolist(), strict=True))
    assert by_item
    for item in served.candidate_ids[::4].tolist():
        assert explain(loaded, item, user_id=user_id).bonus == pytest.approx(by_item.get(item, 0.0))


def test_items_that_are_no_candidates(served: Served, model: Path) -> None:
    retriever = load(model)
    user_id, item = served.query_ids[:1].tolist()[0], served.candidate_ids[4:5].tolist()[0]
    never = 12_345 if served.ids == "int" else "never"
    assert explain(retriever, never, user_id=user_id).verdict == "unknown"
    retriever.remove([item])
    why = explain(retriever, item, user_id=user_id)
    assert (why.verdict, why.rank, why.history) == ("removed", None, ())
    assert "removed in service" in str(why)
    # A new process reads the removal too; and once the item is back, it is a candidate again.
    assert explain(load(model), item, user_id=user_id).verdict == "removed"
    retriever.upsert([{"item_id": item, "genres": ["a"]}])
    assert explain(retriever, item, user_id=user_id).rank is not None


def test_what_a_user_did_since_excludes(served: Served, model: Path) -> None:
    retriever = load(model)
    user_id = served.query_ids[:1].tolist()[0]
    clicked, disliked = served.candidate_ids[[4, 9]].tolist()
    assert explain(retriever, clicked, user_id=user_id).rule == ""
    retriever.record([event(user_id, clicked), event(user_id, disliked, "dislike")])
    assert explain(retriever, clicked, user_id=user_id).rule == "clicked"
    why = explain(retriever, disliked, user_id=user_id)
    assert (why.rule, why.verdict) == ("disliked", "excluded")
    assert "the user disliked it" in str(why)


def test_long_histories_cost_no_more(int_folder: Path) -> None:
    served, retriever = make_served("int"), load(int_folder)
    history = served.candidate_ids.tolist() * 5
    why = explain(retriever, served.candidate_ids.tolist()[0], query={"history": history})
    assert len(why.history) == min(MAX_LEFT_OUT, NUM_CANDIDATES)
    assert why.verdict in ("found", "outranked")


def test_wrong_questions_are_refused(served: Served, folder: Path) -> None:
    retriever, item = load(folder, live=False), served.candidate_ids[:1].tolist()[0]
    wrong_type = "text" if served.ids == "int" else 7
    wrong: list[dict[str, Any]] = [{}, {"user_id": wrong_type, "query": {}}]
    for options in (*wrong, {"query": {"histroy": []}}):
        with pytest.raises(ValueError, match=r"user_id|histroy"):
            explain(retriever, item, **options)
    with pytest.raises(ValueError, match=r"[Ii]ds"):
        explain(retriever, wrong_type, query={"history": []})
    with pytest.raises(ValueError, match="k must be"):
        explain(retriever, item, query={"history": []}, k=0)


@pytest.mark.parametrize("served", ["int"], indirect=True)
def test_the_server_and_the_command_explain(
    served: Served, folder: Path, running: Running, command: Any
) -> None:
    user_id, item = served.query_ids[3:4].tolist()[0], served.candidate_ids[11:12].tolist()[0]
    expected = explain(load(folder), item, user_id=user_id, k=3)
    body = {"item_id": item, "user_id": user_id, "k": 3}
    response = running.post(EXPLAIN, json=body)
    assert response.status_code == 200
    answer = response.json()
    assert (answer["verdict"], answer["rank"]) == (expected.verdict, expected.rank)
    assert answer["words"] == str(expected).split("\n")
    assert [tuple(entry) for entry in answer["history"]] == [
        (id_, pytest.approx(change)) for id_, change in expected.history
    ]
    asked = "explain", folder, "--user", user_id, "--item", item, "-k", 3
    printed = command(*asked)
    assert printed.out.split() == str(expected).split()
    as_json = json.loads(command(*asked, "--json").out)
    assert as_json["rank"] == expected.rank
    by_history = command("explain", folder, "--history", item, 17, "--item", item)
    assert "excluded" in by_history.out


@pytest.mark.parametrize(
    "body",
    [
        {"item_id": 3},
        {"item_id": 3, "user_id": 1, "history": []},
        {"item_id": "three", "user_id": 100},
        {"item_id": 3, "user_id": 100, "k": 101},
        {"item_id": 3, "history": [3] * 41},
        {"item_id": 3, "user_id": 100, "exclude": list(range(51))},
        {"item_id": 3, "user_id": 100, "surprise": 1},
        {"item_id": True, "user_id": 100},
    ],
)
def test_the_server_refuses_what_is_too_much_or_wrong(small: Running, body: Any) -> None:
    response = small.post(EXPLAIN, json=body)
    assert response.status_code == 400
    assert response.json()["error"]
