"""What training tells the user: progress of epochs, and notes on its data."""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeAlias

import tensorflow as tf

from tfrs_pipeline import messages
from tfrs_pipeline.batches.hybrid import HybridBatches
from tfrs_pipeline.messages import counted
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.model.fit import OnEpoch, TrainingResult
from tfrs_pipeline.model.settings import TrainingSettings, TwoTowerSettings

OnProgress: TypeAlias = Callable[..., None]
"""Called during long work with a task's name, steps done and in all, and sometimes a note."""

OnSteps: TypeAlias = Callable[[int, str], None]
"""Called during a long epoch with its number from 1, and how far it is in words."""


class EpochProgress(tf.keras.callbacks.Callback):
    """Reports the steps of an epoch, now and then."""

    def __init__(self, on_steps: OnSteps) -> None:
        super().__init__()
        # Keras's default, False, would fetch the loss of each step, which is not read.
        self._supports_tf_logs = True
        self._on_steps = on_steps

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Starts the clock."""
        self._epoch, self._told = epoch + 1, time.monotonic()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Reports how far the epoch is, if it is time."""
        if time.monotonic() - self._told >= messages.SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            done, total = batch + 1, self.params["steps"]
            self._on_steps(self._epoch, f"epoch {self._epoch}: {done:,}/{total:,} steps")


def describe_data(
    data: TrainingSet,
    batches: HybridBatches,
    settings: TwoTowerSettings,
    training: TrainingSettings,
) -> list[str]:
    """Says what histories lack, what batches never draw, what they mask, and if they are small."""
    notes = []
    reading = sorted({"recency", "attention"}.intersection(settings.history_pooling))
    if reading and data.samples.num_earlier is None:
        notes.append(
            f"model.history_pooling {', '.join(reading)} reads the order of a history, and the log "
            "has none: take mean, or --preset sets"
        )
    if unreachable := batches.num_unreachable:
        verb = "is" if unreachable == 1 else "are"
        notes.append(f"{counted(unreachable, 'item')} {verb} never drawn as negatives")
    if (is_later := data.samples.is_later) is not None:
        num = counted(int(is_later.sum()), "item")
        notes.append(f"{num} came after the training: never negatives, and new unless known before")
    masked = ", ".join(f"{share:.2%} {why}" for why, share in batches.masked_shares().items())
    notes.append(f"masked in the columns that rows share: {masked}")
    if settings.hard is not None and settings.correction == "none":
        told = "without the correction hard negatives count like all others"
        notes.append(f"{told}: their share has no effect")
    elif settings.hard is not None:
        note = f"effective mean hard share {batches.mean_hard_share:.4f}"
        if batches.mean_hard_share < settings.hard.share / 2:
            note += f" for the {settings.hard.share:g} asked for: few positives have losers in "
            note += "their request (docs/guides/funnel.md)"
        notes.append(note)
    if (size := batches.frame.batch_size) < training.batch_size:
        notes.append(
            f"{counted(len(data.samples), 'positive')} fill no batch of training.batch_size: "
            f"batches of {size}. So few say little: expect a model near the baselines, and wide "
            "intervals"
        )
    return notes


def describe_epoch(so_far: TrainingResult, monitor: str, max_epochs: int) -> str:
    """Describes the last epoch: loss, validation, the best so far, time left for all epochs."""
    parts = [f"loss {so_far.history['loss'][-1]:.3f}"]
    if values := so_far.history.get(f"val_{monitor}"):
        parts.append(f"validation {monitor} {values[-1]:.4f}")
        parts.append(f"best {max(values):.4f} (epoch {so_far.best_epoch})")
    if num_left := max_epochs - so_far.num_epochs:
        seconds = round(so_far.seconds / so_far.num_epochs * num_left)
        parts.append(f"{timedelta(seconds=seconds)} left")
    if so_far.num_epochs == so_far.resumed_after + 1 > 1:
        parts.append(f"resumed after epoch {so_far.resumed_after}")
    return ", ".join(parts)


def writers(
    training: TrainingSettings, verbose: bool | None
) -> tuple[OnEpoch | None, OnSteps | None]:
    """Makes writers of epochs and of their steps to standard error; None where nothing is shown."""
    if not (sys.stderr.isatty() if verbose is None else verbose):
        return None, None

    def write_epoch(so_far: TrainingResult) -> None:
        epoch, all_epochs = so_far.num_epochs, training.max_epochs
        line = describe_epoch(so_far, training.monitor, all_epochs)
        print(f"epoch {epoch}/{all_epochs}: {line}", file=sys.stderr, flush=True)

    return write_epoch, lambda epoch, line: print(line, file=sys.stderr, flush=True)
