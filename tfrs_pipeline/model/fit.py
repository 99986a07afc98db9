"""Training: early stopping on the validation metric, resuming, and what it tells the user."""

import contextlib
import functools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from tfrs_pipeline import messages
from tfrs_pipeline.batches.hybrid import HybridBatches
from tfrs_pipeline.durable import naming, read_record, read_whole, write_record
from tfrs_pipeline.messages import counted
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.model.distribution import dataset_of, on_chief
from tfrs_pipeline.model.network import TwoTowerNetwork
from tfrs_pipeline.model.optimizer import make_optimizer
from tfrs_pipeline.model.settings import TrainingSettings, TwoTowerSettings
from tfrs_pipeline.negatives.samplers import FunnelLosers

Validate = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class TrainingResult:
    """What `train` did.

    `seconds` are wall time. The first step is left out, because it includes TensorFlow's start.
    They include validation and the earlier parts of a resumed training.
    """

    history: dict[str, list[float]]  # One value an epoch, by logged name.
    best_epoch: int  # The epoch, from 1, whose weights were kept.
    seconds: float
    resumed_after: int = 0  # Epochs that an earlier process had done.

    @property
    def num_epochs(self) -> int:
        """Number of epochs done."""
        return len(self.history.get("loss", []))

    @property
    def num_waited(self) -> int:
        """Number of epochs since the best one."""
        return self.num_epochs - self.best_epoch


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
    _compile(network, settings, settings.max_epochs * steps, first_step)
    with contextlib.ExitStack() as stack:
        kept = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keeper = _BestEpoch(settings, last, validate, kept, folder is not None, on_epoch, tell)
        epoch = keeper.restore(network)
        if not epoch and start is not None:
            start(network)
        if epoch < last and not keeper.is_over:
            network.fit(
                dataset_of(network, batches, epoch * steps, (last - epoch) * steps),
                initial_epoch=epoch,
                epochs=last,
                steps_per_epoch=steps,
                callbacks=[*callbacks, keeper],
                verbose=0,
            )
        keeper.keep_best(network)
    return keeper.result


def read_epoch(
    network: TwoTowerNetwork, settings: TrainingSettings, folder: Path, epoch: int
) -> TrainingResult:
    """Compiles a network and gives it the weights and the optimizer state of a saved epoch.

    Returns the result as it was after that epoch. The folder keeps the best epoch and the last one.
    """
    state = read_record(folder / f"epoch-{epoch}.json")
    # Nothing is trained here, so any number of steps that the schedule accepts will do.
    _compile(network, settings, settings.warmup_steps + 1)
    _read_checkpoint(network, folder / f"epoch-{epoch}")
    return TrainingResult(state["history"], epoch, state["seconds"])


def _compile(
    network: TwoTowerNetwork, settings: TrainingSettings, num_steps: int, first_step: int = 0
) -> None:
    """Gives a network its optimizer and every variable of the optimizer."""
    with network.distribute_strategy.scope():
        network.compile(optimizer=make_optimizer(settings, num_steps, first_step))
        # A checkpoint is read before the first step, which would otherwise make these variables.
        network.optimizer.build(network.trainable_variables)


class _BestEpoch(tf.keras.callbacks.Callback):
    """Stops early and keeps the best epoch in a folder; `saves_all` keeps the last one too."""

    def __init__(
        self,
        settings: TrainingSettings,
        max_epochs: int,
        validate: Validate | None,
        folder: Path,
        saves_all: bool,
        on_epoch: OnEpoch | None,
        tell: Tell | None,
    ) -> None:
        super().__init__()
        # Keras's default, False, would fetch the loss of each step, which is not read.
        self._supports_tf_logs = True
        self._settings, self._max_epochs, self._validate = settings, max_epochs, validate
        self._folder, self._saves_all = folder, saves_all
        self._on_epoch, self._tell = on_epoch, tell
        self._started = self._last_line = self._seconds_before = 0.0
        self._resumed_after = 0
        self.history: dict[str, list[float]] = {}

    @property
    def result(self) -> TrainingResult:
        seconds = self._seconds_before
        if self._started:
            seconds += time.monotonic() - self._started
        return TrainingResult(self.history, self.best_epoch, seconds, self._resumed_after)

    @property
    def best_epoch(self) -> int:
        if self._validate is None:
            return len(self.history.get("loss", []))
        values = self.history.get(f"val_{self._settings.monitor}", [])
        # Of equal values the earliest: more epochs that gain nothing only overfit.
        return int(np.argmax(values)) + 1 if values else 0

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self._validate is not None and self.result.num_waited >= self._settings.patience

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        now = time.monotonic()
        self._started = self._started or now
        if not batch:
            self._last_line = now
        if self._tell is not None and now - self._last_line >= messages.SECONDS_BETWEEN_LINES:
            self._last_line, done = now, self.result.num_epochs
            self._tell(done, f"epoch {done + 1}: {batch + 1:,}/{self.params['steps']:,} steps")

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
        is_best = self._validate is not None and self.best_epoch == epoch + 1
        if self._saves_all or is_best:
            on_chief(lambda: self._save(self.model, epoch + 1))
        if self.is_over:
            self.model.stop_training = True
        if self._tell is not None:
            line = describe_epoch(self.result, self._settings.monitor, self._max_epochs)
            self._tell(epoch + 1, line)
        if self._on_epoch is not None:
            self._on_epoch(self.result)

    def _validated(self, logs: dict[str, float]) -> dict[str, float]:
        """Adds what validation measures to the logs of an epoch."""
        metrics = {} if self._validate is None else self._validate()
        monitor = self._settings.monitor
        if self._validate is not None and monitor not in metrics:
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
            _read_checkpoint(network, self._path(result.best_epoch))

    def restore(self, network: TwoTowerNetwork) -> int:
        """Loads the last saved epoch that is whole; returns its number, 0 if there is none."""
        epoch, state = on_chief(self._last_whole)
        self.history, self._seconds_before = state["history"], state["seconds"]
        if epoch:
            _read_checkpoint(network, self._path(epoch))
        self._resumed_after = epoch
        return epoch

    def _last_whole(self) -> tuple[int, dict[str, Any]]:
        # An epoch counts if the best one so far is whole too, since training may end with it.
        saved = self._folder.glob("epoch-*.json")
        for epoch in sorted((int(path.stem.partition("-")[2]) for path in saved), reverse=True):
            if (state := read_whole(self._path(epoch, ".json"))) is not None:
                self.history = state["history"]
                if read_whole(self._path(self.best_epoch, ".json")) is not None:
                    return epoch, state
        return 0, {"history": {}, "seconds": 0.0}

    def _path(self, epoch: int, suffix: str = "") -> Path:
        return self._folder / f"epoch-{epoch}{suffix}"

    def _save(self, network: TwoTowerNetwork, epoch: int) -> None:
        record = self._path(epoch, ".json")
        with naming(record.parent, tf.errors.OpError):
            record.parent.mkdir(parents=True, exist_ok=True)
            _checkpoint(network).write(str(self._path(epoch)))
        files = [
            file for file in record.parent.glob(f"{record.stem}.*") if ".json" not in file.name
        ]
        so_far = self.result
        # Written last, with the hashes of the files: an epoch without it does not count.
        write_record(record, {"history": so_far.history, "seconds": so_far.seconds}, files)
        keep = {record.stem, f"epoch-{so_far.best_epoch}"}
        for path in record.parent.glob("epoch-*"):
            if path.name.partition(".")[0] not in keep:
                # Also removes epoch-3_temp, which TensorFlow leaves if it is killed while writing.
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _checkpoint(network: TwoTowerNetwork) -> tf.train.Checkpoint:
    return tf.train.Checkpoint(model=network, optimizer=network.optimizer)


def _read_checkpoint(network: TwoTowerNetwork, path: Path) -> None:
    _checkpoint(network).read(str(path)).assert_existing_objects_matched()


def describe_data(
    data: TrainingSet,
    batches: HybridBatches,
    settings: TwoTowerSettings,
    training: TrainingSettings,
) -> list[str]:
    """Describes what histories lack, what batches never draw and mask, and batches too small."""
    notes = []
    reading = sorted({"recency", "attention"}.intersection(settings.history_pooling))
    if reading and data.samples.num_earlier is None:
        notes.append(
            f"model.history_pooling {', '.join(reading)} reads the order of a history, and the log "
            "has none: take mean, or --preset sets"
        )
    if unreachable := batches.num_unreachable:
        notes.append(f"never drawn as negatives: {counted(unreachable, 'item')}")
    if (is_later := data.samples.is_later) is not None:
        num = counted(int(is_later.sum()), "item")
        notes.append(f"{num} came after the training: new to it, and nobody's negatives")
    masked = ", ".join(f"{share:.2%} {why}" for why, share in batches.masked_shares().items())
    notes.append(f"masked in the columns that rows share: {masked}")
    if settings.hard is not None and settings.correction == "none":
        notes.append(
            "without the correction hard negatives count like all others: their share has no effect"
        )
    elif settings.hard is not None:
        note = f"effective mean hard share {batches.mean_hard_share:.4f}"
        if batches.mean_hard_share < settings.hard.share / 2:
            is_funnel = isinstance(settings.hard, FunnelLosers)
            what = "losers in their request (docs/guides/funnel.md)" if is_funnel else "any"
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
