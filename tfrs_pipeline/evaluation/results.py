"""The results of `evaluate`: one per retriever, and a comparison of several."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from tfrs_pipeline.data.schema import Exclude
from tfrs_pipeline.evaluation.bootstrap import Interval, bootstrap_intervals
from tfrs_pipeline.evaluation.table import format_table
from tfrs_pipeline.messages import counted


@dataclass(frozen=True, repr=False)
class SliceResult:
    """The metrics of a part of the candidates, or of the whole corpus.

    Attributes:
        per_query: Metric name, such as "ndcg@100", -> [num_queries] float64; NaN if a query has
            nothing relevant in this part.
        intervals: The same names -> mean and interval over the queries.
        set_metrics: "coverage@20", "average_popularity@20" and "gini@20" of all lists together.
        num_candidates: Size of this part.
        num_queries: Queries with something relevant in this part.
        num_relevant: Relevant items in this part, over all queries.
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

    def __repr__(self) -> str:
        means = ", ".join(f"{name} {x.mean:.4f}" for name, x in self.intervals.items())
        return f"SliceResult({counted(self.num_queries, 'query')}; {means})"


@dataclass(frozen=True)
class EvaluationResult:
    """The metrics of a retriever.

    Attributes:
        user_ids: [num_queries] users of the measured queries; per-query arrays have this order.
        overall: The whole corpus.
        slices: Name -> each part of the candidates.
        ties: "tied", the relevant items clicked at the time of another positive of their user, and
            "untied", the others; empty if none is tied. Both have the ranking of the whole corpus.
        exclude: What was excluded from a user's ranking; see `Holdout.excluded`.
        num_skipped: Queries with nothing relevant left, which are not measured.
        num_relevant_excluded: Relevant items that `exclude` keeps out of the ranking; not counted
            as relevant.
        num_relevant_unknown: Relevant items outside the corpus, never found, in no slice.
        num_relevant_unclicked: Relevant items without a training count, unknown ones included. Both
            stay in the denominator.
        num_empty_histories: Measured queries whose history is empty.
        num_sampled_from: Queries that the measured ones were sampled from; None without sampling.
        num_even: Relevant items that the metrics "even_recall@k" and "even_ndcg@k" rest on, as if
            they had equal weights; None without these. See `tfrs_pipeline.evaluation.unbiased`.
    """

    user_ids: np.ndarray = field(repr=False)
    overall: SliceResult
    slices: Mapping[str, SliceResult] = field(repr=False)
    ties: Mapping[str, SliceResult] = field(repr=False)
    exclude: Exclude
    num_skipped: int
    num_relevant_excluded: int
    num_relevant_unknown: int
    num_relevant_unclicked: int
    num_empty_histories: int
    num_sampled_from: int | None = None
    num_even: int | None = None

    @property
    def per_query(self) -> Mapping[str, np.ndarray]:
        """Metric name -> [num_queries] float64, for the whole corpus."""
        return self.overall.per_query

    @property
    def per_query_and_slice(self) -> Mapping[str, np.ndarray]:
        """Returns `per_query` and the recalls of slices and ties, as "tail/recall@20"."""
        of_slices = {
            f"{part}/{name}": values
            for part, result in (*self.slices.items(), *self.ties.items())
            for name, values in result.per_query.items()
            if name.startswith("recall@")
        }
        return {**self.per_query, **of_slices}

    def describe(self) -> list[str]:
        """Describes, in lines for a person, what was left out, is hard to find or is tied."""
        num_measured = len(self.user_ids)
        lines = []
        if self.num_sampled_from is not None:
            of = counted(self.num_sampled_from, "query")
            lines.append(f"measured on {num_measured:,} of {of}, sampled")
        if self.num_skipped:
            of = counted(num_measured + self.num_skipped, "query")
            lines.append(f"{self.num_skipped:,} of {of} skipped, with nothing to find")
        if self.num_relevant_excluded:
            lines.append(
                f"{counted(self.num_relevant_excluded, 'relevant item')} not counted: the ranking "
                f"excludes what its user had {self.exclude} before (exclude)"
            )
        num_relevant = self.overall.num_relevant
        num_tied = self.ties["tied"].num_relevant if self.ties else 0
        for number, total, of, what in (
            (self.num_empty_histories, num_measured, "queries", "an empty history"),
            (self.num_relevant_unclicked, num_relevant, "items to find", "no positive in training"),
            (num_tied, num_relevant, "items to find", "the time of another click of their user"),
        ):
            if number > 0.1 * total:
                lines.append(f"{number:,} of {total:,} {of} have {what}")
        if self.num_even is not None:
            lines.append(
                f"even_: as if the log had shown every item equally often; rests on "
                f"{self.num_even:,} of {num_relevant:,} items to find, by their weights"
            )
        return lines

    def summary(self) -> dict[str, Any]:
        """Returns the numbers for JSON, slices under "slices"; NaN becomes None."""
        names = [field.name for field in fields(self) if field.name.startswith("num_")]
        return {
            **self.overall.summary(),
            **{name: getattr(self, name) for name in names},
            "slices": {name: part.summary() for name, part in self.slices.items()},
            "ties": {name: part.summary() for name, part in self.ties.items()},
        }


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Retrievers measured on the same queries, by name; prints as a table.

    `cutoffs` are ascending values of k; `num_bootstrap` and `seed` make the intervals of the
    differences. In a run, `by_request` has the same retrievers asked by request, or why not.
    """

    results: Mapping[str, EvaluationResult]
    cutoffs: tuple[int, ...]
    num_bootstrap: int
    seed: int
    by_request: "Evaluation | str" = ""

    @property
    def first(self) -> EvaluationResult:
        """The result that the others are compared with, or the only one."""
        return next(iter(self.results.values()))

    @cached_property
    def differences(self) -> Mapping[str, Mapping[str, Interval]]:
        """Name of another retriever -> metric -> the other minus the first, paired by query.

        Slices have names such as "tail/recall@20".
        """
        reference, *others = self.results
        values = {name: result.per_query_and_slice for name, result in self.results.items()}
        keys = [(name, metric) for name in others for metric in values[reference]]
        if not keys:
            return {}
        gaps = np.stack([values[name][m] - values[reference][m] for name, m in keys], axis=1)
        # One bootstrap for all, since one for each would take most of an evaluation's time.
        drawn = {"num_bootstrap": self.num_bootstrap, "seed": self.seed}
        intervals = bootstrap_intervals(gaps, users=self.first.user_ids, **drawn)
        found: dict[str, dict[str, Interval]] = {name: {} for name in others}
        for (name, metric), interval in zip(keys, intervals, strict=True):
            found[name][metric] = interval
        return found

    def summary(self) -> dict[str, Any]:
        """Returns the numbers for JSON: "models" and "differences", each by name.

        In a run also "by_request", with the same two, or "left_out": why it has none.
        """
        summary: dict[str, Any] = {
            "models": {name: result.summary() for name, result in self.results.items()},
            "differences": {
                name: {metric: interval.as_dict() for metric, interval in by_metric.items()}
                for name, by_metric in self.differences.items()
            },
        }
        if isinstance(self.by_request, Evaluation):
            summary["by_request"] = self.by_request.summary()
        elif self.by_request:
            summary["by_request"] = {"left_out": self.by_request}
        return summary

    def __repr__(self) -> str:
        shortest, longest = self.cutoffs[0], self.cutoffs[-1]
        columns = [f"ndcg@{longest}", f"recall@{shortest}", f"recall@{longest}"]
        columns += [f"even_recall@{longest}"] if self.first.num_even is not None else []
        columns += [f"tail/recall@{longest}", f"coverage@{shortest}"]
        summary = self.summary()
        gaps = {x: {columns[0]: of[columns[0]]} for x, of in summary["differences"].items()}
        table = format_table(summary["models"], list(dict.fromkeys(columns)), gaps)
        return "\n".join([table, *self.first.describe()])
