"""How long requests take and how many there are, by handler and status code."""

import time

from prometheus_client import Gauge, Histogram
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BUCKETS_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
REQUEST_SECONDS = Histogram(
    "tfrs_request_seconds",
    "Seconds from a request's headers to the end of its answer.",
    ["handler", "code"],
    buckets=BUCKETS_SECONDS,
)
IN_FLIGHT = Gauge("tfrs_requests_in_flight", "Requests being answered.")


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
