"""The two-tower model: `fit` on hybrid batches, `evaluate` over the whole corpus."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from tfrs_pipeline.model.embedding_bank import EmbeddingBank
from tfrs_pipeline.model.features import FeatureSpec, FeatureTable
from tfrs_pipeline.model.task import HybridRetrieval
from tfrs_pipeline.model.towers import HistoryEncoder, Tower
from tfrs_pipeline.samples.dataset import shared_columns
from tfrs_pipeline.samples.streaming_frequency import StreamingFrequency

Correction = Literal["mixture", "streaming", "none"]

# Candidates embedded at once when the whole corpus is.
CORPUS_BLOCK = 65_536
# Of the streaming frequency: few candidates share a bucket, and its state is 3 MB to 200 MB.
BUCKETS_PER_CANDIDATE, MIN_BUCKETS, MAX_BUCKETS = 4, 2**16, 2**22


@tf.keras.utils.register_keras_serializable(package="tfrs_pipeline")
class TwoTowerModel(tfrs.Model):
    """A query tower and a candidate tower, trained with sampled softmax.

    Every argument is JSON-able, so that Keras can save and load the model. The features' values
    are weights: set them with `set_features`.

    Args:
        num_queries: Users, row 0 ("unknown") not counted.
        num_candidates: Corpus size, row 0 not counted.
        query_features: Encoded user features.
        candidate_features: Encoded item features.
        embedding_dim: Size of the shared space.
        query_layers: Hidden sizes of the query tower's MLP.
        candidate_layers: Hidden sizes of the candidate tower's MLP.
        feature_dim: Embedding size of a feature.
        use_user_id: Whether the query tower embeds the user's row.
        use_candidate_id: Whether the candidate tower embeds the candidate's row.
        history_pooling: Any of "mean" and "recency"; none leaves the history out.
        history_length: Most recent history items that a query carries.
        recency_decay: Of the "recency" pooling, per step.
        history_dropout: Share of the history items dropped in training.
        normalize: Cosine scores instead of dot products.
        temperature: Scores are divided by it in the loss.
        correction: What is subtracted from the logits of sampled columns: "mixture", the batch's
            log_q; "streaming", the same with the share of each candidate among the positives as
            estimated from the batches so far (`StreamingFrequency`), for data without counts;
            "none" shows what leaving it out does.
        correct_positive: Whether the positive's logit is corrected too.
        frequency_learning_rate: Of the streaming estimate: weight of a candidate's latest gap.
        bank_size: Candidates of earlier batches whose embeddings are kept as negatives: the
            batches' `bank_size`.
        cutoffs: k of recall@k and ndcg@k in `evaluate`.
    """

    def __init__(
        self,
        *,
        num_queries: int,
        num_candidates: int,
        query_features: Sequence[FeatureSpec | Mapping[str, Any]] = (),
        candidate_features: Sequence[FeatureSpec | Mapping[str, Any]] = (),
        embedding_dim: int = 64,
        query_layers: Sequence[int] = (),
        candidate_layers: Sequence[int] = (),
        feature_dim: int = 4,
        use_user_id: bool = False,
        use_candidate_id: bool = True,
        history_pooling: Sequence[str] = ("mean", "recency"),
        history_length: int = 50,
        recency_decay: float = 0.85,
        history_dropout: float = 0.5,
        normalize: bool = True,
        temperature: float = 0.15,
        correction: Correction = "mixture",
        correct_positive: bool = False,
        frequency_learning_rate: float = 0.01,
        bank_size: int = 0,
        cutoffs: Sequence[int] = (20, 100),
        name: str = "two_tower",
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__(name=name)
        query_specs, candidate_specs = _specs(query_features), _specs(candidate_features)
        arguments["query_features"] = [asdict(spec) for spec in query_specs]
        arguments["candidate_features"] = [asdict(spec) for spec in candidate_specs]
        # As text: Keras would track a dict as a part of the checkpoint.
        self._arguments = json.dumps(arguments)
        self.num_candidates = num_candidates
        self.history_length = history_length
        self.temperature = temperature
        self.query_feature_specs = query_specs
        self.query_table = FeatureTable(query_specs, num_queries + 1, name="query_features")
        self.candidate_table = FeatureTable(
            candidate_specs, num_candidates + 1, name="candidate_features"
        )
        history = (
            HistoryEncoder(
                num_candidates,
                embedding_dim,
                poolings=history_pooling,
                recency_decay=recency_decay,
                dropout=history_dropout,
            )
            if history_pooling
            else None
        )
        self.query_tower = Tower(
            "query_tower",
            embedding_dim=embedding_dim,
            hidden_layers=query_layers,
            features=query_specs,
            feature_dim=feature_dim,
            normalize=normalize,
            num_ids=num_queries if use_user_id else None,
            history=history,
        )
        self.candidate_tower = Tower(
            "candidate_tower",
            embedding_dim=embedding_dim,
            hidden_layers=candidate_layers,
            features=candidate_specs,
            feature_dim=feature_dim,
            normalize=normalize,
            num_ids=num_candidates if use_candidate_id else None,
        )
        self.task = HybridRetrieval(temperature, correct_positive=correct_positive)
        self._correction = correction
        self._frequency = (
            StreamingFrequency(
                num_buckets=_num_buckets(num_candidates), learning_rate=frequency_learning_rate
            )
            if correction == "streaming"
            else None
        )
        self._bank = EmbeddingBank(bank_size, embedding_dim) if bank_size else None
        self._cutoffs = tuple(cutoffs)
        self._loss_metric = tf.keras.metrics.Mean(name="loss")
        self._ranking_metrics = {
            f"{metric}@{k}": tf.keras.metrics.Mean(name=f"{metric}@{k}")
            for k in self._cutoffs
            for metric in ("recall", "ndcg")
        }
        # Filled by `evaluate`: a step scores against all of it.
        self._corpus_embeddings = self.add_weight(
            name="corpus_embeddings",
            shape=[num_candidates, embedding_dim],
            initializer="zeros",
            trainable=False,
        )
        self._build_variables()

    @property
    def ranking_metric_names(self) -> list[str]:
        """Names of what `evaluate` reports, such as "ndcg@100"."""
        return list(self._ranking_metrics)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return dict(json.loads(self._arguments))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TwoTowerModel:
        """Rebuilds the model, without its weights."""
        return cls(**config)

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Does nothing: the constructor has made every variable."""

    def set_features(
        self, query_columns: dict[str, np.ndarray], candidate_columns: dict[str, np.ndarray]
    ) -> None:
        """Sets the encoded features of rows 1, 2, ... of both sides (see `FeatureTable.assign`)."""
        self.query_table.assign(query_columns)
        self.candidate_table.assign(candidate_columns)

    def embed_queries(
        self,
        query_rows: tf.Tensor,
        history_rows: tf.Tensor,
        features: dict[str, tf.Tensor] | None = None,
        training: bool = False,
        dropout_seed: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Embeds queries.

        Args:
            query_rows: [B] int32, 0 is an unknown user.
            history_rows: [B, N] int32, most recent first, padded with 0.
            features: Encoded features, for users that the model does not hold; None takes those
                of `query_rows`.
            training: Whether dropout is on.
            dropout_seed: [2] int32 that the dropout is a function of; None draws anew each time.

        Returns:
            [B, embedding_dim] float32.
        """
        features = self.query_table(query_rows) if features is None else features
        return self.query_tower(
            query_rows, features, history_rows, training=training, dropout_seed=dropout_seed
        )

    def embed_candidates(self, candidate_rows: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Embeds candidates of the corpus: [n] int32 rows -> [n, embedding_dim] float32."""
        features = self.candidate_table(candidate_rows)
        return self.candidate_tower(candidate_rows, features, training=training)

    def embed_corpus(self) -> np.ndarray:
        """Embeds every candidate, rows 1, 2, ... : [num_candidates, embedding_dim] float32."""
        rows = np.arange(1, self.num_candidates + 1, dtype=np.int32)
        blocks = [
            self._embed_candidates_graph(tf.constant(rows[start : start + CORPUS_BLOCK])).numpy()
            for start in range(0, len(rows), CORPUS_BLOCK)
        ]
        return np.concatenate(blocks)

    def call(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Scores pairs.

        Args:
            inputs: `query_row` [B], `history_rows` [B, N] and `candidate_row` [B], all int32.
            training: Whether dropout is on.

        Returns:
            [B] float32 dot products, not divided by the temperature.
        """
        queries = self.embed_queries(inputs["query_row"], inputs["history_rows"], training=training)
        candidates = self.embed_candidates(inputs["candidate_row"], training=training)
        return tf.reduce_sum(queries * candidates, axis=1)

    def compute_loss(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Computes the mean loss of a training batch.

        In training the batch's positives also enter the streaming estimate, before the loss, and
        their embeddings the bank, after it. So the estimate has seen every positive that it is
        asked for, and is high for those that have come once or twice only: t examples into the
        stream, an in-batch candidate of frequency q weighs 1 - exp(-q * t) of its part in the
        target on average. That is too little until it is due to have come a few times, and never
        too much, as it would be with an estimate from before the batch.

        Args:
            inputs: As `TrainingBatches.batch` describes.
            training: Whether dropout is on and the two states move on.

        Returns:
            Scalar float32.

        Raises:
            ValueError: If the batch was made for another correction or bank.
            tf.errors.InvalidArgumentError: If the bank does not hold the steps just before.
        """
        self._check_batch(inputs)
        queries = self.embed_queries(
            inputs["query_row"],
            inputs["history_rows"],
            training=training,
            dropout_seed=inputs.get("dropout_seed"),
        )
        fresh = tf.concat([inputs["candidate_row"], inputs["easy_candidate_row"]], axis=0)
        hard_rows = inputs.get("hard_candidate_row")
        has_hard = hard_rows is not None
        columns = tf.concat([fresh, tf.reshape(hard_rows, [-1])], axis=0) if has_hard else fresh
        # Copies of a candidate are separate columns; the tower's work is shared.
        distinct, slot = tf.unique(columns)
        candidates = tf.gather(self.embed_candidates(distinct, training=training), slot)
        num_fresh = tf.shape(fresh)[0]
        shared = candidates[:num_fresh]
        if self._bank is not None:
            shared = tf.concat([shared, self._bank(inputs["bank_candidate_row"])], axis=0)
        if self._frequency is not None and training:
            self._frequency.update(inputs["candidate_row"])
        hard: dict[str, tf.Tensor] = {}
        if has_hard:
            shape = tf.concat([tf.shape(hard_rows), tf.shape(candidates)[1:]], axis=0)
            log_q = inputs["hard_log_q"]
            hard = {
                "hard_embeddings": tf.reshape(candidates[num_fresh:], shape),
                "hard_log_q": tf.zeros_like(log_q) if self._correction == "none" else log_q,
                "hard_mask": inputs["hard_is_counted"],
            }
        loss = self.task(
            queries,
            shared,
            sample_weight=inputs["weight"],
            log_q=self._log_q(inputs),
            score_mask=inputs["is_counted"],
            compute_metrics=False,
            **hard,
        )
        if self._bank is not None and training:
            num_rows = tf.shape(inputs["candidate_row"])[0]
            # After the loss: a step that the bank refuses leaves it as it was.
            with tf.control_dependencies([loss]):
                self._bank.push(inputs["candidate_row"], candidates[:num_rows])
        # The parent's loss is a sum; a mean keeps the step size free of the batch size.
        total_weight = tf.reduce_sum(inputs["weight"])
        mean_loss = tf.math.divide_no_nan(loss, total_weight)
        self._loss_metric.update_state(mean_loss, sample_weight=total_weight)
        return mean_loss

    def _log_q(self, inputs: Mapping[str, tf.Tensor]) -> tf.Tensor | None:
        """Returns log_q of a batch's shared columns, [1 or B, C]; None without a correction."""
        if self._correction == "none":
            return None
        if self._frequency is None:
            return inputs["log_q"]
        columns = shared_columns(inputs)
        count = inputs["positive_draws"] * self._frequency(columns)
        count += inputs["other_expected_count"]
        # Entries of the bank that are not filled have row 0: they are masked, and have no count.
        log_q = tf.math.log(tf.where(columns > 0, count, 1.0))
        if "hard_share" in inputs:
            log_q -= tf.math.log1p(-inputs["hard_share"])[:, tf.newaxis]
        return log_q

    def _check_batch(self, inputs: Mapping[str, tf.Tensor]) -> None:
        needed = {"mixture": "log_q", "streaming": "positive_draws"}.get(self._correction)
        if needed is not None and needed not in inputs:
            frequency = "streaming" if self._correction == "streaming" else "counted"
            raise ValueError(
                f"The model's correction is {self._correction!r} and the batch holds no "
                f"'{needed}'. Make the batches with frequency={frequency!r}."
            )
        if (self._bank is not None) != ("bank_candidate_row" in inputs):
            raise ValueError(
                f"The model {'keeps a' if self._bank is not None else 'keeps no'} bank of earlier "
                f"embeddings and the batch {'names no' if self._bank is not None else 'names its'} "
                "entries. Give the model the batches' bank_size."
            )

    def train_step(self, inputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Runs one step; the loss it reports is the epoch's mean so far."""
        super().train_step(inputs)
        return {"loss": self._loss_metric.result()}

    def test_step(self, inputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Ranks the whole corpus for one batch of queries (`evaluation_batches`)."""
        queries = self.embed_queries(inputs["query_row"], inputs["history_rows"])
        scores = tf.linalg.matmul(queries, self._corpus_embeddings, transpose_b=True)
        scores = _without(scores, inputs["excluded_rows"])
        relevant = inputs["relevant_rows"]
        num_relevant = tf.reduce_sum(tf.cast(relevant > 0, tf.float32), axis=1)
        depth = min(max(self._cutoffs), self.num_candidates)
        top_scores, top = tf.math.top_k(scores, depth)
        is_hit = tf.reduce_any((top + 1)[:, :, tf.newaxis] == relevant[:, tf.newaxis, :], axis=2)
        gains = tf.cast(is_hit & (top_scores > scores.dtype.min), tf.float32)
        discounts = tf.math.log(2.0) / tf.math.log(tf.range(depth, dtype=tf.float32) + 2.0)
        ideal = tf.concat([[0.0], tf.cumsum(discounts)], axis=0)
        has_relevant = num_relevant > 0
        for k in self._cutoffs:
            hits = gains[:, :k]
            recall = tf.math.divide_no_nan(tf.reduce_sum(hits, axis=1), num_relevant)
            best = tf.gather(ideal, tf.minimum(tf.cast(num_relevant, tf.int32), min(k, depth)))
            ndcg = tf.math.divide_no_nan(tf.linalg.matvec(hits, discounts[:k]), best)
            self._ranking_metrics[f"recall@{k}"].update_state(recall, has_relevant)
            self._ranking_metrics[f"ndcg@{k}"].update_state(ndcg, has_relevant)
        return {name: metric.result() for name, metric in self._ranking_metrics.items()}

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates on `evaluation_batches`: mean recall@k and ndcg@k over the whole corpus.

        Takes and returns what `tf.keras.Model.evaluate` does.
        """
        self._corpus_embeddings.assign(self.embed_corpus())
        return super().evaluate(*args, **kwargs)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32)])
    def _embed_candidates_graph(self, candidate_rows: tf.Tensor) -> tf.Tensor:
        return self.embed_candidates(candidate_rows)

    def _build_variables(self) -> None:
        """Makes every variable now, so that weights can be loaded before the first step."""
        row = tf.zeros([1], tf.int32)
        history = tf.zeros([1, self.history_length], tf.int32)
        self({"query_row": row, "history_rows": history, "candidate_row": row})


def _num_buckets(num_candidates: int) -> int:
    """Returns a power of two, some times the number of candidates, between floor and ceiling."""
    wanted = 2 ** (BUCKETS_PER_CANDIDATE * num_candidates - 1).bit_length()
    return min(max(wanted, MIN_BUCKETS), MAX_BUCKETS)


def _specs(features: Sequence[FeatureSpec | Mapping[str, Any]]) -> list[FeatureSpec]:
    return [f if isinstance(f, FeatureSpec) else FeatureSpec(**f) for f in features]


def _without(scores: tf.Tensor, excluded_rows: tf.Tensor) -> tf.Tensor:
    """Sets the scores of excluded rows (int32 from 1, 0 is padding) to the lowest float."""
    row, place = tf.unstack(tf.cast(tf.where(excluded_rows > 0), tf.int32), axis=1)
    column = tf.gather_nd(excluded_rows, tf.stack([row, place], axis=1)) - 1
    cells = tf.stack([row, column], axis=1)
    return tf.tensor_scatter_nd_update(
        scores, cells, tf.fill([tf.shape(cells)[0]], scores.dtype.min)
    )
