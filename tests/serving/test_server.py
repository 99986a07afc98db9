"""The server within this process: TensorFlow Serving's form, limits, hostile input."""

import asyncio
import gc
import json
import os
import shutil
import threading
import time
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import json_format

from tests.serving.conftest import NUM_QUERIES, Served
from tests.serving.running_server import GOOD, JSON, PREDICT, TEXT, Running, retrieve_user
from tfrs_pipeline.serving.retriever import LoadedRetriever
from tfrs_pipeline.serving.saved_model import DEFAULT_K
from tfrs_pipeline.serving.settings import ServeSettings
from tfrs_pipeline.serving.versions import ServedVersion


def check(answer: dict[str, Any], ids: np.ndarray, scores: np.ndarray) -> None:
    """Compares an answer with Python's."""
    assert answer["candidate_ids"] == ids.tolist()
    np.testing.assert_allclose(np.array(answer["scores"], np.float32), scores, rtol=1e-5)


def test_users_by_rows_and_columns_get_what_python_gets(
    served: Served, running: Running, loaded: LoadedRetriever
) -> None:
    users = served.query_ids.tolist()
    ids, scores, _ = loaded.retrieve_user(users, DEFAULT_K)
    columns = running.predict(inputs=users)["outputs"]
    check(columns, ids, scores)
    assert columns["is_known_user"] == [True] * NUM_QUERIES
    rows = running.predict(instances=users)["predictions"]
    assert rows == [{name: columns[name][i] for name in columns} for i in range(NUM_QUERIES)]
    assert running.predict(inputs=[])["outputs"] == {name: [] for name in columns}


def test_concurrent_requests_each_get_their_own_answer(
    served: Served, running: Running, loaded: LoadedRetriever
) -> None:
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


def test_every_signature_answers_as_tensorflow_does(
    served: Served, running: Running, loaded: LoadedRetriever
) -> None:
    nobody, nothing = (
        -1 if ids.dtype == np.int64 else "" for ids in (served.query_ids, served.candidate_ids)
    )
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
    signatures = loaded.saved_model.signatures
    assert {"retrieve_with_features_filtered", "embed_query", "embed_candidate"} <= set(signatures)
    for name, function in signatures.items():
        specs = function.structured_input_signature[1]
        inputs = {key: columns[key] for key in specs}
        expected = function(
            **{key: tf.constant(inputs[key], spec.dtype) for key, spec in specs.items()}
        )
        answer = running.predict(signature_name=name, inputs=inputs)["outputs"]
        assert set(answer) == set(expected)
        for key, tensor in expected.items():
            if tensor.dtype == tf.string:
                assert np.char.encode(answer[key], "utf-8").tolist() == tensor.numpy().tolist()
            else:
                np.testing.assert_allclose(answer[key], tensor, rtol=1e-5, atol=1e-6)


def test_state_and_metadata_are_tensorflow_servings_own_messages(
    served: Served, running: Running, folder: Path
) -> None:
    from tensorflow.core.protobuf import saved_model_pb2
    from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, model_pb2

    status = json_format.ParseDict(
        running.get("/v1/models/films").json(), get_model_status_pb2.GetModelStatusResponse()
    )
    (version,) = status.model_version_status
    assert (version.version, version.state) == (1, version.AVAILABLE)
    assert (
        running.get("/v1/models/films/versions/1").json() == running.get("/v1/models/films").json()
    )
    metadata = running.get("/v1/models/films/versions/1/metadata").json()
    spec = json_format.ParseDict(metadata["model_spec"], model_pb2.ModelSpec())
    assert (spec.name, spec.version.value) == ("films", 1)
    signatures = json_format.ParseDict(
        metadata["metadata"]["signature_def"], get_model_metadata_pb2.SignatureDefMap()
    ).signature_def
    saved = saved_model_pb2.SavedModel()
    # The fallback has the same signatures: a stock server takes the same requests.
    fallback = folder / "1" / "exact" / "1"
    source = fallback if fallback.exists() else folder / "1"
    saved.ParseFromString((source / "saved_model.pb").read_bytes())
    expected = saved.meta_graphs[0].signature_def
    assert {"serving_default", "retrieve_with_features", "embed_candidate"} <= set(signatures)
    assert set(signatures) == set(expected)
    for name in signatures:
        for side in ("inputs", "outputs"):
            mine, theirs = getattr(signatures[name], side), getattr(expected[name], side)
            assert set(mine) == set(theirs)
            for key in mine:
                assert mine[key].dtype == theirs[key].dtype
                assert len(mine[key].tensor_shape.dim) == len(theirs[key].tensor_shape.dim)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/other/metadata", 404),
        ("POST", "/v1/models/other:predict", 404),
        ("POST", "/v1/models/films/versions/2:predict", 404),
        ("POST", "/v1/models/films/versions/x:predict", 404),
        ("POST", f"/v1/models/films/versions/{'9' * 5000}:predict", 404),
        ("GET", "/v1/models/films/versions/2", 404),
        ("GET", "/v1/models/films/versions/%D9%A1/metadata", 404),
        ("GET", PREDICT, 405),
        ("GET", "/v1/models/films/versions/1:predict", 405),
        ("PUT", PREDICT, 405),
        ("OPTIONS", PREDICT, 405),
        ("DELETE", "/v1/models/films", 405),
        ("POST", "/v1/models/films:classify", 405),
        ("GET", "/page/query", 405),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/../etc/passwd", 404),
    ],
)
def test_wrong_addresses_and_methods(small: Running, method: str, path: str, status: int) -> None:
    response = small.run(small.client.request(method, path, content=TEXT, headers=JSON))
    assert response.status_code == status
    assert set(response.json()) == {"error"}
    assert len(response.text) < 1000
    if path.endswith(":predict") and status == 405:
        assert response.headers["allow"] == "POST"


def test_another_host_is_refused(small: Running) -> None:
    """A web page whose name resolves to this machine must not reach the server."""
    for host, status in {
        "localhost:8501": 200,
        "LOCALHOST": 200,
        "127.0.0.1": 200,
        "[::1": 400,
        "evil.example": 400,
        "localhost.evil.example": 400,
        "": 400,
    }.items():
        response = small.post(PREDICT, json=GOOD, headers={"host": host})
        assert response.status_code == status, host
        assert status == 200 or "among --allowed-hosts" in response.json()["error"]


# Contents that get a 400; all but text and bytes are written as JSON.
BAD: dict[str, Any] = {
    "not JSON": "{",
    "an unterminated string in lists": b"[" * 20 + b'"\\' * 490_000,
    "deep lists": "[" * 1_000_000,
    "deep objects": '{"inputs":' * 100_000,
    "deep and closed": '{"inputs":' + "[" * 190 + "]" * 190 + "}",
    "thousands of digits": '{"inputs": [%s]}' % ("9" * 9_000),
    "many unknown keys": {str(i): 0 for i in range(60_000)},
    "many unknown inputs": {"inputs": {str(i): 0 for i in range(60_000)}},
    "many wrong values": {"inputs": [[]] * 200_000, "items": [[]] * 20_000},
    "many wrong rows": {"instances": ["x"] * 150_000},
    "unknown signature": {**GOOD, "signature_name": "__saved_model_init_op"},
    "binary": bytes(range(256)),
}
HOSTILE: dict[str, tuple[int, dict[str, Any]]] = {
    name: (400, {"content": x if isinstance(x, str | bytes) else json.dumps(x)})
    for name, x in BAD.items()
} | {
    "a form": (415, {"content": TEXT, "headers": {"content-type": "text/plain"}}),
    "an encoded form": (415, {"data": {"inputs": "[1]"}, "headers": {}}),
    "a file": (415, {"files": {"file": b"x"}, "headers": {}}),
    "no type": (415, {"content": TEXT, "headers": {}}),
    "compressed": (415, {"content": b"\x1f\x8b", "headers": {**JSON, "content-encoding": "gzip"}}),
    "long": (413, {"content": b" " * 1_000_001}),
    "longer than what is discarded": (413, {"content": b" " * 33_000_000}),
}


@pytest.mark.parametrize("path", [PREDICT, "/page/query"])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_input_is_refused_and_holds_up_nobody(small: Running, case: str, path: str) -> None:
    status, options = HOSTILE[case]

    async def ask() -> tuple[httpx.Response, httpx.Response]:
        bad = asyncio.create_task(small.client.post(path, **{"headers": JSON, **options}))
        while not bad.done():
            assert (await small.client.get("/healthz")).status_code == 200
            await asyncio.sleep(0.001)
        return await bad, await small.client.post(PREDICT, json=GOOD)

    bad, good = small.run(ask())
    assert bad.status_code == status, bad.text
    assert set(bad.json()) == {"error"}
    assert len(bad.text) < 1000
    assert len(good.json()["outputs"]["candidate_ids"][0]) == 5


def test_what_is_refused_is_explained(small: Running) -> None:
    for num_users, num_excluded, k, message in (
        (1, 0, 101, "inputs.k: Input should be less than or equal to 100. Received: 101"),
        (11, 0, 1, "List should have at most 10 items"),
        (9, 0, 89, "(--max-results). Received: 9 x 89"),
        (1, 51, 1, "inputs.exclude.0: List should have at most 50 items"),
    ):
        document = retrieve_user([1] * num_users, [[3] * num_excluded] * num_users, k)
        assert message in small.post(PREDICT, json=document).json()["error"]
    edge = retrieve_user([101] * 8, [list(range(50))] * 8, 100)
    assert len(small.predict(**edge)["outputs"]["scores"]) == 8
    padded = TEXT + " " * (1_000_000 - len(TEXT))
    typed = {"content-type": "Application/JSON; charset=utf-8"}
    assert small.post(PREDICT, content=padded, headers=typed).status_code == 200


def test_slow_bodies_time_out_and_hold_up_nobody(small: Running) -> None:
    async def drip() -> AsyncIterator[bytes]:
        yield TEXT[:10].encode()
        await asyncio.sleep(20)
        yield TEXT[10:].encode()

    async def ask() -> None:
        start = time.monotonic()
        posts = [small.client.post(PREDICT, content=drip(), headers=JSON) for _ in range(20)]
        slow = [asyncio.create_task(post) for post in posts]
        await asyncio.sleep(0.05)
        assert (await small.client.post(PREDICT, json=GOOD)).status_code == 200
        assert not any(task.done() for task in slow)
        for response in await asyncio.gather(*slow):
            assert response.status_code == 408
            assert response.headers["connection"] == "close"
            assert "within 0.5 s" in response.json()["error"]
        assert time.monotonic() - start < 15

    small.run(ask())


def test_a_slow_call_holds_up_nobody(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = threading.Event(), ServedVersion.call
    called: list[None] = []

    def slow(*arguments: Any) -> Any:
        called.append(None)
        assert len(called) > 1 or gate.wait(20)
        return real(*arguments)

    monkeypatch.setattr(ServedVersion, "call", slow)

    async def ask() -> None:
        first = asyncio.create_task(small.client.post(PREDICT, json=GOOD))
        while not called:
            await asyncio.sleep(0.01)
        assert (await small.client.post(PREDICT, json=GOOD)).status_code == 200
        assert (await small.client.get("/healthz")).status_code == 200
        assert not first.done()
        gate.set()
        assert (await first).status_code == 200

    small.run(ask())


def test_slices_of_large_requests_take_turns_and_small_ones_overtake(
    small: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = [100, 101, 102, 103, 104, 105]
    alone = small.predict(**retrieve_user(users, [[]] * 6, 20))["outputs"]
    for i, user in enumerate(users):
        one = small.predict(**retrieve_user([user], [[]], 20))["outputs"]
        assert one["candidate_ids"] == alone["candidate_ids"][i : i + 1]
        np.testing.assert_allclose(one["scores"], alone["scores"][i : i + 1], rtol=1e-5)
    gate, real, asked = threading.Event(), ServedVersion.call, []

    def watched(version: ServedVersion, signature: str, inputs: Any) -> Any:
        asked.append(int(inputs["k"]))
        assert inputs["k"] == 5 or gate.wait(20)
        return real(version, signature, inputs)

    monkeypatch.setattr(ServedVersion, "call", watched)

    async def ask() -> None:
        large = [
            asyncio.create_task(small.client.post(PREDICT, json=retrieve_user(users, [[]] * 6, k)))
            for k in (98, 99, 100) * 3
        ]
        while not asked:
            await asyncio.sleep(0.01)
        for _ in range(3):
            assert (await small.client.post(PREDICT, json=GOOD)).status_code == 200
        assert not any(task.done() for task in large)
        gate.set()
        assert {(await task).status_code for task in large} == {200}

    small.run(ask())
    large = [k for k in asked if k != 5]
    # Nine requests of two slices each: all first slices come before any second one.
    assert sorted(large[:9]) == sorted((98, 99, 100) * 3)
    assert len(large) == 18


def test_an_internal_error_reveals_nothing(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("secret path")

    before = small.metric("tfrs_request_seconds_count", handler="predict", code="500")
    monkeypatch.setattr(ServedVersion, "call", fail)
    response = small.post(PREDICT, json=GOOD)
    assert response.status_code == 500
    assert "secret" not in response.text
    after = small.metric("tfrs_request_seconds_count", handler="predict", code="500")
    assert after == before + 1


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


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/"])
def test_head_answers_like_get_without_a_body(running: Running, path: str) -> None:
    head = running.run(running.client.head(path))
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == running.get(path).headers["content-type"]


def put(source: Path, folder: Path, number: int) -> None:
    partial = folder / f".partial-{number}"
    shutil.copytree(source, partial)
    os.rename(partial, folder / str(number))


def test_new_versions_are_taken_up_without_a_failed_request(
    int_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "films"
    put(int_folder / "1", folder, 1)
    with Running(folder) as running:

        async def ask(end: asyncio.Event) -> list[int]:
            codes = []
            while not end.is_set():
                codes.append((await running.client.post(PREDICT, json=GOOD)).status_code)
            return codes

        async def until(**expected: str) -> None:
            while True:
                answer = (await running.client.get("/v1/models/films")).json()
                states = {f"v{s['version']}": s["state"] for s in answer["model_version_status"]}
                if states == expected:
                    return
                await asyncio.sleep(0.02)

        async def swap() -> list[int]:
            end = asyncio.Event()
            clients = [asyncio.create_task(ask(end)) for _ in range(4)]
            await asyncio.to_thread(put, int_folder / "1", folder, 2)
            await asyncio.wait_for(until(v2="AVAILABLE"), 50)
            end.set()
            return [code for codes in await asyncio.gather(*clients) for code in codes]

        assert running.get("/page/items?search=film").status_code == 200  # Reads its titles.
        with running.server.versions.use("1") as version:
            first = weakref.ref(version)
        del version
        codes = running.run(swap())
        assert set(codes) == {200}
        gc.collect()
        assert first() is None
        assert running.metric("tfrs_model_version", model="films") == 2
        path = "/v1/models/films/versions/{}:predict"
        assert running.post(path.format(2), json=GOOD).status_code == 200
        assert running.post(path.format(1), json=GOOD).status_code == 404

        # A broken version: its status says so, and the one before stays in use.
        num_failed = running.metric("tfrs_model_loads_total", outcome="failed")
        put(int_folder / "1", tmp_path / "films-broken", 3)
        (tmp_path / "films-broken" / "3" / "saved_model.pb").write_bytes(b"not a model")
        os.rename(tmp_path / "films-broken" / "3", folder / "3")
        running.run(asyncio.wait_for(until(v3="END", v2="AVAILABLE"), 50))
        statuses = running.get("/v1/models/films/versions/3").json()["model_version_status"]
        assert statuses[0]["status"]["error_code"] == "UNKNOWN"
        assert "Version 3 cannot be loaded" in statuses[0]["status"]["error_message"]
        assert running.metric("tfrs_model_loads_total", outcome="failed") == num_failed + 1
        assert running.metric("tfrs_model_version", model="films") == 2
        assert running.get("/readyz").text == "ok: films version 2\n"
        running.predict(**GOOD)


def test_a_released_version_leaves_nothing_behind(folder: Path, kind: str) -> None:
    version = ServedVersion(folder / "1", ServeSettings())
    assert (version.exact is version.retriever) == (kind == "exact")
    tables, indexes = version.handles()
    # Each model has tables of users and items, of two vocabularies, of the index's items and of
    # the filter.
    assert len(tables) == 6 * (1 + (kind == "scann"))
    assert len(indexes) == (kind == "scann")
    assert min(int(tf.raw_ops.LookupTableSizeV2(table_handle=x)) for x in tables) > 0
    version.release()
    for handle in (*tables, *indexes):
        with pytest.raises(tf.errors.NotFoundError):
            tf.raw_ops.DestroyResourceOp(resource=handle, ignore_lookup_error=False)
