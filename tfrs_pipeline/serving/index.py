"""Search over candidate embeddings: exact or by ScaNN, as TensorFlow modules that are exported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tensorflow as tf

# Below this, scoring every candidate is as fast as any index, and exact.
SMALLEST_SCANN_CORPUS = 20_000
# Codes of a block.
_SMALLEST_HASHED_CORPUS = 16
_QUERIES_PER_CALL = 256


@dataclass(frozen=True)
class Exact:
    """Exact search: every candidate is scored. Its time grows with the number of candidates."""

    kind: Literal["exact"] = "exact"


@dataclass(frozen=True)
class Scann:
    """A ScaNN index, tuned to find a share of the exact top k at the least work.

    Args:
        recall: Recall target: share of the exact top k that it must find, in (0, 1].
        k: How many candidates are asked for in service: an index that is tuned at 100 finds far
            less of the top 500.
    """

    recall: float = 0.98
    k: int = 100
    kind: Literal["scann"] = "scann"

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise ValueError(f"recall must be in (0, 1]. Received: {self.recall}")
        if self.k < 1:
            raise ValueError(f"k must be 1 or more. Received: {self.k}")


def index_for(num_candidates: int, recall: float = Scann.recall) -> Scann | Exact:
    """Chooses what suits a corpus: exact search below 20,000 candidates, ScaNN from there on."""
    return Exact() if num_candidates < SMALLEST_SCANN_CORPUS else Scann(recall)


def load_scann_ops() -> Any:
    """Imports ScaNN's TensorFlow ops, which a ScaNN SavedModel needs before it is loaded.

    Raises:
        ImportError: If the package is missing or does not fit the TensorFlow in use.
    """
    try:
        from scann import scann_ops
    except Exception as error:  # A TensorFlow of another version fails in the loader.
        raise ImportError(
            "The ScaNN index needs the package scann, built for this TensorFlow "
            f"({tf.__version__}): pip install 'scann==1.4.2' with tensorflow 2.20, or use exact "
            f"search. The import said: {error}"
        ) from error
    return scann_ops


class ExactIndex(tf.Module):
    """Scores every candidate.

    Args:
        embeddings: [num_candidates, D] float32.
    """

    def __init__(self, embeddings: np.ndarray) -> None:
        super().__init__(name="exact_index")
        self.embeddings = tf.Variable(embeddings, trainable=False, name="candidate_embeddings")
        self.num_candidates = len(embeddings)

    @property
    def exact(self) -> ExactIndex:
        """Itself; of an approximate index, the exact search beside it."""
        return self

    def search(
        self,
        queries: tf.Tensor,
        k: tf.Tensor,
        excluded: tf.Tensor,
        is_allowed: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Finds the k best candidates that are not excluded.

        Args:
            queries: [B, D] float32.
            k: Scalar int32, 1 or more; may exceed the corpus.
            excluded: [B, E] int32 rows never to be found for a query, from 1; 0 is padding.
            is_allowed: [B, num_candidates] bool, which candidates may be found; None is all.

        Returns:
            rows: [B, k] int32 from 1, best first, ties by the smaller row; 0 in empty slots.
            scores: [B, k] float32, -inf in empty slots.
        """
        scores = tf.linalg.matmul(queries, self.embeddings, transpose_b=True)
        if is_allowed is not None:
            scores = tf.where(is_allowed, scores, -np.inf)
        cells = tf.where(excluded > 0)
        columns = tf.cast(tf.gather_nd(excluded, cells), tf.int64) - 1
        lowest = tf.fill([tf.shape(cells)[0]], tf.constant(-np.inf, tf.float32))
        cells = tf.stack([cells[:, 0], columns], axis=1)
        scores = tf.tensor_scatter_nd_update(scores, cells, lowest)
        top_scores, places = tf.math.top_k(scores, tf.minimum(k, self.num_candidates))
        return _filled_up(places + 1, top_scores, k)


@dataclass(frozen=True)
class ScannSettings:
    """How a ScaNN index is built and searched.

    Args:
        num_leaves: Partitions of the corpus; 1 is none.
        num_leaves_to_search: Of them, searched for each query.
        num_reordered: Candidates rescored exactly.
        dimensions_per_block: Of the asymmetric hashing.
        anisotropic_threshold: Of the hashing (Guo et al., ICML 2020).
    """

    num_leaves: int
    num_leaves_to_search: int
    num_reordered: int
    dimensions_per_block: int = 2
    anisotropic_threshold: float = 0.2


def build_searcher(
    builder: Callable[..., Any], embeddings: np.ndarray, settings: ScannSettings
) -> Any:
    """Builds a searcher of dot products as the settings say.

    Args:
        builder: ScaNN's: `scann_ops.builder`, or `scann_ops_pybind.builder` outside TensorFlow.
        embeddings: [num_candidates, D] float32.
        settings: How to build.
    """
    sample = min(len(embeddings), 100_000)
    configured = builder(embeddings, settings.num_reordered, "dot_product")
    if settings.num_leaves > 1:
        configured = configured.tree(
            num_leaves=settings.num_leaves,
            num_leaves_to_search=settings.num_leaves_to_search,
            training_sample_size=sample,
            min_partition_size=1,
        )
    hashed = configured.score_ah(
        settings.dimensions_per_block,
        anisotropic_quantization_threshold=settings.anisotropic_threshold,
        training_sample_size=sample,
    )
    return hashed.reorder(settings.num_reordered).build()


class ScannIndex(tf.Module):
    """An approximate index: partitions, asymmetric hashing, exact rescoring of the best.

    Built on `scann_ops.builder`: the layer of TensorFlow Recommenders has neither the anisotropic
    threshold nor settings that can be given with a search.

    Args:
        exact: Exact search over the candidates: the fallback where the index finds too few, and
            for filters.
        settings: How to build and search.

    Raises:
        ImportError: If ScaNN is missing.
        ValueError: If there are more leaves than candidates, or fewer than 16 candidates.
    """

    def __init__(self, exact: ExactIndex, settings: ScannSettings) -> None:
        super().__init__(name="scann_index")
        if settings.num_leaves > exact.num_candidates:
            raise ValueError(
                f"num_leaves must not exceed the {exact.num_candidates} candidates. "
                f"Received: {settings.num_leaves}"
            )
        if exact.num_candidates < _SMALLEST_HASHED_CORPUS:
            raise ValueError(
                f"ScaNN learns its hashing from {_SMALLEST_HASHED_CORPUS} candidates or more: take "
                f"the exact index. Received: {exact.num_candidates} candidates"
            )
        self._ops = load_scann_ops()
        self.exact = exact
        self.settings = settings
        self.num_candidates = exact.num_candidates
        searcher = build_searcher(self._ops.builder, exact.embeddings.numpy(), settings)
        self._state = searcher.serialize_to_module()
        # Searches load the state; the builder's own copy of it would stay for good.
        tf.raw_ops.DestroyResourceOp(resource=searcher.searcher_handle)

    def approximate(
        self,
        queries: tf.Tensor,
        k: tf.Tensor,
        num_leaves_to_search: tf.Tensor | int | None = None,
        num_reordered: tf.Tensor | int | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Finds about the k best candidates, and fewer where the searched leaves hold fewer.

        Args:
            queries: [B, D] float32.
            k: Scalar int32, at most num_candidates.
            num_leaves_to_search: Scalar int32, instead of the setting's.
            num_reordered: Scalar int32, instead of the setting's; k at least.

        Returns:
            rows: [B, k] int32 from 1, best first; 0 in empty slots.
            scores: [B, k] float32, -inf in empty slots.
        """
        searcher = self._ops.searcher_from_module(self._state)
        leaves = num_leaves_to_search
        if leaves is None:
            leaves = self.settings.num_leaves_to_search
        reordered = self.settings.num_reordered if num_reordered is None else num_reordered

        def search() -> tuple[tf.Tensor, tf.Tensor]:
            places, scores = searcher.search_batched(
                queries,
                final_num_neighbors=k,
                pre_reorder_num_neighbors=tf.maximum(k, reordered),
                leaves_to_search=leaves,
            )
            return tf.cast(places, tf.int32), scores

        # ScaNN fails on a batch of no queries.
        places, scores = tf.cond(
            tf.shape(queries)[0] > 0,
            search,
            lambda: (tf.zeros([0, k], tf.int32), tf.zeros([0, k], tf.float32)),
        )
        # ScaNN pads with NaN where the searched leaves hold fewer than k candidates.
        scores = tf.where(tf.math.is_nan(scores), -np.inf, scores)
        return _filled_up(places + 1, scores, k)

    def search(
        self,
        queries: tf.Tensor,
        k: tf.Tensor,
        excluded: tf.Tensor,
        is_allowed: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Finds about the k best candidates that are not excluded; see `ExactIndex.search`.

        More are fetched and the excluded dropped; a query for which too few are left, and every
        filtered one, is answered by exact search.
        """
        if is_allowed is not None:
            return self.exact.search(queries, k, excluded, is_allowed)
        excluded = tf.sort(excluded, axis=1)
        num_excluded = _num_distinct(excluded)
        # The maximum of no queries is the lowest int32.
        most_excluded = tf.maximum(tf.reduce_max(num_excluded), 0)
        rows, scores = self.approximate(queries, tf.minimum(k + most_excluded, self.num_candidates))
        scores = tf.where(_is_in_sorted(rows, excluded), -np.inf, scores)
        top_scores, order = tf.math.top_k(scores, tf.minimum(k, tf.shape(scores)[1]))
        rows, scores = _filled_up(tf.gather(rows, order, batch_dims=1), top_scores, k)
        num_found = tf.math.count_nonzero(rows, axis=1, dtype=tf.int32)
        short = tf.where(num_found < tf.minimum(k, self.num_candidates - num_excluded))
        exact_rows, exact_scores = self.exact.search(
            tf.gather(queries, short[:, 0]), k, tf.gather(excluded, short[:, 0])
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


def _num_distinct(rows: tf.Tensor) -> tf.Tensor:
    """Counts each line's distinct rows above 0; `rows` is sorted, [B, E] -> [B]."""
    first = tf.concat([tf.ones_like(rows[:, :1], tf.bool), rows[:, 1:] != rows[:, :-1]], axis=1)
    return tf.reduce_sum(tf.cast(first & (rows > 0), tf.int32), axis=1)


def _is_in_sorted(rows: tf.Tensor, sorted_rows: tf.Tensor) -> tf.Tensor:
    """Tells which of `rows` [B, n] are in the same line of `sorted_rows` [B, E]."""
    # A last column that equals nothing keeps the lookup in range, also when E is 0.
    last = tf.fill([tf.shape(rows)[0], 1], tf.int32.max)
    lines = tf.concat([sorted_rows, last], axis=1)
    return tf.gather(lines, tf.searchsorted(lines, rows), batch_dims=1) == rows


def index_recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Computes the mean share of the exact top k that an approximate search found.

    Args:
        found: [num_queries, any] rows; 0 is an empty slot and never a hit.
        exact: [num_queries, k] rows from 1.
    """
    hits = [len(np.intersect1d(a, b)) for a, b in zip(found, exact, strict=True)]
    return float(np.mean(hits)) / exact.shape[1]
