"""Retrieval metrics, per query and of all retrieved lists together.

Per-query metrics take `is_hit`, which `find_hits` makes once for every k. To measure a part of the
relevant items, such as a popularity slice, clear the other hits and count only that part in
`num_relevant`.
"""

from __future__ import annotations

import numpy as np

from tfrs_pipeline.data.ids import are_listed

QUERY_METRICS = ("recall", "hit_rate", "ndcg", "mrr")
SET_METRICS = ("coverage", "average_popularity", "gini")


def find_hits(
    retrieved_rows: np.ndarray, relevant_queries: np.ndarray, relevant_rows: np.ndarray
) -> np.ndarray:
    """Marks the retrieved candidates that are relevant to their query.

    Args:
        retrieved_rows: [num_queries, max_k] candidate rows from 1, best first; 0 is an empty slot
            and never a hit.
        relevant_queries: [num_pairs] numbers of queries, from 0.
        relevant_rows: [num_pairs] the candidate, from 1, that is relevant to the query.

    Returns:
        [num_queries, max_k] bool, True at each hit.

    Raises:
        ValueError: If `retrieved_rows` is not a matrix, or a pair is out of range.

    Example:
        >>> find_hits(np.array([[7, 3, 0]]), np.array([0, 0]), np.array([3, 9]))
        array([[False,  True, False]])
    """
    if retrieved_rows.ndim != 2:
        raise ValueError(
            "retrieved_rows must be [num_queries, max_k]. "
            f"Received: `retrieved_rows.shape` = {retrieved_rows.shape}."
        )
    if not len(relevant_rows) or not retrieved_rows.size:
        return np.zeros(retrieved_rows.shape, bool)
    num_queries = len(retrieved_rows)
    if relevant_rows.min() < 1 or not 0 <= relevant_queries.min() <= relevant_queries.max() < (
        num_queries
    ):
        raise ValueError(
            f"Relevant rows must be 1 or more, of queries in [0, {num_queries}). Received: rows "
            f"from {relevant_rows.min()}, queries {relevant_queries.min()} to "
            f"{relevant_queries.max()}."
        )
    order = np.argsort(relevant_queries, kind="stable")
    starts = np.searchsorted(relevant_queries[order], np.arange(1, num_queries))
    highest = max(relevant_rows.max(), retrieved_rows.max())
    return are_listed(retrieved_rows, np.split(relevant_rows[order], starts), highest)


def query_metrics(is_hit: np.ndarray, num_relevant: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """Computes the metrics of each query at a cutoff.

    With places counted from 1:

        recall@k = hits in the top k / num_relevant; not capped: below 1 where more are relevant
        hit_rate@k = 1 if there is a hit in the top k, or 0
        ndcg@k = sum over the hits of 1 / log2(1 + place), divided by that of the ideal list, which
            puts min(num_relevant, k) hits first (Järvelin and Kekäläinen 2002, binary gains)
        mrr@k = 1 / place of the first hit, or 0 without one

    Args:
        is_hit: [num_queries, max_k] bool, best first; see `find_hits`.
        num_relevant: [num_queries] how many candidates are relevant. 0 gives NaN, for
            `np.nanmean` to skip.
        k: Cutoff, 1 <= k <= max_k.

    Returns:
        Name of `QUERY_METRICS` -> [num_queries] float64 in [0, 1], or NaN.

    Raises:
        ValueError: If k is out of range, or a query has more hits than relevant candidates.

    Example:
        >>> hits = np.array([[False, True, True]])
        >>> {name: x.round(2).item() for name, x in query_metrics(hits, np.array([2]), 2).items()}
        {'recall': 0.5, 'hit_rate': 1.0, 'ndcg': 0.39, 'mrr': 0.5}
    """
    if is_hit.ndim != 2 or is_hit.dtype != bool or num_relevant.shape != is_hit.shape[:1]:
        raise ValueError(
            "is_hit must be [num_queries, max_k] bool and num_relevant [num_queries]. Received: "
            f"`is_hit.shape` = {is_hit.shape} ({is_hit.dtype}), "
            f"`num_relevant.shape` = {num_relevant.shape}."
        )
    _check_cutoff(k, is_hit)
    num_hits = is_hit.sum(axis=1)
    if np.any(num_hits > num_relevant):
        query = int(np.argmax(num_hits > num_relevant))
        raise ValueError(
            f"Query {query} has {num_hits[query]} hits but {num_relevant[query]} relevant "
            "candidates: a candidate was retrieved twice, or num_relevant counts something else."
        )
    top = is_hit[:, :k]
    has_hit = np.any(top, axis=1).astype(float)
    discounts = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.cumsum(discounts)[np.clip(num_relevant, 1, k) - 1]
    values = {
        "recall": top.sum(axis=1) / np.maximum(num_relevant, 1).astype(np.float64),
        "hit_rate": has_hit,
        "ndcg": top @ discounts / ideal,
        "mrr": has_hit / (1.0 + np.argmax(top, axis=1)),
    }
    return {name: np.where(num_relevant > 0, x, np.nan) for name, x in values.items()}


def set_metrics(
    retrieved_rows: np.ndarray, candidate_counts: np.ndarray, in_part: np.ndarray, k: int
) -> dict[str, float]:
    """Computes metrics of the top k of all queries together, for a part of the candidates.

        coverage = share of the candidates that were retrieved for at least one query
        average_popularity = mean training count over the filled slots
        gini = sum over i, j of |x_i - x_j| / (2 n^2 mean(x)), where x_i is how often candidate i
            was retrieved: 0 if all equally often, (n - 1) / n if only one ever

    Args:
        retrieved_rows: [num_queries, max_k] candidate rows from 1, best first; 0 is an empty slot.
        candidate_counts: [num_candidates] training positives.
        in_part: [num_candidates] bool.
        k: Cutoff, 1 <= k <= max_k.

    Returns:
        Name of `SET_METRICS` -> a number; NaN without candidates, or if nothing was retrieved.

    Raises:
        ValueError: If k or a row is out of range.

    Example:
        >>> rows, counts = np.array([[1, 3], [3, 0]]), np.array([90, 5, 0, 8])
        >>> set_metrics(rows, counts, np.array([True, True, True, False]), k=2)
        {'coverage': 0.6666666666666666, 'average_popularity': 30.0, 'gini': 0.4444444444444444}
    """
    _check_cutoff(k, retrieved_rows)
    rows, num_candidates = retrieved_rows[:, :k].ravel(), len(candidate_counts)
    if rows.max(initial=0) > num_candidates:
        raise ValueError(f"Rows must be at most {num_candidates=}. Received: {rows.max()}.")
    times = np.bincount(rows, minlength=num_candidates + 1)[1:][in_part]
    total, n = times.sum(), len(times)
    found = dict.fromkeys(SET_METRICS, float("nan"))
    if n:
        found["coverage"] = float(np.mean(times > 0))
    if total:
        found["average_popularity"] = float(times @ candidate_counts[in_part] / total)
        # Sorted, the double sum is a single one: the i-th smallest counts 2 i - n - 1 times.
        weights = 2 * np.arange(1, n + 1) - n - 1
        found["gini"] = float(weights @ np.sort(times).astype(np.float64) / (n * total))
    return found


def _check_cutoff(k: int, lists: np.ndarray) -> None:
    if not 1 <= k <= lists.shape[1]:
        raise ValueError(f"k must lie in [1, max_k = {lists.shape[1]}]. Received: k={k}.")
