"""Writes what a model's users did and were served as the event table that a run reads, and back."""

import itertools
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tfrs_pipeline.data.schema import DataError, Source, require_all
from tfrs_pipeline.durable import parquet_destination, replacing
from tfrs_pipeline.service.publish import version_at
from tfrs_pipeline.service.user_events import Event, Journal

if TYPE_CHECKING:
    from tfrs_pipeline.service.retriever import LoadedRetriever

# Rows in memory at a time, and per row group of the file.
BLOCK = 100_000
# Each write holds up those of servers, for less than a tenth of a second.
_EVENTS_PER_WRITE = 10_000
# Columns of a log -> keys of events.
_KEYS = {"stage": "type", "timestamp": "time"}
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


def record_file(model: "LoadedRetriever", path: str | Path) -> Counter[str]:
    """Records the events of a Parquet file, such as `write_log` writes.

    Its columns are the keys of events, see `record`; the time may be called `timestamp`, and the
    type `stage`. Other columns are not read. A call that failed can be made again.

    Returns:
        `num_events`, all events; `num_new`, those not recorded before; `num_unknown_items`, those
        of items that the model does not retrieve now; `num_before_end`, those up to the end of the
        model's log: none of them joins a history.

    Raises as `record`, and a `DataError` if the file cannot be read, lacks a column, or has no
    value in one.
    """
    # Text would leave open what is an integer, and what a time.
    if Path(path).suffix != ".parquet":
        raise DataError(f"{path}: past events come in a .parquet file")
    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise DataError(f"{path}: {error}") from None
    names = {_KEYS.get(name, name): name for name in table.column_names}
    remedy = "Events have user_id, item_id, type (or stage) and time (or timestamp)."
    required = ("user_id", "item_id", "type", "time")
    require_all(names, dict.fromkeys(required, remedy), Source(str(path)))
    for key in required:
        if num_missing := table[names[key]].null_count:
            # A missing time would be taken for now, each time that the file is added.
            raise DataError(
                f"{path}: column {names[key]!r} is missing in {num_missing:,} of "
                f"{table.num_rows:,} rows: give them one, or leave them out"
            )
    keys = [key for key in Event._fields if key in names]
    # The events of a user lie together in the store. In another order, each write would go all over
    # its file.
    order = pc.sort_indices(table[names["user_id"]])
    events = table.select([names[key] for key in keys]).rename_columns(keys).take(order)
    if pa.types.is_timestamp(type_ := events.schema.field("time").type):
        # Python's own times end with microseconds.
        times = events["time"].cast(pa.timestamp("us", type_.tz), safe=False)
        events = events.set_column(keys.index("time"), "time", times)
    journal, counts = Journal(model.live.folder), Counter[str]()
    until = model.users.until if model.users.journal is not None else -1
    for start in range(0, len(events), _EVENTS_PER_WRITE):
        read = events.slice(start, _EVENTS_PER_WRITE).to_pylist()
        try:
            checked = model.checked_events(read)
        except ValueError:
            for row, event in zip(order[start:].to_pylist(), read, strict=False):
                try:  # One by one, so that the first that is wrong is named by its row.
                    model.checked_events([event])
                except ValueError as error:
                    raise DataError(f"{path}, row {row + 1:,}: {error}") from None
            raise
        is_candidate = model.candidates.has([event.item_id for event in checked])
        counts["num_events"] += len(checked)
        counts["num_new"] += journal.write([checked])[0]
        counts["num_unknown_items"] += int(np.count_nonzero(~is_candidate))
        counts["num_before_end"] += sum(event.time <= until for event in checked)
    return counts


def _table(rows: list[tuple[Any, ...]], schema: pa.Schema | None = None) -> pa.Table:
    types = _TYPES if schema is None else dict(zip(schema.names, schema.types, strict=True))
    columns = zip(types.items(), zip(*rows, strict=True), strict=True)
    return pa.table({name: pa.array(values, type_) for (name, type_), values in columns})
