"""Exact top-k over every candidate, with exclusions.

The rule: candidates are ordered by score, equal scores by row, the smaller first; an excluded one
is not found; a slot without a candidate has row 0 and score -inf. `ExactIndex` of
`exports/graph_index.py` follows it in a graph; tests hold both to one table.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.retrieval import Excluded, Query, Retrieved, check_asked

# Scores in memory at a time: 64 MB as float32.
_SCORES_PER_BLOCK = 1 << 24


def top_k_in_blocks(
    score_block: Callable[[slice], np.ndarray],
    num_queries: int,
    num_candidates: int,
    k: int,
    exclude_rows: Sequence[np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k best candidates of each query, scoring a block of queries at a time.

    `score_block` returns the scores of a slice of the queries, [len(slice), num_candidates]; column
    c is the candidate of row c + 1, and -inf keeps it out of the result. `exclude_rows` has an
    array of rows for each query. Returns [num_queries, k] int32 rows and float32 scores. A
    `ValueError` if a score is NaN.
    """
    rows = np.zeros((num_queries, k), np.int32)  # Row 0 and -inf are an empty slot.
    scores = np.full((num_queries, k), -np.inf, np.float32)
    block_size = max(1, _SCORES_PER_BLOCK // max(1, num_candidates))
    for start in range(0, num_queries, block_size):
        block = slice(start, min(start + block_size, num_queries))
        shape = (block.stop - block.start, num_candidates)
        block_scores = _checked_scores(score_block(block), shape)
        if exclude_rows is not None:
            excluded = exclude_rows[block]
            queries = np.repeat(np.arange(shape[0]), [len(listed) for listed in excluded])
            # Excluded before the top k is taken, so k candidates remain if the corpus has them.
            block_scores[queries, np.concatenate(excluded) - 1] = -np.inf
        for line, line_scores in enumerate(block_scores, start):
            positions = best_places(line_scores, k)
            rows[line, : len(positions)] = positions + 1
            scores[line, : len(positions)] = line_scores[positions]
    return rows, scores


def _checked_scores(scores: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Copies scores to float32: exclusion does not write into the caller's array."""
    if scores.shape != shape:
        raise ValueError(
            f"Scores must be [num_queries, num_candidates] = {shape}. "
            f"Received: `scores.shape` = {scores.shape}."
        )
    scores = scores.astype(np.float32, order="C")  # Each line is contiguous.
    if num_nan := np.count_nonzero(np.isnan(scores)):
        raise ValueError(
            f"{num_nan} of {scores.size} scores are NaN, which cannot be ranked. The model has "
            "diverged or a feature is NaN."
        )
    return scores


def best_places(scores: np.ndarray, k: int) -> np.ndarray:
    """Returns the positions of the k best of [n] scores above -inf, best first, ties in order."""
    # The k-th best score. All at its level are kept until ties are broken by their order.
    lowest = np.partition(scores, -k)[-k] if k < len(scores) else -np.inf
    positions = np.flatnonzero(scores >= lowest)
    positions = positions[np.argsort(-scores[positions], kind="stable")][:k]
    return positions[scores[positions] > -np.inf]


def merge(
    rows: np.ndarray, scores: np.ndarray, other_rows: np.ndarray, other_scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Merges a query's k best candidates, [k], with others, [any], of which it has none.

    Returns the rows and the scores of the k best of both, in the order of the rule above.

    Example:
        >>> merge(np.array([4, 2]), np.array([0.5, 0.1]), np.array([3, 1]), np.array([0.5, 0.3]))
        (array([3, 4]), array([0.5, 0.5]))
    """
    rows, scores = np.append(rows, other_rows), np.append(scores, other_scores)
    best = np.lexsort((rows, -scores))[: len(rows) - len(other_rows)]
    return rows[best], scores[best]


@dataclass(frozen=True, eq=False)
class ScoreRetriever:
    """Retrieves by a score of every item for each query: `score` returns [num_queries, num_items].

    All baselines but `MostPopular` return it from `fit`; the history of a query gives the scores.
    An item whose score is -inf is never retrieved; NaN is refused (`ValueError`).

    Example:
        >>> scored = ScoreRetriever(Ids(["a", "b"]), lambda queries: np.array([[0.1, 0.9]]))
        >>> scored.retrieve([{}], k=2, exclude=[["b"]])[0]
        array([['a', '']], dtype=object)
    """

    items: Ids
    score: Callable[[Sequence[Query]], np.ndarray]

    def retrieve(self, queries: Sequence[Query], k: int, exclude: Excluded = None) -> Retrieved:
        """Retrieves the k best candidates of each query; see `Retriever.retrieve`."""
        check_asked(queries, k, exclude, ids_are_text=self.items.are_text)
        excluded = None if exclude is None else self.items.rows_by_list(exclude)
        rows, scores = top_k_in_blocks(
            lambda block: self.score(queries[block]), len(queries), len(self.items), k, excluded
        )
        return self.items.take(rows), scores


class ExactRetriever(ScoreRetriever):
    """Scores every candidate by a dot product: exact, in time linear in the size of the corpus.

    `embed_queries`, the query tower, turns queries into [num_queries, dim].
    """

    def __init__(
        self,
        candidate_ids: Collection[Any] | np.ndarray,
        candidate_embeddings: np.ndarray,
        embed_queries: Callable[[Sequence[Query]], np.ndarray],
    ) -> None:
        items, embeddings = Ids(candidate_ids), np.asarray(candidate_embeddings, np.float32)
        if len(embeddings) != len(items):
            raise ValueError(
                f"candidate_embeddings must be [{len(items)}, dim], one row a candidate id. "
                f"Received: `candidate_embeddings.shape` = {embeddings.shape}."
            )
        super().__init__(
            items, lambda queries: np.asarray(embed_queries(queries), np.float32) @ embeddings.T
        )
