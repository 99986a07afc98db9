"""Embeds raw queries, and retrieves rows, with the network in memory."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import tensorflow as tf

from tfrs_pipeline.evaluation.topk import top_k_in_blocks
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.model.encoder import Encoder, embed_queries
from tfrs_pipeline.model.exportable import Exportable
from tfrs_pipeline.model.network import TwoTowerNetwork
from tfrs_pipeline.retrieval import Query, check_queries, check_requests

RetrieveRows: TypeAlias = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""Takes [n] query rows, [n, N] history rows, most recent first, padded with 0, and k. Returns
candidate rows, [n, k], best first, 0 in empty slots."""


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


def retrieval_of_rows(network: TwoTowerNetwork) -> Callable[[], RetrieveRows]:
    """Returns a function that embeds all candidates and returns an exact retrieval of their rows.

    Each call embeds them anew, as mining needs between epochs.
    """
    specs = [
        tf.TensorSpec([None], tf.int32),
        tf.TensorSpec([None, network.history_length], tf.int32),
    ]
    embed = tf.function(
        lambda rows, histories: network.embed_queries(rows, histories), input_signature=specs
    )

    def of_now() -> RetrieveRows:
        corpus = network.embed_corpus()

        def retrieve(query_rows: np.ndarray, history_rows: np.ndarray, k: int) -> np.ndarray:
            queries = embed(tf.constant(query_rows), tf.constant(history_rows)).numpy()
            size = len(queries), len(corpus)
            return top_k_in_blocks(lambda block: queries[block] @ corpus.T, *size, k)[0]

        return retrieve

    return of_now
