"""Hard negatives mined from the model itself, for logs without losers of a funnel.

The current model retrieves for every sample's query, and ranks from a to b are kept: the top is
full of items that the user would like but has not met, which would be false negatives.
"""

from typing import Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from tfrs_pipeline.negatives.funnel import HardShare
from tfrs_pipeline.settings import CHECKED, refused_by_name


@refused_by_name
@dataclass(frozen=True, config=CHECKED)
class Mined:
    """Items that the model ranks from `min_rank` to `max_rank` for the sample's query.

    Attributes:
        share: f in (0, 1), share of the negatives' weight that hard negatives hold.
        num: Columns drawn for each row from its pool.
        min_rank: Best rank to keep; 0 is the top.
        max_rank: First rank not to keep.
        max_pool: Most items kept for a sample, drawn at random.
        every: Epochs between minings. There are no hard negatives before the first, because an
            untrained model ranks at random.
    """

    share: HardShare = 0.01
    num: PositiveInt = 8
    min_rank: NonNegativeInt = 100
    max_rank: NonNegativeInt = 500
    max_pool: PositiveInt = 100
    every: PositiveInt = 3
    kind: Literal["mined"] = "mined"

    def __post_init__(self) -> None:
        if not self.min_rank < self.max_rank:
            got = f"{self.min_rank} and {self.max_rank}"
            raise ValueError(f"Mined ranks must be min_rank < max_rank. Received: {got}")

    @property
    def pools(self) -> tuple[str, ...]:
        """Names of the pools that rows draw from."""
        return ("mined",)

    def keep(self, is_allowed: np.ndarray) -> np.ndarray:
        """Marks the retrieved items, best first, whose rank among the allowed is kept: [b, k] bool.

        Example:
            >>> Mined(min_rank=1, max_rank=3).keep(np.array([[True, False, True, True, True]]))
            array([[False, False,  True,  True, False]])
        """
        rank = np.cumsum(is_allowed, axis=1) - 1
        return is_allowed & (rank >= self.min_rank) & (rank < self.max_rank)

    def draw_pools(
        self, is_left: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws up to `max_pool` True places of each line, [b, k], in random order.

        Returns [b, at most max_pool] places, and how many at the start of each line count, [b].
        """
        # Places that are not left sort last.
        keys = np.where(is_left, rng.random(is_left.shape, np.float32), np.float32(2))
        num = np.minimum(is_left.sum(axis=1), self.max_pool)
        if self.max_pool < keys.shape[1]:
            lowest = np.argpartition(keys, self.max_pool, axis=1)[:, : self.max_pool]
        else:
            lowest = np.broadcast_to(np.arange(keys.shape[1]), keys.shape)
        in_order = np.argsort(np.take_along_axis(keys, lowest, axis=1), axis=1)
        return np.take_along_axis(lowest, in_order, axis=1), num
