"""Event tables turned into samples: sharded Parquet, a corpus table and the mask tables.

Everything is an Ibis expression, run out of core by the backend that holds the tables.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow.parquet as pq

from tfrs_pipeline.data.files import open_parquet
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.schema import DataError, Stage
from tfrs_pipeline.durable import write_record
from tfrs_pipeline.negatives.funnel import FunnelLosers
from tfrs_pipeline.samples.hard_pools import add_pools, describe_pools, find_losers
from tfrs_pipeline.samples.positives import NO_POSITIVE, Positives
from tfrs_pipeline.samples.store import POOL_PREFIX, Samples, read_samples

logger = logging.getLogger(__name__)

SAMPLES_PER_SHARD = 1_000_000
SAMPLES_PER_ROW_GROUP = 131_072


def build_samples(
    log: Log, folder: Path, *, seed: int, hard: FunnelLosers | None = None
) -> dict[str, Any]:
    """Writes the samples of a log below `folder`.

    Files: `corpus.parquet` (candidate_row from 1, item_id, count), `queries.parquet` (query_row
    from 1, user_id), `samples/shard-*.parquet` (query_row, candidate_row, weight and, in a log with
    an order, num_earlier), `sequences.parquet`, `known_positives.parquet` and `exposed.parquet`
    (query_row, candidate_rows).
    Row 0 is "unknown" on both sides. Counts, histories and masks come from the log's events alone:
    give the training part. Shards hold the samples in an order shuffled by `seed`.

    Before an event means an earlier timestamp (ties, and items of the same request, do not enter);
    in a log without times an earlier place in it; in one without any order, every other positive of
    the user.

    Args:
        log: Its events; rows are those of all its items and users.
        folder: Where to write; made if missing.
        seed: Of the shuffle, and of the draw of hard pools.
        hard: Which losers of the funnel become the samples' hard negatives; a shard then has a
            column `hard_<stage>_rows` per stage.

    Returns:
        Counts by name: num_samples, num_empty_histories, num_candidates, num_queries,
        num_known_positives, num_exposed, num_candidates_without_count; with hard negatives,
        "hard_negatives" by stage and "hard_negatives_removed" by reason.

    Raises:
        DataError: If no event is a positive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The report is written last: while it is missing, the samples are not whole.
    (folder / "report.json").unlink(missing_ok=True)
    items = _number_rows(log.items, "item_id", "candidate_row")
    users = _number_rows(log.users, "user_id", "query_row")
    has_order = log.is_ordered or "timestamp" in log.events.columns
    with _numbered(log, items, users, folder) as numbered:
        positives = Positives.select(numbered)
        _write_corpus(items, users, positives, folder)
        known, exposed = _write_lists(numbered, positives, folder)
        samples = _with_num_earlier(positives) if has_order else positives
        if "weight" not in samples.columns:
            samples = samples.mutate(weight=ibis.literal(1.0))
        removed: dict[str, int] = {}
        if hard is not None:
            losers, removed = find_losers(numbered, hard, known, exposed)
            samples = add_pools(samples, losers, hard, seed)
        num_samples = _write_shards(samples, folder / "samples", seed)
    if num_samples == 0:
        raise DataError(NO_POSITIVE)
    report = _report(folder, removed)
    shards = (folder / "samples").glob("shard-*.parquet")
    write_record(folder / "report.json", report, [*folder.glob("*.parquet"), *shards])
    return report


@contextlib.contextmanager
def _numbered(log: Log, items: ibis.Table, users: ibis.Table, folder: Path) -> Iterator[ibis.Table]:
    """Writes the events with rows instead of ids, and with their times; deleted after the build.

    Once, so that the window and the joins are not run again for every output.
    """
    numbered = log.events.inner_join(items, "item_id").inner_join(users, "user_id")
    time = numbered["timestamp" if "timestamp" in numbered.columns else "event_number"]
    numbered = numbered.mutate(time=time)
    numbered = numbered.mutate(query_time=_query_time(numbered)).drop("item_id", "user_id")
    for left in folder.glob("_numbered-*.parquet"):  # By a process that was killed.
        left.unlink()
    # Under a name of its own: DuckDB remembers the statistics of a path that it has read.
    path = folder / f"_numbered-{uuid.uuid4().hex}.parquet"
    try:
        numbered.to_parquet(path)
        yield open_parquet(numbered.get_backend(), path)
    finally:
        path.unlink(missing_ok=True)


def _write_corpus(
    items: ibis.Table, users: ibis.Table, positives: ibis.Table, folder: Path
) -> None:
    counts = positives.group_by("candidate_row").agg(count=lambda t: t.count())
    corpus = items.left_join(counts, "candidate_row").select(
        "candidate_row", "item_id", count=ibis.coalesce(counts["count"], 0)
    )
    corpus.order_by("candidate_row").to_parquet(folder / "corpus.parquet")
    users.order_by("query_row").to_parquet(folder / "queries.parquet")


def _write_lists(
    numbered: ibis.Table, positives: ibis.Table, folder: Path
) -> tuple[ibis.Table, ibis.Table]:
    """Writes each query's sequence and masks; returns the pairs behind the two masks."""
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
    return known, exposed


def _number_rows(table: ibis.Table, id_column: str, row_column: str) -> ibis.Table:
    row = ibis.row_number().over(ibis.window(order_by=table[id_column])) + 1
    return table.select(id_column, **{row_column: row.cast("int32")})


def _with_num_earlier(positives: ibis.Table) -> ibis.Table:
    """Counts, for each positive, the user's positives before its query: the column num_earlier.

    In the order of time they are a prefix of the user's sequence: what was clicked before the query
    was made. Ties are excluded, and so are items of the same request.
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
    pools = [name for name in samples.columns if name.startswith(POOL_PREFIX)]
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
