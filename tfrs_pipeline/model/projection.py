"""The algebra of an ensemble: joins vectors with weights, and rotates them to fewer dimensions.

A sum of dot products is a dot product, so one joined vector replaces those of all members.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg

# Added to the second moments of queries, as a share of their mean, because a model may have
# dimensions that no query uses.
_RIDGE = 1e-6


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
        # iALS scores all candidates alike if no query has a history. Weights are divided by the
        # spread: divided by almost 0, one would take all dimensions of the rotation.
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
        """Returns the sum's vectors, whose dot products are the weighted sums of the members'.

        After a rotation, they approximate these sums.
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

    Returns:
        The matrices of the members, in their order.

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
        query_matrix = np.zeros((member.queries.shape[1], width + num_biases))
        query_matrix[range(size), range(start, start + size)] = np.sqrt(weight)
        candidate_matrix = query_matrix.copy()
        if member.has_bias:
            # Each member's queries end in a 1. The sum needs one, so only the first is kept.
            query_matrix[-1, -1], candidate_matrix[-1, -1] = is_first_bias, weight
            is_first_bias = False
        matrices.append((query_matrix, candidate_matrix))
    joined = _as_float32(matrices, num_biases)
    if dim is None or dim >= width + num_biases:
        return joined
    # In float32, since the joined vectors of a large corpus take much memory; products are small.
    vectors = joined(members)
    queries, candidates = vectors.queries[:, :width], vectors.candidates[:, :width]
    # In float64: with fewer queries than dimensions, rounding would make the moments indefinite.
    queries = queries.astype(np.float64)
    moments = queries.T @ queries / len(queries)
    moments += _RIDGE * max(np.trace(moments) / width, np.finfo(np.float32).tiny) * np.eye(width)
    factor = np.linalg.cholesky(moments)
    # The eigenvectors of (C L)'(C L), which is small, are the right singular vectors of C L.
    eigenvalues, eigenvectors = np.linalg.eigh(
        factor.T @ (candidates.T @ candidates).astype(np.float64) @ factor
    )
    kept = eigenvectors[:, np.argsort(-eigenvalues)[: dim - num_biases]]
    # Similar items are found by the products of two candidates. In an orthonormal basis these stay
    # those of the joined vectors, as far as they lie in it. Queries take the other factor.
    basis, upper = np.linalg.qr(factor @ kept)
    rotate_queries = scipy.linalg.solve_triangular(factor, kept, lower=True, trans="T") @ upper.T
    rotations = [
        scipy.linalg.block_diag(rotation, np.eye(num_biases))
        for rotation in (rotate_queries, basis)
    ]
    rotated = [
        (query_matrix @ rotations[0], candidate_matrix @ rotations[1])
        for query_matrix, candidate_matrix in matrices
    ]
    return _as_float32(rotated, num_biases)


def _as_float32(matrices: Sequence[tuple[np.ndarray, np.ndarray]], num_biases: int) -> Projection:
    pairs = [(a.astype(np.float32), b.astype(np.float32)) for a, b in matrices]
    return Projection(pairs, bool(num_biases))
