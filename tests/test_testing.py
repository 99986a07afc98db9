"""What `check_draws` notices, and what it leaves alone."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import tfrs_pipeline as tp

# isort: split
import tensorflow as tf

from tfrs_pipeline.testing import check_draws


@dataclass(frozen=True)
class Own:
    """A kind made of two functions."""

    drawn: Any
    expected: Any

    def draw(self, *arguments: Any) -> tf.Tensor:
        return tf.convert_to_tensor(self.drawn(*arguments))

    def expected_count(self, frame: tp.SamplingFrame) -> np.ndarray:
        return np.asarray(self.expected(frame))


def frame_of(slope: float = 1, num: int = 50) -> tp.SamplingFrame:
    return tp.SamplingFrame.of_counts([0, *(np.arange(1, num + 1) ** slope)], 64)


@pytest.mark.parametrize(("drawn", "message"), [
    ([0, 1, 2], "drew 0, which it expects 0 times"),
    ([1, 4], "drew 4, which it expects 0 times"),
    ([1, 3], "drew 3, which it expects 0 times"),
    ([1.0, 2.0], "a vector of integers, not float32 of shape"),
    ([[1], [2]], r"not int32 of shape \(2, 1\)"),
    (1, r"not int32 of shape \(\)"),
    ([1, 1, 2], "expects 1 copies of candidate 1, and drew 2"),
    ([1], "expects 1 copies of candidate 2, and drew 0"),
])  # fmt: skip
def test_wrong_draws_are_noticed(drawn: Any, message: str) -> None:
    kind = Own(lambda *arguments: drawn, lambda frame: (0, 1, 1, 0))
    with pytest.raises(AssertionError, match=f"Own.*{message}"):
        check_draws(kind, frame_of(num=3))


@pytest.mark.parametrize("counts", [(0, 1), (1, 1, 1, 1), (0, np.nan, 1, 1), (0, -1, 1, 1)])
def test_impossible_counts_are_noticed(counts: Any) -> None:
    kind = Own(lambda *arguments: [1], lambda frame: counts)
    with pytest.raises(AssertionError, match=r"Own.*for each of 4 candidate rows, 0 at row 0"):
        check_draws(kind, frame_of(num=3))


@pytest.mark.parametrize("expected", [tp.Uniform(64), tp.Uniform(16), tp.Popularity(32, 1.0)])
def test_a_count_that_does_not_fit_the_draws_is_noticed(expected: Any) -> None:
    with pytest.raises(AssertionError, match=r"expects .* copies of candidate .*, and drew"):
        check_draws(Own(tp.Uniform(32).draw, expected.expected_count), frame_of())


def block(frame: tp.SamplingFrame, rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draws ten neighbouring items for a whole batch."""
    first = tf.random.stateless_uniform([1], seed, 0, frame.num_candidates, tf.int32)
    return (first + tf.range(10)) % frame.num_candidates + 1


def following(frame: tp.SamplingFrame, rows: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draws the item after each positive, as often as that positive comes."""
    return rows % frame.num_candidates + 1


KINDS = {
    "uniform": tp.Uniform(32),
    "popularity": tp.Popularity(32),
    "block": Own(block, tp.Uniform(10).expected_count),
    "following": Own(following, lambda x: np.append(0, np.roll(x.q_positive[1:], 1) * 64)),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("slope", [0, 1, 3])
def test_a_count_that_fits_is_left_alone(name: str, slope: int) -> None:
    check_draws(KINDS[name], frame_of(slope))
