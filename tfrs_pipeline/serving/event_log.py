"""Writes what a model's users did and were served as the event table that a run reads."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tfrs_pipeline.durable import replacing
from tfrs_pipeline.serving.journal import Journal
from tfrs_pipeline.serving.publish import version_at
from tfrs_pipeline.serving.vectors import destination_problem

# Rows in memory at a time, and per row group of the file.
BLOCK = 100_000
_TYPES: dict[str, pa.DataType | None] = {
    **dict.fromkeys(("user_id", "item_id")),  # As they were recorded: int64 or string.
    "timestamp": pa.timestamp("ms", tz="UTC"),
    "stage": pa.string(),
    "request_id": pa.string(),
    "rank": pa.int32(),
}


def write_log(model: str | Path, path: str | Path) -> int:
    """Writes the events and answers recorded for a model as an event table, in order of time.

    Each item of a request is a row: `user_id`, `item_id`, `timestamp`, `stage`, `request_id` and
    its `rank` in the answer, from 0. An item that was served is "retrieved", one that was shown
    "exposed", a clicked one "clicked", a disliked one "disliked"; other stages are those that were
    recorded. The furthest one counts. Events without a request have no `request_id`.

    Args:
        model: The folder of a model or of a version.
        path: A `.parquet` file; an earlier one is replaced once the new one is complete.

    Returns:
        The number of rows.

    Raises:
        Damaged: If the file of events is damaged.
        StorageError: If a file cannot be read or written.
        ValueError: If nothing has been recorded; if the path is a folder, its folder is missing, or
            its suffix is another.

    Example:
        >>> write_log("saved_models/videos", "log.parquet")  # doctest: +SKIP
        120000
    """
    path, journal, num_rows = Path(path), Journal(version_at(model).parent), 0
    if problem := destination_problem(path):
        raise ValueError(f"path: {problem}")
    blocks = journal.log(BLOCK)
    if (block := next(blocks, None)) is None:
        raise ValueError(
            f"Nothing has been recorded: there is no event in {journal.path}. Send events to the "
            "server, or call `record`."
        )
    with replacing(path) as partial:
        table = _table(block)
        with pq.ParquetWriter(partial, table.schema) as file:
            while block is not None:
                file.write_table(_table(block, table.schema))
                num_rows += len(block)
                block = next(blocks, None)
    return num_rows


def _table(rows: list[tuple[Any, ...]], schema: pa.Schema | None = None) -> pa.Table:
    types = _TYPES if schema is None else dict(zip(schema.names, schema.types, strict=True))
    columns = zip(types.items(), zip(*rows, strict=True), strict=True)
    return pa.table({name: pa.array(values, type_) for (name, type_), values in columns})
