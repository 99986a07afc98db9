"""Limits that uvicorn lacks: headers that are slow or long, and a 503 with `Retry-After`.

A proxy does more against clients that mean harm: see docs/guides/serving.md, "On a network".
"""

import asyncio
import time

from prometheus_client import Gauge, Histogram
from starlette.datastructures import MutableHeaders
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

# For the headers of a connection's first request. Later ones only have a limit of bytes.
HEADER_SECONDS, MAX_HEADER_BYTES = 10.0, 65_536


class CountRequests:
    """ASGI middleware that measures requests by handler and status code.

    It also tells browsers to take each answer for what its type says.
    """

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
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
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
    """A connection that answers 503 if it is one too many, and closes if its headers are bad.

    uvicorn's own `limit_concurrency` would answer 503 on older connections too, so that whoever
    opens many would shut out clients that are being served.
    """

    _num_header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first request."""
        super().connection_made(transport)
        limit, self.limit_concurrency = self.limit_concurrency, None
        # Tasks outlive connections whose clients do not wait for the answer.
        if limit is not None and max(len(self.connections), len(self.tasks)) > limit:
            self.app = _BUSY
        self._deadline = self.loop.call_later(HEADER_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        """Reads on, unless the headers are too long: the parser keeps all of them in memory."""
        self._num_header_bytes += len(data)
        super().data_received(data)
        if self._num_header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The headers are longer than {MAX_HEADER_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        """Begins to answer."""
        self._deadline.cancel()
        self._num_header_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Keeps a part of the body, which does not count as a header."""
        self._num_header_bytes = 0
        super().on_body(body)
