"""Positives: items that were exposed to the user and clicked."""

from __future__ import annotations

import ibis
import numpy as np

from tfrs_pipeline.events.schema import DataError, Stage


def select_positives(events: ibis.Table) -> ibis.Table:
    """Keeps the events whose item was exposed and clicked.

    Args:
        events: Event table; `stage` is the furthest stage that the item reached.

    Returns:
        The rows of stage `clicked`, all columns.
    """
    return events.filter(events["stage"] == Stage.CLICKED.value)


def positive_probability(counts: np.ndarray) -> np.ndarray:
    """Computes q_positive, the distribution that the batches' positives are drawn from.

    q_positive(c) = counts(c) / sum of counts, since batches are a fair draw of the samples.

    Args:
        counts: [num_rows] samples per candidate row; row 0, "unknown", holds none.

    Returns:
        [num_rows] float64, sum 1.

    Raises:
        DataError: If there is no positive at all.

    Example:
        >>> positive_probability(np.array([0, 3, 1]))
        array([0.  , 0.75, 0.25])
    """
    total = counts.sum()
    if total <= 0:
        raise DataError(
            "The training part holds no positive (an item exposed and clicked). "
            "Check the label (stage_values, rating_threshold) and the split."
        )
    return np.asarray(counts, np.float64) / total
