"""How often positives are drawn: popular items less often."""

import numpy as np

from tfrs_pipeline.data.schema import DataError

NO_POSITIVE = (
    "The training part holds no positive (an item exposed and clicked). "
    "Check the label (stage_values, rating_threshold) and the split."
)


def resampling_rate(counts: np.ndarray, exponent: float) -> np.ndarray | None:
    """Computes how often each candidate's positives are drawn, or weigh; only ratios matter.

    rate(c) = counts(c)^(-exponent), so that c comes in proportion to counts(c)^(1 - exponent). The
    model then learns log p(c | x) plus the log of the rate. It is [num_rows] float64, 0 without a
    sample; None for an exponent of 0.
    """
    if exponent == 0:
        return None
    safe = np.maximum(np.asarray(counts, np.float64), 1.0)
    return np.where(np.asarray(counts) > 0, safe**-exponent, 0.0)


def positive_probability(counts: np.ndarray, rate: np.ndarray | None = None) -> np.ndarray:
    """Computes q_positive, the distribution from which batches draw positives: counts * rate.

    Weights are not rates and do not change it. Returns [num_rows] float64 with sum 1. Raises a
    `DataError` if there is no positive.
    """
    mass = np.asarray(counts, np.float64) * (1.0 if rate is None else rate)
    total = mass.sum()
    if total <= 0:
        raise DataError(NO_POSITIVE)
    return mass / total
