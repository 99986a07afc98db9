"""Writes what a model's users did and were served as the event table that a run reads."""

import itertools
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from tfrs_pipeline.answers.publish import version_at
from tfrs_pipeline.durable import parquet_destination, replacing
from tfrs_pipeline.records.user_events import Journal

if TYPE_CHECKING:
    from tfrs_pipeline.answers.retriever import LoadedRetriever

# Rows in memory at a time, and per row group of the file.
BLOCK = 100_000
_TYPES: dict[str, pa.DataType | None] = {
    **dict.fromkeys(("user_id", "item_id")),  # As they were recorded: int64 or string.
    "timestamp": pa.timestamp("ms", tz="UTC"),
    "stage": pa.string(),
    "request_id": pa.string(),
    "rank": pa.int32(),
}


def write_log(model: "str | Path | LoadedRetriever", path: str | Path) -> int:
    """Writes the events and answers recorded for a model as an event table, in order of time.

    Each item of a request is a row: `user_id`, `item_id`, `timestamp`, `stage`, `request_id` and
    its `rank` in the answer, from 1. An item that was served is "retrieved", one that was shown
    "exposed", a clicked one "clicked", a disliked one "disliked"; other stages are those that were
    recorded. The furthest one counts. Events without a request have no `request_id`.

    Args:
        model: The folder of a model or of a version, or the loaded model.
        path: A `.parquet` file; an earlier one is replaced once the new one is complete. Once
            `--drop-older-days` dropped rows, it is refused, since it may be their only copy.

    Returns:
        The number of rows.

    Raises:
        Damaged: If the file of events is damaged.
        StorageError: If a file cannot be read or written.
        ValueError: If nothing has been recorded; if the path is a folder, its folder is missing, or
            its suffix is another; if there is a file that may have rows that were dropped.

    Example:
        >>> write_log("saved_models/videos", "log.parquet")  # doctest: +SKIP
        120000
    """
    version = version_at(model if isinstance(model, str | Path) else model.folder)
    path, journal, num_rows = parquet_destination(path), Journal(version.parent), 0
    if path.exists() and journal.has_dropped():
        today = path.with_stem(f"{path.stem}-{datetime.now(UTC):%Y-%m-%d}")
        raise ValueError(
            f"{path} exists, and rows have been dropped from {journal.path}: replacing the "
            f"file may lose them. Give another path, such as {today}, or move the file away."
        )
    blocks = journal.log(BLOCK)
    if (block := next(blocks, None)) is None:
        raise ValueError(
            f"Nothing has been recorded, or all was dropped: there is no event in {journal.path}. "
            "Send events to the server, or call `record`."
        )
    schema = _table(block).schema
    with replacing(path) as partial, pq.ParquetWriter(partial, schema) as file:
        for rows in itertools.chain([block], blocks):
            file.write_table(_table(rows, schema))
            num_rows += len(rows)
    return num_rows


def _table(rows: list[tuple[Any, ...]], schema: pa.Schema | None = None) -> pa.Table:
    types = _TYPES if schema is None else dict(zip(schema.names, schema.types, strict=True))
    columns = zip(types.items(), zip(*rows, strict=True), strict=True)
    return pa.table({name: pa.array(values, type_) for (name, type_), values in columns})
