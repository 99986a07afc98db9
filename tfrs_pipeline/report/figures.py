"""The figures of a run's report, which notebooks show too, in the style of `drawing`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfrs_pipeline import drawing
from tfrs_pipeline.evaluation.evaluate import popularity_slices

_SIZE = (4.8, 2.9)
_MAX_POINTS = 150


def plot_intervals(
    panels: Mapping[str, Mapping[str, Mapping[str, Any]]], metric: str
) -> drawing.Drawing:
    """Draws a metric of each model with its interval, the first at the top, in panels side by side.

    Args:
        panels: Title of a panel -> model -> "mean", "low" and "high", as `Interval.as_dict` gives
            them. All panels have the same models.
        metric: Name of the metric, for screen readers.

    A notebook shows what is returned; its `card()` is an SVG document.

    Example:
        >>> found = {"ours": {"mean": 0.33, "low": 0.32, "high": 0.34}}
        >>> plot_intervals({"NDCG@100": found}, "ndcg@100").label
        'ndcg@100 of each model with its 95% interval: NDCG@100'
    """
    names = list(next(iter(panels.values())))
    figure, all_axes = drawing.new_figure(
        4.2, 0.75 + 0.34 * len(names), len(panels), sharex=True, sharey=True
    )
    for axes, (of_panel, intervals) in zip(all_axes, panels.items(), strict=True):
        for place, interval in enumerate(intervals.values()):
            colour = drawing.SERIES[0] if place == 0 else drawing.SERIES[1]
            # None becomes NaN.
            mean, low, high = np.array([interval[key] for key in ("mean", "low", "high")], float)
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot(mean, place, drawing.MARKERS[min(place, 1)], color=colour, markersize=5)
            if not np.isnan(mean):
                axes.annotate(
                    f"{mean:.3f}".replace("0.", "."),
                    (mean, place),
                    xytext=(0, 4),
                    textcoords="offset points",
                    ha="center",
                    color=drawing.INK,
                    fontsize=8.5,
                )
        drawing.title(axes, of_panel, "center")
        axes.spines["left"].set_visible(False)
        axes.tick_params(left=False)
        axes.margins(x=0.18)
        axes.locator_params(axis="x", nbins=6 // len(panels))
        axes.grid(axis="x", color=drawing.GRID)
    all_axes[0].set_yticks(range(len(names)), [x.replace("_uncorr", "_\nuncorr") for x in names])
    all_axes[0].set_ylim(len(names) - 0.5, -0.6)
    for place, text in enumerate(all_axes[0].get_yticklabels()):
        text.set(color=drawing.INK, weight="normal" if place else "bold")
    label = f"{metric} of each model with its 95% interval: {', '.join(panels)}"
    return drawing.finish(figure, label)


def plot_curves(
    curves: Mapping[str, Sequence[float | None]],
    chosen: Mapping[str, int],
    what: str,
    *,
    seconds: Mapping[str, Sequence[float]] | None = None,
) -> drawing.Drawing:
    """Draws each model's values by epoch, from 1, with a mark at the chosen epoch.

    Args:
        curves: Model -> a value an epoch, such as `model.result.history["val_ndcg@100"]`; None
            where nothing was measured, but not in all epochs.
        chosen: Model -> the epoch to mark, such as `model.result.best_epoch`.
        what: Title.
        seconds: Model -> CPU seconds at the end of each epoch, to draw the values by.
    """
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = drawing.new_figure(*_SIZE)
    ends = {}
    for number, (model, measured) in enumerate(curves.items()):
        values = np.array(measured, float)  # None becomes NaN.
        colour, marker = drawing.SERIES[number % 5], drawing.MARKERS[number % 5]
        places = np.arange(1, len(values) + 1) if seconds is None else np.array(seconds[model])
        axes.plot(places, values, color=colour, linestyle=drawing.LINES[number % 5])
        if 1 <= (epoch := chosen[model]) <= len(values):
            axes.plot(places[epoch - 1], values[epoch - 1], marker, color=colour, markersize=6)
        last = np.flatnonzero(~np.isnan(values))[-1]
        ends[model] = (places[last], values[last])
    by = "epoch" if seconds is None else "CPU seconds"
    axes.set_xlabel(by)
    drawing.title(axes, what)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=drawing.GRID)
    drawing.label_lines(axes, ends, [drawing.SERIES[i % 5] for i in range(len(ends))])
    return drawing.finish(figure, f"{what} by {by}, the chosen epoch marked")


def plot_popularity(
    curves: Mapping[str, np.ndarray], counts: np.ndarray, what: str
) -> drawing.Drawing:
    """Draws values of the candidates by popularity rank, on logarithmic axes.

    Args:
        curves: Name -> [num_candidates] values, such as shares of the positives or of the draws.
        counts: [num_candidates] training positives, which rank the candidates and divide them into
            head, torso and tail, such as `holdout.candidate_counts`.
        what: Title.
    """
    order = np.argsort(-counts, kind="stable")
    slices = {name: int(is_in.sum()) for name, is_in in popularity_slices(counts).items()}
    figure, (axes,) = drawing.new_figure(*_SIZE)
    ends = {}
    for number, (label, values) in enumerate(curves.items()):
        ranks, means = thinned(values[order])
        is_drawn = means > 0
        colour, line = drawing.SERIES[number % 5], drawing.LINES[number % 5]
        axes.plot(ranks[is_drawn], means[is_drawn], color=colour, linestyle=line)
        if is_drawn.any():
            ends[label] = (ranks[is_drawn][-1], means[is_drawn][-1])
    axes.set(xscale="log", yscale="log")
    _mark_slices(axes, slices)
    _plain_numbers(axes)
    axes.set_xlabel("rank of the item by training positives")
    drawing.title(axes, f"{what}\n")
    axes.grid(color=drawing.GRID)
    if len(curves) > 1:
        drawing.label_lines(axes, ends, [drawing.SERIES[i % 5] for i in range(len(ends))])
    return drawing.finish(figure, f"{what} by popularity rank of the item, both axes logarithmic")


def _mark_slices(axes: Any, slices: Mapping[str, int]) -> None:
    """Divides the ranks into head, torso and tail, with names above."""
    start = 0
    for part, num in slices.items():
        if start:
            axes.axvline(start + 0.5, color=drawing.SOFT, linewidth=0.8, linestyle=(0, (2, 3)))
        if num:
            place = np.sqrt((start + 1) * (start + num)), 1.01
            options = {"xycoords": ("data", "axes fraction"), "ha": "center", "fontsize": 9}
            axes.annotate(part, place, color=drawing.SOFT, **options)
        start += num


def _plain_numbers(axes: Any) -> None:
    """Writes the numbers of logarithmic axes without powers of ten."""
    from matplotlib.ticker import LogLocator

    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}".replace("e-0", "e-"))
    axes.minorticks_off()
    low, high = axes.get_ylim()
    if high < 100 * low:  # Powers of ten alone might leave the axis without a number.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def thinned(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages values over ranks that are close on a logarithmic axis; the first ranks stay alone.

    Returns the geometric middle of each group's ranks, from 1, and the groups' means.
    """
    edges = np.unique(np.geomspace(1, len(values) + 1, _MAX_POINTS).round().astype(np.int64))
    starts, stops = edges[:-1], edges[1:] - 1
    sums = np.add.reduceat(np.asarray(values, np.float64), starts - 1)
    return np.sqrt(starts * stops.astype(np.float64)), sums / (stops - starts + 1)
