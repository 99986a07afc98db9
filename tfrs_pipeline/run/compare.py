"""Sampling plans side by side on the user's own data: which negatives suit it.

Every plan trains the same towers from the same initial weights, on the same positives, within the
same budget; only what a positive is compared with differs, and how it is weighed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from pydantic_core import to_jsonable_python

from tfrs_pipeline.cluster import this_worker
from tfrs_pipeline.config import RunConfig, with_settings
from tfrs_pipeline.data.holdout import Holdout
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.outcomes import items_by_stage, items_met
from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.drawing import finish
from tfrs_pipeline.evaluation.auc import auc_per_query, draw_corpus_rows
from tfrs_pipeline.evaluation.bootstrap import bootstrap_intervals
from tfrs_pipeline.evaluation.comparison import PlanRow, comparison_figure, comparison_table
from tfrs_pipeline.evaluation.results import EvaluationResult
from tfrs_pipeline.messages import counted
from tfrs_pipeline.model.fit import TrainingResult
from tfrs_pipeline.model.notes import OnProgress
from tfrs_pipeline.negatives.funnel import FunnelLosers
from tfrs_pipeline.negatives.in_batch import InBatch
from tfrs_pipeline.negatives.mined import Mined
from tfrs_pipeline.negatives.popularity import Popularity
from tfrs_pipeline.negatives.uniform import Uniform
from tfrs_pipeline.run.data import OnStep, RunData, Steps, prepare
from tfrs_pipeline.run.folder import claim_folder
from tfrs_pipeline.run.pipeline import evaluate_all
from tfrs_pipeline.run.training import check_trainable, train_and_refit
from tfrs_pipeline.settings import ConfigError

# Columns that a row draws from its hard negatives, in plans of one stage and of several.
NUM_HARD = 8
# Of the corpus, drawn uniformly, that positives are compared with in the AUC.
NUM_CORPUS_ITEMS = 1000
# Column -> stage of the items that positives are compared with: of those that the user met in the
# test part alone. "auc_corpus" compares them with items of which the user has no event at all.
AUC_STAGES: dict[str, Stage] = {
    "auc_pre_rank_losers": Stage.RETRIEVED,
    "auc_rank_losers": Stage.PRE_RANKED,
    "auc_exposed": Stage.EXPOSED,
}
# A way of choosing negatives: what it changes in the config, by dotted name.
Plan: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class _Measured:
    summary: dict[str, Any]
    per_query: dict[str, np.ndarray]
    training: TrainingResult


@dataclass(frozen=True)
class PlanComparison:
    """What a comparison left behind: a row a plan, the table of them, and notes.

    The folder holds comparison.json, comparison.md, comparison.svg and a folder a plan.
    """

    folder: Path
    rows: Sequence[PlanRow]
    table: str
    notes: Sequence[str]


def compare(
    config: RunConfig,
    folder: Path,
    *,
    on_step: OnStep = lambda report: None,
    on_progress: OnProgress = lambda *task: None,
) -> PlanComparison:
    """Trains and measures every sampling plan of a config, in `folder`, which is made if missing.

    A folder that holds a stopped comparison of the same config is resumed: trained plans are
    measured again from their checkpoints, the one at hand goes on from its last epoch. `on_step` is
    called as each plan ends, `on_progress` within it, as by `run`.

    A `ConfigError` if there is a run to start from, a `ValueError` if the folder holds something
    else, or the data is refused (`DataError`).
    """
    if config.warm_start is not None:
        message = "the plans of a comparison all start from nothing; leave it out"
        raise ConfigError([("warm_start", f"got {str(config.warm_start)!r}: {message}")])
    if this_worker().count > 1:
        raise ValueError("A comparison trains in one process. Unset TF_CONFIG, or use run.")
    with claim_folder(config, folder, is_run=False):
        return _compare(config, folder, Steps(on_step, on_progress))


def prepare_plans(
    config: RunConfig, folder: Path, step: Steps
) -> tuple[RunData, dict[str, Plan], list[str]]:
    """Makes the data of a comparison and its plans, as `compare` does; trains nothing.

    Returns the data, the plans by name, and notes: on plans that are missing and on what the
    comparison cannot show. Raises what `prepare`, `sampling_plans` and, of a plan,
    `check_trainable` raise.
    """
    data = prepare(config, folder, step, hard=_every_loser(config))
    with step("plans") as report:
        pools = data.final.samples.hard_pools
        logged = [name for name, pool in pools.items() if len(pool.values)]
        num_candidates = len(data.final.corpus.candidate_ids)
        max_epochs = _max_epochs(config, len(data.selection.samples))
        plans, notes = sampling_plans(config, logged, num_candidates, max_epochs)
        for plan in plans.values():  # Refused before the first one is trained.
            planned = with_settings(config, {**plan, "training.max_epochs": max_epochs})
            check_trainable(data, planned.model, planned.training)
        notes += _about_exposed(config, data.test, plans.values())
        report.notes = [f"{counted(len(plans), 'plan')}: {', '.join(plans)}", *notes]
    return data, plans, notes


def _compare(config: RunConfig, folder: Path, step: Steps) -> PlanComparison:
    data, plans, notes = prepare_plans(config, folder, step)
    positives, others = _auc_rows(config, data)
    max_epochs = _max_epochs(config, len(data.selection.samples))
    measured: dict[str, _Measured] = {}
    for name, plan in plans.items():
        with step(name) as report:
            model = train_and_refit(
                with_settings(config, plan),
                data,
                max_epochs=max_epochs,
                folder=folder / "plans" / name / "checkpoints",
                name=name,
                on_progress=step.on_progress,
            )
            result = evaluate_all(config, {name: model}, data.test, step.on_progress).first
            queries = model.query_embeddings(data.test.as_queries())
            candidates = model.network.embed_corpus()
            per_query = _per_query(result, data.test, max(config.evaluation.cutoffs))
            per_query |= {
                column: auc_per_query(queries, candidates, positives, rows)
                for column, rows in others.items()
            }
            measured[name] = _Measured(result.summary(), per_query, model.result)
            report.notes = model.notes
            without_hard = [x for x in model.notes if x.startswith("no hard negatives")]
            notes += [f"{name}: {x}" for x in without_hard]
    return _write(_rows(measured, config), config, notes, plans, folder)


def _every_loser(config: RunConfig) -> FunnelLosers:
    """Asks for the pools of every stage that a plan may want; a plan draws from its own."""
    losers = _losers_of(config)
    stages = losers.stages
    if "exposed" in config.compare.plans and "exposed" not in stages:
        stages = (*stages, "exposed")
    return dataclasses.replace(losers, stages=stages, allow_exposed="exposed" in stages)


def _losers_of(config: RunConfig) -> FunnelLosers:
    hard = config.model.hard
    return hard if isinstance(hard, FunnelLosers) else FunnelLosers()


def sampling_plans(
    config: RunConfig, logged: Sequence[str], num_candidates: int, max_epochs: int | None = None
) -> tuple[dict[str, Plan], list[str]]:
    """Turns the plans of a config into settings, by name; says what is missing.

    Plans of one kind of negative draw as many shared columns as the config's mixture has, so that
    all of them but in-batch alone see the same number. `logged` are the stages whose losers the
    samples hold, `max_epochs` is a plan's budget, None that of the training. A `ValueError` if the
    reference is missing, or a plan does not go with the other settings.
    """
    common: dict[str, Any] = {
        "model.correction": "mixture",
        "model.hard": None,
        "model.resampling_exponent": 0.0,
    }
    notes: list[str] = []
    if config.training.examples != "single":
        # For every plan alike: in-batch negatives are positives of single examples.
        common["training.examples"] = "single"
        notes.append("every plan is trained with training.examples 'single'")
    plans: dict[str, Plan] = {}
    for kind in config.compare.plans:
        found, note = _plans_of_kind(
            kind, config, logged, num_candidates, max_epochs or config.training.max_epochs
        )
        plans |= {name: {**common, **plan} for name, plan in found.items()}
        notes += [note] if note else []
    if config.compare.reference not in plans:
        raise ValueError(
            f"compare.reference is {config.compare.reference!r}, a plan that is missing here "
            f"({'; '.join(notes)}). Choose another reference."
        )
    for plan in plans.values():  # Refused before the first one is trained.
        with_settings(config, plan)
    return plans, notes


def _plans_of_kind(
    kind: str, config: RunConfig, logged: Sequence[str], num_candidates: int, max_epochs: int
) -> tuple[dict[str, Plan], str]:
    """Turns a kind of plan into settings, several for those with a list of values; with a note."""
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
    hard, note = _hard_kind(kind, config, logged, num_candidates, max_epochs)
    if hard is None:
        return {}, f"plan {kind} is missing: {note}"
    name = "mined" if isinstance(hard, Mined) else "exposed" if kind == "exposed" else "hybrid"
    shares = (0.5,) if kind == "hybrid_50_50" else config.compare.hard_shares
    return {
        f"{name}_50_50" if share == 0.5 else f"{name}_{share:g}": {
            "model.hard": dataclasses.replace(hard, share=share)
        }
        for share in shares
    }, note


def _hard_kind(
    kind: str, config: RunConfig, logged: Sequence[str], num_candidates: int, max_epochs: int
) -> tuple[FunnelLosers | Mined | None, str]:
    """Chooses the hard negatives of a kind of plan, None if there are none, and says why."""
    losers = _losers_of(config)
    stages = tuple(stage for stage in losers.stages if stage in logged)
    if kind == "exposed":
        hard = FunnelLosers(stages=("exposed",), num=NUM_HARD, allow_exposed=True)
        return (hard, "") if "exposed" in logged else (None, "the log holds no exposed items")
    if kind != "mined" and stages:
        if not isinstance(config.model.hard, FunnelLosers):
            losers = dataclasses.replace(losers, num=NUM_HARD // len(stages))
        return losers.of_stages(stages), ""
    mined = config.model.hard if isinstance(config.model.hard, Mined) else Mined(num=NUM_HARD)
    if mined.every >= max_epochs:
        return None, (
            f"it is mined for every {mined.every} epochs (model.hard.every), and a plan has "
            f"{max_epochs} (training.max_epochs, compare.max_steps)"
        )
    if num_candidates <= mined.min_rank:
        rank = mined.min_rank
        return None, f"{num_candidates:,} items have no rank {rank} (model.hard.min_rank)"
    if kind == "mined":
        return mined, ""
    of_stages = " or ".join(losers.stages)
    return mined, f"plan {kind}: the log holds no losers of {of_stages}; mined instead"


def _about_exposed(config: RunConfig, test: Holdout, plans: Iterable[Plan]) -> list[str]:
    """Warns of a gain that is none: exposed items that cannot come back as test positives.

    A plan that pushes them down frees places for what can be found, unless they are excluded.
    """
    if config.evaluation.exclude != "clicked":
        return []
    if not any("exposed" in getattr(plan["model.hard"], "stages", ()) for plan in plans):
        return []
    comes_back = any(
        len(np.intersect1d(relevant, np.setdiff1d(seen, clicked)))
        for relevant, seen, clicked in zip(test.relevant, test.seen, test.clicked, strict=True)
    )
    if comes_back:
        return []
    return [
        "no exposed item comes back as a test positive in this log, so that plans with exposed "
        "negatives seem better than they are: set evaluation.exclude to 'seen'"
    ]


def _auc_rows(
    config: RunConfig, data: RunData
) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    """Finds rows of each test query: its positives, and by AUC column their rivals."""
    test = data.test
    ids = Ids(test.candidate_ids)
    positives = [ids.known_rows(items) for items in test.relevant]
    # As the ranking: what it excludes is not to be found, here either.
    if (excluded := test.excluded(config.evaluation.exclude)) is not None:
        rows = (ids.known_rows(items) for items in excluded)
        positives = [np.setdiff1d(a, b) for a, b in zip(positives, rows, strict=True)]
    events, drawn = data.split.events, draw_corpus_rows(len(ids), NUM_CORPUS_ITEMS, config.seed)
    of_drawn = events.filter(events["item_id"].isin(ids.take(drawn).tolist()))
    met = items_met(of_drawn, test.user_ids)
    others = {"auc_corpus": [np.setdiff1d(drawn, ids.rows(items)) for items in met]}
    of_stages = items_by_stage(events, "test", test.user_ids, [*AUC_STAGES.values()])
    for name, stage in AUC_STAGES.items():
        others[name] = [ids.known_rows(items) for items in of_stages[stage]]
    return positives, {
        name: rows
        for name, rows in others.items()
        if any(len(own) and len(other) for own, other in zip(positives, rows, strict=True))
    }


def _max_epochs(config: RunConfig, num_samples: int) -> int:
    """Returns the budget of a plan in epochs."""
    if config.compare.max_steps is None:
        return config.training.max_epochs
    steps_per_epoch = max(1, round(num_samples / config.training.batch_size))
    return math.ceil(config.compare.max_steps / steps_per_epoch)


def _per_query(result: EvaluationResult, test: Holdout, longest: int) -> dict[str, np.ndarray]:
    """Returns a plan's metrics of each test query, NaN where it was not measured."""
    place = {user: i for i, user in enumerate(result.user_ids.tolist())}
    of_result = [place.get(user, -1) for user in test.user_ids.tolist()]
    tail = result.slices["tail"].per_query[f"recall@{longest}"]
    columns = {**result.per_query, f"tail/recall@{longest}": tail}
    return {name: np.append(values, np.nan)[of_result] for name, values in columns.items()}


def _rows(measured: Mapping[str, _Measured], config: RunConfig) -> list[PlanRow]:
    """Compares every plan with the reference, query by query."""
    reference = measured[config.compare.reference].per_query
    names = list(reference)
    rows = []
    for plan, of_plan in measured.items():
        values = np.stack([of_plan.per_query[metric] for metric in names], axis=1)
        against = values - np.stack([reference[metric] for metric in names], axis=1)
        # One draw of queries for both, so that the intervals belong together.
        intervals = bootstrap_intervals(np.concatenate([values, against], axis=1), seed=config.seed)
        differences = dict(zip(names, intervals[len(names) :], strict=True))
        rows.append(
            PlanRow(
                name=plan,
                metrics=dict(zip(names, intervals[: len(names)], strict=True)),
                differences={} if plan == config.compare.reference else differences,
                summary=of_plan.summary,
                num_epochs=of_plan.training.best_epoch,
                seconds=of_plan.training.seconds,
            )
        )
    return rows


def _write(
    rows: Sequence[PlanRow],
    config: RunConfig,
    notes: Sequence[str],
    plans: Mapping[str, Plan],
    folder: Path,
) -> PlanComparison:
    cutoffs, reference = config.evaluation.cutoffs, config.compare.reference
    content = {
        "reference": reference,
        "exclude": config.evaluation.exclude,
        "seed": config.seed,
        "notes": list(notes),
        "plans": [
            {**row.as_dict(), "settings": to_jsonable_python(plans[row.name])} for row in rows
        ],
    }
    (folder / "comparison.json").write_text(json.dumps(content, indent=2))
    lines = [
        comparison_table(rows, cutoffs, markdown=True),
        "",
        f"Differences are from {reference}, query by query, with 95% bootstrap intervals.",
        *(f"{note[0].upper()}{note[1:]}." for note in notes),
    ]
    (folder / "comparison.md").write_text("\n".join(lines) + "\n")
    label = f"What each plan gains over {reference}, what it finds and what it tells apart"
    drawing = finish(comparison_figure(rows, reference, cutoffs), label)
    (folder / "comparison.svg").write_text(drawing.card())
    return PlanComparison(folder, rows, comparison_table(rows, cutoffs, markdown=False), notes)
