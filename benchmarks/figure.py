"""Draws the figures of README and site from committed result files.

    python benchmarks/figure.py

`docs/figures/correction.svg`: the effect of the correction on MovieLens-100K, and of other log q on
three logs. `scale.svg`: CPU time and memory of each stage of a run as its log grows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MultipleLocator

import tfrs_pipeline  # noqa: F401 Before TensorFlow, since it selects Keras 2.
from tfrs_pipeline.drawing import (
    GRID,
    INK,
    SERIES,
    SOFT,
    Drawing,
    finish,
    label_lines,
    new_figure,
    title,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
METRIC = "ndcg@100"
# A row a pair of models that differ in the correction alone; below them the others, dot by dot.
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


# A log -> what `losses.py` wrote of it, and its metric.
LOGS = {
    "KuaiRand": ("losses_kuairand", "ndcg@10"),
    "MovieLens-100K": ("corrections_ml_100k", "ndcg@100"),
    "MovieLens-1M": ("losses_ml_1m", "ndcg@10"),
}
# Plans of `losses.py` other than the exact log q.
OTHER_LOG_Q = {"unigram": "share of clicks ", "none": "none "}


def draw_correction(
    results: Mapping[str, Any], corrections: Mapping[str, tuple[Mapping[str, Any], str]]
) -> Drawing:
    """Draws models with and without the correction, and others; and what other log q cost.

    Args:
        results: What `movielens_100k.py` wrote.
        corrections: Log -> what `losses.py` wrote of it, and its metric.
    """
    figure, (left, right) = new_figure(9.8, 3.1, 2)
    _draw_models(left, results)
    for place, (written, metric) in enumerate(corrections.values()):
        exact = written["plans"]["package"][f"test/{metric}"]["mean"]
        for colour, (plan, name) in zip(SERIES[1:], OTHER_LOG_Q.items(), strict=False):
            x = written["plans"][plan][f"test/{metric}"]
            mean, error = (100 * x[key] / exact for key in ("difference", "standard_error"))
            right.plot([mean - error, mean + error], [place, place], color=colour, linewidth=2)
            right.plot(mean, place, "o", color=colour, markersize=6)
            is_nearer = plan == "unigram"
            right.annotate(
                f"{name if place == 0 else ''}{mean:.1f}%".replace("-", "\N{MINUS SIGN}"),
                (0 if is_nearer else mean - error, place),
                xytext=(6 if is_nearer else -6, 0),
                textcoords="offset points",
                va="center",
                ha="left" if is_nearer else "right",
                color=colour,
                fontsize=8.5,
            )
    right.axvline(0, color=SOFT, linewidth=1)
    right.set_xlim(-46, 24)
    right.set_yticks(range(len(corrections)), list(corrections))
    right.set_ylim(len(corrections) - 0.5, -0.7)
    right.tick_params(left=False, labelcolor=INK)
    right.spines["left"].set_visible(False)
    right.set_xticks([-30, -15, 0])
    right.grid(axis="x", color=GRID)
    right.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}%".replace("-", "\N{MINUS SIGN}"))
    title(right, "NDCG relative to the exact log q, paired seeds\n")
    return finish(figure, "NDCG with and without the correction, and with other corrections")


def _draw_models(axes: Any, results: Mapping[str, Any]) -> None:
    names = [*PAIRS, *OTHERS]
    for place, (without, corrected) in enumerate(PAIRS.values()):
        ends = [_values(results, name)["mean"] for name in (without, corrected)]
        axes.plot(ends, [place, place], ":", color=SOFT, linewidth=1.5)
        is_first = place == 0
        _dot(axes, place, _values(results, without), SERIES[1], "without " if is_first else "")
        _dot(axes, place, _values(results, corrected), SERIES[0], "corrected " if is_first else "")
    for place, name in enumerate(OTHERS.values(), len(PAIRS)):
        _dot(axes, place, _values(results, name), SOFT, "")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.7)
    axes.tick_params(left=False, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=GRID)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value, 2))
    axes.xaxis.set_major_locator(MultipleLocator(0.05))
    title(axes, "NDCG@100 on MovieLens-100K, 95% intervals over users\n")


def _values(results: Mapping[str, Any], name: str) -> dict[str, float]:
    values: dict[str, float] = results["models"][name]["clicked"][METRIC]
    return values


def _dot(axes: Any, place: int, value: Mapping[str, float], colour: str, name: str) -> None:
    """Draws a mean with its interval, and its number above."""
    axes.plot([value["low"], value["high"]], [place, place], color=colour, linewidth=2)
    axes.plot(value["mean"], place, "o", color=colour, markersize=6)
    axes.annotate(
        f"{name}{_short(value['mean'], 3)}",
        (value["mean"], place),
        xytext=(0, 5),
        textcoords="offset points",
        ha="center",
        color=colour if name else INK,
        fontsize=8.5,
    )


def _short(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".lstrip("0")


def draw_scale(sizes: Sequence[Mapping[str, Any]]) -> Drawing:
    """Draws seconds and memory of each stage over the number of events.

    Args:
        sizes: What `scale.py` measured of each size.
    """
    figure, (left, right) = new_figure(9.6, 3.4, 2)
    events = [size["num_events"] for size in sizes]
    stages = list(sizes[0]["stages"])
    # As many steps of training for all sizes: its seconds say nothing.
    seconds = {
        name: [size["stages"][name]["cpu_seconds"] for size in sizes]
        for name in stages
        if name != "training"
    }
    memory = {name: [size["stages"][name]["rss_anon_gib"] for size in sizes] for name in stages}
    memory["columns on disk"] = [size["columns_gib"] for size in sizes]
    colours = dict(zip(memory, (*SERIES, SOFT), strict=False))
    left.set_yscale("log")
    panels = {
        "CPU seconds": (left, seconds),
        "GiB at the peak, without mapped pages": (right, memory),
    }
    for what, (axes, lines) in panels.items():
        for name, values in lines.items():
            style = "--" if name == "columns on disk" else "-"
            axes.plot(events, values, style, marker="o", markersize=4, color=colours[name])
        axes.set(xscale="log", xlabel="events")
        title(axes, what)
        axes.grid(color=GRID)
        axes.minorticks_off()
    for axes, lines in panels.values():
        ends = {name: (events[-1], values[-1]) for name, values in lines.items()}
        label_lines(axes, ends, [colours[name] for name in ends])
    return finish(figure, "CPU seconds and memory of each stage by the number of events")


def drawings() -> dict[str, Drawing]:
    """Draws the committed result files; name of the figure -> drawing."""

    def read(name: str) -> Any:
        return json.loads((RESULTS / f"{name}.json").read_text())

    return {
        "correction": draw_correction(
            read("movielens_100k"),
            {log: (read(name), metric) for log, (name, metric) in LOGS.items()},
        ),
        "scale": draw_scale([*read("scale")["sizes"], read("scale_1e8")["sizes"][-1]]),
    }


def main() -> None:
    """Writes the figures."""
    for name, drawing in drawings().items():
        (FIGURES / f"{name}.svg").write_text(drawing.card() + "\n")


if __name__ == "__main__":
    main()
