"""Sampling plans side by side on the user's own data: which negatives suit it.

Every plan trains the same towers from the same initial weights, on the same positives, within the
same budget; only what a positive is compared with differs, and how it is weighed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfrs_pipeline.config import RunConfig, with_settings
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log, Split
from tfrs_pipeline.data.outcomes import items_by_stage
from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.data.split import Holdout
from tfrs_pipeline.evaluation.auc import auc_per_query, draw_corpus_rows
from tfrs_pipeline.evaluation.bootstrap import bootstrap_intervals
from tfrs_pipeline.evaluation.comparison import PlanRow, comparison_figure, comparison_table
from tfrs_pipeline.model.queries import QueryEncoder, exact_retriever
from tfrs_pipeline.model.two_tower import TwoTowerModel
from tfrs_pipeline.run import (
    NOTHING_MINED,
    Corpus,
    OnProgress,
    OnStage,
    Stages,
    claim_folder,
    describe_samples,
    evaluate_retriever,
    hard_negative_rules,
    parts_before_test,
    read_corpus,
    stored_data,
    stored_split,
    train_and_refit,
    training_samples,
)
from tfrs_pipeline.samples.build import Samples

logger = logging.getLogger(__name__)

LOSERS = (Stage.RETRIEVED, Stage.PRE_RANKED)
# What positives are set against: name of the column -> stage of the items, of those that the user
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
class Comparison:
    """What a comparison left behind.

    Args:
        folder: With comparison.json, comparison.md, comparison.png and a folder a plan.
        rows: A row a plan, in the order of the table.
        table: As plain text.
        notes: What was left out, and what holds for every plan.
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
        corpus: Ids and features behind the rows.
        selection: Samples of the training part.
        final: Samples of all that precedes the test.
        validation_queries: To choose the epoch.
        test_queries: To measure.
        positive_rows: Per test query, places of what is to be found.
        others: AUC column -> per test query, places of what positives are set against; None where
            the log has none.
    """

    config: RunConfig
    corpus: Corpus
    selection: Samples
    final: Samples
    validation_queries: Holdout
    test_queries: Holdout
    positive_rows: list[np.ndarray]
    others: dict[str, list[np.ndarray] | None]


def compare(
    config: RunConfig,
    folder: Path,
    *,
    on_stage: OnStage = lambda report: None,
    on_progress: OnProgress = lambda task, done, total: None,
) -> Comparison:
    """Trains and measures every sampling plan of a config.

    A folder that holds a stopped comparison of the same config is resumed: finished plans are kept,
    the one at hand goes on from its last epoch.

    Args:
        config: What to do; `compare` lists the plans.
        folder: Where to work; made if missing.
        on_stage: Called as each plan ends.
        on_progress: Called within with a task's name, steps done and steps in all.

    Returns:
        The table, and where it lies.

    Raises:
        ValueError: If the folder holds something else, or the data is refused (`DataError`).
    """
    claim_folder(config, folder)
    stage = Stages(on_stage, on_progress)
    with stage("data") as report:
        log, report.notes = stored_data(config.data, folder / "data")
    with stage("split") as report:
        split, report.notes = stored_split(log, config, folder / "data")
        config, notes = _with_exposed_left_out(config, split)
        report.notes += notes
    with stage("samples") as report:
        task, plans, left_out = _prepare(config, log, split, folder)
        report.notes += [*describe_samples(folder / "compared_samples" / "final"), *left_out]
        notes += left_out
    results = {}
    for plan in plans:
        with stage(plan.name) as report:
            results[plan.name], report.notes = _run_plan(
                plan, task, folder / "plans" / plan.name, on_progress
            )
    notes += [
        f"{name}: {note}"
        for name, result in results.items()
        for note in result["notes"]
        if NOTHING_MINED in note
    ]
    rows = _rows(results, config)
    return _write(rows, config, notes, {plan.name: plan for plan in plans}, folder)


def sampling_plans(
    config: RunConfig, hard_stages: Sequence[str], num_candidates: int
) -> tuple[list[Plan], list[str]]:
    """Turns the plans of a config into settings.

    Plans of one sampler draw as many shared columns as the mixed one has, so that all of them but
    in-batch alone see the same number.

    Args:
        config: `compare.plans`, and what the plans have in common.
        hard_stages: Stages whose losers the samples hold, such as "retrieved".
        num_candidates: Size of the corpus.

    Returns:
        The plans, and notes on what was left out.

    Raises:
        ValueError: If the reference is left out, or a plan does not go with the other settings.
    """
    settings, samples = config.compare, config.samples
    num_columns = sum(sampler.num for sampler in samples.easy_negatives)
    if samples.in_batch:
        num_columns += (1 + samples.bank_batches) * config.training.batch_size - 1
    corrected = "mixture" if config.model.correction == "none" else config.model.correction
    common = {
        "model.correction": corrected,
        "samples.preset": None,
        "samples.hard_share": 0.0,
        "samples.resampling": "none",
    }
    notes: list[str] = []
    if config.training.positions == "all":
        # For every plan alike: in-batch negatives are positives of single examples.
        common["training.positions"] = "one"
        notes.append("every plan is trained with training.positions 'one'")
    plans: list[Plan] = []

    def add(name: str, **changed: Any) -> None:
        dotted = {name.replace("__", "."): value for name, value in changed.items()}
        plans.append(Plan(name, {**common, **dotted}))

    for kind in settings.plans:
        if corrected == "streaming" and kind in ("popularity", "resampled"):
            notes.append(
                f"plan {kind} is left out: it draws by training counts, which model.correction "
                "'streaming' does without"
            )
        elif kind == "in_batch_uncorrected":
            add(
                kind,
                model__correction="none",
                model__correct_positive=False,
                samples__easy_negatives=(),
                samples__in_batch=True,
            )
        elif kind == "in_batch":
            add(kind, samples__easy_negatives=(), samples__in_batch=True)
        elif kind in ("uniform", "popularity"):
            sampler = {"alpha": 0.0 if kind == "uniform" else 0.75, "num": num_columns}
            add(
                kind,
                samples__easy_negatives=(sampler,),
                samples__in_batch=False,
                samples__bank_batches=0,
            )
        elif kind == "mixed":
            add(kind)
        elif kind == "resampled":
            for exponent in settings.resampling_exponents:
                add(
                    f"resampled_{exponent:g}",
                    samples__resampling="power_law",
                    samples__resampling_exponent=exponent,
                )
        else:
            hard, note = _hard_plans(kind, config, hard_stages, num_candidates)
            plans += [Plan(plan.name, {**common, **plan.settings}) for plan in hard]
            notes += [note] if note else []
    distinct = {plan.name: plan for plan in plans}
    if settings.reference not in distinct:
        raise ValueError(
            f"compare.reference is {settings.reference!r}, a plan that is left out here "
            f"({'; '.join(notes)}). Choose another reference."
        )
    for plan in plans:  # Refused before the first one is trained.
        with_settings(config, plan.settings)
    return list(distinct.values()), notes


def _hard_plans(
    kind: str, config: RunConfig, hard_stages: Sequence[str], num_candidates: int
) -> tuple[list[Plan], str]:
    """Turns a kind of plan with hard negatives into settings, a plan a share; with a note."""
    samples = config.samples
    shares = (0.5,) if kind == "hybrid_50_50" else config.compare.hard_shares
    losers = [stage.value for stage in LOSERS if stage.value in hard_stages]
    note = ""
    if kind == "exposed":
        if not samples.allow_exposed_as_negatives:
            return [], (
                "plan exposed is left out: items that were shown and not clicked are not for "
                "retrieval; samples.allow_exposed_as_negatives shows what they do"
            )
        if "exposed" not in hard_stages:
            return [], "plan exposed is left out: the log holds no exposed items"
        name, stages = "exposed", ["exposed"]
    elif kind != "mined" and losers:
        name, stages = "hybrid", losers
    elif num_candidates > samples.mined_min_rank:
        name, stages = "mined", ["mined"]
        if kind != "mined":
            note = f"plan {kind}: the log holds no losers; mined from the model"
    else:
        return [], (
            f"plan {kind} is left out: {num_candidates:,} items have no rank "
            f"samples.mined_min_rank = {samples.mined_min_rank}"
        )
    samplers = [
        {"stage": stage, "share": 1 / len(stages), "num": 8 // len(stages)} for stage in stages
    ]
    plans = [
        Plan(
            f"{name}_50_50" if share == 0.5 else f"{name}_{share:g}",
            {"samples.hard_share": share, "samples.hard_negatives": samplers},
        )
        for share in shares
    ]
    return plans, note


def _with_exposed_left_out(config: RunConfig, split: Split) -> tuple[RunConfig, list[str]]:
    """Leaves exposed items out of every ranking where they cannot come back as test positives.

    Else a plan that pushes them down would seem to gain: it frees places for what can be found.
    """
    queries = split.test
    num_back = num_exposed = 0
    for relevant, seen, clicked in zip(
        queries.relevant, queries.seen, queries.clicked, strict=True
    ):
        exposed = np.setdiff1d(seen, clicked)
        num_exposed += len(exposed)
        num_back += len(np.intersect1d(relevant, exposed))
    # With "none" a clicked item may be found again, and "seen" would leave it out.
    if num_back or not num_exposed or config.evaluation.exclude != "clicked":
        return config, []
    config = with_settings(config, {"evaluation.exclude": "seen"})
    return config, [
        "exposed items are left out of every ranking (evaluation.exclude = seen): none of "
        f"{num_exposed:,} comes back as a test positive in this log"
    ]


def _prepare(
    config: RunConfig, log: Log, split: Split, folder: Path
) -> tuple[_Task, list[Plan], list[str]]:
    """Builds the samples that all plans share, and what they are measured against."""
    counts = split.events.group_by("stage").agg(num=split.events.count()).to_pyarrow().to_pylist()
    logged = {row["stage"] for row in counts}
    stages = [stage.value for stage in LOSERS if stage.value in logged]
    if config.samples.allow_exposed_as_negatives and Stage.EXPOSED.value in logged:
        stages.append(Stage.EXPOSED.value)
    # With the pools of every stage that a plan may ask for; a plan draws from those it wants.
    building = config
    if stages:
        building = with_settings(
            config,
            {
                "samples.preset": None,
                "samples.hard_share": 0.5,
                "samples.hard_negatives": [{"stage": stage} for stage in stages],
            },
        )
        assert hard_negative_rules(building.samples) is not None
    selection, final = (
        training_samples(building, log, split, parts, folder / "compared_samples" / name)
        for name, parts in (("selection", ("train",)), ("final", parts_before_test(config)))
    )
    corpus = read_corpus(log, folder / "compared_samples" / "final")
    validation, test = split.validation, split.test
    plans, notes = sampling_plans(
        config,
        [stage for stage in stages if len(final.hard_pools[stage].values)],
        len(corpus.candidate_ids),
    )
    positive_rows, others = _auc_rows(config, split, test, Ids(corpus.candidate_ids))
    task = _Task(config, corpus, selection, final, validation, test, positive_rows, others)
    return task, plans, notes


def _auc_rows(
    config: RunConfig, split: Split, test: Holdout, ids: Ids
) -> tuple[list[np.ndarray], dict[str, list[np.ndarray] | None]]:
    """Finds the places of each test query's positives, and of what they are set against."""
    relevant, seen = (
        [ids.known_rows(items) for items in lists] for lists in (test.relevant, test.seen)
    )
    # As the ranking: what it leaves out is not to be found, here either.
    nothing = [np.zeros(0, np.int32)] * len(test)
    clicked = [ids.known_rows(items) for items in test.clicked]
    excluded = {"clicked": clicked, "seen": seen, "none": nothing}[config.evaluation.exclude]
    positives = [np.setdiff1d(a, b) for a, b in zip(relevant, excluded, strict=True)]
    stages = [stage for stage in AUC_STAGES.values() if stage is not None]
    of_stages = items_by_stage(split.events, "test", test.user_ids, stages)
    others: dict[str, list[np.ndarray] | None] = {}
    for name, of_stage in AUC_STAGES.items():
        if of_stage is None:
            met = [np.union1d(a, b) for a, b in zip(seen, relevant, strict=True)]
            others[name] = draw_corpus_rows(
                len(ids), met, config.compare.num_corpus_items, config.seed
            )
        else:
            rows = [ids.known_rows(items) for items in of_stages[of_stage]]
            others[name] = rows if any(map(len, rows)) else None
    return positives, others


def _run_plan(
    plan: Plan, task: _Task, folder: Path, on_progress: OnProgress
) -> tuple[dict[str, Any], list[str]]:
    """Trains and measures a plan, or reads what was measured before it was stopped."""
    done = folder / "result.json"
    if done.exists():
        result = json.loads(done.read_text())
    else:
        result = _measure_plan(plan, task, folder, on_progress)
    with np.load(folder / "per_query.npz") as saved:
        result["per_query"] = dict(saved)
    return result, result["notes"]


def _measure_plan(plan: Plan, task: _Task, folder: Path, on_progress: OnProgress) -> dict[str, Any]:
    config = with_settings(task.config, plan.settings)
    settings = config.compare
    max_epochs = config.training.max_epochs
    if settings.max_steps is not None:
        steps_per_epoch = max(1, round(len(task.selection) / config.training.batch_size))
        max_epochs = -(-settings.max_steps // steps_per_epoch)
    model, training, notes = train_and_refit(
        config,
        task.corpus,
        task.selection,
        task.final,
        task.validation_queries,
        max_epochs=max_epochs,
        max_seconds=settings.max_seconds,
        folder=folder / "checkpoints",
        name=plan.name,
        on_progress=on_progress,
    )
    result = evaluate_retriever(
        config,
        exact_retriever(model, task.corpus.query_ids, task.corpus.candidate_ids),
        task.corpus,
        task.final,
        task.test_queries,
        plan.name,
        on_progress,
    )
    place = {user: i for i, user in enumerate(result.user_ids.tolist())}
    of_result = [place.get(user, -1) for user in task.test_queries.user_ids.tolist()]
    longest = max(config.evaluation.cutoffs)
    per_query = {
        name: np.append(values, np.nan)[of_result] for name, values in result.per_query.items()
    }
    per_query[f"tail/recall@{longest}"] = np.append(
        result.slices["tail"].per_query[f"recall@{longest}"], np.nan
    )[of_result]
    per_query |= _aucs(model, task)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "per_query.npz").open("wb") as opened:
        np.savez(opened, **dict[str, Any](per_query))
    measured = {
        "summary": result.summary(),
        "num_epochs": training.best_epoch,
        "seconds": training.seconds,
        "history": training.history,
        "notes": notes,
    }
    # Written last, and at once: a plan with a result is done.
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(measured))
    os.replace(partial, folder / "result.json")
    return measured


def _aucs(model: TwoTowerModel, task: _Task) -> dict[str, np.ndarray]:
    encoder = QueryEncoder(model, task.corpus.query_ids, task.corpus.candidate_ids)
    queries = encoder(task.test_queries.as_queries())
    candidates = model.embed_corpus()
    return {
        name: auc_per_query(queries, candidates, task.positive_rows, rows)
        for name, rows in task.others.items()
        if rows is not None
    }


def _rows(results: Mapping[str, dict[str, Any]], config: RunConfig) -> list[PlanRow]:
    """Sets every plan against the reference, query by query."""
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
) -> Comparison:
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
    return Comparison(folder, rows, table, notes)


def _jsonable(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()}
