"""What service knows of each user at the end of a log: the latest history, and the dislikes."""

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from tfrs_pipeline.data import schema
from tfrs_pipeline.data.histories import whole_seconds
from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import PAIR
from tfrs_pipeline.samples.never_negatives import ROW_PAIR
from tfrs_pipeline.samples.store import RowLists, offsets_of


def latest_histories(
    log: Log, query_ids: Ids, candidate_ids: Ids
) -> tuple[RowLists, RowLists, np.ndarray | None]:
    """Collects the positives of each user of a log, in its engine.

    Returns, per query row from 0, the candidate rows of the user's positives, most recent first,
    with 0 for unknown items; the known ones, distinct and ascending; and the seconds since 1970 of
    each value in the histories, or None in a log without timestamps.
    """
    keys = schema.order_keys(log.events)
    rows = _with_rows(log.positives().select(*PAIR, *keys), query_ids, candidate_ids)
    known = rows.filter(rows["candidate_row"] > 0).select(*ROW_PAIR).distinct()
    latest_first = [ibis.desc(key) for key in keys]
    histories, times = _by_query(rows.order_by(["query_row", *latest_first]), len(query_ids))
    known_positives, _ = _by_query(known.order_by(ROW_PAIR), len(query_ids))
    return histories, known_positives, times


def disliked_rows(log: Log, query_ids: Ids, candidate_ids: Ids) -> RowLists:
    """Collects the candidate rows that each user disliked, ascending, per query row from 0."""
    if log.disliked is None:
        return RowLists.empty(len(query_ids) + 1)
    return _distinct_rows(log.disliked, query_ids, candidate_ids)


def seen_rows(log: Log, query_ids: Ids, candidate_ids: Ids) -> RowLists:
    """Collects the candidate rows that each user clicked, was shown or disliked, ascending."""
    return _distinct_rows(log.events.filter(schema.was_shown), query_ids, candidate_ids)


def _distinct_rows(pairs: ibis.Table, query_ids: Ids, candidate_ids: Ids) -> RowLists:
    rows = _with_rows(pairs.select(*PAIR).distinct(), query_ids, candidate_ids)
    rows = rows.filter(rows["candidate_row"] > 0)
    return _by_query(rows.order_by(ROW_PAIR), len(query_ids))[0]


def _with_rows(pairs: ibis.Table, query_ids: Ids, candidate_ids: Ids) -> ibis.Table:
    """Adds the rows of users and items, 0 for an unknown item; drops unknown users."""
    users, items = (
        ibis.memtable(pa.table({name: ids.values, row: np.arange(1, len(ids) + 1, dtype=np.int32)}))
        for name, ids, row in zip(PAIR, (query_ids, candidate_ids), ROW_PAIR, strict=True)
    )
    joined = pairs.inner_join(users, "user_id").left_join(items, "item_id")
    return joined.fill_null({"candidate_row": 0})


def _by_query(rows: ibis.Table, num_queries: int) -> tuple[RowLists, np.ndarray | None]:
    """Reads the lists of queries and, if the rows have times, those of the entries."""
    kept: dict[str, ir.Value] = {name: rows[name] for name in ROW_PAIR}
    if "timestamp" in rows.columns:
        kept["time"] = whole_seconds(rows["timestamp"])
    pairs = rows.select(**kept).to_pyarrow()
    lengths = np.bincount(pairs["query_row"].to_numpy(), minlength=num_queries + 1)
    lists = RowLists(offsets_of(lengths), pairs["candidate_row"].to_numpy().astype(np.int32))
    return lists, pairs["time"].to_numpy() if "time" in kept else None
