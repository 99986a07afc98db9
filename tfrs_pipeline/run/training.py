"""The trainings of a run: made, read back, and used as a start by another run."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from tfrs_pipeline.config import RunConfig, with_settings
from tfrs_pipeline.data.held_out_queries import Holdout
from tfrs_pipeline.data.log import Log, Split
from tfrs_pipeline.durable import read_record
from tfrs_pipeline.evaluation.baselines import Ials
from tfrs_pipeline.evaluation.evaluate import Truth
from tfrs_pipeline.messages import counted
from tfrs_pipeline.model.bonus_choice import item_graph
from tfrs_pipeline.model.checkpoints import read_epoch
from tfrs_pipeline.model.corpus import Corpus, TrainingSet
from tfrs_pipeline.model.ensemble import FittedSum, Model
from tfrs_pipeline.model.fitted_model import Fitted, FittedTwoTower, query_encoder
from tfrs_pipeline.model.ials import FittedIals
from tfrs_pipeline.model.optimizer import make_optimizer
from tfrs_pipeline.model.two_tower import TwoTower
from tfrs_pipeline.model.warm_start import WarmStart
from tfrs_pipeline.run.data import RunData
from tfrs_pipeline.run.folder import MODEL, RunFolder
from tfrs_pipeline.run.plans import IALS, Ensemble, ensemble_in, ensemble_of, models_of, training_in
from tfrs_pipeline.run.steps import RunContext, Step
from tfrs_pipeline.search.history_bonus import HistoryBonus

Training: TypeAlias = Literal["selection", "refit"]
AnyModel = TypeVar("AnyModel", FittedTwoTower, FittedSum)


def training_step(name: str, path: str, train: Callable[..., Model], *reads: str) -> Step:
    """Returns the step that trains a model of a run or a comparison, kept at a path in its folder.

    `train` is called with the runner, the samples and what else the step reads. It resumes after
    the last whole epoch in the folder, which may be that of the refit.
    """
    notes = attrgetter("notes")
    return Step(
        f"train {name}", ("samples", *reads), name, train, path, describe=notes, workers="all"
    )


def train_model(
    run: RunContext, samples: RunData, race: Mapping[str, Any] | None = None, *, name: str = MODEL
) -> Model:
    """Trains a model of a run, by the record of its race if there is one."""
    ensemble = ensemble_of(run.config, race)
    if name == MODEL and ensemble.is_sum:
        return train_ensemble(run, samples, ensemble)
    return train_member(run, samples, ensemble, name)


def check_plan(plan: TwoTower, data: TrainingSet) -> None:
    """Refuses what a training of a model on this data would refuse, before others train for hours.

    A refit need not be checked: its samples are those of the first training and more.
    """
    data.check_negatives_left(plan.hard)
    training, batches = plan.training, plan.batches(data.samples)
    make_optimizer(training, training.max_epochs * batches.steps_per_epoch)


def check_trainings(config: RunConfig, data: TrainingSet) -> None:
    """Refuses what the trainings of a run without a race would refuse, warm starts included."""
    ensemble, (model, *others) = ensemble_of(config), models_of(config)
    for name in (*(ensemble.plans if ensemble.is_sum else [model]), *others):
        plan = plan_of(with_settings(config, ensemble.training(name)[1].settings), name)
        check_plan(plan, data)
        if config.warm_start and (source := trained_in(config.warm_start, "selection", name)):
            WarmStart(source, plan, plan.training, data.corpus)


def train_and_refit(
    run: RunContext,
    samples: RunData,
    *,
    config: RunConfig,
    folder: Path,
    name: str = MODEL,
    max_epochs: int | None = None,
    has_bonus: bool = True,
) -> FittedTwoTower:
    """Chooses the number of epochs on validation, then trains on all events before the test.

    The model's `result` is that of the first training; its `notes` describe both.

    Args:
        run: Reports progress; its settings are not read.
        samples: The data of the run.
        config: Settings of the training.
        folder: Where both trainings are kept.
        name: Name of the model.
        max_epochs: Most epochs of the first training; None is the settings' number.
        has_bonus: Whether validation chooses a bonus.
    """
    source = config.warm_start

    def fit(step: Training, max_epochs: int) -> FittedTwoTower:
        is_first = step == "selection"
        task = f"{name}, {step}"
        return plan_of(config, name).fit_samples(
            samples.selection if is_first else samples.final,
            samples.validation if is_first else None,
            max_epochs=max_epochs,
            # The source's first training has seen nothing that validates here.
            warm_start=None if source is None else trained_in(source, step, name),
            folder=folder / step,
            exclude=config.evaluation.exclude,
            cutoffs=config.evaluation.cutoffs,
            tell=lambda done, line: run.progress.task(task, done, max_epochs, line),
        )

    model = fit("selection", max_epochs or config.training.max_epochs)
    # The second training has no validation, so this one's curves and its bonus are kept.
    chosen, bonus = model.result, None
    if has_bonus:
        bonus = model.with_bonus(samples.validation, config.evaluation.exclude, config.seed).bonus
    notes = [] if source is None else list(_about_source(source, name, samples))
    monitor = config.training.monitor
    monitored = chosen.history[f"val_{monitor}"]
    notes.append(
        f"best validation {monitor} {max(monitored):.4f} after epoch "
        f"{chosen.best_epoch} of {len(monitored)}"
    )
    if samples.has_refit:
        del model  # One network at a time.
        # No validation stops it, so it trains for as many epochs as were best above.
        model = fit("refit", chosen.best_epoch)
        epochs = counted(chosen.best_epoch, "epoch")
        notes.append(f"trained again on training and validation positives for {epochs}")
    notes += model.notes
    return _with_bonus(dataclasses.replace(model, result=chosen, notes=notes), bonus, samples.split)


def _with_bonus(model: AnyModel, bonus: HistoryBonus | None, split: Split) -> AnyModel:
    """Adds a bonus to a model that is tested: neighbours are those of all events before the test.

    They need no training, so a service has them too.
    """
    if bonus is None:
        return model
    notes = model.notes + list(bonus.notes)
    if bonus.neighbours is not None:
        ids = model.query_ids, model.candidate_ids
        graph = item_graph(split.before_test, *ids, bonus.neighbours.kind)
        bonus = dataclasses.replace(bonus, graph=graph)
    return dataclasses.replace(model, bonus=bonus, notes=notes)


def train_member(
    run: RunContext, samples: RunData, ensemble: Ensemble, name: str, *, has_bonus: bool = True
) -> FittedTwoTower:
    """Trains a model of a run by its plan; see `train_and_refit`."""
    path, plan = ensemble.training(name)
    return train_and_refit(
        run,
        samples,
        config=with_settings(run.config, plan.settings),
        folder=run.folder.checkpoints / path,
        name=name,
        max_epochs=plan.epochs,
        has_bonus=has_bonus,
    )


def train_ensemble(run: RunContext, samples: RunData, ensemble: Ensemble) -> FittedSum:
    """Trains each member of a sum as `train_and_refit` does, and sums them.

    A member that comes from a race trains for as many epochs as in the race, because these decided
    its weight; iALS is fitted anew. The queries of validation give the scales and the rotation of
    the sum.
    """
    config = run.config
    queries = queries_of(config, samples.validation).queries

    def fit(data: RunData, *, is_tested: bool) -> FittedSum:
        members: dict[str, Fitted] = {}
        notes: list[str] = []
        for name in ensemble.weights:
            if name == IALS:
                run.progress.task(name, 0, 0)
                members[name] = FittedIals.fit(Ials(seed=config.seed), data.final.log)
                notes.append(f"{name}: fitted anew; an item without a positive has the vector 0")
                continue
            # The first member has a bonus, for its own test.
            has_bonus = is_tested and not members
            model = train_member(run, data, ensemble, name, has_bonus=has_bonus)
            members[name] = model
            bonus_notes = () if model.bonus is None else model.bonus.notes
            notes += [f"{name}: {note}" for note in model.notes if note not in bonus_notes]
        return dataclasses.replace(FittedSum.of(members, ensemble.weights, queries), notes=notes)

    # The sum of the first trainings, which have not seen validation, chooses the bonus.
    selection = dataclasses.replace(samples, final=samples.selection)
    first = fit(selection, is_tested=not samples.has_refit)
    bonus = first.with_bonus(samples.validation, config.evaluation.exclude, config.seed).bonus
    tested = fit(samples, is_tested=True) if samples.has_refit else first
    return _with_bonus(tested, bonus, samples.split)


def queries_of(config: RunConfig, validation: Holdout) -> Truth:
    """Returns the queries of validation by which epochs and sums are chosen."""
    sample = validation.sample(config.training.validation_users, config.seed)
    return Truth.of(sample, config.evaluation.exclude)


def trainings_of(name: str, model: Model) -> dict[str, Any]:
    """Returns the trainings behind a model by name: its own, and those of the members of a sum."""
    members = model.members.items() if isinstance(model, FittedSum) else ()
    trained = {member: x for member, x in members if not isinstance(x, FittedIals)}
    return {name: model, **trained}


def plan_of(config: RunConfig, name: str) -> TwoTower:
    """Returns the unfitted model of a config."""
    return TwoTower(**dict(config.model), training=config.training, seed=config.seed, name=name)


def trained_in(
    folder: Path | str, step: Training = "refit", name: str = "two_tower"
) -> FittedTwoTower | None:
    """Reads a model that a finished run has trained, to start another training from it.

    Args:
        folder: The run's folder.
        step: "selection", the training that validation ended, or "refit", the training on all
            events before the test; if there was no second training, it means the first.
        name: Name of the model; None is returned if the run trained no model of this name.

    Raises:
        ValueError: If the run is unfinished, or its model is a sum and no member is named.
        Damaged: If a file has changed since the run wrote it.

    Example:
        A model for today's events that starts from yesterday's run::

            plan.fit(train, validation, warm_start=trained_in("runs/yesterday"))
    """
    run = RunFolder(Path(folder))
    if name == MODEL and (ensemble := ensemble_in(run.path)).is_sum:
        raise ValueError(
            f"The model of {run.path} is a sum, of which each member starts a training by itself: "
            f"give name, one of {', '.join(ensemble.plans)}"
        )
    if (found := training_in(run.path, name)) is None:
        return None
    (checkpoints, plan), record = found, run.results()["training"][name]
    config = with_settings(run.settings(), plan.settings)
    if not (checkpoints / step).is_dir():  # Without a second training, the first is the last.
        step = "selection"
    split = split_in(run)
    log, part = (split.train, "selection") if step == "selection" else (split.before_test, "final")
    samples = run.samples / part
    read_record(samples / "report.json")  # Checks the files that ids are read from.
    corpus = Corpus.read(log, samples)
    if config.warm_start is not None:  # As in its training.
        corpus = dataclasses.replace(corpus, is_later=None)
    network = plan_of(config, name).build(corpus)
    result = read_epoch(network, config.training, checkpoints / step, record["best_epoch"])
    encoder = query_encoder(network, corpus)
    model = FittedTwoTower(config.model, config.training, corpus, network, encoder, result, log)
    bonus = record["bonus"] and HistoryBonus.read(record["bonus"], None)
    return _with_bonus(model, bonus, split)


def split_in(folder: RunFolder) -> Split:
    """Reads the split of a run's log; raises `Damaged` if a file of either has changed."""
    read_record(folder.split.with_suffix(".json"))  # Checks the file of the split.
    return Split.read(Log.read(folder.data), folder.split)


def _about_source(path: Path, name: str, data: RunData) -> Iterator[str]:
    """Describes where a model started, and warns if its source has seen held-out events."""
    if (found := training_in(path, name)) is None:
        yield f"started from random weights: {path} has no {name}"
        return
    yield f"started from {path}"
    source = split_in(RunFolder(path))
    if not data.split.kind == source.kind == "time":
        return
    final = source.before_test if (found[0] / "refit").is_dir() else source.train
    for log, part in ((source.train, "validation"), (final, "test")):
        last = log.events["timestamp"].max().to_pyarrow().as_py()
        held_out = data.split.events.filter(data.split.events["part"] == part)
        first = held_out["timestamp"].min().to_pyarrow().as_py()
        if first is not None and last >= first:
            yield (
                f"    which was trained on events up to {last:%Y-%m-%d %H:%M}, but {part} "
                f"begins {first:%Y-%m-%d %H:%M}: its metrics are too good"
            )
