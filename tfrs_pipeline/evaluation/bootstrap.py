"""Bootstrap intervals of means over queries."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import numpy as np

# Random draws in memory at a time: 64 MB as float64.
_DRAWS_PER_BLOCK = 1 << 23
# Digits of a difference that are read. What lies beyond them is rounding.
_MOST_DIGITS = 9


class Outcome(Enum):
    """How one model compares with another, by the 95% interval of their paired difference."""

    BETTER = "better"
    LEVEL = "level"
    WORSE = "worse"


@dataclass(frozen=True)
class Interval:
    """A mean over queries with its 95% bootstrap interval.

    All are NaN if no query was measured; low and high are NaN if only one was.
    """

    mean: float
    low: float
    high: float

    @property
    def outcome(self) -> Outcome:
        """Reads the interval as one of a difference: level if it includes 0, or is missing."""
        low, high = round(self.low, _MOST_DIGITS), round(self.high, _MOST_DIGITS)
        return Outcome.BETTER if low > 0 else Outcome.WORSE if high < 0 else Outcome.LEVEL

    def written(self, sign: str = "") -> str:
        """Writes the mean and, in brackets, the interval, so that its reader sees the outcome.

        The numbers have four digits, or so many that no end looks like 0 without being 0.

        Example:
            >>> Interval(0.0028, 0.00002, 0.0053).written("+")
            '+0.00280 [+0.00002, +0.00530]'
            >>> Interval(0.0028, 1e-18, 0.0053).written("+")  # A rounding error is 0.
            '+0.0028 [+0.0000, +0.0053]'
        """
        digits = 4
        while digits < _MOST_DIGITS and any(
            round(end, _MOST_DIGITS) and not round(end, digits) for end in (self.low, self.high)
        ):
            digits += 1
        numbers = self.mean, self.low, self.high
        mean, low, high = (f"{number:{sign}.{digits}f}" for number in numbers)
        return f"{mean} [{low}, {high}]"

    def as_dict(self) -> dict[str, float | None]:
        """Returns the numbers for JSON, with None for NaN."""
        return {name: None if np.isnan(value) else value for name, value in asdict(self).items()}


def bootstrap_intervals(
    values: np.ndarray, *, users: np.ndarray | None = None, num_bootstrap: int = 1000, seed: int = 0
) -> list[Interval]:
    """Computes the mean of each column of values, with a 95% percentile interval.

    Values are [num_queries, num_columns]; a mean skips NaN. Whole queries are drawn with
    replacement, the same for every column, so columns stay paired. If `users`, [num_queries], holds
    a user twice, users are drawn with all their queries, because these are not independent. The
    same seed and number of queries give the same resamples; without any, low and high are NaN.
    """
    is_measured = ~np.isnan(values)
    filled = np.where(is_measured, values, 0.0)
    # Each resample divides by its own number of measured queries.
    both = np.concatenate([filled, is_measured.astype(np.float64)], axis=1)
    means = _divide(both.sum(axis=0)[None])[0]
    # Only the resamples draw users. The mean above weighs every query alike.
    if users is not None:
        both = _sums_by_user(both, users)
    resampled = _divide(_resampled_sums(both, num_bootstrap, np.random.default_rng(seed)))
    intervals = []
    for column, mean in enumerate(means):
        # A single value has no spread.
        num_measured = np.count_nonzero(both[:, len(means) + column])
        draws = resampled[:, column] if num_measured > 1 else np.empty(0)
        draws = draws[~np.isnan(draws)]  # A resample may miss all queries of a rare slice.
        low, high = np.quantile(draws, [0.025, 0.975]) if len(draws) else (np.nan, np.nan)
        intervals.append(Interval(float(mean), float(low), float(high)))
    return intervals


def mean_interval(values: np.ndarray, users: np.ndarray) -> Interval:
    """Computes the mean and interval of one metric's values: [num_queries], or [1] for all lists.

    A single value of all lists has no interval.
    """
    by_user = users if len(values) == len(users) else None
    (interval,) = bootstrap_intervals(values[:, np.newaxis], users=by_user)
    return interval


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray) -> Interval:
    """Computes sum / sum of two columns, [num_users] each, with a 95% percentile interval.

    Whole users are drawn with replacement. The denominators may not all be 0.
    """
    values = np.stack([numerators, denominators], axis=1).astype(np.float64)
    draws = _divide(_resampled_sums(values, 1000, np.random.default_rng(0)))
    low, high = np.nanquantile(draws, [0.025, 0.975])  # A resample may miss all but zeros.
    return Interval(float(numerators.sum() / denominators.sum()), float(low), float(high))


def table_intervals(
    tables: Mapping[str, Mapping[str, np.ndarray]], **options: Any
) -> dict[str, dict[str, Interval]]:
    """Computes the intervals of the columns, [num_queries] each, of several tables by name.

    All have the same resamples, which take most of the time; `options` are as above.
    """
    columns = [values for table in tables.values() for values in table.values()]
    intervals = iter(bootstrap_intervals(np.stack(columns, axis=1), **options) if columns else ())
    return {name: {column: next(intervals) for column in table} for name, table in tables.items()}


def _sums_by_user(values: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Sums the rows of each user; returns the values unchanged if each has one."""
    numbers, num = np.unique(users, return_inverse=True, return_counts=True)[1:]
    if len(num) == len(users):
        return values
    starts = np.cumsum(num) - num
    return np.add.reduceat(values[np.argsort(numbers, kind="stable")], starts, axis=0)


def _resampled_sums(values: np.ndarray, num_bootstrap: int, rng: np.random.Generator) -> np.ndarray:
    """Sums the columns of resampled rows: [num_bootstrap, num_columns]."""
    num = len(values)
    sums = np.zeros((num_bootstrap, values.shape[1]))
    block_size = max(1, _DRAWS_PER_BLOCK // max(1, num))
    for start in range(0, num_bootstrap if num else 0, block_size):
        # How often each row is drawn, so that sums are one product of matrices.
        copies = np.empty((min(block_size, num_bootstrap - start), num))
        for row in copies:
            row[:] = np.bincount(rng.integers(num, size=num), minlength=num)
        sums[start : start + block_size] = copies @ values
    return sums


def _divide(sums: np.ndarray) -> np.ndarray:
    """Divides the left half, sums of values, by the right half, their numbers."""
    totals, counts = np.split(sums, 2, axis=1)
    return np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)
