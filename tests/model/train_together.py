"""Trains models of the tiny log, alone or as one of the workers that TF_CONFIG names.

The arguments are FOLDER CASE...: each case trains in its own folder; the chief saves the weights.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.model.conftest import LOSERS, REQUEST_FEATURES, make_log, tiny, weights_of
from tfrs_pipeline import FittedTwoTower, InBatch, Popularity, TrainingSet, Uniform
from tfrs_pipeline.cluster import this_worker
from tfrs_pipeline.model.distribution import chief_first

# The cases cover what replicas could get wrong: negatives, dropout, examples and optimizers.
DROPOUT: dict[str, Any] = {"use_user_id": True, "feature_dropout": 0.2, "hard": LOSERS}
# Adam would scale up a gradient of pure rounding error, such as that of the attention keys' bias.
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
# With this seed rounding errors fade in a single process: if weights change by 1e-7 at every step,
# they end within 2e-6. With seeds 0 and 3 they end .003 to .04 apart, too far for a comparison.
SEED = 2


def train(case: str, folder: Path) -> FittedTwoTower:
    plan = tiny(seed=SEED, **CASES[case])
    # A set holds positives of many requests, so it has no request features.
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
