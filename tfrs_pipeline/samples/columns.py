"""Columns as files that are mapped into memory: written block by block, read on demand.

Request features are raw in Parquet files, and encoded in such columns.
"""

import fcntl
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tfrs_pipeline.durable import file_hash, naming, part_files, read_whole, write_record


def read_blocks(table: Path, column: str) -> Iterator[Any]:
    """Reads a column of Parquet, a file or a folder of parts: Arrow arrays of some rows each."""
    for part in part_files(table):
        for batch in pq.ParquetFile(part).iter_batches(columns=[column]):
            if batch.num_rows:
                yield batch[0]


def write_column(
    path: Path, dtype: Any, blocks: Iterable[Any], row_shape: tuple[int, ...] = ()
) -> None:
    """Writes blocks of numbers, or of rows of them, as one .npy file of a dtype."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (0, *row_shape)}
    num_rows = 0
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            rows = np.ascontiguousarray(block, dtype)
            file.write(rows.data)
            num_rows += len(rows)
        # The format leaves room for any number of rows, so the header keeps its length.
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (num_rows, *row_shape)})


def starts_of_keys(blocks: Iterable[np.ndarray], num_keys: int) -> np.ndarray:
    """Finds where the rows of each key begin in a table that is ordered by key.

    Each block, never empty, has the keys of some rows, 0 to num_keys - 1. Returns [num_keys + 1]
    int64; the last entry is the number of rows.
    """
    num_before = np.zeros(num_keys + 1, np.int64)
    for keys in blocks:
        num_before[keys[0] + 1 : keys[-1] + 2] += np.bincount(keys - keys[0])
    return np.cumsum(num_before)


def map_columns(
    folder: Path, made_of: Mapping[str, Any], write: Callable[[Path], None]
) -> dict[str, np.ndarray]:
    """Maps the columns in a folder, after writing them if they are missing, damaged or outdated.

    `write` writes a `NAME.npy` for each column; a change of `made_of`, a JSON value, outdates them.
    """
    record, made_of = folder / "columns.json", json.loads(json.dumps(made_of))
    # Checked without the lock, which cannot be made on a read-only disk.
    if read_whole(record) != made_of:
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Workers that share the folder wait for the first.
            if read_whole(record) != made_of:
                with naming(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                    write(folder)
                write_record(record, made_of, folder.glob("*.npy"))
    return {path.stem: np.asarray(np.load(path, mmap_mode="r")) for path in folder.glob("*.npy")}


def request_column(name: str) -> str:
    """Names the column of `samples.parquet` that holds a request feature."""
    return f"request_{name}"


def read_raw(folder: Path, name: str) -> pa.ChunkedArray:
    """Reads a request feature of all samples in a folder; strings are dictionary-encoded."""
    column = request_column(name)
    parts = part_files(folder / "samples.parquet")
    is_text = pa.types.is_string(pq.read_schema(parts[0]).field(column).type)
    as_codes = [column] if is_text else None
    return pq.read_table(parts, columns=[column], read_dictionary=as_codes)[column]


def encoded_columns(
    folder: Path, encoders: Mapping[str, Callable[[Any], np.ndarray]], made_by: Any
) -> dict[str, np.ndarray]:
    """Maps the encoded request features of a folder's samples, written once, block by block.

    `encoders` turn an Arrow array of raw values into an array; `made_by`, JSON, identifies them.
    """

    def write(columns: Path) -> None:
        for i, (name, encode) in enumerate(encoders.items()):
            blocks = map(encode, read_blocks(folder / "samples.parquet", request_column(name)))
            first = next(blocks)
            every = itertools.chain([first], blocks)
            # Files have numbers, because a feature's name may not be a valid file name.
            write_column(columns / f"{i}.npy", first.dtype, every, first.shape[1:])

    made_of = {"report": file_hash(folder / "report.json"), "encoders": made_by}
    columns = map_columns(folder / "requests", made_of, write)
    return {name: columns[str(i)] for i, name in enumerate(encoders)}
