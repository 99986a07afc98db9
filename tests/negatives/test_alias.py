"""Alias tables and the graph sampler: exact, tail included."""

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tfrs_pipeline.negatives.alias import AliasSampler, build_alias_table
from tfrs_pipeline.samples.popularity import sampling_probability

MASSES = st.lists(st.floats(0, 1e6), min_size=1, max_size=50).filter(lambda m: sum(m) > 1e-6)


def zipf_counts(num_candidates: int) -> np.ndarray:
    return np.concatenate([[0], np.maximum(1, num_candidates // np.arange(1, num_candidates + 1))])


@given(MASSES)
def test_table_gives_back_the_distribution(masses: list[float]) -> None:
    probability = np.array(masses) / np.sum(masses)
    accept, alias = build_alias_table(probability)
    n = len(probability)
    rebuilt = accept.astype(np.float64) / n
    np.add.at(rebuilt, alias, (1 - accept.astype(np.float64)) / n)
    np.testing.assert_allclose(rebuilt, probability, rtol=0, atol=1e-7)
    assert (rebuilt[probability == 0] == 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
def test_drawn_frequencies_match_over_a_million_items(alpha: float) -> None:
    probability = sampling_probability(zipf_counts(1_000_000), alpha)
    sampler = AliasSampler(probability)
    num_draws, num_batches = 2_000_000, 10
    observed = np.zeros(len(probability), np.int64)
    for step in range(num_batches):
        rows = sampler.sample(num_draws, tf.constant([7, step])).numpy()
        observed += np.bincount(rows, minlength=len(observed))
    expected = probability * num_draws * num_batches
    assert observed[0] == 0
    # Tail items are pooled in rank order until a cell expects 5 draws, so that all of them count.
    cell = np.floor(np.cumsum(expected[1:]) / 5).astype(np.int64)
    observed_cells = np.bincount(cell, observed[1:])
    expected_cells = np.bincount(cell, expected[1:])
    used = expected_cells > 0
    statistic = ((observed_cells - expected_cells)[used] ** 2 / expected_cells[used]).sum()
    assert scipy.stats.chi2.sf(statistic, used.sum() - 1) > 1e-4


def test_same_seed_same_rows() -> None:
    sampler = AliasSampler(sampling_probability(zipf_counts(100), alpha=0.0))
    first, again, other = (
        sampler.sample(50, tf.constant(seed)).numpy() for seed in ([1, 2], [1, 2], [1, 3])
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"sum to 1.*0\.5"):
        build_alias_table(np.array([0.25, 0.25]))
    with pytest.raises(ValueError, match="0 or more"):
        build_alias_table(np.array([1.5, -0.5]))
