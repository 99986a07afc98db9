"""Which shared columns hold a candidate of a row's lists, for many rows at once.

`samples/never_negatives.py` decides what the lists hold.
"""

from collections.abc import Sequence

import numpy as np

from tfrs_pipeline.samples.store import RowLists


def contains(columns: np.ndarray, lists: Sequence[RowLists]) -> np.ndarray:
    """Marks the columns whose candidate is in a list of the row: [num_rows, num_columns] bool.

    Each of `lists` has a list for each of the `num_rows` rows.

    Example:
        Two rows, whose lists are [3] and [7, 9]:

        >>> contains(np.array([7, 3, 7]), [RowLists.from_lists([[3], [7, 9]])])
        array([[False,  True, False],
               [ True, False,  True]])
    """
    distinct, column = np.unique(columns, return_inverse=True)
    largest = max(rows.max(initial=0) for rows in (columns, *(part.values for part in lists)))
    # The table's column for each candidate, from 1; 0 if the candidate is in no column.
    table_column = np.zeros(largest + 1, np.int32)
    table_column[distinct] = np.arange(1, len(distinct) + 1, dtype=np.int32)
    num_rows, width = len(lists[0]), len(distinct) + 1
    table = np.zeros(num_rows * width, bool)
    for part in lists:
        first = np.repeat(np.arange(num_rows) * width, np.diff(part.offsets))
        table[first + table_column[part.values]] = True
    return table.reshape(num_rows, width).take(column + 1, axis=1)
