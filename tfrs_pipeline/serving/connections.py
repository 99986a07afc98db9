"""What uvicorn lacks: a deadline for headers, a 503 that says when to come again, a gentle stop.

A client of a server that stops sees one of three things. What it sent before, or sends in the next
second on an open or a new connection, is answered, with `Connection: close`. A connection that
still lies idle then is closed, as HTTP allows at any time: a request that crosses with it has no
byte of an answer, was not read, and can be sent again. New connections are refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable, Sized
from urllib.parse import urlsplit

import uvicorn
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tfrs_pipeline.serving.metrics import CountRequests

# For the headers of a request, from the opening of its connection or its first byte.
HEADER_SECONDS = 10.0
# For requests on connections that are taken after a signal to stop, and then for those on the last.
DRAIN_SECONDS, LAST_SECONDS = 1.0, 0.5

_BUSY = CountRequests(
    JSONResponse(
        {"error": "Too many connections are open; --max-connections is the limit."},
        503,
        {"Retry-After": "1", "Connection": "close"},
    )
)


class Connection(H11Protocol):
    """A connection whose request headers have to come in time."""

    _deadline: asyncio.TimerHandle | None = None
    _is_one_too_many = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a request."""
        super().connection_made(transport)
        self.limit_concurrency = None  # uvicorn's own 503 names no time.
        # Those before it go on.
        self._is_one_too_many = self._is_over(self.connections)
        self._expect_headers(True)

    def data_received(self, data: bytes) -> None:
        """Reads on, or says that there are too many connections, or tasks whose client has gone."""
        self._is_one_too_many &= self._is_over(self.connections)
        is_busy = self._is_one_too_many or self._is_over(self.tasks)
        self.app = _BUSY if is_busy else self.config.loaded_app
        super().data_received(data)
        self._expect_headers(self.cycle is None or self.cycle.response_complete)

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits for nothing more."""
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
    """A server that answers what comes while its clients learn that it stops.

    Where `is_loading` says so at the end, the process ends at once: a load that goes on in its
    thread cannot be stopped, and would be waited for.
    """

    def __init__(
        self, config: uvicorn.Config, is_loading: Callable[[], bool] = lambda: False
    ) -> None:
        super().__init__(config)
        self._is_loading = is_loading

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops as the module says."""
        # This list is that of all connections, also of requests that are being answered.
        self.server_state.default_headers.append((b"connection", b"close"))
        await self._sleep(DRAIN_SECONDS)
        for listener in (*self.servers, *(sockets or ())):
            listener.close()
        await self._sleep(LAST_SECONDS)
        await super().shutdown(sockets)
        if self._is_loading():
            logging.shutdown()
            sys.stdout.flush()
            os._exit(0)

    async def _sleep(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.05)):
            if not self.force_exit:
                await asyncio.sleep(0.05)


class AllowedHosts:
    """ASGI middleware that refuses requests which call the server by a name of no pattern.

    "*.example.com" is all names below, "*" any.
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
