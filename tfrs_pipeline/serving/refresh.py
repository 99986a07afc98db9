"""An exported model over another set of items, without another training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf

from tfrs_pipeline.data.columns import Formats
from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.data.tables import load_items
from tfrs_pipeline.serving.export import export_index, file_hash
from tfrs_pipeline.serving.index import IndexKind
from tfrs_pipeline.serving.retriever import LoadedRetriever, load_retriever

logger = logging.getLogger(__name__)

ITEMS_PER_CALL = 8192


@dataclass(frozen=True)
class Refreshed:
    """What became of a model's items.

    Args:
        folder: The new version.
        num_items: Items of its index.
        num_new: Of them, those that the version before did not have.
        num_untrained: Of them, those that the training did not have: embedded by their features.
        num_dropped: Items of the version before that are gone.
        num_left_out: Items of the file that cannot be embedded: the training did not have them, and
            the model reads no item features.
        has_trained_unknown: Whether the embedding that such an item has in place of its id's was
            trained, or there is none.
        index: Kind, settings and recall, as `export_index` returns it.
    """

    folder: Path
    num_items: int
    num_new: int
    num_untrained: int
    num_dropped: int
    num_left_out: int
    has_trained_unknown: bool
    index: dict[str, Any]


def refresh_index(
    model: str | Path,
    items: str | Path,
    *,
    index: IndexKind | None = None,
    target_recall: float | None = None,
    keep_versions: int | None = None,
    allow_all_new: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> Refreshed:
    """Writes a new version of an exported model whose index holds the items of a file.

    Every item is embedded anew, by its id, where the training had it, and by its features. The
    towers, and what is known of the users, stay as they are: the history of a user may hold items
    that are gone, and items that are new mean nothing in a history. A new item has the embedding of
    an unknown id beside its features. Where the model's `unknown_rate` is 0 that was not trained,
    and the item is seldom found.

    Args:
        model: A model's folder, whose newest version is taken, or a version's.
        items: CSV or Parquet with item_id, every item feature of the model under its name and,
            if there is one, title: the items to be retrieved, all of them.
        index: Kind of index; None takes that of the model's config.
        target_recall: Of a ScaNN index; None likewise.
        keep_versions: How many versions to keep, the newest; None likewise.
        allow_all_new: Whether the file may hold no item of the version before nor of the training,
            which would otherwise be taken for ids of another kind.
        on_progress: Called with a task's name, steps done and steps in all.

    Returns:
        The new version, which a fresh process has loaded and answered with, and what it holds.

    Raises:
        DataError: If the file cannot be read, lacks a column, or holds no item for the index; if it
            holds no known item, and `allow_all_new` is not set.
        FileNotFoundError: If there is no exported model.
        ValueError: If the model was exported without what this needs, its folder is no numbered
            version, or ScaNN is asked to index fewer than 16 items.
        ExportError: If a fresh process cannot load the export or answers otherwise.
        RuntimeError: If no ScaNN index reaches the recall.
    """
    # The twin needs no ScaNN, and has the same encoder.
    retriever = load_retriever(model, exact=True)
    _check_refreshable(retriever)
    before = set(retriever.candidate_ids())
    table, embeddings, is_trained, num_left_out = _embedded_items(
        Path(items), retriever, on_progress
    )
    on_progress("index", 0, 0)
    config = retriever.manifest["config"]
    export = dict(config["export"])
    given = {"index": index, "target_recall": target_recall, "keep_versions": keep_versions}
    export |= {name: value for name, value in given.items() if value is not None}
    ids = table["item_id"].to_pylist()
    if not (allow_all_new or is_trained.any() or before & set(ids)):
        raise DataError(
            f"{items}: none of its {len(ids)} ids, such as {ids[0]!r}, is known to the model, "
            f"whose ids are like {min(before)!r}. Give the ids of the log that it was trained "
            "on, or say that all are new (--all-new, allow_all_new=True)."
        )
    num_untrained = int((~is_trained).sum())
    folder, description = export_index(
        retriever.folder.parent.parent,
        retriever.folder.parent.name,
        encoder=retriever.saved_model.encoder,
        embeddings=embeddings,
        queries=retriever.held_out_queries(),
        index=export["index"],
        target_recall=export["target_recall"],
        manifest={
            **retriever.manifest,
            # What was asked for holds for the next refreshment too.
            "config": {**config, "export": export},
            "refreshed": {
                "from_version": int(retriever.folder.name),
                "items": {Path(items).name: file_hash(Path(items))},
                "num_items": len(ids),
                "num_untrained": num_untrained,
            },
        },
        items=table,
        filter_by=export["filter_by"],
        keep_versions=export["keep_versions"],
    )
    model_config = config["model"]
    return Refreshed(
        folder=folder,
        num_items=len(ids),
        num_new=len(set(ids) - before),
        num_untrained=num_untrained,
        num_dropped=len(before - set(ids)),
        num_left_out=num_left_out,
        has_trained_unknown=model_config["unknown_rate"] > 0
        or not model_config["use_candidate_id"],
        index=description,
    )


def _check_refreshable(retriever: LoadedRetriever) -> None:
    if "features" not in retriever.manifest:
        raise ValueError(
            f"{retriever.folder} was exported by a version of this package that could not refresh "
            "it. Export the model anew with `tfrs-pipeline run`."
        )
    if not retriever.folder.name.isdecimal():
        raise ValueError(
            "A version's folder is named by its number, such as saved_models/NAME/3: the new one "
            f"is written beside it. Received: {retriever.folder}"
        )


def _embedded_items(
    path: Path, retriever: LoadedRetriever, on_progress: Callable[[str, int, int], None]
) -> tuple[pa.Table, np.ndarray, np.ndarray, int]:
    """Reads and embeds the items of a file, those alone that can be embedded.

    Returns:
        The table, embeddings [n, D] float32, [n] whether the training had the item, and how many
        items were left out.
    """
    table = _read_items(path, retriever)
    if not table.num_rows:
        raise DataError(f"{path} holds no row: it must list all items to retrieve.")
    embeddings, is_trained = _embed(retriever, table, on_progress)
    if retriever.manifest["config"]["data"]["item_features"] or is_trained.all():
        return table, embeddings, is_trained, 0
    num_left_out = int((~is_trained).sum())
    if num_left_out == len(is_trained):
        raise DataError(
            f"{path} holds no item that the model can embed: it reads no item features, and its "
            f"training had none of the {num_left_out} ids."
        )
    table = table.filter(pa.array(is_trained))
    return table, embeddings[is_trained], is_trained[is_trained], num_left_out


def _read_items(path: Path, retriever: LoadedRetriever) -> pa.Table:
    data = retriever.manifest["config"]["data"]
    return load_items(
        path,
        is_integer_id=retriever.item_dtype == tf.int64,
        item_features=data["item_features"],
        item_columns=data["item_columns"],
        formats=Formats(data["timestamp_unit"], data["time_zone"], data["list_separator"]),
    ).to_pyarrow()


def _embed(
    retriever: LoadedRetriever, items: pa.Table, on_progress: Callable[[str, int, int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Embeds an item table: [n, D] float32, and [n] whether the training had the item."""
    kinds = retriever.manifest["config"]["data"]["item_features"]
    blocks = []
    for start in range(0, items.num_rows, ITEMS_PER_CALL):
        on_progress("embed items", start, items.num_rows)
        block = items.slice(start, ITEMS_PER_CALL)
        columns = {name: block[name] for name in kinds}
        blocks.append(retriever.embed_candidates(block["item_id"].to_pylist(), columns))
    embeddings, is_trained = zip(*blocks, strict=True)
    return np.concatenate(embeddings), np.concatenate(is_trained)
