"""Says what became of the answers of each version: how many were clicked, and at which ranks."""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfrs_pipeline.answers.publish import version_at
from tfrs_pipeline.evaluation.bootstrap import Interval
from tfrs_pipeline.messages import counted
from tfrs_pipeline.records.journal import Journal

if TYPE_CHECKING:
    from tfrs_pipeline.answers.retriever import LoadedRetriever

_Z = 1.96  # Of a 95% interval.
_STEPS = 1, 3, 10  # The last ranks of the groups that the text counts.


@dataclass(frozen=True)
class Outcome:
    """What became of the recorded answers of a version.

    Attributes:
        version: Its number.
        num_answers: Number of answers to users with an id.
        num_users: Number of these users.
        num_clicks: Number of clicked items, each once an answer; see `write_log` for which belong
            to an answer.
        ranks: Number of clicked items by rank in the answer, from 1.
        clicks: Clicked items an answer, with the 95% interval over users.
        gain: `clicks` less those of the version with answers before it, with its interval; None
            for the first one.
    """

    version: int
    num_answers: int
    num_users: int
    num_clicks: int
    ranks: Counter[int]
    clicks: Interval
    gain: Interval | None

    def __str__(self) -> str:
        """Returns the outcome in a line."""
        groups = Counter(
            next((step for step in _STEPS if rank <= step), 0) for rank in self.ranks.elements()
        )
        first, last = 1, []
        for step in _STEPS:
            where = f"{first}" if first == step else f"{first} to {step}"
            last.append(f"{groups[step]:,} at {where}")
            first = step + 1
        text = (
            f"version {self.version}: {counted(self.num_answers, 'answer')} to "
            f"{counted(self.num_users, 'user')}, {counted(self.num_clicks, 'click')}, "
            f"{self.clicks.written()} an answer; by rank {', '.join(last)}, {groups[0]:,} further"
        )
        return (
            text
            if self.gain is None
            else f"{text}; {self.gain.written('+')} beside the version before"
        )


def outcomes(model: "str | Path | LoadedRetriever") -> list[Outcome]:
    """Counts what became of the recorded answers of a model, by version, in ascending order.

    An interval takes users as what was drawn: a user's answers are not independent. It is that of a
    ratio of sums by its linearization (the delta method), and of the difference of two ratios,
    where a user may have answers of both. Versions that served at different times differ by the
    time too; see the guide to watching for two at one time.

    Args:
        model: The folder of a model or of a version, or the loaded model.

    Raises:
        Damaged: If the file of events is damaged.
        StorageError: If it cannot be read.

    Example:
        >>> for outcome in outcomes("saved_models/videos"):  # doctest: +SKIP
        ...     print(outcome)
    """
    version = version_at(model if isinstance(model, str | Path) else model.folder)
    journal = Journal(version.parent)
    answers: defaultdict[int, Counter[Any]] = defaultdict(Counter)
    clicks: defaultdict[int, Counter[Any]] = defaultdict(Counter)
    ranks: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for number, user_id, num in journal.num_answers():
        answers[number][user_id] = num
    for number, user_id, rank in journal.clicks_of_answers():
        clicks[number][user_id] += 1
        ranks[number][rank] += 1
    found = list[Outcome]()
    before: dict[Any, float] = {}
    for number, num_by_user in sorted(answers.items()):
        num, num_clicks = num_by_user.total(), clicks[number].total()
        rate = num_clicks / num
        # How each user moves the ratio: its linearization.
        shares = {user: (clicks[number][user] - rate * n) / num for user, n in num_by_user.items()}
        gain = None
        if found:
            moves = [shares.get(user, 0) - before.get(user, 0) for user in {**shares, **before}]
            gain = _interval(rate - found[-1].clicks.mean, moves)
        per_answer = _interval(rate, [*shares.values()])
        counts = num, len(num_by_user), num_clicks, ranks[number]
        found.append(Outcome(number, *counts, per_answer, gain))
        before = shares
    return found


def _interval(value: float, moves: list[float]) -> Interval:
    """Returns a value with the 95% interval of the sum of independent moves around it."""
    if len(moves) < 2:
        return Interval(value, math.nan, math.nan)
    half = _Z * math.sqrt(sum(move**2 for move in moves) * len(moves) / (len(moves) - 1))
    return Interval(value, value - half, value + half)
