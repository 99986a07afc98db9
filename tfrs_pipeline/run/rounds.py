"""The rule of a race: from the curves so far, which recipe trains next and which are dropped.

It is successive halving by CPU time with one change: a recipe is not dropped for being in the worse
half, but if its own curve says that it will not catch up. So a slow starter may go on.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tfrs_pipeline.messages import counted

# Before any comparison, each recipe has at least this many epochs and CPU seconds.
FIRST_EPOCHS = 5
FIRST_SECONDS = 10.0
# Doubling the CPU time is expected to gain at most this many times what the last doubling gained.
# Chosen on the curves of nine logs: docs/explanation/tried.md.
STILL_TO_GAIN = 2.0


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
        now, before = self.best_by(seconds), self.best_by(seconds / 2)
        return now + STILL_TO_GAIN * (now - before)


@dataclass(frozen=True)
class Turn:
    """Which recipe trains next, until it has both `epochs` and CPU `seconds`, in total.

    The turn also ends at `limit` CPU seconds, where the budget does. `within` names its round.
    """

    name: str
    epochs: int
    seconds: float
    limit: float = math.inf
    within: str = field(default="the winner", compare=False)

    def is_over(self, curve: Curve) -> bool:
        """Returns whether the recipe has had its turn."""
        is_full = len(curve.values) >= self.epochs and curve.spent >= self.seconds
        return is_full or curve.spent >= self.limit


@dataclass(frozen=True)
class Standing:
    """A race after some turns."""

    turn: Turn | None  # None if the race is decided.
    # Recipe -> its CPU seconds when it was dropped, and how far it was behind.
    dropped: dict[str, tuple[float, float]]


def standing(curves: Sequence[Curve], budget: float | None = None) -> Standing:
    """Says which recipe trains next, and which are dropped.

    Each round doubles the CPU seconds that a recipe has in total. After a round, a recipe stays if
    it leads, or if what it can still reach is as good as the leader's best by then. The leader wins
    after the `budget`, CPU seconds of all recipes together. Recipes train in the order of `curves`.
    """
    left = math.inf if budget is None else budget - sum(curve.spent for curve in curves)
    number, racing, dropped = 1, list(curves), dict[str, tuple[float, float]]()

    def next_is(curve: Curve, epochs: int, seconds: float) -> Turn | None:
        within = f"round {number}, {counted(len(racing), 'recipe')} left"
        return Turn(curve.name, epochs, seconds, curve.spent + left, within) if left > 0 else None

    for curve in curves:
        if len(curve.values) < FIRST_EPOCHS and not curve.has_ended:
            return Standing(next_is(curve, FIRST_EPOCHS, 0.0), {})
    quota = max(FIRST_SECONDS, *(curve.seconds[:FIRST_EPOCHS][-1] for curve in curves))
    while True:
        number += 1
        for curve in racing:
            if curve.spent < quota and not curve.has_ended:
                return Standing(next_is(curve, 0, quota), dropped)
        leading = max(curve.best_by(quota) for curve in racing)
        for curve in racing:
            best = curve.best_by(quota)
            can_gain = not curve.has_ended_by(quota) and curve.reach(quota) >= leading
            # The epoch that ends a turn may reach beyond the quota, and count for the winner.
            if curve.best < leading and not can_gain:
                dropped[curve.name] = min(curve.spent, quota), leading - best
        racing = [curve for curve in racing if curve.name not in dropped]
        if all(curve.has_ended_by(quota) for curve in racing):
            return Standing(None, dropped)
        quota *= 2


def most_left(curves: Sequence[Curve], epochs: Mapping[str, int]) -> float | None:
    """Returns the CPU seconds left if all train to the last of their `epochs`; None if unknown."""
    dropped = standing(curves).dropped
    racing = [curve for curve in curves if curve.name not in dropped and not curve.has_ended]
    if not all(curve.values for curve in racing):
        return None
    return sum(curve.spent * (epochs[curve.name] / len(curve.values) - 1) for curve in racing)


def winner(curves: Sequence[Curve]) -> Curve:
    """Returns the curve with the best value; the first of equals."""
    return max(curves, key=lambda curve: curve.best)
