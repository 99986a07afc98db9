"""Draws the README's figure, what the correction does, from the result file of MovieLens-100K.

    python benchmarks/figure.py

An SVG of its own card, light or dark as the reader's system is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "movielens_100k.json"
FIGURE = ROOT / "docs" / "figures" / "correction.svg"
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
WIDTH, LEFT, RIGHT, TOP, ROW = 640, 222, 24, 52, 30
LOW, HIGH = 0.15, 0.35

STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de }
  text { font: 13px system-ui, sans-serif; fill: #24292f }
  .small { font-size: 11px; fill: #57606a }
  .grid { stroke: #d8dee4 }
  .with { fill: #0072b2; stroke: #0072b2 }
  .without { fill: #d55e00; stroke: #d55e00 }
  .other { fill: #57606a; stroke: #57606a }
  @media (prefers-color-scheme: dark) {
    .card { fill: #161b22; stroke: #30363d }
    text { fill: #e6edf3 }
    .small { fill: #9198a1 }
    .grid { stroke: #30363d }
    .with { fill: #56b4e9; stroke: #56b4e9 }
    .without { fill: #e69f00; stroke: #e69f00 }
    .other { fill: #9198a1; stroke: #9198a1 }
  }
"""


def draw(results: dict[str, Any]) -> str:
    """Draws the figure.

    Args:
        results: What `movielens_100k.py` wrote.

    Returns:
        The SVG.
    """
    height = TOP + ROW * (len(PAIRS) + len(OTHERS)) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'aria-label="NDCG@100 on MovieLens-100K with and without the correction">',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>',
        '<text x="14" y="24">NDCG@100 on MovieLens-100K, 95% intervals over users</text>',
    ]
    bottom = height - 34
    for tick in (0.15, 0.20, 0.25, 0.30, 0.35):
        x = _x(tick)
        parts += [
            f'<line class="grid" x1="{x}" y1="{TOP - 12}" x2="{x}" y2="{bottom}"/>',
            f'<text class="small" x="{x}" y="{bottom + 18}" text-anchor="middle">'
            f"{_short(tick, 2)}</text>",
        ]
    y = TOP + 4
    for place, (label, (without, corrected)) in enumerate(PAIRS.items()):
        low, high = (_value(results, name)["mean"] for name in (without, corrected))
        parts.append(_label(label, y))
        parts.append(
            f'<line class="other" stroke-width="1.5" stroke-dasharray="2 3" x1="{_x(low)}" '
            f'y1="{y}" x2="{_x(high)}" y2="{y}"/>'
        )
        parts += _dot(_value(results, without), y, "without", "without" if not place else "")
        parts += _dot(_value(results, corrected), y, "with", "corrected" if not place else "")
        y += ROW
    for label, name in OTHERS.items():
        parts.append(_label(label, y))
        parts += _dot(_value(results, name), y, "other", "")
        y += ROW
    return "\n".join([*parts, "</svg>", ""])


def _x(value: float) -> float:
    return round(LEFT + (value - LOW) / (HIGH - LOW) * (WIDTH - LEFT - RIGHT), 1)


def _short(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".lstrip("0")


def _value(results: dict[str, Any], name: str) -> dict[str, float]:
    values: dict[str, float] = results["models"][name]["clicked"][METRIC]
    return values


def _label(text: str, y: float) -> str:
    return f'<text x="{LEFT - 14}" y="{y + 4}" text-anchor="end">{text}</text>'


def _dot(value: dict[str, float], y: float, kind: str, name: str) -> list[str]:
    """Draws a mean with its interval, and its number above."""
    x = _x(value["mean"])
    number = _short(value["mean"], 3)
    return [
        f'<line class="{kind}" stroke-width="2" x1="{_x(value["low"])}" y1="{y}" '
        f'x2="{_x(value["high"])}" y2="{y}"/>',
        f'<circle class="{kind}" cx="{x}" cy="{y}" r="4.5"/>',
        f'<text class="small" x="{x}" y="{y - 8}" text-anchor="middle">{name} {number}</text>',
    ]


def main() -> None:
    """Draws the figure of the committed result file."""
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    FIGURE.write_text(draw(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
