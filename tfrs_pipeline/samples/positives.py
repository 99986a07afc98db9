"""Positives: items that were exposed to the user and clicked, less of the popular ones."""

from __future__ import annotations

from dataclasses import dataclass

import ibis
import numpy as np

from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.data.split import is_positive

NO_POSITIVE = (
    "The training part holds no positive (an item exposed and clicked). "
    "Check the label (stage_values, rating_threshold) and the split."
)


@dataclass(frozen=True)
class Positives:
    """Which events are positives, and how often each candidate's are trained.

    Positives are mostly popular items. With an exponent these are down-sampled and the others
    up-sampled: a positive of candidate c is drawn, or weighted, by rate(c) = counts(c)^(-exponent),
    so that c comes in proportion to counts(c)^(1 - exponent). It shifts what the model learns: log
    p(c | x) plus the log of the rate.

    Args:
        exponent: 0 changes nothing, 1 makes every clicked item equally likely.

    Raises:
        ValueError: If the exponent is not in [0, 1].
    """

    exponent: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.exponent <= 1:
            raise ValueError(f"exponent must be in [0, 1]. Received: {self.exponent}")

    @staticmethod
    def select(events: ibis.Table) -> ibis.Table:
        """Keeps the events whose item was exposed and clicked.

        Args:
            events: Event table; `stage` is the furthest stage that the item reached.

        Returns:
            The rows of stage `clicked`, all columns.
        """
        return events.filter(is_positive(events))

    def rate(self, counts: np.ndarray) -> np.ndarray | None:
        """Computes the resampling rate of each candidate's positives; only ratios matter.

        Args:
            counts: [num_rows] samples per candidate row.

        Returns:
            [num_rows] float64, 0 where there is no sample; None without resampling.

        Example:
            >>> Positives(exponent=0.5).rate(np.array([0, 16, 4]))
            array([0.  , 0.25, 0.5 ])
        """
        if self.exponent == 0:
            return None
        safe = np.maximum(np.asarray(counts, np.float64), 1.0)
        return np.where(np.asarray(counts) > 0, safe**-self.exponent, 0.0)


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
