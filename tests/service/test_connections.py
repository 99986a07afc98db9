"""Connections to a server, over sockets, without a model."""

import asyncio
import contextlib
import json
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from prometheus_client import REGISTRY
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from tfrs_pipeline.service import connections
from tfrs_pipeline.service.connections import MAX_HEADER_BYTES, Connection

REQUEST = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Running:
    """A server whose answers to /slow wait for `gate`."""

    def __init__(self, limit: int) -> None:
        self.gate, self.is_asked = asyncio.Event(), threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        options: Any = {"interface": "asgi3", "lifespan": "off", "log_config": None}
        config = uvicorn.Config(self._answer, http=Connection, limit_concurrency=limit, **options)
        self.server = uvicorn.Server(config)
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._run)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/slow":
            self.is_asked.set()
            await self.gate.wait()
        await PlainTextResponse("ok")(scope, receive, send)

    def _run(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.server.serve([self.listener]))

    def open(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    running = Running(limit=3)
    running.thread.start()
    yield running
    running.server.should_exit = running.server.force_exit = True
    with contextlib.suppress(RuntimeError):  # The loop has ended.
        running.loop.call_soon_threadsafe(running.gate.set)
    running.thread.join()


def answer(connection: socket.socket, path: bytes = b"") -> str:
    connection.sendall(REQUEST % path)
    return read(connection)


def read(connection: socket.socket) -> str:
    """Reads one answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    while len(body) < length:
        body += connection.recv(65536)
    return (head + b"\r\n\r\n" + body).decode()


def is_cut_off(connection: socket.socket) -> bool:
    """Tells whether a connection ends without an answer, or is reset because of unread bytes."""
    try:
        return connection.recv(65536) == b""
    except ConnectionResetError:
        return True


def test_first_headers_that_are_late_are_cut_off(running: Running) -> None:
    with running.open() as silent, running.open() as slow, running.open() as good:
        assert answer(good).startswith("HTTP/1.1 200")
        with contextlib.suppress(ConnectionError):  # The connection is closed by then.
            for byte in REQUEST % (b"x" * 2000):
                slow.sendall(bytes([byte]))
                if select.select([slow], [], [], 0.01)[0]:
                    break
        assert is_cut_off(slow)
        assert silent.recv(65536) == b""
        # A connection that has been asked once may be idle for longer.
        assert answer(good).startswith("HTTP/1.1 200")


@pytest.mark.parametrize(
    "begin",
    [
        b"",
        b"GET /",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ",
        b"POST /slow HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ",
    ],
    ids=["nothing", "path", "header", "trailer"],
)
def test_headers_without_end_are_refused(running: Running, begin: bytes) -> None:
    filler = b"x" if begin else b"\r\n"
    with running.open() as connection:
        connection.sendall(begin)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 10 * MAX_HEADER_BYTES:
                sent += connection.send(1000 * filler)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(65536).startswith(b"HTTP/1.1 400")
        assert is_cut_off(connection)
    with running.open() as connection:
        # Many requests on one connection may together be longer than the limit.
        for _ in range(4):
            assert answer(connection, b"x" * (MAX_HEADER_BYTES // 2)).startswith("HTTP/1.1 200")


def test_beyond_the_limit_the_answer_says_when_to_try_again(running: Running) -> None:
    refusals = "tfrs_request_seconds_sum", {"handler": "none", "code": "503"}
    refused_before = REGISTRY.get_sample_value(*refusals) or 0
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(running.open()) for _ in range(3)]
        for connection in kept:
            assert answer(connection).startswith("HTTP/1.1 200")
        with running.open() as further:
            head, _, body = answer(further).partition("\r\n\r\n")
            assert head.startswith("HTTP/1.1 503")
            assert "retry-after: 1" in head
            assert "connection: close" in head
            assert set(json.loads(body)) == {"error"}
        # A silent connection does not count.
        with running.open() as silent:
            for connection in kept:
                assert answer(connection).startswith("HTTP/1.1 200")
            assert answer(silent).startswith("HTTP/1.1 503")
        # A further connection does not take the place of a late one that is now within the limit.
        with running.open() as late:
            kept.pop().close()
            while not answer(late).startswith("HTTP/1.1 200"):
                late.close()
                late = stack.enter_context(running.open())
            with running.open():
                assert answer(late).startswith("HTTP/1.1 200")
        # By now the first refusal is counted.
        assert (REGISTRY.get_sample_value(*refusals) or 0) > refused_before
        kept.pop().close()
        while not answer(stack.enter_context(running.open())).startswith("HTTP/1.1 200"):
            pass


def test_a_stopping_server_finishes_what_it_has_begun(running: Running) -> None:
    with running.open() as idle, running.open() as busy:
        assert "connection: close" not in answer(idle)
        busy.sendall(REQUEST % b"slow")
        assert running.is_asked.wait(20)
        running.server.should_exit = True
        # The idle client gets no byte, and the waiting one gets a whole answer.
        assert idle.recv(65536) == b""
        running.loop.call_soon_threadsafe(running.gate.set)
        text = read(busy)
        assert text.startswith("HTTP/1.1 200")
        assert "connection: close" in text
    running.thread.join()
    with pytest.raises(ConnectionRefusedError):
        running.open()
