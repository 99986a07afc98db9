"""What the server refuses, and that large, slow and hostile requests hold up nobody."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from tests.service.running_server import (
    GOOD,
    JSON,
    PREDICT,
    TEXT,
    Running,
    off_the_event_loop,
    retrieve_user,
)
from tfrs_pipeline.service.server import _http_error
from tfrs_pipeline.service.versions import ServedVersion

VERSIONS = "/v1/models/films/versions"


@pytest.mark.parametrize(
    ("method", "status", "paths"),
    [
        ("GET", 404, "/v1/models/other /v1/models/other/metadata /docs /openapi.json"),
        ("GET", 404, f"{VERSIONS}/2 {VERSIONS}/%D9%A1/metadata /../etc/passwd"),
        ("POST", 404, f"/v1/models/other:predict {VERSIONS}/2:predict {VERSIONS}/x:predict"),
        ("POST", 404, f"{VERSIONS}/{'9' * 5000}:predict"),
        ("GET", 405, f"{PREDICT} {VERSIONS}/1:predict /page/query"),
        *((method, 405, PREDICT) for method in ("PUT", "OPTIONS")),
        ("DELETE", 405, "/v1/models/films"),
        ("POST", 405, "/v1/models/films:classify"),
    ],
)
def test_wrong_addresses_and_methods(small: Running, method: str, status: int, paths: str) -> None:
    for path in paths.split():
        check_refused(small, method, path, status)


def check_refused(small: Running, method: str, path: str, status: int) -> None:
    response = small.run(small.client.request(method, path, content=TEXT, headers=JSON))
    assert response.status_code == status
    assert set(response.json()) == {"error"}
    assert len(response.text) < 1000
    if path.endswith(":predict") and status == 405:
        assert response.headers["allow"] == "POST"


def test_another_host_is_refused(small: Running) -> None:
    """A web page whose name resolves to this machine must not reach the server."""
    good = ["localhost:8501", "LOCALHOST", "127.0.0.1"]
    bad = ["[::1", "evil.example", "localhost.evil.example", ""]
    statuses = dict.fromkeys(good, 200) | dict.fromkeys(bad, 400)
    for host, status in statuses.items():
        response = small.post(PREDICT, json=GOOD, headers={"host": host})
        assert response.status_code == status, host
        assert status == 200 or response.text == "Invalid host header"


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
    "far too long": (413, {"content": b" " * 33_000_000}),
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


def test_what_an_error_quotes_is_cut(small: Running) -> None:
    long = "x" * 100_000
    wrong: list[tuple[str, Any]] = [
        ("/page/query", {"user_id": 101, "features": {long: 5}}),
        ("/page/query", {"user_id": long}),
        ("/page/query", {"features": {long: "5"}}),
        ("/page/query", {"items": [3], "request": {"timestamp": long}}),
        (PREDICT, {**GOOD, long: 1}),
    ]
    for path, document in wrong:
        response = small.post(path, json=document)
        assert (response.status_code, len(response.text) < 1000) == (400, True), response.text[:999]
    # What to do often stands at the end.
    error = HTTPException(400, f"Item {long} is wrong. Send another one.")
    answer = json.loads(bytes(small.run(_http_error(Request({"type": "http"}), error)).body))
    assert answer["error"].startswith("Item xxx")
    assert answer["error"].endswith("xxx is wrong. Send another one.")
    assert len(answer["error"]) < 1000


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
            assert "within 1.5 s" in response.json()["error"]
        assert time.monotonic() - start < 15

    small.run(ask())


def test_slow_calls_hold_up_nobody(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    off_the_event_loop(monkeypatch)
    gate, real = threading.Event(), ServedVersion.call
    called: list[None] = []

    def slow(*arguments: Any) -> Any:
        called.append(None)
        assert len(called) != 1 or gate.wait(20)
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


def test_a_quick_model_that_turns_slow_leaves_the_event_loop(
    small: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, threads = ServedVersion.call, list[str]()

    def busy(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name.rpartition("_")[0])
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass
        return real(*arguments)

    with small.server.versions.use() as version:
        monkeypatch.setattr(version, "is_quick", True)
        monkeypatch.setattr(ServedVersion, "call", busy)
        for _ in range(3):
            assert small.post(PREDICT, json=GOOD).status_code == 200
    # The first ran on the event loop itself.
    assert "requests" not in threads[0]
    assert threads[1:] == ["requests", "requests"]


def test_small_requests_overtake_large(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than four queries, or 500 results, are large."""
    off_the_event_loop(monkeypatch)
    gate, real, asked = threading.Event(), ServedVersion.call, []

    def watched(version: ServedVersion, signature: str, inputs: Any) -> Any:
        asked.append(int(inputs["k"]))
        assert inputs["k"] == 5 or gate.wait(20)
        return real(version, signature, inputs)

    monkeypatch.setattr(ServedVersion, "call", watched)

    async def ask() -> None:
        bodies = [retrieve_user([100] * 5, [[]] * 5, 1), retrieve_user([100] * 6, [[]] * 6, 100)]
        large = [asyncio.create_task(small.client.post(PREDICT, json=body)) for body in bodies]
        while not asked:
            await asyncio.sleep(0.01)
        for _ in range(3):
            assert (await small.client.post(PREDICT, json=GOOD)).status_code == 200
        assert not any(task.done() for task in large)
        gate.set()
        assert {(await task).status_code for task in large} == {200}

    small.run(ask())
    assert asked == [1, 5, 5, 5, 100]
