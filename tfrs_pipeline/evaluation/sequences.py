"""Each user's training positives in the order of the log, to count what follows what."""

from dataclasses import dataclass

import ibis
import numpy as np
import pyarrow as pa

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.requests import query_start
from tfrs_pipeline.data.split import is_positive, order_keys
from tfrs_pipeline.evaluation.interactions import clicked_rows, items_of

_MOMENT = "_moment"


@dataclass(frozen=True)
class Sequences:
    """Training positives, [n], user by user, each user's in the order of the log.

    `users` are numbers, ascending; item rows start at 1. `is_new_moment` is False for a positive of
    the same moment as the one before it: the same request, or the same time if the log's rule for
    ties is "drop". Positives of one moment do not follow each other.
    """

    items: Ids
    users: np.ndarray
    item_rows: np.ndarray
    is_new_moment: np.ndarray

    @classmethod
    def from_log(cls, log: Log) -> "Sequences":
        """Collects the positives of a log; a `ValueError` if it has no order."""
        items = items_of(log)
        if log.order == "none":
            raise ValueError(
                "The log has no order, so nothing follows anything in it. If its rows are in the "
                "order of time, set is_ordered; else use Ease or Ials."
            )
        return cls.from_table(positives_in_order(log, log.events).to_pyarrow(), items)

    @classmethod
    def from_table(cls, table: pa.Table, items: Ids) -> "Sequences":
        """Collects the rows of `positives_in_order`."""
        users = table["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()
        moments = table[_MOMENT].cast(pa.int64()).to_numpy()
        is_new = (users[1:] != users[:-1]) | (moments[1:] != moments[:-1])
        return cls(items, users, clicked_rows(table, items), np.append(True, is_new)[: len(users)])

    def earlier(self, num: int) -> np.ndarray:
        """Finds the `num`-th positive of the user before each moment: [n] places, -1 if none.

        For 0, it is where the moment begins.
        """
        place = np.arange(len(self.users))
        place = np.maximum.accumulate(np.where(self.is_new_moment, place, 0))
        place = np.maximum(place - num, -1)
        return np.where((place >= 0) & (self.users[place] == self.users), place, -1)


def positives_in_order(log: Log, events: ibis.Table, *others: str) -> ibis.Table:
    """Selects the positives among a log's events, user by user, with other columns of them."""
    keys = order_keys(events)
    start, first = query_start(events, events[keys[0]])
    moment = start if log.ties == "drop" else first
    positives = events.mutate(**{_MOMENT: moment}).filter(is_positive)
    return positives.order_by(["user_id", *keys]).select("user_id", "item_id", _MOMENT, *others)
