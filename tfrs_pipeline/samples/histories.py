"""The users' histories up to the end of the log, for a model in service."""

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.requests import whole_seconds
from tfrs_pipeline.data.split import is_positive, order_keys
from tfrs_pipeline.samples.store import RowLists, offsets_of


def latest_histories(
    log: Log, query_ids: Ids, candidate_ids: Ids
) -> tuple[RowLists, RowLists, np.ndarray | None]:
    """Collects the positives of each user of a log, in its engine.

    Returns, per query row from 0, the candidate rows of the user's positives, most recent first,
    with 0 for unknown items; the known ones, distinct and ascending; and the seconds since 1970 of
    each value in the histories, or None in a log without timestamps.
    """
    users = _row_table("user_id", query_ids, "query_row")
    items = _row_table("item_id", candidate_ids, "candidate_row")
    events = log.events.filter(is_positive).select("user_id", "item_id", *order_keys(log.events))
    joined = events.inner_join(users, "user_id").left_join(items, "item_id")
    rows = joined.mutate(candidate_row=ibis.coalesce(joined["candidate_row"], 0))
    latest_first = [ibis.desc(key) for key in order_keys(log.events)]
    known = rows.filter(rows["candidate_row"] > 0).select("query_row", "candidate_row").distinct()
    histories, times = _by_query(rows.order_by(["query_row", *latest_first]), len(query_ids))
    known_positives, _ = _by_query(known.order_by(["query_row", "candidate_row"]), len(query_ids))
    return histories, known_positives, times


def _row_table(id_name: str, ids: Ids, row_name: str) -> ibis.Table:
    rows = pa.array(np.arange(1, len(ids) + 1, dtype=np.int32))
    return ibis.memtable(pa.table({id_name: ids.values, row_name: rows}))


def _by_query(rows: ibis.Table, num_queries: int) -> tuple[RowLists, np.ndarray | None]:
    """Reads the lists of queries and, if the rows have times, those of the entries."""
    kept: dict[str, ir.Value] = {name: rows[name] for name in ("query_row", "candidate_row")}
    if "timestamp" in rows.columns:
        kept["time"] = whole_seconds(rows["timestamp"])
    pairs = rows.select(**kept).to_pyarrow()
    lengths = np.bincount(pairs["query_row"].to_numpy(), minlength=num_queries + 1)
    lists = RowLists(offsets_of(lengths), pairs["candidate_row"].to_numpy().astype(np.int32))
    return lists, pairs["time"].to_numpy() if "time" in kept else None
