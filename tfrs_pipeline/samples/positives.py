"""Positives: items that were exposed to the user and clicked."""

from __future__ import annotations

import ibis
import numpy as np

from tfrs_pipeline.data.schema import DataError, Stage


def select_positives(events: ibis.Table) -> ibis.Table:
    """Keeps the events whose item was exposed and clicked.

    Args:
        events: Event table; `stage` is the furthest stage that the item reached.

    Returns:
        The rows of stage `clicked`, all columns.
    """
    return events.filter(events["stage"] == Stage.CLICKED.value)


def power_law_rate(counts: np.ndarray, exponent: float) -> np.ndarray:
    """Computes resampling rates that flatten popularity: rate(c) = counts(c)^(-exponent).

    Positives of popular items are down-sampled and those of unpopular ones up-sampled, so that c is
    drawn in proportion to counts(c)^(1 - exponent). Only ratios matter.

    Args:
        counts: [num_rows] samples per candidate row.
        exponent: 0 changes nothing, 1 makes every clicked item equally likely.

    Returns:
        [num_rows] float64, 0 where there is no sample.

    Raises:
        ValueError: If the exponent is not in [0, 1].

    Example:
        >>> power_law_rate(np.array([0, 16, 4]), exponent=0.5)
        array([0.  , 0.25, 0.5 ])
    """
    if not 0 <= exponent <= 1:
        raise ValueError(f"exponent must be in [0, 1]. Received: {exponent}")
    safe = np.maximum(np.asarray(counts, np.float64), 1.0)
    return np.where(counts > 0, safe**-exponent, 0.0)


def keep_rate(counts: np.ndarray, threshold: float) -> np.ndarray:
    """Computes word2vec's keep-rule: rate(c) = min(1, sqrt(t / f) + t / f), f = share of c.

    Args:
        counts: [num_rows] samples per candidate row.
        threshold: t, above 0: items of a smaller share than about 2.6 t are kept whole.

    Returns:
        [num_rows] float64 in [0, 1], 0 where there is no sample.

    Raises:
        ValueError: If the threshold is not positive.

    Reference:
        Mikolov et al. 2013, in the form of their code (the paper has sqrt(t / f) alone).

    Example:
        >>> keep_rate(np.array([0, 96, 4]), threshold=0.06).round(4)
        array([0.    , 0.3125, 1.    ])
    """
    if threshold <= 0:
        raise ValueError(f"threshold must be above 0. Received: {threshold}")
    share = np.asarray(counts, np.float64) / max(1, counts.sum())
    ratio = threshold / np.where(share > 0, share, 1.0)
    return np.where(share > 0, np.minimum(1.0, np.sqrt(ratio) + ratio), 0.0)


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
        raise DataError(
            "The training part holds no positive (an item exposed and clicked). "
            "Check the label (stage_values, rating_threshold) and the split."
        )
    return mass / total
