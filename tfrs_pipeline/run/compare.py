"""Compares ways of training on the user's own data: models in Python, a config's sampling plans."""

import dataclasses
import functools
import hashlib
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

from tfrs_pipeline.cluster import this_worker
from tfrs_pipeline.config import EvaluationConfig, RunConfig, with_settings
from tfrs_pipeline.data.holdout import Holdout
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import Exclude
from tfrs_pipeline.durable import hold_to
from tfrs_pipeline.evaluation.evaluate import evaluate
from tfrs_pipeline.evaluation.results import Evaluation, joined
from tfrs_pipeline.messages import (
    SILENT,
    Progress,
    check_integer,
    counted,
    written,
)
from tfrs_pipeline.model.corpus import MADE_OF_FILE, TrainingSet
from tfrs_pipeline.model.fit import TrainingResult
from tfrs_pipeline.model.two_tower import TwoTower
from tfrs_pipeline.negatives.kinds import (
    FunnelLosers,
    InBatch,
    Popularity,
    SamplingFrame,
    Uniform,
)
from tfrs_pipeline.run.comparison import Comparison
from tfrs_pipeline.run.data import RunData, data_steps
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.measure import evaluate_all
from tfrs_pipeline.run.steps import Runner, Step
from tfrs_pipeline.run.training import check_plan, fit_once, plan_of, training_step
from tfrs_pipeline.settings import ConfigError

Plan: TypeAlias = Mapping[str, Any]
"""A way of choosing negatives: the settings that it changes in the config, by dotted name."""

# Hard negatives that a row draws, in plans of one stage and of several.
NUM_HARD = 8


Measured: TypeAlias = tuple[Evaluation, TrainingResult]
"""What a training of a plan comes to."""


def compare(
    train: Log,
    validation: Holdout | None,
    test: Holdout,
    *,
    plans: Mapping[str, TwoTower],
    seeds: int = 1,
    seed: int = 0,
    exclude: Exclude = "clicked",
    cutoffs: Sequence[int] = (20, 100),
    folder: Path | str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Trains models with the same seeds, and compares them with the first one on a test.

    The difference of two models is computed for each seed and for each user, since a hard user is
    hard for both. The result has the mean over the seeds with its standard error, and an interval
    over the users.

    Args:
        train: The training part.
        validation: Chooses each model's epoch; None trains all epochs.
        test: What is measured.
        plans: Models by name, the reference first. They may differ in any setting or part.
        seeds: How many times each is trained; one says nothing about the seed's effect.
        seed: The first seed, in place of the models' own; the next ones count on from it.
        exclude: What is excluded from a user's ranking.
        cutoffs: Values of k.
        folder: Keeps samples and trainings, so that a stopped comparison can resume, and gets the
            files that `tfrs-pipeline compare` writes; None is temporary.
        progress: Told about epochs; None writes them to a notebook's cell, or to standard error if
            it is a terminal.

    Raises:
        ConfigError: If a cutoff is below 1.
        TypeError: If a plan is not a `TwoTower`.
        ValueError: If there is no plan or no seed, the folder holds other trainings, or one of the
            models cannot train on this log.

    Example:
        A correction against none, in three seeds::

            plans = {"mixture": tp.TwoTower(), "none": tp.TwoTower(correction="none")}
            print(tp.compare(*log.split("last_share"), plans=plans, seeds=3))
    """
    check_integer(1, seeds=seeds)
    if not plans or not all(isinstance(plan, TwoTower) for plan in plans.values()):
        raise TypeError(f"plans must be models by name, one or more TwoTower. Received: {plans!r}")
    asked = EvaluationConfig(exclude=exclude, cutoffs=tuple(cutoffs))
    with ExitStack() as stack:
        place = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        told, data = progress or written(), dict[FunnelLosers | None, TrainingSet]()
        for hard in dict.fromkeys(plan.losers for plan in plans.values()):
            name = f"samples-{hashlib.sha256(repr(hard).encode()).hexdigest()[:8]}"
            data[hard] = TrainingSet.build(train, place / name, seed=seed, hard=hard)
        for plan in plans.values():  # All can train, before the first one does.
            check_plan(plan, data[plan.losers])

        def one(name: str, number: int) -> Measured:
            plan, kept = plans[name], place / "plans" / quote(name, safe=" ") / f"seed-{number}"
            plan, samples = plan.model_copy(update={"seed": number}), data[plan.losers]
            kept.mkdir(parents=True, exist_ok=True)
            hold_to(kept / MADE_OF_FILE, plan.made_of(train, validation, exclude))
            model = fit_once(
                plan,
                asked,
                samples,
                validation,
                task=lambda: _label(name, number, seeds),
                max_epochs=plan.training.max_epochs,
                folder=kept,
                progress=told,
            )
            found = evaluate({name: model}, test, exclude=exclude, cutoffs=asked.cutoffs)
            return found, model.result

        by_seed, trainings = _measured(plans, range(seed, seed + seeds), one)
        settings = {
            name: {x: getattr(plan, x) for x in sorted(plan.model_fields_set - {"name", "seed"})}
            for name, plan in plans.items()
        }
        monitor = next(iter(plans.values())).training.monitor
        comparison = Comparison(by_seed, trainings, settings, monitor)
        if folder is not None:
            comparison.write(place)
        return comparison


def compare_plans(
    config: RunConfig, folder: Path, *, progress: Progress = SILENT, begun: Runner | None = None
) -> Comparison:
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
        data: RunData = runner.artifacts["samples"]
        seeds = range(config.seed, config.seed + config.compare.seeds)

        def one(name: str, seed: int) -> Measured:
            # The data is the same for all seeds.
            planned = _planned(config, {**plans[name], "seed": seed}, data)
            label = _label(name, seed, len(seeds))
            model = runner.run([training_step(label, planned, place, f"plans/{name}/seed-{seed}")])
            del runner.artifacts[label]  # One network at a time.
            return evaluate_all(config, {name: model}, data, runner.progress.task), model.result

        by_seed, trainings = _measured(
            dict.fromkeys([config.compare.reference, *plans]), seeds, one
        )
        most = _max_epochs(config, data)
        done = {x.num_epochs for by_plan in trainings.values() for x in by_plan.values()}
        if done == {most} and most < config.training.max_epochs:
            ended = f"compare.max_steps ended every plan after {counted(most, 'epoch')}"
            notes.append(f"{ended}: each might still have gained")
        comparison = Comparison(by_seed, trainings, plans, config.training.monitor, notes)
        comparison.write(folder)
        return comparison


def _label(name: str, seed: int, num_seeds: int) -> str:
    """Names a training for people; also a name that TensorFlow takes."""
    return name if num_seeds == 1 else f"{name}/seed_{seed}"


def _measured(
    names: Iterable[str], seeds: Iterable[int], one: Callable[[str, int], Measured]
) -> tuple[dict[int, Evaluation], dict[str, dict[int, TrainingResult]]]:
    """Trains and measures each plan with each seed: all plans with the first one, and so on."""
    by_seed, trainings = {}, {name: dict[int, TrainingResult]() for name in names}
    for seed in seeds:
        found = []
        for name, by_plan in trainings.items():
            evaluation, by_plan[seed] = one(name, seed)
            found.append(evaluation)
        by_seed[seed] = joined(found)
    return by_seed, trainings


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
        check_plan(plan_of(_planned(config, plan, data), "two_tower"), data.selection)
    runner.note(f"{counted(len(plans), 'plan')}: {', '.join(plans)}", *notes)
    return plans, notes


def _planned(config: RunConfig, plan: Plan, data: RunData) -> RunConfig:
    return with_settings(config, {**plan, "training.max_epochs": _max_epochs(config, data)})


def _max_epochs(config: RunConfig, data: RunData) -> int:
    if config.compare.max_steps is None:
        return config.training.max_epochs
    num = len(data.selection.samples)
    steps_per_epoch = max(1, round(num / config.training.fitting(num).batch_size))
    return math.ceil(config.compare.max_steps / steps_per_epoch)


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
        made = {name: {**common, **plan} for name, plan in found.items()}
        plans |= {name: plan for name, plan in made.items() if plan not in plans.values()}
        notes += [note] if note else []
    return plans, notes


def _plans_of_kind(
    kind: str, config: RunConfig, logged: Sequence[str]
) -> tuple[dict[str, Plan], str]:
    """Returns the plans of a kind, one for each of its values, and a note if it is missing."""
    # Every plan but in-batch has as many shared columns as the config's mixture.
    frame = SamplingFrame.of_counts([0, 1], config.training.batch_size)
    num = round(sum(shared.expected_count(frame).sum() for shared in config.model.negatives))
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
        kind if kind == "hybrid_50_50" else f"{name}_{share:g}": {
            "model.hard": dataclasses.replace(losers, share=share)
        }
        for share in shares
    }, ""
