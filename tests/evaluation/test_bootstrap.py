import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfrs_pipeline.evaluation.bootstrap import Interval, Outcome, bootstrap_intervals


def test_interval_is_near_the_normal_approximation() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=(2000, 2))
    for column, interval in enumerate(bootstrap_intervals(values, num_bootstrap=4000)):
        mean = values[:, column].mean()
        half_width = 1.96 * values[:, column].std() / math.sqrt(len(values))
        assert interval.mean == pytest.approx(mean, rel=1e-12)
        # A quantile of 4000 draws is off by about sqrt(.025 * .975 / 4000) / density(1.96) = .042
        # standard errors. The tolerance is four times that; `half_width` is 1.96 standard errors.
        assert interval.low == pytest.approx(mean - half_width, abs=half_width * 4 * 0.042 / 1.96)
        assert interval.high == pytest.approx(mean + half_width, abs=half_width * 4 * 0.042 / 1.96)


def test_nan_counts_as_if_the_query_were_not_there() -> None:
    rng = np.random.default_rng(2)
    values = rng.random(3000)
    with_gaps = np.where(rng.random(3000) < 0.5, np.nan, values)
    left = with_gaps[~np.isnan(with_gaps)]
    (interval,) = bootstrap_intervals(with_gaps[:, None])
    assert interval.mean == pytest.approx(left.mean(), rel=1e-12)
    half_width = 1.96 * left.std() / math.sqrt(len(left))
    assert interval.high - interval.low == pytest.approx(2 * half_width, rel=0.1)


def test_columns_are_resampled_together() -> None:
    values = np.random.default_rng(3).random((300, 1))
    a, b, difference = bootstrap_intervals(np.hstack([values, values + 1, values - values - 1]))
    assert b.low == pytest.approx(a.low + 1)
    assert difference == Interval(-1, -1, -1)


def test_seed_alone_decides_the_interval_of_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).random((100, 3))
    whole = bootstrap_intervals(values, seed=5)
    assert bootstrap_intervals(values, seed=5) == whole
    assert bootstrap_intervals(values, seed=6) != whole
    (alone,) = bootstrap_intervals(values[:, 1:2], seed=5)
    assert alone.low == pytest.approx(whole[1].low, rel=1e-12)
    monkeypatch.setattr("tfrs_pipeline.evaluation.bootstrap._DRAWS_PER_BLOCK", 100 * 7)
    in_blocks = bootstrap_intervals(values, seed=5)
    assert [x.low for x in in_blocks] == pytest.approx([x.low for x in whole], rel=1e-12)


@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=8))
def test_the_interval_holds_within_the_values(values: Any) -> None:
    column = np.array(values).reshape(-1, 1)
    (interval,) = bootstrap_intervals(column, num_bootstrap=50)
    (mean_alone,) = bootstrap_intervals(column, num_bootstrap=0)
    assert mean_alone.as_dict() == {**interval.as_dict(), "low": None, "high": None}
    finite = [x for x in values if not math.isnan(x)]
    if len(finite) > 1:
        assert min(finite) - 1e-9 <= interval.low <= interval.high <= max(finite) + 1e-9
    else:
        assert interval.as_dict() == {"mean": next(iter(finite), None), "low": None, "high": None}


def test_queries_of_one_user_are_drawn_together() -> None:
    """Copies of a user's query count as one; with one query per user, users do not matter."""
    rng = np.random.default_rng(0)
    values, users = rng.random((50, 2)), rng.permutation(50)
    once = bootstrap_intervals(values)
    assert bootstrap_intervals(values, users=users) == once
    copied = np.repeat(np.arange(50), 10)
    (first, _), (again, _) = once, bootstrap_intervals(values[copied], users=copied)
    assert again.as_dict() == pytest.approx(first.as_dict(), abs=1e-12)
    # Counted as separate queries, they would seem to say more.
    (apart, _) = bootstrap_intervals(values[copied])
    assert apart.high - apart.low < 0.5 * (again.high - again.low)
    # A single user has no spread, whatever the number of queries.
    assert np.isnan(bootstrap_intervals(values, users=np.zeros(50))[0].low)


@given(st.floats(-0.2, 0.2), st.sampled_from([1.0, 1e-3, 1e-6, 1e-12]), st.floats(0, 0.1))
def test_what_is_written_shows_the_outcome(low: float, scale: float, width: float) -> None:
    """A reader who sees only the text says the same of it as the rule."""
    interval = Interval(low * scale + width / 2, low * scale, low * scale + width)
    mean, ends = interval.written("+").split(" ", 1)
    shown_low, shown_high = map(float, ends.strip("[]").split(", "))
    expected = {True: Outcome.BETTER, False: Outcome.LEVEL}[shown_low > 0]
    assert interval.outcome is (Outcome.WORSE if shown_high < 0 else expected)
    assert float(mean) == pytest.approx(interval.mean, abs=1e-4)
    digits = {len(number.partition(".")[2]) for number in (mean, *ends.strip("[]").split(", "))}
    assert len(digits) == 1


def test_four_digits_are_enough_for_most() -> None:
    assert Interval(0.0028, 0.0001, 0.0053).written() == "0.0028 [0.0001, 0.0053]"
    assert Interval(0.0028, 0.00002, 0.0053).written() == "0.00280 [0.00002, 0.00530]"
    assert Interval(0.0, 0.0, 0.0).written("+") == "+0.0000 [+0.0000, +0.0000]"
    assert Interval(0.1, math.nan, math.nan).written() == "0.1000 [nan, nan]"
