"""Sampling plans side by side on the user's own data: which negatives suit it.

Every plan trains the same towers from the same initial weights, on the same positives, within the
same budget; only what a positive is compared with differs, and how it is weighed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfrs_pipeline.config import RunConfig, with_settings
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.outcomes import items_by_stage
from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.durable import is_whole, read_record, write_record
from tfrs_pipeline.evaluation.auc import auc_per_query, draw_corpus_rows
from tfrs_pipeline.evaluation.bootstrap import bootstrap_intervals
from tfrs_pipeline.evaluation.comparison import PlanRow, comparison_figure, comparison_table
from tfrs_pipeline.model.two_tower import OnProgress, TwoTower
from tfrs_pipeline.negatives.funnel import FunnelLosers
from tfrs_pipeline.negatives.in_batch import InBatch
from tfrs_pipeline.negatives.mined import Mined
from tfrs_pipeline.negatives.popularity import Popularity
from tfrs_pipeline.negatives.uniform import Uniform
from tfrs_pipeline.run import (
    OnStep,
    RunData,
    Steps,
    evaluate_all,
    prepare,
    train_and_refit,
)
from tfrs_pipeline.run_folder import claim_folder

logger = logging.getLogger(__name__)

# Columns that a row draws from its hard negatives, in plans of one stage and of several.
NUM_HARD = 8
# What positives are compared with: name of the column -> stage of the items, of those that the user
# met in the test part alone; None is the corpus, without what the user has seen or clicked.
AUC_STAGES: dict[str, Stage | None] = {
    "auc_corpus": None,
    "auc_pre_rank_losers": Stage.RETRIEVED,
    "auc_rank_losers": Stage.PRE_RANKED,
    "auc_exposed": Stage.EXPOSED,
}


@dataclass(frozen=True)
class Plan:
    """A way of choosing negatives.

    Args:
        name: Also of its folder.
        settings: What it changes in the config, by dotted name.
    """

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class PlanComparison:
    """What a comparison left behind.

    Args:
        folder: With comparison.json, comparison.md, comparison.png and a folder a plan.
        rows: A row a plan, in the order of the table.
        table: As plain text.
        notes: What was dropped, and what holds for every plan.
    """

    folder: Path
    rows: Sequence[PlanRow]
    table: str
    notes: Sequence[str]


@dataclass(frozen=True)
class _Task:
    """What every plan is trained and measured on.

    Args:
        config: Of the comparison.
        data: Split and samples.
        positive_rows: Per test query, rows of what is to be found.
        others: AUC column -> per test query, rows of what positives are compared with; None where
            the log has none.
    """

    config: RunConfig
    data: RunData
    positive_rows: list[np.ndarray]
    others: dict[str, list[np.ndarray] | None]


def compare(
    config: RunConfig,
    folder: Path,
    *,
    on_step: OnStep = lambda report: None,
    on_progress: OnProgress = lambda task, done, total: None,
) -> PlanComparison:
    """Trains and measures every sampling plan of a config.

    A folder that holds a stopped comparison of the same config is resumed: finished plans are kept,
    the one at hand goes on from its last epoch.

    Args:
        config: What to do; `compare` lists the plans.
        folder: Where to work; made if missing.
        on_step: Called as each plan ends.
        on_progress: Called within with a task's name, steps done and steps in all.

    Returns:
        The table, and where it lies.

    Raises:
        ValueError: If the folder holds something else, or the data is refused (`DataError`).
    """
    with claim_folder(config, folder, exports=False):
        return _compare(config, folder, Steps(on_step, on_progress), on_progress)


def _compare(
    config: RunConfig, folder: Path, step: Steps, on_progress: OnProgress
) -> PlanComparison:
    data = prepare(config, folder, step, hard=_every_loser(config))
    with step("plans") as report:
        pools = data.final.samples.hard_pools
        logged = [name for name, pool in pools.items() if len(pool.values)]
        plans, notes = sampling_plans(config, logged, len(data.final.corpus.candidate_ids))
        notes += _about_exposed(config, data, plans)
        task = _Task(config, data, *_auc_rows(config, data))
        report.notes = [f"{len(plans)} plans", *notes]
    results = {}
    for plan in plans:
        with step(plan.name) as report:
            result = _run_plan(plan, task, folder / "plans" / plan.name, on_progress)
            results[plan.name], report.notes = result, result["notes"]
    notes += [
        f"{name}: {note}"
        for name, result in results.items()
        for note in result["notes"]
        if note.startswith("no hard negatives")
    ]
    rows = _rows(results, config)
    return _write(rows, config, notes, {plan.name: plan for plan in plans}, folder)


def _every_loser(config: RunConfig) -> FunnelLosers:
    """Asks for the pools of every stage that a plan may want; a plan draws from its own."""
    hard = config.model.hard
    losers = hard if isinstance(hard, FunnelLosers) else FunnelLosers()
    stages: tuple[Any, ...] = ("retrieved", "pre_ranked")
    if "exposed" in config.compare.plans:
        stages = (*stages, "exposed")
    return dataclasses.replace(losers, stages=stages, allow_exposed="exposed" in stages)


def sampling_plans(
    config: RunConfig, logged: Sequence[str], num_candidates: int
) -> tuple[list[Plan], list[str]]:
    """Turns the plans of a config into settings.

    Plans of one kind of negative draw as many shared columns as the config's mixture has, so that
    all of them but in-batch alone see the same number.

    Args:
        config: `compare.plans`, and what the plans have in common.
        logged: Stages whose losers the samples hold, such as "retrieved".
        num_candidates: Size of the corpus.

    Returns:
        The plans, and notes on what is missing.

    Raises:
        ValueError: If the reference is missing, or a plan does not go with the other settings.
    """
    corrected = "mixture" if config.model.correction == "none" else config.model.correction
    common: dict[str, Any] = {
        "model.correction": corrected,
        "model.hard": None,
        "model.resampling_exponent": 0.0,
    }
    notes: list[str] = []
    if config.training.examples != "single":
        # For every plan alike: in-batch negatives are positives of single examples.
        common["training.examples"] = "single"
        notes.append("every plan is trained with training.examples 'single'")
    plans: list[Plan] = []
    for kind in config.compare.plans:
        if corrected == "streaming" and kind in ("popularity", "resampled"):
            notes.append(
                f"plan {kind} is missing: it draws by training counts, which model.correction "
                "'streaming' does without"
            )
            continue
        found, note = _plans_of_kind(kind, config, logged, num_candidates)
        plans += [Plan(plan.name, {**common, **plan.settings}) for plan in found]
        notes += [note] if note else []
    distinct = {plan.name: plan for plan in plans}
    if config.compare.reference not in distinct:
        raise ValueError(
            f"compare.reference is {config.compare.reference!r}, a plan that is missing here "
            f"({'; '.join(notes)}). Choose another reference."
        )
    for plan in plans:  # Refused before the first one is trained.
        with_settings(config, plan.settings)
    return list(distinct.values()), notes


def _plans_of_kind(
    kind: str, config: RunConfig, logged: Sequence[str], num_candidates: int
) -> tuple[list[Plan], str]:
    """Turns a kind of plan into settings, several for those with a list of values; with a note."""
    num = sum(
        config.training.batch_size - 1 if isinstance(shared, InBatch) else shared.num
        for shared in config.model.negatives
    )
    simple: dict[str, dict[str, Any]] = {
        "in_batch_uncorrected": {
            "model.negatives": (InBatch(),),
            "model.correction": "none",
            "model.correct_positive": False,
        },
        "in_batch": {"model.negatives": (InBatch(),)},
        "uniform": {"model.negatives": (Uniform(num),)},
        "popularity": {"model.negatives": (Popularity(num),)},
        "mixed": {},
    }
    if kind in simple:
        return [Plan(kind, simple[kind])], ""
    if kind == "resampled":
        return [
            Plan(f"resampled_{exponent:g}", {"model.resampling_exponent": exponent})
            for exponent in config.compare.resampling_exponents
        ], ""
    return _hard_plans(kind, config, logged, num_candidates)


def _hard_plans(
    kind: str, config: RunConfig, logged: Sequence[str], num_candidates: int
) -> tuple[list[Plan], str]:
    """Turns a kind of plan with hard negatives into settings, a plan a share; with a note."""
    shares = (0.5,) if kind == "hybrid_50_50" else config.compare.hard_shares
    losers = tuple(stage for stage in ("retrieved", "pre_ranked") if stage in logged)
    mined = config.model.hard if isinstance(config.model.hard, Mined) else Mined(num=NUM_HARD)
    hard: FunnelLosers | Mined
    note = ""
    if kind == "exposed":
        if "exposed" not in logged:
            return [], "plan exposed is missing: the log holds no exposed items"
        name = "exposed"
        hard = FunnelLosers(stages=("exposed",), num=NUM_HARD, allow_exposed=True)
    elif kind != "mined" and losers:
        name = "hybrid"
        hard = FunnelLosers(stages=losers, num=NUM_HARD // len(losers))  # type: ignore[arg-type]
    elif num_candidates > mined.min_rank:
        name, hard = "mined", mined
        if kind != "mined":
            note = f"plan {kind}: the log holds no losers; mined from the model"
    else:
        return [], (
            f"plan {kind} is missing: {num_candidates:,} items have no rank {mined.min_rank} "
            "(model.hard.min_rank)"
        )
    plans = [
        Plan(
            f"{name}_50_50" if share == 0.5 else f"{name}_{share:g}",
            {"model.hard": dataclasses.replace(hard, share=share)},
        )
        for share in shares
    ]
    return plans, note


def _about_exposed(config: RunConfig, data: RunData, plans: Sequence[Plan]) -> list[str]:
    """Warns of a gain that is none: exposed items that cannot come back as test positives.

    A plan that pushes them down frees places for what can be found, unless they are excluded.
    """
    if config.evaluation.exclude != "clicked":
        return []
    if not any(plan.name.startswith("exposed") for plan in plans):
        return []
    test = data.test
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
) -> tuple[list[np.ndarray], dict[str, list[np.ndarray] | None]]:
    """Finds the rows of each test query's positives, and of what they are compared with."""
    test = data.test
    ids = Ids(test.candidate_ids)
    relevant, seen = (
        [ids.known_rows(items) for items in lists] for lists in (test.relevant, test.seen)
    )
    positives = relevant
    # As the ranking: what it excludes is not to be found, here either.
    if (excluded := test.excluded(config.evaluation.exclude)) is not None:
        rows = (ids.known_rows(items) for items in excluded)
        positives = [np.setdiff1d(a, b) for a, b in zip(relevant, rows, strict=True)]
    stages = [stage for stage in AUC_STAGES.values() if stage is not None]
    of_stages = items_by_stage(data.split.events, "test", test.user_ids, stages)
    others: dict[str, list[np.ndarray] | None] = {}
    for name, of_stage in AUC_STAGES.items():
        if of_stage is None:
            met = [np.union1d(a, b) for a, b in zip(seen, relevant, strict=True)]
            others[name] = draw_corpus_rows(
                len(ids), met, config.compare.num_corpus_items, config.seed
            )
        else:
            found = [ids.known_rows(items) for items in of_stages[of_stage]]
            others[name] = found if any(map(len, found)) else None
    return positives, others


def _run_plan(plan: Plan, task: _Task, folder: Path, on_progress: OnProgress) -> dict[str, Any]:
    """Trains and measures a plan, or reads what was measured before it was stopped."""
    if not is_whole(folder / "result.json"):
        _measure_plan(plan, task, folder, on_progress)
    result = read_record(folder / "result.json", check_files=False)
    with np.load(folder / "per_query.npz") as saved:
        result["per_query"] = dict(saved)
    return result


def _measure_plan(plan: Plan, task: _Task, folder: Path, on_progress: OnProgress) -> None:
    config = with_settings(task.config, plan.settings)
    settings = config.compare
    max_epochs = config.training.max_epochs
    if settings.max_steps is not None:
        num_samples = len(task.data.selection.samples)
        steps_per_epoch = max(1, round(num_samples / config.training.batch_size))
        max_epochs = -(-settings.max_steps // steps_per_epoch)
    model = train_and_refit(
        config,
        task.data,
        max_epochs=max_epochs,
        max_seconds=settings.max_seconds,
        folder=folder / "checkpoints",
        name=plan.name,
        on_progress=on_progress,
    )
    test = task.data.test
    result = evaluate_all(config, {plan.name: model}, test, on_progress).first
    place = {user: i for i, user in enumerate(result.user_ids.tolist())}
    of_result = [place.get(user, -1) for user in test.user_ids.tolist()]
    longest = max(config.evaluation.cutoffs)
    columns = {
        **result.per_query,
        f"tail/recall@{longest}": result.slices["tail"].per_query[f"recall@{longest}"],
    }
    per_query = {name: np.append(values, np.nan)[of_result] for name, values in columns.items()}
    per_query |= _aucs(model, task)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "per_query.npz", **dict[str, Any](per_query))
    measured = {
        "summary": result.summary(),
        "num_epochs": model.result.best_epoch,
        "seconds": model.result.seconds,
        "history": model.result.history,
        "notes": model.notes,
    }
    write_record(folder / "result.json", measured, [folder / "per_query.npz"])


def _aucs(model: TwoTower, task: _Task) -> dict[str, np.ndarray]:
    queries = model.query_embeddings(task.data.test.as_queries())
    candidates = model.network.embed_corpus()
    return {
        name: auc_per_query(queries, candidates, task.positive_rows, rows)
        for name, rows in task.others.items()
        if rows is not None
    }


def _rows(results: Mapping[str, dict[str, Any]], config: RunConfig) -> list[PlanRow]:
    """Compares every plan with the reference, query by query."""
    reference = results[config.compare.reference]["per_query"]
    names = list(reference)
    rows = []
    for name, result in results.items():
        values = np.stack([result["per_query"][metric] for metric in names], axis=1)
        against = values - np.stack([reference[metric] for metric in names], axis=1)
        # One draw of queries for both, so that the intervals belong together.
        intervals = bootstrap_intervals(
            np.concatenate([values, against], axis=1),
            num_bootstrap=config.evaluation.num_bootstrap,
            seed=config.seed,
        )
        rows.append(
            PlanRow(
                name=name,
                metrics=dict(zip(names, intervals[: len(names)], strict=True)),
                differences={}
                if name == config.compare.reference
                else dict(zip(names, intervals[len(names) :], strict=True)),
                summary=result["summary"],
                num_epochs=result["num_epochs"],
                seconds=result["seconds"],
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
    cutoffs = config.evaluation.cutoffs
    table = comparison_table(rows, cutoffs, markdown=False)
    reference = config.compare.reference
    content = {
        "reference": reference,
        "exclude": config.evaluation.exclude,
        "seed": config.seed,
        "notes": list(notes),
        "plans": [
            {**row.as_dict(), "settings": _jsonable(plans[row.name].settings)} for row in rows
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
    comparison_figure(rows, reference, cutoffs).savefig(folder / "comparison.png", dpi=150)
    return PlanComparison(folder, rows, table, notes)


def _jsonable(settings: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(each) for each in value]
        is_kind = dataclasses.is_dataclass(value) and not isinstance(value, type)
        return dataclasses.asdict(value) if is_kind else value

    return {name: plain(value) for name, value in settings.items()}
