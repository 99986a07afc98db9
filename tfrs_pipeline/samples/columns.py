"""Columns as files that are mapped into memory: written piece by piece, read as asked."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from tfrs_pipeline.durable import is_whole, naming, read_record, write_record


class ColumnWriter:
    """Writes a .npy file, whose length is known only at its end: of numbers, or of rows of them.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.npy"
        >>> with ColumnWriter(path, np.int32) as column:
        ...     column.append([5, 3])
        ...     column.append([8])
        >>> map_column(path)
        array([5, 3, 8], dtype=int32)
    """

    def __init__(self, path: Path, dtype: Any, row_shape: tuple[int, ...] = ()) -> None:
        self._dtype = np.dtype(dtype)
        self._row_shape = row_shape
        self._length = 0
        self._file = path.open("wb")
        self._write_header()

    def append(self, values: Any) -> None:
        """Appends values, cast if they are of another type."""
        array = np.ascontiguousarray(values, self._dtype)
        self._file.write(array.data)
        self._length += len(array)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        # The format leaves room for any length in the header: it is as long as before.
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        shape = self._length, *self._row_shape
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)


class OffsetsWriter(ColumnWriter):
    """Writes where the rows of each key begin, of a table in the order of the keys.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "offsets.npy"
        >>> with OffsetsWriter(path, num_keys=5) as offsets:
        ...     offsets.append_keys(np.array([1, 1]))
        ...     offsets.append_keys(np.array([1, 3]))
        >>> map_column(path)
        array([0, 0, 3, 3, 4, 4])
    """

    def __init__(self, path: Path, num_keys: int) -> None:
        super().__init__(path, np.int64)
        self._num_keys = num_keys
        self._num_rows = 0

    def append_keys(self, keys: np.ndarray) -> None:
        """Appends rows by their keys, 0 to num_keys - 1, ascending."""
        # A key's rows may go on in the next call: where they begin is known all the same.
        new = np.arange(self._length, keys[-1] + 1)
        self.append(self._num_rows + np.searchsorted(keys, new))
        self._num_rows += len(keys)

    def __exit__(self, *error: object) -> None:
        self.append(np.full(self._num_keys + 1 - self._length, self._num_rows))
        super().__exit__(*error)


def map_columns(
    folder: Path, made_of: Mapping[str, Any], write: Callable[[Path], None]
) -> dict[str, np.ndarray]:
    """Maps the columns in a folder, written first if they are not there, whole, and made of this.

    `write` is given the folder, emptied, to write a `NAME.npy` a column. `made_of` is JSON-able:
    with another one the columns are made again.
    """
    record = folder / "columns.json"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Workers that share the folder wait for the first.
        if not (is_whole(record) and read_record(record) == made_of):
            with naming(folder):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                write(folder)
            write_record(record, made_of, folder.glob("*.npy"))
    return {path.stem: map_column(path) for path in folder.glob("*.npy")}


def map_column(path: Path) -> np.ndarray:
    """Maps a .npy file: an array that cannot be written, whose pages the system reads and drops."""
    return np.asarray(np.load(path, mmap_mode="r"))
