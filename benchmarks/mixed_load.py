"""Sends a server every kind of request for an hour: no good one may fail, memory must settle.

The load: good requests, small and as large as is allowed; hostile ones; connections that send a
body a byte at a time; live writes; new versions, every fifth of them broken; stops and restarts at
the same port. A client repeats a request if its connection was refused, or closed without a byte of
an answer; any other answer than a 200 is a failure. The writer removes the best items of a user and
puts them back; an answer that holds a removed item, or lacks one that is back, is a failure too.
Before the load, the script measures a small client's latency alone and beside the largest requests,
in turn.

It records two sizes of memory. Resident memory varies with what the allocator has just given back.
Memory for data, all that the process holds, must settle: otherwise something is never freed.

    python benchmarks/mixed_load.py --minutes 60 --json benchmarks/results/mixed_load.json
"""

from __future__ import annotations

import asyncio
import collections
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import parser_with_json, write_json
from serving import (
    NAME,
    NUM_USERS,
    build_export,
    request,
    resident_mib,
    run_clients,
    served,
    status_mib,
)

Counts = collections.Counter[str]


TOKEN = "of-this-benchmark-alone"


def post(body: bytes, content_type: str = "application/json") -> bytes:
    """Writes a request to predict."""
    return http("POST", f"/v1/models/{NAME}:predict", body, content_type)


def http(method: str, path: str, body: bytes, content_type: str, more: str = "") -> bytes:
    """Writes a request."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{more}"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def write_items(method: str, content: Any, token: str = TOKEN) -> bytes:
    """Writes a request that changes live items."""
    body, bearer = json.dumps(content).encode(), f"Authorization: Bearer {token}\r\n"
    return http(method, f"/v1/models/{NAME}/items", body, "application/json", bearer)


def large_requests() -> dict[str, tuple[int, bytes]]:
    """Makes requests at the server's limits, and how many clients send each at once."""
    rng = np.random.default_rng(0)

    def retrieve(num_queries: int, k: int, history: int, exclude: int) -> bytes:
        lists = {"history": history, "exclude": exclude}
        inputs = {n: rng.integers(0, 9999, (num_queries, w)).tolist() for n, w in lists.items()}
        inputs |= {"user_id": [-1] * num_queries, "k": k}
        return post(json.dumps({"signature_name": "retrieve", "inputs": inputs}).encode())

    return {
        "10 queries of k 2,000": (2, retrieve(10, 2000, 20, 0)),
        "64 queries of k 312": (2, retrieve(64, 312, 20, 0)),
        "eight bodies of 200 KB": (8, retrieve(11, 10, 1000, 1900)),
    }


HOSTILE = [
    post(b"[" * 20 + b'"\\' * 90_000),
    post(b"[" * 190_000),
    post(b"x" * 1_000_000),
    post(b'{"inputs": [1e999]}'),
    post(b'{"inputs": [1]}', "text/plain"),
    b"GET /v1/models/%s:predict HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % NAME.encode(),
    b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"\x16\x03\x01 this is no HTTP\r\n\r\n",
    write_items("PUT", {"items": [{"item_id": 1}]}, "no-token"),
    write_items("PUT", {"items": [{"item_id": "text"}]}),
    write_items("PUT", {"items": [{"item_id": 1}, {"item_id": float("nan")}]}),
    write_items("DELETE", {"item_ids": [10**30]}),
]


class Client:
    """A client that keeps its connection."""

    def __init__(self, port: int, counts: Counts) -> None:
        self._port, self._counts = port, counts
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, data: bytes) -> int:
        """Returns the status code of the answer, 0 if it broke off."""
        return (await self.answer(data))[0]

    async def answer(self, data: bytes) -> tuple[int, bytes]:
        """Returns the code and the body of the answer."""
        while True:
            head = b""
            try:
                if self._streams is None:
                    self._streams = await asyncio.open_connection("127.0.0.1", self._port)
                reader, writer = self._streams
                writer.write(data)
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
                body = await reader.readexactly(int(length or 0))
                if b"connection: close" in head.lower():
                    self._close()
                return int(head[9:12]), body
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                self._close()
                if head or getattr(error, "partial", b""):
                    return 0, b""
                self._counts["sent again"] += 1
                await asyncio.sleep(0.02)

    def _close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


def run_load(port: int, seconds: float) -> dict[str, Any]:
    """Runs all kinds of clients until the time is over, in a separate process."""
    until = time.monotonic() + seconds
    counts: Counts = collections.Counter()
    latencies: list[float] = []

    async def small(seed: int) -> None:
        rng, client = np.random.default_rng(seed), Client(port, counts)
        while time.monotonic() < until:
            start = time.perf_counter()
            code = await client.ask(request(int(rng.integers(NUM_USERS))))
            counts["good, 200" if code == 200 else f"failed: small, {code}"] += 1
            latencies.append(1000 * (time.perf_counter() - start))

    async def large() -> None:
        client = Client(port, counts)
        while time.monotonic() < until:
            for _, data in large_requests().values():
                code = await client.ask(data)
                counts["large, 200" if code == 200 else f"failed: large, {code}"] += 1
            await asyncio.sleep(0.2)

    async def hostile() -> None:
        client = Client(port, counts)
        while time.monotonic() < until:
            for data in HOSTILE:
                code = await client.ask(data)
                is_refused = 400 <= code < 500
                counts["hostile, 4xx" if is_refused else f"failed: hostile, {code}"] += 1
            await asyncio.sleep(0.2)

    async def slow() -> None:
        while time.monotonic() < until:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                end = asyncio.create_task(reader.read())
                body = b"x" * 40
                writer.write(post(body)[: -len(body)])
                for byte in body:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(1)
                    if end.done():
                        break
                counts["slow, cut off" if end.done() else "failed: slow, not cut off"] += 1
                writer.close()
                await end
            except ConnectionError:
                await asyncio.sleep(0.5)

    async def writer() -> None:
        rng, client = np.random.default_rng(3), Client(port, counts)

        async def best(user: int) -> list[int]:
            code, body = await client.answer(request(user))
            return json.loads(body)["outputs"]["candidate_ids"][0] if code == 200 else []

        while time.monotonic() < until:
            user = int(rng.integers(NUM_USERS))
            chosen = (await best(user))[:3]
            for method, content in (
                ("DELETE", {"item_ids": chosen}),
                ("PUT", {"items": [{"item_id": i, "title": f"Item {i}"} for i in chosen]}),
            ):
                code = await client.ask(write_items(method, content))
                found = len({*await best(user)} & {*chosen})
                is_right = found == (0 if method == "DELETE" else len(chosen))
                what = "seen" if is_right else f"failed: {method} not seen"
                counts[f"write, {what}" if code == 200 else f"failed: write, {code}"] += 1
            await asyncio.sleep(0.1)

    async def run() -> None:
        quick = [small(0), small(1), small(2), large(), hostile(), writer()]
        await asyncio.gather(*quick, *(slow() for _ in range(20)))

    asyncio.run(run())
    failed = sum(count for what, count in counts.items() if what.startswith("failed"))
    p50, p99 = np.percentile(latencies, [50, 99])
    return {
        "num_failed": failed,
        "counts": dict(counts),
        "p50_ms": float(p50),
        "p99_ms": float(p99),
    }


def neighbours(port: int, rounds: int) -> dict[str, Any]:
    """Measures a small client alone and beside large requests, in turn."""
    context = multiprocessing.get_context("spawn")
    found = {}
    with context.Pool(1) as mine, context.Pool(1) as others:
        for name, (num_clients, data) in large_requests().items():
            p99s = []
            for _ in range(rounds):
                pair = []
                for is_beside in (False, True):
                    beside = others.apply_async(repeat, (port, num_clients, data, 2.5 * is_beside))
                    time.sleep(0.2)
                    latencies, _, _ = mine.apply(run_clients, (port, 1, 2.0))
                    beside.get()
                    pair.append(float(np.percentile(latencies, 99)))
                p99s.append(pair)
            alone, beside_p99 = np.array(p99s).T
            ratio = float(np.median(beside_p99 / alone))
            found[name] = {"p99_ms_alone_and_beside": p99s, "median_ratio": ratio}
            print(f"{name:24} beside / alone, median of p99: {ratio:.2f}", flush=True)
    return found


def repeat(port: int, num_clients: int, data: bytes, seconds: float) -> None:
    """Sends the same request again and again."""
    until = time.monotonic() + seconds

    async def one() -> None:
        client = Client(port, collections.Counter())
        while time.monotonic() < until:
            await client.ask(data)

    async def run() -> None:
        await asyncio.gather(*(one() for _ in range(num_clients)))

    asyncio.run(run())


def start(model: Path, port: int) -> subprocess.Popen[str]:
    """Starts the server and waits until it serves."""
    command = [sys.executable, "-m", "tfrs_pipeline.cli", "serve", str(model), "--no-page"]
    (token := model.parent / "token").write_text(TOKEN)
    token.chmod(0o600)
    flags = ["--port", str(port), "--poll-seconds", "0.2", "--token-file", str(token)]
    process = subprocess.Popen(
        [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    if not process.stdout.readline().startswith("serving "):
        raise RuntimeError("The server did not start.")
    return process


def stop(process: subprocess.Popen[str]) -> None:
    """Stops the server."""
    process.send_signal(signal.SIGTERM)
    if process.wait(300) != 0:  # It takes seconds, unless the machine is busy.
        raise RuntimeError(f"The server ended with {process.returncode}")


def measure(model: Path, minutes: float, num_stops: int, swap_seconds: float) -> dict[str, Any]:
    """Loads a server while its versions change and it is stopped and started again."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start(model, port)
    seconds, num_swaps = 60 * minutes, 0
    resident, data = [[resident_mib(process.pid)]], [[status_mib(process.pid, "VmData")]]
    begin = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        load = pool.apply_async(run_load, (port, seconds))
        version = 1
        while not load.ready():
            is_due = (time.monotonic() - begin) / seconds > len(resident) / (num_stops + 1)
            if is_due and len(resident) <= num_stops:
                stop(process)
                process = start(model, port)
                resident.append([])
                data.append([])
            version, num_swaps = version + 1, num_swaps + 1
            put(model, version, is_broken=num_swaps % 5 == 0)
            time.sleep(swap_seconds)
            resident[-1].append(resident_mib(process.pid))
            data[-1].append(status_mib(process.pid, "VmData"))
        figures = load.get()
    stop(process)
    return {
        **figures,
        "minutes": minutes,
        "num_versions": num_swaps,
        "num_broken_versions": num_swaps // 5,
        "num_stops": len(resident),
        "resident_mib_of_each_process": resident,
        "data_mib_of_each_process": data,
    }


def put(model: Path, version: int, *, is_broken: bool) -> None:
    """Puts a copy of the first version in place, and removes versions that nothing needs."""
    partial = model / f".partial-{version}"
    shutil.copytree(model / "1", partial, copy_function=os.link)
    if is_broken:
        (partial / "saved_model.pb").unlink()
        (partial / "saved_model.pb").write_bytes(b"not a model")
    os.rename(partial, model / str(version))
    for path in model.iterdir():
        if path.name.isdigit() and 1 < int(path.name) < version - 2:
            shutil.rmtree(path)


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--candidates", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--stops", type=int, default=2, help="Besides the last one (2).")
    parser.add_argument("--swap-seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5, help="Of a client alone and beside (5).")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = build_export(Path(directory), options.candidates, 0).parent
        ratios = {}
        if options.rounds:
            with served(model, "--no-page") as (port, _):
                ratios = neighbours(port, options.rounds)
        load = measure(model, options.minutes, options.stops, options.swap_seconds)
    print({key: value for key, value in load.items() if "mib" not in key})
    for kind in ("resident", "data"):
        for number, process in enumerate(load[f"{kind}_mib_of_each_process"], 1):
            print(
                f"{kind}, process {number}: {', '.join(f'{mib:.0f}' for mib in process[::5])} MiB"
            )
    figures = {"num_candidates": options.candidates, "neighbours": ratios, "load": load}
    write_json(options.json, figures, seed=0)
    if load["num_failed"]:
        raise SystemExit(f"{load['num_failed']} requests failed")


if __name__ == "__main__":
    main()
