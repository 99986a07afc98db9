"""What an export needs to know of a model, of this package or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.reading import Reading
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.samples.store import RowLists


@dataclass(frozen=True, eq=False, repr=False)
class Exportable:
    """A model as `export` takes it: whatever embeds queries and candidates can be served.

    Rows are int32: 0 is "unknown", 1, 2, ... are those of the ids in their order. A score is the
    dot product of a query's and a candidate's embedding, both [n, D] float32.

    Args:
        embed_queries: Embeds queries, within a graph too: called with their rows [B] and the
            candidate rows of their histories [B, history_length], most recent first, padded with 0.
            Where there are features, also with `features=`, encoded, by name: those of the request,
            and all of the user's or none, which takes what the model holds of the rows. Where there
            are `history_times`, also with `history_times=` [B, history_length + 1] float64: in
            seconds since 1970, when the query comes and each item of the history did, NaN where it
            is not known.
        embed_candidates: Embeds candidates, likewise, by rows [n]. Where there are features, also
            with `features=`, or without, which takes what the model holds of the rows.
        variables: What the two read: variables, and lookup tables where there are any. They are
            saved, and nothing else of the model.
        items: One row a candidate: `item_id`, columns to filter by and, if there are such, `title`
            and `_listed`, which is whether to retrieve it.
        query_ids: [num_queries] int64, or object of `str`: the users' ids; empty is no user.
        history_length: The most recent items of a history that `embed_queries` reads; 0 is none.
        histories: Per query row from 0, candidate rows, most recent first, as known when exported;
            without a list, nothing is known of anyone.
        known_positives: Per query row from 0, the candidate rows that are not retrieved again;
            likewise.
        history_times: [total], of each of the histories' values its time in seconds since 1970;
            None if `embed_queries` reads no times.
        query_features: Fitted features of the users, in the order in which requests list them.
        request_features: Those of a request itself, likewise.
        candidate_features: Those of the candidates.
        reading: How the item table was read (see `Log`).

    Raises:
        ValueError: If the lists are not those of the query ids, the times not those of the
            histories, the items no Arrow table, or there is none, or ids occur twice, are reserved
            (-1, ""), or neither integers nor strings.
    """

    embed_queries: Callable[..., tf.Tensor]
    embed_candidates: Callable[..., tf.Tensor]
    variables: Sequence[Any]
    items: pa.Table
    query_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    history_length: int = 0
    histories: RowLists = field(default_factory=lambda: RowLists.empty(0))
    known_positives: RowLists = field(default_factory=lambda: RowLists.empty(0))
    history_times: np.ndarray | None = None
    query_features: Sequence[Feature] = ()
    request_features: Sequence[Feature] = ()
    candidate_features: Sequence[Feature] = ()
    reading: Reading = field(default_factory=Reading)

    def __post_init__(self) -> None:
        if len(self.query_ids):
            object.__setattr__(self, "query_ids", Ids(self.query_ids).values)
        num_rows = len(self.query_ids) + 1
        for name in ("histories", "known_positives"):
            num_lists = len(getattr(self, name))
            if not num_lists:
                object.__setattr__(self, name, RowLists.empty(num_rows))
            elif num_lists != num_rows:
                raise ValueError(
                    f"{name} must be {num_rows} lists: of row 0, which is the unknown user and has "
                    f"none, and of each of the {num_rows - 1} query ids. Received: {num_lists}"
                )
        times, total = self.history_times, len(self.histories.values)
        if times is not None and len(times) != total:
            raise ValueError(
                f"history_times must be {total}, one for each value of histories. Received: "
                f"{len(times)}"
            )
        _ = self.candidate_ids

    @cached_property
    def candidate_ids(self) -> np.ndarray:
        """[num_candidates] int64, or object of `str`: the items' ids, in their order."""
        if not isinstance(self.items, pa.Table) or "item_id" not in self.items.column_names:
            raise ValueError(
                "items must be an Arrow table, such as pa.Table.from_pandas makes, with a column "
                f"item_id. Received: {getattr(self.items, 'column_names', type(self.items))}"
            )
        return Ids(self.items["item_id"].to_pylist()).values
