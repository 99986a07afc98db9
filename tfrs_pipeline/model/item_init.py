"""Initial item embeddings from a singular value decomposition (SVD) of the clicks."""

from pathlib import Path

import numpy as np
import scipy.sparse
import tensorflow as tf
from scipy.sparse.linalg import LinearOperator, eigsh
from threadpoolctl import threadpool_limits

from tfrs_pipeline.cluster import this_worker
from tfrs_pipeline.model.distribution import on_chief
from tfrs_pipeline.model.network import TwoTowerNetwork
from tfrs_pipeline.model.towers import Tower
from tfrs_pipeline.samples.store import RowLists
from tfrs_pipeline.settings import refuse

# Chosen on validation: docs/explanation/tried.md.
_EXPONENT = 0.4


def item_factors(clicked: RowLists, num_items: int, dim: int) -> np.ndarray:
    """Computes factors of items, which are close for items that the same users clicked.

    Factors are V S^2, scaled to a mean length of 1 over the items with clicks. U S V^T is the
    truncated singular value decomposition of the matrix, users by items, of
    1 / (clicks of the user * clicks of the item)^0.4 where the user clicked the item, else 0.

    `clicked` lists the distinct candidate rows of each user. Returns [num_items + 1, dim] float32;
    0 in row 0 and, to rounding, for items without clicks and in columns beyond the clicks' rank.

    Example:
        >>> clicked = RowLists.from_lists([[], [1, 2], [1, 2], [3]])
        >>> abs(item_factors(clicked, num_items=3, dim=1)).round(3)
        array([[0. ],
               [1.5],
               [1.5],
               [0. ]], dtype=float32)
    """
    factors = np.zeros((num_items + 1, dim), np.float32)
    num_vectors = min(dim, num_items - 1)
    if num_vectors < 1 or not len(clicked.values):
        return factors
    items, per_user = clicked.values - 1, np.diff(clicked.offsets)
    per_item = np.bincount(items, minlength=num_items)
    cells = (np.repeat(per_user, per_user) * per_item[items]) ** -_EXPONENT
    clicks = scipy.sparse.csr_matrix((cells, items, clicked.offsets), (len(clicked), num_items))
    transposed = clicks.T.tocsr()
    gram = LinearOperator((num_items, num_items), matvec=lambda x: transposed @ (clicks @ x))
    rng = np.random.default_rng(0)
    # Not `svds`: it has no seed for the restarts that equal items need. One thread adds in order.
    with threadpool_limits(1, "blas"):
        values, vectors = eigsh(gram, num_vectors, v0=rng.random(num_items), rng=rng)
    found = vectors * values
    factors[1:, :num_vectors] = found / np.linalg.norm(found[per_item > 0], axis=1).mean()
    return factors


def add_item_factors(network: TwoTowerNetwork, clicked: RowLists, folder: Path | None) -> None:
    """Adds the factors of items (`item_factors`) to their random initial embeddings.

    A separate item table of the history gets them too. With several workers, the chief passes them
    to the others in a file in the folder. Raises a `ConfigError` if there is no such table.
    """
    query, candidate = network.query_tower, network.candidate_tower
    tables: list[tf.Variable | None] = []
    if isinstance(candidate, Tower) and candidate.id_embedding is not None:
        tables.append(candidate.id_embedding.embeddings)
    if isinstance(query, Tower) and query.history is not None:
        tables.append(query.history.item_table)
    own = [table for table in tables if table is not None]
    if not own:
        refuse([("model.item_init", "got 'svd', and no built-in tower embeds item ids")])
    factors = _factors_of_chief(clicked, network.num_candidates, own[0].shape[1], folder)
    for table in own:
        table.assign_add(factors)


def _factors_of_chief(
    clicked: RowLists, num_items: int, dim: int, folder: Path | None
) -> np.ndarray:
    if folder is None or this_worker().count == 1:
        return item_factors(clicked, num_items, dim)
    path = folder / "item_factors.npy"

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, item_factors(clicked, num_items, dim))

    on_chief(write)
    factors = np.load(path)
    on_chief(lambda: None)  # Every worker has read it.
    on_chief(lambda: path.unlink(missing_ok=True))
    return factors
