"""`tfrs-pipeline serve` as a user runs it: flags, sockets, signals."""

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from tests.service.conftest import Exported
from tests.service.running_server import GOOD, PREDICT, TEXT
from tfrs_pipeline import cli
from tfrs_pipeline.service import server
from tfrs_pipeline.service.settings import ServeSettings


@pytest.fixture(scope="module")
def folder(exported: Exported) -> Path:
    """A model with a ScaNN index, whose op must be loaded in a fresh process."""
    return exported("int", "scann")


@pytest.fixture
def process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tfrs_pipeline.cli", "serve", str(folder), "--port", "0"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield running
    running.kill()
    running.communicate()


def port_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert re.fullmatch(r"serving .* at http://127\.0\.0\.1:\d+\n", line)
    return int(line.rsplit(":", 1)[1])


def begun(port: int, num_bytes: int) -> socket.socket:
    """Opens a connection and sends a request without the end of its body."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    head = (
        f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(TEXT)}\r\n\r\n"
    )
    connection.sendall((head + TEXT[:num_bytes]).encode())
    return connection


def answer_of(connection: socket.socket) -> str:
    """Reads until the server closes the connection."""
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    return data.decode()


def begins_to_stop(port: int) -> None:
    """Waits until new connections are refused."""
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.1)
    raise AssertionError("still listening after 30 s")


@pytest.mark.slow
def test_ctrl_c_answers_what_is_under_way(process: subprocess.Popen[str]) -> None:
    port = port_of(process)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        assert client.post(PREDICT, json=GOOD).status_code == 200
        # A request under way when the signal comes is answered.
        late = begun(port, 20)
        client.get("/healthz")  # The server has read the request's beginning by now.
        process.send_signal(signal.SIGINT)  # The benchmark below sends SIGTERM.
        begins_to_stop(port)
        late.sendall(TEXT[20:].encode())
        text = answer_of(late)
        assert text.startswith("HTTP/1.1 200 ")
        assert len(json.loads(text.partition("\r\n\r\n")[2])["outputs"]["scores"][0]) == 5
    assert process.wait(60) == 0
    assert process.stderr is not None
    log = process.stderr.read()
    assert "films: version 1 in use" in log
    assert "Traceback" not in log


@pytest.mark.nightly
def test_a_second_ctrl_c_ends_it_at_once(process: subprocess.Popen[str]) -> None:
    late = begun(port_of(process), 20)  # One signal would wait for it.
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Traceback" not in log
    late.close()


# Its second version never finishes loading.
LOADS_FOREVER = """
import sys, threading
from tfrs_pipeline import cli
from tfrs_pipeline.service import versions

def load(folder, real=versions.load):
    return real(folder) if folder.name == "1" else threading.Event().wait()

versions.load = load
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_stop_does_not_wait_for_a_version_that_loads(folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(folder, tmp_path / "films"))
    flags = ["serve", str(model), "--port", "0", "--poll-seconds", "0.05"]
    process = subprocess.Popen(
        [sys.executable, "-c", LOADS_FOREVER, *flags], stdout=subprocess.PIPE, text=True
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port_of(process)}", timeout=60) as client:
            shutil.copytree(model / "1", model / "2")
            while "LOADING" not in client.get("/v1/models/films").text:
                time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.nightly
def test_everything_at_once_and_no_good_request_fails() -> None:
    """Runs a short form of the benchmark, which fails if a good request does.

    It has new and broken versions, stops, hostile and slow requests, on many connections.
    """
    script = Path(__file__).parents[2] / "benchmarks" / "mixed_load.py"
    flags = ["--candidates", "2000", "--minutes", "0.25", "--stops", "1"]
    flags += ["--rounds", "0", "--swap-seconds", "2"]
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "'num_failed': 0" in done.stdout


def test_requests_get_503_while_too_many_connections_are_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {x: signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)}
    configs: list[uvicorn.Config] = []
    monkeypatch.setattr(server.ModelVersions, "load_first", lambda self: None)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: configs.append(self.config))
    try:
        server.serve(folder, ServeSettings(port=0, max_connections=2), print)
    finally:
        for x, handler in before.items():
            signal.signal(x, handler)
    configs[0].lifespan = "off"  # It would load versions.
    listener = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(configs[0])
    thread = threading.Thread(target=lambda: asyncio.run(running.serve([listener])))
    thread.start()
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/healthz"
        with httpx.Client() as first, httpx.Client() as second, httpx.Client() as third:
            assert [client.get(url).status_code for client in (first, second)] == [200, 200]
            assert third.get(url).status_code == 503  # And closes the third connection.
            assert [client.get(url).status_code for client in (first, second)] == [200, 200]
    finally:
        running.should_exit = running.force_exit = True
        thread.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_the_first_version_loads_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = {x: signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(server.os, "_exit", sys.exit)  # Which does not end the tests.
    monkeypatch.setattr(
        server.ModelVersions, "load_first", lambda self: signal.raise_signal(number)
    )
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["serve", str(folder), "--port", "0"])
    finally:
        for x, handler in before.items():
            signal.signal(x, handler)
    assert stopped.value.code == 0


def test_a_port_in_use_is_refused_before_a_model_is_loaded(
    folder: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.ModelVersions, "load_first", lambda self: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, err = command("serve", folder, "--port", port)
    assert code == 1
    assert f"Cannot listen on 127.0.0.1, port {port}: Address already in use. Set --port" in err


def test_flags_become_settings(folder: Path, monkeypatch: pytest.MonkeyPatch, command: Any) -> None:
    assert command("serve", folder, "--max-k", "0").code == 2
    code, _, err = command("serve", folder, "--host", "")  # As from an unset variable.
    assert (code, err) == (2, "error: host: got ''; string should have at least 1 character\n")
    got: list[Any] = []
    monkeypatch.setattr(server, "serve", lambda *arguments: got.extend(arguments))
    flags = ["--host", "::1", "--allowed-hosts", "a.example", "*.b.example", "--no-page"]
    assert command("serve", folder, "--max-k", "7", *flags).code == 0
    assert got[0] == folder
    hosts = ("a.example", "*.b.example")
    settings = {name: getattr(got[1], name) for name in ServeSettings.model_fields}
    assert settings == dict(ServeSettings(host="::1", allowed_hosts=hosts, page=False, max_k=7))
