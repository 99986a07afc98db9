"""DuckDB, in which logs and samples are made; Spark, from which tables of a log may come."""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import duckdb
import ibis
import ibis.expr.types as ir
from ibis.backends.duckdb import Backend as DuckDB
from ibis.common.exceptions import TableNotFound

from tfrs_pipeline.data.schema import DataError
from tfrs_pipeline.durable import StorageError, naming
from tfrs_pipeline.messages import printable

# Mark temporary folders. A run's folder may have such a name, but has no such lock.
_PREFIX, _LOCK = "tfrs-pipeline-", "tables.lock"


def connect(memory_limit: str | None = None) -> DuckDB:
    """Opens a DuckDB whose tables need not fit in memory: they are in a file that is deleted later.

    Results beyond `memory_limit`, such as "4GB", go to disk too; None is four fifths of the memory.
    Both are in the system's temporary folder, and take about as much as the uncompressed events.
    """
    folder, lock = _locked_folder()
    options = {} if memory_limit is None else {"memory_limit": memory_limit}
    connection = ibis.duckdb.connect(
        folder / "tables.duckdb", temp_directory=str(folder / "spilled"), **options
    )
    # Finalizers run in reverse order, so the lock is held until the folder is gone.
    weakref.finalize(connection, os.close, lock)
    # The folder goes with its connection, not with the process: a notebook may open many logs.
    weakref.finalize(connection, shutil.rmtree, folder, ignore_errors=True)
    shown = connection.con.execute("SELECT current_setting('enable_progress_bar')").fetchone()
    if shown and shown[0]:  # In Jupyter without ipywidgets it is off, and cannot even be set.
        connection.con.execute("SET enable_progress_bar = false")
    return connection


def _locked_folder() -> tuple[Path, int]:
    """Removes the folders of killed processes; makes and locks one for this process."""
    temporary = Path(tempfile.gettempdir())
    for left in temporary.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), left.open("rb+") as opened:  # Held, or another user's.
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)
    # A folder of its own for each connection: DuckDB locks its file against other processes.
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    # Renamed once held, so that no other process takes it for an abandoned lock.
    lock = os.open(folder / "new.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(folder / "new.lock", folder / _LOCK)
    return folder, lock


def connect_spark() -> Any:
    """Opens a Spark session as an Ibis backend, with Spark's own settings, or takes the open one.

    Raises a `DataError` if pyspark or Java is missing.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise DataError(
            "Spark needs the package pyspark, which is not installed: "
            "pip install -c constraints.txt -e '.[spark]'"
        ) from error
    if not os.environ.get("JAVA_HOME") and shutil.which("java") is None:
        raise DataError(
            "Spark needs Java 17 or 21, and there is no program 'java'. Install one, such as the "
            "package default-jre-headless of Debian, or set JAVA_HOME."
        )
    return ibis.pyspark.connect(SparkSession.builder.appName("tfrs-pipeline").getOrCreate())


def open_parquet(connection: DuckDB, path: Path) -> ibis.Table:
    """Opens a Parquet file without reading it; the path is never a pattern."""
    return connection.read_parquet(glob.escape(str(path)))


def write_parquet(table: ibis.Table, path: Path) -> None:
    """Writes a table in its order, over a file that may be there."""
    with naming(path, duckdb.IOException):
        table.to_parquet(path)


def check_stored(error: Exception) -> None:
    """Raises a `StorageError` if data could not be stored; a `KeyboardInterrupt` if interrupted."""
    if isinstance(error, duckdb.InterruptException):
        raise KeyboardInterrupt from error
    reason = printable(str(error).strip().partition("\n")[0], 300)
    if is_lost := isinstance(error, TableNotFound):
        reason = "a table is missing after it was written, as on a full disk"
    if is_lost or "Could not write file" in reason:
        raise StorageError(
            f"DuckDB cannot store the log's tables: {reason}. Make room there, or set TMPDIR "
            "in the environment to another folder."
        ) from error


def random_key(*values: ir.Value, seed: int) -> ir.StringValue:
    """Hashes integers or strings to 12 hexadecimal digits, the same in every version and thread."""
    text = ibis.literal(str(seed))
    for value in values:
        text = text + ":" + value.cast("string")
    return text.hexdigest("md5").left(12)
