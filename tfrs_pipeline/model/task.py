"""The retrieval loss over mixed negatives."""

from __future__ import annotations

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
    columns of that row alone: B * H products, not B * B * H.

    Args:
        temperature: Scores are divided by it.
        correct_positive: Whether the positive's logit is corrected with its column's log_q too
            (Yi et al., RecSys 2019).
        name: Layer name.
        **kwargs: Further arguments of the parent, such as `loss` and `batch_metrics`.
    """

    def __init__(
        self,
        temperature: float | None = None,
        *,
        correct_positive: bool = False,
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
        hard_embeddings: tf.Tensor | None = None,
        hard_log_q: tf.Tensor | None = None,
        hard_mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Computes the summed loss of a batch.

        Args:
            query_embeddings: [B, D] float.
            candidate_embeddings: [C, D], C >= B; the first B are the rows' positives, all are
                shared columns.
            sample_weight: [B], optional.
            candidate_sampling_probability: [C], in [1e-6, 1]: as in the parent, the positive is
                corrected with it too. Not together with `log_q`.
            candidate_ids: [C] ids for the parent's factorized metrics.
            compute_metrics: Whether to update the factorized metrics.
            compute_batch_metrics: Whether to update the batch metrics.
            score_mask: [B, C] bool, True where a column counts. The row's own positive, on the
                diagonal, must.
            log_q: [B, C], [1, C] or [C], subtracted from the logits of the shared columns; the
                diagonal is left alone unless `correct_positive`.
            hard_embeddings: [B, H, D], each row's own negatives.
            hard_log_q: [B, H], required with `hard_embeddings`.
            hard_mask: [B, H] bool, True where a hard negative counts.

        Returns:
            Scalar, the weighted sum over rows of logsumexp(logits) - logit of the positive.

        Raises:
            ValueError: If both corrections are given, shapes do not fit, or hard negatives come
                without their log_q.
            tf.errors.InvalidArgumentError: If a sampling probability leaves [1e-6, 1].
        """
        num_rows = tf.shape(query_embeddings)[0]
        scores = self._scaled(
            tf.linalg.matmul(query_embeddings, candidate_embeddings, transpose_b=True)
        )
        correction = self._correction(log_q, candidate_sampling_probability, scores)
        logits = scores if correction is None else scores - correction
        if score_mask is not None:
            logits = tf.where(score_mask, logits, MASKED_LOGIT)
        if hard_embeddings is not None:
            if hard_log_q is None:
                raise ValueError("hard_embeddings need their hard_log_q: [B, H].")
            if len(hard_log_q.shape) != 2:
                raise ValueError(
                    f"hard_log_q must be [B, H]. Received: shape {tuple(hard_log_q.shape)}"
                )
            hard = self._scaled(tf.einsum("bd,bhd->bh", query_embeddings, hard_embeddings))
            hard -= hard_log_q
            if hard_mask is not None:
                hard = tf.where(hard_mask, hard, MASKED_LOGIT)
            logits = tf.concat([logits, hard], axis=1)
        loss = self._summed_loss(logits, num_rows, sample_weight)
        updates = [metric.update_state(loss) for metric in self._loss_metrics]
        if compute_metrics:
            ids = None if candidate_ids is None else candidate_ids[:num_rows]
            updates += [
                metric.update_state(
                    query_embeddings,
                    candidate_embeddings[:num_rows],
                    true_candidate_ids=ids,
                    sample_weight=sample_weight,
                )
                for metric in self._factorized_metrics
            ]
        if compute_batch_metrics and self._batch_metrics:
            labels = tf.eye(num_rows, tf.shape(logits)[1])
            updates += [
                metric.update_state(labels, logits, sample_weight=sample_weight)
                for metric in self._batch_metrics
            ]
        with tf.control_dependencies([update for update in updates if update is not None]):
            return tf.identity(loss)

    def _scaled(self, scores: tf.Tensor) -> tf.Tensor:
        return scores if self._temperature is None else scores / self._temperature

    def _correction(
        self,
        log_q: tf.Tensor | None,
        probability: tf.Tensor | None,
        scores: tf.Tensor,
    ) -> tf.Tensor | None:
        if log_q is not None and probability is not None:
            raise ValueError("Pass log_q or candidate_sampling_probability, not both.")
        if log_q is not None and len(log_q.shape) == 1 and log_q.shape[0] != scores.shape[1]:
            raise ValueError(
                "log_q must be [num_rows, num_columns], [1, num_columns] or [num_columns], here of "
                f"{scores.shape[1]} columns. Received: shape {tuple(log_q.shape)}"
            )
        if probability is not None:
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
        if log_q is None:
            return None
        if self._correct_positive:
            return log_q
        own = tf.eye(tf.shape(scores)[0], tf.shape(scores)[1], dtype=tf.bool)
        return tf.where(own, tf.zeros_like(scores), log_q)

    def _summed_loss(
        self, logits: tf.Tensor, num_rows: tf.Tensor, sample_weight: tf.Tensor | None
    ) -> tf.Tensor:
        if self._has_own_loss:
            labels = tf.eye(num_rows, tf.shape(logits)[1])
            return self._loss(y_true=labels, y_pred=logits, sample_weight=sample_weight)
        # The parent's categorical cross-entropy, without materialising its labels.
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=tf.range(num_rows), logits=logits
        )
        return tf.reduce_sum(losses if sample_weight is None else losses * sample_weight)
