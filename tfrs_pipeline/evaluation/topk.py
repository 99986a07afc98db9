"""Exact top-k over every candidate: the oracle that approximate search is measured against."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from tfrs_pipeline.data.ids import CandidateIds
from tfrs_pipeline.retrieval import Query

# Scores held at a time: 64 MB as float32.
_SCORES_PER_BLOCK = 1 << 24


def top_k_in_blocks(
    score_block: Callable[[slice], np.ndarray],
    num_queries: int,
    num_candidates: int,
    k: int,
    exclude_rows: Sequence[np.ndarray] | None = None,
    block_size: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k best candidates of each query, scoring a block of queries at a time.

    Exact, and the same for any block size: equal scores are ordered by row, the smaller first.
    Scores are compared as float32.

    Args:
        score_block: Given a slice of the queries, returns their scores, [len(slice),
            num_candidates]. -inf keeps a candidate out of the result.
        num_queries: How many queries.
        num_candidates: How many candidates.
        k: How many to find for each query, 1 or more; may exceed `num_candidates`.
        exclude_rows: One array of candidate rows a query, never to be returned for it. Repeats are
            harmless. None excludes nothing.
        block_size: Queries scored at a time; by default so many that a block takes 64 MB.

    Returns:
        rows: [num_queries, k] int32, best first, -1 in empty slots.
        scores: [num_queries, k] float32, -inf in empty slots.

    Raises:
        ValueError: If a score is NaN, a row is out of range, a shape is not as described, or k or
            block_size is below 1.

    Example:
        >>> scores = np.array([[0.5, 2.0, 2.0, 1.0]])
        >>> rows, _ = top_k_in_blocks(lambda block: scores[block], 1, 4, k=2)
        >>> rows
        array([[1, 2]], dtype=int32)
    """
    if block_size is None:
        block_size = max(1, _SCORES_PER_BLOCK // max(1, num_candidates))
    if k < 1 or block_size < 1:
        raise ValueError(
            f"k and block_size must be 1 or more. Received: k={k}, block_size={block_size}."
        )
    if exclude_rows is not None:
        check_one_each("exclude_rows", exclude_rows, num_queries)
    rows = np.full((num_queries, k), -1, np.int32)
    scores = np.full((num_queries, k), -np.inf, np.float32)
    for start in range(0, num_queries, block_size):
        block = slice(start, min(start + block_size, num_queries))
        shape = (block.stop - block.start, num_candidates)
        block_scores = _checked_scores(score_block(block), shape)
        for i, query_scores in enumerate(block_scores, start):
            if exclude_rows is not None:
                _exclude(query_scores, exclude_rows[i])
            top = _top_k(query_scores, k)
            rows[i, : len(top)] = top
            scores[i, : len(top)] = query_scores[top]
    return rows, scores


def check_one_each(name: str, values: Sequence[Any], num_queries: int) -> None:
    """Refuses what should hold one collection a query and does not.

    Raises:
        ValueError: With both numbers, or a string, which would be read letter by letter.
    """
    if len(values) != num_queries:
        raise ValueError(
            f"{name} must hold one collection a query, an empty one to leave nothing out. "
            f"Received: {len(values)} for {num_queries} queries."
        )
    text = next((value for value in values if isinstance(value, str)), None)
    if text is not None:
        raise ValueError(
            f"{name} must hold one collection a query. Received: {text!r}; did you mean [{text!r}]?"
        )


def _checked_scores(scores: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Copies scores to float32, so that excluding does not write into the caller's array."""
    if scores.shape != shape:
        raise ValueError(
            f"score_block must return [num_queries_in_block, num_candidates] = {shape}. "
            f"Received: `scores.shape` = {scores.shape}."
        )
    scores = scores.astype(np.float32)
    num_nan = np.count_nonzero(np.isnan(scores))
    if num_nan:
        raise ValueError(
            f"{num_nan} of {scores.size} scores are NaN, which have no place in an order. "
            "The model has diverged or a feature is NaN."
        )
    return scores


def _exclude(query_scores: np.ndarray, rows: np.ndarray) -> None:
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(query_scores):
        raise ValueError(
            f"Excluded rows must lie in [0, {len(query_scores)}): leave unknown candidates out. "
            f"Received: {rows.min()} to {rows.max()}."
        )
    query_scores[rows] = -np.inf


def _top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Finds the rows of the k best of [num_candidates] scores; fewer where -inf takes the rest."""
    if k < len(scores):
        threshold = np.partition(scores, -k)[-k]
        above = np.flatnonzero(scores > threshold)
        ties = np.flatnonzero(scores == threshold)[: k - len(above)]
        rows = np.concatenate([above, ties])
    else:
        rows = np.arange(len(scores))
    rows = rows[scores[rows] > -np.inf]
    # Equal scores stand in row order within `rows`, and a stable sort leaves them so.
    return rows[np.argsort(-scores[rows], kind="stable")]


def retrieve_by_scores(
    score_queries: Callable[[Sequence[Query]], np.ndarray],
    corpus: CandidateIds,
    queries: Sequence[Query],
    k: int,
    exclude: Sequence[Collection[Any]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Answers `Retriever.retrieve` for anything that can score every candidate of its queries.

    Args:
        score_queries: Given queries, returns [num_queries, num_candidates] scores.
        corpus: The candidates, in the order of the scores.
        queries: As of `Retriever.retrieve`.
        k: As of `Retriever.retrieve`.
        exclude: As of `Retriever.retrieve`.

    Returns:
        Candidate ids and scores, as of `Retriever.retrieve`.
    """
    exclude_rows = exclude_rows_of(corpus, queries, exclude)
    rows, scores = top_k_in_blocks(
        lambda block: score_queries(queries[block]), len(queries), len(corpus), k, exclude_rows
    )
    return corpus.take(rows), scores


def exclude_rows_of(
    corpus: CandidateIds,
    queries: Sequence[Query],
    exclude: Sequence[Collection[Any]] | None,
) -> list[np.ndarray] | None:
    """Looks up the candidate rows that `exclude` of `Retriever.retrieve` names; unknown ids go.

    Raises:
        ValueError: If there is not one collection a query.
    """
    if exclude is None:
        return None
    check_one_each("exclude", exclude, len(queries))
    return [corpus.known_rows(ids) for ids in exclude]


class ExactRetriever:
    """Scores every candidate by a dot product: exact, and linear in the size of the corpus.

    Args:
        candidate_ids: [num_candidates] distinct ids, int or str. Their order breaks ties.
        candidate_embeddings: [num_candidates, dim] floats.
        query_fn: The query tower: queries -> [num_queries, dim] embeddings.

    Raises:
        ValueError: If ids and embeddings do not match.

    Example:
        >>> tower = lambda queries: np.array([[1.0, 0.0]] * len(queries))
        >>> retriever = ExactRetriever(["a", "b"], np.array([[0.1, 0.9], [0.8, 0.2]]), tower)
        >>> retriever.retrieve([{"user_id": "u"}], k=1)[0]
        array([['b']], dtype=object)
    """

    def __init__(
        self,
        candidate_ids: Collection[Any] | np.ndarray,
        candidate_embeddings: np.ndarray,
        query_fn: Callable[[Sequence[Query]], np.ndarray],
    ) -> None:
        self.corpus = CandidateIds(candidate_ids)
        self.candidate_embeddings = np.asarray(candidate_embeddings, np.float32)
        self.query_fn = query_fn
        if self.candidate_embeddings.ndim != 2 or len(self.candidate_embeddings) != len(
            self.corpus
        ):
            raise ValueError(
                f"candidate_embeddings must be [{len(self.corpus)}, dim], one row a candidate id. "
                f"Received: `candidate_embeddings.shape` = {self.candidate_embeddings.shape}."
            )

    def retrieve(
        self,
        queries: Sequence[Query],
        k: int,
        exclude: Sequence[Collection[Any]] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Retrieves the k best candidates of each query; see `Retriever.retrieve`."""
        return retrieve_by_scores(self._scores, self.corpus, queries, k, exclude)

    def _scores(self, queries: Sequence[Query]) -> np.ndarray:
        embeddings = np.asarray(self.query_fn(queries), np.float32)
        expected = (len(queries), self.candidate_embeddings.shape[1])
        if embeddings.shape != expected:
            raise ValueError(
                f"query_fn must return [num_queries, dim] = {expected}. "
                f"Received: `embeddings.shape` = {embeddings.shape}."
            )
        return embeddings @ self.candidate_embeddings.T
