"""How often positives are drawn: fewer of the popular ones."""

from __future__ import annotations

import numpy as np

from tfrs_pipeline.data.schema import DataError

NO_POSITIVE = (
    "The training part holds no positive (an item exposed and clicked). "
    "Check the label (stage_values, rating_threshold) and the split."
)


def resampling_rate(counts: np.ndarray, exponent: float) -> np.ndarray | None:
    """Computes how often each candidate's positives are drawn, or weigh; only ratios matter.

    rate(c) = counts(c)^(-exponent), so that c comes in proportion to counts(c)^(1 - exponent). It
    shifts what the model learns: log p(c | x) plus the log of the rate.

    Args:
        counts: [num_rows] samples per candidate row.
        exponent: 0 changes nothing, 1 makes every clicked item equally likely.

    Returns:
        [num_rows] float64, 0 where there is no sample; None for an exponent of 0.

    Raises:
        ValueError: If the exponent is not in [0, 1].

    Example:
        >>> resampling_rate(np.array([0, 16, 4]), exponent=0.5)
        array([0.  , 0.25, 0.5 ])
    """
    if not 0 <= exponent <= 1:
        raise ValueError(f"exponent must be in [0, 1]. Received: {exponent}")
    if exponent == 0:
        return None
    safe = np.maximum(np.asarray(counts, np.float64), 1.0)
    return np.where(np.asarray(counts) > 0, safe**-exponent, 0.0)


def positive_probability(counts: np.ndarray, rate: np.ndarray | None = None) -> np.ndarray:
    """Computes q_positive, the distribution from which batches draw positives.

    It is proportional to counts(c) * rate(c).

    Args:
        counts: [num_rows] samples per candidate row; row 0, "unknown", holds none.
        rate: [num_rows] resampling rates; None for none. Weights are not rates: they do not change
            q_positive.

    Returns:
        [num_rows] float64, sum 1.

    Raises:
        DataError: If there is no positive at all.

    Example:
        >>> positive_probability(np.array([0, 3, 1]))
        array([0.  , 0.75, 0.25])
    """
    mass = np.asarray(counts, np.float64) * (1.0 if rate is None else rate)
    total = mass.sum()
    if total <= 0:
        raise DataError(NO_POSITIVE)
    return mass / total
