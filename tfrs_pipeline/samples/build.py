"""Turns event tables into samples, Parquet files.

All tables have flat, ordered rows, since DuckDB would hold lists in memory.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir

from tfrs_pipeline.data import schema
from tfrs_pipeline.data.engines import random_key, write_parquet
from tfrs_pipeline.data.histories import query_start, whole_seconds, with_num_before
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.raw_table import store as store_table
from tfrs_pipeline.data.request_features import at_request
from tfrs_pipeline.data.schema import DataError, Stage, count_rows, is_positive, was_shown
from tfrs_pipeline.data.split import round_up
from tfrs_pipeline.durable import write_record
from tfrs_pipeline.negatives.samplers import FunnelLosers
from tfrs_pipeline.samples import store
from tfrs_pipeline.samples.never_negatives import ROW_PAIR, exposed_pairs, possible_losers
from tfrs_pipeline.samples.store import NO_POSITIVE, write_columns

_REQUESTED = "_requested_"
# Columns that identify a positive, in the order of the samples, and those that identify a request.
_POSITIVE = ["query_row", "time", "event_number"]
_REQUEST = ["query_row", "query_time", "request"]
MAX_POOL = 100
"""Most losers that are kept for a positive and stage."""


def build_samples(
    log: Log, folder: Path, *, seed: int, hard: FunnelLosers | None = None
) -> dict[str, Any]:
    """Writes the samples of a log below `folder`.

    | file | columns | in the order of |
    |---|---|---|
    | `corpus.parquet` | candidate_row from 1, item_id, count | candidate_row |
    | `queries.parquet` | query_row from 1, user_id | query_row |
    | `samples.parquet` | query_row, candidate_row, weight; with an order num_earlier; with timestamps time, in seconds since 1970, int64; request_<name> of each request feature; with hard negatives num_hard_<stage> | query_row, then time |
    | `hard_<stage>.parquet` | event_number, candidate_row: the samples' pools, num_hard_<stage> rows each | samples, then random |
    | `known_positives.parquet`, `exposed.parquet` | query_row, candidate_row, each pair once | both |

    A query's samples are its sequence; its first num_earlier samples come before the sample. Row 0
    is "unknown" on both sides. Counts, histories and masks come only from the given events: give
    the training part.

    An earlier event comes before the first event of the request: by time, and at equal times by
    event number, unless the log's rule for `ties` is "drop". Without times, it has an earlier
    place; without an order, it is any other positive of the user.

    All items and users of the log get rows. The seed draws the hard pools from the losers that
    `hard` asks for. Returns counts by name; with hard negatives also "hard_negatives" by stage
    (num_samples with some, and their mean_pool) and num_losers_removed, the losers that the guard
    or their rank keeps from being hard negatives. With dislikes also num_disliked, pairs of a user
    and an item, and num_disliked_clicks, clicks that are not positives, however early they came: a
    dislike anywhere in the events beats a click on the pair. Disliked items are among the exposed
    ones too, so they are never negatives of their user. Raises a `DataError` if there is no
    positive.
    """  # noqa: E501
    folder.mkdir(parents=True, exist_ok=True)
    # The report is written last: while it is missing, the samples are incomplete.
    (folder / "report.json").unlink(missing_ok=True)
    # In tables of the log's database, not in files: DuckDB caches the statistics of a path.
    work = _Work(folder)
    try:
        events = _write_rows(log, work)
        disliked = None if log.disliked is None else schema.disliked_pairs(events, ROW_PAIR)
        positives = schema.without_disliked(events.filter(is_positive), disliked)
        _write_counts(positives, work)
        known = work.write(
            "known_positives", positives.select(*ROW_PAIR).distinct().order_by(ROW_PAIR)
        )
        work.write("exposed", exposed_pairs(events, known).order_by(ROW_PAIR))
        samples = positives
        if log.order != "none":
            samples = with_num_before(positives, positives, "query_row", log.ties, "num_earlier")
        if hard is not None:
            samples = _write_pools(positives, samples, work, hard, seed)
        _write_samples(samples, work, log)
        report = _report(work, hard, disliked)
    finally:
        work.drop()
    files = [folder / f"{name}.parquet" for name in work.written]
    write_record(folder / "report.json", report, [*files, *write_columns(folder)])
    return report


@dataclass(frozen=True)
class _Work:
    """The tables of a build: kept in the log's database until they are written, and read again."""

    folder: Path
    kept: dict[str, ibis.Table] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)

    def keep(self, name: str, table: ibis.Table) -> ibis.Table:
        self.kept[name] = store_table(table, schema.Source("samples"))
        return self.kept[name]

    def write(self, name: str, table: ibis.Table) -> ibis.Table:
        write_parquet(self.keep(name, table), self.folder / f"{name}.parquet")
        self.written.append(name)
        return self.kept[name]

    def drop(self) -> None:
        for table in self.kept.values():
            table.get_backend().drop_table(table.get_name())


def _write_rows(log: Log, work: _Work) -> ibis.Table:
    """Writes the events with rows instead of ids, once, so that no output repeats the joins."""
    items = work.keep("items", _number_rows(log.items, "item_id", "candidate_row"))
    users = work.write("queries", _number_rows(log.users, "user_id", "query_row"))
    names = ["user_id", "item_id", "event_number", "stage", "request_id", "rank", "weight"]
    kept = [name for name in names if name in log.events.columns]
    time = log.events["timestamp" if "timestamp" in log.events.columns else "event_number"]
    requests = at_request(log.events, log.request_features)
    # The prefix avoids clashes with the columns that are made here.
    requests = {f"{_REQUESTED}{name}": value for name, value in requests.items()}
    events = log.events.select(*kept, time=time, **requests)
    # Rows are half as wide as ids and need no lookup in training.
    events = events.inner_join(items, "item_id").inner_join(users, "user_id")
    start, first = query_start(events, events["time"])
    events = events.mutate(query_time=start, query_number=first)
    return work.keep("events", events.drop("user_id", "item_id"))


def _number_rows(table: ibis.Table, id_column: str, row_column: str) -> ibis.Table:
    """Numbers ids in ascending order, from 1."""
    row = ibis.row_number().over(ibis.window(order_by=table[id_column])) + 1
    rows = table.select(id_column, **{row_column: row.cast("int32")})
    return rows.select(row_column, id_column).order_by(row_column)


def _write_counts(positives: ibis.Table, work: _Work) -> None:
    counts = positives.group_by("candidate_row").agg(count=positives.count())
    corpus = work.kept["items"].left_join(counts, "candidate_row").fill_null({"count": 0})
    corpus = corpus.select("candidate_row", "item_id", "count").order_by("candidate_row")
    corpus = work.write("corpus", corpus)
    if not corpus["count"].max().to_pyarrow().as_py():
        raise DataError(NO_POSITIVE)


def _write_pools(
    positives: ibis.Table, samples: ibis.Table, work: _Work, hard: FunnelLosers, seed: int
) -> ibis.Table:
    """Writes the pools; returns samples with pool sizes."""
    kept = work.kept
    found = find_losers(kept["events"], hard, kept["known_positives"], kept["exposed"])
    losers = work.keep("losers", found)
    for stage, pool in draw_pools(positives, losers, hard, seed).items():
        # A batch draws neighbours, so pools are in random order: rows group items of similar age.
        pool = pool.order_by([*_POSITIVE, "place"]).select("event_number", "candidate_row")
        pool, name = work.write(f"hard_{stage}", pool), store.pool_size_column(stage)
        sizes = pool.group_by("event_number").agg(**{name: pool.count().cast("int32")})
        samples = samples.left_join(sizes, "event_number").drop("event_number_right")
        samples = samples.fill_null({name: 0})
    return samples


def _write_samples(samples: ibis.Table, work: _Work, log: Log) -> None:
    # Ordered by the time itself, which may be finer than seconds.
    samples = samples.order_by(_POSITIVE)
    columns: dict[str, ir.Value] = {name: samples[name] for name in ROW_PAIR}
    # DuckDB reads the literal 1.0 as a decimal.
    columns["weight"] = ibis.literal(1).cast("float64")
    columns |= {name: samples[name] for name in ("weight", "num_earlier") if name in samples}
    if log.order == "timestamp":
        columns["time"] = whole_seconds(samples["time"])
    for name in log.request_features:
        columns[store.request_column(name)] = samples[f"{_REQUESTED}{name}"]
    sizes = [name for name in samples.columns if name.startswith(store.pool_size_column(""))]
    work.write("samples", samples.select(**columns, **{name: samples[name] for name in sizes}))


def _report(work: _Work, hard: FunnelLosers | None, disliked: ibis.Table | None) -> dict[str, Any]:
    events, samples = work.kept["events"], work.kept["samples"]
    corpus, known = work.kept["corpus"], work.kept["known_positives"]
    if "num_earlier" in samples.columns:
        without = samples.filter(samples["num_earlier"] == 0)
    else:  # Without an order only users with a single item have an empty history.
        one = known.group_by("query_row").having(known.count() == 1).agg(num=known.count())
        without = samples.semi_join(one, "query_row")
    report: dict[str, Any] = {
        "num_samples": count_rows(samples),
        "num_empty_histories": count_rows(without),
        "num_candidates": count_rows(corpus),
        "num_candidates_without_count": count_rows(corpus.filter(corpus["count"] == 0)),
        "num_queries": count_rows(work.kept["queries"]),
        "num_known_positives": count_rows(known),
        "num_exposed": count_rows(work.kept["exposed"]),
    }
    if disliked is not None:
        num_clicks = count_rows(events.filter(is_positive))
        report["num_disliked"] = count_rows(disliked)
        report["num_disliked_clicks"] = num_clicks - report["num_samples"]
    if hard is not None:
        num_losers = count_rows(events.filter(events["stage"].isin(list(hard.stages))))
        num_removed = num_losers - count_rows(work.kept["losers"])
        report |= {"hard_negatives": {}, "num_losers_removed": num_removed}
        for stage in hard.stages:
            sizes = samples[store.pool_size_column(stage)]
            num, total = schema.totals(samples, num=(sizes > 0).sum(), total=sizes.sum()).values()
            report["hard_negatives"][stage] = {"num_samples": num, "mean_pool": total / max(1, num)}
    return report


def find_losers(
    events: ibis.Table, hard: FunnelLosers, known: ibis.Table, exposed: ibis.Table
) -> ibis.Table:
    """Finds the losers of each request that may be hard negatives.

    Left out is what is never a negative of its user (`never_negatives.py`).

    `known` and `exposed` are the pairs of query_row and candidate_row of `known_positives.parquet`
    and `exposed.parquet`. Returns candidate_row, stage, and the request in three columns.
    """
    events = _with_request(events)
    if Stage.RANKED in hard.stages:
        # Items just below the screen are nearly as good as those on it: only the low end has lost.
        events = _without_high(events, hard)
    taken = events.filter(events["stage"].isin(list(hard.stages)))
    losers = taken.select("candidate_row", "stage", *_REQUEST)
    return possible_losers(losers, known, exposed, hard)


def draw_pools(
    positives: ibis.Table, losers: ibis.Table, hard: FunnelLosers, seed: int
) -> dict[str, ibis.Table]:
    """Draws the pool of each positive from the losers of its own request.

    Returns, by stage, query_row, time and event_number of the positive, candidate_row of the loser,
    each pair once, and its place in the pool's random order.
    """
    keys = _with_request(positives).select(*dict.fromkeys([*_POSITIVE, *_REQUEST]))
    pools: dict[str, ibis.Table] = {}
    for stage in hard.stages:
        of_stage = losers.filter(losers["stage"] == stage)
        pool = keys.inner_join(of_stage.select(*_REQUEST, "candidate_row").distinct(), _REQUEST)
        pool = pool.select(*_POSITIVE, "candidate_row")
        # A hash, not a random number: the same log gives the same pools with any number of threads.
        key = random_key(pool["candidate_row"], pool["event_number"], seed=seed)
        drawn = ibis.window(group_by="event_number", order_by=[key, pool["candidate_row"]])
        pool = pool.mutate(place=ibis.row_number().over(drawn))
        pools[stage] = pool.filter(pool["place"] < MAX_POOL)
    return pools


def _with_request(events: ibis.Table) -> ibis.Table:
    """Adds the id of the request as text: "" without one, so that the time alone identifies it."""
    has_ids = "request_id" in events.columns
    named = events["request_id"].cast("string") if has_ids else ibis.null("string")
    return events.mutate(request=ibis.coalesce(named, ""))


def _without_high(events: ibis.Table, hard: FunnelLosers) -> ibis.Table:
    """Leaves out `ranked` events that are not at the low end of their request's ranks."""
    is_ranked = events["stage"] == Stage.RANKED.value
    others = events.filter(~is_ranked)
    if "rank" not in events.columns:
        return others
    # Only ranks of the last ranked list, because other losers' ranks have another scale. What was
    # shown was on that list.
    # These alone, since a window over all events would sort what was only retrieved too.
    logged = events.filter(events["rank"].notnull() & (is_ranked | was_shown(events)))
    num = logged.count().over(ibis.window(group_by=_REQUEST))
    in_order = ibis.window(group_by=_REQUEST, order_by=["rank", "event_number"])
    # Place among the logged ranks, from 1: share s keeps the last ceil(s * n).
    place = ibis.row_number().over(in_order) + 1
    low = logged.filter(place > num - round_up(num * hard.bottom_share))
    return others.union(events.filter(is_ranked).semi_join(low, "event_number"))
