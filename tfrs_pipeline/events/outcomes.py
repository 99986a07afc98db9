"""What became of a user's items: how far each of them came, for those who compare models."""

from __future__ import annotations

from collections.abc import Sequence

import ibis
import numpy as np

from tfrs_pipeline.events.schema import Stage

_ORDER = {stage.value: number for number, stage in enumerate(Stage)}


def items_by_stage(
    split: ibis.Table, part: str, user_ids: np.ndarray, stages: Sequence[Stage]
) -> dict[Stage, list[np.ndarray]]:
    """Collects each user's items whose furthest stage was reached in a part.

    An item counts once, for the furthest stage that it ever reached with this user, in any part:
    one that lost here and was clicked there is no loser.

    Args:
        split: Event table with `part`.
        part: Whose events count, such as "test".
        user_ids: [num_users] users to answer for.
        stages: Stages to answer for.

    Returns:
        Per stage and user, in the order of `user_ids`, distinct item ids, ascending; none for a
        user without.
    """
    rank = split["stage"].cases(*_ORDER.items())
    furthest = (
        split.mutate(rank=rank, rank_in_part=(split["part"] == part).ifelse(rank, -1))
        .group_by(["user_id", "item_id"])
        .agg(rank=lambda t: t["rank"].max(), rank_in_part=lambda t: t["rank_in_part"].max())
    )
    wanted = [_ORDER[stage.value] for stage in stages]
    pairs = (
        furthest.filter(
            (furthest["rank"] == furthest["rank_in_part"]) & furthest["rank"].isin(wanted)
        )
        .order_by(["user_id", "item_id"])
        .select("user_id", "item_id", "rank")
        .to_pyarrow()
    )
    users = pairs["user_id"].to_numpy(zero_copy_only=False)
    items = pairs["item_id"].to_numpy(zero_copy_only=False)
    ranks = pairs["rank"].to_numpy(zero_copy_only=False)
    result = {}
    for stage in stages:
        is_stage = ranks == _ORDER[stage.value]
        of_stage, ids = users[is_stage], items[is_stage]
        starts = np.searchsorted(of_stage, user_ids, side="left")
        ends = np.searchsorted(of_stage, user_ids, side="right")
        result[stage] = [ids[a:b] for a, b in zip(starts, ends, strict=True)]
    return result
