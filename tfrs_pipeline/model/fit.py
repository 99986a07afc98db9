"""Training: early stopping on the validation metric, budget, resume, diagnostics."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tfrs_pipeline.model.optimizer import Decay, OptimizerName, make_optimizer
from tfrs_pipeline.model.two_tower import TwoTowerModel
from tfrs_pipeline.negatives.batches import TrainingBatches

logger = logging.getLogger(__name__)


class BeforeEpochs(Protocol):
    """Prepares the batches for the next `every` epochs, such as by mining hard negatives.

    Attributes:
        every: Epochs that one preparation lasts, 1 or more.
    """

    every: int

    def prepare(self, model: TwoTowerModel, epoch: int) -> None:
        """Prepares the batches.

        Args:
            model: As trained so far: by `epoch` epochs, or by some more where a stopped run goes on
                between two preparations; what was prepared then must be kept for that.
            epoch: Epochs done when the preparation is due: 0, `every`, twice `every`, ...
        """
        ...


@dataclass(frozen=True)
class TrainingResult:
    """What `train` did.

    Args:
        history: Per logged name, one value an epoch.
        best_epoch: Epochs after which the kept weights were reached, counted from 1.
        seconds: Wall time, validation included, earlier parts of a resumed run included.
    """

    history: dict[str, list[float]]
    best_epoch: int
    seconds: float


def train(
    model: TwoTowerModel,
    batches: TrainingBatches,
    *,
    max_epochs: int,
    optimizer: OptimizerName = "lazy_adam",
    learning_rate: float = 0.002,
    warmup_steps: int = 0,
    decay: Decay = "none",
    decay_to: float = 0.0,
    decay_epochs: int | None = None,
    validation: tf.data.Dataset | None = None,
    monitor: str = "ndcg@100",
    patience: int = 3,
    max_seconds: float | None = None,
    before_epochs: BeforeEpochs | None = None,
    checkpoint_folder: Path | None = None,
    tensorboard_folder: Path | None = None,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainingResult:
    """Trains a model and leaves it with its best weights.

    A batch and the dropout are functions of (seed, step), so that a run that was stopped goes on
    from its last whole epoch and ends as an unbroken one would have.

    Args:
        model: Compiled here.
        batches: Training batches.
        max_epochs: Epochs at most; exactly, without validation.
        optimizer: "adagrad", "adam" or "lazy_adam".
        learning_rate: Step size; with a warm-up or a decay, its peak.
        warmup_steps: Steps of a linear warm-up (see `WarmupDecay`).
        decay: "none", "cosine" or "linear", after the warm-up.
        decay_to: Share of the peak that the decay ends at.
        decay_epochs: Epochs whose steps the decay goes over; None is `max_epochs`. A second
            training for the number of epochs that a first one chose needs the first one's
            `max_epochs`: then epoch e has the same step sizes in both, which is what was chosen. A
            decay squeezed into fewer epochs would be another training, that nothing has validated.
        validation: `evaluation_batches`, or None to train `max_epochs` and keep the last weights.
        monitor: Validation metric to maximise, such as "ndcg@100".
        patience: Epochs without a better value before training stops.
        max_seconds: No epoch is begun once training has taken this long, validation and earlier
            parts of a resumed run included.
        before_epochs: Called before the first epoch and every few epochs from then on.
        checkpoint_folder: Where every epoch is saved and a stopped run is resumed from.
        tensorboard_folder: Where event files for TensorBoard are written; None writes none.
        on_epoch: Called after each epoch with its number, from 1, and its logs.

    Returns:
        The history, the best epoch and the time.

    Raises:
        ValueError: If `monitor` is not a metric of the model, or the warm-up leaves no step for the
            decay.
    """
    if validation is not None and monitor not in model.ranking_metric_names:
        raise ValueError(
            f"Cannot monitor '{monitor}': evaluate() reports {model.ranking_metric_names}. "
            "Add its cutoff to evaluation.cutoffs or choose one of these."
        )
    steps = batches.steps_per_epoch
    model.compile(
        optimizer=make_optimizer(
            optimizer,
            learning_rate,
            num_steps=(decay_epochs or max_epochs) * steps,
            warmup_steps=warmup_steps,
            decay=decay,
            decay_to=decay_to,
        )
    )
    model.optimizer.build(model.trainable_variables)
    keeper = _BestEpoch(
        f"val_{monitor}" if validation is not None else None,
        patience=patience,
        max_seconds=max_seconds,
        folder=checkpoint_folder,
        on_epoch=on_epoch,
    )
    first_epoch = keeper.restore(model)
    if first_epoch and first_epoch < max_epochs:
        logger.info("training: resuming after epoch %d", first_epoch)
    callbacks: list[tf.keras.callbacks.Callback] = [keeper]
    if tensorboard_folder is not None:
        # Before the keeper: an epoch that counts as done has its events.
        callbacks.insert(0, _EventFiles(tensorboard_folder, batches))
    keeper.start_clock()
    epoch = first_epoch
    while epoch < max_epochs and not keeper.is_over:
        until = max_epochs
        if before_epochs is not None:
            due = epoch - epoch % before_epochs.every
            before_epochs.prepare(model, due)
            until = min(due + before_epochs.every, max_epochs)
        model.fit(
            batches.dataset(epoch * steps, (until - epoch) * steps),
            initial_epoch=epoch,
            epochs=until,
            steps_per_epoch=steps,
            validation_data=validation,
            callbacks=callbacks,
            verbose=0,
        )
        epoch = until
    keeper.keep_best(model)
    return TrainingResult(keeper.history, keeper.best_epoch, keeper.seconds)


class _EventFiles(tf.keras.callbacks.Callback):
    """Writes each epoch's logs, step size and diagnostics for TensorBoard."""

    def __init__(self, folder: Path, batches: TrainingBatches) -> None:
        super().__init__()
        self._folder = folder
        self._batches = batches
        self._writer: tf.summary.SummaryWriter | None = None

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(str(self._folder))
        model = self.model
        last_step = (epoch + 1) * self._batches.steps_per_epoch - 1
        scalars: dict[str, Any] = {
            "learning_rate": model.optimizer.learning_rate,
            **{name.replace("val_", "validation/"): x for name, x in (logs or {}).items()},
            **model.diagnose(self._batches.batch(tf.constant(last_step, tf.int64))),
        }
        with self._writer.as_default():
            for name, value in scalars.items():
                tf.summary.scalar(name, float(value), step=epoch + 1)
        self._writer.flush()


class _BestEpoch(tf.keras.callbacks.Callback):
    """Early stopping that remembers the best weights, and saves itself after each epoch."""

    def __init__(
        self,
        monitor: str | None,
        *,
        patience: int,
        max_seconds: float | None,
        folder: Path | None,
        on_epoch: Callable[[int, dict[str, float]], None] | None,
    ) -> None:
        super().__init__()
        self._monitor = monitor
        self._patience = patience
        self._max_seconds = max_seconds
        self._folder = folder
        self._on_epoch = on_epoch
        self._best_weights: list[np.ndarray] | None = None
        self._started = 0.0
        self._seconds_before = 0.0
        self.history: dict[str, list[float]] = {}

    @property
    def best_epoch(self) -> int:
        values = self.history.get(self._monitor or "loss", [])
        if self._monitor is None:
            return len(values)
        return int(np.argmax(values)) + 1 if values else 0

    @property
    def is_over(self) -> bool:
        """Whether patience or the time has run out."""
        num_epochs = len(self.history.get("loss", []))
        if self._max_seconds is not None and num_epochs and self.seconds >= self._max_seconds:
            return True
        return self._monitor is not None and num_epochs - self.best_epoch >= self._patience

    @property
    def seconds(self) -> float:
        return self._seconds_before + (time.monotonic() - self._started if self._started else 0.0)

    def start_clock(self) -> None:
        self._started = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        for name, value in (logs or {}).items():
            self.history.setdefault(name, []).append(float(value))
        if self._monitor is None or self.best_epoch == epoch + 1:
            self._best_weights = self.model.get_weights()
        if self._folder is not None:
            self._save(self.model, epoch + 1)
        if self.is_over:
            self.model.stop_training = True
        if self._on_epoch is not None:
            self._on_epoch(epoch + 1, dict(logs or {}))

    def keep_best(self, model: TwoTowerModel) -> None:
        self._seconds_before, self._started = self.seconds, 0.0
        if self._best_weights is not None:
            model.set_weights(self._best_weights)

    def restore(self, model: TwoTowerModel) -> int:
        """Loads the last saved epoch into the model and returns its number, 0 if there is none."""
        if self._folder is None or not (self._folder / "state.json").exists():
            return 0
        state = json.loads((self._folder / "state.json").read_text())
        epoch = state["epoch"]
        self.history, self._seconds_before = state["history"], state["seconds"]
        best = tf.train.Checkpoint(model=model)
        best.read(str(self._folder / f"epoch-{self.best_epoch}")).expect_partial()
        self._best_weights = model.get_weights()
        last = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        last.read(str(self._folder / f"epoch-{epoch}")).assert_existing_objects_matched()
        return epoch

    def _save(self, model: TwoTowerModel, epoch: int) -> None:
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        checkpoint.write(str(self._folder / f"epoch-{epoch}"))
        state = {"epoch": epoch, "history": self.history, "seconds": self.seconds}
        # state.json names the epoch that counts: it is replaced once the checkpoint is whole.
        partial = self._folder / "state.json.partial"
        partial.write_text(json.dumps(state))
        os.replace(partial, self._folder / "state.json")
        keep = {epoch, self.best_epoch}
        for file in self._folder.glob("epoch-*"):
            if int(file.name.split("-")[1].split(".")[0]) not in keep:
                file.unlink()
