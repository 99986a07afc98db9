"""Hard negatives mined from the model itself, for logs without losers of a funnel.

The current model retrieves for every sample's query. Known positives and exposed items are dropped,
and the ranks from a to b of the rest are kept: the top is full of items that the user would like
but has not met, which would be false negatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tfrs_pipeline.messages import check_integer
from tfrs_pipeline.negatives.funnel import check_share


@dataclass(frozen=True)
class Mined:
    """Items that the model ranks from `min_rank` to `max_rank` for the sample's query.

    Args:
        share: f in (0, 1), share of the negatives' weight that hard negatives hold.
        num: Columns drawn for each row from its pool.
        min_rank: Best rank to keep; 0 is the top, after known positives and exposed items are
            dropped.
        max_rank: First rank not to keep.
        max_pool: Most items kept for a sample, drawn at random.
        every: Epochs between two minings. Before the first there are none, because a model that has
            learned nothing ranks at random.

    Raises:
        ValueError: If an argument is out of range.
    """

    share: float = 0.01
    num: int = 8
    min_rank: int = 100
    max_rank: int = 500
    max_pool: int = 100
    every: int = 3
    kind: Literal["mined"] = "mined"

    def __post_init__(self) -> None:
        check_share(self.share)
        check_integer(0, min_rank=self.min_rank, max_rank=self.max_rank)
        if not self.min_rank < self.max_rank:
            raise ValueError(
                "Mined ranks must be 0 <= min_rank < max_rank. "
                f"Received: {self.min_rank} and {self.max_rank}"
            )
        check_integer(1, num=self.num, max_pool=self.max_pool, every=self.every)

    @property
    def pools(self) -> tuple[str, ...]:
        """Names of the pools that rows draw from."""
        return ("mined",)

    def keep(
        self, is_found: np.ndarray, is_known: np.ndarray, is_exposed: np.ndarray
    ) -> tuple[np.ndarray, dict[str, int]]:
        """Chooses among retrieved items, best first.

        Args:
            is_found: [b, k] bool, False in empty slots.
            is_known: [b, k] bool, the sample's positive and the user's other known ones.
            is_exposed: [b, k] bool, shown to the user and never clicked.

        Returns:
            [b, k] bool, and how many each filter dropped, in the order in which they apply.

        Example:
            >>> found = np.ones((1, 5), bool)
            >>> known, exposed = found & False, found & False
            >>> known[0, 1] = True
            >>> Mined(min_rank=1, max_rank=3).keep(found, known, exposed)[0]
            array([[False, False,  True,  True, False]])
        """
        left, dropped = is_found, {}

        def drop(reason: str, is_dropped: np.ndarray) -> None:
            nonlocal left
            dropped[reason] = int(np.count_nonzero(left & is_dropped))
            left = left & ~is_dropped

        drop("known positives", is_known)
        drop("exposed and not clicked", is_exposed)
        rank = np.cumsum(left, axis=1) - 1
        drop("of a better rank", rank < self.min_rank)
        drop("of a worse rank", rank >= self.max_rank)
        return left, dropped

    def draw_pools(
        self, is_left: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws up to `max_pool` True places of each line, [b, k], in random order.

        Returns [b, at most max_pool] places, and how many at the start of each line count, [b].
        """
        # What is not left sorts last.
        keys = np.where(is_left, rng.random(is_left.shape, np.float32), np.float32(2))
        num = np.minimum(is_left.sum(axis=1), self.max_pool)
        if self.max_pool < keys.shape[1]:
            lowest = np.argpartition(keys, self.max_pool, axis=1)[:, : self.max_pool]
        else:
            lowest = np.broadcast_to(np.arange(keys.shape[1]), keys.shape)
        in_order = np.argsort(np.take_along_axis(keys, lowest, axis=1), axis=1)
        return np.take_along_axis(lowest, in_order, axis=1), num
