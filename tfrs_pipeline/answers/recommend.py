"""Writes the best items of all users into a file, in parts that survive a kill."""

import hashlib
import os
import shutil
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tfrs_pipeline.answers.publish import MANIFEST_FILE
from tfrs_pipeline.data.schema import DataError, Source, require_all
from tfrs_pipeline.data.settings import Reading
from tfrs_pipeline.durable import file_hash, hold_to, locked, parquet_destination, replacing
from tfrs_pipeline.libraries import require
from tfrs_pipeline.messages import SILENT, Progress, check_integer
from tfrs_pipeline.search.queries import QUERIES_PER_CALL

if TYPE_CHECKING:
    from tfrs_pipeline.answers.retriever import LoadedRetriever

# A part is written whole, so a killed command repeats the answers of this many users at most.
USERS_PER_PART = 8_192
# Columns with a dictionary. That of scores, most of which differ, would be large and of no use.
_REPEATED = ["user_id", "item_id", "rank"]


def recommend(
    model: "LoadedRetriever",
    path: str | Path,
    *,
    users: Any = None,
    k: int = 100,
    allowed: Collection[str] = (),
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Writes the k best items of each user, as `retrieve_user` answers them, into a Parquet file.

    Each item is a row: `user_id`, `item_id`, `rank` from 1 int32, and `score` float32; users in
    their order, the best item first. A user for whom fewer than k items are left has fewer rows.

    The folder `PATH.parts` holds the answers of 8,192 users a file, each complete, until the file
    is. If the process is killed, the same call goes on after the last complete part.

    Args:
        model: What `tp.load` returns.
        path: A `.parquet` file; an earlier one is replaced once the new one is complete.
        users: CSV or Parquet, or a table, with `user_id` and optionally `history`: item ids, oldest
            first, in a list, or in a text that is split as in the log's files. A user with a
            history is answered by it; its items take the place of the stored ones, and what
            `left_out` of the model returns is left out. None is all users of the model, and then
            those of whom only events are known.
        k: Number of items for each user.
        allowed: Values of the item filter; items need one of them. An empty list allows all.
        progress: Shows how many users are done, and how many a second.

    Returns:
        `num_users`, `num_rows`, `num_unknown_items`, how many items of the histories in `users` the
        training did not have, and `users_per_second`, of the users answered in this call.

    Raises:
        DataError: If `users` has no `user_id`, an empty one, one that is not of the model's type,
            or one with several histories.
        InUse: If another process writes the same file.
        StorageError: If the file cannot be written.
        ValueError: If the path is a folder, its folder is missing or its suffix is another; if the
            parts belong to another version, k, filter or other users; as `retrieve_user` raises.

    Example:
        >>> recommend(tp.load("saved_models/videos"), "tonight.parquet", k=20)  # doctest: +SKIP
    """
    path = parquet_destination(path)
    check_integer(1, k=k)
    model.graph.catch_up()  # As a server's, these answers follow what others have clicked.
    table = pa.table({"user_id": known_users(model)}) if users is None else _read(model, users)
    parts = path.with_name(f"{path.name}.parts")
    record = parts / "parts.json"  # Says which request the parts answer.
    request = {"version": str(model.folder), "k": k, "filter": sorted(allowed)}
    request |= {"manifest": file_hash(model.folder / MANIFEST_FILE)}
    with locked(path.with_name(f"{path.name}.lock")):
        parts.mkdir(exist_ok=True)
        if not record.exists():  # A kill left these parts, and nothing says what they answer.
            for file in parts.glob("*.parquet"):
                file.unlink()
        if users is None:  # Those at the start: events may bring more before the command goes on.
            if not (kept := parts / "users.parquet").exists():
                with replacing(kept) as partial:
                    pq.write_table(table, partial)
            table = pq.read_table(kept)
        digest = hashlib.sha256()
        for batch in table.combine_chunks().to_batches(max_chunksize=USERS_PER_PART):
            digest.update(batch.serialize())
        request["users"] = digest.hexdigest()
        hold_to(record, request)
        starts = range(0, table.num_rows, USERS_PER_PART)
        files = [parts / f"{number:06}.parquet" for number in range(len(starts))]
        num_done, start_time, rate = 0, time.monotonic(), 0.0
        for file, start in zip(files, starts, strict=True):
            if not file.exists():
                part = table.slice(start, USERS_PER_PART)
                with replacing(file) as partial:
                    answers = _answers(model, part, k, list(allowed))
                    pq.write_table(answers, partial, use_dictionary=_REPEATED)
                num_done += part.num_rows
                rate = num_done / (time.monotonic() - start_time)
            done, note = min(start + USERS_PER_PART, table.num_rows), f"{rate:,.0f} users/s"
            progress.task("recommend", done, table.num_rows, note if rate else "")
        with (
            replacing(path) as partial,
            pq.ParquetWriter(partial, _schema(model), use_dictionary=_REPEATED) as writer,
        ):
            for file in files:
                writer.write_table(pq.read_table(file))
        record.unlink()  # First: if a kill leaves parts, the next call does not take them.
        shutil.rmtree(parts)
    num_rows = pq.read_metadata(path).num_rows
    about = {"num_users": table.num_rows, "num_rows": num_rows, "users_per_second": rate}
    return about | {"num_unknown_items": _num_unknown(model, table)}


def _num_unknown(model: "LoadedRetriever", users: pa.Table) -> int:
    """Counts the items of histories that the training did not have."""
    if "history" not in users.column_names:
        return 0
    ids = pc.list_flatten(users["history"]).drop_null().to_pylist()
    return int((~model.stored.has_items(ids)).sum())


def known_users(model: "LoadedRetriever") -> pa.Array:
    """Returns the ids of all users that the training had, in the order of their rows.

    Users of whom only events are known follow, in the order of their ids.

    Raises a `ValueError` if the model was exported without user data.
    """
    if not model.manifest["user_data"]:
        raise ValueError(
            "This model was exported without user data and knows no users: give `users`, with "
            "their histories."
        )
    are_text = model.stored.users.are_text
    type_, _ = id_types(model)
    trained = pa.array(model.stored.users.values(), type_)
    recorded = [] if model.users.journal is None else model.users.journal.user_ids()
    # An earlier model of this name may have had ids of the other type.
    active = pa.array([id_ for id_ in recorded if isinstance(id_, str) == are_text], type_)
    return pa.concat_arrays([trained, active.filter(pc.invert(pc.is_in(active, trained)))])


def id_types(model: "LoadedRetriever") -> tuple[pa.DataType, pa.DataType]:
    """Returns the types of the users' ids and of the items'."""
    user_id, item_id = (
        pa.string() if ids.are_text else pa.int64()
        for ids in (model.stored.users, model.stored.items)
    )
    return user_id, item_id


def _schema(model: "LoadedRetriever") -> pa.Schema:
    user_id, item_id = id_types(model)
    ids = {"user_id": user_id, "item_id": item_id}
    return pa.schema({**ids, "rank": pa.int32(), "score": pa.float32()})


def _read(model: "LoadedRetriever", users: Any) -> pa.Table:
    """Reads a table of users, one row each: user_id, and history if there is one.

    Raises a `DataError` as `recommend` does.
    """
    user_id, item_id = id_types(model)
    separator = Reading(**model.manifest.get("reading", {})).list_separator
    types = {"user_id": user_id, "history": pa.list_(item_id)}
    table = read_columns(users, "users", types, separator)
    if table.num_columns == 1:
        table = table.group_by(["user_id"], use_threads=False).aggregate([])
    if pc.count_distinct(table["user_id"]).as_py() < table.num_rows:
        name = users if isinstance(users, str | Path) else "users"
        raise DataError(f"{name}: a user comes twice, with a history each. Keep one.")
    return table


def read_columns(
    source: Any, what: str, types: Mapping[str, pa.DataType], separator: str = "|"
) -> pa.Table:
    """Reads columns of ids of a file or a table; only the first has to be there.

    A text in place of a list is split. Raises a `DataError` if there is no such column, or it has
    an empty id or one of another type.
    """
    require("data", f"Reading a file of {what}")
    from tfrs_pipeline.data.engines import connect
    from tfrs_pipeline.data.files import scan

    scanned, (first, *_) = scan(connect(), source, what), types
    remedy = f"Other columns than {', '.join(types)} are not read."
    require_all(scanned.columns, {first: remedy}, Source(scanned.name))
    names = [name for name in types if name in scanned.columns]
    raw = scanned.load({name: name for name in names})
    table = raw.table.order_by("_row").select(names).to_pyarrow()
    if raw.dropped:
        raise DataError(f"{scanned.name}: {raw.dropped[0].reason}. Mend the line.")
    for position, name in enumerate(names):
        column = table[name].combine_chunks()
        try:
            if pa.types.is_list(types[name]) and pa.types.is_string(column.type):
                texts = [(text or "").split(separator) for text in column.to_pylist()]
                column = pa.array([[*filter(None, map(str.strip, text))] for text in texts])
            table = table.set_column(position, name, column.cast(types[name]))
        except pa.ArrowException as error:
            raise DataError(f"{scanned.name}: column {name!r} holds no ids: {error}") from None
    if num_empty := table[first].null_count:
        raise DataError(f"{scanned.name}: {num_empty} rows have no {first}. Remove them.")
    return table


def _answers(model: "LoadedRetriever", users: pa.Table, k: int, allowed: list[str]) -> pa.Table:
    """Answers users in threads, each of which takes one batch after another."""
    batches = [
        users.slice(start, QUERIES_PER_CALL) for start in range(0, len(users), QUERIES_PER_CALL)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return pa.concat_tables(
            threads.map(lambda batch: _answer(model, batch, k, allowed), batches)
        )


def _answer(model: "LoadedRetriever", users: pa.Table, k: int, allowed: list[str]) -> pa.Table:
    ids = users["user_id"].to_pylist()
    histories = (
        users["history"].to_pylist() if "history" in users.column_names else [None] * len(ids)
    )
    # One call for the users with a history of their own, and one for the others.
    has_history = np.array([bool(history) for history in histories])
    shape = len(ids), min(k, model.num_candidates)
    items = np.zeros(shape, object if model.stored.items.are_text else np.int64)
    scores = np.zeros(shape, np.float32)
    for by_history in np.unique(has_history):
        lines = np.flatnonzero(has_history == by_history)
        user_ids = [ids[line] for line in lines]
        filters = [allowed] * len(lines) if allowed else None
        if by_history:
            queries = [{"user_id": ids[line], "history": histories[line]} for line in lines]
            exclude = model.left_out(queries)
            answer = model.retrieve(queries, shape[1], exclude, allowed=filters)
        else:
            answer = model.retrieve_user(user_ids, shape[1], allowed=filters)[:2]
        items[lines], scores[lines] = answer
    is_filled = scores > -np.inf
    lines, ranks = np.nonzero(is_filled)
    columns = [users["user_id"].combine_chunks().take(lines), pa.array(items[is_filled])]
    columns += [pa.array(ranks + 1, pa.int32()), pa.array(scores[is_filled])]
    return pa.table(columns, schema=_schema(model))
