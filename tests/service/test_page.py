"""The page at /, and what it asks the server."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.service.conftest import NUM_CANDIDATES, Exported, Served
from tests.service.running_server import JSON, Running
from tfrs_pipeline.answers.retriever import LoadedRetriever


def test_the_page_is_one_file_that_asks_no_other_server(running: Running) -> None:
    response = running.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    for outside in ("http://", "https://", "//cdn", "src=", "@import", "innerHTML"):
        assert outside not in response.text


def test_the_page_shows_the_card(served: Served, running: Running, loaded: LoadedRetriever) -> None:
    card = running.get("/page/model").json()
    assert (card["name"], card["version"], card["num_candidates"]) == ("films", 1, NUM_CANDIDATES)
    assert card["example_user"] == served.query_ids.tolist()[3]
    assert card["filter"] == {"name": "genres", "values": ["a", "b", "c"]}
    assert card["inputs"] == [{"name": "gender", "example": "", "values": ["F", "M"]}]
    titles = loaded.titles()
    assert all(item["title"] == titles[item["item_id"]] for item in card["example_items"])
    # The page asks for one of these when it opens.
    items = [x["item_id"] for x in card["example_items"]]
    for first in ({"user_id": str(card["example_user"])}, {"items": items}):
        assert running.post("/page/query", json=first).json()["index"]["items"]


def test_items_are_found_by_title_and_id(served: Served, running: Running) -> None:
    def find(words: str) -> list[Any]:
        response = running.run(running.client.get("/page/items", params={"search": words}))
        return [item["item_id"] for item in response.json()["items"]]

    ids = served.candidate_ids.tolist()
    assert find("the 7TH film") == [ids[7]]
    assert find("  7th ") == [i for i in ids if ids.index(i) % 10 == 7]
    assert find("quoted") == [ids[5]]
    assert find(str(ids[59])) == [ids[59]]
    assert len(find("film")) == 20
    assert find("") == find("no such film") == find("\n") == []
    # No match spans two items.
    assert find(f"{ids[7]} the 8th") == []


def test_the_page_compares_with_exact_search_and_excludes_the_items(
    served: Served, running: Running, loaded: LoadedRetriever, kind: str
) -> None:
    user = served.query_ids.tolist()[2]
    answer = running.post("/page/query", json={"user_id": str(user), "k": 6}).json()
    known = served.known(3)
    assert answer["history"]["length"] == len(known)
    assert [item["item_id"] for item in answer["history"]["items"]] == known[::-1][:10]
    items, titles = answer["index"]["items"], loaded.titles()
    assert [item["title"] for item in items] == [titles[item["item_id"]] for item in items]
    assert answer["index"]["is_known_user"]
    assert answer["index"]["latency_ms"] > 0
    if kind == "scann":
        assert answer["num_common"] == 6
        exact = [item["item_id"] for item in answer["exact"]["items"]]
        assert exact == [item["item_id"] for item in items]
    else:
        assert answer["exact"] is None
    history = served.candidate_ids[[4, 9]].tolist()
    everything = running.post("/page/query", json={"items": history, "k": 100}).json()
    found = {item["item_id"] for item in everything["index"]["items"]}
    assert found == set(served.candidate_ids.tolist()) - set(history)
    assert "history" not in everything


@pytest.mark.parametrize("of", ["user", "items", "features"])
@pytest.mark.parametrize("has_filter", [False, True])
def test_it_shows_its_request(served: Served, running: Running, of: str, has_filter: bool) -> None:
    asked: dict[str, Any] = {"k": 7, "filter": ["b"] if has_filter else []}
    history = served.candidate_ids[[4, 9]].tolist()
    if of == "user":
        asked["user_id"] = str(served.query_ids.tolist()[1])
    else:
        asked["items"] = history
    if of == "features":
        asked["features"] = {"gender": "F"}
    answer = running.post("/page/query", json=asked).json()
    request = answer["request"]
    response = running.post(request["path"], content=request["body"].encode(), headers=JSON)
    found = json.loads(response.text)["outputs"]
    shown = answer["index"]["items"]
    is_found = np.isfinite(found["scores"][0])
    scores = np.array(found["scores"][0])[is_found]
    np.testing.assert_allclose([item["score"] for item in shown], scores, rtol=1e-4)
    assert [x["item_id"] for x in shown] == np.array(found["candidate_ids"][0])[is_found].tolist()
    assert shown
    # A click on an item adds it to the explain call.
    assert ("explain" in answer) == (of != "features")
    for rank, item in enumerate(shown if "explain" in answer else [], 1):
        body = json.loads(answer["explain"]["body"]) | {"item_id": item["item_id"]}
        why = running.post(answer["explain"]["path"], json=body).json()
        assert (why["verdict"], why["rank"]) == ("found", rank)
        assert why["score"] == pytest.approx(item["score"], rel=1e-4)


@pytest.mark.parametrize(
    "query",
    [
        *({}, {"user_id": "1", "items": [3]}, {"items": [3], "features": {"sex": "F"}}),
        *({"items": [3], "filter": "b"}, {"user_id": "one"}, {"user_id": None}, {"user_id": [1]}),
        *({"items": []}, {"items": [3] * 41}, {"items": ["x"]}, {"items": 3}),
        *({"user_id": "1", "k": k} for k in (0, 101, "3")),
        {"user_id": "\ud800"},
    ],
    ids=str,
)
def test_the_page_refuses_wrong_queries(small: Running, query: dict[str, Any]) -> None:
    response = small.post("/page/query", content=json.dumps(query), headers=JSON)
    assert response.status_code == 400
    assert set(response.json()) == {"error"}


def test_the_page_needs_no_folder_once_it_is_loaded(films: Path) -> None:
    with Running(films) as running:
        shutil.rmtree(films / "1")
        assert running.get("/page/model").json()["num_candidates"] == NUM_CANDIDATES
        assert running.get("/page/items?search=7th").json()["items"]
        assert running.post("/page/query", json={"user_id": "101"}).status_code == 200


def test_without_the_page_its_addresses_are_unknown(exported: Exported) -> None:
    with Running(exported("int", "scann"), page=False) as running:
        for path in ("/", "/page/model"):
            assert running.get(path).status_code == 404
