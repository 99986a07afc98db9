"""A small untrained model behind the serving modules; what it answers can be computed by hand."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tfrs_pipeline.evaluation.topk import ExactRetriever
from tfrs_pipeline.model.features import Feature
from tfrs_pipeline.model.queries import exact_retriever
from tfrs_pipeline.model.two_tower import TwoTowerModel
from tfrs_pipeline.samples.builder import RowLists
from tfrs_pipeline.serving.export import RetrievalModule
from tfrs_pipeline.serving.index import ExactIndex, ScannIndex, ScannSettings

NUM_QUERIES, NUM_CANDIDATES = 6, 60


@dataclass(frozen=True)
class Served:
    """A model, its ids, and what is known of each user."""

    model: TwoTowerModel
    query_ids: np.ndarray
    candidate_ids: np.ndarray
    histories: list[np.ndarray]

    @property
    def in_memory(self) -> ExactRetriever:
        return exact_retriever(self.model, self.query_ids, self.candidate_ids)

    def known(self, row: int) -> list[Any]:
        """Ids of the user's known positives, oldest first."""
        return self.candidate_ids[self.histories[row][::-1] - 1].tolist()

    def module(self, kind: str, num_leaves_to_search: int = 8) -> RetrievalModule:
        embeddings = self.model.embed_corpus()
        exact = ExactIndex(embeddings)
        settings = ScannSettings(8, num_leaves_to_search, num_reordered=60)
        return RetrievalModule(
            self.model,
            ScannIndex(embeddings, settings) if kind == "scann" else exact,
            exact,
            query_ids=self.query_ids,
            candidate_ids=self.candidate_ids,
            histories=RowLists.from_lists(self.histories),
            known_positives=RowLists.from_lists([np.unique(rows) for rows in self.histories]),
        )


@pytest.fixture(scope="session", params=["int", "str"])
def served(request: pytest.FixtureRequest) -> Served:
    return make_served(request.param)


def make_served(ids: str) -> Served:
    """Makes the model with ids of a type, "int" or "str"."""
    rng = np.random.default_rng(0)
    gender = Feature.fit("gender", "categorical", ["M", "F"])
    genres = Feature.fit("genres", "multi_categorical", [["a", "b"], ["c"]])
    model = TwoTowerModel(
        num_queries=NUM_QUERIES,
        num_candidates=NUM_CANDIDATES,
        query_features=[gender.spec],
        candidate_features=[genres.spec],
        embedding_dim=8,
        feature_dim=4,
        history_length=5,
        use_user_id=True,
    )
    model.set_features(
        {"gender": rng.integers(1, 3, NUM_QUERIES)},
        {"genres": rng.integers(0, 4, (NUM_CANDIDATES, 2))},
    )
    # An untrained Keras embedding is nearly zero: spread the answers out.
    model.set_weights(
        [
            w if w.dtype.kind == "i" else rng.normal(size=w.shape).astype(np.float32)
            for w in model.get_weights()
        ]
    )
    histories = [np.zeros(0, np.int32)] + [
        rng.permutation(np.arange(1, NUM_CANDIDATES + 1))[: 2 * i].astype(np.int32)
        for i in range(NUM_QUERIES)
    ]
    if ids == "int":
        query_ids, candidate_ids = np.arange(NUM_QUERIES) + 100, np.arange(NUM_CANDIDATES) * 7 + 3
    else:
        query_ids = np.array([f"Zoë {i}" for i in range(NUM_QUERIES)], object)
        candidate_ids = np.array([f"film-é-{i}" for i in range(NUM_CANDIDATES)], object)
    return Served(model, query_ids, candidate_ids, histories)
