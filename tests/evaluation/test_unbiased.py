"""Metrics as if all items had been shown equally often: a slow loop, known exposure, limits."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfrs_pipeline import Log, MostPopular, Rankings, evaluate
from tfrs_pipeline.evaluation.bootstrap import bootstrap_intervals
from tfrs_pipeline.evaluation.metrics import EvenRecall, EvenWeights, find_hits, item_weights

NUM_ITEMS = 8


def even(
    found: Any, relevant: list[list[int]], users: list[int], exposure: Any, *cutoffs: int
) -> tuple[dict[str, np.ndarray], int | None]:
    """Measures even metrics of lists of candidates from 1; also the effective number of items."""
    rows = np.array(found)
    queries = np.repeat(np.arange(len(relevant)), [len(x) for x in relevant])
    pairs = queries, np.array([item for x in relevant for item in x], int)
    shown = np.array(exposure, float)
    weights = EvenWeights.of(*pairs, np.array(users), shown)
    if weights is None:
        return {}, None
    none = np.zeros(0)
    rankings = Rankings(rows, find_hits(rows, *pairs), none, none, none, weights)
    metrics = [EvenRecall(k) for k in cutoffs]
    values = ((str(metric), metric.measure(rankings)) for metric in metrics)
    return {name: value for name, value in values if value is not None}, weights.num


def slow(
    found: list[list[int]], relevant: list[list[int]], users: list[int], exposure: list[int], k: int
) -> tuple[list[float], float]:
    """Returns the recall of each user, and the effective number, by plain loops."""
    wanted = [item for of_query in relevant for item in of_query]
    raw = {item: 1 / max(exposure[item - 1], 1) for item in range(1, NUM_ITEMS + 1)}
    limit = math.sqrt(len(wanted)) * sum(raw[item] for item in wanted) / len(wanted)
    weight = {item: min(value, limit) for item, value in raw.items()}
    recalls, squares = [], 0.0
    for user in sorted(set(users)):
        own = [q for q, other in enumerate(users) if other == user and relevant[q]]
        if not own:
            continue
        total = sum(weight[item] for q in own for item in relevant[q])
        squares += sum((weight[item] / total) ** 2 for q in own for item in relevant[q])
        recall = 0.0
        for q in own:
            top = [item for item in found[q][:k] if item in relevant[q]]
            recall += sum(weight[item] for item in top) / total
        recalls.append(recall)
    return recalls, len(recalls) ** 2 / squares


@st.composite
def problems(draw: st.DrawFn) -> Any:
    num_queries = draw(st.integers(1, 6))
    items = st.permutations(range(1, NUM_ITEMS + 1))
    found = [draw(items) for _ in range(num_queries)]
    some = st.lists(st.integers(1, NUM_ITEMS), unique=True, max_size=5)
    relevant = [sorted(draw(some)) for _ in range(num_queries)]
    users = sorted(draw(st.integers(0, 3)) for _ in range(num_queries))
    exposure = draw(st.lists(st.integers(0, 900), min_size=NUM_ITEMS, max_size=NUM_ITEMS))
    return found, relevant, users, exposure, draw(st.integers(1, NUM_ITEMS))


@given(problems())
def test_equals_a_slow_loop_over_users(problem: Any) -> None:
    found, relevant, users, exposure, k = problem
    values, num_even = even(found, relevant, users, exposure, k)
    with_items = {user for user, x in zip(users, relevant, strict=True) if x}
    if sum(map(len, relevant)) < max(1, 1.5 * len(with_items)):
        assert (values, num_even) == ({}, None)
        return
    recalls, effective = slow(found, relevant, users, exposure, k)
    by_query = values[f"even_recall@{k}"]  # The users are in order, and have one value each.
    np.testing.assert_allclose(by_query[~np.isnan(by_query)], recalls, rtol=1e-9)
    assert num_even == round(effective)


def test_equal_exposure_gives_the_plain_metric_and_counts_every_item() -> None:
    found, relevant = [[1, 2, 3], [3, 1, 2]], [[1, 4], [2, 3]]
    values, num_even = even(found, relevant, [0, 1], [50] * NUM_ITEMS, 1, 2)
    np.testing.assert_allclose(values["even_recall@1"], [0.5, 0.5])
    assert num_even == 4


NUM_LIKED, NUM_USERS = 60, 2000


@pytest.mark.parametrize("is_known", [True, False])
def test_known_propensities_give_the_recall_of_all_that_users_like(is_known: bool) -> None:
    # Users like 60 of 200 items. The log shows item i to a user with probability p(i), and the
    # ranking finds the items that are shown most, so that what was clicked looks easier to find.
    rng = np.random.default_rng(0)
    p = np.linspace(0.9, 0.1, 200)
    liked = np.argsort(rng.random((NUM_USERS, 200)), axis=1)[:, :NUM_LIKED]
    clicked = [np.sort(1 + x[rng.random(NUM_LIKED) < p[x]]).tolist() for x in liked]
    found = np.tile(np.arange(1, 101), (NUM_USERS, 1))
    truth = np.mean(liked < 100, axis=1)
    shown = 1e6 * (p if is_known else p[::-1])
    values = even(found, clicked, list(range(NUM_USERS)), shown, 100)[0]["even_recall@100"]
    plain = [np.mean(np.array(x) <= 100) for x in clicked]
    error = values - truth
    # Four standard errors plus the bias of a ratio, of the order of 1 / items per user.
    tolerance = 4 * error.std() / math.sqrt(NUM_USERS) + 0.5 / np.mean([len(x) for x in clicked])
    assert tolerance < 0.03 < np.mean(plain) - truth.mean()
    assert (abs(error.mean()) < tolerance) == is_known


def test_no_weight_is_above_the_root_of_the_items_times_the_mean() -> None:
    exposure = np.array([1.0, *[1e6] * 7])
    weights = item_weights(exposure, np.array([0, *range(1, 8), *range(1, 8), 1]))
    mean = (1 + 15e-6) / 16
    assert weights[0] == pytest.approx(4 * mean)
    np.testing.assert_array_equal(weights[1:], 1e-6)


@pytest.mark.parametrize("first", ["clicked", "retrieved"])
def test_exposure_is_what_the_log_held_until_the_part_ends(first: str) -> None:
    # Each of two users has, in order, a three times, then b, c, d and e.
    items = [*"aaabcde"] * 2
    stages = [first, *["clicked"] * 6] * 2
    clicks = {"user_id": [1] * 7 + [2] * 7, "item_id": items, "stage": stages}
    log = Log.from_table(pa.table(clicks))
    split = log.split("last_n", validation=2, test=1, min_positives=3)
    for holdout, num_e in ((split.validation, 0), (split.test, 2)):
        num_events = {"a": 6, "b": 2, "c": 2, "d": 2, "e": num_e}
        # A log of clicks alone cannot tell what it showed.
        power = 0.5 if first == "clicked" else 1.0
        expected = [num_events[item] ** power for item in holdout.candidate_ids]
        assert holdout.exposure is not None
        np.testing.assert_allclose(holdout.exposure, expected)
    model = MostPopular().fit(log)
    assert evaluate(model, split.validation, cutoffs=(2,)).first.num_even == 4
    # With one item to find per user there is nothing to weigh.
    one_each = evaluate(model, split.test, cutoffs=(2,)).first
    assert one_each.num_even is None
    assert not any("even" in name for name in one_each.per_query)


def test_intervals_by_request_are_those_of_a_bootstrap_over_users() -> None:
    """Users ask once or fifty times, and each counts once: in the mean and in every resample."""
    rng = np.random.default_rng(0)
    num_users, num_bootstrap = 120, 4000
    users = np.repeat(np.arange(num_users), rng.choice([1, 2, 50], num_users)).tolist()
    relevant = [sorted(1 + rng.choice(NUM_ITEMS, 3, replace=False)) for _ in users]
    # Users with many queries find less, so that a mean over queries is another number.
    found = [
        np.roll(np.sort(1 + rng.permutation(NUM_ITEMS)), users.count(user)).tolist()
        for user in users
    ]
    exposure = rng.integers(1, 900, NUM_ITEMS).tolist()
    values = even(found, relevant, users, exposure, 2)[0]
    columns = values["even_recall@2"][:, np.newaxis]
    options: Any = {"users": np.array(users), "num_bootstrap": num_bootstrap}
    drawn = rng.integers(num_users, size=(num_bootstrap, num_users))
    (interval,) = bootstrap_intervals(columns, **options)
    recalls, _ = slow(found, relevant, users, exposure, 2)
    means = np.array(recalls)[drawn].mean(axis=1)
    assert interval.mean == pytest.approx(np.mean(recalls), rel=1e-9)
    # As in `test_bootstrap.py`, a quantile of 4,000 draws is off by about .042 standard errors.
    # Both have this error, and four times that of their difference is allowed.
    tolerance = 4 * math.sqrt(2) * 0.042 * means.std()
    assert interval.low == pytest.approx(np.quantile(means, 0.025), abs=tolerance)
    assert interval.high == pytest.approx(np.quantile(means, 0.975), abs=tolerance)
