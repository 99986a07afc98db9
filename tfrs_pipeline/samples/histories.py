"""What is known of each user now: what a model in service answers by."""

from __future__ import annotations

import numpy as np

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.samples.positives import Positives
from tfrs_pipeline.samples.store import RowLists


def latest_histories(log: Log, query_ids: Ids, candidate_ids: Ids) -> tuple[RowLists, RowLists]:
    """Collects the positives of each user of a log.

    Args:
        log: All that has happened, its test part included.
        query_ids: Users and their rows.
        candidate_ids: Items and their rows.

    Returns:
        histories: Per query row from 0, the candidate rows of the user's positives, most recent
            first; of unknown items 0. Row 0, which stands for any unknown user, has none.
        known_positives: The known ones of the same, distinct and ascending.
    """
    keys = ["timestamp"] if "timestamp" in log.events.columns else []
    table = (
        Positives.select(log.events)
        .order_by([*keys, "event_number"])
        .select("user_id", "item_id")
        .to_pyarrow()
    )
    queries = query_ids.rows(table["user_id"].to_numpy())
    candidates = candidate_ids.rows(table["item_id"].to_numpy())
    is_known = queries > 0
    queries, candidates = queries[is_known], candidates[is_known]
    latest_first = np.lexsort([-np.arange(len(queries)), queries])
    num_keys = len(query_ids) + 1
    offsets = np.searchsorted(queries[latest_first], np.arange(num_keys + 1))
    histories = RowLists(offsets.astype(np.int64), candidates[latest_first].astype(np.int32))
    pairs = np.unique((queries.astype(np.int64) << 32 | candidates)[candidates > 0])
    known_offsets = np.searchsorted(pairs >> 32, np.arange(num_keys + 1))
    known = RowLists(known_offsets.astype(np.int64), (pairs & 0xFFFFFFFF).astype(np.int32))
    return histories, known
