"""What the server counts, in Prometheus' form."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ServerMetrics:
    """The server's metrics, in a registry of their own.

    Args:
        model: Name of the model.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()

        def make(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(name, text, labels, registry=self.registry, **options)

        self.requests = make(Counter, "tfrs_requests", "Requests answered.", "handler", "code")
        self.seconds = make(
            Histogram,
            "tfrs_request_seconds",
            "Seconds from a request's headers to the end of its answer.",
            "handler",
            buckets=_SECONDS,
        )
        self.in_flight = make(Gauge, "tfrs_requests_in_flight", "Requests being answered.")
        self.call_seconds = make(
            Histogram, "tfrs_model_call_seconds", "Seconds of a model call.", buckets=_SECONDS
        )
        self.call_queries = make(
            Histogram, "tfrs_model_call_queries", "Queries in a model call.", buckets=_QUERIES
        )
        self.version = make(Gauge, "tfrs_model_version", "Version in use.", "model").labels(model)
        self.loads = make(Counter, "tfrs_model_loads", "Versions loaded, or not.", "outcome")
        self.load_seconds = make(
            Gauge, "tfrs_model_load_seconds", "Seconds that the last load took."
        )
        for outcome in ("ok", "failed"):
            self.loads.labels(outcome)


class CountRequests:
    """ASGI middleware that counts requests by handler and code.

    Args:
        app: What it wraps.
        metrics: Where to count.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

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
        with self._metrics.in_flight.track_inprogress():
            try:
                await self._app(scope, receive, counting_send)
            finally:
                # The function's name, not the path: a client must not be able to add labels.
                handler = getattr(scope.get("endpoint"), "__name__", "none")
                self._metrics.requests.labels(handler, str(code)).inc()
                self._metrics.seconds.labels(handler).observe(time.perf_counter() - start)
