"""The scores of joined vectors are the weighted sums of the members' scores, rotated or not."""

import numpy as np
import pytest

from tfrs_pipeline.model.projection import Vectors, projection

RNG = np.random.default_rng(0)


def vectors(num_queries: int, num_items: int, dim: int, *, has_bias: bool = False) -> Vectors:
    queries, candidates = (
        RNG.normal(size=(num, dim + has_bias)).astype(np.float32)
        for num in (num_queries, num_items)
    )
    if has_bias:
        queries[:, -1] = 1
    return Vectors(queries, candidates, has_bias)


def scores(model: Vectors) -> np.ndarray:
    return model.queries.astype(float) @ model.candidates.T.astype(float)


def test_a_projection_sums_the_weighted_scores_and_the_biases() -> None:
    members = [
        vectors(20, 30, 4),
        vectors(20, 30, 6, has_bias=True),
        vectors(20, 30, 3, has_bias=True),
    ]
    weights = [1.0, 0.3, 2.0]
    joined = projection(members, weights)(members)
    pairs = zip(weights, members, strict=True)
    expected = sum(weight * scores(member) for weight, member in pairs)
    np.testing.assert_allclose(scores(joined), expected, atol=1e-5)
    assert joined.queries.shape == (20, 4 + 6 + 3 + 1)
    # The biases of both members are one bias, the last entry.
    assert joined.has_bias
    np.testing.assert_allclose(joined.queries[:, -1], 1)
    biases = 0.3 * members[1].candidates[:, -1] + 2 * members[2].candidates[:, -1]
    np.testing.assert_allclose(joined.candidates[:, -1], biases, rtol=1e-5)


def test_a_rotation_is_the_best_approximation_of_its_rank() -> None:
    members = [vectors(200, 50, 8), vectors(200, 50, 5)]
    weights = [1.0, 0.6]
    expected = scores(projection(members, weights)(members))
    rotated = projection(members, weights, dim=6)(members)
    assert rotated.queries.shape == (200, 6)
    # Eckart and Young: no matrix of rank 6 is nearer than the truncated decomposition.
    left, values, right = np.linalg.svd(expected)
    best = (left[:, :6] * values[:6]) @ right[:6]
    np.testing.assert_allclose(scores(rotated), best, atol=1e-2 * np.abs(best).max())
    error = np.linalg.norm(expected - scores(rotated))
    assert error <= np.linalg.norm(expected - best) * 1.001


def test_a_rotation_keeps_the_products_of_items() -> None:
    """Similar items are found by them. They must not be on the scale of what users ask for."""
    members = [vectors(200, 50, 8), vectors(200, 50, 5)]
    for member in members:  # As in a trained model, queries differ far more in some dimensions.
        member.queries[:] *= np.geomspace(10, 0.1, member.queries.shape[1])
    joined, rotated = (projection(members, [1.0, 0.6], dim)(members).candidates for dim in (13, 12))
    expected, products = joined @ joined.T, rotated @ rotated.T
    # One of 13 dimensions is missing, so no vector is longer, and little is lost.
    assert (np.diag(products) <= np.diag(expected) * (1 + 1e-5)).all()
    assert np.linalg.norm(products - expected) < 0.3 * np.linalg.norm(expected)
    # What is lost is a vector's part in one direction: a matrix of rank 1.
    left = np.linalg.eigvalsh(expected - products)
    assert np.abs(left[:-1]).max() < 1e-4 * left[-1]


def test_a_rotation_to_all_dimensions_or_more_changes_nothing() -> None:
    members = [vectors(40, 30, 4), vectors(40, 30, 3, has_bias=True)]
    for dim in (8, 99):
        joined = projection(members, [1, 1], dim)(members)
        assert joined.queries.shape == (40, 8)
        np.testing.assert_allclose(scores(joined), sum(map(scores, members)), atol=1e-5)


def test_a_rotation_keeps_the_biases() -> None:
    members = [vectors(99, 30, 8), vectors(99, 30, 8, has_bias=True)]
    rotated = projection(members, [1, 0.5], dim=5)(members)
    assert rotated.queries.shape == (99, 5)
    np.testing.assert_allclose(rotated.queries[:, -1], 1)
    np.testing.assert_allclose(rotated.candidates[:, -1], 0.5 * members[1].candidates[:, -1])


def test_a_rotation_stands_fewer_queries_than_dimensions() -> None:
    """Their moments have no full rank: rounded, they would not be positive definite."""
    members = [vectors(50, 60, 200), vectors(50, 60, 200)]
    members[0].queries[:] += 30  # All queries point one way, as those of a trained model do.
    rotated = projection(members, [1, 1], dim=120)(members)
    expected = sum(map(scores, members))
    np.testing.assert_allclose(scores(rotated), expected, atol=1e-2 * np.abs(expected).max())


def test_a_model_that_scores_all_items_alike_can_be_summed() -> None:
    first = vectors(20, 30, 4)
    flat = Vectors(np.zeros((20, 2), np.float32), np.zeros((30, 2), np.float32))
    joined = projection([first, flat], [1, 1 / flat.spread])([first, flat])
    np.testing.assert_allclose(scores(joined), scores(first), atol=1e-5)
    # Such as iALS where no query has a history: its items have vectors.
    cold = flat._replace(candidates=vectors(20, 30, 2).candidates)
    assert cold.spread == flat.spread == 1
    rotated = projection([first, cold], [1, 1 / cold.spread], dim=4)([first, cold])
    np.testing.assert_allclose(scores(rotated), scores(first), atol=1e-3)


def test_the_spread_is_that_of_a_querys_scores() -> None:
    model = vectors(30, 40, 5)
    assert model.spread == pytest.approx(np.sqrt(scores(model).var(axis=1).mean()), rel=1e-5)
