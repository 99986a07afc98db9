"""The model of TFRS' tutorial "Recommending movies: retrieval", for benchmarks to measure against.

Embeddings of user and item ids, 32-d, in-batch negatives, batch 8192, Adagrad 0.1, 3 epochs, no
correction. Its metrics rank every pair of every training batch; they change no weight.
"""

from __future__ import annotations

from collections.abc import Sequence

# Before TensorFlow Recommenders, since it selects Keras 2.
import tfrs_pipeline as tp

# isort: split
import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

EMBEDDING_DIM = 32
BATCH_SIZE = 8192
LEARNING_RATE = 0.1
NUM_EPOCHS = 3
# With the correction it keeps improving; without, it does not.
NUM_EPOCHS_CORRECTED = 20
SHUFFLE = 100_000
METRICS_BATCH_SIZE = 128
# Uniform negatives of HybridTutorialModel.
NUM_UNIFORM = 512

SETTINGS = {
    "embedding_dim": EMBEDDING_DIM,
    "batch_size": BATCH_SIZE,
    "optimizer": "adagrad",
    "learning_rate": LEARNING_RATE,
}


class TutorialModel(tfrs.Model):
    """The tutorial's model, compiled with its optimizer.

    Args:
        data: What it is trained on: its users and items are known to the model.
        compute_metrics: Whether to compute the tutorial's metrics in training, as it does.
    """

    def __init__(self, data: tp.TrainingSet, *, compute_metrics: bool = False) -> None:
        super().__init__()
        self.user_model = _tower(data.corpus.query_ids)
        self.item_model = _tower(data.corpus.candidate_ids)
        self._compute_metrics = compute_metrics
        metrics = None
        if compute_metrics:
            items = tf.data.Dataset.from_tensor_slices(_texts(data.corpus.candidate_ids))
            metrics = tfrs.metrics.FactorizedTopK(
                candidates=items.batch(METRICS_BATCH_SIZE).map(self.item_model)
            )
        self.task = tfrs.tasks.Retrieval(metrics=metrics)
        self.compile(optimizer=tf.keras.optimizers.Adagrad(LEARNING_RATE))

    def compute_loss(self, features: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Computes the summed loss of a batch of user_id, item_id and sampling_probability."""
        del training
        return self.task(
            self.user_model(features["user_id"]),
            self.item_model(features["item_id"]),
            candidate_sampling_probability=features.get("sampling_probability"),
            compute_metrics=self._compute_metrics,
        )


class HybridTutorialModel(TutorialModel):
    """The tutorial's model with task and negatives as the guide changes them.

    Args:
        data: As in `TutorialModel`.
    """

    def __init__(self, data: tp.TrainingSet) -> None:
        super().__init__(data)
        self.task = tp.HybridRetrieval()
        # The rows of the lookup are those of the samples: row 0 is the unknown item.
        frame = tp.SamplingFrame.of_counts(data.samples.counts, BATCH_SIZE)
        self.mixture = tp.Mixture([tp.InBatch(), tp.Uniform(NUM_UNIFORM)], frame)

    def compute_loss(self, features: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Computes the summed loss of a batch of user_id and item_id."""
        lookup, embedding = self.item_model.layers
        rows = tf.cast(lookup(features["item_id"]), tf.int32)
        seed = tf.random.uniform([2], maxval=tf.int32.max, dtype=tf.int32)
        negatives = self.mixture.draw(rows, seed)
        return self.task(
            self.user_model(features["user_id"]),
            self.item_model(features["item_id"]),
            negative_embeddings=embedding(negatives),
            log_q=self.mixture.log_q(negatives),
            score_mask=rows[:, tf.newaxis] != negatives[tf.newaxis, :],
        )


def _texts(ids: tp.Ids) -> list[str]:
    return ids.values.astype(str).tolist()


def _tower(ids: tp.Ids) -> tf.keras.Model:
    return tf.keras.Sequential(
        [
            tf.keras.layers.StringLookup(vocabulary=_texts(ids), mask_token=None),
            tf.keras.layers.Embedding(len(ids) + 1, EMBEDDING_DIM),
        ]
    )


def tutorial_batches(data: tp.TrainingSet, *, corrected: bool = False) -> tf.data.Dataset:
    """Makes the tutorial's batches, in its order of calls, which repeats them in each epoch.

    Args:
        data: Positives to train on.
        corrected: Whether a batch holds sampling_probability, the item's share of the positives.

    Returns:
        Batches of user_id and item_id, both text, and sampling_probability if corrected; the
        last one of the epoch is smaller.
    """
    samples, corpus = data.samples, data.corpus
    features = {
        "user_id": corpus.query_ids.values.astype(str)[samples.query_rows - 1],
        "item_id": corpus.candidate_ids.values.astype(str)[samples.candidate_rows - 1],
    }
    if corrected:
        share = samples.counts / samples.counts.sum()
        features["sampling_probability"] = share[samples.candidate_rows].astype(np.float32)
    pairs = tf.data.Dataset.from_tensor_slices(features)
    return pairs.shuffle(SHUFFLE).batch(BATCH_SIZE).cache()


def fit_tutorial(
    data: tp.TrainingSet,
    *,
    num_epochs: int,
    seed: int,
    corrected: bool = False,
    hybrid: bool = False,
) -> tp.ScoreRetriever:
    """Trains the tutorial's model.

    Args:
        data: What to train on.
        num_epochs: Passes over the samples; the tutorial's own are `NUM_EPOCHS`.
        seed: Seed of the weights and the order.
        corrected: Whether the task is given the candidate_sampling_probability.
        hybrid: Whether the model is `HybridTutorialModel`.

    Returns:
        A retriever whose query is a user's id, whatever the history.
    """
    tf.keras.utils.set_random_seed(seed)
    model = HybridTutorialModel(data) if hybrid else TutorialModel(data)
    model.fit(tutorial_batches(data, corrected=corrected), epochs=num_epochs, verbose=0)
    return tutorial_retriever(model, data.corpus.candidate_ids)


def tutorial_retriever(model: TutorialModel, candidate_ids: tp.Ids) -> tp.ScoreRetriever:
    """Makes a trained model a retriever; a query is a user's id, whatever the history."""
    candidates = model.item_model(tf.constant(_texts(candidate_ids))).numpy()

    def score(queries: Sequence[tp.Query]) -> np.ndarray:
        users = tf.constant([str(query["user_id"]) for query in queries])
        return model.user_model(users).numpy() @ candidates.T

    return tp.ScoreRetriever(candidate_ids, score)
