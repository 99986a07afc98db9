"""Writes a trained model as a SavedModel that answers with raw ids.

saved_models/README.md lists the files of a version.
"""

import errno
import importlib.metadata
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from tfrs_pipeline.data.schema import LISTED
from tfrs_pipeline.durable import naming, write_record
from tfrs_pipeline.export.encoder import (
    Encoder,
    embed_queries,
    features_of,
    item_times,
    known_rows,
)
from tfrs_pipeline.export.graph_index import ExactIndex, ScannIndex
from tfrs_pipeline.export.saved_model import RetrievalModule, check_operation, prove
from tfrs_pipeline.features.encoding import TIMESTAMP, raw_signature, request_signature
from tfrs_pipeline.features.feature import Feature
from tfrs_pipeline.features.raw import to_text_lists
from tfrs_pipeline.model.distribution import on_chief
from tfrs_pipeline.model.exportable import Exportable
from tfrs_pipeline.model.tf_tables import embed_corpus, signature_inputs
from tfrs_pipeline.retrieval import HISTORY_TIMESTAMPS, Query, history_of
from tfrs_pipeline.search.exclusions import rule_of
from tfrs_pipeline.search.settings import Auto, Scann, Search, has_scann, search_of
from tfrs_pipeline.search.tune import Requests, measure_requests, tune_index
from tfrs_pipeline.service import publish

if TYPE_CHECKING:
    from tfrs_pipeline.model.sums import Model

LIBRARIES = ("tensorflow", "tf-keras", "tensorflow-recommenders", "scann", "numpy")
# Most queries to tune and measure an index on; how many the reloaded model must answer alike.
NUM_QUERIES, NUM_PROBES = 1000, 20


@dataclass(frozen=True)
class ExportOptions:
    """The options of `export` that the next refresh reuses."""

    index: Search
    filter_by: str | None = None
    keep_versions: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.index, Search):
            raise TypeError(
                f"index must be tp.Exact(), tp.Scann() or tp.Auto(). Received: {self.index!r}."
            )

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "ExportOptions":
        """Reads the options back from the manifest of an export."""
        options = dict(manifest["export"])
        return cls(search_of(**options.pop("index")), **options)


# In a notebook, TensorFlow logs "Assets written to" for every SavedModel. The folder that it names
# is temporary, so the line would mislead.
logging.getLogger("tensorflow").addFilter(lambda log: "Assets written to" not in log.getMessage())


def export(
    model: "Exportable | Model",
    path: str | Path,
    *,
    index: Search | None = None,
    filter_by: str | None = None,
    keep_versions: int | None = None,
    user_data: bool = True,
    queries: Sequence[Query] | None = None,
) -> Path:
    """Writes a model's next version, checks it in a fresh process, and publishes it.

    If several workers train, all must call this: the chief writes, and the others wait.

    Args:
        model: A `FittedTwoTower`, a `FittedSum`, or an `Exportable` of another model. The items of
            the log's item table are retrieved, or all if there is none; histories may hold the
            others too.
        path: The model's folder, such as "saved_models/videos", whose name becomes the model's.
        index: `Exact()`, `Scann()` or `Auto()`; None is `Auto()`.
        filter_by: Item column by whose values requests may filter.
        keep_versions: How many versions to keep: the newest two, then the newest of each training,
            then other refreshes. The rest are deleted. None keeps all.
        user_data: Whether to export users' ids, histories, features and held-out queries. Without
            it requests bring the history, and an index is measured on queries of one item each.
        queries: Held-out queries with `user_id`, `history`, `history_timestamps` and `request`. A
            ScaNN index is tuned and measured on the first 1,000; the reloaded model must answer
            the first 20 alike. None takes the model's users.

    Returns:
        The folder of the new version.

    Raises:
        ExportError: If a fresh process cannot load the export or answers differently. No version
            is then published or deleted.
        RuntimeError: If no ScaNN index reaches the recall target.
        TypeError: If `model` or `index` has the wrong type.
        ValueError: If the items lack the column `filter_by`, `user_data` is False for a model that
            embeds each user's id, or a fitted model has no log.
        ImportError: If `index` is `Scann()` and ScaNN is not installed.

    Example:
        >>> export(model, "saved_models/videos", filter_by="category")  # doctest: +SKIP
        PosixPath('saved_models/videos/1')
    """
    options = ExportOptions(index or Auto(), filter_by, keep_versions)

    def write() -> str:
        return str(export_version(model, path, options, user_data=user_data, queries=queries)[0])

    return Path(on_chief(write))


def export_version(
    model: "Exportable | Model",
    path: str | Path,
    options: ExportOptions,
    *,
    user_data: bool,
    queries: Sequence[Query] | None,
    manifest: Mapping[str, Any] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Exports a model within one process, and returns the manifest too (see `export_index`).

    `manifest` is what a run adds to it.
    """
    # Importing the classes would load code that only training needs.
    if not hasattr(model, "exportable"):
        raise TypeError(
            "Exports what TwoTower.fit returns, or a tp.Exportable of another model that "
            f"embeds queries and candidates. Received: {model!r:.200}."
        )
    model = model.exportable()
    items = model.items
    is_retrieved = items[LISTED] if LISTED in items.column_names else np.ones(len(items))
    rows = np.flatnonzero(is_retrieved)
    if not user_data:
        queries = [{"history": [id_]} for id_ in model.candidate_ids[:NUM_QUERIES].tolist()]
    elif queries is None:
        queries = stored_queries(model)
    features = {
        "query": model.query_features,
        "request": model.request_features,
        "candidate": model.candidate_features,
    }
    inputs = {side: raw_signature(side_features) for side, side_features in features.items()}
    inputs["request"] = request_signature(
        features["request"], features["query"], reads_times=model.history_times is not None
    )
    # Not called as a tf.function, which warns where many models are embedded one after the other.
    spec = tf.TensorSpec([None], tf.int32)
    embed = tf.function(model.embed_candidates, autograph=False).get_concrete_function(spec)
    items_read = model.items_read
    about = {
        "features": {
            side: [feature.to_dict() for feature in side_features]
            for side, side_features in features.items()
        },
        "feature_inputs": {
            side: {name: spec.name for name, spec in specs.items()}
            for side, specs in inputs.items()
        },
        "reading": model.reading.as_json(),
        "user_data": user_data,
        "exclude": rule_of(model),
        "has_item_bias": model.has_item_bias,
        "items_read": items_read.isoformat(),
        # A clock that is ahead may date an event after the reading. If that ended the log, no event
        # in service would count until then.
        "histories_until": min(model.histories_until or items_read, items_read).isoformat(),
        "example_user": next((q["user_id"] for q in queries if "user_id" in q), None),
    }
    return export_index(
        path,
        options,
        encoder=Encoder(model, user_data=user_data),
        embeddings=embed_corpus(embed, len(model.candidate_ids))[rows],
        items=items.drop_columns([LISTED] if LISTED in items.column_names else []).take(rows),
        queries=queries,
        manifest={**about, **(manifest or {})},
    )


def export_index(
    path: str | Path,
    options: ExportOptions,
    *,
    encoder: Encoder,
    embeddings: np.ndarray,
    items: pa.Table,
    queries: Sequence[Query],
    manifest: Mapping[str, Any],
) -> tuple[Path, dict[str, Any]]:
    """Exports an index over candidates behind an encoder, built or loaded.

    `embeddings` has a row for each of `items`. Returns the new version's folder and its manifest:
    another export may delete the file at any time.
    """
    shown = {"item_id": items["item_id"]}
    if "title" in items.column_names:  # With titles, people can read the answers.
        shown["title"] = items["title"].cast(pa.string())
    item_filter = None
    if (name := options.filter_by) is not None:
        if name not in items.column_names:
            known = ", ".join(items.column_names)
            raise ValueError(
                f"filter_by must name a column of the items. Received: {name!r}; known: {known}"
            )
        shown[publish.FILTER_COLUMN] = items[name]
        values = to_text_lists(items[name])[0].unique().to_pylist()
        item_filter = {"name": name, "values": sorted(values)}
    ids, features = items["item_id"].to_numpy(), features_of(manifest)
    queries, index = queries[:NUM_QUERIES], options.index
    if isinstance(index, Auto):
        index = index.choose(len(embeddings))
    tuned = None
    description: dict[str, Any] = {"kind": index.kind}
    if isinstance(index, Scann):
        embedded = embed_queries(encoder, queries, features)
        requests = Requests(embedded, known_rows(encoder, queries, ids))
        tuning, measured = requests.for_tuning_and_measuring()
        tuned = tune_index(embeddings, tuning, target_recall=index.recall)
        description |= {
            "target_recall": index.recall,
            "num_leaves": tuned.num_leaves,
            "levels": [asdict(level) for level in tuned.levels],
            "requests": measure_requests(tuned.candidates(embeddings), measured),
        }
    # Both SavedModels share the vectors in memory, but each folder holds them on its own.
    exact, has_bias = ExactIndex(embeddings), manifest.get("has_item_bias", False)
    module = RetrievalModule(encoder, exact, ids, has_bias)
    # What the export writes itself comes last: a refresh brings the manifest of the version before.
    full = {
        **manifest,
        "format": publish.FORMAT,
        "index": description,
        "filter": item_filter,
        "export": asdict(options),
        "name": Path(path).name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "signatures": sorted(module.exported),
        "versions": {
            library: importlib.metadata.version(library)
            for library in LIBRARIES
            if library != "scann" or has_scann()
        },
    }
    with publish.new_version(Path(path), keep=options.keep_versions) as (partial, folder):
        modules = {partial: module}
        if tuned is not None:
            # For the server; the operation reads the same files.
            tuned.searcher.save(partial / publish.INDEX_FOLDER)
            scann = ScannIndex(exact, partial / publish.INDEX_FOLDER, tuned.levels)
            check_operation(scann, tuned.searcher, embedded[:NUM_PROBES])
            with_scann = RetrievalModule(encoder, scann, ids, has_bias)
            modules[partial / publish.SCANN_FOLDER] = with_scann
        allowed_ops = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
        for saved_to, saved in modules.items():
            with naming(Path(path), tf.errors.OpError):
                try:
                    tf.saved_model.save(saved, str(saved_to), saved.exported, allowed_ops)
                except tf.errors.ResourceExhaustedError as error:
                    if (text := os.strerror(errno.ENOSPC)) not in error.message:
                        raise
                    # TensorFlow names a file of its own, which is gone by now.
                    raise OSError(errno.ENOSPC, text) from error
        (partial / publish.ITEMS_FILE).parent.mkdir()
        pq.write_table(pa.table(shown), partial / publish.ITEMS_FILE)
        read = signature_inputs(encoder.embed_query)
        table = query_table(queries, items, features["request"], read)
        pq.write_table(table, partial / publish.QUERIES_FILE)
        files = [path for path in partial.rglob("*") if path.is_file()]
        # As a reader of the file gets it: tuples are lists, and dates are text.
        full = json.loads(json.dumps(full, default=str))
        write_record(partial / publish.MANIFEST_FILE, full, files)
        # The last thing before the rename, so that no version is published without this proof.
        prove(modules, queries[:NUM_PROBES], ids[:NUM_PROBES].tolist(), features)
    return folder, full


def describe_index(description: Mapping[str, Any], num_candidates: int) -> str:
    """Describes the "index" of a manifest in a sentence."""
    if description["kind"] == "exact":
        return f"exact search over {num_candidates:,} candidates"
    recalls = [request["recall"] for request in description["requests"]]
    lowest = min(recalls, default=description["target_recall"])
    return f"ScaNN finds at least {lowest:.4f} of the exact answer on average"


def stored_queries(model: Exportable) -> list[Query]:
    """Makes a query for each of the first 1,000 users from what a model stores about them."""
    queries: list[Query] = []
    offsets = model.histories.offsets
    for row, user in enumerate(model.query_ids[:NUM_QUERIES].tolist(), 1):
        history = model.histories[row][::-1]
        is_known = history > 0
        query = {"user_id": user, "history": model.candidate_ids[history[is_known] - 1].tolist()}
        if model.history_times is not None:
            times = model.history_times[offsets[row] : offsets[row + 1]][::-1]
            query[HISTORY_TIMESTAMPS] = times[is_known]
        queries.append(query)
    return queries


def query_table(
    queries: Sequence[Query], items: pa.Table, request: Sequence[Feature], read: Collection[str]
) -> pa.Table:
    """Makes a table of queries, with the columns that the encoder's inputs `read` need."""
    ids = pa.list_(items.schema.field("item_id").type)
    columns = {
        "user_id": pa.array([query.get("user_id") for query in queries]),
        "history": pa.array([list(history_of(query)) for query in queries], ids),
    }
    if HISTORY_TIMESTAMPS in read:
        columns[HISTORY_TIMESTAMPS] = pa.array(item_times(queries), pa.list_(pa.float64()))
    if request or TIMESTAMP in read:
        requests = [query.get("request") or {} for query in queries]
        names = [*(feature.name for feature in request), TIMESTAMP]
        values = {name: [request_.get(name) for request_ in requests] for name in names}
        for feature in request:  # Categories of several types become one; "" is a missing one.
            if feature.raw_dtype == "string":
                values[feature.name] = [
                    (list(filter(None, row)) if isinstance(row, list) else row) or None
                    for row in feature.to_raw(values[feature.name]).tolist()
                ]
        rows = zip(*values.values(), strict=True)
        columns["request"] = pa.array([dict(zip(values, row, strict=True)) for row in rows])
    return pa.table(columns)
