"""The guard of a batch: what must never be a negative of a query, in whichever column it comes.

By training events alone, these are its known positives, and what was exposed to it and not clicked:
that the user passed an item over among a few says nothing about retrieval among millions, and is
left to ranking. Samples were cleared of them when they were built; the masks of a batch do not
trust that.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from tfrs_pipeline.batches.row_lists import contains, is_member
from tfrs_pipeline.samples.store import RowLists, Samples

KNOWN, EXPOSED = REASONS = "known positives", "exposed items"

Never = Mapping[str, tf.RaggedTensor]
"""By reason, for each row, the sorted candidates that are never a negative of its query."""


def read_never(samples: Samples, query_rows: np.ndarray) -> dict[str, RowLists]:
    """Gathers what is `Never` a negative of queries, [n] int32."""
    lists = {KNOWN: samples.known_positives, EXPOSED: samples.exposed}
    return {reason: of_queries.take(query_rows) for reason, of_queries in lists.items()}


def is_never_shared(never: Never, columns: tf.Tensor) -> tf.Tensor:
    """Tells which shared columns, [C], are never a negative of a row's query: [n, C] bool."""
    return contains([never[reason] for reason in REASONS], columns)


def is_never_own(never: Never, rows: tf.Tensor, pool: str) -> tf.Tensor:
    """Tells which of each row's own candidates [n, H] are never a negative of its query.

    A pool of exposed items is there only for who insists (`allow_exposed`): it is kept to the known
    positives.
    """
    reasons = (KNOWN,) if pool == "exposed" else REASONS
    found = [is_member(never[reason], rows) for reason in reasons]
    return tf.reduce_any(tf.stack(found), axis=0)
