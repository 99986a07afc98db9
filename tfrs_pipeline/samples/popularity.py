"""Popularity: training counts turned into sampling distributions."""

from __future__ import annotations

import numpy as np


def sampling_probability(counts: np.ndarray, alpha: float) -> np.ndarray:
    """Computes p(c) proportional to counts(c)^alpha over the corpus.

    alpha = 0 is uniform over every candidate, clicked or not; alpha = 1 is the distribution of
    in-batch negatives; .75 lies between (word2vec; Mikolov et al. 2013).

    Args:
        counts: [num_rows] training positives per candidate row. Row 0 is "unknown" and is never
            drawn, whatever its count.
        alpha: Exponent, 0 or more.

    Returns:
        [num_rows] float64, sum 1; 0 at row 0 and, for alpha > 0, at candidates without a count.

    Raises:
        ValueError: If alpha is negative, the corpus is empty or no candidate can be drawn.

    Example:
        >>> sampling_probability(np.array([0, 16, 1, 0]), alpha=0.75)
        array([0.        , 0.88888889, 0.11111111, 0.        ])
    """
    if alpha < 0:
        raise ValueError(f"alpha must be 0 or more: it is a power of the counts. Received: {alpha}")
    if len(counts) < 2:
        raise ValueError("The corpus is empty: row 0 is 'unknown', candidates start at row 1.")
    # 0^0 is 1 here, as wanted: uniform draws from items without a click too.
    mass = np.power(np.asarray(counts, np.float64), alpha)
    mass[0] = 0.0
    total = mass.sum()
    if total <= 0:
        raise ValueError(
            f"No candidate has a training positive, so none can be drawn with alpha={alpha}. "
            "Use alpha=0 (uniform), or check the training part."
        )
    return mass / total
