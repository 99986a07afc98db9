"""One self-contained HTML page about a run: data, training, what it finds, and for whom.

The page asks nothing of the network and runs no script. Every number of metrics.json that it shows
stands in a `<data>` element with its full value.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfrs_pipeline.config import RunConfig, dump_config
from tfrs_pipeline.data.schema import Dropped, Stage
from tfrs_pipeline.data.split import PARTS
from tfrs_pipeline.evaluation.evaluate import popularity_slices
from tfrs_pipeline.evaluation.metrics import QUERY_METRICS
from tfrs_pipeline.report.figures import (
    curves_figure,
    frontier_figure,
    intervals_figure,
    popularity_figure,
    slices_figure,
)

SET_METRICS = ("coverage", "average_popularity", "gini")
LEFT_OUT = "left out"
_EXCLUDED = {
    "clicked": "what the user clicked before is left out of the ranking",
    "seen": "what the user saw before is left out of the ranking",
    "none": "nothing is left out of the ranking",
}


@dataclass(frozen=True)
class Popularity:
    """Who is drawn how often, by candidate.

    Args:
        counts: [num_candidates] training positives.
        before: [num_candidates] share of the positives as logged, sum 1.
        after: [num_candidates] share of the positives' weight as trained on, sum 1; that of before
            where neither resampling nor weights change it.
        samplers: Sampler of negatives -> [num_candidates] its distribution.
        num_unreachable: Candidates that no sampler can draw.
    """

    counts: np.ndarray
    before: np.ndarray
    after: np.ndarray
    samplers: Mapping[str, np.ndarray]
    num_unreachable: int


@dataclass(frozen=True)
class RunFacts:
    """What a page tells of a run.

    Args:
        folder: Where the run lies.
        config: Its settings.
        metrics: What its metrics.json holds.
        table_sizes: "events", "items", "users" -> rows.
        dropped: What the source left out.
        events_by_stage: Stage -> part of the split, or "left out" of it -> events.
        items_by_part: Part of the split -> distinct items.
        samples: Report of the samples that the model in service was trained on
            (`build_samples`).
        masked_shares: Reason -> share of the columns that rows share and that do not count.
        mean_hard_share: Mean of f over the positives; None where hard negatives are mined, so that
            it changes while training.
        popularity: Of the same samples.
        titles: Item id -> title, of those that are shown.
    """

    folder: str
    config: RunConfig
    metrics: Mapping[str, Any]
    table_sizes: Mapping[str, int]
    dropped: Sequence[Dropped]
    events_by_stage: Mapping[str, Mapping[str, int]]
    items_by_part: Mapping[str, int]
    samples: Mapping[str, Any]
    masked_shares: Mapping[str, float]
    mean_hard_share: float | None
    popularity: Popularity
    titles: Mapping[Any, str]

    @property
    def shortest(self) -> int:
        """The shortest cutoff."""
        return min(self.config.evaluation.cutoffs)

    @property
    def longest(self) -> int:
        """The longest cutoff."""
        return max(self.config.evaluation.cutoffs)


@dataclass(frozen=True)
class Number:
    """A number in a table.

    Args:
        value: In full; None is one that was not measured.
        shown: How it is written.
        note: Smaller, below it.
        is_strong: Whether it stands out.
        share: Length of a bar beside it, 0 to 1; None is no bar.
    """

    value: float | None
    shown: str
    note: str = ""
    is_strong: bool = False
    share: float | None = None


Cell = str | Number


def report_page(facts: RunFacts) -> str:
    """Writes the page.

    Args:
        facts: Of a finished run.

    Returns:
        A whole HTML document. The same facts give the same text.
    """
    sections = [(title, write(facts)) for title, write in _SECTIONS.items()]
    sections = [(title, content) for title, content in sections if content]
    contents = "".join(
        f'<li><a href="#{_anchor(title)}">{_text(title)}</a></li>' for title, _ in sections
    )
    body = "".join(
        f'<section id="{_anchor(title)}"><h2>{_text(title)}</h2>{content}</section>'
        for title, content in sections
    )
    name = facts.config.model_name
    return _PAGE.format(
        title=_text(f"{name}: report of a retrieval run"),
        style=_STYLE,
        name=_text(name),
        folder=_text(facts.folder),
        tiles=_tiles(facts),
        contents=contents,
        body=body,
    )


# Sections, in the order of the page


def _results(facts: RunFacts) -> str:
    models, evaluation = facts.metrics["models"], facts.config.evaluation
    names = [f"{name}@{k}" for name in QUERY_METRICS for k in evaluation.cutoffs]
    names += [f"{name}@{k}" for name in SET_METRICS for k in evaluation.cutoffs]
    names = [name for name in names if all(name in model for model in models.values())]
    rows = [[name, *_metric_cells(name, [m[name] for m in models.values()])] for name in names]
    first = next(iter(models.values()))
    paragraphs = _paragraph(
        f"On the test part, {_count(first['num_queries'])} queries with "
        f"{_count(first['num_relevant'])} items to find; {_EXCLUDED[evaluation.exclude]}. "
        f"{_count(first['num_skipped'])} queries with nothing to find were skipped. "
        "Below a mean stands its 95% interval, by bootstrap over queries; the best is bold."
    )
    figures = _figures(
        intervals_figure(
            {name: model[metric] for name, model in models.items()},
            metric,
            f"interval-{metric.partition('@')[0]}",
        )
        for metric in (f"ndcg@{facts.longest}", f"recall@{facts.longest}")
    )
    return paragraphs + figures + _table("Metrics", ["metric", *models], rows) + _differences(facts)


def _metric_cells(name: str, values: Sequence[Any]) -> list[Cell]:
    if not isinstance(values[0], Mapping):
        digits = 1 if name.startswith("average_popularity") else 4
        return [_measured(value, digits) for value in values]
    best = max((value["mean"] for value in values if value["mean"] is not None), default=None)
    return [_interval(value, is_strong=value["mean"] == best) for value in values]


def _differences(facts: RunFacts) -> str:
    differences = facts.metrics.get("differences", {})
    if not differences:
        return ""
    reference = next(iter(facts.metrics["models"]))
    names = list(next(iter(differences.values())))
    rows = [
        [name, *(_difference(of_model[name]) for of_model in differences.values())]
        for name in names
    ]
    return (
        f"<h3>The others compared with {_text(reference)}</h3>"
        + _paragraph(
            f"The model minus {reference}, query by query: what makes a query hard is common to "
            "both, so that this interval is narrower than the two apart. Bold where it leaves "
            "out 0."
        )
        + _table("Differences", ["metric", *differences], rows)
    )


def _slices(facts: RunFacts) -> str:
    models = facts.metrics["models"]
    metrics = [f"recall@{facts.longest}", f"ndcg@{facts.longest}"]
    first = next(iter(models.values()))
    rows: list[list[Cell]] = []
    for part in first["slices"]:
        for metric in metrics:
            values = [model["slices"][part][metric] for model in models.values()]
            rows.append([f"{part}, {metric}", *_metric_cells(metric, values)])
    sizes: list[list[Cell]] = [
        [
            part,
            _whole(values["num_candidates"]),
            _whole(values["num_relevant"]),
            _whole(values["num_queries"]),
        ]
        for part, values in first["slices"].items()
    ]
    figure = slices_figure(
        {
            name: {part: values[metrics[0]] for part, values in model["slices"].items()}
            for name, model in models.items()
        },
        metrics[0],
        "slices",
    )
    return (
        _paragraph(
            "The head is the most popular items, which hold half of the training positives; the "
            "torso the next ones, up to 80%; the tail all others. One ranking over the whole "
            "corpus; only the items of the slice count as found."
        )
        + _figures([figure])
        + _table("Slices", ["slice", "items", "items to find", "queries"], sizes)
        + _table("Metrics by slice", ["slice, metric", *models], rows)
    )


def _training(facts: RunFacts) -> str:
    training = facts.metrics["training"]
    monitor = f"val_{facts.config.training.monitor}"
    chosen = {name: result["best_epoch"] for name, result in training.items()}
    names = dict.fromkeys(name for result in training.values() for name in result["history"])
    ordered = sorted(names, key=lambda name: (name != "loss", name != monitor))
    figures = _figures(
        curves_figure(
            {
                model: result["history"][name]
                for model, result in training.items()
                if name in result["history"]
            },
            chosen,
            name.replace("val_", "validation "),
            f"curve-{number}",
        )
        for number, name in enumerate(ordered)
    )
    rows: list[list[Cell]] = [
        [
            model,
            _whole(result["best_epoch"]),
            _whole(len(result["history"]["loss"])),
            _measured(max(result["history"][monitor]), 4),
            _measured(result["history"]["loss"][result["best_epoch"] - 1], 4),
        ]
        for model, result in training.items()
    ]
    header = ["model", "chosen epoch", "epochs", f"best validation {monitor[4:]}", "loss there"]
    return (
        _paragraph(
            f"The epoch of the best validation {monitor[4:]} is chosen, and marked. Losses compare "
            "between models only where they have the same columns and the same correction."
        )
        + figures
        + _table("Chosen epochs", header, rows)
    )


def _data(facts: RunFacts) -> str:
    sizes = ", ".join(f"{_count(num)} {name}" for name, num in facts.table_sizes.items())
    source = facts.config.data
    where = f", from {source.path}" if source.path is not None else ""
    parts: list[list[Cell]] = []
    for part in PARTS:
        if part in facts.metrics["split"]:
            counts = facts.metrics["split"][part]
            numbers = [counts["num_events"], counts["num_positives"], counts["num_users"]]
            cells = [_whole(num) for num in (*numbers, facts.items_by_part.get(part, 0))]
            parts.append([part, *cells])
    dropped: list[list[Cell]] = [[d.reason, _whole(d.num_rows)] for d in facts.dropped]
    split = facts.metrics["split"]
    dropped.append([f"left out by the split {facts.config.split.kind}: events",
                    _whole(split.get("num_events_dropped", 0))])  # fmt: skip
    dropped.append([f"left out by the split {facts.config.split.kind}: users",
                    _whole(split.get("num_users_dropped", 0))])  # fmt: skip
    return (
        _paragraph(f"Source {source.source}{where}: {sizes}.")
        + _table("Split", ["part", "events", "positives", "users", "items"], parts)
        + _table("Dropped", ["what was dropped", "number"], dropped)
    )


def _funnel(facts: RunFacts) -> str:
    parts = [part for part in (*PARTS, LEFT_OUT)
             if any(part in of_stage for of_stage in facts.events_by_stage.values())]  # fmt: skip
    stages = [stage.value for stage in Stage if stage.value in facts.events_by_stage]
    totals = {stage: sum(facts.events_by_stage[stage].values()) for stage in stages}
    largest = max(totals.values(), default=1)
    rows: list[list[Cell]] = [
        [
            stage,
            Number(totals[stage], _count(totals[stage]), share=totals[stage] / largest),
            *(_whole(facts.events_by_stage[stage].get(part, 0)) for part in parts),
        ]
        for stage in stages
    ]
    samples = facts.samples
    masks = _masked_pairs(facts)
    for reason, num in samples.get("hard_negatives_removed", {}).items():
        masks.append([f"never a hard negative: {reason}", _whole(num), "event"])
    columns: list[list[Cell]] = [
        [reason, Number(share, f"{share:.2%}")] for reason, share in facts.masked_shares.items()
    ]
    return (
        _paragraph("The furthest stage that an item reached in a request; each event counts once.")
        + _table("Events by stage", ["stage", "events", *parts], rows)
        + "<h3>Never a negative</h3>"
        + _paragraph(
            "Counted in all that the model in service was trained on. An item that was shown and "
            "not clicked is for ranking, not for retrieval."
            + (
                " This run allows them all the same (samples.allow_exposed_as_negatives)."
                if facts.config.samples.allow_exposed_as_negatives
                else ""
            )
        )
        + _table("Masked", ["what is kept from being a negative", "number", "of what"], masks)
        + _table("Left out of the shared columns", ["reason", "share of the columns"], columns)
        + _hard_negatives(facts)
    )


def _masked_pairs(facts: RunFacts) -> list[list[Cell]]:
    config, samples = facts.config.samples, facts.samples
    rows: list[list[Cell]] = []
    for reason, num, setting, is_masked in (
        (
            "known positive of the user",
            samples["num_known_positives"],
            "mask_known_positives",
            config.mask_known_positives,
        ),
        (
            "exposed to the user, not clicked",
            samples["num_exposed"],
            "mask_exposed",
            config.mask_exposed,
        ),
    ):
        unless = "" if is_masked else f" (not masked: samples.{setting} is off)"
        rows.append([reason + unless, _whole(num), "pair of user and item"])
    return rows


def _hard_negatives(facts: RunFacts) -> str:
    config = facts.config.samples
    if not config.hard_share:
        return _paragraph("No hard negatives: samples.hard_share is 0.")
    pools = facts.samples.get("hard_negatives", {})
    num_samples = max(1, facts.samples["num_samples"])
    rows: list[list[Cell]] = []
    for stage, pool in pools.items():
        share = pool["num_samples"] / num_samples
        cells = [Number(share, f"{share:.1%}"), _measured(pool["mean_pool"], 1)]
        rows.append([stage, _whole(pool["num_samples"]), *cells])
    text = f"Hard share {config.hard_share:g} of the negative weight; "
    if facts.mean_hard_share is None:
        text += "mined from the model while it was trained: see what the stages said."
    else:
        text += (
            f"effective mean {facts.mean_hard_share:.4f}, as a positive without hard negatives "
            "has none."
        )
    header = ["stage", "positives with some", "share of the positives", "mean size of the pool"]
    return (
        "<h3>Hard negatives</h3>"
        + _paragraph(text)
        + (_table("Pools", header, rows) if rows else "")
    )


def _popularity(facts: RunFacts) -> str:
    popularity = facts.popularity
    order = np.argsort(-popularity.counts, kind="stable")
    slices = popularity_slices(popularity.counts)
    sizes = {name: int(is_in.sum()) for name, is_in in slices.items()}
    is_changed = not np.allclose(popularity.before, popularity.after, rtol=1e-6, atol=0)
    shares = {"positives, as logged": popularity.before}
    if is_changed:
        shares["positives, as trained on"] = popularity.after
    lines = {**shares, **popularity.samplers}
    drawn = {
        "training positives": {"training positives": popularity.counts},
        **({"share of the positives": shares} if is_changed else {}),
        "probability of a draw": popularity.samplers,
    }
    figures = [
        popularity_figure(
            {name: values[order] for name, values in curves.items()}, sizes, what, f"rank-{number}"
        )
        for number, (what, curves) in enumerate(drawn.items())
        if curves
    ]
    rows: list[list[Cell]] = [
        [
            name,
            _whole(sizes[name]),
            *(Number(float(values[is_in].sum()), f"{values[is_in].sum():.1%}")
              for values in lines.values()),
        ]
        for name, is_in in slices.items()
    ]  # fmt: skip
    samples = facts.config.samples
    changed = (
        f"Positives are resampled ({samples.resampling}, as {samples.resampling_as})."
        if samples.resampling != "none"
        else "Positives are not resampled (samples.resampling is none)."
    )
    if popularity.num_unreachable:
        changed += f" {_count(popularity.num_unreachable)} items are never drawn as negatives."
    without = int((popularity.counts == 0).sum())
    return (
        _paragraph(
            f"{changed} {_count(without)} of {_count(len(popularity.counts))} items have no "
            "training positive; log axes cannot show them. Where ranks are many, a point is the "
            "mean of neighbours."
        )
        + _figures(figures)
        + _table("Shares by slice", ["slice", "items", *lines], rows)
    )


def _index(facts: RunFacts) -> str:
    index = facts.metrics["index"]
    rows: list[list[Cell]] = [["kind", str(index["kind"])]]
    for name, value in index.items():
        if name.startswith("index_recall@"):
            rows.append([f"{name}, against exact search", _measured(value, 4)])
    rows += [[f"settings: {name}", _plain(value)] for name, value in
             index.get("settings", {}).items()]  # fmt: skip
    return _table("Kind and settings", ["property", "value"], rows) + _frontier(
        index.get("frontier", [])
    )


def _frontier(points: Sequence[Mapping[str, Any]]) -> str:
    """Shows what was tried for an index: a list of flat records, drawn where they have a cost.

    A cost is a field whose name ends in "_ms"; what is found is one that begins "index_recall@".
    """
    if not points:
        return ""
    names = list(dict.fromkeys(name for point in points for name in point))
    rows = [[_plain(point.get(name)) for name in names] for point in points]
    costs = [name for name in names if name.endswith("_ms")]
    found = [name for name in names if name.startswith("index_recall@")]
    figures = ""
    if costs and found:
        pairs = [(p[costs[0]], p[found[0]]) for p in points if {costs[0], found[0]} <= set(p)]
        figures = _figures([frontier_figure(pairs, [costs[0], found[0]], "frontier")])
    return (
        "<h3>What it finds against what it costs</h3>" + figures + _table("Frontier", names, rows)
    )


def _examples(facts: RunFacts) -> str:
    examples = facts.metrics.get("examples", [])
    if not examples:
        return ""

    def listed(ids: Iterable[Any], found: Sequence[Any] = ()) -> str:
        lines = (
            f"<li>{_item(id_, facts.titles)}"
            + (' <strong class="hit">&#10003; clicked</strong>' if id_ in found else "")
            + "</li>"
            for id_ in ids
        )
        return f"<ol>{''.join(lines)}</ol>"

    model = next(iter(facts.metrics["models"]))
    blocks = []
    for example in examples:
        num_history, shown = example["num_history"], len(example["history"])
        latest = f"latest {shown} of {_count(num_history)}" if shown < num_history else "all"
        blocks.append(
            f'<article class="example"><h3>User {_text(example["user_id"])}</h3>'
            f"<div><h4>Clicked before ({latest})</h4>{listed(example['history'])}</div>"
            f"<div><h4>Recommended</h4>{listed(example['recommended'], example['found'])}"
            f"<p>Among these: {len(example['found'])} of the {_count(example['num_relevant'])} "
            "that the user clicked in the test part.</p></div></article>"
        )
    return _paragraph(
        f"What {model} recommends by the history before the test part, and what of it the "
        "user clicked in the test part. The users are chosen by the length of their "
        "history, short to long, not by what was found."
    ) + "".join(blocks)


def _times(facts: RunFacts) -> str:
    seconds = facts.metrics["seconds"]
    longest = max(seconds.values(), default=0) or 1
    rows: list[list[Cell]] = [
        [stage, Number(taken, f"{taken:,.1f} s", share=taken / longest)]
        for stage, taken in seconds.items()
    ]
    total = sum(seconds.values())
    rows.append(["in all", Number(total, f"{total:,.1f} s")])
    notes = "".join(
        f"<dt>{_text(stage)}</dt>" + "".join(f"<dd>{_text(line)}</dd>" for line in lines)
        for stage, lines in facts.metrics["notes"].items()
        if lines
    )
    return (
        _paragraph("A run that was stopped and resumed counts its last part only.")
        + _table("Times", ["stage", "time"], rows)
        + f"<h3>What the stages said</h3><dl>{notes}</dl>"
    )


def _settings(facts: RunFacts) -> str:
    return (
        _paragraph("All settings, as TOML: saved to a file, they are what --config takes.")
        + '<pre tabindex="0" aria-label="Settings as TOML">'
        + f"{_text(dump_config(facts.config))}</pre>"
    )


def _versions(facts: RunFacts) -> str:
    versions = facts.metrics.get("versions", {})
    rows: list[list[Cell]] = [[name, str(version)] for name, version in versions.items()]
    return _table("Libraries", ["library", "version"], rows) if rows else ""


_SECTIONS: dict[str, Callable[[RunFacts], str]] = {
    "Results": _results,
    "Head, torso and tail": _slices,
    "Recommendations": _examples,
    "Training": _training,
    "Data": _data,
    "Funnel": _funnel,
    "Popularity": _popularity,
    "Index": _index,
    "Time": _times,
    "Settings": _settings,
    "Versions": _versions,
}


def _tiles(facts: RunFacts) -> str:
    models, index = facts.metrics["models"], facts.metrics["index"]
    metric = f"ndcg@{facts.longest}"
    (name, first), *others = models.items()
    measured = {n: m for n, m in others if m[metric]["mean"] is not None}
    tiles: list[tuple[str, Number]] = [(f"{metric} of {name}", _interval(first[metric]))]
    if measured:
        best = max(measured, key=lambda n: measured[n][metric]["mean"])
        tiles.append((f"{metric} of the best other, {best}", _interval(measured[best][metric])))
    recall = f"recall@{facts.longest}"
    tiles.append((f"{recall} of {name}", _interval(first[recall])))
    positives = facts.samples["num_samples"]
    tiles.append(("positives trained on", _whole(positives)))
    tiles.append(("items", _whole(facts.samples["num_candidates"])))
    for key, value in index.items():
        if key.startswith("index_recall@"):
            tiles.append((f"{key}, {index['kind']}", _measured(value, 4)))
    return "".join(
        f"<div><dt>{_text(label)}</dt><dd>{_number(number)}</dd></div>" for label, number in tiles
    )


# Parts of a page


def _text(value: Any) -> str:
    """Makes any text safe in HTML, within an attribute too."""
    return html.escape(str(value))


def _anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def _paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>"


def _figures(figures: Iterable[str]) -> str:
    return (
        '<div class="figures">'
        + "".join(f"<figure>{figure}</figure>" for figure in figures)
        + "</div>"
    )


def _item(id_: Any, titles: Mapping[Any, str]) -> str:
    title = titles.get(id_)
    if not title:
        return _text(id_)
    return f"{_text(title)} <small>{_text(id_)}</small>"


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Writes a table in a box of its own that scrolls; the first cell of a row is its header."""
    is_number = [any(isinstance(row[i], Number) for row in rows) for i in range(len(header))]
    head = "".join(
        f'<th scope="col"{" class=num" if number else ""}>{_text(name)}</th>'
        for name, number in zip(header, is_number, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{_content(first)}</th>'
        + "".join(map(_cell, rest, is_number[1:]))
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}">'
        f"<table><caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(cell: Cell, is_number: bool) -> str:
    """Writes a cell; in a column of numbers words stand to the right as well."""
    return f"<td{' class=num' if is_number else ''}>{_content(cell)}</td>"


def _content(cell: Cell) -> str:
    return _text(cell) if isinstance(cell, str) else _number(cell)


def _number(number: Number) -> str:
    if number.value is None:
        return _text(number.shown)
    shown = f'<data value="{number.value!r}">{_text(number.shown)}</data>'
    if number.is_strong:
        shown = f"<strong>{shown}</strong>"
    if number.note:
        shown += f"<small>{_text(number.note)}</small>"
    if number.share is not None:
        shown += f'<span class="bar" style="width:{number.share * 100:.1f}%"></span>'
    return shown


def _measured(value: float | None, digits: int) -> Number:
    return Number(None, "-") if value is None else Number(value, f"{value:.{digits}f}")


def _interval(interval: Mapping[str, Any], *, is_strong: bool = False) -> Number:
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    if mean is None:
        return Number(None, "-")
    note = "" if low is None else f"{low:.4f} to {high:.4f}"
    return Number(mean, f"{mean:.4f}", note, is_strong)


def _difference(interval: Mapping[str, Any]) -> Number:
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    if mean is None:
        return Number(None, "-")
    if low is None:
        return Number(mean, f"{mean:+.4f}")
    return Number(mean, f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}", low > 0 or high < 0)


def _whole(value: int) -> Number:
    return Number(value, _count(value))


def _count(value: int) -> str:
    return f"{value:,}"


def _plain(value: Any) -> Cell:
    """Shows a value of unknown kind."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    return Number(value, f"{value:,}" if isinstance(value, int) else f"{value:,.6g}")


_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1c2127; --soft: #55606b; --line: #d9dee3; --wash: #f3f5f7;
  --link: #0b5cad; --good: #00693e;
  --series-1: #0072b2; --series-2: #b84a00; --series-3: #00795a; --series-4: #a8487f;
  --series-5: #6b5d00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --ink: #e6eaee; --soft: #a5b0bb; --line: #39424c; --wash: #1d232a;
    --link: #7fb8f5; --good: #5fd39d;
    --series-1: #56b4e9; --series-2: #f0a35e; --series-3: #3ccfa0; --series-4: #e59ac6;
    --series-5: #d9cb55;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; padding-top: .5rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .25rem; }
h4 { font-size: .95rem; margin: .5rem 0 .25rem; }
p { max-width: 46rem; margin: .5rem 0; }
a { color: var(--link); }
small { color: var(--soft); font-size: .8rem; }
.where { color: var(--soft); margin: .25rem 0 1rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1rem 0; padding: 0;
  list-style: none; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem;
  margin: 1rem 0; }
.tiles div { background: var(--wash); border-radius: .5rem; padding: .6rem .8rem; }
.tiles dt { color: var(--soft); font-size: .85rem; line-height: 1.3; }
.tiles dd { margin: .2rem 0 0; font-size: 1.4rem; font-variant-numeric: tabular-nums; }
.tiles small { display: block; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1rem; margin: 1rem 0; align-items: start; }
figure { margin: 0; max-width: 34rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; margin: 1rem 0; }
.scroll:focus-visible, pre:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; font-weight: 600; padding: .2rem 0; white-space: nowrap; }
th, td { padding: .3rem .75rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 400; position: sticky; left: 0; background: var(--paper); }
th.num, td.num { text-align: right; }
td.num { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.num small { display: block; }
td.num:has(.bar) { min-width: 10rem; }
.bar { display: block; height: .35rem; margin-left: auto; background: var(--series-1);
  border-radius: .2rem; min-width: 1px; }
.example { max-width: 60rem; }
.example div { display: inline-block; width: 49%; vertical-align: top; padding-right: 1.5rem; }
@media (max-width: 40rem) { .example div { width: 100%; } }
.example ol { margin: .25rem 0; padding-left: 2rem; }
.hit { color: var(--good); white-space: nowrap; }
dl:not(.tiles) dt { font-weight: 600; margin-top: .6rem; }
dl:not(.tiles) dd { margin: 0 0 0 1rem; }
pre { background: var(--wash); border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto;
  font-size: .85rem; overflow-wrap: normal; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{name}</h1>
<p class="where">A retrieval run, in {folder}</p>
<dl class="tiles">{tiles}</dl>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
</header>
<main>{body}</main>
</body>
</html>
"""
