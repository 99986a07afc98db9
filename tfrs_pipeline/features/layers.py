"""Layers that embed encoded features."""

import re
import zlib

import tensorflow as tf


def layer_name(column: str) -> str:
    """Returns a name that TensorFlow accepts for a layer: the column's, if possible.

    Example:
        >>> layer_name("year"), layer_name("release date")
        ('year', 'xrelease_date_9cebf073')
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", column)
    if name == column and name[:1].isalnum():
        return name
    return f"x{name}_{zlib.crc32(column.encode()):08x}"


class CodeEmbedding(tf.keras.layers.Layer):
    """Embeds codes [n], or lists of codes [n, m] as the mean over the codes other than 0.

    Code 0 of a single value has an embedding too; a list of zeros is the zero vector.
    """

    def __init__(self, column: str, num_codes: int, dim: int) -> None:
        name = layer_name(column)
        super().__init__(name=f"{name}_embedding")
        self._embedding = tf.keras.layers.Embedding(num_codes, dim, name=name)

    @property
    def table(self) -> tf.Variable:
        """The table with a row for each code."""
        return self._embedding.embeddings

    def call(self, codes: tf.Tensor) -> tf.Tensor:
        """Returns [n, dim] float32."""
        embedded = self._embedding(codes)
        if codes.shape.rank == 1:
            return embedded
        is_value = tf.cast(codes > 0, tf.float32)[:, :, tf.newaxis]
        summed = tf.reduce_sum(embedded * is_value, axis=1)
        return tf.math.divide_no_nan(summed, tf.reduce_sum(is_value, axis=1))


class FlaggedNumbers(tf.keras.layers.Layer):
    """Fills missing rows with zeros, and appends 1 if the row was missing, else 0.

    With `dim`, the numbers are mapped linearly without a bias, so that missing rows stay zeros.
    """

    table = None
    """Numbers have no table of codes."""

    def __init__(self, column: str, dim: int | None = None) -> None:
        name = layer_name(column)
        super().__init__(name=f"{name}_embedding")
        self._projection = None
        if dim is not None:
            self._projection = tf.keras.layers.Dense(dim, use_bias=False, name=name)

    def call(self, values: tf.Tensor) -> tf.Tensor:
        """Returns [n, (dim or m) + 1] float32 for values [n, m]; [n] counts as [n, 1]."""
        if values.shape.rank == 1:
            values = values[:, tf.newaxis]
        is_missing = tf.math.is_nan(values[:, :1])
        filled = tf.where(is_missing, tf.zeros_like(values), values)
        if self._projection is not None:
            filled = self._projection(filled)
        return tf.concat([filled, tf.cast(is_missing, tf.float32)], axis=1)
