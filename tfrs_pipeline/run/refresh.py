"""Gives an exported model another set of items, without training.

TensorFlow is imported after the items are read, so that bad ones are refused at once.
"""

import contextlib
import functools
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.data.settings import Reading
from tfrs_pipeline.data.tables import load_items
from tfrs_pipeline.durable import Damaged, file_hash, read_record
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.raw import in_blocks
from tfrs_pipeline.messages import SILENT, Progress
from tfrs_pipeline.run.steps import Runner, Step
from tfrs_pipeline.serving import publish
from tfrs_pipeline.serving.index import Search

if TYPE_CHECKING:
    from tfrs_pipeline.serving.retriever import LoadedRetriever

# Shown during an export, a run's too: it may take minutes.
WRITING = "builds the index, writes it, and has a fresh process load it and answer"


@dataclass(frozen=True)
class Refreshed:
    """How a refresh changed a model's items, compared with the previous version."""

    folder: Path
    num_items: int
    num_new: int
    notes: list[str]  # What was done, dropped or missing, for people.


def refresh_index(
    model: str | Path,
    items: str | Path,
    *,
    index: Search | None = None,
    keep_versions: int | None = None,
    allow_all_new: bool = False,
    progress: Progress = SILENT,
) -> Refreshed:
    """Writes a new version of an exported model whose index holds the items of a file.

    Towers and stored user data stay the same, so histories ignore new items. `index` and
    `keep_versions` are as before unless given.
    """
    # Locked, because the new version would hide a newly trained one behind older towers.
    with publish.publishing(publish.version_at(model).parent):
        asked = {"index": index, "keep_versions": keep_versions}
        asked = {name: value for name, value in asked.items() if value is not None}
        steps = refresh_steps(Path(model), Path(items), asked, allow_all_new=allow_all_new)
        return Runner(progress).run(steps)


def refresh_steps(
    model: Path, items: Path, options: dict[str, Any], *, allow_all_new: bool
) -> list[Step]:
    """Returns the steps of a refresh; `options` replace those of the version's export."""
    check = functools.partial(_check, items, allow_all=allow_all_new)
    embed = functools.partial(_embed, items, allow_all=allow_all_new)
    export, read = functools.partial(_export, items, options, datetime.now(UTC)), ("model", "items")
    return [
        Step("items", (), "items", functools.partial(_read_items, model, items)),
        Step("model", (), "model", functools.partial(_load, model)),
        # Checked before the items are embedded, which takes long.
        Step("check", read, "unknown", check),
        Step("embed", read, "embedded", embed),
        Step("export", ("model", "embedded"), "version", export, place="NAME/VERSION/"),
    ]


def _read_items(model: Path, path: Path, runner: Runner) -> pa.Table:
    version = publish.version_at(model)
    if not version.name.isdecimal():
        raise ValueError(
            "A version's folder is named by its number, such as saved_models/NAME/3: the new "
            f"one is written beside it. Received: {version}"
        )
    manifest = read_record(version / publish.MANIFEST_FILE, check_files=False)
    id_type = pq.read_schema(version / publish.ITEMS_FILE).field("item_id").type
    items, notes = load_items(
        path,
        is_integer_id=pa.types.is_integer(id_type),
        item_features={x["name"]: x["kind"] for x in manifest["features"]["candidate"]},
        reading=Reading(**manifest.get("reading", {})),
    )
    table = items.to_pyarrow()
    if not table.num_rows:
        raise DataError(f"{path} holds no row. List all items to retrieve in it.")
    runner.note(*notes)
    return table


def _load(model: Path, runner: Runner) -> "LoadedRetriever":
    from tfrs_pipeline.serving.retriever import load

    # The towers and the version's own items are needed, not its index.
    return load(model, exact=True, live=False)


def _check(
    path: Path, runner: Runner, retriever: "LoadedRetriever", items: pa.Table, *, allow_all: bool
) -> dict[str, int]:
    """Counts the items with only unknown values, by categorical feature."""
    num_unknown = {}
    for feature in retriever.features["candidate"]:
        if not allow_all:
            refuse_lost(feature, path, items)
        if feature.holds_categories:
            num_unknown[feature.name] = num = _num_unknown(path, items, feature, allow_all)
            if num:
                runner.note(
                    f"{feature.name}: {num:,} of {items.num_rows:,} items have no value that the "
                    "training had: taken as missing"
                )
    return num_unknown


def refuse_lost(feature: Feature, path: Path, items: pa.Table) -> None:
    """Refuses items that all lack a feature that the training's items had."""
    raws = map(feature.to_raw, in_blocks(items[feature.name]))
    is_lost = all((raw == "" if raw.dtype == object else np.isnan(raw)).all() for raw in raws)
    if is_lost and feature.had_values:
        raise DataError(
            f"{path}: none of {items.num_rows:,} items has a value of '{feature.name}', but "
            "items of the training had: a failed join leaves such a column. Fill it; if it is "
            "meant to be empty, set allow_all_new (--allow-all-new)."
        )


def _num_unknown(path: Path, items: pa.Table, feature: Feature, allow_all: bool) -> int:
    """Counts the items with only unknown values.

    Refuses if none is known, and several are unknown or all items have the same one.
    """
    num_known, num_unknown, unknown = 0, 0, set[str]()
    for block in in_blocks(items[feature.name]):
        raw = feature.to_raw(block)
        is_unknown, is_given = feature.unknown(raw), raw != ""
        num_unknown += int(is_unknown.sum())
        num_known += int((is_given.any(axis=tuple(range(1, raw.ndim))) & ~is_unknown).sum())
        if len(unknown) < 2:
            unknown.update(raw[is_unknown][is_given[is_unknown]])
    are_all_one = num_unknown == items.num_rows > 1 and len(feature.vocabulary) > 1
    is_lost = len(unknown) > 1 or are_all_one
    if feature.vocabulary and is_lost and not (num_known or allow_all):
        raise DataError(
            f"{path}: no value of '{feature.name}', such as {min(unknown)!r}, is known to the "
            f"model, whose values are like {feature.vocabulary[0]!r}. Write them as in the log "
            "that it was trained on; if all are meant to be new, set allow_all_new "
            "(--allow-all-new)."
        )
    return num_unknown


def _embed(
    path: Path, runner: Runner, retriever: "LoadedRetriever", items: pa.Table, *, allow_all: bool
) -> tuple[pa.Table, np.ndarray, int]:
    """Embeds the items that the model can embed; refuses a file of only unknown ids.

    Returns these items, [n, D] float32, and how many of them the training did not have.
    """
    from tfrs_pipeline.model.encoder import ITEMS_PER_CALL

    features, blocks = [x.name for x in retriever.features["candidate"]], []
    for start in range(0, items.num_rows, ITEMS_PER_CALL):
        runner.progress.task("embed items", start, items.num_rows)
        block = items.slice(start, ITEMS_PER_CALL)
        columns = {name: block[name] for name in features}
        blocks.append(retriever.embed_candidates(block["item_id"].to_pylist(), columns))
    embeddings, is_trained = map(np.concatenate, zip(*blocks, strict=True))
    if not features:  # Without features, unknown items cannot be embedded.
        if not is_trained.any():
            raise DataError(
                f"{path} holds no item that the model can embed: it reads no item features, and "
                f"its training had none of the {len(is_trained)} ids. Give items of its log, or "
                "train it with item features."
            )
        if num_skipped := int((~is_trained).sum()):
            why = "the model reads no item features, and its training did not have them"
            runner.note(f"skipped {num_skipped:,} of the file: {why}")
        items, embeddings = items.filter(pa.array(is_trained)), embeddings[is_trained]
        is_trained = is_trained[is_trained]
    ids, before = items["item_id"].to_pylist(), set(retriever.candidate_ids())
    if not (allow_all or is_trained.any()) and before.isdisjoint(ids):
        raise DataError(
            f"{path}: none of its {len(ids)} ids, such as {ids[0]!r}, is known to the model, "
            f"whose ids are like {min(before)!r}. Give the ids of the log that it was trained "
            "on; if all are meant to be new, set allow_all_new (--allow-all-new)."
        )
    if num_untrained := int((~is_trained).sum()):
        runner.note(f"{num_untrained:,} are new since the training: embedded by features only")
        model = retriever.manifest.get("config", {}).get("model")
        if model is None or (model["use_candidate_id"] and not model["id_dropout"]):
            how = "was not trained, so" if model else "may be untrained; then"
            runner.note(
                f"    the embedding of unknown ids {how} they will seldom be found. Train "
                "with model.id_dropout above 0, such as 0.1"
            )
    return items, embeddings, num_untrained


def _export(
    path: Path,
    options: dict[str, Any],
    began: datetime,
    runner: Runner,
    retriever: "LoadedRetriever",
    embedded: tuple[pa.Table, np.ndarray, int],
) -> Refreshed:
    from tfrs_pipeline.serving.export import ExportOptions, describe_index, export_index

    runner.progress.task("export", 0, 0, WRITING)
    items, embeddings, num_untrained = embedded
    number = int(retriever.folder.name)
    ids, before = set(items["item_id"].to_pylist()), set(retriever.candidate_ids())
    refreshed = {
        "from_version": number,
        # The version as which its training was exported.
        "trained_as": retriever.manifest.get("refreshed", {}).get("trained_as", number),
        "items": {path.name: file_hash(path)},
        "num_items": len(ids),
        "num_untrained": num_untrained,
    }
    folder, manifest = export_index(
        retriever.folder.parent,
        replace(ExportOptions.of(retriever.manifest), **options),
        encoder=retriever.saved_model.encoder,
        embeddings=embeddings,
        items=items,
        queries=retriever.held_out_queries(),
        manifest=retriever.manifest | {"refreshed": refreshed, "items_read": began.isoformat()},
    )
    num_new, num_gone = len(ids - before), len(before - ids)
    runner.note(
        f"{len(ids):,} items: {num_new:,} new, {num_gone:,} gone since the previous version",
        describe_index(manifest["index"], len(ids)),
    )
    notes = [note for report in runner.reports for note in report.notes]
    return Refreshed(folder, len(ids), num_new, notes)


def describe_undone(model: Path, read: datetime) -> list[str]:
    """Describes a refresh in service, if it read its items later than a run that will replace it.

    Returns no line or one. `read` is the moment at which the run began to read its items.
    """
    for number in publish.versions_of(model)[-1:]:
        with contextlib.suppress(Damaged, OSError):  # The run is fine, whatever that version is.
            path = model / str(number) / publish.MANIFEST_FILE
            manifest = read_record(path, check_files=False)
            refreshed = datetime.fromisoformat(manifest["items_read"])
            if "refreshed" in manifest and refreshed > read:
                return [
                    f"version {number} was made by refresh-index, whose items were read at "
                    f"{refreshed.isoformat()[:16]} UTC, and this run's at {read.isoformat()[:16]}: "
                    "to have the newer items in service, run refresh-index again"
                ]
    return []
