"""Retrieval metrics: of each query, from where its hits stand; of all retrieved lists together.

The metrics of a query take `is_hit`, which `find_hits` makes once for all of them. To measure a
part of the relevant items (a popularity slice), clear the other hits and count the part in
`num_relevant`.
"""

from __future__ import annotations

import numpy as np


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
        [num_queries, max_k] bool, True where a hit stands.

    Raises:
        ValueError: If `retrieved_rows` is no matrix, or a pair is out of range.

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
    # One number for a (query, row) pair, so that one sorted search answers all queries.
    stride = np.int64(max(relevant_rows.max(), retrieved_rows.max())) + 1
    wanted = np.sort(relevant_queries * stride + relevant_rows)
    pairs = np.arange(num_queries)[:, None] * stride + retrieved_rows
    places = np.minimum(np.searchsorted(wanted, pairs), len(wanted) - 1)
    return wanted[places] == pairs


def recall_at_k(is_hit: np.ndarray, num_relevant: np.ndarray, k: int) -> np.ndarray:
    """Computes recall@k of each query.

    recall@k = |top k retrieved and relevant| / |relevant|. Not capped: below 1 where more than k
    are relevant.

    Args:
        is_hit: [num_queries, max_k] bool, best first; see `find_hits`.
        num_relevant: [num_queries] how many candidates are relevant. 0 gives NaN, for
            `np.nanmean` to skip.
        k: Cutoff, 1 <= k <= max_k.

    Returns:
        [num_queries] float64 in [0, 1], or NaN.

    Raises:
        ValueError: If k is out of range, or a query has more hits than relevant candidates.

    Example:
        >>> recall_at_k(np.array([[False, True, True]]), np.array([2]), k=2)
        array([0.5])
    """
    top, is_measured = _checked(is_hit, num_relevant, k)
    return _where_measured(top.sum(axis=1), np.maximum(num_relevant, 1), is_measured)


def hit_rate_at_k(is_hit: np.ndarray, num_relevant: np.ndarray, k: int) -> np.ndarray:
    """Computes whether the top k of each query hold a relevant candidate: 1 or 0.

    Args, Returns and Raises as of `recall_at_k`.

    Example:
        >>> hit_rate_at_k(np.array([[False, True, True]]), np.array([2]), k=2)
        array([1.])
    """
    top, is_measured = _checked(is_hit, num_relevant, k)
    return _where_measured(np.any(top, axis=1).astype(float), 1.0, is_measured)


def ndcg_at_k(is_hit: np.ndarray, num_relevant: np.ndarray, k: int) -> np.ndarray:
    """Computes normalised discounted cumulative gain of each query, with binary gains.

    DCG@k = sum over the hits of 1 / log2(1 + place), places from 1. The ideal puts
    min(num_relevant, k) hits first, so that a perfect list has 1.

    Args, Returns and Raises as of `recall_at_k`.

    Reference: Järvelin and Kekäläinen 2002, Cumulated gain-based evaluation of IR techniques.

    Example:
        >>> ndcg_at_k(np.array([[True, False]]), np.array([1]), k=2)
        array([1.])
    """
    top, is_measured = _checked(is_hit, num_relevant, k)
    discounts = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.cumsum(discounts)[np.clip(num_relevant, 1, k) - 1]
    return _where_measured(top @ discounts, ideal, is_measured)


def mrr_at_k(is_hit: np.ndarray, num_relevant: np.ndarray, k: int) -> np.ndarray:
    """Computes the reciprocal rank of each query: 1 / place of its first hit, or 0 without one.

    Args, Returns and Raises as of `recall_at_k`.

    Example:
        >>> mrr_at_k(np.array([[False, True, True]]), np.array([2]), k=3)
        array([0.5])
    """
    top, is_measured = _checked(is_hit, num_relevant, k)
    has_hit = np.any(top, axis=1).astype(float)
    return _where_measured(has_hit, 1.0 + np.argmax(top, axis=1), is_measured)


QUERY_METRICS = {
    "recall": recall_at_k,
    "hit_rate": hit_rate_at_k,
    "ndcg": ndcg_at_k,
    "mrr": mrr_at_k,
}


def _checked(is_hit: np.ndarray, num_relevant: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    if is_hit.ndim != 2 or is_hit.dtype != bool or num_relevant.shape != is_hit.shape[:1]:
        raise ValueError(
            "is_hit must be [num_queries, max_k] bool and num_relevant [num_queries]. Received: "
            f"`is_hit.shape` = {is_hit.shape} ({is_hit.dtype}), "
            f"`num_relevant.shape` = {num_relevant.shape}."
        )
    if not 1 <= k <= is_hit.shape[1]:
        raise ValueError(f"k must lie in [1, max_k = {is_hit.shape[1]}]. Received: k={k}.")
    num_hits = is_hit.sum(axis=1)
    if np.any(num_hits > num_relevant):
        query = int(np.argmax(num_hits > num_relevant))
        raise ValueError(
            f"Query {query} has {num_hits[query]} hits but {num_relevant[query]} relevant "
            "candidates: a candidate was retrieved twice, or num_relevant counts something else."
        )
    return is_hit[:, :k], num_relevant > 0


def _where_measured(
    numerator: np.ndarray, denominator: np.ndarray | float, is_measured: np.ndarray
) -> np.ndarray:
    return np.where(is_measured, numerator / np.asarray(denominator, np.float64), np.nan)


def recommendation_counts_at_k(
    retrieved_rows: np.ndarray, num_candidates: int, k: int
) -> np.ndarray:
    """Counts how often each candidate stands in a top k.

    Args:
        retrieved_rows: [num_queries, max_k] candidate rows from 1, best first; 0 is an empty slot.
        num_candidates: How many candidates the corpus has.
        k: Cutoff, 1 <= k <= max_k.

    Returns:
        [num_candidates] int64; row r is counted at r - 1.

    Raises:
        ValueError: If k or a row is out of range.
    """
    if not 1 <= k <= retrieved_rows.shape[1]:
        raise ValueError(f"k must lie in [1, max_k = {retrieved_rows.shape[1]}]. Received: k={k}.")
    rows = retrieved_rows[:, :k].ravel()
    if len(rows) and rows.max() > num_candidates:
        raise ValueError(f"Rows must be at most {num_candidates=}. Received: {rows.max()}.")
    return np.bincount(rows, minlength=num_candidates + 1)[1:]


def coverage(recommendation_counts: np.ndarray) -> float:
    """Computes the share of the candidates that were retrieved for at least one query.

    Args:
        recommendation_counts: [num_candidates], see `recommendation_counts_at_k`. Pass a part of
            the candidates to measure that part.

    Returns:
        A share in [0, 1]; NaN of no candidates.

    Example:
        >>> coverage(np.array([0, 3, 1, 0]))
        0.5
    """
    if not len(recommendation_counts):
        return float("nan")
    return float(np.mean(recommendation_counts > 0))


def average_popularity(recommendation_counts: np.ndarray, candidate_counts: np.ndarray) -> float:
    """Computes the mean training count of what was retrieved, every filled slot counting once.

    Args:
        recommendation_counts: [num_candidates], see `recommendation_counts_at_k`.
        candidate_counts: [num_candidates] training positives.

    Returns:
        Training positives per retrieved candidate; NaN if nothing was retrieved.

    Example:
        >>> average_popularity(np.array([1, 0, 3]), np.array([100, 50, 0]))
        25.0
    """
    total = recommendation_counts.sum()
    return float(recommendation_counts @ candidate_counts / total) if total else float("nan")


def gini(recommendation_counts: np.ndarray) -> float:
    """Computes how unevenly the retrieved slots are spread over the candidates.

    Gini = sum over i, j of |x_i - x_j| / (2 n^2 mean(x)): 0 when all are retrieved equally often,
    (n - 1) / n when only one ever is.

    Args:
        recommendation_counts: [num_candidates], see `recommendation_counts_at_k`.

    Returns:
        A number in [0, 1); NaN if nothing was retrieved.

    Example:
        >>> gini(np.array([0, 0, 0, 8]))
        0.75
    """
    counts = np.sort(recommendation_counts).astype(np.float64)
    total = counts.sum()
    if not total:
        return float("nan")
    # Sorted, the double sum is a single one: the i-th smallest counts 2 i - n - 1 times.
    n = len(counts)
    return float((2 * np.arange(1, n + 1) - n - 1) @ counts / (n * total))
