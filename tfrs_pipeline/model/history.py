"""Turns a query's history into a vector: pooled, or read by causal self-attention."""

import itertools
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from tfrs_pipeline.features.raw import NO_TIME
from tfrs_pipeline.model.randomness import Dropout, Stream
from tfrs_pipeline.model.settings import ATTENTION_HEADS, TwoTowerSettings

# Logarithmic buckets of the seconds between events; the last begins at 68 years.
NUM_GAPS = 64
_GAPS_PER_DOUBLING = 2
# The first second of each bucket from 1. Times are whole seconds; the subtrahend only prevents that
# rounding puts one into the bucket above.
_FIRST_SECONDS = np.ceil(
    np.expm1((np.arange(NUM_GAPS - 1) - 1e-6) * np.log(2) / _GAPS_PER_DOUBLING)
).astype(np.int32)
# A weight is exp(this * the bucket's learned number). The factor is large because a step moves the
# number only by about the learning rate.
_AGE_SCALE = 4.0
# Share of gaps, and of whole sequences, that training makes unknown, as requests may lack times.
GAP_DROPOUT = 0.05
# About the standard deviation of a new embedding's entries. Normalised vectors, whose entries are
# about 1, would outweigh the features that a tower adds to them.
_EMBEDDING_SCALE = 0.03


class HistoryEncoder(tf.keras.layers.Layer):
    """Encodes the items of a query's history, by itself or at every position of a sequence.

    Each pooling gives one vector:

    - "mean": the mean of the items' embeddings.
    - "recency": their mean with weights that fall by `recency_decay` per step from the latest item.
      If it `reads_times`, they are also multiplied by a learned weight of the item's age, which is
      the time between it and the latest item; all are 1 at first, and where times are unknown.
    - "attention": the last output of a causal Transformer over them (`SelfAttention`). If it
      `reads_times`, it knows the time from each item to the next, and from the last one to the
      query; absent times are unknown. At first, the output is about as long as a new embedding.

    An empty history has a learned vector for each pooling; `num_vectors` counts the poolings.
    `item_embedding` is a layer that embeds candidate rows of any shape, [..., dim]; None makes a
    separate embedding of `num_candidates` rows and row 0.
    """

    def __init__(
        self,
        num_candidates: int,
        settings: TwoTowerSettings,
        item_embedding: tf.keras.layers.Layer | None = None,
        reads_times: bool = False,
    ) -> None:
        super().__init__(name="history")
        dim = settings.dim
        self._embedding = item_embedding or tf.keras.layers.Embedding(
            num_candidates + 1, dim, name="history_item"
        )
        self._is_shared = item_embedding is not None
        self.num_vectors = len(settings.history_pooling)
        # All pooled means share one look-up of the items' vectors.
        self._means = tuple(name for name in settings.history_pooling if name != "attention")
        self._recency_decay, self._dropout = settings.recency_decay, settings.history_dropout
        self._reads_times = reads_times
        if self._means:
            shape = [len(self._means) * dim]
            self._empty = self.add_weight("empty_history", shape, initializer="uniform")
        self.ages = None
        if reads_times and "recency" in self._means:
            self.ages = self.add_weight("ages", [NUM_GAPS], initializer="zeros")
        self._has_attention = "attention" in settings.history_pooling
        if self._has_attention:
            self.attention = SelfAttention(settings, reads_times)

    def call(
        self,
        history_rows: tf.Tensor,
        times: tf.Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> tf.Tensor:
        """Encodes histories: [B, num_poolings * dim] float32.

        `history_rows`, [B, N] int32, are sorted most recent first, padded with 0. `times`,
        [B, N + 1] int32, are those of the query and of each item, as `relative_seconds` gives them.
        """
        kept = self._kept(history_rows, dropout)
        lengths = tf.math.count_nonzero(history_rows, axis=1, dtype=tf.int32)
        parts = []
        if self._means:
            # Ages count from the latest item, so training and any later request see the same ones.
            ages = None if times is None else _elapsed(times[:, 1:], times[:, 1:2])
            weights = self._age_weights(ages, dropout)
            parts.append(self._pooled(history_rows, kept, weights, is_large=dropout is not None))
        if self._has_attention:
            width = tf.shape(history_rows)[1]
            if dropout is None:
                # Cut to the longest history, except in training: a slice needs its batch's dropout.
                width = tf.reduce_max(tf.concat([lengths, [0]], axis=0))
            oldest_first, kept = (
                tf.reverse_sequence(values, lengths, seq_axis=1)[:, :width]
                for values in (history_rows, kept)
            )
            if times is not None:
                times = tf.reverse_sequence(times, lengths + 1, seq_axis=1)[:, : width + 1]
            states = self._attended(oldest_first, kept, times, dropout)
            parts.append(tf.gather(states, lengths, batch_dims=1))
        return tf.concat(parts, axis=1)

    def states(
        self,
        sequence_rows: tf.Tensor,
        times: tf.Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> tf.Tensor:
        """Encodes every prefix of sequences: [W, L + 1, num_poolings * dim] float32.

        Entry j encodes the first j items of [W, L] int32, oldest first, padded with 0, for a query
        at entry j of `times`, [W, L + 1] int32: those of the items, then of the last query.
        """
        kept = self._kept(sequence_rows, dropout)
        parts = []
        if self._means:
            ages = None
            if times is not None:
                # Entry [j, i] is the age of item i where item j - 1 is the latest.
                latest = tf.pad(times[:, :-1], [[0, 0], [1, 0]])[:, :, tf.newaxis]
                ages = _elapsed(times[:, tf.newaxis, :-1], latest)
            parts.append(self._pooled_states(sequence_rows, kept, self._age_weights(ages, dropout)))
        if self._has_attention:
            parts.append(self._attended(sequence_rows, kept, times, dropout))
        return tf.concat(parts, axis=2)

    @property
    def item_table(self) -> tf.Variable | None:
        """The embedding table of items, by candidate row; None if it belongs to another layer."""
        return None if self._is_shared else self._embedding.embeddings

    def _kept(self, rows: tf.Tensor, dropout: Dropout | None) -> tf.Tensor:
        """Returns 1 for items that count, 0 for padding and dropped items: float32."""
        is_kept = rows > 0
        if dropout is not None and self._dropout:
            is_kept &= dropout.of(Stream.HISTORY).uniform(tf.shape(rows)) >= self._dropout
        return tf.cast(is_kept, tf.float32)

    def _age_weights(self, seconds: tf.Tensor | None, dropout: Dropout | None) -> tf.Tensor | float:
        """Returns the weights of ages, [lines, ...]; 1 if no times are read.

        In training, the times of some lines count as unknown.
        """
        if self.ages is None or seconds is None:
            return 1.0
        buckets = _buckets(seconds, is_large=dropout is not None)
        weights = tf.exp(_AGE_SCALE * tf.gather(self.ages, buckets))
        if dropout is None:
            return weights
        shape = tf.concat([tf.shape(seconds)[:1], tf.ones_like(tf.shape(seconds)[1:])], axis=0)
        is_kept = dropout.of(Stream.GAPS).uniform(shape) >= GAP_DROPOUT
        return tf.where(is_kept, weights, 1.0)

    def _pooled_states(
        self, sequence_rows: tf.Tensor, kept: tf.Tensor, age_weights: tf.Tensor | float
    ) -> tf.Tensor:
        """Pools every prefix of sequences: [W, L] -> [W, L + 1, num_pooled * dim]."""
        vectors = self._embedding(sequence_rows) * kept[:, :, tf.newaxis]
        length = tf.shape(sequence_rows)[1]
        # Entry [j, i] weighs item i in the first j items.
        steps_ago = tf.range(length + 1)[:, tf.newaxis] - 1 - tf.range(length)[tf.newaxis, :]
        is_before = tf.cast(steps_ago >= 0, tf.float32)
        decay = self._recency_decay ** tf.cast(tf.maximum(steps_ago, 0), tf.float32)
        by_pooling = {"mean": is_before, "recency": is_before * decay * age_weights}
        pooled = []
        for pooling in self._means:
            weights = by_pooling[pooling]
            axes = "wji" if weights.shape.rank == 3 else "ji"  # Ages differ from line to line.
            sums = tf.einsum(f"{axes},wid->wjd", weights, vectors)
            num_weighted = tf.einsum(f"{axes},wi->wj", weights, kept)[:, :, tf.newaxis]
            # If dropout leaves nothing, the empty history's vector replaces the 0.
            pooled.append(tf.math.divide_no_nan(sums, num_weighted))
        num_kept = tf.einsum("ji,wi->wj", is_before, kept)
        is_empty = (num_kept == 0)[:, :, tf.newaxis]
        return tf.where(is_empty, self._empty, tf.concat(pooled, axis=2))

    def _pooled(
        self,
        history_rows: tf.Tensor,
        kept: tf.Tensor,
        age_weights: tf.Tensor | float,
        *,
        is_large: bool,
    ) -> tf.Tensor:
        """Pools [B, N] histories, where `kept` is 1: [B, num_pooled * dim]."""
        steps_ago = tf.range(tf.shape(history_rows)[1], dtype=tf.float32)
        weights = {"mean": kept, "recency": kept * self._recency_decay**steps_ago * age_weights}
        # Looks up only items that count: most cells of long histories are padding or dropped.
        kept_cells = tf.where(kept > 0)
        vectors = self._embedding(tf.gather_nd(history_rows, kept_cells))
        num_rows = tf.shape(history_rows)[0]
        pooled = []
        for pooling in self._means:
            weighted = vectors * tf.gather_nd(weights[pooling], kept_cells)[:, tf.newaxis]
            if is_large:
                # The cells are sorted by row. For sorted rows this sum is several times faster,
                # gradient included; LiteRT's does not take a row without a cell.
                total = tf.math.segment_sum(weighted, kept_cells[:, 0])
                total = tf.pad(total, [[0, num_rows - tf.shape(total)[0]], [0, 0]])
            else:
                total = tf.math.unsorted_segment_sum(weighted, kept_cells[:, 0], num_rows)
            share = tf.reduce_sum(weights[pooling], axis=1, keepdims=True)
            pooled.append(tf.math.divide_no_nan(total, share))
        is_empty = ~tf.reduce_any(kept > 0, axis=1, keepdims=True)
        return tf.where(is_empty, self._empty, tf.concat(pooled, axis=1))

    def _attended(
        self,
        sequence_rows: tf.Tensor,
        kept: tf.Tensor,
        times: tf.Tensor | None,
        dropout: Dropout | None,
    ) -> tf.Tensor:
        """Runs the Transformer: [W, L] rows, oldest first -> [W, L + 1, dim]."""
        # A dropped item keeps its position, with a vector of zeros.
        vectors = self._embedding(sequence_rows) * tf.expand_dims(kept, 2)
        gaps = None
        if self._reads_times and times is not None:
            gaps = gap_buckets(times, is_large=dropout is not None)
            if dropout is not None:
                gaps = drop_gaps(gaps, dropout.of(Stream.GAPS))
        return self.attention(vectors, gaps, dropout) * _EMBEDDING_SCALE


class SelfAttention(tf.keras.layers.Layer):
    """A causal Transformer with learned positions: an output depends only on what comes before.

    Blocks normalise first: x + Attention(norm(x)), then x + MLP(norm(x)); the outputs are
    normalised once more. A learned vector before the first item gives the output of an empty
    history. Each head has a learned relative position bias, zero at first. Each bucket of gaps has
    a learned vector, which is added. Padding must come last.

    References: Kang and McAuley 2018, "Self-Attentive Sequential Recommendation", ICDM. The bias:
    Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer", JMLR.
    """

    def __init__(self, settings: TwoTowerSettings, reads_gaps: bool) -> None:
        super().__init__(name="self_attention")
        dim, max_length = settings.dim, settings.history_length
        self._dropout = settings.attention_dropout
        self._scale = dim**0.5
        self.start = self.add_weight("start", [1, 1, dim], initializer=_normal())
        self.positions = self.add_weight("positions", [max_length + 1, dim], initializer=_normal())
        self.gap_vectors = None
        if reads_gaps:
            self.gap_vectors = self.add_weight("gaps", [NUM_GAPS, dim], initializer="zeros")
        self.blocks = [
            {
                "attention_norm": tf.keras.layers.LayerNormalization(epsilon=1e-6),
                "query_key_value": tf.keras.layers.Dense(3 * dim),
                "attended": tf.keras.layers.Dense(dim),
                "mlp_norm": tf.keras.layers.LayerNormalization(epsilon=1e-6),
                "hidden": tf.keras.layers.Dense(dim, "relu"),
                "output": tf.keras.layers.Dense(dim),
            }
            for _ in range(settings.attention_blocks)
        ]
        # The bias helps if few sequences are long enough to train the late positions.
        shape = [ATTENTION_HEADS, max_length + 1]
        self.by_distance = [
            self.add_weight(f"by_distance_{i}", shape, initializer="zeros")
            for i in range(settings.attention_blocks)
        ]
        self.norm = tf.keras.layers.LayerNormalization(epsilon=1e-6)

    def call(
        self, vectors: tf.Tensor, gaps: tf.Tensor | None = None, dropout: Dropout | None = None
    ) -> tf.Tensor:
        """Attends to [W, L, dim] vectors, oldest first: [W, L + 1, dim], output j sees the first j.

        `gaps`, [W, L + 1] int32, come from `gap_buckets`; None means unknown.
        """
        shape = tf.shape(vectors)
        size = self.positions.shape[0]
        message = f"A history may hold {size - 1} items at most: give the latest."
        tf.debugging.assert_less(shape[1], size, message)
        start = tf.tile(self.start, [shape[0], 1, 1])
        # Scaled as in SASRec, or the positions would weigh as much as the items.
        hidden = tf.concat([start, vectors * self._scale], axis=1)
        hidden += self.positions[: shape[1] + 1]
        if self.gap_vectors is not None:
            if gaps is None:
                gaps = tf.zeros_like(hidden[:, :, 0], tf.int32)
            hidden += tf.gather(self.gap_vectors, gaps)
        # One stream for each place where something is dropped; None outside training.
        draws = None if dropout is None else dropout.of(Stream.ATTENTION)
        dropouts = (None if draws is None else draws.of(i) for i in itertools.count())
        hidden = self._dropped(hidden, dropouts)
        steps = tf.range(shape[1] + 1)
        steps_ago = steps[:, tf.newaxis] - steps
        for block, by_distance in zip(self.blocks, self.by_distance, strict=True):
            bias = tf.gather(by_distance, tf.maximum(steps_ago, 0), axis=1)
            bias = tf.where(steps_ago >= 0, bias, bias.dtype.min)
            attended = self._attend(block, block["attention_norm"](hidden), bias)
            attended = block["attended"](attended)
            hidden += self._dropped(attended, dropouts)
            output = block["output"](block["hidden"](block["mlp_norm"](hidden)))
            hidden += self._dropped(output, dropouts)
        return self.norm(hidden)

    def _attend(
        self, block: dict[str, tf.keras.layers.Layer], hidden: tf.Tensor, bias: tf.Tensor
    ) -> tf.Tensor:
        shape = tf.shape(hidden)
        projected = tf.reshape(
            block["query_key_value"](hidden),
            [shape[0], shape[1], 3, ATTENTION_HEADS, hidden.shape[2] // ATTENTION_HEADS],
        )
        query, key, value = tf.unstack(tf.transpose(projected, [2, 0, 3, 1, 4]))
        # Queries and keys have unit variance, so their products grow with the dimension.
        scores = tf.matmul(query, key, transpose_b=True) / (query.shape[-1] ** 0.5)
        weights = tf.nn.softmax(scores + bias)
        attended = tf.transpose(tf.matmul(weights, value), [0, 2, 1, 3])
        return tf.reshape(attended, shape)

    def _dropped(self, values: tf.Tensor, dropouts: Iterator[Dropout | None]) -> tf.Tensor:
        dropout = next(dropouts)
        if dropout is None or not self._dropout:
            return values
        is_kept = dropout.uniform(tf.shape(values)) >= self._dropout
        return tf.where(is_kept, values / (1.0 - self._dropout), 0.0)


def _normal() -> tf.keras.initializers.Initializer:
    return tf.keras.initializers.RandomNormal(stddev=0.02)


def gap_buckets(times: tf.Tensor, *, is_large: bool = False) -> tf.Tensor:
    """Buckets the time since the previous entry, given [W, L + 1] `relative_seconds`: int32.

    The bucket is 0 at the first position and where a time is unknown, else
    1 + floor(2 log2(1 + seconds)), at most `NUM_GAPS` - 1.

    Example:
        >>> from tfrs_pipeline.features.raw import relative_seconds
        >>> times = relative_seconds(np.array([[5.0, 5.0, 6.0, 9.0, np.nan, 7.0]]))
        >>> gap_buckets(tf.constant(times)).numpy()
        array([[0, 1, 3, 5, 0, 0]], dtype=int32)
    """
    buckets = _buckets(_elapsed(times[:, :-1], times[:, 1:]), is_large=is_large)
    return tf.pad(buckets, [[0, 0], [1, 0]])


def _elapsed(earlier: tf.Tensor, later: tf.Tensor) -> tf.Tensor:
    """Returns the seconds between times of any shape: int32, -1 where one is unknown."""
    is_known = (earlier != NO_TIME) & (later != NO_TIME)
    return tf.where(is_known, tf.maximum(later - earlier, 0), -1)  # A clock may go backwards.


def _buckets(seconds: tf.Tensor, *, is_large: bool) -> tf.Tensor:
    """Buckets seconds of any shape, as in `gap_buckets`: int32, 0 where unknown (-1)."""
    if is_large:  # The faster search, which LiteRT lacks.
        buckets = tf.searchsorted(_FIRST_SECONDS, tf.reshape(seconds, [-1]), side="right")
        return tf.reshape(buckets, tf.shape(seconds))
    is_reached = tf.expand_dims(seconds, -1) >= _FIRST_SECONDS
    return tf.reduce_sum(tf.cast(is_reached, tf.int32), axis=-1)


def drop_gaps(gaps: tf.Tensor, dropout: Dropout) -> tf.Tensor:
    """Makes some gaps unknown, and all gaps of some sequences."""
    shape = tf.shape(gaps)
    drawn = dropout.uniform(tf.stack([shape[0], shape[1] + 1]))
    is_kept = (drawn[:, :1] >= GAP_DROPOUT) & (drawn[:, 1:] >= GAP_DROPOUT)
    return tf.where(is_kept, gaps, 0)
