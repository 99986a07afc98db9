"""Measures `refresh-index`, and the rebuild of an index in service, for a given number of items.

The model of `serving.py` is exported with exact search. `refresh-index` gives it the same items
with a ScaNN index, in a separate process. The new version is loaded. Its index is then built anew,
as for live items that have drifted, while a reader keeps asking for the best 100.

    python benchmarks/refresh.py --items 1000000 --json benchmarks/results/refresh_1m.json

CPU time includes child processes; memory is the largest process's.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from live import Reader
from record import parser_with_json, spent, write_json
from serving import NAME, Clusters

from tfrs_pipeline.exports.export import export
from tfrs_pipeline.search.searcher import build_in_subprocess
from tfrs_pipeline.search.settings import Exact
from tfrs_pipeline.service.retriever import load


def refresh(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Exports the model, and refreshes it in a separate process; returns what that took."""
    model = Clusters(options.items, options.seed)
    export(model.exportable(), folder / NAME, index=Exact())
    items = folder / "items.parquet"
    pq.write_table(model.items, items)
    # In Python, because the command keeps the exact search of the version before.
    script = (
        "import sys, tfrs_pipeline as tp\n"
        "tp.refresh_index(sys.argv[1], sys.argv[2], index=tp.Scann(recall=float(sys.argv[3])))"
    )
    command = [sys.executable, "-c", script, str(folder / NAME), str(items)]
    command += [str(options.target_recall)]
    return spent(command)


def rebuild(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Loads the newest version, and builds its index anew while a reader asks."""
    start = time.process_time()
    retriever = load(folder / NAME)
    loaded = time.process_time() - start
    index, candidates = retriever.manifest["index"], retriever.candidates
    rng = np.random.default_rng(options.seed)
    queries = candidates.ids_and_vectors()[1][rng.choice(options.items, 500)]
    reader = Reader(candidates, queries, 100)
    time.sleep(10)
    alone = reader.stop()
    reader, before = Reader(candidates, queries, 100), _children_seconds()
    start = time.perf_counter()
    candidates.rebuild(lambda vectors: build_in_subprocess(vectors, index["num_leaves"]))
    seconds = time.perf_counter() - start
    return {
        "load_cpu_seconds": loaded,
        "num_leaves": index["num_leaves"],
        "least_recall": min(request["recall"] for request in index["requests"]),
        "readers_alone": alone,
        "rebuild_seconds": seconds,
        "rebuild_cpu_seconds_of_the_child": _children_seconds() - before,
        "readers_beside_the_rebuild": reader.stop(),
    }


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--target-recall", type=float, default=0.98)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = {"num_items": options.items, "refresh": refresh(Path(name), options)}
        figures["rebuild"] = rebuild(Path(name), options)
    print(json.dumps(figures, indent=1))
    if options.json:
        write_json(options.json, figures, seed=options.seed)


if __name__ == "__main__":
    main()
