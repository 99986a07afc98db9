"""Tables of numbers, for logs and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def format_table(
    models: Mapping[str, Mapping[str, Any]],
    columns: Sequence[str],
    differences: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    markdown: bool = False,
    width: int | None = None,
) -> str:
    """Formats measurements as a table with a line for each model.

    An interval is shown as its mean and half its width, a missing value as "-".

    Args:
        models: Name -> `EvaluationResult.summary()`.
        columns: Names of metrics; slices have names such as "tail/recall@20".
        differences: Name -> metric -> difference from the model without an entry, as in
            `Evaluation.summary()`; shown beside the metric's column.
        markdown: Whether to write a Markdown table instead of lines of equal length.
        width: Most characters of a line. Last columns that do not fit are left out, but never the
            first. None keeps all.

    Example:
        >>> summary = {"recall@20": {"mean": 0.25, "low": 0.24, "high": 0.26}, "coverage@20": 0.5}
        >>> print(format_table({"ease": summary}, ["recall@20", "coverage@20"]))
        model       recall@20  coverage@20
        ease   0.2500 ±0.0100       0.5000
    """
    differences = differences or {}
    compared = {metric for of_model in differences.values() for metric in of_model}
    reference = next((name for name in models if name not in differences), "")
    lines: list[list[str]] = [["model"], *([name] for name in models)]
    for column in columns:
        lines[0].append(column)
        for line, summary in zip(lines[1:], models.values(), strict=True):
            line.append(_cell(_find(summary, column)))
        if column in compared:
            lines[0].append(f"from {reference}")
            for line in lines[1:]:
                line.append(_difference(differences.get(line[0], {}).get(column)))
    table = (format_markdown_cells if markdown else format_cells)(lines)
    if width is None or len(table.partition("\n")[0]) <= width or len(columns) <= 1:
        return table
    return format_table(models, columns[:-1], differences, markdown=markdown, width=width)


def format_cells(lines: Sequence[Sequence[str]]) -> str:
    """Formats cells as plain text, the first column aligned left, the others right.

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
    """Formats cells as a Markdown table; the first line is its header.

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
