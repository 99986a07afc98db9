"""Exports a trained model: a version that serves without TensorFlow, and a SavedModel beside it.

saved_models/README.md lists the files of a version.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tfrs_pipeline.answers.proof import Answers
from tfrs_pipeline.answers.stored import Stored
from tfrs_pipeline.answers.version import NUM_QUERIES, ExportOptions, Items, write_version
from tfrs_pipeline.data.schema import LISTED
from tfrs_pipeline.durable import naming
from tfrs_pipeline.exports.alignment import align
from tfrs_pipeline.exports.encoder import Encoder, without_users
from tfrs_pipeline.exports.saved_model import answers_of, save_graphs
from tfrs_pipeline.exports.towers import write_towers
from tfrs_pipeline.features.encoding import raw_signature
from tfrs_pipeline.model.distribution import on_chief
from tfrs_pipeline.model.exportable import Exportable
from tfrs_pipeline.model.tf_tables import embed_corpus
from tfrs_pipeline.retrieval import HISTORY_TIMESTAMPS, Query
from tfrs_pipeline.search.exclusions import rule_with
from tfrs_pipeline.search.settings import Auto, Search

if TYPE_CHECKING:
    from tfrs_pipeline.model.ensemble import Model

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
    """Exports a model within one process, and returns the manifest too (see `write_version`).

    `manifest` is what a run adds to it.
    """
    # Importing the classes would load code that only training needs.
    if not hasattr(model, "exportable"):
        raise TypeError(
            "Exports what TwoTower.fit returns, or a tp.Exportable of another model that "
            f"embeds queries and candidates. Received: {model!r:.200}."
        )
    model = model.exportable()
    table = model.items
    is_retrieved = table[LISTED] if LISTED in table.column_names else np.ones(len(table))
    rows = np.flatnonzero(is_retrieved)
    if not user_data:
        queries = [{"history": [id_]} for id_ in model.candidate_ids[:NUM_QUERIES].tolist()]
    elif queries is None:
        queries = stored_queries(model)
    # Not called as a tf.function, which warns where many models are embedded one after the other.
    spec = tf.TensorSpec([None], tf.int32)
    embed = tf.function(model.embed_candidates, autograph=False).get_concrete_function(spec)
    vectors = embed_corpus(embed, len(model.candidate_ids))[rows]
    ids, has_bias = model.candidate_ids[rows], model.has_item_bias
    aligned = align(Path(path), ids, vectors, has_item_bias=has_bias)
    if aligned is not None:
        vectors, model = vectors @ aligned.rotation, model.turned(aligned.rotation)
    items = Items(
        table.drop_columns([LISTED] if LISTED in table.column_names else []).take(rows), vectors
    )
    encoder = Encoder(model, user_data=user_data)
    users = model if user_data else without_users(model)
    about = {**_about(users), "user_data": user_data}
    about["aligned"] = None if aligned is None else aligned.report
    about["example_user"] = next((q["user_id"] for q in queries if "user_id" in q), None)

    def fill(folder: Path) -> None:
        write_towers(model, folder)
        Stored.write(
            folder,
            item_ids=model.candidate_ids,
            user_ids=users.query_ids,
            lists={
                "histories": users.histories,
                "known": users.known_positives,
                "disliked": users.disliked,
            },
            times=users.history_times,
            columns=users.query_columns,
            graph=model.graph,
        )

    def save(
        folder: Path, full: Mapping[str, Any], probes: Answers, embedded: np.ndarray | None
    ) -> dict[str, Answers]:
        with naming(Path(path), tf.errors.OpError):
            modules = save_graphs(folder, encoder, full, embedded)
        return {part: answers_of(module, probes) for part, module in modules.items()}

    return write_version(
        Path(path),
        options,
        fill=fill,
        items=items,
        queries=queries,
        manifest={**about, **(manifest or {})},
        save_graphs=save,
    )


def _about(model: Exportable) -> dict[str, Any]:
    """Returns what a manifest says of a model, but for its users' data and its index."""
    features, bonus, items_read = model.inputs.features, model.bonus, model.items_read
    names = {side: raw_signature(features[side]) for side in ("query", "candidate")}
    names["request"] = model.inputs.request_signature
    return {
        "features": {
            side: [feature.to_dict() for feature in side_features]
            for side, side_features in features.items()
        },
        "feature_inputs": {
            side: {name: spec.name for name, spec in specs.items()} for side, specs in names.items()
        },
        "history_length": model.history_length,
        "bonus": bonus and bonus.as_dict(),
        "reading": model.reading.as_json(),
        "exclude": rule_with(model.exclude, bonus),
        "has_item_bias": model.has_item_bias,
        "items_read": items_read.isoformat(),
        # A clock that is ahead may date an event after the reading. If that ended the log, no event
        # in service would count until then.
        "histories_until": min(model.histories_until or items_read, items_read).isoformat(),
        "stored": {
            "users_are_text": model.query_ids.dtype != np.int64,
            "items_are_text": model.candidate_ids.dtype != np.int64,
            "reads_times": model.history_times is not None,
            "user_features": [*model.query_columns],
            "graph": model.graph.kind,
        },
    }


def stored_queries(model: Exportable) -> list[Query]:
    """Makes a query for each of the first 1,000 users from what a model stores about them."""
    queries: list[Query] = []
    offsets = model.histories.offsets
    for row, user in enumerate(model.query_ids[:NUM_QUERIES].tolist(), 1):
        history = model.histories[row][::-1]
        query = {"user_id": user, "history": model.candidate_ids[history - 1].tolist()}
        if model.history_times is not None:
            times = model.history_times[offsets[row] : offsets[row + 1]]
            query[HISTORY_TIMESTAMPS] = times[::-1]
        queries.append(query)
    return queries
