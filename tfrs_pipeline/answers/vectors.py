"""Writes the vectors of a model's items for another engine, as Parquet."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tfrs_pipeline.durable import parquet_destination, replacing

if TYPE_CHECKING:
    from tfrs_pipeline.answers.retriever import LoadedRetriever

BLOCK = 65_536  # Rows per row group of the file.
# The length of a normalised float32 vector differs from 1 by rounding alone.
_ROUNDING = 1e-5


def write_vectors(model: "LoadedRetriever", path: str | Path) -> dict[str, Any]:
    """Writes the items of a model with their vectors, for a search engine of your own.

    Each item is a row with `item_id`, `title` if the export has titles, `embedding`, a list of D
    float32, and `norm`, its length. The score is the inner product of an embedding and the
    query's, which `LoadedRetriever.embed_queries` or the signatures `embed_user` and `embed_query`
    of the same version return. Items added in service are written, removed ones are not.

    `model` is what `tp.load` returns; with `exact=True` that needs no ScaNN. `path` is a `.parquet`
    file; an earlier one is replaced once the new one is complete.

    Returns:
        The file's metadata, which its Parquet schema holds as text: `model`, `version`, `dim`,
        `num_items`, `metric` ("inner_product"), `has_item_bias` (whether the last entry of a vector
        is the item's bias, which a query multiplies by 1), `min_norm`, `max_norm`,
        `unit_length`: whether all have length 1, so that cosine similarity ranks items alike; and
        `aligned`: None, or the `version` before, onto whose vectors these were turned, `num_items`
        that both have, and the `mean_cosine` of their vectors.

    Raises:
        ValueError: If the path is a folder, its folder is missing, or its suffix is another; if all
            items have been removed.
        StorageError: If the file cannot be written.

    Example:
        >>> write_vectors(tp.load("saved_models/videos"), "videos.parquet")  # doctest: +SKIP
    """
    path = parquet_destination(path)
    titles, (ids, embeddings) = model.titles(), model.candidates.ids_and_vectors()
    if not len(ids):
        raise ValueError("The model has no items: all of them have been removed.")
    norms = np.sqrt(np.vecdot(embeddings, embeddings))
    about = {
        "model": model.manifest["name"],
        "version": model.folder.name,
        "dim": embeddings.shape[1],
        "num_items": len(ids),
        "metric": "inner_product",
        "has_item_bias": bool(model.manifest.get("has_item_bias")),
        "min_norm": float(norms.min()),
        "max_norm": float(norms.max()),
        "unit_length": bool(np.abs(norms - 1).max() < _ROUNDING),
        "aligned": model.manifest.get("aligned"),
    }
    metadata = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in about.items()
    }
    columns = {"item_id": pa.array(ids)}
    if titles:
        columns["title"] = pa.array([titles.get(id_) for id_ in ids.tolist()], pa.string())
    vector = pa.list_(pa.float32(), embeddings.shape[1])
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(embeddings.ravel(), type=vector)
    columns["norm"] = pa.array(norms)
    table = pa.table(columns, metadata=metadata)
    with replacing(path) as partial:
        # A dictionary would not help: hardly any value repeats.
        pq.write_table(table, partial, row_group_size=BLOCK, use_dictionary=False)
    return about
