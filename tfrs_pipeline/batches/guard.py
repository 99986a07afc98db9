"""The guard of a batch: what must never be a negative of a query, in whichever column it comes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from tfrs_pipeline.batches.row_lists import contains, is_member
from tfrs_pipeline.samples.store import RowLists, Samples

KNOWN, EXPOSED = REASONS = "known positives", "exposed items"

Never = Mapping[str, tf.RaggedTensor]
"""By reason, for each row, the sorted candidates that are never a negative of its query."""


class Guard:
    """Finds the columns that are no negatives of their row's query, of training events alone.

    These are its known positives, and what was exposed to it and not clicked: that the user passed
    an item over among a few says nothing about retrieval among millions, and is left to ranking.
    Samples were cleared of them when they were built; the masks of a batch do not trust that.
    """

    def __init__(self, samples: Samples) -> None:
        self._never = {KNOWN: samples.known_positives, EXPOSED: samples.exposed}

    def read(self, query_rows: np.ndarray) -> dict[str, RowLists]:
        """Gathers what is `Never` a negative of queries, [n] int32."""
        return {reason: lists.take(query_rows) for reason, lists in self._never.items()}

    @staticmethod
    def of_shared(never: Never, columns: tf.Tensor) -> tf.Tensor:
        """Tells which shared columns, [C] int32, are never a row's negative: [n, C] bool."""
        return contains([never[reason] for reason in REASONS], columns)

    @staticmethod
    def of_own(never: Never, rows: tf.Tensor, pool: str) -> tf.Tensor:
        """Tells which of each row's own candidates [n, H] are never a negative of its query.

        A pool of exposed items is there only for who insists (`allow_exposed`): it is kept to the
        known positives.
        """
        reasons = (KNOWN,) if pool == "exposed" else REASONS
        found = [is_member(never[reason], rows) for reason in reasons]
        return tf.reduce_any(tf.stack(found), axis=0)
