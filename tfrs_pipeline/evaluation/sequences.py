"""Each user's training positives in their order, to see what follows what."""

from __future__ import annotations

from dataclasses import dataclass

import ibis
import numpy as np
import pyarrow as pa

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.split import is_positive, order_keys
from tfrs_pipeline.evaluation.interactions import clicked_rows, items_of


@dataclass(frozen=True)
class Sequences:
    """Training positives, user by user, each user's in the order of the log.

    Args:
        items: The corpus.
        users: [n] numbers of users, equal ones side by side.
        item_rows: [n] rows of items, from 1.
        is_next_request: [n] bool, False if the positive has the request of the one before it.
    """

    items: Ids
    users: np.ndarray
    item_rows: np.ndarray
    is_next_request: np.ndarray

    @classmethod
    def from_log(cls, log: Log) -> Sequences:
        """Collects the positives of a log; a `ValueError` if it has no order."""
        items = items_of(log)
        if log.order == "none":
            raise ValueError(
                "The log has no order, so nothing follows anything in it. If its rows are in the "
                "order of time, set is_ordered; else use Ease or Ials."
            )
        return cls.from_table(positives_in_order(log.events).to_pyarrow(), items)

    @classmethod
    def from_table(cls, table: pa.Table, items: Ids) -> Sequences:
        """Collects the rows of `positives_in_order`."""
        users = _codes(table["user_id"])
        is_next_request = np.ones(len(users), bool)
        if "request_id" in table.column_names:
            requests = _codes(table["request_id"])
            is_same = (users[1:] == users[:-1]) & (requests[1:] == requests[:-1])
            is_next_request[1:] = ~is_same | (requests[1:] < 0)
        return cls(items, users, clicked_rows(table, items), is_next_request)

    def earlier(self, num: int) -> np.ndarray:
        """Finds the `num`-th positive of the user before each positive's request.

        Returns [n] places, -1 where the user has none.
        """
        place = np.arange(len(self.users))
        place = np.maximum.accumulate(np.where(self.is_next_request, place, 0))
        place = np.maximum(place - num, -1)
        return np.where((place >= 0) & (self.users[place] == self.users), place, -1)


def positives_in_order(events: ibis.Table, *others: str) -> ibis.Table:
    """Selects the positives, user by user, with their requests, if any, and other columns."""
    positives = events.filter(is_positive)
    names = ["user_id", "item_id", *(["request_id"] if "request_id" in events.columns else [])]
    return positives.order_by(["user_id", *order_keys(positives)]).select(*names, *others)


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers the values of a column: [n] int32, -1 where null."""
    indices = column.combine_chunks().dictionary_encode().indices
    codes: np.ndarray = indices.fill_null(-1).to_numpy()
    return codes
