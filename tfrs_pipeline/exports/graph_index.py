"""Exact and ScaNN search as TensorFlow modules, for exported models.

They answer what a SavedModel can be asked: the best k that are not excluded. Filters and items that
change in service are the work of `candidates.py`.
"""

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.search.settings import Level

# The files of an index as ScaNN saves it, in the order in which its operation takes them. An index
# without partitions lacks the second and the third.
_FILES = [
    "scann_config.pb",
    "serialized_partitioner.pb",
    "datapoint_to_token.npy",
    "ah_codebook.pb",
    "hashed_dataset.npy",
]


def load_scann_ops() -> Any:
    """Imports ScaNN's TensorFlow ops, without which a ScaNN SavedModel cannot be loaded."""
    try:
        from scann import scann_ops
    except Exception as error:  # With another TensorFlow version, the op's loader fails.
        raise ImportError(
            "The ScaNN index needs the package scann, built for this TensorFlow "
            f"({tf.__version__}): pip install 'scann==1.4.2' with tensorflow 2.20, or use exact "
            f"search. The import said: {error}"
        ) from error
    return scann_ops


class ExactIndex(tf.Module):
    """Scores every candidate: `embeddings` are [num_candidates, D] float32."""

    def __init__(self, embeddings: np.ndarray) -> None:
        super().__init__(name="exact_index")
        self.embeddings = tf.Variable(embeddings, trainable=False, name="candidate_embeddings")

    def search(
        self, queries: tf.Tensor, k: tf.Tensor, excluded: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Finds the k best candidates of [B, D] queries: rows and scores, [B, k], best first.

        Rows are int32 from 1, in `excluded` [B, E] too; 0 is padding, or a slot of score -inf.
        """
        scores = tf.linalg.matmul(queries, self.embeddings, transpose_b=True)
        cells = tf.where(excluded > 0)
        columns = tf.cast(tf.gather_nd(excluded, cells), tf.int64) - 1
        lowest = tf.fill([tf.shape(cells)[0]], tf.constant(-np.inf, tf.float32))
        cells = tf.stack([cells[:, 0], columns], axis=1)
        scores = tf.tensor_scatter_nd_update(scores, cells, lowest)
        top_scores, columns = tf.math.top_k(scores, tf.minimum(k, tf.shape(scores)[1]))
        return _filled_up(columns + 1, top_scores, k)


class ScannIndex(tf.Module):
    """ScaNN's TensorFlow operation over the index in a folder; `exact` has the same vectors.

    The layer of TFRS, `tfrs.layers.factorized_top_k.ScaNN`, would build the index again, fixes k,
    and lacks the anisotropic hashing. What both share is how exclusions are answered: the operation
    finds as many more as a query excludes, and these are dropped. Each depth is searched as widely
    as `levels` say. Deeper requests, and queries left with too few, are answered by `exact`.
    """

    def __init__(self, exact: ExactIndex, folder: Path, levels: Sequence[Level]) -> None:
        super().__init__(name="scann_index")
        self._ops, self.exact, self.levels = load_scann_ops(), exact, tuple(levels)
        self.embeddings = exact.embeddings
        parts = [_part(folder / name) for name in _FILES]
        # The operation takes an int8 copy of the vectors too, which this index does not have.
        no_int8 = tf.constant(0, tf.int8), tf.constant(0.0), tf.constant(0.0)
        vectors = tf.constant(0.0)  # A placeholder: the vectors are stored once, in `exact`.
        self._state = self._ops.ScannState((*parts, *no_int8, vectors))
        self._state.dataset = exact.embeddings

    def approximate(
        self,
        queries: tf.Tensor,
        depth: tf.Tensor,
        num_leaves_to_search: tf.Tensor,
        num_reordered: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Finds roughly the `depth` best candidates: rows and scores as in `ExactIndex.search`."""
        searcher = self._ops.searcher_from_module(self._state)
        indices, scores = searcher.search_batched(
            queries,
            final_num_neighbors=depth,
            pre_reorder_num_neighbors=num_reordered,
            leaves_to_search=num_leaves_to_search,
        )
        # ScaNN pads with NaN where the searched leaves hold fewer candidates.
        scores = tf.where(tf.math.is_nan(scores), -np.inf, scores)
        return _filled_up(tf.cast(indices, tf.int32) + 1, scores, depth)

    def search(
        self, queries: tf.Tensor, k: tf.Tensor, excluded: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Finds roughly the k best candidates that are not excluded; see `ExactIndex.search`."""
        # All queries of a call are searched as widely as their longest list of exclusions needs.
        needed = k + tf.shape(excluded)[1]
        widths = tf.constant([astuple(level) for level in self.levels])
        level = tf.searchsorted(widths[:, 0], [needed])[0]
        depth, *others = tf.unstack(widths[tf.minimum(level, len(self.levels) - 1)])
        rows, scores = self.approximate(queries, depth, *others)
        scores = tf.where(_is_member(_as_lists(excluded), rows), -np.inf, scores)
        top_scores, order = tf.math.top_k(scores, tf.minimum(k, depth))
        rows, scores = _filled_up(tf.gather(rows, order, batch_dims=1), top_scores, k)
        # Queries beyond the last level, and those left with too few candidates.
        short = tf.where((rows[:, -1] == 0) | (needed > depth))
        exact_rows, exact_scores = self.exact.search(
            tf.gather_nd(queries, short), k, tf.gather(excluded, short[:, 0])
        )
        return (
            tf.tensor_scatter_nd_update(rows, short, exact_rows),
            tf.tensor_scatter_nd_update(scores, short, exact_scores),
        )


def search_with_bonuses(
    index: ExactIndex | ScannIndex,
    queries: tf.Tensor,
    k: tf.Tensor,
    excluded: tf.Tensor,
    rows: tf.Tensor,
    bonuses: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Searches as `ExactIndex.search`, with bonuses [B, R] on the scores of some candidates.

    These are `rows` [B, R], distinct, 0 in padding. They are scored exactly, and merged with the
    best of the others. A positive bonus does not leave its candidate out of the search: whatever is
    among the best with bonuses, but has none, is also among the best without.
    """
    is_worse = bonuses < 0
    # Without the other columns, since the index has to find as many more as `excluded` is wide.
    worse = tf.boolean_mask(tf.where(is_worse, rows, 0), tf.reduce_any(is_worse, axis=0), axis=1)
    others = index.search(queries, k, tf.concat([excluded, worse], axis=1))
    vectors = tf.gather(index.embeddings, tf.maximum(rows - 1, 0))
    scores = tf.linalg.matvec(vectors, queries) + bonuses
    is_open = (rows > 0) & ~_is_member(_as_lists(excluded), rows)
    # A candidate that the search found too counts with its bonus.
    is_twice = _is_member(_as_lists(rows), others[0])
    rows = tf.concat([tf.where(is_twice, 0, others[0]), rows], axis=1)
    scores = tf.concat(
        [tf.where(is_twice, -np.inf, others[1]), tf.where(is_open, scores, -np.inf)], axis=1
    )
    # Of equal scores, the smaller row comes first.
    order = tf.argsort(rows, axis=1)
    rows, scores = (tf.gather(values, order, batch_dims=1) for values in (rows, scores))
    top_scores, best = tf.math.top_k(scores, k)
    return _filled_up(tf.gather(rows, best, batch_dims=1), top_scores, k)


def _part(path: Path) -> tf.Tensor:
    """Reads a part of an index; to the operation, an empty scalar means that there is none."""
    is_array = path.suffix == ".npy"
    if not path.exists():
        return tf.constant(0) if is_array else tf.constant("")
    return tf.constant(np.load(path) if is_array else [path.read_bytes()])


def _filled_up(rows: tf.Tensor, scores: tf.Tensor, k: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Fills [B, <=k] rows and scores up to k, with row 0 wherever the score is -inf."""
    missing = [[0, 0], [0, k - tf.shape(rows)[1]]]
    rows = tf.pad(tf.where(scores > -np.inf, rows, 0), missing)
    return rows, tf.pad(scores, missing, constant_values=-np.inf)


def _as_lists(rows: tf.Tensor) -> tf.RaggedTensor:
    """Turns [B, E] rows into a sorted list for each line, without 0s and repeats."""
    ordered = tf.sort(tf.pad(rows, [[0, 0], [1, 0]]))
    return tf.ragged.boolean_mask(ordered[:, 1:], ordered[:, 1:] > ordered[:, :-1])


def _is_member(lists: tf.RaggedTensor, rows: tf.Tensor) -> tf.Tensor:
    """Marks the entries of line i of `rows`, [n, m] int32, that are in sorted list i: [n, m]."""
    # (list, value) pairs as one ascending sequence.
    pairs = lists.value_rowids() * 2**32 + tf.cast(lists.values, tf.int64)
    line = tf.range(tf.shape(rows, tf.int64)[0])[:, tf.newaxis]
    keys = tf.reshape(line * 2**32 + tf.cast(rows, tf.int64), [-1])
    position = tf.searchsorted(pairs, keys)
    padded = tf.concat([pairs, [-1]], axis=0)
    return tf.ensure_shape(
        tf.reshape(tf.gather(padded, position) == keys, tf.shape(rows)), rows.shape
    )
