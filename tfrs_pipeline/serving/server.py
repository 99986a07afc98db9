"""An exported model over HTTP, in TensorFlow Serving's own REST form.

    POST /v1/models/NAME:predict, /v1/models/NAME/versions/V:predict
    GET  /v1/models/NAME, /v1/models/NAME/versions/V        state of the versions
    GET  /v1/models/NAME/metadata, .../versions/V/metadata  signatures
    GET  /healthz, /readyz, /metrics                        for whoever runs it
    GET  /                                                  a page to try the model on

docs/serving.md describes requests, limits and what a network takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import socket
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fastapi
    import prometheus_client
    import uvicorn
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
except ImportError as missing:
    raise ImportError(
        "The server needs the extra 'serve': pip install -c constraints.txt -e '.[serve]', in the "
        f"project's folder. "
        f"The import said: {missing}"
    ) from missing

from tfrs_pipeline.serving import page, rest
from tfrs_pipeline.serving.batching import Batcher
from tfrs_pipeline.serving.metrics import CountRequests, ServerMetrics
from tfrs_pipeline.serving.rest import RequestError
from tfrs_pipeline.serving.settings import ServeSettings
from tfrs_pipeline.serving.versions import ModelVersions, ServedVersion

logger = logging.getLogger(__name__)

# curl -d and many clients name a form though they send JSON, as TensorFlow Serving's own examples
# do; it looks at no type at all.
CONTENT_TYPES = ("", "application/json", "application/x-www-form-urlencoded")
# A client that still sends hears nothing before a connection is closed: what is too long is read
# and forgotten up to this many times the limit.
MAX_FORGOTTEN = 32
# Writing more values than this would keep the event loop from everyone else.
MAX_VALUES_ON_LOOP = 8_192
CLOSE = {"Connection": "close"}
# For a call of the model that still runs when the requests' own time to finish is over.
STOP_SECONDS = 5.0


class ModelServer:
    """The parts of a server: the model's versions, the thread that calls them, the counters.

    Args:
        model: Folder of a model, or of one of its versions.
        settings: See `ServeSettings`.

    Raises:
        FileNotFoundError: If there is no version in the folder.
    """

    def __init__(self, model: Path, settings: ServeSettings) -> None:
        self.settings = settings
        self.versions = ModelVersions(
            model, with_exact=settings.page, on_load=lambda *load: self.metrics.on_load(*load)
        )
        self.batcher = Batcher(
            share=settings.batch,
            wait_seconds=settings.batch_wait_ms / 1000,
            max_rows=settings.max_batch_rows,
            max_waiting=settings.max_waiting,
            on_call=lambda *call: self.metrics.on_call(*call),
        )
        self.metrics = ServerMetrics(self.versions.name, lambda: self.batcher.num_waiting)
        # Weakly: the titles must not keep an old version in memory.
        self._items: weakref.WeakKeyDictionary[ServedVersion, page.ItemSearch]
        self._items = weakref.WeakKeyDictionary()

    async def items(self, version: ServedVersion) -> page.ItemSearch:
        """Returns the items of a version; reads them when they are first asked for."""
        if version not in self._items:
            folder = version.index.retriever.folder
            self._items[version] = await asyncio.to_thread(page.ItemSearch, folder)
        return self._items[version]

    def check_name(self, name: str) -> None:
        """Refuses the name of another model."""
        if name != self.versions.name:
            raise RequestError(
                404,
                f"Servable not found for request: Latest({name!r:.80}). "
                f"This server serves {self.versions.name!r}.",
            )


def create_app(server: ModelServer) -> fastapi.FastAPI:
    """Makes the ASGI application of a server whose first version is loaded."""

    @contextlib.asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        server.batcher.start()
        watch = asyncio.create_task(server.versions.watch(server.settings.poll_seconds))
        yield
        watch.cancel()
        await asyncio.to_thread(server.batcher.stop, STOP_SECONDS)

    # Its documentation pages load scripts from elsewhere.
    app = fastapi.FastAPI(
        title="tfrs-pipeline", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )
    app.add_middleware(CountRequests, metrics=server.metrics)
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    _add_predict(app, server)
    _add_model(app, server)
    _add_operations(app, server)
    if server.settings.page:
        _add_page(app, server)
    return app


def _add_predict(app: fastapi.FastAPI, server: ModelServer) -> None:
    settings = server.settings

    async def predict(request: Request) -> Response:
        server.check_name(request.path_params["name"])
        number = _version_number(request)
        with server.versions.use(number):
            pass  # Not found is said before the body is read, which may take long.
        body = await read_body(request, settings.max_body_bytes, settings.body_timeout_seconds)
        document = rest.parse_json(body, settings.max_depth)
        with server.versions.use(number) as version:
            call = rest.parse_predict(document, version.signatures)
            rest.check_limits(
                call.inputs,
                max_queries=settings.max_queries,
                max_k=settings.max_k,
                max_exclude=settings.max_exclude,
                max_history=settings.max_history,
            )
            outputs = await server.batcher.call(version.index, call.signature, call.inputs)
        if sum(array.size for array in outputs.values()) > MAX_VALUES_ON_LOOP:
            content = await asyncio.to_thread(
                rest.format_outputs, outputs, is_row_format=call.is_row_format
            )
        else:
            content = rest.format_outputs(outputs, is_row_format=call.is_row_format)
        return Response(content, media_type="application/json")

    # Starlette's plain routes: the body is read with a deadline, not by FastAPI.
    for path in ("/v1/models/{name}:predict", "/v1/models/{name}/versions/{version}:predict"):
        app.add_route(path, predict, methods=["POST"])


def _add_model(app: fastapi.FastAPI, server: ModelServer) -> None:
    async def model_status(request: Request) -> Response:
        _refuse_method(request)
        server.check_name(request.path_params["name"])
        number = _version_number(request)
        found = [s for s in server.versions.statuses() if number in (None, s[0])]
        if not found:
            raise RequestError(
                404, f"Could not find version {number} of model {server.versions.name}"
            )
        return JSONResponse({"model_version_status": [_status(*status) for status in found]})

    async def model_metadata(request: Request) -> Response:
        server.check_name(request.path_params["name"])
        with server.versions.use(_version_number(request)) as version:
            spec = {
                "name": server.versions.name,
                "signature_name": "",
                "version": str(version.number),
            }
            signatures = {"signature_def": {"signature_def": version.signature_def}}
            return JSONResponse({"model_spec": spec, "metadata": signatures})

    for path in ("/v1/models/{name}", "/v1/models/{name}/versions/{version}"):
        app.add_route(f"{path}/metadata", model_metadata, methods=["GET"])
        app.add_route(path, model_status, methods=["GET"])


def _status(number: int, state: str, error: str) -> dict[str, Any]:
    status = {"error_code": "UNKNOWN" if error else "OK", "error_message": error}
    return {"version": str(number), "state": state, "status": status}


def _add_operations(app: fastapi.FastAPI, server: ModelServer) -> None:
    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        version = server.versions.current
        if not server.batcher.is_running:
            raise RequestError(503, "The thread that calls the model does not run.")
        return PlainTextResponse(f"ok: {server.versions.name} version {version.number}\n")

    async def metrics(request: Request) -> Response:
        content = prometheus_client.generate_latest(server.metrics.registry)
        return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    for handler in (healthz, readyz, metrics):
        app.add_route(f"/{handler.__name__}", handler, methods=["GET"])


def _add_page(app: fastapi.FastAPI, server: ModelServer) -> None:
    settings = server.settings

    async def index_page(request: Request) -> Response:
        return HTMLResponse(page.page_html(), headers=page.PAGE_HEADERS)

    async def page_model(request: Request) -> Response:
        with server.versions.use() as version:
            items = await server.items(version)
            return JSONResponse(page.card(version, server.versions.name, items))

    async def page_items(request: Request) -> Response:
        words = request.query_params.get("search", "")[:200]
        with server.versions.use() as version:
            items = await server.items(version)
            return JSONResponse({"items": items.find(words)})

    async def page_query(request: Request) -> Response:
        body = await read_body(request, settings.max_body_bytes, settings.body_timeout_seconds)
        document = rest.parse_json(body, settings.max_depth)
        with server.versions.use() as version:
            items = await server.items(version)
            found = await page.answer(
                document,
                version,
                items,
                server.batcher,
                max_k=settings.max_k,
                max_history=settings.max_history,
            )
        return JSONResponse(found)

    app.add_route("/", index_page, methods=["GET"])
    app.add_route("/page/model", page_model, methods=["GET"])
    app.add_route("/page/items", page_items, methods=["GET"])
    app.add_route("/page/query", page_query, methods=["POST"])


async def read_body(request: Request, max_bytes: int, timeout_seconds: float) -> bytes:
    """Reads the body of a request.

    Raises:
        RequestError: 415 for a type that is not JSON's, 413 if it is too long, 408 if it has not
            come in time. The last closes the connection, as does what is much too long.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in CONTENT_TYPES:
        raise RequestError(
            415, f"Content-Type must be application/json. Got: {content_type!r:.80}", CLOSE
        )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise RequestError(
            415, f"Content-Encoding is not supported. Got: {encoding!r:.80}; send it plain.", CLOSE
        )
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(timeout_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= max_bytes:
                    body += chunk
                elif size > MAX_FORGOTTEN * max_bytes:
                    break
    except TimeoutError:
        raise RequestError(
            408, f"The body did not come within {timeout_seconds:g} seconds.", CLOSE
        ) from None
    except ClientDisconnect:
        raise RequestError(400, "The client went away before its body had come.", CLOSE) from None
    if size > max_bytes:
        headers = CLOSE if size > MAX_FORGOTTEN * max_bytes else None
        raise RequestError(413, f"The body may have {max_bytes} bytes.", headers)
    return bytes(body)


def _version_number(request: Request) -> int | None:
    text = request.path_params.get("version")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise RequestError(404, f"A version is a number. Got: {text!r:.80}")
    return int(text)


def _refuse_method(request: Request) -> None:
    """Answers a call of the model by GET, whose path a model's name would match too."""
    last = request.path_params.get("version") or request.path_params["name"]
    if last.endswith(":predict"):
        raise RequestError(405, "predict takes a POST.", {"Allow": "POST"})


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse({"error": error.message}, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"Malformed request: {request.method} {request.url.path:.200}: {error.detail}"
    return JSONResponse({"error": message}, error.status_code, error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    # Starlette raises it again for the log; a client learns nothing of the inside.
    return JSONResponse({"error": "Internal error; the server's log has more."}, 500)


class _Uvicorn(uvicorn.Server):
    """A server that says when it listens and ends without an error after a signal."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            try:
                yield
            finally:
                # uvicorn raises them again after its stop, which would end in an error code.
                self._captured_signals.clear()


def serve(model: Path, settings: ServeSettings, on_ready: Callable[[str], None]) -> None:
    """Serves a model until SIGTERM or Ctrl-C, then finishes what is in flight.

    Args:
        model: Folder of a model, whose newest version is served, or of one of its versions.
        settings: See `ServeSettings`.
        on_ready: Told the address once it is listened to.

    Raises:
        FileNotFoundError: If there is no version.
        RuntimeError: If no version can be loaded.
        OSError: If the address is in use or not this machine's.
    """
    server = ModelServer(model, settings)
    listener = _bind(settings.host, settings.port)
    try:
        # What the libraries hold lives as long as the process: no later collection need look at it.
        gc.collect()
        gc.freeze()
        server.versions.load_first()
        address = _address(settings.host, listener.getsockname()[1])
        if not _is_local(settings.host):
            logger.warning(
                "%s is open to the network, without TLS or passwords: put a proxy before it",
                address,
            )
        config = uvicorn.Config(
            create_app(server),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            limit_concurrency=settings.max_connections,
            timeout_graceful_shutdown=settings.shutdown_seconds,
        )
        _Uvicorn(config, lambda: on_ready(address)).run(sockets=[listener])
    finally:
        listener.close()


def _bind(host: str, port: int) -> socket.socket:
    """Takes the address at once, so that one in use is refused before a model is loaded."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    # With the protocol named, asyncio sends at once: else the body of an answer waits 40 ms for the
    # client to acknowledge its headers.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"Cannot listen on {host}, port {port}: {error}. Try --port 0.") from error
    return listener


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
