"""The kinds of hard negatives: items that lost in the funnel, or mined from the model itself."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from tfrs_pipeline.settings import CHECKED, Several, refused_by_name

HardShare: TypeAlias = Annotated[float, Field(gt=0, lt=1)]
HardStage: TypeAlias = Literal["retrieved", "pre_ranked", "ranked", "exposed"]


def _split(stages: Any) -> Any:
    """Reads stages as typed after a flag, separated by commas."""
    return stages.split(",") if isinstance(stages, str) else stages


Stages: TypeAlias = Annotated[Several[HardStage], BeforeValidator(_split)]
# 11,000 years; engines know no longer interval.
Hours: TypeAlias = Annotated[float, Field(gt=0, le=100_000_000)]


@refused_by_name
@dataclass(frozen=True, config=CHECKED)
class FunnelLosers:
    """Items that lost to the positive in its own request, or lost in the user's recent requests.

    Stages have equal weight. Exposed items and known positives are left out.

    Attributes:
        share: f in (0, 1), share of the negatives' weight that hard negatives hold, in rows that
            have any. .5 is the rule of thumb; ablations found about .01 better.
        stages: Furthest stages that the losers reached: "retrieved" lost in pre-rank, "pre_ranked"
            lost in rank, "ranked" ended low in rank.
        num: Columns drawn for each row from its pool of a stage.
        min_pool: A stage with fewer losers in the positive's own request also takes the latest
            `max_pool` of the user's recent requests.
        max_pool: Most losers kept for a positive and stage, drawn at random.
        window_hours: How far back recent requests may be; ignored in a log without timestamps.
        bottom_share: For "ranked": the low part of the request's ranks, as a share in (0, 1].
        min_rank: For "ranked": the low part as this rank (0 is the best) and worse, instead.
        allow_exposed: Whether "exposed", items that were shown and not clicked, may be a stage.
            Ranking learns from them; this option measures what they do to retrieval.

    Raises:
        ConfigError: If "exposed" is a stage without `allow_exposed`, or a low part is given without
            "ranked".
    """

    share: HardShare = 0.01
    stages: Stages = ("retrieved", "pre_ranked")
    num: PositiveInt = 4
    min_pool: NonNegativeInt = 4
    max_pool: PositiveInt = 100
    window_hours: Hours = 24.0
    bottom_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    min_rank: NonNegativeInt | None = None
    allow_exposed: bool = False
    kind: Literal["funnel"] = "funnel"

    def __post_init__(self) -> None:
        if "exposed" in self.stages and not self.allow_exposed:
            raise ValueError(
                "stages holds 'exposed'. An item that was exposed to a user and not clicked is "
                "never a negative of that user in retrieval: the funnel rated it highly enough to "
                "show it, and the missing click may be due to its position. It is for ranking. To "
                "see what such negatives do to retrieval, set allow_exposed."
            )
        low_part = self.bottom_share, self.min_rank
        if "ranked" not in self.stages and low_part != (FunnelLosers.bottom_share, None):
            raise ValueError(
                "bottom_share and min_rank choose among items of the stage 'ranked'. Add it to "
                f"stages, or leave them out. Received: {self.bottom_share} and {self.min_rank}, "
                f"stages {self.stages!r}"
            )

    def of_stages(self, stages: Sequence[HardStage]) -> "FunnelLosers":
        """Returns a copy with other stages, without the options of stages that are left out."""
        if "ranked" in stages:
            return replace(self, stages=stages)
        common = FunnelLosers.bottom_share
        return replace(self, stages=stages, bottom_share=common, min_rank=None)

    @property
    def pools(self) -> tuple[str, ...]:
        """Names of the pools that rows draw from."""
        return tuple(self.stages)


@refused_by_name
@dataclass(frozen=True, config=CHECKED)
class Mined:
    """Items that the model ranks from `min_rank` to `max_rank` for the sample's query.

    Known positives and exposed items have no rank. The top is full of items that the user would
    like but has not met: false negatives.

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
