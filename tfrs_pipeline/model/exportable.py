"""What an export needs to know about a model of this package or another one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import tensorflow as tf

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.schema import Exclude
from tfrs_pipeline.data.settings import Reading
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.samples.store import RowLists
from tfrs_pipeline.search.history_bonus import HistoryBonus
from tfrs_pipeline.search.item_graph import KINDS, ItemGraph
from tfrs_pipeline.search.queries import QueryInputs


@dataclass(frozen=True, eq=False, repr=False)
class Exportable:
    """A model as `export` takes it: any model that embeds queries and candidates can be served.

    Rows are int32: 0 is "unknown", and 1, 2, ... follow the order of the ids. A score is the dot
    product of a query's and a candidate's embedding, both [n, D] float32.

    Args:
        embed_queries: Embeds queries, also within a graph. It is called with query rows [B] and the
            candidate rows of histories [B, history_length], most recent first, padded with 0. If
            there are features, it also gets `features=`, encoded, by name: those of the request,
            and all or none of the user's. If none, it uses those that the model holds for the
            rows. If there are `history_times`, it also gets `history_times=`
            [B, history_length + 1] int32: the times of the query and of each item of the history
            in seconds, counted from the latest of them, -2^31 where unknown.
        embed_candidates: Embeds candidates by rows [n], also within a graph. If there are features,
            it is called with `features=`, or without, to use those that the model holds.
        variables: Variables and lookup tables that the two functions read; no others are saved.
        items: A row for each candidate: `item_id`, columns to filter by and, optionally, `title`
            and `_listed`, whether to retrieve it.
        query_ids: [num_queries] int64, or object array of `str`: the users' ids; may be empty.
        history_length: Number of most recent items of a history that `embed_queries` reads.
        histories: For each query row from 0, the candidate rows clicked before the export, most
            recent first; empty if no history is known. Unknown items, row 0, are left out.
        known_positives: For each query row from 0, the candidate rows that the user knows: those
            clicked, with `exclude` "seen" those shown too. Empty if there are none.
        disliked: For each query row from 0, the candidate rows that the user disliked, which no
            answer by user id holds, with a repeat bonus or without; empty if there are none.
        history_times: [total], the times of the values of `histories` in seconds since 1970; None
            if `embed_queries` reads no times.
        query_features: Fitted features of the users, in the order in which requests list them.
        query_columns: Their encoded values by name, [num_queries, ...], in the order of the ids;
            a feature without them is missing in service, unless the request brings it.
        request_features: Fitted features of requests, in that order.
        candidate_features: Fitted features of the candidates.
        reading: How the item table was read (see `Log`).
        has_item_bias: Whether the last entry of a candidate's embedding is a bias and that of a
            query's is 1. To find similar items, an item's last entry is set to 1 too.
        bonus: What is added to the scores of the items in a query's history, given or stored, and
            of what people took near them; None is nothing. If it has no graph, that of `histories`
            is taken. With `repeats`, answers hold known positives whatever `exclude` is.
        exclude: What answers by user id leave out, as the rankings of an evaluation do: "clicked"
            and "seen" `known_positives` and what is recorded in service as clicked, or also as
            shown; "none" nothing. Disliked items are always left out.
        items_read: When the reading of the items began, with a time zone. Earlier live writes of
            these items do not count. The default is now.
        histories_until: The time of the log's last event, with a time zone: events recorded in
            service count if they are later. None for a log without times, where `items_read` takes
            its place.

    Raises:
        ValueError: If `histories`, `known_positives`, `disliked` or `history_times` have another
            length, the items are not an Arrow table or empty, or ids occur twice, are reserved
            (-1, "") or are neither integers nor strings.
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
    query_columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    request_features: Sequence[Feature] = ()
    candidate_features: Sequence[Feature] = ()
    reading: Reading = field(default_factory=Reading)
    has_item_bias: bool = False
    bonus: HistoryBonus | None = None
    exclude: Exclude = "clicked"
    items_read: datetime = field(default_factory=lambda: datetime.now(UTC))
    histories_until: datetime | None = None
    disliked: RowLists = field(default_factory=lambda: RowLists.empty(0))

    def __post_init__(self) -> None:
        if self.exclude not in (rules := get_args(Exclude)):
            raise ValueError(f"exclude must be one of {', '.join(rules)}. Got {self.exclude!r}")
        list_names = "histories", "known_positives", "disliked"
        for name in ("query_ids", *list_names):
            if not hasattr(getattr(self, name), "__len__"):
                raise ValueError(
                    f"{name} must be a list of one entry per user; leave it out if the model knows "
                    f"no users. Received: {getattr(self, name)!r}"
                )
        if len(self.query_ids):
            object.__setattr__(self, "query_ids", Ids(self.query_ids).values)
        # Lists have an entry for row 0 as well, so that a row is its own index.
        num_rows = len(self.query_ids) + 1
        for name in list_names:
            num_lists = len(getattr(self, name))
            if not num_lists:
                object.__setattr__(self, name, RowLists.empty(num_rows))
            elif num_lists != num_rows:
                raise ValueError(
                    f"{name} must be {num_rows} lists: an empty one for row 0, the unknown user, "
                    f"and one for each of the {num_rows - 1} query ids. Received: {num_lists}"
                )
        times, total = self.history_times, len(self.histories.values)
        if times is not None and len(times) != total:
            raise ValueError(
                f"history_times must be {total}, one for each value of histories. Received: "
                f"{len(times)}"
            )
        # Lists leave out row 0, as a request's history leaves out items of unknown ids.
        for name in list_names:
            row_lists = getattr(self, name)
            is_known = row_lists.values > 0
            if not is_known.all():
                object.__setattr__(self, name, row_lists.where(is_known))
                if name == "histories" and times is not None:
                    object.__setattr__(self, "history_times", np.asarray(times)[is_known])
        _ = self.candidate_ids  # Read now, so that wrong items are refused here.
        if self.bonus is not None and self.bonus.neighbours is not None:
            object.__setattr__(self, "bonus", replace(self.bonus, graph=self.graph))

    def exportable(self) -> "Exportable":
        """Returns the model itself, as a fitted model returns its `Exportable`."""
        return self

    def turned(self, rotation: np.ndarray) -> "Exportable":
        """Returns the model with its space turned by an orthogonal [D, D]: scores stay."""
        matrix = tf.constant(rotation, tf.float32)

        def turn(embed: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
            return lambda *rows, **inputs: tf.matmul(embed(*rows, **inputs), matrix)

        queries, candidates = turn(self.embed_queries), turn(self.embed_candidates)
        return replace(self, embed_queries=queries, embed_candidates=candidates)

    @cached_property
    def inputs(self) -> QueryInputs:
        """What the query tower reads, and how raw queries become that."""
        return QueryInputs(
            users=Ids(self.query_ids) if len(self.query_ids) else NoUsers(self.query_ids),
            items=Ids(self.candidate_ids),
            features={
                "query": self.query_features,
                "request": self.request_features,
                "candidate": self.candidate_features,
            },
            columns=self.query_columns,
            history_length=self.history_length,
            reads_times=self.history_times is not None,
        )

    @cached_property
    def graph(self) -> ItemGraph:
        """What people took near each item: that of `bonus`, or else in all `histories`."""
        bonus = self.bonus or HistoryBonus()
        if bonus.graph is not None:
            return bonus.graph
        kind = next(iter(KINDS)) if bonus.neighbours is None else bonus.neighbours.kind
        return ItemGraph.build(self.histories, len(self.candidate_ids), kind)

    @cached_property
    def candidate_ids(self) -> np.ndarray:
        """[num_candidates] int64, or object array of `str`: the items' ids, in their order."""
        if not isinstance(self.items, pa.Table) or "item_id" not in self.items.column_names:
            raise ValueError(
                "items must be an Arrow table, such as pa.Table.from_pandas makes, with a column "
                f"item_id. Received: {getattr(self.items, 'column_names', type(self.items))}"
            )
        return Ids(self.items["item_id"].to_pylist()).values


class NoUsers:
    """The users of a model that knows none; ids have the type of the empty array `ids`."""

    def __init__(self, ids: np.ndarray) -> None:
        self.are_text = ids.dtype != np.int64

    def rows(self, values: Any) -> np.ndarray:
        """Returns 0 for each id: [n] int32."""
        return np.zeros(len(values), np.int32)
