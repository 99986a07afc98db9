"""The settings of the server; without TensorFlow, because the command line's help needs them."""

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import Field, PositiveFloat, PositiveInt

from tfrs_pipeline.durable import naming
from tfrs_pipeline.records.settings import MAX_ANSWERS
from tfrs_pipeline.settings import Config

Port: TypeAlias = Annotated[int, Field(ge=0, le=65535)]
HostName: TypeAlias = Annotated[str, Field(pattern=r"^(\*|(\*\.)?[^*]+)$")]


class ServeSettings(Config):
    """How a model is served; limits on a request hold for each one separately."""

    host: str = Field("127.0.0.1", min_length=1)  # An empty one would be every address.
    """Address to listen on. Any address but this machine's own opens the server to a network,
    without TLS or passwords: see docs/guides/serving.md."""
    port: Port = 8501
    """Port to listen on; 0 takes a free one."""
    allowed_hosts: tuple[HostName, ...] = ("localhost", "127.0.0.1")
    """Names that requests may have in their Host header, besides the address that the server
    listens on; *.example.com allows all names below it, * any. Keeps other web pages out."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages that may ask this server from a browser, by origin, such as https://shop.example;
    * is any. They may not write: no page can hold the token without showing it to its readers."""
    poll_seconds: PositiveFloat = 2.0
    """Seconds between checks for a new version, and for items that other processes have written."""
    token_file: Path | None = None
    """File with a token, of 16 characters or more, whose holders may add and remove items
    (PUT and DELETE /v1/models/NAME/items), send events (POST /v1/events) and delete a user's
    (DELETE /v1/users/ID). Without it nobody may."""
    record_share: float = Field(0.0, ge=0, le=1)
    """Share of the answers to users that is recorded, with items and ranks, for `tfrs-pipeline
    log`; 0 records none."""
    exclude_served_answers: int = Field(0, ge=0, le=MAX_ANSWERS)
    """Leaves out of an answer to a user the items of this many answers before it: of each the first
    100, and in all `max_exclude` or three quarters of the candidates at most, those of the newest
    answers first. Needs --record-share 1. `exclude_served` of a request replaces it."""
    exclude_served_hours: float = Field(0.0, ge=0)
    """Leaves out of an answer to a user the items of all answers in this many hours before it, of
    the last 1,000 at most, within the same bounds. Needs --record-share 1. `exclude_served` of a
    request replaces it."""
    page: bool = True
    """Whether to serve the page at /, which compares the index with exact search."""
    # More contend for the interpreter's lock: with 4 on two cores, p99 is a fifth higher.
    num_threads: PositiveInt = 2
    """How many small requests are answered at the same time. Larger ones take turns in one more
    thread, so that they do not hold up the others."""
    max_body_bytes: PositiveInt = 200_000
    """Longest request body, in bytes."""
    body_timeout_seconds: PositiveFloat = 10.0
    """Seconds within which a request body must arrive."""
    max_k: PositiveInt = 2_000
    """Largest k of a request."""
    max_queries: PositiveInt = 64
    """Most queries in a request."""
    max_results: PositiveInt = 20_000
    """Most results in a request: its queries times k."""
    max_exclude: PositiveInt = 2_000
    """Longest list of items to exclude, and of values to filter by, per query; also the most items
    that are left out because they were served lately."""
    max_history: PositiveInt = 1_000
    """Longest history in a query; the model uses its most recent part."""
    max_connections: PositiveInt = 1_000
    """Most open connections; while there are more, every request gets a 503."""
    shutdown_seconds: PositiveInt = 20
    """Seconds that requests in flight have to finish after a signal to stop."""

    def _problems(self) -> Iterator[tuple[str, str]]:
        for name in ("exclude_served_answers", "exclude_served_hours"):
            if (value := getattr(self, name)) and self.record_share < 1:
                message = "only recorded answers can be left out: set record_share to 1"
                yield name, f"got {value} with record_share {self.record_share}; {message}"


def read_token(path: Path) -> bytes:
    """Reads a token, or raises a `ValueError` if it is missing or too easy to guess."""
    remedy = f"`openssl rand -hex 32 > {path}` writes one."
    with naming(path):
        if not path.exists():
            raise ValueError(f"There is no token file {path}. {remedy}")
        token = path.read_text(encoding="utf-8", errors="replace").strip()
    if len(token) < 16 or not token.isascii() or any(map(str.isspace, token)):
        raise ValueError(
            f"{path} must hold a token of 16 or more ASCII characters, on one line. {remedy}"
        )
    return token.encode()


def listening(host: str, port: int) -> socket.socket:
    """Binds the address before a model is loaded, so that one in use is refused at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        number = max(error.errno or 0, 0)  # Below 0 if the host is unknown.
        reason = os.strerror(number) if number else str(error.strerror).partition(" (")[0]
        remedy = "--port to another one, or to 0 for a free one"
        if number in (0, errno.EADDRNOTAVAIL):
            remedy = "--host to an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all"
        raise OSError(f"Cannot listen on {host}, port {port}: {reason}. Set {remedy}.") from error
    # Connections inherit this option, which asyncio sets only if a protocol is named. Without it an
    # answer's body waits 40 ms for the client to acknowledge the headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
