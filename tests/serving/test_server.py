"""The server within this process: TensorFlow Serving's form, limits, hostile input, the page."""

import asyncio
import contextlib
import gc
import json
import os
import shutil
import threading
import time
import weakref
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import json_format
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.conftest import KIND_OF, NUM_CANDIDATES, NUM_QUERIES, Exported, Served
from tfrs_pipeline.serving.retriever import LoadedRetriever, load
from tfrs_pipeline.serving.saved_model import DEFAULT_K
from tfrs_pipeline.serving.server import ModelServer, create_app
from tfrs_pipeline.serving.settings import ServeSettings
from tfrs_pipeline.serving.versions import ServedVersion

PREDICT = "/v1/models/films:predict"


class Running:
    """A started server, its loop in a thread; requests go straight to the application."""

    def __init__(self, model: Path, **settings: Any) -> None:
        self.server = ModelServer(model, ServeSettings(poll_seconds=0.05, **settings))
        self.server.versions.load_first()
        self.app = create_app(self.server)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "Running":
        self._thread.start()
        self._stack = contextlib.AsyncExitStack()
        self.run(self._open())
        return self

    async def _open(self) -> None:
        await self._stack.enter_async_context(self.app.router.lifespan_context(self.app))
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        client = httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30)
        self.client = await self._stack.enter_async_context(client)

    def __exit__(self, *error: object) -> None:
        self.run(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def get(self, path: str) -> httpx.Response:
        return self.run(self.client.get(path))

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.run(self.client.post(path, **options))

    def predict(self, **document: Any) -> Any:
        response = self.post(PREDICT, json=document)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "application/json"
        return response.json()

    def metric(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(self.get("/metrics").text)
        samples = [s for family in families for s in family.samples if s.name == name]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())


@pytest.fixture(scope="module")
def kind(served: Served) -> str:
    return KIND_OF[served.ids]


@pytest.fixture(scope="module")
def folder(served: Served, kind: str, exported: Exported) -> Path:
    return exported(served.ids, kind)


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    with Running(folder) as running:
        yield running


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedRetriever:
    return load(folder)


@pytest.fixture(scope="module")
def int_folder(exported: Exported) -> Path:
    """Of a model with integer ids and an exact index, for what has nothing to do with either."""
    return exported("int", "exact")


@pytest.fixture(scope="module")
def small(int_folder: Path) -> Iterator[Running]:
    limits = {"max_k": 100, "max_queries": 10, "max_exclude": 50, "max_history": 40}
    limits |= {"max_results": 800, "max_body_bytes": 1_000_000}
    with Running(int_folder, **limits, body_timeout_seconds=0.5) as running:
        yield running


def retrieve_user(users: list[Any], exclude: list[list[Any]], k: Any) -> dict[str, Any]:
    inputs = {"user_id": users, "exclude": exclude, "k": k}
    return {"signature_name": "retrieve_user", "inputs": inputs}


def check(answer: dict[str, Any], ids: np.ndarray, scores: np.ndarray) -> None:
    """Compares an answer with one from Python."""
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


def test_many_at_once_get_each_its_own(
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


GOOD = retrieve_user([101], [[]], 5)
TEXT = json.dumps(GOOD)
JSON = {"content-type": "application/json"}


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
    """A page of a name that resolves to this machine must not reach the server through it."""
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


# Contents that are refused with 400; what is no text is JSON.
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
    "longer than what is read away": (413, {"content": b" " * 33_000_000}),
}


@pytest.mark.parametrize("path", [PREDICT, "/page/query"])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_input_is_answered_and_not_felt(small: Running, case: str, path: str) -> None:
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
    documents = {
        "inputs.k: Input should be less than or equal to 100. Received: 101": retrieve_user(
            [1], [[]], 101
        ),
        "List should have at most 10 items": retrieve_user([1] * 11, [[]] * 11, 1),
        "800 results, its queries times k (--max-results). Received: 9 x 89": retrieve_user(
            [1] * 9, [[]] * 9, 89
        ),
        "inputs.exclude.0: List should have at most 50 items": retrieve_user([1], [[3] * 51], 1),
    }
    for message, document in documents.items():
        assert message in small.post(PREDICT, json=document).json()["error"]
    edge = retrieve_user([101] * 8, [list(range(50))] * 8, 100)
    assert len(small.predict(**edge)["outputs"]["scores"]) == 8
    padded = TEXT + " " * (1_000_000 - len(TEXT))
    typed = {"content-type": "Application/JSON; charset=utf-8"}
    assert small.post(PREDICT, content=padded, headers=typed).status_code == 200


def test_a_slow_body_is_timed_out_and_not_felt(small: Running) -> None:
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


def test_a_slow_call_is_not_felt(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_slices_of_large_requests_take_turns_and_small_ones_go_past(
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
    # Nine requests of two slices each: no second one before each has had its first.
    assert sorted(large[:9]) == sorted((98, 99, 100) * 3)
    assert len(large) == 18


def test_an_inner_error_says_nothing_of_the_inside(
    small: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_head_tells_what_get_would(running: Running, path: str) -> None:
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

        # A broken one: its status says so, and the one before it goes on.
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


def test_the_page_is_one_file_that_asks_nobody_else(running: Running) -> None:
    response = running.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    for outside in ("http://", "https://", "//cdn", "src=", "@import", "innerHTML"):
        assert outside not in response.text


def test_the_page_shows_the_card_of_the_model(
    served: Served, running: Running, loaded: LoadedRetriever, kind: str
) -> None:
    card = running.get("/page/model").json()
    assert (card["name"], card["version"], card["num_candidates"]) == ("films", 1, NUM_CANDIDATES)
    assert card["example_user"] == served.query_ids.tolist()[3]
    assert card["can_compare"] == (kind == "scann")
    assert card["filter"] == {"name": "genres", "values": ["a", "b", "c"]}
    assert card["inputs"] == [{"name": "gender", "kind": "categorical", "values": ["F", "M"]}]
    titles = loaded.titles()
    assert all(item["title"] == titles[item["item_id"]] for item in card["example_items"])
    # The page asks for the first of both as it opens.
    for first in (
        {"user_id": str(card["example_user"])},
        {"items": [x["item_id"] for x in card["example_items"]]},
    ):
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
    # Nothing is found across the border of two titles.
    assert find(f"{ids[7]} the 8th") == []


def test_the_page_retrieves_for_a_user_and_for_items(
    served: Served, running: Running, loaded: LoadedRetriever, kind: str
) -> None:
    user = served.query_ids.tolist()[2]
    answer = running.post("/page/query", json={"user_id": str(user), "k": 6}).json()
    ids, scores, _ = loaded.retrieve_user([user], 6)
    items = answer["index"]["items"]
    assert [item["item_id"] for item in items] == ids[0].tolist()
    np.testing.assert_allclose([item["score"] for item in items], scores[0], rtol=1e-4)
    titles = loaded.titles()
    assert [item["title"] for item in items] == [titles[id_] for id_ in ids[0].tolist()]
    assert answer["index"]["is_known_user"]
    assert answer["index"]["latency_ms"] > 0
    if kind == "scann":
        assert answer["num_common"] == 6
        assert [i["item_id"] for i in answer["exact"]["items"]] == ids[0].tolist()
    else:
        assert answer["exact"] is None
    history = served.candidate_ids[[4, 9]].tolist()
    everything = running.post("/page/query", json={"items": history, "k": 100}).json()
    found = {item["item_id"] for item in everything["index"]["items"]}
    assert found == set(served.candidate_ids.tolist()) - set(history)
    assert "history" not in everything


def test_the_page_shows_a_history_latest_first(
    served: Served, running: Running, loaded: LoadedRetriever
) -> None:
    titles = loaded.titles()
    for row in (1, 2, 3):
        known = served.known(row)
        user = served.query_ids.tolist()[row - 1]
        answer = running.post("/page/query", json={"user_id": str(user), "k": 1}).json()
        assert answer["history"]["length"] == len(known)
        items = answer["history"]["items"]
        assert [item["item_id"] for item in items] == known[::-1][:10]
        assert all(item["title"] == titles[item["item_id"]] for item in items)


@pytest.mark.parametrize("of", ["user", "items", "features"])
@pytest.mark.parametrize("has_filter", [False, True])
def test_the_request_that_the_page_shows_is_what_it_asked(
    served: Served, running: Running, of: str, has_filter: bool
) -> None:
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
    np.testing.assert_allclose(
        [item["score"] for item in shown], np.array(found["scores"][0])[is_found], rtol=1e-4
    )
    assert [x["item_id"] for x in shown] == np.array(found["candidate_ids"][0])[is_found].tolist()
    ids = served.candidate_ids.tolist()
    genres = [served.genres[ids.index(item["item_id"])] for item in shown]
    assert shown
    assert not has_filter or all("b" in of_item for of_item in genres)
    # And it is what the same question has as its answer in Python.
    query: dict[str, Any] = {"history": history}
    query |= {"features": {"gender": "F"}} if of == "features" else {}
    with running.server.versions.use() as version:
        allowed = [["b"]] if has_filter else None
        if of == "user":
            user = version.retriever.parse_user_id(asked["user_id"])
            ids, *_ = version.retriever.retrieve_user([user], 7, allowed=allowed)
        else:
            ids, _ = version.retriever.retrieve([query], 7, [history], allowed=allowed)
    assert [x["item_id"] for x in shown] == ids[0][: len(shown)].tolist()


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
def test_the_page_refuses_what_is_no_query(small: Running, query: dict[str, Any]) -> None:
    response = small.post("/page/query", content=json.dumps(query), headers=JSON)
    assert response.status_code == 400
    assert set(response.json()) == {"error"}


def test_a_released_version_leaves_nothing_behind(folder: Path, kind: str) -> None:
    version = ServedVersion(folder / "1", ServeSettings())
    assert (version.exact is version.retriever) == (kind == "exact")
    tables, indexes = version.handles()
    # Of users and items, two vocabularies, the index's items and the filter, in each model.
    assert len(tables) == 6 * (1 + (kind == "scann"))
    assert len(indexes) == (kind == "scann")
    assert min(int(tf.raw_ops.LookupTableSizeV2(table_handle=x)) for x in tables) > 0
    version.release()
    for handle in (*tables, *indexes):
        with pytest.raises(tf.errors.NotFoundError):
            tf.raw_ops.DestroyResourceOp(resource=handle, ignore_lookup_error=False)


def test_the_page_needs_no_folder_once_it_is_loaded(int_folder: Path, tmp_path: Path) -> None:
    put(int_folder / "1", tmp_path / "films", 1)
    with Running(tmp_path / "films") as running:
        shutil.rmtree(tmp_path / "films" / "1")
        assert running.get("/page/model").json()["num_candidates"] == NUM_CANDIDATES
        assert running.get("/page/items?search=7th").json()["items"]
        assert running.post("/page/query", json={"user_id": "101"}).status_code == 200


def test_without_the_page_no_fallback_is_loaded(exported: Exported) -> None:
    with Running(exported("int", "scann"), page=False) as running:
        with running.server.versions.use() as version:
            assert version.exact is None
        for path in ("/", "/page/model"):
            assert running.get(path).status_code == 404
