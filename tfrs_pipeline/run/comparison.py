"""The result of a comparison: a table, words and a figure, and the files that hold them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_json

from tfrs_pipeline.data.schema import ASKED
from tfrs_pipeline.drawing import Drawing, plot_intervals
from tfrs_pipeline.evaluation.bootstrap import Outcome
from tfrs_pipeline.evaluation.results import (
    Evaluation,
    averaged,
    explained,
    format_table,
    other_columns,
    with_other,
)
from tfrs_pipeline.model.checkpoints import TrainingResult
from tfrs_pipeline.run.folder import COMPARISON_FILE

# A wider line is cut or wrapped on many screens.
WIDTH = 110


@dataclass(frozen=True)
class OverSeeds:
    """How a plan differs from the first one in a metric, with each seed.

    Trainings with the same seed are paired: they begin with the same weights and see the positives
    in the same order, as far as the plans allow. `standard_error` is that of the mean over the
    seeds, and `low` to `high` its 95% interval by Student's t; all NaN for one seed.

    Example:
        >>> gain = OverSeeds.of({0: 0.010, 1: 0.014, 2: 0.012})
        >>> f"{gain.mean:.3f} ± {gain.standard_error:.4f}, [{gain.low:.3f}, {gain.high:.3f}]"
        '0.012 ± 0.0012, [0.007, 0.017]'
    """

    by_seed: Mapping[int, float]
    mean: float
    standard_error: float
    low: float
    high: float

    @classmethod
    def of(cls, by_seed: Mapping[int, float]) -> "OverSeeds":
        """Computes the numbers from the difference of each seed."""
        from scipy.special import stdtrit

        num, values = len(by_seed), np.array([*by_seed.values()])
        # Student's t, because the deviation of two or three seeds is itself uncertain.
        mean = float(values.mean())
        error = float(values.std(ddof=1)) / math.sqrt(num) if num > 1 else math.nan
        half = error * float(stdtrit(num - 1, 0.975))
        return cls(by_seed, mean, error, mean - half, mean + half)


@dataclass(frozen=True, repr=False)
class Comparison:
    """Measured plans, the first one the reference; prints as a narrow table.

    Attributes:
        by_seed: Seed -> all plans trained with it, measured on the same queries.
        trainings: Plan -> seed -> how its training went.
        settings: Plan -> the settings that make it.
        monitor: The validation metric that chose the epochs.
        notes: Lines for the user.
    """

    by_seed: Mapping[int, Evaluation]
    trainings: Mapping[str, Mapping[int, TrainingResult]]
    settings: Mapping[str, Mapping[str, Any]]
    monitor: str
    notes: Sequence[str] = ()

    @cached_property
    def evaluation(self) -> Evaluation:
        """The mean over the seeds: each query's metrics first, then intervals over the users."""
        return averaged([*self.by_seed.values()])

    @cached_property
    def over_seeds(self) -> Mapping[str, Mapping[str, OverSeeds]]:
        """Plan -> metric, such as "tail/recall@100" -> its differences from the first plan."""
        return _over_seeds(self.by_seed)

    def table(self, *, markdown: bool = False, width: int | None = WIDTH) -> str:
        """Formats the plans as text or Markdown, with as many columns as fit in a width.

        If the width is None, it has all columns, and differences in three of them.
        """
        summary, cutoffs = self.evaluation.summary(), self.evaluation.cutoffs
        names = "ndcg", "even_recall", "recall"
        ndcg, *others = metrics = [f"{name}@{cutoffs[-1]}" for name in names]
        error, plans = f"se, {len(self.by_seed)} seeds", with_other(summary)
        for name, trainings in self.trainings.items():
            results, seeds = [*trainings.values()], self.over_seeds.get(name, {}).get(ndcg)
            plans[name]["epochs"] = sum(result.best_epoch for result in results) / len(results)
            plans[name]["seconds"] = round(sum(result.seconds for result in results))
            plans[name][error] = seeds.standard_error if seeds and len(results) > 1 else None
        # A line of limited width has room for the differences of one metric; None slices all.
        differences = {
            name: {metric: gaps[metric] for metric in metrics[: width and 1] if metric in gaps}
            for name, gaps in summary["differences"].items()
        }
        columns = [ndcg, error, *other_columns(summary, ndcg), others[0], f"tail/{others[1]}"]
        columns += [others[1], f"coverage@{cutoffs[0]}", f"average_popularity@{cutoffs[0]}"]
        columns += ["epochs", "seconds"]
        return format_table(plans, columns, differences, markdown=markdown, width=width)

    def lines(self, width: int | None = WIDTH) -> Iterator[str]:
        """Yields lines: the result of the comparison, and how to read its table at a width."""
        evaluation, num_seeds = self.evaluation, len(self.by_seed)
        first, longest = evaluation.first, evaluation.cutoffs[-1]
        yield compared_in_words(evaluation, f"ndcg@{longest}", self.over_seeds)
        if isinstance(other := evaluation.other, Evaluation):
            by_seed: Any = {seed: measured.other for seed, measured in self.by_seed.items()}
            over = _over_seeds(by_seed)
            yield f"{ASKED[other.asked_by]}, {compared_in_words(other, f'ndcg@{longest}', over)}"
        if first.num_even is not None:
            words = compared_in_words(evaluation, f"even_recall@{longest}", self.over_seeds)
            share = f"{first.num_even:,} of {first.overall.num_relevant:,} items to find"
            yield f"{words} (it rests on {share}, by their weights)"
        basis = "differences are query by query, with their 95% interval over users"
        if num_seeds > 1:
            yield f"{basis}, of the mean of {num_seeds} seeds; se: their standard error over seeds"
            yield "better or worse: the intervals over users and seeds (Student's t) both exclude 0"
            if num_seeds == 2:
                yield (
                    "two seeds rarely decide: their interval is ± 12.7 standard errors, that of "
                    "three ± 4.3"
                )
        elif len(self.trainings) > 1:
            yield (
                f"{basis}, for one seed: with another, near plans can change places; try "
                "--compare.seeds 3, in Python seeds=3"
            )
        yield from explained(self.table(width=width), evaluation.summary())
        yield from self.notes

    def summary(self) -> dict[str, Any]:
        """Returns all numbers, as comparison.json has them."""
        return {
            "reference": next(iter(self.trainings)),
            "exclude": self.evaluation.first.exclude,
            "cutoffs": self.evaluation.cutoffs,
            "seeds": [*self.by_seed],
            "lines": [*self.lines(None)],
            **self.evaluation.summary(),
            "over_seeds": self.over_seeds,
            "monitor": self.monitor,
            "trainings": self.trainings,
            "settings": self.settings,
        }

    def plot(self) -> Drawing:
        """Draws what each plan gains over the first one; of a single plan, its metric."""
        metric = f"ndcg@{self.evaluation.cutoffs[-1]}"
        differences = self.evaluation.differences
        gains = {name: gaps[metric].as_dict() for name, gaps in differences.items()}
        if not gains:
            return plot_intervals(self.evaluation, metric)
        panel = {f"{metric} minus that of {next(iter(self.trainings))}": gains}
        return plot_intervals(panel, metric, are_differences=True)

    def write(self, folder: Path) -> None:
        """Writes comparison.json, comparison.md and comparison.svg."""
        table = self.table(markdown=True, width=None)
        lines = (f"- {line}\n" for line in self.lines(None))
        (folder / "comparison.md").write_text(f"{table}\n\n{''.join(lines)}")
        (folder / "comparison.svg").write_text(self.plot().svg)
        # Settings may hold a user's own parts, which JSON cannot: these are written as text.
        written = to_json(self.summary(), indent=2, inf_nan_mode="null", fallback=repr)
        (folder / COMPARISON_FILE).write_bytes(written)

    def __repr__(self) -> str:
        return "\n".join([self.table(), "", *self.lines()])

    def _repr_markdown_(self) -> str:
        return "\n".join([self.table(markdown=True), "", *(f"- {line}" for line in self.lines())])


def _over_seeds(by_seed: Mapping[int, Evaluation]) -> dict[str, dict[str, OverSeeds]]:
    # Without resamples, which take most of the time: only the means are read.
    differences = {
        seed: replace(evaluation, num_bootstrap=0).differences
        for seed, evaluation in by_seed.items()
    }
    return {
        name: {
            metric: OverSeeds.of(
                {seed: gaps[name][metric].mean for seed, gaps in differences.items()}
            )
            for metric in by_metric
        }
        for name, by_metric in next(iter(differences.values())).items()
    }


def compared_in_words(
    evaluation: Evaluation, metric: str, over_seeds: Mapping[str, Mapping[str, OverSeeds]]
) -> str:
    """Says which plan is highest, and which ones are better than the first, level or worse.

    If there are several seeds, the intervals over users and over seeds have to agree.
    """
    results = evaluation.results
    names: dict[Outcome, list[str]] = {outcome: [] for outcome in Outcome}
    for name, differences in evaluation.differences.items():
        outcome, seeds = differences[metric].outcome, over_seeds[name][metric]
        if len(seeds.by_seed) > 1 and seeds.low <= 0 <= seeds.high:
            outcome = Outcome.LEVEL  # Another seed could undo the gain.
        names[outcome].append(name)
    best = max(results, key=lambda name: results[name].overall.intervals[metric].mean)
    parts = [f"{outcome.value}: {', '.join(plans)}" for outcome, plans in names.items() if plans]
    against = f"; against {next(iter(results))}, {'; '.join(parts)}" if parts else ""
    return f"in {metric} {best} is highest{against}"
