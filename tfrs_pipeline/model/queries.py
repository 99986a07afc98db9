"""Raw queries turned into rows and embeddings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.evaluation.topk import top_k_in_blocks
from tfrs_pipeline.features.encoding import (
    TIMESTAMP,
    encode_requests,
    raw_requests,
    request_signature,
)
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.raw import MAX_SECONDS, to_seconds
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.model.network import TwoTowerNetwork
from tfrs_pipeline.retrieval import (
    HISTORY_TIMESTAMPS,
    Query,
    check_ids,
    check_queries,
    check_requests,
)
from tfrs_pipeline.samples.store import RowLists

QUERY_BATCH = 1024

RetrieveRows: TypeAlias = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""Given [n] query rows, [n, N] history rows, most recent first, padded with 0, and k: the candidate
rows, [n, k], best first, 0 in empty slots."""


class QueryEncoder:
    """Embeds raw queries with a model's query tower."""

    def __init__(
        self,
        model: TwoTowerNetwork,
        query_ids: Ids,
        candidate_ids: Ids,
        request_features: Sequence[Feature] = (),
    ) -> None:
        self._model = model
        self._query_ids = query_ids
        self._candidate_ids = candidate_ids
        self._request_features = request_features
        self._specs = request_signature(request_features, reads_times=model.reads_times)
        shape = [None, model.history_length]

        @tf.function(
            input_signature=[
                tf.TensorSpec([None], tf.int32),
                tf.TensorSpec(shape, tf.int32),
                self._specs,
                *([tf.TensorSpec(shape, tf.float64)] if model.reads_times else []),
            ]
        )
        def embed(
            query_rows: tf.Tensor,
            histories: tf.Tensor,
            requests: dict[str, tf.Tensor],
            of_items: tf.Tensor | None = None,
        ) -> tf.Tensor:
            encoded = encode_requests(request_features, requests)
            times = None
            if of_items is not None:
                times = tf.concat([requests[TIMESTAMP][:, tf.newaxis], of_items], axis=1)
            return model.embed_queries(query_rows, histories, encoded, times)

        self._embed = embed

    @classmethod
    def of(cls, network: TwoTowerNetwork, corpus: Corpus) -> QueryEncoder:
        """Makes the encoder of a network and the corpus that it was built for."""
        return cls(network, corpus.query_ids, corpus.candidate_ids, corpus.request_features)

    def __call__(self, queries: Sequence[Query]) -> np.ndarray:
        """Embeds queries: [n, D] float32.

        `user_id`, `history`, `request` and, where the model reads times, `history_timestamps` are
        read; any may be missing. Unknown users have row 0, unknown items are dropped from the
        history. A `ValueError` as `check_queries` and `check_requests`, or if a user id is of
        another type than the model's.
        """
        check_queries(queries, ids_are_text=self._candidate_ids.are_text)
        users = [query.get("user_id") for query in queries]
        check_ids([users], are_text=self._query_ids.are_text)
        requests = [query.get("request") for query in queries]
        known = [feature.name for feature in self._request_features]
        check_requests(requests, known, may_have_others=True)
        length = self._model.history_length
        query_rows = self._query_ids.rows(users)
        histories = list(map(history_of, queries))
        offsets = np.append(0, np.cumsum(np.fromiter(map(len, histories), np.int64)))
        items = self._candidate_ids.rows(itertools.chain.from_iterable(histories))
        history_rows = RowLists(offsets, items).where(items > 0).latest(length)
        times = None
        if self._model.reads_times:
            of_items = RowLists(offsets, np.concatenate([np.zeros(0), *item_times(queries)]))
            times = of_items.where(items > 0).latest(length)
        return self.embed_rows(query_rows, history_rows, requests, times)

    def row_retrieval(self) -> RetrieveRows:
        """Makes the exact retrieval by rows of the network as it is now."""
        corpus = self._model.embed_corpus()

        def retrieve(query_rows: np.ndarray, history_rows: np.ndarray, k: int) -> np.ndarray:
            queries = self.embed_rows(query_rows, history_rows)
            size = len(queries), len(corpus)
            return top_k_in_blocks(lambda block: queries[block] @ corpus.T, *size, k)[0]

        return retrieve

    def embed_rows(
        self,
        query_rows: np.ndarray,
        history_rows: np.ndarray,
        requests: Sequence[Mapping[str, Any] | None] | None = None,
        of_items: np.ndarray | None = None,
    ) -> np.ndarray:
        """Embeds [n] int32 query rows with their [n, N] int32 history rows: [n, D] float32.

        Histories are most recent first, padded with 0. `requests` hold raw features and timestamp.
        `of_items`, [n, N] float64, are the times of the items, NaN where unknown, read where the
        model reads times. None says nothing of any query.
        """
        given = [None] * len(query_rows) if requests is None else requests
        reads_times = self._model.reads_times
        raw = raw_requests(self._request_features, given, reads_times=reads_times)
        if of_items is None:
            of_items = np.full(history_rows.shape, np.nan)
        columns = [query_rows, history_rows, *([of_items] if reads_times else [])]
        blocks = []
        for start in range(0, max(len(query_rows), 1), QUERY_BATCH):
            place = slice(start, start + QUERY_BATCH)
            of_block = {
                name: tf.constant(raw[name][place], spec.dtype, raw[name][place].shape)
                for name, spec in self._specs.items()
            }
            rows, histories, *times = (tf.constant(column[place]) for column in columns)
            blocks.append(self._embed(rows, histories, of_block, *times).numpy())
        return np.concatenate(blocks)


def item_times(queries: Sequence[Query]) -> list[np.ndarray]:
    """Returns the time of each item of each query's history: float64 seconds since 1970 or NaN.

    A query may have `history_timestamps`, one per item: datetimes with a time zone, None where
    unknown; or seconds since 1970, NaN where unknown. A `ValueError` if their number differs or
    they are something else.
    """
    times = []
    for query in queries:
        num_items = len(history_of(query))
        given = query.get(HISTORY_TIMESTAMPS)
        if given is None:
            times.append(np.full(num_items, np.nan))
            continue
        if len(given) != num_items:
            raise ValueError(
                f"{HISTORY_TIMESTAMPS} must be one time an item of the history, None where it is "
                f"not known. Received: {len(given)} times for {num_items} items."
            )
        seconds = np.asarray(given)
        if seconds.dtype.kind not in "iuf":
            seconds = to_seconds(HISTORY_TIMESTAMPS, list(given))
        elif (seconds > MAX_SECONDS).any():
            raise ValueError(
                f"{HISTORY_TIMESTAMPS} must be seconds since 1970; divide milliseconds by 1,000. "
                f"Received: {np.nanmax(seconds)}, which is after the year 5000"
            )
        times.append(seconds.astype(np.float64))
    return times


def history_of(query: Query) -> Sequence[Any]:
    """Returns the history of a query, which may be missing or, read from a file, None."""
    history = query.get("history")
    return () if history is None else history
