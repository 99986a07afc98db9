"""The report of a run: reads the run's folder and renders one self-contained HTML page."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ibis
import numpy as np
from markupsafe import Markup

from tfrs_pipeline import drawing
from tfrs_pipeline.config import RunConfig, dump_config
from tfrs_pipeline.data.log import Log, Split
from tfrs_pipeline.data.schema import ASKED, Dropped, Stage
from tfrs_pipeline.data.split import PARTS
from tfrs_pipeline.durable import read_record
from tfrs_pipeline.evaluation.metrics import METRICS, popularity_slices
from tfrs_pipeline.evaluation.results import QUESTIONS
from tfrs_pipeline.messages import counted
from tfrs_pipeline.model.corpus import later_rows
from tfrs_pipeline.model.two_tower import TwoTower
from tfrs_pipeline.negatives.samplers import Negatives, Popularity
from tfrs_pipeline.report import verdict
from tfrs_pipeline.report.advice import advice
from tfrs_pipeline.report.comparison import comparison_page, pages
from tfrs_pipeline.run.folder import COMPARISON_FILE, RunFolder
from tfrs_pipeline.samples.store import positive_probability, read_ids, read_samples

REPORT_FILE = "report.html"
DROPPED = "dropped"


@dataclass(frozen=True)
class PopularityFacts:
    """How often each candidate is a positive or drawn as a negative; arrays are [num_candidates].

    `shares` are those of the positives: as logged and, if they differ, as trained on. `negatives`
    has the distribution of each kind's draws.
    """

    counts: np.ndarray
    shares: Mapping[str, np.ndarray]
    negatives: Mapping[str, np.ndarray]
    num_unreachable: int


@dataclass(frozen=True)
class RunFacts:
    """The facts that the report shows about a run.

    Events are counted by stage, from the funnel's first, and by part of the split or "dropped".
    Samples, masked shares (by reason) and popularity describe the exported model's training data.
    """

    folder: str
    config: RunConfig
    metrics: Mapping[str, Any]
    table_sizes: Mapping[str, int]
    dropped: Sequence[Dropped]
    log_notes: Sequence[str]
    events_by_stage: Mapping[str, Mapping[str, int]]
    items_by_part: Mapping[str, int]
    samples: Mapping[str, Any]
    masked_shares: Mapping[str, float]
    mean_hard_share: float
    popularity: PopularityFacts
    titles: Mapping[Any, str]

    @property
    def trainings(self) -> dict[str, Any]:
        """The trainings in metrics.json by model; a sum has those of its members alone."""
        is_sum = "best_member" in self.metrics["models"]
        trainings = self.metrics["training"].items()
        return {name: x for name, x in trainings if not (is_sum and name == "two_tower")}

    @property
    def funnel(self) -> list[dict[str, Any]]:
        """The stages from the first: how many events ended there, and how many reached them."""
        # A dislike is no stage that the next one could follow.
        stages = [stage for stage in self.events_by_stage if stage != Stage.DISLIKED]
        sizes = [sum(self.events_by_stage[stage].values()) for stage in stages]
        # An event is counted at its last stage, and has passed all before it.
        reached = np.cumsum(sizes[::-1])[::-1].tolist()
        columns = zip(stages, sizes, reached, [*reached[:1], *reached], strict=False)
        return [
            {"stage": stage, "ended": size, "reached": num, "of_before": num / before}
            for stage, size, num, before in columns
        ]

    @property
    def events_by_part(self) -> dict[str, int]:
        """Number of events in each part of the split, merged into others, and dropped."""
        split = self.metrics["split"]
        counts = {part: int(split[part]["num_events"]) for part in PARTS if part in split}
        merged = [x.num_rows for x in self.dropped if x.is_merged]
        return counts | ({"merged": sum(merged)} if merged else {}) | {DROPPED: self.num_dropped}

    @property
    def num_dropped(self) -> int:
        """Number of events dropped at reading and by the split."""
        at_reading = sum(x.num_rows for x in self.dropped if not x.is_merged)
        return at_reading + int(self.metrics["split"]["num_events_dropped"])


def write_report(folder: Path | str, output: Path | str | None = None) -> Path:
    """Writes the report of a finished run or comparison as one HTML page; returns its path.

    `output` is the file, or a folder for report.html; None is the folder of the run.
    """
    folder = Path(folder)
    path = Path(output or folder)
    if path.is_dir():
        path /= REPORT_FILE
    is_run = not (folder / COMPARISON_FILE).exists()
    page = report_page(gather_facts(folder)) if is_run else comparison_page(folder)
    path.write_text(page, encoding="utf-8")
    return path


def report_page(facts: RunFacts) -> str:
    """Renders the page as an HTML document; the same facts give the same text."""
    # The metric that has chosen the epoch and decides the export decides the verdict too.
    metric, cutoffs = facts.config.training.monitor, facts.config.evaluation.cutoffs
    recall, ndcg = f"recall@{max(cutoffs)}", f"ndcg@{max(cutoffs)}"
    shown = metric, ndcg, recall, f"even_{recall}", f"coverage@{min(cutoffs)}"
    main = tuple(dict.fromkeys(shown))
    template = pages().get_template("template.html")
    return template.render(
        facts=facts,
        ndcg=ndcg,
        recall=recall,
        slices=popularity_slices(facts.popularity.counts),
        figures=_figures(facts, metric, recall),
        counted=counted,
        better=verdict.compared_with_baselines(facts.metrics, metric),
        otherwise=verdict.other_question(facts.metrics, metric),
        advice=list(advice(facts.metrics, metric, facts.config)),
        for_whom=verdict.by_popularity(facts.metrics, recall),
        exported=verdict.exported(facts.metrics),
        metrics_by_name=METRICS,
        asked=ASKED,
        questions=QUESTIONS,
        main_metrics=main,
        index=verdict.found_by_index(facts.metrics["index"], facts.samples["num_candidates"]),
        metric_names=[f"{name}@{k}" for name in METRICS for k in cutoffs],
        parts=[x for x in (*PARTS, DROPPED) if any(x in y for y in facts.events_by_stage.values())],
        settings=dump_config(facts.config),
    )


def _figures(facts: RunFacts, metric: str, recall: str) -> dict[str, list[Markup]]:
    """Draws the figures of each section."""
    models = facts.metrics["models"]
    slices = {
        part: {name: model["slices"][part][recall] for name, model in models.items()}
        for part in next(iter(models.values()))["slices"]
    }
    overall = {metric: {name: model[metric] for name, model in models.items()}}
    # In the first panel means, in the second what decides: differences query by query.
    results = [drawing.plot_intervals(overall, metric)]
    pairs = verdict.compared(facts.metrics, metric)
    gains = {name: x.gain.as_dict() for name, x in pairs.items()}
    if gains:
        panel = {f"{metric}: {next(iter(models))} minus": gains}
        results.append(drawing.plot_intervals(panel, metric, are_differences=True))
    drawings = {
        "results": results,
        "slices": [drawing.plot_intervals(slices, recall)],
        "race": _race_figures(facts),
        "training": _training_figures(facts),
        "popularity": _popularity_figures(facts.popularity),
    }
    return {section: [Markup(x.svg) for x in figures] for section, figures in drawings.items()}


def _training_figures(facts: RunFacts) -> list[drawing.Drawing]:
    """Draws the logs of each epoch: the loss and the monitored metric first."""
    training = facts.trainings
    histories = {name: result["history"] for name, result in training.items()}
    chosen = {name: result["best_epoch"] for name, result in training.items()}
    monitor = f"val_{facts.config.training.monitor}"
    # A dict keeps the order: what decides comes first, and the others are folded away.
    logged = dict.fromkeys(["loss", monitor, *(name for h in histories.values() for name in h)])
    curves = {
        name: {
            model: history[name]
            for model, history in histories.items()
            # Validation may have no positive in a part of the items: nothing was measured there.
            if any(value is not None for value in history.get(name, []))
        }
        for name in logged
    }
    return [
        drawing.plot_curves(lines, chosen, name.replace("val_", "validation "))
        for name, lines in curves.items()
        if lines
    ]


def _race_figures(facts: RunFacts) -> list[drawing.Drawing]:
    """Draws the curves of a race by CPU time; none if the run did not race."""
    if (race := facts.metrics.get("race")) is None:
        return []
    values = {name: curve["values"] for name, curve in race["recipes"].items() if curve["values"]}
    seconds = {name: race["recipes"][name]["seconds"] for name in values}
    chosen = {name: curve.index(max(curve)) + 1 for name, curve in values.items()}
    what = f"validation {race['metric']} of the recipes"
    return [drawing.plot_curves(values, chosen, what, seconds=seconds)]


def _popularity_figures(popularity: PopularityFacts) -> list[drawing.Drawing]:
    ranks = {
        "training positives": {"training positives": popularity.counts},
        "share of the positives": popularity.shares if len(popularity.shares) > 1 else {},
        "probability of a draw": popularity.negatives,
    }
    return [
        drawing.plot_popularity(lines, popularity.counts, what)
        for what, lines in ranks.items()
        if lines
    ]


def gather_facts(folder: Path) -> RunFacts:
    """Reads all that the report needs from a run's folder."""
    metrics, config = RunFolder(folder).results(), RunFolder(folder).settings()
    log = Log.read(folder / "data")
    split = Split.read(log, folder / "data" / "split.parquet")
    # If there was no second training, only the first has samples.
    trained_on, samples_folder = split.before_test, folder / "samples" / "final"
    if not samples_folder.is_dir():
        trained_on, samples_folder = split.train, folder / "samples" / "selection"
    is_later = later_rows(trained_on, read_ids(samples_folder)[0])
    samples = dataclasses.replace(read_samples(samples_folder), is_later=is_later)
    model = TwoTower(**dict(config.model), training=config.training, seed=config.seed)
    # Batches know what is drawn and masked. They are described here, and none is trained on.
    batches, by_part = model.batches(samples), split.events.group_by("part")
    frame = batches.frame
    expected = {_label(kind): kind.expected_count(frame) for kind in batches.negatives}
    logged, trained = positive_probability(frame.counts)[1:], batches.positive_share[1:]
    shares = {"positives, as logged": logged}
    if not np.allclose(logged, trained, rtol=1e-6, atol=0):  # Resampling is what makes them differ.
        shares["positives, as trained on"] = trained
    counts = by_part.agg(num=split.events["item_id"].nunique()).to_pyarrow().to_pylist()
    num_items = {row["part"]: row["num"] for row in counts}
    return RunFacts(
        folder=str(folder),
        config=config,
        metrics=metrics,
        table_sizes=log.counts(),
        dropped=log.dropped,
        log_notes=log.notes,
        events_by_stage=_events_by_stage(log.events, split.events),
        items_by_part={part: num_items[part] for part in PARTS if part in num_items},
        samples=read_record(samples_folder / "report.json"),
        masked_shares=batches.masked_shares(),
        mean_hard_share=batches.mean_hard_share,
        popularity=PopularityFacts(
            counts=frame.counts[1:],
            shares=shares,
            negatives={name: count[1:] / count.sum() for name, count in expected.items()},
            num_unreachable=batches.num_unreachable,
        ),
        titles=_titles(log, metrics),
    )


def _events_by_stage(events: ibis.Table, split: ibis.Table) -> dict[str, dict[str, int]]:
    in_all = events.group_by("stage").agg(num=events.count()).to_pyarrow().to_pylist()
    in_parts = split.group_by(["stage", "part"]).agg(num=split.count()).to_pyarrow().to_pylist()
    totals = {row["stage"]: row["num"] for row in in_all}
    counts: dict[str, dict[str, int]] = {s.value: {} for s in Stage if s.value in totals}
    for row in in_parts:
        counts[row["stage"]][row["part"]] = row["num"]
    for stage, num_by_part in counts.items():
        # What is in no part was left out by the split.
        if num_dropped := totals[stage] - sum(num_by_part.values()):
            num_by_part[DROPPED] = num_dropped
    return counts


def _label(kind: Negatives) -> str:
    if isinstance(kind, Popularity):
        return f"clicks^{kind.alpha:g}"
    return str(getattr(kind, "kind", type(kind).__name__)).replace("_", "-")


def _titles(log: Log, metrics: dict[str, Any]) -> dict[Any, str]:
    shown: Iterable[Any] = {
        id_
        for example in metrics.get("examples", [])
        for id_ in (*example["history"], *example["recommended"])
    }
    if "title" not in log.items.columns or not shown:
        return {}
    items = log.items.filter(log.items["item_id"].isin(list(shown)))
    rows = items.select("item_id", "title").to_pyarrow().to_pylist()
    return {row["item_id"]: row["title"] for row in rows if row["title"]}
