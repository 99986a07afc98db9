"""Measures the server: time and throughput beside the same calls in process.

The model has random clusters, 64-d, with a ScaNN index tuned to .95 of the exact top 100. A request
is `retrieve_user` of a random user at k = 100. Clients are connections, from their own process on
this machine, that ask again as soon as they are answered. The numbers of threads run in turn.

    python benchmarks/serving.py --json benchmarks/results/serving.json

With two cores, server and clients have one each: requests a second are a lower bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import multiprocessing
import signal
import subprocess
import sys
import tempfile
import threading
import time
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

    A query's embedding is the mean of its history's; see `tp.Exportable`. Users and items have the
    ids 0, 1, ...
    """

    def __init__(
        self,
        num_candidates: int,
        seed: int,
        *,
        num_users: int = NUM_USERS,
        history_length: int = HISTORY_LENGTH,
        dim: int = EMBEDDING_DIM,
    ) -> None:
        import pyarrow as pa
        import tensorflow as tf

        from tfrs_pipeline.samples.store import RowLists

        rng = np.random.default_rng(seed)
        cluster = np.arange(num_candidates) % NUM_CLUSTERS
        points = rng.normal(size=(NUM_CLUSTERS, dim))[cluster]
        points += 0.5 * rng.normal(size=points.shape)
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        table = np.concatenate([np.zeros((1, dim)), points])
        self.table = tf.Variable(table.astype(np.float32))
        shape, num_members = (num_users, history_length), num_candidates // NUM_CLUSTERS
        user_clusters = np.arange(num_users)[:, np.newaxis] % NUM_CLUSTERS
        rows = 1 + user_clusters + NUM_CLUSTERS * rng.integers(num_members, size=shape)
        rows = rows.astype(np.int32)
        # Row 0, the unknown user, has an empty list.
        offsets = np.append(0, history_length * np.arange(num_users + 1))
        self.histories = RowLists(offsets, rows.ravel())
        rows = np.sort(rows, axis=1)
        is_first = np.diff(rows, axis=1, prepend=0) > 0
        self.known_positives = RowLists(offsets, rows.ravel()).where(is_first.ravel())
        self.history_length, self.query_ids = history_length, np.arange(num_users)
        titles = [f"Item {i} of cluster {c}" for i, c in enumerate(cluster.tolist())]
        self.items = pa.table({"item_id": np.arange(num_candidates), "title": titles})

    def exportable(self) -> Any:
        """Gathers what an export asks for."""
        import tfrs_pipeline as tp

        return tp.Exportable(
            embed_queries=self.embed_queries,
            embed_candidates=self.embed_candidates,
            variables=[self.table],
            items=self.items,
            query_ids=self.query_ids,
            history_length=self.history_length,
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
    import tfrs_pipeline as tp

    model = Clusters(num_candidates, seed)
    return tp.export(model.exportable(), directory / NAME, index=tp.Scann(recall=0.95))


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


def run_clients(
    port: int,
    num_clients: int,
    seconds: float,
    *,
    name: str = NAME,
    num_users: int = NUM_USERS,
    k: int = 100,
    most: int | None = None,
) -> tuple[list[float], int, float]:
    """Runs clients of users 0, 1, ... until the time is over, or each has sent `most` requests.

    Returns the latencies of answers, the number of failures, and seconds.
    """

    async def client(seed: int, until: float, latencies: list[float]) -> int:
        users = np.random.default_rng(seed).integers(num_users, size=most or 1000).tolist()
        requests = [request(user, name, k) for user in users]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        failed = 0
        for data in itertools.cycle(requests) if most is None else requests:
            if (start := time.perf_counter()) >= until:
                break
            writer.write(data)
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


def request(user: int, name: str = NAME, k: int = 100) -> bytes:
    """Writes a request, as a client that keeps its connection does."""
    body = json.dumps(
        {
            "signature_name": "retrieve_user",
            "inputs": {"user_id": [user], "exclude": [[]], "k": k},
        }
    ).encode()
    head = (
        f"POST /v1/models/{name}:predict HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Client:
    """A connection to a server of one model, for queries and events."""

    def __init__(self, port: int, name: str, token: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._name, self._token = name, token

    def post(self, path: str, body: Any) -> Any:
        """Posts JSON; returns the JSON of the answer."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"}
        self._connection.request("POST", path, json.dumps(body), headers)
        response = self._connection.getresponse()
        content = json.loads(response.read())
        assert response.status == 200, content
        return content

    def ask(self, user: Any, k: int) -> list[Any]:
        """Returns the best items for a user."""
        inputs = {"user_id": [user], "exclude": [[]], "k": k}
        body = {"signature_name": "retrieve_user", "inputs": inputs}
        answer = self.post(f"/v1/models/{self._name}:predict", body)
        return list(answer["outputs"]["candidate_ids"][0])


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
    import tfrs_pipeline as tp

    retriever = tp.load(model)
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


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--candidates", type=int, default=100_000)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=3.0, help="Of each run (3).")
    parser.add_argument("--rounds", type=int, default=3)
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
    figures = {
        "num_candidates": options.candidates,
        "least_index_recall": recall,
        "latency": latency,
        "p50_ratio_to_in_process": overhead,
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
