"""Samples in memory, and the way from the Parquet files of `build_samples` to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tfrs_pipeline.data.ids import Ids

_POOL_SIZE = "num_hard_"


def pool_size_column(stage: str) -> str:
    """Names the column that holds how many hard negatives of a stage each sample has."""
    return f"{_POOL_SIZE}{stage}"


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
            then it is the rest of the sequence, copies of the positive excluded.
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

    @classmethod
    def from_pairs(
        cls,
        query_rows: Sequence[int] | np.ndarray,
        candidate_rows: Sequence[int] | np.ndarray,
        *,
        num_queries: int,
        num_candidates: int,
    ) -> Samples:
        """Makes samples of positives alone, in the order of time.

        Args:
            query_rows: [num_samples] rows in 1 .. num_queries.
            candidate_rows: [num_samples] rows in 1 .. num_candidates.
            num_queries: Users, row 0 not counted.
            num_candidates: Corpus size, row 0 not counted.

        Raises:
            ValueError: If a row is out of range, or the two differ in length.

        Example:
            >>> samples = Samples.from_pairs([1, 2, 1], [5, 5, 3], num_queries=2, num_candidates=9)
            >>> samples.history(2)
            array([5], dtype=int32)
        """
        queries, candidates = (np.asarray(x, np.int32) for x in (query_rows, candidate_rows))
        if len(queries) != len(candidates):
            raise ValueError(
                "query_rows and candidate_rows must be of one length. "
                f"Received: {len(queries)} and {len(candidates)}"
            )
        for name, rows, last in (
            ("query_rows", queries, num_queries),
            ("candidate_rows", candidates, num_candidates),
        ):
            if len(rows) and not 1 <= rows.min() <= rows.max() <= last:
                raise ValueError(
                    f"{name} must lie in 1 .. {last}: row 0 is 'unknown'. "
                    f"Received: {rows.min()} to {rows.max()}"
                )
        order = np.argsort(queries, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(queries, minlength=num_queries + 1))])
        num_earlier = np.empty(len(queries), np.int32)
        num_earlier[order] = np.arange(len(queries)) - offsets[queries[order]]
        known = np.unique(queries.astype(np.int64) << 32 | candidates)
        known_offsets = np.searchsorted(known >> 32, np.arange(num_queries + 2))
        return cls(
            query_rows=queries,
            candidate_rows=candidates,
            weights=np.ones(len(queries), np.float32),
            sequences=RowLists(offsets, candidates[order]),
            num_earlier=num_earlier,
            known_positives=RowLists(known_offsets, (known & 0xFFFFFFFF).astype(np.int32)),
            exposed=RowLists(np.zeros(num_queries + 2, np.int64), np.zeros(0, np.int32)),
            counts=np.bincount(candidates, minlength=num_candidates + 1),
        )

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


def read_samples(folder: Path) -> Samples:
    """Loads what `build_samples` wrote.

    Raises:
        FileNotFoundError: If the folder holds no samples.
    """
    path = folder / "samples.parquet"
    if not path.exists():
        raise FileNotFoundError(f"No samples in {folder}: run build_samples first.")
    table = pq.read_table(path)
    corpus = pq.read_table(folder / "corpus.parquet")
    num_queries = pq.read_table(folder / "queries.parquet", columns=["query_row"]).num_rows
    counts = np.zeros(corpus.num_rows + 1, np.int64)
    counts[corpus["candidate_row"].to_numpy()] = corpus["count"].to_numpy()
    pools = {}
    for name in table.column_names:
        if name.startswith(_POOL_SIZE):
            stage = name.removeprefix(_POOL_SIZE)
            rows = pq.read_table(folder / f"hard_{stage}.parquet", columns=["candidate_row"])
            pools[stage] = _lists(table[name].to_numpy(), rows)
    return Samples(
        query_rows=table["query_row"].to_numpy().astype(np.int32),
        candidate_rows=table["candidate_row"].to_numpy().astype(np.int32),
        weights=table["weight"].to_numpy().astype(np.float32),
        sequences=_by_query(table, num_queries),
        num_earlier=table["num_earlier"].to_numpy().astype(np.int32)
        if "num_earlier" in table.column_names
        else None,
        known_positives=_by_query(pq.read_table(folder / "known_positives.parquet"), num_queries),
        exposed=_by_query(pq.read_table(folder / "exposed.parquet"), num_queries),
        counts=counts,
        hard_pools=pools,
    )


def read_ids(folder: Path) -> tuple[Ids, Ids]:
    """Reads the ids behind the rows.

    Returns:
        candidate_ids: Item ids and their rows.
        query_ids: User ids and their rows.
    """
    corpus = pq.read_table(folder / "corpus.parquet", columns=["item_id"])["item_id"]
    queries = pq.read_table(folder / "queries.parquet", columns=["user_id"])["user_id"]
    return Ids(corpus.to_numpy()), Ids(queries.to_numpy())


def _by_query(pairs: pa.Table, num_queries: int) -> RowLists:
    return _lists(np.bincount(pairs["query_row"].to_numpy(), minlength=num_queries + 1), pairs)


def _lists(lengths: np.ndarray, rows: pa.Table) -> RowLists:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return RowLists(offsets, rows["candidate_row"].to_numpy().astype(np.int32))
