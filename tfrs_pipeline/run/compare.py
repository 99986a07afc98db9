"""Sampling plans side by side on the user's own data: which negatives suit it.

Every plan trains the same towers from the same initial weights, on the same positives, within the
same budget; only what a positive is compared with differs, and how it is weighed.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from tfrs_pipeline.model.fitted import FittedTwoTower
from tfrs_pipeline.model.notes import OnProgress
from tfrs_pipeline.negatives.mined import Mined
from tfrs_pipeline.run.data import RunData, data_steps
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.measure import evaluate_all
from tfrs_pipeline.run.plans import Plan, about_exposed, every_loser, sampling_plans
from tfrs_pipeline.run.steps import OnStep, Runner, Step
from tfrs_pipeline.run.training import check_trainable, training_step
from tfrs_pipeline.settings import ConfigError

# Of the corpus, drawn uniformly, that positives are compared with in the AUC.
NUM_CORPUS_ITEMS = 1000
# Column -> stage of the items that positives are compared with: of those that the user met in the
# test part alone. "auc_corpus" compares them with items of which the user has no event at all.
AUC_STAGES: dict[str, Stage] = {
    "auc_pre_rank_losers": Stage.RETRIEVED,
    "auc_rank_losers": Stage.PRE_RANKED,
    "auc_exposed": Stage.EXPOSED,
}


@dataclass(frozen=True)
class _Measured:
    summary: dict[str, Any]
    per_query: dict[str, np.ndarray]
    training: TrainingResult
    unmined: list[str]


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
    measured again from their checkpoints, the one at hand goes on from its last epoch. `on_step`
    and `on_progress` are called as by `run`.

    Raises:
        ConfigError: If there is a run to start from.
        ValueError: If the folder holds something else, or the data is refused (`DataError`).
    """
    if config.warm_start is not None:
        message = "the plans of a comparison all start from nothing; leave it out"
        raise ConfigError([("warm_start", f"got {str(config.warm_start)!r}: {message}")])
    if this_worker().count > 1:
        raise ValueError("A comparison trains in one process. Unset TF_CONFIG, or use run.")
    place = RunFolder(folder)
    with place.claim(config, is_run=False):
        runner = Runner(config, place, on_step, on_progress)
        plans, notes = runner.run(plan_steps(config))
        data: RunData = runner.artifacts["samples"]
        measure = functools.partial(_measure, auc_rows(config, data))
        measured: dict[str, _Measured] = {}
        for name, plan in plans.items():
            planned = _planned(config, plan, data)
            measured[name] = runner.run(
                [
                    training_step(name, planned, f"plans/{name}/checkpoints"),
                    Step(f"measure {name}", ("samples", name), "measured", measure),
                ]
            )
            del runner.artifacts[name]  # One network at a time.
        notes += [f"{name}: {note}" for name, x in measured.items() for note in x.unmined]
        return _write(_rows(measured, config), config, notes, plans, folder)


def plan_steps(config: RunConfig) -> list[Step]:
    """Returns the steps that make the data and the plans of a comparison; they train nothing."""
    return [
        *data_steps(config, every_loser(config)),
        Step("plans", ("samples",), "plans", _make_plans),
    ]


def _make_plans(runner: Runner, data: RunData) -> tuple[dict[str, Plan], list[str]]:
    """Makes the plans, with notes, and refuses each that cannot be trained, before any is."""
    config = runner.config
    pools = data.final.samples.hard_pools
    logged = [name for name, pool in pools.items() if len(pool.values)]
    num_candidates = len(data.final.corpus.candidate_ids)
    plans, notes = sampling_plans(config, logged, num_candidates, _max_epochs(config, data))
    for plan in plans.values():
        check_trainable(data, _planned(config, plan, data))
    notes += about_exposed(config, data.test, plans.values())
    runner.note(f"{counted(len(plans), 'plan')}: {', '.join(plans)}", *notes)
    return plans, notes


def _planned(config: RunConfig, plan: Plan, data: RunData) -> RunConfig:
    """Returns the settings that a plan trains with, within the budget."""
    return with_settings(config, {**plan, "training.max_epochs": _max_epochs(config, data)})


def _measure(
    rows_of_queries: tuple[list[np.ndarray], dict[str, list[np.ndarray]]],
    runner: Runner,
    data: RunData,
    model: FittedTwoTower,
) -> _Measured:
    config, (positives, others) = runner.config, rows_of_queries
    result = evaluate_all(config, {model.network.name: model}, data.test, runner.on_progress).first
    queries = model.query_embeddings(data.test.as_queries())
    candidates = model.network.embed_corpus()
    per_query = _per_query(result, data.test, max(config.evaluation.cutoffs))
    per_query |= {
        column: auc_per_query(queries, candidates, positives, rows)
        for column, rows in others.items()
    }
    return _Measured(result.summary(), per_query, model.result, _about_mining(data, model))


def _about_mining(data: RunData, model: FittedTwoTower) -> list[str]:
    """Returns a note if the training that is measured ended before its first mining."""
    hard, result = model.settings.hard, model.result
    num_epochs = result.best_epoch if data.has_refit else result.num_epochs
    if not isinstance(hard, Mined) or num_epochs > hard.every:
        return []
    return [
        "no hard negatives were mined: training ended within the first "
        f"{hard.every} epochs (model.hard.every)"
    ]


def auc_rows(
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


def _max_epochs(config: RunConfig, data: RunData) -> int:
    """Returns the budget of a plan in epochs."""
    if config.compare.max_steps is None:
        return config.training.max_epochs
    steps_per_epoch = max(1, round(len(data.selection.samples) / config.training.batch_size))
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
