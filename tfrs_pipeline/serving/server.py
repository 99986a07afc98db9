"""Serves an exported model over HTTP, with TensorFlow Serving's REST API.

docs/guides/serving.md describes addresses, requests, limits and use on a network.
"""

import asyncio
import contextlib
import gc
import hmac
import http
import ipaddress
import logging
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

try:
    import prometheus_client
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from tfrs_pipeline.serving.connections import AllowedHosts, Connection, CountRequests, Server
except ImportError as missing:
    raise ImportError(
        "The server needs the extra 'serve': pip install -c constraints.txt -e '.[serve]', in the "
        f"project's folder. The import said: {missing}"
    ) from missing

from tfrs_pipeline.durable import Damaged, try_writing
from tfrs_pipeline.serving import page, rest
from tfrs_pipeline.serving.publish import version_at
from tfrs_pipeline.serving.settings import ServeSettings, listening, read_token
from tfrs_pipeline.serving.versions import ModelVersions, ServedVersion
from tfrs_pipeline.serving.watching import LIVE_UNKNOWN_VALUES

logger = logging.getLogger(__name__)

# A client reads no answer while it is sending, so a body that is too long is read and discarded,
# up to this many times the limit.
MAX_DISCARDED = 32
CLOSE = {"Connection": "close"}
# Larger requests are answered in slices, one at a time, so that small ones need not wait.
SMALL_BODY_BYTES = 8_192
SMALL_QUERIES, SMALL_RESULTS = 4, 500
# After a call that took longer than this in the event loop, threads answer for `PAUSE` times its
# duration, so that slow calls take a twentieth of the loop's time at most.
SLOW_SECONDS, PAUSE = 0.005, 20
# Seconds after which a thread yields to another. Python's default, 5 ms, equals ten small requests.
SWITCH_SECONDS = 0.0005

_PREDICT_PATH = re.compile(
    r"/v1/models/(?P<name>[^/]+?)(?:/versions/(?P<version>[^/]+))?:predict", re.DOTALL
)

T = TypeVar("T")


class ModelServer:
    """A model's versions, and the threads that call them and write its items.

    Raises a `StorageError` if holders of a token could not write to the model's folder, and a
    `ValueError` if the file holds no good token.
    """

    def __init__(self, model: Path, settings: ServeSettings) -> None:
        self.settings = settings
        self.versions = ModelVersions(model, lambda folder: ServedVersion(folder, settings))
        self.threads = ThreadPoolExecutor(settings.num_threads, "requests")
        self.large = ThreadPoolExecutor(1, "large-requests")
        self.writes = ThreadPoolExecutor(1, "writes")
        self.slow_until = 0.0
        self._token = None if settings.token_file is None else read_token(settings.token_file)
        if self._token is not None:
            try_writing(version_at(model).parent)

    def number(self, request: Request) -> str | None:
        """Reads the version in a request's path, None for any; raises a 404 for another model."""
        name = request.path_params["name"]
        if name != self.versions.name:
            known = f"This server serves {self.versions.name!r}."
            raise HTTPException(404, f"Servable not found for request: Latest({name:.80}). {known}")
        return request.path_params.get("version")

    def authorize(self, header: str) -> None:
        """Refuses a write without the token, and all writes if there is none."""
        if self._token is None:
            told = "This server takes no items: it was started without --token-file."
            raise HTTPException(403, told)
        kind, _, token = header.partition(" ")
        # In constant time, which does not tell how much of the token is right.
        is_right = hmac.compare_digest(token.strip().encode(), self._token)
        if kind.lower() != "bearer" or not is_right:
            told = "Send the token that the server was started with: Authorization: Bearer TOKEN"
            raise HTTPException(401, told, {"WWW-Authenticate": "Bearer"})

    async def ask(self, work: Callable[[ServedVersion], T]) -> T:
        """Does slow work with the version in use, off the event loop."""
        with self.versions.use() as version:
            return await _run(self.large, work, version)

    async def predict(self, request: Request) -> Response:
        """Answers a predict call: a small one alone in the event loop, a large one by turns."""
        if request.method != "POST":
            raise HTTPException(405, headers={"Allow": "POST"})
        number, body = self.number(request), await read_body(request, self.settings)

        def begin(version: ServedVersion) -> bytes | rest.PredictCall:
            call = rest.parse_predict(body, version.signatures)
            if call.num_queries > SMALL_QUERIES or call.num_results > SMALL_RESULTS:
                return call
            outputs = version.call(call.signature, call.inputs)
            version.watch.count(call.inputs, outputs)
            return rest.format_outputs(outputs, call.is_row_format)

        with self.versions.use(number) as version:
            await asyncio.sleep(0)  # Requests that arrived together are counted now.
            is_small = len(body) <= SMALL_BODY_BYTES
            start = time.monotonic()
            if is_small and version.num_uses == 1 and start > self.slow_until:
                answer = begin(version)  # A change of threads takes a fifth of a short call.
                if (seconds := time.monotonic() - start) > SLOW_SECONDS:
                    self.slow_until = start + PAUSE * seconds
            else:
                answer = await _run(self.threads if is_small else self.large, begin, version)
            if not isinstance(answer, bytes):
                call, parts = answer, []
                for part in call.slices(SMALL_QUERIES, SMALL_RESULTS):
                    parts.append(await _run(self.large, version.call, call.signature, part))
                outputs = {name: np.concatenate([x[name] for x in parts]) for name in parts[0]}
                version.watch.count(call.inputs, outputs)
                answer = await _run(self.large, rest.format_outputs, outputs, call.is_row_format)
            return Response(answer, media_type="application/json")


def write_items(versions: ModelVersions, body: bytes, is_put: bool) -> dict[str, Any]:
    """Adds or removes the items in a body, to and from the version in use."""
    values = rest.parse_items(body, "items" if is_put else "item_ids")
    request = (values, []) if is_put else ([], values)
    try:
        with versions.use() as version:
            change = version.retriever.live.prepare(*request)
        with versions.writing, versions.use() as current:
            live = current.retriever.live
            if current is not version:  # A new version has other vectors.
                change = live.prepare(*request)
            num_new, num_removed = live.write(change)
            num_items = current.retriever.num_candidates
    except Damaged:
        raise
    except ValueError as error:
        raise rest.bad_request(str(error)) from None
    except OSError:
        logger.exception("a write of items was not confirmed")
        message = "The items could not be put on disk, and nothing has changed"
        more = f"{message}; the server's log has more."
        raise HTTPException(503, more, {"Retry-After": "1"}) from None
    counts: dict[str, Any] = {"num_new": num_new} if is_put else {"num_removed": num_removed}
    LIVE_UNKNOWN_VALUES.inc(len(change.notes))
    notes = {"notes": change.notes} if change.notes else {}
    return {**counts, **notes, "num_items": num_items}


async def _run(threads: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, work, *arguments)


def create_app(server: ModelServer, on_ready: Callable[[], None] = lambda: None) -> Starlette:
    """Makes the ASGI application of a server that has loaded its first version."""
    settings = server.settings

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watch = asyncio.create_task(server.versions.watch(settings.poll_seconds))
        on_ready()
        yield
        watch.cancel()
        for threads in (server.threads, server.large, server.writes):
            threads.shutdown(wait=False, cancel_futures=True)

    app = Starlette(lifespan=lifespan)
    app.add_middleware(PredictCalls, server=server)
    app.add_middleware(AllowedHosts, patterns=(*settings.allowed_hosts, settings.host))
    app.add_middleware(CountRequests)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    _add_model(app, server)
    if settings.page:
        _add_page(app, server)

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        with server.versions.use() as version:
            return PlainTextResponse(f"ok: {server.versions.name} version {version.number}\n")

    async def prometheus(request: Request) -> Response:
        content = prometheus_client.generate_latest()
        return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    app.add_route("/healthz", healthz)
    app.add_route("/readyz", readyz)
    app.add_route("/metrics", prometheus)
    return app


class PredictCalls:
    """ASGI middleware that answers predict calls before the router, which costs more than a call.

    It takes every method, because the other routes would read ":predict" as part of a name.
    """

    def __init__(self, app: ASGIApp, server: ModelServer) -> None:
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a call, or passes the request on."""
        found = scope["type"] == "http" and _PREDICT_PATH.fullmatch(scope["path"])
        if not found:
            await self._app(scope, receive, send)
            return
        scope.update(path_params=found.groupdict(), endpoint=self._server.predict)
        request = Request(scope, receive)
        try:
            response = await self._server.predict(request)
        except HTTPException as error:
            response = await _http_error(request, error)
        await response(scope, receive, send)


def _add_model(app: Starlette, server: ModelServer) -> None:
    model, version = "/v1/models/{name}", "/v1/models/{name}/versions/{version}"

    async def items(request: Request) -> Response:
        if request.method not in ("PUT", "DELETE"):
            raise HTTPException(405, headers={"Allow": "PUT, DELETE"})
        server.number(request)
        body = await read_body(request, server.settings)
        server.authorize(request.headers.get("authorization", ""))
        is_put = request.method == "PUT"
        # This pool has one thread, so writes are done one after the other.
        return JSONResponse(await _run(server.writes, write_items, server.versions, body, is_put))

    async def model_metadata(request: Request) -> Response:
        with server.versions.use(server.number(request)) as version:
            name, number = server.versions.name, str(version.number)
            spec = {"name": name, "signature_name": "", "version": number}
            signatures = {"signature_def": {"signature_def": version.signature_def}}
            return JSONResponse({"model_spec": spec, "metadata": signatures})

    async def model_status(request: Request) -> Response:
        number = server.number(request)
        found = [
            {
                "version": str(version),
                "state": state,
                "status": {"error_code": "UNKNOWN" if error else "OK", "error_message": error},
            }
            for version, (state, error) in server.versions.statuses().items()
            if number in (None, str(version))
        ]
        if not found:
            raise HTTPException(404, f"Could not find version {number!s:.40} of the model.")
        return JSONResponse({"model_version_status": found})

    app.add_route(f"{model}/items", items, list(http.HTTPMethod))
    for path in (model, version):
        app.add_route(f"{path}/metadata", model_metadata)
        app.add_route(path, model_status)


def _add_page(app: Starlette, server: ModelServer) -> None:
    async def index_page(request: Request) -> Response:
        return FileResponse(page.PAGE_FILE, headers=page.PAGE_HEADERS)

    async def page_model(request: Request) -> Response:
        return JSONResponse(await server.ask(page.card))

    async def page_items(request: Request) -> Response:
        search = request.query_params.get("search", "")[:200]
        return JSONResponse({"items": await server.ask(lambda version: page.find(version, search))})

    async def page_query(request: Request) -> Response:
        body = await read_body(request, server.settings)
        answer = await server.ask(lambda version: page.answer(version, body, server.settings))
        return JSONResponse(answer)

    app.add_route("/", index_page)
    app.add_route("/page/model", page_model)
    app.add_route("/page/items", page_items)
    app.add_route("/page/query", page_query, ["POST"])


async def read_body(request: Request, settings: ServeSettings) -> bytes:
    """Reads the body of a request, or refuses it: too long, too slow, or not JSON."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(settings.body_timeout_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= settings.max_body_bytes:
                    body += chunk
                elif size > MAX_DISCARDED * settings.max_body_bytes:
                    break
    except TimeoutError:
        seconds = settings.body_timeout_seconds
        raise HTTPException(408, f"The body did not arrive within {seconds:g} s.", CLOSE) from None
    except ClientDisconnect:
        raise HTTPException(400, "The client left before its body had arrived.") from None
    if size > settings.max_body_bytes:
        most = settings.max_body_bytes
        raise HTTPException(413, f"The body may have {most} bytes (--max-body-bytes).", CLOSE)
    # Any web page can send forms, or bodies without a type, to a server on its reader's machine.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = request.headers.get("content-encoding", "identity")
    if (kind, encoding) != ("application/json", "identity"):
        got = f"{kind!r:.80}, encoding {encoding!r:.80}"
        wanted = "Send plain JSON, with Content-Type: application/json."
        raise HTTPException(415, f"{wanted} Received: {got}")
    return bytes(body)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if message == http.HTTPStatus(error.status_code).phrase:  # The router's own.
        message = f"Malformed request: {request.method} {request.url.path:.200}: {message}"
    if len(message) > 800:  # It quotes something long: what to do may stand at its end.
        message = f"{message[:400]} ... {message[-400:]}"
    return JSONResponse({"error": message}, error.status_code, error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    # Starlette raises the error again for the log; the client gets no details.
    return JSONResponse({"error": "Internal error; the server's log has more."}, 500)


def serve(model: Path, settings: ServeSettings, on_ready: Callable[[str], None]) -> None:
    """Serves a model until SIGTERM or Ctrl-C; calls `on_ready` with the address at the start."""
    server = ModelServer(model, settings)
    with listening(settings.host, settings.port) as listener:
        for number in (signal.SIGTERM, signal.SIGINT):
            # Set before the first load, so that a signal can end it. After it stops, uvicorn raises
            # the signal again, and the default handler would exit with an error.
            signal.signal(number, lambda *arguments: sys.exit(0))
        # The libraries' objects live as long as the process, so garbage collection can skip them.
        gc.collect()
        gc.freeze()
        server.versions.load_first()
        ip, port = listener.getsockname()[:2]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"http://{host}:{port}"
        if not ipaddress.ip_address(ip).is_loopback:
            risk = "is open to the network, without TLS or passwords: put a proxy before it"
            logger.warning("%s %s", address, risk)
        config = uvicorn.Config(
            create_app(server, lambda: on_ready(address)),
            log_config=None,
            access_log=False,
            server_header=False,
            http=Connection,
            ws="none",
            proxy_headers=False,
            timeout_keep_alive=30,
            limit_concurrency=settings.max_connections,
            timeout_graceful_shutdown=settings.shutdown_seconds,
        )
        sys.setswitchinterval(SWITCH_SECONDS)
        Server(config, lambda: server.versions.is_loading).run(sockets=[listener])
