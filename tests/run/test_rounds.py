"""The rule of a race, on curves that are known beforehand: nothing is trained here."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tfrs_pipeline.run import rounds
from tfrs_pipeline.run.rounds import FIRST_EPOCHS, FIRST_SECONDS, STEP, Curve, standing, winner

CURVES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30)


def full(name: str, values: Sequence[float], epoch: float = 5.0) -> Curve:
    """Makes the curve of a recipe trained to its end, whose epochs take equally long."""
    seconds = tuple(itertools.accumulate(itertools.repeat(epoch, len(values))))
    return Curve(name, seconds, tuple(values), has_ended=True)


def until(curve: Curve, num_epochs: int) -> Curve:
    is_all = num_epochs == len(curve.values)
    return Curve(curve.name, curve.seconds[:num_epochs], curve.values[:num_epochs], is_all)


def raced(known: Sequence[Curve], budget: float | None = None) -> tuple[list[Curve], list[str]]:
    """Replays a race on known curves; returns where each recipe stopped, and who had the turns."""
    curves, turns = [until(curve, 0) for curve in known], list[str]()
    while (name := standing(curves, budget).next) is not None:
        place = [curve.name for curve in known].index(name)
        whole, done = known[place], len(curves[place].values)
        assert done < len(whole.values), "An ended training cannot have another turn."
        curves[place] = until(whole, done + 1)
        turns += [name] if turns[-1:] != [name] else []
    return curves, turns


def test_a_slow_starter_that_rises_wins() -> None:
    early = full("early", [0.30, 0.33, 0.34, 0.34, 0.34, 0.34, 0.34])
    late = full("late", [0.20, 0.28, 0.31, 0.32, *[0.33 + 0.002 * i for i in range(20)]])
    curves, _ = raced([early, late])
    assert winner(curves).name == "late"
    assert winner(curves).has_ended


def test_a_round_is_named_until_one_recipe_is_left() -> None:
    good = full("good", [0.30 + 0.005 * i for i in range(40)])
    flat = full("flat", [0.20] * 40)
    assert standing([until(good, 4), until(flat, 0)]).within == "round 1, 2 recipes left"
    assert standing([until(good, 5), until(flat, 5)]).within == ""
    assert standing([until(good, 5), until(flat, 5)]).next == "good"
    assert standing([until(good, 0)]).within == ""


def test_what_is_left_is_bounded_for_all_that_have_trained() -> None:
    good = full("good", [0.30 + 0.005 * i for i in range(40)])
    flat = full("flat", [0.20] * 40, epoch=2.0)
    epochs = {"good": 40, "flat": 60}
    # A recipe without an epoch has no known speed.
    assert rounds.most_left([until(good, 0), until(flat, 0)], epochs) == (0.0, 2)
    assert rounds.most_left([until(good, 5), until(flat, 0)], epochs) == (35 * 5.0, 1)
    begun = [until(good, 5), until(flat, 5)]
    assert rounds.most_left(begun, epochs) == pytest.approx((35 * 5.0 + 55 * 2.0, 0))
    # A recipe that is dropped or has ended trains no further.
    curves, _ = raced([good, flat])
    assert "flat" in standing(curves).dropped
    left = rounds.most_left([until(good, 30), curves[1]], epochs)
    assert left == pytest.approx((10 * 5.0, 0))


def test_one_that_cannot_catch_up_is_dropped_early() -> None:
    good = full("good", [0.30 + 0.005 * i for i in range(40)])
    flat = full("flat", [0.20] * 40)
    curves, _ = raced([good, flat])
    assert winner(curves) == good
    spent, behind = standing(curves).dropped["flat"]
    assert curves[1].spent == spent <= max(FIRST_SECONDS, FIRST_EPOCHS * 5.0)
    assert behind == pytest.approx(good.best_by(spent) - 0.2)
    budget = 2 * curves[1].spent + 1.0
    stopped, _ = raced([good, flat], budget)
    assert not winner(stopped).has_ended
    assert standing(stopped, budget).dropped == {"flat": (spent, behind)}


def test_a_tie_with_a_leader_that_has_ended_is_not_worth_the_time() -> None:
    # It can reach .3005: it gained .001 since 10 / 1.7 seconds.
    slow = until(full("slow", [0.2970, 0.2975, 0.2980, 0.2983, 0.2985, 0.3], epoch=2.0), 5)
    leader = full("leader", [0.30] * 6, epoch=2.0)
    assert standing([until(leader, 5), slow]).dropped == {}
    assert standing([full("leader", [0.30] * 5, epoch=2.0), slow]).dropped.keys() == {"slow"}
    promising = until(full("slow", [0.2920, 0.2930, 0.2980, 0.2983, 0.2985, 0.3], epoch=2.0), 5)
    assert standing([full("leader", [0.30] * 5, epoch=2.0), promising]).dropped == {}


def test_who_stays_close_is_trained_to_the_end() -> None:
    """Tries two close recipes, two equal ones (the first wins), and one alone."""
    close = {"one": [0.3, 0.4, 0.41], "other": [0.3, 0.39, 0.42]}
    cases: Any = ((close, "other"), ({"a": [0.2, 0.3], "b": [0.3, 0.2]}, "a"))
    for known, first in (*cases, ({"alone": [0.1, 0.05, 0.04, 0.03]}, "alone")):
        whole = [full(name, values) for name, values in known.items()]
        curves, _ = raced(whole)
        assert curves == whole
        assert winner(curves).name == first


def test_a_round_gives_each_recipe_the_same_cpu_time() -> None:
    cheap = full("cheap", [0.3 + 0.001 * i for i in range(400)], epoch=1.0)
    dear = full("dear", [0.3 + 0.01 * i for i in range(40)], epoch=10.0)
    quota = FIRST_EPOCHS * 10.0
    curves = [until(cheap, round(FIRST_SECONDS) - 1), until(dear, 0)]
    assert standing(curves).next == "cheap"
    curves[0] = until(cheap, round(FIRST_SECONDS))
    for within, cheap_epochs, dear_epochs, then in (
        ("round 1", FIRST_SECONDS, 0, "dear"),
        ("round 1", FIRST_SECONDS, FIRST_EPOCHS - 1, "dear"),
        ("round 2", FIRST_SECONDS, FIRST_EPOCHS, "cheap"),
        ("round 2", quota - 1, FIRST_EPOCHS, "cheap"),
        # The recipe that trained last goes on.
        ("round 3", quota, FIRST_EPOCHS, "cheap"),
        ("round 3", quota * STEP + 1, FIRST_EPOCHS, "dear"),
        ("round 4", quota * STEP + 1, FIRST_EPOCHS * STEP + 1, "dear"),
    ):
        found = standing([until(cheap, int(cheap_epochs)), until(dear, int(dear_epochs))])
        assert (found.within.partition(",")[0], found.next) == (within, then)


def test_a_budget_ends_the_race_with_the_leader() -> None:
    starts = {"poor": 0.1, "fair": 0.2, "good": 0.3}
    known = [full(x, [y + 0.001 * j for j in range(100)]) for x, y in starts.items()]
    unlimited = sum(curve.spent for curve in raced(known)[0])
    for budget in (10.0, 60.0, 200.0):
        curves, _ = raced(known, budget)
        # Epochs are not cut, and each recipe has a turn before the budget is checked.
        assert sum(curve.spent for curve in curves) <= max(budget, 5.0) + 5.0 < unlimited
    assert winner(curves).name == "good"
    assert not winner(curves).has_ended
    # A small budget still tries all.
    quick = [full(x, [y] * 100, epoch=0.2) for x, y in starts.items()]
    curves, _ = raced(quick, 6.0)
    assert min(len(curve.values) for curve in curves) >= FIRST_EPOCHS
    assert (standing(curves, 6.0).next, standing(curves, 6.0).within) == (None, "")


@given(st.lists(CURVES, min_size=1, max_size=4), st.integers(0, 10**6))
@example([[1.0, 0.0, 0.0, 0.0, 1.0, 2.0, 0.0], [0.0, 0.0, 1.0, 2.0]], 2)
def test_a_race_ends_with_a_winner(curves: list[list[float]], seed: int) -> None:
    known = [full(str(i), values, epoch=1.0 + (seed + i) % 7) for i, values in enumerate(curves)]
    trained, turns = raced(known)
    first = winner(trained)
    assert first in known
    dropped = standing(trained).dropped
    for curve in trained:
        # A recipe that did not win was behind when it was dropped, or has ended behind.
        assert curve is first or curve.best <= first.best
        assert curve.has_ended or curve.name in dropped
    # The rule reads only the curves, so that a race stopped after any turn goes on the same way.
    assert raced(known)[1] == turns


def test_the_building_of_a_network_counts_as_a_usual_epoch() -> None:
    curve = Curve("a").after([0.1, 0.2, 0.3], [9.0, 2.0, 2.0], has_ended=False)
    assert curve.seconds == (2.0, 4.0, 6.0)
    curve = curve.after([0.1, 0.2, 0.3, 0.4, 0.5], [7.0, 3.0], has_ended=True)
    assert curve.seconds == pytest.approx((2.0, 4.0, 6.0, 8.0, 11.0))
    assert curve.has_ended
    # One epoch was saved, but not its time.
    assert Curve("a").after([0.1, 0.2], [4.0], has_ended=False).seconds == (4.0, 8.0)
    # All epochs were saved, but the process was killed before it wrote any times.
    assert Curve("a").after([0.1, 0.2], [], has_ended=True).seconds == (0.0, 0.0)
