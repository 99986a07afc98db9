"""Tables of numbers, for logs and for Markdown."""

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
    """Formats summaries of models, by name, as a table with a line for each.

    An interval is shown as its mean and half its width, a missing value as "-". Slices have columns
    such as "tail/recall@20". The differences of `Evaluation.summary()` are next to their metric.
    The last columns that do not fit in `width` characters are left out, but never the first.
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
    """Formats cells as plain text, the first column aligned left, the others right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = []
    for first, *rest in lines:
        others = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        rows.append("  ".join([first.ljust(widths[0]), *others]))
    return "\n".join(rows)


def format_markdown_cells(lines: Sequence[Sequence[str]]) -> str:
    """Formats cells as a Markdown table; the first line is its header."""
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
