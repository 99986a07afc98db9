"""Counts the clicks on recorded answers by version and rank, with intervals over users."""

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

_Z = 1.96  # Standard errors on either side of a 95% interval.
_LAST_RANKS = 1, 3, 10  # The last rank of each group that the text counts.


@dataclass(frozen=True)
class VersionOutcome:
    """The clicks on the recorded answers of a version.

    Attributes:
        version: Number of the version.
        num_answers: Number of answers to users with an id.
        num_users: Number of these users.
        num_clicks: Number of clicked items, each counted once an answer. A click belongs to the
            answer whose `request_id` it brings.
        ranks: Number of clicked items by rank in the answer, from 1.
        clicks: Clicked items per answer, with the 95% interval over users.
        gain: `clicks` minus that of the previous version with answers, with its 95% interval; None
            for the first version.
    """

    version: int
    num_answers: int
    num_users: int
    num_clicks: int
    ranks: Counter[int]
    clicks: Interval
    gain: Interval | None

    def __str__(self) -> str:
        """Returns the outcome in one line."""
        groups = Counter(
            next((last for last in _LAST_RANKS if rank <= last), 0)
            for rank in self.ranks.elements()
        )
        first, by_rank = 1, []
        for last in _LAST_RANKS:
            ranks = f"{first}" if first == last else f"{first} to {last}"
            by_rank.append(f"{groups[last]:,} at {ranks}")
            first = last + 1
        text = (
            f"version {self.version}: {counted(self.num_answers, 'answer')} to "
            f"{counted(self.num_users, 'user')}, {counted(self.num_clicks, 'click')}, "
            f"{_written(self.clicks)} an answer; by rank {', '.join(by_rank)}, "
            f"{groups[0]:,} further"
        )
        if self.gain is None:
            return text
        return f"{text}; {self.gain.written('+')} against the version before"


def outcomes(model: "str | Path | LoadedRetriever") -> list[VersionOutcome]:
    """Counts the clicks on the recorded answers of a model, by version.

    Clicks per answer are a ratio of two sums over users. The delta method linearizes the ratio and
    gives its interval. Users are the sampled units, because answers to one user depend on each
    other. A gain is the difference of two ratios; a user with answers of both versions counts in
    both. Versions that served at different times differ by the time too: to compare models, serve
    two versions at once (docs/guides/watching.md).

    Args:
        model: The folder of a model or of a version, or the loaded model.

    Returns:
        An outcome per version with recorded answers, by ascending number; [] if there are none.

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
    for number, user_id, num in journal.answer_counts():
        answers[number][user_id] = num
    for number, user_id, rank in journal.answer_clicks():
        clicks[number][user_id] += 1
        ranks[number][rank] += 1
    by_version = list[VersionOutcome]()
    shares_before: dict[Any, float] = {}
    for number, num_by_user in sorted(answers.items()):
        num, num_clicks = num_by_user.total(), clicks[number].total()
        rate = num_clicks / num
        # How far each user moves the ratio, linearized.
        shares = {user: (clicks[number][user] - rate * n) / num for user, n in num_by_user.items()}
        gain = None
        if by_version:
            users = {**shares, **shares_before}
            moves = [shares.get(user, 0) - shares_before.get(user, 0) for user in users]
            gain = _interval(rate - by_version[-1].clicks.mean, moves)
        per_answer = _interval(rate, [*shares.values()])
        counts = num, len(num_by_user), num_clicks, ranks[number]
        by_version.append(VersionOutcome(number, *counts, per_answer, gain))
        shares_before = shares
    return by_version


def _written(rate: Interval) -> str:
    return f"{rate.mean:.4f}" if math.isnan(rate.low) else rate.written()


def _interval(value: float, moves: list[float]) -> Interval:
    """Returns a value with its 95% interval, where it varies by a sum of independent moves.

    With fewer than two moves, the interval is NaN.
    """
    if len(moves) < 2:
        return Interval(value, math.nan, math.nan)
    half_width = _Z * math.sqrt(sum(move**2 for move in moves) * len(moves) / (len(moves) - 1))
    return Interval(value, value - half_width, value + half_width)
