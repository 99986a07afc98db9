"""A bonus for the items of a user's history, where people buy, play or watch the same items again.

The dot product alone ranks the items of a history poorly: each is one of the many that a history
makes likely, and how often it occurred is lost in the mean. The bonus is added to their scores.
These items are few, so they are scored exactly and merged with the best of the others, whatever
index finds those.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.retrieval import Query, history_of
from tfrs_pipeline.search.topk import ExactRetriever, ScoreRetriever


@dataclass(frozen=True)
class RepeatBonus:
    """What is added to the score of an item of the query's history.

        bonus(u, i) = weight * n(u, i)^power
        n(u, i)     = sum over the occurrences of i in u's history of (1 + age)^-forgetting

    The age counts the known items after an occurrence, so n is the number of occurrences without
    forgetting; with it, old ones fade as memories do (Anderson and Schooler 1991, "Reflections of
    the environment in memory"). The power is below 1: the tenth purchase says less than the second.
    With power 0, the bonus is the weight. The whole history counts, not only the items that the
    model reads.

    Attributes:
        weight: Factor, in units of scores. A negative one ranks the history's items lower.
        power: From 0 to below 1.
        forgetting: 0 or more; 0 counts all occurrences alike.
    """

    weight: float
    power: float
    forgetting: float

    def __str__(self) -> str:
        decay = f", each times (1 + age)^-{self.forgetting:g}" if self.forgetting else ""
        return f"{self.weight:+.3g} * occurrences^{self.power:g}{decay}"

    def of(self, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the distinct known items of a history, and their bonuses.

        Args:
            history: [n] candidate rows, most recent first; unknown items, 0, are left out.

        Returns:
            [any] rows, in the order of their last occurrence, most recent first; and their
            bonuses, [any] float32.

        Example:
            >>> rows, bonuses = RepeatBonus(2.0, 0.5, 0.0).of(np.array([7, 3, 7, 7, 7]))
            >>> rows.tolist(), bonuses.tolist()
            ([7, 3], [4.0, 2.0])
        """
        known = history[history > 0]
        rows, first, slots = np.unique(known, return_index=True, return_inverse=True)
        n = np.bincount(slots, (1.0 + np.arange(len(known))) ** -self.forgetting, len(rows))
        order = np.argsort(first)
        bonuses = self.weight * n[order] ** self.power
        return rows[order], bonuses.astype(np.float32)

    def cells(
        self, items: Ids, queries: Sequence[Query]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lists the bonuses of queries, line by line.

        Returns, for each bonus, the position of its query from 0, [any] int64; the row of its item
        among `items` from 1, [any] int32; and the bonus, [any] float32.
        """
        parts = [self.of(items.rows(history_of(query))[::-1]) for query in queries]
        lines = np.repeat(np.arange(len(parts)), [len(rows) for rows, _ in parts])
        rows = np.concatenate([np.zeros(0, np.int32), *(rows for rows, _ in parts)])
        return lines, rows, np.concatenate([np.zeros(0, np.float32), *(part[1] for part in parts)])

    def added_to(self, exact: ExactRetriever) -> ScoreRetriever:
        """Returns a retriever that adds the bonus to the scores of an exact one."""

        def score(queries: Sequence[Query]) -> np.ndarray:
            scores = exact.score(queries)
            lines, rows, bonuses = self.cells(exact.items, queries)
            scores[lines, rows - 1] += bonuses
            return scores

        return ScoreRetriever(exact.items, score)
