"""How often each candidate comes as a positive: as logged, or less of the popular ones."""

from __future__ import annotations

import numpy as np

from tfrs_pipeline.data.schema import DataError

NO_POSITIVE = (
    "The training part holds no positive (an item exposed and clicked). "
    "Check the label (stage_values, rating_threshold) and the split."
)


def resampling_rate(counts: np.ndarray, exponent: float) -> np.ndarray | None:
    """Computes the rate(c) = counts(c)^(-exponent) at which candidates' positives are trained.

    Positives are mostly popular items. With an exponent these are down-sampled and the others
    up-sampled: a positive of candidate c is drawn, or weighted, by rate(c), so that c comes in
    proportion to counts(c)^(1 - exponent). It shifts what the model learns: log p(c | x) plus the
    log of the rate.

    Args:
        counts: [num_rows] samples per candidate row.
        exponent: 0 changes nothing, 1 makes every clicked item equally likely.

    Returns:
        [num_rows] float64, of which only ratios matter, 0 where there is no sample; None without
        resampling.

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
    """Computes q_positive, the distribution that the batches' positives are drawn from.

    q_positive(c) is proportional to counts(c) * rate(c): batches are a fair draw of the samples, or
    one in proportion to their rates.

    Args:
        counts: [num_rows] samples per candidate row; row 0, "unknown", holds none.
        rate: [num_rows] resampling rates of what is drawn; None is no resampling. Weights are not
            rates: they leave q_positive as it is.

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
