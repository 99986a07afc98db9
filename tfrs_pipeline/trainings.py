"""The trainings of a run: the model's, and those of the baselines that it is compared with."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.data.split import Holdout
from tfrs_pipeline.evaluation.baselines import Ease, Ials, MostPopular
from tfrs_pipeline.evaluation.evaluate import evaluate
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.model.settings import TwoTowerSettings
from tfrs_pipeline.model.two_tower import OnProgress, TwoTower
from tfrs_pipeline.retrieval import Retriever
from tfrs_pipeline.run_data import RunData


def train_and_refit(
    config: RunConfig,
    data: RunData,
    *,
    settings: TwoTowerSettings | None = None,
    max_epochs: int | None = None,
    max_seconds: float | None = None,
    folder: Path | None = None,
    name: str = "two_tower",
    on_progress: OnProgress = lambda task, done, total: None,
) -> TwoTower:
    """Chooses the number of epochs on validation, then trains on all that precedes the test.

    Args:
        config: Of the run; `training.refit` says whether there is a second training.
        data: Split and samples.
        settings: Of the model, instead of the config's own.
        max_epochs: Instead of the config's own.
        max_seconds: After this time the first training begins no epoch.
        folder: Where both trainings are kept, to be resumed if stopped.
        name: Of the model.
        on_progress: As in `run`.

    Returns:
        The model; its `result` is that of the first training, and its `notes` tell of both.
    """
    training = config.training
    if max_epochs is not None:
        training = training.model_copy(update={"max_epochs": max_epochs})

    def fit(
        samples: TrainingSet, step: str, max_epochs: int, validation: Holdout | None
    ) -> TwoTower:
        model = TwoTower(settings or config.model, training=training, seed=config.seed, name=name)
        return model.fit_samples(
            samples,
            validation,
            max_epochs=max_epochs,
            max_seconds=max_seconds if validation else None,
            folder=None if folder is None else folder / step,
            exclude=config.evaluation.exclude,
            cutoffs=config.evaluation.cutoffs,
            on_epoch=lambda epoch, logs: on_progress(f"{name}, {step}", epoch, max_epochs),
            on_progress=on_progress,
            log=data.split.train,
        )

    model = fit(data.selection, "selection", training.max_epochs, data.validation)
    chosen = model.result
    monitored = chosen.history[f"val_{training.monitor}"]
    notes = [
        f"best validation {training.monitor} {max(monitored):.4f} after "
        f"{chosen.best_epoch} of {len(monitored)} epochs"
    ]
    if data.final is not data.selection:
        model = fit(data.final, "refit", chosen.best_epoch, None)
        notes.append(
            f"trained again on training and validation positives for {chosen.best_epoch} epochs"
        )
        model.result = chosen
    model.notes = [*notes, *model.notes]
    return model


def fit_baselines(
    config: RunConfig,
    data: RunData,
    *,
    on_progress: OnProgress = lambda task, done, total: None,
) -> tuple[dict[str, Retriever], list[str]]:
    """Fits the baselines of a config, their settings chosen on validation where it lists several.

    Args:
        config: Of the run; `evaluation` lists the baselines and their settings.
        data: Split and queries.
        on_progress: As in `run`.

    Returns:
        The baselines by name, and notes on what was chosen and what was skipped.
    """
    settings = config.evaluation
    final = data.split.before_test if config.training.refit else data.split.train
    grids: dict[str, list[Any]] = {
        "popularity": [MostPopular()],
        "ease": [Ease(l2=l2) for l2 in settings.ease_l2],
        "ials": [
            Ials(regularization=regularization, alpha=alpha, seed=config.seed)
            for regularization, alpha in itertools.product(
                settings.ials_regularization, settings.ials_alpha
            )
        ],
    }
    num_items = len(data.test.candidate_ids)
    found: dict[str, Retriever] = {}
    notes = []
    for name in settings.baselines:
        if name == "ease" and num_items > Ease.max_candidates:
            notes.append(
                f"ease: skipped, it inverts a matrix of items by items, and {num_items:,} items "
                f"are more than {Ease.max_candidates:,}"
            )
        if name == "uncorrected" or (name == "ease" and num_items > Ease.max_candidates):
            continue
        grid, scores = grids[name], []
        for i, baseline in enumerate(grid if len(grid) > 1 else []):
            on_progress(f"{name}, choosing on validation", i, len(grid))
            measured = evaluate(
                baseline.fit(data.split.train),
                data.validation,
                exclude=settings.exclude,
                cutoffs=settings.cutoffs,
                num_bootstrap=0,
            )
            scores.append(measured.first.overall.intervals[config.training.monitor].mean)
        best = grid[int(np.argmax(scores))] if scores else grid[0]
        found[name] = best.fit(final)
        if scores:
            notes.append(f"{name}: {best!r}, best of {len(grid)} on validation")
    return found, notes
