"""What answers say they knew, and what /metrics counts of them; the guide names every metric."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from tests.service.conftest import NUM_CANDIDATES, NUM_QUERIES, Served, make_served
from tests.service.running_server import Running, retrieve_user, send
from tfrs_pipeline import load

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "watching.md"
STRANGE = 999_999


@pytest.fixture(scope="module")
def films_served() -> Served:
    return make_served("int")


@pytest.fixture(scope="module")
def server(int_folder: Path) -> Iterator[Running]:
    with Running(int_folder) as running:
        yield running


def retrieve(histories: list[list[int]], k: int = 5, **more: Any) -> dict[str, Any]:
    num = len(histories)
    inputs = {"user_id": [-1] * num, "history": histories, "exclude": [[]] * num, "k": k, **more}
    name = "retrieve_filtered" if "allowed" in more else "retrieve"
    return {"signature_name": name, "inputs": inputs}


class Counted:
    """The change of the counters within a block, by name and label."""

    NAMES = ("user_ids", "history_items", "slots", "filtered_queries", "answers")

    def __init__(self, server: Running) -> None:
        self._server = server

    def _all(self) -> Counter[str]:
        text, found = self._server.get("/metrics").text, Counter[str]()
        for name, label, value in re.findall(r'tfrs_(\w+)_total\{\w+="(\w+)"\} (\S+)', text):
            found[f"{name} {label}"] = int(float(value))
        return found

    def __enter__(self) -> "Counted":
        self._before = self._all()
        return self

    def __exit__(self, *error: object) -> None:
        changed = self._all() - self._before
        self.changes = {x: n for x, n in changed.items() if x.startswith(self.NAMES)}


def test_each_answer_says_what_it_knew_of_its_query(
    films_served: Served, server: Running, int_folder: Path
) -> None:
    items = films_served.candidate_ids.tolist()
    histories = [
        [items[3], STRANGE, items[5], items[3]],  # A repeated item counts as often as it comes.
        [STRANGE, STRANGE + 1, STRANGE + 2, STRANGE + 3],
        [-1, -1, -1, -1],
        [*items[:3], -1],
    ]
    known = [sum(id_ in items for id_ in line) for line in histories]
    assert known == [3, 0, 0, 3]
    answer = server.predict(**retrieve(histories))["outputs"]
    assert answer["num_known_items"] == known
    assert answer["is_known_user"] == [False] * 4
    # An answer that knew nothing is the one for an empty history, and now says so.
    assert answer["candidate_ids"][1] == answer["candidate_ids"][2]
    knows = load(int_folder).stored.has_items
    assert [int(knows(line).sum()) for line in histories] == known
    users = [*films_served.query_ids.tolist(), STRANGE]
    stored = [len(films_served.clicks[row]) for row in range(1, NUM_QUERIES + 1)]
    rows = server.predict(instances=users)["predictions"]
    assert [row["num_known_items"] for row in rows] == [*stored, 0]
    assert [row["is_known_user"] for row in rows] == [True] * NUM_QUERIES + [False]
    similar = {"item_id": items[:2], "exclude": [[], []], "k": 3}
    outputs = server.predict(signature_name="similar", inputs=similar)["outputs"]
    assert set(outputs) == {"candidate_ids", "scores"}


def test_counters_say_what_answers_knew_and_held(films_served: Served, server: Running) -> None:
    items, users = films_served.candidate_ids.tolist(), films_served.query_ids.tolist()
    with Counted(server) as counted:
        server.predict(**retrieve_user([*users, STRANGE, -1], [[]] * 8, 3))
    expected = {"answers 1": 8, "user_ids true": 6, "user_ids false": 1, "slots true": 24}
    assert counted.changes == expected
    with Counted(server) as counted:
        server.predict(**retrieve([[items[1], STRANGE, -1], [items[1], items[2], STRANGE]]))
    expected = {"answers 1": 2, "slots true": 10, "history_items true": 3}
    assert counted.changes == {**expected, "history_items false": 2}
    with Counted(server) as counted:
        server.predict(**retrieve([[]], k=NUM_CANDIDATES + 4))
    assert counted.changes == {"answers 1": 1, "slots true": NUM_CANDIDATES, "slots false": 4}
    # Two filters leave items, one leaves none, and an empty one is none.
    with Counted(server) as counted:
        server.predict(**retrieve([[]] * 4, k=2, allowed=[["a"], ["b"], ["no such"], [""]]))
    expected = {"answers 1": 4, "slots true": 6, "slots false": 2}
    assert counted.changes == {**expected, "filtered_queries true": 1, "filtered_queries false": 2}
    # A large request counts once; the page does not count.
    with Counted(server) as counted:
        server.predict(**retrieve_user(users, [[]] * 6, 200))
        assert server.post("/page/query", json={"user_id": users[0]}).status_code == 200
    assert (counted.changes["answers 1"], counted.changes["user_ids true"]) == (6, 6)


def test_unknown_values_of_live_items_are_counted(films: Path) -> None:
    with Running(films, takes_writes=True) as server:
        before = server.metric("tfrs_live_unknown_values_total")
        rows = [{"item_id": 90_000 + i, "genres": [x]} for i, x in enumerate(["a", "jazz", "x"])]
        answer = send(server, {"items": rows}, "/v1/models/films/items", "PUT")
        assert len(answer.json()["notes"]) == 2
        assert server.metric("tfrs_live_unknown_values_total") == before + 2


def test_the_guide_names_what_metrics_prints(server: Running) -> None:
    text = PAGE.read_text()
    kinds = dict(re.findall(r"^# TYPE (tfrs_\w+) (\w+)$", server.get("/metrics").text, re.M))
    printed = {name: kind for name, kind in kinds.items() if not name.endswith("_created")}
    table = dict(re.findall(r"^\| `(tfrs_\w+)` \|[^|]*\| (.*) \|$", text, re.M))
    assert set(table) == set(printed)
    for name, kind in printed.items():
        assert table[name].startswith("histogram: ") == (kind == "histogram")
    (rules,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    alerts = yaml.safe_load(rules)["groups"][0]["rules"]
    assert len(alerts) == 4
    for alert in alerts:
        for name in re.findall(r"tfrs_\w+", alert["expr"]):
            assert re.sub("_(bucket|count|sum)$", "", name) in printed
        # A word in place of a label's value would match nothing, and never alert.
        for label, value in re.findall(r'(\w+)="(\w+)"', alert["expr"]):
            assert f"`{label}`" in text
            assert f"`{value}`" in text or f'`{label}="{value}"`' in text
