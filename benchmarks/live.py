"""Measures live items: recall and query times while items are replaced, and writes lost to kills.

First, a reader asks one query after the other, without writes and then while `--rate` items a
second are written and as many removed, until `--exchanged` of the corpus is new. Half of the new
items lie in other clusters than the old ones. At twelve moments the recall is measured by k and by
excluded items, against exact search over what is there at that moment. Writes are checked, put on
disk and found by the next search, as in service; only the embedding is looked up. Then a process
that writes items to a copy of `--model` is killed `--kills` times at moments drawn at random. After
each kill the model is loaded: confirmed writes must be there, and what is there must be complete.

    python benchmarks/live.py --model saved_models/movielens --json benchmarks/results/live.json

The corpus is that of `index_libraries.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from index import synthetic
from record import parser_with_json, write_json

from tfrs_pipeline.serving.candidates import Candidates
from tfrs_pipeline.serving.live import LiveItems
from tfrs_pipeline.serving.retriever import LoadedRetriever, load
from tfrs_pipeline.serving.store import STORE_FILE, Store
from tfrs_pipeline.serving.tune import Requests, tune_index

NUM_MOMENTS = 12
KS, EXCLUDED = (10, 100), (0, 100, 1000)
ITEMS_PER_WRITE = 10


class Reader:
    """Asks one query after the other in a thread, until it is stopped."""

    def __init__(self, candidates: Candidates, queries: np.ndarray, k: int) -> None:
        self._candidates, self._queries, self._k = candidates, queries, k
        self._is_stopped = threading.Event()
        self.seconds: list[float] = []
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        number = 0
        while not self._is_stopped.is_set():
            query = self._queries[number % len(self._queries)][np.newaxis]
            start = time.perf_counter()
            self._candidates.search(query, self._k)
            self.seconds.append(time.perf_counter() - start)
            number += 1

    def stop(self) -> dict[str, float]:
        """Stops, and returns the percentiles of the times in microseconds."""
        self._is_stopped.set()
        self._thread.join()
        places = {"p50": 50, "p99": 99, "p99.9": 99.9, "most": 100}
        times = {n: 1e6 * float(np.percentile(self.seconds, p)) for n, p in places.items()}
        return {**times, "num_queries": len(self.seconds)}


def recalls(candidates: Candidates, queries: np.ndarray) -> dict[str, float]:
    """Measures recall by k and by how many of the nearest items are excluded."""
    nearest = candidates.search(queries, max(EXCLUDED), exact=True)[0]
    found = {}
    for k in KS:
        for num in EXCLUDED:
            excluded = [line[:num] for line in nearest]
            here, exact = (
                candidates.search(queries, k, excluded, exact=is_exact)[0]
                for is_exact in (False, True)
            )
            shares = [len(np.intersect1d(a, b)) / k for a, b in zip(here, exact, strict=True)]
            found[f"k {k}, {num} excluded"] = float(np.mean(shares))
    return found


def churn(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Replaces items while a reader asks."""
    num, dim = options.vectors, options.dim
    num_new = round(options.exchanged * num)
    vectors, queries = synthetic(num, dim, 1500, options.seed)
    # Half of the new items are like the old ones, and half elsewhere; so are their queries.
    like, _ = synthetic(num_new // 2, dim, 1, options.seed + 1)
    elsewhere, other_queries = synthetic(num_new - len(like), dim, 100, options.seed + 2)
    rng = np.random.default_rng(options.seed)
    new = rng.permutation(np.concatenate([like, elsewhere]))
    start = time.perf_counter()
    requests = Requests(queries[500:], [np.zeros(0, np.int32)] * 1000)
    tuned = tune_index(vectors, requests, target_recall=options.target_recall)
    print(f"built and tuned in {time.perf_counter() - start:.0f} s", flush=True)
    candidates = Candidates(np.arange(1, num + 1), vectors, tuned.searcher, tuned.levels)

    def embed(ids: Any, columns: Any) -> tuple[np.ndarray, np.ndarray]:
        return new[np.array(ids) - num - 1], np.ones(len(ids), bool)

    live = LiveItems(candidates, Store(folder), 1, (), None, tuned.num_leaves, embed)
    asked = np.concatenate([queries[:100], other_queries])
    moments = [{"exchanged": 0.0, **recalls(candidates, asked)}]
    reader = Reader(candidates, queries[:500], 100)
    time.sleep(options.quiet_seconds)
    alone = reader.stop()
    print("without writes", alone, flush=True)
    gone, write_seconds = rng.permutation(num)[:num_new] + 1, []
    times: list[dict[str, float]] = []
    for moment in np.array_split(np.arange(num_new), NUM_MOMENTS):
        reader = Reader(candidates, queries[:500], 100)
        begin = time.perf_counter()
        for start in range(0, len(moment), ITEMS_PER_WRITE):
            some = moment[start : start + ITEMS_PER_WRITE]
            before = time.perf_counter()
            live.write(live.prepare([{"item_id": int(num + 1 + i)} for i in some]))
            live.write(live.prepare(removed=gone[some].tolist()))
            write_seconds.append(time.perf_counter() - before)
            wait = begin + (start + len(some)) / options.rate - time.perf_counter()
            time.sleep(max(0.0, wait))
        times.append({"rate": len(moment) / (time.perf_counter() - begin), **reader.stop()})
        found = candidates.search(new[moment[-5:]], 1)[0][:, 0]
        assert found.tolist() == [num + 1 + i for i in moment[-5:]], found
        share = (moment[-1] + 1) / num
        moments.append({"exchanged": share, **recalls(candidates, asked)})
        print(times[-1], moments[-1], flush=True)
    return {
        "readers_alone": alone,
        "readers_beside_writes": times,
        "ratio_of_p99": float(np.median([x["p99"] for x in times])) / alone["p99"],
        "write_milliseconds": 1e3 * float(np.median(write_seconds)),
        "items_per_write": ITEMS_PER_WRITE,
        "moments": moments,
        "least_recall": min(v for x in moments for n, v in x.items() if n != "exchanged"),
        "store_mb": (folder / STORE_FILE).stat().st_size / 1e6,
    }


def write_until_killed(model: Path, first: int, confirmed: Connection) -> None:
    """Writes three items at a time, and sends the number of each confirmed write."""
    retriever = load(model)
    for number in range(first, sys.maxsize):
        retriever.upsert(items_of(retriever, number))
        confirmed.send(number)


def items_of(retriever: LoadedRetriever, number: int) -> list[dict[str, Any]]:
    """Makes the items of a write, whose records differ in length."""
    names = [feature.name for feature in retriever.features["candidate"]]
    names += [] if retriever.item_filter is None else [retriever.item_filter["name"]]
    title = f"{number} {'x' * (37 * number % 3000)}"
    return [
        {**dict.fromkeys(names), "item_id": 10**9 + 3 * number + place, "title": title}
        for place in range(3)
    ]


def kills(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Kills a writer again and again; returns how many writes were lost, or half done."""
    rng, model = np.random.default_rng(options.seed), folder / "model"
    shutil.copytree(options.model, model)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([load.__module__])
    confirmed, num_lost, num_half = set[int](), 0, 0
    for _ in range(options.kills):
        receiver, sender = context.Pipe(duplex=False)
        first = max(confirmed, default=-1) + 2  # The write after the last is unknown.
        writer = context.Process(target=write_until_killed, args=(model, first, sender))
        writer.start()
        sender.close()
        confirmed.add(receiver.recv())
        time.sleep(float(rng.uniform(0, 0.2)))
        writer.kill()
        writer.join()
        with contextlib.suppress(EOFError):
            while True:
                confirmed.add(receiver.recv())
        retriever = load(model)
        there = set(retriever.candidate_ids())
        written = {(id_ - 10**9) // 3 for id_ in there if id_ >= 10**9}
        whole = {
            number
            for number in written
            if all(
                item["item_id"] in there and retriever.live.titles[item["item_id"]] == item["title"]
                for item in items_of(retriever, number)
            )
        }
        num_lost += len(confirmed - whole)
        num_half += len(written - whole)
    figures = {
        "kills": options.kills,
        "confirmed_writes": len(confirmed),
        "lost": num_lost,
        "half": num_half,
        "store_mb": (model / STORE_FILE).stat().st_size / 1e6,
    }
    print(figures, flush=True)
    return figures


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--vectors", type=int, default=1_000_000, help="0 leaves this part out.")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1000, help="Items a second.")
    parser.add_argument("--exchanged", type=float, default=0.2, help="A share of the corpus.")
    parser.add_argument("--quiet-seconds", type=float, default=20)
    parser.add_argument("--target-recall", type=float, default=0.98)
    parser.add_argument("--model", type=Path, help="An export with integer ids; is not changed.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        if options.vectors:
            figures["churn"] = churn(options, Path(name))
        if options.model:
            figures["kills"] = kills(options, Path(name))
    if options.json:
        write_json(options.json, figures, seed=options.seed)


if __name__ == "__main__":
    main()
