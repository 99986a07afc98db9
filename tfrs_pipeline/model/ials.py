"""iALS as a member of a sum: like a tower, it embeds a query by a function of its history."""

import functools
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from tfrs_pipeline.data.log import Log
from tfrs_pipeline.evaluation.baselines import Ials
from tfrs_pipeline.evaluation.interactions import Interactions
from tfrs_pipeline.model.exportable import Exportable
from tfrs_pipeline.model.fitted_model import Fitted
from tfrs_pipeline.model.tf_tables import stored

# How many of the most recent items of a history count. As a baseline, iALS reads all.
HISTORY_LENGTH = 200
# Steps that solve for a query's vector; the tests hold them to the factors of Cholesky.
_STEPS = 48


def conjugate_gradients(matrices: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Solves A x = b for [B, D, D] symmetric A, with eigenvalues above 0, and [B, D] b: [B, D].

    Instead of a Cholesky factor, which LiteRT lacks. The error falls the faster the nearer the
    eigenvalues are to each other, and those of whitened factors are.

    Reference: Hestenes and Stiefel 1952, "Methods of conjugate gradients for solving linear
    systems", J. Res. NBS.
    """
    solution, residual, direction = tf.zeros_like(right), right, right
    norm = tf.reduce_sum(residual**2, axis=1, keepdims=True)
    for _ in range(_STEPS):
        product = tf.linalg.matvec(matrices, direction)
        curvature = tf.reduce_sum(direction * product, axis=1, keepdims=True)
        step = tf.math.divide_no_nan(norm, curvature)  # Once the residual is 0, nothing changes.
        solution += step * direction
        residual -= step * product
        norm, last_norm = tf.reduce_sum(residual**2, axis=1, keepdims=True), norm
        direction = residual + tf.math.divide_no_nan(norm, last_norm) * direction
    return solution


@dataclass(frozen=True, eq=False, repr=False)
class FittedIals(Fitted):
    """An iALS model that can be summed and exported; `Ials.fit` returns one that only ranks.

    With the factors y_i of the items, the vector of a query whose history has the items h is
    (Y'Y + l I + (a - 1) sum y_h y_h')^-1 a sum y_h, where l is the regularization and a the weight
    of a click. With the Cholesky factor L of Y'Y + l I and z_i = L^-1 y_i, its products with the
    factors are those of the vectors z_i and (I + (a - 1) sum z_h z_h')^-1 a sum z_h. So one table
    embeds histories and candidates, and vectors of both sides are of one scale.

    A query without a known item, and an item that the log lacks or that nobody clicked, have the
    vector 0: in a sum, the other members rank them.

    Attributes:
        settings: The settings of the factorization.
        log: The log that it was fitted to.
        vectors: [1 + num_items, D] float32, z of each candidate row; row 0 is 0.
    """

    settings: Ials
    log: Log
    vectors: np.ndarray

    @classmethod
    def fit(cls, settings: Ials, log: Log) -> "FittedIals":
        """Factorizes the positives of a log; the same log and settings give the same vectors.

        The settings need a regularization above 0: without one, Y'Y may have no inverse.
        """
        factors = settings.factorize(Interactions.of(log)).item_factors
        moments = (factors.T @ factors).astype(np.float64)
        moments += settings.regularization * np.eye(len(moments))
        whitening = np.linalg.inv(np.linalg.cholesky(moments)).astype(np.float32)
        return cls(settings, log, np.pad(factors @ whitening.T, [(1, 0), (0, 0)]))

    @functools.cached_property
    def towers(self) -> Exportable:
        """The vectors as an export has them, without what users did."""
        users, items = (
            table.select(name).order_by(name).to_pyarrow()
            for table, name in ((self.log.users, "user_id"), (self.log.items, "item_id"))
        )
        vectors, weight = stored(self.vectors), self.settings.alpha
        up_to = np.tri(HISTORY_LENGTH, dtype=np.int32)

        def embed_queries(query_rows: tf.Tensor, history_rows: tf.Tensor) -> tf.Tensor:
            is_equal = tf.expand_dims(history_rows, 2) == tf.expand_dims(history_rows, 1)
            # [B, L] how often the item of a position occurs up to it: in iALS, an item counts once.
            num = tf.reduce_sum(tf.cast(is_equal, tf.int32) * up_to, axis=2)
            # Row 0, the padding, has the vector 0.
            clicked = tf.gather(vectors, tf.where(num == 1, history_rows, 0))  # [B, L, D]
            moments = tf.eye(clicked.shape[2]) + (weight - 1) * tf.matmul(
                clicked, clicked, transpose_a=True
            )
            return conjugate_gradients(moments, weight * tf.reduce_sum(clicked, axis=1))

        return Exportable(
            embed_queries=embed_queries,
            embed_candidates=lambda rows: tf.gather(vectors, rows),
            variables=[vectors],
            items=items,
            query_ids=users["user_id"].to_numpy(),
            history_length=HISTORY_LENGTH,
        )
