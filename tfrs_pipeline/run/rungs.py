"""The rule of a race: which recipes train on after each round, by their curves alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tfrs_pipeline.messages import counted

# Recipes are compared for the first time at the CPU time that this many epochs of the slowest take.
# With 5, noise in the first epochs decides: docs/explanation/tried.md has replays of both numbers.
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


def race_in_rungs(
    curves: dict[str, Curve],
    train: Callable[[str, int, str], object],
    budget: float = math.inf,
) -> bool:
    """Trains recipes until one is left, all that are left have ended, or the budget is spent.

    Updates their `curves`; returns whether the budget was spent before one was left.

    In the first round, each recipe is timed: it trains for `FIRST_EPOCHS`, or for `TIMED_EPOCHS` if
    there is a budget. In each further round, those that are left train up
    to the same CPU time t: first the time that `FIRST_EPOCHS` of the slowest take, then twice the
    time of the round before. A recipe trains on if its best value by t, plus what it can still
    gain, reaches the leader's best by t:

        best(t) + STILL_TO_GAIN * (best(t) - best(t / 2)) >= best of the leader(t);

    or, because a model that still rises may improve the sum, if both of these hold:

        best(t) + STILL_TO_GAIN * (best(t) - best(t / 2)) >= NEAR * best of the leader(t),
        best(t) - best(t / 2) >= RISES * best(t).

    This is successive halving (Jamieson and Talwalkar 2016), except that a recipe's own curve drops
    it, and not that half of the others are better: a slow starter that still rises may continue.

    Args:
        curves: Recipe -> its curve so far: without an epoch, or as an earlier process left it.
        train: Called with a recipe, the number of epochs to have in the end, and the name of the
            turn; replaces its curve.
        budget: CPU seconds of all recipes together. In the second round, no recipe trains for more
            than an equal share of it; in a later one, of what is left when the round begins. So a
            small budget serves all. A turn has one epoch or more, and none begins without budget.
    """
    # Epochs of each recipe after the turns so far. A race that resumes takes the same turns, with
    # the budget that was left at each, although its curves may be longer.
    reached = dict.fromkeys(curves, 0)
    diverged = set[str]()

    def unspent() -> float:
        return budget - sum(curves[name].epoch_seconds * reached[name] for name in curves)

    def turn(name: str, number: int, seconds: float = 0.0) -> None:
        curve, left = curves[name], [curves[name] for name in racing]
        num_epochs = curve.epochs_by(seconds)
        if number == 1:
            num_epochs = TIMED_EPOCHS if math.isfinite(budget) else FIRST_EPOCHS
        elif curve.epoch_seconds:  # What is left may be for a few epochs.
            affordable = max(1.0, unspent() / curve.epoch_seconds)
            num_epochs = math.floor(min(num_epochs, reached[name] + affordable))
        num_epochs = min(num_epochs, curve.num_epochs)
        if num_epochs <= reached[name] or unspent() <= 0:
            return
        if num_epochs <= len(curve.values):
            reached[name] = num_epochs
            return
        task = f"race, round {number}, {counted(len(racing), 'recipe')} left"
        if all(curve.values for curve in left):  # All are timed.
            most = min(unspent(), sum(curve.num_left * curve.epoch_seconds for curve in left))
            task += f", at most about {in_cpu_time(most)}"
        leader = max(left, key=lambda curve: curve.best)
        leading = f" (leading: {leader.name}, {leader.best:.4f})" if leader.values else ""
        if not curve.failure:  # Otherwise it failed in this turn before the race was resumed.
            train(name, num_epochs, f"{task}: {name}{leading}")
        reached[name] = len(curves[name].values)  # Fewer if its patience is over.
        if curves[name].failure:
            diverged.add(name)

    racing = list(curves)
    if len(racing) < 2:
        return False
    for name in racing:
        turn(name, 1)
    first = FIRST_EPOCHS * max(curve.epoch_seconds for curve in curves.values())
    seconds = min(first, budget / len(curves))
    number = 1
    while True:
        number += 1
        # The cheapest first: where the budget ends in this round, most of them get their turn.
        for name in sorted(racing, key=lambda name: curves[name].epoch_seconds):
            turn(name, number, seconds)
        racing = [name for name in racing if name not in diverged]
        if not racing:
            return False
        best = {name: curves[name].best_by(seconds) for name in racing}
        gain = {name: best[name] - curves[name].best_by(seconds / 2) for name in racing}
        reach = {name: best[name] + STILL_TO_GAIN * gain[name] for name in racing}
        shares = {name: NEAR if gain[name] >= RISES * best[name] else 1.0 for name in racing}
        leading = max(best.values())
        # A custom metric may be negative. A share of the leader's best is then above that best.
        needed = {name: min(shares[name] * leading, leading) for name in racing}
        racing = [name for name in racing if reach[name] >= needed[name]]
        share = unspent() / len(racing)  # Equal, so that the last round has time for all.
        left = [name for name in racing if curves[name].num_epochs > reached[name]]
        if len(racing) == 1 or not any(0 < curves[name].epoch_seconds <= share for name in left):
            is_untimed = [not (reached[name] or curves[name].failure) for name in curves]
            return any(is_untimed) or (len(racing) > 1 and bool(left))
        seconds = min(2 * seconds, seconds + share)


def in_cpu_time(seconds: float) -> str:
    """Words a duration, rounded up."""
    if seconds <= 90:
        return f"{10 * math.ceil(seconds / 10)} CPU seconds"
    return counted(math.ceil(seconds / 60), "CPU minute")
