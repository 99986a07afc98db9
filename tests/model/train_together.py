"""Trains models of the tiny log, alone or as one of the workers that TF_CONFIG names.

A program: FOLDER CASE... trains each case in a folder of its own, and the chief keeps the weights.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.model.conftest import LOSERS, REQUEST_FEATURES, make_log, tiny, weights_of
from tfrs_pipeline import InBatch, Popularity, Uniform
from tfrs_pipeline.cluster import this_worker
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.model.distribution import chief_first
from tfrs_pipeline.model.fitted import FittedTwoTower

# Every kind of negative, of dropout, of examples and of optimizer: what replicas could get wrong.
DROPOUT: dict[str, Any] = {"use_user_id": True, "feature_dropout": 0.2, "hard": LOSERS}
# To Adam a gradient of nothing but rounding, as the bias of attention's keys has, is one like any.
ATTENTION: dict[str, Any] = {**DROPOUT, "history_pooling": ["recency", "attention"]}
SHARED = [Uniform(16), Popularity(8)]


def trained_by(optimizer: str, examples: str = "single", **model: Any) -> dict[str, Any]:
    return {**model, "training": {"optimizer": optimizer, "examples": examples}}


CASES = {
    "hard": trained_by("lazy_adam", **DROPOUT),
    "sequences": trained_by("adagrad", "sequences", negatives=SHARED, **ATTENTION),
    "mixture": trained_by("adagrad", negatives=[InBatch(), *SHARED], **ATTENTION),
    "sets": trained_by("lazy_adam", "sets", negatives=SHARED, item_init="svd"),
}
NUM_EPOCHS = 3
# One of the seeds for which a single process forgets rounding: weights that change by 1e-7 at every
# step end within 2e-6. For others (0 and 3) they end .003 to .04 apart, and compare nothing.
SEED = 2


def train(case: str, folder: Path) -> FittedTwoTower:
    plan = tiny(seed=SEED, **CASES[case])
    # Sets hold the positives of many requests.
    features = None if case == "sets" else REQUEST_FEATURES
    split = make_log(features).split("last_n", validation=1, test=1)
    samples = "samples" if features is None else "requested"
    data = chief_first(
        lambda: TrainingSet.build(split.train, folder / samples, seed=0, hard=LOSERS)
    )
    return plan.fit_samples(data, split.validation, max_epochs=NUM_EPOCHS, folder=folder / case)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        fitted = train(name, Path(sys.argv[1]))
        if this_worker().is_chief:
            np.savez(Path(sys.argv[1]) / f"{name}.npz", *weights_of(fitted.network))
