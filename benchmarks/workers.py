"""Measures a training step by one process and by several on this machine, with a core each.

The workers talk over loopback. All bytes on it are counted, so nothing else should use it
meanwhile. One machine with as many cores as workers is the worst case for the arithmetic that
workers repeat, and the best for the network: the result is what several workers cost, not how they
scale over machines.

Steps of `fit` with the default mixture on made-up positives, Zipf over the candidates; the median
of the epochs after the first, which is spent on tracing. CPU seconds are those of all workers
together; wall time is reliable only on idle cores.

    python benchmarks/workers.py --json benchmarks/results/workers.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
from record import write_json

from tfrs_pipeline.cluster import this_worker
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.model.corpus import Corpus, TrainingSet
from tfrs_pipeline.model.fit import TrainingResult

NUM_QUERIES, NUM_CANDIDATES = 50_000, 100_000
NUM_EPOCHS = 4
TIMEOUT_S = 500


def parse_args() -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--steps", type=int, default=30, help="of an epoch")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--as-worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def train(folder: Path, batch_size: int, steps: int) -> dict[str, float]:
    """Trains as one of the workers, and measures this one's epochs."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, NUM_CANDIDATES + 1)
    num = batch_size * steps
    samples = tp.Samples.from_pairs(
        rng.integers(1, NUM_QUERIES + 1, num),
        1 + rng.choice(NUM_CANDIDATES, num, p=share / share.sum()),
        num_queries=NUM_QUERIES,
        num_candidates=NUM_CANDIDATES,
    )
    ids = Ids(np.arange(1, NUM_CANDIDATES + 1)), Ids(np.arange(1, NUM_QUERIES + 1))
    training = tp.TrainingSettings(batch_size=batch_size, max_epochs=NUM_EPOCHS)
    model = tp.TwoTower(training=training, dim=64)
    marks = []

    def on_epoch(so_far: TrainingResult) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        marks.append((time.monotonic(), usage.ru_utime + usage.ru_stime, loopback_bytes()))

    model.fit_samples(TrainingSet(samples, Corpus(*ids), {}), folder=folder, on_epoch=on_epoch)
    seconds, cpu, sent = (np.median(np.diff(x)) / steps for x in zip(*marks, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "cpu_seconds": cpu, "loopback_mb": sent / 1e6, "peak_gib": peak}


def loopback_bytes() -> int:
    """Counts the bytes that have passed over loopback."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return 0


def measure(count: int, batch_size: int, steps: int) -> dict[str, float]:
    """Has `count` processes train together, each on a separate core."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{x.getsockname()[1]}" for x in sockets]
    for x in sockets:
        x.close()
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--as-worker", folder]
        command += ["--batch-size", str(batch_size), "--steps", str(steps)]
        workers = []
        for i in range(count):
            cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}}
            environment = {**os.environ, "TF_CONFIG": json.dumps(cluster)}
            pinned = ["taskset", "-c", str(cores[i % len(cores)]), *command]
            workers.append(
                subprocess.Popen(pinned, env=environment, stdout=subprocess.PIPE, text=True)
            )
        try:
            printed = [worker.communicate(timeout=TIMEOUT_S)[0] for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
    measured = [json.loads(lines.splitlines()[-1]) for lines in printed]
    return {
        "seconds": max(x["seconds"] for x in measured),
        "cpu_seconds": sum(x["cpu_seconds"] for x in measured),
        "loopback_mb": measured[0]["loopback_mb"],
        "peak_gib": max(x["peak_gib"] for x in measured),
    }


def main() -> None:
    """Starts the workers, or is one of them."""
    args = parse_args()
    if args.as_worker:
        (batch_size,) = args.batch_size
        figures: dict[str, Any] = train(args.as_worker / "checkpoints", batch_size, args.steps)
        print(json.dumps({"worker": this_worker().number, **figures}), flush=True)
        return
    lines = []
    for batch_size in args.batch_size:
        for count in args.workers:
            line = {"batch_size": batch_size, "workers": count}
            line |= measure(count, batch_size, args.steps)
            line["positives_per_second"] = batch_size / line["seconds"]
            print({name: round(value, 4) for name, value in line.items()}, flush=True)
            lines.append(line)
    if args.json:
        write_json(args.json, {"steps": args.steps, "runs": lines}, seed=0)


if __name__ == "__main__":
    main()
