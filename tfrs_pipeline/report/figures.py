"""The figures of a run's report: inline SVG whose colours follow the page, light or dark.

Each takes a name of its own in the page, for its ids, and what an axis shows.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What matplotlib draws with -> the page's own colour. No other colour may hold these values.
INK, GRID = "#000101", "#000102"
SERIES = tuple(f"#00020{number}" for number in range(1, 6))
_VARIABLES = {
    INK: "var(--ink)",
    GRID: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)},
}
# Distinct without colour too.
_MARKERS = ("o", "s", "^", "D", "v")
_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (9, 3)))
_SIZE = (4.6, 3.1)
_MAX_POINTS = 150


def intervals_figure(intervals: Mapping[str, Mapping[str, Any]], metric: str, name: str) -> Markup:
    """Draws each model's "mean", "low" and "high", None where not measured; the first on top."""
    figure, axes = _figure((4.6, 1.0 + 0.34 * len(intervals)))
    for place, interval in enumerate(intervals.values()):
        colour = SERIES[0] if place == 0 else SERIES[1]
        mean, low, high = (_nan(interval[key]) for key in ("mean", "low", "high"))
        axes.plot([low, high], [place, place], color=colour, linewidth=2.5)
        axes.plot(mean, place, _MARKERS[min(place, 1)], color=colour, markersize=6)
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.set_ylim(len(intervals) - 0.5, -0.5)
    axes.set_xlabel(f"{metric}, 95% interval")
    axes.grid(axis="x", color=GRID)
    return _svg(figure, name, f"{metric} of each model with its 95% interval")


def slices_figure(
    slices: Mapping[str, Mapping[str, Mapping[str, Any]]], metric: str, name: str
) -> Markup:
    """Draws a metric by popularity of the item: model -> slice -> "mean", "low" and "high"."""
    figure, axes = _figure(_SIZE)
    names = list(next(iter(slices.values())))
    spread = np.linspace(-0.3, 0.3, len(slices)) if len(slices) > 1 else np.zeros(1)
    for number, (model, parts) in enumerate(slices.items()):
        places = np.arange(len(names)) + spread[number]
        colour, marker = SERIES[number % len(SERIES)], _MARKERS[number % len(_MARKERS)]
        for place, interval in zip(places, parts.values(), strict=True):
            axes.plot([place] * 2, [_nan(interval["low"]), _nan(interval["high"])], color=colour)
        means = [_nan(interval["mean"]) for interval in parts.values()]
        axes.plot(places, means, marker, color=colour, markersize=5, label=model)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel(metric)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=GRID)
    _legend(axes)
    return _svg(figure, name, f"{metric} of each model on head, torso and tail")


def curves_figure(
    curves: Mapping[str, Sequence[float]], chosen: Mapping[str, int], what: str, name: str
) -> Markup:
    """Draws each model's values after every epoch, from 1, with a mark at the chosen one."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(_SIZE)
    for number, (model, values) in enumerate(curves.items()):
        colour, marker = SERIES[number % len(SERIES)], _MARKERS[number % len(_MARKERS)]
        epochs = np.arange(1, len(values) + 1)
        axes.plot(epochs, values, color=colour, linestyle=_LINES[number % 5], label=model)
        if 1 <= chosen[model] <= len(values):
            axes.plot(chosen[model], values[chosen[model] - 1], marker, color=colour, markersize=7)
    axes.set_xlabel("epoch")
    axes.set_ylabel(what)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=GRID)
    _legend(axes)
    return _svg(figure, name, f"{what} by epoch, the chosen epoch marked")


def popularity_figure(
    curves: Mapping[str, np.ndarray], slices: Mapping[str, int], what: str, name: str
) -> Markup:
    """Draws values by rank of popularity, both axes logarithmic; zeros are not drawn.

    `curves` are [num_candidates] by falling training count, `slices` says how many candidates the
    "head", the "torso" and the "tail" hold.
    """
    from matplotlib.ticker import LogLocator

    figure, axes = _figure(_SIZE)
    for number, (label, values) in enumerate(curves.items()):
        ranks, means = thinned(values)
        drawn = np.where(means > 0, means, np.nan)
        colour, line = SERIES[number % len(SERIES)], _LINES[number % 5]
        axes.plot(ranks, drawn, color=colour, linestyle=line, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    start = 0
    for part, num in slices.items():
        if start:
            axes.axvline(start + 0.5, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
        if num:
            middle = np.sqrt((start + 1) * (start + num))
            axes.annotate(
                part,
                (middle, 1.01),
                xycoords=("data", "axes fraction"),
                ha="center",
                color=INK,
                fontsize=9,
            )
        start += num
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}".replace("e-0", "e-"))
    axes.minorticks_off()
    low, high = axes.get_ylim()
    if high < 100 * low:  # Powers of ten alone would leave an axis without a number.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.set_xlabel("rank of the item by training positives")
    axes.set_ylabel(what)
    axes.grid(color=GRID)
    if len(curves) > 1:
        _legend(axes, top=1.1)
    return _svg(figure, name, f"{what} by popularity rank of the item, both axes logarithmic")


def thinned(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Takes means over ranks that lie together on a logarithmic axis, for a curve of few points.

    Args:
        values: [num_ranks] by rank.

    Returns:
        Ranks from 1, the geometric middle of those that were taken together, and the means of their
        values. While ranks are few they stay apart.

    Example:
        >>> thinned(np.array([4.0, 2.0, 0.0]))
        (array([1., 2., 3.]), array([4., 2., 0.]))
    """
    edges = np.unique(np.geomspace(1, len(values) + 1, _MAX_POINTS).round().astype(np.int64))
    starts, stops = edges[:-1], edges[1:] - 1
    sums = np.add.reduceat(np.asarray(values, np.float64), starts - 1)
    return np.sqrt(starts * stops.astype(np.float64)), sums / (stops - starts + 1)


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # Not pyplot: no window, no state.

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)
        axis.label.set_fontsize(10)
    return figure, axes


def _legend(axes: Axes, top: float = 1.0) -> None:
    longest = max(len(label) for label in axes.get_legend_handles_labels()[1])
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, top),
        ncols=2 if longest <= 22 else 1,  # As many as fit beside each other.
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        borderaxespad=0.2,
    )


def _nan(value: float | None) -> float:
    return np.nan if value is None else value


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """Writes a figure as an SVG element for a page: its ids are its own, its colours the page's."""
    import matplotlib

    file = io.StringIO()
    # Text stays text: it can be read aloud, found and copied.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(?:xlink:)?(href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    (box,) = re.findall(r'^<svg[^>]*(viewBox="[^"]*")', text)
    body = text[text.index(">") + 1 :]
    return Markup(f'<svg {box} role="img" aria-label="{escape(label)}">{body}'.rstrip())
