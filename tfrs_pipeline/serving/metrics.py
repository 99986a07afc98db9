"""What the server counts, in Prometheus' form."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ServerMetrics:
    """The server's metrics, in a registry of their own.

    Args:
        model: Name of the model, a label of those that are about it.
        num_waiting: Reads the length of the queue.
    """

    def __init__(self, model: str, num_waiting: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "tfrs_requests", "Requests answered.", ["handler", "code"], registry=registry
        )
        self._seconds = Histogram(
            "tfrs_request_seconds",
            "Seconds from a request's headers to the end of its answer.",
            ["handler"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._in_flight = Gauge(
            "tfrs_requests_in_flight", "Requests being answered.", registry=registry
        )
        self._call_seconds = Histogram(
            "tfrs_model_call_seconds",
            "Seconds of a model call.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._call_rows = Histogram(
            "tfrs_model_call_queries", "Queries in a model call.", buckets=_ROWS, registry=registry
        )
        self._call_requests = Histogram(
            "tfrs_model_call_requests",
            "Requests that shared a model call.",
            buckets=_ROWS,
            registry=registry,
        )
        waiting = Gauge("tfrs_waiting_calls", "Model calls in the queue.", registry=registry)
        waiting.set_function(num_waiting)
        self._version = Gauge(
            "tfrs_model_version", "Version in use.", ["model"], registry=registry
        ).labels(model)
        self._loads = Counter(
            "tfrs_model_loads", "Versions loaded, or not.", ["model", "outcome"], registry=registry
        )
        self._model = model
        for outcome in ("ok", "failed"):
            self._loads.labels(model, outcome)
        self._load_seconds = Gauge(
            "tfrs_model_load_seconds", "Seconds that the last load took.", registry=registry
        )

    def on_call(self, num_requests: int, num_rows: int, seconds: float) -> None:
        """Counts a call of the model."""
        self._call_requests.observe(num_requests)
        self._call_rows.observe(num_rows)
        self._call_seconds.observe(seconds)

    def on_load(self, version: int, seconds: float, error: str | None) -> None:
        """Counts a version that was loaded, or could not be."""
        self._loads.labels(self._model, "failed" if error else "ok").inc()
        self._load_seconds.set(seconds)
        if not error:
            self._version.set(version)


class CountRequests:
    """ASGI middleware that counts requests by handler and code.

    Args:
        app: What it wraps.
        metrics: Where to count.
    """

    def __init__(self, app: Any, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[..., Any],
        send: Callable[..., Any],
    ) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        code = 500

        async def counting_send(message: Mapping[str, Any]) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        start = time.perf_counter()
        with self._metrics._in_flight.track_inprogress():
            try:
                await self._app(scope, receive, counting_send)
            finally:
                # The function's name, not the path: a client must not be able to add labels.
                handler = getattr(scope.get("endpoint"), "__name__", "none")
                self._metrics._requests.labels(handler, str(code)).inc()
                self._metrics._seconds.labels(handler).observe(time.perf_counter() - start)
