"""The saved epochs of a training: where a stopped one resumes, and a finished one is read back."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import tensorflow as tf

from tfrs_pipeline.durable import naming, read_record, read_whole, write_record
from tfrs_pipeline.model.network import TwoTowerNetwork
from tfrs_pipeline.model.optimizer import set_optimizer
from tfrs_pipeline.model.settings import TrainingSettings

History: TypeAlias = dict[str, list[float]]
"""One value an epoch, by logged name."""


@dataclass(frozen=True)
class TrainingResult:
    """The epochs of a training so far.

    `seconds` are wall time, with validation and the earlier parts of a resumed training. They leave
    out the first step, because it includes TensorFlow's start.
    """

    history: History  # One value an epoch, by logged name.
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


def save_epoch(folder: Path, network: TwoTowerNetwork, so_far: TrainingResult) -> None:
    """Saves the last epoch with its record, and removes all others but the best one.

    The record, such as epoch-3.json, is written last: an epoch counts only if its record is whole.
    """
    epoch = so_far.num_epochs
    path = folder / f"epoch-{epoch}"
    with naming(folder, tf.errors.OpError):
        folder.mkdir(parents=True, exist_ok=True)
        _checkpoint(network).write(str(path))
    files = [file for file in folder.glob(f"{path.name}.*") if ".json" not in file.name]
    record = {"history": so_far.history, "seconds": so_far.seconds}
    write_record(_record(folder, epoch), record, files)
    keep = {path.name, f"epoch-{so_far.best_epoch}"}
    for other in folder.glob("epoch-*"):
        if other.name.partition(".")[0] not in keep:
            # Also removes epoch-3_temp, which TensorFlow leaves if it is killed while writing.
            shutil.rmtree(other) if other.is_dir() else other.unlink()


def last_whole_epoch(
    folder: Path, best_epoch: Callable[[History], int]
) -> tuple[int, dict[str, Any]]:
    """Returns the number and the record of the last whole epoch; 0 and no history without one.

    The best epoch so far must be whole too, since the training may end with it.
    """
    saved = folder.glob("epoch-*.json")
    for epoch in sorted((int(path.stem.partition("-")[2]) for path in saved), reverse=True):
        record = read_whole(_record(folder, epoch))
        if record and read_whole(_record(folder, best_epoch(record["history"]))):
            return epoch, record
    return 0, {"history": {}, "seconds": 0.0}


def restore_epoch(folder: Path, network: TwoTowerNetwork, epoch: int) -> None:
    """Gives a compiled network the weights and the optimizer's state of a saved epoch."""
    checkpoint = _checkpoint(network).read(str(folder / f"epoch-{epoch}"))
    checkpoint.assert_existing_objects_matched()


def _record(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch}.json"


def _checkpoint(network: TwoTowerNetwork) -> tf.train.Checkpoint:
    return tf.train.Checkpoint(model=network, optimizer=network.optimizer)


def read_epoch(
    network: TwoTowerNetwork, settings: TrainingSettings, folder: Path, epoch: int
) -> TrainingResult:
    """Compiles a network, restores a saved epoch, and returns the training up to that epoch.

    The folder keeps the best epoch and the last one. Raises `Damaged` if a file has changed.
    """
    record = read_record(_record(folder, epoch))
    # Nothing is trained here, so any number of steps that the schedule accepts will do.
    set_optimizer(network, settings, settings.warmup_steps + 1)
    restore_epoch(folder, network, epoch)
    return TrainingResult(record["history"], epoch, record["seconds"])
