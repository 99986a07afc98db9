"""iALS as a member of a sum: like a tower, it embeds a query by a function of its history."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.data.log import Log, check_log
from tfrs_pipeline.evaluation.baselines import Ials
from tfrs_pipeline.evaluation.interactions import Interactions
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.model.exportable import Exportable
from tfrs_pipeline.model.fitted_model import with_log
from tfrs_pipeline.model.tf_tables import stored

# How many of the most recent items of a history count. As a baseline, iALS reads all.
HISTORY_LENGTH = 200


@dataclass(frozen=True, eq=False, repr=False)
class FittedIals:
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

    Example:
        `Sum` fits one::

            both = tp.Sum([two_tower, tp.Ials()]).fit(train, validation)
    """

    settings: Ials
    log: Log
    vectors: np.ndarray

    @classmethod
    def fit(cls, settings: Ials, train: Log | TrainingSet) -> "FittedIals":
        """Factorizes the positives of a log; the same log and settings give the same vectors.

        Raises a `TypeError` if `train` is neither a log nor the training set of one, and a
        `ValueError` if there is no regularization: then Y'Y may have no inverse.
        """
        if settings.regularization <= 0:
            raise ValueError(f"In a sum, iALS needs a regularization above 0. Received: {settings}")
        log: Any = train.log if isinstance(train, TrainingSet) else train
        check_log(log)
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

        def embed_queries(query_rows: tf.Tensor, history_rows: tf.Tensor) -> tf.Tensor:
            is_equal = history_rows[:, :, tf.newaxis] == history_rows[:, tf.newaxis, :]
            # [B, L] how often the item of a position occurs up to it: in iALS, an item counts once.
            num = tf.reduce_sum(tf.linalg.band_part(tf.cast(is_equal, tf.int32), -1, 0), axis=2)
            # Row 0, the padding, has the vector 0.
            clicked = tf.gather(vectors, tf.where(num == 1, history_rows, 0))  # [B, L, D]
            moments = tf.eye(clicked.shape[2]) + (weight - 1) * tf.matmul(
                clicked, clicked, transpose_a=True
            )
            total = weight * tf.reduce_sum(clicked, axis=1)[:, :, tf.newaxis]
            return tf.linalg.cholesky_solve(tf.linalg.cholesky(moments), total)[:, :, 0]

        return Exportable(
            embed_queries=embed_queries,
            embed_candidates=lambda rows: tf.gather(vectors, rows),
            variables=[vectors],
            items=items,
            query_ids=users["user_id"].to_numpy(),
            history_length=HISTORY_LENGTH,
        )

    def exportable(self) -> Exportable:
        """Gathers what an export holds: the vectors and the whole log, test part included."""
        return with_log(self.towers, self.log)
