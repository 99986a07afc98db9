"""The server within this process: TensorFlow Serving's form, limits, hostile input."""

import asyncio
import gc
import os
import shutil
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from google.protobuf import json_format

from tests.exports.saved import ask_saved_model, saved_model
from tests.service.conftest import NUM_QUERIES, Served
from tests.service.running_server import GOOD, JSON, PREDICT, Running, in_json, retrieve_user
from tfrs_pipeline.answers.retriever import LoadedRetriever
from tfrs_pipeline.answers.signatures import DEFAULT_K, DEFAULT_SIGNATURE, numpy_type
from tfrs_pipeline.service.versions import ServedVersion


def check(answer: dict[str, Any], ids: np.ndarray, scores: np.ndarray) -> None:
    """Compares an answer with Python's."""
    assert answer["candidate_ids"] == ids.tolist()
    np.testing.assert_allclose(np.array(answer["scores"], np.float32), in_json(scores), rtol=1e-5)


def test_rows_and_columns(served: Served, running: Running, loaded: LoadedRetriever) -> None:
    users = served.query_ids.tolist()
    ids, scores, _ = loaded.retrieve_user(users, DEFAULT_K)
    columns = running.predict(inputs=users)["outputs"]
    check(columns, ids, scores)
    assert columns["is_known_user"] == [True] * NUM_QUERIES
    rows = running.predict(instances=users)["predictions"]
    assert rows == [{name: columns[name][i] for name in columns} for i in range(NUM_QUERIES)]
    assert running.predict(inputs=[])["outputs"] == {name: [] for name in columns}


def test_concurrent_requests(served: Served, running: Running, loaded: LoadedRetriever) -> None:
    rng = np.random.default_rng(0)
    users = rng.choice(served.query_ids, 60).tolist()
    exclude = [rng.choice(served.candidate_ids, i % 7).tolist() for i in range(60)]

    async def ask() -> list[httpx.Response]:
        documents = [retrieve_user([u], [e], 9) for u, e in zip(users, exclude, strict=True)]
        posts = [running.client.post(PREDICT, json=document) for document in documents]
        return await asyncio.gather(*posts)

    for user, ids, answer in zip(users, exclude, running.run(ask()), strict=True):
        found = answer.json()["outputs"]
        check(found, *loaded.retrieve_user([user], 9, [ids])[:2])
        assert not set(ids) & set(found["candidate_ids"][0])


def test_every_signature(served: Served, running: Running, loaded: LoadedRetriever) -> None:
    nobody = nothing = -1 if served.ids == "int" else ""
    items = served.candidate_ids.tolist()
    columns: dict[str, Any] = {
        "user_id": [served.query_ids.tolist()[4], nobody],
        "history": [items[3:6], [items[30], items[12], nothing]],
        "exclude": [[items[1]], [items[30]]],
        "k": 7,
        "gender": ["F", ""],
        "genres": [["a", "c"], ["b", ""]],
        "allowed": [["b", ""], ["a", "c"]],
        "item_id": [items[8], nothing],
    }
    signatures = saved_model(loaded.folder).signatures
    assert {"retrieve_with_features", "similar", "embed_query", "embed_candidate"} <= set(
        signatures
    )
    default = {DEFAULT_SIGNATURE: {"user_id": loaded.signatures["retrieve_user"]["user_id"]}}
    for name, specs in (loaded.signatures | default).items():
        inputs = {key: columns[key] for key in specs}
        if name.startswith(("similar", "also_taken")):  # An empty id is refused here.
            inputs["item_id"] = items[8:10]
        if name in signatures:
            expected = ask_saved_model(loaded.folder, name, inputs, 2)
        else:  # A SavedModel has no filter, and no item graph by itself.
            assert name.endswith("_filtered") or name == "also_taken"
            types = {key: numpy_type(spec.dtype) for key, spec in specs.items()}
            arrays = {key: np.array(inputs[key], types[key]) for key in specs}
            expected = loaded.engine.answer(name, arrays)
        answer = running.predict(signature_name=name, inputs=inputs)["outputs"]
        assert set(answer) == set(expected)
        for key, array in expected.items():
            if array.dtype == object:
                assert answer[key] == array.tolist()
            else:
                values = np.array(answer[key], np.float32)
                np.testing.assert_allclose(values, in_json(array), rtol=1e-5, atol=1e-6)


def test_lists_of_any_length_for_many_queries(served: Served, running: Running) -> None:
    """Users know from 0 to 10 items, and a large request is answered too."""
    users = served.query_ids.tolist()
    answer = running.predict(signature_name="embed_user", inputs={"user_id": users})["outputs"]
    for row, user in enumerate(users):
        alone = running.predict(signature_name="embed_user", inputs={"user_id": [user]})["outputs"]
        np.testing.assert_allclose(answer["embeddings"][row], alone["embeddings"][0], atol=1e-5)
        known = set(answer["known_items"][row]) - {-1, ""}
        assert known == set(served.known(row + 1)) == set(alone["known_items"][0]) - {-1, ""}


def kinds_of(signatures: Any) -> dict[tuple[str, str, str], tuple[int, int]]:
    """Returns type and rank of each input and output."""
    return {
        (name, side, key): (tensor.dtype, len(tensor.tensor_shape.dim))
        for name, signature in signatures.items()
        for side in ("inputs", "outputs")
        for key, tensor in getattr(signature, side).items()
    }


def test_tensorflow_servings_own_messages(served: Served, running: Running, folder: Path) -> None:
    from tensorflow.core.protobuf import saved_model_pb2
    from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, model_pb2

    answer = get_model_status_pb2.GetModelStatusResponse()
    status = json_format.ParseDict(running.get("/v1/models/films").json(), answer)
    (version,) = status.model_version_status
    assert (version.version, version.state) == (1, version.AVAILABLE)
    of_version = running.get("/v1/models/films/versions/1").json()
    assert of_version == running.get("/v1/models/films").json()
    metadata = running.get("/v1/models/films/versions/1/metadata").json()
    spec = json_format.ParseDict(metadata["model_spec"], model_pb2.ModelSpec())
    assert (spec.name, spec.version.value) == ("films", 1)
    defined, known = metadata["metadata"]["signature_def"], get_model_metadata_pb2.SignatureDefMap()
    signatures = json_format.ParseDict(defined, known).signature_def
    saved = saved_model_pb2.SavedModel()
    also_taken, similar = signatures.pop("also_taken"), signatures["similar"]
    assert kinds_of({"": also_taken}) == kinds_of({"": similar})
    # A stock server takes the same requests but these and those with a filter, and so does one with
    # ScaNN.
    filtered = {name: signatures.pop(name) for name in list(signatures) if "filtered" in name}
    assert {len(signature.inputs) for signature in filtered.values()} == {4, 5, 6}
    assert {signature.inputs["allowed"].dtype for signature in filtered.values()} == {7}  # Text.
    for source in (folder / "1", folder / "1" / "scann" / "1"):
        if source.exists():
            saved.ParseFromString((source / "saved_model.pb").read_bytes())
            assert kinds_of(signatures) == kinds_of(saved.meta_graphs[0].signature_def)
    expected = saved.meta_graphs[0].signature_def
    assert {"serving_default", "retrieve_with_features", "embed_candidate"} <= set(signatures)
    assert kinds_of(signatures) == kinds_of(expected)


def test_an_internal_error_reveals_nothing(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("secret path")

    labels = {"handler": "predict", "code": "500"}
    before = small.metric("tfrs_request_seconds_count", **labels)
    monkeypatch.setattr(ServedVersion, "call", fail)
    response = small.post(PREDICT, json=GOOD)
    assert (response.status_code, "secret" in response.text) == (500, False)
    assert small.metric("tfrs_request_seconds_count", **labels) == before + 1


def test_health_readiness_and_metrics(small: Running) -> None:
    names: dict[str, dict[str, str]] = {
        "tfrs_request_seconds_count": {"handler": "predict", "code": "200"},
        "tfrs_request_seconds_bucket": {"handler": "predict", "code": "400", "le": "+Inf"},
        "tfrs_model_call_queries_sum": {},
        "tfrs_model_call_seconds_count": {},
    }
    before = [small.metric(name, **labels) for name, labels in names.items()]
    for _ in range(3):
        small.predict(instances=[101, 102])
    small.post(PREDICT, content="{", headers=JSON)
    after = [small.metric(name, **labels) for name, labels in names.items()]
    assert np.subtract(after, before).tolist() == [3, 1, 6, 3]
    assert small.metric("tfrs_model_version", model="films") == 1
    assert small.metric("tfrs_model_loads_total", outcome="ok") >= 1
    small.get("/" + "x" * 50)
    assert "xxx" not in small.get("/metrics").text
    assert small.get("/healthz").text == "ok\n"
    assert small.get("/readyz").text == "ok: films version 1\n"


@pytest.mark.parametrize(
    "path", ["/healthz", "/metrics", "/", "/page/model", "/v1/models/films", "/x"]
)
def test_browsers_take_answers_for_what_their_type_says(running: Running, path: str) -> None:
    assert running.get(path).headers.get_list("x-content-type-options") == ["nosniff"]
    answer = running.post(PREDICT, json={"signature_name": "no such"})
    assert (answer.status_code, answer.headers["x-content-type-options"]) == (400, "nosniff")


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/"])
def test_head_answers_like_get_without_a_body(running: Running, path: str) -> None:
    head = running.run(running.client.head(path))
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == running.get(path).headers["content-type"]


def put(source: Path, folder: Path, number: int) -> None:
    partial = folder / f".partial-{number}"
    shutil.copytree(source, partial)
    os.rename(partial, folder / str(number))


def test_versions_come_and_go_without_failures(int_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "films"
    put(int_folder / "1", folder, 1)
    with Running(folder) as running:

        async def ask(end: asyncio.Event) -> list[int]:
            codes = []
            while not end.is_set():
                codes.append((await running.client.post(PREDICT, json=GOOD)).status_code)
                await asyncio.sleep(0)  # As a client would wait for its socket.
            return codes

        async def until(**expected: str) -> None:
            while True:
                answer = (await running.client.get("/v1/models/films")).json()
                states = {f"v{s['version']}": s["state"] for s in answer["model_version_status"]}
                if states == expected:
                    return
                await asyncio.sleep(0.02)

        async def swap(change: Callable[[], Any], **expected: str) -> list[int]:
            end = asyncio.Event()
            clients = [asyncio.create_task(ask(end)) for _ in range(4)]
            await asyncio.to_thread(change)
            await asyncio.wait_for(until(**expected), 50)
            end.set()
            return [code for codes in await asyncio.gather(*clients) for code in codes]

        assert running.get("/page/items?search=film").status_code == 200  # Reads its titles.
        with running.server.versions.use("1") as version:
            first = weakref.ref(version)
        del version
        codes = running.run(swap(lambda: put(int_folder / "1", folder, 2), v2="AVAILABLE"))
        assert set(codes) == {200}
        gc.collect()
        assert first() is None
        assert running.metric("tfrs_model_version", model="films") == 2
        path = "/v1/models/films/versions/{}:predict"
        assert running.post(path.format(2), json=GOOD).status_code == 200
        assert running.post(path.format(1), json=GOOD).status_code == 404
        # Without the newest folder, the version before comes back.
        codes = running.run(swap(lambda: shutil.rmtree(folder / "2"), v1="AVAILABLE"))
        assert set(codes) == {200}
        assert running.metric("tfrs_model_version", model="films") == 1
        assert running.post(path.format(1), json=GOOD).status_code == 200


def test_pages_of_named_origins_may_ask(int_folder: Path) -> None:
    shop, other = "https://shop.example", "https://other.example"
    asks = {"Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "content-type"
    with Running(int_folder, allowed_origins=(shop,)) as running:
        asked = partial(running.client.options, PREDICT)
        answered = running.run(asked(headers={"Origin": shop, **asks}))
        assert answered.headers["access-control-allow-origin"] == shop
        response = running.post(PREDICT, json=GOOD, headers={"Origin": shop})
        assert response.headers["access-control-allow-origin"] == shop
        refused = running.run(asked(headers={"Origin": other, **asks}))
        assert "access-control-allow-origin" not in refused.headers
        # A page may not send the token, so it cannot write.
        asks["Access-Control-Request-Headers"] = "authorization"
        assert running.run(asked(headers={"Origin": shop, **asks})).status_code == 400
    with Running(int_folder) as running:
        response = running.post(PREDICT, json=GOOD, headers={"Origin": shop})
        assert response.status_code == 200
        assert "access-control-allow-origin" not in response.headers
