"""An exported model over another set of items, without another training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from tfrs_pipeline.data.reading import Reading
from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.data.tables import load_items
from tfrs_pipeline.durable import Damaged, file_hash, read_record
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.raw import in_blocks
from tfrs_pipeline.model.encoder import ITEMS_PER_CALL
from tfrs_pipeline.serving.export import ExportOptions, export_index
from tfrs_pipeline.serving.index import Search
from tfrs_pipeline.serving.publish import ITEMS_FILE, MANIFEST_FILE, publishing, versions_of
from tfrs_pipeline.serving.retriever import LoadedRetriever, load, version_at


@dataclass(frozen=True)
class Refreshed:
    """What became of a model's items, compared with the version before."""

    folder: Path
    num_items: int
    num_new: int
    num_untrained: int
    num_dropped: int
    num_skipped: int  # Of the file: they cannot be embedded.
    num_unknown: dict[str, int]  # By feature: items with only values that the training lacked.
    has_trained_unknown: bool | None  # The unknown id's embedding; None if nothing says it.
    index: dict[str, Any]
    notes: Sequence[str]


def refresh_index(
    model: str | Path,
    items: str | Path,
    *,
    index: Search | None = None,
    keep_versions: int | None = None,
    allow_all_new: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> Refreshed:
    """Writes a new version of an exported model whose index holds the items of a file.

    The towers and what is known of users stay: new items mean nothing in a history.
    """
    # Nobody publishes meanwhile: the new version would hide another's towers behind older ones.
    with publishing(version_at(model).parent):
        # The brute-force fallback needs no ScaNN, and has the same encoder.
        retriever = load(model, exact=True)
        if not retriever.folder.name.isdecimal():
            raise ValueError(
                "A version's folder is named by its number, such as saved_models/NAME/3: the new "
                f"one is written beside it. Received: {retriever.folder}"
            )
        # Checked before the items are embedded, which takes long.
        found = _read_items(Path(items), retriever, allow_all_new=allow_all_new)
        embedded = _embed(found, retriever, allow_all_new=allow_all_new, on_progress=on_progress)
        on_progress("index", 0, 0)
        before = ExportOptions.of(retriever.manifest)
        keep = before.keep_versions if keep_versions is None else keep_versions
        options = replace(before, index=index or before.index, keep_versions=keep)
        return _publish(retriever, found, embedded, options)


class _Found(NamedTuple):
    """Items of a file, lines on what was dropped of it, and `Refreshed.num_unknown`."""

    path: Path
    table: pa.Table
    notes: Sequence[str]
    num_unknown: dict[str, int]


class _Embedded(NamedTuple):
    """Items that a model can embed: [n, D] float32, and [n] whether the training had each."""

    table: pa.Table
    embeddings: np.ndarray
    is_trained: np.ndarray


def _publish(
    retriever: LoadedRetriever, found: _Found, embedded: _Embedded, options: ExportOptions
) -> Refreshed:
    number, before = int(retriever.folder.name), set(retriever.candidate_ids())
    ids, num_untrained = embedded.table["item_id"].to_pylist(), int((~embedded.is_trained).sum())
    refreshed = {
        "from_version": number,
        # The version that its training was exported as.
        "trained_as": retriever.manifest.get("refreshed", {}).get("trained_as", number),
        "items": {found.path.name: file_hash(found.path)},
        "num_items": len(ids),
        "num_untrained": num_untrained,
    }
    folder, manifest = export_index(
        retriever.folder.parent,
        options,
        encoder=retriever.saved_model.encoder,
        embeddings=embedded.embeddings,
        items=embedded.table,
        queries=retriever.held_out_queries(),
        manifest={**retriever.manifest, "refreshed": refreshed},
    )
    model, has_trained_unknown = retriever.manifest.get("config", {}).get("model"), None
    if model is not None:
        reads_no_id = not model.get("use_candidate_id", True)
        has_trained_unknown = model.get("id_dropout", 0) > 0 or reads_no_id
    return Refreshed(
        folder=folder,
        num_items=len(ids),
        num_new=len(set(ids) - before),
        num_untrained=num_untrained,
        num_dropped=len(before - set(ids)),
        num_skipped=found.table.num_rows - len(ids),
        num_unknown=found.num_unknown,
        has_trained_unknown=has_trained_unknown,
        index=manifest["index"],
        notes=found.notes,
    )


def describe_undone(model: Path, since: datetime, item_ids: np.ndarray) -> str | None:
    """Describes what a new version of these items would undo of a refresh; None if nothing."""
    if not (versions := versions_of(model)):
        return None
    newest = model / str(versions[-1])
    since = since.replace(microsecond=0)  # A manifest has whole seconds.
    try:
        manifest = read_record(newest / MANIFEST_FILE, check_files=False)
        if "refreshed" not in manifest or datetime.fromisoformat(manifest["date"]) < since:
            return None
        items = pq.read_table(newest / ITEMS_FILE, columns=["item_id"])
    except (Damaged, OSError, pa.ArrowInvalid):
        return None
    refreshed, ours = set(items["item_id"].to_pylist()), set(item_ids.tolist())
    if refreshed == ours:
        return None
    return (
        f"version {newest.name} is a refresh made after this run began: of its items "
        f"{len(refreshed - ours):,} are not in this version, and {len(ours - refreshed):,} of this "
        "version are not in it. Run refresh-index for today's items"
    )


def _read_items(path: Path, retriever: LoadedRetriever, *, allow_all_new: bool) -> _Found:
    items, notes = load_items(
        path,
        is_integer_id=retriever.item_dtype == tf.int64,
        item_features=_kinds(retriever),
        reading=Reading(**retriever.manifest.get("reading", {})),
    )
    table = items.to_pyarrow()
    if not table.num_rows:
        raise DataError(f"{path} holds no row. List all items to retrieve in it.")
    num_unknown = {}
    for feature in retriever.features["candidate"]:
        if not allow_all_new:
            refuse_lost(feature, path, table)
        if feature.holds_categories:
            num_unknown[feature.name] = _num_unknown(path, table, feature, allow_all_new)
    return _Found(path, table, notes, num_unknown)


def _embed(
    found: _Found,
    retriever: LoadedRetriever,
    *,
    allow_all_new: bool,
    on_progress: Callable[[str, int, int], None],
) -> _Embedded:
    """Embeds the items that the model can embed; refuses ids of another kind."""
    path, items, features, blocks = found.path, found.table, list(_kinds(retriever)), []
    for start in range(0, items.num_rows, ITEMS_PER_CALL):
        on_progress("embed items", start, items.num_rows)
        block = items.slice(start, ITEMS_PER_CALL)
        columns = {name: block[name] for name in features}
        blocks.append(retriever.embed_candidates(block["item_id"].to_pylist(), columns))
    embeddings, is_trained = map(np.concatenate, zip(*blocks, strict=True))
    if not features:  # By id alone an unknown item says nothing.
        if not is_trained.any():
            raise DataError(
                f"{path} holds no item that the model can embed: it reads no item features, and "
                f"its training had none of the {len(is_trained)} ids. Give items of its log, or "
                "train it with item features."
            )
        items, embeddings = items.filter(pa.array(is_trained)), embeddings[is_trained]
        is_trained = is_trained[is_trained]
    ids, before = items["item_id"].to_pylist(), set(retriever.candidate_ids())
    if not (allow_all_new or is_trained.any()) and before.isdisjoint(ids):
        raise DataError(
            f"{path}: none of its {len(ids)} ids, such as {ids[0]!r}, is known to the model, "
            f"whose ids are like {min(before)!r}. Give the ids of the log that it was trained "
            "on; if all are meant to be new, set allow_all_new."
        )
    return _Embedded(items, embeddings, is_trained)


def refuse_lost(feature: Feature, path: Path, items: pa.Table) -> None:
    """Refuses items none of which has a feature that items of the training had."""
    raws = map(feature.to_raw, in_blocks(items[feature.name]))
    is_lost = all((raw == "" if raw.dtype == object else np.isnan(raw)).all() for raw in raws)
    if is_lost and feature.had_values:
        raise DataError(
            f"{path}: none of {items.num_rows:,} items has a value of '{feature.name}', of "
            "which the training had some: a join that failed leaves such a column. Fill it; if "
            "it is meant to be empty, set allow_all_new."
        )


def _num_unknown(path: Path, items: pa.Table, feature: Feature, allow_all: bool) -> int:
    """Counts the items that have only unknown values; refuses several values if none is known."""
    num_known, num_unknown, unknown = 0, 0, set[str]()
    for block in in_blocks(items[feature.name]):
        raw = feature.to_raw(block)
        is_known = (feature.encode(raw).numpy().reshape(len(block), -1) > 0).any(axis=1)
        is_given = raw.reshape(len(block), -1) != ""
        is_unknown = is_given.any(axis=1) & ~is_known
        num_known += int(is_known.sum())
        num_unknown += int(is_unknown.sum())
        if len(unknown) < 2:
            unknown.update(raw.reshape(is_given.shape)[is_unknown[:, np.newaxis] & is_given])
    if feature.vocabulary and len(unknown) > 1 and not (num_known or allow_all):
        raise DataError(
            f"{path}: no value of '{feature.name}', such as {min(unknown)!r}, is known to the "
            f"model, whose values are like {feature.vocabulary[0]!r}. Write them as in the log "
            "that it was trained on; if all are meant to be new, set allow_all_new."
        )
    return num_unknown


def _kinds(retriever: LoadedRetriever) -> dict[str, Any]:
    """Returns the kinds of the model's item features, by name."""
    return {feature.name: feature.kind for feature in retriever.features["candidate"]}
