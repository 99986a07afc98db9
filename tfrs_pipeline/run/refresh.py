"""Gives an exported model another set of items, without training and without TensorFlow."""

import functools
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tfrs_pipeline.answers import publish
from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.data.settings import Reading
from tfrs_pipeline.data.tables import load_items
from tfrs_pipeline.durable import file_hash, read_record
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.raw import in_blocks
from tfrs_pipeline.messages import SILENT, Progress
from tfrs_pipeline.run.steps import Runner, Step
from tfrs_pipeline.search.settings import Search

if TYPE_CHECKING:
    from tfrs_pipeline.answers.proof import Answers
    from tfrs_pipeline.answers.retriever import LoadedRetriever

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
        options = {"index": index, "keep_versions": keep_versions}
        options = {name: value for name, value in options.items() if value is not None}
        refresh = _Refresh(Path(model), Path(items), options, allow_all_new, progress)
        return refresh.do(refresh_steps())


@dataclass
class _Refresh(Runner):
    """Runs the steps of a refresh; `options` replace those of the version's export."""

    model: Path
    path: Path
    options: dict[str, Any]
    allow_all_new: bool
    progress: Progress
    began: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        super().__init__(self.progress)


def _save_graphs(
    refresh: _Refresh,
    before: Path,
    folder: Path,
    manifest: Mapping[str, Any],
    probes: "Answers",
    _: np.ndarray | None,
) -> Mapping[str, "Answers"]:
    """Writes the SavedModels again, in a process with TensorFlow; returns their answers."""
    from tfrs_pipeline.search.searcher import in_fresh_process

    if not (before / publish.SAVED_MODEL_FILE).exists() or not find_spec("tensorflow"):
        refresh.note(
            "no SavedModel is written: TensorFlow is not installed here, or the version before has "
            "none. A service of this package needs none"
        )
        return {}
    about = {name: manifest[name] for name in ("index", "has_item_bias")}
    done = in_fresh_process(
        "tfrs_pipeline.exports.saved_model:save_again",
        *map(str, (folder, before)),
        stdin=pickle.dumps((about, probes)),
    )
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip()[-2000:]
        raise RuntimeError(f"The SavedModel could not be written: {why}")
    answers: Mapping[str, Answers] = pickle.loads(done.stdout)
    return answers


def refresh_steps() -> list[Step]:
    """Returns the steps of a refresh, in order."""
    return [
        Step("items", (), "items", _read_items),
        Step("model", (), "model", _load),
        # Before the items are embedded, because that takes long.
        Step("check", ("model", "items"), "unknown", _check),
        Step("embed", ("model", "items"), "embedded", _embed),
        Step("export", ("model", "embedded"), "version", _export, "NAME/VERSION/"),
    ]


def _read_items(refresh: _Refresh) -> pa.Table:
    version = publish.version_at(refresh.model)
    if not version.name.isdecimal():
        raise ValueError(
            "A version's folder is named by its number, such as saved_models/NAME/3: the new "
            f"one is written beside it. Received: {version}"
        )
    manifest = read_record(version / publish.MANIFEST_FILE, check_files=False)
    # Ids of another type would all be new.
    id_type = pq.read_schema(version / publish.ITEMS_FILE).field("item_id").type
    items, notes = load_items(
        refresh.path,
        is_integer_id=pa.types.is_integer(id_type),
        item_features={item["name"]: item["kind"] for item in manifest["features"]["candidate"]},
        reading=Reading(**manifest.get("reading", {})),
    )
    table = items.to_pyarrow()
    if not table.num_rows:
        raise DataError(f"{refresh.path} holds no row. List all items to retrieve in it.")
    refresh.note(*notes)
    return table


def _load(refresh: _Refresh) -> "LoadedRetriever":
    from tfrs_pipeline.answers.retriever import load

    # The towers and the version's own items are needed, not its index.
    return load(refresh.model, exact=True, live=False)


def _check(refresh: _Refresh, model: "LoadedRetriever", items: pa.Table) -> None:
    """Counts the items with only unknown values; refuses features that the file has lost."""
    for feature in model.features["candidate"]:
        # A failed join or export may have emptied a column. An error is better than a model that
        # serves without it.
        if not refresh.allow_all_new:
            refuse_lost(feature, refresh.path, items)
        if feature.holds_categories and (num := _num_unknown(refresh, items, feature)):
            refresh.note(
                f"{feature.name}: {num:,} of {items.num_rows:,} items have no value that the "
                "training had: taken as missing"
            )


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


def _num_unknown(refresh: _Refresh, items: pa.Table, feature: Feature) -> int:
    """Counts the items with only unknown values.

    Refuses if none is known, and several are unknown or all items have the same one.
    """
    num_known, num_unknown, unknown = 0, 0, set[str]()
    for block in in_blocks(items[feature.name]):
        raw = feature.to_raw(block)
        is_unknown, has_value = feature.unknown(raw), raw != ""
        num_unknown += int(is_unknown.sum())
        num_known += int((has_value.any(axis=tuple(range(1, raw.ndim))) & ~is_unknown).sum())
        if len(unknown) < 2:  # Two are enough for the rule below.
            unknown.update(raw[is_unknown][has_value[is_unknown]])
    # One new category among items without any is news; several, or one for all, are a mistake.
    are_all_one = num_unknown == items.num_rows > 1 and len(feature.vocabulary) > 1
    is_lost = len(unknown) > 1 or are_all_one
    if feature.vocabulary and is_lost and not (num_known or refresh.allow_all_new):
        raise DataError(
            f"{refresh.path}: no value of '{feature.name}', such as {min(unknown)!r}, is known to "
            f"the model, whose values are like {feature.vocabulary[0]!r}. Write them as in the log "
            "that it was trained on; if all are meant to be new, set allow_all_new "
            "(--allow-all-new)."
        )
    return num_unknown


def _embed(
    refresh: _Refresh, model: "LoadedRetriever", items: pa.Table
) -> tuple[pa.Table, np.ndarray, int]:
    """Embeds the items that the model can embed; refuses a file of only unknown ids.

    Returns these items, [n, D] float32, and how many of them the training did not have.
    """
    from tfrs_pipeline.answers.engine import ITEMS_PER_CALL

    path = refresh.path
    features, blocks = [feature.name for feature in model.features["candidate"]], []
    # In blocks, since the features of millions of items take more memory than their vectors.
    for start in range(0, items.num_rows, ITEMS_PER_CALL):
        refresh.progress.task("embed items", start, items.num_rows)
        block = items.slice(start, ITEMS_PER_CALL)
        columns = {name: block[name] for name in features}
        blocks.append(model.embed_candidates(block["item_id"].to_pylist(), columns))
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
            refresh.note(f"skipped {num_skipped:,} of the file: {why}")
        items, embeddings = items.filter(pa.array(is_trained)), embeddings[is_trained]
        is_trained = is_trained[is_trained]
    ids, ids_before = items["item_id"].to_pylist(), set(model.candidate_ids())
    # Ids of another kind, such as row numbers, would all pass as new items.
    if not (refresh.allow_all_new or is_trained.any()) and ids_before.isdisjoint(ids):
        raise DataError(
            f"{path}: none of its {len(ids)} ids, such as {ids[0]!r}, is known to the model, "
            f"whose ids are like {min(ids_before)!r}. Give the ids of the log that it was trained "
            "on; if all are meant to be new, set allow_all_new (--allow-all-new)."
        )
    if num_untrained := int((~is_trained).sum()):
        refresh.note(f"{num_untrained:,} are new since the training: embedded by features only")
        settings = model.manifest.get("config", {}).get("model")
        if settings is None or (settings["use_candidate_id"] and not settings["id_dropout"]):
            how = "was not trained, so" if settings else "may be untrained; then"
            refresh.note(
                f"    the embedding of unknown ids {how} they will seldom be found. Train "
                "with model.id_dropout above 0, such as 0.1"
            )
    return items, embeddings, num_untrained


def _export(
    refresh: _Refresh, model: "LoadedRetriever", embedded: tuple[pa.Table, np.ndarray, int]
) -> Refreshed:
    from tfrs_pipeline.answers.version import ExportOptions, Items, describe_index, write_version

    refresh.progress.task("export", 0, 0, WRITING)
    items, embeddings, num_untrained = embedded
    before, number = model.folder, int(model.folder.name)
    ids, ids_before = set(items["item_id"].to_pylist()), set(model.candidate_ids())
    refreshed = {
        "from_version": number,
        # The version as which its training was exported.
        "trained_as": model.manifest.get("refreshed", {}).get("trained_as", number),
        "items": {refresh.path.name: file_hash(refresh.path)},
        "num_items": len(ids),
        "num_untrained": num_untrained,
    }
    about = {"refreshed": refreshed, "items_read": refresh.began.isoformat()}
    folder, manifest = write_version(
        before.parent,
        replace(ExportOptions.of(model.manifest), **refresh.options),
        fill=lambda files: publish.keep_parts(before, files),
        items=Items(items, embeddings),
        queries=model.held_out_queries(),
        manifest=model.manifest | about,
        save_graphs=functools.partial(_save_graphs, refresh, before),
    )
    num_new, num_gone = len(ids - ids_before), len(ids_before - ids)
    refresh.note(
        f"{len(ids):,} items: {num_new:,} new, {num_gone:,} gone since the previous version",
        describe_index(manifest["index"], len(ids)),
    )
    notes = [note for report in refresh.reports for note in report.notes]
    return Refreshed(folder, len(ids), num_new, notes)
