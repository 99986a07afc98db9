"""Batches with hard negatives and resampled positives: what is drawn, and what it weighs."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

from tests.negatives.test_batches import (
    NUM_CANDIDATES,
    NUM_SAMPLES,
    SAMPLES,
    batch_list,
    columns_of,
)
from tfrs_pipeline.model.loss import HybridRetrieval
from tfrs_pipeline.negatives.batches import TrainingBatches, shared_columns
from tfrs_pipeline.samples.build import RowLists, Samples
from tfrs_pipeline.samples.positives import keep_rate, positive_probability, power_law_rate

HARD = (("retrieved", 3.0, 5), ("pre_ranked", 1.0, 4))


def with_pools(samples: Samples, seed: int = 0) -> Samples:
    """Gives each sample pools without its known positives and exposed items; some are empty."""
    rng = np.random.default_rng(seed)
    pools: dict[str, list[np.ndarray]] = {"retrieved": [], "pre_ranked": []}
    for row in samples.query_rows.tolist():
        excluded = np.concatenate([samples.known_positives[row], samples.exposed[row]])
        allowed = np.setdiff1d(np.arange(1, NUM_CANDIDATES + 1), excluded)
        for stage in pools:
            size = rng.choice([0, 3, 9])
            pools[stage].append(rng.permutation(allowed)[:size])
    lists = {stage: RowLists.from_lists(pool) for stage, pool in pools.items()}
    return Samples(**{**vars(samples), "hard_pools": lists})


HYBRID = with_pools(SAMPLES)
# The weight names the sample: no two are equal.
SAMPLE_OF = {float(weight): i for i, weight in enumerate(SAMPLES.weights)}


def hybrid_batches(samples: Samples = HYBRID, **options: Any) -> TrainingBatches:
    settings: dict[str, Any] = {
        "batch_size": 32,
        "easy_negatives": ((0.0, 12), (0.75, 10)),
        "history_length": 4,
        "seed": 3,
        "hard_share": 0.4,
        "hard_negatives": HARD,
    }
    return TrainingBatches(samples, **{**settings, **options})


def test_each_row_draws_from_its_own_pools_alone() -> None:
    for batch in batch_list(hybrid_batches(), 8):
        for i, weight in enumerate(batch["weight"]):
            sample = SAMPLE_OF[float(weight)]
            for stage, columns in (("retrieved", slice(0, 5)), ("pre_ranked", slice(5, 9))):
                pool = set(HYBRID.hard_pools[stage][sample].tolist())
                drawn = batch["hard_candidate_row"][i, columns]
                is_counted = batch["hard_is_counted"][i, columns]
                assert is_counted.all() == is_counted.any() == bool(pool)
                assert set(drawn[is_counted].tolist()) <= pool


def test_log_q_of_hard_columns_is_the_formula() -> None:
    num_cases = set()
    for batch in batch_list(hybrid_batches(), 8):
        for i, weight in enumerate(batch["weight"]):
            sample = SAMPLE_OF[float(weight)]
            has = [len(HYBRID.hard_pools[stage][sample]) > 0 for stage, _, _ in HARD]
            num_cases.add(tuple(has))
            f = 0.4 if any(has) else 0.0
            assert batch["hard_share"][i] == pytest.approx(f)
            total = sum(
                share for (_, share, _), available in zip(HARD, has, strict=True) if available
            )
            start = 0
            for (_, share, num), available in zip(HARD, has, strict=True):
                if available:
                    expected = np.log(num / (NUM_CANDIDATES * f * share / total))
                    got = batch["hard_log_q"][i, start : start + num]
                    np.testing.assert_allclose(got, expected, rtol=1e-5)
                start += num
    assert num_cases == {(True, True), (True, False), (False, True), (False, False)}


def test_shared_columns_weigh_one_minus_f() -> None:
    easy = batch_list(hybrid_batches(hard_share=0.0), 2)
    for batch, without in zip(batch_list(hybrid_batches(), 2), easy, strict=True):
        expected = without["log_q"] - np.log(1 - batch["hard_share"])[:, None]
        np.testing.assert_allclose(batch["log_q"], expected, rtol=1e-5)
        assert batch["log_q"].shape == (32, 54)


def test_a_hard_negative_that_slipped_in_is_masked_and_not_counted() -> None:
    """Pools hold forbidden items here, as if they had not been cleared when they were built."""
    pools = {
        "retrieved": RowLists.from_lists(
            [
                np.concatenate([SAMPLES.known_positives[row], SAMPLES.exposed[row], [41, 42]])
                for row in SAMPLES.query_rows.tolist()
            ]
        )
    }
    samples = Samples(
        **{
            **vars(SAMPLES),
            "hard_pools": pools,
            "counts": np.concatenate([SAMPLES.counts, [1, 1]]),
        }
    )
    num_masked = 0
    batches = hybrid_batches(samples, hard_negatives=(("retrieved", 1.0, 6),))
    for batch in batch_list(batches, 8):
        for i, query in enumerate(batch["query_row"]):
            forbidden = {*SAMPLES.known_positives[query], *SAMPLES.exposed[query]}
            is_good = [row not in forbidden for row in batch["hard_candidate_row"][i]]
            assert batch["hard_is_counted"][i].tolist() == is_good
            num_masked += is_good.count(False)
            if any(is_good):
                expected = np.log(sum(is_good) / (42 * 0.4))
                assert batch["hard_log_q"][i, 0] == pytest.approx(expected, rel=1e-5)
            else:
                assert batch["hard_share"][i] == 0
    assert num_masked > 50


@pytest.mark.parametrize("hard_share", [0.05, 0.5])
@pytest.mark.parametrize(("in_batch", "bank_batches"), [(True, 0), (False, 0), (True, 2)])
@pytest.mark.parametrize("easy", [(), ((0.0, 30),), ((0.75, 30),), ((0.0, 20), (0.75, 20))])
def test_mean_denominator_is_the_target(
    hard_share: float, in_batch: bool, bank_batches: int, easy: tuple[tuple[float, int], ...]
) -> None:
    """From the pipeline's own draws to the sum in the loss, for each sample of one query."""
    if (not easy and not in_batch) or (bank_batches and len(easy) == 1):
        return
    exp_scores = np.exp(np.random.default_rng(1).normal(size=NUM_CANDIDATES + 1))
    batches = hybrid_batches(
        in_batch=in_batch, easy_negatives=easy, hard_share=hard_share, bank_batches=bank_batches
    )
    reachable = batches.expected_count > 0
    # Rows of the same sample over many steps: only the draws differ.
    sums: dict[int, list[float]] = {}
    for batch in batch_list(batches, 1500):
        columns = shared_columns(batch).numpy()
        counted = batch["is_counted"]
        if in_batch:
            counted = counted & ~np.eye(32, len(columns), dtype=bool)
        shared = np.where(counted, exp_scores[columns] / np.exp(batch["log_q"]), 0).sum(axis=1)
        hard = exp_scores[batch["hard_candidate_row"]] / np.exp(batch["hard_log_q"])
        total = shared + np.where(batch["hard_is_counted"], hard, 0).sum(axis=1)
        for weight, value in zip(batch["weight"], total, strict=True):
            sums.setdefault(SAMPLE_OF[float(weight)], []).append(value)
    z_scores, ratios = [], []
    for sample, values in sums.items():
        row, own = SAMPLES.query_rows[sample], SAMPLES.candidate_rows[sample]
        excluded = {own, *SAMPLES.known_positives[row], *SAMPLES.exposed[row]}
        shared = sum(exp_scores[c] for c in range(1, 41) if c not in excluded and reachable[c])
        pools = [(share, HYBRID.hard_pools[stage][sample]) for stage, share, _ in HARD]
        pools = [(share, pool) for share, pool in pools if len(pool)]
        f = hard_share if pools else 0.0
        hard = sum(
            share / sum(s for s, _ in pools) * exp_scores[pool].mean() for share, pool in pools
        )
        exact = (1 - f) * shared + f * NUM_CANDIDATES * hard
        ratios.append(np.mean(values) / exact)
        z_scores.append((np.mean(values) - exact) / (np.std(values) / np.sqrt(len(values))))
    # An epoch is drawn without replacement: a row's 31 others come from the 149 other samples, so
    # that the in-batch term is 150 / 149 of what is declared; so is the bank's within the epoch.
    assert np.abs(z_scores).max() < 5
    assert np.mean(ratios) == pytest.approx(1, abs=0.01)


def test_positives_are_drawn_by_their_rate_and_q_follows() -> None:
    rate = power_law_rate(SAMPLES.counts, exponent=0.6)
    batches = hybrid_batches(SAMPLES, hard_share=0.0, positive_rate=rate)
    drawn = np.concatenate([batch["candidate_row"] for batch in batch_list(batches, 800)])
    q = positive_probability(SAMPLES.counts, rate)
    used = q > 0
    observed = np.bincount(drawn, minlength=len(q))[used]
    assert scipy.stats.chisquare(observed, q[used] * len(drawn)).pvalue > 1e-4
    np.testing.assert_allclose(
        q[used], SAMPLES.counts[used] ** 0.4 / (SAMPLES.counts[used] ** 0.4).sum()
    )
    batch = batch_list(batches, 1)[0]
    smoothed = np.where(SAMPLES.counts > 0, SAMPLES.counts**0.75, 0)
    n = 31 * q + 12 / NUM_CANDIDATES + 10 * smoothed / smoothed.sum()
    np.testing.assert_allclose(batch["log_q"][0], np.log(n[columns_of(batch)]), rtol=1e-5)


def test_drawn_batches_are_a_function_of_seed_and_step() -> None:
    rate = power_law_rate(SAMPLES.counts, exponent=0.6)
    whole = batch_list(hybrid_batches(positive_rate=rate), 5)
    rest = batch_list(hybrid_batches(positive_rate=rate), 2, start=3)
    for expected, got in zip(whole[3:], rest, strict=True):
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])


def test_weights_leave_q_positive_as_it_is() -> None:
    factor = keep_rate(SAMPLES.counts, threshold=0.02)
    plain = hybrid_batches(SAMPLES, hard_share=0.0)
    weighted = hybrid_batches(SAMPLES, hard_share=0.0, positive_weight=factor)
    np.testing.assert_array_equal(plain.expected_count, weighted.expected_count)
    a, b = batch_list(plain, 1)[0], batch_list(weighted, 1)[0]
    np.testing.assert_array_equal(a["candidate_row"], b["candidate_row"])
    mean = factor[SAMPLES.candidate_rows].mean()
    np.testing.assert_allclose(
        b["weight"], a["weight"] * factor[a["candidate_row"]] / mean, rtol=1e-5
    )


def test_shares_before_and_after_resampling() -> None:
    rate = power_law_rate(SAMPLES.counts, exponent=1.0)
    for option in ("positive_rate", "positive_weight"):
        equal = Samples(**{**vars(SAMPLES), "weights": np.ones(NUM_SAMPLES, np.float32)})
        share = hybrid_batches(equal, hard_share=0.0, **{option: rate}).positive_share
        np.testing.assert_allclose(
            share[SAMPLES.counts > 0], 1 / (SAMPLES.counts > 0).sum(), rtol=1e-5
        )


def test_same_gradient_as_khrylchenko_2025() -> None:
    """Their correction weighs each row by 1 - P(positive), stopped, and leaves c+ out of the sum.

    Correcting logQ Bias in Sampled Softmax (Khrylchenko et al., RecSys 2025): the gradient is
    (1 - P) * grad( -s(x, c+) + log sum over sampled negatives of exp(s - log q) ), with P the
    positive's softmax probability, here estimated from the same columns.
    """
    rng = np.random.default_rng(0)
    queries = tf.Variable(rng.normal(size=(5, 3)), dtype=tf.float32)
    candidates = tf.Variable(rng.normal(size=(9, 3)), dtype=tf.float32)
    log_q = tf.constant(rng.normal(size=(5, 9)), tf.float32)
    with tf.GradientTape() as tape:
        ours = HybridRetrieval()(queries, candidates, log_q=log_q)
    our_gradients = tape.gradient(ours, [queries, candidates])
    own = tf.eye(5, 9, dtype=tf.bool)
    with tf.GradientTape() as tape:
        scores = queries @ tf.transpose(candidates)
        positive = tf.linalg.diag_part(scores)
        negatives = tf.where(own, -np.inf, scores - log_q)
        log_negatives = tf.reduce_logsumexp(negatives, axis=1)
        probability = tf.sigmoid(positive - log_negatives)
        theirs = tf.reduce_sum(tf.stop_gradient(1 - probability) * (log_negatives - positive))
    their_gradients = tape.gradient(theirs, [queries, candidates])
    for a, b in zip(our_gradients, their_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"needs hard negatives.*the samples hold: none"):
        hybrid_batches(SAMPLES)
    with pytest.raises(ValueError, match="hard_share must be in"):
        hybrid_batches(hard_share=1.0)
    with pytest.raises(ValueError, match="exponent"):
        power_law_rate(SAMPLES.counts, 1.5)
    with pytest.raises(ValueError, match="threshold"):
        keep_rate(SAMPLES.counts, 0)
