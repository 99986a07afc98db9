"""GF-CF, a graph filter in closed form, whose published numbers check the evaluator.

It is deterministic.

Reference: Shen et al. 2021, How Powerful is Graph Convolution for Recommendation?
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from tfrs_pipeline.data.log import Log
from tfrs_pipeline.evaluation.interactions import Interactions, history_matrix
from tfrs_pipeline.evaluation.topk import ScoreRetriever
from tfrs_pipeline.retrieval import Query


class GfcfRetriever:
    """Scores a history h by h R'R + alpha h D^-1/2 V V' D^1/2.

    R is the matrix of users by items, normalised on both sides by the square roots of the degrees,
    V its first right singular vectors, D the degrees of the items.

    Args:
        alpha: Weight of the ideal low-pass filter.
        num_factors: Singular vectors.
    """

    def __init__(self, *, alpha: float = 0.3, num_factors: int = 256) -> None:
        self.alpha, self.num_factors = alpha, num_factors

    def fit(self, train: Log) -> GfcfRetriever:
        """Computes the two filters from the positives of a log."""
        clicks = Interactions.of(train)
        self.items, interactions = clicks.items, clicks.matrix
        degrees = np.asarray(interactions.sum(axis=0)).ravel().astype(np.float64)
        user_scale = 1 / np.sqrt(np.maximum(np.asarray(interactions.sum(axis=1)).ravel(), 1))
        self._item_scale = 1 / np.sqrt(np.maximum(degrees, 1))
        normalised = (
            scipy.sparse.diags(user_scale) @ interactions @ scipy.sparse.diags(self._item_scale)
        ).tocsr()
        start = np.full(min(normalised.shape), 1.0)  # Otherwise it is drawn at random.
        _, _, vectors = scipy.sparse.linalg.svds(normalised, k=self.num_factors, v0=start)
        self._vectors = vectors.astype(np.float32)
        self._weighted = (self.alpha * vectors * np.sqrt(degrees)).astype(np.float32)
        self._linear = (normalised.T @ normalised).tocsr().astype(np.float32)
        return self

    def retrieve(
        self,
        queries: Sequence[Query],
        k: int,
        exclude: Sequence[Collection[Any]] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Retrieves by history; see `Retriever.retrieve`."""
        return ScoreRetriever(self.items, self._scores).retrieve(queries, k, exclude)

    def _scores(self, queries: Sequence[Query]) -> np.ndarray:
        history = history_matrix(queries, self.items)
        smooth = (
            history @ (self._vectors * self._item_scale.astype(np.float32)).T
        ) @ self._weighted
        return (history @ self._linear).toarray() + smooth
