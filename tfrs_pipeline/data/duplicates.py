"""Duplicates: events that a log has more than once, such as after a second delivery.

Several events of an item in one visit are not duplicates; `visits.py` merges those.
"""

import ibis

from tfrs_pipeline.data.rules import RawTable
from tfrs_pipeline.data.schema import Dropped, Duplicates, count_rows


def resolve_duplicates(events: ibis.Table, raw: RawTable, duplicates: Duplicates) -> ibis.Table:
    """Keeps or drops events that repeat an earlier one; returns those kept."""
    # By part too: an event in the test part does not repeat one in the training part. Context and
    # scores are left out, because they may differ between two reports of one event.
    keys = ["user_id", "item_id", "timestamp", "stage", "request_id", "part"]
    keys = [name for name in keys if name in events.columns]
    num_rows, what = count_rows(events), f"in {', '.join(keys)}"
    num_copies = num_rows - count_rows(events.select(*keys).distinct())
    if not num_copies:
        return events
    if duplicates == "keep":
        note = f"{num_copies:,} of {num_rows:,} events repeat an earlier one {what}: kept"
        raw.notes.append(f"{note} (data.duplicates drop leaves them out)")
        return events
    raw.dropped.append(Dropped("repeats an earlier event", num_copies))
    same = ibis.window(group_by=keys, order_by="event_number")
    return events.filter(ibis.row_number().over(same) == 0)
