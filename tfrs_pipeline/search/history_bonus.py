"""A bonus on the scores of a few items: those of a query's history, and what is near them.

A dot product blurs what is exact. It ranks the items of a history poorly: each is one of the many
that a history makes likely, and how often it occurred is lost in the mean. And it does not know
which item comes after which. The bonus is added to the scores of these items. They are few, so they
are scored exactly and merged with the best of the others, whatever index finds those.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.retrieval import Query, history_of
from tfrs_pipeline.search.item_graph import ItemGraph
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
        return f"items of the history score {self.weight:+.3g} * occurrences^{self.power:g}{decay}"

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


# Most recent known items of a history whose neighbours have a bonus.
NUM_LATEST = 10


@dataclass(frozen=True)
class NeighbourBonus:
    """What is added to the score of an item that people took near the latest ones of a history.

        bonus(u, j) = weight * sum over the latest items i of decay^age w_ij

    The age counts the known items after i; w_ij is the weight of j in the neighbours of i (see
    `ItemGraph`).

    Attributes:
        kind: What counts as near: a name in `KINDS`.
        weight: Factor, above 0, in units of scores.
        decay: Above 0, 1 at most.
    """

    kind: str
    weight: float
    decay: float

    def __str__(self) -> str:
        decay = f", times {self.decay:g}^age" if self.decay < 1 else ""
        return f"{self.kind} scores {self.weight:+.3g} * its weight in the item graph{decay}"

    def of(self, history: np.ndarray, graph: ItemGraph) -> tuple[np.ndarray, np.ndarray]:
        """Returns the neighbours of a history's latest known items, and their bonuses.

        `history` is [n] candidate rows, most recent first; unknown items, 0, are left out. Returns
        distinct rows, [any] int32, ascending; and their bonuses, [any] float32.
        """
        latest = history[history > 0][:NUM_LATEST]
        rows, weights, lengths = graph.of_each(latest)
        # Summed in double precision, of single factors.
        faded = np.repeat((self.decay ** np.arange(len(latest))).astype(np.float32), lengths)
        distinct, slots = np.unique(rows, return_inverse=True)
        sums = np.bincount(slots, faded * weights, len(distinct))
        return distinct, (self.weight * sums).astype(np.float32)


@dataclass(frozen=True, eq=False)
class HistoryBonus:
    """What is added to the scores of a query's candidates because of its history.

    Attributes:
        repeats: The bonus of the history's own items; None is none.
        neighbours: That of what people took near them; None is none.
        graph: The neighbours of each item, of the kind of `neighbours`.
        notes: What validation said of each part, for a person.
    """

    repeats: RepeatBonus | None = None
    neighbours: NeighbourBonus | None = None
    graph: ItemGraph | None = None
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.repeats is not None or self.neighbours is not None

    def __str__(self) -> str:
        return "; ".join(str(part) for part in (self.repeats, self.neighbours) if part is not None)

    def times(self, weight: float) -> "HistoryBonus":
        """Returns the bonus with all its weights times a number."""
        repeats, near = self.repeats, self.neighbours
        return replace(
            self,
            repeats=repeats and replace(repeats, weight=weight * repeats.weight),
            neighbours=near and replace(near, weight=weight * near.weight),
        )

    def plus(self, other: "HistoryBonus") -> "HistoryBonus":
        """Returns both as one; they may not have the same part."""
        return HistoryBonus(
            self.repeats or other.repeats,
            self.neighbours or other.neighbours,
            self.graph or other.graph,
            (*self.notes, *other.notes),
        )

    def of(self, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the distinct known items with a bonus, and their bonuses.

        Args:
            history: [n] candidate rows, most recent first; unknown items, 0, are left out.

        Returns:
            [any] int32 rows and [any] float32 bonuses.
        """
        parts = [] if self.repeats is None else [self.repeats.of(history)]
        if self.neighbours is not None and self.graph is not None:
            parts.append(self.neighbours.of(history, self.graph))
        if len(parts) == 1:
            return parts[0]
        rows = np.concatenate([np.zeros(0, np.int32), *(part[0] for part in parts)])
        bonuses = np.concatenate([np.zeros(0, np.float32), *(part[1] for part in parts)])
        distinct, slots = np.unique(rows, return_inverse=True)
        return distinct, np.bincount(slots, bonuses, len(distinct)).astype(np.float32)

    def as_dict(self) -> dict[str, Any]:
        """Returns the settings for JSON; the graph is kept as arrays, or built again."""
        return {
            "repeats": self.repeats and asdict(self.repeats),
            "neighbours": self.neighbours and asdict(self.neighbours),
            "notes": list(self.notes),
        }

    @classmethod
    def read(cls, record: Mapping[str, Any], graph: ItemGraph | None) -> "HistoryBonus":
        """Reads what `as_dict` returned."""
        repeats, neighbours = record["repeats"], record["neighbours"]
        return cls(
            repeats and RepeatBonus(**repeats),
            neighbours and NeighbourBonus(**neighbours),
            graph,
            tuple(record["notes"]),
        )

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
