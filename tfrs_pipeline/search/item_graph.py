"""What people took near each item, counted: an item's neighbours, without any training."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from tfrs_pipeline.samples.store import RowLists, offsets_of

# Neighbours that an item keeps.
NUM_NEIGHBOURS = 100
# Added to the counts that a weight is divided by, so that one pair does not weigh as much as many.
_SHRINKAGE = 2.0


@dataclass(frozen=True)
class Nearness:
    """Which items of a history are near each other, and how their count becomes a weight.

    Attributes:
        window: How many steps apart two items of a history may be. At n steps, a pair counts 1 / n.
        is_directed: Whether only the later of two items is a neighbour of the earlier one.
        alpha: With the count c_ij of a pair, and the sum c_i of all counts of an item, the weight
            is c_ij / ((c_i + 2)^alpha (c_j + 2)^(1 - alpha)): the share of what came after i if
            alpha is 1, and like a cosine, which popular items do not lead, if it is 0.5.
    """

    window: int
    is_directed: bool
    alpha: float


KINDS = {
    "what came next": Nearness(window=3, is_directed=True, alpha=1.0),
    "what was taken together": Nearness(window=10, is_directed=False, alpha=0.5),
}


@dataclass(eq=False)
class ItemGraph:
    """For each item, the neighbours of highest weight, and how often they were near it.

    Attributes:
        kind: Its name in `KINDS`.
        neighbours: The rows of the neighbours of each item row from 0; row 0 has none.
        counts: [total] float32, the count of each of them.
        totals: [1 + num_items] float32, the sum of all counts of each item, also of those that are
            no neighbours.
    """

    kind: str
    neighbours: RowLists
    counts: np.ndarray
    totals: np.ndarray

    @classmethod
    def build(cls, histories: RowLists, num_items: int, kind: str) -> Self:
        """Counts the pairs of histories, most recent first; row 0, an unknown item, is near none.

        Example:
            >>> histories = RowLists.from_lists([np.array([3, 2, 1]), np.array([2, 1])])
            >>> graph = ItemGraph.build(histories, num_items=3, kind="what came next")
            >>> rows, weights = graph.of(1)
            >>> rows.tolist(), weights.astype(float).round(2).tolist()  # 2 / 4.5, 0.5 / 4.5
            ([2, 3], [0.44, 0.11])
        """
        import scipy.sparse  # A service, which builds no graph, starts without it.

        nearness, shape = KINDS[kind], (num_items + 1, num_items + 1)
        values = histories.values
        users = np.repeat(np.arange(len(histories)), np.diff(histories.offsets))
        near = scipy.sparse.csr_matrix(shape, dtype=np.float32)
        for steps in range(1, 1 + min(nearness.window, max(0, len(values) - 1))):
            later, earlier = values[:-steps], values[steps:]
            is_pair = (users[:-steps] == users[steps:]) & (later != earlier)
            is_pair &= (later > 0) & (earlier > 0)
            pairs = earlier[is_pair], later[is_pair]
            ones = np.full(len(pairs[0]), 1 / steps, np.float32)
            near = near + scipy.sparse.csr_matrix((ones, pairs), shape)
        if not nearness.is_directed:
            near = near + near.T
        near = near.tocsr()
        totals = np.asarray(near.sum(axis=1), np.float32).ravel()
        rows = np.repeat(np.arange(num_items + 1), np.diff(near.indptr))
        weights = weights_of(near.data, totals[rows], totals[near.indices], nearness.alpha)
        # By row, then by weight; of equal weights, the smaller row of a neighbour comes first.
        order = np.lexsort((near.indices, -weights, rows))
        rank = np.arange(len(order)) - near.indptr[rows[order]]
        order = order[rank < NUM_NEIGHBOURS]
        lengths = np.bincount(rows[order], minlength=num_items + 1)
        neighbours = RowLists(offsets_of(lengths), near.indices[order].astype(np.int32))
        return cls(kind, neighbours, near.data[order].astype(np.float32), totals)

    def of(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows of an item's neighbours, [any] int32, and their weights, float32."""
        return self.of_each(np.array([row]))[:2]

    def of_each(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Returns what `of` does for [n] items, one after the other, and their n lengths."""
        parts = [self.counts_of(row) for row in rows.tolist()]
        lengths = [len(counts) for _, counts in parts]
        near = np.concatenate([np.zeros(0, np.int32), *(part[0] for part in parts)])
        counts = np.concatenate([np.zeros(0, np.float32), *(part[1] for part in parts)])
        of_item = np.repeat(self.totals[rows], lengths)
        alpha = KINDS[self.kind].alpha
        return near, weights_of(counts, of_item, self.totals[near], alpha), lengths

    def counts_of(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows of an item's neighbours, [any] int32, and their counts, float32."""
        start, end = self.neighbours.offsets[row : row + 2]
        return self.neighbours.values[start:end], self.counts[start:end]

    def weights(self) -> np.ndarray:
        """Returns the weights of all neighbours, in the order of `neighbours`: [total] float32."""
        of_item = np.repeat(self.totals, np.diff(self.neighbours.offsets))
        of_neighbour = self.totals[self.neighbours.values]
        return weights_of(self.counts, of_item, of_neighbour, KINDS[self.kind].alpha)


def weights_of(
    counts: np.ndarray, of_item: np.ndarray, of_neighbour: np.ndarray, alpha: float
) -> np.ndarray:
    """Returns the weights of counts: [n] float32; see `Nearness`."""
    if alpha == 1:
        return counts / (of_item + np.float32(_SHRINKAGE))
    scale = (of_item + _SHRINKAGE) ** alpha * (of_neighbour + _SHRINKAGE) ** (1 - alpha)
    return (counts / scale).astype(np.float32)
