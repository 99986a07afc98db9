"""Membership in lists of candidate rows, against sets in Python."""

import numpy as np

from tfrs_pipeline.batches.guard import contains
from tfrs_pipeline.samples.store import RowLists


def test_columns_are_found_in_the_lists_of_each_row() -> None:
    rng = np.random.default_rng(0)
    for num_items, num_rows, num_columns in ((3, 4, 6), (40, 7, 30), (10_000, 5, 0), (9, 0, 4)):
        kinds = [
            [rng.choice(np.arange(1, num_items + 1), rng.integers(0, 3)) for _ in range(num_rows)]
            for _ in range(2)
        ]
        columns = rng.integers(1, num_items + 1, num_columns).astype(np.int32)
        lists = [RowLists.from_lists(rows) for rows in kinds]
        parts = [part for each in lists for part in (each.values, each.offsets)]
        found = contains(columns, *parts)
        expected = [
            [column in {*first, *second} for column in columns.tolist()]
            for first, second in zip(*kinds, strict=True)
        ]
        assert found.shape == (num_rows, num_columns)
        assert found.tolist() == expected
