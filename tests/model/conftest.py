"""A tiny problem that a two-tower model can learn: three tastes of users and items."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tfrs_pipeline.model.features import Feature
from tfrs_pipeline.model.two_tower import TwoTowerModel
from tfrs_pipeline.negatives.batches import TrainingBatches
from tfrs_pipeline.samples.build import RowLists, Samples

NUM_QUERIES, NUM_CANDIDATES = 30, 24
GENRES = ("drama", "comedy", "war")


@dataclass(frozen=True)
class Problem:
    """Samples of users that click items of their own genre, with features of both."""

    samples: Samples
    relevant: RowLists
    query_features: list[Feature]
    candidate_features: list[Feature]
    query_columns: dict[str, np.ndarray]
    candidate_columns: dict[str, np.ndarray]

    def model(self, **options: Any) -> TwoTowerModel:
        model = TwoTowerModel(
            num_queries=NUM_QUERIES,
            num_candidates=NUM_CANDIDATES,
            query_features=[feature.spec for feature in self.query_features],
            candidate_features=[feature.spec for feature in self.candidate_features],
            **{
                "embedding_dim": 8,
                "feature_dim": 4,
                "history_length": 5,
                "cutoffs": (3, 8),
                **options,
            },
        )
        model.set_features(self.query_columns, self.candidate_columns)
        return model

    def batches(self) -> TrainingBatches:
        return TrainingBatches(
            self.samples, batch_size=32, easy_negatives=[(0.0, 16)], history_length=5, seed=1
        )


@pytest.fixture(scope="session")
def problem() -> Problem:
    rng = np.random.default_rng(0)
    clicks = [
        rng.permutation(np.arange(1 + row % 3, NUM_CANDIDATES + 1, 3))[:6]
        for row in range(NUM_QUERIES)
    ]
    train = [rows[:4] for rows in clicks]
    query_rows = np.repeat(np.arange(1, NUM_QUERIES + 1), 4).astype(np.int32)
    candidate_rows = np.concatenate(train).astype(np.int32)
    nothing = RowLists.from_lists([np.zeros(0, int)] * (NUM_QUERIES + 1))
    query_columns = [GENRES[row % 3] for row in range(NUM_QUERIES)]
    genre_column = [[GENRES[row % 3], "film"] for row in range(NUM_CANDIDATES)]
    year_column = [None if row == 5 else 1990.0 + row for row in range(NUM_CANDIDATES)]
    taste = Feature.fit("taste", "categorical", query_columns)
    genres = Feature.fit("genres", "multi_categorical", genre_column)
    year = Feature.fit("year", "numeric", year_column)
    return Problem(
        samples=Samples(
            query_rows=query_rows,
            candidate_rows=candidate_rows,
            weights=np.ones(len(query_rows), np.float32),
            sequences=RowLists.from_lists([np.zeros(0, int), *train]),
            num_earlier=np.tile(np.arange(4, dtype=np.int32), NUM_QUERIES),
            known_positives=RowLists.from_lists([np.zeros(0, int), *map(np.sort, train)]),
            exposed=nothing,
            counts=np.bincount(candidate_rows, minlength=NUM_CANDIDATES + 1),
        ),
        relevant=RowLists.from_lists([rows[4:] for rows in clicks]),
        query_features=[taste],
        candidate_features=[genres, year],
        query_columns={"taste": taste.encode_column(query_columns)},
        candidate_columns={
            "genres": genres.encode_column(genre_column),
            "year": year.encode_column(year_column),
        },
    )
