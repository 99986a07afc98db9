"""The server's Prometheus metrics; the client library adds the process's memory and CPU time."""

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)

REQUEST_SECONDS = Histogram(
    "tfrs_request_seconds",
    "Seconds from a request's headers to the end of its answer.",
    ["handler", "code"],
    buckets=_SECONDS,
)
IN_FLIGHT = Gauge("tfrs_requests_in_flight", "Requests being answered.")
CALL_SECONDS = Histogram("tfrs_model_call_seconds", "Seconds of a model call.", buckets=_SECONDS)
CALL_QUERIES = Histogram(
    "tfrs_model_call_queries", "Queries in a model call.", buckets=(1, 2, 4, 8, 16, 32, 64, 128)
)
VERSION = Gauge("tfrs_model_version", "Version in use.", ["model"])
LOADS = Counter(
    "tfrs_model_loads", "Versions that were loaded or failed to load.", ["model", "outcome"]
)
LOAD_SECONDS = Gauge("tfrs_model_load_seconds", "Seconds that the last load took.", ["model"])
