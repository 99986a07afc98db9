"""The streaming frequency: a slow loop, theory of its spread, drift, and saved state."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tfrs_pipeline.samples.streaming import StreamingFrequency

MASK = 2**64 - 1


def splitmix(value: int) -> int:
    """The finaliser of splitmix64, as published, on Python's integers."""
    value &= MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


class SlowFrequency:
    """Algorithm of `StreamingFrequency`, one example at a time, in dictionaries."""

    def __init__(self, num_buckets: int, num_hashes: int, learning_rate: float) -> None:
        self.num_buckets = num_buckets
        self.keys = [splitmix((i + 1) * 0x9E3779B97F4A7C15) for i in range(num_hashes)]
        self.kept = np.array([1 - learning_rate, 1 - max(0.15, learning_rate)], np.float32)
        self.clock = self.num_rises = 0
        self.last_seen: dict[tuple[int, int], int] = {}
        # N and S of the long memory and of the recent one.
        self.num: dict[tuple[int, int], np.ndarray] = {}
        self.span: dict[tuple[int, int], np.ndarray] = {}

    def buckets(self, row: int) -> list[tuple[int, int]]:
        return [
            (i, (splitmix(row + key) & (2**63 - 1)) % self.num_buckets)
            for i, key in enumerate(self.keys)
        ]

    def update(self, rows: list[int]) -> None:
        gaps: dict[tuple[int, int], list[int]] = {}
        for row in rows:
            self.clock += 1
            for bucket in self.buckets(row):
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
        for bucket in self.buckets(row):
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


def state(frequency: StreamingFrequency) -> list[np.ndarray]:
    return [np.array(weight) for weight in frequency.get_weights()]


def assert_same_state(first: StreamingFrequency, second: StreamingFrequency) -> None:
    for got, expected in zip(state(first), state(second), strict=True):
        assert got.dtype == expected.dtype
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
@given(STREAMS, st.integers(1, 6), st.integers(1, 3), st.sampled_from([0.01, 0.1, 0.3, 1.0]))
def test_equals_a_slow_loop(
    stream: list[list[int]], num_buckets: int, num_hashes: int, learning_rate: float
) -> None:
    frequency = StreamingFrequency(
        num_buckets=num_buckets, num_hashes=num_hashes, learning_rate=learning_rate
    )
    slow = SlowFrequency(num_buckets, num_hashes, learning_rate)
    for batch in stream:
        frequency.update(tf.constant(batch, tf.int32))
        slow.update(batch)
    estimates = frequency(tf.range(12)).numpy()
    np.testing.assert_array_equal(estimates, [slow.estimate(row) for row in range(12)])


@pytest.mark.parametrize("batch_size", [1, 40])
def test_the_graph_equals_a_slow_loop_and_eager(batch_size: int) -> None:
    rng = np.random.default_rng(batch_size)
    frequency, eager = (StreamingFrequency(num_buckets=500, learning_rate=0.01) for _ in range(2))
    slow = SlowFrequency(500, 2, 0.01)
    update = as_graph(frequency)
    # All but row 0 rise steeply after the first batch, for the recent memory.
    batches = [np.zeros(20_000, np.int64), *rng.choice(60, (200, batch_size), p=zipf(60))]
    for batch in batches:
        rows = batch.astype(np.int32)
        update(rows)
        eager.update(rows)
        slow.update(rows.tolist())
    assert slow.num_rises > 0
    assert_same_state(frequency, eager)
    got = tf.function(frequency)(tf.range(70)).numpy()
    np.testing.assert_array_equal(got, [slow.estimate(row) for row in range(70)])


def test_int32_and_int64_ids_are_the_same_and_any_shape_is_kept() -> None:
    first, second = (StreamingFrequency(num_buckets=99) for _ in range(2))
    first.update(tf.constant([5, 2**31 - 1, 5], tf.int32))
    second.update(tf.constant([5, 2**31 - 1, 5], tf.int64))
    assert_same_state(first, second)
    rows = tf.constant([[[5], [2**31 - 1]], [[3], [5]]])
    grid = first(rows)
    assert grid.shape == (2, 2, 1)
    assert grid.dtype == tf.float32
    np.testing.assert_array_equal(
        tf.reshape(grid, [-1]), first(tf.cast(tf.reshape(rows, [-1]), tf.int64))
    )


def test_never_seen_is_rarer_than_anything_seen() -> None:
    frequency = StreamingFrequency(num_buckets=10_000)
    assert frequency(tf.constant([0, 1, 2])).numpy().tolist() == [1, 1, 1]
    frequency.update(tf.zeros([0], tf.int32))
    assert frequency(tf.constant([1])).numpy() == 1
    rng = np.random.default_rng(0)
    frequency.update(tf.constant([3]))
    for _ in range(20):
        frequency.update(tf.constant(rng.integers(1, 9, 50), tf.int32))
        seen = frequency(tf.range(1, 9)).numpy()
        unseen = frequency(tf.range(100, 200)).numpy()
        clock = int(frequency.get_weights()[0])
        np.testing.assert_array_equal(unseen, np.float32(1) / np.float32(clock + 1))
        assert seen.min() > unseen.max()
        assert np.isfinite(seen).all()
        assert seen.max() <= 1


def test_seen_once_is_one_over_the_length_of_the_stream() -> None:
    frequency = StreamingFrequency(num_buckets=10_000)
    for batch in ([1, 1], [7, 1], [1] * 500):
        frequency.update(tf.constant(batch))
    assert frequency(tf.constant(7)).numpy() == pytest.approx(1 / 504)


def test_a_candidate_that_always_comes_has_frequency_one() -> None:
    frequency = StreamingFrequency(num_buckets=100)
    for size in (1, 64, 3):
        frequency.update(tf.fill([size], 4))
    assert frequency(tf.constant(4)).numpy() == 1


def test_the_common_are_within_five_percent_on_a_zipf_stream() -> None:
    batch_size, num_steps, num_streams = 1024, 1500, 3
    q = zipf(1000)
    errors, relative_spread = [], []
    for seed in range(num_streams):
        rng = np.random.default_rng(seed)
        rows = 1 + rng.choice(len(q), (num_steps, batch_size), p=q)
        frequency = StreamingFrequency(num_buckets=50_000)
        run_stream(frequency, rows)
        often = np.bincount(rows.ravel(), minlength=len(q) + 1)[1:] >= 1000
        estimate = frequency(tf.range(1, len(q) + 1)).numpy()
        errors.append((estimate / q - 1)[often])
        relative_spread.append(spread(q, batch_size)[often])
    error, expected = np.concatenate(errors), np.concatenate(relative_spread)
    assert len(error) > 500
    # Bias is half a percent at most by theory; the rest of it is chance.
    chance = np.sqrt((expected**2).mean() / len(error))
    assert abs(error.mean()) < 0.005 + 4 * chance < 0.05
    assert np.abs(error).mean() < 0.05
    assert np.abs(error).mean() == pytest.approx(np.sqrt(2 / np.pi) * expected.mean(), rel=0.12)
    standardised = error / expected
    assert standardised.std() == pytest.approx(1, abs=4 / np.sqrt(2 * len(error)))
    # No candidate is lost to a collision or a false rise.
    assert np.abs(standardised).max() < 6


def test_the_rare_are_spread_as_theory_says() -> None:
    # A tenth of an occurrence a batch: 7% is what a memory of .01 leaves; 5% of mean absolute
    # error would need one of .0078.
    num_candidates, batch_size, num_steps = 500, 50, 12_000
    rows = 1 + np.random.default_rng(5).integers(0, num_candidates, (num_steps, batch_size))
    frequency = StreamingFrequency(num_buckets=50_000)
    run_stream(frequency, rows)
    error = frequency(tf.range(1, num_candidates + 1)).numpy() * num_candidates - 1
    expected = spread(np.array(1 / num_candidates), batch_size)
    assert expected == pytest.approx(0.069, abs=0.001)
    assert error.std() == pytest.approx(expected, rel=4 / np.sqrt(2 * num_candidates))
    # Read at a moment of no choice of its own: the open gap brings -a/2.
    assert error.mean() == pytest.approx(-0.005, abs=4 * expected / np.sqrt(num_candidates))


def gaps_then(
    frequency: StreamingFrequency, gaps: list[int], row: int = 7
) -> Iterator[tuple[int, float]]:
    """Lets `row` come once a batch, last in it, after the given gaps; yields what it is then."""
    update = as_graph(frequency)
    for i, gap in enumerate(gaps):
        update(np.array([0] * (gap - 1) + [row], np.int32))
        yield i, float(frequency(tf.constant(row)))


@pytest.mark.parametrize(("old", "new"), [(30, 10), (10, 30), (4, 40)])
def test_a_change_is_forgotten_as_the_memory_predicts(old: int, new: int) -> None:
    frequency = StreamingFrequency(num_buckets=1000, learning_rate=0.05)
    for i, estimate in gaps_then(frequency, [old] * 200 + [new] * 90):
        share = 0.95 ** max(0, i + 1 - 200)
        assert 1 / estimate == pytest.approx(share * old + (1 - share) * new, rel=1e-3)
    assert estimate * new == pytest.approx(1, abs=0.05)


def test_a_silent_candidate_fades_and_comes_back() -> None:
    frequency = StreamingFrequency(num_buckets=1000)
    before = [estimate for _, estimate in gaps_then(frequency, [10] * 600)]
    assert before[-1] == pytest.approx(0.1)
    num = (1 - 0.99**600) / 0.01
    for silence in (1000, 1000, 100_000):
        frequency.update(tf.zeros([silence], tf.int32))
    assert float(frequency(tf.constant(7))) == pytest.approx(num / (10 * num + 102_000), rel=1e-4)
    later = [estimate for _, estimate in gaps_then(frequency, [10] * 300)]
    # The silence was 10,200 gaps long: a mean of gaps would still hold 500 of them beside 95.
    assert later[150] == pytest.approx(0.1, rel=0.5)
    assert later[299] == pytest.approx(0.1, rel=0.1)


def test_a_new_candidate_is_known_after_some_occurrences() -> None:
    frequency = StreamingFrequency(num_buckets=1000)
    clock = frequency.get_weights()[0] + 10**9
    frequency.set_weights([clock, *frequency.get_weights()[1:]])
    gaps = np.random.default_rng(0).geometric(0.02, 200).tolist()
    estimates = [estimate for _, estimate in gaps_then(frequency, gaps)]
    assert estimates[0] == pytest.approx(1e-9, rel=1e-3)
    assert estimates[130] == pytest.approx(0.02, rel=0.5)
    # The spread of 200 gaps is 7%.
    assert estimates[199] == pytest.approx(0.02, rel=0.3)


def test_follows_a_shift_of_popularity() -> None:
    batch_size, q = 256, zipf(200)
    rng = np.random.default_rng(3)
    frequency = StreamingFrequency(num_buckets=20_000)
    run_stream(frequency, 1 + rng.choice(200, (1500, batch_size), p=q))
    # 1500 batches: at least 460 with an occurrence for the first 45, by when 1% of the old is left.
    run_stream(frequency, 1 + rng.choice(200, (1500, batch_size), p=q[::-1]))
    num_occupied = 1500 * (1 - (1 - q) ** batch_size)
    followed = num_occupied > 460
    assert followed.sum() >= 45
    error = frequency(tf.range(1, 201)).numpy()[::-1][followed] / q[followed] - 1
    expected = spread(q, batch_size)[followed]
    assert abs(error.mean()) < 0.05
    assert np.abs(error / expected).max() < 5


def test_cuts_of_the_stream_do_not_matter_to_what_comes_once_a_batch() -> None:
    rng = np.random.default_rng(0)
    # Halves of the candidates take turns, so that 20 examples in line with a turn hold no repeat.
    halves = [rng.permutation(20) + 20 * (i % 2) for i in range(60)]
    stream = np.concatenate(halves)
    states = []
    for size in (1, 10, 20):
        frequency = StreamingFrequency(num_buckets=5000)
        run_stream(frequency, stream.reshape(-1, size))
        states.append(frequency)
    assert_same_state(states[0], states[1])
    assert_same_state(states[0], states[2])


def test_ids_fill_the_buckets_evenly_and_the_hashes_are_independent() -> None:
    num_buckets = 1000
    frequency = StreamingFrequency(num_buckets=num_buckets, num_hashes=3)
    pvalues = []
    for stride in (1, 1000, 2**20):
        rows = tf.range(200_000, dtype=tf.int64) * stride
        cells = frequency._cells(rows).numpy() - np.arange(3)[:, np.newaxis] * num_buckets
        assert cells.min() >= 0
        assert cells.max() < num_buckets
        pvalues += [scipy.stats.chisquare(np.bincount(line)).pvalue for line in cells]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            pairs = cells[i] // 20 * 50 + cells[j] // 20
            pvalues.append(scipy.stats.chisquare(np.bincount(pairs, minlength=2500)).pvalue)
    # Of 18 tests, both ends: not even enough, or evener than chance.
    assert min(pvalues) > 1e-4
    assert max(pvalues) < 1 - 1e-4


def test_more_hashes_lose_fewer_to_collisions() -> None:
    rng = np.random.default_rng(0)
    rows = 1 + rng.integers(0, 300, (300, 100))
    excess = {}
    for num_hashes in (1, 2, 4):
        frequency = StreamingFrequency(num_buckets=600, num_hashes=num_hashes)
        run_stream(frequency, rows)
        excess[num_hashes] = (frequency(tf.range(1, 301)).numpy() * 300 > 1.6).mean()
    # A bucket is shared with probability 1 - exp(-299/600) = .39, all of them with its power.
    for num_hashes, share in excess.items():
        expected = 0.39**num_hashes
        assert share == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 300))


def test_the_clock_goes_past_what_a_float_can_count() -> None:
    frequency = StreamingFrequency(num_buckets=100)
    frequency.set_weights([np.int64(2**40), *frequency.get_weights()[1:]])
    frequency.update(tf.constant([1]))
    run_stream(frequency, np.tile([2, 1], (400, 1)))
    assert frequency.get_weights()[0] == 2**40 + 801
    assert float(frequency(tf.constant(1))) == pytest.approx(0.5, rel=0.2)


def trained() -> StreamingFrequency:
    frequency = StreamingFrequency(num_buckets=300, num_hashes=3, learning_rate=0.2)
    for seed in range(5):
        rows = np.random.default_rng(seed).integers(0, 50, 20)
        frequency.update(tf.constant(rows, tf.int32))
    return frequency


def assert_goes_on_alike(restored: StreamingFrequency, original: StreamingFrequency) -> None:
    assert restored.get_config() == original.get_config()
    assert_same_state(restored, original)
    for frequency in (restored, original):
        frequency.update(tf.constant([3, 60, 3, 8]))
    assert_same_state(restored, original)
    rows = tf.range(80)
    np.testing.assert_array_equal(restored(rows), original(rows))


def test_a_checkpoint_restores_every_bit(tmp_path: Path) -> None:
    original = trained()
    path = tf.train.Checkpoint(frequency=original).write(str(tmp_path / "checkpoint"))
    restored = StreamingFrequency(num_buckets=300, num_hashes=3, learning_rate=0.2)
    tf.train.Checkpoint(frequency=restored).read(path).assert_consumed()
    assert_goes_on_alike(restored, original)


@pytest.mark.parametrize("form", ["model.keras", "saved_model", "model.h5"])
def test_a_saved_keras_model_restores_every_bit(tmp_path: Path, form: str) -> None:
    original = trained()
    rows = tf.keras.Input([4], dtype=tf.int32)
    model = tf.keras.Model(rows, original(rows))
    model.save(tmp_path / form)
    loaded = tf.keras.models.load_model(tmp_path / form, compile=False)
    restored = loaded.get_layer(original.name)
    assert isinstance(restored, StreamingFrequency)
    assert_goes_on_alike(restored, original)


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
    assert len(frequency.non_trainable_weights) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_buckets": 0}, "num_buckets must be 1 or more. Received: 0"),
        ({"num_buckets": 9, "num_hashes": 0}, "num_hashes must be 1 or more"),
        ({"num_buckets": 9, "learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"num_buckets": 9, "learning_rate": 1.5}, r"Received: 1\.5"),
    ],
)
def test_refuses_arguments_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamingFrequency(**options)  # type: ignore[arg-type]


def test_refuses_other_shapes_and_dtypes() -> None:
    frequency = StreamingFrequency(num_buckets=9)
    with pytest.raises(ValueError, match=r"must be \[n\].*\(2, 1\)"):
        frequency.update(tf.constant([[1], [2]]))
    with pytest.raises(ValueError, match=r"int32 or int64\. Received: float32"):
        frequency.update(tf.constant([1.0]))
    with pytest.raises(ValueError, match="Received: string"):
        frequency(tf.constant(["a"]))
