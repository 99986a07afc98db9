"""Compares search structures at one recall: build time, time per query, size.

Each structure is searched widely enough to find .98 of the exact top 100. Half of the queries
choose the setting; it must reach the target on the other half, whose recall is shown. Without
`--embeddings` the corpus is synthetic: unit vectors in 1,000 overlapping clusters, whose spread
falls from dimension to dimension as in learned embeddings. The queries are drawn in the same way.

    pip install faiss-cpu==1.15.1 hnswlib==0.8.0
    python benchmarks/index_libraries.py --json benchmarks/results/index_libraries.json
    python benchmarks/index_libraries.py --embeddings vectors.npz

Only this script needs the two libraries; without them it measures the rest. Each structure has its
own process. Searches use one thread, builds all cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from record import write_json

from tfrs_pipeline.evaluation.results import format_cells

NUM_CLUSTERS = 1000
Search = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Task:
    """What every structure is measured on.

    Args:
        folder: Holds candidates.npy and queries.npy, float32, and exact.npy, the places of the
            `k` best candidates of each query.
        k: Neighbours to find.
        target_recall: Recall target.
    """

    folder: Path
    k: int
    target_recall: float

    def load(self, name: str) -> np.ndarray:
        """Reads an array."""
        return np.load(self.folder / f"{name}.npy")

    def recalls(self, search: Search) -> tuple[float, float]:
        """Returns the recall on the half that chooses, and on the half that is held out."""
        queries, exact = self.load("queries"), self.load("exact")
        found = np.concatenate([search(block) for block in np.array_split(queries, 16)])
        hits = np.array([len(np.intersect1d(a, b)) for a, b in zip(found, exact, strict=True)])
        tuning, held_out = (float(hits[half::2].mean()) / self.k for half in (0, 1))
        return tuning, held_out

    def smallest(self, most: int, search_at: Callable[[int], Search], least: int = 1) -> int | None:
        """Finds the smallest value of a knob, up to `most`, that reaches the recall target."""

        def keeps(value: int) -> bool:
            return min(self.recalls(search_at(value))) >= self.target_recall

        low, high = least - 1, least
        while not keeps(high):
            if high == most:
                return None
            low, high = high, min(2 * high, most)
        # To within 1%; recall nearly always rises with the knob.
        while high - low > max(1, high // 100):
            middle = (low + high) // 2
            low, high = (low, middle) if keeps(middle) else (middle, high)
        return high

    def microseconds(self, search: Search, batch_size: int, num_calls: int) -> float:
        """Returns the median time per held-out query, in calls of `batch_size`."""
        queries = self.load("queries")[1::2]
        rows = np.resize(np.arange(len(queries)), (num_calls, batch_size))
        search(queries[:batch_size])
        seconds = []
        for batch in (np.ascontiguousarray(queries[row]) for row in rows):
            start = time.perf_counter()
            search(batch)
            seconds.append(time.perf_counter() - start)
        return 1e6 * float(np.median(seconds)) / batch_size

    def measure(
        self, name: str, search: Search, build_seconds: float, num_bytes: int, **settings: Any
    ) -> dict[str, Any]:
        """Returns the figures of a structure that is set to reach the recall target."""
        return {
            "index": name,
            "recall": self.recalls(search)[1],
            "build_seconds": build_seconds,
            "microseconds_batch_1": self.microseconds(search, 1, 300),
            "microseconds_batch_64": self.microseconds(search, 64, 30),
            "index_mb": num_bytes / 1e6,
            "settings": settings,
        }


def measure_exact(task: Task) -> list[dict[str, Any]]:
    """Scores every candidate, in TensorFlow."""
    tf = _tensorflow_of_one_thread()
    from tfrs_pipeline.serving.graph_index import ExactIndex

    candidates = task.load("candidates")
    start = time.perf_counter()
    index = ExactIndex(candidates)
    seconds = time.perf_counter() - start
    nothing = tf.zeros([1, 0], tf.int32)
    search = _compiled(tf, lambda q, k: index.search(q, k, nothing), task.k)
    return [task.measure("exact, TensorFlow", search, seconds, candidates.nbytes)]


def measure_scann(task: Task) -> list[dict[str, Any]]:
    """Tunes this project's index; measures its search, and ScaNN's operation in TensorFlow."""
    tf = _tensorflow_of_one_thread()
    from tfrs_pipeline.serving.graph_index import ExactIndex, ScannIndex
    from tfrs_pipeline.serving.searcher import Searcher
    from tfrs_pipeline.serving.tune import Requests, tune_index

    vectors, queries = task.load("candidates"), task.load("queries")
    start = time.perf_counter()
    requests = Requests(queries[::2], [np.zeros(0, np.int32)] * len(queries[::2]))
    index = tune_index(vectors, requests, target_recall=task.target_recall)
    tuning_seconds = time.perf_counter() - start
    level = next(level for level in index.levels if level.depth >= task.k)
    start = time.perf_counter()
    Searcher.build(vectors, index.num_leaves)
    build_seconds = time.perf_counter() - start
    saved, candidates = task.folder / "scann", index.candidates(vectors)
    index.searcher.save(saved)
    num_bytes = sum(path.stat().st_size for path in saved.iterdir())  # The vectors too.
    settings = {"num_leaves": index.num_leaves, **asdict(level)}
    own = task.measure(
        "ScaNN, this package",
        lambda q: candidates.search(q, task.k)[0] - 1,
        build_seconds,
        num_bytes,
        **settings,
    )
    own["tuning_seconds"] = tuning_seconds
    graph = ScannIndex(ExactIndex(vectors), saved, index.levels)
    operation = task.measure(
        "ScaNN, TensorFlow",
        _compiled(
            tf, lambda q, k: graph.search(q, k, tf.zeros([tf.shape(q)[0], 0], tf.int32)), task.k
        ),
        build_seconds,
        num_bytes,
        **settings,
    )
    return [own, operation]


def _tensorflow_of_one_thread() -> Any:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    return tf


def _compiled(tf: Any, find: Any, k: int) -> Search:
    search = tf.function(
        lambda q: find(q, k), input_signature=[tf.TensorSpec([None, None], tf.float32)]
    )

    def found(queries: np.ndarray) -> np.ndarray:
        return search(queries)[0].numpy() - 1

    return found


def measure_faiss_flat(task: Task) -> list[dict[str, Any]]:
    """Scores every candidate, in faiss."""
    import faiss

    candidates = task.load("candidates")
    index = faiss.IndexFlatIP(candidates.shape[1])
    seconds = _build(faiss, index, candidates)
    return [
        task.measure(
            "exact, faiss", lambda q: index.search(q, task.k)[1], seconds, candidates.nbytes
        )
    ]


def measure_faiss_ivf_flat(task: Task) -> list[dict[str, Any]]:
    """Tunes how many lists of an inverted file are searched."""
    import faiss

    candidates = task.load("candidates")
    num_lists = 4 * round(math.sqrt(len(candidates)))
    index = faiss.index_factory(
        candidates.shape[1], f"IVF{num_lists},Flat", faiss.METRIC_INNER_PRODUCT
    )
    seconds = _build(faiss, index, candidates)

    def search_at(num_lists_to_search: int) -> Search:
        def search(queries: np.ndarray) -> np.ndarray:
            index.nprobe = num_lists_to_search
            return index.search(queries, task.k)[1]

        return search

    searched = task.smallest(num_lists, search_at)
    assert searched is not None  # All lists are all candidates.
    size = len(faiss.serialize_index(index))
    return [
        task.measure(
            "faiss IVF-Flat",
            search_at(searched),
            seconds,
            size,
            num_lists=num_lists,
            num_lists_to_search=searched,
        )
    ]


def measure_faiss_ivf_pq(task: Task) -> list[dict[str, Any]]:
    """Tunes lists to search and candidates to rescore in an inverted file of 4-bit codes."""
    import faiss

    candidates = task.load("candidates")
    dim = candidates.shape[1]
    num_lists, blocks = 4 * round(math.sqrt(len(candidates))), dim // 2 if dim % 2 == 0 else dim
    factory = f"IVF{num_lists},PQ{blocks}x4fsr,RFlat"
    index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    seconds = _build(faiss, index, candidates)
    ivf = faiss.extract_index_ivf(index)

    def search_at(num_lists_to_search: int, over_k: int) -> Search:
        def search(queries: np.ndarray) -> np.ndarray:
            ivf.nprobe, index.k_factor = num_lists_to_search, over_k
            return index.search(queries, task.k)[1]

        return search

    tried = []
    for over_k in (1, 2, 3, 5, 10, 20):
        searched = task.smallest(num_lists, lambda n, over_k=over_k: search_at(n, over_k))
        if searched is not None:
            cost = task.microseconds(search_at(searched, over_k), 16, 50)
            tried.append((cost, searched, over_k))
    if not tried:
        return [
            {"index": "faiss IVF-PQ, refined", "missing": f"recall below the target: {factory}"}
        ]
    _, searched, over_k = min(tried)
    return [
        task.measure(
            "faiss IVF-PQ, refined",
            search_at(searched, over_k),
            seconds,
            len(faiss.serialize_index(index)),
            factory=factory,
            num_lists_to_search=searched,
            num_reordered=over_k * task.k,
        )
    ]


def _build(faiss: Any, index: Any, candidates: np.ndarray) -> float:
    """Trains and fills an index on all cores, and leaves faiss one thread for searches."""
    faiss.omp_set_num_threads(multiprocessing.cpu_count())
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        # The default takes five times as long and finds hardly more.
        ivf.cp.max_points_per_centroid, ivf.cp.niter = 50, 10
    start = time.perf_counter()
    index.train(candidates)
    index.add(candidates)
    seconds = time.perf_counter() - start
    faiss.omp_set_num_threads(1)
    return seconds


def measure_faiss_hnsw(task: Task) -> list[dict[str, Any]]:
    """Tunes the width of the search in faiss's graph."""
    import faiss

    candidates = task.load("candidates")
    index = faiss.IndexHNSWFlat(candidates.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 100
    seconds = _build(faiss, index, candidates)

    def search_at(width: int) -> Search:
        def search(queries: np.ndarray) -> np.ndarray:
            index.hnsw.efSearch = width
            return index.search(queries, task.k)[1]

        return search

    width = task.smallest(len(candidates) // 10, search_at, least=task.k)
    if width is None:
        return [{"index": "faiss HNSW", "missing": "recall below the target at any width"}]
    return [
        task.measure(
            "faiss HNSW",
            search_at(width),
            seconds,
            len(faiss.serialize_index(index)),
            num_links=16,
            construction_width=100,
            search_width=width,
        )
    ]


def measure_hnswlib(task: Task) -> list[dict[str, Any]]:
    """Tunes the width of the search in hnswlib's graph."""
    import hnswlib

    candidates = task.load("candidates")
    index = hnswlib.Index(space="ip", dim=candidates.shape[1])
    start = time.perf_counter()
    index.init_index(max_elements=len(candidates), M=16, ef_construction=100, random_seed=0)
    index.add_items(candidates, num_threads=multiprocessing.cpu_count())
    seconds = time.perf_counter() - start
    index.set_num_threads(1)

    def search_at(width: int) -> Search:
        def search(queries: np.ndarray) -> np.ndarray:
            index.set_ef(width)
            return index.knn_query(queries, task.k)[0].astype(np.int64)

        return search

    width = task.smallest(len(candidates) // 10, search_at, least=task.k)
    if width is None:
        return [{"index": "hnswlib", "missing": "recall below the target at any width"}]
    return [
        task.measure(
            "hnswlib",
            search_at(width),
            seconds,
            index.index_file_size(),
            num_links=16,
            construction_width=100,
            search_width=width,
        )
    ]


INDEXES = {
    "exact": measure_exact,
    "faiss-exact": measure_faiss_flat,
    "scann": measure_scann,
    "faiss-ivf-flat": measure_faiss_ivf_flat,
    "faiss-ivf-pq": measure_faiss_ivf_pq,
    "faiss-hnsw": measure_faiss_hnsw,
    "hnswlib": measure_hnswlib,
}


def synthetic(num_vectors: int, dim: int, num_queries: int, seed: int) -> Iterator[np.ndarray]:
    """Draws candidates and queries, [num, dim] float32 unit vectors, from the same clusters."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((NUM_CLUSTERS, dim), dtype=np.float32)
    spread = np.sqrt(1 / np.arange(1, dim + 1, dtype=np.float32))
    for num in (num_vectors, num_queries):
        points = rng.standard_normal((num, dim), dtype=np.float32)
        points += centres[rng.integers(0, NUM_CLUSTERS, num)]
        points *= spread
        yield points / np.linalg.norm(points, axis=1, keepdims=True)


def exact_places(candidates: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Returns [num_queries, k] places of the best, in no order."""
    blocks = np.array_split(queries, -(-len(queries) // 16))
    return np.concatenate(
        [np.argpartition(block @ candidates.T, -k, axis=1)[:, -k:] for block in blocks]
    )


def measure_apart(measure: Callable[[Task], list[dict[str, Any]]], task: Task) -> list[Any]:
    """Measures in a separate process, so that the libraries' threads do not interfere."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(measure, task).result()
    except ImportError as error:
        name = measure.__name__.removeprefix("measure_")
        message = f"{error}: pip install faiss-cpu==1.15.1 hnswlib==0.8.0"
        return [{"index": name, "missing": message}]


def show(results: list[dict[str, Any]]) -> None:
    """Prints a line for each structure."""
    measured = [result for result in results if "missing" not in result]
    lines = [["index", "recall", "build s", "us, 1 a call", "us, 64 a call", "MB"]]
    for result in measured:
        lines.append(
            [
                result["index"],
                f"{result['recall']:.4f}",
                f"{result['build_seconds']:.1f}",
                f"{result['microseconds_batch_1']:.0f}",
                f"{result['microseconds_batch_64']:.0f}",
                f"{result['index_mb']:.0f}",
            ]
        )
    print(format_cells(lines), flush=True)
    for result in results:
        if "missing" in result:
            print(f"{result['index']}: {result['missing']}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=int, default=1_000_000, help="Of the synthetic corpus.")
    parser.add_argument("--dim", type=int, default=64, help="Of the synthetic corpus.")
    parser.add_argument("--queries", type=int, default=1000, help="Both halves together.")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--target-recall", type=float, default=0.98)
    parser.add_argument("--indexes", nargs="+", choices=INDEXES, default=list(INDEXES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--embeddings",
        type=Path,
        metavar="FILE",
        help="A model's: an .npz of `candidates` and `queries`, [num, dim] float32.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Where to write the figures.")
    options = parser.parse_args()
    if options.embeddings:
        with np.load(options.embeddings) as file:
            arrays = [file[name].astype(np.float32) for name in ("candidates", "queries")]
        candidates, queries = arrays[0], arrays[1][: options.queries]
    else:
        candidates, queries = synthetic(options.vectors, options.dim, options.queries, options.seed)
    with tempfile.TemporaryDirectory() as directory:
        task = Task(Path(directory), options.k, options.target_recall)
        exact = exact_places(candidates, queries, options.k)
        for name, array in (("candidates", candidates), ("queries", queries), ("exact", exact)):
            np.save(task.folder / f"{name}.npy", array)
        results = []
        for name in options.indexes:
            results += measure_apart(INDEXES[name], task)
            show(results)
            if options.json:  # After each, since all take a quarter of an hour.
                figures = {
                    "num_candidates": len(candidates),
                    "dim": candidates.shape[1],
                    "num_held_out_queries": len(queries) // 2,
                    "k": options.k,
                    "target_recall": options.target_recall,
                    "search_threads": 1,
                    "build_threads": multiprocessing.cpu_count(),
                    "benchmark_versions": {n: _version(n) for n in ("faiss-cpu", "hnswlib")},
                    "indexes": results,
                }
                write_json(options.json, figures, seed=options.seed)


if __name__ == "__main__":
    main()
