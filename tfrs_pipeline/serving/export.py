"""A trained model written as a SavedModel that answers with raw ids.

Layout, TensorFlow Serving's own:

    <directory>/<name>/<version>/
        saved_model.pb, variables/     encoder and index, under the signatures of `RetrievalModule`
        manifest.json                  config, features, data, counts, metrics, index, versions
        assets.extra/items.parquet     item_id and title, for reading answers
        assets.extra/queries.parquet   user_id and history of queries, to measure an index on
        exact/1/                       the brute-force fallback, for servers without the ScaNN op

A version is written beside its place and renamed once it is whole and checked.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from tfrs_pipeline.durable import write_record
from tfrs_pipeline.model.features import Feature, raw_signature
from tfrs_pipeline.retrieval import Query
from tfrs_pipeline.serving.encoder import (
    Encoder,
    Exportable,
    embed_corpus,
    id_list,
    id_lists,
    signature_inputs,
)
from tfrs_pipeline.serving.index import Exact, ExactIndex, Scann, ScannIndex, index_for
from tfrs_pipeline.serving.publish import (
    EXACT_FOLDER,
    ITEMS_FILE,
    MANIFEST_FILE,
    QUERIES_FILE,
    new_version,
)
from tfrs_pipeline.serving.saved_model import ItemFilter, RetrievalModule, missing_input
from tfrs_pipeline.serving.tune import tune_index

LIBRARIES = ("tensorflow", "tf-keras", "tensorflow-recommenders", "scann", "numpy")
# An index is measured on so many queries at most.
NUM_QUERIES = 1000
# Of them, queries whose answers the reloaded model must repeat.
NUM_PROBES = 20
_QUERIES_PER_CALL = 256


class ExportError(RuntimeError):
    """An export that was not whole or did not answer as the model in memory does."""


def export(
    model: Exportable,
    path: str | Path,
    *,
    index: Scann | Exact | None = None,
    filter_by: str | None = None,
    keep_versions: int | None = None,
    user_data: bool = True,
    queries: Sequence[Query] | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model's next version, checks it in a fresh process, and puts it in place.

    Args:
        model: Whatever embeds queries and candidates.
        path: The model's folder, such as "saved_models/videos"; its name is the model's.
        index: How to search; None takes `Exact()` below 20,000 candidates and `Scann()` from there
            on.
        filter_by: Column of the model's items by whose values requests may filter.
        keep_versions: How many versions to keep, the newest; None keeps all.
        user_data: Whether to export what is known of users: their ids, histories, features and
            embeddings, and the queries. Without it requests bring the history, and an index is
            measured on queries of one item each.
        queries: Held-out ones, of which `user_id` and `history` are read: a ScaNN index is tuned
            and measured on the first 1,000, and what every signature answers to the first 20 must
            come back the same from the reloaded model. None takes the model's users.
        manifest: More for `manifest.json`: JSON-able, such as config and metrics.

    Returns:
        The folder of the new version.

    Raises:
        ExportError: If a fresh process cannot load the export or answers otherwise; nothing is
            left in place then, and no version is deleted.
        RuntimeError: If no ScaNN index reaches the recall target.
        ValueError: If the model's items are not those of its ids, or lack the column to filter by;
            if there shall be no user data and the model has an embedding of each user.
    """
    return export_version(
        model,
        path,
        index=index,
        filter_by=filter_by,
        keep_versions=keep_versions,
        user_data=user_data,
        queries=queries,
        manifest=manifest or {},
    )[0]


def export_version(
    model: Exportable,
    path: str | Path,
    *,
    index: Scann | Exact | None,
    filter_by: str | None,
    keep_versions: int | None,
    user_data: bool,
    queries: Sequence[Query] | None,
    manifest: Mapping[str, Any],
) -> tuple[Path, dict[str, Any]]:
    """Exports a model as `export` does; returns the manifest too (see `export_index`)."""
    items = model.items
    if items["item_id"].to_pylist() != model.candidate_ids.tolist():
        raise ValueError(
            f"The model's items must be one row for each of its {len(model.candidate_ids)} "
            f"candidate ids, in their order. Received: {items.num_rows} rows"
        )
    if not user_data:
        queries = [{"history": [id_]} for id_ in model.candidate_ids[:NUM_QUERIES].tolist()]
    elif queries is None:
        queries = _stored_queries(model)
    sides = {"query": model.query_features, "candidate": model.candidate_features}
    about = {
        "features": {side: [f.to_dict() for f in features] for side, features in sides.items()},
        "feature_inputs": {
            side: {name: spec.name for name, spec in raw_signature(features).items()}
            for side, features in sides.items()
        },
        "user_data": user_data,
        "example_user": next((q["user_id"] for q in queries if "user_id" in q), None),
    }
    return export_index(
        path,
        encoder=Encoder(model, user_data=user_data),
        embeddings=embed_corpus(model),
        items=items,
        queries=queries,
        index=index,
        filter_by=filter_by,
        keep_versions=keep_versions,
        manifest={**about, **manifest},
    )


def export_index(
    path: str | Path,
    *,
    encoder: Encoder,
    embeddings: np.ndarray,
    items: pa.Table,
    queries: Sequence[Query],
    index: Scann | Exact | None,
    filter_by: str | None,
    keep_versions: int | None,
    manifest: Mapping[str, Any],
) -> tuple[Path, dict[str, Any]]:
    """Exports an index over candidates behind an encoder; see `export`.

    Args:
        path: As of `export`, and so are the arguments below without a word.
        encoder: `Encoder`, or what one was loaded as.
        embeddings: [num_candidates, D] float32, of the rows of `items`.
        items: The candidates: `item_id`, the column of the filter and, if there is one, `title`.
        queries: Likewise.
        index: Likewise.
        filter_by: Likewise.
        keep_versions: Likewise.
        manifest: What is known of the model; index, filter, name, date, signatures and versions
            of the libraries are added.

    Returns:
        The folder of the new version, and its manifest: another export, which keeps only its own
        version, may have deleted both.
    """
    queries = queries[:NUM_QUERIES]
    item_filter = None
    if filter_by is not None:
        if filter_by not in items.column_names:
            raise ValueError(
                f"filter_by must name a column of the items. Received: {filter_by!r}; known: "
                f"{', '.join(items.column_names)}"
            )
        item_filter = ItemFilter(filter_by, items[filter_by].to_pylist())
    search, description = _built(index or index_for(len(embeddings)), embeddings, encoder, queries)
    ids = items["item_id"].to_numpy()
    modules = {Path(): RetrievalModule(encoder, search, ids, item_filter)}
    if search is not search.exact:
        modules[EXACT_FOLDER] = RetrievalModule(encoder, search.exact, ids, item_filter)
    full = {
        **manifest,
        "index": description,
        "filter": item_filter and item_filter.describe(),
        # What was asked for holds for the next refreshment too.
        "export": {
            "index": index and asdict(index),
            "filter_by": filter_by,
            "keep_versions": keep_versions,
        },
        "name": Path(path).name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "signatures": sorted(modules[Path()].exported),
        "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
    }
    options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
    with new_version(Path(path), keep=keep_versions) as version:
        for place, module in modules.items():
            folder = version.partial / place
            tf.saved_model.save(module, str(folder), signatures=module.exported, options=options)
        (version.partial / ITEMS_FILE).parent.mkdir()
        shown = items.select(["item_id", *({"title"} & set(items.column_names))])
        pq.write_table(shown, version.partial / ITEMS_FILE)
        pq.write_table(_query_table(queries, items), version.partial / QUERIES_FILE)
        files = [path for path in version.partial.rglob("*") if path.is_file()]
        full = json.loads(json.dumps(full, default=str))
        write_record(version.partial / MANIFEST_FILE, full, files)
        probes = queries[:NUM_PROBES], ids[:NUM_PROBES].tolist(), _example_values(full)
        for place, module in modules.items():
            _prove(version.partial / place, module, *probes)
    return version.folder, full


def _built(
    index: Scann | Exact, embeddings: np.ndarray, encoder: Encoder, queries: Sequence[Query]
) -> tuple[ExactIndex | ScannIndex, dict[str, Any]]:
    """Builds an index; says what it is, for the manifest."""
    if isinstance(index, Exact):
        return ExactIndex(embeddings), {"kind": index.kind}
    embedded = embed_queries(encoder, queries)
    scann, curve = tune_index(embeddings, embedded, k=index.k, target_recall=index.recall)
    return scann, {
        "kind": index.kind,
        f"index_recall@{curve.k}": curve.chosen.recall,
        "query_ms": curve.chosen.query_ms,
        "settings": asdict(scann.settings),
        "curve": curve.records(),
    }


def describe_index(description: Mapping[str, Any], num_candidates: int) -> str:
    """Says what a manifest's "index" is."""
    if description["kind"] == "exact":
        return f"exact search over {num_candidates:,} candidates"
    name, recall = next(x for x in description.items() if x[0].startswith("index_recall@"))
    settings = description["settings"]
    return (
        f"ScaNN finds {recall:.4f} of the exact top {name.partition('@')[2]}, "
        f"searching {settings['num_leaves_to_search']} of {settings['num_leaves']} leaves"
    )


def embed_queries(encoder: Encoder, queries: Sequence[Query]) -> np.ndarray:
    """Embeds queries by `user_id` and `history`: [num_queries, D] float32."""
    blocks = []
    for start in range(0, max(len(queries), 1), _QUERIES_PER_CALL):
        inputs = _query_inputs(encoder.embed_query, queries[start : start + _QUERIES_PER_CALL])
        blocks.append(encoder.embed_query(*inputs.values())["embeddings"].numpy())
    return np.concatenate(blocks)


def _query_inputs(function: Any, queries: Sequence[Query]) -> dict[str, tf.Tensor]:
    """Makes those of a signature's inputs that are in queries: user_id [B], history [B, any]."""
    specs = signature_inputs(function)
    inputs = {}
    if "user_id" in specs:
        users = [query.get("user_id") for query in queries]
        inputs["user_id"] = id_list(users, specs["user_id"].dtype)
    if "history" in specs:
        inputs["history"] = id_lists(list(map(_history, queries)), specs["history"].dtype)
    return inputs


def _history(query: Query) -> Sequence[Any]:
    """Returns the history of a query, which may be missing or, read from a file, None."""
    history = query.get("history")
    return () if history is None else history


def _stored_queries(model: Exportable) -> list[Query]:
    """Makes a query of each of the first users, by what is stored of them."""
    users = model.query_ids[:NUM_QUERIES].tolist()
    return [
        {"user_id": user, "history": model.candidate_ids[model.histories[row][::-1] - 1].tolist()}
        for row, user in enumerate(users, 1)
    ]


def _query_table(queries: Sequence[Query], items: pa.Table) -> pa.Table:
    ids = pa.list_(items.schema.field("item_id").type)
    columns = {
        "user_id": pa.array([query.get("user_id") for query in queries]),
        "history": pa.array([list(_history(query)) for query in queries], ids),
    }
    return pa.table(columns)


def _example_values(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a value of the filter and of every feature, by the name of its input."""
    values: dict[str, Any] = {}
    if manifest["filter"] and manifest["filter"]["values"]:
        values["allowed"] = manifest["filter"]["values"][0]
    for side in manifest["features"].values():
        features = [Feature.from_dict(settings) for settings in side]
        for feature, spec in zip(features, raw_signature(features).values(), strict=True):
            is_text = spec.dtype == tf.string
            values[spec.name] = (feature.vocabulary or ("1",))[0] if is_text else 1.0
    return values


def _probe(
    function: Any, queries: Sequence[Query], item_ids: Sequence[Any], values: Mapping[str, Any]
) -> dict[str, tf.Tensor]:
    """Makes the inputs that a signature is asked with before a version is put in place."""
    specs = signature_inputs(function)
    inputs = {"k": tf.constant(10), **_query_inputs(function, queries)}
    num_rows = len(item_ids) if "item_id" in specs else len(queries)
    if "item_id" in specs:
        inputs["item_id"] = tf.constant(item_ids, specs["item_id"].dtype)
    for name, spec in specs.items():
        if name in values:
            shape = [num_rows, *(size or 1 for size in spec.shape[1:])]
            inputs[name] = tf.fill(shape, tf.constant(values[name], spec.dtype))
        elif name not in inputs:
            inputs[name] = missing_input(spec, num_rows)
    return {name: inputs[name] for name in specs}


def _prove(
    folder: Path,
    module: RetrievalModule,
    queries: Sequence[Query],
    item_ids: Sequence[Any],
    values: Mapping[str, Any],
) -> None:
    """Has a fresh process load what was saved and answer as the module in memory does."""
    probe = folder / "probe.npz"
    arrays: dict[str, np.ndarray] = {}
    for name, function in module.exported.items():
        inputs = _probe(function, queries, item_ids, values)
        outputs = function(*inputs.values())
        for role, tensors in (("input", inputs), ("output", outputs)):
            arrays |= {f"{name}/{role}/{key}": _plain(x.numpy()) for key, x in tensors.items()}
    np.savez(probe, allow_pickle=False, **arrays)
    command = [sys.executable, "-m", "tfrs_pipeline.serving.check", str(folder), str(probe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    probe.unlink()
    if done.returncode:
        raise ExportError(
            f"A fresh process could not use the export to {folder}: {done.stderr.strip()[-2000:]}"
        )


def _plain(values: np.ndarray) -> np.ndarray:
    """Turns TensorFlow's byte strings into an array that needs no pickle."""
    if values.dtype != object:
        return values
    return np.char.decode(values.astype(bytes), "utf-8") if values.size else values.astype(str)
