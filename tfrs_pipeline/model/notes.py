"""What a training has to say of its batches and its validation, in lines for a person."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeAlias

import tensorflow as tf

from tfrs_pipeline import messages
from tfrs_pipeline.batches.hybrid import HybridBatches
from tfrs_pipeline.data.holdout import Holdout
from tfrs_pipeline.messages import counted
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.model.fit import OnEpoch, Start, TrainingResult
from tfrs_pipeline.model.mining import MinedPools
from tfrs_pipeline.model.settings import TrainingSettings, TwoTowerSettings
from tfrs_pipeline.negatives.mined import Mined
from tfrs_pipeline.samples.store import Samples

OnProgress: TypeAlias = Callable[..., None]
"""Told of long work: a task's name, steps done and in all, and at times what there is to say."""

OnSteps: TypeAlias = Callable[[int, int, int], None]
"""Told of an epoch that takes long: its number from 1, steps done and in all."""


class EpochProgress(tf.keras.callbacks.Callback):
    """Tells of the steps of an epoch, now and then."""

    def __init__(self, on_steps: OnSteps) -> None:
        super().__init__()
        # Keras sets it to False; it need not fetch the loss of each step, which is not read.
        self._supports_tf_logs = True
        self._on_steps = on_steps

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Starts the clock."""
        self._epoch, self._told = epoch + 1, time.monotonic()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Tells how far it has come, if it is time."""
        if time.monotonic() - self._told >= messages.SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            self._on_steps(self._epoch, batch + 1, self.params["steps"])


def describe_training(
    settings: TwoTowerSettings,
    data: TrainingSet,
    batches: HybridBatches,
    start: Start | None,
    validation: Holdout | None,
    mining: MinedPools | None,
) -> list[str]:
    """Says what a training began with, what it measured and mined, and what it never draws."""
    return [
        *(start.describe() if start else []),
        *describe_sample(validation),
        *(mining.describe() if mining else []),
        *describe_order(data.samples, settings),
        *describe_batches(batches, settings),
    ]


def describe_sample(validation: Holdout | None) -> list[str]:
    """Says that validation ranks a sample of its users; nothing if it ranks all."""
    if validation is None or validation.num_sampled_from is None:
        return []
    num_users = validation.num_sampled_from
    return [f"validation ranks {len(validation):,} of {num_users:,} users, sampled"]


def describe_batches(batches: HybridBatches, settings: TwoTowerSettings) -> list[str]:
    """Says what the batches cannot draw and mask, and the mean share of hard negatives."""
    is_later, unreachable = batches.samples.is_later, batches.num_unreachable
    verb = "is" if unreachable == 1 else "are"
    never = f"{counted(unreachable, 'item')} {verb} never drawn as negatives"
    notes = [never] if unreachable else []
    if is_later is not None:
        num = counted(int(is_later.sum()), "item")
        notes.append(
            f"{num} came after the training: nobody's negatives, and new unless known before"
        )
    masked = ", ".join(f"{share:.2%} {why}" for why, share in batches.masked_shares().items())
    notes.append(f"masked in the columns that rows share: {masked}")
    if settings.hard is not None and settings.correction == "none":
        notes.append(
            "without the correction hard negatives count as any others: their share has no effect"
        )
    elif settings.hard is not None:
        since = ", from the first mining on" if isinstance(settings.hard, Mined) else ""
        notes.append(f"effective mean hard share {batches.mean_hard_share:.4f}{since}")
    return notes


def describe_order(samples: Samples, settings: TwoTowerSettings) -> list[str]:
    """Warns if the model reads the order of histories and the log has none."""
    reading = sorted({"recency", "attention"}.intersection(settings.history_pooling))
    if samples.num_earlier is not None or not reading:
        return []
    return [
        f"model.history_pooling {', '.join(reading)} reads the order of a history, and the log has "
        "none: take mean, or --preset sets"
    ]


def describe_epoch(so_far: TrainingResult, monitor: str, max_epochs: int) -> str:
    """Says what the last epoch came to: loss, validation, best so far, time left for all epochs."""
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


def describe_steps(epoch: int, done: int, total: int) -> str:
    """Says how far an epoch has come."""
    return f"epoch {epoch}: {done:,}/{total:,} steps"


def writers(
    training: TrainingSettings, verbose: bool | None
) -> tuple[OnEpoch | None, OnSteps | None]:
    """Makes what writes a line an epoch to standard error, and of its steps if it takes long.

    They are None if `verbose` is False, or None and it is no terminal.
    """
    if not (sys.stderr.isatty() if verbose is None else verbose):
        return None, None

    def write_epoch(so_far: TrainingResult) -> None:
        epoch, all_epochs = so_far.num_epochs, training.max_epochs
        line = describe_epoch(so_far, training.monitor, all_epochs)
        print(f"epoch {epoch}/{all_epochs}: {line}", file=sys.stderr, flush=True)

    def write_steps(epoch: int, done: int, total: int) -> None:
        print(describe_steps(epoch, done, total), file=sys.stderr, flush=True)

    return write_epoch, write_steps
