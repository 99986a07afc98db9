"""The training batches that a model's settings ask for."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tfrs_pipeline.batches.examples import Examples
from tfrs_pipeline.batches.hybrid import HybridBatches
from tfrs_pipeline.batches.kinds import SinglePositives, UserSets, WholeSequences
from tfrs_pipeline.model.settings import TrainingSettings, TwoTowerSettings, reads_times
from tfrs_pipeline.negatives.kinds import Negatives
from tfrs_pipeline.samples.store import Samples, resampling_rate


def make_batches(
    samples: Samples,
    settings: TwoTowerSettings,
    training: TrainingSettings,
    negatives: Sequence[Negatives],
    seed: int,
) -> HybridBatches:
    """Makes the batches of `TwoTower.batches`; `negatives` include the user's own kinds."""
    if not reads_times(settings, training):
        samples = dataclasses.replace(samples, sequence_times=None)
    training = training.fitting(len(samples))
    rate = resampling_rate(samples.counts, settings.resampling_exponent)
    common: dict[str, Any] = {
        "batch_size": training.batch_size,
        "history_length": settings.history_length,
        "seed": seed,
    }
    examples: Examples
    if training.examples == "sequences":
        examples = WholeSequences(samples, **common)
    elif training.examples == "sets":
        examples = UserSets(samples, **common)
    else:
        examples = SinglePositives(samples, rate=rate, **common)
    weight = None if training.examples == "single" else rate
    return HybridBatches(
        samples, examples, negatives, hard=settings.hard, seed=seed, positive_weight=weight
    )
