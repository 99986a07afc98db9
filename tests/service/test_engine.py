"""The one path of a query, in NumPy and LiteRT, against the graph that a SavedModel holds."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.exports.saved import decoded
from tests.service.conftest import NUM_QUERIES, Served, make_served
from tests.service.test_requests import FEATURES, REQUESTS, user_queries
from tfrs_pipeline import Exact, LoadedRetriever, export, load
from tfrs_pipeline.answers import engine as engine_module
from tfrs_pipeline.answers.proof import difference
from tfrs_pipeline.answers.signatures import completed
from tfrs_pipeline.exports.encoder import Encoder
from tfrs_pipeline.model.tf_tables import as_tensors, call, signature_inputs
from tfrs_pipeline.samples.store import RowLists
from tfrs_pipeline.search.candidates import UnknownItem
from tfrs_pipeline.search.history_bonus import HistoryBonus, NeighbourBonus, RepeatBonus

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures")


@dataclasses.dataclass(frozen=True)
class Both:
    """A model in a graph, and as it is served."""

    served: Served
    encoder: Encoder
    loaded: LoadedRetriever

    def in_graph(self, name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        function = getattr(self.encoder, name)
        answer = call(function, as_tensors(signature_inputs(function), inputs))
        return {key: decoded(tensor.numpy()) for key, tensor in answer.items()}

    def inputs(self, name: str, num_rows: int, **known: Any) -> dict[str, np.ndarray]:
        return completed(self.loaded.signatures[name], known, num_rows)


def dislikes(served: Served) -> RowLists:
    """Makes a long list for a user who knows little, and a short one for others."""
    lists = [np.zeros(0, np.int32) for _ in range(NUM_QUERIES + 1)]
    everything = np.arange(1, 61, dtype=np.int32)
    for row, num in ((1, 13), (3, 2)):
        lists[row] = np.setdiff1d(everything, served.clicks[row])[-num:].astype(np.int32)
    return RowLists.from_lists(lists)


MODELS = ["int", "text", "times and requests", "dislikes", "bonus and dislikes"]


@pytest.fixture(scope="module", params=MODELS)
def both(
    request: pytest.FixtureRequest, module_path: Path, trusted_exports: None, few_signatures: None
) -> Both:
    name, changes = request.param, dict[str, Any]()
    served = make_served("str" if name in ("text", "dislikes") else "int")
    if name == "times and requests":
        served = make_served("int", use_user_id=False, request_features=FEATURES, reads_times=True)
    if "bonus" in name:
        near = NeighbourBonus("what came next", 5.0, decay=0.7)
        changes["bonus"] = HistoryBonus(RepeatBonus(3.0, power=0.5, forgetting=0.5), near)
    if "dislikes" in name:
        changes["disliked"] = dislikes(served)
    model = dataclasses.replace(served.exportable(), **changes)
    loaded = load(export(model, module_path / name / "films", index=Exact()))
    return Both(served, Encoder(model), loaded)


def check(expected: dict[str, np.ndarray], answer: dict[str, np.ndarray]) -> None:
    """Compares answers: ids and what is counted exactly, scores as the proof of an export does."""
    assert not difference(expected, answer)
    for name, array in expected.items():
        assert answer[name].dtype == array.dtype, name
        if array.dtype.kind in "biO":
            assert answer[name].tolist() == array.tolist(), name


def queries_of(served: Served) -> list[Any]:
    """Makes queries: of users with their history, others, none, an unknown user and items."""
    other: Any = 4 if served.ids == "int" else "nobody"
    known: list[Any] = (
        user_queries(served, REQUESTS) if served.request_features else served.queries()
    )
    return [
        *known,
        {"user_id": other, "history": [other, *served.known(4)[:2], other]},
        {"history": served.known(6)},
        {},
    ]


def test_users_are_embedded_as_in_the_graph(both: Both) -> None:
    users = [*both.served.query_ids.tolist(), 4 if both.served.ids == "int" else "nobody"]
    arrays = both.loaded.inputs.read([{"user_id": user} for user in users])
    for rows in (range(7), [6], [1, 0], []):
        chosen = [*rows]
        inputs = both.inputs("embed_user", len(chosen), user_id=arrays["user_id"][chosen])
        expected = both.in_graph("embed_user", inputs)
        check(expected, both.loaded.engine.answer("embed_user", inputs))
    assert both.in_graph("embed_user", both.inputs("embed_user", 1))["is_known_user"].tolist() == [
        False
    ]


def test_histories_are_embedded_as_in_the_graph(both: Both) -> None:
    queries = queries_of(both.served)
    for some in (queries, queries[-1:], queries[4:5], []):
        arrays = both.loaded.inputs.read(some)
        inputs = both.inputs("embed_query", len(some), **arrays)
        expected = both.in_graph("embed_query", inputs)
        check(expected, both.loaded.engine.answer("embed_query", inputs))
        gender = np.array(["F", "M", "", "x"] * 3, object)[: len(some)]
        inputs = both.inputs("embed_query_with_features", len(some), **arrays, gender=gender)
        with_features = both.in_graph("embed_query_with_features", inputs)
        check(with_features, both.loaded.engine.answer("embed_query_with_features", inputs))
        if len(some) > 3:
            assert np.abs(with_features["embeddings"] - expected["embeddings"]).max() > 1e-3


def test_items_are_embedded_as_in_the_graph(both: Both) -> None:
    ids = both.served.candidate_ids.tolist()
    items = np.array([*ids[:3], ids[-1], "new" if both.served.ids == "str" else 5])
    genres = np.array([["a", "b"], ["", ""], ["c", ""], ["x", "b"], ["b", ""]], object)
    for num in (5, 1, 0):
        known = {"item_id": items[:num].astype(items.dtype if items.dtype.kind == "i" else object)}
        inputs = both.inputs("embed_candidate", num, **known, genres=genres[:num])
        expected = both.in_graph("embed_candidate", inputs)
        check(expected, both.loaded.engine.answer("embed_candidate", inputs))
        assert expected["is_known_item"].tolist() == [True, True, True, True, False][:num]


@pytest.mark.parametrize("both", ["int", "bonus and dislikes", "times and requests"], indirect=True)
def test_large_batches_are_embedded_in_blocks(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, queries = both.loaded.engine, queries_of(both.served)
    inputs = both.inputs("embed_query", len(queries), **both.loaded.inputs.read(queries))
    whole = engine.answer("embed_query", inputs)
    ids = both.served.candidate_ids.tolist()
    genres = both.served.genres
    vectors, is_known = both.loaded.embed_candidates(ids, {"genres": genres})
    monkeypatch.setattr(engine_module, "QUERIES_PER_CALL", 2)
    monkeypatch.setattr(engine_module, "ITEMS_PER_CALL", 7)
    for name, array in engine.answer("embed_query", inputs).items():
        np.testing.assert_allclose(array, whole[name], atol=1e-6)
    again, _ = both.loaded.embed_candidates(ids, {"genres": genres})
    np.testing.assert_allclose(again, vectors, atol=1e-6)
    np.testing.assert_allclose(again, both.served.model.embed_corpus(), atol=1e-5)
    assert is_known.all()


@pytest.mark.parametrize("both", ["int", "text"], indirect=True)
def test_signatures_that_retrieve_answer_as_the_methods(both: Both) -> None:
    users = both.served.query_ids
    excluded = both.served.candidate_ids[:3].tolist()
    inputs = both.inputs("retrieve_user", 6, user_id=users, k=np.int32(70))
    empty: Any = -1 if both.served.ids == "int" else ""
    inputs["exclude"] = np.array([excluded, [empty] * 3] * 3, users.dtype)
    answer = both.loaded.engine.answer("retrieve_user", inputs)
    ids, scores, is_known = both.loaded.retrieve_user(users.tolist(), 70, [excluded, []] * 3)
    assert answer["candidate_ids"].tolist() == ids.tolist()
    np.testing.assert_array_equal(answer["scores"], scores)
    assert answer["is_known_user"].tolist() == is_known.tolist()
    assert set(answer) == {"candidate_ids", "scores", "is_known_user", "num_known_items"}
    item = both.served.candidate_ids[5:6]
    similar = {"item_id": item, "exclude": inputs["exclude"][:1, :0], "k": np.int32(4)}
    found = both.loaded.engine.answer("similar", similar)
    assert found["candidate_ids"].tolist() == both.loaded.similar(item.tolist(), 4)[0].tolist()
    unknown = np.array([4] if both.served.ids == "int" else ["x"], users.dtype)
    with pytest.raises(UnknownItem):
        both.loaded.engine.answer("similar", {**similar, "item_id": unknown})
