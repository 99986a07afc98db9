"""A bank of the candidate embeddings of earlier batches: negatives that cost no tower.

Reference: Wang, Zhu and He 2021, "Cross-Batch Negative Sampling for Training Two-Tower
Recommenders", SIGIR. Embeddings change slowly, so that those of the last few batches, as they were
then, stand in for fresh ones: no gradient flows into them.
"""

from __future__ import annotations

import tensorflow as tf


class EmbeddingBank(tf.keras.layers.Layer):
    """The latest candidate embeddings, first in, first out.

    The embeddings of the latest batch come first, in the batch's order, then those of the batch
    before it, and so on: the order of `TrainingBatches.batch`'s `bank_candidate_row`. The bank also
    knows whose embeddings it holds, and refuses to stand for others. Both are weights that no
    optimizer touches, so that they are saved and restored with the model.

    Args:
        size: Entries, a multiple of the batch size.
        embedding_dim: Size of an embedding.
        name: Layer name.
    """

    def __init__(self, size: int, embedding_dim: int, name: str = "embedding_bank") -> None:
        super().__init__(name=name, trainable=False)
        self._size = size
        self._embeddings = self.add_weight(
            name="embeddings", shape=[size, embedding_dim], initializer="zeros", trainable=False
        )
        # 0, "unknown", is an entry that is not filled: no positive has it.
        self._candidate_rows = self.add_weight(
            name="candidate_rows",
            shape=[size],
            dtype=tf.int32,
            initializer="zeros",
            trainable=False,
        )

    def call(self, candidate_rows: tf.Tensor) -> tf.Tensor:
        """Reads the bank.

        Args:
            candidate_rows: [size] int32, whose embeddings it must hold, 0 in entries that are not
                filled.

        Returns:
            [size, embedding_dim] float32, zeros in entries that are not filled; no gradient.

        Raises:
            ValueError: If there are more or fewer rows than entries.
            tf.errors.InvalidArgumentError: If it holds the embeddings of other candidates.
        """
        if candidate_rows.shape[0] != self._size:
            raise ValueError(
                f"The batches name {candidate_rows.shape[0]} entries of the bank, and the model "
                f"keeps {self._size}: its bank_size must be the batches' bank_size, which is "
                "bank_batches * batch_size."
            )
        is_same = tf.debugging.assert_equal(
            self._candidate_rows,
            candidate_rows,
            "The bank holds other candidates than the batch names: the model was not trained on "
            "the steps just before this one. Begin at step 0 with a new model, or restore the "
            "model as it was after the step before.",
        )
        with tf.control_dependencies([] if is_same is None else [is_same]):
            return tf.identity(self._embeddings)

    def push(self, candidate_rows: tf.Tensor, embeddings: tf.Tensor) -> None:
        """Takes in a batch, and lets go of the oldest one.

        Args:
            candidate_rows: [B] int32.
            embeddings: [B, embedding_dim], of these candidates.
        """
        embeddings = tf.cast(embeddings, self._embeddings.dtype)
        for variable, new in (
            (self._embeddings, embeddings),
            (self._candidate_rows, candidate_rows),
        ):
            variable.assign(tf.concat([new, variable], axis=0)[: self._size])
