"""A trained model written as a SavedModel that answers with raw ids.

Layout, TensorFlow Serving's own:

    <directory>/<name>/<version>/
        saved_model.pb, variables/     the index, under the signatures of `RetrievalModule`
        manifest.json                  config, features, data, counts, metrics, index, versions
        assets.extra/items.parquet     item_id and title, for reading answers
        assets.extra/queries.parquet   user_id and history of held-out queries, to measure it on
        exact/1/                       the brute-force twin, for servers without the ScaNN op

A version is written beside its place and renamed once it is whole and proven.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from tfrs_pipeline.model.features import Feature, raw_signature
from tfrs_pipeline.retrieval import Query
from tfrs_pipeline.serving.encoder import Encoder, empty_id
from tfrs_pipeline.serving.index import (
    ExactIndex,
    IndexKind,
    ScannIndex,
    resolve_index_kind,
)
from tfrs_pipeline.serving.publish import MANIFEST_FILE, new_version
from tfrs_pipeline.serving.saved_model import ItemFilter, RetrievalModule
from tfrs_pipeline.serving.tune import measure_frontier

EXACT_TWIN = Path("exact") / "1"
ITEMS_FILE = Path("assets.extra") / "items.parquet"
QUERIES_FILE = Path("assets.extra") / "queries.parquet"
LIBRARIES = ("tensorflow", "tf-keras", "tensorflow-recommenders", "scann", "numpy")
# The reloaded model may run other kernels on another batch shape: same answer, not same bits.
SCORE_TOLERANCE = 1e-4
# An index promises its recall at this k, measured on so many queries at most.
PROMISED_K = 100
NUM_QUERIES = 1000
# Of them, queries whose answers the reloaded model must repeat.
NUM_PROBES = 20
_QUERIES_PER_CALL = 256


class ExportError(RuntimeError):
    """An export that was not whole or did not answer as the model in memory does."""


def export_index(
    directory: Path,
    name: str,
    *,
    encoder: Encoder,
    embeddings: np.ndarray,
    queries: Sequence[Query],
    index: IndexKind,
    target_recall: float,
    manifest: Mapping[str, Any],
    items: pa.Table,
    filter_by: str | None = None,
    keep_versions: int | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Builds an index over candidates and exports it behind an encoder (see `write_export`).

    Args:
        directory: Such as `saved_models`.
        name: Model name.
        encoder: `Encoder`, or what one was loaded as.
        embeddings: [num_candidates, D] float32, of the rows of `items`.
        queries: Held-out ones, on the first 1,000 of which a ScaNN index is tuned and measured.
        index: Which kind.
        target_recall: Share of the exact top 100 that a ScaNN index must find.
        manifest: As for `write_export`; the index and the filter are added.
        items: The candidates, with `item_id`, the column of the filter and, if there is one,
            `title`.
        filter_by: Column by whose values requests may filter.
        keep_versions: As for `write_export`.

    Returns:
        The folder of the new version, and what the index is: "kind" and, for ScaNN, "settings",
        the "index_recall@100" against exact search, and the "frontier" that it was chosen from
        (`Frontier.records`).

    Raises:
        ExportError: If a fresh process cannot load the export or answers otherwise.
        RuntimeError: If no ScaNN index reaches the recall.
    """
    queries = queries[:NUM_QUERIES]
    item_filter = None
    if filter_by is not None:
        item_filter = ItemFilter.of_column(filter_by, items[filter_by].to_pylist())
    exact = ExactIndex(embeddings)
    kind = resolve_index_kind(index, len(embeddings))
    description: dict[str, Any] = {"kind": kind}
    indexes: list[ExactIndex | ScannIndex] = [exact]
    if kind == "scann":
        k = min(PROMISED_K, len(embeddings))
        scann, frontier = measure_frontier(
            embeddings, embed_queries(encoder, queries), k=k, target_recall=target_recall
        )
        description |= {
            f"index_recall@{k}": frontier.chosen.recall,
            "settings": scann.describe(),
            "frontier": frontier.records(),
        }
        indexes.insert(0, scann)
    module, *twin = (
        RetrievalModule(
            encoder,
            search,
            exact,
            candidate_ids=items["item_id"].to_numpy(),
            item_filter=item_filter,
        )
        for search in indexes
    )
    folder = write_export(
        directory,
        name,
        module=module,
        twin=twin[0] if twin else None,
        manifest={
            **manifest,
            "index": description,
            "filter": item_filter and item_filter.describe(),
        },
        items=items.select(["item_id", *({"title"} & set(items.column_names))]),
        queries=queries,
        keep_versions=keep_versions,
    )
    return folder, description


def describe_index(description: Mapping[str, Any], num_candidates: int) -> list[str]:
    """Says what `export_index` built."""
    if description["kind"] == "exact":
        return [f"exact search over {num_candidates:,} candidates"]
    k = min(PROMISED_K, num_candidates)
    settings = description["settings"]
    return [
        f"ScaNN finds {description[f'index_recall@{k}']:.4f} of the exact top {k}, "
        f"searching {settings['num_leaves_to_search']} of {settings['num_leaves']} leaves"
    ]


def embed_queries(encoder: Encoder, queries: Sequence[Query]) -> np.ndarray:
    """Embeds queries by `user_id` and `history`: [num_queries, D] float32."""
    blocks = []
    for start in range(0, max(len(queries), 1), _QUERIES_PER_CALL):
        inputs = _query_inputs(encoder.embed_query, queries[start : start + _QUERIES_PER_CALL])
        blocks.append(encoder.embed_query(**inputs)["embeddings"].numpy())
    return np.concatenate(blocks)


def write_export(
    directory: Path,
    name: str,
    *,
    module: RetrievalModule,
    twin: RetrievalModule | None,
    manifest: Mapping[str, Any],
    items: pa.Table,
    queries: Sequence[Query],
    keep_versions: int | None = None,
) -> Path:
    """Writes the next version of a model, proves it in a fresh process, and puts it in place.

    Args:
        directory: Such as `saved_models`.
        name: Model name.
        module: What to serve.
        twin: The brute-force twin, where `module` needs the ScaNN op.
        manifest: JSON-able; name, date, signatures and library versions are added.
        items: Table with `item_id` and, if there is one, `title`.
        queries: Held-out queries, their `user_id` and `history`, kept beside the model; what every
            signature answers to the first of them must come back the same from the reloaded model.
        keep_versions: How many versions to keep, the newest; None keeps all.

    Returns:
        The folder of the new version.

    Raises:
        ExportError: If a fresh process cannot load the export or answers otherwise; nothing is
            left in place then, and no version is deleted.
    """
    options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
    with new_version(directory / name, keep=keep_versions) as version:
        partial = version.partial
        tf.saved_model.save(module, str(partial), signatures=module.exported, options=options)
        if twin is not None:
            tf.saved_model.save(twin, str(partial / EXACT_TWIN), signatures=twin.exported)
        (partial / ITEMS_FILE).parent.mkdir()
        pq.write_table(items, partial / ITEMS_FILE)
        pq.write_table(_query_table(queries, items), partial / QUERIES_FILE)
        full = {
            **manifest,
            "name": name,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "signatures": sorted(module.exported),
            "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
        }
        (partial / MANIFEST_FILE).write_text(json.dumps(full, indent=2, default=str))
        probes = _Probes(
            queries[:NUM_PROBES], items["item_id"].to_pylist()[:NUM_PROBES], _example_values(full)
        )
        _prove(partial, module, twin, probes)
    return version.folder


def file_hash(path: Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _query_inputs(function: Any, queries: Sequence[Query]) -> dict[str, tf.Tensor]:
    """Makes those of a signature's inputs that are in queries: user_id [B], history [B, any]."""
    specs = signature_inputs(function)
    inputs = {}
    if "user_id" in specs:
        dtype = specs["user_id"].dtype
        given = [query.get("user_id") for query in queries]
        users = [empty_id(dtype) if user is None else user for user in given]
        inputs["user_id"] = tf.constant(users, dtype, [len(users)])
    if "history" in specs:
        dtype = specs["history"].dtype
        given = [query.get("history") for query in queries]
        histories = tf.ragged.constant(
            [[] if history is None else list(history) for history in given], dtype, ragged_rank=1
        )
        inputs["history"] = histories.to_tensor(empty_id(dtype))
    return inputs


def _query_table(queries: Sequence[Query], items: pa.Table) -> pa.Table:
    columns = {
        "user_id": pa.array([query.get("user_id") for query in queries]),
        "history": pa.array(
            [list(query.get("history", ())) for query in queries],
            pa.list_(items.schema.field("item_id").type),
        ),
    }
    return pa.table(columns)


@dataclass(frozen=True)
class _Probes:
    """What every signature is asked before a version is put in place.

    Args:
        queries: Their `user_id` and `history`.
        item_ids: Of candidates to be embedded.
        values: Values of other inputs by name: of the filter, and of raw features.
    """

    queries: Sequence[Query]
    item_ids: Sequence[Any]
    values: Mapping[str, Any]

    def inputs(self, function: Any) -> dict[str, tf.Tensor]:
        """Makes the inputs of a signature; what has no value here is missing."""
        specs = signature_inputs(function)
        if "item_id" in specs:
            num_rows = len(self.item_ids)
            inputs = {"item_id": tf.constant(list(self.item_ids), specs["item_id"].dtype)}
        else:
            num_rows = len(self.queries)
            inputs = {"k": tf.constant(10), **_query_inputs(function, self.queries)}
        for name, value in self.values.items():
            if name in specs:
                spec = specs[name]
                shape = [num_rows, *(size or 1 for size in spec.shape[1:])]
                inputs[name] = tf.fill(shape, tf.constant(value, spec.dtype))
        return {
            name: inputs[name] if name in inputs else missing_input(spec, num_rows)
            for name, spec in specs.items()
        }


def _example_values(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a value of the filter and of every feature, by the name of its input."""
    values: dict[str, Any] = {}
    if manifest.get("filter") and manifest["filter"]["values"]:
        values["allowed"] = manifest["filter"]["values"][0]
    for side in manifest.get("features", {}).values():
        features = [Feature.from_dict(settings) for settings in side]
        for feature, spec in zip(features, raw_signature(features).values(), strict=True):
            is_text = spec.dtype == tf.string
            values[spec.name] = (feature.vocabulary or ("1",))[0] if is_text else 1.0
    return values


def _prove(
    partial: Path, module: RetrievalModule, twin: RetrievalModule | None, probes: _Probes
) -> None:
    for folder, source in ((partial, module), (partial / EXACT_TWIN, twin)):
        if source is None:
            continue
        probe = folder / "probe.npz"
        arrays: dict[str, np.ndarray] = {}
        for name, function in source.exported.items():
            inputs = probes.inputs(function)
            arrays |= {f"{name}/input/{key}": _plain(x.numpy()) for key, x in inputs.items()}
            outputs = function(**inputs)
            arrays |= {f"{name}/output/{key}": _plain(x.numpy()) for key, x in outputs.items()}
        np.savez(probe, allow_pickle=False, **arrays)
        command = [sys.executable, "-m", "tfrs_pipeline.serving.check", str(folder), str(probe)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        probe.unlink()
        if done.returncode:
            raise ExportError(
                f"A fresh process could not use the export of {partial.parent.name}: "
                f"{done.stderr.strip()[-2000:]}"
            )


def missing_input(spec: tf.TensorSpec, num_rows: int) -> tf.Tensor:
    """Makes an input that says nothing: empty ids, empty lists, missing features; a k of 1.

    Args:
        spec: Of the input.
        num_rows: Queries or items; without meaning to a k.
    """
    if spec.shape.rank == 0:
        return tf.constant(1, spec.dtype)
    fill = np.nan if spec.dtype.is_floating else empty_id(spec.dtype)
    shape = [num_rows, *(size or 0 for size in spec.shape[1:])]
    return tf.fill(shape, tf.constant(fill, spec.dtype))


def signature_inputs(function: Any) -> dict[str, tf.TensorSpec]:
    """Returns the inputs of a signature by name, as it is before it is saved or after."""
    if hasattr(function, "get_concrete_function"):
        function = function.get_concrete_function()
    positional, named = function.structured_input_signature
    return {spec.name: spec for spec in positional} | dict(named)


def _plain(values: np.ndarray) -> np.ndarray:
    """Turns TensorFlow's byte strings into an array that needs no pickle."""
    if values.dtype != object:
        return values
    return np.char.decode(values.astype(bytes), "utf-8") if values.size else values.astype(str)
