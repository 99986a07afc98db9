"""Chooses on validation which models are summed, and with which weights."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tfrs_pipeline.evaluation.bootstrap import mean_interval
from tfrs_pipeline.evaluation.evaluate import Truth, measure_vectors
from tfrs_pipeline.evaluation.metrics import Metric
from tfrs_pipeline.evaluation.results import difference_text
from tfrs_pipeline.model.projection import Vectors, projection

# Weights that are tried for a further member, in units of its spread; the first one has 1.
WEIGHTS = (0.3, 0.6, 1.0)
# On fewer queries every member weighs 1, since noise would choose among the weights.
MIN_QUERIES = 100


@dataclass(frozen=True)
class Choice:
    """A sum of models that validation chose, or the best model alone.

    Attributes:
        weights: Weights of the members by name. The best model comes first, with 1; it is alone if
            no rotated sum is better.
        metric: Name of the metric that decided.
        alone: Mean of the metric for the best model alone.
        summed: Mean of the metric for the rotated sum.
        difference: The rotated sum minus the best model alone, paired by query, as
            `Interval.as_dict` returns it.
    """

    weights: Mapping[str, float]
    metric: str
    alone: float
    summed: float
    difference: Mapping[str, float | None]

    def lines(self) -> list[str]:
        """Describes the members of the sum and its gain, for a person."""
        first, *others = self.weights
        if not others:
            return [f"{first} alone: no sum with another model is better on validation"]
        parts = " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())
        return [
            f"the sum {parts}: validation {self.metric} {self.summed:.4f}, where {first} alone has "
            f"{self.alone:.4f} ({difference_text(self.difference)})"
        ]


def choose(
    members: Mapping[str, Vectors],
    truth: Truth,
    metric: Metric,
    *,
    winner: str,
    max_members: int,
) -> Choice:
    """Chooses the weights of a sum on validation, one member after another.

    The winner, which is the best model alone, comes first. Sums are measured after their rotation
    to the winner's dimensions. As long as one more member makes the sum better, the best one joins
    with the best of `WEIGHTS`; on fewer than `MIN_QUERIES` queries, with 1. The mean decides, not
    its interval: the winner's value is the best of many epochs on the same queries, which flatters
    it (docs/archive/tried.md).

    Args:
        members: Vectors by name, for the queries and the items of `truth`, in their order.
        truth: The queries of validation, and what is relevant to each.
        metric: The metric that decides; more is better.
        winner: Name of the best member alone.
        max_members: Most members of the sum, the winner included.

    Returns:
        The weights, in the order in which the members joined, and the gain.
    """
    dim = members[winner].candidates.shape[1]
    spreads = {name: vectors.spread for name, vectors in members.items()}

    def measure(weights: Mapping[str, float]) -> np.ndarray:
        # Rotated, as the sum is served: the rotation may lose what a member gains.
        vectors = [members[name] for name in weights]
        scaled_weights = [weight / spreads[name] for name, weight in weights.items()]
        queries, candidates, _ = projection(vectors, scaled_weights, dim)(vectors)
        return measure_vectors(queries, candidates, truth, metric)

    weights = {winner: 1.0}
    alone = best = measure(weights)
    grid = WEIGHTS if len(truth.queries) >= MIN_QUERIES else (1.0,)
    while len(weights) < min(max_members, len(members)):
        others = [name for name in members if name not in weights]
        extended = [{**weights, name: weight} for name in others for weight in grid]
        trials = [measure(trial) for trial in extended]
        means = [float(np.nanmean(trial)) for trial in trials]
        if max(means) <= np.nanmean(best):
            break
        first_best = means.index(max(means))
        weights, best = extended[first_best], trials[first_best]
    difference = mean_interval(best - alone, truth.user_ids).as_dict()
    mean_alone, mean_summed = (float(np.nanmean(values)) for values in (alone, best))
    return Choice(weights, str(metric), mean_alone, mean_summed, difference)
