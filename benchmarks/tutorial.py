"""The model of TFRS' tutorial "Recommending movies: retrieval", for benchmarks to measure against.

Embeddings of user and item ids, 32-d, in-batch negatives, batch 8192, Adagrad 0.1, 3 epochs, no
correction. Its metrics rank every pair of every batch in training; they change no weight.
"""

from __future__ import annotations

from collections.abc import Sequence

# Before TensorFlow Recommenders, since it selects Keras 2.
from tfrs_pipeline.evaluation.topk import ExactRetriever

# isort: split
import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from tfrs_pipeline.retrieval import Query
from tfrs_pipeline.samples.build import Samples

EMBEDDING_DIM = 32
BATCH_SIZE = 8192
LEARNING_RATE = 0.1
NUM_EPOCHS = 3
# With the correction it goes on improving; without, it does not.
NUM_EPOCHS_CORRECTED = 20
SHUFFLE = 100_000
METRICS_BATCH_SIZE = 128

SETTINGS = {
    "embedding_dim": EMBEDDING_DIM,
    "batch_size": BATCH_SIZE,
    "optimizer": "adagrad",
    "learning_rate": LEARNING_RATE,
}


class TutorialModel(tfrs.Model):
    """The tutorial's model, compiled with its optimizer.

    Args:
        user_ids: Every user's id.
        item_ids: Every item's id.
        compute_metrics: Whether to compute the tutorial's metrics in training, as it does.
    """

    def __init__(
        self, user_ids: Sequence[str], item_ids: Sequence[str], *, compute_metrics: bool
    ) -> None:
        super().__init__()
        self.user_model = _tower(user_ids)
        self.item_model = _tower(item_ids)
        self._compute_metrics = compute_metrics
        metrics = None
        if compute_metrics:
            items = tf.data.Dataset.from_tensor_slices(list(item_ids))
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


def _tower(ids: Sequence[str]) -> tf.keras.Model:
    return tf.keras.Sequential(
        [
            tf.keras.layers.StringLookup(vocabulary=list(ids), mask_token=None),
            tf.keras.layers.Embedding(len(ids) + 1, EMBEDDING_DIM),
        ]
    )


def tutorial_batches(
    samples: Samples, query_ids: np.ndarray, candidate_ids: np.ndarray, *, corrected: bool
) -> tf.data.Dataset:
    """Makes the tutorial's batches, in its order of calls: the same ones come in each epoch.

    Args:
        samples: Positives to train on.
        query_ids: [num_queries] user ids behind the rows, as of `Corpus`.
        candidate_ids: [num_candidates] item ids behind the rows, likewise.
        corrected: Whether a batch holds sampling_probability, the item's share of the positives.

    Returns:
        Batches of user_id and item_id, both text, and perhaps sampling_probability; the last one
        of the epoch is smaller.
    """
    rows = samples.candidate_rows
    features = {
        "user_id": query_ids.astype(str)[samples.query_rows - 1],
        "item_id": candidate_ids.astype(str)[rows - 1],
    }
    if corrected:
        share = samples.counts / samples.counts.sum()
        features["sampling_probability"] = share[rows].astype(np.float32)
    pairs = tf.data.Dataset.from_tensor_slices(features)
    return pairs.shuffle(SHUFFLE).batch(BATCH_SIZE).cache()


def make_tutorial(
    samples: Samples,
    query_ids: np.ndarray,
    candidate_ids: np.ndarray,
    *,
    corrected: bool,
    compute_metrics: bool = False,
) -> tuple[TutorialModel, tf.data.Dataset]:
    """Makes the tutorial's model and batches, its metrics left out of training unless asked for.

    Args:
        samples: As of `tutorial_batches`.
        query_ids: As of `tutorial_batches`.
        candidate_ids: As of `tutorial_batches`.
        corrected: As of `tutorial_batches`.
        compute_metrics: As of `TutorialModel`.
    """
    model = TutorialModel(
        query_ids.astype(str).tolist(),
        candidate_ids.astype(str).tolist(),
        compute_metrics=compute_metrics,
    )
    return model, tutorial_batches(samples, query_ids, candidate_ids, corrected=corrected)


def fit_tutorial(
    samples: Samples,
    query_ids: np.ndarray,
    candidate_ids: np.ndarray,
    *,
    num_epochs: int,
    corrected: bool,
    seed: int,
) -> ExactRetriever:
    """Trains the tutorial's model.

    Args:
        samples: As of `tutorial_batches`.
        query_ids: As of `tutorial_batches`.
        candidate_ids: As of `tutorial_batches`.
        num_epochs: Passes over the samples; the tutorial's own are `NUM_EPOCHS`.
        corrected: Whether the task is given the candidate_sampling_probability.
        seed: Of the weights and the order.

    Returns:
        A retriever whose query is a user's id, whatever the history.
    """
    tf.keras.utils.set_random_seed(seed)
    model, batches = make_tutorial(samples, query_ids, candidate_ids, corrected=corrected)
    model.fit(batches, epochs=num_epochs, verbose=0)
    return tutorial_retriever(model, candidate_ids)


def tutorial_retriever(model: TutorialModel, candidate_ids: np.ndarray) -> ExactRetriever:
    """Makes a trained model a retriever; a query is a user's id, whatever the history."""

    def embed_queries(queries: Sequence[Query]) -> np.ndarray:
        return model.user_model(tf.constant([str(query["user_id"]) for query in queries])).numpy()

    candidates = model.item_model(tf.constant(candidate_ids.astype(str).tolist())).numpy()
    return ExactRetriever(candidate_ids, candidates, embed_queries)
