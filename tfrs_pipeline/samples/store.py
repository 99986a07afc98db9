"""Samples, in memory or mapped from the files of `build_samples`."""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tfrs_pipeline.data.ids import Ids
from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.features.feature import Feature

_FLAT: dict[str, type] = {
    **dict.fromkeys(("query_row", "candidate_row", "num_earlier"), np.int32),
    "weight": np.float32,
    "time": np.int64,
}
_POOL_SIZE = "num_hard_"
PAIR_VALUE = (1 << 32) - 1
"""The bits of a pair (`RowLists.pairs`) that hold the candidate row."""


def pool_size_column(stage: str) -> str:
    """Names the column that holds how many hard negatives of a stage each sample has."""
    return f"{_POOL_SIZE}{stage}"


def request_column(name: str) -> str:
    """Names the column of `samples.parquet` that holds a request feature."""
    return f"request_{name}"


def padded_lines(
    values: np.ndarray,
    first: np.ndarray,
    num: np.ndarray,
    width: int,
    *,
    step: int = 1,
    missing: float = 0,
) -> np.ndarray:
    """Gathers [n] lines of `num` values from offset `first`, padded with `missing`: [n, width].

    A line is read backwards if `step` is -1; at most `width` of its values are read.
    """
    offset = np.arange(width)
    is_there = offset < num[:, np.newaxis]
    source = first[:, np.newaxis] + step * offset
    lines = np.full(is_there.shape, missing, np.result_type(values, missing))
    lines[is_there] = values[source[is_there]]
    return lines


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns where lists of these lengths begin in flat values, and the total: [n + 1] int64."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@dataclass(frozen=True)
class RowLists:
    """One list of candidate rows per key row, as offsets into flat values.

    The list of key i is values[offsets[i]:offsets[i + 1]], int32; offsets are [num_keys + 1] int64.
    """

    offsets: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, key: int) -> np.ndarray:
        return self.values[self.offsets[key] : self.offsets[key + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[key] for key in range(len(self)))

    @classmethod
    def from_lists(cls, lists: Sequence[np.ndarray]) -> "RowLists":
        """Packs a list of 1-D integer arrays."""
        values = np.concatenate([np.zeros(0, np.int32), *lists]).astype(np.int32)
        return cls(offsets_of([len(x) for x in lists]), values)

    @classmethod
    def empty(cls, num_keys: int) -> "RowLists":
        """Makes empty lists."""
        return cls(np.zeros(num_keys + 1, np.int64), np.zeros(0, np.int32))

    def take(self, keys: np.ndarray) -> "RowLists":
        """Gathers the list of each key, [n] integers; repeats are allowed."""
        starts = self.offsets[keys]
        lengths = self.offsets[keys + 1] - starts
        offsets = offsets_of(lengths)
        position = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return RowLists(offsets, self.values[position])

    def where(self, is_kept: np.ndarray) -> "RowLists":
        """Keeps some of the values, [total] bool."""
        return RowLists(np.append(0, np.cumsum(is_kept))[self.offsets], self.values[is_kept])

    def pairs(self, keys: np.ndarray | None = None) -> np.ndarray:
        """Returns each value with the key of its list as one number: [total] int64.

        The key, by default the list's number, is above bit 32, and the value below: `PAIR_VALUE`.
        """
        keys = np.arange(len(self)) if keys is None else keys
        return np.repeat(keys, np.diff(self.offsets)).astype(np.int64) << 32 | self.values

    def latest(self, length: int) -> np.ndarray:
        """Returns the ends of the lists, backwards, padded with 0: [num_keys, length] int32."""
        ends, lengths = self.offsets[1:], np.diff(self.offsets)
        return padded_lines(self.values, ends - 1, lengths, length, step=-1)


@dataclass(frozen=True)
class Samples:
    """Training samples, one per positive: arrays in memory, or mapped from files.

    Args:
        query_rows: [num_samples] int32, the user's row.
        candidate_rows: [num_samples] int32, the positive.
        weights: [num_samples] float32.
        sequences: Per query row, the candidate rows of all its training positives, oldest first.
        num_earlier: [num_samples] int32, how many items of the query's sequence come before the
            sample: its history is that prefix, or its latest part. None in a log without order,
            where the history is the rest of the sequence without copies of the positive.
        known_positives: Per query row, the sorted candidate rows that it clicked in training and
            did not dislike there.
        exposed: Per query row, the sorted candidate rows shown in training and not clicked, or
            disliked.
        counts: [num_candidates + 1] int64 training positives per candidate row; row 0 is 0.
        hard_pools: Stage name -> per sample, the candidate rows of its hard negatives.
        request_columns: Request feature -> [num_samples] or [num_samples, any], encoded: int32, or
            float32 with NaN where missing.
        sequence_times: [total] int64, seconds since 1970 of each value in `sequences`. None in a
            log without timestamps.
        is_later: [num_candidates + 1] bool, items that came after the training: never negatives.
            None if there are none.
        query_ids: The users of the query rows; None in samples of other origin than a log.
        candidate_ids: The items of the candidate rows; None likewise.
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
    request_columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    sequence_times: np.ndarray | None = None
    is_later: np.ndarray | None = None
    query_ids: Ids | None = None
    candidate_ids: Ids | None = None

    @property
    def num_possible_negatives(self) -> int:
        """Number of candidates that may be negatives: all but those that came later."""
        num_later = 0 if self.is_later is None else int(self.is_later.sum())
        return len(self.counts) - 1 - num_later

    def __len__(self) -> int:
        return len(self.query_rows)

    @classmethod
    def from_pairs(
        cls,
        query_rows: Sequence[int] | np.ndarray,
        candidate_rows: Sequence[int] | np.ndarray,
        *,
        num_queries: int,
        num_candidates: int,
    ) -> "Samples":
        """Makes samples from positives only, given in the order of time.

        Rows are [num_samples] integers in 1 .. num_queries and 1 .. num_candidates; a `ValueError`
        if not.

        Example:
            >>> samples = Samples.from_pairs([1, 2, 1], [5, 5, 3], num_queries=2, num_candidates=9)
            >>> samples.history(2)
            array([5], dtype=int32)
        """
        queries, candidates = np.asarray(query_rows), np.asarray(candidate_rows)
        for rows, last in ((queries, num_queries), (candidates, num_candidates)):
            is_row = np.issubdtype(rows.dtype, np.integer) & (rows >= 1) & (rows <= last)
            if len(queries) != len(candidates) or not np.all(is_row):
                raise ValueError(
                    "query_rows and candidate_rows must be of one length and hold integers from 1 "
                    f"(row 0 is 'unknown') to {last}. Received: {rows}"
                )
        queries, candidates = queries.astype(np.int32), candidates.astype(np.int32)
        order = np.argsort(queries, kind="stable")
        offsets = offsets_of(np.bincount(queries, minlength=num_queries + 1))
        num_earlier = np.empty(len(queries), np.int32)
        num_earlier[order] = np.arange(len(queries)) - offsets[queries[order]]
        # A pair as one number, so that sorting and removing copies is one call.
        known = np.unique(queries.astype(np.int64) << 32 | candidates)
        known_offsets = np.searchsorted(known >> 32, np.arange(num_queries + 2))
        return cls(
            query_rows=queries,
            candidate_rows=candidates,
            weights=np.ones(len(queries), np.float32),
            sequences=RowLists(offsets, candidates[order]),
            num_earlier=num_earlier,
            known_positives=RowLists(known_offsets, (known & PAIR_VALUE).astype(np.int32)),
            exposed=RowLists.empty(num_queries + 1),
            counts=np.bincount(candidates, minlength=num_candidates + 1),
        )

    def history(self, i: int) -> np.ndarray:
        """Returns the candidate rows of sample i's history: [n] int32, oldest first."""
        sequence = self.sequences[self.query_rows[i]]
        if self.num_earlier is None:
            return sequence[sequence != self.candidate_rows[i]]
        return sequence[: self.num_earlier[i]]

    def latest(self, index: np.ndarray, length: int) -> np.ndarray:
        """Gathers the latest `length` rows of the histories of samples, [n] places.

        Returns [n, length] int32 candidate rows, most recent first, padded with 0.
        """
        if self.num_earlier is None:
            # The rest of the sequences, without copies of the positive.
            # Without an order there is no earlier part, and the positive itself would give it away.
            lists = self.sequences.take(self.query_rows[index])
            positives = np.repeat(self.candidate_rows[index], np.diff(lists.offsets))
            return lists.where(lists.values != positives).latest(length)
        num = self.num_earlier[index]
        last = self.sequences.offsets[self.query_rows[index]] + num - 1
        return padded_lines(self.sequences.values, last, num, length, step=-1)

    def latest_times(self, index: np.ndarray, length: int) -> np.ndarray:
        """Gathers the times of samples' queries, then of the items that `latest` returns.

        The query's time is the time of the first event after its history. Returns [n, length + 1]
        float64 seconds; NaN fills the rest.
        """
        assert self.sequence_times is not None
        assert self.num_earlier is not None
        num = self.num_earlier[index]
        last = self.sequences.offsets[self.query_rows[index]] + num
        return padded_lines(self.sequence_times, last, num + 1, length + 1, step=-1, missing=np.nan)


def read_samples(
    folder: Path, *, request_features: Iterable[Feature] = (), **others: Any
) -> Samples:
    """Maps the samples that `build_samples` wrote; a batch reads what it needs.

    Request features are encoded, and `others` are the fields of `Samples` that no file has. Whether
    the files are as they were written is for the caller to check, once: their record is
    `report.json`. A `FileNotFoundError` without samples.
    """
    if not all((folder / name).exists() for name in ("report.json", "columns")):
        raise FileNotFoundError(f"No samples in {folder}: run build_samples first.")
    paths = (folder / "columns").glob("*.npy")
    column = {path.stem: np.asarray(np.load(path, mmap_mode="r")) for path in paths}

    def lists(name: str) -> RowLists:
        return RowLists(column[f"of_{name}"], column[name])

    return Samples(
        query_rows=column["query_row"],
        candidate_rows=column["candidate_row"],
        weights=column["weight"],
        # Samples are ordered by user and time, so they are the sequences too.
        sequences=RowLists(column["of_sequences"], column["candidate_row"]),
        num_earlier=column.get("num_earlier"),
        sequence_times=column.get("time"),
        known_positives=lists("known_positives"),
        exposed=lists("exposed"),
        counts=column["counts"],
        hard_pools={x.removeprefix("hard_"): lists(x) for x in column if x.startswith("hard_")},
        request_columns={
            x.name: x.encode_column(read_raw(folder, x.name)) for x in request_features
        },
        **others,
    )


def read_ids(folder: Path) -> tuple[Ids, Ids]:
    """Reads the ids behind the rows: item ids, and user ids."""
    items, users = (
        pq.read_table(folder / f"{table}.parquet", columns=[name])[name].to_numpy()
        for table, name in (("corpus", "item_id"), ("queries", "user_id"))
    )
    return Ids(items), Ids(users)


def read_raw(folder: Path, name: str) -> pa.ChunkedArray:
    """Reads a request feature of all samples in a folder; strings are dictionary-encoded."""
    column = request_column(name)
    table = folder / "samples.parquet"
    is_text = pa.types.is_string(pq.read_schema(table).field(column).type)
    # A text that repeats in millions of samples is held once.
    as_codes = [column] if is_text else None
    return pq.read_table(table, columns=[column], read_dictionary=as_codes)[column]


def write_columns(folder: Path) -> list[Path]:
    """Copies the Parquet files of samples to a folder `columns`, to map; returns its files.

    A column is `NAME.npy`; the offsets of lists are `of_NAME.npy`. One column is in memory at a
    time.
    """
    # Parquet is compressed in pages, so a batch of scattered rows would unpack most of a file.
    columns = folder / "columns"
    shutil.rmtree(columns, ignore_errors=True)
    columns.mkdir()

    def read(table: str, column: str) -> np.ndarray:
        return pq.read_table(folder / f"{table}.parquet", columns=[column])[column].to_numpy()

    def write(name: str, dtype: Any, values: np.ndarray) -> None:
        np.save(columns / f"{name}.npy", values.astype(dtype, copy=False))

    num_queries = pq.read_metadata(folder / "queries.parquet").num_rows

    def write_starts(name: str, table: str) -> None:
        # Where the rows of each query begin in a table that is ordered by query.
        lengths = np.bincount(read(table, "query_row"), minlength=num_queries + 1)
        write(f"of_{name}", np.int64, offsets_of(lengths))

    names = pq.read_schema(folder / "samples.parquet").names
    for name, dtype in _FLAT.items():
        if name in names:
            write(name, dtype, read("samples", name))
    write_starts("sequences", "samples")
    for name in ("known_positives", "exposed"):
        write(name, np.int32, read(name, "candidate_row"))
        write_starts(name, name)
    for name in names:
        if name.startswith(_POOL_SIZE):
            pool = f"hard_{name.removeprefix(_POOL_SIZE)}"
            write(pool, np.int32, read(pool, "candidate_row"))
            write(f"of_{pool}", np.int64, offsets_of(read("samples", name)))
    write("counts", np.int64, np.append(0, read("corpus", "count")))
    return sorted(columns.iterdir())


NO_POSITIVE = (
    "The training part holds no positive (an item exposed and clicked). "
    "Check the label (stage_values, rating_threshold) and the split."
)


def resampling_rate(counts: np.ndarray, exponent: float) -> np.ndarray | None:
    """Computes how often each candidate's positives are drawn, or weigh; only ratios matter.

    rate(c) = counts(c)^(-exponent), so that c comes in proportion to counts(c)^(1 - exponent). The
    model then learns log p(c | x) plus the log of the rate. It is [num_rows] float64, 0 without a
    sample; None for an exponent of 0.
    """
    if exponent == 0:
        return None
    # Rows without a sample get 0 below; the maximum only avoids a division by 0.
    safe = np.maximum(np.asarray(counts, np.float64), 1.0)
    return np.where(np.asarray(counts) > 0, safe**-exponent, 0.0)


def positive_probability(counts: np.ndarray, rate: np.ndarray | None = None) -> np.ndarray:
    """Computes q_positive, the distribution from which batches draw positives: counts * rate.

    Weights are not rates and do not change it. Returns [num_rows] float64 with sum 1. Raises a
    `DataError` if there is no positive.
    """
    mass = np.asarray(counts, np.float64) * (1.0 if rate is None else rate)
    total = mass.sum()
    if total <= 0:
        raise DataError(NO_POSITIVE)
    return mass / total
