"""Request features of samples: raw in Parquet, encoded in columns that are mapped."""

import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tfrs_pipeline.durable import file_hash, part_files
from tfrs_pipeline.samples.columns import map_columns, read_blocks, write_column


def request_column(name: str) -> str:
    """Names the column of `samples.parquet` that holds a request feature."""
    return f"request_{name}"


def read_raw(folder: Path, name: str) -> pa.ChunkedArray:
    """Reads a request feature of all samples in a folder; strings as codes of a dictionary."""
    column = request_column(name)
    parts = part_files(folder / "samples.parquet")
    is_text = pa.types.is_string(pq.read_schema(parts[0]).field(column).type)
    as_codes = [column] if is_text else None
    tables = [pq.read_table(part, columns=[column], read_dictionary=as_codes) for part in parts]
    return pa.chunked_array([chunk for table in tables for chunk in table[column].chunks])


def encoded_columns(
    folder: Path, encoders: Mapping[str, Callable[[Any], np.ndarray]], made_by: Any
) -> dict[str, np.ndarray]:
    """Maps the encoded request features of a folder's samples, written once, a part at a time.

    `encoders` turn, by feature, an Arrow array of raw values into an array; `made_by`, JSON-able,
    tells encoders apart. Returns, by feature, [num_samples, ...].
    """
    made_of = {"report": file_hash(folder / "report.json"), "encoders": made_by}
    write = functools.partial(_write, folder, encoders)
    columns = map_columns(folder / "requests", made_of, write)
    return {name: columns[str(i)] for i, name in enumerate(encoders)}


def _write(
    folder: Path, encoders: Mapping[str, Callable[[Any], np.ndarray]], columns: Path
) -> None:
    """Writes one column each, named by number: a feature's name may not be a valid file name."""
    for i, (name, encode) in enumerate(encoders.items()):
        blocks = map(encode, read_blocks(folder / "samples.parquet", request_column(name)))
        first = next(blocks)
        every = itertools.chain([first], blocks)
        write_column(columns / f"{i}.npy", first.dtype, every, first.shape[1:])
