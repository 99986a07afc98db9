"""AUC of each query: how often its positives score above other items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def auc(positive_scores: np.ndarray, negative_scores: np.ndarray) -> float:
    """Computes the share of (positive, negative) pairs in which the positive scores higher.

    The area under the ROC curve (Mann-Whitney); a tie counts a half. NaN if either array is empty;
    a `ValueError` if a score is NaN.

    Example:
        >>> auc(np.array([2.0, 0.5]), np.array([1.0, 0.5]))
        0.625
    """
    if np.isnan(positive_scores).any() or np.isnan(negative_scores).any():
        raise ValueError("Scores are NaN: the model has diverged or a feature is NaN.")
    if not len(positive_scores) or not len(negative_scores):
        return float("nan")
    in_order = np.sort(negative_scores)
    num_below = np.searchsorted(in_order, positive_scores, side="left")
    num_not_above = np.searchsorted(in_order, positive_scores, side="right")
    return float((num_below + num_not_above).mean() / (2 * len(in_order)))


def auc_per_query(
    query_embeddings: np.ndarray,
    candidate_embeddings: np.ndarray,
    positive_rows: Sequence[np.ndarray],
    negative_rows: Sequence[np.ndarray],
) -> np.ndarray:
    """Computes the AUC of each query's positives against its own negatives, by dot products.

    Embeddings are [num_queries, dim] and [num_candidates, dim] floats. Each query has an array of
    candidate rows, from 1, of either kind. Returns [num_queries] float64 in [0, 1]; NaN where a
    query lacks positives or negatives.
    """
    values = []
    for query, positives, negatives in zip(
        query_embeddings, positive_rows, negative_rows, strict=True
    ):
        rows = np.concatenate([positives, negatives]).astype(int)
        scores = candidate_embeddings[rows - 1] @ query
        values.append(auc(scores[: len(positives)], scores[len(positives) :]))
    return np.array(values)


def draw_corpus_rows(num_candidates: int, num_drawn: int, seed: int) -> np.ndarray:
    """Draws distinct rows from 1 uniformly, ascending; the whole corpus if it holds no more."""
    if num_drawn >= num_candidates:
        return np.arange(1, num_candidates + 1)
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(num_candidates, num_drawn, replace=False)) + 1
