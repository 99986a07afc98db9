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
from tests.service.conftest import NUM_CANDIDATES, Served
from tests.service.running_server import PREDICT, Running, in_json
from tfrs_pipeline import LoadedRetriever, Log, TrainingSettings, TwoTower, export, load
from tfrs_pipeline.run.refresh import refresh_index
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
