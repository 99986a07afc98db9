"""How far each item came, against a slow loop."""

import ibis
import numpy as np
import pyarrow as pa
import pytest

from tfrs_pipeline.data.outcomes import items_by_stage, items_met
from tfrs_pipeline.data.schema import Stage


@pytest.mark.parametrize("ids", ["int", "str"])
def test_equals_a_slow_loop(ids: str) -> None:
    rng = np.random.default_rng(4)
    num = 400
    users = rng.integers(0, 6, num)
    items = rng.integers(0, 60, num)
    stages = rng.choice([stage.value for stage in Stage], num, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    parts = rng.choice(["train", "validation", "test"], num)

    def named(values: np.ndarray) -> list[int] | list[str]:
        return values.tolist() if ids == "int" else [f"x{value}" for value in values.tolist()]

    table = {"user_id": named(users), "item_id": named(items), "stage": stages, "part": parts}
    split = ibis.memtable(pa.table(table))
    order = [stage.value for stage in Stage]
    asked = np.array(named(np.array([1, 3, 9])), dtype=np.int64 if ids == "int" else object)
    found = items_by_stage(split, "test", asked, [Stage.RETRIEVED, Stage.EXPOSED])
    for stage, lists in found.items():
        for user, got in zip(asked.tolist(), lists, strict=True):
            rows = [i for i in range(num) if table["user_id"][i] == user]
            expected = set()
            for item in {table["item_id"][i] for i in rows}:
                own = [i for i in rows if table["item_id"][i] == item]
                furthest = max(order.index(stages[i]) for i in own)
                is_alone = all(parts[i] == "test" for i in own)
                if is_alone and furthest == order.index(stage.value):
                    expected.add(item)
            assert got.tolist() == sorted(expected)
    assert sum(map(len, found[Stage.EXPOSED])) > 0
    for user, got in zip(asked.tolist(), items_met(split, asked), strict=True):
        of_user = {i for u, i in zip(table["user_id"], table["item_id"], strict=True) if u == user}
        assert got.tolist() == sorted(of_user)
