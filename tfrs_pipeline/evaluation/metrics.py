"""Retrieval metrics, per query and over all retrieved lists together.

Candidates are rows from 1, best first; row 0 is an empty slot. To measure a part of the relevant
items, such as a popularity slice, clear the other hits and count only that part in `num_relevant`.
"""

import numpy as np

from tfrs_pipeline.data.ids import are_listed

QUERY_METRICS = ("recall", "hit_rate", "ndcg", "mrr")
SET_METRICS = ("coverage", "average_popularity", "gini")


def find_hits(
    retrieved_rows: np.ndarray, relevant_queries: np.ndarray, relevant_rows: np.ndarray
) -> np.ndarray:
    """Marks which of [num_queries, max_k] rows are relevant to their query.

    `relevant_queries`, from 0, and `relevant_rows` are [num_pairs] each.
    """
    if not len(relevant_rows) or not retrieved_rows.size:
        return np.zeros(retrieved_rows.shape, bool)
    order = np.argsort(relevant_queries, kind="stable")
    starts = np.searchsorted(relevant_queries[order], np.arange(1, len(retrieved_rows)))
    highest = max(relevant_rows.max(), retrieved_rows.max())
    return are_listed(retrieved_rows, np.split(relevant_rows[order], starts), highest)


def query_metrics(is_hit: np.ndarray, num_relevant: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """Computes the metrics of each query at a cutoff, with places counted from 1.

        recall@k = hits in the top k / num_relevant; not capped, so below 1 if more are relevant
        hit_rate@k = 1 if there is a hit in the top k, or 0
        ndcg@k = sum over the hits of 1 / log2(1 + place), divided by the sum for the ideal list,
            which has min(num_relevant, k) hits first (Järvelin and Kekäläinen 2002, binary gains)
        mrr@k = 1 / place of the first hit, or 0 without one

    `is_hit` is [num_queries, max_k] bool, k at most max_k; `num_relevant` is [num_queries]. Returns
    name of `QUERY_METRICS` -> [num_queries] float64 in [0, 1], NaN where nothing is relevant.
    """
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
            was retrieved: 0 if all are equally often, (n - 1) / n if only one ever is

    `candidate_counts` and `in_part`, bool, are [num_candidates]. Returns name of `SET_METRICS` -> a
    number: NaN without candidates or, but for coverage, if nothing was retrieved.
    """
    rows = retrieved_rows[:, :k].ravel()
    times = np.bincount(rows, minlength=len(candidate_counts) + 1)[1:][in_part]
    total, n = times.sum(), len(times)
    found = dict.fromkeys(SET_METRICS, float("nan"))
    if n:
        found["coverage"] = float(np.mean(times > 0))
    if total:
        found["average_popularity"] = float(times @ candidate_counts[in_part] / total)
        # After sorting, the double sum is a single one: the i-th smallest has weight 2 i - n - 1.
        weights = 2 * np.arange(1, n + 1) - n - 1
        found["gini"] = float(weights @ np.sort(times).astype(np.float64) / (n * total))
    return found
