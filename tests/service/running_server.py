"""Servers within this process: on a port in a thread, or called without a socket."""

import asyncio
import contextlib
import functools
import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from tfrs_pipeline.service.server import ModelServer, create_app
from tfrs_pipeline.service.settings import ServeSettings
from tfrs_pipeline.service.versions import ServedVersion

PREDICT = "/v1/models/films:predict"
TOKEN = "0123456789abcdef"
JSON = {"content-type": "application/json"}


def in_json(scores: Any) -> np.ndarray:
    """Returns scores as an answer in JSON has them: NaN, which null becomes, in empty slots."""
    values = np.asarray(scores)
    is_score = values.dtype.kind == "f"
    return np.where(np.isneginf(values), np.nan, values) if is_score else values


def retrieve_user(users: list[Any], exclude: list[list[Any]], k: Any) -> dict[str, Any]:
    """Makes the body of a predict call."""
    inputs = {"user_id": users, "exclude": exclude, "k": k}
    return {"signature_name": "retrieve_user", "inputs": inputs}


GOOD = retrieve_user([101], [[]], 5)
TEXT = json.dumps(GOOD)


class Running:
    """A started server, its loop in a thread; requests go straight to the application.

    With `takes_writes`, the token for them is `TOKEN`, in a file beside the model.
    """

    def __init__(self, model: Path, *, takes_writes: bool = False, **settings: Any) -> None:
        if takes_writes:
            settings["token_file"] = model.with_name("token")
            settings["token_file"].write_text(f"{TOKEN}\n")
        self.server = ModelServer(model, ServeSettings(**{"poll_seconds": 0.05} | settings))
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


def send(
    running: Running, body: Any, path: str = "/v1/events", method: str = "POST", token: str = TOKEN
) -> Any:
    """Sends a write, in JSON unless it is bytes."""
    headers = {**JSON, **({"authorization": f"Bearer {token}"} if token else {})}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return running.run(running.client.request(method, path, content=content, headers=headers))


def off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets no version count as quick, whatever its calls cost on this machine."""
    never = property(lambda _: False, lambda _, is_quick: None)
    monkeypatch.setattr(ServedVersion, "is_quick", never, raising=False)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 50
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@functools.cache
def address_of(model: Path) -> str:
    """Serves a model until the tests end, with `TOKEN`; returns its URL."""
    with tempfile.NamedTemporaryFile("w", prefix="token-") as file:
        file.write(TOKEN)
        file.flush()
        server = ModelServer(model, ServeSettings(page=False, token_file=Path(file.name)))
    server.versions.load_first()
    listener = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(create_app(server), log_config=None))
    threading.Thread(
        target=running.run, kwargs={"sockets": [listener]}, daemon=True, name="server"
    ).start()
    while not running.started:
        time.sleep(0.01)
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1/models/{model.name}"
