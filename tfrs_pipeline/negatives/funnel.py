"""Hard negatives from the funnel's log: items that lost in pre-rank or in rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

from tfrs_pipeline.messages import check_integer

HardStage = Literal["retrieved", "pre_ranked", "ranked", "exposed"]
_MOST_HOURS = 100_000_000  # 11,000 years: more is no interval of an engine.


def _split(stages: Any) -> Any:
    """Reads stages as typed after a flag, separated by commas."""
    return stages.split(",") if isinstance(stages, str) else stages


Stages = Annotated[tuple[HardStage, ...], BeforeValidator(_split)]


@dataclass(frozen=True)
class FunnelLosers:
    """Items that lost to the positive in its own request, or lost in the user's recent ones.

    Stages weigh alike. `samples.hard_pools` finds the losers when samples are built, without the
    exposed items and known positives.

    Args:
        share: f in (0, 1), share of the negatives' weight that hard negatives hold, in rows that
            have any. .5 is the rule of thumb; published ablations, and this package's, found about
            .01 better.
        stages: Furthest stages that the losers reached: "retrieved" lost in pre-rank, "pre_ranked"
            lost in rank, "ranked" ended low in rank.
        num: Columns drawn for each row from its pool of a stage.
        min_pool: A stage with fewer losers in the positive's own request also takes the latest
            `max_pool` of the user's recent requests.
        max_pool: Most losers kept for a positive and stage, drawn at random.
        window_hours: How far back recent requests may lie; ignored in a log without timestamps.
        bottom_share: For "ranked": the low part of the ranked list, as a share of the request's
            ranks in (0, 1].
        min_rank: For "ranked": the low part as a rank instead, this one (0 is the best) and worse.
        allow_exposed: Whether "exposed", items that were shown and not clicked, may be a stage.
            Ranking learns from them; this option measures what they do to retrieval.

    Raises:
        ValueError: If an argument is out of range, "exposed" is a stage without `allow_exposed`, or
            a low part is given without "ranked".
    """

    share: float = 0.01
    stages: Stages = ("retrieved", "pre_ranked")
    num: int = 4
    min_pool: int = 4
    max_pool: int = 100
    window_hours: float = 24.0
    bottom_share: float = 0.5
    min_rank: int | None = None
    allow_exposed: bool = False
    kind: Literal["funnel"] = "funnel"

    def __post_init__(self) -> None:
        check_share(self.share)
        # Equal settings compare as equal, however they were written.
        object.__setattr__(self, "stages", tuple(_split(self.stages)))
        for name in ("window_hours", "bottom_share"):
            object.__setattr__(self, name, float(getattr(self, name)))
        known, given = get_args(HardStage), set(self.stages)
        if not given or not given <= set(known) or len(given) < len(self.stages):
            raise ValueError(
                f"stages must be one or more of {', '.join(known)}, each once. Received: "
                f"{self.stages!r}"
            )
        if "exposed" in self.stages and not self.allow_exposed:
            raise ValueError(
                "stages holds 'exposed'. An item that was exposed to a user and not clicked is "
                "never a negative of that user in retrieval: the funnel liked it enough to show "
                "it, and the lack of a click says as much of its position as of it. It is for "
                "ranking. To see what such negatives do to retrieval, set allow_exposed."
            )
        check_integer(1, num=self.num, max_pool=self.max_pool)
        check_integer(0, min_pool=self.min_pool)
        if self.min_rank is not None:
            check_integer(0, min_rank=self.min_rank)
        if not 0 < self.window_hours <= _MOST_HOURS:
            raise ValueError(
                f"window_hours must be above 0 and {_MOST_HOURS:,} at most. Received: "
                f"{self.window_hours}; for no limit give the hours of the whole log"
            )
        if not 0 < self.bottom_share <= 1:
            raise ValueError(f"bottom_share must be in (0, 1]. Received: {self.bottom_share}")
        low_part = self.bottom_share, self.min_rank
        if "ranked" not in self.stages and low_part != (FunnelLosers.bottom_share, None):
            raise ValueError(
                "bottom_share and min_rank choose among items of the stage 'ranked'. Add it to "
                f"stages, or leave them out. Received: {self.bottom_share} and {self.min_rank}, "
                f"stages {self.stages!r}"
            )

    def of_stages(self, stages: tuple[HardStage, ...]) -> FunnelLosers:
        """Returns these losers with other stages, without options of a stage that is left out."""
        if "ranked" in stages:
            return replace(self, stages=stages)
        common = FunnelLosers.bottom_share
        return replace(self, stages=stages, bottom_share=common, min_rank=None)

    @property
    def pools(self) -> tuple[str, ...]:
        """Names of the pools that rows draw from."""
        return tuple(self.stages)


def check_share(share: float) -> None:
    """Refuses (`ValueError`) a hard share outside (0, 1)."""
    if not 0 < share < 1:
        raise ValueError(
            f"share must be in (0, 1); without hard negatives, set hard to none. Received: {share}"
        )
