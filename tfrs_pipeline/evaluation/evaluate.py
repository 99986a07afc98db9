"""Measures retrievers: per query first, then means with intervals, overall and by slice."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np

from tfrs_pipeline.data.holdout import Holdout, check_holdout
from tfrs_pipeline.data.ids import Ids, as_id_array
from tfrs_pipeline.data.schema import Exclude
from tfrs_pipeline.evaluation.bootstrap import bootstrap_intervals
from tfrs_pipeline.evaluation.metrics import (
    even_metrics,
    find_hits,
    popularity_slices,
    query_metrics,
    set_metrics,
)
from tfrs_pipeline.evaluation.results import Evaluation, EvaluationResult, SliceResult
from tfrs_pipeline.retrieval import Query, Retriever

QUERIES_PER_CALL = 1024


def evaluate(
    retrievers: Retriever | Mapping[str, Retriever],
    holdout: Holdout,
    *,
    exclude: Exclude = "clicked",
    cutoffs: Sequence[int] = (20, 100),
    num_bootstrap: int = 1000,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Measures retrievers on what users clicked afterwards; the result prints as a table.

    Relevant items that `exclude` keeps out of the ranking are removed and counted; queries left
    with nothing relevant are skipped and counted. Relevant items without a training count stay in
    the denominator. A slice counts only its own relevant items, in the ranking of the whole corpus.

    Args:
        retrievers: One, named by its class, or several by name, compared with the first.
        holdout: The queries and their relevant items, from `Log.split`. For very many users, a
            `Holdout.sample` gives nearly the same means in less time.
        exclude: What is excluded from a user's ranking; see `Holdout.excluded`.
        cutoffs: Values of k, 1 or more.
        num_bootstrap: Resamples for the intervals; 0 computes means only.
        seed: Seed of the resamples.
        on_progress: Called with the retriever's name, the queries done and their total.

    Returns:
        An `Evaluation`. Its `results`, by name, have means with intervals and values by query,
        overall and by slice; its `differences` are from the first.

    Raises:
        TypeError: If an argument is not a retriever, a holdout or a list of cutoffs.
        ValueError: If nothing is left to find, or a retriever breaks its contract: wrong shape, a
            candidate twice, an excluded or unknown candidate.

    Example:
        >>> import pyarrow as pa
        >>> from tfrs_pipeline.data.log import Log
        >>> from tfrs_pipeline.evaluation.baselines import Ease, MostPopular
        >>> clicks = pa.table({"user_id": [1] * 4 + [2] * 4, "item_id": [*"abcd", *"bacd"]})
        >>> train, _, test = Log.from_table(clicks).split("last_n", min_positives=3)
        >>> models = {"popular": MostPopular().fit(train), "ease": Ease(l2=1.0).fit(train)}
        >>> print(evaluate(models, test, cutoffs=(1,), num_bootstrap=0))
        model    ndcg@1  from popular  recall@1  tail/recall@1  coverage@1  average_popularity@1
        popular  1.0000                  1.0000         1.0000      0.2500                0.0000
        ease     1.0000       +0.0000    1.0000         1.0000      0.2500                0.0000
        average_popularity: mean training positives of the items that are retrieved; those of the \
items to find are 0.0
        2 of 2 items to find have no positive in training
    """
    named, cutoffs = _named(retrievers), _checked_cutoffs(cutoffs)
    check_holdout(holdout)
    truth = Truth.of(holdout, exclude)
    results = {}
    for name, retriever in named.items():
        report = functools.partial(on_progress, name) if on_progress else None
        rows = _retrieve_rows(retriever, truth, cutoffs[-1], report)
        results[name] = _measure(rows, truth, cutoffs, num_bootstrap, seed)
    return Evaluation(results, cutoffs, num_bootstrap, seed, holdout.by)


def _named(retrievers: Retriever | Mapping[str, Retriever]) -> Mapping[str, Retriever]:
    if not isinstance(retrievers, Mapping):
        retrievers = {type(retrievers).__name__: retrievers}
    if not retrievers:
        raise ValueError("Needs at least one retriever. Received: none.")
    for name, retriever in retrievers.items():
        if isinstance(retriever, type) or not hasattr(retriever, "retrieve"):
            has_fit = hasattr(retriever, "fit") and not isinstance(retriever, type)
            hint = ": pass what its fit returns" if has_fit else "; see `Retriever`"
            raise TypeError(f"{name} has no `retrieve`{hint}. Received: {retriever!r}.")
    return retrievers


def _checked_cutoffs(cutoffs: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(cutoffs, Iterable):
        raise TypeError(f"cutoffs must be a list, such as [20, 100]. Received: {cutoffs!r}.")
    cutoffs = tuple(cutoffs)
    if not cutoffs or not all(isinstance(k, int | np.integer) and k >= 1 for k in cutoffs):
        raise ValueError(
            f"cutoffs must be integers of 1 or more, at least one. Received: {list(cutoffs)}."
        )
    return tuple(sorted(set(cutoffs)))


Pairs: TypeAlias = tuple[np.ndarray, np.ndarray]
"""[num_pairs] query numbers, ascending, and [num_pairs] candidate rows."""


@dataclass(frozen=True)
class Truth:
    """The queries of a holdout that can be measured, at `places`, and their relevant items.

    Pairs leave out candidates outside the corpus, but `num_relevant`, [num_queries], counts them.
    `num_excluded` counts the relevant items that were excluded, over all queries.
    """

    holdout: Holdout
    exclude: Exclude
    items: Ids
    places: np.ndarray
    excluded: list[np.ndarray] | None
    excluded_pairs: Pairs
    relevant: Pairs
    num_relevant: np.ndarray
    num_excluded: int

    @cached_property
    def queries(self) -> list[Query]:
        """The measured queries."""
        all_queries = self.holdout.as_queries()
        return [all_queries[i] for i in self.places]

    @classmethod
    def of(cls, holdout: Holdout, exclude: Exclude) -> "Truth":
        """Looks up ids once for all retrievers; a `ValueError` if nothing is left to find."""
        items, excluded = Ids(holdout.candidate_ids), holdout.excluded(exclude)
        num_queries = len(holdout)
        lists = [*holdout.relevant, *(excluded or ())]
        # Empty lists are left out, because an empty float array would turn all ids into floats, as
        # unsigned integers beside signed ones would without `as_id_array`.
        given = [as_id_array(ids) for ids in lists if len(ids)]
        ids = np.concatenate([items.values[:0], *given])
        if len(ids) and isinstance(ids[0], str) != isinstance(items.empty_id, str):
            raise ValueError(
                "Relevant ids and candidate ids must be of one type: load both the same way. "
                f"Received: relevant {ids.tolist()[0]!r}, candidate {items.values.tolist()[0]!r}."
            )
        rows = items.rows(ids).astype(np.int64)
        # Unknown ids get distinct numbers above the corpus.
        is_unknown = rows == 0
        rows[is_unknown] = len(items) + 1 + np.unique(ids[is_unknown], return_inverse=True)[1]
        query = np.repeat(np.arange(len(lists)), [len(ids) for ids in lists])
        stride = rows.max(initial=0) + 1
        is_relevant = query < num_queries
        relevant = np.unique(query[is_relevant] * stride + rows[is_relevant])
        excluded_keys = np.unique((query[~is_relevant] - num_queries) * stride + rows[~is_relevant])
        left = np.setdiff1d(relevant, excluded_keys, assume_unique=True)
        num_relevant = np.bincount(left // stride, minlength=num_queries)
        measured = np.flatnonzero(num_relevant)
        num_excluded = len(relevant) - len(left)
        if not len(measured):
            raise ValueError(
                f"Nothing to measure: none of {num_queries} queries has a relevant item that "
                f"exclude={exclude!r} leaves in the ranking ({num_excluded} were excluded). "
                "Exclude less (evaluation.exclude), or test on a larger part."
            )
        place = np.full(num_queries, -1)
        place[measured] = np.arange(len(measured))

        def pairs(keys: np.ndarray) -> Pairs:
            queries, rows = place[keys // stride], keys % stride
            is_kept = (queries >= 0) & (rows <= len(items))
            return queries[is_kept], rows[is_kept]

        return cls(
            holdout=holdout,
            exclude=exclude,
            items=items,
            places=measured,
            excluded=None if excluded is None else [excluded[i] for i in measured],
            excluded_pairs=pairs(excluded_keys),
            relevant=pairs(left),
            num_relevant=num_relevant[measured],
            num_excluded=num_excluded,
        )


def check_measurable(holdout: Holdout, exclude: Exclude) -> None:
    """Refuses (`ValueError`) a holdout in which `exclude` leaves nothing to find."""
    Truth.of(holdout, exclude)


def _retrieve_rows(
    retriever: Retriever, truth: Truth, k: int, report: Callable[[int, int], None] | None
) -> np.ndarray:
    """Retrieves for all queries, and checks the retriever's contract: [num_queries, k] rows."""
    num_queries = len(truth.queries)
    rows = np.empty((num_queries, k), np.int32)
    excluded_queries, excluded_rows = truth.excluded_pairs
    for start in range(0, num_queries, QUERIES_PER_CALL):
        batch = slice(start, min(start + QUERIES_PER_CALL, num_queries))
        excluded = None if truth.excluded is None else truth.excluded[batch]
        answer = retriever.retrieve(truth.queries[batch], k, excluded)
        shape = (batch.stop - batch.start, k)
        returns = f"must return ids and scores of {shape}"
        if not isinstance(answer, tuple | list) or len(answer) != 2:
            raise _broken(retriever, returns, type(answer).__name__)
        ids, scores = map(np.asarray, answer)
        if ids.shape != shape or scores.shape != shape:
            raise _broken(retriever, returns, _described(ids, scores))
        rows[batch] = truth.items.rows(ids).reshape(shape)
        mine = slice(*np.searchsorted(excluded_queries, [batch.start, batch.stop]))
        is_excluded = find_hits(rows[batch], excluded_queries[mine] - start, excluded_rows[mine])
        for fault in _faults(rows[batch], ids, scores, truth.items, is_excluded):
            raise _broken(retriever, fault, _described(ids, scores))
        if report is not None:
            report(batch.stop, num_queries)
    return rows


def _faults(
    rows: np.ndarray, ids: np.ndarray, scores: np.ndarray, items: Ids, is_excluded: np.ndarray
) -> Iterator[str]:
    if np.any((rows == 0) & (ids != items.empty_id)):
        yield "returned ids that are not candidates"
    if scores.dtype.kind not in "biuf":
        yield "must return numbers as scores"
    if np.isnan(scores).any() or np.any(scores[:, 1:] > scores[:, :-1]):
        yield "must return the best first, without NaN"
    in_order = np.sort(rows, axis=1)
    if np.any((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] > 0)):
        yield "returned a candidate twice for a query"
    if is_excluded.any():
        yield "returned excluded candidates"


def _broken(retriever: Retriever, what: str, received: str) -> ValueError:
    name = type(retriever).__name__
    return ValueError(f"{name}.retrieve {what}; see `Retriever`. Received: {received}.")


def _described(ids: np.ndarray, scores: np.ndarray) -> str:
    first = (ids[0, :5], scores[0, :5]) if ids.ndim == scores.ndim == 2 and len(ids) else ()
    return f"ids {ids.shape} {ids.dtype}, scores {scores.shape} {scores.dtype}, first {first}"


def _measure(
    rows: np.ndarray, truth: Truth, cutoffs: Sequence[int], num_bootstrap: int, seed: int
) -> EvaluationResult:
    """Measures the ranking `rows`, [num_queries, k], over the whole corpus and in each part."""
    counts = truth.holdout.candidate_counts
    parts = {part.name: part for part in _parts(rows, truth)}
    per_query = [
        {
            f"{metric}@{k}": values
            for k in cutoffs
            for metric, values in query_metrics(part.is_hit, part.num_relevant, k).items()
        }
        for part in parts.values()
    ]
    user_ids, exposure = np.asarray(truth.holdout.user_ids)[truth.places], truth.holdout.exposure
    is_hit = parts["all"].is_hit
    even, num_even = even_metrics(rows, is_hit, truth.relevant, user_ids, exposure, cutoffs)
    per_query[0] |= even
    columns = np.stack([values for of_part in per_query for values in of_part.values()], axis=1)
    found = bootstrap_intervals(columns, users=user_ids, num_bootstrap=num_bootstrap, seed=seed)
    intervals = iter(found)
    results = {
        part.name: SliceResult(
            per_query=values,
            intervals={name: next(intervals) for name in values},
            set_metrics={
                f"{metric}@{k}": value
                for k in cutoffs
                for metric, value in set_metrics(rows, counts, part.candidates, k).items()
            },
            num_candidates=int(part.candidates.sum()),
            num_queries=int(np.count_nonzero(part.num_relevant)),
            num_relevant=int(part.num_relevant.sum()),
        )
        for values, part in zip(per_query, parts.values(), strict=True)
    }
    num_unknown = int(truth.num_relevant.sum()) - len(truth.relevant[1])
    return EvaluationResult(
        user_ids=user_ids,
        overall=results.pop("all"),
        slices=results,
        exclude=truth.exclude,
        num_skipped=len(truth.holdout) - len(rows),
        num_relevant_excluded=truth.num_excluded,
        num_relevant_unknown=num_unknown,
        num_relevant_unclicked=num_unknown + int((counts[truth.relevant[1] - 1] == 0).sum()),
        num_empty_histories=sum(not len(query.get("history", ())) for query in truth.queries),
        relevant_popularity=float(counts[truth.relevant[1] - 1].sum() / truth.num_relevant.sum()),
        num_sampled_from=truth.holdout.num_sampled_from,
        num_even=num_even,
        num_tied=sum(truth.holdout.num_tied or ()),
    )


class _Part(NamedTuple):
    """Some of the relevant items: their hits, [num_queries, k], and numbers, [num_queries].

    `candidates`, [num_candidates] bool, marks the part's candidates.
    """

    name: str
    candidates: np.ndarray
    is_hit: np.ndarray
    num_relevant: np.ndarray


def _parts(rows: np.ndarray, truth: Truth) -> Iterator[_Part]:
    """Yields all relevant items, and those in each slice."""
    queries, relevant_rows = truth.relevant
    is_hit = find_hits(rows, *truth.relevant)
    yield _Part("all", np.ones(len(truth.items), bool), is_hit, truth.num_relevant)
    for name, is_in in popularity_slices(truth.holdout.candidate_counts).items():
        # Relevant items outside the corpus are in no slice.
        num = np.bincount(queries[is_in[relevant_rows - 1]], minlength=len(rows))
        yield _Part(name, is_in, is_hit & is_in[rows - 1], num)
