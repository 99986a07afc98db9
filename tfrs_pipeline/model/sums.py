"""The sum of several models, as one: vectors joined with weights, and rotated to fewer dimensions.

The sum of dot products is a dot product. So one index serves all members of a sum, and everything
that takes a fitted model (evaluation, export, service) takes their sum.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import scipy.linalg
import tensorflow as tf

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.evaluation.bootstrap import mean_interval
from tfrs_pipeline.evaluation.evaluate import Truth, measure_vectors
from tfrs_pipeline.evaluation.metrics import Metric
from tfrs_pipeline.evaluation.results import difference_text
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.model.exportable import Exportable
from tfrs_pipeline.model.fit import TrainingResult
from tfrs_pipeline.model.fitted_model import Fitted, FittedTwoTower, encoder_of
from tfrs_pipeline.model.tf_tables import embed_corpus, feature_argument
from tfrs_pipeline.retrieval import Query
from tfrs_pipeline.search.history_bonus import HistoryBonus

# What a further member's score may weigh, in units of its spread; the first has 1.
WEIGHTS = (0.3, 0.6, 1.0)
# On fewer queries every member weighs 1, since noise would choose among the weights.
MIN_QUERIES = 100
# Added to the second moments of queries, as a share of their mean: a model may have dimensions that
# no query uses.
_RIDGE = 1e-6
_SIDES = "query_features", "request_features", "candidate_features"


class Vectors(NamedTuple):
    """A model's embeddings, float32: [n, D] of some queries, and [m, D] of all candidates.

    With `has_bias`, the last of the D entries is 1 in a query, and a bias in a candidate.
    """

    queries: np.ndarray
    candidates: np.ndarray
    has_bias: bool = False

    @property
    def spread(self) -> float:
        """Standard deviation of a query's scores over candidates, root mean square over queries.

        It is 1 for a model that scores all candidates of every query alike.
        """
        # From moments of the embeddings, since the scores of all pairs may not fit in memory.
        centered = self.candidates - self.candidates.mean(axis=0)
        covariance = centered.T @ centered / len(centered)
        variance = np.einsum("nd,de,ne->n", self.queries, covariance, self.queries).mean()
        # iALS scores all alike where no query has a history. Weights are divided by the spread: by
        # almost 0, one would leave the rotation no dimension for the other members.
        return float(np.sqrt(variance)) if variance > np.finfo(np.float32).tiny else 1.0


class Projection(NamedTuple):
    """How members' vectors become those of their sum: sum over i of x_i A_i, where A_i is [D_i, D].

    Attributes:
        matrices: A_i for the queries and A_i for the candidates of each member i, float32.
        has_bias: Whether the last entries of the sum are as in `Vectors` with `has_bias`.
    """

    matrices: Sequence[tuple[np.ndarray, np.ndarray]]
    has_bias: bool

    def __call__(self, members: Sequence[Vectors]) -> Vectors:
        """Returns the sum's vectors: their dot products are the weighted sums of the members'.

        With a rotation, these are approximated.
        """
        pairs = [*zip(members, self.matrices, strict=True)]
        queries = sum(member.queries @ matrix for member, (matrix, _) in pairs)
        candidates = sum(member.candidates @ matrix for member, (_, matrix) in pairs)
        return Vectors(np.asarray(queries), np.asarray(candidates), self.has_bias)


def projection(
    members: Sequence[Vectors], weights: Sequence[float], dim: int | None = None
) -> Projection:
    """Joins members end to end, each score times its weight; rotates them to `dim` dimensions.

    Biases of items add up to one, the last entry, which counts in `dim`. The rest of the `dim`
    entries are the best approximation of the weighted sums S = Q C' by a matrix of this rank, in
    the mean square over the members' queries and all candidates: with the Cholesky factor L of
    Q'Q / n, the first right singular vectors V of C L, and the factors B R = L V (B orthonormal),
    candidates are C B, and queries Q L^-T V R'.

    Args:
        members: The vectors of each member, for the same queries and candidates in one order.
        weights: What each member's scores are multiplied by, above 0, in units of the scores
            themselves: a weight in units of the spread is divided by `Vectors.spread` before.
        dim: Dimensions of the sum. None, or as many as all members have, rotates nothing.

    Example:
        >>> a = Vectors(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]]))
        >>> b = Vectors(np.array([[2.0]]), np.array([[5.0]]))
        >>> joined = projection([a, b], weights=[1, 0.5])([a, b])
        >>> (joined.queries @ joined.candidates.T).round(6).tolist()  # 1 * 11 + .5 * 10
        [[16.0]]
    """
    num_biases = int(any(member.has_bias for member in members))
    widths = [member.queries.shape[1] - member.has_bias for member in members]
    starts, width = np.cumsum([0, *widths[:-1]]), sum(widths)
    matrices, is_first_bias = [], True
    for member, weight, start, size in zip(members, weights, starts, widths, strict=True):
        # The root on both sides, so that products of two candidates, by which similar items are
        # found, are weighted alike.
        of_queries = np.zeros((member.queries.shape[1], width + num_biases))
        of_queries[range(size), range(start, start + size)] = np.sqrt(weight)
        of_candidates = of_queries.copy()
        if member.has_bias:
            # A query's last entries, all 1, become one: only the first member's is kept.
            of_queries[-1, -1], of_candidates[-1, -1] = is_first_bias, weight
            is_first_bias = False
        matrices.append((of_queries, of_candidates))
    joined = _rounded(matrices, num_biases)
    if dim is None or dim >= width + num_biases:
        return joined
    # In float32, since the joined vectors of a long corpus are large; their products are small.
    vectors = joined(members)
    queries, candidates = vectors.queries[:, :width], vectors.candidates[:, :width]
    # In float64: rounding would make the moments of fewer queries than dimensions indefinite.
    wide = queries.astype(np.float64)
    moments = wide.T @ wide / len(wide)
    moments += _RIDGE * max(np.trace(moments) / width, np.finfo(np.float32).tiny) * np.eye(width)
    factor = np.linalg.cholesky(moments)
    # The eigenvectors of (C L)'(C L), which is small, are the right singular vectors of C L.
    eigenvalues, eigenvectors = np.linalg.eigh(
        factor.T @ (candidates.T @ candidates).astype(np.float64) @ factor
    )
    kept = eigenvectors[:, np.argsort(-eigenvalues)[: dim - num_biases]]
    # In an orthonormal basis, so that the products of two candidates, by which similar items are
    # found, are those of their joined vectors, as far as these lie in it. Queries take the rest.
    basis, rest = np.linalg.qr(factor @ kept)
    rotate_queries = scipy.linalg.solve_triangular(factor, kept, lower=True, trans="T") @ rest.T
    rotations = [
        scipy.linalg.block_diag(rotation, np.eye(num_biases))
        for rotation in (rotate_queries, basis)
    ]
    rotated = [
        (of_queries @ rotations[0], of_candidates @ rotations[1])
        for of_queries, of_candidates in matrices
    ]
    return _rounded(rotated, num_biases)


def _rounded(matrices: Sequence[tuple[np.ndarray, np.ndarray]], num_biases: int) -> Projection:
    pairs = [(a.astype(np.float32), b.astype(np.float32)) for a, b in matrices]
    return Projection(pairs, bool(num_biases))


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
        """Sums fitted models; `queries` give the scales of their scores, and the rotation.

        The sum has at most `dim` dimensions; if that is None, as many as the first member.

        Raises a `ValueError` if the members have other items, users or features.
        """
        check_members(members)
        vectors = [vectors_of(member, queries) for member in members.values()]
        scaled = [
            weights[name] / of_member.spread
            for name, of_member in zip(members, vectors, strict=True)
        ]
        joined = projection(vectors, scaled, dim or vectors[0].candidates.shape[1])
        return cls(members, weights, joined, next(iter(members.values())).log)

    @property
    def first(self) -> Any:
        """The first member: in a run, the best alone."""
        return next(iter(self.members.values()))

    @property
    def result(self) -> TrainingResult:
        """How the training of the first member went."""
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
            side: tuple({x.name: x for member in members for x in getattr(member, side)}.values())
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
                name: x for member in members for name, x in member.query_columns.items()
            },
            **merged,
        )


def _features_argument(features: Iterable[Feature], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the argument `features` of a member, with those that it reads; {} if it has none."""
    encoded = inputs.get("features") or {}
    names = [feature.name for feature in features if feature.name in encoded]
    return feature_argument({name: encoded[name] for name in names})


def vectors_of(member: Fitted, queries: Sequence[Query], items: Ids | None = None) -> Vectors:
    """Embeds queries with a member, and its candidates, or `items` in their order.

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


@dataclass(frozen=True)
class Choice:
    """A sum that validation has chosen from several models, or the best of them alone.

    Attributes:
        weights: Weights of the members by name. The best model comes first, with 1; it is the only
            one if no sum improved on it, or the rotated sum was worse.
        metric: The name of the metric that decided.
        alone: Mean of the metric for the best model alone.
        summed: Mean for the sum, rotated.
        difference: The sum, rotated, minus the best model alone, paired by query, as
            `Interval.as_dict` returns it.
    """

    weights: Mapping[str, float]
    metric: str
    alone: float
    summed: float
    difference: Mapping[str, float | None]

    def lines(self) -> list[str]:
        """Describes the sum for a person: its members, and what it gains."""
        first, *others = self.weights
        if not others:
            return [f"{first} alone: no sum with another model is better on validation"]
        parts = " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())
        return [
            f"the sum {parts}: validation {self.metric} {self.summed:.4f}, where {first} alone has "
            f"{self.alone:.4f} ({difference_text(self.difference)})"
        ]


def choose(
    members: Mapping[str, Vectors],
    truth: Truth,
    metric: Metric,
    *,
    winner: str,
    max_members: int,
) -> Choice:
    """Chooses the weights of a sum on validation, one member after another.

    The winner, which is the best model alone, comes first. As long as one more member makes the sum
    better after its rotation to the winner's dimensions, the best one joins with the best of
    `WEIGHTS`; on fewer than `MIN_QUERIES` queries, with 1. Better is the mean, not the interval,
    since the winner's value is the best of many epochs on the same queries, which flatters it
    (docs/archive/tried.md).

    Args:
        members: Vectors by name, for the queries and the items of `truth`, in their order.
        truth: The queries of validation, and what is relevant to each.
        metric: The metric that decides; more is better.
        winner: Name of the best member alone.
        max_members: Most members of the sum, the winner included.
    """
    dim = members[winner].candidates.shape[1]
    spreads = {name: vectors.spread for name, vectors in members.items()}

    def measured(weights: Mapping[str, float]) -> np.ndarray:
        # After the rotation, as the sum is served: joined, a member may gain what that loses.
        vectors = [members[name] for name in weights]
        scaled = [weight / spreads[name] for name, weight in weights.items()]
        queries, candidates, _ = projection(vectors, scaled, dim)(vectors)
        return measure_vectors(queries, candidates, truth, metric)

    weights = {winner: 1.0}
    alone = best = measured(weights)
    grid = WEIGHTS if len(truth.queries) >= MIN_QUERIES else (1.0,)
    while len(weights) < min(max_members, len(members)):
        left = [name for name in members if name not in weights]
        extended = [{**weights, name: weight} for name in left for weight in grid]
        trials = [measured(trial) for trial in extended]
        means = [float(np.nanmean(trial)) for trial in trials]
        if max(means) <= np.nanmean(best):
            break
        first_best = means.index(max(means))
        weights, best = extended[first_best], trials[first_best]
    difference = mean_interval(best - alone, truth.user_ids).as_dict()
    before, after = (float(np.nanmean(values)) for values in (alone, best))
    return Choice(weights, str(metric), before, after, difference)
