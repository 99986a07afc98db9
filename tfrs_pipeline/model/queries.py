"""Raw queries turned into rows and embeddings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.model.features import Feature
from tfrs_pipeline.model.network import TwoTowerNetwork
from tfrs_pipeline.model.requests import encode_requests, raw_requests, request_signature
from tfrs_pipeline.retrieval import Query
from tfrs_pipeline.samples.store import RowLists

QUERY_BATCH = 1024


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
        length = model.history_length

        @tf.function(
            input_signature=[
                tf.TensorSpec([None], tf.int32),
                tf.TensorSpec([None, length], tf.int32),
                request_signature(request_features),
            ]
        )
        def embed(
            query_rows: tf.Tensor, histories: tf.Tensor, requests: dict[str, tf.Tensor]
        ) -> tf.Tensor:
            encoded = encode_requests(request_features, requests)
            return model.embed_queries(query_rows, histories, encoded)

        self._embed = embed

    def rows(self, queries: Sequence[Query]) -> tuple[np.ndarray, np.ndarray]:
        """Looks up query_rows, [n] int32, and history_rows, [n, N] int32.

        `user_id` and `history` are read; either may be missing. Unknown users have row 0, unknown
        items are dropped from the history.
        """
        length = self._model.history_length
        users = self._query_ids.rows([query.get("user_id") for query in queries])
        histories = [query.get("history", ()) for query in queries]
        offsets = np.append(0, np.cumsum(np.fromiter(map(len, histories), np.int64)))
        items = self._candidate_ids.rows(itertools.chain.from_iterable(histories))
        return users, RowLists(offsets, items).where(items > 0).latest(length)

    def __call__(self, queries: Sequence[Query]) -> np.ndarray:
        """Embeds queries: [n, D] float32; `request` is read besides, where there is one."""
        return self.embed_rows(*self.rows(queries), [query.get("request") for query in queries])

    def embed_rows(
        self,
        query_rows: np.ndarray,
        history_rows: np.ndarray,
        requests: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> np.ndarray:
        """Embeds what `rows` gives: [n, D] float32; features of no request are missing."""
        given = [None] * len(query_rows) if requests is None else requests
        raw = raw_requests(self._request_features, given)
        specs = request_signature(self._request_features)
        blocks = []
        for start in range(0, max(len(query_rows), 1), QUERY_BATCH):
            place = slice(start, start + QUERY_BATCH)
            of_block = {
                name: tf.constant(raw[name][place], spec.dtype, raw[name][place].shape)
                for name, spec in specs.items()
            }
            rows = tf.constant(query_rows[place]), tf.constant(history_rows[place])
            blocks.append(self._embed(*rows, of_block).numpy())
        return np.concatenate(blocks)
