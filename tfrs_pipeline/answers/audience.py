"""Finds the users who would want an item most: the search of a query, the other way round."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tfrs_pipeline.answers.recommend import USERS_PER_PART, id_types, known_users, read_columns
from tfrs_pipeline.durable import parquet_destination, replacing
from tfrs_pipeline.messages import SILENT, Progress, check_integer
from tfrs_pipeline.search.queries import QUERIES_PER_CALL

if TYPE_CHECKING:
    from tfrs_pipeline.answers.retriever import LoadedRetriever


def audience(
    model: "LoadedRetriever",
    items: Any,
    path: str | Path,
    *,
    k: int = 1000,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Writes the k users with the highest score of each item into a Parquet file.

    Each user of an item is a row: `item_id`, `user_id`, `rank` from 1 int32, and `score` float32;
    items in their order, the best user first. The score is that of the item in the user's answer,
    by what the user did until now. A user whose answers leave the item out, such as one who clicked
    or disliked it, is in no audience of it (see `LoadedRetriever.retrieve_user`).

    A score compares users as far as it compares items: a user whose history says little has low
    ones. Takes the time of one query for each user, however many items there are.

    Args:
        model: What `tp.load` returns.
        items: Ids of items, or CSV or Parquet, or a table, with `item_id`.
        path: A `.parquet` file; an earlier one is replaced once the new one is complete.
        k: Number of users of each item.
        progress: Shows how many users are done.

    Returns:
        `num_items`, `num_users`, how many users were asked, and `num_rows`.

    Raises:
        DataError: If a file has no `item_id`, or an id that is empty or not of the model's type.
        StorageError: If the file cannot be written.
        UnknownItem: If an item is no candidate of the model.
        ValueError: If the model was exported without user data; if the path is a folder, its folder
            is missing or its suffix is another.

    Example:
        >>> audience(tp.load("saved_models/videos"), ["v7"], "fans.parquet")  # doctest: +SKIP
    """
    path = parquet_destination(path)
    check_integer(1, k=k)
    _, item_type = id_types(model)
    if not isinstance(items, Sequence) or isinstance(items, str):
        table = read_columns(items, "items", {"item_id": item_type})
        items = table["item_id"].to_pylist()
    ids = list(dict.fromkeys(items))
    vectors, rows = model.candidates.vectors_of(ids), model.stored.items.rows(ids)
    # By row of the training's items, the place among the items asked for; -1 for others.
    place_of_row = np.full(len(model.stored.items) + 1, -1)
    place_of_row[rows[rows > 0]] = np.flatnonzero(rows > 0)
    place_of = {id_: place for place, id_ in enumerate(ids)}
    model.graph.catch_up()
    users = known_users(model)

    def score(block: slice) -> np.ndarray:
        some = users[block].to_pylist()
        arrays = model.inputs.read([{"user_id": id_} for id_ in some])
        embedded = model.engine.embed("embed_user", arrays)
        scores = vectors @ embedded["embeddings"].T
        for line, (of_items, numbers) in enumerate(embedded.get("with_bonus", ())):
            places = place_of_row[of_items]
            scores[places[places >= 0], line] += numbers[: len(of_items)][places >= 0]
        for line, known in enumerate(embedded["known_items"]):
            scores[[place_of[id_] for id_ in known if id_ in place_of], line] = -np.inf
        return scores

    best = np.full((len(ids), 0), -np.inf, np.float32)
    best_users = np.zeros((len(ids), 0), np.int64)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, len(users), USERS_PER_PART):
            end = min(start + USERS_PER_PART, len(users))
            starts = range(start, end, QUERIES_PER_CALL)
            blocks = [slice(first, min(first + QUERIES_PER_CALL, end)) for first in starts]
            scores = np.concatenate([best, *threads.map(score, blocks)], axis=1)
            numbers = np.broadcast_to(np.arange(start, end), (len(ids), end - start))
            numbers = np.concatenate([best_users, numbers], axis=1)
            # Stable: of equal scores, the first user comes first.
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            best, best_users = (np.take_along_axis(x, order, axis=1) for x in (scores, numbers))
            progress.task("audience", end, len(users))
    is_filled = best > -np.inf
    lines, ranks = np.nonzero(is_filled)
    columns = {
        "item_id": pa.array([ids[line] for line in lines], item_type),
        "user_id": users.take(pa.array(best_users[is_filled])),
        "rank": pa.array(ranks + 1, pa.int32()),
        "score": pa.array(best[is_filled], pa.float32()),
    }
    with replacing(path) as partial:
        pq.write_table(pa.table(columns), partial)
    return {"num_items": len(ids), "num_users": len(users), "num_rows": len(lines)}
