"""Measures recall and CPU time of a ScaNN index for all kinds of requests, beside exact search.

The index is tuned like an export's. Then other queries search it: over a grid of k and of excluded
items, the query's nearest or far ones, and with filters that a share of the items pass, at random
or the nearest to or farthest from a direction, as items with one value of a feature may be.

    python benchmarks/index.py --vectors 50000 --json benchmarks/results/index_50k.json
    python benchmarks/index.py --model saved_models/NAME

Without `--model` the corpora are synthetic: unit vectors in 1,000 overlapping clusters, whose
spread falls from dimension to dimension as in learned embeddings. The queries are drawn in the same
way. With `--model`, the items and held-out queries are the model's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import parser_with_json, write_json

import tfrs_pipeline as tp
from tfrs_pipeline.evaluation.results import format_cells
from tfrs_pipeline.search.candidates import Candidates, FilterValues
from tfrs_pipeline.search.tune import Requests, Tuned, exact_ranking, tune_index

BATCH_SIZE = 16
# Exact search is asked less: its time differs little between queries.
NUM_TIMED_EXACTLY = 64
KINDS = ("near", "far")
FILTERS = ("at random", "near", "far")
NUM_CLUSTERS = 1000


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


class Searches:
    """An index and exact search, each called with one query and with 16 at a time."""

    def __init__(self, index: Tuned, embeddings: np.ndarray, queries: np.ndarray) -> None:
        self._index, self._embeddings, self._queries = index, embeddings, queries
        self._candidates = index.candidates(embeddings)

    def compare(
        self, k: int, excluded: np.ndarray, is_allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        """Returns found rows, [n, k], of all queries, the exact rows of some, and the CPU times.

        With `is_allowed`, [num_candidates] bool, only these candidates are found.
        """
        candidates, allowed = self._candidates, None
        if is_allowed is not None:
            numbers, values = np.arange(1, len(is_allowed) + 1), FilterValues()
            of_index = self._index.searcher, self._index.levels
            codes = values.encode(np.where(is_allowed, "some", "").astype(object))
            candidates = Candidates(numbers, self._embeddings, *of_index, values, codes)
            allowed = ["some"]
        answers, times = list[np.ndarray](), dict[str, float]()
        for name, num in (("", len(self._queries)), ("exact_", NUM_TIMED_EXACTLY)):
            for size in (1, BATCH_SIZE):
                rows = list[np.ndarray]()
                starts = range(0, num if size > 1 else NUM_TIMED_EXACTLY, size)
                # Once for all calls, because the clock ticks slowly on some machines.
                begin = time.process_time()
                for start in starts:
                    block = slice(start, start + size)
                    found, _ = candidates.search(
                        self._queries[block],
                        k,
                        list(excluded[block]),
                        allowed and [allowed] * size,
                        exact=bool(name),
                    )
                    rows.append(np.maximum(found, 0))
                seconds = time.process_time() - begin
                times[f"{name}ms_of_{size}"] = 1e3 * seconds / (len(starts) * size)
            answers.append(np.concatenate(rows))
        return answers[0], answers[1], times


def recall_of(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Returns the mean share of each query's exact answer that was found, and its error."""
    pairs = zip(found, exact, strict=True)
    shares = [len(np.intersect1d(a[a > 0], b)) / max(1, int(np.count_nonzero(b))) for a, b in pairs]
    return {
        "recall": float(np.mean(shares)),
        "standard_error": float(np.std(shares) / len(shares) ** 0.5),
    }


def measure_grid(
    searches: Searches, ranking: np.ndarray, num_candidates: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yields recall and times by k and by excluded items."""
    rng = np.random.default_rng(options.seed)
    for kind in KINDS:
        for num in options.excluded:
            if kind == "far":  # None of them is a better answer than what is asked for.
                drawn = rng.integers(1, num_candidates + 1, (len(ranking), 3 * num))
                excluded = np.stack(
                    [
                        line[~np.isin(line, best)][:num]
                        for line, best in zip(drawn, ranking[:, : max(options.k)], strict=True)
                    ]
                )
            else:
                excluded = ranking[:, :num]
            for k in options.k if num or kind == "near" else ():
                found, _, times = searches.compare(k, excluded)
                exact = ranking[:, num : num + k] if kind == "near" else ranking[:, :k]
                cell = {"k": k, "excluded": num, "where": kind if num else "-"}
                yield {**cell, **recall_of(found, exact), **times}


def measure_filters(
    searches: Searches, embeddings: np.ndarray, ranking: np.ndarray, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yields recall and times where a share of the items pass; k 100, the nearest 20 excluded."""
    rng = np.random.default_rng(options.seed)
    direction = embeddings[rng.integers(len(embeddings))]
    for kind in FILTERS:
        value = rng.random(len(embeddings))
        if kind != "at random":
            value = embeddings @ direction * (-1 if kind == "near" else 1)
        order = np.argsort(value)
        for share in options.shares:
            is_allowed = np.zeros(len(embeddings), bool)
            is_allowed[order[: round(share * len(embeddings))]] = True
            found, exact, times = searches.compare(100, ranking[:, :20], is_allowed)
            cell = {"share": share, "which": kind}
            yield {**cell, **recall_of(found[: len(exact)], exact), **times}


def measure(
    embeddings: np.ndarray, tuning: Requests, queries: np.ndarray, options: argparse.Namespace
) -> dict[str, Any]:
    """Tunes an index and measures it on other queries; prints the results."""
    start = time.process_time()
    index = tune_index(embeddings, tuning, target_recall=options.target_recall)
    seconds = time.process_time() - start
    ranking, _ = exact_ranking(embeddings, queries, max(options.k) + max(options.excluded))
    searches = Searches(index, embeddings, queries)
    print(f"{len(embeddings):,} candidates, built and tuned in {seconds:.0f} CPU s", flush=True)
    cells = list(measure_grid(searches, ranking, len(embeddings), options))
    show(cells)
    filters = list(measure_filters(searches, embeddings, ranking, options))
    show(filters)
    return {
        "num_candidates": len(embeddings),
        "num_tuning_queries": len(tuning.queries),
        "num_queries": len(queries),
        "built_and_tuned_seconds": seconds,
        "num_leaves": index.num_leaves,
        "levels": [vars(level) for level in index.levels],
        "least_recall": min(cell["recall"] for cell in cells),
        "least_recall_filtered": min(cell["recall"] for cell in filters),
        "grid": cells,
        "filters": filters,
    }


def show(cells: Sequence[dict[str, Any]]) -> None:
    """Prints a line for each cell."""
    lines = [list(cells[0])]
    for cell in cells:
        lines.append([f"{x:.4f}" if isinstance(x, float) else str(x) for x in cell.values()])
    print(format_cells(lines), flush=True)


def main() -> None:
    """Runs the benchmark."""
    parser = parser_with_json(__doc__)
    parser.add_argument("--vectors", type=int, nargs="+", default=[50_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=64, help="Of the synthetic corpora.")
    parser.add_argument("--tuning-queries", type=int, default=1000, help="At most.")
    parser.add_argument("--queries", type=int, default=512, help="A multiple of 16.")
    parser.add_argument("--k", type=int, nargs="+", default=[10, 100, 500, 2000])
    parser.add_argument("--excluded", type=int, nargs="+", default=[0, 50, 100, 500, 1000, 5000])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.1, 0.01, 0.001])
    parser.add_argument("--target-recall", type=float, default=0.98)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="An export, in place of synthetic corpora.")
    options = parser.parse_args()
    if options.queries % BATCH_SIZE or options.queries < NUM_TIMED_EXACTLY:
        parser.error(f"--queries must be a multiple of {BATCH_SIZE}, {NUM_TIMED_EXACTLY} or more")
    corpora = []
    if options.model:
        retriever = tp.load(options.model, exact=True, live=False)
        queries, ids = retriever.held_out_queries(), tp.Ids(retriever.candidate_ids())
        users = retriever.users.now([query.get("user_id") for query in queries])
        known = [ids.known_rows(user.known) for user in users]
        held_out, num = retriever.embed_queries(queries), options.queries
        tuning = Requests(held_out[num:], known[num:])
        corpora.append((retriever.candidate_embeddings(), tuning, held_out[:num]))
    results = []
    for num_vectors in () if options.model else options.vectors:
        total = options.tuning_queries + options.queries
        embeddings, queries = synthetic(num_vectors, options.dim, total, options.seed)
        first, rest = np.split(queries, [options.tuning_queries])
        corpora.append((embeddings, Requests(first, [np.zeros(0, np.int32)] * len(first)), rest))
    for corpus in corpora:
        results.append(measure(*corpus, options))
        write_json(
            options.json,
            {"target_recall": options.target_recall, "corpora": results},
            seed=options.seed,
        )


if __name__ == "__main__":
    main()
