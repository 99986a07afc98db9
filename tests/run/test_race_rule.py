"""The rule of a race, on curves that are known beforehand: nothing is trained here."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from hypothesis import example, given
from hypothesis import strategies as st

import tfrs_pipeline as tp
from tfrs_pipeline.run.race_rule import FIRST_EPOCHS, TIMED_EPOCHS, Curve, Turn, next_turn


def replayed(
    known: Mapping[str, Sequence[float]],
    seconds: Mapping[str, float] | None = None,
    budget: float = math.inf,
    done: Sequence[tuple[str, int]] = (),
) -> tuple[tp.Race, list[tuple[str, int]]]:
    """Races on known curves; returns the race, and the turns with the epochs after each.

    `done` are the turns before the race was stopped. A recipe diverges in its first NaN.
    """
    curves = {name: Curve(name, num_left=len(values)) for name, values in known.items()}
    turns: list[tuple[str, int]] = []

    def train(name: str, num_epochs: int, task: str) -> None:
        turns.append((name, num_epochs))
        values = known[name]
        assert len(curves[name].values) < num_epochs <= len(values)
        if any(map(math.isnan, values[:num_epochs])):
            curves[name] = dataclasses.replace(curves[name], failure="the loss is nan")
            return
        left = len(values) - num_epochs
        curves[name] = Curve(name, values[:num_epochs], (seconds or {}).get(name, 1.0), left)

    for name, num_epochs in done:
        train(name, num_epochs, "before")
    turns.clear()
    while isinstance(turn := next_turn(curves, budget), Turn):
        train(*turn)
    was_cut = turn
    return tp.Race([*curves.values()], "ndcg@100", was_cut=was_cut), turns


def epochs_of(race: tp.Race) -> dict[str, int]:
    return {curve.name: len(curve.values) for curve in race.curves}


def test_a_slow_starter_that_rises_wins() -> None:
    """As self-attention does on small logs, it is a quarter behind after nine epochs."""
    early = [0.06, 0.068, 0.07, 0.071, 0.072, *[0.0725] * 25]
    late = [0.0552 + 0.0201 * math.log(epoch / 9) for epoch in range(1, 61)]
    race, _ = replayed({"early": early, "late": late})
    assert race.winner == "late"


def test_a_recipe_is_dropped_if_its_own_curve_says_that_it_stays_behind() -> None:
    """At t, `rising` has gained .04 since t / 2, `slow` .02; both are at half of the leader."""
    first = FIRST_EPOCHS
    known = {"leader": [0.3] * 200, "flat": [0.22] * 200}
    for name, gain in (("rising", 0.04), ("slow", 0.02)):
        known[name] = [0.15 - gain] * (first // 2) + [0.15] * 200
    race, turns = replayed(known)
    assert epochs_of(race) == {
        "leader": 2 * first,
        "flat": first,
        "rising": 2 * first,
        "slow": first,
    }
    assert race.winner == "leader"
    assert turns == [
        *((name, first) for name in known),
        ("leader", 2 * first),
        ("rising", 2 * first),
    ]


def test_who_stays_close_is_trained_to_the_end() -> None:
    """Two equal recipes and two close ones that rise; the first of equals wins."""
    rise = [0.3 + 0.001 * epoch for epoch in range(60)]
    for known, first in (
        ({"a": [0.2, 0.3], "b": [0.3, 0.2]}, "a"),
        ({"one": rise, "other": [value - 0.001 for value in rise]}, "one"),
    ):
        race, _ = replayed(known)
        assert epochs_of(race) == {name: len(values) for name, values in known.items()}
        assert race.winner == first


def test_a_round_gives_each_recipe_the_same_cpu_time() -> None:
    flat = [0.3] * 1000
    _, turns = replayed({"cheap": flat, "dear": flat[:80]}, {"cheap": 1.0, "dear": 8.0})
    first = FIRST_EPOCHS
    assert turns[:5] == [
        ("cheap", first),
        ("dear", first),
        ("cheap", 8 * first),
        ("cheap", 16 * first),
        ("dear", 2 * first),
    ]


def test_a_budget_ends_the_race_with_the_leader() -> None:
    starts = {"poor": 0.298, "fair": 0.299, "good": 0.3}
    known = {x: [y + 0.001 * j for j in range(100)] for x, y in starts.items()}
    unlimited = sum(curve.spent for curve in replayed(known)[0].curves)
    for budget in (20.0, 60.0, 100.0):
        race, turns = replayed(known, budget=budget)
        assert sum(curve.spent for curve in race.curves) <= budget < unlimited
        assert race.winner == "good"
        assert turns[:3] == [(name, TIMED_EPOCHS) for name in known]
    # A small budget is for all.
    assert min(epochs_of(replayed(known, budget=30.0)[0]).values()) >= FIRST_EPOCHS
    # Epochs are not cut: who is being timed when the budget ends is the last.
    assert epochs_of(replayed(known, budget=1.0)[0]) == {"poor": TIMED_EPOCHS, "fair": 0, "good": 0}


def test_what_is_left_of_a_budget_goes_to_many_epochs() -> None:
    """After the first round, 2 of 30 seconds are left: for one epoch of `dear`, or for `cheap`."""
    rising = [0.1 + 0.001 * epoch for epoch in range(40)]
    seconds = {"slow": 10.0, "dear": 3.0, "cheap": 1.0}
    race, _ = replayed(dict.fromkeys(seconds, rising), seconds, 30.0)
    assert epochs_of(race) == {"slow": TIMED_EPOCHS, "dear": TIMED_EPOCHS, "cheap": 4}
    assert race.winner == "cheap"


def test_a_race_says_whether_its_budget_ended_it() -> None:
    known = {f"gains {x}": [0.1 + x * epoch / 1e4 for epoch in range(40)] for x in (9, 10)}
    line = "the budget ended the race: others might still have won"
    # Of the smallest one, nothing is left for the second recipe.
    races = [replayed(known, budget=budget)[0] for budget in (1.0, 9.0, math.inf)]
    assert [line in race.lines() for race in races] == [True, True, False]


def test_one_recipe_alone_does_not_race() -> None:
    assert replayed({"alone": [0.1, 0.2]})[1] == []


def test_a_recipe_that_diverges_drops_out_and_the_others_go_on() -> None:
    """It diverges in the first round, or in a later one, although it leads until then."""
    rise = [0.2 + 0.001 * epoch for epoch in range(40)]
    others = {"one": rise, "other": [value - 0.001 for value in rise]}
    alone, _ = replayed(others)
    for num, wins in ((1, []), (FIRST_EPOCHS + 1, [0.25] * FIRST_EPOCHS)):
        race, _ = replayed({"bad": [*[0.25] * (num - 1), *[math.nan] * 40], **others})
        bad, *rest = race.curves
        assert (race.winner, rest) == (alone.winner, alone.curves)
        assert list(bad.values) == wins
        assert "bad: the loss is nan" in race.lines()
    all_bad, _ = replayed(dict.fromkeys("ab", [math.nan] * 9))
    assert all(curve.failure for curve in all_bad.curves)


CURVES = st.lists(st.floats(-1.0, 1.0) | st.just(math.nan), min_size=1, max_size=60)


@given(
    st.lists(CURVES, min_size=1, max_size=4),
    st.integers(0, 10**6),
    st.just(math.inf) | st.floats(0, 99, exclude_min=True),
)
@example([[1.0, 0.0, 0.0, 0.0, 1.0, 2.0, 0.0], [0.0, 0.0, 1.0, 2.0]], 2, math.inf)
def test_a_race_ends_with_a_winner(values: list[list[float]], seed: int, budget: float) -> None:
    known = {str(i): curve for i, curve in enumerate(values)}
    seconds = {name: 1.0 + (seed + i) % 7 for i, name in enumerate(known)}
    race, turns = replayed(known, seconds, budget)
    first = next(curve for curve in race.curves if curve.name == race.winner)
    able = [curve for curve in race.curves if not curve.failure]
    assert first.best == max(curve.best for curve in able or race.curves)
    # The rule reads only the curves: a race that is stopped after any turn goes on the same way.
    for num in range(len(turns) + 1):
        again, rest = replayed(known, seconds, budget, turns[:num])
        assert turns[:num] + rest == turns
        assert again.curves == race.curves


def test_a_stopped_race_has_the_budget_that_each_round_had() -> None:
    """What was spent later does not count when the rounds before are decided again."""
    known = {"cheap": [0.2 + 0.002 * i for i in range(33)], "dear": [0.2] * 4 + [0.23] * 60}
    seconds = {"cheap": 3.0, "dear": 8.0}
    race, turns = replayed(known, seconds, 200.0)
    assert len(turns) > 4
    for num in range(len(turns)):
        again, rest = replayed(known, seconds, 200.0, turns[:num])
        assert turns[:num] + rest == turns
        assert again.curves == race.curves


def test_the_lines_of_a_race_name_what_each_recipe_came_to() -> None:
    curves = [
        Curve("slow", [0.1, 0.2], 3.0, 9),
        Curve("quick", [0.2, 0.3, 0.1], 1.0),
        Curve("none"),
    ]
    assert tp.Race(curves, "ndcg@20", {"sets": "no order"}).lines() == [
        "quick won: validation ndcg@20 0.3000 after epoch 2; its epochs took 3 of all 9 CPU "
        "seconds",
        "slow: best 0.2000 after epoch 2 of 2, in 6 CPU seconds",
        "none: not trained before the budget ended",
        "sets did not race: no order",
    ]
