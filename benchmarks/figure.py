"""Draws the figures of the README and the site from committed result files.

    python benchmarks/figure.py

In `docs/figures`: the way from the log to the service (`way.svg`); the effect of the correction on
MovieLens-100K (`correction.svg`), and of other log q on eight logs (`log_q.svg`); CPU time and
memory of each stage of a run as its log grows (`scale_seconds.svg`, `scale_memory.svg`); the click
rate of the closed loop (`loop.svg`). Pages show two of the plots side by side, a phone one below
the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MultipleLocator

import tfrs_pipeline  # noqa: F401 Before TensorFlow, since it selects Keras 2.
from tfrs_pipeline.drawing import (
    GRID,
    INK,
    MARKERS,
    SERIES,
    SOFT,
    Drawing,
    finish,
    name_lines,
    new_figure,
    title,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
SIZE = (4.62, 3.2)  # Inches: as wide as a phone, so that its text is never small.
METRIC = "ndcg@100"
# The way from the log to the service: what it is called, and what it does, row by row.
WAY = (
    (
        ("log", "clicks, purchases,\nitems shown"),
        ("samples", "positives, and\nsampled negatives"),
        ("two towers", "embed users'\nhistories, and items"),
    ),
    (
        ("service", "answers a request\nwith the top items"),
        ("index", "finds the nearest\namong millions"),
        ("verdict", "better than\nsimple models?"),
    ),
)
# Pairs of models that differ only in the correction, a row each; below them, a row per other model.
PAIRS = {
    "in-batch negatives": ("in_batch_uncorrected", "in_batch"),
    "mixed negatives (the default)": ("two_tower_uncorrected", "two_tower"),
}
OTHERS = {
    "iALS (implicit)": "ials",
    "EASE": "ease",
    "the TFRS tutorial as it stands": "tutorial",
    "popularity": "popularity",
}


# Corrections of corrections.json, other than the exact log q.
OTHER_LOG_Q = ("none", "share", "share, both", "count", "count x2")


def draw_way() -> Drawing:
    """Draws the way from the log to the service: a row of steps to the right, a row back."""
    figure, (axes,) = new_figure(SIZE[0], 1.95)
    figure.set_layout_engine("none")
    axes.set(position=(0, 0, 1, 1), xlim=(-0.06, 3.06), ylim=(-0.04, 2.04))
    axes.axis("off")
    width, height, rows = 0.9, 0.78, (1.56, 0.44)
    for middle, colour, steps in zip(rows, (SERIES[0], SERIES[2]), WAY, strict=True):
        for column, (name, about) in enumerate(steps, 1):
            centre = column - 0.5
            corner = (centre - width / 2, middle - height / 2)
            style: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.06", "linewidth": 1.4}
            style |= {"facecolor": "none", "edgecolor": colour}
            axes.add_patch(FancyBboxPatch(corner, width, height, **style))
            words: dict[str, Any] = {"ha": "center", "va": "center"}
            axes.text(
                centre, middle + 0.23, name, color=colour, fontsize=11, weight="bold", **words
            )
            axes.text(centre, middle - 0.13, about, color=INK, fontsize=9, **words)
    above, below = rows[0] - height / 2, rows[1] + height / 2
    left, right = (1 - width) / 2, (1 + width) / 2
    arrows = {(0.5, below): (0.5, above), (2.5, above): (2.5, below)}
    for column in (0, 1):
        arrows[column + right, rows[0]] = (column + 1 + left, rows[0])
        arrows[column + 1 + left, rows[1]] = (column + right, rows[1])
    line = {"arrowstyle": "-|>", "color": SOFT, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    for start, end in arrows.items():
        axes.annotate("", end, start, arrowprops=line)
    axes.text(0.56, 1.0, "tomorrow's log", color=SOFT, fontsize=9, va="center")
    return finish(
        figure,
        "A log of clicks becomes samples; two towers learn from them; a verdict compares them with "
        "simple models; an index and a service answer requests, which make tomorrow's log",
    )


def draw_log_q(cells: Sequence[Mapping[str, Any]]) -> Drawing:
    """Draws the NDCG of other log q by log, relative to the exact one."""
    cells = [cell for cell in cells if cell["metric"] == METRIC]
    figure, all_axes = new_figure(7.8, 3.6, 2, sharex=True, sharey=True)
    logs = list(dict.fromkeys(cell["log"] for cell in cells))
    for axes, way in zip(all_axes, ("in-batch", "mixed"), strict=True):
        for number, name in enumerate(OTHER_LOG_Q):
            own = [x for x in cells if (x["way"], x["correction"]) == (way, name)]
            places = [logs.index(x["log"]) + 0.14 * (number - 2) for x in own]
            exact = [x["mean"] - x["difference"] for x in own]
            means, margins = (
                [100 * (x[key] or 0) / base for x, base in zip(own, exact, strict=True)]
                for key in ("difference", "margin")
            )
            style: dict[str, Any] = {"fmt": MARKERS[number], "markersize": 4, "elinewidth": 1.5}
            style |= {"color": SERIES[number], "label": name if way == "mixed" else None}
            axes.errorbar(means, places, xerr=margins, **style)
        axes.axvline(0, color=SOFT, linewidth=1)
        title(axes, f"NDCG against exact, {way}")
        _name_rows(axes, [log.partition(",")[0] for log in logs])
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}%".replace("-", "\N{MINUS SIGN}"))
    name_lines(figure)
    return finish(figure, "NDCG@100 with other corrections, relative to the exact log q, by log")


def draw_models(results: Mapping[str, Any]) -> Drawing:
    """Draws models with and without the correction, and others, by `movielens_100k.py`."""
    figure, (axes,) = new_figure(*SIZE)
    for place, (without, corrected) in enumerate(PAIRS.values()):
        ends = [_values(results, name)["mean"] for name in (without, corrected)]
        axes.plot(ends, [place, place], ":", color=SOFT, linewidth=1.5)
        is_first = place == 0
        name = "without " if is_first else ""
        _dot(axes, place, _values(results, without), SERIES[1], name, "right")
        name = "corrected " if is_first else ""
        _dot(axes, place, _values(results, corrected), SERIES[0], name, "left")
    for place, name in enumerate(OTHERS.values(), len(PAIRS)):
        _dot(axes, place, _values(results, name), SOFT)
    _name_rows(axes, [*PAIRS, *OTHERS])
    axes.xaxis.set_major_formatter(lambda value, _: _short(value, 2))
    axes.xaxis.set_major_locator(MultipleLocator(0.05))
    title(axes, "NDCG@100 on MovieLens-100K\n")
    return finish(figure, "NDCG with and without the correction, and of other models")


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.7)
    axes.tick_params(left=False, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=GRID)


def _values(results: Mapping[str, Any], name: str) -> dict[str, float]:
    values: dict[str, float] = results["models"][name]["clicked"][METRIC]
    return values


def _dot(
    axes: Any,
    place: int,
    value: Mapping[str, float],
    colour: str,
    name: str = "",
    side: str = "center",
) -> None:
    """Draws a mean with its interval, and writes its number above, on a side of it."""
    axes.plot([value["low"], value["high"]], [place, place], color=colour, linewidth=2)
    axes.plot(value["mean"], place, "o", color=colour, markersize=6)
    axes.annotate(
        f"{name}{_short(value['mean'], 3)}",
        (value["mean"], place),
        xytext=({"right": 5, "left": -5}.get(side, 0), 5),
        textcoords="offset points",
        ha=side,
        color=INK if side == "center" else colour,
        fontsize=9,
    )


def _short(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".lstrip("0")


def draw_scale(sizes: Sequence[Mapping[str, Any]]) -> dict[str, Drawing]:
    """Draws the seconds and memory of each stage, by size, as `scale.py` measured them."""
    seconds, memory = (
        {name: [size["stages"][name][key] for size in sizes] for name in sizes[0]["stages"]}
        for key in ("cpu_seconds", "rss_anon_gib")
    )
    del seconds["training"]  # All sizes train equally many steps.
    memory["columns on disk"] = [size["columns_gib"] for size in sizes]
    colours = dict(zip(memory, (*SERIES, SOFT), strict=False))
    found = {}
    for name, (what, lines) in {
        "scale_seconds": ("CPU seconds", seconds),
        "scale_memory": ("GiB at the peak", memory),
    }.items():
        figure, (axes,) = new_figure(*SIZE)
        events = [size["num_events"] for size in sizes]
        axes.set(xscale="log", xlabel="events", yscale="log" if lines is seconds else "linear")
        for stage, values in lines.items():
            style = "--" if stage == "columns on disk" else "-"
            options = {"color": colours[stage], "marker": "o", "markersize": 4}
            axes.plot(events, values, style, label=stage, **options)
        title(axes, what)
        axes.grid(color=GRID)
        axes.minorticks_off()
        name_lines(figure)
        found[name] = finish(figure, f"{what} of each stage by the number of events")
    return found


def draw_loop(days: Sequence[Mapping[str, Any]]) -> Drawing:
    """Draws the true click rate of each arm by day."""
    figure, (axes,) = new_figure(*SIZE)
    for colour, arm in zip(SERIES, dict.fromkeys(row["arm"] for row in days), strict=False):
        rates = {row["day"]: 100 * row["click_rate"] for row in days if row["arm"] == arm}
        axes.plot([*rates], [*rates.values()], color=colour, label=arm)
    axes.set(xlabel="day", ylim=0)
    title(axes, "true click rate of what was shown, %")
    axes.grid(color=GRID)
    axes.legend(loc="lower left", frameon=False, labelcolor="linecolor")
    return finish(figure, "True click rate of each arm by day")


def drawings() -> dict[str, Drawing]:
    """Draws the committed result files; name of the figure -> drawing."""

    def read(name: str) -> Any:
        return json.loads((RESULTS / f"{name}.json").read_text())

    return {
        "way": draw_way(),
        "correction": draw_models(read("movielens_100k")),
        "log_q": draw_log_q(read("corrections")["cells"]),
        "loop": draw_loop(read("loop")["days"]),
        **draw_scale([*read("scale")["sizes"], read("scale_1e8")["sizes"][-1]]),
    }


def main() -> None:
    """Writes the figures."""
    for name, drawing in drawings().items():
        (FIGURES / f"{name}.svg").write_text(drawing.svg + "\n")


if __name__ == "__main__":
    main()
