"""Adds to uvicorn: limits of headers, a 503 with `Retry-After`, a graceful stop.

A stopping server accepts requests for one more second, on open and new connections, and answers
with `Connection: close`. It then refuses new connections and closes idle ones, as HTTP allows at
any time. A request sent while its connection closes is not read, so the client can send it again.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sized
from types import FrameType
from urllib.parse import urlsplit

import uvicorn
from prometheus_client import Gauge, Histogram
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

BUCKETS_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
REQUEST_SECONDS = Histogram(
    "tfrs_request_seconds",
    "Seconds from a request's headers to the end of its answer.",
    ["handler", "code"],
    buckets=BUCKETS_SECONDS,
)
IN_FLIGHT = Gauge("tfrs_requests_in_flight", "Requests being answered.")

# For the headers of a request, from its first byte or the opening of its connection.
HEADER_SECONDS, MAX_HEADER_BYTES = 10.0, 65_536
# After a signal to stop: time for new connections, then for requests on the last of them.
DRAIN_SECONDS, LAST_SECONDS = 1.0, 0.5


class CountRequests:
    """ASGI middleware that measures requests by handler and status code."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        code = 500

        async def counting_send(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        start = time.perf_counter()
        with IN_FLIGHT.track_inprogress():
            try:
                await self._app(scope, receive, counting_send)
            finally:
                # The function's name, because clients could add labels by asking for new paths.
                handler = getattr(scope.get("endpoint"), "__name__", "none")
                REQUEST_SECONDS.labels(handler, code).observe(time.perf_counter() - start)


_BUSY = CountRequests(
    JSONResponse(
        {"error": "Too many connections are open; --max-connections is the limit."},
        503,
        {"Retry-After": "1", "Connection": "close"},
    )
)


class Connection(HttpToolsProtocol):
    """A connection whose request headers must be short and arrive in time."""

    _deadline: asyncio.TimerHandle | None = None
    _is_one_too_many = False
    _num_header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts to wait for a request."""
        super().connection_made(transport)
        self.limit_concurrency = None  # uvicorn's own 503 has no `Retry-After`.
        # Only this connection is refused; older ones go on.
        self._is_one_too_many = self._is_over(self.connections)
        self._expect_headers(True)

    def data_received(self, data: bytes) -> None:
        """Reads on, or answers 503 if there are too many connections or unfinished tasks."""
        self._is_one_too_many &= self._is_over(self.connections)
        is_busy = self._is_one_too_many or self._is_over(self.tasks)
        self.app = _BUSY if is_busy else self.config.loaded_app
        self._num_header_bytes += len(data)
        super().data_received(data)
        if self._num_header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The headers are longer than {MAX_HEADER_BYTES} bytes.")
        self._expect_headers(self.cycle is None or self.cycle.response_complete)

    def on_headers_complete(self) -> None:
        """Begins to answer."""
        super().on_headers_complete()
        self._num_header_bytes = 0

    def on_body(self, body: bytes) -> None:
        """Keeps a part of the body, which does not count as a header."""
        self._num_header_bytes = 0
        super().on_body(body)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops waiting."""
        self._expect_headers(False)
        super().connection_lost(exc)

    def _is_over(self, members: Sized) -> bool:
        limit = self.config.limit_concurrency
        return limit is not None and len(members) > limit

    def _expect_headers(self, is_expected: bool) -> None:
        # Further bytes of the same headers do not move the deadline.
        if is_expected and self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)
        elif not is_expected and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """A server that stops gracefully, as the module's docstring says."""

    def __init__(self, config: uvicorn.Config, is_loading: Callable[[], bool]) -> None:
        super().__init__(config)
        self._is_loading = is_loading

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stops gracefully at the first signal, and at once at a second Ctrl-C."""
        if self.should_exit and sig == signal.SIGINT:
            os._exit(1)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops gracefully."""
        # All connections share this list, including those with a request in flight.
        self.server_state.default_headers.append((b"connection", b"close"))
        await self._sleep(DRAIN_SECONDS)
        for listener in (*self.servers, *(sockets or ())):
            listener.close()
        await self._sleep(LAST_SECONDS)
        await super().shutdown(sockets)
        if self._is_loading():  # Python would wait for the loading thread, which cannot be stopped.
            logging.shutdown()
            sys.stdout.flush()
            os._exit(0)

    async def _sleep(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.05)):
            if not self.force_exit:
                await asyncio.sleep(0.05)


class AllowedHosts:
    """ASGI middleware that refuses requests whose `Host` matches no pattern.

    "*.example.com" matches all names below it, "*" any name.
    """

    def __init__(self, app: ASGIApp, patterns: tuple[str, ...]) -> None:
        self._app = app
        self._patterns = [pattern.lower() for pattern in patterns]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        app = self._app
        if scope["type"] == "http":
            given = Headers(scope=scope).get("host", "")
            if not self._is_allowed(given):
                error = f"Host {given!r:.80} is not among --allowed-hosts."
                app = JSONResponse({"error": error}, 400)
        await app(scope, receive, send)

    def _is_allowed(self, given: str) -> bool:
        try:
            host = urlsplit(f"//{given}").hostname or ""
        except ValueError:
            return False
        return any(
            host == pattern or (pattern[0] == "*" and host.endswith(pattern[1:]))
            for pattern in self._patterns
        )
