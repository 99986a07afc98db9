"""Items similar to an item: by NumPy, in Python, by the signature, over REST, on the page."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from tests.exports.saved import saved_model
from tests.model.conftest import eagerly
from tests.search.test_item_graph import weights_by_hand
from tests.service.conftest import NUM_CANDIDATES, Served
from tests.service.running_server import PREDICT, Running, in_json, send, until
from tfrs_pipeline import LoadedRetriever, Log, TrainingSettings, TwoTower, export, load
from tfrs_pipeline.run.refresh import refresh_index
from tfrs_pipeline.search.item_graph import KINDS
from tfrs_pipeline.search.queries import padded_ids

pytestmark = pytest.mark.usefixtures("trusted_exports")
K = 6
SOME = [3, 40, 17]  # Places of the items that are asked about.
UNKNOWN: dict[str, Any] = {"int": 4, "str": "film 4"}


@pytest.fixture(scope="module")
def items(served: Served) -> list[Any]:
    return [served.candidate_ids.tolist()[place] for place in SOME]


def by_numpy(
    ids: list[Any], vectors: np.ndarray, places: list[int], k: int, closed: Any, biases: Any = 0.0
) -> tuple[list[list[Any]], np.ndarray]:
    """Ranks all other items, but those in `closed`, by their dot products, one by one."""
    found, scores = [], []
    for place, of_item in zip(places, closed, strict=True):
        products = np.array([float(np.dot(vectors[place], other)) for other in vectors]) + biases
        order = [i for i in np.argsort(-products, kind="stable") if ids[i] not in of_item]
        order = [i for i in order if i != place][:k]
        found.append([ids[i] for i in order])
        scores.append(products[order])
    return found, np.array(scores)


def by_signature(
    served: Served, model: Any, items: list[Any], k: int, exclude: list[list[Any]]
) -> tuple[list[list[Any]], np.ndarray]:
    """Asks a module, in memory or reloaded."""
    dtype = tf.int64 if served.ids == "int" else tf.string
    rows = padded_ids(exclude, are_text=served.ids == "str")
    excluded = tf.constant(rows, dtype, rows.shape)
    answer = model.similar(tf.constant(items, dtype), excluded, tf.constant(k))
    assert set(answer) == {"candidate_ids", "scores"}
    ids = answer["candidate_ids"].numpy().tolist()
    texts = [[x.decode() if isinstance(x, bytes) else x for x in row] for row in ids]
    return texts, answer["scores"].numpy()


@pytest.mark.parametrize(("is_filtered", "k"), [(False, K), (True, K), (False, NUM_CANDIDATES)])
def test_every_way_answers_as_numpy(
    served: Served,
    loaded: LoadedRetriever,
    running: Running,
    items: list[Any],
    kind: str,
    is_filtered: bool,
    k: int,
) -> None:
    vectors, ids = served.model.embed_corpus(), served.candidate_ids.tolist()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    # For each item, the most similar one is excluded too.
    best, _ = by_numpy(ids, vectors, SOME, 1, [set()] * 3)
    closed, allowed = list(map(set, best)), [["a"], ["b"], ["c"]] if is_filtered else []
    for of_item, (genre,) in zip(closed, allowed, strict=False):
        pairs = zip(ids, served.genres, strict=True)
        of_item |= {id_ for id_, genres in pairs if genre not in genres}
    expected, scores = by_numpy(ids, vectors, SOME, k, closed)
    num_empty = k - len(expected[0])  # An item never finds itself.
    expected = [row + [-1 if served.ids == "int" else ""] * num_empty for row in expected]
    scores = np.pad(scores, [(0, 0), (0, num_empty)], constant_values=-np.inf)
    inputs: dict[str, Any] = {"item_id": items, "exclude": best, "k": k}
    inputs |= {"allowed": allowed} if is_filtered else {}
    name = "similar_filtered" if is_filtered else "similar"
    over_rest = running.predict(signature_name=name, inputs=inputs)["outputs"]
    assert set(over_rest) == {"candidate_ids", "scores"}
    answers = [
        loaded.similar(items, k, np.array(best, object), allowed=allowed or None),
        (over_rest["candidate_ids"], np.array(over_rest["scores"], np.float32)),
    ]
    if not is_filtered:  # A SavedModel has no filter.
        for module in (saved_model(loaded.folder), served.module(kind)):
            answers.append(by_signature(served, module, items, k, best))
    for found, found_scores in answers:
        assert np.asarray(found, object).tolist() == expected
        np.testing.assert_allclose(in_json(found_scores), in_json(scores), atol=1e-5)


def test_refuses_what_is_not_there(
    served: Served, loaded: LoadedRetriever, running: Running, items: list[Any]
) -> None:
    unknown = UNKNOWN[served.ids]
    for message, asked in (
        (rf"Item {unknown!r} is not among the 60 items", ([items[0], unknown], K)),
        ("item_ids must be a list", ("film", K)),
        ("This model's ids are", ([UNKNOWN["str" if served.ids == "int" else "int"]], K)),
        ("k must be", (items, 0)),
        ("exclude must hold one collection", (items, K, [[]])),
    ):
        with pytest.raises(ValueError, match=message):
            loaded.similar(*asked)
    with pytest.raises(ValueError, match="No item has 'z' as its genres"):
        loaded.similar(items[:1], K, allowed=[["z"]])
    # TensorFlow Serving turns this into a 400.
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"Not among .*{unknown}"):
        by_signature(served, saved_model(loaded.folder), [items[0], unknown], K, [[]] * 2)
    inputs = {"item_id": [items[0], unknown], "exclude": [[], []], "k": K}
    response = running.post(PREDICT, json={"signature_name": "similar", "inputs": inputs})
    assert response.status_code == 400
    assert f"Item {unknown!r} is not among" in response.json()["error"]


def test_an_item_of_today_is_found(served: Served, folder: Path, tmp_path: Path) -> None:
    loaded = load(shutil.copytree(folder, tmp_path / "films"))
    gone, *rest = served.candidate_ids.tolist()
    new, genres = UNKNOWN[served.ids], ["a", "c"]
    loaded.upsert([{"item_id": new, "genres": genres}])
    loaded.remove([gone])
    ids = [*rest, new]
    own = loaded.embed_candidates([new], {"genres": [genres]})[0]
    vectors = np.concatenate([served.model.embed_corpus()[1:], own])
    # Asks about the new item, and the one nearest to it.
    (nearest,), _ = by_numpy(ids, vectors, [len(rest)], 1, [set()])
    for place in (len(rest), ids.index(nearest[0])):
        expected, scores = by_numpy(ids, vectors, [place], len(rest), [set()])
        found, found_scores = loaded.similar([ids[place]], len(rest))
        assert found.tolist() == expected
        np.testing.assert_allclose(found_scores, scores, atol=1e-5)
    with pytest.raises(ValueError, match="is not among"):
        loaded.similar([gone], 1)


def test_the_page_and_the_command_ask_it(
    running: Running, loaded: LoadedRetriever, items: list[Any], served: Served, command: Any
) -> None:
    expected = loaded.similar(items[:1], K, allowed=[["b"]])[0][0].tolist()
    asked = {"similar_to": str(items[0]), "k": K, "filter": ["b"]}
    answer = running.post("/page/query", json=asked).json()
    assert [item["item_id"] for item in answer["index"]["items"]] == expected
    assert json.loads(answer["request"]["body"])["signature_name"] == "similar_filtered"
    response = running.post("/page/query", json={**asked, "user_id": "1"})
    assert response.status_code == 400
    words = ["query", loaded.folder, "-k", K, "--similar-to"]
    shown = json.loads(command(*words, items[0], "--filter", "b", "--json").out)
    assert (shown["similar_to"], shown["notes"]) == (items[0], [])
    assert [item["item_id"] for item in shown["items"]] == expected
    for flags, message in (
        ([UNKNOWN[served.ids]], "is not among the 60 items"),
        ([items[0], "--user", "1"], "given with --similar-to"),
    ):
        code, _, err = command(*words, *flags)
        assert code != 0
        assert message in err.replace("\n", " ")


def test_only_the_bias_of_a_found_item_counts(tmp_path: Path) -> None:
    """In a model with a learned bias, the last entry of its vectors; also after a refresh."""
    rng = np.random.default_rng(0)
    clicks = {"user_id": rng.integers(1, 20, 100), "item_id": rng.integers(1, 12, 100) * 10}
    log = Log.from_table(pa.table(clicks))
    training = TrainingSettings(batch_size=32, max_epochs=1)
    with eagerly():
        model = TwoTower(dim=4, candidate_bias=True, training=training).fit(log)
    for table in model.network.candidate_tower.id_tables:  # An untrained bias is nearly 0.
        table.assign(rng.normal(size=table.shape))
    ids, vectors = model.candidate_ids.tolist(), model.network.embed_corpus()
    places = list(range(len(ids)))
    nothing: list[set[Any]] = [set() for _ in ids]
    directions, biases = vectors[:, :-1], vectors[:, -1]
    expected, scores = by_numpy(ids, directions, places, 4, nothing, biases)
    for others in ((directions, places, 4, nothing), (vectors, places, 4, nothing)):
        assert by_numpy(ids, *others)[0] != expected
    folder = export(model, tmp_path / "films")
    pq.write_table(pa.table({"item_id": ids}), tmp_path / "items.parquet")
    for path in (folder, refresh_index(folder.parent, tmp_path / "items.parquet").folder):
        answers = [load(path).similar(ids, 4)]
        if path == folder:  # Here a refresh writes no SavedModel (`trusted_exports`).
            asked = tf.constant(ids, tf.int64), tf.zeros([len(ids), 0], tf.int64), tf.constant(4)
            found = saved_model(path).similar(*asked)
            answers.append((found["candidate_ids"].numpy(), found["scores"].numpy()))
        for got, got_scores in answers:
            assert got.tolist() == expected
            np.testing.assert_allclose(got_scores, scores, atol=1e-5)


def also_taken_by_hand(served: Served, item: Any) -> dict[Any, float]:
    """Returns the weights of what came next after an item in the histories, by id."""
    ids = served.candidate_ids.tolist()
    weights = weights_by_hand([rows.tolist() for rows in served.clicks], next(iter(KINDS)))
    near = weights.get(ids.index(item) + 1, {})
    return {ids[row - 1]: weight for row, weight in near.items()}


def filled(ids: Any, scores: Any) -> dict[Any, float]:
    """Returns the scores of an answer's items; empty slots come last, with the empty id."""
    pairs = dict(zip(ids, in_json(scores).tolist(), strict=True))
    num = sum(np.isfinite(score) for score in pairs.values())
    assert {*list(pairs)[num:]} <= {-1, ""}
    return dict([*pairs.items()][:num])


@pytest.fixture(scope="module")
def taken(served: Served) -> list[Any]:
    """Items of a history with several neighbours, and one without any."""
    in_histories = {row for rows in served.clicks for row in rows.tolist()}
    never = next(row for row in range(1, NUM_CANDIDATES + 1) if row not in in_histories)
    items: list[Any] = [*served.known(6)[:3], served.candidate_ids.tolist()[never - 1]]
    sizes = [len(also_taken_by_hand(served, item)) for item in items]
    assert min(sizes[:3]) >= 3
    assert sizes[3] == 0
    return items


@pytest.mark.parametrize("is_filtered", [False, True])
def test_also_taken_is_the_item_graph_in_python_and_over_http(
    served: Served, loaded: LoadedRetriever, running: Running, taken: list[Any], is_filtered: bool
) -> None:
    ids = served.candidate_ids.tolist()
    expected = [also_taken_by_hand(served, item) for item in taken]
    # For each item but the last, one of its neighbours is excluded.
    exclude = [[*near][:1] for near in expected]
    allowed = [["a"], ["b"], ["a", "c"], []] if is_filtered else []
    for line, excluded in enumerate(exclude):
        for item in excluded:
            del expected[line][item]
        if values := {*allowed[line]} if is_filtered else set():
            genres = dict(zip(ids, served.genres, strict=True))
            expected[line] = {i: x for i, x in expected[line].items() if values & {*genres[i]}}
    in_python = loaded.similar(
        taken, NUM_CANDIDATES, exclude, allowed=allowed or None, kind="also_taken"
    )
    name, empty = "also_taken", -1 if served.ids == "int" else ""
    rectangle = [row or [empty] for row in exclude]
    inputs: dict[str, Any] = {"item_id": taken, "exclude": rectangle, "k": NUM_CANDIDATES}
    if is_filtered:
        name, inputs["allowed"] = f"{name}_filtered", [[*row, ""][:2] for row in allowed]
        inputs["allowed"][3] = ["", ""]
    outputs = running.predict(signature_name=name, inputs=inputs)["outputs"]
    assert set(outputs) == {"candidate_ids", "scores"}
    over_http = outputs["candidate_ids"], np.array(outputs["scores"], np.float32)
    for answer in (in_python, over_http):
        for item, near, *line in zip(taken, expected, *answer, strict=True):
            answered = filled(*line)
            assert item not in answered
            assert answered == pytest.approx(near, rel=1e-5)
            assert [*answered.values()] == sorted(answered.values(), reverse=True)
    (two,), (scores,) = loaded.similar(taken[:1], 2, kind="also_taken")
    best = sorted(also_taken_by_hand(served, taken[0]).values(), reverse=True)[:2]
    assert [*filled(two, scores).values()] == pytest.approx(best, rel=1e-5)


def test_also_taken_refuses_what_is_not_there(
    served: Served, loaded: LoadedRetriever, running: Running, taken: list[Any], command: Any
) -> None:
    unknown = UNKNOWN[served.ids]
    message = f"Item {unknown!r} is unknown to this model"
    with pytest.raises(ValueError, match=message):
        loaded.similar([taken[0], unknown], K, kind="also_taken")
    with pytest.raises(ValueError, match=r"kind is one of alike, also_taken\. Received: 'near'"):
        loaded.similar(taken[:1], K, kind="near")
    inputs = {"item_id": [taken[0], unknown], "exclude": [[], []], "k": K}
    response = running.post(PREDICT, json={"signature_name": "also_taken", "inputs": inputs})
    assert response.status_code == 400
    assert message in response.json()["error"]
    code, _, err = command(
        "query", loaded.folder, "--kind", "also_taken", "--similar-to", str(unknown)
    )
    assert code != 0
    assert message in err.replace("\n", " ")
    # The SavedModel knows no graph.
    assert not hasattr(saved_model(loaded.folder), "also_taken")


def test_the_command_counts_recorded_clicks(served: Served, model: Path, command: Any) -> None:
    """It prints fewer than k where fewer were taken, and never a removed item."""
    retriever, (a, b, c) = load(model), served.candidate_ids.tolist()[-3:]
    before = also_taken_by_hand(served, a)
    user = 999 if served.ids == "int" else "newcomer"
    click = {"user_id": user, "type": "click"}
    retriever.record([{**click, "item_id": item} for item in (a, b)])
    retriever.record([{**click, "item_id": c}])
    retriever.remove([c])

    def asked() -> dict[Any, float]:
        words = ["--similar-to", str(a), "--kind", "also_taken", "-k", 50, "--json"]
        answer = json.loads(command("query", model, *words).out)
        return {item["item_id"]: item["score"] for item in answer["items"]}

    answered = asked()
    assert {*answered} == {*before, b} - {c}
    (ids,), (scores,) = retriever.similar([a], 50, kind="also_taken")  # Before the next look.
    assert filled(ids, scores) == pytest.approx({i: x for i, x in before.items() if i != c})
    retriever.catch_up()
    (ids,), (scores,) = retriever.similar([a], 50, kind="also_taken")
    assert filled(ids, scores) == pytest.approx(answered, abs=1e-6)


def test_a_server_counts_events_and_leaves_removed_items_out(writable: Running) -> None:
    a, b, c = [3 + 7 * row for row in (57, 58, 59)]

    def also_taken() -> list[Any]:
        inputs = {"item_id": [a], "exclude": [[]], "k": 60}
        outputs = writable.predict(signature_name="also_taken", inputs=inputs)["outputs"]
        return [*filled(outputs["candidate_ids"][0], np.array(outputs["scores"][0], np.float32))]

    before = also_taken()
    # The times are in the order of the clicks.
    for item in (a, b, c):
        body = {"events": [{"user_id": 999, "item_id": item, "type": "click"}]}
        assert send(writable, body).status_code == 200
    until(lambda: {*also_taken()} == {*before, b, c})
    path = "/v1/models/films/items"
    assert send(writable, {"item_ids": [c]}, path, "DELETE").status_code == 200
    assert {*also_taken()} == {*before, b} - {c}
