"""Hard negatives: items that lost in the funnel."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, PositiveInt
from pydantic.dataclasses import dataclass

from tfrs_pipeline.settings import CHECKED, Several, refused_by_name

HardShare: TypeAlias = Annotated[float, Field(gt=0, lt=1)]
HardStage: TypeAlias = Literal["retrieved", "pre_ranked", "ranked", "exposed"]


def _split(stages: Any) -> Any:
    """Reads stages as typed after a flag, separated by commas."""
    return stages.split(",") if isinstance(stages, str) else stages


Stages: TypeAlias = Annotated[Several[HardStage], BeforeValidator(_split)]


@refused_by_name
@dataclass(frozen=True, config=CHECKED)
class FunnelLosers:
    """Items that lost in the positive's own request.

    The request is the user's events with its request_id or, without one, at its time. Stages have
    equal weight. Exposed items and known positives are left out. At most 100 losers of a stage,
    drawn at random, are kept for a positive.

    Attributes:
        share: f in (0, 1), share of the negatives' weight that hard negatives hold, in rows that
            have any. .5 is the rule of thumb; ablations found about .01 better.
        stages: Furthest stages that the losers reached: "retrieved" lost in pre-rank, "pre_ranked"
            lost in rank, "ranked" ended low in rank.
        num: Columns drawn for each row from its pool of a stage.
        bottom_share: For "ranked": the low part of the request's ranks, as a share in (0, 1].
        allow_exposed: Whether "exposed", items that were shown and not clicked, may be a stage.
            Ranking learns from them; this option measures what they do to retrieval.

    Raises:
        ConfigError: If "exposed" is a stage without `allow_exposed`, or `bottom_share` is given
            without "ranked".
    """

    share: HardShare = 0.01
    stages: Stages = ("retrieved", "pre_ranked")
    num: PositiveInt = 4
    bottom_share: Annotated[float, Field(gt=0, le=1)] = 0.5
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
        if "ranked" not in self.stages and self.bottom_share != FunnelLosers.bottom_share:
            raise ValueError(
                "bottom_share chooses among items of the stage 'ranked'. Add that stage, or leave "
                f"bottom_share out. Received: {self.bottom_share}, stages {self.stages!r}"
            )

    def of_stages(self, stages: Sequence[HardStage]) -> "FunnelLosers":
        """Returns a copy with other stages; without "ranked", `bottom_share` is the default."""
        share = self.bottom_share if "ranked" in stages else FunnelLosers.bottom_share
        return replace(self, stages=stages, bottom_share=share)
