"""The bonus of the items in a history: every kind of query gets the answer computed by hand."""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.exports.saved import ask_saved_model
from tests.search.test_settings import clustered
from tests.service.conftest import NUM_CANDIDATES, Served
from tfrs_pipeline.exports.export import export
from tfrs_pipeline.exports.graph_index import load_scann_ops
from tfrs_pipeline.search.candidates import Candidates
from tfrs_pipeline.search.queries import id_array, padded_ids
from tfrs_pipeline.search.repeats import RepeatBonus
from tfrs_pipeline.search.searcher import Searcher
from tfrs_pipeline.search.settings import Exact, Level, Scann
from tfrs_pipeline.service.publish import SCANN_FOLDER
from tfrs_pipeline.service.retriever import LoadedRetriever, load
from tfrs_pipeline.service.signatures import completed, numpy_type

pytestmark = pytest.mark.usefixtures("few_signatures")
# A bonus in a ScaNN index, and a penalty in an exact one.
BONUSES = {"int": RepeatBonus(3.0, power=0.5, forgetting=0.5), "str": RepeatBonus(-4.0, 0.0, 0.0)}


@pytest.fixture(scope="module")
def bonus(served: Served) -> RepeatBonus:
    return BONUSES[served.ids]


@pytest.fixture(scope="module")
def repeating(served: Served) -> Served:
    """Users who clicked the same items again, more often than the model reads items."""
    rng = np.random.default_rng(7)
    clicks = [rng.choice(rows, 3 * len(rows)) if len(rows) else rows for rows in served.clicks]
    return dataclasses.replace(served, clicks=clicks)


def exported_to(folder: Path, repeating: Served, bonus: RepeatBonus) -> Path:
    exportable = dataclasses.replace(repeating.exportable(), repeat_bonus=bonus)
    index = Exact() if repeating.ids == "str" else Scann(recall=0.9)
    export(exportable, folder, index=index, filter_by="genres", queries=repeating.queries())
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize("served", ["int"], indirect=True)
def test_a_fresh_process_adds_the_bonus(
    repeating: Served, bonus: RepeatBonus, tmp_path: Path
) -> None:
    assert exported_to(tmp_path / "films", repeating, bonus).is_dir()


@pytest.fixture(scope="module")
def model_folder(
    repeating: Served, bonus: RepeatBonus, module_path: Path, trusted_exports: None
) -> Path:
    return exported_to(module_path / repeating.ids / "films", repeating, bonus)


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> LoadedRetriever:
    return load(model_folder)


def bonuses_by_hand(bonus: RepeatBonus, history: Sequence[Any]) -> dict[Any, float]:
    """Adds up the occurrences of each item, the latest first."""
    n: dict[Any, float] = defaultdict(float)
    for age, item in enumerate(reversed(history)):
        n[item] += (1 + age) ** -bonus.forgetting
    return {item: bonus.weight * num**bonus.power for item, num in n.items()}


def by_hand(
    served: Served,
    bonus: RepeatBonus,
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
        added = bonuses_by_hand(bonus, known)
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
    repeating: Served, bonus: RepeatBonus, model_folder: Path, loaded: LoadedRetriever
) -> None:
    queries: list[dict[str, Any]] = [*repeating.queries(), {}, {"history": repeating.known(3)[:1]}]
    queries[1] = queries[1] | {"history": [*queries[1]["history"], queries[0]["history"][:1]][:-1]}
    exclude = [repeating.candidate_ids[line : line + 9].tolist() for line in range(len(queries))]
    k = 12
    for excluded in (None, exclude):
        expected = by_hand(repeating, bonus, queries, k, excluded)
        # The bonus decides: without it, the answers differ.
        none = by_hand(repeating, RepeatBonus(0.0, 0.0, 0.0), queries, k, excluded)
        assert expected[0] != none[0]
        check(bonus.added_to(repeating.in_memory).retrieve(queries, k, excluded), expected)
        check(loaded.retrieve(queries, k, excluded), expected)
        check(load(model_folder, exact=True).retrieve(queries, k, excluded), expected)
        load_scann_ops()
        for folder in (loaded.folder, loaded.folder / SCANN_FOLDER):
            if folder.is_dir():
                check(ask_graph(folder, queries, excluded, k), expected)
    allowed = by_hand(repeating, bonus, queries, k, exclude, allowed="b")
    check(loaded.retrieve(queries, k, exclude, allowed=[["b"]] * len(queries)), allowed)


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
    repeating: Served, bonus: RepeatBonus, loaded: LoadedRetriever
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


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_candidates_that_change_get_the_bonus_of_their_id(kind: str) -> None:
    vectors, queries, new = clustered(300), clustered(4, seed=1), clustered(3, seed=2)
    searcher = Searcher.build(vectors, 10) if kind == "scann" else None
    levels = [Level(100, 10, 300)] if searcher else []
    candidates = Candidates(list(range(300)), vectors, searcher, levels)
    # 7 is replaced, 300 and 301 are new, 8 is gone.
    candidates.change([7, 300, 301], new, removed=[8])
    now = dict(enumerate(vectors)) | dict(zip([7, 300, 301], new, strict=True))
    del now[8]
    # The best item of each query too, which a search without the bonus would find.
    best_ids = np.argsort(-(queries @ vectors.T), axis=1)[:, 0].tolist()
    numbers = np.array([5, 6, -5, 7, 0, 0.1, 9], np.float32)  # The last one is padding.
    bonuses = [([7, 8, 301, 999, 20, best], numbers) for best in best_ids]
    for exclude in ([], [20, 7, 55]):
        ids, scores = candidates.search(queries, 40, [exclude] * 4, bonuses=bonuses)
        for line, query in enumerate(queries):
            added = dict(zip(bonuses[line][0], numbers.tolist(), strict=False))
            expected = {i: float(v @ query) + added.get(i, 0) for i, v in now.items()}
            left = expected.keys() - {*exclude}
            best = sorted(left, key=expected.__getitem__, reverse=True)[:40]
            assert ids[line].tolist() == best
            np.testing.assert_allclose(scores[line], [expected[i] for i in best], rtol=1e-4)


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
