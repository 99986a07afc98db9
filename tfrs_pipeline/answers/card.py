"""A version's model card: what it was trained on, how well it retrieves, and for what it is not."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tfrs_pipeline.messages import counted

CARD_FILE = Path("MODEL_CARD.md")
_UNKNOWN = "Unknown: it was exported without a run."
_NOT_FOR = """\
- Ranking: it retrieves, and a ranker orders what it finds. A score is no probability.
- What the log never showed. It learned from what people were shown and clicked, so what a page
  favours is favoured again.
- Items that the training did not know: they are found by their features alone, or not at all.
- People without a history, who get what is popular.
- Another market, season or page. The figures are those of one log and its last days."""


def model_card(manifest: Mapping[str, Any], version: int) -> str:
    """Writes the card in Markdown, from a version's manifest."""
    parts = {
        "What it was trained on": _trained_on(manifest),
        "What it reads": _read(manifest),
        "How well it retrieves": _figures(manifest.get("metrics")),
    }
    sections = [f"## {title}\n\n" + "\n".join(lines) for title, lines in parts.items()]
    head = f"# {manifest['name']}, version {version}\n\nA retrieval model of {manifest['date']}."
    return "\n\n".join([head, *sections, f"## What it is not for\n\n{_NOT_FOR}\n"])


def _trained_on(manifest: Mapping[str, Any]) -> Iterator[str]:
    counts, types = manifest.get("counts"), manifest["reading"].get("event_weights", {})
    if counts is None:
        yield _UNKNOWN
        return
    yield f"- The log {manifest['log']}, by the run {manifest['run']}."
    sizes = {"num_samples": "positive", "num_queries": "user", "num_candidates": "item"}
    yield f"- {', '.join(counted(counts[name], word) for name, word in sizes.items())}."
    if types:
        # A type has a weight, or a word in place of one, such as "exposed".
        weights = [f"{x} {y if isinstance(y, str) else f'{y:g}'}" for x, y in types.items()]
        yield f"- Weights of events: {', '.join(weights)}."
    yield f"- Histories until {manifest['histories_until']}; what came later, from the service."


def _read(manifest: Mapping[str, Any]) -> Iterator[str]:
    yield f"- The last {manifest['history_length']} items of a history."
    for side, features in manifest["feature_inputs"].items():
        if features:
            yield f"- Of the {side}: {', '.join(features)}."


def _figures(metrics: Mapping[str, Any] | None) -> Iterator[str]:
    if metrics is None:
        yield _UNKNOWN
        return
    yield f"On {counted(metrics['num_queries'], 'query')} of held-out clicks:\n"
    yield "| metric | mean | 95% interval |"
    yield "|---|---:|---:|"
    rare = {f"{name}, rare items": x for name, x in metrics["slices"].get("tail", {}).items()}
    for name, value in {**metrics, **rare}.items():
        if name.startswith(("recall@", "ndcg@", "even_recall@")) and value["low"] is not None:
            ends = f"{value['low']:.4f} to {value['high']:.4f}"
            yield f"| {name} | {value['mean']:.4f} | {ends} |"
