"""What evaluation, mining and serving ask of anything that retrieves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

Query: TypeAlias = Mapping[str, Any]
"""Whichever of these a retriever needs: `"user_id"`, an int or str; `"history"`, a sequence of item
ids, oldest first; `"history_timestamps"`, the time of each of these, aware `datetime`s or seconds
since 1970; `"features"`, raw values of user features by column name; `"request"`, those of request
features, and `"timestamp"`, when the request comes: of it those features are made that the log made
of its own, and with it models that read times know how long ago the history was."""

Excluded: TypeAlias = Sequence[Collection[Any]] | None
"""Per query, candidate ids never to be returned for it, unknown ones ignored; None is nothing."""

Retrieved: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Candidate ids and scores, [num_queries, k] each; see `Retriever.retrieve`."""


@runtime_checkable
class Retriever(Protocol):
    """Finds the best candidates of each query: a model, a baseline, an index, a server's client.

    One contract test runs on every retriever of the package.
    """

    def retrieve(self, queries: Sequence[Query], k: int, exclude: Excluded = None) -> Retrieved:
        """Retrieves the k best candidates of each query.

        Ties are broken by the order of the corpus. A query gives the same answer alone as in any
        batch. Where fewer than k candidates are left, the last slots are empty. An approximate
        index may miss candidates, and which ones can change with k, with what is excluded and with
        the batch; in all else, and in the order of what it finds, it keeps to this too.

        Args:
            queries: One mapping a query. Ids in a history that the corpus does not know are
                ignored.
            k: How many candidates a query, 1 or more; may exceed the corpus.
            exclude: One collection of candidate ids a query, never to be returned for it. Ids that
                the corpus does not know are ignored. None excludes nothing.

        Returns:
            candidate_ids: [num_queries, k], best first, in the type of the corpus: int64 with -1 in
                empty slots, or object (str) with "" in them.
            scores: [num_queries, k] float32, -inf in empty slots.
        """
        ...
