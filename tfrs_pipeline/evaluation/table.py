"""Summaries of several models as one table, for logs and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("ndcg@100", "recall@20", "recall@100", "mrr@20", "coverage@20", "gini@20")


def format_table(models: Mapping[str, Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """Lays summaries out as plain text, a model a line.

    Args:
        models: Model name -> `EvaluationResult.summary()`.
        columns: Names of metrics. "head/recall@20" is that of a slice.

    Returns:
        Lines of equal length, without a newline at the end. An interval is shown as its mean and
        half its width; "-" stands for what was not measured.

    Example:
        >>> summary = {"recall@20": {"mean": 0.25, "low": 0.24, "high": 0.26}, "coverage@20": 0.5}
        >>> print(format_table({"ease": summary}, ["recall@20", "coverage@20"]))
        model       recall@20  coverage@20
        ease   0.2500 ±0.0100       0.5000
    """
    return format_cells(_cells(models, columns))


def format_markdown_table(
    models: Mapping[str, Mapping[str, Any]], columns: Sequence[str] = COLUMNS
) -> str:
    """Lays summaries out as a Markdown table; arguments and cells as of `format_table`.

    Example:
        >>> print(format_markdown_table({"ease": {"coverage@20": 0.5}}, ["coverage@20"]))
        | model | coverage@20 |
        |---|---:|
        | ease | 0.5000 |
    """
    return format_markdown_cells(_cells(models, columns))


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
    """Lays lines of cells out as a Markdown table; the first line is its header."""
    header, *rest = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([header, "|---|" + "---:|" * (len(lines[0]) - 1), *rest])


def _cells(models: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> list[list[str]]:
    return [
        ["model", *columns],
        *([name, *(_cell(_find(summary, c)) for c in columns)] for name, summary in models.items()),
    ]


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
