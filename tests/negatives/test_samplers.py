"""Kinds of negatives: drawn as often as declared, tail included; what they refuse."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from hypothesis import example, given
from hypothesis import strategies as st

from tfrs_pipeline import DataError, FunnelLosers, InBatch, Mixture, Uniform
from tfrs_pipeline.negatives.samplers import (
    Negatives,
    Popularity,
    SamplingFrame,
    build_alias_table,
    sampling_probability,
)
from tfrs_pipeline.samples.store import positive_probability

MASSES = st.lists(st.floats(0, 1e6), min_size=1, max_size=50).filter(lambda m: sum(m) > 1e-6)
COUNTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=30).map(
    lambda counts: np.array([0, *counts])
)


def frame_of(counts: list[int] | np.ndarray, batch_size: int = 5) -> SamplingFrame:
    return SamplingFrame.of_counts(counts, batch_size)


@given(MASSES)
@example([1.0] * 49)  # 49 times 1 / 49 sums to less than 1.
def test_an_alias_table_gives_back_the_distribution(masses: list[float]) -> None:
    probability = np.array(masses) / np.sum(masses)
    accept, alias = build_alias_table(probability)
    n = len(probability)
    rebuilt = accept.astype(np.float64) / n
    np.add.at(rebuilt, alias, (1 - accept.astype(np.float64)) / n)
    np.testing.assert_allclose(rebuilt, probability, rtol=0, atol=1e-7)
    assert (rebuilt[probability == 0] == 0).all()


@pytest.mark.parametrize("kind", [Uniform(500_000), Popularity(500_000)])
def test_draws_are_as_declared_over_all_of_a_large_corpus(kind: Negatives) -> None:
    num_candidates, num_batches = 300_000, 12
    frame = frame_of([0, *np.maximum(1, num_candidates // np.arange(1, num_candidates + 1))])
    own, seeds = tf.constant([1]), [tf.constant([7, step]) for step in range(num_batches)]
    rows = [kind.draw(frame, own, seed).numpy() for seed in seeds]
    observed = np.bincount(np.concatenate(rows), minlength=num_candidates + 1)
    expected = kind.expected_count(frame) * num_batches
    assert observed[0] == expected[0] == 0
    # Tail items are pooled in rank order until a cell expects 5 draws, so that all of them count.
    cell = np.floor(np.cumsum(expected[1:]) / 5).astype(np.int64)
    cells = np.stack([np.bincount(cell, x[1:]) for x in (observed, expected)])
    assert scipy.stats.chisquare(*cells[:, cells[1] > 0]).pvalue > 1e-4
    np.testing.assert_array_equal(kind.draw(frame, own, seeds[3]), rows[3])
    assert (rows[4] != rows[3]).any()


@given(COUNTS, st.floats(0, 2))
def test_probability_is_proportional_to_a_power_of_counts(counts: np.ndarray, alpha: float) -> None:
    if alpha > 0 and counts.sum() == 0:
        return
    probability = sampling_probability(counts, alpha)
    assert probability[0] == 0
    assert probability.sum() == pytest.approx(1, abs=1e-12)
    if alpha == 0:  # Unclicked items have a share too.
        np.testing.assert_allclose(probability[1:], 1 / (len(counts) - 1))
        return
    np.testing.assert_array_equal(probability > 0, counts > 0)
    most = counts.argmax()
    ratio = (counts / counts[most]) ** alpha
    np.testing.assert_allclose(probability / probability[most], ratio, rtol=1e-9)


def test_a_mixture_adds_up_what_its_kinds_draw() -> None:
    frame = SamplingFrame.of_counts([0, 6, 3, 0], batch_size=4)
    kinds: list[Negatives] = [InBatch(), Uniform(6), Popularity(5, alpha=1)]
    n = np.array([0, 2 + 2 + 10 / 3, 1 + 2 + 5 / 3, 2])
    twice = Mixture([InBatch(), *kinds], frame)
    np.testing.assert_allclose(twice.expected_count, n + np.array([0, 2, 1, 0]))
    mixture = Mixture(kinds, frame)
    np.testing.assert_allclose(mixture.expected_count, n)
    rows = tf.constant([2, 1, 1, 2])
    drawn = mixture.draw(rows, seed=[1, 0])
    assert drawn.shape == [4 + 6 + 5]
    np.testing.assert_array_equal(drawn[:4], rows)
    np.testing.assert_array_equal(drawn, mixture.draw(rows, seed=[1, 0]))
    assert (drawn != mixture.draw(rows, seed=[1, 1])).numpy().any()
    np.testing.assert_allclose(mixture.log_q(drawn), np.log(n[drawn]), rtol=1e-6)
    assert Mixture([Uniform(2)], frame).draw(rows[:3], seed=[1, 0]).shape == [2]
    # Nothing is clipped: log_q is -inf for an item that no kind draws.
    tail = Mixture([Uniform(1)], frame_of([0, *[1] * 10**6])).log_q(tf.constant([10**6]))
    assert tail.numpy() == pytest.approx(np.log(1e-6), rel=1e-6)
    assert Mixture([InBatch()], frame).log_q(tf.constant([3])).numpy() == -np.inf


def test_a_smaller_batch_is_filled_up_so_that_its_log_q_is_that_of_any_other() -> None:
    frame = SamplingFrame.of_counts([0, 6, 3, 0], batch_size=4)
    mixture = Mixture([InBatch(), Uniform(2)], frame)
    specs = [tf.TensorSpec(shape, tf.int32) for shape in ([None], [2])]
    unsized = tf.function(mixture.draw, specs)
    last, num_draws = tf.constant([3]), 2000
    drawn = np.array([unsized(last, [7, i]) for i in range(num_draws)])
    assert (drawn[:, 0] == 3).all()  # The row's own.
    np.testing.assert_array_equal(drawn[0], mixture.draw(last, [7, 0]))
    share = np.bincount(drawn[:, 1:4].ravel(), minlength=4) / (3 * num_draws)
    # Four standard deviations of a share over this many draws.
    np.testing.assert_allclose(share, frame.q_positive, atol=4 * (2 / 9 / (3 * num_draws)) ** 0.5)
    assert share[3] == 0
    longer = tf.constant([3], tf.int64)  # NumPy and Keras rows are int64.
    np.testing.assert_array_equal(mixture.draw(longer, [7, 0]), drawn[0])
    whole = tf.constant([2, 1, 1, 2])
    np.testing.assert_array_equal(unsized(whole, [7, 0]), mixture.draw(whole, [7, 0]))
    many = tf.ones([5], tf.int32)
    for draw in (mixture.draw, unsized, tf.function(mixture.draw)):
        with pytest.raises(tf.errors.InvalidArgumentError, match="batches of 4 positives or fewer"):
            draw(many, [7, 0])


@pytest.mark.parametrize("size", [16, 5], ids=["a batch", "the smaller last one"])
def test_expected_counts_hold_where_some_positives_are_of_unknown_items(size: int) -> None:
    """Three in ten positives are unknown. Copies are counted in the columns of other rows."""
    frame = SamplingFrame.of_counts([30, 40, 20, 10, 0], batch_size=16)
    mixture = Mixture([InBatch(), Uniform(4), Popularity(3, 1.0)], frame)
    num_batches, rng = 2000, np.random.default_rng(0)
    draw = tf.function(mixture.draw)
    copies = np.zeros(5)
    for i in range(num_batches):
        rows = tf.constant(rng.choice(5, size, p=[0.3, 0.4, 0.2, 0.1, 0.0]), tf.int32)
        others = draw(rows, tf.constant([7, i])).numpy()[1:]
        copies += np.bincount(others, minlength=5)
    n = np.array([0, 7 + 12 / 7, 4 + 6 / 7, 2.5 + 3 / 7, 1])
    np.testing.assert_allclose(mixture.expected_count, n)
    # Four standard deviations of a mean over the batches, whose variance is at most Poisson's.
    tolerance = 4 * np.sqrt(n[1:] / num_batches)
    assert (np.abs(copies[1:] / num_batches - n[1:]) < tolerance).all()
    assert copies[0] / num_batches == pytest.approx(4.5, abs=4 * np.sqrt(4.5 / num_batches))
    assert mixture.log_q(tf.constant([0])).numpy() == -np.inf


def test_refusals_of_counts() -> None:
    for counts in ([], [0], [0, 0], [7, 0], [-1, 2], [0, -1], [0, np.nan], [1, np.inf], [[0, 1]]):
        with pytest.raises(ValueError, match="a finite number for each candidate row"):
            SamplingFrame.of_counts(np.array(counts), 5)
    with pytest.raises(ValueError, match=r"batch_size must be .* 1 or more\. Received: 0"):
        SamplingFrame.of_counts([0, 2], 0)
    with pytest.raises(DataError, match="holds no positive"):
        positive_probability(np.array([0, 0]))
    for kinds, batch_size in (([InBatch()], 1), ([], 5)):
        with pytest.raises(ValueError, match="No shared column"):
            Mixture(kinds, frame_of([0, 1], batch_size))


@dataclass(frozen=True)
class Own:
    """A kind made of two functions."""

    drawn: Any
    expected: Any

    def draw(self, *arguments: Any) -> tf.Tensor:
        return tf.convert_to_tensor(self.drawn(*arguments))

    def expected_count(self, frame: SamplingFrame) -> np.ndarray:
        return np.asarray(self.expected(frame))


def own(drawn: Any, *counts: float) -> Own:
    """Returns an own kind that draws and expects the given values."""
    return Own(lambda *arguments: drawn, lambda frame: counts)


def test_a_mixture_may_be_made_in_a_graph() -> None:
    frame, rows = frame_of([0, 1, 1]), tf.constant([1])
    assert tf.function(lambda: Mixture([Uniform(3)], frame).draw(rows, [0, 0]))().shape == [3]


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64], ids=["int32", "int64"])
def test_integers_may_be_longer_and_a_seed_hold_the_step_of_a_graph(dtype: tf.DType) -> None:
    kinds = [InBatch(), own(tf.constant([2, 1], dtype), 0, 1, 1)]
    drawn = Mixture(kinds, frame_of([0, 3, 1], 2)).draw(tf.constant([1, 1]), [0, 0])
    assert drawn.numpy().tolist() == [1, 1, 2, 1]
    mixture, rows = Mixture([Uniform(9)], frame_of([0, 1, 1])), tf.constant([1])
    drawn = tf.function(lambda step: mixture.draw(rows, [7, step]))(tf.constant(3, dtype))
    np.testing.assert_array_equal(drawn, mixture.draw(rows, [7, 3]))
    counter = tf.Variable(3, dtype=dtype)  # Like an optimizer's `iterations`.
    drawn = tf.function(lambda: mixture.draw(rows, [7, counter]))()
    np.testing.assert_array_equal(drawn, mixture.draw(rows, [7, 3]))


@pytest.mark.parametrize(("kind", "arguments", "message"), [
    (Uniform, {"num": 0}, "num: got 0; must be greater than 0"),
    (Uniform, {"num": 2.5}, r"num: got 2\.5; must be a valid integer"),
    (Uniform, {"number": 5}, "unknown setting; did you mean 'num'"),
    (Popularity, {"alpha": 0.0}, "alpha: got 0.0; must be greater than 0"),
    (FunnelLosers, {"share": 0.0}, "share: got 0.0; must be greater than 0"),
    (FunnelLosers, {"share": -0.1}, "share: got -0.1; must be greater than 0"),
    (FunnelLosers, {"share": 1.0}, "share.*less than 1"),
    (FunnelLosers, {"stages": ()}, "stages.*at least one value"),
    (FunnelLosers, {"stages": ("foo",)}, "'foo'.*'retrieved', .* or 'exposed'"),
    (FunnelLosers, {"stages": ("ranked", "ranked")}, "stages.*a value twice"),
    (FunnelLosers, {"stages": ("exposed",)}, "never a negative.*set allow_exposed"),
    (FunnelLosers, {"share": np.nan}, "share.*finite number"),
    (FunnelLosers, {"num": 2.5}, "num.*valid integer"),
    (FunnelLosers, {"bottom_share": 0.0}, "bottom_share.*greater than 0"),
    (FunnelLosers, {"bottom_share": 0.3}, "of the stage 'ranked'.*0.3, stages .'retrieved'"),
])  # fmt: skip
def test_kinds_refuse_arguments(kind: type, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        kind(**arguments)


def test_equal_settings_are_one_however_they_are_written() -> None:
    """A folder of samples is identified by the repr of its settings."""
    written: Any = {"stages": "ranked", "num": 4.0, "bottom_share": 1}
    losers = FunnelLosers(stages=("ranked",), num=4, bottom_share=1.0)
    assert repr(FunnelLosers(**written)) == repr(losers)
