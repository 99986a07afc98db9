"""Exact and ScaNN search over candidate embeddings, as TensorFlow modules for an export."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import tensorflow as tf

from tfrs_pipeline.batches.guard import is_member
from tfrs_pipeline.serving.item_filter import Allowed

# Below this, exact search is as fast as any index.
SMALLEST_SCANN_CORPUS = 20_000
# Below this, looking up the nearest leaves costs more than it saves.
SMALLEST_PARTITIONED_CORPUS = 10_000
# Codes per block.
_SMALLEST_HASHED_CORPUS = 16
# With two dimensions per block, a deep search has to rescore several times as many.
_DIMENSIONS_PER_BLOCK, _ANISOTROPIC_THRESHOLD = 1, 0.2
_TRAINING_SAMPLE = 100_000


@dataclass(frozen=True)
class Exact:
    """Exact search: scores every candidate, in time proportional to their number."""

    kind: Literal["exact"] = "exact"


@dataclass(frozen=True)
class Scann:
    """A ScaNN index, tuned to reach a recall target with the least work.

    The target holds for every k and any number of excluded candidates: each query is searched as
    widely as its own request needs, or exactly if that is less work.

    Args:
        recall: Recall target: the share of the exact answer that must be found, in (0, 1].

    Raises:
        ValueError: If the target is out of range.
    """

    recall: float = 0.98
    kind: Literal["scann"] = "scann"

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise ValueError(f"recall must be in (0, 1]. Received: {self.recall}")


@dataclass(frozen=True)
class Auto:
    """Exact search below 20,000 candidates, else `Scann`; each refresh chooses again.

    Args:
        recall: Recall target of a ScaNN index, in (0, 1].

    Raises:
        ValueError: If the target is out of range.
    """

    recall: float = Scann.recall
    kind: Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        Scann(self.recall)  # Checks the target, which a small corpus would never use.

    def choose(self, num_candidates: int) -> Scann | Exact:
        """Chooses by the size of a corpus."""
        return Exact() if num_candidates < SMALLEST_SCANN_CORPUS else Scann(self.recall)


Search: TypeAlias = Exact | Scann | Auto
"""How to search."""


def search_of(kind: str, recall: float = Scann.recall) -> Search:
    """Returns the `Search` of a `kind`; exact search has no recall target."""
    return Exact() if kind == "exact" else {"scann": Scann, "auto": Auto}[kind](recall)


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

    @property
    def exact(self) -> "ExactIndex":
        """The exact search over the same candidates: this index itself."""
        return self

    def search(
        self, queries: tf.Tensor, k: tf.Tensor, excluded: tf.Tensor, allowed: Allowed | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Finds the k best candidates of [B, D] queries: rows and scores, [B, k], best first.

        Rows are int32 from 1, in `excluded` [B, E] too; 0 is padding, or an empty slot with the
        score -inf.
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


@dataclass(frozen=True)
class Level:
    """How widely to search if k plus the number of excluded candidates is at most `depth`."""

    depth: int
    num_leaves_to_search: int
    num_reordered: int


def num_leaves_of(num_candidates: int) -> int:
    """Returns the number of partitions of an index; 1 means none."""
    if num_candidates < SMALLEST_PARTITIONED_CORPUS:
        return 1
    # ScaNN advises the square root. Four times that makes smaller leaves, so fewer candidates have
    # to be searched.
    return 4 * round(math.sqrt(num_candidates))


def build_searcher(builder: Callable[..., Any], embeddings: np.ndarray, num_leaves: int) -> Any:
    """Builds a dot-product searcher with ScaNN's builder; each search sets its own width."""
    sample = min(len(embeddings), _TRAINING_SAMPLE)
    configured = builder(embeddings, 1, "dot_product")
    if num_leaves > 1:
        configured = configured.tree(
            num_leaves=num_leaves,
            num_leaves_to_search=num_leaves,
            training_sample_size=sample,
            min_partition_size=1,
        )
    hashed = configured.score_ah(
        _DIMENSIONS_PER_BLOCK,
        anisotropic_quantization_threshold=_ANISOTROPIC_THRESHOLD,
        training_sample_size=sample,
    )
    return hashed.reorder(1).build()


class ScannIndex(tf.Module):
    """An approximate index: partitions, asymmetric hashing, exact rescoring of the best.

    `levels` are sorted by depth, ascending; `exact` answers deeper requests.
    """

    # Uses `scann_ops.builder`, because the layer of TensorFlow Recommenders has neither the
    # anisotropic threshold nor settings for each search.
    def __init__(
        self, exact: ExactIndex, num_leaves: int | None = None, levels: Sequence[Level] = ()
    ) -> None:
        super().__init__(name="scann_index")
        self.num_leaves = num_leaves_of(exact.num_candidates) if num_leaves is None else num_leaves
        if exact.num_candidates < _SMALLEST_HASHED_CORPUS:
            raise ValueError(
                f"ScaNN learns its hashing from {_SMALLEST_HASHED_CORPUS} candidates or more: take "
                f"the exact index. Received: {exact.num_candidates} candidates"
            )
        self._ops = load_scann_ops()
        self.exact = exact
        self.levels = tuple(levels)
        self.num_candidates = exact.num_candidates
        searcher = build_searcher(self._ops.builder, exact.embeddings.numpy(), self.num_leaves)
        self._state = searcher.serialize_to_module()
        # Searches load the state; the builder's own copy would never be freed.
        tf.raw_ops.DestroyResourceOp(resource=searcher.searcher_handle)

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
        num_wanted = tf.minimum(k, self.num_candidates - num_excluded)
        level = self._levels_of(num_wanted + num_excluded, allowed)
        # Levels without a query cost nothing.
        present = tf.unique(tf.boolean_mask(level, level < len(self.levels))).y

        def search_next(
            number: tf.Tensor, rows: tf.Tensor, scores: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            lines = tf.where(level == present[number])
            found, found_scores = self._search_level(
                present[number], queries, k, lists, allowed, lines
            )
            return (
                number + 1,
                tf.tensor_scatter_nd_update(rows, lines, found),
                tf.tensor_scatter_nd_update(scores, lines, found_scores),
            )

        empty = tf.stack([tf.shape(queries)[0], k])
        _, rows, scores = tf.while_loop(
            lambda number, *_: number < tf.size(present),
            search_next,
            (0, tf.zeros(empty, tf.int32), tf.fill(empty, tf.constant(-np.inf, tf.float32))),
            shape_invariants=(tf.TensorShape([]), *2 * [tf.TensorShape([None, None])]),
            parallel_iterations=1,
        )
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

    def _search_level(
        self,
        level: tf.Tensor,
        queries: tf.Tensor,
        k: tf.Tensor,
        excluded: tf.RaggedTensor,
        allowed: Allowed | None,
        lines: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Searches the queries numbered `lines` [b, 1] at a level: rows and scores [b, k]."""
        widths = [(x.depth, x.num_leaves_to_search, x.num_reordered) for x in self.levels]
        settings = tf.constant(widths, tf.int32, [len(widths), 3])
        found, scores = self.approximate(tf.gather_nd(queries, lines), *tf.unstack(settings[level]))
        is_dropped = is_member(tf.gather(excluded, lines[:, 0]), found)
        if allowed is not None:
            is_dropped |= ~allowed.of_queries(lines[:, 0]).has(found)
        left = tf.where(is_dropped, -np.inf, scores)
        top_scores, order = tf.math.top_k(left, tf.minimum(k, tf.shape(left)[1]))
        return _filled_up(tf.gather(found, order, batch_dims=1), top_scores, k)

    def _levels_of(self, depth: tf.Tensor, allowed: Allowed | None) -> tf.Tensor:
        """Returns each query's level, [B]; a number past the last level means exact search."""
        needed = tf.cast(depth, tf.float32)
        if allowed is not None:
            # So many candidates nearly always include enough allowed ones: three deviations more.
            needed = (needed + 3 * tf.sqrt(needed)) / allowed.share
        return tf.searchsorted(tf.constant([x.depth for x in self.levels], tf.float32), needed)


def _filled_up(rows: tf.Tensor, scores: tf.Tensor, k: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Fills [B, <=k] rows and scores up to k, with row 0 wherever the score is -inf."""
    missing = [[0, 0], [0, k - tf.shape(rows)[1]]]
    rows = tf.pad(tf.where(scores > -np.inf, rows, 0), missing)
    return rows, tf.pad(scores, missing, constant_values=-np.inf)


def _as_lists(rows: tf.Tensor) -> tf.RaggedTensor:
    """Turns [B, E] rows into a sorted list for each line, without 0s and repeats."""
    lines = tf.where(rows > 0)
    pairs = lines[:, 0] * 2**32 + tf.cast(tf.gather_nd(rows, lines), tf.int64)
    pairs = tf.sort(tf.unique(pairs).y)
    values, num_lines = tf.cast(pairs % 2**32, tf.int32), tf.shape(rows, tf.int64)[0]
    return tf.RaggedTensor.from_value_rowids(values, pairs // 2**32, num_lines, validate=False)
