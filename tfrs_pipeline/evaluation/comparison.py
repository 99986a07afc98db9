"""A comparison of sampling plans as a table, in words and as a figure."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tfrs_pipeline.drawing import GRID, MARKERS, SERIES, SOFT, new_figure
from tfrs_pipeline.evaluation.bootstrap import Interval, Outcome
from tfrs_pipeline.evaluation.results import Evaluation
from tfrs_pipeline.evaluation.table import BY_REQUEST, format_table, with_requests

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OUTCOMES = (
    (Outcome.BETTER, "beats", "beat"),
    (Outcome.LEVEL, "ties with", "tie with"),
    (Outcome.WORSE, "is worse than", "are worse than"),
)


def comparison_table(
    evaluation: Evaluation,
    trained: Mapping[str, Mapping[str, int]],
    *,
    markdown: bool = False,
    width: int | None = None,
) -> str:
    """Formats plans and numbers of their trainings, in as many columns as fit."""
    shortest, longest = evaluation.cutoffs[0], evaluation.cutoffs[-1]
    compared = [f"{name}@{longest}" for name in ("ndcg", "recall", "even_recall")]
    columns = [compared[0], f"{BY_REQUEST}/{compared[0]}", *compared[1:], f"tail/recall@{longest}"]
    columns += [f"{name}@{shortest}" for name in ("coverage", "average_popularity")]
    columns += next(iter(trained.values()))
    models = with_requests(evaluation.summary())
    plans = {name: {**x, **trained[name]} for name, x in models.items()}
    differences = {
        name: {metric: of_plan[metric].as_dict() for metric in compared if metric in of_plan}
        for name, of_plan in evaluation.differences.items()
    }
    return format_table(plans, columns, differences, markdown=markdown, width=width)


def compared_in_words(evaluation: Evaluation, metric: str) -> str:
    """Says which plans are better than the first, tie with it or are worse, by the intervals."""
    results = evaluation.results
    reference = next(iter(results))
    names: dict[Outcome, list[str]] = {outcome: [] for outcome in Outcome}
    for name, differences in evaluation.differences.items():
        names[differences[metric].outcome].append(name)
    best = max(results, key=lambda name: results[name].overall.intervals[metric].mean)
    parts = [
        f"{', '.join(names[outcome])} {words if len(names[outcome]) > 1 else word} {reference}"
        for outcome, word, words in _OUTCOMES
        if names[outcome]
    ]
    if best == reference:
        parts.insert(0, f"{reference} is highest")
    elif best in names[Outcome.LEVEL]:
        parts.append(f"{best} is highest, by no more than chance")
    else:
        parts[0] += f", {best} the most" if len(names[Outcome.BETTER]) > 1 else ""
    return f"in {metric} {'; '.join(parts)}"


def comparison_figure(evaluation: Evaluation) -> "Figure":
    """Draws two panels with a row for each plan: gains over the first, recall by popularity."""
    names, longest = list(evaluation.results), evaluation.cutoffs[-1]
    figure, (gains, slices) = new_figure(9, 1.6 + 0.36 * len(names), 2, sharey=True)
    _draw_gains(gains, evaluation, f"ndcg@{longest}")
    parts = evaluation.first.slices
    for colour, marker, part in zip(SERIES, MARKERS, parts, strict=False):
        of_part = [x.slices[part].intervals for x in evaluation.results.values()]
        recalls = [intervals[f"recall@{longest}"].mean for intervals in of_part]
        slices.plot(recalls, range(len(names)), marker, color=colour, label=part)
    slices.legend(  # Above, since crossing lines leave no room beside.
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(parts),
        frameon=False,
        labelcolor="linecolor",
        handletextpad=0.2,
        columnspacing=1.2,
    )
    slices.set_xlabel(f"recall@{longest} by popularity of the item")
    for axes in (gains, slices):
        axes.grid(axis="y", color=GRID)
    gains.set_yticks(range(len(names)), names)
    gains.set_ylim(len(names) - 0.5, -0.5)
    return figure


def _draw_gains(axes: "Axes", evaluation: Evaluation, metric: str) -> None:
    gains = [Interval(0.0, 0.0, 0.0), *(x[metric] for x in evaluation.differences.values())]
    for place, gain in enumerate(gains):
        colour = SOFT if gain.outcome is Outcome.LEVEL else SERIES[0]
        axes.plot([gain.low, gain.high], [place, place], color=colour, linewidth=2)
        axes.plot(gain.mean, place, "o", color=colour)
    axes.axvline(0, color=SOFT, linewidth=1, zorder=0)
    axes.locator_params(axis="x", nbins=6)  # More labels would overlap.
    reference, base = next(iter(evaluation.results)), evaluation.first.overall.intervals[metric]
    axes.set_xlabel(f"{metric} above that of {reference} ({base.mean:.4f}), 95% interval")
