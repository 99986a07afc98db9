"""Tunes how widely an index searches, and measures its recall."""

import bisect
import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from tfrs_pipeline.data.ids import are_listed
from tfrs_pipeline.evaluation.topk import top_k_in_blocks
from tfrs_pipeline.serving.candidates import Candidates
from tfrs_pipeline.serving.index import Level, num_leaves_of
from tfrs_pipeline.serving.searcher import Searcher

logger = logging.getLogger(__name__)

# A level serves depths up to twice that of the level before.
SMALLEST_DEPTH, LARGEST_DEPTH = 128, 8192
# Requests in the report, besides those that exclude the items that a user knows.
REPORTED_KS, REPORTED_EXCLUSIONS = (10, 100, 1000), (0, 100, 1000, 5000)
# A mean over fewer queries is unreliable.
_FEW_QUERIES = 20
_REPORTED_QUERIES = 128
# In units of one hashed candidate, some 4 nanoseconds at 64 dimensions, for a query alone.
_WORK_OF_A_LEAF, _WORK_OF_RESCORING, _WORK_OF_A_RESULT = 3, 4, 6
# Scoring a candidate exactly, where the processor's cache holds all vectors and where it does not.
_WORK_OF_EXACT_SCORE, _CACHED_BYTES = (1.5, 4), 1 << 24
# Differences below this share of a query's largest score are rounding.
_EQUAL = 1e-6
# Candidates rescored exactly, per candidate looked for.
_REORDERED_OVER_DEPTH = (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)

_Answer: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Rows from 1, best first, 0 in empty slots, and their scores."""


class Requests(NamedTuple):
    """The queries on which an index is tuned and measured.

    `queries` are [num_queries, D] float32; `known` the rows, from 1, that each query's user knows.
    """

    queries: np.ndarray
    known: Sequence[np.ndarray]

    def for_tuning_and_measuring(self) -> tuple["Requests", "Requests"]:
        """Holds out 128 queries for the measurement; below 384, returns all for both."""
        num = _REPORTED_QUERIES
        if len(self.queries) < 3 * num:
            return self, self
        tuning = Requests(self.queries[num:], self.known[num:])
        return tuning, Requests(self.queries[:num], self.known[:num])


class Tuned(NamedTuple):
    """An index, its number of leaves, and how widely to search it by depth, ascending."""

    searcher: Searcher
    num_leaves: int
    levels: tuple[Level, ...]

    def candidates(self, embeddings: np.ndarray) -> Candidates:
        """Returns a search over the vectors of the index; ids are rows from 1."""
        rows = np.arange(1, len(embeddings) + 1)
        return Candidates(rows, embeddings, self.searcher, self.levels)


def tune_index(embeddings: np.ndarray, requests: Requests, *, target_recall: float) -> Tuned:
    """Builds a ScaNN index that reaches a recall target with the least work, at each depth.

    The depth of a request is its k plus its number of excluded candidates.
    """
    num_queries = len(requests.queries)
    if not num_queries:
        raise ValueError("There must be queries to measure on. Received: 0 queries")
    if num_queries < _FEW_QUERIES:
        logger.warning("the index is tuned on no more than %d queries", num_queries)
    num_leaves = num_leaves_of(len(embeddings))
    searcher = Searcher.build(embeddings, num_leaves)
    depths = [min(SMALLEST_DEPTH, len(embeddings))]
    while 2 * depths[-1] <= min(LARGEST_DEPTH, len(embeddings) - 1):
        depths.append(2 * depths[-1])
    ranking, scores = exact_ranking(embeddings, requests.queries, depths[-1])
    is_known = are_listed(ranking, requests.known, len(embeddings))

    def recall(depth: int, leaves: int, reordered: int) -> float:
        found = searcher.search(requests.queries, Level(depth, leaves, reordered))[:2]
        is_found = found_places((ranking[:, :depth], scores[:, :depth]), found)
        return lowest_recall(is_found, is_known[:, :depth])

    size = Size(len(embeddings), embeddings.shape[1], num_leaves)
    # Aims a quarter of the allowed loss higher, so that other queries reach the target too.
    wanted = target_recall + (1 - target_recall) / 4
    levels: list[Level] = []
    # Work is computed, not timed, so that equal data give an equal index.
    for depth in depths:
        if levels and size.work(Level(depth, 1, depth)) >= size.exact_work:
            break
        level = _least(size, functools.partial(recall, depth), depth, wanted)
        if level is None and not levels:
            found = recall(depth, num_leaves, len(embeddings))
            raise RuntimeError(
                f"No ScaNN search finds {target_recall} of the best {depth}: the widest finds "
                f"{found:.4f}. Lower the recall target, or take the exact index."
            )
        if level is None or (levels and size.work(level) >= size.exact_work):
            break
        levels.append(level)
    logger.info("index of %d leaves: %s", num_leaves, levels)
    return Tuned(searcher, num_leaves, tuple(levels))


def exact_ranking(
    embeddings: np.ndarray, queries: np.ndarray, depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best candidates: [num_queries, depth] rows from 1, best first, and scores."""
    shape = len(queries), len(embeddings)
    return top_k_in_blocks(lambda block: queries[block] @ embeddings.T, *shape, depth)


def _least(
    size: "Size", recall: Callable[[int, int], float], depth: int, wanted: float
) -> Level | None:
    """Finds the fewest candidates to rescore, then the fewest leaves; None if none suffices."""
    # Half of the allowed loss is left for the leaves. Recall nearly always rises with both.
    most, half = size.num_candidates, (1 + wanted) / 2
    options = sorted({min(round(x * depth), most) for x in _REORDERED_OVER_DEPTH} | {most})
    place = bisect.bisect_left(options, True, key=lambda n: recall(size.num_leaves, n) >= half)
    reordered = options[min(place, len(options) - 1)]
    leaves = sorted({max(1, round(size.num_leaves * 2 ** (-step / 2))) for step in range(16)})
    place = bisect.bisect_left(leaves, True, key=lambda n: recall(n, reordered) >= wanted)
    return None if place == len(leaves) else Level(depth, leaves[place], reordered)


@dataclass(frozen=True)
class Size:
    """The size of an index, from which the work of a search is computed."""

    num_candidates: int
    dim: int
    num_leaves: int

    def work(self, level: Level) -> float:
        """Computes the work of a search at a level, in hashed candidates."""
        return (
            self.num_candidates * level.num_leaves_to_search / self.num_leaves
            + _WORK_OF_A_LEAF * self.num_leaves
            + _WORK_OF_RESCORING * level.num_reordered
            + _WORK_OF_A_RESULT * level.depth
        )

    @property
    def exact_work(self) -> float:
        """The work of scoring every candidate."""
        is_large = 4 * self.num_candidates * self.dim > _CACHED_BYTES
        return _WORK_OF_EXACT_SCORE[is_large] * self.num_candidates


def lowest_recall(is_found: np.ndarray, is_known: np.ndarray) -> float:
    """Returns the lowest mean recall over two kinds of requests, minus three standard errors.

    The arrays, [num_queries, depth], mark the places of the exact ranking found and known.
    """
    depth = is_found.shape[1]
    # If a request excludes the nearest candidates, its answer lies at the end of the depth.
    kinds = [is_found[:, -max(10, depth // 32) :].mean(axis=1)]
    num_known = is_known.sum(axis=1)
    # If a request excludes what its user knows, its answer is the rest of the depth.
    is_real = (num_known > 0) & (num_known < depth)
    if is_real.sum() >= _FEW_QUERIES:
        kinds.append((is_found & ~is_known)[is_real].sum(axis=1) / (depth - num_known[is_real]))
    return min(float(x.mean() - 3 * x.std() / np.sqrt(len(x))) for x in kinds)


def found_places(exact: _Answer, found: _Answer) -> np.ndarray:
    """Returns which entries of the exact answers, [num_queries, depth], a search has found."""
    # Candidates with equal scores are interchangeable: another candidate with the score of the
    # last one may replace a missed candidate with that score.
    (rows, scores), (found_rows, found_scores) = exact, found
    num = max(rows.max(), found_rows.max())
    last, rounding = scores[:, -1:], _EQUAL * np.abs(scores).max(axis=1, keepdims=True)
    is_found = are_listed(rows, found_rows, num)
    is_other = ~are_listed(found_rows, rows, num) & (found_scores >= last - rounding)
    is_missed = ~is_found & (scores <= last + rounding)
    is_replaced = np.cumsum(is_missed, axis=1) <= is_other.sum(axis=1, keepdims=True)
    return is_found | (is_missed & is_replaced)


def measure_requests(candidates: Candidates, requests: Requests) -> list[dict[str, Any]]:
    """Measures "recall" by "k" and "excluded": a number of the nearest, or "known" items.

    The ids of the candidates are their rows, from 1.
    """
    queries, num = requests.queries[:_REPORTED_QUERIES], len(candidates)
    most = min(REPORTED_EXCLUSIONS[-1], num)
    ranking, _ = exact_ranking(candidates.ids_and_vectors()[1], queries, most)
    cases: dict[int | str, Any] = {n: ranking[:, :n] for n in REPORTED_EXCLUSIONS}
    cases["known"] = requests.known[: len(queries)]
    measured = []
    for k, (name, excluded) in itertools.product(REPORTED_KS, cases.items()):
        if k + max(map(len, excluded)) >= num:
            continue
        found, exact = (
            candidates.search(queries, k, excluded, exact=is_exact) for is_exact in (False, True)
        )
        rows = [np.maximum(ids, 0) for ids in (found[0], exact[0])]
        is_found = found_places((rows[1], exact[1]), (rows[0], found[1]))
        measured.append({"k": k, "excluded": name, "recall": round(float(is_found.mean()), 4)})
    return measured
