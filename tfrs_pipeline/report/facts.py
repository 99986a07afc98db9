"""The report of a run: reads the run's folder and renders one self-contained HTML page."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from tfrs_pipeline import drawing
from tfrs_pipeline.config import RunConfig, dump_config
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import ASKED, Dropped, Stage
from tfrs_pipeline.data.split import PARTS
from tfrs_pipeline.durable import read_record
from tfrs_pipeline.evaluation.metrics import METRICS
from tfrs_pipeline.evaluation.results import QUESTIONS
from tfrs_pipeline.messages import counted, printable
from tfrs_pipeline.report import verdict
from tfrs_pipeline.report.advice import advice
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.samples.store import read_samples

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class RunFacts:
    """The facts that the report shows about a run.

    Events are counted by stage, from the funnel's first. Samples and counts, [num_candidates]
    positives of each candidate, describe the exported model's training data.
    """

    folder: str
    config: RunConfig
    metrics: Mapping[str, Any]
    table_sizes: Mapping[str, int]
    dropped: Sequence[Dropped]
    log_notes: Sequence[str]
    events_by_stage: Mapping[str, int]
    samples: Mapping[str, Any]
    counts: np.ndarray
    titles: Mapping[Any, str]

    @property
    def trainings(self) -> dict[str, Any]:
        """The trainings in metrics.json by model; a sum has those of its members alone."""
        is_sum = "best_member" in self.metrics["models"]
        # A sum has no epochs of its own: its model is made of those of its members.
        trainings = self.metrics["training"].items()
        return {name: x for name, x in trainings if not (is_sum and name == "two_tower")}

    @property
    def funnel(self) -> list[dict[str, Any]]:
        """The stages from the first: how many events ended there, and how many reached them."""
        # A dislike is not a stage of the funnel: none comes before or after it.
        stages = [stage for stage in self.events_by_stage if stage != Stage.DISLIKED]
        sizes = [self.events_by_stage[stage] for stage in stages]
        # An event is counted at its last stage, and has passed all before it.
        reached = np.cumsum(sizes[::-1])[::-1].tolist()
        columns = zip(stages, sizes, reached, [*reached[:1], *reached], strict=False)
        return [
            {"stage": stage, "ended": size, "reached": num, "of_before": num / before}
            for stage, size, num, before in columns
        ]

    @property
    def parts(self) -> list[str]:
        """The parts of the split that have events, in their order."""
        return [part for part in PARTS if part in self.metrics["split"]]

    @property
    def num_dropped(self) -> int:
        """Number of events dropped at reading and by the split."""
        at_reading = sum(x.num_rows for x in self.dropped if not x.is_merged)
        return at_reading + int(self.metrics["split"]["num_events_dropped"])


def write_report(folder: Path | str) -> Path:
    """Writes the report of a finished run, report.html in its folder; returns its path."""
    path = Path(folder) / REPORT_FILE
    path.write_text(report_page(gather_facts(path.parent)), encoding="utf-8")
    return path


def report_page(facts: RunFacts) -> str:
    """Renders the page as an HTML document; the same facts give the same text."""
    # The metric that has chosen the epoch and decides the export decides the verdict too.
    metric, cutoffs = facts.config.training.monitor, facts.config.evaluation.cutoffs
    recall, ndcg = f"recall@{max(cutoffs)}", f"ndcg@{max(cutoffs)}"
    shown = metric, ndcg, recall, f"even_{recall}", f"coverage@{min(cutoffs)}"
    main = tuple(dict.fromkeys(shown))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tfrs_pipeline", "report"),
        autoescape=True,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Unlike Jinja's own, it leaves the other letters as they are.
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    template = environment.get_template("template.html")
    return template.render(
        facts=facts,
        ndcg=ndcg,
        recall=recall,
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
        settings=dump_config(facts.config),
    )


def _visible(value: Any) -> Any:
    """Escapes the control characters of a text, such as an id's, except for line ends and tabs."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join(x if x.isprintable() or x in "\n\t" else printable(x) for x in value)


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
        "popularity": [drawing.plot_popularity({"training positives": facts.counts}, facts.counts)],
    }
    return {section: [Markup(x.svg) for x in figures] for section, figures in drawings.items()}


def _training_figures(facts: RunFacts) -> list[drawing.Drawing]:
    """Draws the loss by epoch, and the validation metric that chooses the epoch."""
    trainings, monitor = facts.trainings.items(), f"val_{facts.config.training.monitor}"
    chosen = {name: result["best_epoch"] for name, result in trainings}
    return [
        drawing.plot_curves(
            {model: result["history"].get(name, []) for model, result in trainings},
            chosen,
            name.replace("val_", "validation "),
        )
        for name in ("loss", monitor)
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


def gather_facts(folder: Path) -> RunFacts:
    """Reads all that the report needs from a run's folder."""
    metrics, config = RunFolder(folder).results(), RunFolder(folder).settings()
    log = Log.read(folder / "data")
    # If there was no second training, only the first has samples.
    samples = folder / "samples" / "final"
    if not samples.is_dir():
        samples = folder / "samples" / "selection"
    by_stage = log.events.group_by("stage").agg(num=log.events.count()).to_pyarrow().to_pylist()
    events = {row["stage"]: row["num"] for row in by_stage}
    return RunFacts(
        folder=str(folder),
        config=config,
        metrics=metrics,
        table_sizes=log.counts(),
        dropped=log.dropped,
        log_notes=log.notes,
        events_by_stage={stage.value: events[stage] for stage in Stage if stage in events},
        samples=read_record(samples / "report.json"),
        counts=read_samples(samples).counts[1:],
        titles=_titles(log, metrics),
    )


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
