"""Baselines that a model has to pass: popularity, EASE, implicit ALS."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import scipy.sparse
from scipy.linalg import lapack
from threadpoolctl import threadpool_limits

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.evaluation.topk import exclude_rows_of, retrieve_by_scores
from tfrs_pipeline.retrieval import Query


def interaction_matrix(
    user_ids: np.ndarray, item_ids: np.ndarray, candidate_ids: Collection[Any] | np.ndarray
) -> scipy.sparse.csr_matrix:
    """Builds the matrix that the baselines are fitted on from pairs of a training log.

    Args:
        user_ids: [num_events] users of the training positives, int or str.
        item_ids: [num_events] their items.
        candidate_ids: [num_candidates] the corpus; its order is that of the columns.

    Returns:
        [num_users, num_candidates] float32, 1 where a user has a positive, however many; a row for
        each user of `user_ids`, in sorted order.

    Raises:
        ValueError: If the two columns differ in length, or an item is not a candidate.

    Example:
        >>> interaction_matrix(np.array([7, 7, 9]), np.array([1, 1, 2]), [1, 2, 3]).toarray()
        array([[1., 0., 0.],
               [0., 1., 0.]], dtype=float32)
    """
    if len(user_ids) != len(item_ids):
        raise ValueError(
            "user_ids and item_ids must be columns of one table. "
            f"Received: {len(user_ids)} and {len(item_ids)} rows."
        )
    corpus = Ids(candidate_ids)
    columns = corpus.rows(item_ids) - 1
    if np.any(columns < 0):
        unknown = np.asarray(item_ids)[columns < 0].tolist()
        raise ValueError(
            f"{len(unknown)} of {len(columns)} events are of items that are not candidates, first "
            f"{unknown[0]!r}. Drop them, or add the items."
        )
    users, rows = np.unique(user_ids, return_inverse=True)
    return _zero_one_matrix(rows, columns, (len(users), len(corpus)))


class PopularityRetriever:
    """The same candidates to everyone: those with the most training positives."""

    def __init__(self, corpus: Ids, candidate_counts: np.ndarray) -> None:
        self.corpus = corpus
        self.candidate_counts = candidate_counts
        self._order = np.argsort(-candidate_counts, kind="stable").astype(np.int32) + 1

    @classmethod
    def fit(
        cls, interactions: scipy.sparse.csr_matrix, candidate_ids: Collection[Any] | np.ndarray
    ) -> PopularityRetriever:
        """Counts the users of each candidate.

        Args:
            interactions: [num_users, num_candidates] of 0 and 1; see `interaction_matrix`.
            candidate_ids: [num_candidates], aligned with the columns.
        """
        corpus = Ids(candidate_ids)
        matrix = _checked_interactions(interactions, corpus)
        return cls(corpus, np.bincount(matrix.indices, minlength=len(corpus)))

    def retrieve(
        self,
        queries: Sequence[Query],
        k: int,
        exclude: Sequence[Collection[Any]] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Retrieves the k most popular; see `Retriever.retrieve`. Queries may lack a history."""
        if k < 1:
            raise ValueError(f"k must be 1 or more. Received: k={k}.")
        excluded_rows = exclude_rows_of(self.corpus, queries, exclude)
        rows = np.zeros((len(queries), k), np.int32)
        for i in range(len(queries)):
            excluded = () if excluded_rows is None else excluded_rows[i]
            # Of the k + |excluded| most popular, at least k are not excluded.
            top = self._order[: k + len(excluded)]
            top = top[~np.isin(top, excluded)][:k]
            rows[i, : len(top)] = top
        scores = np.where(rows > 0, self.candidate_counts[rows - 1], -np.inf)
        return self.corpus.take(rows), scores.astype(np.float32)


class EaseRetriever:
    """EASE: a linear autoencoder of histories, solved in closed form; strong where it fits memory.

    B = argmin ||X - X B||^2 + l2 ||B||^2 with a zero diagonal, from P = (X'X + l2 I)^-1 as
    B_ij = -P_ij / P_jj. A candidate's score is the sum of its weights over the history.

    Reference: Steck 2019, Embarrassingly Shallow Autoencoders for Sparse Data.
    """

    def __init__(self, corpus: Ids, weights: np.ndarray) -> None:
        self.corpus = corpus
        self.weights = weights

    @classmethod
    def fit(
        cls,
        interactions: scipy.sparse.csr_matrix,
        candidate_ids: Collection[Any] | np.ndarray,
        *,
        l2: float = 200.0,
        max_candidates: int = 20_000,
    ) -> EaseRetriever:
        """Solves for the item-to-item weights.

        Args:
            interactions: [num_users, num_candidates] of 0 and 1; see `interaction_matrix`.
            candidate_ids: [num_candidates], aligned with the columns.
            l2: Regularisation, above 0. Good values grow with the number of users.
            max_candidates: Refuse a larger corpus: memory grows with its square, time with its
                cube.

        Raises:
            ValueError: If the corpus is too large or an argument is out of range.
        """
        corpus = Ids(candidate_ids)
        num_candidates = len(corpus)
        if num_candidates > max_candidates:
            raise ValueError(
                f"EASE inverts a matrix of {num_candidates} x {num_candidates} candidates, "
                f"{num_candidates**2 * 12 / 1e9:.0f} GB of memory, and max_candidates is "
                f"{max_candidates}. Leave EASE out, use IalsRetriever, or raise max_candidates."
            )
        if l2 <= 0:
            raise ValueError(f"l2 must be above 0, or the matrix may be singular. Received: {l2}.")
        matrix = _checked_interactions(interactions, corpus).astype(np.float64)
        return cls(corpus, _ease_weights(matrix, l2))

    def retrieve(
        self,
        queries: Sequence[Query],
        k: int,
        exclude: Sequence[Collection[Any]] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Retrieves by history; see `Retriever.retrieve`. Without one, all scores are 0."""
        return retrieve_by_scores(self._scores, self.corpus, queries, k, exclude)

    def _scores(self, queries: Sequence[Query]) -> np.ndarray:
        return _history_matrix(queries, self.corpus) @ self.weights


class IalsRetriever:
    """Implicit ALS: matrix factorisation on every cell, clicked ones weighted by `alpha`.

    The user's factors are computed from the query's history, so that new users and new clicks need
    no new fit.

    Reference: Hu, Koren and Volinsky 2008, Collaborative Filtering for Implicit Feedback Datasets;
    the solver is the `implicit` library's.
    """

    def __init__(self, corpus: Ids, model: Any) -> None:
        self.corpus = corpus
        self._model = model

    @classmethod
    def fit(
        cls,
        interactions: scipy.sparse.csr_matrix,
        candidate_ids: Collection[Any] | np.ndarray,
        *,
        num_factors: int = 128,
        regularization: float = 30.0,
        alpha: float = 6.0,
        num_iterations: int = 15,
        seed: int = 0,
        num_threads: int = 0,
    ) -> IalsRetriever:
        """Factorises the interactions.

        Args:
            interactions: [num_users, num_candidates] of 0 and 1; see `interaction_matrix`.
            candidate_ids: [num_candidates], aligned with the columns.
            num_factors: Size of the embeddings.
            regularization: L2 on both sides' factors, 0 or more. It and `alpha` matter most, and
                only together: the defaults suit about a thousand users.
            alpha: Weight of a clicked cell; any other has 1.
            num_iterations: Alternations.
            seed: Of the first factors.
            num_threads: 0 takes every core.

        Raises:
            ValueError: If an argument is out of range.
        """
        # The CPU class itself: the library's own factory takes a GPU when it sees one. Imported
        # here since it takes a second, and popularity and EASE do without it.
        from implicit.cpu.als import AlternatingLeastSquares

        corpus = Ids(candidate_ids)
        matrix = _checked_interactions(interactions, corpus)
        if num_factors < 1 or num_iterations < 1 or regularization < 0 or alpha <= 0:
            raise ValueError(
                "num_factors and num_iterations must be 1 or more, regularization 0 or more, "
                f"alpha above 0. Received: {num_factors=}, {num_iterations=}, {regularization=}, "
                f"{alpha=}."
            )
        # Its threads and those of BLAS would fight over the cores; the library warns of it.
        with threadpool_limits(1, "blas"):
            model = AlternatingLeastSquares(
                factors=num_factors,
                regularization=regularization,
                alpha=alpha,
                iterations=num_iterations,
                random_state=seed,
                num_threads=num_threads,
            )
            model.fit(matrix, show_progress=False)
        return cls(corpus, model)

    def retrieve(
        self,
        queries: Sequence[Query],
        k: int,
        exclude: Sequence[Collection[Any]] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Retrieves by history; see `Retriever.retrieve`. Without one, all scores are 0."""
        return retrieve_by_scores(self._scores, self.corpus, queries, k, exclude)

    def _scores(self, queries: Sequence[Query]) -> np.ndarray:
        histories = _history_matrix(queries, self.corpus)
        factors = self._model.recalculate_user(np.arange(len(queries)), histories)
        return factors @ self._model.item_factors.T


def _ease_weights(interactions: scipy.sparse.csr_matrix, l2: float) -> np.ndarray:
    """Solves for EASE's B, [num_candidates, num_candidates] float32, in 12 bytes a cell."""
    num_candidates = interactions.shape[1]
    gram = np.empty((num_candidates, num_candidates), order="F")
    columns = interactions.tocsc()
    for start in range(0, num_candidates, 1024):
        block = slice(start, start + 1024)
        gram[:, block] = (columns.T @ columns[:, block]).toarray()
    gram[np.diag_indices_from(gram)] += l2
    # Cholesky in place: a third of the work of a general inverse and none of its copies. Only the
    # lower triangle is filled, which is the upper one of the transpose.
    factor, factor_failed = lapack.dpotrf(gram, lower=True, clean=False, overwrite_a=True)
    precision, inverse_failed = lapack.dpotri(factor, lower=True, overwrite_c=True)
    if factor_failed or inverse_failed:
        raise ValueError(f"EASE's matrix is not positive definite with l2={l2}: use a larger l2.")
    weights = precision.T.astype(np.float32)
    for i in range(num_candidates):
        weights[i + 1 :, i] = weights[i, i + 1 :]
    weights /= -np.diag(precision).astype(np.float32)
    np.fill_diagonal(weights, 0.0)
    return weights


def _history_matrix(queries: Sequence[Query], corpus: Ids) -> scipy.sparse.csr_matrix:
    """Marks the candidates of each history: [num_queries, num_candidates] of 0 and 1."""
    for query in queries:
        if "history" not in query:
            raise ValueError(
                "This retriever works from query['history']: pass [] for a user without one. "
                f"Received a query with: {', '.join(map(repr, query)) or 'nothing'}."
            )
    histories = [corpus.known_rows(query["history"]) for query in queries]
    rows = np.repeat(np.arange(len(queries)), [len(h) for h in histories])
    columns = np.concatenate([*histories, np.empty(0, np.int32)]) - 1
    return _zero_one_matrix(rows, columns, (len(queries), len(corpus)))


def _zero_one_matrix(
    rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]
) -> scipy.sparse.csr_matrix:
    matrix = scipy.sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def _checked_interactions(
    interactions: scipy.sparse.csr_matrix, corpus: Ids
) -> scipy.sparse.csr_matrix:
    if not scipy.sparse.issparse(interactions) or interactions.shape[1] != len(corpus):
        raise ValueError(
            f"interactions must be a sparse [num_users, {len(corpus)}] matrix, one column a "
            f"candidate id. Received: {type(interactions).__name__} {np.shape(interactions)}."
        )
    matrix = scipy.sparse.csr_matrix(interactions, dtype=np.float32, copy=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    if np.any(matrix.data != 1):
        raise ValueError(
            "interactions must be 0 or 1, repeats merged: `interaction_matrix` makes it so. "
            f"Received values {matrix.data.min()} to {matrix.data.max()}."
        )
    return matrix
