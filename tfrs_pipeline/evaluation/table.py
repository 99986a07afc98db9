"""Tables of numbers, for logs and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def format_table(
    models: Mapping[str, Mapping[str, Any]],
    columns: Sequence[str],
    differences: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Lays what was measured of several models out as plain text, a model a line.

    Args:
        models: Name -> `EvaluationResult.summary()`.
        columns: Names of metrics. "tail/recall@20" is that of a slice.
        differences: Name -> metric -> difference from the first model, as of
            `Evaluation.summary()`; that of the first column is shown beside it.

    Returns:
        Lines of equal length, without a newline at the end. An interval is shown as its mean and
        half its width; "-" stands for what was not measured.

    Example:
        >>> summary = {"recall@20": {"mean": 0.25, "low": 0.24, "high": 0.26}, "coverage@20": 0.5}
        >>> print(format_table({"ease": summary}, ["recall@20", "coverage@20"]))
        model       recall@20  coverage@20
        ease   0.2500 ±0.0100       0.5000
    """
    lines = [
        [name, *(_cell(_find(summary, column)) for column in columns)]
        for name, summary in models.items()
    ]
    header = ["model", *columns]
    if differences:
        header.insert(2, f"from {next(iter(models))}")
        for line in lines:
            line.insert(2, _difference(differences.get(line[0], {}).get(columns[0])))
    return format_cells([header, *lines])


def format_cells(lines: Sequence[Sequence[str]]) -> str:
    """Lays lines of cells out as plain text: the first column to the left, the rest to the right.

    Example:
        >>> print(format_cells([["plan", "n"], ["a", "12"]]))
        plan   n
        a     12
    """
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def format_markdown_cells(lines: Sequence[Sequence[str]]) -> str:
    """Lays lines of cells out as a Markdown table; the first line is its header.

    Example:
        >>> print(format_markdown_cells([["plan", "n"], ["a", "12"]]))
        | plan | n |
        |---|---:|
        | a | 12 |
    """
    header, *rest = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([header, "|---|" + "---:|" * (len(lines[0]) - 1), *rest])


def _find(summary: Mapping[str, Any], column: str) -> Any:
    slice_name, _, metric = column.rpartition("/")
    part = summary.get("slices", {}).get(slice_name, {}) if slice_name else summary
    return part.get(metric)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        mean, low, high = value["mean"], value["low"], value["high"]
        if mean is None or low is None:
            return _cell(mean)
        return f"{mean:.4f} ±{(high - low) / 2:.4f}"
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if value <= 1 else f"{value:.1f}"


def _difference(value: Mapping[str, Any] | None) -> str:
    if value is None or value["mean"] is None:
        return ""
    if value["low"] is None:
        return f"{value['mean']:+.4f}"
    return f"{value['mean']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]"
