"""Hard negatives: items that lost in the funnel."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

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
