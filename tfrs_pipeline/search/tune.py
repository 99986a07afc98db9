"""Tunes how widely an index searches, and measures its recall."""

import bisect
import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tfrs_pipeline.data.ids import are_listed
from tfrs_pipeline.search.candidates import Candidates
from tfrs_pipeline.search.searcher import Searcher
from tfrs_pipeline.search.settings import Level, num_leaves_of
from tfrs_pipeline.search.topk import top_k_in_blocks

logger = logging.getLogger(__name__)

# A level serves depths up to twice that of the level before.
SMALLEST_DEPTH, LARGEST_DEPTH = 128, 8192
# Deeper than this share of the candidates, rescoring what the index finds takes as long as scoring
# all of them.
LARGEST_DEPTH_SHARE = 1 / 16
# Requests in the report, besides those that exclude the items that a user knows.
REPORTED_KS, REPORTED_EXCLUSIONS = (10, 100, 1000), (0, 100, 1000, 5000)
# A mean over fewer queries is unreliable.
_FEW_QUERIES = 20
_REPORTED_QUERIES = 128
# Differences below this share of a query's largest score are rounding.
_EQUAL = 1e-6
# Candidates rescored exactly, per candidate looked for.
_REORDERED_OVER_DEPTH = (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


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
    queries, num = requests.queries, len(embeddings)
    if not len(queries):
        raise ValueError("There must be queries to measure on. Received: 0 queries")
    if len(queries) < _FEW_QUERIES:
        logger.warning("the index is tuned on no more than %d queries", len(queries))
    num_leaves = num_leaves_of(num)
    searcher = Searcher.build(embeddings, num_leaves)
    depths = [min(SMALLEST_DEPTH, num)]
    while 2 * depths[-1] <= min(LARGEST_DEPTH, LARGEST_DEPTH_SHARE * num):
        depths.append(2 * depths[-1])
    ranking, scores = exact_ranking(embeddings, queries, depths[-1])

    def recall(depth: int, leaves: int, reordered: int) -> float:
        # The exact ranking of the largest depth begins with that of every smaller one.
        rows, index_scores, _ = searcher.search(queries, Level(depth, leaves, reordered))
        exact = ranking[:, :depth], scores[:, :depth]
        return lowest_recall(exact, (rows, index_scores), requests.known, num)

    # Aims a quarter of the allowed loss higher, so that other queries reach the target too.
    wanted = target_recall + (1 - target_recall) / 4
    levels: list[Level] = []
    for depth in depths:
        level = _least(functools.partial(recall, depth), depth, wanted, num, num_leaves)
        if level is not None:
            levels.append(level)
        elif levels:
            break  # Deeper requests are answered exactly.
        else:
            widest = recall(depth, num_leaves, num)
            raise RuntimeError(
                f"No ScaNN search finds {target_recall} of the best {depth}: the widest finds "
                f"{widest:.4f}. Lower the recall target, or take the exact index."
            )
    logger.info("index of %d leaves: %s", num_leaves, levels)
    return Tuned(searcher, num_leaves, tuple(levels))


def exact_ranking(
    embeddings: np.ndarray, queries: np.ndarray, depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best candidates: [num_queries, depth] rows from 1, best first, and scores."""
    shape = len(queries), len(embeddings)
    return top_k_in_blocks(lambda block: queries[block] @ embeddings.T, *shape, depth)


def _least(
    recall: Callable[[int, int], float], depth: int, wanted: float, num: int, num_leaves: int
) -> Level | None:
    """Finds the fewest candidates to rescore, then the fewest leaves; None if none suffices."""
    # Half of the allowed loss is left for the leaves. Recall nearly always rises with both.
    half = (1 + wanted) / 2
    options = sorted({min(round(factor * depth), num) for factor in _REORDERED_OVER_DEPTH} | {num})
    position = bisect.bisect_left(options, True, key=lambda n: recall(num_leaves, n) >= half)
    reordered = options[min(position, len(options) - 1)]
    leaves = sorted({max(1, round(num_leaves * 2 ** (-step / 2))) for step in range(16)})
    position = bisect.bisect_left(leaves, True, key=lambda n: recall(n, reordered) >= wanted)
    return None if position == len(leaves) else Level(depth, leaves[position], reordered)


def lowest_recall(
    exact: tuple[np.ndarray, np.ndarray],
    found: tuple[np.ndarray, np.ndarray],
    known: Sequence[np.ndarray],
    num_candidates: int,
) -> float:
    """Returns the lowest mean recall over two kinds of requests, minus three standard errors.

    `exact` and `found` are rows and scores, [num_queries, depth]. `known` are the rows that each
    query's user knows.
    """
    rows, _ = exact
    depth = rows.shape[1]
    # If a request excludes the nearest candidates, its answer lies at the end of the depth.
    nearest = rows[:, : -max(10, depth // 32)]
    # An index may find the nearest and miss those that follow.
    recalls = [_recall_without(exact, found, nearest, num_candidates)]
    # If a request excludes what its user knows, its answer is the rest of the depth.
    num_known = are_listed(rows, known, num_candidates).sum(axis=1)
    is_real = (num_known > 0) & (num_known < depth)
    if is_real.sum() >= _FEW_QUERIES:
        recalls.append(_recall_without(exact, found, known, num_candidates)[is_real])
    return min(float(r.mean() - 3 * r.std() / np.sqrt(len(r))) for r in recalls)


def _recall_without(
    exact: tuple[np.ndarray, np.ndarray],
    found: tuple[np.ndarray, np.ndarray],
    excluded: Sequence[np.ndarray] | np.ndarray,
    num_candidates: int,
) -> np.ndarray:
    """Returns the recall of queries that exclude rows of what was searched: [num_queries]."""
    exact_scores, approximate_scores = (
        np.where(are_listed(rows, excluded, num_candidates), -np.inf, scores)
        for rows, scores in (exact, found)
    )
    return share_found(exact_scores, approximate_scores)


def share_found(exact: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Returns which share of the exact answers a search has found: [num_queries].

    Takes the scores, [num_queries, depth], -inf in empty slots. A candidate is found if it scores
    like the last of the exact answer or better, since candidates of equal scores, such as new items
    with the same features, are interchangeable.

    Example:
        >>> share_found(np.array([[0.9, 0.5, 0.5]]), np.array([[0.9, 0.5, 0.1]]))
        array([0.66666667])
    """
    is_wanted = exact > -np.inf
    last = np.where(is_wanted, exact, np.inf).min(axis=1, keepdims=True)
    rounding = _EQUAL * np.where(is_wanted, np.abs(exact), 0).max(axis=1, keepdims=True)
    num_wanted = is_wanted.sum(axis=1)
    num_hits = np.minimum((found >= last - rounding).sum(axis=1), num_wanted)
    return num_hits / np.maximum(num_wanted, 1)


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
        # The answer would be every candidate that is left, which says nothing about the search.
        if k + max(map(len, excluded)) >= num:
            continue
        approximate, exact = (
            candidates.search(queries, k, excluded, exact=is_exact)[1] for is_exact in (False, True)
        )
        recall = float(share_found(exact, approximate).mean())
        measured.append({"k": k, "excluded": name, "recall": round(recall, 4)})
    return measured
