"""An exported model over another set of items, without another training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

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
    """What became of a model's items.

    Args:
        folder: The new version.
        num_items: Items of its index.
        num_new: Of them, those that the version before did not have.
        num_untrained: Of them, those that the training did not have: embedded by their features.
        num_dropped: Items of the version before that are gone.
        num_skipped: Items of the file that cannot be embedded.
        num_unknown: By feature of categories, the items that have only values that the training did
            not have: taken as missing.
        has_trained_unknown: Whether the embedding that an untrained item has in place of its id's
            was trained, or there is none; None if the manifest does not say.
        index: What was built, as the manifest has it.
        notes: What of the file was dropped or is missing, in lines for a person.
    """

    folder: Path
    num_items: int
    num_new: int
    num_untrained: int
    num_dropped: int
    num_skipped: int
    num_unknown: dict[str, int]
    has_trained_unknown: bool | None
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

    Every item is embedded anew, by its features and by its id, if the training had it. A new item
    has the embedding of an unknown id, which is of use only if ID dropout has trained it. The
    towers and what is known of users stay: new items mean nothing in a history.

    Args:
        model: A model's folder, for its newest version, or a version's.
        items: CSV or Parquet of all items to retrieve: item_id, every item feature of the model
            under its name and, if there is one, title.
        index: How to search; None searches as the version before.
        keep_versions: How many versions to keep, as in `export`; None keeps as many as before.
        allow_all_new: Whether to accept a file without any known item, without any known value of
            a feature of several categories, or without any value of a feature that had some.
        on_progress: Called with a task's name, steps done and steps in all.

    Raises:
        DataError: If the file cannot be read, lacks a column, holds no item for the index, or only
            what `allow_all_new` would accept.
        FileNotFoundError: If there is no exported model.
        ValueError: If the model's folder is not a numbered version, or ScaNN is asked to index
            fewer than 16 items.
        ExportError: As `export`; so is RuntimeError.
    """
    # Nobody publishes meanwhile: the new version would hide another's towers behind older ones.
    with publishing(version_at(model).parent):
        retriever = _load_numbered(model)
        # Checked before the items are embedded, which takes long.
        found = _read_items(Path(items), retriever, allow_all_new=allow_all_new)
        embedded = _embed(found, retriever, allow_all_new=allow_all_new, on_progress=on_progress)
        on_progress("index", 0, 0)
        before = ExportOptions.of(retriever.manifest)
        keep = before.keep_versions if keep_versions is None else keep_versions
        options = replace(before, index=index or before.index, keep_versions=keep)
        return _publish(retriever, found, embedded, options)


@dataclass(frozen=True)
class _Found:
    """Items of a file, lines on what was dropped of it, and `Refreshed.num_unknown`."""

    path: Path
    table: pa.Table
    notes: Sequence[str]
    num_unknown: dict[str, int]


@dataclass(frozen=True)
class _Embedded:
    """Items that a model can embed: [n, D] float32, and [n] whether the training had each."""

    table: pa.Table
    embeddings: np.ndarray
    is_trained: np.ndarray


def _load_numbered(model: str | Path) -> LoadedRetriever:
    # The brute-force fallback needs no ScaNN, and has the same encoder.
    retriever = load(model, exact=True)
    if not retriever.folder.name.isdecimal():
        raise ValueError(
            "A version's folder is named by its number, such as saved_models/NAME/3: the new "
            f"one is written beside it. Received: {retriever.folder}"
        )
    return retriever


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
    return Refreshed(
        folder=folder,
        num_items=len(ids),
        num_new=len(set(ids) - before),
        num_untrained=num_untrained,
        num_dropped=len(before - set(ids)),
        num_skipped=found.table.num_rows - len(ids),
        num_unknown=found.num_unknown,
        has_trained_unknown=_has_trained_unknown(retriever.manifest),
        index=manifest["index"],
        notes=found.notes,
    )


def describe_undone(model: Path, since: datetime, item_ids: np.ndarray) -> str | None:
    """Says which part of a refresh a new version, about to be published, undoes.

    Args:
        model: The model's folder, of which the newest version counts.
        since: When the run began, with a zone. A refresh before it does not count.
        item_ids: [n] int64, or object of str: the items of the version to come.

    Returns:
        A line for a person; None if there is no version, it is damaged or lacks its items, was not
        refreshed since, or has the same items.
    """
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


def _has_trained_unknown(manifest: Mapping[str, Any]) -> bool | None:
    model = manifest.get("config", {}).get("model")
    if model is None:
        return None
    return model.get("id_dropout", 0) > 0 or not model.get("use_candidate_id", True)


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
    features = retriever.features["candidate"]
    if not allow_all_new:
        _refuse_lost_features(path, table, features)
    num_unknown = {
        feature.name: _num_unknown(path, table, feature, allow_all=allow_all_new)
        for feature in features
        if feature.holds_categories
    }
    return _Found(path, table, notes, num_unknown)


def _embed(
    found: _Found,
    retriever: LoadedRetriever,
    *,
    allow_all_new: bool,
    on_progress: Callable[[str, int, int], None],
) -> _Embedded:
    """Embeds the items that the model can embed; refuses (`DataError`) ids of another kind."""
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


def _refuse_lost_features(path: Path, items: pa.Table, features: Sequence[Feature]) -> None:
    """Refuses (`DataError`) items none of which has a feature that items of the training had."""
    for feature in features:
        raws = map(feature.to_raw, in_blocks(items[feature.name]))
        if not all((raw == "" if raw.dtype == object else np.isnan(raw)).all() for raw in raws):
            continue
        if feature.had_values:
            raise DataError(
                f"{path}: none of {items.num_rows:,} items has a value of '{feature.name}', of "
                "which the training had some: a join that failed leaves such a column. Fill it; if "
                "it is meant to be empty, set allow_all_new."
            )


def _num_unknown(path: Path, items: pa.Table, feature: Feature, *, allow_all: bool) -> int:
    """Counts the items that have only unknown values.

    Refuses (`DataError`) where there are several values and none is known; one alone may be new.
    """
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
    if feature.known_values and len(unknown) > 1 and not (num_known or allow_all):
        raise DataError(
            f"{path}: no value of '{feature.name}', such as {min(unknown)!r}, is known to the "
            f"model, whose values are like {feature.known_values[0]!r}. Write them as in the log "
            "that it was trained on; if all are meant to be new, set allow_all_new."
        )
    return num_unknown


def _kinds(retriever: LoadedRetriever) -> dict[str, Any]:
    """Returns the kinds of the model's item features, by name."""
    return {feature.name: feature.kind for feature in retriever.features["candidate"]}
