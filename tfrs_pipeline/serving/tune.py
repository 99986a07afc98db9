"""Tunes how widely an index searches, and measures its recall."""

import bisect
import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import tensorflow as tf

from tfrs_pipeline.data.ids import are_listed
from tfrs_pipeline.evaluation.topk import top_k_in_blocks
from tfrs_pipeline.serving.index import ExactIndex, Level, ScannIndex

logger = logging.getLogger(__name__)

# A level serves depths up to twice that of the level before.
SMALLEST_DEPTH, LARGEST_DEPTH = 128, 8192
# Requests in the report, besides those that exclude the items that a user knows.
REPORTED_KS, REPORTED_EXCLUSIONS = (10, 100, 1000), (0, 100, 1000, 5000)
# A mean over fewer queries is unreliable.
_FEW_QUERIES = 20
_QUERIES_PER_CALL = 16
_REPORTED_QUERIES = 128
# In units of one hashed candidate: a million of 64 dimensions, 16 queries a call.
_WORK_OF_A_LEAF, _WORK_OF_RESCORING, _WORK_OF_A_RESULT, WORK_OF_EXACT_SCORE = 1, 9, 20, 3
# Differences below this share of a query's largest score are rounding.
_EQUAL = 1e-6
# Candidates rescored exactly, per candidate looked for.
_REORDERED_OVER_DEPTH = (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)

_Search = Callable[..., tuple[tf.Tensor, tf.Tensor]]
_Answer: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Rows from 1, best first, 0 in empty slots, and their scores."""


class Requests(NamedTuple):
    """The queries on which an index is tuned and measured.

    `queries` are [num_queries, D] float32. `known` holds the rows, from 1, that each query's user
    knows.
    """

    queries: np.ndarray
    known: Sequence[np.ndarray]

    def parted(self) -> tuple["Requests", "Requests"]:
        """Holds out 128 queries for measurement, second; below 384, uses all for both."""
        num = _REPORTED_QUERIES
        if len(self.queries) < 3 * num:
            return self, self
        tuning = Requests(self.queries[num:], self.known[num:])
        return tuning, Requests(self.queries[:num], self.known[:num])


def tune_index(embeddings: np.ndarray, requests: Requests, *, target_recall: float) -> ScannIndex:
    """Builds a ScaNN index that reaches a recall target with the least work, at each depth.

    The depth of a request is its k plus its number of excluded candidates.
    """
    num_queries = len(requests.queries)
    if not num_queries:
        raise ValueError("There must be queries to measure on. Received: 0 queries")
    if num_queries < _FEW_QUERIES:
        logger.warning("the index is tuned on no more than %d queries", num_queries)
    index = ScannIndex(ExactIndex(embeddings))
    depths = _depths(len(embeddings))
    ranking, scores = exact_ranking(embeddings, requests.queries, depths[-1])
    is_known = are_listed(ranking, requests.known, len(embeddings))
    search = compiled(index.approximate, 3)

    def recall(depth: int, leaves: int, reordered: int) -> float:
        found = _in_calls(search, requests.queries, depth, leaves, reordered)
        is_found = found_places((ranking[:, :depth], scores[:, :depth]), found)
        return lowest_recall(is_found, is_known[:, :depth])

    exact_work = WORK_OF_EXACT_SCORE * index.num_candidates
    # Aims a quarter of the allowed loss higher, so that other queries reach the target too.
    wanted = target_recall + (1 - target_recall) / 4
    levels: list[Level] = []
    # Work is computed, not timed, so that equal data give an equal index.
    for depth in depths:
        if levels and work_of(Level(depth, 1, depth), index) >= exact_work:
            break
        level = _least(index, functools.partial(recall, depth), depth, wanted)
        if level is None and not levels:
            raise RuntimeError(
                f"No ScaNN search finds {target_recall} of the best {depth}: the widest finds "
                f"{recall(depth, index.num_leaves, index.num_candidates):.4f}. Lower the recall "
                "target, or take the exact index."
            )
        if level is None or (levels and work_of(level, index) >= exact_work):
            break
        levels.append(level)
    index.levels = tuple(levels)
    logger.info("index of %d leaves: %s", index.num_leaves, index.levels)
    return index


def exact_ranking(
    embeddings: np.ndarray, queries: np.ndarray, depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best candidates: [num_queries, depth] rows from 1, best first, and scores."""
    shape = len(queries), len(embeddings)
    return top_k_in_blocks(lambda block: queries[block] @ embeddings.T, *shape, depth)


def _depths(num_candidates: int) -> list[int]:
    depths = [min(SMALLEST_DEPTH, num_candidates)]
    while 2 * depths[-1] <= min(LARGEST_DEPTH, num_candidates - 1):
        depths.append(2 * depths[-1])
    return depths


def _least(
    index: ScannIndex, recall: Callable[[int, int], float], depth: int, wanted: float
) -> Level | None:
    """Finds the fewest candidates to rescore, then the fewest leaves; None if none suffices."""
    # Half of the allowed loss is left for the leaves. Recall nearly always rises with both.
    most, half = index.num_candidates, (1 + wanted) / 2
    options = sorted({min(round(x * depth), most) for x in _REORDERED_OVER_DEPTH} | {most})
    place = bisect.bisect_left(options, True, key=lambda n: recall(index.num_leaves, n) >= half)
    reordered = options[min(place, len(options) - 1)]
    leaves = sorted({max(1, round(index.num_leaves * 2 ** (-step / 2))) for step in range(16)})
    place = bisect.bisect_left(leaves, True, key=lambda n: recall(n, reordered) >= wanted)
    return None if place == len(leaves) else Level(depth, leaves[place], reordered)


def work_of(level: Level, index: ScannIndex) -> float:
    """Computes the work of a search at a level, in hashed candidates."""
    hashed = index.num_candidates * level.num_leaves_to_search / index.num_leaves
    return (
        hashed
        + _WORK_OF_A_LEAF * index.num_leaves
        + _WORK_OF_RESCORING * level.num_reordered
        + _WORK_OF_A_RESULT * level.depth
    )


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
    """Returns which places of the exact answers, [num_queries, depth], a search has found."""
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


def measure_requests(index: ScannIndex, requests: Requests) -> list[dict[str, Any]]:
    """Measures "recall" by "k" and "excluded": a number of the nearest, or "known" items."""
    queries, num = requests.queries[:_REPORTED_QUERIES], index.num_candidates
    most = min(REPORTED_EXCLUSIONS[-1], num)
    ranking, _ = exact_ranking(index.exact.embeddings.numpy(), queries, most)
    cases: dict[int | str, Any] = {n: ranking[:, :n] for n in REPORTED_EXCLUSIONS}
    cases["known"] = requests.known[: len(queries)]
    searches = [compiled(x.search, 1, num_lists=1) for x in (index, index.exact)]
    measured = []
    for k, (name, excluded) in itertools.product(REPORTED_KS, cases.items()):
        width = max(map(len, excluded))
        if k + width >= num:
            continue
        lists = np.zeros((len(queries), width), np.int32)
        for line, rows in zip(lists, excluded, strict=True):
            line[: len(rows)] = rows
        found, exact = (_in_calls(search, queries, k, excluded=lists) for search in searches)
        recall = round(float(found_places(exact, found).mean()), 4)
        measured.append({"k": k, "excluded": name, "recall": recall})
    return measured


def _in_calls(
    search: _Search, queries: np.ndarray, *options: int, excluded: np.ndarray | None = None
) -> _Answer:
    """Searches in calls of 16 queries: [num_queries, any] rows, and their scores."""
    found = []
    arguments = [tf.constant(option, tf.int32) for option in options]
    for start in range(0, len(queries), _QUERIES_PER_CALL):
        block = slice(start, start + _QUERIES_PER_CALL)
        lists = [] if excluded is None else [tf.constant(excluded[block])]
        found.append(search(tf.constant(queries[block]), *arguments, *lists))
    rows, scores = (np.concatenate(blocks) for blocks in zip(*found, strict=True))
    return rows, scores


def compiled(search: _Search, num_options: int, num_lists: int = 0) -> _Search:
    """Compiles a search by queries, `num_options` integers and `num_lists` lists of rows."""
    options = [tf.TensorSpec([], tf.int32)] * num_options
    lists = [tf.TensorSpec([None, None], tf.int32)] * num_lists
    signature = [tf.TensorSpec([None, None], tf.float32), *options, *lists]
    # A plain tf.function would warn of retracing when many indexes are built in turn.
    return tf.function(search, input_signature=signature).get_concrete_function()
