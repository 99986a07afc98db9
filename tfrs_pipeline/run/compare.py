"""Compares ways of training on the user's own data: models in Python, a config's sampling plans."""

import dataclasses
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

import numpy as np

from tfrs_pipeline.cluster import this_worker
from tfrs_pipeline.config import EvaluationConfig, RunConfig, with_settings
from tfrs_pipeline.data.held_out_queries import Holdout
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import Exclude
from tfrs_pipeline.durable import hold_to
from tfrs_pipeline.evaluation.evaluate import evaluate
from tfrs_pipeline.evaluation.results import Evaluation, joined
from tfrs_pipeline.messages import Progress, check_integer, counted, suggest, written
from tfrs_pipeline.model.checkpoints import TrainingResult
from tfrs_pipeline.model.corpus import MADE_OF_FILE, TrainingSet
from tfrs_pipeline.model.two_tower import TwoTower
from tfrs_pipeline.negatives.samplers import (
    FunnelLosers,
    InBatch,
    Popularity,
    SamplingFrame,
    Uniform,
)
from tfrs_pipeline.run.comparison import Comparison
from tfrs_pipeline.run.data import RunData, data_steps
from tfrs_pipeline.run.folder import MODEL, PLANS_FOLDER
from tfrs_pipeline.run.measure import evaluate_all
from tfrs_pipeline.run.race import forget_networks
from tfrs_pipeline.run.steps import RunContext, Step
from tfrs_pipeline.run.training import check_plan, plan_of, train_and_refit, training_step
from tfrs_pipeline.settings import ConfigError

Plan: TypeAlias = Mapping[str, Any]
"""A way of choosing negatives: the settings that it changes in the config, by dotted name."""

# Plans differ in these settings alone.
_COMMON: Plan = {
    "model.correction": "mixture",
    "model.hard": None,
    "model.resampling_exponent": 0.0,
    "training.examples": "single",  # In-batch negatives need single examples.
}
# Plan -> the settings that it changes, computed from a config and the number that ends its name.
PLANS: Mapping[str, Callable[[RunConfig, float], Plan]] = {
    # The reference: the mixture of the settings.
    "mixed": lambda config, _: {},
    "in_batch_uncorrected": lambda config, _: {
        "model.negatives": (InBatch(),),
        "model.correction": "none",
    },
    "in_batch": lambda config, _: {"model.negatives": (InBatch(),)},
    "uniform": lambda config, _: {"model.negatives": (Uniform(num_columns(config)),)},
    "popularity": lambda config, _: {"model.negatives": (Popularity(num_columns(config)),)},
    "hybrid_": lambda config, share: {
        "model.hard": dataclasses.replace(config.model.hard or FunnelLosers(), share=share)
    },
    # As many hard negatives as two stages of the plan hybrid have together.
    "exposed_": lambda config, share: {
        "model.hard": FunnelLosers(share, ("exposed",), num=8, allow_exposed=True)
    },
    "resampled_": lambda config, exponent: {"model.resampling_exponent": exponent},
}


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
        progress: Shows the epochs; None writes them to a notebook's cell, or to standard error if
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
    measured = EvaluationConfig(exclude=exclude, cutoffs=tuple(cutoffs))
    progress = progress or written()
    with ExitStack() as stack:
        path = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        data = dict[FunnelLosers | None, TrainingSet]()
        for hard in dict.fromkeys(plan.losers for plan in plans.values()):
            # Plans with the same losers share their samples.
            name = f"samples-{hashlib.sha256(repr(hard).encode()).hexdigest()[:8]}"
            data[hard] = TrainingSet.build(train, path / name, seed=seed, hard=hard)
        for plan in plans.values():  # All are checked before the first one trains for hours.
            check_plan(plan, data[plan.losers])

        def measure(name: str, number: int, label: str) -> tuple[Evaluation, TrainingResult]:
            plan = plans[name].model_copy(update={"seed": number})
            plan_folder = path / "plans" / quote(name, safe=" ") / f"seed-{number}"
            plan_folder.mkdir(parents=True, exist_ok=True)
            # Refuses checkpoints of another model, which a changed plan would continue.
            hold_to(plan_folder / MADE_OF_FILE, plan.made_of(train, validation, exclude))
            max_epochs = plan.training.max_epochs
            model = plan.fit_samples(
                data[plan.losers],
                validation,
                folder=plan_folder,
                exclude=exclude,
                cutoffs=measured.cutoffs,
                tell=lambda done, line: progress.task(label, done, max_epochs, line),
            )
            if validation is not None:  # As `TwoTower.fit` does after its training.
                model = model.with_bonus(validation, exclude, number)
            result = evaluate({name: model}, test, exclude=exclude, cutoffs=measured.cutoffs)
            return result, model.result

        settings = {
            name: {
                field: getattr(plan, field)
                for field in sorted(plan.model_fields_set - {"name", "seed"})
            }
            for name, plan in plans.items()
        }
        monitor = next(iter(plans.values())).training.monitor
        comparison = _compare(settings, range(seed, seed + seeds), measure, monitor)
        if folder is not None:
            comparison.write(path)
        return comparison


def compare_claimed(run: RunContext) -> Comparison:
    """Trains and measures every sampling plan of a config, in a claimed folder.

    A stopped comparison of the same config in the folder resumes: trained plans are measured again,
    and the unfinished one continues.

    Raises:
        ConfigError: If `warm_start` is set, or no plan is left.
        ValueError: If the data is rejected.
    """
    config = run.config
    if config.warm_start is not None:
        message = "the plans of a comparison all start from random weights; leave it out"
        raise ConfigError([("warm_start", f"got {str(config.warm_start)!r}: {message}")])
    if this_worker().count > 1:
        raise ValueError("A comparison trains in one process. Unset TF_CONFIG, or use run.")
    plans, notes = run.do(plan_steps(config))
    data: RunData = run.artifacts["samples"]
    seeds = range(config.seed, config.seed + config.compare.seeds)

    def measure(name: str, seed: int, label: str) -> tuple[Evaluation, TrainingResult]:
        # The data is the same for all seeds.
        planned = with_settings(config, {**plans[name], "seed": seed})
        path = f"{PLANS_FOLDER}/{name}/seed-{seed}"
        folder = run.folder.path / path
        train = partial(train_and_refit, config=planned, folder=folder, name=label)
        model = run.do([training_step(label, path, train)])
        del run.artifacts[label]  # One network at a time.
        return evaluate_all(config, {name: model}, data, run.progress), model.result

    comparison = _compare(plans, seeds, measure, config.training.monitor, notes)
    comparison.write(run.folder.path)
    return comparison


def _compare(
    plans: Mapping[str, Plan],
    seeds: Sequence[int],
    measure: Callable[[str, int, str], tuple[Evaluation, TrainingResult]],
    monitor: str,
    notes: Sequence[str] = (),
) -> Comparison:
    """Trains and measures all plans with the first seed, then all with the next one, and so on.

    `measure` takes the name of a plan, a seed, and a name of the training.
    """
    by_seed: dict[int, Evaluation] = {}
    trainings: dict[str, dict[int, TrainingResult]] = {name: {} for name in plans}
    for seed in seeds:
        evaluations = []
        for name in plans:
            forget_networks()
            # The name of the training in messages. TensorFlow must take it too.
            label = name if len(seeds) == 1 else f"{name}/seed_{seed}"
            evaluation, trainings[name][seed] = measure(name, seed, label)
            evaluations.append(evaluation)
        by_seed[seed] = joined(evaluations)
    return Comparison(by_seed, trainings, plans, monitor, notes)


def plan_steps(config: RunConfig) -> list[Step]:
    """Returns the steps that make the data and the plans of a comparison; they train nothing."""
    return [*data_steps(every_loser(config)), Step("plans", ("samples",), "plans", _make_plans)]


def _make_plans(run: RunContext, samples: RunData) -> tuple[dict[str, Plan], list[str]]:
    """Makes the plans, with notes; refuses a plan that cannot train before any of them trains."""
    pools = samples.final.samples.hard_pools
    logged = {stage for stage, pool in pools.items() if len(pool.values)}
    plans, notes = sampling_plans(run.config, logged)
    if not plans:
        raise ConfigError([("compare.plans", f"none is left: {'; '.join(notes)}")])
    for plan in plans.values():
        check_plan(plan_of(with_settings(run.config, plan), MODEL), samples.selection)
    run.note(f"{counted(len(plans), 'plan')}: {', '.join(plans)}", *notes)
    return plans, notes


def sampling_plans(
    config: RunConfig, logged: Iterable[str] | None = None
) -> tuple[dict[str, Plan], list[str]]:
    """Turns the plans of a config into settings by name, with notes on those that are missing.

    Args:
        config: `compare.plans` names the plans.
        logged: Stages whose losers the samples hold; None stands for all.

    Raises:
        ConfigError: If there is no such plan, or the number in its name is out of range.

    Example:
        >>> plans, _ = sampling_plans(RunConfig(compare={"plans": ["mixed", "resampled_0.3"]}))
        >>> {name: plan["model.resampling_exponent"] for name, plan in plans.items()}
        {'mixed': 0.0, 'resampled_0.3': 0.3}
    """
    plans: dict[str, Plan] = {}
    notes = []
    if config.training.examples != "single":
        notes.append("every plan is trained with training.examples 'single'")
    for name in config.compare.plans:
        # A kind and, after an underscore, a number.
        match = re.fullmatch(r"(\D+?)(\d*\.?\d+)?", name)
        kind, number = match.groups() if match else (name, None)
        if kind not in PLANS or kind.endswith("_") != (number is not None):
            message = f"got {name!r}; {suggest(kind, PLANS)} (a number follows _: hybrid_0.01)"
            raise ConfigError([("compare.plans", message)])
        plan = {**_COMMON, **PLANS[kind](config, float(number or 0))}
        losers: FunnelLosers | None = plan["model.hard"]
        if losers is not None and logged is not None:
            stages = tuple(stage for stage in losers.stages if stage in logged)
            if not stages:
                wanted = " or ".join(losers.stages)
                notes.append(
                    f"plan {name} is missing: no positive has an item of {wanted} in its request"
                )
                continue
            plan["model.hard"] = losers.of_stages(stages)
        plans[name] = plan
    return plans, notes


def every_loser(config: RunConfig) -> FunnelLosers:
    """Returns losers of every stage that any plan may need; each plan draws from its own."""
    losers = config.model.hard or FunnelLosers()
    planned = [plan["model.hard"] for plan in sampling_plans(config)[0].values()]
    stages = dict.fromkeys(stage for hard in (losers, *planned) if hard for stage in hard.stages)
    return dataclasses.replace(losers, stages=tuple(stages), allow_exposed="exposed" in stages)


def num_columns(config: RunConfig) -> int:
    """Returns how many shared columns the config's mixture gives each row.

    That is the sum of the samplers' expected counts, which is the same for every corpus.
    """
    # One candidate is enough, because the sum does not depend on the corpus.
    frame = SamplingFrame.of_counts([0, 1], config.training.batch_size)
    counts = [np.sum(kind.expected_count(frame)) for kind in config.model.negatives]
    return round(float(np.sum(counts)))
