"""Exact top-k over every candidate, with exclusions: what approximate search is compared with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.retrieval import (
    Excluded,
    Query,
    Retrieved,
    check_asked,
    check_k,
    check_one_each,
)

# Scores held at a time: 64 MB as float32.
_SCORES_PER_BLOCK = 1 << 24


def top_k_in_blocks(
    score_block: Callable[[slice], np.ndarray],
    num_queries: int,
    num_candidates: int,
    k: int,
    exclude_rows: Sequence[np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k best candidates of each query, scoring a block of queries at a time.

    Exact, and the same for any block size: equal scores are ordered by row, the smaller first.
    Scores are compared as float32.

    Args:
        score_block: Given a slice of the queries, returns their scores, [len(slice),
            num_candidates]; column c is the candidate of row c + 1. -inf keeps a candidate out of
            the result.
        num_queries: How many queries.
        num_candidates: How many candidates.
        k: How many to find for each query, 1 or more; may exceed `num_candidates`.
        exclude_rows: One array of candidate rows a query, never to be returned for it. Repeats and
            row 0 are harmless. None excludes nothing.

    Returns:
        rows: [num_queries, k] int32 from 1, best first, 0 in empty slots.
        scores: [num_queries, k] float32, -inf in empty slots.

    Raises:
        ValueError: If a score is NaN, a row is out of range, a shape is not as described, or k is
            below 1.

    Example:
        >>> scores = np.array([[0.5, 2.0, 2.0, 1.0]])
        >>> rows, _ = top_k_in_blocks(lambda block: scores[block], 1, 4, k=2)
        >>> rows
        array([[2, 3]], dtype=int32)
    """
    check_k(k)
    if exclude_rows is not None:
        check_one_each("exclude_rows", exclude_rows, num_queries)
    rows = np.zeros((num_queries, k), np.int32)
    scores = np.full((num_queries, k), -np.inf, np.float32)
    num_found = min(k, num_candidates)
    block_size = max(1, _SCORES_PER_BLOCK // max(1, num_candidates))
    for start in range(0, num_queries, block_size):
        block = slice(start, min(start + block_size, num_queries))
        shape = (block.stop - block.start, num_candidates)
        block_scores = _checked_scores(score_block(block), shape)
        if exclude_rows is not None:
            _exclude(block_scores, exclude_rows[block])
        rows[block, :num_found], scores[block, :num_found] = _top_k(block_scores, num_found)
    return rows, scores


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


def _exclude(scores: np.ndarray, exclude_rows: Sequence[np.ndarray]) -> None:
    """Sets the scores of excluded rows to -inf, in place."""
    rows = np.concatenate(exclude_rows)
    if not len(rows):
        return
    if not 0 <= rows.min() <= rows.max() <= scores.shape[1]:
        raise ValueError(
            f"Excluded rows must lie in [0, {scores.shape[1]}], 0 standing for unknown candidates. "
            f"Received: {rows.min()} to {rows.max()}."
        )
    queries = np.repeat(np.arange(len(scores)), [len(of_query) for of_query in exclude_rows])
    scores[queries[rows > 0], rows[rows > 0] - 1] = -np.inf


def _top_k(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k best of [num_queries, num_candidates] scores, k at most num_candidates."""
    threshold = np.partition(scores, -k, axis=1)[:, [-k]]
    is_above = scores > threshold
    is_tie = scores == threshold
    # Of those at the threshold, the first in row order fill what is left.
    num_ties = k - is_above.sum(axis=1, keepdims=True, dtype=np.int32)
    is_found = is_above | (is_tie & (np.cumsum(is_tie, axis=1, dtype=np.int32) <= num_ties))
    places = np.nonzero(is_found)[1].reshape(-1, k)
    found = np.take_along_axis(scores, places, axis=1)
    # Equal scores stand in row order within `places`, and a stable sort leaves them so.
    order = np.argsort(-found, axis=1, kind="stable")
    rows = np.take_along_axis(places, order, axis=1) + 1
    found = np.take_along_axis(found, order, axis=1)
    return np.where(found > -np.inf, rows, 0), found


def retrieve_by_scores(
    score_queries: Callable[[Sequence[Query]], np.ndarray],
    corpus: Ids,
    queries: Sequence[Query],
    k: int,
    exclude: Excluded = None,
) -> Retrieved:
    """Answers `Retriever.retrieve` for anything that can score every candidate of its queries.

    `score_queries` returns [num_queries, num_candidates], columns in the order of the corpus.
    """
    check_asked(queries, k, exclude, ids_are_text=corpus.are_text)
    exclude_rows = exclude_rows_of(corpus, exclude)
    rows, scores = top_k_in_blocks(
        lambda block: score_queries(queries[block]), len(queries), len(corpus), k, exclude_rows
    )
    return corpus.take(rows), scores


def exclude_rows_of(corpus: Ids, exclude: Excluded) -> list[np.ndarray] | None:
    """Looks up the rows that are excluded, without unknown ids."""
    return None if exclude is None else [corpus.known_rows(ids) for ids in exclude]


class ExactRetriever:
    """Scores every candidate by a dot product: exact, and linear in the size of the corpus.

    Candidates are distinct ids, int or str, whose order breaks ties, and [num_candidates, dim]
    floats; a `ValueError` if the two do not match. `embed_queries`, the query tower, turns queries
    into [num_queries, dim].

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
        embed_queries: Callable[[Sequence[Query]], np.ndarray],
    ) -> None:
        self.corpus = Ids(candidate_ids)
        self.candidate_embeddings = np.asarray(candidate_embeddings, np.float32)
        self._embed_queries = embed_queries
        if self.candidate_embeddings.ndim != 2 or len(self.candidate_embeddings) != len(
            self.corpus
        ):
            raise ValueError(
                f"candidate_embeddings must be [{len(self.corpus)}, dim], one row a candidate id. "
                f"Received: `candidate_embeddings.shape` = {self.candidate_embeddings.shape}."
            )

    def retrieve(self, queries: Sequence[Query], k: int, exclude: Excluded = None) -> Retrieved:
        """Retrieves the k best candidates of each query; see `Retriever.retrieve`."""
        return retrieve_by_scores(self._scores, self.corpus, queries, k, exclude)

    def _scores(self, queries: Sequence[Query]) -> np.ndarray:
        embeddings = np.asarray(self._embed_queries(queries), np.float32)
        expected = (len(queries), self.candidate_embeddings.shape[1])
        if embeddings.shape != expected:
            raise ValueError(
                f"embed_queries must return [num_queries, dim] = {expected}. "
                f"Received: `embeddings.shape` = {embeddings.shape}."
            )
        return embeddings @ self.candidate_embeddings.T
