"""What is known of each user now: what a model in service answers by."""

from __future__ import annotations

import ibis
import numpy as np
import pyarrow as pa

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.split import order_keys
from tfrs_pipeline.samples.positives import Positives
from tfrs_pipeline.samples.store import RowLists


def latest_histories(log: Log, query_ids: Ids, candidate_ids: Ids) -> tuple[RowLists, RowLists]:
    """Collects the positives of each user of a log, joined and sorted by its engine.

    Args:
        log: All that has happened, its test part included.
        query_ids: Users and their rows.
        candidate_ids: Items and their rows.

    Returns:
        histories: Per query row from 0, the candidate rows of the user's positives, most recent
            first; of unknown items 0. Row 0, which stands for any unknown user, has none.
        known_positives: The known ones of the same, distinct and ascending.
    """
    users = _row_table("user_id", query_ids, "query_row")
    items = _row_table("item_id", candidate_ids, "candidate_row")
    events = Positives.select(log.events).select("user_id", "item_id", *order_keys(log.events))
    joined = events.inner_join(users, "user_id").left_join(items, "item_id")
    rows = joined.mutate(candidate_row=ibis.coalesce(joined["candidate_row"], 0))
    latest_first = [ibis.desc(key) for key in order_keys(log.events)]
    known = rows.filter(rows["candidate_row"] > 0).select("query_row", "candidate_row").distinct()
    return (
        _by_query(rows.order_by(["query_row", *latest_first]), len(query_ids)),
        _by_query(known.order_by(["query_row", "candidate_row"]), len(query_ids)),
    )


def _row_table(id_name: str, ids: Ids, row_name: str) -> ibis.Table:
    rows = pa.array(np.arange(1, len(ids) + 1, dtype=np.int32))
    return ibis.memtable(pa.table({id_name: ids.values, row_name: rows}))


def _by_query(rows: ibis.Table, num_queries: int) -> RowLists:
    pairs = rows.select("query_row", "candidate_row").to_pyarrow()
    lengths = np.bincount(pairs["query_row"].to_numpy(), minlength=num_queries + 1)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return RowLists(offsets, pairs["candidate_row"].to_numpy().astype(np.int32))
