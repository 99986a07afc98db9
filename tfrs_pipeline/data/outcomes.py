"""How far the items of a user came, for those who compare models."""

from __future__ import annotations

from collections.abc import Sequence

import ibis
import numpy as np
import pyarrow as pa

from tfrs_pipeline.data.holdout import by_user
from tfrs_pipeline.data.schema import Stage

_ORDER = {stage.value: number for number, stage in enumerate(Stage)}


def items_by_stage(
    split: ibis.Table, part: str, user_ids: np.ndarray, stages: Sequence[Stage]
) -> dict[Stage, list[np.ndarray]]:
    """Collects the items that each user met in one part only, by the furthest stage they reached.

    Items that the user met in another part too are left out: a model may have learned the pair, and
    one that lost here and was clicked there is not a loser. Returns per stage and user, in the
    order of `user_ids`, the distinct item ids, ascending.
    """
    rank = split["stage"].cases(*_ORDER.items())
    furthest = (
        split.mutate(rank=rank, is_in_part=split["part"] == part)
        .group_by(["user_id", "item_id"])
        .agg(rank=lambda t: t["rank"].max(), is_alone=lambda t: t["is_in_part"].all())
    )
    wanted = [_ORDER[stage.value] for stage in stages]
    pairs = furthest.filter(furthest["is_alone"] & furthest["rank"].isin(wanted)).to_pyarrow()
    ranks = pairs["rank"].to_numpy(zero_copy_only=False)
    return {
        stage: _by_user(pairs.filter(ranks == _ORDER[stage.value]), user_ids) for stage in stages
    }


def items_met(events: ibis.Table, user_ids: np.ndarray) -> list[np.ndarray]:
    """Collects the items of each user's events, whatever stage they reached.

    Returns per user of `user_ids` the distinct item ids, ascending.
    """
    return _by_user(events.select("user_id", "item_id").distinct().to_pyarrow(), user_ids)


def _by_user(pairs: pa.Table, user_ids: np.ndarray) -> list[np.ndarray]:
    """Groups the items of distinct pairs of user_id and item_id by user, ascending."""
    pairs = pairs.sort_by([("user_id", "ascending"), ("item_id", "ascending")])
    users, items = (pairs[x].to_numpy(zero_copy_only=False) for x in ("user_id", "item_id"))
    return by_user(users, items, user_ids)
