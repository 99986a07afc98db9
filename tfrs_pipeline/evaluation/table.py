"""Tables of numbers, for logs and for Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

BY_REQUEST = "by_request"
"""Prefix of the columns measured by request; the others are measured by user."""


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
    Columns that no model has are left out, and the last that do not fit in `width` characters, but
    never the first.
    """
    columns = [x for x in columns if any(_find(of, x) is not None for of in models.values())]
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


def with_requests(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the models of `Evaluation.summary()` with columns such as "by_request/ndcg@20"."""
    found = metrics.get("by_request", {}).get("models", {})
    return {
        name: {**x, "slices": {**x["slices"], **({BY_REQUEST: found[name]} if found else {})}}
        for name, x in metrics["models"].items()
    }


def explained(table: str, metrics: Mapping[str, Any]) -> Iterator[str]:
    """Explains the columns of a table of models, in lines."""
    left_out = metrics.get("by_request", {}).get("left_out")
    if BY_REQUEST in table:
        yield (
            f"{BY_REQUEST}: one query per request, with the history up to it, as in service; the "
            "other columns: one query per user, with the history before the test, for all that "
            "the user clicked in it"
        )
    elif left_out:
        yield f"measured by user alone: {left_out}"
    if "±" in table:
        yield "±: half of the 95% interval over users"
    if "even_" in table:
        yield "even_: as if the log had shown every item equally often"
    if "tail/" in table:
        yield "tail: the least popular items, which together have a fifth of the training clicks"


def format_cells(lines: Sequence[Sequence[str]]) -> str:
    """Formats cells as plain text, the first column aligned left, the others right."""
    columns = []
    for i, cells in enumerate(zip(*lines, strict=True)):
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if i else cell.ljust(width) for cell in cells])
    return "\n".join(map("  ".join, zip(*columns, strict=True)))


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
