"""The guard of a batch: what must never be a negative of a query, in whichever column it comes."""

from __future__ import annotations

from collections.abc import Collection

import tensorflow as tf

from tfrs_pipeline.batches.row_lists import contains, is_member, ragged
from tfrs_pipeline.samples.store import Samples

KNOWN, EXPOSED = "known positives", "exposed items"


class Guard:
    """Finds the columns that are no negatives of their row's query, of training events alone.

    These are its known positives, and what was exposed to it and not clicked: that the user passed
    an item over among a few says nothing about retrieval among millions, and is left to ranking.
    Samples were cleared of them when they were built; the masks of a batch do not trust that.

    Args:
        samples: Whose users' lists to keep to.
    """

    def __init__(self, samples: Samples) -> None:
        self._never = {KNOWN: ragged(samples.known_positives), EXPOSED: ragged(samples.exposed)}

    def of_shared(
        self,
        query_row: tf.Tensor,
        columns: tf.Tensor,
        *,
        repeats_queries: bool,
        reasons: Collection[str] = (KNOWN, EXPOSED),
    ) -> tf.Tensor:
        """Tells which columns that all rows share are never a negative of a row's query.

        Args:
            query_row: [W] int32.
            columns: [C] int32 candidate rows.
            repeats_queries: Whether rows of one query come together, which is then looked up once.
            reasons: Of them.

        Returns:
            [W, C] bool.
        """
        slot = None
        if repeats_queries:
            query_row, slot = tf.unique(query_row)
        found = contains([tf.gather(self._never[x], query_row) for x in reasons], columns)
        return found if slot is None else tf.gather(found, slot)

    def of_own(self, query_row: tf.Tensor, rows: tf.Tensor, pool: str) -> tf.Tensor:
        """Tells which of each row's own candidates [W, H] are never a negative of its query.

        A pool of exposed items is there only for who insists (`allow_exposed`): it is kept to the
        known positives.
        """
        reasons = (KNOWN,) if pool == "exposed" else (KNOWN, EXPOSED)
        found = [is_member(tf.gather(self._never[x], query_row), rows) for x in reasons]
        return tf.reduce_any(tf.stack(found), axis=0)
