"""A comparison of sampling plans as a table and as a figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tfrs_pipeline.drawing import GRID, MARKERS, SERIES, SOFT, new_figure
from tfrs_pipeline.evaluation.bootstrap import Interval, Outcome
from tfrs_pipeline.evaluation.table import format_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AUC_TITLES = {
    "auc_corpus": "the corpus",
    "auc_pre_rank_losers": "pre-rank losers",
    "auc_rank_losers": "rank losers",
    "auc_exposed": "exposed, not clicked",
}
_LINKS = {Outcome.BETTER: "than", Outcome.LEVEL: "with", Outcome.WORSE: "than"}


@dataclass(frozen=True)
class PlanRow:
    """The results of one plan.

    Args:
        name: Of the plan.
        metrics: Per-query metric -> mean and interval: "ndcg@100", "tail/recall@100", and those of
            `AUC_TITLES` that the log has items for.
        differences: The same names -> paired difference from the reference; empty for itself.
        summary: `EvaluationResult.summary()`.
        num_epochs: The epoch that validation chose.
        seconds: Wall time of the training from the first step on, validation included.
    """

    name: str
    metrics: Mapping[str, Interval]
    differences: Mapping[str, Interval]
    summary: Mapping[str, Any]
    num_epochs: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Returns the numbers for JSON."""
        return dataclasses.asdict(self) | {
            field: {name: interval.as_dict() for name, interval in getattr(self, field).items()}
            for field in ("metrics", "differences")
        }


def comparison_table(
    rows: Sequence[PlanRow], cutoffs: Sequence[int], *, markdown: bool, width: int | None = None
) -> str:
    """Formats a comparison as Markdown or plain text, with as many columns as fit in `width`.

    Recall, NDCG and the tail are at the longest cutoff, coverage and average popularity at the
    shortest.
    """
    shortest, longest = min(cutoffs), max(cutoffs)
    compared = [f"ndcg@{longest}", f"recall@{longest}"]
    columns = [*compared, f"tail/recall@{longest}", f"coverage@{shortest}"]
    columns += [f"average_popularity@{shortest}"]
    columns += [name for name in AUC_TITLES if any(name in row.metrics for row in rows)]
    columns += ["epochs", "seconds"]
    plans = {
        row.name: {
            **row.summary,
            **{name: row.metrics[name].as_dict() for name in AUC_TITLES if name in row.metrics},
            "epochs": row.num_epochs,
            "seconds": round(row.seconds),
        }
        for row in rows
    }
    differences = {
        row.name: {metric: row.differences[metric].as_dict() for metric in compared}
        for row in rows
        if row.differences
    }
    return format_table(plans, columns, differences, markdown=markdown, width=width)


def compared_in_words(rows: Sequence[PlanRow], metric: str, reference: str) -> str:
    """Says which plans are better than the reference, level with it and worse, by the intervals."""
    best = max(rows, key=lambda row: row.metrics[metric].mean)
    parts = [f"best: {best.name}"]
    for outcome, link in _LINKS.items():
        names = [
            row.name
            for row in rows
            if row.name != reference and row.differences[metric].outcome is outcome
        ]
        if names:
            parts.append(f"{outcome.value} {link} {reference}: {', '.join(names)}")
    return f"in {metric} {'; '.join(parts)}"


def comparison_figure(rows: Sequence[PlanRow], reference: str, cutoffs: Sequence[int]) -> Figure:
    """Draws three panels with a line for each plan: gains, recall by popularity, and AUCs."""
    longest = max(cutoffs)
    figure, (gains, slices, aucs) = new_figure(13, 1.6 + 0.36 * len(rows), 3, sharey=True)
    _draw_gains(gains, rows, f"ndcg@{longest}", reference)
    parts = {
        part: [row.summary["slices"][part][f"recall@{longest}"]["mean"] for row in rows]
        for part in ("head", "torso", "tail")
    }
    _draw_dots(slices, parts)
    slices.set_xlabel(f"recall@{longest} by popularity of the item")
    found = {
        title: [row.metrics[name].mean if name in row.metrics else None for row in rows]
        for name, title in AUC_TITLES.items()
        if any(name in row.metrics for row in rows)
    }
    _draw_dots(aucs, found)
    aucs.axvline(0.5, color=SOFT, linewidth=1, zorder=0)
    aucs.set_xlabel("AUC of the positives, compared with")
    for axes in (gains, slices, aucs):
        axes.grid(axis="y", color=GRID)
    gains.set_yticks(range(len(rows)), [row.name for row in rows])
    gains.set_ylim(len(rows) - 0.5, -0.5)
    return figure


def _draw_dots(axes: Axes, series: Mapping[str, Sequence[float | None]]) -> None:
    """Draws values of the plans with a legend above: lines cross, so names cannot stand beside."""
    for colour, marker, (name, values) in zip(SERIES, MARKERS, series.items(), strict=False):
        drawn = [np.nan if value is None else value for value in values]
        axes.plot(drawn, range(len(drawn)), marker, color=colour, label=name)
    if series:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=len(series),
            frameon=False,
            labelcolor="linecolor",
            handletextpad=0.2,
            columnspacing=1.2,
        )


def _draw_gains(axes: Axes, rows: Sequence[PlanRow], metric: str, reference: str) -> None:
    base = next(row.metrics[metric].mean for row in rows if row.name == reference)
    for place, row in enumerate(rows):
        interval = row.differences.get(metric, Interval(0.0, 0.0, 0.0))
        colour = SOFT if interval.outcome is Outcome.LEVEL else SERIES[0]
        if not np.isnan(interval.low):
            axes.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2)
        axes.plot(interval.mean, place, "o", color=colour)
    axes.axvline(0, color=SOFT, linewidth=1, zorder=0)
    axes.locator_params(axis="x", nbins=6)  # More labels would overlap.
    axes.set_xlabel(f"{metric} above that of {reference} ({base:.4f}), 95% interval")
