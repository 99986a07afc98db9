"""Compares sampling plans on the user's own data, as a table, in words and as a figure."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic_core import to_jsonable_python

from tfrs_pipeline.cluster import this_worker
from tfrs_pipeline.config import RunConfig, with_settings
from tfrs_pipeline.drawing import GRID, MARKERS, SERIES, SOFT, finish, new_figure
from tfrs_pipeline.evaluation.bootstrap import Interval, Outcome
from tfrs_pipeline.evaluation.results import (
    Evaluation,
    explained,
    format_table,
    other_prefix,
    with_other,
)
from tfrs_pipeline.messages import SILENT, Progress, counted
from tfrs_pipeline.model.fit import TrainingResult
from tfrs_pipeline.model.fitted import FittedTwoTower
from tfrs_pipeline.negatives.kinds import FunnelLosers, InBatch, Popularity, Uniform
from tfrs_pipeline.run.data import RunData, data_steps
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.measure import evaluate_all
from tfrs_pipeline.run.steps import Runner, Step
from tfrs_pipeline.run.training import check_trainable, training_step
from tfrs_pipeline.settings import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Plan: TypeAlias = Mapping[str, Any]
"""A way of choosing negatives: the settings that it changes in the config, by dotted name."""

# Hard negatives that a row draws, in plans of one stage and of several.
NUM_HARD = 8


@dataclass(frozen=True)
class PlanComparison:
    """The measured plans of a comparison, the reference first.

    The folder holds comparison.json, comparison.md, comparison.svg and a folder for each plan.
    """

    folder: Path
    evaluation: Evaluation
    trainings: Mapping[str, TrainingResult]
    notes: Sequence[str]

    def table(self, *, markdown: bool = False, width: int | None = None) -> str:
        """Formats the plans as Markdown or text, with as many columns as fit in a width."""
        summary, cutoffs = self.evaluation.summary(), self.evaluation.cutoffs
        shortest, longest = cutoffs[0], cutoffs[-1]
        ndcg, *others = compared = [f"{x}@{longest}" for x in ("ndcg", "recall", "even_recall")]
        columns = [ndcg, f"{other_prefix(summary)}/{ndcg}", *others, f"tail/recall@{longest}"]
        columns += [f"coverage@{shortest}", f"average_popularity@{shortest}", "epochs", "seconds"]
        plans = {
            name: {**x, "epochs": training.best_epoch, "seconds": round(training.seconds)}
            for (name, x), training in zip(
                with_other(summary).items(), self.trainings.values(), strict=True
            )
        }
        differences = {
            name: {metric: of_plan[metric] for metric in compared if metric in of_plan}
            for name, of_plan in summary["differences"].items()
        }
        return format_table(plans, columns, differences, markdown=markdown, width=width)


def compare(
    config: RunConfig, folder: Path, *, progress: Progress = SILENT, begun: Runner | None = None
) -> PlanComparison:
    """Trains and measures every sampling plan of a config, in `folder`, which is made if missing.

    A stopped comparison of the same config in the folder is resumed: trained plans are measured
    again, and the unfinished one continues. `begun`, a runner that has made the first steps,
    replaces `progress`. Raises a `ConfigError` if `warm_start` is set, and a `ValueError` if the
    folder holds something else or the data is refused.
    """
    if config.warm_start is not None:
        message = "the plans of a comparison all start from random weights; leave it out"
        raise ConfigError([("warm_start", f"got {str(config.warm_start)!r}: {message}")])
    if this_worker().count > 1:
        raise ValueError("A comparison trains in one process. Unset TF_CONFIG, or use run.")
    place = RunFolder(folder)
    with place.claim(config, is_run=False):
        runner = begun or Runner(progress)
        plans, notes = runner.run(runner.remaining(plan_steps(config, place)))

        def measure(runner: Runner, data: RunData, model: FittedTwoTower) -> Any:
            named = {model.network.name: model}
            return evaluate_all(config, named, data, runner.progress.task), model.result

        data: RunData = runner.artifacts["samples"]
        measured: dict[str, tuple[Evaluation, TrainingResult]] = {}
        for name, plan in plans.items():
            planned = _planned(config, plan, data)
            training = training_step(name, planned, place, f"plans/{name}/checkpoints")
            measuring = Step(f"measure {name}", ("samples", name), "measured", measure)
            measured[name] = runner.run([training, measuring])
            del runner.artifacts[name]  # One network at a time.
        most, done = _max_epochs(config, data), {x.num_epochs for _, x in measured.values()}
        if done == {most} and most < config.training.max_epochs:
            ended = f"compare.max_steps ended every plan after {counted(most, 'epoch')}"
            notes.append(f"{ended}: each might still have gained")
        return _write(config, measured, notes, plans, folder)


def plan_steps(config: RunConfig, folder: RunFolder) -> list[Step]:
    """Returns the steps that make the data and the plans of a comparison; they train nothing."""
    return [
        *data_steps(config, folder, every_loser(config)),
        Step("plans", ("samples",), "plans", functools.partial(_make_plans, config)),
    ]


def _make_plans(
    config: RunConfig, runner: Runner, data: RunData
) -> tuple[dict[str, Plan], list[str]]:
    """Makes the plans, with notes, and refuses those that cannot be trained before any training."""
    pools = data.final.samples.hard_pools
    logged = [name for name, pool in pools.items() if len(pool.values)]
    plans, notes = sampling_plans(config, logged)
    for plan in plans.values():
        check_trainable(data.parts, _planned(config, plan, data))
    runner.note(f"{counted(len(plans), 'plan')}: {', '.join(plans)}", *notes)
    return plans, notes


def _planned(config: RunConfig, plan: Plan, data: RunData) -> RunConfig:
    return with_settings(config, {**plan, "training.max_epochs": _max_epochs(config, data)})


def _joined(of_plans: Mapping[str, Evaluation]) -> Evaluation:
    """Joins the evaluations of the plans, whose queries are the same."""
    first = next(iter(of_plans.values()))
    results = {name: x.first for name, x in of_plans.items()}
    asked = {name: x.other for name, x in of_plans.items() if isinstance(x.other, Evaluation)}
    return dataclasses.replace(
        first, results=results, other=_joined(asked) if asked else first.other
    )


def _max_epochs(config: RunConfig, data: RunData) -> int:
    if config.compare.max_steps is None:
        return config.training.max_epochs
    num = len(data.selection.samples)
    steps_per_epoch = max(1, round(num / config.training.fitting(num).batch_size))
    return math.ceil(config.compare.max_steps / steps_per_epoch)


def _write(
    config: RunConfig,
    measured: Mapping[str, tuple[Evaluation, TrainingResult]],
    notes: Sequence[str],
    plans: Mapping[str, Plan],
    folder: Path,
) -> PlanComparison:
    reference = config.compare.reference
    measured = {reference: measured[reference], **measured}
    evaluation = _joined({name: evaluation for name, (evaluation, _) in measured.items()})
    trainings = {name: training for name, (_, training) in measured.items()}
    comparison = PlanComparison(folder, evaluation, trainings, notes)
    content = {
        "reference": reference,
        "exclude": config.evaluation.exclude,
        "seed": config.seed,
        "notes": list(notes),
        **evaluation.summary(),
        "plans": {
            name: {
                "settings": to_jsonable_python(plans[name]),
                "epochs": training.best_epoch,
                "seconds": training.seconds,
            }
            for name, training in trainings.items()
        },
    }
    (folder / "comparison.json").write_text(json.dumps(content, indent=2))
    table = comparison.table(markdown=True)
    lines = [
        f"Differences are from {reference}, query by query, with 95% bootstrap intervals.",
        "",
        *(f"- {line}" for line in (*explained(table, evaluation.summary()), *notes)),
    ]
    (folder / "comparison.md").write_text("\n".join([table, "", *lines, ""]))
    label = f"What each plan gains over {reference}, and what it finds by popularity"
    (folder / "comparison.svg").write_text(finish(comparison_figure(evaluation), label).card())
    return comparison


def every_loser(config: RunConfig) -> FunnelLosers:
    """Returns losers of every stage that any plan may need; each plan draws from its own."""
    losers = config.model.hard or FunnelLosers()
    stages = losers.stages
    if "exposed" in config.compare.plans and "exposed" not in stages:
        stages = (*stages, "exposed")
    return dataclasses.replace(losers, stages=stages, allow_exposed="exposed" in stages)


def sampling_plans(config: RunConfig, logged: Sequence[str]) -> tuple[dict[str, Plan], list[str]]:
    """Turns the plans of a config into settings by name, with notes on those that are missing.

    `logged` are the stages whose losers the samples hold.
    """
    common: dict[str, Any] = {
        "model.correction": "mixture",
        "model.hard": None,
        "model.resampling_exponent": 0.0,
    }
    notes: list[str] = []
    if config.training.examples != "single":
        # The same for every plan, because in-batch negatives need single examples.
        common["training.examples"] = "single"
        notes.append("every plan is trained with training.examples 'single'")
    plans: dict[str, Plan] = {}
    for kind in config.compare.plans:
        found, note = _plans_of_kind(kind, config, logged)
        plans |= {name: {**common, **plan} for name, plan in found.items()}
        notes += [note] if note else []
    return plans, notes


def _plans_of_kind(
    kind: str, config: RunConfig, logged: Sequence[str]
) -> tuple[dict[str, Plan], str]:
    """Returns the plans of a kind, one for each of its values, and a note if it is missing."""
    # Every plan but in-batch has as many shared columns as the config's mixture.
    num = sum(
        config.training.batch_size - 1 if isinstance(shared, InBatch) else shared.num
        for shared in config.model.negatives
    )
    in_batch = {"model.negatives": (InBatch(),)}
    simple: dict[str, Plan] = {
        "in_batch_uncorrected": {**in_batch, "model.correction": "none"},
        "in_batch": in_batch,
        "uniform": {"model.negatives": (Uniform(num),)},
        "popularity": {"model.negatives": (Popularity(num),)},
        "mixed": {},
    }
    if kind in simple:
        return {kind: simple[kind]}, ""
    if kind == "resampled":
        return {
            f"resampled_{exponent:g}": {"model.resampling_exponent": exponent}
            for exponent in config.compare.resampling_exponents
        }, ""
    hard, name = config.model.hard, "hybrid"
    if kind == "exposed":
        hard, name = FunnelLosers(stages=("exposed",), allow_exposed=True, num=NUM_HARD), kind
    losers = hard or FunnelLosers()
    if not (stages := tuple(stage for stage in losers.stages if stage in logged)):
        asked = " or ".join(losers.stages)
        return {}, f"plan {kind} is missing: no positive has an item of {asked} in its request"
    losers = losers.of_stages(stages)
    if hard is None:
        losers = dataclasses.replace(losers, num=NUM_HARD // len(stages))
    shares = (0.5,) if kind == "hybrid_50_50" else config.compare.hard_shares
    return {
        f"{name}_50_50" if share == 0.5 else f"{name}_{share:g}": {
            "model.hard": dataclasses.replace(losers, share=share)
        }
        for share in shares
    }, ""


def compared_in_words(evaluation: Evaluation, metric: str) -> str:
    """Says which plans are better than the first, tie with it or are worse, by the intervals."""
    results = evaluation.results
    reference = next(iter(results))
    names: dict[Outcome, list[str]] = {outcome: [] for outcome in Outcome}
    for name, differences in evaluation.differences.items():
        names[differences[metric].outcome].append(name)
    best = max(results, key=lambda name: results[name].overall.intervals[metric].mean)
    verbs = {
        Outcome.BETTER: ("beats", "beat"),
        Outcome.LEVEL: ("ties with", "tie with"),
        Outcome.WORSE: ("is worse than", "are worse than"),
    }
    parts = [
        f"{', '.join(found)} {verbs[outcome][len(found) > 1]} {reference}"
        for outcome, found in names.items()
        if found
    ]
    if best == reference:
        parts.insert(0, f"{reference} is highest")
    elif best in names[Outcome.LEVEL]:
        parts.append(f"{best} is highest, by no more than chance")
    else:
        parts[0] += f", {best} the most" if len(names[Outcome.BETTER]) > 1 else ""
    return f"in {metric} {'; '.join(parts)}"


def comparison_figure(evaluation: Evaluation) -> "Figure":
    """Draws two panels with a row for each plan: gains over the first, recall by popularity."""
    names, longest = list(evaluation.results), evaluation.cutoffs[-1]
    figure, (gains, slices) = new_figure(9, 1.6 + 0.36 * len(names), 2, sharey=True)
    metric, first = f"ndcg@{longest}", evaluation.first
    above = [Interval(0.0, 0.0, 0.0), *(x[metric] for x in evaluation.differences.values())]
    for place, gain in enumerate(above):
        colour = SOFT if gain.outcome is Outcome.LEVEL else SERIES[0]
        gains.plot([gain.low, gain.high], [place, place], color=colour, linewidth=2)
        gains.plot(gain.mean, place, "o", color=colour)
    gains.axvline(0, color=SOFT, linewidth=1, zorder=0)
    gains.locator_params(axis="x", nbins=6)  # More labels would overlap.
    base = first.overall.intervals[metric].mean
    gains.set_xlabel(f"{metric} above that of {names[0]} ({base:.4f}), 95% interval")
    for colour, marker, part in zip(SERIES, MARKERS, first.slices, strict=False):
        of_part = [x.slices[part].intervals for x in evaluation.results.values()]
        recalls = [intervals[f"recall@{longest}"].mean for intervals in of_part]
        slices.plot(recalls, range(len(names)), marker, color=colour, label=part)
    slices.legend(  # Above: crossing lines leave no room at the side.
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(first.slices),
        frameon=False,
        labelcolor="linecolor",
        handletextpad=0.2,
        columnspacing=1.2,
    )
    slices.set_xlabel(f"recall@{longest} by popularity of the item")
    for axes in (gains, slices):
        axes.grid(axis="y", color=GRID)
    gains.set_yticks(range(len(names)), names)
    gains.set_ylim(len(names) - 0.5, -0.5)
    return figure
