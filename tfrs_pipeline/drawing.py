"""All figures, in one style: safe for colour blindness, names in their colours, on a white card.

Colours are those of Okabe and Ito (2008), darkened to stand out on white.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tfrs_pipeline.evaluation.metrics import popularity_slices
from tfrs_pipeline.evaluation.results import EvaluationResult, find_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, GRID = "#1c2127", "#55606b", "#d9dee3"
SERIES = ("#0072b2", "#b84a00", "#00795a", "#a8487f", "#6b5d00")
# Distinguishable without colour.
MARKERS = ("o", "s", "^", "D", "v")
LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (9, 3)))
_FONT_SIZE = 9.5
_SHORT = re.compile(r"(\d\.\d\d)\d+")  # Less than a hundredth of a point is invisible.
_SIZE = (4.8, 2.9)
_MAX_POINTS = 150


@dataclass(frozen=True)
class Drawing:
    """A finished figure, as an SVG element with a label for screen readers."""

    label: str
    svg: str = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Writes the figure to an SVG file, and replaces an earlier one.

        Raises a `ValueError` if the path does not end in .svg.
        """
        if Path(path).suffix.lower() != ".svg":
            raise ValueError(f"A drawing is saved as SVG: give a path NAME.svg. Received: {path}")
        Path(path).write_text(self.svg, encoding="utf-8")

    def _repr_svg_(self) -> str:
        return self.svg


def new_figure(
    width: float, height: float, columns: int = 1, **options: Any
) -> "tuple[Figure, Sequence[Axes]]":
    """Makes a figure, in inches, with axes side by side; options are those of `Figure.subplots`."""
    from matplotlib.figure import Figure  # Not pyplot: no window, no state.
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(width, height), layout=layout)
    all_axes = figure.subplots(1, columns, squeeze=False, **options)[0]
    for axes in all_axes:
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(GRID)
        axes.tick_params(which="both", color=GRID, labelcolor=SOFT, labelsize=_FONT_SIZE)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set(color=INK, fontsize=_FONT_SIZE)
    return figure, all_axes


def title(axes: "Axes", text: str, align: Literal["left", "center"] = "left") -> None:
    """Writes a title above axes."""
    axes.set_title(text, loc=align, color=INK, fontsize=_FONT_SIZE)


def name_lines(figure: "Figure") -> None:
    """Writes the labels of all lines to the right of a figure, in their colours."""
    options: Any = {"frameon": False, "labelcolor": "linecolor", "borderaxespad": 1}
    figure.legend(loc="outside right upper", fontsize=_FONT_SIZE, **options)


def finish(figure: "Figure", label: str) -> Drawing:
    """Converts a figure to SVG; the same figure gives the same text."""
    import matplotlib
    from markupsafe import escape

    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text stays text, so that it can be read aloud, found and copied.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(file, format="svg", metadata=no_metadata)
    _, start, text = file.getvalue().partition("<svg ")
    # A page may hold several figures. Only the ids of definitions are hashes, which are unique.
    text = re.sub(r' id="[\w.]+_\d+"', "", text)
    # Only within tags, because numbers between them are for people.
    text = re.sub(r"<[^>]*>", lambda tag: _SHORT.sub(r"\1", tag[0]), text)
    return Drawing(label, f'{start}role="img" aria-label="{escape(label)}" {text.rstrip()}')


def plot_intervals(
    results: Any, metric: str | Sequence[str] | None = None, *, are_differences: bool = False
) -> Drawing:
    """Draws a metric of each model with its interval, the first at the top, in panels side by side.

    Args:
        results: What `evaluate` returns. Or numbers: title of a panel -> model -> "mean", "low" and
            "high", as `Interval.as_dict` gives them, with the same models in all panels.
        metric: Name of the metric, or several, with a panel each, such as `["head/recall@100",
            "tail/recall@100"]`; by default NDCG at the largest cutoff. For numbers, the name is
            what a screen reader says.
        are_differences: Whether numbers are differences: draws a line at 0, and signs.

    A notebook shows what is returned; its `svg` is an SVG document. A `TypeError` says what is
    drawn if `results` is something else.

    Example:
        >>> intervals = {"ours": {"mean": 0.33, "low": 0.32, "high": 0.34}}
        >>> plot_intervals({"NDCG@100": intervals}, "ndcg@100").label
        'ndcg@100 of each model with its 95% interval: NDCG@100'
    """
    panels = getattr(results, "results", results)
    models = panels.values() if isinstance(panels, Mapping) else ()
    if models and all(isinstance(model, EvaluationResult) for model in models):
        ndcg = [name for name in next(iter(models)).per_query if name.startswith("ndcg")]
        metrics = [metric] if isinstance(metric, str) else metric or ndcg[-1:]
        summaries = {name: model.summary() for name, model in panels.items()}
        panels = {x: {name: find_metric(y, x) for name, y in summaries.items()} for x in metrics}
        metric = ", ".join(metrics)
    intervals = [
        interval
        for panel in (panels.values() if models else ())
        for interval in (panel.values() if isinstance(panel, Mapping) else [None])
    ]
    if not (metric and intervals and all(isinstance(x, Mapping) for x in intervals)):
        raise TypeError(
            "plot_intervals takes what evaluate returns, and a metric that has an interval, such "
            "as 'ndcg@100' or 'tail/recall@20'; or intervals by panel and model, and a name. "
            f"Received: {metric!r} of {type(results).__name__}."
        )
    names = list(next(iter(panels.values())))
    figure, all_axes = new_figure(
        4.2, 0.75 + 0.34 * len(names), len(panels), sharex=True, sharey=True
    )
    for axes, (panel, intervals) in zip(all_axes, panels.items(), strict=True):
        for position, interval in enumerate(intervals.values()):
            is_first = position == 0 and not are_differences
            colour = SERIES[0] if is_first else SERIES[1]
            # None becomes NaN.
            mean, low, high = np.array([interval[key] for key in ("mean", "low", "high")], float)
            axes.plot([low, high], [position, position], color=colour, linewidth=2)
            axes.plot(mean, position, MARKERS[0 if is_first else 1], color=colour, markersize=5)
            if not np.isnan(mean):
                axes.annotate(
                    f"{mean:{'+' if are_differences else ''}.3f}".replace("0.", "."),
                    (mean, position),
                    xytext=(0, 4),
                    textcoords="offset points",
                    ha="center",
                    color=INK,
                    fontsize=8.5,
                )
        if are_differences:
            axes.axvline(0, color=SOFT, linewidth=1)
        title(axes, panel, "center")
        axes.spines["left"].set_visible(False)
        axes.tick_params(left=False)
        axes.margins(x=0.18)
        axes.locator_params(axis="x", nbins=6 // len(panels))
        # As short as the values, or labels would meet in a narrow panel.
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}".replace("0.", "."))
        axes.grid(axis="x", color=GRID)
    all_axes[0].set_yticks(range(len(names)), [x.replace("_uncorr", "_\nuncorr") for x in names])
    all_axes[0].set_ylim(len(names) - 0.5, -0.6)
    for position, text in enumerate(all_axes[0].get_yticklabels()):
        text.set(color=INK, weight="normal" if position or are_differences else "bold")
    label = f"{metric} of each model with its 95% interval: {', '.join(panels)}"
    return finish(figure, label)


def plot_curves(
    curves: Any,
    chosen: Mapping[str, int] | None = None,
    what: str | None = None,
    *,
    seconds: Mapping[str, Sequence[float]] | None = None,
) -> Drawing:
    """Draws each model's values by epoch, from 1, with a mark at the chosen epoch.

    Args:
        curves: A fitted model, or several by name. Or numbers: model -> a value an epoch, such as
            `model.result.history["val_ndcg@100"]`; None where nothing was measured, but not in all
            epochs.
        chosen: For numbers: model -> the epoch to mark, such as `model.result.best_epoch`.
        what: Title. For fitted models, the value to draw, such as "loss"; by default the first that
            was measured on validation.
        seconds: For numbers: model -> CPU seconds at the end of each epoch, to draw the values by.

    A `TypeError` says what is drawn if `curves` is something else.
    """
    from matplotlib.ticker import MaxNLocator

    models = curves if isinstance(curves, Mapping) else {"model": curves}
    fitted: dict[str, Any] = {name: getattr(x, "result", None) for name, x in models.items()}
    if fitted and all(fitted.values()):
        logged = next(iter(fitted.values())).history
        what = what or next((name for name in logged if name.startswith("val_")), "loss")
        curves = {name: result.history.get(what) for name, result in fitted.items()}
        chosen = {name: result.best_epoch for name, result in fitted.items()}
    if chosen is None or what is None or None in curves.values():
        raise TypeError(
            "plot_curves takes fitted models and a value that they logged, such as "
            "'loss'; or values by model and epoch, the epochs to mark and a title. "
            f"Received: {type(models).__name__} of {', '.join(map(str, models))}, {what!r}."
        )
    figure, (axes,) = new_figure(*_SIZE)
    for number, (model, measured) in enumerate(curves.items()):
        values = np.array(measured, float)  # None becomes NaN.
        colour, marker = SERIES[number % 5], MARKERS[number % 5]
        places = np.arange(1, len(values) + 1) if seconds is None else np.array(seconds[model])
        axes.plot(places, values, color=colour, linestyle=LINES[number % 5], label=model)
        if 1 <= (epoch := chosen[model]) <= len(values):
            axes.plot(places[epoch - 1], values[epoch - 1], marker, color=colour, markersize=6)
    by = "epoch" if seconds is None else "CPU seconds"
    axes.set_xlabel(by)
    title(axes, what)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=GRID)
    name_lines(figure)
    return finish(figure, f"{what} by {by}, the chosen epoch marked")


def plot_popularity(
    curves: Mapping[str, np.ndarray], counts: np.ndarray, what: str = "training positives"
) -> Drawing:
    """Draws values of the candidates by popularity rank, on logarithmic axes.

    Args:
        curves: Name -> [num_candidates] values, such as the training positives
            (`test.candidate_counts`), or shares of the positives or of the draws.
        counts: [num_candidates] training positives. They rank the candidates, and divide them into
            head, torso and tail.
        what: Title.
    """
    # Equal counts keep the order of the candidates, so that the same log gives the same figure.
    order = np.argsort(-counts, kind="stable")
    figure, (axes,) = new_figure(*_SIZE)
    for number, (label, values) in enumerate(curves.items()):
        ranks, means = thinned(values[order])
        is_drawn = means > 0
        colour, line = SERIES[number % 5], LINES[number % 5]
        axes.plot(ranks[is_drawn], means[is_drawn], color=colour, linestyle=line, label=label)
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,g}")  # Not powers of ten.
    start = 0
    for part, is_in in popularity_slices(counts).items():
        num = is_in.sum()
        if start:
            axes.axvline(start + 0.5, color=SOFT, linewidth=0.8, linestyle=(0, (2, 3)))
        # In a narrow slice, its name would overlap the next one.
        if num and np.log10((start + num) / (start + 1)) > 0.06 * len(part):
            position = np.sqrt((start + 1) * (start + num)), 1.01
            options: Any = {"xycoords": ("data", "axes fraction"), "ha": "center", "fontsize": 9}
            axes.annotate(part, position, color=SOFT, **options)
        start += num
    axes.set_xlabel("rank of the item by training positives")
    title(axes, f"{what}\n")
    axes.grid(color=GRID)
    if len(curves) > 1:
        name_lines(figure)
    return finish(figure, f"{what} by popularity rank of the item, both axes logarithmic")


def thinned(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages values over ranks that are close on a logarithmic axis; the first ranks stay alone.

    Returns the geometric middle of each group's ranks, from 1, and the groups' means.
    """
    edges = np.unique(np.geomspace(1, len(values) + 1, _MAX_POINTS).round().astype(np.int64))
    starts, stops = edges[:-1], edges[1:] - 1
    sums = np.add.reduceat(np.asarray(values, np.float64), starts - 1)
    return np.sqrt(starts * stops.astype(np.float64)), sums / (stops - starts + 1)
