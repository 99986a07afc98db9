"""Serves an exported model over HTTP, with TensorFlow Serving's REST API.

docs/guides/serving.md describes addresses, requests, limits and use on a network.
"""

import asyncio
import collections
import contextlib
import gc
import hmac
import http
import ipaddress
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import prometheus_client
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tfrs_pipeline.answers.card import model_card
from tfrs_pipeline.answers.explain import explain
from tfrs_pipeline.durable import Damaged, StorageError, try_writing
from tfrs_pipeline.features.encoding import parse_request
from tfrs_pipeline.records.journal import Journal, Watch
from tfrs_pipeline.records.recorder import Recorder
from tfrs_pipeline.records.settings import Lately
from tfrs_pipeline.records.user_events import Answer, Event
from tfrs_pipeline.search.queries import padded_ids
from tfrs_pipeline.service import page, rest
from tfrs_pipeline.service.counters import (
    EVENTS,
    LIVE_UNKNOWN_VALUES,
    RECORDED,
    UNRECORDED,
    WITHOUT_EVENTS,
    count_answers,
    count_click,
)
from tfrs_pipeline.service.request_metrics import CountRequests
from tfrs_pipeline.service.settings import ServeSettings, listening, read_token
from tfrs_pipeline.service.versions import QUICK_SECONDS, ModelVersions, ServedVersion

logger = logging.getLogger(__name__)

CLOSE = {"Connection": "close"}
# Larger requests take turns in a thread of their own, so that small ones need not wait for them.
SMALL_BODY_BYTES = 8_192
SMALL_QUERIES, SMALL_RESULTS = 4, 500
# Seconds after which a thread yields to another. Python's default, 5 ms, equals ten small requests.
SWITCH_SECONDS = 0.0005

T = TypeVar("T")


class ModelServer:
    """A model's versions, and the threads that call them and write its items and events.

    Raises a `StorageError` if it is to write (`token_file`, `record_share`) and the model's folder
    is not writable, and a `ValueError` if the file holds no good token.
    """

    def __init__(self, model: Path, settings: ServeSettings) -> None:
        self.settings = settings
        self.versions = ModelVersions(model, self._load)
        self.threads = ThreadPoolExecutor(settings.num_threads, "requests")
        self.large = ThreadPoolExecutor(1, "large-requests")
        self.watch = Watch()
        # What users did, for queries; the recorder has connections of its own.
        self.journal = Journal(self.versions.folder, self.watch)
        recorder_journal = Journal(self.versions.folder, self.watch, count_click)
        self.recorder = Recorder(recorder_journal, UNRECORDED.inc)
        # One thread, so writes are done one after the other. It may wait for another process.
        self.writes = ThreadPoolExecutor(1, "writes")
        answers, hours = settings.exclude_served_answers, settings.exclude_served_hours
        self._lately = Lately(answers=answers, hours=hours)
        self._token = None if settings.token_file is None else read_token(settings.token_file)
        if self._token is not None or settings.record_share:
            try_writing(self.versions.folder)
            if self.recorder.journal.path.exists():
                self.recorder.journal.write([])  # Refuses a file of another version at the start.

    def _load(self, folder: Path) -> ServedVersion:
        return ServedVersion(folder, self.settings, self.journal)

    def number(self, request: Request) -> str | None:
        """Reads the version in a request's path, None for any; raises a 404 for another model."""
        name = request.path_params["name"]
        if name != self.versions.name:
            known = f"This server serves {self.versions.name!r}."
            raise HTTPException(404, f"Servable not found for request: Latest({name:.80}). {known}")
        return request.path_params.get("version")

    def authorize(self, request: Request) -> None:
        """Refuses a write without the token, and all writes if there is none."""
        if self._token is None:
            message = "This server takes no writes: it was started without --token-file."
            raise HTTPException(403, message)
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        # In constant time, which does not tell how much of the token is right.
        is_right = hmac.compare_digest(token.strip().encode(), self._token)
        if kind.lower() != "bearer" or not is_right:
            message = "Send the token that the server was started with: Authorization: Bearer TOKEN"
            raise HTTPException(401, message, {"WWW-Authenticate": "Bearer"})

    async def ask(self, work: Callable[[ServedVersion], T]) -> T:
        """Does slow work with the version in use, off the event loop."""
        with self.versions.use() as version:
            return await _run(self.large, work, version)

    async def predict(self, request: Request) -> Response:
        """Answers a predict call, off the event loop; large calls take turns."""
        if request.method != "POST":
            raise HTTPException(405, headers={"Allow": "POST"})
        number, body = self.number(request), await read_body(request, self.settings)
        request_id = rest.request_id(request.headers.get("x-request-id"))
        with self.versions.use(number) as version:
            parse, threads = rest.parse_predict, self.large
            if len(body) > SMALL_BODY_BYTES:
                call = await _run(threads, parse, body, version.signatures)
            else:
                call = parse(body, version.signatures)  # Takes less than a change of threads.
                num = call.num_queries
                if num <= SMALL_QUERIES and num * call.k <= SMALL_RESULTS:
                    threads = self.threads
            call, threads = await self._excluding_served(version, call, threads)
            if threads is self.threads and version.is_quick:
                start = time.thread_time()
                answer, outputs = _answer(version, call)
                # A filter may cost more than the query that was timed; it holds up others once.
                version.is_quick = time.thread_time() - start < 10 * QUICK_SECONDS
            else:
                answer, outputs = await _run(threads, _answer, version, call)
        if "user_id" in call.inputs and "candidate_ids" in outputs:
            self._keep(request_id, version.number, call.inputs["user_id"], outputs["candidate_ids"])
        headers = {"X-Request-ID": request_id, "X-Model-Version": str(version.number)}
        if "user_id" in call.inputs and self.watch.unreadable:
            WITHOUT_EVENTS.inc(call.num_queries)
            headers["X-Events"] = "unavailable"
        return Response(answer, media_type="application/json", headers=headers)

    async def explain(self, request: Request) -> Response:
        """Says why an item is in an answer or not; such calls take turns, as large ones do."""
        number, body = self.number(request), await read_body(request, self.settings)
        with self.versions.use(number) as version:
            return JSONResponse(await _run(self.large, explained, version, body, self.settings))

    async def _excluding_served(
        self, version: ServedVersion, call: rest.PredictCall, threads: ThreadPoolExecutor
    ) -> tuple[rest.PredictCall, ThreadPoolExecutor]:
        """Adds what the users were served lately to the items that a call excludes.

        Returns also the threads for the call: with many such items it is no longer small.
        """
        lately = call.exclude_served or self._lately
        if not (lately.answers or lately.hours):
            return call, threads
        # Signatures that only embed have a user, and nothing to exclude from.
        if missing := {"user_id", "exclude"} - call.inputs.keys():
            if call.exclude_served is None:
                return call, threads
            name = max(missing)
            raise rest.bad_request(f"exclude_served: {call.signature!r} has no input {name!r}.")
        if self.settings.record_share < 1:
            raise rest.bad_request(
                "exclude_served: this server does not record all its answers. Start it with "
                "--record-share 1."
            )
        users, most = call.inputs["user_id"].tolist(), self.settings.max_exclude
        lists: list[list[Any]] = [[] for _ in users]
        with contextlib.suppress(Damaged, StorageError):  # The watch notes it.
            lists = await _run(threads, self.recorder.served_lately, users, lately, most)
        if sum(map(len, lists)) > SMALL_RESULTS:
            threads = self.large
        # An earlier model of this name may have had ids of the other type.
        are_text = version.retriever.stored.items.are_text
        # A quarter of the candidates is left, so that no answers, however large, empty the next.
        bound = version.retriever.num_candidates * 3 // 4
        lists = [[id_ for id_ in ids if isinstance(id_, str) == are_text][:bound] for ids in lists]
        served = padded_ids(lists, are_text)
        exclude = np.concatenate([call.inputs["exclude"], served], axis=1)
        return call._replace(inputs=call.inputs | {"exclude": exclude}), threads

    def _keep(self, request_id: str, number: int, users: np.ndarray, items: np.ndarray) -> None:
        """Records what was served, for a share of the requests; the answer does not wait for it."""
        if random.random() < self.settings.record_share:
            milliseconds = time.time_ns() // 1_000_000
            answer = Answer(request_id, milliseconds, number, users, items)
            if self.recorder.keep(answer):
                RECORDED.labels(number).inc(sum(1 for _ in answer.by_query()))
            else:
                UNRECORDED.inc()

    async def items(self, request: Request) -> Response:
        """Adds or removes live items."""
        self.number(request)
        body = await read_body(request, self.settings)
        self.authorize(request)
        is_put = request.method == "PUT"
        return JSONResponse(await _run(self.writes, write_items, self.versions, body, is_put))

    async def events(self, request: Request) -> Response:
        """Records what users did."""
        body = await read_body(request, self.settings)
        self.authorize(request)
        threads = self.large if len(body) > SMALL_BODY_BYTES else self.threads
        read, num_unknown = await _run(threads, read_events, self.versions, body)
        outcome = "refused"
        try:
            with confirming("events"):
                num_new = await asyncio.wrap_future(self.recorder.submit(read))
            outcome = "confirmed"
        finally:
            for type_, num in collections.Counter(event.type for event in read).items():
                EVENTS.labels(type_, outcome).inc(num)
        return JSONResponse({"num_new": num_new, "num_unknown_items": num_unknown})

    async def user(self, request: Request) -> Response:
        """Deletes a user's events and answers."""
        self.authorize(request)
        with self.versions.use() as version, rest.refusing():
            user_id = version.retriever.stored.parse_id(request.path_params["user_id"], "user")
        # A deletion that fails may leave copies of deleted rows in the file.
        with confirming("deletion", "so delete the user again"):
            num_deleted = await asyncio.wrap_future(self.recorder.forget(user_id))
        return JSONResponse({"num_deleted": num_deleted})

    async def model_metadata(self, request: Request) -> Response:
        """Says which signatures a version answers, as TensorFlow Serving does."""
        with self.versions.use(self.number(request)) as version:
            name, number = self.versions.name, str(version.number)
            spec = {"name": name, "signature_name": "", "version": number}
            signatures = {"signature_def": {"signature_def": version.signature_def}}
            return JSONResponse({"model_spec": spec, "metadata": signatures})

    async def model_status(self, request: Request) -> Response:
        """Says in which state each version is."""
        number = self.number(request)
        statuses = [
            {
                "version": str(version),
                "state": state,
                "status": {"error_code": "UNKNOWN" if error else "OK", "error_message": error},
            }
            for version, (state, error) in self.versions.statuses().items()
            if number in (None, str(version))
        ]
        if not statuses:
            raise HTTPException(404, f"Could not find version {number!s:.40} of the model.")
        return JSONResponse({"model_version_status": statuses})

    async def readyz(self, request: Request) -> Response:
        """Says whether the server can answer, and whether events are unavailable."""
        problem = await asyncio.to_thread(self.journal.problem)
        note = "; events are unavailable: users are answered by what the version holds"
        with self.versions.use() as version:
            ready = f"ok: {self.versions.name} version {version.number}{note if problem else ''}\n"
            return PlainTextResponse(ready)

    async def page_model(self, request: Request) -> Response:
        """Describes the model to the page."""
        return JSONResponse(await self.ask(page.card))

    async def page_card(self, request: Request) -> Response:
        """Returns the model card of the version in use."""
        with self.versions.use() as version:
            text = model_card(version.retriever.manifest, version.number)
            return PlainTextResponse(text)  # A browser would save Markdown in place of showing it.

    async def page_items(self, request: Request) -> Response:
        """Finds items for the page."""
        search = request.query_params.get("search", "")[:200]
        return JSONResponse({"items": await self.ask(lambda version: page.find(version, search))})

    async def page_query(self, request: Request) -> Response:
        """Answers a query of the page."""
        body = await read_body(request, self.settings)
        return JSONResponse(await self.ask(lambda version: page.answer(version, body)))

    def routes(self) -> list[Route]:
        """Returns the addresses that the server answers."""
        routes = []
        for address in ("/v1/models/{name}", "/v1/models/{name}/versions/{version}"):
            # For every method, and first: most requests come here, and the last route would take
            # ":predict" for a part of the name.
            predict = Route(f"{address}:predict", self.predict, methods=list(http.HTTPMethod))
            metadata = Route(f"{address}/metadata", self.model_metadata)
            explain = Route(f"{address}:explain", self.explain, methods=["POST"])
            routes += [predict, explain, metadata, Route(address, self.model_status)]
        routes += [
            Route("/v1/models/{name}/items", self.items, methods=["PUT", "DELETE"]),
            Route("/v1/events", self.events, methods=["POST"]),
            Route("/v1/users/{user_id:path}", self.user, methods=["DELETE"]),
            Route("/healthz", healthz),
            Route("/readyz", self.readyz),
            Route("/metrics", prometheus),
        ]
        if self.settings.page:
            routes += [
                Route("/", index_page),
                Route("/page/model", self.page_model),
                Route("/page/card", self.page_card),
                Route("/page/items", self.page_items),
                Route("/page/query", self.page_query, methods=["POST"]),
            ]
        return routes


async def healthz(request: Request) -> Response:
    """Answers while the process runs."""
    return PlainTextResponse("ok\n")


async def prometheus(request: Request) -> Response:
    """Returns the counters."""
    content = prometheus_client.generate_latest()
    return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)


async def index_page(request: Request) -> Response:
    """Returns the page."""
    return FileResponse(page.PAGE_FILE, headers=page.PAGE_HEADERS)


def _answer(version: ServedVersion, call: rest.PredictCall) -> tuple[bytes, dict[str, Any]]:
    """Calls the model; returns the answer in JSON, and the outputs."""
    outputs = version.call(call.signature, call.inputs)
    count_answers(version.number, call.inputs, outputs)
    return rest.format_outputs(outputs, call.is_row_format), outputs


def explained(version: ServedVersion, body: bytes, limits: ServeSettings) -> dict[str, Any]:
    """Answers an explain call, with the version and the explanation in words."""
    call = rest.parse_explain(body, limits).model_dump()
    item_id, user_id, history = (call.pop(name) for name in ("item_id", "user_id", "history"))
    typed = {name: value for name, value in call["request"].items() if isinstance(value, str)}
    with rest.refusing():
        # As the command line reads texts: JSON has no times.
        call["request"] |= parse_request(version.retriever.features["request"], typed)
        # A call has one of them.
        query = {"history": history, "request": call.pop("request")} if user_id is None else None
        why = explain(version.retriever, item_id, user_id=user_id, query=query, **call)
    return {**asdict(why), "words": str(why).split("\n"), "version": version.number}


def write_items(versions: ModelVersions, body: bytes, is_put: bool) -> dict[str, Any]:
    """Adds or removes the items in a body, to and from the version in use."""
    values = rest.parse_items(body, "items" if is_put else "item_ids")
    # A new version has other vectors, so it takes over only after this write.
    with confirming("items"), rest.refusing(), versions.writing, versions.use() as version:
        live = version.retriever.live
        change = live.prepare(values) if is_put else live.prepare(removed=values)
        num_new, num_removed = live.write(change)
        num_items = version.retriever.num_candidates
    counts: dict[str, Any] = {"num_new": num_new} if is_put else {"num_removed": num_removed}
    LIVE_UNKNOWN_VALUES.inc(len(change.notes))
    notes = {"notes": change.notes} if change.notes else {}
    return {**counts, **notes, "num_items": num_items}


@contextlib.contextmanager
def confirming(what: str, state: str = "and nothing has changed") -> Iterator[None]:
    """Answers 503 with the reason if the block cannot put what it writes on disk."""
    try:
        yield
    except (Damaged, OSError) as error:
        if what == "items":  # The watch of the events notes the others.
            logger.error("a write of %s was not confirmed: %s", what, error)
        message = f"The {what} could not be put on disk, {state}: {error}"
        raise HTTPException(503, message, {"Retry-After": "1"}) from None


def read_events(versions: ModelVersions, body: bytes) -> tuple[list[Event], int]:
    """Reads the events in a body; returns them, and how many have an item that is no candidate."""
    values = rest.parse_items(body, "events")
    with versions.use() as version:
        with rest.refusing():
            events = version.retriever.checked_events(values)
        is_known = version.retriever.candidates.has([event.item_id for event in events])
    return events, int((~is_known).sum())


async def _run(threads: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, work, *arguments)


def create_app(server: ModelServer, on_ready: Callable[[], None] = lambda: None) -> Starlette:
    """Makes the ASGI application of a server, for `lifespan` to start once a version is loaded."""
    settings = server.settings

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        stop, watch = threading.Event(), server.versions.watch
        # A loading thread cannot be stopped, and a daemon is not waited for.
        threading.Thread(target=watch, args=(settings.poll_seconds, stop), daemon=True).start()
        on_ready()
        yield
        stop.set()
        for threads in (server.threads, server.large, server.writes):
            threads.shutdown(wait=False, cancel_futures=True)
        server.recorder.close()

    pages: dict[str, Any] = {"allow_origins": settings.allowed_origins}
    pages |= {"allow_methods": ["POST"], "allow_headers": ["Content-Type", "X-Request-ID"]}
    pages["expose_headers"] = ["X-Request-ID", "X-Model-Version"]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    allowed_hosts = (*settings.allowed_hosts, host)
    return Starlette(
        routes=server.routes(),
        middleware=[
            Middleware(CountRequests),
            Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts, www_redirect=False),
            *([Middleware(CORSMiddleware, **pages)] if settings.allowed_origins else []),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _internal_error},
        lifespan=lifespan,
    )


async def read_body(request: Request, settings: ServeSettings) -> bytes:
    """Reads the body of a request, or refuses it: too long, too slow, or not JSON."""
    body, size, most = bytearray(), 0, settings.max_body_bytes
    try:
        async with asyncio.timeout(settings.body_timeout_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    body += chunk
                # A body that is too long is read to its end: a client that is still sending does
                # not read an answer.
    except TimeoutError:
        if size <= most:
            message = f"The body did not arrive within {settings.body_timeout_seconds:g} s."
            raise HTTPException(408, message, CLOSE) from None
    except ClientDisconnect:
        raise HTTPException(400, "The client left before its body had arrived.") from None
    if size > most:
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
        message = f"{request.method} {request.url.path:.200}: {message}"
        if allowed := (error.headers or {}).get("Allow"):
            message += f"; it takes {allowed}"
    if len(message) > 800:  # It quotes a long value. Both ends are kept: the remedy comes last.
        message = f"{message[:400]} ... {message[-400:]}"
    return JSONResponse({"error": message}, error.status_code, error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    # Starlette raises the error again for the log; the client gets no details.
    return JSONResponse({"error": "Internal error; the server's log has more."}, 500)


def serve(model: Path, settings: ServeSettings, on_ready: Callable[[str], None]) -> None:
    """Serves a model until SIGTERM or Ctrl-C; calls `on_ready` with the address at the start.

    At a signal, requests in flight are finished; a second Ctrl-C ends the process at once. Either
    ends it here, with code 0 or 1.
    """
    server = ModelServer(model, settings)
    with listening(settings.host, settings.port) as listener:
        ip, port = listener.getsockname()[:2]
        address = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{port}"
        config = uvicorn.Config(
            create_app(server, lambda: on_ready(address)),
            log_config=None,
            access_log=False,
            server_header=False,
            http="httptools",
            ws="none",
            proxy_headers=False,
            timeout_keep_alive=30,
            # uvicorn refuses requests from this many open connections on.
            limit_concurrency=settings.max_connections + 1,
            timeout_graceful_shutdown=settings.shutdown_seconds,
        )
        running = uvicorn.Server(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            # A signal ends the first load. uvicorn has handlers of its own, and raises the signals
            # that it got again after it has stopped. Python would then wait for threads, and the
            # loading of a version cannot be stopped.
            signal.signal(number, lambda *_: os._exit(int(running.force_exit)))
        # The libraries' objects live as long as the process, so garbage collection can skip them.
        gc.collect()
        gc.freeze()
        server.versions.load_first()
        if not ipaddress.ip_address(ip).is_loopback:
            risk = "is open to the network, without TLS or passwords: put a proxy before it"
            logger.warning("%s %s", address, risk)
        sys.setswitchinterval(SWITCH_SECONDS)
        running.run(sockets=[listener])
