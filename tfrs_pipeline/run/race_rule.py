"""The rule of a race: which recipes train on after each round, by their curves alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from tfrs_pipeline.messages import counted

# Recipes are compared for the first time at the CPU time that this many epochs of the slowest take.
# With 5, noise in the first epochs decides: docs/archive/tried.md has replays of both numbers.
FIRST_EPOCHS = 8
# A trailing recipe trains on if this many times its gain in the second half of its time would bring
# it to the leader's best. Self-attention rises late: it may be a quarter behind after nine epochs,
# and win.
STILL_TO_GAIN = 2.5
# It also trains on if that would bring it to this share of the leader's best, and this share of its
# own best is from the second half: a model that is a fifth behind alone may still improve a sum.
NEAR, RISES = 0.75, 0.01
# With a budget, a recipe first trains for this many epochs: the second one, in which no network is
# built, says how many more the budget allows.
TIMED_EPOCHS = 2


@dataclass(frozen=True)
class Curve:
    """What a recipe has reached so far.

    `values` has the validation metric after each epoch. An epoch takes `epoch_seconds` of CPU time,
    without the building of the network, which each turn repeats. At most `num_left` more follow:
    none if its patience or its epochs are over. If its training diverged, `failure` says so, and
    the values are those before that turn: it neither wins nor joins a sum.
    """

    name: str
    values: Sequence[float] = ()
    epoch_seconds: float = 0.0
    num_left: int = 0
    failure: str = ""

    @property
    def seconds(self) -> list[float]:
        """CPU seconds up to the end of each epoch."""
        return [self.epoch_seconds * epoch for epoch in range(1, len(self.values) + 1)]

    @property
    def spent(self) -> float:
        """CPU seconds so far."""
        return self.epoch_seconds * len(self.values)

    @property
    def best(self) -> float:
        """Best value so far; minus infinity before the first epoch."""
        return max(self.values, default=-math.inf)

    @property
    def best_epoch(self) -> int:
        """Epoch, from 1, of the best value; 0 before the first."""
        return self.values.index(self.best) + 1 if self.values else 0

    @property
    def num_epochs(self) -> int:
        """Most epochs that it may have in the end."""
        return len(self.values) + self.num_left

    def epochs_by(self, seconds: float) -> int:
        """Returns how many epochs end within a number of CPU seconds."""
        # The term is for rounding: ten epochs take ten times the seconds of one.
        return math.floor(seconds / self.epoch_seconds + 1e-6) if self.epoch_seconds else 0

    def best_by(self, seconds: float) -> float:
        """Returns the best value within a number of CPU seconds, or of the first epoch."""
        return max(self.values[: max(1, self.epochs_by(seconds))], default=-math.inf)


class Turn(NamedTuple):
    """The next training of a race: a recipe, the epochs to have in the end, and the turn's name."""

    name: str
    num_epochs: int
    task: str


def next_turn(curves: Mapping[str, Curve], budget: float = math.inf) -> Turn | bool:
    """Returns who trains next or, once the race is over, whether the budget ended it.

    A race is over when one recipe is left, when all that are left have ended, or when the budget is
    spent. In the first round, each recipe is timed: it trains for `FIRST_EPOCHS`, or for
    `TIMED_EPOCHS` if there is a budget. In each further round, those that are left (`stay`) train
    up to the same CPU time: first the time that `FIRST_EPOCHS` of the slowest take, then twice the
    time of the round before. This is successive halving (Jamieson and Talwalkar 2016), except that
    a recipe's own curve drops it, and not that half of the others are better: a slow starter that
    still rises may continue.

    The rounds are replayed from the first one, by the curves alone. So a race that was stopped
    takes the same turns, with the budget that was left at each, although curves may be longer.

    Args:
        curves: Recipe -> its curve so far; at first without an epoch.
        budget: CPU seconds of all recipes together. In the second round, no recipe trains for more
            than an equal share of it; in a later one, of what is left when the round begins. So a
            small budget serves all. A turn has one epoch or more, and none begins without budget.
    """
    if len(curves) < 2:
        return False
    racing, number, seconds = [*curves.values()], 0, 0.0
    reached = dict.fromkeys(curves, 0)  # Epochs after the turns so far.

    def unspent() -> float:
        return budget - sum(curves[name].epoch_seconds * reached[name] for name in curves)

    while True:
        number += 1
        turns, diverged = racing, list[Curve]()
        if number > 1:  # The cheapest first: where the budget ends, most of them get their turn.
            turns = sorted(racing, key=attrgetter("epoch_seconds"))
        for curve in turns:
            if number == 1:
                num_epochs = TIMED_EPOCHS if math.isfinite(budget) else FIRST_EPOCHS
            else:  # What is left may be for a few epochs.
                affordable = max(1.0, unspent() / (curve.epoch_seconds or 1.0))
                most = reached[curve.name] + affordable
                num_epochs = math.floor(min(curve.epochs_by(seconds), most))
            num_epochs = min(num_epochs, curve.num_epochs)
            if num_epochs <= reached[curve.name] or unspent() <= 0:
                continue
            if num_epochs > len(curve.values):
                if not curve.failure:
                    return Turn(curve.name, num_epochs, _task(number, curve, racing, unspent()))
                diverged.append(curve)  # In this turn.
            reached[curve.name] = min(num_epochs, len(curve.values))
        racing = [curve for curve in racing if curve not in diverged]
        if number == 1:
            first = FIRST_EPOCHS * max(curve.epoch_seconds for curve in curves.values())
            seconds = min(first, budget / len(curves))
            continue
        if not racing:
            return False
        racing = stay(racing, seconds)
        share = unspent() / len(racing)  # Equal, so that the last round has time for all.
        unfinished = [curve for curve in racing if curve.num_epochs > reached[curve.name]]
        if len(racing) == 1 or not any(0 < curve.epoch_seconds <= share for curve in unfinished):
            is_untimed = [not (reached[name] or curves[name].failure) for name in curves]
            return any(is_untimed) or (len(racing) > 1 and bool(unfinished))
        seconds = min(2 * seconds, seconds + share)


def stay(racing: Sequence[Curve], seconds: float) -> list[Curve]:
    """Returns the recipes that train on after a CPU time t; the leader is one of them.

    A recipe trains on if its best value by t, plus what it can still gain, reaches the leader's
    best by t:

        best(t) + STILL_TO_GAIN * (best(t) - best(t / 2)) >= best of the leader(t);

    or, because a model that still rises may improve the sum, if both of these hold:

        best(t) + STILL_TO_GAIN * (best(t) - best(t / 2)) >= NEAR * best of the leader(t),
        best(t) - best(t / 2) >= RISES * best(t).
    """
    leading, kept = max(curve.best_by(seconds) for curve in racing), []
    for curve in racing:
        best = curve.best_by(seconds)
        gain = best - curve.best_by(seconds / 2)
        share = NEAR if gain >= RISES * best else 1.0
        # A custom metric may be negative. A share of the leader's best is then above that best.
        if best + STILL_TO_GAIN * gain >= min(share * leading, leading):
            kept.append(curve)
    return kept


def _task(number: int, curve: Curve, racing: Sequence[Curve], unspent: float) -> str:
    """Names a turn: its round, what all may still take once they are timed, and who leads."""
    task = f"race, round {number}, {counted(len(racing), 'recipe')} left"
    if all(other.values for other in racing):
        most = min(unspent, sum(other.num_left * other.epoch_seconds for other in racing))
        task += f", at most about {in_cpu_time(most)}"
    leader = max(racing, key=attrgetter("best"))
    leading = f" (leading: {leader.name}, {leader.best:.4f})" if leader.values else ""
    return f"{task}: {curve.name}{leading}"


def in_cpu_time(seconds: float) -> str:
    """Words a duration, rounded up."""
    if seconds <= 90:
        return f"{10 * math.ceil(seconds / 10)} CPU seconds"
    return counted(math.ceil(seconds / 60), "CPU minute")
