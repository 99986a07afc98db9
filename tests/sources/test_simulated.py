"""The simulated funnel does what its formulas say, and the truth it states is the one it used."""

import math
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, chisquare

from tfrs_pipeline.sources.simulated import DEVICES, FunnelOptions, Simulation, simulate_funnel

NUM_USERS, NUM_ITEMS, NUM_REQUESTS = 200, 300, 1500
# A correct simulation fails a test at this level once in a million seeds; the seed is fixed.
LEVEL = 1e-6
Log = dict[str, np.ndarray]


@cache
def simulate(num_requests: int = NUM_REQUESTS, **options: Any) -> Simulation:
    sizes = {"num_users": NUM_USERS, "num_items": NUM_ITEMS, "num_requests": num_requests}
    return simulate_funnel(**sizes, seed=3, options=FunnelOptions(**options))


usual = simulate


def log_of(simulation: Simulation) -> Log:
    """Returns the columns of the event table, in the order of event_number; null is NaN."""
    table = simulation.log.events.order_by("event_number").to_pyarrow()
    return {name: table[name].to_numpy() for name in table.column_names}


@cache
def usual_log() -> Log:
    return log_of(usual())


def truth_of(simulation: Simulation, log: Log) -> np.ndarray:
    """Returns the true click probability of each event's pair."""
    matrix = simulation.click_probability(simulation.user_ids)
    return matrix[log["user_id"] - 1, log["item_id"] - 1]


def test_same_seed_same_log_and_another_seed_another() -> None:
    small: dict[str, Any] = {"num_users": 20, "num_items": 120, "num_requests": 40}
    simulations = [simulate_funnel(**small, seed=seed) for seed in (1, 1, 2)]
    for name, key in (("events", "event_number"), ("items", "item_id"), ("users", "user_id")):
        tables = [getattr(x.log, name).order_by(key).to_pyarrow() for x in simulations]
        assert [tables[0].equals(other) for other in tables[1:]] == [True, False]
    one, two, three = (s.click_probability([5, 2]) for s in simulations)
    np.testing.assert_array_equal(one, two)
    assert np.abs(one - three).max() > 0.01


def test_a_longer_simulation_begins_with_the_shorter_one() -> None:
    """The shorter one ends within its second block of 1,024 requests."""
    shorter, longer = log_of(simulate(1100)), usual_log()
    for name in set(shorter) - {"timestamp"}:
        np.testing.assert_array_equal(shorter[name], longer[name][: len(shorter[name])])


@settings(max_examples=4)
@given(st.lists(st.integers(1, 40), min_size=4, max_size=4), st.integers(1, 30))
def test_each_request_holds_the_configured_stages(sizes: list[int], num_requests: int) -> None:
    exposed, ranked, pre_ranked, retrieved = sorted(sizes)
    options = FunnelOptions(retrieved, pre_ranked, ranked, exposed, click_bias=3.0)
    few: dict[str, Any] = {"num_users": 5, "num_items": 40, "num_requests": num_requests}
    log = log_of(simulate_funnel(**few, seed=0, options=options))
    expected = {"retrieved": retrieved - pre_ranked, "pre_ranked": pre_ranked - ranked}
    expected |= {"ranked": ranked - exposed, "shown": exposed}
    for request in range(num_requests):
        is_request = log["request_id"] == request
        stages = Counter(log["stage"][is_request].tolist())
        stages["shown"] = stages.pop("clicked", 0) + stages.pop("exposed", 0)
        assert {stage: stages[stage] for stage in expected} == expected
        assert sum(stages.values()) == retrieved
        assert len(set(log["item_id"][is_request])) == retrieved
        assert len(set(log["user_id"][is_request])) == 1
    assert len(log["stage"]) == num_requests * retrieved


def test_shown_are_the_first_ranks_and_ranks_follow_scores() -> None:
    log, options = usual_log(), FunnelOptions()
    is_ranked = np.isin(log["stage"], ["ranked", "exposed", "clicked"])
    np.testing.assert_array_equal(is_ranked, ~np.isnan(log["rank"]))
    np.testing.assert_array_equal(is_ranked, ~np.isnan(log["score"]))
    is_shown = np.isin(log["stage"], ["exposed", "clicked"])
    np.testing.assert_array_equal(is_shown, log["rank"] < options.num_exposed)
    ranks, scores = (log[name][is_ranked].reshape(NUM_REQUESTS, -1) for name in ("rank", "score"))
    by_score = np.take_along_axis(ranks, np.argsort(-scores, axis=1), axis=1)
    np.testing.assert_array_equal(by_score, [np.arange(options.num_ranked)] * NUM_REQUESTS)


def test_without_noise_each_stage_is_a_sort() -> None:
    simulation = simulate(60, retrieval_noise=0, pre_rank_noise=0, rank_noise=0)
    log, preferences = log_of(simulation), simulation.preferences
    for request in range(60):
        of_request = {name: column[log["request_id"] == request] for name, column in log.items()}
        user_row = int(of_request["user_id"][0]) - 1
        truth, retrieval = {}, {}
        for row in range(NUM_ITEMS):
            cosine = float(np.dot(preferences.user_tastes[user_row], preferences.item_tastes[row]))
            popularity = float(preferences.popularity[row])
            truth[row + 1] = -4 + 4 * cosine + 0.3 * popularity
            retrieval[row + 1] = 4 * cosine + 1.0 * popularity
        taken = sorted(retrieval, key=lambda item: -retrieval[item])[:100]
        best = sorted(taken, key=lambda item: -truth[item])
        items = of_request["item_id"].tolist()
        assert items[:20] == best[:20]
        assert set(items[20:40]) == set(best[20:40])
        assert set(items[40:]) == set(best[40:])
        assert set(of_request["stage"][20:40]) == {"pre_ranked"}
        assert of_request["score"][:20] == pytest.approx([truth[item] for item in best[:20]])


def test_click_probability_is_the_stated_formula() -> None:
    simulation = usual()
    preferences = simulation.preferences
    assert np.linalg.norm(preferences.user_tastes, axis=1) == pytest.approx(1)
    assert np.linalg.norm(preferences.item_tastes, axis=1) == pytest.approx(1)
    # Zipf: the log of 1 / place, each place once.
    places = np.exp(preferences.popularity.max() - preferences.popularity)
    assert np.sort(places) == pytest.approx(np.arange(1, NUM_ITEMS + 1))
    assert preferences.popularity.mean() == pytest.approx(0)
    by_id = np.corrcoef(preferences.popularity, simulation.item_ids)[0, 1]
    assert abs(by_id) < 5 / math.sqrt(NUM_ITEMS)
    probability = simulation.click_probability([17, 4])
    for row, user_id in enumerate([17, 4]):
        cosines = preferences.item_tastes @ preferences.user_tastes[user_id - 1]
        logits = -4 + 4 * cosines + 0.3 * preferences.popularity
        assert probability[row] == pytest.approx(1 / (1 + np.exp(-logits)))


def chi_squared(is_clicked: np.ndarray, expected: np.ndarray, groups: np.ndarray) -> float:
    """Sums (clicks - expected)^2 / variance over the groups."""
    weights = is_clicked.astype(float), expected, expected * (1 - expected)
    observed, mean, variance = (np.bincount(groups, x) for x in weights)
    return float(((observed - mean) ** 2 / variance).sum())


@pytest.mark.parametrize("position_bias", [0.5, 1.0])
def test_clicks_follow_truth_times_examination(position_bias: float) -> None:
    simulation = usual() if position_bias == 0.5 else simulate(position_bias=position_bias)
    log = log_of(simulation)
    is_shown = np.isin(log["stage"], ["exposed", "clicked"])
    is_clicked = (log["stage"] == "clicked")[is_shown]
    rank = log["rank"][is_shown].astype(int)
    liking = truth_of(simulation, log)[is_shown]
    bins = np.digitize(liking, np.quantile(liking, np.linspace(0, 1, 11)[1:-1]))
    groups, bound = 10 * bins + rank, chi2.isf(LEVEL, 10 * 10)
    looks = 1 / (1 + rank) ** position_bias
    assert chi_squared(is_clicked, liking * looks, groups) < bound
    # The bias is visible: without examination, the truth does not fit the clicks.
    assert chi_squared(is_clicked, liking, groups) > 2 * bound
    # Nor does the truth of another user.
    strangers = np.roll(simulation.click_probability(simulation.user_ids), 1, axis=0)
    others = strangers[log["user_id"] - 1, log["item_id"] - 1][is_shown]
    assert chi_squared(is_clicked, others * looks, groups) > 2 * bound


@pytest.mark.parametrize("name", ["retrieval_noise", "pre_rank_noise", "rank_noise"])
def test_each_stage_has_a_noise_of_its_own(name: str) -> None:
    # What a stage keeps is worse with more noise; what the stages before it keep is the same.
    order = ["retrieved", "pre_ranked", "ranked", "exposed", "clicked"]
    names = ("retrieval_noise", "pre_rank_noise", "rank_noise")
    survivors = {stage: order[i:] for i, stage in enumerate(names)}
    more_noise: dict[str, Any] = {name: 6.0}
    noisy = simulate(**more_noise)
    means: dict[str, list[float]] = {}
    for simulation, log in ((usual(), usual_log()), (noisy, log_of(noisy))):
        truth = truth_of(simulation, log)
        for stage, stages in survivors.items():
            means.setdefault(stage, []).append(truth[np.isin(log["stage"], stages)].mean())
    assert means[name][1] < 0.9 * means[name][0]
    for before in list(survivors)[: list(survivors).index(name)]:
        assert means[before][1] == pytest.approx(means[before][0])


def test_what_is_liked_depends_on_the_device_by_the_stated_formula() -> None:
    simulation = simulate(device_weight=4.0)
    log, preferences = log_of(simulation), simulation.preferences
    assert simulation.log.request_features == {"device": "categorical"}
    assert np.linalg.norm(preferences.device_tastes, axis=1) == pytest.approx(4)
    # Each request has one device, and all devices are equally frequent.
    devices = log["device"].reshape(NUM_REQUESTS, -1)
    assert (devices == devices[:, :1]).all()
    counts = [int((devices[:, 0] == device).sum()) for device in DEVICES]
    assert sum(counts) == NUM_REQUESTS
    assert chisquare(counts).pvalue > LEVEL
    for row, device in enumerate(DEVICES):
        probability = simulation.click_probability([17], device)[0]
        taste = 4 * preferences.user_tastes[16] + preferences.device_tastes[row]
        logits = -4 + preferences.item_tastes @ taste + 0.3 * preferences.popularity
        assert probability == pytest.approx(1 / (1 + np.exp(-logits)))
        best = simulation.best_items([17], k=5, device=device)[0]
        assert best.tolist() == (1 + np.argsort(-probability)[:5]).tolist()
    # The clicks follow the formula for their device, and for no other.
    is_shown = np.isin(log["stage"], ["exposed", "clicked"])
    looks = 1 / (1 + log["rank"][is_shown]) ** 0.5
    is_clicked = (log["stage"] == "clicked")[is_shown]
    of_device = np.stack([simulation.click_probability(simulation.user_ids, d) for d in DEVICES])
    pairs = log["user_id"][is_shown] - 1, log["item_id"][is_shown] - 1
    place = np.searchsorted(DEVICES, log["device"][is_shown].astype(str))
    liking, others = of_device[place, *pairs], of_device[(place + 1) % 3, *pairs]
    bins = np.digitize(liking, np.quantile(liking, np.linspace(0, 1, 11)[1:-1]))
    bound = chi2.isf(LEVEL, 10)
    assert chi_squared(is_clicked, liking * looks, bins) < bound
    assert chi_squared(is_clicked, others * looks, bins) > 2 * bound


def test_devices_change_nothing_where_they_do_not_matter() -> None:
    log = simulate(60, device_weight=1e-12).log.events.order_by("event_number").to_pyarrow()
    without = simulate(60).log.events.order_by("event_number").to_pyarrow()
    names = ["user_id", "item_id", "timestamp", "stage", "request_id", "rank"]
    assert log.select(names).equals(without.select(names))
    assert "device" not in without.column_names


def test_best_items_equal_a_slow_loop() -> None:
    simulation = usual()
    user_ids = [9, 200, 1, 9, 31]
    best = simulation.best_items(user_ids, k=7)
    for user_id, items in zip(user_ids, best.tolist(), strict=True):
        probability = simulation.click_probability([user_id])[0].tolist()
        by_item = dict(zip(simulation.item_ids.tolist(), probability, strict=True))
        assert items == sorted(by_item, key=lambda item: -by_item[item])[:7]
    assert sorted(simulation.best_items([4], k=NUM_ITEMS)[0]) == list(range(1, NUM_ITEMS + 1))
    assert simulation.best_items([4]).shape == (1, 50)
    assert simulation.best_items([]).shape == (0, 50)


def test_time_goes_on_by_request() -> None:
    log = usual_log()
    times = log["timestamp"].reshape(NUM_REQUESTS, -1)
    assert (times == times[:, :1]).all()
    assert (np.diff(times[:, 0]) > np.timedelta64(0)).all()
    assert (np.diff(log["request_id"]) >= 0).all()
    assert np.timedelta64(29, "D") < times[-1, 0] - times[0, 0] < np.timedelta64(30, "D")


def explained_share(values: np.ndarray, groups: np.ndarray) -> float:
    """Returns the share of the variance that lies between the groups."""
    centered = values - values.mean(axis=0)
    of_groups = [centered[groups == group] for group in np.unique(groups)]
    between = sum(len(rows) * (rows.mean(axis=0) ** 2).sum() for rows in of_groups)
    return float(between / (centered**2).sum())


def test_features_tell_of_the_taste() -> None:
    genres = usual().log.users.order_by("user_id").to_pyarrow()["favourite_genre"].to_numpy()
    item_genres = usual().log.items.order_by("item_id").to_pyarrow()["genre"].to_numpy()
    # By chance it would be 9 / 199 and 9 / 299.
    assert 0.2 < explained_share(usual().preferences.user_tastes, genres) < 0.9
    assert 0.2 < explained_share(usual().preferences.item_tastes, item_genres) < 0.9
    # The same name is the same cluster on both sides.
    liking = usual().click_probability(usual().user_ids)
    is_favourite = genres[:, None] == item_genres[None, :]
    assert liking[is_favourite].mean() > 2 * liking[~is_favourite].mean()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_exposed": 21}, "num_exposed must be at most num_ranked.*Received: 21 and 20"),
        ({"num_pre_ranked": 101}, "num_pre_ranked must be at most num_retrieved"),
        ({"num_exposed": 0}, "num_exposed: got 0; must be greater than 0"),
        ({"num_exposed": 2.5}, "num_exposed: got 2.5; must be a valid integer"),
        ({"rank_noise": -1}, "rank_noise: got -1; must be greater than or equal to 0"),
        ({"device_weight": np.inf}, "device_weight: got inf; must be a finite"),
        ({"click_bias": np.nan}, "click_bias: got nan; must be a finite"),
        ({"popularity_weight": np.nan}, "popularity_weight: got nan; must be a finite"),
        ({"num_retrieved": 301}, "num_items at least num_retrieved, 301.*and 300"),
        ({"num_requests": 0}, "num_requests must be 1 or more"),
        ({"click_bias": -60}, "none of 1000 rows is a positive"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(**{"num_requests": 10} | options)


def test_refused_questions() -> None:
    with pytest.raises(ValueError, match=r"2 unknown user ids, the first is 0.*1 to 200"):
        usual().click_probability([0, 3, 201])
    with pytest.raises(ValueError, match=r"device must be one of .*None.*Received: 'tv'"):
        usual().click_probability([3], "tv")
    with pytest.raises(ValueError, match=r"device must be one of .*phone.*Received: None"):
        simulate(10, device_weight=1.0).best_items([3])
