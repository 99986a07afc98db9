"""What a user brings: a metric and baselines."""

from typing import Any

import numpy as np

from tfrs_pipeline.evaluation.baselines import Baseline, Ease
from tfrs_pipeline.evaluation.metrics import Metric, Rankings


class Precision(Metric):
    """Share of the top k that is relevant."""

    name = "precision"
    note = "precision: of the {num_relevant:,} items to find"

    def measure(self, rankings: Rankings) -> np.ndarray:
        return rankings.is_hit[:, : self.k].mean(axis=1)


class Crowd(Baseline):
    label = "the wisdom of the crowd"

    def fit(self, train: Any) -> Any:
        return Ease().fit(train)


class NoOne(Baseline):
    """Learns nothing, and refuses to."""

    label = "no one"

    def fit(self, train: Any) -> Any:
        raise ValueError("no one learns from this")
