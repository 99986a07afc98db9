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
from tfrs_pipeline.model.feature_layers import FeatureSpec, FeatureTable
from tfrs_pipeline.model.features import bucket_count
from tfrs_pipeline.model.history import HistoryEncoder
from tfrs_pipeline.model.loss import HybridRetrieval
from tfrs_pipeline.model.randomness import Stream, fold
from tfrs_pipeline.model.towers import Combination, Tower
from tfrs_pipeline.negatives.batches import has_in_batch, shared_columns
from tfrs_pipeline.samples.streaming import StreamingFrequency

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
        feature_dropout: Share of the features that training takes for missing, row by row.
        use_user_id: Whether the query tower embeds the user's row.
        use_candidate_id: Whether the candidate tower embeds the candidate's row.
        unknown_rate: Share of the ids that training takes for unknown: it trains the embedding that
            a new user or item gets, beside its features.
        candidate_bias: Whether each item has a number that is added to its scores; embeddings then
            have one entry more.
        share_item_embedding: Whether the history's items are read with the candidate tower's id
            embedding.
        history_pooling: Any of "mean", "recency" and "attention" (see `HistoryEncoder`); none
            leaves the history out.
        history_length: Most recent history items that a query carries.
        recency_decay: Of the "recency" pooling, per step.
        history_dropout: Share of the history items dropped in training.
        attention_blocks: Of the "attention" pooling.
        attention_heads: Of each block; must divide `embedding_dim`.
        attention_dropout: Share of the activations of the blocks dropped in training.
        combination: "concat" or "sum" of what a tower reads (see `Tower`).
        normalize: Cosine scores instead of dot products.
        temperature: Scores are divided by it in the loss.
        correction: What is subtracted from the logits of sampled columns: "mixture", the batch's
            log_q; "streaming", the same with the share of each candidate among the positives as
            estimated from the batches so far (`StreamingFrequency`), for data without counts;
            "none" shows what leaving it out does.
        correct_positive: Whether the positive's logit is corrected too.
        score_dtype: Type in which training multiplies embeddings: "float32" or "bfloat16".
        frequency_learning_rate: Of the streaming estimate: weight of a candidate's latest gap.
        bank_size: Candidates of earlier batches whose embeddings are kept as negatives: the
            batches' `bank_size`.
        cutoffs: k of recall@k and ndcg@k in `evaluate`.
    """

    # Of `report_tail`: [num_candidates + 1] bool.
    _is_tail: tf.Variable | None = None

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
        feature_dropout: float = 0.0,
        use_user_id: bool = False,
        use_candidate_id: bool = True,
        unknown_rate: float = 0.0,
        candidate_bias: bool = False,
        share_item_embedding: bool = False,
        history_pooling: Sequence[str] = ("mean", "recency"),
        history_length: int = 50,
        recency_decay: float = 0.85,
        history_dropout: float = 0.5,
        attention_blocks: int = 2,
        attention_heads: int = 2,
        attention_dropout: float = 0.2,
        combination: Combination = "concat",
        normalize: bool = True,
        temperature: float = 0.15,
        correction: Correction = "mixture",
        correct_positive: bool = False,
        score_dtype: str = "float32",
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
        towers: dict[str, Any] = {
            "embedding_dim": embedding_dim,
            "feature_dim": feature_dim,
            "normalize": normalize,
            "combination": combination,
            "unknown_rate": unknown_rate,
            "feature_dropout": feature_dropout,
        }
        self.candidate_tower = Tower(
            "candidate_tower",
            hidden_layers=candidate_layers,
            features=candidate_specs,
            num_ids=num_candidates if use_candidate_id else None,
            has_bias=candidate_bias,
            **towers,
        )
        if share_item_embedding and not use_candidate_id:
            raise ValueError(
                "share_item_embedding needs use_candidate_id: its embedding is shared."
            )
        history = (
            HistoryEncoder(
                num_candidates,
                embedding_dim,
                poolings=history_pooling,
                max_length=history_length,
                recency_decay=recency_decay,
                dropout=history_dropout,
                attention_blocks=attention_blocks,
                attention_heads=attention_heads,
                attention_dropout=attention_dropout,
                item_embedding=self.candidate_tower.id_embedding if share_item_embedding else None,
            )
            if history_pooling
            else None
        )
        self.query_tower = Tower(
            "query_tower",
            hidden_layers=query_layers,
            features=query_specs,
            num_ids=num_queries if use_user_id else None,
            history=history,
            **towers,
        )
        self._has_bias = candidate_bias
        output_dim = embedding_dim + int(candidate_bias)
        self.task = HybridRetrieval(
            temperature, correct_positive=correct_positive, score_dtype=tf.as_dtype(score_dtype)
        )
        self._correction = correction
        self._frequency = (
            StreamingFrequency(
                num_buckets=bucket_count(
                    num_candidates,
                    per_value=BUCKETS_PER_CANDIDATE,
                    low=MIN_BUCKETS,
                    high=MAX_BUCKETS,
                ),
                learning_rate=frequency_learning_rate,
            )
            if correction == "streaming"
            else None
        )
        self._bank = EmbeddingBank(bank_size, output_dim) if bank_size else None
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
            shape=[num_candidates, output_dim],
            initializer="zeros",
            trainable=False,
        )
        self._build_variables()

    @property
    def ranking_metric_names(self) -> list[str]:
        """Names of what `evaluate` reports, such as "ndcg@100"."""
        return list(self._reported_metrics)

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
            [B, output_dim] float32: embedding_dim, and one more, which is 1, with a candidate bias.
        """
        history = None
        if self.query_tower.history is not None:
            history = self.query_tower.history(
                history_rows, training=training, dropout_seed=dropout_seed
            )
        return self._queries(query_rows, history, features, training, dropout_seed)

    def embed_positions(
        self,
        query_rows: tf.Tensor,
        sequence_rows: tf.Tensor,
        state: tf.Tensor,
        training: bool = False,
        dropout_seed: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Embeds queries whose histories are beginnings of sequences, in one pass over these.

        Args:
            query_rows: [P] int32, 0 is an unknown user.
            sequence_rows: [W, L] int32, oldest first, 0 is padding and comes last.
            state: [P] int32, w * (L + 1) + j for the first j items of sequence w.
            training: Whether dropout is on.
            dropout_seed: [2] int32 that the dropout is a function of; None draws anew each time.

        Returns:
            [P, output_dim] float32, as `embed_queries`.

        Raises:
            ValueError: If the query tower reads no history.
        """
        encoder = self.query_tower.history
        if encoder is None:
            raise ValueError("Positions of sequences need a history: give history_pooling.")
        states = encoder.states(sequence_rows, training=training, dropout_seed=dropout_seed)
        history = tf.gather(tf.reshape(states, [-1, states.shape[-1]]), state)
        return self._queries(query_rows, history, None, training, dropout_seed)

    def _queries(
        self,
        query_rows: tf.Tensor,
        history: tf.Tensor | None,
        features: dict[str, tf.Tensor] | None,
        training: bool,
        dropout_seed: tf.Tensor | None,
    ) -> tf.Tensor:
        features = self.query_table(query_rows) if features is None else features
        queries = self.query_tower(
            query_rows, features, history, training=training, dropout_seed=dropout_seed
        )
        if not self._has_bias:
            return queries
        return tf.concat([queries, tf.ones_like(queries[:, :1])], axis=1)

    def embed_candidates(
        self,
        candidate_rows: tf.Tensor,
        features: dict[str, tf.Tensor] | None = None,
        training: bool = False,
        dropout_seed: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Embeds candidates.

        Args:
            candidate_rows: [n] int32, 0 is an unknown item.
            features: Encoded features, for items that the model does not hold; None takes those of
                `candidate_rows`.
            training: Whether ids are taken for unknown at `unknown_rate`.
            dropout_seed: [2] int32 that this is a function of; None draws anew each time.

        Returns:
            [n, output_dim] float32: embedding_dim, and the bias with a candidate bias.
        """
        if dropout_seed is not None:  # Not the draws of the query tower.
            dropout_seed = fold(dropout_seed, Stream.CANDIDATES)
        return self.candidate_tower(
            candidate_rows,
            self.candidate_table(candidate_rows) if features is None else features,
            training=training,
            dropout_seed=dropout_seed,
        )

    def embed_corpus(self) -> np.ndarray:
        """Embeds every candidate, rows 1, 2, ... : [num_candidates, output_dim] float32."""
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
            inputs: As `TrainingBatches.batch` or one of its children describes.
            training: Whether dropout is on and the two states move on.

        Returns:
            Scalar float32.

        Raises:
            ValueError: If the batch was made for another correction or bank.
            tf.errors.InvalidArgumentError: If the bank does not hold the steps just before.
        """
        self._check_batch(inputs)
        queries = self._embed_batch_queries(inputs, training)
        positives, shared, hard = self._embed_columns(inputs, training)
        if self._frequency is not None and training:
            self._frequency.update(inputs["candidate_row"])
        own: dict[str, tf.Tensor] = {}
        if not has_in_batch(inputs):
            own = {
                "positive_embeddings": positives,
                "positive_log_q": inputs["positive_log_q"],
                "positive_query": inputs.get("positive_query"),
            }
        if hard is not None:
            log_q = inputs["hard_log_q"]
            own |= {
                "hard_embeddings": hard,
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
            **own,
        )
        if self._bank is not None and training:
            # After the loss: a step that the bank refuses leaves it as it was.
            with tf.control_dependencies([loss]):
                self._bank.push(inputs["candidate_row"], positives)
        # The parent's loss is a sum; a mean keeps the step size free of the batch size.
        total_weight = tf.reduce_sum(inputs["weight"])
        mean_loss = tf.math.divide_no_nan(loss, total_weight)
        self._loss_metric.update_state(mean_loss, sample_weight=total_weight)
        return mean_loss

    def _embed_columns(
        self, inputs: Mapping[str, tf.Tensor], training: bool
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
        """Embeds a batch's candidates: positives [B or P, D], shared [C, D], own hard [B, H, D]."""
        positive_rows = inputs["candidate_row"]
        fresh = tf.concat([positive_rows, inputs["easy_candidate_row"]], axis=0)
        hard_rows = inputs.get("hard_candidate_row")
        columns = fresh
        if hard_rows is not None:
            columns = tf.concat([fresh, tf.reshape(hard_rows, [-1])], axis=0)
        # Copies of a candidate are separate columns; the tower's work is shared.
        distinct, slot = tf.unique(columns)
        embedded = self.embed_candidates(
            distinct, training=training, dropout_seed=inputs.get("dropout_seed")
        )
        candidates = tf.gather(embedded, slot)
        num_positives, num_fresh = tf.shape(positive_rows)[0], tf.shape(fresh)[0]
        shared = candidates[(0 if has_in_batch(inputs) else num_positives) : num_fresh]
        if self._bank is not None:
            shared = tf.concat([shared, self._bank(inputs["bank_candidate_row"])], axis=0)
        hard = None
        if hard_rows is not None:
            shape = tf.concat([tf.shape(hard_rows), tf.shape(candidates)[1:]], axis=0)
            hard = tf.reshape(candidates[num_fresh:], shape)
        return candidates[:num_positives], shared, hard

    def _embed_batch_queries(self, inputs: Mapping[str, tf.Tensor], training: bool) -> tf.Tensor:
        seed = inputs.get("dropout_seed")
        if "sequence_rows" in inputs:
            return self.embed_positions(
                inputs["query_row"],
                inputs["sequence_rows"],
                inputs["state"],
                training=training,
                dropout_seed=seed,
            )
        return self.embed_queries(
            inputs["query_row"], inputs["history_rows"], training=training, dropout_seed=seed
        )

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
        if self._is_tail is not None:
            self._update_tail(self._is_tail, gains, top + 1, relevant)
        return {name: metric.result() for name, metric in self._reported_metrics.items()}

    @property
    def _reported_metrics(self) -> dict[str, tf.keras.metrics.Mean]:
        tail = {} if self._is_tail is None else self._tail_metrics
        return {**self._ranking_metrics, **tail}

    def report_tail(self, is_tail: np.ndarray) -> None:
        """Makes `evaluate` report the recall of tail items as well, as "tail/recall@k".

        It is what `evaluation.evaluate` reports of the slice "tail": the share of a query's
        relevant tail items that are in the top k of the whole corpus, averaged over the queries
        that have any.

        Args:
            is_tail: [num_candidates] bool, of rows 1, 2, ..., such as
                `popularity_slices(counts[1:])["tail"]`.

        Raises:
            ValueError: If it is not one bool a candidate.
        """
        if is_tail.shape != (self.num_candidates,) or is_tail.dtype != bool:
            raise ValueError(
                f"is_tail must be [{self.num_candidates}] bool, one for each candidate. "
                f"Received: shape {is_tail.shape}, {is_tail.dtype}"
            )
        if self._is_tail is None:
            self._tail_metrics = {
                f"tail/recall@{k}": tf.keras.metrics.Mean(name=f"tail/recall@{k}")
                for k in self._cutoffs
            }
            self._is_tail = tf.Variable(
                tf.zeros([self.num_candidates + 1], tf.bool), trainable=False, name="is_tail"
            )
            # Keras keeps the graph of an earlier evaluation, which does not report it.
            self.test_function = None
        self._is_tail.assign(np.concatenate([[False], is_tail]))

    def _update_tail(
        self, is_tail: tf.Variable, gains: tf.Tensor, top_rows: tf.Tensor, relevant: tf.Tensor
    ) -> None:
        """Takes in a batch: gains and candidate rows of its ranking, [b, depth]; [b, R] rows."""
        gains *= tf.cast(tf.gather(is_tail, top_rows), tf.float32)
        num_relevant = tf.reduce_sum(tf.cast(tf.gather(is_tail, relevant), tf.float32), axis=1)
        for k in self._cutoffs:
            recall = tf.math.divide_no_nan(tf.reduce_sum(gains[:, :k], axis=1), num_relevant)
            self._tail_metrics[f"tail/recall@{k}"].update_state(recall, num_relevant > 0)

    def diagnose(self, inputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Computes what tells a training gone wrong, from one batch; nothing is changed.

        Args:
            inputs: As `TrainingBatches.batch` or one of its children describes.

        Returns:
            Scalar float32 by name. "log_q/min" and "log_q/max": over the shared columns that count,
            unless nothing is corrected. "masked_share": of each positive's shared columns, those
            that do not.
            "norm/query" and "norm/candidate": mean length of the embeddings of the batch's queries
            and positives, 1 where the model normalizes and has no candidate bias.
            "norm/TOWER/LAYER": mean length of a row of each embedding table of a tower, such as
            "norm/candidate_tower/id"; a table that both read is the candidate tower's.
        """
        is_counted = inputs["is_counted"]
        if "positive_query" in inputs:
            is_counted = tf.gather(is_counted, inputs["positive_query"])
        queries = self._embed_batch_queries(inputs, training=False)
        figures = {
            "masked_share": 1.0 - tf.reduce_mean(tf.cast(is_counted, tf.float32)),
            "norm/query": _mean_norm(queries),
            "norm/candidate": _mean_norm(self.embed_candidates(inputs["candidate_row"])),
        }
        log_q = self._log_q(inputs)
        if log_q is not None:
            counted = tf.boolean_mask(tf.broadcast_to(log_q, tf.shape(is_counted)), is_counted)
            figures |= {"log_q/min": tf.reduce_min(counted), "log_q/max": tf.reduce_max(counted)}
        shared = self.candidate_tower.id_embedding
        for tower in (self.query_tower, self.candidate_tower):
            for layer in tower.submodules:
                is_table = isinstance(layer, tf.keras.layers.Embedding)
                if is_table and (layer is not shared or tower is self.candidate_tower):
                    figures[f"norm/{tower.name}/{layer.name}"] = _mean_norm(layer.embeddings)
        return figures

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates on `evaluation_batches`: mean recall@k and ndcg@k over the whole corpus.

        After `report_tail`, "tail/recall@k" too. Takes and returns what `tf.keras.Model.evaluate`
        does.
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


def _mean_norm(vectors: tf.Tensor) -> tf.Tensor:
    return tf.reduce_mean(tf.norm(vectors, axis=1))


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
