"""The trainings of a run: the epochs are chosen on validation, then the model is trained again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, TypeAlias

from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.data.holdout import Holdout
from tfrs_pipeline.data.log import Log, Split
from tfrs_pipeline.durable import read_record
from tfrs_pipeline.messages import counted
from tfrs_pipeline.model.batching import make_batches
from tfrs_pipeline.model.corpus import Corpus, TrainingSet
from tfrs_pipeline.model.fit import TrainingResult, optimizer_of, read_epoch
from tfrs_pipeline.model.fitted import FittedTwoTower
from tfrs_pipeline.model.notes import OnProgress, describe_epoch, describe_steps
from tfrs_pipeline.model.queries import QueryEncoder
from tfrs_pipeline.model.settings import TrainingSettings, TwoTowerSettings
from tfrs_pipeline.model.two_tower import TwoTower
from tfrs_pipeline.model.warm_start import shape_problems
from tfrs_pipeline.run.data import RunData
from tfrs_pipeline.run.folder import METRICS_FILE, read_settings
from tfrs_pipeline.settings import ConfigError, refuse

Training: TypeAlias = Literal["selection", "refit"]


def trained_in(
    folder: Path | str, step: Training = "refit", name: str = "two_tower"
) -> FittedTwoTower | None:
    """Reads a model that a finished run has trained, to start another training from it.

    Args:
        folder: The run's folder.
        step: "selection", the training that validation ended, or "refit", the training on all
            that precedes the test; without a second training, it is the first.
        name: Name of the model.

    Returns:
        The fitted model, with its optimizer state; None if the run trained no model of the name.

    Raises:
        ConfigError: If the run is not finished.
        Damaged: If a file is not as the run wrote it.

    Example:
        A model of today's events that starts from yesterday's run::

            plan.fit(train, validation, warm_start=trained_in("runs/yesterday"))
    """
    folder = Path(folder)
    config = _settings_of_finished(folder)
    trained, settings = read_record(folder / METRICS_FILE)["training"], variants(config)
    if name not in trained:
        return None
    checkpoints = folder / "checkpoints" / name
    if not (checkpoints / step).is_dir():
        step = "selection"
    split = _split_of(folder)
    part, samples = (
        (split.train, "selection") if step == "selection" else (split.before_test, "final")
    )
    corpus = Corpus.read(part, folder / "samples" / samples)
    if config.warm_start is not None:  # As it was trained.
        corpus = dataclasses.replace(corpus, is_later=None)
    plan = TwoTower(**dict(settings[name]), training=config.training, seed=config.seed, name=name)
    network, best_epoch = plan.build(corpus), trained[name]["best_epoch"]
    result = read_epoch(network, config.training, checkpoints / step, best_epoch)
    encoder = QueryEncoder.of(network, corpus)
    return FittedTwoTower(
        settings[name], config.training, corpus, network, encoder, result, log=part
    )


def variants(config: RunConfig) -> dict[str, TwoTowerSettings]:
    """Returns by name the settings of the models that a run trains."""
    found = {"two_tower": config.model}
    if "uncorrected" in config.evaluation.baselines and config.model.correction != "none":
        without = config.model.model_copy(update={"correction": "none"})
        found["two_tower_uncorrected"] = without
    return found


def check_source(config: RunConfig) -> None:
    """Refuses (`ConfigError`) a run that cannot be started from, before anything is done.

    Such a run is not finished, or its model is of another shape.
    """
    if config.warm_start is not None:
        refuse(shape_problems(_settings_of_finished(config.warm_start).model, config.model))


def _settings_of_finished(folder: Path) -> RunConfig:
    if not (folder / METRICS_FILE).is_file():
        message = f"got {str(folder)!r}, a run that is not finished: go on with it first"
        raise ConfigError([("warm_start", message)])
    return read_settings(folder)


def _split_of(folder: Path) -> Split[Log]:
    return Split.read(Log.read(folder / "data"), folder / "data" / "split.parquet")


def _about_source(folder: Path, name: str, data: RunData) -> list[str]:
    """Says where a model has started, and warns if that has seen what is held out here."""
    if not (folder / "checkpoints" / name).is_dir():
        return [f"from nothing: {folder} has no {name}"]
    notes = [f"started from {folder}"]
    source = _split_of(folder)
    if data.split.kind == source.kind == "time":
        has_refit = (folder / "checkpoints" / name / "refit").is_dir()
        final = "before_test" if has_refit else "train"
        for part, held_out in (("train", "validation"), (final, "test")):
            last = getattr(source, part).events["timestamp"].max().to_pyarrow().as_py()
            events = data.split.events
            of_part = events.filter(events["part"] == held_out)
            first = of_part["timestamp"].min().to_pyarrow().as_py()
            if first is not None and last >= first:
                notes.append(
                    f"    which was trained on events up to {last:%Y-%m-%d %H:%M}, and {held_out} "
                    f"begins {first:%Y-%m-%d %H:%M}: what it measures here is too good"
                )
    return notes


def check_trainable(data: RunData, settings: TwoTowerSettings, training: TrainingSettings) -> None:
    """Refuses what either training would, before hours of the first.

    Raises:
        DataError: If nothing is left to train on, or losers are asked for and there is none.
        ValueError: If there are too few positives for a batch, or the warm-up leaves no step for
            the decay.
    """
    for part in (data.selection, data.final):
        part.check_negatives_left(settings.hard)
        batches = make_batches(part.samples, settings, training, settings.negatives, seed=0)
        optimizer_of(training, training.max_epochs * batches.steps_per_epoch)


def train_and_refit(
    config: RunConfig,
    data: RunData,
    *,
    settings: TwoTowerSettings | None = None,
    max_epochs: int | None = None,
    max_seconds: float | None = None,
    folder: Path | None = None,
    name: str = "two_tower",
    warm_start: Path | None = None,
    on_progress: OnProgress = lambda *task: None,
) -> FittedTwoTower:
    """Chooses the number of epochs on validation, then trains on all that precedes the test.

    `training.refit` says whether there is that second training. After `max_seconds` the first one
    begins no epoch. `settings`, of the model, and `max_epochs`, where given, stand for the config's
    own.

    Both trainings are kept in `folder`, to be resumed if stopped. `warm_start` is the folder of a
    run to start from: the first training from the first one there, which has seen nothing of what
    validates here, the second from what came of the second.

    Returns the model; its `result` is that of the first training, and its `notes` tell of both.
    """
    training = config.training
    if max_epochs is not None:
        training = training.model_copy(update={"max_epochs": max_epochs})

    def fit(
        samples: TrainingSet, step: Training, max_epochs: int, validation: Holdout | None
    ) -> FittedTwoTower:
        def on_epoch(so_far: TrainingResult) -> None:
            note = describe_epoch(so_far, training.monitor, max_epochs)
            on_progress(f"{name}, {step}", so_far.num_epochs, max_epochs, note)

        def on_steps(epoch: int, done: int, total: int) -> None:
            note = describe_steps(epoch, done, total)
            on_progress(f"{name}, {step}", epoch - 1, max_epochs, note)

        plan = TwoTower(
            **dict(settings or config.model), training=training, seed=config.seed, name=name
        )
        return plan.fit_samples(
            samples,
            validation,
            max_epochs=max_epochs,
            max_seconds=max_seconds if validation else None,
            warm_start=None if warm_start is None else trained_in(warm_start, step, name),
            folder=None if folder is None else folder / step,
            exclude=config.evaluation.exclude,
            cutoffs=config.evaluation.cutoffs,
            on_epoch=on_epoch,
            on_steps=on_steps,
            on_progress=on_progress,
            log=data.split.train,
        )

    check_trainable(data, settings or config.model, training)
    model = fit(data.selection, "selection", training.max_epochs, data.validation)
    chosen = model.result
    monitored = chosen.history[f"val_{training.monitor}"]
    notes = [
        *(_about_source(warm_start, name, data) if warm_start else []),
        f"best validation {training.monitor} {max(monitored):.4f} after epoch "
        f"{chosen.best_epoch} of {len(monitored)}",
    ]
    results = [chosen]
    if data.final is not data.selection:
        model = fit(data.final, "refit", chosen.best_epoch, None)
        notes.append(
            "trained again on training and validation positives for "
            f"{counted(chosen.best_epoch, 'epoch')}"
        )
        results.append(model.result)
    notes += [
        f"resumed after epoch {result.resumed_after}"
        for result in results
        if 0 < result.resumed_after < result.num_epochs
    ]
    return dataclasses.replace(model, result=chosen, notes=[*notes, *model.notes])
