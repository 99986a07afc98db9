"""A server on a free port of this machine, in a thread of this process."""

import functools
import socket
import threading
import time
from pathlib import Path

import uvicorn

from tfrs_pipeline.serving.server import ModelServer, create_app
from tfrs_pipeline.serving.settings import ServeSettings


@functools.cache
def address_of(model: Path) -> str:
    """Serves a model until the tests end; returns its URL."""
    server = ModelServer(model, ServeSettings(page=False))
    server.versions.load_first()
    listener = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(create_app(server), log_config=None))
    threading.Thread(
        target=running.run, kwargs={"sockets": [listener]}, daemon=True, name="server"
    ).start()
    while not running.started:
        time.sleep(0.01)
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1/models/{model.name}"
