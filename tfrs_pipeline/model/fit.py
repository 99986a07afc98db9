"""Training: early stopping on the validation metric, and what it tells the user."""

import contextlib
import functools
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias

import numpy as np
import tensorflow as tf

from tfrs_pipeline import messages
from tfrs_pipeline.batches.batch import Slices
from tfrs_pipeline.batches.hybrid import HybridBatches
from tfrs_pipeline.messages import counted
from tfrs_pipeline.model.checkpoints import (
    History,
    TrainingResult,
    last_whole_epoch,
    restore_epoch,
    save_epoch,
)
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.model.distribution import on_chief
from tfrs_pipeline.model.network import TwoTowerNetwork
from tfrs_pipeline.model.optimizer import set_optimizer
from tfrs_pipeline.model.settings import TrainingSettings, TwoTowerSettings
from tfrs_pipeline.negatives.samplers import FunnelLosers

Validate = Callable[[], dict[str, float]]


class Diverged(ValueError):
    """The loss of a training is no finite number any more."""


OnEpoch: TypeAlias = Callable[[TrainingResult], None]

Tell: TypeAlias = Callable[[int, str], None]
"""Called after each epoch, and during a long one: with the number of epochs done, and a line."""


def train(
    network: TwoTowerNetwork,
    batches: HybridBatches,
    settings: TrainingSettings,
    *,
    max_epochs: int | None = None,
    validate: Validate | None = None,
    start: Callable[[TwoTowerNetwork], None] | None = None,
    first_step: int = 0,
    folder: Path | None = None,
    callbacks: Sequence[tf.keras.callbacks.Callback] = (),
    on_epoch: OnEpoch | None = None,
    tell: Tell | None = None,
) -> TrainingResult:
    """Trains a network and leaves it with its best weights.

    A batch and its dropout depend only on (seed, step): a stopped training resumes after its last
    complete epoch and ends like an uninterrupted one.

    `validate` returns metrics by name; without it all epochs are trained, and the last is kept.
    `max_epochs` replaces the settings' number. `start` sets the weights of an untrained network; if
    they were trained before, steps count on from `first_step`. `folder` keeps the best and the last
    epoch, to resume from. `tell` gets lines for people, `on_epoch` the result so far.
    """
    steps = batches.steps_per_epoch
    last = settings.max_epochs if max_epochs is None else max_epochs
    # The decay spans all epochs of the settings, so that a refit for fewer epochs has the same
    # learning rates as the training that was validated.
    set_optimizer(network, settings, settings.max_epochs * steps, first_step)
    with contextlib.ExitStack() as stack:
        kept = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keeper = _BestEpoch(settings, last, validate, kept, folder is not None, on_epoch, tell)
        epoch = keeper.resume(network)
        if not epoch and start is not None:
            start(network)
        if epoch < last and not keeper.is_over:
            network.fit(
                _dataset_of(network, batches, epoch * steps, (last - epoch) * steps),
                initial_epoch=epoch,
                epochs=last,
                steps_per_epoch=steps,
                callbacks=[*callbacks, keeper],
                verbose=0,
            )
        keeper.keep_best(network)
    return keeper.result


def _dataset_of(
    network: tf.keras.Model, batches: HybridBatches, start_step: int, num_steps: int
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """Returns the batches of some steps; with several replicas, each gets its slices."""
    strategy = network.distribute_strategy
    if strategy.num_replicas_in_sync == 1:
        return batches.dataset(start_step, num_steps)

    def worker_slices(context: tf.distribute.InputContext) -> tf.data.Dataset:
        count = context.num_replicas_in_sync // context.num_input_pipelines
        first = context.input_pipeline_id * count
        slices = Slices(first, count, context.num_replicas_in_sync)
        endless = batches.dataset(start_step, slices=slices)
        # Without this, TensorFlow asks all replicas before each step whether they have a batch.
        return endless.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))

    return strategy.distribute_datasets_from_function(worker_slices)


@dataclass(eq=False)
class _BestEpoch(tf.keras.callbacks.Callback):
    """Stops early and keeps the best epoch in a folder; `saves_all` keeps the last one too."""

    settings: TrainingSettings
    max_epochs: int
    validate: Validate | None
    folder: Path
    saves_all: bool
    on_epoch: OnEpoch | None
    tell: Tell | None
    history: History = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        # Keras's default, False, would fetch the loss of each step, which is not read.
        self._supports_tf_logs = True
        self._started = self._last_line = self._seconds_before = 0.0
        self._resumed_after = 0

    @property
    def result(self) -> TrainingResult:
        seconds = self._seconds_before
        if self._started:
            seconds += time.monotonic() - self._started
        best_epoch = self._best_epoch(self.history)
        return TrainingResult(self.history, best_epoch, seconds, self._resumed_after)

    def _best_epoch(self, history: History) -> int:
        if self.validate is None:
            return len(history.get("loss", []))
        values = history.get(f"val_{self.settings.monitor}", [])
        # Of equal values the earliest: more epochs that gain nothing only overfit.
        return int(np.argmax(values)) + 1 if values else 0

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self.validate is not None and self.result.num_waited >= self.settings.patience

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        now = time.monotonic()
        self._started = self._started or now
        if not batch:
            self._last_line = now
        if self.tell is not None and now - self._last_line >= messages.SECONDS_BETWEEN_LINES:
            self._last_line, done = now, self.result.num_epochs
            self.tell(done, f"epoch {done + 1}: {batch + 1:,}/{self.params['steps']:,} steps")

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        # Fetched once an epoch, because a fetch waits for all steps before it.
        logs = {name: float(value) for name, value in (logs or {}).items()}
        if not math.isfinite(logs["loss"]):
            raise Diverged(
                f"The loss is {logs['loss']} after epoch {epoch + 1}: training has diverged. Lower "
                "training.learning_rate, and look for weights and features of extreme size."
            )
        # All replicas take the chief's numbers, or they might stop at different epochs.
        logs = dict(on_chief(functools.partial(self._validated, logs)))
        for name, value in logs.items():
            self.history.setdefault(name, []).append(value)
        # Without a folder to resume from, only an epoch to return to is saved.
        is_best = self.validate is not None and self.result.best_epoch == epoch + 1
        if self.saves_all or is_best:
            on_chief(lambda: save_epoch(self.folder, self.model, self.result))
        if self.is_over:
            self.model.stop_training = True
        if self.tell is not None:
            line = describe_epoch(self.result, self.settings.monitor, self.max_epochs)
            self.tell(epoch + 1, line)
        if self.on_epoch is not None:
            self.on_epoch(self.result)

    def _validated(self, logs: dict[str, float]) -> dict[str, float]:
        """Adds what validation measures to the logs of an epoch."""
        metrics = {} if self.validate is None else self.validate()
        monitor = self.settings.monitor
        if self.validate is not None and monitor not in metrics:
            raise ValueError(
                f"Cannot monitor {monitor!r}: validation measures {list(metrics)}. Add "
                "its cutoff to evaluation.cutoffs, or set training.monitor to one of these."
            )
        return logs | {f"val_{name}": float(value) for name, value in metrics.items()}

    def keep_best(self, network: TwoTowerNetwork) -> None:
        result = self.result
        self._seconds_before, self._started = result.seconds, 0.0
        if result.best_epoch < result.num_epochs:
            # Restores the optimizer state too, because another training may start from it.
            restore_epoch(self.folder, network, result.best_epoch)

    def resume(self, network: TwoTowerNetwork) -> int:
        """Loads the last saved epoch that is whole; returns its number, 0 if there is none."""
        epoch, record = on_chief(lambda: last_whole_epoch(self.folder, self._best_epoch))
        self.history, self._seconds_before = record["history"], record["seconds"]
        if epoch:
            restore_epoch(self.folder, network, epoch)
        self._resumed_after = epoch
        return epoch


def describe_data(
    data: TrainingSet,
    batches: HybridBatches,
    settings: TwoTowerSettings,
    training: TrainingSettings,
) -> list[str]:
    """Describes what histories lack, what batches never draw, and batches too small."""
    notes = []
    reading = sorted({"recency", "attention"}.intersection(settings.history_pooling))
    if reading and data.samples.num_earlier is None:
        notes.append(
            f"model.history_pooling {', '.join(reading)} reads the order of a history, and the log "
            "has none: take mean, or --preset sets"
        )
    if (is_later := data.samples.is_later) is not None:
        num = counted(int(is_later.sum()), "item")
        notes.append(f"{num} came after the training: new to it, and nobody's negatives")
    if settings.hard is not None and settings.correction == "none":
        notes.append(
            "without the correction hard negatives count like all others: their share has no effect"
        )
    elif settings.hard is not None:
        note = f"effective mean hard share {batches.mean_hard_share:.4f}"
        if batches.mean_hard_share < settings.hard.share / 2:
            is_funnel = isinstance(settings.hard, FunnelLosers)
            what = "losers in their request (docs/guides/events.md)" if is_funnel else "any"
            note += f" for the {settings.hard.share:g} asked for: few positives have {what}"
        notes.append(note)
    if (size := batches.frame.batch_size) < training.batch_size:
        notes.append(
            f"{counted(len(data.samples), 'positive')} fill no batch of training.batch_size: "
            f"batches of {size}. So few say little: expect a model near the baselines, and wide "
            "intervals"
        )
    return notes


def describe_epoch(so_far: TrainingResult, monitor: str, max_epochs: int) -> str:
    """Describes the last epoch: loss, validation, the best so far, time left to the last."""
    parts = [f"loss {so_far.history['loss'][-1]:.3f}"]
    if values := so_far.history.get(f"val_{monitor}"):
        parts.append(f"validation {monitor} {values[-1]:.4f}")
        parts.append(f"best {max(values):.4f} (epoch {so_far.best_epoch})")
    if num_left := max_epochs - so_far.num_epochs:
        seconds = round(so_far.seconds / so_far.num_epochs * num_left)
        parts.append(f"{timedelta(seconds=seconds)} left to epoch {max_epochs}")
    if so_far.num_epochs == so_far.resumed_after + 1 > 1:
        parts.append(f"resumed after epoch {so_far.resumed_after}")
    return ", ".join(parts)
