"""What became of a user's items: how far each of them came, for those who compare models."""

from __future__ import annotations

from collections.abc import Sequence

import ibis
import numpy as np

from tfrs_pipeline.data.schema import Stage

_ORDER = {stage.value: number for number, stage in enumerate(Stage)}


def items_by_stage(
    split: ibis.Table, part: str, user_ids: np.ndarray, stages: Sequence[Stage]
) -> dict[Stage, list[np.ndarray]]:
    """Collects the items that each user met in a part alone, by the furthest stage they reached.

    An item that the user met in another part is excluded: what a model learned of the very pair
    would be measured, and one that lost here and was clicked there is no loser. Per stage and user,
    in the order of `user_ids`, the item ids are distinct and ascending.
    """
    rank = split["stage"].cases(*_ORDER.items())
    furthest = (
        split.mutate(rank=rank, is_in_part=split["part"] == part)
        .group_by(["user_id", "item_id"])
        .agg(rank=lambda t: t["rank"].max(), is_alone=lambda t: t["is_in_part"].all())
    )
    wanted = [_ORDER[stage.value] for stage in stages]
    pairs = (
        furthest.filter(furthest["is_alone"] & furthest["rank"].isin(wanted))
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
