"""The rule of a race: from the curves so far, which recipe trains next and which are dropped.

It is successive halving by CPU time with one change: a recipe is not dropped for being in the worse
half, but if its own curve says that it will not catch up. So a slow starter may continue.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Before any comparison, each recipe has at least this many epochs and CPU seconds, unless an equal
# share of the budget is less.
FIRST_EPOCHS = 5
FIRST_SECONDS = 10.0
# Each round multiplies a recipe's CPU time by STEP. A recipe is expected to gain at most
# STILL_TO_GAIN times what it gained after the first 1 / LOOK_BACK of its time. Chosen on the curves
# of recorded races: docs/explanation/tried.md.
STEP, LOOK_BACK, STILL_TO_GAIN = math.sqrt(2), 1.7, 2.0
# A recipe must promise this many times the best value of a leader that has ended, not just a tie.
WORTH_MORE_TIME = 1.01


@dataclass(frozen=True)
class Curve:
    """The curve of one recipe.

    `seconds` are the CPU seconds of its epochs up to the end of each; building the network, which
    each turn repeats, does not count.
    """

    name: str
    seconds: tuple[float, ...] = ()
    values: tuple[float, ...] = ()  # The validation metric after each epoch.
    has_ended: bool = False  # By itself: by its patience, or all epochs done.

    @property
    def spent(self) -> float:
        """CPU seconds so far."""
        return self.seconds[-1] if self.seconds else 0.0

    @property
    def best(self) -> float:
        """Best value so far; minus infinity before the first epoch."""
        return max(self.values, default=-math.inf)

    @property
    def best_epoch(self) -> int:
        """Epoch, from 1, of the best value; 0 before the first."""
        return self.values.index(self.best) + 1 if self.values else 0

    def after(
        self, values: Sequence[float], durations: Sequence[float], has_ended: bool
    ) -> "Curve":
        """Returns the curve after a turn: the values of all epochs, the earlier turns' included.

        `durations` are the CPU seconds of the turn's epochs. The first includes building the
        network, so the median of the other epochs replaces it.
        """
        known = [b - a for a, b in itertools.pairwise((0.0, *self.seconds))]
        usual = [*known, *durations[1:]] or durations[:1]
        each = [*known, *([statistics.median(usual)] if durations else []), *durations[1:]]
        # An epoch has no duration if its process was killed after saving it.
        each += [statistics.median(each or [0.0])] * (len(values) - len(each))
        seconds = tuple(itertools.accumulate(each[: len(values)]))
        return Curve(self.name, seconds, tuple(values), has_ended)

    def has_ended_by(self, seconds: float) -> bool:
        """Returns whether the training has ended within a number of CPU seconds."""
        return self.has_ended and self.spent <= seconds

    def best_by(self, seconds: float) -> float:
        """Returns the best value within a number of CPU seconds."""
        reached = [x for x, at in zip(self.values, self.seconds, strict=True) if at <= seconds]
        return max(reached, default=-math.inf)

    def reach(self, seconds: float) -> float:
        """Estimates the value that it can still reach, from its first `seconds` CPU seconds."""
        now, before = self.best_by(seconds), self.best_by(seconds / LOOK_BACK)
        return now + STILL_TO_GAIN * (now - before)


@dataclass(frozen=True)
class Standing:
    """A race after some epochs."""

    next: str | None  # The recipe that trains the next epoch; None if the race is decided.
    within: str  # Names the round; empty once one recipe is left, which trains to its end.
    # Recipe -> its CPU seconds when it was dropped, and how far it was behind.
    dropped: dict[str, tuple[float, float]]


def standing(curves: Sequence[Curve], budget: float | None = None) -> Standing:
    """Says which recipe trains the next epoch, and which are dropped.

    Each round multiplies the CPU seconds that a recipe has in total by `STEP`. After a round, a
    recipe stays if it is not behind the leader's best by then, or if it can still reach that best,
    or 1% more if the leader has ended. The leader wins after the `budget`, CPU seconds of all
    recipes together.
    """
    is_over = budget is not None and sum(curve.spent for curve in curves) >= budget
    number, racing, dropped = 1, list(curves), dict[str, tuple[float, float]]()
    share = math.inf if budget is None else budget / len(curves)  # A small budget is for all.

    def is_next(curve: Curve) -> Standing:
        within = f"round {number}, {len(racing)} recipes left" if len(racing) > 1 else ""
        return Standing(None, "", dropped) if is_over else Standing(curve.name, within, dropped)

    for curve in curves:
        is_short = len(curve.values) < FIRST_EPOCHS or curve.spent < FIRST_SECONDS
        if is_short and curve.spent < share and not curve.has_ended:
            return is_next(curve)
    quota = max(min(FIRST_SECONDS, share), *(curve.seconds[:FIRST_EPOCHS][-1] for curve in curves))
    while True:
        number += 1
        # The last recipe to train comes first, since a change of recipes builds a network.
        racing.reverse()
        for curve in racing:
            if curve.spent < quota and not curve.has_ended:
                return is_next(curve)
        leader = max(racing, key=lambda curve: curve.best_by(quota))
        leading = leader.best_by(quota)
        least = leading * (WORTH_MORE_TIME if leader.has_ended_by(quota) else 1.0)
        for curve in racing:
            best = curve.best_by(quota)
            can_gain = not curve.has_ended_by(quota) and curve.reach(quota) >= least
            # The epoch that ends a turn may reach beyond the quota, and count for the winner.
            if curve.best < leading and not can_gain:
                dropped[curve.name] = min(curve.spent, quota), leading - best
        racing = [curve for curve in racing if curve.name not in dropped]
        if all(curve.has_ended_by(quota) for curve in racing):
            return Standing(None, "", dropped)
        quota *= STEP


def most_left(curves: Sequence[Curve], epochs: Mapping[str, int]) -> tuple[float, int]:
    """Returns the CPU seconds left if all train to the last of their `epochs`.

    Recipes without an epoch so far have no known speed and are left out; also returns how many.
    """
    dropped = standing(curves).dropped
    racing = [curve for curve in curves if curve.name not in dropped and not curve.has_ended]
    timed = [curve for curve in racing if curve.values]
    left = (curve.spent * (epochs[curve.name] / len(curve.values) - 1) for curve in timed)
    return sum(left), len(racing) - len(timed)


def winner(curves: Sequence[Curve]) -> Curve:
    """Returns the curve with the best value; the first of equals."""
    return max(curves, key=lambda curve: curve.best)
