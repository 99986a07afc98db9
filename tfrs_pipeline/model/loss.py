"""The retrieval loss over mixed negatives."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

# The range that tfrs.tasks.Retrieval clips candidate_sampling_probability to.
PARENT_PROBABILITY_RANGE = (1e-6, 1.0)
MASKED_LOGIT = np.finfo(np.float32).min / 100.0


class HybridRetrieval(tfrs.tasks.Retrieval):
    """`tfrs.tasks.Retrieval` with the log_q of any mixture, and a row's own negatives.

    The parent's `candidate_sampling_probability` is one number per column, clipped to [1e-6, 1],
    and corrects the positive as well. Here `log_q` may differ by row, is never clipped, and the
    row's own positive keeps its bare logit unless `correct_positive`. Hard negatives of a row are
    columns of that row alone: B * H products, not B * B * H. A row may have several positives, each
    with a loss of its own over the same negatives, which are scored once.

    Args:
        temperature: Scores are divided by it.
        correct_positive: Whether the positive's logit is corrected with its column's log_q too
            (Yi et al., RecSys 2019).
        score_dtype: Type in which the products of queries and candidates are computed: float32, or
            bfloat16 for machines that multiply it faster. The rest of the loss is float32.
        name: Layer name.
        **kwargs: Further arguments of the parent, such as `loss` and `batch_metrics`.
    """

    def __init__(
        self,
        temperature: float | None = None,
        *,
        correct_positive: bool = False,
        score_dtype: tf.DType = tf.float32,
        name: str | None = None,
        **kwargs: object,
    ) -> None:
        self._has_own_loss = kwargs.get("loss") is not None
        for option in ("num_hard_negatives", "remove_accidental_hits"):
            if kwargs.get(option):
                raise ValueError(
                    f"HybridRetrieval does not take {option}: it mines after the correction or "
                    "sees the row's own id alone. Pass a score_mask, or hard negatives with "
                    "their log_q."
                )
        super().__init__(temperature=temperature, name=name, **kwargs)
        self._correct_positive = correct_positive
        self._score_dtype = tf.as_dtype(score_dtype)

    def call(
        self,
        query_embeddings: tf.Tensor,
        candidate_embeddings: tf.Tensor,
        sample_weight: tf.Tensor | None = None,
        candidate_sampling_probability: tf.Tensor | None = None,
        candidate_ids: tf.Tensor | None = None,
        compute_metrics: bool = True,
        compute_batch_metrics: bool = True,
        score_mask: tf.Tensor | None = None,
        *,
        log_q: tf.Tensor | None = None,
        positive_embeddings: tf.Tensor | None = None,
        positive_log_q: tf.Tensor | None = None,
        positive_query: tf.Tensor | None = None,
        hard_embeddings: tf.Tensor | None = None,
        hard_log_q: tf.Tensor | None = None,
        hard_mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Computes the summed loss of a batch.

        Args:
            query_embeddings: [B, D] float.
            candidate_embeddings: [C, D], the shared columns. Without `positive_embeddings`, C >= B
                and the first B are the rows' positives.
            sample_weight: [B] or [B, 1], optional; [P] with `positive_query`.
            candidate_sampling_probability: [C], in [1e-6, 1]: as in the parent, the positive is
                corrected with it too. Not together with `log_q`.
            candidate_ids: [C] ids for the parent's factorized metrics; not together with
                `positive_embeddings`.
            compute_metrics: Whether to update the factorized metrics.
            compute_batch_metrics: Whether to update the batch metrics.
            score_mask: [B, C] bool, True where a column counts. The row's own positive, on the
                diagonal, must.
            log_q: [B, C], [1, C] or [C], subtracted from the logits of the shared columns; the
                diagonal is left alone unless `correct_positive`.
            positive_embeddings: [B, D], the rows' positives where they are no shared columns: each
                is a column of its own row alone, and no column is on a diagonal.
            positive_log_q: [B], for `correct_positive` with `positive_embeddings`.
            positive_query: [P] int32 in [0, B), the rows that `positive_embeddings`, then [P, D],
                and `positive_log_q`, [P], belong to; any number a row. Without it, one a row.
            hard_embeddings: [B, H, D], each row's own negatives.
            hard_log_q: [B, H], required with `hard_embeddings`.
            hard_mask: [B, H] bool, True where a hard negative counts.

        Returns:
            Scalar, the weighted sum over positives of logsumexp(logits) - logit of the positive,
            the logits being its own and those of its row's negatives.

        Raises:
            ValueError: If both corrections are given, shapes do not fit, hard negatives come
                without their log_q, or `positive_query` without `positive_embeddings`.
            tf.errors.InvalidArgumentError: If a sampling probability leaves [1e-6, 1].
        """
        num_rows = tf.shape(query_embeddings)[0]
        if candidate_ids is not None and positive_embeddings is not None:
            raise ValueError(
                "candidate_ids name the first B candidates as the rows' positives, which they are "
                "not with positive_embeddings: leave one of the two out."
            )
        is_diagonal = positive_embeddings is None
        if is_diagonal and positive_query is not None:
            raise ValueError("positive_query needs the positive_embeddings of its rows: [P, D].")
        positives = candidate_embeddings[:num_rows] if is_diagonal else positive_embeddings
        if sample_weight is not None:  # The parent takes [B, 1] too.
            sample_weight = tf.reshape(sample_weight, [tf.shape(positives)[0]])
        queries = self._scaled(query_embeddings)
        own = self._products("bd,bd->b", _of_positives(queries, positive_query), positives)
        shared = self._products("bd,cd->bc", queries, candidate_embeddings)
        correction, own_correction = self._corrections(
            log_q, candidate_sampling_probability, positive_log_q, shared, is_diagonal
        )
        own = own if own_correction is None else own - own_correction
        shared = shared if correction is None else shared - correction
        counts = score_mask
        if is_diagonal:  # The row's own positive counts once, uncorrected, apart from the rest.
            counts = tf.ones_like(shared, tf.bool) if score_mask is None else score_mask
            counts = tf.linalg.set_diag(counts, tf.zeros([num_rows], tf.bool))
        blocks = [shared if counts is None else tf.where(counts, shared, MASKED_LOGIT)]
        if hard_embeddings is not None:
            blocks.append(self._hard_logits(queries, hard_embeddings, hard_log_q, hard_mask))
        if self._has_own_loss or (compute_batch_metrics and self._batch_metrics):
            repeated = [_of_positives(block, positive_query) for block in blocks]
            logits, labels = _matrix(own, repeated, is_diagonal)
        if self._has_own_loss:
            loss = self._loss(y_true=labels, y_pred=logits, sample_weight=sample_weight)
        else:
            # log(exp(own) + exp(others)) - own.
            losses = tf.nn.softplus(_of_positives(_log_sum_exp(blocks), positive_query) - own)
            loss = tf.reduce_sum(losses if sample_weight is None else losses * sample_weight)
        updates = [metric.update_state(loss) for metric in self._loss_metrics]
        if compute_metrics:
            ids = None if candidate_ids is None else candidate_ids[:num_rows]
            updates += [
                metric.update_state(
                    _of_positives(query_embeddings, positive_query),
                    positives,
                    true_candidate_ids=ids,
                    sample_weight=sample_weight,
                )
                for metric in self._factorized_metrics
            ]
        if compute_batch_metrics and self._batch_metrics:
            updates += [
                metric.update_state(labels, logits, sample_weight=sample_weight)
                for metric in self._batch_metrics
            ]
        with tf.control_dependencies([update for update in updates if update is not None]):
            return tf.identity(loss)

    def _scaled(self, queries: tf.Tensor) -> tf.Tensor:
        """Divides queries by the temperature: a pass over [B, D] instead of one over [B, C]."""
        queries = tf.convert_to_tensor(queries)
        return queries if self._temperature is None else queries / self._temperature

    def _products(self, equation: str, queries: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
        """Multiplies embeddings in `score_dtype`; returns float32."""
        if self._score_dtype != queries.dtype:
            queries = tf.cast(queries, self._score_dtype)
            candidates = tf.cast(candidates, self._score_dtype)
        return tf.cast(tf.einsum(equation, queries, candidates), tf.float32)

    def _hard_logits(
        self,
        queries: tf.Tensor,
        embeddings: tf.Tensor,
        log_q: tf.Tensor | None,
        mask: tf.Tensor | None,
    ) -> tf.Tensor:
        if log_q is None:
            raise ValueError("hard_embeddings need their hard_log_q: [B, H].")
        if len(log_q.shape) != 2:
            raise ValueError(f"hard_log_q must be [B, H]. Received: shape {tuple(log_q.shape)}")
        logits = self._products("bd,bhd->bh", queries, embeddings) - log_q
        return logits if mask is None else tf.where(mask, logits, MASKED_LOGIT)

    def _corrections(
        self,
        log_q: tf.Tensor | None,
        probability: tf.Tensor | None,
        positive_log_q: tf.Tensor | None,
        shared: tf.Tensor,
        is_diagonal: bool,
    ) -> tuple[tf.Tensor | None, tf.Tensor | None]:
        """Returns what is subtracted from the shared columns, and from the row's own positive."""
        if log_q is not None and probability is not None:
            raise ValueError("Pass log_q or candidate_sampling_probability, not both.")
        if log_q is not None and len(log_q.shape) == 1 and log_q.shape[0] != shared.shape[1]:
            raise ValueError(
                "log_q must be [num_rows, num_columns], [1, num_columns] or [num_columns], here of "
                f"{shared.shape[1]} columns. Received: shape {tuple(log_q.shape)}"
            )
        # A probability corrects the positive too, as in the parent.
        corrects_positive = self._correct_positive or probability is not None
        correction = log_q if probability is None else _checked_log(probability)
        if correction is None or not corrects_positive:
            return correction, None
        if is_diagonal:
            return correction, tf.linalg.diag_part(tf.broadcast_to(correction, tf.shape(shared)))
        if positive_log_q is None:
            raise ValueError("correct_positive with positive_embeddings needs positive_log_q: [B].")
        return correction, positive_log_q


def _checked_log(probability: tf.Tensor) -> tf.Tensor:
    """Returns the logarithm of sampling probabilities that the parent would not clip."""
    if probability.shape.rank != 1:
        raise ValueError(
            "candidate_sampling_probability must be [num_candidates]. "
            f"Received: shape {probability.shape}"
        )
    low, high = PARENT_PROBABILITY_RANGE
    message = (
        f"candidate_sampling_probability leaves [{low}, {high}], where "
        "tfrs.tasks.Retrieval would clip it. Pass log_q instead."
    )
    with tf.control_dependencies(
        [
            tf.debugging.assert_greater_equal(probability, low, message),
            tf.debugging.assert_less_equal(probability, high, message),
        ]
    ):
        return tf.math.log(probability)


def _of_positives(rows: tf.Tensor, positive_query: tf.Tensor | None) -> tf.Tensor:
    """Returns what belongs to each positive: rows as they are, or the rows of `positive_query`."""
    return rows if positive_query is None else tf.gather(rows, positive_query)


def _log_sum_exp(blocks: Sequence[tf.Tensor]) -> tf.Tensor:
    """Computes the log of the summed exponentials of each row, over blocks of columns.

    The blocks are not joined: a copy of the scores, and the labels of a cross-entropy, would cost
    half as much again as the rest of the loss.

    Args:
        blocks: Logits, [B, any] each, of one column in all at least.

    Returns:
        [B].
    """
    highest = functools.reduce(tf.maximum, [tf.reduce_max(block, axis=1) for block in blocks])
    highest = tf.stop_gradient(highest)
    total = tf.add_n(
        [tf.reduce_sum(tf.exp(block - highest[:, tf.newaxis]), axis=1) for block in blocks]
    )
    return tf.math.log(total) + highest


def _matrix(
    own: tf.Tensor, blocks: Sequence[tf.Tensor], is_diagonal: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """Joins logits as the parent's losses and metrics take them, with labels of the same shape."""
    num_rows = tf.shape(own)[0]
    if is_diagonal:
        logits = tf.concat([tf.linalg.set_diag(blocks[0], own), *blocks[1:]], axis=1)
        return logits, tf.eye(num_rows, tf.shape(logits)[1])
    logits = tf.concat([own[:, tf.newaxis], *blocks], axis=1)
    return logits, tf.one_hot(tf.zeros([num_rows], tf.int32), tf.shape(logits)[1])
