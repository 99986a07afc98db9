"""Measures retrievers: per query first, then means with intervals, overall and by slice."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tfrs_pipeline.data.held_out_queries import Holdout, check_holdout
from tfrs_pipeline.data.ids import Ids, are_listed
from tfrs_pipeline.data.schema import Exclude
from tfrs_pipeline.evaluation.metrics import (
    METRICS,
    EvenWeights,
    Metric,
    Rankings,
    find_hits,
    popularity_slices,
)
from tfrs_pipeline.evaluation.results import (
    Evaluation,
    EvaluationResult,
    SliceResult,
    with_intervals,
)
from tfrs_pipeline.retrieval import Query, Retriever
from tfrs_pipeline.search.topk import top_k_in_blocks

QUERIES_PER_CALL = 1024


def evaluate(
    retrievers: Retriever | Mapping[str, Retriever],
    holdout: Holdout,
    *,
    metrics: Iterable[Metric] | None = None,
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
        metrics: What is measured, such as `[metric_of("recall@20"), Mine(10)]`; None means all of
            `METRICS` at each of `cutoffs`.
        exclude: What is excluded from a user's ranking; see `Holdout.excluded`.
        cutoffs: Values of k, 1 or more.
        num_bootstrap: Resamples for the intervals; 0 computes means only.
        seed: Seed of the resamples.
        on_progress: Called with the retriever's name, the queries done and their total.

    Returns:
        An `Evaluation`. Its `results`, by name, have means with intervals and values by query,
        overall and by slice; its `differences` are from the first.

    Raises:
        TypeError: If an argument is not a retriever, a metric, a holdout or a list of cutoffs.
        ValueError: If nothing is left to find, a metric leaves its range, or a retriever breaks its
            contract: wrong shape, a candidate twice, an excluded or unknown candidate.

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
    named = _named(retrievers)
    if isinstance(metrics, Metric):
        raise TypeError(f"metrics come in a list, also a single one: [{metrics!r}]")
    # A metric that is listed twice would make two equal columns.
    measured = _at_cutoffs(cutoffs) if metrics is None else tuple(dict.fromkeys(metrics))
    if not measured or not all(isinstance(metric, Metric) for metric in measured):
        raise TypeError(f"metrics must be like [tp.metric_of('recall@20')]. Received: {metrics!r}.")
    check_holdout(holdout)
    truth = Truth.of(holdout, exclude)
    results = {}
    for name, retriever in named.items():
        report = functools.partial(on_progress, name) if on_progress else None
        # One ranking as deep as the largest cutoff serves all metrics.
        rows = _retrieve_rows(retriever, truth, max(metric.k for metric in measured), report)
        results[name] = _measure(rows, truth, measured, num_bootstrap, seed)
    return Evaluation(results, measured, num_bootstrap, seed, holdout.by)


def _named(retrievers: Retriever | Mapping[str, Retriever]) -> Mapping[str, Retriever]:
    # A single one is named by its class.
    if not isinstance(retrievers, Mapping):
        retrievers = {type(retrievers).__name__: retrievers}
    if not retrievers:
        raise ValueError("Needs at least one retriever. Received: none.")
    for name, retriever in retrievers.items():
        if isinstance(retriever, type) or not hasattr(retriever, "retrieve"):
            hint = "pass what its fit returns; see `Retriever`"
            raise TypeError(f"{name} has no `retrieve`: {hint}. Received: {retriever!r}.")
    return retrievers


def _at_cutoffs(cutoffs: Sequence[int]) -> tuple[Metric, ...]:
    """Returns all metrics that settings can name, at each cutoff."""
    if not isinstance(cutoffs, Iterable):
        raise TypeError(f"cutoffs must be a list, such as [20, 100]. Received: {cutoffs!r}.")
    ks = list(cutoffs)
    if not ks or not all(isinstance(k, int | np.integer) and k >= 1 for k in ks):
        raise ValueError(f"cutoffs must be integers of 1 or more, at least one. Received: {ks}.")
    return tuple(metric(int(k)) for k in sorted(set(ks)) for metric in METRICS.values())


@dataclass(frozen=True)
class Truth:
    """The queries of a holdout that can be measured, at `positions`, and their relevant items.

    Attributes:
        positions: [num_queries] numbers of the measured queries among all.
        excluded: For each of them, the ids that its ranking leaves out; None excludes nothing.
        relevant: [num_pairs] numbers of queries, ascending, and [num_pairs] candidate rows. They
            leave out candidates outside the corpus.
        num_relevant: [num_queries] items to find, those outside the corpus included.
        num_excluded: Relevant items that were excluded, over all queries.
    """

    holdout: Holdout
    exclude: Exclude
    items: Ids
    positions: list[int]
    excluded: list[np.ndarray] | None
    relevant: tuple[np.ndarray, np.ndarray]
    num_relevant: np.ndarray
    num_excluded: int

    @cached_property
    def queries(self) -> list[Query]:
        """The measured queries."""
        all_queries = self.holdout.as_queries()
        return [all_queries[i] for i in self.positions]

    @cached_property
    def excluded_rows(self) -> list[np.ndarray]:
        """The rows of the excluded candidates of each query."""
        nothing = [self.items.values[:0]] * len(self.positions)
        return self.items.rows_by_list(self.excluded or nothing)

    @cached_property
    def even(self) -> EvenWeights | None:
        """What each item to find weighs, for all retrievers alike."""
        return EvenWeights.of(*self.relevant, self.user_ids, self.holdout.exposure)

    @property
    def user_ids(self) -> np.ndarray:
        """[num_queries] users of the measured queries."""
        return self.holdout.user_ids[self.positions]

    @classmethod
    def of(cls, holdout: Holdout, exclude: Exclude, part: str = "holdout") -> "Truth":
        """Looks up ids once for all retrievers; a `ValueError` if nothing is left to find."""
        items, excluded = Ids(holdout.candidate_ids), holdout.excluded(exclude)
        # As Python's sets: lists are short, and ids of any type compare as they are.
        wanted = [{*np.asarray(ids).tolist()} for ids in holdout.relevant]
        left = wanted
        if excluded is not None:
            pairs = zip(wanted, excluded, strict=True)
            left = [ids.difference(np.asarray(gone).tolist()) for ids, gone in pairs]
        positions = [i for i, ids in enumerate(left) if ids]
        num_excluded = sum(map(len, wanted)) - sum(map(len, left))
        if not positions:
            raise ValueError(
                f"Nothing to measure in the {part}: none of {len(holdout)} queries has a relevant "
                f"item that exclude={exclude!r} leaves in the ranking ({num_excluded} were "
                "excluded). Exclude less (evaluation.exclude), or split off a larger part."
            )
        # Sorted, because sums of weights depend on their order in the last digit.
        ids = [id_ for i in positions for id_ in sorted(left[i])]
        if isinstance(ids[0], str) != items.are_text:
            raise ValueError(
                "Relevant ids and candidate ids must be of one type: load both the same way. "
                f"Received: relevant {ids[0]!r}, candidate {items.values.tolist()[0]!r}."
            )
        rows, num_relevant = items.rows(ids), np.array([len(left[i]) for i in positions])
        queries, is_known = np.repeat(np.arange(len(positions)), num_relevant), rows > 0
        return cls(
            holdout=holdout,
            exclude=exclude,
            items=items,
            positions=positions,
            excluded=None if excluded is None else [excluded[i] for i in positions],
            relevant=(queries[is_known], rows[is_known]),
            num_relevant=num_relevant,
            num_excluded=num_excluded,
        )


def _retrieve_rows(
    retriever: Retriever, truth: Truth, k: int, report: Callable[[int, int], None] | None
) -> np.ndarray:
    """Retrieves for all queries, and checks the retriever's contract: [num_queries, k] rows."""
    num_queries = len(truth.queries)
    rows = np.empty((num_queries, k), np.int32)
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
        # Ids that are no candidates get row 0, like empty slots, and are told apart below.
        rows[batch] = truth.items.rows(ids).reshape(shape)
        is_excluded = are_listed(rows[batch], truth.excluded_rows[batch], len(truth.items))
        for fault in _faults(rows[batch], ids, scores, truth.items, is_excluded):
            raise _broken(retriever, fault, _described(ids, scores))
        if report is not None:
            report(batch.stop, num_queries)
    return rows


def _faults(
    rows: np.ndarray, ids: np.ndarray, scores: np.ndarray, items: Ids, is_excluded: np.ndarray
) -> Iterator[str]:
    # Row 0 is right for the empty id alone; any other id there is unknown.
    if np.any((rows == 0) & (ids != items.empty_id)):
        yield "returned ids that are not candidates"
    if scores.dtype.kind not in "biuf":
        yield "must return numbers as scores"
    if np.isnan(scores).any() or np.any(scores[:, 1:] > scores[:, :-1]):
        yield "must return the best first, without NaN"
    in_order = np.sort(rows, axis=1)  # A candidate that comes twice is next to itself.
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


def measure_vectors(
    queries: np.ndarray, candidates: np.ndarray, truth: Truth, metric: Metric
) -> np.ndarray:
    """Measures a metric of dot products, as `evaluate` does, for each query of `truth`.

    `queries` are [num_queries, D] embeddings of `truth.queries`, `candidates` [num_candidates, D]
    those of `truth.items`, both float32. Returns [num_queries] float64, NaN where there is nothing
    to measure; or a single value, if the metric measures all lists together.
    """
    shape = len(queries), len(candidates)
    rows, _ = top_k_in_blocks(
        lambda block: queries[block] @ candidates.T, *shape, metric.k, truth.excluded_rows
    )
    measured = _measure_part(rankings_of(rows, truth), [metric])
    name = str(metric)
    return measured.per_query.get(name, np.asarray([measured.set_metrics.get(name, np.nan)]))


def _measure(
    rows: np.ndarray, truth: Truth, metrics: Sequence[Metric], num_bootstrap: int, seed: int
) -> EvaluationResult:
    """Measures the ranking `rows`, [num_queries, k], over the whole corpus and in each slice."""
    counts, user_ids = truth.holdout.candidate_counts, truth.user_ids
    whole = rankings_of(rows, truth)
    queries, relevant_rows = truth.relevant
    parts = {"all": _measure_part(whole, metrics)}
    for name, is_in in popularity_slices(counts).items():
        # Relevant items outside the corpus are in no slice.
        num = np.bincount(queries[is_in[relevant_rows - 1]], minlength=len(rows))
        # At an empty slot, `rows - 1` reads the last candidate, but that slot is never a hit.
        is_hit = whole.is_hit & is_in[rows - 1]
        parts[name] = _measure_part(Rankings(rows, is_hit, num, counts, is_in), metrics)
    parts = with_intervals(parts, user_ids, num_bootstrap=num_bootstrap, seed=seed)
    # Items outside the corpus are in no list: they are unclicked, and were never found.
    to_find = relevant_rows - 1
    num_unknown = int(truth.num_relevant.sum()) - len(to_find)
    return EvaluationResult(
        user_ids=user_ids,
        overall=parts.pop("all"),
        slices=parts,
        exclude=truth.exclude,
        num_skipped=len(truth.holdout) - len(rows),
        num_relevant_excluded=truth.num_excluded,
        num_relevant_unknown=num_unknown,
        num_relevant_unclicked=num_unknown + int((counts[to_find] == 0).sum()),
        num_empty_histories=sum(not len(query.get("history", ())) for query in truth.queries),
        relevant_popularity=float(counts[to_find].sum() / truth.num_relevant.sum()),
        num_sampled_from=truth.holdout.num_sampled_from,
        num_even=None if truth.even is None else truth.even.num,
    )


def rankings_of(rows: np.ndarray, truth: Truth) -> Rankings:
    """Returns what a metric reads of the rankings `rows`, [num_queries, k], of all candidates."""
    counts, is_hit = truth.holdout.candidate_counts, find_hits(rows, *truth.relevant)
    every = np.ones(len(counts), bool)
    return Rankings(rows, is_hit, truth.num_relevant, counts, every, truth.even)


def _measure_part(rankings: Rankings, metrics: Sequence[Metric]) -> SliceResult:
    """Measures what can be measured in a part, without intervals."""
    per_query: dict[str, np.ndarray] = {}
    set_metrics: dict[str, float] = {}
    for metric in metrics:
        if (measured := metric.measure(rankings)) is None:
            continue
        values = np.asarray(measured, np.float64)
        if values.shape == ():
            set_metrics[str(metric)] = float(values)
        elif values.shape == rankings.num_relevant.shape:
            # NaN, not 0: a query without a relevant item in this part says nothing about it.
            values = per_query[str(metric)] = np.where(rankings.num_relevant > 0, values, np.nan)
        least, most = metric.range
        # A sum of rounded numbers may be off by a little.
        is_outside = (values < least - 1e-9) | (values > most + 1e-9)
        if values.shape not in ((), rankings.num_relevant.shape) or is_outside.any():
            raise ValueError(
                f"{metric} must measure a number, or one for each of the "
                f"{len(rankings.rows)} queries, from {least:g} to {most:g}. Received: {measured!r}."
            )
    return SliceResult(
        per_query=per_query,
        intervals={},
        set_metrics=set_metrics,
        num_candidates=int(rankings.is_in.sum()),
        num_queries=int(np.count_nonzero(rankings.num_relevant)),
        num_relevant=int(rankings.num_relevant.sum()),
    )
