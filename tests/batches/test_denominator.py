"""The loss's denominator, estimated from the pipeline's own draws, against the exact sum.

The mean estimate over draws equals the sum over the corpus, within sampling error: for mixtures of
negatives, with and without hard negatives and resampling.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import tensorflow as tf

import tfrs_pipeline as tp
from tests import small_batches
from tests.small_batches import BATCH_SIZE, NUM_CANDIDATES, NUM_SAMPLES, SAMPLE_OF, SAMPLES
from tfrs_pipeline.samples.store import resampling_rate

NUM_EPOCHS = 300
SCORES = np.random.default_rng(1).normal(size=NUM_CANDIDATES + 1).astype(np.float32)
EXP = np.exp(SCORES.astype(np.float64))


@dataclass(frozen=True)
class Shelf:
    """An own kind that draws from the 20 newest items, newer ones more often; 40 is the newest."""

    num: int

    def draw(self, frame: tp.SamplingFrame, positive_rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        newest_of_two = tf.random.stateless_uniform([self.num, 2], seed, 21, 41, tf.int32)
        return tf.reduce_max(newest_of_two, axis=1)

    def expected_count(self, frame: tp.SamplingFrame) -> np.ndarray:
        rank = np.maximum(np.arange(frame.num_candidates + 1) - 20, 0)
        return self.num * (2 * rank - (rank > 0)) / 20**2


MIXTURES: dict[str, tuple[tp.Negatives, ...]] = {
    "in-batch": (tp.InBatch(),),
    "all": (tp.InBatch(), tp.Uniform(12), tp.Popularity(10), Shelf(9)),
}


def denominators(batches: tp.HybridBatches, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sample and the denominator of each row, [num_steps, BATCH_SIZE].

    Each loss is log(1 + D / exp s+), so its derivative by s+ gives D of each row.
    """
    task = tp.HybridRetrieval()

    def of_batch(batch: tp.Batch) -> tuple[tf.Tensor, tf.Tensor]:
        def embed(rows: tf.Tensor) -> tf.Tensor:
            return tf.gather(SCORES, rows)[..., tf.newaxis]

        positives, given = embed(batch.candidate_row), {"log_q": batch.log_q}
        given |= {"negative_embeddings": embed(batch.shared_row), "score_mask": batch.is_counted}
        if batch.hard is not None:
            given["hard_embeddings"] = embed(batch.hard.candidate_row)
            given |= {"hard_log_q": batch.hard.log_q, "hard_mask": batch.hard.is_counted}
        with tf.GradientTape() as tape:
            tape.watch(positives)
            loss = task(tf.ones_like(positives), positives, **given)
        share = -tape.gradient(loss, positives)[:, 0]
        return batch.weight, tf.exp(positives[:, 0]) * share / (1 - share)

    dataset = batches.dataset(0, num_steps).map(of_batch).batch(num_steps)
    weights, sums = next(dataset.as_numpy_iterator())
    return np.vectorize(SAMPLE_OF.__getitem__)(weights), sums


def exact(sample: int, hard_share: float, drawn_over_declared: np.ndarray) -> float:
    """Returns the exact weight of a sample's negatives, summed over the corpus."""
    never = [*small_batches.forbidden(SAMPLES, SAMPLES.query_rows[sample]), 0]
    shared = np.delete(EXP * drawn_over_declared, never).sum()
    pools = [SAMPLES.hard_pools[stage][sample] for stage in small_batches.STAGES]
    means = [EXP[pool].mean() for pool in pools if len(pool)]
    f = hard_share if means else 0.0
    return (1 - f) * shared + (f * NUM_CANDIDATES * np.mean(means) if means else 0.0)


@pytest.mark.parametrize(
    ("name", "hard_share", "exponent"), [("in-batch", 0.0, 0.6), ("all", 0.5, 0.0)]
)
def test_mean_denominator_is_the_exact_one(name: str, hard_share: float, exponent: float) -> None:
    hard = tp.FunnelLosers(share=hard_share, num=5) if hard_share else None
    rate = {"rate": resampling_rate(SAMPLES.counts, exponent)}
    batches = small_batches.make_batches(negatives=MIXTURES[name], hard=hard, examples=rate)
    declared, drawn = batches.expected_count, batches.expected_count.copy()
    if not exponent:
        # An epoch draws without replacement: the other rows come from the 149 other samples, not
        # from all 150 as declared. So every candidate but the positive comes 1 / 149 more often.
        in_batch = MIXTURES[name].count(tp.InBatch()) * (BATCH_SIZE - 1) * SAMPLES.counts
        drawn += in_batch * (1 / (NUM_SAMPLES - 1) - 1 / NUM_SAMPLES)
    ratio = np.divide(drawn, declared, out=np.zeros_like(drawn), where=declared > 0)
    assert ratio.max() < 1 + 1.01 / (NUM_SAMPLES - 1)
    expected = np.array([exact(i, hard_share, ratio) for i in range(NUM_SAMPLES)])

    samples, sums = denominators(batches, NUM_EPOCHS * NUM_SAMPLES // BATCH_SIZE)
    relative = sums / expected[samples]
    # Over all samples. Draws of different steps are independent, except that they share an epoch.
    by_step = relative.mean(axis=1)
    standard_error = by_step.std() / np.sqrt(len(by_step))
    assert abs(by_step.mean() - 1) < 4 * standard_error
    assert standard_error < 0.01
    # Over each sample alone.
    num = np.bincount(samples.ravel(), minlength=NUM_SAMPLES)
    mean = np.bincount(samples.ravel(), relative.ravel()) / num
    squares = np.bincount(samples.ravel(), relative.ravel() ** 2) / num
    z_scores = (mean - 1) / np.sqrt((squares - mean**2) / num)
    assert np.abs(z_scores).max() < 5
