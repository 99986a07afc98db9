"""What a history adds to scores: every kind of query gets the answer computed by hand."""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.exports.saved import ask_saved_model
from tests.exports.test_relations import RELATIONS, WAYS, Asked
from tests.search.test_item_graph import neighbour_bonuses_by_hand, weights_by_hand
from tests.service.conftest import NUM_CANDIDATES, Served, make_served
from tfrs_pipeline import Holdout, evaluate, recommend
from tfrs_pipeline.answers.publish import SCANN_FOLDER
from tfrs_pipeline.answers.retriever import LoadedRetriever, load
from tfrs_pipeline.answers.signatures import completed, numpy_type
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.exports.export import export
from tfrs_pipeline.exports.graph_index import load_scann_ops
from tfrs_pipeline.search.history_bonus import HistoryBonus, NeighbourBonus, RepeatBonus
from tfrs_pipeline.search.item_graph import KINDS
from tfrs_pipeline.search.queries import id_array, padded_ids
from tfrs_pipeline.search.settings import Exact, Scann

pytestmark = pytest.mark.usefixtures("few_signatures")
NEXT, TOGETHER = KINDS
# A bonus of the history's items in a ScaNN index, and a penalty in an exact one.
BONUSES = {
    "int": HistoryBonus(RepeatBonus(3.0, 0.5, 0.5), NeighbourBonus(TOGETHER, 6.0, 0.7)),
    "str": HistoryBonus(RepeatBonus(-4.0, 0.0, 0.0), NeighbourBonus(NEXT, 20.0, 0.3)),
}


@pytest.fixture(scope="module")
def repeating(served: Served) -> Served:
    """Users who clicked the same items again, more often than the model reads items."""
    rng = np.random.default_rng(7)
    clicks = [rng.choice(rows, 3 * len(rows)) if len(rows) else rows for rows in served.clicks]
    return dataclasses.replace(served, clicks=clicks)


@pytest.fixture(scope="module")
def bonus(repeating: Served) -> HistoryBonus:
    """The bonus with the graph of the users' histories, as an export has it."""
    model = dataclasses.replace(repeating.exportable(), bonus=BONUSES[repeating.ids])
    assert model.bonus is not None
    return model.bonus


def exported_to(folder: Path, repeating: Served, bonus: HistoryBonus) -> Path:
    exportable = dataclasses.replace(repeating.exportable(), bonus=bonus)
    index = Exact() if repeating.ids == "str" else Scann(recall=0.9)
    export(exportable, folder, index=index, filter_by="genres", queries=repeating.queries())
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize("served", ["int"], indirect=True)
def test_a_fresh_process_adds_the_bonus(
    repeating: Served, bonus: HistoryBonus, tmp_path: Path
) -> None:
    assert exported_to(tmp_path / "films", repeating, bonus).is_dir()


@pytest.fixture(scope="module")
def model_folder(
    repeating: Served, bonus: HistoryBonus, module_path: Path, trusted_exports: None
) -> Path:
    return exported_to(module_path / repeating.ids / "films", repeating, bonus)


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> LoadedRetriever:
    return load(model_folder)


def bonuses_by_hand(
    served: Served, bonus: HistoryBonus, history: Sequence[Any]
) -> dict[Any, float]:
    """Adds up what each item of a history, oldest first, gives itself and its neighbours."""
    items = Ids(served.candidate_ids)
    rows = items.rows(history)[::-1].tolist()
    added: dict[int, float] = defaultdict(float)
    if (repeats := bonus.repeats) is not None:
        n: dict[int, float] = defaultdict(float)
        for age, row in enumerate(rows):
            n[row] += (1 + age) ** -repeats.forgetting
        for row, num in n.items():
            added[row] += repeats.weight * num**repeats.power
    if (near := bonus.neighbours) is not None:
        weights = weights_by_hand([clicks.tolist() for clicks in served.clicks], near.kind)
        for row, number in neighbour_bonuses_by_hand(near, rows, weights).items():
            added[row] += number
    return dict(zip(items.take(np.array([*added], int)).tolist(), added.values(), strict=True))


def by_hand(
    served: Served,
    bonus: HistoryBonus,
    queries: Sequence[dict[str, Any]],
    k: int,
    exclude: Sequence[Collection[Any]] | None = None,
    allowed: str = "",
) -> tuple[list[list[Any]], np.ndarray]:
    """Ranks all items by dot product and bonus."""
    ids = served.candidate_ids.tolist()
    all_ids, all_scores = [], np.full((len(queries), k), -np.inf)
    for line, (query, dots) in enumerate(
        zip(queries, served.in_memory.score(queries), strict=True)
    ):
        known = [item for item in query.get("history", []) if item in ids]
        added = bonuses_by_hand(served, bonus, known)
        excluded = set(exclude[line]) if exclude else set()
        scores = {
            item: dot + added.get(item, 0)
            for item, dot, genres in zip(ids, dots.tolist(), served.genres, strict=True)
            if item not in excluded and (not allowed or allowed in genres)
        }
        best = sorted(scores, key=scores.__getitem__, reverse=True)[:k]
        all_scores[line, : len(best)] = [scores[item] for item in best]
        all_ids.append(best)
    return all_ids, all_scores


def check(
    answer: tuple[np.ndarray, np.ndarray], expected: tuple[list[list[Any]], np.ndarray]
) -> None:
    for ids, best in zip(answer[0].tolist(), expected[0], strict=True):
        assert [*ids][: len(best)] == best
    np.testing.assert_allclose(answer[1], expected[1], rtol=1e-4, atol=1e-4)


def test_a_given_history_counts_in_memory_in_the_graph_and_in_service(
    repeating: Served, bonus: HistoryBonus, model_folder: Path, loaded: LoadedRetriever
) -> None:
    queries: list[dict[str, Any]] = [*repeating.queries(), {}, {"history": repeating.known(3)[:1]}]
    queries[1] = queries[1] | {"history": [*queries[1]["history"], queries[0]["history"][:1]][:-1]}
    exclude = [repeating.candidate_ids[line : line + 9].tolist() for line in range(len(queries))]
    k = 12
    for excluded in (None, exclude):
        expected = by_hand(repeating, bonus, queries, k, excluded)
        # Each part decides: without it, the answers differ.
        for less in (
            dataclasses.replace(bonus, repeats=None),
            dataclasses.replace(bonus, neighbours=None),
        ):
            assert expected[0] != by_hand(repeating, less, queries, k, excluded)[0]
        check(bonus.added_to(repeating.in_memory).retrieve(queries, k, excluded), expected)
        check(loaded.retrieve(queries, k, excluded), expected)
        check(load(model_folder, exact=True).retrieve(queries, k, excluded), expected)
        load_scann_ops()
        for folder in (loaded.folder, loaded.folder / SCANN_FOLDER):
            if folder.is_dir():
                check(ask_graph(folder, queries, excluded, k), expected)
    allowed = by_hand(repeating, bonus, queries, k, exclude, allowed="b")
    check(loaded.retrieve(queries, k, exclude, allowed=[["b"]] * len(queries)), allowed)


@pytest.mark.parametrize("way", WAYS)
def test_a_bonus_keeps_the_relations_of_answers(
    repeating: Served, loaded: LoadedRetriever, way: str
) -> None:
    for relation in RELATIONS:
        relation(Asked(loaded, repeating, way))


def ask_graph(folder: Path, queries: Sequence[Any], exclude: Any, k: int) -> Any:
    are_text = isinstance(queries[0]["user_id"], str)
    inputs: dict[str, Any] = {
        "user_id": id_array([query.get("user_id") for query in queries], are_text),
        "history": padded_ids([query.get("history", []) for query in queries], are_text),
        "k": k,
    }
    if exclude is not None:
        inputs["exclude"] = padded_ids(exclude, are_text)
    answer = ask_saved_model(folder, "retrieve", inputs, len(queries))
    return answer["candidate_ids"], answer["scores"]


def test_a_stored_history_counts_as_the_same_history_given(
    repeating: Served, bonus: HistoryBonus, loaded: LoadedRetriever
) -> None:
    users = repeating.query_ids.tolist()
    expected = by_hand(repeating, bonus, repeating.queries(), NUM_CANDIDATES)
    ids, scores, is_known = loaded.retrieve_user(users, NUM_CANDIDATES)
    assert is_known.all()
    check((ids, scores), expected)  # With the items that the users know.
    # A request excludes them.
    exclude = [repeating.known(row) for row in range(1, len(users) + 1)]
    ids, scores, _ = loaded.retrieve_user(users, 5, exclude)
    check((ids, scores), by_hand(repeating, bonus, repeating.queries(), 5, exclude))
    for line, excluded in zip(ids.tolist(), exclude, strict=True):
        assert not set(line) & set(excluded)
    # The server asks in this way.
    users_array = np.array(users, numpy_type(loaded.signatures["retrieve_user"]["user_id"].dtype))
    inputs = {"user_id": users_array, "k": np.int32(7)}
    full = completed(loaded.signatures["retrieve_user"], inputs, len(users))
    answer = loaded.engine.answer("retrieve_user", full)
    seven = by_hand(repeating, bonus, repeating.queries(), 7)
    check((answer["candidate_ids"], answer["scores"]), seven)
    assert set(answer) == {"candidate_ids", "scores", "is_known_user", "num_known_items"}


def test_recommend_and_evaluate_count_it_too(
    repeating: Served, bonus: HistoryBonus, loaded: LoadedRetriever, tmp_path: Path
) -> None:
    queries = repeating.queries()
    users, best = repeating.query_ids.tolist(), by_hand(repeating, bonus, queries, 9)
    recommend(loaded, tmp_path / "best.parquet", k=9)
    table = pq.read_table(tmp_path / "best.parquet")
    assert table["user_id"].to_pylist() == np.repeat(np.array(users, object), 9).tolist()
    assert table["item_id"].to_pylist() == [item for line in best[0] for item in line]
    np.testing.assert_allclose(table["score"], best[1].ravel(), rtol=1e-4, atol=1e-4)
    # Its place among the best decides what an item to find is worth.
    histories = [np.array(query["history"], repeating.candidate_ids.dtype) for query in queries]
    holdout = Holdout(
        user_ids=repeating.query_ids,
        histories=histories,
        relevant=[np.array([line[row]]) for row, line in enumerate(best[0])],
        clicked=histories,
        seen=histories,
        candidate_ids=repeating.candidate_ids,
        candidate_counts=np.ones(NUM_CANDIDATES, int),
        exposure=np.ones(NUM_CANDIDATES),
        by="requests",
    )
    models = {"in memory": bonus.added_to(repeating.in_memory), "in service": loaded}
    measured = evaluate(models, holdout, exclude="none", cutoffs=(9,))
    for result in measured.results.values():
        values = result.per_query["mrr@9"]
        np.testing.assert_allclose(values, 1 / (1 + np.arange(len(queries))))


def test_an_export_without_user_data_keeps_the_graph(tmp_path: Path) -> None:
    served, bonus = make_served("int", use_user_id=False), BONUSES["int"]
    model = dataclasses.replace(served.exportable(), bonus=bonus)
    folder = export(model, tmp_path / "films", index=Exact(), user_data=False)
    loaded = load(folder)
    queries = [{"history": served.known(row)} for row in range(1, 7)]
    expected = by_hand(served, bonus, queries, 12)
    check(loaded.retrieve(queries, 12), expected)
    assert not len(loaded.stored.users)
    inputs = {"user_id": np.full(len(queries), -1), "k": 12}
    inputs["history"] = padded_ids([query["history"] for query in queries], are_text=False)
    answer = ask_saved_model(loaded.folder, "retrieve", inputs, len(queries))
    check((answer["candidate_ids"], answer["scores"]), expected)


def test_an_event_does_not_take_the_users_items_out(
    repeating: Served, loaded: LoadedRetriever
) -> None:
    """A view changes no history; so the answer stays, for a user among others without events."""
    users = repeating.query_ids.tolist()
    before = loaded.retrieve_user(users, 9)
    item = repeating.candidate_ids[:1].tolist()[0]
    loaded.record([{"user_id": users[2], "item_id": item, "type": "view"}])
    try:
        after = loaded.retrieve_user(users, 9)
        np.testing.assert_array_equal(after[0], before[0])
        np.testing.assert_allclose(after[1], before[1], rtol=1e-4)
    finally:
        loaded.forget(users[2])


def test_similar_items_have_no_bonus(repeating: Served, loaded: LoadedRetriever) -> None:
    item = repeating.candidate_ids[3]
    vectors = repeating.model.embed_corpus()
    scores = vectors @ vectors[3]
    best = [i for i in np.argsort(-scores) if i != 3][:5]
    (ids,), _ = loaded.similar([item], 5)
    assert ids.tolist() == repeating.candidate_ids[best].tolist()


def test_without_a_bonus_nothing_changes(repeating: Served) -> None:
    outputs = repeating.module("exact").exported["embed_user"]
    outputs = outputs.get_concrete_function().structured_outputs
    assert set(outputs) == {"embeddings", "is_known_user", "num_known_items", "known_items"}


def test_queries_with_and_without_features_are_answered_together(
    repeating: Served, loaded: LoadedRetriever
) -> None:
    # Their histories differ in length, and so do their lists of bonuses.
    long, short = repeating.known(6), repeating.known(3)[:1]
    queries: list[dict[str, Any]] = [{"history": long, "features": {"gender": "F"}}]
    queries += [{"history": short}]
    queries += [{"history": short, "features": {"gender": "M"}}]
    ids, scores = loaded.retrieve(queries, 9)
    for line, query in enumerate(queries):
        alone_ids, alone_scores = loaded.retrieve([query], 9)
        assert ids[line].tolist() == alone_ids[0].tolist()
        np.testing.assert_allclose(scores[line], alone_scores[0], rtol=1e-5)
