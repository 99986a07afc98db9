"""The streaming frequency: a slow loop, theory of its spread, drift, and saved state."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tfrs_pipeline.model.streaming import StreamingFrequency


class SlowFrequency:
    """Algorithm of `StreamingFrequency`, one example at a time, in dictionaries."""

    def __init__(self, frequency: StreamingFrequency) -> None:
        rate = frequency.learning_rate
        self.cells = frequency._cells(tf.range(80)).numpy().T.tolist()
        self.kept = np.array([1 - rate, 1 - max(0.15, rate)], np.float32)
        self.clock = self.num_rises = 0
        self.last_seen: dict[int, int] = {}
        # N and S of the long memory and of the recent one.
        self.num: dict[int, np.ndarray] = {}
        self.span: dict[int, np.ndarray] = {}

    def update(self, rows: list[int]) -> None:
        gaps: dict[int, list[int]] = {}
        for row in rows:
            self.clock += 1
            for bucket in self.cells[row]:
                gap = self.clock - self.last_seen.get(bucket, 0)
                gaps.setdefault(bucket, []).append(gap)
                self.last_seen[bucket] = self.clock
        nothing = np.zeros(2, np.float32)
        for bucket, ended in gaps.items():
            num = self.num.get(bucket, nothing) * self.kept + np.float32(len(ended))
            span = self.span.get(bucket, nothing) * self.kept + np.float32(sum(ended))
            # N' / S' > 4 N / S, without the division.
            if num[1] * span[0] > np.float32(4) * num[0] * span[1]:
                self.num_rises += 1
                num[0], span[0] = num[1], span[1]
            self.num[bucket], self.span[bucket] = num, span

    def estimate(self, row: int) -> np.float32:
        found = []
        for bucket in self.cells[row]:
            if bucket in self.num:
                open_gap = np.float32(self.clock - self.last_seen[bucket])
                found.append(self.num[bucket][0] / (self.span[bucket][0] + open_gap))
            else:
                found.append(np.float32(1) / np.float32(self.clock + 1))
        return min(found)


def as_graph(frequency: StreamingFrequency) -> Callable[[np.ndarray], None]:
    return tf.function(
        frequency.update, input_signature=[tf.TensorSpec([None], tf.int32)], autograph=False
    )


def run_stream(frequency: StreamingFrequency, rows: np.ndarray) -> None:
    """Updates with each line of `rows`, [num_steps, B], in one graph."""

    @tf.function
    def run(batches: tf.Tensor) -> None:
        for i in tf.range(tf.shape(batches)[0]):
            frequency.update(batches[i])

    run(tf.constant(rows, tf.int32))


def assert_same_state(first: StreamingFrequency, second: StreamingFrequency) -> None:
    for got, expected in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(got, expected)


def spread(q: np.ndarray, batch_size: int, learning_rate: float = 0.01) -> np.ndarray:
    """Relative standard deviation of an estimate: gaps are geometric, weights decay by batch."""
    per_batch = batch_size * q / (1 - (1 - q) ** batch_size)
    return np.sqrt(learning_rate / (2 - learning_rate) * (1 - q) / per_batch)


def zipf(num_candidates: int) -> np.ndarray:
    weights = 1 / np.arange(1, num_candidates + 1)
    return weights / weights.sum()


STREAMS = st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=8)


@settings(max_examples=30)
@given(STREAMS, st.integers(1, 6), st.sampled_from([0.01, 0.1, 0.3, 1.0]))
def test_equals_a_slow_loop(
    stream: list[list[int]], num_buckets: int, learning_rate: float
) -> None:
    frequency = StreamingFrequency(num_buckets, learning_rate)
    slow = SlowFrequency(frequency)
    for batch in stream:
        frequency.update(tf.constant(batch, tf.int32))
        slow.update(batch)
    estimates = frequency(tf.range(12)).numpy()
    np.testing.assert_array_equal(estimates, [slow.estimate(row) for row in range(12)])


def test_the_graph_equals_a_slow_loop_whatever_the_integers_and_the_cuts() -> None:
    rng = np.random.default_rng(1)
    # All but row 0 rise steeply after the first batch, for the recent memory.
    batches = [np.zeros(20_000, np.int64), *rng.choice(60, (120, 20), p=zipf(60))]
    frequency, wide = (StreamingFrequency(500) for _ in range(2))
    slow = SlowFrequency(frequency)
    update = as_graph(frequency)
    for batch in batches:
        update(batch.astype(np.int32))
        wide.update(tf.constant(batch, tf.int64))
        slow.update(batch.tolist())
    assert slow.num_rises > 0
    assert_same_state(frequency, wide)
    grid = tf.reshape(tf.range(70), [7, 10, 1])
    found = tf.function(frequency)(grid)
    assert (found.shape, found.dtype) == ([7, 10, 1], tf.float32)
    np.testing.assert_array_equal(tf.reshape(found, [-1]), [slow.estimate(i) for i in range(70)])
    # Halves of the candidates take turns, so that 20 examples in line with a turn hold no repeat.
    stream = np.concatenate([rng.permutation(20) + 20 * (i % 2) for i in range(60)])
    cut = [StreamingFrequency(5000) for _ in range(2)]
    for size, one in zip((1, 10), cut, strict=True):
        run_stream(one, stream.reshape(-1, size))
    assert_same_state(*cut)


def test_what_was_never_seen_what_was_once_and_what_is_always() -> None:
    frequency = StreamingFrequency(10_000)
    assert frequency(tf.constant([0, 1])).numpy().tolist() == [1, 1]
    frequency.update(tf.zeros([0], tf.int32))
    for batch in ([1, 1], [7, 1], [1] * 500):
        frequency.update(tf.constant(batch))
    never, once, often = frequency(tf.constant([9, 7, 1])).numpy()
    assert never == np.float32(1 / 505)
    assert once == pytest.approx(1 / 504)
    assert never < once < often <= 1
    always = StreamingFrequency(100)
    run_stream(always, np.full((3, 64), 4))
    assert always(tf.constant(4)).numpy() == 1
    # The clock goes past what a float can count.
    frequency.set_weights([np.int64(2**40), *StreamingFrequency(10_000).get_weights()[1:]])
    run_stream(frequency, np.tile([2, 1], (400, 1)))
    assert frequency.get_weights()[0] == 2**40 + 800
    assert float(frequency(tf.constant(1))) == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize(
    ("q", "batch_size", "num_steps", "bias"),
    [
        # Often in a batch, on a stream by Zipf's law; and a tenth of an occurrence a batch, where
        # 7% is what a memory of .01 leaves and the open gap, at a moment of no choice, brings -a/2.
        (zipf(1000), 1024, 1500, 0.0),
        (np.full(500, 1 / 500), 50, 12_000, -0.005),
    ],
)
def test_estimates_are_spread_as_theory_says(
    q: np.ndarray, batch_size: int, num_steps: int, bias: float
) -> None:
    rows = 1 + np.random.default_rng(5).choice(len(q), (num_steps, batch_size), p=q)
    frequency = StreamingFrequency(50_000)
    run_stream(frequency, rows)
    often = np.bincount(rows.ravel(), minlength=len(q) + 1)[1:] >= 1000
    error = (frequency(tf.range(1, len(q) + 1)).numpy() / q - 1)[often]
    expected = spread(q, batch_size)[often]
    assert len(error) > 200
    standardised = (error - bias) / expected
    # The bias is half a percent at most, by theory, where a candidate comes often.
    slack = 0.0 if bias else 0.005 / expected.mean()
    assert abs(standardised.mean()) < slack + 4 / np.sqrt(len(error))
    assert standardised.std() == pytest.approx(1, abs=4 / np.sqrt(2 * len(error)))
    # No candidate is lost to a collision or a false rise.
    assert np.abs(standardised).max() < 6


def gaps_then(frequency: StreamingFrequency, gaps: list[int]) -> Iterator[tuple[int, float]]:
    """Lets row 7 come once a batch, last in it, after the given gaps; yields what it is then."""
    update = as_graph(frequency)
    for i, gap in enumerate(gaps):
        update(np.array([0] * (gap - 1) + [7], np.int32))
        yield i, float(frequency(tf.constant(7)))


def test_a_change_is_forgotten_as_the_memory_predicts() -> None:
    frequency = StreamingFrequency(1000, learning_rate=0.05)
    for i, estimate in gaps_then(frequency, [10] * 120 + [30] * 90):
        share = 0.95 ** max(0, i + 1 - 120)
        assert 1 / estimate == pytest.approx(share * 10 + (1 - share) * 30, rel=3e-3)


def test_a_silent_candidate_fades_and_comes_back() -> None:
    frequency = StreamingFrequency(1000)
    run_stream(frequency, np.tile([0] * 9 + [7], (600, 1)))
    num = (1 - 0.99**600) / 0.01
    for silence in (1000, 1000, 100_000):
        frequency.update(tf.zeros([silence], tf.int32))
    assert float(frequency(tf.constant(7))) == pytest.approx(num / (10 * num + 102_000), rel=1e-4)
    later = [estimate for _, estimate in gaps_then(frequency, [10] * 210)]
    # The silence was 10,200 gaps long: a mean of gaps would still hold 500 of them beside 95.
    assert later[150] == pytest.approx(0.1, rel=0.5)
    assert later[209] == pytest.approx(0.1, rel=0.2)


def test_ids_fill_the_buckets_evenly_and_the_hashes_are_independent() -> None:
    frequency = StreamingFrequency(1000)
    pvalues = []
    for stride in (1, 1000, 2**20):
        rows = tf.range(200_000, dtype=tf.int64) * stride
        cells = frequency._cells(rows).numpy() - np.array([[0], [1000]])
        assert 0 <= cells.min() <= cells.max() < 1000
        pairs = cells[0] // 20 * 50 + cells[1] // 20
        for drawn, num in ((cells[0], 1000), (cells[1], 1000), (pairs, 2500)):
            pvalues.append(scipy.stats.chisquare(np.bincount(drawn, minlength=num)).pvalue)
    # Of 9 tests, both ends: not even enough, or evener than chance.
    assert 1e-4 < min(pvalues) <= max(pvalues) < 1 - 1e-4


def trained() -> StreamingFrequency:
    frequency = StreamingFrequency(300, learning_rate=0.2)
    for seed in range(5):
        rows = np.random.default_rng(seed).integers(0, 50, 20)
        frequency.update(tf.constant(rows, tf.int32))
    return frequency


def test_a_checkpoint_restores_every_bit_and_goes_on_alike(tmp_path: Path) -> None:
    original, restored = trained(), StreamingFrequency(300, learning_rate=0.2)
    path = tf.train.Checkpoint(frequency=original).write(str(tmp_path / "checkpoint"))
    tf.train.Checkpoint(frequency=restored).read(path).assert_consumed()
    assert_same_state(restored, original)
    for frequency in (restored, original):
        frequency.update(tf.constant([3, 60, 3, 8]))
    assert_same_state(restored, original)


def test_nothing_is_trainable_and_half_precision_does_not_reach_it() -> None:
    policy = tf.keras.mixed_precision.global_policy()
    tf.keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        frequency = trained()
        estimate = frequency(tf.range(50))
    finally:
        tf.keras.mixed_precision.set_global_policy(policy)
    assert estimate.dtype == tf.float32
    np.testing.assert_array_equal(estimate, trained()(tf.range(50)))
    assert frequency.trainable_weights == []
