"""What a training has to say of its batches and its validation, in lines for a person."""

from __future__ import annotations

import sys

from tfrs_pipeline.batches.hybrid import HybridBatches
from tfrs_pipeline.data.holdout import Holdout
from tfrs_pipeline.model.fit import OnEpoch
from tfrs_pipeline.model.settings import TrainingSettings, TwoTowerSettings


def describe_sample(validation: Holdout | None) -> list[str]:
    """Says that validation ranks a sample of its users; nothing if it ranks all."""
    if validation is None or validation.num_sampled_from is None:
        return []
    num_users = validation.num_sampled_from
    return [f"validation ranks {len(validation):,} of {num_users:,} users, sampled"]


def describe_batches(batches: HybridBatches, settings: TwoTowerSettings) -> list[str]:
    """Says what the batches cannot draw and mask, and the mean share of hard negatives."""
    unreachable = int((batches.expected_count[1:] <= 0).sum())
    notes = [f"{unreachable:,} items are never drawn as negatives"] if unreachable else []
    masked = ", ".join(f"{share:.2%} {why}" for why, share in batches.masked_shares().items())
    notes.append(f"masked in the columns that rows share: {masked}")
    if settings.hard is not None:
        notes.append(f"effective mean hard share {batches.mean_hard_share:.4f}")
    return notes


def epoch_writer(training: TrainingSettings, verbose: bool | None) -> OnEpoch | None:
    """Makes what writes a line an epoch to standard error; None, for a terminal, asks for it."""
    if not (sys.stderr.isatty() if verbose is None else verbose):
        return None

    def write(epoch: int, logs: dict[str, float]) -> None:
        measured = logs.get(f"val_{training.monitor}")
        found = "" if measured is None else f", validation {training.monitor} {measured:.4f}"
        line = f"epoch {epoch}/{training.max_epochs}: loss {logs['loss']:.4f}{found}"
        print(line, file=sys.stderr, flush=True)

    return write
