"""Embeds raw queries, and retrieves rows, with the network in memory."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.model.encoder import Encoder, embed_queries
from tfrs_pipeline.model.exportable import Exportable
from tfrs_pipeline.model.network import TwoTowerNetwork
from tfrs_pipeline.retrieval import Query, check_queries, check_requests


class QueryEncoder:
    """Embeds raw queries with the current network, through the `Encoder` that an export has."""

    def __init__(self, network: TwoTowerNetwork, corpus: Corpus) -> None:
        self._candidate_ids = corpus.candidate_ids
        self._features = {"query": corpus.query_features, "request": corpus.request_features}
        self._encoder = Encoder(
            Exportable(
                embed_queries=network.embed_queries,
                embed_candidates=network.embed_candidates,
                variables=(),
                items=pa.table({"item_id": corpus.candidate_ids.values}),
                query_ids=corpus.query_ids.values,
                history_length=network.history_length,
                history_times=np.zeros(0) if network.reads_times else None,
                query_features=corpus.query_features,
                request_features=corpus.request_features,
            )
        )

    def __call__(self, queries: Sequence[Query]) -> np.ndarray:
        """Checks queries and embeds them: [n, D] float32."""
        check_queries(queries, ids_are_text=self._candidate_ids.are_text)
        return self.embed(queries)

    def embed(self, queries: Sequence[Query]) -> np.ndarray:
        """Embeds queries that `check_queries` has passed: [n, D] float32."""
        known = [feature.name for feature in self._features["request"]]
        requests = [query.get("request") for query in queries]
        check_requests(requests, known, may_have_others=True)
        return embed_queries(self._encoder, queries, self._features)
