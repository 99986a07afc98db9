"""Exact and ScaNN search and the item filter as TensorFlow modules, for the exported model."""

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfrs_pipeline.batches.hard import is_member
from tfrs_pipeline.features.categorical import lower_booleans
from tfrs_pipeline.features.raw import has_booleans, to_text_lists
from tfrs_pipeline.model.graph import lookup, row_table, stored
from tfrs_pipeline.serving.candidates import FilterValues
from tfrs_pipeline.serving.index import Level
from tfrs_pipeline.serving.searcher import FILES, Saved


class Allowed(NamedTuple):
    """Which candidates each query may find: those that have one of its values."""

    is_chosen: tf.Tensor  # [B, num_codes] bool; code 0 means no value.
    codes: tf.Tensor  # [num_candidates + 1, P] int32, the values of each row, padded with 0.
    share: tf.Tensor  # [B] float32, rough share of the candidates that may be found.

    def of_queries(self, lines: tf.Tensor) -> "Allowed":
        """Takes the queries with the numbers `lines`, [b]."""
        return Allowed(tf.gather(self.is_chosen, lines), self.codes, tf.gather(self.share, lines))

    def has(self, rows: tf.Tensor) -> tf.Tensor:
        """Returns which rows, [B, n], each query may find: [B, n] bool."""
        codes = tf.gather(self.codes, rows)
        return tf.reduce_any(tf.gather(self.is_chosen, codes, batch_dims=1), axis=2)

    def has_all(self) -> tf.Tensor:
        """Returns which candidates each query may find: [B, num_candidates] bool."""
        # One list position at a time: all at once would take P times the memory.
        places = tf.unstack(self.codes[1:], axis=1)
        is_allowed = tf.gather(self.is_chosen, places[0], axis=1)
        for place in places[1:]:
            is_allowed |= tf.gather(self.is_chosen, place, axis=1)
        return is_allowed


class ItemFilter(tf.Module):
    """Values by which a request may choose items; None and "" mean that an item has none."""

    def __init__(self, name: str, column: Sequence[Any]) -> None:
        super().__init__(name="item_filter")
        values = sorted(set(to_text_lists(column)[0].to_pylist()))
        self._column, self._values = name, tuple(values)
        codes = FilterValues(values, np.zeros(0, np.int32)).encode(column)
        self._table = row_table(np.array(values, object))
        self._codes = stored(np.pad(codes, [[1, 0], [0, 0]]))
        shares = np.bincount(codes.ravel(), minlength=len(values) + 1) / max(1, len(codes))
        self._shares = tf.constant(np.where(np.arange(len(shares)), shares, 0), tf.float32)

    def describe(self) -> dict[str, Any]:
        """Returns the column's name and its distinct values, for the manifest."""
        return {"name": self._column, "values": list(self._values)}

    def choose(self, allowed: tf.Tensor) -> Allowed:
        """Finds candidates with one of the `allowed` values, [B, F]; an empty row allows all."""
        if has_booleans(self._values):
            allowed = lower_booleans(allowed)
        codes = lookup(self._table, allowed)
        num_codes = len(self._values) + 1
        is_chosen = tf.math.bincount(
            codes, minlength=num_codes, maxlength=num_codes, axis=-1, binary_output=True
        )
        # Code 0 is padding or an unknown value, which nobody chooses.
        is_chosen = (is_chosen > 0) & (tf.range(num_codes) > 0)
        # This counts candidates with two of the values twice.
        share = tf.reduce_sum(tf.where(is_chosen, self._shares, 0), axis=1)
        is_any = tf.reduce_all(allowed == "", axis=1)
        share = tf.where(is_any, 1.0, tf.minimum(share, 1))
        return Allowed(is_chosen | is_any[:, tf.newaxis], self._codes, share)


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
        self.num_candidates = len(embeddings)

    def search(
        self, queries: tf.Tensor, k: tf.Tensor, excluded: tf.Tensor, allowed: Allowed | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Finds the k best candidates of [B, D] queries: rows and scores, [B, k], best first.

        Rows are int32 from 1, in `excluded` [B, E] too; 0 is padding, or a slot of score -inf.
        """
        scores = tf.linalg.matmul(queries, self.embeddings, transpose_b=True)
        if allowed is not None:
            scores = tf.where(allowed.has_all(), scores, -np.inf)
        cells = tf.where(excluded > 0)
        columns = tf.cast(tf.gather_nd(excluded, cells), tf.int64) - 1
        lowest = tf.fill([tf.shape(cells)[0]], tf.constant(-np.inf, tf.float32))
        cells = tf.stack([cells[:, 0], columns], axis=1)
        scores = tf.tensor_scatter_nd_update(scores, cells, lowest)
        top_scores, places = tf.math.top_k(scores, tf.minimum(k, self.num_candidates))
        return _filled_up(places + 1, top_scores, k)


class SavedIndex(tf.Module):
    """A saved ScaNN index in variables, from which ScaNN's operation makes a searcher."""

    def __init__(self, vectors: tf.Variable, saved: Saved) -> None:
        super().__init__(name="saved_index")
        self._ops = load_scann_ops()
        self._vectors = vectors
        for file in FILES:
            # To the operation, a scalar means that the index lacks this part.
            content: Any = saved.get(file, 0 if file.endswith(".npy") else b"")
            if file in saved and isinstance(content, bytes):
                content = [content]
            dtype = None if file in saved or isinstance(content, bytes) else tf.int32
            setattr(self, _variable(file), stored(tf.constant(content, dtype)))

    @tf.function(input_signature=[])
    def recreate_handle(self) -> tf.Tensor:
        """Returns the handle of a searcher, made at the first call."""
        config, codebook, partitioner, tokens, hashed = (
            getattr(self, _variable(file)) for file in FILES
        )
        no_int8 = tf.constant(0, tf.int8), *2 * [tf.constant(0, tf.float32)]
        return self._ops.tensors_to_scann(
            self._vectors, config, partitioner, tokens, codebook, hashed, *no_int8
        )


def read_saved_index(folder: Path) -> Saved:
    """Reads the index of a SavedModel, without ScaNN's operation."""
    saved: dict[str, np.ndarray | bytes] = {}
    for file in FILES:
        value = _saved_value(folder, f"_index/_state/{_variable(file)}")
        if np.ndim(value):
            saved[file] = value if file.endswith(".npy") else value[0]
    return saved


def read_saved_codes(folder: Path) -> np.ndarray:
    """Reads the codes of each candidate in the item filter of a SavedModel: [n, P] int32."""
    return np.asarray(_saved_value(folder, "_item_filter/_codes")[1:])  # Row 0 is the empty slot.


def _saved_value(folder: Path, variable: str) -> Any:
    reader = tf.train.load_checkpoint(str(folder / "variables" / "variables"))
    return reader.get_tensor(f"{variable}/.ATTRIBUTES/VARIABLE_VALUE")


def _variable(file: str) -> str:
    return file.partition(".")[0]


class ScannIndex(tf.Module):
    """An approximate index: partitions, asymmetric hashing, exact rescoring of the best.

    `levels` are sorted by depth, ascending; `exact` answers deeper requests.
    """

    def __init__(self, exact: ExactIndex, saved: Saved, levels: Sequence[Level]) -> None:
        super().__init__(name="scann_index")
        self._ops = load_scann_ops()
        self.exact = exact
        self.levels = tuple(levels)
        self._state = SavedIndex(exact.embeddings, saved)

    def approximate(
        self,
        queries: tf.Tensor,
        depth: tf.Tensor,
        num_leaves_to_search: tf.Tensor,
        num_reordered: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Finds roughly the `depth` best candidates: rows and scores as in `ExactIndex.search`."""
        searcher = self._ops.searcher_from_module(self._state)
        places, scores = searcher.search_batched(
            queries,
            final_num_neighbors=depth,
            pre_reorder_num_neighbors=num_reordered,
            leaves_to_search=num_leaves_to_search,
        )
        # ScaNN pads with NaN where the searched leaves hold fewer candidates.
        scores = tf.where(tf.math.is_nan(scores), -np.inf, scores)
        return _filled_up(tf.cast(places, tf.int32) + 1, scores, depth)

    def search(
        self, queries: tf.Tensor, k: tf.Tensor, excluded: tf.Tensor, allowed: Allowed | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Finds roughly the k best candidates that are not excluded; see `ExactIndex.search`."""
        lists = _as_lists(excluded)
        num_excluded = tf.cast(lists.row_lengths(), tf.int32)
        num_wanted = tf.minimum(k, self.exact.num_candidates - num_excluded)
        needed = tf.cast(num_wanted + num_excluded, tf.float32)
        if allowed is not None:
            # With three standard deviations more, there are nearly always enough allowed ones.
            needed = (needed + 3 * tf.sqrt(needed)) / allowed.share
        # A number past the last level means exact search.
        level = tf.searchsorted(tf.constant([x.depth for x in self.levels], tf.float32), needed)
        # All queries within the levels are searched as widely as the one that needs most.
        lines = tf.where(level < len(self.levels))
        widest = tf.reduce_max(tf.where(level < len(self.levels), level, 0))
        shape = tf.stack([tf.shape(queries)[0], k])
        rows = tf.zeros(shape, tf.int32)
        scores = tf.fill(shape, tf.constant(-np.inf, tf.float32))

        def approximately() -> tuple[tf.Tensor, tf.Tensor]:
            widths = [astuple(each) for each in self.levels]
            width = tf.unstack(tf.constant(widths, tf.int32, [len(widths), 3])[widest])
            found, found_scores = self.approximate(tf.gather_nd(queries, lines), *width)
            is_dropped = is_member(tf.gather(lists, lines[:, 0]), found)
            if allowed is not None:
                is_dropped |= ~allowed.of_queries(lines[:, 0]).has(found)
            left = tf.where(is_dropped, -np.inf, found_scores)
            top_scores, order = tf.math.top_k(left, tf.minimum(k, tf.shape(left)[1]))
            best = _filled_up(tf.gather(found, order, batch_dims=1), top_scores, k)
            return (
                tf.tensor_scatter_nd_update(rows, lines, best[0]),
                tf.tensor_scatter_nd_update(scores, lines, best[1]),
            )

        rows, scores = tf.cond(tf.size(lines) > 0, approximately, lambda: (rows, scores))
        # Exact search answers queries beyond the last level and those left with too few candidates.
        short = tf.where(tf.math.count_nonzero(rows, axis=1, dtype=tf.int32) < num_wanted)
        chosen = None if allowed is None else allowed.of_queries(short[:, 0])
        exact_rows, exact_scores = self.exact.search(
            tf.gather_nd(queries, short), k, tf.gather(excluded, short[:, 0]), chosen
        )
        return (
            tf.tensor_scatter_nd_update(rows, short, exact_rows),
            tf.tensor_scatter_nd_update(scores, short, exact_scores),
        )


def _filled_up(rows: tf.Tensor, scores: tf.Tensor, k: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Fills [B, <=k] rows and scores up to k, with row 0 wherever the score is -inf."""
    missing = [[0, 0], [0, k - tf.shape(rows)[1]]]
    rows = tf.pad(tf.where(scores > -np.inf, rows, 0), missing)
    return rows, tf.pad(scores, missing, constant_values=-np.inf)


def _as_lists(rows: tf.Tensor) -> tf.RaggedTensor:
    """Turns [B, E] rows into a sorted list for each line, without 0s and repeats."""
    ordered = tf.sort(tf.pad(rows, [[0, 0], [1, 0]]))
    return tf.ragged.boolean_mask(ordered[:, 1:], ordered[:, 1:] > ordered[:, :-1])
