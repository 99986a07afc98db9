"""Measures each stage of a run as its log grows: seconds, memory, training speed.

DuckDB makes clicks of N / 20 users on 200,000 items over thirty days: some users click more than
others, and items' clicks fall with a power of their rank. Each size has a separate process, which
goes through a run's stages: log (read, checked and written), split by time, samples of the training
part (columns included), training (64-d, histories of 50, in-batch, 256 uniform and 256 popular
negatives, batches of 1,024), validation of sampled users against all items.

    memory    peak of each stage, sampled every 20 ms: RssAnon is what the process holds, VmRSS is
              that and the pages of mapped files, which the system may drop
    seconds   wall time, and CPU time, which other jobs on the machine change less
    training  steps a second, and CPU milliseconds a step; then once more in turn with the first
              size, in one process, so that ratios are of one machine at one time

    python benchmarks/scale.py --events 1e6 1e7 1e8 --json benchmarks/results/scale.json
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# Before TensorFlow, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import duckdb
import numpy as np
from record import parser_with_json, write_json
from serving import status_mib

from tfrs_pipeline.data.engines import connect
from tfrs_pipeline.model.fitted_model import query_encoder
from tfrs_pipeline.model.optimizer import make_optimizer
from tfrs_pipeline.search.topk import ExactRetriever

NUM_ITEMS, EVENTS_PER_USER = 200_000, 20
NEGATIVES = (tp.InBatch(), tp.Uniform(256), tp.Popularity(256))
WARM_UP_STEPS = 30
MEMORY = {"rss_anon_gib": "RssAnon", "rss_gib": "VmRSS"}

Stages = dict[str, dict[str, float]]


def make_log(num_events: int, path: Path, memory_limit: str) -> None:
    """Writes the clicks."""
    with duckdb.connect(config={"memory_limit": memory_limit}) as connection:
        connection.execute("SELECT setseed(0.5)")
        connection.execute(
            f"""COPY (
                SELECT
                    1 + ({num_events // EVENTS_PER_USER} * random() ** 1.5)::BIGINT AS user_id,
                    1 + ({NUM_ITEMS - 1} * random() ** 3)::BIGINT AS item_id,
                    TIMESTAMPTZ '2026-01-01 00:00:00Z'
                        + to_microseconds((30 * 86400e6 * random())::BIGINT) AS timestamp
                FROM range({num_events})
            ) TO '{path}' (FORMAT parquet)"""
        )


def resident() -> dict[str, float]:
    """Reads the memory of this process, in GiB."""
    return {name: status_mib(os.getpid(), field) / 1024 for name, field in MEMORY.items()}


@contextlib.contextmanager
def stage(name: str, stages: Stages) -> Iterator[dict[str, float]]:
    """Measures the seconds, CPU seconds and peak memory of what runs within."""
    peak, is_over = resident(), threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            peak.update({name: max(peak[name], gib) for name, gib in resident().items()})

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, cpu_start = time.perf_counter(), time.process_time()
    figures: dict[str, float] = {}
    yield figures
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    is_over.set()
    watcher.join()
    stages[name] = {"seconds": seconds, "cpu_seconds": cpu_seconds, **peak, **figures}
    shown = "  ".join(f"{key} {value:,.2f}" for key, value in stages[name].items())
    print(f"  {name:12} {shown}", flush=True)


def make_network(data: tp.TrainingSet) -> tuple[tp.TwoTowerNetwork, tp.HybridBatches]:
    """Makes the network, compiled, and its batches."""
    model = tp.TwoTower(dim=64, negatives=NEGATIVES)
    network, batches = model.build(data.corpus), model.batches(data.samples)
    network.compile(optimizer=make_optimizer(model.training, 1))
    return network, batches


def fit(network: tp.TwoTowerNetwork, batches: tp.HybridBatches, steps: int) -> dict[str, float]:
    """Trains the next steps, spread over the epoch."""
    done = int(network.optimizer.iterations)
    dataset = batches.dataset(done, steps)
    start, cpu_start = time.perf_counter(), time.process_time()
    network.fit(dataset, steps_per_epoch=steps, verbose=0)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"steps_per_second": steps / seconds, "cpu_ms_per_step": 1000 * cpu_seconds / steps}


def open_duckdb(folder: Path, memory_limit: str) -> Any:
    """Opens a DuckDB whose file lies beside the log, not in the system's temporary folder."""
    tempfile.tempdir = str(folder)
    return connect(memory_limit)


def measure(num_events: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Goes through the stages of a run."""
    stages: Stages = {}
    print(f"{num_events:,} events", flush=True)
    with stage("log", stages):
        log = tp.Log.from_files(
            folder / "clicks.parquet", connection=open_duckdb(folder, options.memory_limit)
        )
        log.write(folder / "log")
    connection = open_duckdb(folder, options.memory_limit)
    with stage("split", stages):
        log = tp.Log.read(folder / "log", connection)
        log.split("time").write(folder / "log" / "split.parquet")
        split = tp.Split.read(log, folder / "log" / "split.parquet")
    with stage("samples", stages):
        data = tp.TrainingSet.build(split.train, folder / "samples", seed=0)
    with stage("training", stages) as figures:
        network, batches = make_network(data)
        fit(network, batches, WARM_UP_STEPS)
        figures |= fit(network, batches, options.steps)
    with stage("validation", stages):
        holdout = split.holdout("validation", options.users)
        corpus = data.corpus
        encoder = query_encoder(network, corpus)
        retriever = ExactRetriever(corpus.candidate_ids.values, network.embed_corpus(), encoder)
        tp.evaluate(retriever, holdout, num_bootstrap=0)
    files = list((folder / "samples" / "columns").iterdir())
    return {
        "num_events": num_events,
        "num_samples": len(data.samples),
        "columns_gib": sum(path.stat().st_size for path in files) / 2**30,
        "parquet_gib": (folder / "clicks.parquet").stat().st_size / 2**30,
        "stages": stages,
    }


def measure_in_turn(folders: Sequence[Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the training of several sizes in turn; ratios are to the first one, by round."""
    trainings = []
    for folder in folders:
        log = tp.Log.read(folder / "log", open_duckdb(folder, options.memory_limit))
        split = tp.Split.read(log, folder / "log" / "split.parquet")
        trainings.append(
            make_network(tp.TrainingSet.build(split.train, folder / "samples", seed=0))
        )
        fit(*trainings[-1], WARM_UP_STEPS)
    rounds = [[fit(*x, options.steps) for x in trainings] for _ in range(options.rounds)]
    found = []
    for place in range(len(folders)):
        figures: dict[str, Any] = {}
        for name in rounds[0][0]:
            values = np.array([of_round[place][name] for of_round in rounds])
            first = np.array([of_round[0][name] for of_round in rounds])
            figures[name] = float(np.median(values))
            figures[f"{name}_to_first"] = float(np.median(values / first))
        found.append(figures)
        print("in turn", "  ".join(f"{name} {x:.2f}" for name, x in figures.items()), flush=True)
    return found


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a fresh process, which leaves no memory behind."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--events", type=lambda text: int(float(text)), nargs="+", required=True)
    parser.add_argument("--memory-limit", default="3GB", help="Of DuckDB (3GB).")
    parser.add_argument("--users", type=int, default=10_000, help="Most queries (10,000).")
    parser.add_argument("--steps", type=int, default=200, help="Training steps a round (200).")
    parser.add_argument("--rounds", type=int, default=3, help="Of what is measured in turn (3).")
    parser.add_argument("--folder", type=Path, help="Where temporary files go.")
    options = parser.parse_args()
    sizes: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folders = [Path(temporary) / str(num_events) for num_events in options.events]
        for num_events, folder in zip(options.events, folders, strict=True):
            folder.mkdir()
            clicks = folder / "clicks.parquet"
            in_own_process(make_log, num_events, clicks, options.memory_limit)
            load = os.getloadavg()[0]
            sizes.append(in_own_process(measure, num_events, folder, options))
            sizes[-1]["load_average"] = load, os.getloadavg()[0]
            in_turn = in_own_process(measure_in_turn, [folders[0], folder], options)
            sizes[-1]["training_in_turn"] = in_turn[-1]
            write_json(options.json, {"sizes": sizes})


if __name__ == "__main__":
    main()
