"""Measures a retriever: per query first, then means with intervals, whole and by slice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from tfrs_pipeline.data.ids import CandidateIds, as_id_array
from tfrs_pipeline.evaluation.bootstrap import Interval, bootstrap_intervals
from tfrs_pipeline.evaluation.metrics import (
    QUERY_METRICS,
    average_popularity,
    coverage,
    find_hits,
    gini,
    recommendation_counts_at_k,
)
from tfrs_pipeline.retrieval import Query, Retriever

if TYPE_CHECKING:
    from tfrs_pipeline.data.split import EvaluationQueries

Exclude: TypeAlias = Literal["clicked", "seen", "none"]


@dataclass(frozen=True)
class SliceResult:
    """What was measured of one part of the candidates; the whole corpus is one such part.

    Attributes:
        per_query: Metric name, as "ndcg@100", -> [num_queries] float64; NaN where the query has
            nothing relevant in this part.
        intervals: The same names -> mean and interval over the queries.
        set_metrics: "coverage@20", "average_popularity@20", "gini@20": of all lists together.
        num_candidates: Size of this part.
        num_queries: Queries that have something relevant in this part.
        num_relevant: Relevant items in this part, all queries together.
    """

    per_query: Mapping[str, np.ndarray]
    intervals: Mapping[str, Interval]
    set_metrics: Mapping[str, float]
    num_candidates: int
    num_queries: int
    num_relevant: int

    def summary(self) -> dict[str, Any]:
        """Returns the numbers for JSON: a dict of mean, low and high, or one number; no arrays."""
        return {
            **{name: interval.as_dict() for name, interval in self.intervals.items()},
            **{name: None if np.isnan(x) else x for name, x in self.set_metrics.items()},
            "num_candidates": self.num_candidates,
            "num_queries": self.num_queries,
            "num_relevant": self.num_relevant,
        }


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` measured.

    Attributes:
        user_ids: [num_queries] users of the measured queries; every per-query array is in this
            order.
        overall: Of the whole corpus.
        slices: Of each part of the candidates.
        num_skipped: Queries with nothing relevant (left): not measured.
        num_relevant_excluded: Relevant items that `exclude` keeps out of the ranking: taken out of
            the relevant.
        num_relevant_unknown: Relevant items that are not in the corpus: they stay in the
            denominator and are never found. They belong to no slice.
    """

    user_ids: np.ndarray
    overall: SliceResult
    slices: Mapping[str, SliceResult]
    num_skipped: int
    num_relevant_excluded: int
    num_relevant_unknown: int

    @property
    def per_query(self) -> Mapping[str, np.ndarray]:
        """Metric name -> [num_queries] float64, of the whole corpus."""
        return self.overall.per_query

    def summary(self) -> dict[str, Any]:
        """Returns the numbers for JSON, slices under "slices"; NaN becomes None."""
        return {
            **self.overall.summary(),
            "num_skipped": self.num_skipped,
            "num_relevant_excluded": self.num_relevant_excluded,
            "num_relevant_unknown": self.num_relevant_unknown,
            "slices": {name: part.summary() for name, part in self.slices.items()},
        }


def evaluate(
    retriever: Retriever,
    queries: EvaluationQueries,
    *,
    candidate_ids: Sequence[Any] | np.ndarray,
    candidate_counts: np.ndarray,
    exclude: Exclude = "clicked",
    cutoffs: Sequence[int] = (20, 100),
    batch_size: int = 1024,
    num_bootstrap: int = 1000,
    seed: int = 0,
    slices: Mapping[str, np.ndarray] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Measures a retriever on what its users went on to click.

    Relevant items that `exclude` keeps out of the ranking are taken out of the relevant and
    counted; queries with nothing relevant left are skipped and counted. Relevant items without a
    training count stay in the denominator.

    Args:
        retriever: Anything that retrieves over these candidates.
        queries: Histories and relevant items, from `events.split.evaluation_queries`.
        candidate_ids: [num_candidates] ids of the whole corpus, int or str as in `queries`.
        candidate_counts: [num_candidates] training positives, aligned with `candidate_ids`.
        exclude: What is left out of a user's ranking: what the user clicked before the cut, what
            the user saw before it, or nothing.
        cutoffs: Values of k, 1 or more.
        batch_size: Queries a call of the retriever.
        num_bootstrap: Resamples for the intervals; 0 gives none.
        seed: Of the resamples.
        slices: Name -> [num_candidates] bool, True in the slice; `popularity_slices` of the counts
            unless given. A slice's metrics count only the relevant items of the slice, in the same
            ranking over the whole corpus.
        on_progress: Called after each batch with the queries done and their total.

    Returns:
        Per-query values, means with intervals, and counts.

    Raises:
        ValueError: If an argument is not as described, no query has anything relevant, or the
            retriever breaks its contract: wrong shape, a candidate twice, an excluded or unknown
            candidate.
    """
    corpus = CandidateIds(candidate_ids)
    counts = np.asarray(candidate_counts)
    if slices is None:
        slices = popularity_slices(counts)
    cutoffs = sorted(set(cutoffs))
    _check_arguments(corpus, counts, slices, cutoffs, batch_size)

    excluded = _excluded_ids(queries, exclude)
    relevant, num_excluded = _relevant_left(queries.relevant, excluded)
    measured = np.flatnonzero([len(ids) for ids in relevant])
    _check_measured(measured, relevant, corpus, num_excluded, exclude)
    relevant_rows = [corpus.known_rows(relevant[i]) for i in measured]
    all_queries = queries.as_queries()
    rows = _retrieve_rows(
        retriever,
        [all_queries[i] for i in measured],
        corpus,
        cutoffs[-1],
        None if excluded is None else [excluded[i] for i in measured],
        batch_size,
        on_progress,
    )

    is_hit = find_hits(rows, relevant_rows)
    num_relevant = np.array([len(relevant[i]) for i in measured])
    parts = [_Part(is_hit, num_relevant, np.ones(len(corpus), bool))]
    for in_slice in slices.values():
        num_in_slice = np.array([np.count_nonzero(in_slice[r]) for r in relevant_rows])
        parts.append(_Part(is_hit & in_slice[rows], num_in_slice, in_slice))
    overall, *of_slices = _measure(rows, parts, counts, cutoffs, num_bootstrap, seed)
    return EvaluationResult(
        user_ids=np.asarray(queries.user_ids)[measured],
        overall=overall,
        slices=dict(zip(slices, of_slices, strict=True)),
        num_skipped=len(relevant) - len(measured),
        num_relevant_excluded=num_excluded,
        num_relevant_unknown=int(num_relevant.sum()) - sum(len(r) for r in relevant_rows),
    )


def popularity_slices(
    candidate_counts: np.ndarray, *, head_share: float = 0.5, torso_share: float = 0.3
) -> dict[str, np.ndarray]:
    """Cuts the candidates into head, torso and tail by their training counts.

    By falling count, ties by row: the head is the fewest candidates that hold `head_share` of the
    training positives, the torso the next ones up to `head_share + torso_share`, the tail all
    others. Candidates without a count are always tail.

    Args:
        candidate_counts: [num_candidates] training positives, 0 or more.
        head_share: Share of the training positives, in (0, 1).
        torso_share: Share of them, in (0, 1 - head_share].

    Returns:
        "head", "torso", "tail" -> [num_candidates] bool; each candidate is in exactly one.

    Raises:
        ValueError: If a count is negative or a share is out of range.

    Example:
        >>> {name: np.flatnonzero(x) for name, x in popularity_slices([1, 5, 0, 3, 1]).items()}
        {'head': array([1]), 'torso': array([3]), 'tail': array([0, 2, 4])}
    """
    counts = np.asarray(candidate_counts)
    if counts.ndim != 1 or np.any(counts < 0):
        raise ValueError("candidate_counts must be one number a candidate, 0 or more.")
    if not (head_share > 0 and torso_share > 0 and head_share + torso_share <= 1):
        raise ValueError(
            "head_share and torso_share must be above 0 and 1 at most together. "
            f"Received: {head_share} and {torso_share}."
        )
    order = np.argsort(-counts, kind="stable")
    held_by_more_popular = np.cumsum(counts[order]) - counts[order]
    # A sum of shares such as .5 + .3 is a hair off; counts are whole, so half of one is margin.
    bounds = np.array([head_share, head_share + torso_share]) * counts.sum() - 1e-6
    part = np.empty(len(counts), np.int8)
    part[order] = np.searchsorted(bounds, held_by_more_popular)
    return {name: part == number for number, name in enumerate(("head", "torso", "tail"))}


def paired_difference(
    a: EvaluationResult,
    b: EvaluationResult,
    metric: str,
    *,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> Interval:
    """Computes by how much a is above b, query by query, with a bootstrap interval.

    Far narrower than the two intervals apart: what makes a query hard is common to both models.

    Args:
        a: A result.
        b: Another retriever's result, on the same queries with the same `exclude`.
        metric: A per-query metric of both, as "ndcg@100".
        num_bootstrap: Resamples.
        seed: Of the resamples.

    Returns:
        Mean and interval of a minus b. An interval that leaves out 0 is a difference.

    Raises:
        ValueError: If the two were not measured on the same users, or the metric is not in both.
    """
    if not np.array_equal(a.user_ids, b.user_ids):
        raise ValueError(
            "The two results must be of the same users: evaluate both on the same queries with the "
            f"same `exclude`. Received: {len(a.user_ids)} and {len(b.user_ids)} users."
        )
    for result in (a, b):
        if metric not in result.per_query:
            raise ValueError(
                f"Metric {metric!r} was not measured. Measured: {', '.join(result.per_query)}."
            )
    difference = a.per_query[metric] - b.per_query[metric]
    return bootstrap_intervals(difference[:, None], num_bootstrap=num_bootstrap, seed=seed)[0]


def _check_arguments(
    corpus: CandidateIds,
    counts: np.ndarray,
    slices: Mapping[str, np.ndarray],
    cutoffs: Sequence[int],
    batch_size: int,
) -> None:
    shape = (len(corpus),)
    if counts.shape != shape:
        raise ValueError(
            f"candidate_counts must hold one count a candidate, {shape}. "
            f"Received: `candidate_counts.shape` = {counts.shape}."
        )
    for name, in_slice in slices.items():
        if in_slice.shape != shape or in_slice.dtype != bool:
            raise ValueError(
                f"Slice {name!r} must be a bool a candidate, {shape}. "
                f"Received: shape {in_slice.shape}, {in_slice.dtype}."
            )
    if not cutoffs or cutoffs[0] < 1 or batch_size < 1:
        raise ValueError(
            "Needs at least one cutoff, and cutoffs and batch_size of 1 or more. "
            f"Received: cutoffs={list(cutoffs)}, batch_size={batch_size}."
        )


def _excluded_ids(queries: EvaluationQueries, exclude: Exclude) -> list[np.ndarray] | None:
    if exclude == "none":
        return None
    if exclude == "clicked":
        return queries.clicked
    if exclude == "seen":
        return queries.seen
    raise ValueError(f"exclude must be 'clicked', 'seen' or 'none'. Received: {exclude!r}.")


def _relevant_left(
    relevant: Sequence[np.ndarray], excluded: Sequence[np.ndarray] | None
) -> tuple[list[list[Any]], int]:
    """Takes the excluded out of the relevant ids; also returns how many that were."""
    if excluded is None:
        return [sorted(set(ids.tolist())) for ids in relevant], 0
    left = []
    num_excluded = 0
    for ids, excluded_ids in zip(relevant, excluded, strict=True):
        wanted = set(ids.tolist())
        rest = wanted - set(excluded_ids.tolist())
        num_excluded += len(wanted) - len(rest)
        left.append(sorted(rest))
    return left, num_excluded


def _check_measured(
    measured: np.ndarray,
    relevant: Sequence[list[Any]],
    corpus: CandidateIds,
    num_excluded: int,
    exclude: Exclude,
) -> None:
    if not len(measured):
        raise ValueError(
            f"Nothing to measure: none of {len(relevant)} queries has a relevant item that "
            f"exclude={exclude!r} leaves in the ranking ({num_excluded} were left out)."
        )
    ids = relevant[measured[0]]
    if as_id_array(ids).dtype != corpus.ids.dtype:
        raise ValueError(
            "Relevant ids and candidate ids must be of one type: load both the same way. "
            f"Received: relevant {ids[0]!r}, candidate {corpus.ids[0]!r}."
        )


def _retrieve_rows(
    retriever: Retriever,
    queries: Sequence[Query],
    corpus: CandidateIds,
    k: int,
    excluded: Sequence[np.ndarray] | None,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    """Retrieves for all queries, holding the retriever to its contract: [num_queries, k] rows."""
    rows = np.empty((len(queries), k), np.int32)
    for start in range(0, len(queries), batch_size):
        batch = slice(start, min(start + batch_size, len(queries)))
        batch_excluded = None if excluded is None else excluded[batch]
        ids, scores = retriever.retrieve(queries[batch], k, batch_excluded)
        shape = (batch.stop - batch.start, k)
        if ids.shape != shape or scores.shape != shape:
            raise _broken(retriever, f"must return ids and scores of {shape}", ids, scores)
        rows[batch] = corpus.rows(ids).reshape(shape)
        if np.any((rows[batch] < 0) & (ids != corpus.empty_id)):
            raise _broken(retriever, "returned ids that are not candidates", ids, scores)
        # A NaN compares as False, so it fails here too.
        if not np.all(scores[:, 1:] <= scores[:, :-1]):
            raise _broken(retriever, "must return the best first, no NaN", ids, scores)
        in_order = np.sort(rows[batch], axis=1)
        if np.any((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)):
            raise _broken(retriever, "returned a candidate twice for a query", ids, scores)
        if batch_excluded is not None:
            excluded_rows = [corpus.known_rows(ids_) for ids_ in batch_excluded]
            if find_hits(rows[batch], excluded_rows).any():
                raise _broken(retriever, "returned excluded candidates", ids, scores)
        if on_progress is not None:
            on_progress(batch.stop, len(queries))
    return rows


def _broken(retriever: Retriever, what: str, ids: np.ndarray, scores: np.ndarray) -> ValueError:
    first = (ids[0, :5], scores[0, :5]) if ids.ndim == scores.ndim == 2 and len(ids) else ()
    return ValueError(
        f"{type(retriever).__name__}.retrieve {what}; see `Retriever`. Received: ids {ids.shape} "
        f"{ids.dtype}, scores {scores.shape} {scores.dtype}, first {first}."
    )


@dataclass(frozen=True)
class _Part:
    """What is measured of a part of the candidates.

    is_hit: [num_queries, k] bool; num_relevant: [num_queries]; in_part: [num_candidates] bool.
    """

    is_hit: np.ndarray
    num_relevant: np.ndarray
    in_part: np.ndarray


def _measure(
    rows: np.ndarray,
    parts: Sequence[_Part],
    counts: np.ndarray,
    cutoffs: Sequence[int],
    num_bootstrap: int,
    seed: int,
) -> list[SliceResult]:
    """Measures each part of the candidates in the ranking `rows`, [num_queries, k]."""
    per_query = [
        {
            f"{name}@{k}": metric(part.is_hit, part.num_relevant, k)
            for name, metric in QUERY_METRICS.items()
            for k in cutoffs
        }
        for part in parts
    ]
    columns = np.stack([values for of_part in per_query for values in of_part.values()], axis=1)
    intervals = iter(bootstrap_intervals(columns, num_bootstrap=num_bootstrap, seed=seed))
    return [
        SliceResult(
            per_query=values,
            intervals={name: next(intervals) for name in values},
            set_metrics=_set_metrics(rows, part.in_part, counts, cutoffs),
            num_candidates=int(part.in_part.sum()),
            num_queries=int(np.count_nonzero(part.num_relevant)),
            num_relevant=int(part.num_relevant.sum()),
        )
        for part, values in zip(parts, per_query, strict=True)
    ]


def _set_metrics(
    rows: np.ndarray, in_part: np.ndarray, counts: np.ndarray, cutoffs: Sequence[int]
) -> dict[str, float]:
    metrics = {}
    for k in cutoffs:
        times_retrieved = recommendation_counts_at_k(rows, len(in_part), k)[in_part]
        metrics[f"coverage@{k}"] = coverage(times_retrieved)
        metrics[f"average_popularity@{k}"] = average_popularity(times_retrieved, counts[in_part])
        metrics[f"gini@{k}"] = gini(times_retrieved)
    return metrics
