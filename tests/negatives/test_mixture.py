"""The arithmetic of log_q: sums over sampled columns against sums over the corpus."""

import numpy as np
import pytest

from tfrs_pipeline.negatives.mixture import expected_count, log_expected_count, num_unreachable
from tfrs_pipeline.samples.popularity import sampling_probability
from tfrs_pipeline.samples.positives import positive_probability

NUM_CANDIDATES = 200
BATCH = 33
COUNTS = np.concatenate([[0], 1000 // np.arange(1, NUM_CANDIDATES + 1)])
COUNTS[-20:] = 0
Q_POSITIVE = positive_probability(COUNTS)
UNIFORM = sampling_probability(COUNTS, 0)
SMOOTHED = sampling_probability(COUNTS, 0.75)

Mixture = tuple[bool, list[tuple[np.ndarray, int]], int]
# In-batch or not, easy samplers, entries of the bank.
MIXTURES: dict[str, Mixture] = {
    "in_batch": (True, [], 0),
    "uniform": (False, [(UNIFORM, 64)], 0),
    "smoothed": (False, [(SMOOTHED, 64)], 0),
    "in_batch_uniform": (True, [(UNIFORM, 40)], 0),
    "all": (True, [(UNIFORM, 24), (SMOOTHED, 24)], 0),
    "in_batch_bank": (True, [], 2 * BATCH),
    "all_bank": (True, [(UNIFORM, 24), (SMOOTHED, 24)], 2 * BATCH),
}


def draw_sums(weights: np.ndarray, mixture: Mixture, num_draws: int) -> np.ndarray:
    """Draws batches and sums `weights` [num_rows] over the columns of each: [num_draws]."""
    in_batch, easy, bank_size = mixture
    rng = np.random.default_rng(0)
    terms = [(Q_POSITIVE, BATCH - 1)] if in_batch else []
    terms += [(Q_POSITIVE, BATCH)] * (bank_size // BATCH)
    sums = np.zeros(num_draws)
    for probability, num in [*terms, *easy]:
        rows = rng.choice(len(probability), size=(num_draws, num), p=probability)
        sums += weights[rows].sum(axis=1)
    return sums


@pytest.mark.parametrize("name", MIXTURES)
def test_mean_of_the_estimated_denominator_is_the_exact_one(name: str) -> None:
    in_batch, easy, bank_size = MIXTURES[name]
    count = expected_count(Q_POSITIVE, BATCH, easy, in_batch=in_batch, bank_size=bank_size)
    exp_scores = np.exp(np.random.default_rng(1).normal(size=NUM_CANDIDATES + 1))
    exp_scores[0] = 0
    weights = np.zeros(len(count))
    drawn = count > 0
    weights[drawn] = exp_scores[drawn] / np.exp(log_expected_count(count)[drawn])
    sums = draw_sums(weights, MIXTURES[name], num_draws=20_000)
    exact = exp_scores[count > 0].sum()
    standard_error = sums.std() / np.sqrt(len(sums))
    assert abs(sums.mean() - exact) < 4 * standard_error
    assert standard_error < 0.01 * exact


def test_the_in_batch_probability_on_all_columns_is_far_off() -> None:
    exp_scores = np.exp(np.random.default_rng(1).normal(size=NUM_CANDIDATES + 1))
    exp_scores[0] = 0
    num_columns = BATCH - 1 + 40
    weights = np.zeros(NUM_CANDIDATES + 1)
    drawn = Q_POSITIVE > 0
    weights[drawn] = exp_scores[drawn] / (num_columns * Q_POSITIVE[drawn])
    sums = draw_sums(weights, MIXTURES["in_batch_uniform"], num_draws=2_000)
    assert abs(sums.mean() / exp_scores[drawn].sum() - 1) > 0.4


def test_expected_count_is_the_mean_number_of_copies() -> None:
    in_batch, easy, bank_size = MIXTURES["all_bank"]
    count = expected_count(Q_POSITIVE, BATCH, easy, in_batch=in_batch, bank_size=bank_size)
    assert count.sum() == pytest.approx(BATCH - 1 + 48 + 2 * BATCH)
    for row in (1, 50, NUM_CANDIDATES):
        one = np.zeros(NUM_CANDIDATES + 1)
        one[row] = 1
        copies = draw_sums(one, MIXTURES["all_bank"], num_draws=20_000)
        tolerance = 4 * copies.std() / np.sqrt(len(copies))
        assert abs(copies.mean() - count[row]) < tolerance


def test_nothing_is_clipped() -> None:
    count = expected_count(np.array([0, 1.0, 0.0]), 3, [(np.array([0, 1 - 1e-12, 1e-12]), 1)])
    np.testing.assert_allclose(log_expected_count(count)[2], np.log(1e-12), rtol=1e-6)
    assert log_expected_count(count)[0] == -np.inf


def test_unreachable_items_are_counted() -> None:
    assert num_unreachable(expected_count(Q_POSITIVE, BATCH)) == 20
    assert num_unreachable(expected_count(Q_POSITIVE, BATCH, [(UNIFORM, 1)])) == 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="3 candidate rows"):
        expected_count(np.array([0, 0.5, 0.5]), 4, [(np.array([0, 1.0]), 2)])
    with pytest.raises(ValueError, match="must sum to 1"):
        expected_count(np.array([0, 0.5, 0.4]), 4)
    with pytest.raises(ValueError, match="row 0"):
        expected_count(np.array([0.5, 0.5]), 4)
    with pytest.raises(ValueError, match="No shared column"):
        expected_count(np.array([0, 1.0]), 1)
