"""Sampling distributions from counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.samples.popularity import sampling_probability
from tfrs_pipeline.samples.positives import positive_probability

COUNTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=30).map(
    lambda counts: np.array([0, *counts])
)


@given(COUNTS, st.floats(0, 2))
def test_probability_is_a_distribution_in_the_order_of_the_counts(
    counts: np.ndarray, alpha: float
) -> None:
    if alpha > 0 and counts.sum() == 0:
        return
    probability = sampling_probability(counts, alpha)
    assert probability[0] == 0
    assert probability.sum() == pytest.approx(1, abs=1e-12)
    order = np.argsort(counts[1:], kind="stable")
    assert (np.diff(probability[1:][order]) >= 0).all()


def test_ratio_is_the_power_of_the_ratio_of_counts() -> None:
    probability = sampling_probability(np.array([0, 81, 16, 0]), alpha=0.75)
    assert probability[1] / probability[2] == pytest.approx((81 / 16) ** 0.75)
    assert probability[3] == 0


def test_uniform_draws_items_without_a_click_too() -> None:
    probability = sampling_probability(np.array([0, 5, 0, 0]), alpha=0)
    assert probability.tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])


def test_alpha_one_is_the_distribution_of_positives() -> None:
    counts = np.array([0, 3, 1, 6])
    np.testing.assert_allclose(sampling_probability(counts, 1.0), positive_probability(counts))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"alpha must be 0 or more.*-1"):
        sampling_probability(np.array([0, 1]), -1)
    with pytest.raises(ValueError, match="corpus is empty"):
        sampling_probability(np.array([0]), 0)
    with pytest.raises(ValueError, match="alpha=0 "):
        sampling_probability(np.array([0, 0]), 0.75)
    with pytest.raises(DataError, match="holds no positive"):
        positive_probability(np.array([0, 0]))
