"""An ensemble, the weighted sum of several models, as one model (`model/projection.py`).

One index serves all members, and everything that takes a fitted model (evaluation, export, service)
takes their sum.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.model.checkpoints import TrainingResult
from tfrs_pipeline.model.exportable import Exportable
from tfrs_pipeline.model.fitted_model import Fitted, FittedTwoTower, encoder_of
from tfrs_pipeline.model.projection import Projection, Vectors, projection
from tfrs_pipeline.model.tf_tables import embed_corpus, feature_argument
from tfrs_pipeline.retrieval import Query
from tfrs_pipeline.search.history_bonus import HistoryBonus

_SIDES = "query_features", "request_features", "candidate_features"


@dataclass(frozen=True, eq=False, repr=False)
class FittedSum(Fitted):
    """The weighted sum of fitted models: a retriever to evaluate, to export, and to serve.

    Its vectors are the members', joined and perhaps rotated, so it is searched like one model. A
    query costs the towers of all members.

    Attributes:
        members: The fitted models by name, of the same items and users.
        weights: What each member's score is multiplied by, in units of its `Vectors.spread`.
        projection: Makes the sum's vectors from the members'.
        log: The log of the first member.
        notes: Lines for the user.
        bonus: What is added to the scores of the items in a query's history, and of what people
            took near them; None is nothing.
    """

    members: Mapping[str, Fitted]
    weights: Mapping[str, float]
    projection: Projection
    log: Log
    notes: list[str] = dataclasses.field(default_factory=list)
    bonus: HistoryBonus | None = None

    @classmethod
    def of(
        cls,
        members: Mapping[str, Fitted],
        weights: Mapping[str, float],
        queries: Sequence[Query],
        dim: int | None = None,
    ) -> "FittedSum":
        """Sums fitted models.

        Args:
            members: The models by name, fitted to one log.
            weights: Weight of each member, above 0, in units of its `Vectors.spread`.
            queries: Queries that give the spreads of the scores, and the rotation.
            dim: Most dimensions of the sum; None is as many as the first member has.

        Raises:
            ValueError: If the members differ in items, users or features.
        """
        check_members(members)
        vectors = [vectors_of(member, queries) for member in members.values()]
        scaled_weights = [
            weights[name] / member_vectors.spread
            for name, member_vectors in zip(members, vectors, strict=True)
        ]
        joined = projection(vectors, scaled_weights, dim or vectors[0].candidates.shape[1])
        return cls(members, weights, joined, next(iter(members.values())).log)

    @property
    def first(self) -> Any:
        """The first member: in a run, the best single model."""
        return next(iter(self.members.values()))

    @property
    def result(self) -> TrainingResult:
        """The training of the first member."""
        return self.first.result

    def __repr__(self) -> str:
        parts = (f"{weight:g} {name}" for name, weight in self.weights.items())
        return f"FittedSum({' + '.join(parts)})"

    @functools.cached_property
    def towers(self) -> Exportable:
        """The towers of all members as one, each of which reads its part of the inputs."""
        members = [member.towers for member in self.members.values()]
        pairs = [*zip(members, self.projection.matrices, strict=True)]

        # Inputs by name: members differ in which they take.
        def embed_queries(
            query_rows: tf.Tensor, history_rows: tf.Tensor, **inputs: Any
        ) -> tf.Tensor:
            parts = []
            for member, (matrix, _) in pairs:
                length = member.history_length
                features = *member.query_features, *member.request_features
                arguments = _features_argument(features, inputs)
                if member.history_times is not None and "history_times" in inputs:
                    # The time of the query comes before those of the history.
                    arguments["history_times"] = inputs["history_times"][:, : length + 1]
                embedded = member.embed_queries(query_rows, history_rows[:, :length], **arguments)
                parts.append(embedded @ matrix)
            return tf.add_n(parts)

        def embed_candidates(rows: tf.Tensor, **inputs: Any) -> tf.Tensor:
            parts = [
                member.embed_candidates(
                    rows, **_features_argument(member.candidate_features, inputs)
                )
                @ matrix
                for member, (_, matrix) in pairs
            ]
            return tf.add_n(parts)

        # The longest history, and times if any member reads them.
        longest = max(members, key=lambda member: member.history_length)
        all_times = (member.history_times for member in members)
        history_times = next((times for times in all_times if times is not None), None)
        merged: dict[str, Any] = {
            side: tuple({f.name: f for member in members for f in getattr(member, side)}.values())
            for side in _SIDES
        }
        return dataclasses.replace(
            longest,
            embed_queries=embed_queries,
            embed_candidates=embed_candidates,
            variables=[variable for member in members for variable in member.variables],
            history_times=history_times,
            has_item_bias=self.projection.has_bias,
            query_columns={
                name: column for member in members for name, column in member.query_columns.items()
            },
            **merged,
        )


def _features_argument(features: Iterable[Feature], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the argument `features` with those that a member reads; {} if it reads none."""
    encoded = inputs.get("features") or {}
    names = [feature.name for feature in features if feature.name in encoded]
    return feature_argument({name: encoded[name] for name in names})


def vectors_of(member: Fitted, queries: Sequence[Query], items: Ids | None = None) -> Vectors:
    """Embeds queries with a member, and its candidates; with `items`, these in their order.

    Items that the member lacks get zeros.
    """
    towers = member.towers
    candidates = embed_corpus(towers.embed_candidates, len(towers.candidate_ids))
    if items is not None:
        rows = Ids(towers.candidate_ids).rows(items.values)
        candidates = np.concatenate([np.zeros_like(candidates[:1]), candidates])[rows]
    return Vectors(encoder_of(towers)(queries), candidates, towers.has_item_bias)


def check_members(members: Mapping[str, Fitted]) -> None:
    """Raises a `ValueError` if members differ in items, users, or a feature of the same name."""
    (first_name, first), *others = ((name, member.towers) for name, member in members.items())
    for name, other in others:
        for what, first_ids, other_ids in (
            ("items", first.candidate_ids, other.candidate_ids),
            ("users", first.query_ids, other.query_ids),
        ):
            if first_ids.dtype != other_ids.dtype or not np.array_equal(first_ids, other_ids):
                raise ValueError(
                    f"A sum needs models of the same {what}: fit {name} to the log of "
                    f"{first_name}. Received: {len(other_ids):,} and {len(first_ids):,} {what}."
                )
        for side in _SIDES:
            by_name = {feature.name: feature for feature in getattr(first, side)}
            for feature in getattr(other, side):
                if by_name.get(feature.name, feature) != feature:
                    raise ValueError(
                        f"A sum encodes each feature once, but {first_name} and {name} have fitted "
                        f"{feature.name!r} differently: fit both to one log."
                    )


Model: TypeAlias = FittedTwoTower | FittedSum
"""What a run trains and exports."""
