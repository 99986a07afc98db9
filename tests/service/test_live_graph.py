"""Clicks in service move the item graph, as if it were built of the histories until now."""

import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.search.test_item_graph import graph_of
from tests.service.conftest import NUM_CANDIDATES, NUM_QUERIES, Served, make_served
from tests.service.test_user_events import event
from tfrs_pipeline.answers import live_graph
from tfrs_pipeline.answers.retriever import LoadedRetriever, load
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.exports.export import export
from tfrs_pipeline.records.journal import Journal
from tfrs_pipeline.records.user_events import check_events
from tfrs_pipeline.search.history_bonus import HistoryBonus, NeighbourBonus
from tfrs_pipeline.search.item_graph import KINDS, ItemGraph
from tfrs_pipeline.search.settings import Exact

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")
NEXT, TOGETHER = KINDS
UNKNOWN_ITEM, NEW_USERS = 4, [7, 8, 9]


@pytest.fixture(scope="module")
def served() -> Served:
    return make_served("int")


@pytest.fixture(scope="module", params=[NEXT, TOGETHER])
def exported_model(
    request: pytest.FixtureRequest, served: Served, module_path: Path, trusted_exports: None
) -> Path:
    bonus = HistoryBonus(neighbours=NeighbourBonus(request.param, 20.0, 0.5))
    model = dataclasses.replace(served.exportable(), bonus=bonus)
    folder = module_path / request.param.replace(" ", "_") / "films"
    export(model, folder, index=Exact())
    return folder


@pytest.fixture
def model(exported_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported_model, tmp_path / "films"))


@pytest.fixture(autouse=True)
def every_look_counts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_graph, "_SHARE", 0)
        yield


def stored_histories(served: Served) -> dict[Any, list[Any]]:
    """Returns the ids that each user clicked before, oldest first."""
    stored = {user: served.known(row) for row, user in enumerate(served.query_ids.tolist(), 1)}
    return stored | {user: [] for user in NEW_USERS}


def random_clicks(served: Served, num: int, start: float, seed: int) -> list[dict[str, Any]]:
    """Makes clicks of known and new users, two a second, in the order of their times."""
    rng = np.random.default_rng(seed)
    users = [*served.query_ids.tolist(), *NEW_USERS]
    items = [*served.candidate_ids[:20].tolist(), UNKNOWN_ITEM]
    return [
        event(users[rng.integers(len(users))], items[rng.integers(len(items))], time=start + i / 2)
        for i in range(num)
    ]


def check(graph: ItemGraph, served: Served, clicks: list[dict[str, Any]]) -> None:
    """Compares a graph with one that is built of the users' histories with these clicks."""
    histories = stored_histories(served)
    for click in sorted(clicks, key=lambda click: click["time"]):
        histories[click["user_id"]].append(click["item_id"])
    items = Ids(served.candidate_ids)
    latest_first = [items.rows(history)[::-1].tolist() for history in histories.values()]
    expected = graph_of(latest_first, graph.kind, NUM_CANDIDATES)
    np.testing.assert_allclose(graph.totals, expected.totals, rtol=1e-5)
    for row in range(NUM_CANDIDATES + 1):
        for read in ("counts_of", "of"):
            numbers, by_build = (
                dict(zip(*(part.tolist() for part in getattr(of, read)(row)), strict=True))
                for of in (graph, expected)
            )
            assert numbers == pytest.approx(by_build, rel=1e-5)


def test_the_graph_is_that_of_the_histories_until_now(served: Served, model: Path) -> None:
    retriever, other = load(model), load(model)
    check(retriever.graph, served, [])
    clicks = random_clicks(served, 60, time.time(), seed=0)
    # Within one look, the order of arrival does not matter.
    retriever.record(clicks[:30][::-1])
    check(retriever.graph, served, [])  # Only a look counts.
    retriever.catch_up()
    check(retriever.graph, served, clicks[:30])
    other.record(clicks[30:])
    for _ in range(3):
        retriever.catch_up()
        check(retriever.graph, served, clicks)
    # Another process has all of them at once, and so does a restart.
    for again in (other, load(model)):
        again.catch_up()
        check(again.graph, served, clicks)


def test_what_is_no_click_of_now_counts_nothing(served: Served, model: Path) -> None:
    retriever, (a, b) = load(model), served.candidate_ids[:2].tolist()
    before = retriever.users.until / 1000
    ignored = [event(7, item, time=before - 9 + i) for i, item in enumerate((a, b))]
    ignored += [event(7, item, type_) for item in (a, b) for type_ in ("view", "dislike", "ranked")]
    retriever.record(ignored)
    retriever.catch_up()
    check(retriever.graph, served, [])


def test_each_click_of_one_second_counts_once(served: Served, model: Path) -> None:
    retriever, (a, b) = load(model), served.candidate_ids[:2].tolist()
    second = float(int(time.time()) + 5)
    clicks = [event(7, item, time=second + i / 10) for i, item in enumerate((a, b, a, b, b))]
    for click in clicks:
        assert retriever.record([click, click]) == 1
        retriever.catch_up()
    check(retriever.graph, served, clicks)


def test_a_late_click_has_its_place_after_the_next_load(served: Served, model: Path) -> None:
    retriever, (a, b, c) = load(model), served.candidate_ids[:3].tolist()
    start = time.time()
    clicks = [event(7, item, time=start + i) for i, item in enumerate((a, b, c))]
    for click in (clicks[0], clicks[2], clicks[1]):
        retriever.record([click])
        retriever.catch_up()
    # After a, before c: only the first is counted now.
    row_a, row_b = Ids(served.candidate_ids).rows([a, b]).tolist()
    assert row_b in retriever.graph.counts_of(row_a)[0]
    again = load(model)
    again.catch_up()
    check(again.graph, served, clicks)


def test_a_deletion_counts_after_the_next_load(served: Served, model: Path) -> None:
    retriever = load(model)
    clicks = random_clicks(served, 40, time.time(), seed=1)
    retriever.record(clicks)
    retriever.catch_up()
    gone = clicks[0]["user_id"]
    retriever.forget(gone)
    retriever.catch_up()
    check(retriever.graph, served, clicks)
    again = load(model)
    again.catch_up()
    check(again.graph, served, [click for click in clicks if click["user_id"] != gone])


def test_events_of_a_model_with_other_ids_count_nothing(served: Served, model: Path) -> None:
    retriever, (a, b) = load(model), served.candidate_ids[:2].tolist()
    texts = [event("Ann", item) for item in ("a", "b")]
    Journal(model).write([check_events(texts, users_are_text=True, items_are_text=True)])
    clicks = [event(7, item, time=time.time() + i) for i, item in enumerate((a, b))]
    retriever.record(clicks)
    retriever.catch_up()
    check(retriever.graph, served, clicks)


def test_looks_take_a_share_of_the_time(
    served: Served, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_graph, "_SHARE", 1e6)
    retriever = load(model)
    retriever.catch_up()
    retriever.record(random_clicks(served, 9, time.time(), seed=2))
    retriever.catch_up()  # Too early.
    check(retriever.graph, served, [])


def test_without_live_events_nothing_moves(served: Served, model: Path) -> None:
    load(model).record(random_clicks(served, 9, time.time(), seed=3))
    retriever = load(model, live=False)
    retriever.catch_up()
    check(retriever.graph, served, [])


def rank_of(retriever: LoadedRetriever, user: Any, item: Any) -> int:
    ids, _, _ = retriever.retrieve_user([user], NUM_CANDIDATES)
    return ids[0].tolist().index(item)


def test_the_clicks_of_others_change_the_answer_to_a_user(served: Served, model: Path) -> None:
    retriever, user = load(model), served.query_ids[NUM_QUERIES - 1]
    a = served.known(NUM_QUERIES)[-1]
    ids, _, _ = retriever.retrieve_user([user], NUM_CANDIDATES)
    answer = [item for item in ids[0].tolist() if item != -1]
    b = answer[-1]  # What the model would show last.
    start, others = time.time(), [*range(1000, 1030)]
    retriever.record(
        [event(other, item, time=start + i) for other in others for i, item in enumerate((a, b))]
    )
    assert rank_of(retriever, user, b) == len(answer) - 1
    retriever.catch_up()
    assert rank_of(retriever, user, b) == 0
