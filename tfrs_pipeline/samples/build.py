"""Event tables turned into samples: sharded Parquet, a corpus table and the mask tables.

Everything is an Ibis expression, run out of core by the backend that holds the tables.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import DataError, Stage
from tfrs_pipeline.samples.hard_pools import (
    HARD_STAGES,
    HardNegativeRules,
    add_pools,
    describe_pools,
    find_losers,
    pool_column,
)
from tfrs_pipeline.samples.positives import select_positives

logger = logging.getLogger(__name__)

HistoryOrder = Literal["timestamp", "event_number", "none"]

SAMPLES_PER_SHARD = 1_000_000
SAMPLES_PER_ROW_GROUP = 131_072


@dataclass(frozen=True)
class RowLists:
    """One list of candidate rows per key row, as offsets into flat values.

    Args:
        offsets: [num_keys + 1] int64; the list of key i is values[offsets[i]:offsets[i + 1]].
        values: [total] int32 candidate rows.
    """

    offsets: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, key: int) -> np.ndarray:
        return self.values[self.offsets[key] : self.offsets[key + 1]]

    @classmethod
    def from_lists(cls, lists: Sequence[np.ndarray]) -> RowLists:
        """Packs a list of 1-D integer arrays."""
        offsets = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
        values = np.concatenate(lists) if len(lists) else np.zeros(0)
        return cls(offsets, values.astype(np.int32))


@dataclass(frozen=True)
class Samples:
    """Training samples in memory, one per positive.

    Args:
        query_rows: [num_samples] int32, the user's row.
        candidate_rows: [num_samples] int32, the positive.
        weights: [num_samples] float32.
        sequences: Per query row, the candidate rows of all its training positives, oldest first.
        num_earlier: [num_samples] int32, how many of the query's sequence lie strictly before the
            sample: its history is that prefix, or the latest of it. None in a log without order:
            then it is the rest of the sequence, copies of the positive left out.
        known_positives: Per query row, the sorted candidate rows that it clicked in training.
        exposed: Per query row, the sorted candidate rows shown in training and never clicked.
        counts: [num_candidates + 1] int64 training positives per candidate row; row 0 is 0.
        hard_pools: Stage name -> per sample, the candidate rows of its hard negatives.
    """

    query_rows: np.ndarray
    candidate_rows: np.ndarray
    weights: np.ndarray
    sequences: RowLists
    num_earlier: np.ndarray | None
    known_positives: RowLists
    exposed: RowLists
    counts: np.ndarray
    hard_pools: Mapping[str, RowLists] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.query_rows)

    def history(self, i: int, length: int | None = None) -> np.ndarray:
        """Returns the history of sample i.

        Args:
            i: Place of the sample.
            length: Of the most recent rows to return; None is all.

        Returns:
            [at most length] int32 candidate rows, oldest first.
        """
        sequence = self.sequences[self.query_rows[i]]
        if self.num_earlier is None:
            rows = sequence[sequence != self.candidate_rows[i]]
        else:
            rows = sequence[: self.num_earlier[i]]
        return rows if length is None else rows[max(len(rows) - length, 0) :]


def build_samples(
    log: Log,
    training_events: ibis.Table,
    folder: Path,
    *,
    seed: int,
    order: HistoryOrder = "timestamp",
    hard_negatives: HardNegativeRules | None = None,
) -> dict[str, Any]:
    """Writes the samples of the training part below `folder`.

    Files: `corpus.parquet` (candidate_row from 1, item_id, count), `queries.parquet` (query_row
    from 1, user_id), `samples/shard-*.parquet` (query_row, candidate_row, weight and, unless order
    is "none", num_earlier), `sequences.parquet`, `known_positives.parquet` and `exposed.parquet`
    (query_row, candidate_rows).
    Row 0 is "unknown" on both sides. Counts, histories and masks come from `training_events`
    alone. Shards hold the samples in an order shuffled by `seed`: a batch is a fair draw.

    Args:
        log: Every item and every user, whichever part they are in.
        training_events: Events of the training part, all stages.
        folder: Where to write; made if missing.
        seed: Of the shuffle.
        order: What "before" means: an earlier timestamp (ties, and items of the same request, do
            not enter), an earlier place in the log, or, for logs without any order, every other
            positive of the user.
        hard_negatives: Which losers of the funnel become the samples' hard negatives; None leaves
            them out. A shard then has a column `hard_<stage>_rows` per stage.

    Returns:
        Counts by name: num_samples, num_empty_histories, num_candidates, num_queries,
        num_known_positives, num_exposed, num_candidates_without_count; with hard negatives,
        "hard_negatives" by stage and "hard_negatives_removed" by reason.

    Raises:
        DataError: If no training event is a positive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The report is written last: while it is missing, the samples are not whole.
    (folder / "report.json").unlink(missing_ok=True)
    items = _number_rows(log.items, "item_id", "candidate_row")
    users = _number_rows(log.users, "user_id", "query_row")
    numbered = training_events.inner_join(items, "item_id").inner_join(users, "user_id")
    # Written once, so that the window and the joins are not run again for every output.
    # Under a name of its own: DuckDB remembers the statistics of a path that it has read.
    numbered = numbered.mutate(
        time=numbered["timestamp" if order == "timestamp" else "event_number"]
    )
    numbered = numbered.mutate(query_time=_query_time(numbered))
    numbered_path = folder / f"_numbered-{uuid.uuid4().hex}.parquet"
    numbered = _materialise(numbered.drop("item_id", "user_id"), numbered_path)
    positives = select_positives(numbered)

    counts = positives.group_by("candidate_row").agg(count=lambda t: t.count())
    corpus = items.left_join(counts, "candidate_row").select(
        "candidate_row", "item_id", count=ibis.coalesce(counts["count"], 0)
    )
    corpus.order_by("candidate_row").to_parquet(folder / "corpus.parquet")
    users.order_by("query_row").to_parquet(folder / "queries.parquet")

    known = positives.select("query_row", "candidate_row").distinct()
    exposed = (
        numbered.filter(numbered["stage"] == Stage.EXPOSED.value)
        .select("query_row", "candidate_row")
        .distinct()
        .anti_join(known, ["query_row", "candidate_row"])
    )
    for name, rows, by in (
        ("sequences", positives, ["time", "event_number"]),
        ("known_positives", known, ["candidate_row"]),
        ("exposed", exposed, ["candidate_row"]),
    ):
        lists = rows.group_by("query_row").agg(
            candidate_rows=rows["candidate_row"].collect(order_by=[rows[key] for key in by])
        )
        lists.order_by("query_row").to_parquet(folder / f"{name}.parquet")

    samples = positives if order == "none" else _with_num_earlier(positives)
    if "weight" not in samples.columns:
        samples = samples.mutate(weight=ibis.literal(1.0))
    removed: dict[str, int] = {}
    if hard_negatives is not None:
        losers, removed = find_losers(numbered, hard_negatives, known, exposed)
        samples = add_pools(samples, losers, hard_negatives, seed)
    num_samples = _write_shards(samples, folder / "samples", seed)
    numbered_path.unlink()
    if num_samples == 0:
        raise DataError(
            "The training part holds no positive (an item exposed and clicked). "
            "Check the label (stage_values, rating_threshold) and the split."
        )
    report = _report(folder, removed)
    (folder / "report.json").write_text(json.dumps(report, indent=2))
    return report


def read_samples(folder: Path) -> Samples:
    """Loads what `build_samples` wrote.

    Raises:
        FileNotFoundError: If the folder holds no samples.
    """
    shards = sorted((folder / "samples").glob("shard-*.parquet"))
    if not shards:
        raise FileNotFoundError(f"No samples in {folder}: run build_samples first.")
    table = pa.concat_tables([pq.read_table(shard) for shard in shards]).combine_chunks()
    corpus = pq.read_table(folder / "corpus.parquet")
    num_queries = pq.read_metadata(folder / "queries.parquet").num_rows
    counts = np.zeros(corpus.num_rows + 1, np.int64)
    counts[corpus["candidate_row"].to_numpy()] = corpus["count"].to_numpy()
    return Samples(
        query_rows=table["query_row"].to_numpy().astype(np.int32),
        candidate_rows=table["candidate_row"].to_numpy().astype(np.int32),
        weights=table["weight"].to_numpy().astype(np.float32),
        sequences=_read_lists(folder / "sequences.parquet", num_queries + 1),
        num_earlier=table["num_earlier"].to_numpy().astype(np.int32)
        if "num_earlier" in table.column_names
        else None,
        known_positives=_read_lists(folder / "known_positives.parquet", num_queries + 1),
        exposed=_read_lists(folder / "exposed.parquet", num_queries + 1),
        counts=counts,
        hard_pools={
            stage.value: RowLists(*_unpack(table[pool_column(stage)]))
            for stage in HARD_STAGES
            if pool_column(stage) in table.column_names
        },
    )


def read_ids(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads the ids behind the rows.

    Returns:
        `candidate_ids` [num_candidates] and `query_ids` [num_queries], int64 or object (str): the
        id of row r stands at r - 1.
    """
    corpus = pq.read_table(folder / "corpus.parquet", columns=["item_id"])["item_id"]
    queries = pq.read_table(folder / "queries.parquet", columns=["user_id"])["user_id"]
    return corpus.to_numpy(), queries.to_numpy()


def _number_rows(table: ibis.Table, id_column: str, row_column: str) -> ibis.Table:
    row = ibis.row_number().over(ibis.window(order_by=table[id_column])) + 1
    return table.select(id_column, **{row_column: row.cast("int32")})


def _materialise(table: ibis.Table, path: Path) -> ibis.Table:
    table.to_parquet(path)
    return table.get_backend().read_parquet(path)


def _with_num_earlier(positives: ibis.Table) -> ibis.Table:
    """Counts, for each positive, the user's positives before its query: the column num_earlier.

    In the order of time they are a prefix of the user's sequence: what was clicked before the query
    was made. Ties are left out, and so are items of the same request.
    """
    # Clicks and queries on one line of time; a query goes before the clicks of its moment.
    clicks = positives.select("query_row", at="time", is_click=1, asker=ibis.null("int64"))
    queries = positives.select("query_row", at="query_time", is_click=0, asker="event_number")
    line = clicks.union(queries)
    before = ibis.cumulative_window(group_by="query_row", order_by=["at", "is_click"])
    line = line.mutate(num_earlier=line["is_click"].sum().over(before).cast("int32"))
    counts = line.filter(line["is_click"] == 0).select("num_earlier", event_number="asker")
    return positives.inner_join(counts, "event_number")


def _query_time(events: ibis.Table) -> ibis.Value:
    """Says when an event's query was made: at the start of its request, if it has one."""
    if "request_id" not in events.columns:
        return events["time"]
    start = events["time"].min().over(ibis.window(group_by=["query_row", "request_id"]))
    return events["request_id"].isnull().ifelse(events["time"], start)


def _write_shards(samples: ibis.Table, folder: Path, seed: int) -> int:
    folder.mkdir(exist_ok=True)
    for old in folder.glob("shard-*.parquet"):
        old.unlink()
    key = (samples["event_number"].cast("string") + f":{seed}").hash()
    pools = [name for name in samples.columns if name in map(pool_column, HARD_STAGES)]
    earlier = [name for name in samples.columns if name == "num_earlier"]
    shuffled = samples.order_by([key, samples["event_number"]]).select(
        "query_row", "candidate_row", "weight", *earlier, *pools
    )
    num_samples, shard = 0, 0
    writer: pq.ParquetWriter | None = None
    for batch in shuffled.to_pyarrow_batches(chunk_size=SAMPLES_PER_ROW_GROUP):
        if writer is None:
            writer = pq.ParquetWriter(folder / f"shard-{shard:05d}.parquet", batch.schema)
        writer.write_batch(batch)
        num_samples += batch.num_rows
        if num_samples >= (shard + 1) * SAMPLES_PER_SHARD:
            writer.close()
            writer, shard = None, shard + 1
    if writer is not None:
        writer.close()
    return num_samples


def _unpack(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Turns lists into offsets and values; null is empty."""
    if column.num_chunks == 0:
        return np.zeros(1, np.int64), np.zeros(0, np.int32)
    array = column.combine_chunks()
    lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    values = array.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
    return offsets, values


def _read_lists(path: Path, num_keys: int) -> RowLists:
    table = pq.read_table(path)
    lengths = np.zeros(num_keys, np.int64)
    if table.num_rows:
        lists = table["candidate_rows"].combine_chunks()
        lengths[table["query_row"].to_numpy()] = lists.value_lengths().to_numpy()
        values = lists.flatten().to_numpy().astype(np.int32)
    else:
        values = np.zeros(0, np.int32)
    return RowLists(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), values)


def _report(folder: Path, removed: Mapping[str, int]) -> dict[str, Any]:
    samples = read_samples(folder)
    report: dict[str, Any] = {
        "num_samples": len(samples),
        "num_empty_histories": _num_empty_histories(samples),
        "num_candidates": len(samples.counts) - 1,
        "num_candidates_without_count": int((samples.counts[1:] == 0).sum()),
        "num_queries": len(samples.known_positives) - 1,
        "num_known_positives": len(samples.known_positives.values),
        "num_exposed": len(samples.exposed.values),
    }
    if samples.hard_pools:
        sizes = {stage: np.diff(pool.offsets) for stage, pool in samples.hard_pools.items()}
        report["hard_negatives"] = describe_pools(sizes)
        report["hard_negatives_removed"] = dict(removed)
    return report


def _num_empty_histories(samples: Samples) -> int:
    if samples.num_earlier is not None:
        return int(np.count_nonzero(samples.num_earlier == 0))
    # Without an order only users of a single item have nothing else.
    num_known = np.diff(samples.known_positives.offsets)
    return int(np.count_nonzero(num_known[samples.query_rows] == 1))
