"""Measures the server: time and throughput beside the same calls in process, swaps, memory.

The model has random clusters, 64-d, with a ScaNN index tuned to .95 of the exact top 100. A request
is `retrieve_user` of a random user at k = 100. Clients are connections, from their own process on
this machine, that ask again as soon as they are answered. The numbers of threads run in turn.

    python benchmarks/serving.py --json benchmarks/results/serving.json

With two cores, server and clients have one each: requests a second are a lower bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from record import parser_with_json, write_json

NAME = "clusters"
EMBEDDING_DIM, NUM_CLUSTERS, NUM_USERS, HISTORY_LENGTH = 64, 200, 1000, 20
IN_PROCESS = "in process"
SERVED = {
    "HTTP, 1 thread": ("--num-threads", "1"),
    "HTTP, 2 threads": ("--num-threads", "2"),
    "HTTP, 4 threads": ("--num-threads", "4"),
}


class Clusters:
    """Items in clusters, and users whose histories lie within one each.

    A query's embedding is the mean of its history's; see `tp.Exportable`.
    """

    def __init__(self, num_candidates: int, seed: int) -> None:
        import pyarrow as pa
        import tensorflow as tf

        from tfrs_pipeline.samples.store import RowLists

        rng = np.random.default_rng(seed)
        cluster = rng.integers(0, NUM_CLUSTERS, num_candidates)
        points = rng.normal(size=(NUM_CLUSTERS, EMBEDDING_DIM))[cluster]
        points += 0.5 * rng.normal(size=points.shape)
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        table = np.concatenate([np.zeros((1, EMBEDDING_DIM)), points])
        self.table = tf.Variable(table.astype(np.float32))
        members = [1 + np.flatnonzero(cluster == c).astype(np.int32) for c in range(NUM_CLUSTERS)]
        lists = [np.zeros(0, np.int32)]
        lists += [rng.choice(members[u % NUM_CLUSTERS], HISTORY_LENGTH) for u in range(NUM_USERS)]
        self.histories = RowLists.from_lists(lists)
        self.known_positives = RowLists.from_lists([np.unique(rows) for rows in lists])
        titles = [f"Item {i} of cluster {c}" for i, c in enumerate(cluster.tolist())]
        self.items = pa.table({"item_id": np.arange(num_candidates), "title": titles})

    def exportable(self) -> Any:
        """Gathers what an export asks for."""
        from tfrs_pipeline.model.exportable import Exportable

        return Exportable(
            embed_queries=self.embed_queries,
            embed_candidates=self.embed_candidates,
            variables=[self.table],
            items=self.items,
            query_ids=np.arange(NUM_USERS),
            history_length=HISTORY_LENGTH,
            histories=self.histories,
            known_positives=self.known_positives,
        )

    def embed_queries(self, query_rows: Any, history_rows: Any) -> Any:
        """Embeds queries by their histories."""
        import tensorflow as tf

        mean = tf.reduce_sum(tf.gather(self.table, history_rows), axis=1)
        return tf.math.l2_normalize(mean, axis=1)

    def embed_candidates(self, candidate_rows: Any) -> Any:
        """Looks candidates up."""
        import tensorflow as tf

        return tf.gather(self.table, candidate_rows)


def build_export(directory: Path, num_candidates: int, seed: int) -> Path:
    """Exports items in clusters with a ScaNN index."""
    from tfrs_pipeline.exports.export import export
    from tfrs_pipeline.search.settings import Scann

    model = Clusters(num_candidates, seed)
    index = Scann(recall=0.95)
    return export(model.exportable(), directory / NAME, index=index)


@dataclass
class Figures:
    """Latencies of answered requests, in milliseconds; the number of failures, and the time."""

    latencies_ms: list[float]
    num_failed: int
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Returns p50, p99, requests a second and failures."""
        p50, p99 = np.percentile(self.latencies_ms, [50, 99])
        return {
            "p50_ms": float(p50),
            "p99_ms": float(p99),
            "requests_per_second": len(self.latencies_ms) / self.seconds,
            "num_requests": len(self.latencies_ms),
            "num_failed": self.num_failed,
        }


def in_process(retriever: Any, num_threads: int, seconds: float) -> Figures:
    """Calls a loaded model from threads of this process."""
    latencies: list[float] = []
    until = time.perf_counter() + seconds

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while (start := time.perf_counter()) < until:
            retriever.retrieve_user([int(rng.integers(NUM_USERS))], 100)
            latencies.append(1000 * (time.perf_counter() - start))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(num_threads)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Figures(latencies, 0, time.perf_counter() - start)


def over_http(port: int, num_clients: int, seconds: float) -> Figures:
    """Asks the server from a separate process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        latencies, failed, elapsed = pool.apply(run_clients, (port, num_clients, seconds))
    return Figures(latencies, failed, elapsed)


def run_clients(port: int, num_clients: int, seconds: float) -> tuple[list[float], int, float]:
    """Runs clients until the time is over; returns latencies, failures and seconds."""

    async def client(seed: int, until: float, latencies: list[float]) -> int:
        users = np.random.default_rng(seed).permutation(NUM_USERS).tolist()
        requests = itertools.cycle([request(user) for user in users])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        failed = 0
        while (start := time.perf_counter()) < until:
            writer.write(next(requests))
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
            if head.startswith(b"HTTP/1.1 200 "):
                latencies.append(1000 * (time.perf_counter() - start))
            else:
                failed += 1
        writer.close()
        return failed

    async def run() -> tuple[list[float], int, float]:
        latencies: list[float] = []
        start = time.perf_counter()
        until = start + seconds
        failed = await asyncio.gather(*(client(i, until, latencies) for i in range(num_clients)))
        return latencies, sum(failed), time.perf_counter() - start

    return uvloop.run(run())


def request(user: int) -> bytes:
    """Writes a request, as a client that keeps its connection does."""
    body = json.dumps(
        {
            "signature_name": "retrieve_user",
            "inputs": {"user_id": [user], "exclude": [[]], "k": 100},
        }
    ).encode()
    head = (
        f"POST /v1/models/{NAME}:predict HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@contextlib.contextmanager
def served(model: Path, *flags: str) -> Iterator[tuple[int, int]]:
    """Runs `tfrs-pipeline serve` in a separate process; yields its port and process id."""
    command = [sys.executable, "-m", "tfrs_pipeline.cli", "serve", str(model), "--port", "0"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("serving "):
            raise RuntimeError(f"The server did not start: {line!r}")
        yield int(line.rsplit(":", 1)[1]), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise RuntimeError(f"The server ended with {process.returncode}")


def resident_mib(pid: int) -> float:
    """Reads the resident memory of a process."""
    return status_mib(pid, "VmRSS")


def status_mib(pid: int, field: str) -> float:
    """Reads a size in `/proc/PID/status`."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def measure_latency(
    model: Path, clients: Sequence[int], seconds: float, rounds: int
) -> dict[str, Any]:
    """Measures every way to ask, in turn, so that a busy machine affects all alike."""
    from tfrs_pipeline.service.retriever import load

    retriever = load(model)
    retriever.retrieve_user([1], 100)
    figures: dict[str, dict[int, list[Figures]]] = {
        name: {n: [] for n in clients} for name in (IN_PROCESS, *SERVED)
    }
    with contextlib.ExitStack() as stack:
        ports = {
            name: stack.enter_context(served(model, *flags, "--no-page"))[0]
            for name, flags in SERVED.items()
        }
        for port in ports.values():
            over_http(port, 2, 1)
        for _ in range(rounds):
            for num in clients:
                figures[IN_PROCESS][num].append(in_process(retriever, num, seconds))
                for name, port in ports.items():
                    figures[name][num].append(over_http(port, num, seconds))
    return {
        name: {str(num): _pooled(runs).summary() for num, runs in by_clients.items()}
        for name, by_clients in figures.items()
    }


def _pooled(runs: Sequence[Figures]) -> Figures:
    return Figures(
        [latency for run in runs for latency in run.latencies_ms],
        sum(run.num_failed for run in runs),
        sum(run.seconds for run in runs),
    )


def measure_swaps(model: Path, num_swaps: int, num_clients: int) -> dict[str, Any]:
    """Puts new versions in place while clients ask; the server must follow without a failure."""
    newest = max(int(path.name) for path in model.iterdir())
    memory = []
    with served(model, "--no-page", "--poll-seconds", "0.2") as (port, pid):
        over_http(port, num_clients, 2)
        memory.append(resident_mib(pid))
        context = multiprocessing.get_context("spawn")
        latencies: list[float] = []
        failed = 0
        with context.Pool(1) as pool:
            for version in range(newest + 1, newest + 1 + num_swaps):
                partial = model / f".partial-{version}"
                shutil.copytree(model / str(newest), partial)
                os.rename(partial, model / str(version))
                while _version(port) != version:
                    more, wrong, _ = pool.apply(run_clients, (port, num_clients, 1.0))
                    latencies += more
                    failed += wrong
                memory.append(resident_mib(pid))
                if version - 1 > newest:
                    shutil.rmtree(model / str(version - 1))
    return {
        "num_swaps": num_swaps,
        "num_clients": num_clients,
        "num_requests": len(latencies),
        "num_failed": failed,
        "p99_ms": float(np.percentile(latencies, 99)),
        "resident_mib": {
            "before": memory[0],
            **{f"after {n} swaps": memory[n] for n in (1, num_swaps // 2, num_swaps)},
        },
    }


def _version(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models/{NAME}") as answer:
        statuses = json.load(answer)["model_version_status"]
    return next(int(s["version"]) for s in statuses if s["state"] == "AVAILABLE")


def measure_memory(model: Path, seconds: float, rounds: int) -> dict[str, Any]:
    """Reads the server's memory between rounds of load."""
    with served(model, "--no-page") as (port, pid):
        over_http(port, 8, seconds)
        memory, num_requests = [resident_mib(pid)], 0
        for _ in range(rounds):
            num_requests += len(over_http(port, 8, seconds).latencies_ms)
            memory.append(resident_mib(pid))
    return {"num_requests": num_requests, "resident_mib": [memory[0], memory[-1]]}


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--candidates", type=int, default=100_000)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=3.0, help="Of each run (3).")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--swaps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = build_export(Path(directory), options.candidates, options.seed)
        measured = json.loads((folder / "manifest.json").read_text())["index"]["requests"]
        recall = min(request["recall"] for request in measured)
        print(f"{options.candidates} candidates, index recall {recall:.3f} or more")
        latency = measure_latency(folder, options.clients, options.seconds, options.rounds)
        for name, by_clients in latency.items():
            show(name, by_clients)
        overhead = {
            name: {
                num: latency[name][num]["p50_ms"] / figure["p50_ms"]
                for num, figure in latency[IN_PROCESS].items()
            }
            for name in SERVED
        }
        print(f"p50 over HTTP / in process: {overhead}")
        memory = measure_memory(folder, options.seconds, 5)
        print(f"memory under load: {memory}")
        swaps = measure_swaps(folder.parent, options.swaps, 8)
        print(f"swaps: {swaps}")
    if options.json:
        figures = {
            "num_candidates": options.candidates,
            "least_index_recall": recall,
            "latency": latency,
            "p50_ratio_to_in_process": overhead,
            "memory_under_load": memory,
            "swaps": swaps,
        }
        write_json(options.json, figures, seed=options.seed)


def show(name: str, figures: dict[str, dict[str, Any]]) -> None:
    """Prints a line for each number of clients."""
    for num, figure in figures.items():
        print(
            f"{name:20} {num:>3} clients: p50 {figure['p50_ms']:8.2f} ms, p99 "
            f"{figure['p99_ms']:8.2f} ms, {figure['requests_per_second']:7.0f} requests/s, "
            f"{figure['num_failed']} failed",
            flush=True,
        )


if __name__ == "__main__":
    main()
