"""Columns of Parquet files: read block by block, and written as files to map into memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def read_blocks(table: Path, column: str) -> Iterator[Any]:
    """Reads a column of a Parquet file: Arrow arrays of some rows each."""
    for batch in pq.ParquetFile(table).iter_batches(columns=[column]):
        if batch.num_rows:
            yield batch[0]


def write_column(path: Path, dtype: Any, blocks: Iterable[Any]) -> None:
    """Writes blocks of numbers as one .npy file of a dtype."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (0,)}
    num_rows = 0
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            rows = np.ascontiguousarray(block, dtype)
            file.write(rows.data)
            num_rows += len(rows)
        # The format leaves room for any number of rows, so the header keeps its length.
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (num_rows,)})


def starts_of_keys(blocks: Iterable[np.ndarray], num_keys: int) -> np.ndarray:
    """Finds where the rows of each key begin in a table that is ordered by key.

    Each block, never empty, has the keys of some rows, 0 to num_keys - 1. Returns [num_keys + 1]
    int64; the last entry is the number of rows.
    """
    num_before = np.zeros(num_keys + 1, np.int64)
    for keys in blocks:
        # A block holds a range of keys, so only that slice changes.
        num_before[keys[0] + 1 : keys[-1] + 2] += np.bincount(keys - keys[0])
    return np.cumsum(num_before)


def request_column(name: str) -> str:
    """Names the column of `samples.parquet` that holds a request feature."""
    return f"request_{name}"


def read_raw(folder: Path, name: str) -> pa.ChunkedArray:
    """Reads a request feature of all samples in a folder; strings are dictionary-encoded."""
    column = request_column(name)
    table = folder / "samples.parquet"
    is_text = pa.types.is_string(pq.read_schema(table).field(column).type)
    # A text that repeats in millions of samples is held once.
    as_codes = [column] if is_text else None
    return pq.read_table(table, columns=[column], read_dictionary=as_codes)[column]
