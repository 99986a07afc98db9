"""Who clicked what in training, as a matrix and in order, to fit baselines to."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import ibis
import numpy as np
import pyarrow as pa
import scipy.sparse

from tfrs_pipeline.data.held_out_queries import numbered
from tfrs_pipeline.data.histories import query_start
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log, check_log
from tfrs_pipeline.data.schema import order_keys
from tfrs_pipeline.retrieval import Query


@dataclass(frozen=True)
class Interactions:
    """Which users clicked which items in training.

    The matrix is [num_users, num_items] float32 of 0 and 1; the item of row r has column r - 1.
    """

    items: Ids
    matrix: scipy.sparse.csr_matrix

    @classmethod
    def from_rows(cls, items: Ids, user_rows: np.ndarray, item_rows: np.ndarray) -> "Interactions":
        """Makes a matrix from user numbers, from 0, and item rows, from 1; drops empty users."""
        shape = (int(user_rows.max(initial=-1)) + 1, len(items))
        matrix = _zero_one_matrix(user_rows, item_rows, shape)
        # A baseline learns nothing from a user without a positive.
        return cls(items, matrix[np.diff(matrix.indptr) > 0])

    @classmethod
    def of(cls, train: "Log | Interactions", positives: ibis.Table | None = None) -> "Interactions":
        """Collects the positives of a log, or some; its items, ordered by id, are the corpus.

        Interactions are returned unchanged.
        """
        if isinstance(train, Interactions):
            return train
        items = items_of(train)
        clicks = train.positives() if positives is None else positives
        pairs = clicks.select("user_id", "item_id").distinct()
        pairs = pairs.order_by("user_id").to_pyarrow()
        users = numbered(pairs["user_id"])
        return cls.from_rows(items, users, clicked_rows(pairs, items))

    @property
    def counts(self) -> np.ndarray:
        """[num_items] int64 number of users of each item."""
        return np.bincount(self.matrix.indices, minlength=len(self.items))

    @cached_property
    def popularity(self) -> np.ndarray:
        """[num_items] float64 number of users of each item, and what breaks ties of these."""
        return self.counts + below_one(self.rarity[1])

    @cached_property
    def rarity(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of users, and of items, [num_items] float64, that tell nearly all of them apart.

        They follow from who clicked what alone. So they break ties without regard to names, which
        the order of rows depends on.
        """
        counts = np.sqrt(self.counts)
        of_users = self.matrix.astype(float) @ counts
        return of_users, self.matrix.T.astype(float) @ np.sqrt(of_users)


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
        keys = order_keys(log.events)
        start, first = query_start(log.events, log.events[keys[0]])
        # By the rule "drop", all at one time are a moment; else each request, or each event alone.
        moment = start if log.ties == "drop" else first
        positives = log.positives(log.events.mutate(moment=moment))
        positives = positives.order_by(["user_id", *keys]).select("user_id", "item_id", "moment")
        table = positives.to_pyarrow()
        # The table is sorted by user, so that numbers in order of appearance ascend.
        users = numbered(table["user_id"])
        moments = table["moment"].cast(pa.int64()).to_numpy()
        is_new = (users[1:] != users[:-1]) | (moments[1:] != moments[:-1])
        return cls(items, users, clicked_rows(table, items), np.append(True, is_new)[: len(users)])

    def earlier(self, num: int) -> np.ndarray:
        """Finds the `num`-th positive before each moment (0: its first): [n] places, -1 if none."""
        position = np.arange(len(self.users))
        # The first positive of each moment, then as many back, if these are the same user's.
        position = np.maximum.accumulate(np.where(self.is_new_moment, position, 0))
        position = np.maximum(position - num, -1)
        return np.where((position >= 0) & (self.users[position] == self.users), position, -1)


def below_one(counts: np.ndarray) -> np.ndarray:
    """Scales counts so that they break the ties of other counts: float64 in [0, 1)."""
    return counts / (1.0 + counts.max(initial=0))


def items_of(log: Log) -> Ids:
    """Returns the items of a log, ordered by id; a `TypeError` if it is not a log."""
    check_log(log)
    return Ids(log.items.select("item_id").order_by("item_id").to_pyarrow()["item_id"].to_numpy())


def clicked_rows(clicked: pa.Table, items: Ids) -> np.ndarray:
    """Looks up the rows of clicked items; raises a `ValueError` if the log's items lack one."""
    # Each distinct id is looked up once, since a log repeats its items.
    ids = clicked["item_id"].dictionary_encode().combine_chunks()
    rows = items.rows(ids.dictionary.to_numpy(zero_copy_only=False))[ids.indices.to_numpy()]
    if num_unknown := np.count_nonzero(rows < 1):
        raise ValueError(
            f"{num_unknown} of {len(rows)} clicked items are not among the log's items."
        )
    return rows


def history_matrix(queries: Sequence[Query], items: Ids) -> scipy.sparse.csr_matrix:
    """Marks the items of each history: [num_queries, num_items] float32 of 0 and 1."""
    histories = history_columns(queries, items)
    rows = np.repeat(np.arange(len(queries)), [len(h) for h in histories])
    columns = np.concatenate([*histories, np.empty(0, np.int32)])
    return _zero_one_matrix(rows, columns + 1, (len(queries), len(items)))


def history_columns(queries: Sequence[Query], items: Ids) -> list[np.ndarray]:
    """Looks up the known items of each history: an array of columns per query, oldest first."""
    for query in queries:
        if query.get("history") is None:
            raise ValueError(
                "This retriever works from query['history']: pass [] for a user without one. "
                f"Received a query with: {', '.join(map(repr, query)) or 'nothing'}."
            )
    return [rows - 1 for rows in items.rows_by_list([query["history"] for query in queries])]


def _zero_one_matrix(
    rows: np.ndarray, item_rows: np.ndarray, shape: tuple[int, int]
) -> scipy.sparse.csr_matrix:
    matrix = scipy.sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, item_rows - 1)), shape)
    matrix.sum_duplicates()  # An item that comes again counts once.
    matrix.data[:] = 1.0
    return matrix
