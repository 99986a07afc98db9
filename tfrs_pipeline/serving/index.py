"""Search structures over candidate embeddings, as TensorFlow modules that can be exported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.evaluation.topk import exclude_rows_of, top_k_in_blocks
from tfrs_pipeline.retrieval import Query

logger = logging.getLogger(__name__)

IndexKind = Literal["auto", "scann", "exact"]

# Below this, scoring every candidate is as fast as any index, and exact.
SMALLEST_SCANN_CORPUS = 20_000
# Codes of a block.
_SMALLEST_HASHED_CORPUS = 16


def resolve_index_kind(kind: IndexKind, num_candidates: int) -> Literal["scann", "exact"]:
    """Chooses what "auto" means: exact search below 20,000 candidates, ScaNN from there on."""
    if kind != "auto":
        return kind
    chosen: Literal["scann", "exact"] = (
        "exact" if num_candidates < SMALLEST_SCANN_CORPUS else "scann"
    )
    logger.info("index: %s, for %d candidates", chosen, num_candidates)
    return chosen


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
            f"({tf.__version__}): pip install 'scann==1.4.2' with tensorflow 2.20, or use "
            f"index = 'exact'. The import said: {error}"
        ) from error
    return scann_ops


class ExactIndex(tf.Module):
    """Scores every candidate.

    Args:
        embeddings: [num_candidates, dim] float32.
    """

    def __init__(self, embeddings: np.ndarray) -> None:
        super().__init__(name="exact_index")
        self.embeddings = tf.Variable(embeddings, trainable=False, name="candidate_embeddings")
        self.num_candidates = len(embeddings)

    def scores(self, queries: tf.Tensor) -> tf.Tensor:
        """Scores queries, [B, dim], against all: [B, num_candidates] float32."""
        return tf.linalg.matmul(queries, self.embeddings, transpose_b=True)

    def search(self, queries: tf.Tensor, k: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Finds the k best candidates.

        Args:
            queries: [B, dim] float32.
            k: Scalar int32, at most num_candidates.

        Returns:
            places: [B, k] int32 from 0, best first, ties by the smaller place.
            scores: [B, k] float32.
        """
        scores, places = tf.math.top_k(self.scores(queries), k)
        return places, scores


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
        embeddings: [num_candidates, dim] float32.
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
        embeddings: [num_candidates, dim] float32.
        settings: How to build and search.

    Raises:
        ImportError: If ScaNN is missing.
        ValueError: If there are more leaves than candidates, or fewer than 16 candidates.
    """

    def __init__(self, embeddings: np.ndarray, settings: ScannSettings) -> None:
        super().__init__(name="scann_index")
        if settings.num_leaves > len(embeddings):
            raise ValueError(
                f"num_leaves must not exceed the {len(embeddings)} candidates. "
                f"Received: {settings.num_leaves}"
            )
        if len(embeddings) < _SMALLEST_HASHED_CORPUS:
            raise ValueError(
                f"ScaNN learns its hashing from {_SMALLEST_HASHED_CORPUS} candidates or more; use "
                f"index = 'exact'. Received: {len(embeddings)} candidates"
            )
        self._ops = load_scann_ops()
        self.settings = settings
        self.num_candidates = len(embeddings)
        searcher = build_searcher(self._ops.builder, embeddings, settings)
        self._state = searcher.serialize_to_module()
        # Searches load the state; the builder's own copy of it would stay for good.
        tf.raw_ops.DestroyResourceOp(resource=searcher.searcher_handle)

    def search(
        self,
        queries: tf.Tensor,
        k: tf.Tensor,
        num_leaves_to_search: tf.Tensor | int | None = None,
        num_reordered: tf.Tensor | int | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Finds about the k best candidates.

        Args:
            queries: [B, dim] float32.
            k: Scalar int32.
            num_leaves_to_search: Scalar int32, instead of the setting's.
            num_reordered: Scalar int32, instead of the setting's; k at least.

        Returns:
            places: [B, <=k] int32 from 0, best first; what stands in an empty slot means nothing.
            scores: [B, <=k] float32, -inf in empty slots.
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
        return places, scores

    def describe(self) -> dict[str, Any]:
        """Returns the settings, for the manifest."""
        return asdict(self.settings)


def index_recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Computes the mean share of the exact top k that an approximate search found.

    Args:
        found: [num_queries, any] places; -1 is an empty slot and never a hit.
        exact: [num_queries, k] places from 0.
    """
    hits = [len(np.intersect1d(a, b)) for a, b in zip(found, exact, strict=True)]
    return float(np.mean(hits)) / exact.shape[1]


class IndexRetriever:
    """A `Retriever` over an index in this process: a model that is still training, a trial.

    Args:
        index: Over the embeddings of the candidates.
        exact: Over the same; answers where the index finds fewer than there are.
        candidate_ids: [num_candidates] distinct ids, in the order of the embeddings.
        query_fn: The query tower: queries -> [num_queries, dim] float32.
    """

    def __init__(
        self,
        index: ExactIndex | ScannIndex,
        exact: ExactIndex,
        candidate_ids: Collection[Any] | np.ndarray,
        query_fn: Callable[[Sequence[Query]], np.ndarray],
    ) -> None:
        self.corpus = Ids(candidate_ids)
        self._exact = exact
        self._query_fn = query_fn
        self._search = tf.function(
            index.search,
            input_signature=[tf.TensorSpec([None, None], tf.float32), tf.TensorSpec([], tf.int32)],
        )

    def retrieve(
        self,
        queries: Sequence[Query],
        k: int,
        exclude: Sequence[Collection[Any]] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Retrieves the k best candidates of each query; see `Retriever.retrieve`."""
        if k < 1:
            raise ValueError(f"k must be 1 or more. Received: k={k}.")
        excluded = exclude_rows_of(self.corpus, queries, exclude)
        if excluded is None:
            excluded = [np.zeros(0, np.int32)] * len(queries)
        rows = np.zeros((len(queries), k), np.int32)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        if not len(queries):
            return self.corpus.take(rows), scores
        embeddings = self._query_fn(queries)
        depth = min(k + max(map(len, excluded)), len(self.corpus))
        places, found_scores = (x.numpy() for x in self._search(embeddings, depth))
        found = places + 1
        if exclude is None and np.isfinite(found_scores).all():
            rows[:, :depth], scores[:, :depth] = found, found_scores
            return self.corpus.take(rows), scores
        short = []
        for i, left_out in enumerate(excluded):
            is_good = (found_scores[i] > -np.inf) & ~np.isin(found[i], left_out)
            slots = np.flatnonzero(is_good)[:k]
            if len(slots) < min(k, len(self.corpus) - len(left_out)):
                short.append(i)
                continue
            rows[i, : len(slots)] = found[i][slots]
            scores[i, : len(slots)] = found_scores[i][slots]
        if short:
            rows[short], scores[short] = top_k_in_blocks(
                lambda block: self._exact.scores(embeddings[short][block]).numpy(),
                len(short),
                len(self.corpus),
                k,
                [excluded[i] for i in short],
            )
        return self.corpus.take(rows), scores
