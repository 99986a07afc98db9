"""The Keras model: a query tower and a candidate tower under the loss over mixed negatives."""

from collections.abc import Mapping

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from tfrs_pipeline.batches.batch import Batch
from tfrs_pipeline.model.corpus import Corpus
from tfrs_pipeline.model.loss import HybridRetrieval
from tfrs_pipeline.model.randomness import Stream, fold, pass_seed
from tfrs_pipeline.model.settings import TwoTowerSettings
from tfrs_pipeline.model.tf_tables import embed_corpus
from tfrs_pipeline.model.towers import FeatureTable, drop_features

# Share of the request features that training drops, so that a request may come without them.
REQUEST_DROPOUT = 0.05
_HISTORY_INPUTS = "history_rows", "history_times", "sequence_rows", "sequence_times", "state"
_DROPOUT_INPUTS = "dropout_seed", "dropout_slice"


class TwoTowerNetwork(tfrs.Model):
    """A query tower and a candidate tower, for `fit` on `HybridBatches`.

    A tower is any Keras layer that returns [n, D] float32. It is called with a dict:

    - `row`: [n] int32, users or items; 0 is unknown.
    - `features`: Encoded, by name. The query tower also gets request features, some of which
      training drops.
    - `dropout_seed`: [2] int32, in training; with several replicas also `dropout_slice`.
    - For queries, `history_rows`, or `sequence_rows` and `state`; if the corpus has times and
      `history_pooling` has recency or attention, also `history_times` or `sequence_times`. See
      `Batch`.

    Raises a `ValueError` if a tower returns something else, their widths differ, or the Keras
    policy is not float32. Encoded features of the corpus become constants of the model; the query
    tower may also read those in `candidate_table`.

    Attributes:
        shrinkage: The setting `history_shrinkage`, which `embed_queries` reads.
    """

    def __init__(
        self,
        query_tower: tf.keras.layers.Layer,
        candidate_tower: tf.keras.layers.Layer,
        settings: TwoTowerSettings,
        corpus: Corpus,
        candidate_table: FeatureTable,
        name: str,
    ) -> None:
        # Embeddings in half precision would be exported, and index and evaluation would differ.
        policy = tf.keras.mixed_precision.global_policy().name
        if policy != "float32":
            raise ValueError(
                f"The towers need the policy float32. Received: {policy!r}. Set it by "
                "tf.keras.mixed_precision.set_global_policy('float32'); layers of your own tower "
                "may have another dtype as long as the tower returns float32."
            )
        super().__init__(name=name)
        self.query_tower, self.candidate_tower = query_tower, candidate_tower
        self.query_table = FeatureTable(corpus, "query")
        self._request_features = corpus.request_features
        self.num_candidates = len(corpus.candidate_ids)
        self.candidate_table = candidate_table
        self.history_length, self.shrinkage = settings.history_length, settings.history_shrinkage
        self.reads_times = corpus.has_times
        self.task = HybridRetrieval(settings.temperature)
        self._is_corrected = settings.correction != "none"
        self._make_loss_metric()
        # Each replica reports the metric over all replicas, so the values must not be added up.
        self.distribute_reduction_method = "first"
        self._build_variables()
        self._check_variables()

    def embed_queries(
        self,
        query_rows: tf.Tensor,
        history_rows: tf.Tensor,
        features: Mapping[str, tf.Tensor] | None = None,
        history_times: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Embeds queries: [B, D] float32; see `Exportable`.

        Absent request features and times are missing values. With a `shrinkage` of m, the result is
        (n q + m q_0) / (n + m) for the tower's output q, its output q_0 for the same query with an
        empty history, and the number n of known items in the history.
        """
        batch = Batch(query_rows, history_rows=history_rows, history_times=history_times)
        queries = self._queries(batch, features)
        if not self.shrinkage:
            return queries
        empty = self._queries(Batch(query_rows, history_rows=tf.zeros_like(history_rows)), features)
        n = tf.reduce_sum(tf.cast(history_rows > 0, tf.float32), axis=1, keepdims=True)
        return empty + n / (n + self.shrinkage) * (queries - empty)

    def embed_candidates(
        self,
        candidate_rows: tf.Tensor,
        features: Mapping[str, tf.Tensor] | None = None,
        *,
        training: bool = False,
        dropout_seed: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Embeds candidates by [n] int32 rows, where 0 is an unknown item: [n, D] float32."""
        inputs = {
            "row": candidate_rows,
            "features": self.candidate_table(candidate_rows) if features is None else features,
        }
        if dropout_seed is not None:  # The draws must differ from the query tower's.
            inputs["dropout_seed"] = fold(dropout_seed, Stream.CANDIDATES)
        return self.candidate_tower(inputs, training=training)

    def embed_corpus(self) -> np.ndarray:
        """Embeds every candidate, rows 1, 2, ... : [num_candidates, D] float32."""
        return embed_corpus(self._embed_block, self.num_candidates)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32)], autograph=False)
    def _embed_block(self, candidate_rows: tf.Tensor) -> tf.Tensor:
        return self.embed_candidates(candidate_rows)

    def _queries(
        self, batch: Batch, features: Mapping[str, tf.Tensor] | None = None, training: bool = False
    ) -> tf.Tensor:
        rows = batch.query_row
        # An export brings the features of new users; training reads those of the corpus by row.
        encoded = dict(features or {})
        if not self.query_table.names <= encoded.keys():
            encoded = self.query_table(rows) | encoded
        inputs = {
            "row": rows,
            "features": encoded | self._encoded_request(batch, encoded, training),
        }
        read = {name: getattr(batch, name) for name in (*_HISTORY_INPUTS, *_DROPOUT_INPUTS)}
        inputs |= {name: value for name, value in read.items() if value is not None}
        return self.query_tower(inputs, training=training)

    def _encoded_request(
        self, batch: Batch, encoded: Mapping[str, tf.Tensor], training: bool
    ) -> dict[str, tf.Tensor]:
        """Returns the request features: those in `encoded`, else the batch's, else missing ones."""
        rows, known = batch.query_row, {**(batch.requests or {}), **encoded}
        features = {
            feature.name: known.get(
                feature.name, tf.repeat(feature.missing, tf.shape(rows)[0], axis=0)
            )
            for feature in self._request_features
        }
        if not features or not training:
            return features
        # Unlike features of users, those of a request may be absent in service at any time.
        seed = fold(pass_seed(training, batch.dropout_seed), Stream.REQUESTS)
        return drop_features(features, self._request_features, REQUEST_DROPOUT, seed, rows)

    def compute_loss(self, inputs: Batch, training: bool = False) -> tf.Tensor:
        """Computes the mean loss of a batch: scalar float32.

        The losses of a batch's slices (`Slices.take`) add up to the mean loss of the whole. Raises
        a `ValueError` if several replicas train on something other than a slice.
        """
        # Slices carry their batch's total weight; a cut by tf.distribute does not.
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if inputs.total_weight is None and replicas > 1:
            raise ValueError(
                "Several replicas train on batches that tf.distribute has cut: it cuts each tensor "
                "along its first axis, which is not always the rows. Train with TwoTower.fit under "
                "the strategy: it gives each replica its slice."
            )
        queries = self._queries(inputs, training=training)
        positives, shared, hard = self._embed_columns(inputs, training)
        hard_log_q = None if inputs.hard is None else inputs.hard.log_q
        if hard_log_q is not None and not self._is_corrected:
            hard_log_q = tf.zeros_like(hard_log_q)
        loss = self.task(
            queries,
            positives,
            sample_weight=inputs.weight,
            negative_embeddings=shared,
            score_mask=inputs.is_counted,
            log_q=inputs.log_q if self._is_corrected else None,
            positive_query=inputs.positive_query,
            hard_embeddings=hard,
            hard_log_q=hard_log_q,
            hard_mask=None if inputs.hard is None else inputs.hard.is_counted,
        )
        # The task's loss is a sum; a mean makes the learning rate independent of the batch size.
        weight = tf.reduce_sum(inputs.weight)
        self._loss_metric.update_state(tf.math.divide_no_nan(loss, weight), sample_weight=weight)
        total_weight = weight if inputs.total_weight is None else inputs.total_weight
        return tf.math.divide_no_nan(loss, total_weight)

    def _embed_columns(
        self, inputs: Batch, training: bool
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
        """Embeds a batch's candidates: positives [P, D], shared [C, D], own hard [W, H, D]."""
        columns = [inputs.candidate_row, inputs.shared_row]
        if inputs.hard is not None:
            columns.append(tf.reshape(inputs.hard.candidate_row, [-1]))
        # Copies of a candidate are separate columns, but the tower embeds it once.
        distinct, slot = tf.unique(tf.concat(columns, axis=0))
        embedded = self.embed_candidates(
            distinct, training=training, dropout_seed=inputs.dropout_seed
        )
        slots = tf.split(slot, [tf.shape(rows)[0] for rows in columns])
        # The split loses the static number of columns, which the loss checks log_q against.
        positives, shared, *hard = (
            tf.gather(embedded, tf.ensure_shape(part, rows.shape))
            for part, rows in zip(slots, columns, strict=True)
        )
        if not hard:
            return positives, shared, None
        shape = tf.concat([tf.shape(inputs.hard.candidate_row), [-1]], axis=0)
        return positives, shared, tf.reshape(hard[0], shape)

    @tf.__internal__.tracking.no_automatic_dependency_tracking
    def _make_loss_metric(self) -> None:
        # Kept out of checkpoints: each replica has a part, and one worker could not read them all.
        self._loss_metric = tf.keras.metrics.Mean(name="loss")

    @property
    def metrics(self) -> list[tf.keras.metrics.Metric]:
        """The loss metric, which Keras resets each epoch."""
        return [*super().metrics, self._loss_metric]

    @property
    def losses(self) -> list[tf.Tensor]:
        """A replica's share of custom towers' regularization losses, since gradients add up."""
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        return [loss / replicas for loss in super().losses]

    # Nothing here branches on tensors, and AutoGraph would rewrite all that is called, which takes
    # seconds. A custom tower that branches decorates its `call` with tf.function.
    @tf.autograph.experimental.do_not_convert
    def train_step(self, inputs: Batch) -> dict[str, tf.Tensor]:
        """Runs one step; returns the epoch's mean loss so far."""
        super().train_step(inputs)
        return {"loss": self._loss_metric.result()}

    def _build_variables(self) -> None:
        """Creates every variable, so that weights can be loaded before the first step."""
        # Keras makes variables at the first call; a row of unknown ids is enough.
        row = tf.zeros([1], tf.int32)
        history = tf.zeros([1, self.history_length], tf.int32)
        query = self._queries(Batch(row, history_rows=history))
        candidate = self.embed_candidates(row)
        if query.shape.rank != 2 or query.shape != candidate.shape:
            raise ValueError(
                "Each tower must return [n, D], the same D: make the last layers of query_tower "
                "and candidate_tower equally wide. A built-in tower returns model.dim numbers, and "
                f"one more with model.candidate_bias. Received for n = 1: {tuple(query.shape)} of "
                f"the query tower, {tuple(candidate.shape)} of the candidate tower."
            )
        for name, output in (("query_tower", query), ("candidate_tower", candidate)):
            if output.dtype != tf.float32:
                raise ValueError(
                    f"The {name} must return float32: an export multiplies queries by candidates. "
                    f'Give its last layer dtype="float32". Received: {output.dtype.name}'
                )

    def check_sequences(self) -> None:
        """Tries the query tower on a whole sequence; a `KeyError` if it reads histories alone."""
        row = tf.zeros([1], tf.int32)
        sequence = tf.zeros([1, self.history_length], tf.int32)
        times = tf.zeros([1, self.history_length + 1], tf.int32) if self.reads_times else None
        try:
            self._queries(Batch(row, sequence_rows=sequence, sequence_times=times, state=row))
        except KeyError as error:
            error.add_note(
                "With training.examples 'sequences', training gives the query_tower sequence_rows "
                "and state in place of history_rows (see tp.WholeSequences). Read both forms, as "
                "queries come with a history, or set training.examples to 'single'."
            )
            raise

    def _check_variables(self) -> None:
        """Refuses towers with per-replica statistics if several replicas train."""
        if tf.distribute.get_strategy().num_replicas_in_sync == 1:
            return
        for variable in (*self.query_tower.weights, *self.candidate_tower.weights):
            if variable.synchronization == tf.VariableSynchronization.ON_READ:
                raise ValueError(
                    f"{variable.name} is a statistic of each replica's own slice, as "
                    "BatchNormalization has: several replicas would train another model than one. "
                    "Use LayerNormalization."
                )
