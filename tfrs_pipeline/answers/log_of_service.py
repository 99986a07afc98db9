"""Writes what a model's users did and were served as the event table that a run reads."""

import itertools
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from tfrs_pipeline.answers.publish import MANIFEST_FILE, version_at
from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.durable import parquet_destination, read_record, replacing
from tfrs_pipeline.records.journal import Journal
from tfrs_pipeline.records.user_events import WORDS, event_types

if TYPE_CHECKING:
    from tfrs_pipeline.answers.retriever import LoadedRetriever

# Rows in memory at a time, and per row group of the file.
BLOCK = 100_000
# Columns of a log whose types of events have weights, in place of `stage`.
_TYPED_COLUMNS = "event", "session_id"
_TYPES: dict[str, pa.DataType | None] = {
    **dict.fromkeys(("user_id", "item_id")),  # As they were recorded: int64 or string.
    "timestamp": pa.timestamp("ms", tz="UTC"),
    **dict.fromkeys(("stage", "event", "session_id"), pa.string()),
    "weight": pa.float64(),
    "request_id": pa.string(),
    "rank": pa.int32(),
}


def write_log(model: "str | Path | LoadedRetriever", path: str | Path) -> int:
    """Writes the events and answers recorded for a model as an event table, in order of time.

    Each item of a request is a row: `user_id`, `item_id`, `timestamp`, `stage`, `request_id` and
    its `rank` in the answer, from 1. An item that was served is "retrieved", one that was shown
    "exposed", a clicked one "clicked", a disliked one "disliked"; other stages are those that were
    recorded. The furthest one counts. Events without a request have no `request_id`. If any event
    has a weight, a column `weight` holds it, and 1 for the others.

    If the model's training log had types of events with weights, each event is a row, as that log's
    settings read it. `event`, `session_id` and `weight` replace `stage`; `event` is the event's
    type, or "retrieved" for an item that was served and has no event.

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
    types = event_types(read_record(version / MANIFEST_FILE, check_files=False))
    names = [name for name in _TYPES if name not in (("stage",) if types else _TYPED_COLUMNS)]
    blocks = journal.log(BLOCK, _stage_words(types) if types else None)
    if (block := next(blocks, None)) is None:
        raise ValueError(
            f"Nothing has been recorded, or all was dropped: there is no event in {journal.path}. "
            "Send events to the server, or call `record`."
        )
    # The first row decides: ids of one column are all text, or all integers.
    id_types = (pa.string() if isinstance(id_, str) else pa.int64() for id_ in block[0])
    schema = pa.schema([(name, _TYPES[name] or next(id_types)) for name in names])
    written_names = [n for n in names if n != "weight" or types or journal.has_weights()]
    written_schema = pa.schema([schema.field(name) for name in written_names])
    with replacing(path) as partial, pq.ParquetWriter(partial, written_schema) as file:
        for rows in itertools.chain([block], blocks):
            columns = zip(schema, zip(*rows, strict=True), strict=True)
            arrays = [pa.array(values, field.type) for field, values in columns]
            file.write_table(pa.table(arrays, schema=schema).select(written_names))
            num_rows += len(rows)
    return num_rows


def _stage_words(types: Mapping[str, Any]) -> dict[str, str]:
    """Returns the name in column `event` of each stage, for events that have no type of `types`.

    A single type of a stage is its name: `dislike` becomes the log's `report`. If there are several
    or none, the name is the client's.
    The log's reader drops names that its `event_weights` lacks, and reports them.
    """
    words = {stage: word for word, stage in WORDS.items()}
    names = {}
    for stage in Stage:
        own = [name for name in types if types[name] == stage]
        # Not a name of another stage: where a view is a click, what was shown is no view.
        usual = words.get(stage, stage.value), stage.value, f"{stage.value}_in_service"
        named = own if len(own) == 1 else [name for name in usual if name in own]
        names[stage.value] = [*named, *(name for name in usual if name not in types)][0]
    return names
