"""The results of `evaluate`: one per retriever, a comparison of several, and their tables."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from tfrs_pipeline.data.schema import ASKED, AskedBy, Exclude
from tfrs_pipeline.evaluation.bootstrap import Interval, table_intervals
from tfrs_pipeline.evaluation.metrics import BUILT_IN, METRICS, Metric
from tfrs_pipeline.messages import counted


@dataclass(frozen=True, repr=False)
class SliceResult:
    """The metrics of a part of the candidates, or of the whole corpus.

    Attributes:
        per_query: Metric name, such as "ndcg@100", -> [num_queries] float64; NaN if a query has
            nothing relevant in this part. An "even_" metric has one value per user, at the first
            of the user's queries, and NaN at the others.
        intervals: The same names -> mean and interval over the queries.
        set_metrics: Metrics of all lists together, such as "coverage@20".
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
            **{
                name: None if np.isnan(value) else value for name, value in self.set_metrics.items()
            },
            "num_candidates": self.num_candidates,
            "num_queries": self.num_queries,
            "num_relevant": self.num_relevant,
        }

    def __repr__(self) -> str:
        intervals = self.intervals.items()
        means = ", ".join(f"{name} {interval.mean:.4f}" for name, interval in intervals)
        return f"SliceResult({counted(self.num_queries, 'query')}; {means})"


@dataclass(frozen=True)
class EvaluationResult:
    """The metrics of a retriever.

    Attributes:
        user_ids: [num_queries] users of the measured queries; per-query arrays have this order.
        overall: The whole corpus.
        slices: Name -> each part of the candidates.
        exclude: What was excluded from a user's ranking; see `Holdout.excluded`.
        num_skipped: Queries with nothing relevant left, which are not measured.
        num_relevant_excluded: Relevant items that `exclude` keeps out of the ranking; not counted
            as relevant.
        num_relevant_unknown: Relevant items outside the corpus, never found, in no slice.
        num_relevant_unclicked: Relevant items without a training count, unknown ones included. Both
            stay in the denominator.
        num_empty_histories: Measured queries whose history is empty.
        relevant_popularity: Mean training positives of the relevant items, to compare a model's
            "average_popularity@k" with; an item outside the corpus has none.
        num_sampled_from: Queries that the measured ones were sampled from; None without sampling.
        num_even: Effective number of relevant items (Kish) that "even_recall@k" rests on; None
            without it. See `tfrs_pipeline.evaluation.metrics`.
    """

    user_ids: np.ndarray = field(repr=False)
    overall: SliceResult
    slices: Mapping[str, SliceResult] = field(repr=False)
    exclude: Exclude
    num_skipped: int
    num_relevant_excluded: int
    num_relevant_unknown: int
    num_relevant_unclicked: int
    num_empty_histories: int
    relevant_popularity: float
    num_sampled_from: int | None = None
    num_even: int | None = None

    @property
    def per_query(self) -> Mapping[str, np.ndarray]:
        """Metric name -> [num_queries] float64, for the whole corpus."""
        return self.overall.per_query

    def describe(self) -> list[str]:
        """Describes, in lines for a person, what was left out or is hard to find."""
        num, num_relevant = len(self.user_ids), self.overall.num_relevant
        sampled_from = counted(self.num_sampled_from or 0, "query")
        is_many = self.num_relevant_excluded and self.num_skipped >= 0.05 * (num + self.num_skipped)
        hint = "; if own items may come again, set evaluation.exclude to none"
        hint += " (docs/guides/rules.md)"
        lines = [
            (self.num_sampled_from, f"measured on {num:,} of {sampled_from}, sampled"),
            (self.num_skipped,
             f"{self.num_skipped:,} of {counted(num + self.num_skipped, 'query')} skipped, with "
             f"nothing to find{hint if is_many else ''}"),
            (self.num_relevant_excluded,
             f"{counted(self.num_relevant_excluded, 'relevant item')} not counted: the ranking "
             f"excludes what its user had {self.exclude} before (exclude)"),
            (self.num_empty_histories > 0.1 * num,
             f"{self.num_empty_histories:,} of {num:,} queries have an empty history"),
            (self.num_relevant_unclicked > 0.1 * num_relevant,
             f"{self.num_relevant_unclicked:,} of {num_relevant:,} items to find have no positive "
             "in training"),
        ]  # fmt: skip
        # A remark on a tenth of the queries or less would only distract.
        return [line for is_needed, line in lines if is_needed]

    def summary(self) -> dict[str, Any]:
        """Returns the numbers for JSON, slices under "slices"; NaN becomes None."""
        names = [
            attribute.name
            for attribute in fields(self)
            if attribute.name.startswith(("num_", "relevant_"))
        ]
        return {
            **self.overall.summary(),
            **{name: getattr(self, name) for name in names},
            "slices": {name: part.summary() for name, part in self.slices.items()},
        }


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Retrievers measured on the same queries, by name; prints as a table.

    `metrics` are those that were measured; `num_bootstrap` and `seed` make the intervals of the
    differences. `asked_by` says what has a query: a user or a request (see `Split.holdout`). A run
    decides by this evaluation; there `other` has the results by the other question, or why there
    are none.
    """

    results: Mapping[str, EvaluationResult]
    metrics: tuple[Metric, ...]
    num_bootstrap: int
    seed: int
    asked_by: AskedBy = "users"
    other: "Evaluation | str" = ""

    @property
    def first(self) -> EvaluationResult:
        """The result that the others are compared with, or the only one."""
        return next(iter(self.results.values()))

    @property
    def cutoffs(self) -> tuple[int, ...]:
        """The values of k, ascending."""
        return tuple(sorted({metric.k for metric in self.metrics}))

    def _compared(self, result: EvaluationResult) -> dict[str, np.ndarray]:
        """Returns the values that models are compared by: overall and, by few metrics, in slices.

        All metrics in all slices would be many columns that nobody reads.
        """
        by_slice = [str(metric) for metric in self.metrics if metric.is_by_slice]
        in_slices = {
            f"{part}/{name}": measured.per_query[name]
            for part, measured in result.slices.items()
            for name in by_slice
        }
        return {**result.per_query, **in_slices}

    @cached_property
    def differences(self) -> Mapping[str, Mapping[str, Interval]]:
        """Name of another retriever -> metric -> the other minus the first, paired by query.

        Slices have names such as "tail/recall@20".
        """
        first, *others = ((name, self._compared(result)) for name, result in self.results.items())
        gaps = {
            name: {metric: values[metric] - reference for metric, reference in first[1].items()}
            for name, values in others
        }
        # With the seed of the models' own intervals, the same users are drawn.
        drawn = {"num_bootstrap": self.num_bootstrap, "seed": self.seed}
        return table_intervals(gaps, users=self.first.user_ids, **drawn)

    def summary(self) -> dict[str, Any]:
        """Returns the numbers for JSON: "asked_by", and "models" and "differences" by name.

        In a run also "other", with the same three, or "left_out": why there is no other question.
        """
        summary: dict[str, Any] = {
            "asked_by": self.asked_by,
            "models": {name: result.summary() for name, result in self.results.items()},
            "differences": {
                name: {metric: interval.as_dict() for metric, interval in by_metric.items()}
                for name, by_metric in self.differences.items()
            },
        }
        if isinstance(self.other, Evaluation):
            summary["other"] = self.other.summary()
        elif self.other:
            summary["other"] = {"left_out": self.other}
        return summary

    def __repr__(self) -> str:
        shortest, longest = self.cutoffs[0], self.cutoffs[-1]
        # Shows every metric that the caller chose, and every metric of the user's own.
        is_chosen = len(self.metrics) < len(METRICS)
        custom = [
            str(metric) for metric in self.metrics if is_chosen or metric.name not in BUILT_IN
        ]
        columns = [f"ndcg@{longest}", *custom, f"recall@{shortest}", f"recall@{longest}"]
        columns += [f"even_recall@{longest}", f"tail/recall@{longest}", f"coverage@{shortest}"]
        columns += [f"average_popularity@{shortest}"]
        summary = self.summary()
        gaps = {
            name: {metric: gap[metric] for metric in [columns[0], *custom] if metric in gap}
            for name, gap in summary["differences"].items()
        }
        table = format_table(summary["models"], list(dict.fromkeys(columns)), gaps)
        notes = _notes(table, next(iter(summary["models"].values())))
        # Notes explain the columns; the other lines are about the queries.
        return "\n".join([table, *notes, *self.first.describe()])


def with_intervals(
    parts: Mapping[str, SliceResult], users: np.ndarray, *, num_bootstrap: int, seed: int
) -> dict[str, SliceResult]:
    """Computes the intervals of all parts from one set of resamples, so that all stay paired."""
    tables = {name: part.per_query for name, part in parts.items()}
    intervals = table_intervals(tables, users=users, num_bootstrap=num_bootstrap, seed=seed)
    return {name: replace(part, intervals=intervals[name]) for name, part in parts.items()}


def joined(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Joins evaluations of different retrievers on the same queries; the first stays the first."""
    first = evaluations[0]
    results = {
        name: result for evaluation in evaluations for name, result in evaluation.results.items()
    }
    return replace(first, results=results, other=_others(evaluations, joined))


def averaged(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Averages evaluations of the same queries, such as those of models trained with other seeds.

    Each query's metrics are averaged first, then these means over the queries, with intervals over
    the users: they say how far the result depends on the users, not on the seed.
    """
    if len(evaluations) == 1:
        return evaluations[0]
    first = evaluations[0]

    def average(results: Sequence[EvaluationResult]) -> EvaluationResult:
        parts = [{"all": result.overall, **result.slices} for result in results]
        # Sizes and users are those of the first: all were measured on the same queries.
        means = {
            name: replace(
                part,
                per_query=_mean([by_name[name].per_query for by_name in parts]),
                set_metrics=_mean([by_name[name].set_metrics for by_name in parts]),
            )
            for name, part in parts[0].items()
        }
        users, drawn = results[0].user_ids, {"num_bootstrap": first.num_bootstrap}
        slices = with_intervals(means, users, seed=first.seed, **drawn)
        return replace(results[0], overall=slices.pop("all"), slices=slices)

    results = {
        name: average([evaluation.results[name] for evaluation in evaluations])
        for name in first.results
    }
    return replace(first, results=results, other=_others(evaluations, averaged))


def _mean(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # A query without a relevant item is NaN in all tables, so no mean mixes NaN and numbers.
    return {name: np.mean([table[name] for table in tables], axis=0) for name in tables[0]}


def _others(
    evaluations: Sequence[Evaluation], combine: Callable[[Sequence[Evaluation]], Evaluation]
) -> Evaluation | str:
    """Combines the evaluations by the other question, too; or why there are none."""
    all_others = [evaluation.other for evaluation in evaluations]
    others = [other for other in all_others if isinstance(other, Evaluation)]
    return combine(others) if others else evaluations[0].other


def other_prefix(metrics: Mapping[str, Any]) -> str:
    """Returns the prefix of columns by a run's other question, such as "by_user"; "" if none."""
    asked_by: AskedBy | None = metrics.get("other", {}).get("asked_by")
    return "" if asked_by is None else ASKED[asked_by].replace(" ", "_")


def format_table(
    models: Mapping[str, Mapping[str, Any]],
    columns: Sequence[str],
    differences: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    markdown: bool = False,
    width: int | None = None,
) -> str:
    """Formats summaries of models, by name, as a table with a line for each.

    An interval is shown as its mean and half its width, a missing value as "-". Slices have columns
    such as "tail/recall@20". The differences of `Evaluation.summary()` are next to their metric.
    Columns that no model has are left out. So are the last columns, but never the first, if they do
    not fit in `width` characters.
    """
    # A run with other metrics may lack some.
    columns = [
        column
        for column in columns
        if any(find_metric(model, column) is not None for model in models.values())
    ]
    differences = differences or {}
    # Differences are from the one model that has none.
    reference = next((name for name in models if name not in differences), "")
    cells = [["model", *models]]
    for column in columns:
        cells.append([column, *(_cell(find_metric(model, column)) for model in models.values())])
        gaps = [differences.get(name, {}).get(column) for name in models]
        if any(gaps):
            cells.append([f"from {reference}", *map(difference_text, gaps)])
    lines = list(zip(*cells, strict=True))
    table = (format_markdown_cells if markdown else format_cells)(lines)
    if width is None or len(table.partition("\n")[0]) <= width or len(columns) <= 1:
        return table
    # Columns come in the order of their importance, so the last one goes first.
    return format_table(models, columns[:-1], differences, markdown=markdown, width=width)


def with_other(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the models of `Evaluation.summary()` with columns such as "by_user/ndcg@20"."""
    models = {name: dict(model) for name, model in metrics["models"].items()}
    if prefix := other_prefix(metrics):
        for name, model in models.items():
            model["slices"] = {**model["slices"], prefix: metrics["other"]["models"][name]}
    return models


QUESTIONS: Mapping[AskedBy, str] = {
    "users": "one query per user, with the history before the test, for all that the user clicked "
    "in it",
    "requests": "one query per request, with the history up to it, as in service",
}
"""What each question asks of a model, for a person."""


def other_columns(metrics: Mapping[str, Any], metric: str) -> list[str]:
    """Returns the column of a metric by a run's other question, if it was asked."""
    prefix = other_prefix(metrics)
    return [f"{prefix}/{metric}"] if prefix else []


def explained(table: str, metrics: Mapping[str, Any]) -> Iterator[str]:
    """Explains the columns of a table of models, in lines."""
    other, prefix = metrics.get("other", {}), other_prefix(metrics)
    if prefix and prefix in table:
        yield f"{prefix}: {QUESTIONS[other['asked_by']]}"
        yield f"the other columns: {QUESTIONS[metrics['asked_by']]}"
    elif "left_out" in other:
        yield f"measured {ASKED[metrics['asked_by']]} alone: {other['left_out']}"
    if "±" in table:
        yield "±: half of the 95% interval over users"
    if "best_member" in metrics["models"]:
        yield "two_tower: the sum of models of the race; best_member: the winner alone"
    first: Mapping[str, Any] = next(iter(metrics["models"].values()), {})
    yield from _notes(table, first)
    if "tail/" in table:
        yield "tail: the least popular items, which together have a fifth of the training clicks"
    for name, why in metrics.get("left_out", {}).items():
        yield f"{name} is left out: {why}"


def _notes(table: str, first: Mapping[str, Any]) -> Iterator[str]:
    """Yields the notes of the metrics in a table, with the numbers of its first model."""
    notes = [metric.note for name, metric in METRICS.items() if f"{name}@" in table]
    for note in filter(None, dict.fromkeys(notes)):
        yield note.format(**first)


def format_cells(lines: Sequence[Sequence[str]]) -> str:
    """Formats cells as plain text, the first column aligned left, the others right."""
    columns = []
    for i, cells in enumerate(zip(*lines, strict=True)):
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if i else cell.ljust(width) for cell in cells])
    return "\n".join(map("  ".join, zip(*columns, strict=True)))


def format_markdown_cells(lines: Sequence[Sequence[str]]) -> str:
    """Formats cells as a Markdown table; the first line is its header."""
    header, *rest = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([header, "|---|" + "---:|" * (len(lines[0]) - 1), *rest])


def find_metric(summary: Mapping[str, Any], column: str) -> Any:
    """Returns a column of a model's summary, such as "tail/recall@20"; None if there is none."""
    slice_name, _, metric = column.rpartition("/")
    part = summary.get("slices", {}).get(slice_name, {}) if slice_name else summary
    return part.get(metric)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        mean, low, high = value["mean"], value["low"], value["high"]
        if mean is None or low is None:  # Without resamples there is no interval.
            return _cell(mean)
        return f"{mean:.4f} ±{(high - low) / 2:.4f}"
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if value <= 1 else f"{value:.1f}"  # A share, or a mean count.


def difference_text(value: Mapping[str, Any] | None) -> str:
    """Writes a difference in the form of `Interval.as_dict`, with its interval; "" without one."""
    if value is None or value["mean"] is None:
        return ""
    if value["low"] is None:
        return f"{value['mean']:+.4f}"
    return Interval(**value).written("+")
