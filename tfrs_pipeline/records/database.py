"""SQLite files beside a model's versions.

Any number of processes on one machine may read and write such a file. A write is a transaction, on
disk before it is confirmed, so a killed process or a power cut leaves all of it or nothing.
"""

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tfrs_pipeline.durable import Damaged, StorageError, locked, naming, replacing

# A writer waits this long for others. A transaction takes milliseconds; a rewrite of the events'
# file takes 5 to 7 s a GB, so it holds off others for too long from 4 to 5 GB on.
BUSY_SECONDS = 30.0
# SQLite's codes for a file that is not as this version wrote it. The first comes from a missing
# table or column.
_DAMAGES = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Stamp(NamedTuple):
    """What changes with a file's content; times in nanoseconds since 1970."""

    device: int
    inode: int
    size: int
    mtime: int


class Replaced(StorageError):
    """The file was deleted or restored since this process first read it."""


class Database:
    """A file in a model's folder, made by the first write; safe from several threads.

    Each method raises `Damaged` if the file is not as this version wrote it, and `StorageError` if
    it cannot be read or written. If another file has taken its place, reads and writes go to that
    one, unless `is_mirrored`: then `Replaced` is raised, because the copy in memory would be wrong.

    Attributes:
        file_name: Name of the file in the folder.
        schema: SQL that creates the tables.
        formats: Numbers of the layouts that this release reads and writes, its current one last;
            a file has its number as `application_id`.
        what_is_lost: Ends the message about a damaged file: what moving it away loses.
        is_mirrored: Whether a copy of the content is kept in memory.
    """

    file_name: str
    schema: str
    formats: tuple[int, ...]
    what_is_lost: str
    is_mirrored = False

    def __init__(self, folder: Path) -> None:
        self.path = folder / self.file_name
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[Any, ...] | None = None  # Of the file that was read first.
        self._checked: Stamp | None = None  # Of the file when its beginning was last seen whole.

    def __del__(self) -> None:
        if self._connection is not None:  # Else it would stay open for an unknown time.
            self._connection.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Holds off other writers; at the end, what was written is on disk.

        Refuses a file of another format. If the block or the disk fails, nothing is written.
        """
        with self._opened(is_writer=True) as connection:
            assert connection is not None
            if connection.in_transaction:  # Begun by a block around this one, in this thread.
                yield connection
                return
            with connection:  # Commits, or rolls back.
                connection.execute("BEGIN IMMEDIATE")
                (number,) = connection.execute("PRAGMA application_id").fetchone()
                if number not in self.formats:
                    wanted = self.formats[-1]
                    raise sqlite3.DatabaseError(f"its format is {number}, and not {wanted}")
                yield connection

    @contextlib.contextmanager
    def _opened(self, *, is_writer: bool = False) -> Iterator[sqlite3.Connection | None]:
        """Yields a connection, None if there is no file; a writer makes one."""
        with self._lock, naming(self.path, sqlite3.OperationalError):
            try:
                if is_writer and (self._identity is None or not self.is_mirrored):
                    self._create_if_missing()
                yield self._connected()
            except (sqlite3.DatabaseError, json.JSONDecodeError) as error:
                code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
                if code not in _DAMAGES:  # The other bits hold details.
                    raise
                raise Damaged(
                    f"{self.path} is damaged, or of another version of this package ({error}). "
                    "Restore it from a backup or use that version, or move it away with "
                    f"{self.file_name}-wal and {self.file_name}-shm{self.what_is_lost}."
                ) from error

    def _stamp(self) -> "Stamp | None":
        """Returns what changes with the file's content, None if there is none.

        A write goes into the log beside it; some later one copies the log into the file.
        """
        try:
            file = self.path.stat()
        except FileNotFoundError:
            return None
        return Stamp(file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns)

    def _check_beginning(self, stamp: "Stamp") -> None:
        """Raises a `DatabaseError` if the file is empty, cut or overwritten.

        An open connection does not notice: it goes on with its copies of the pages, and what it
        confirms is gone when it ends. A new one would delete the log beside an empty file.
        """
        # Without the log. By SQLite itself, because to open and close the file would drop the locks
        # that SQLite has on it in this process.
        uri = f"{self.path.absolute().as_uri()}?immutable=1"
        try:
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as raw:
                if raw.execute("PRAGMA schema_version").fetchone() == (0,):
                    raise sqlite3.DatabaseError("file is empty")
        except sqlite3.DatabaseError as error:
            # While a log is copied, the beginning may tell of pages that are not there yet; so it
            # does after a kill at that moment, until the next copy.
            if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_CORRUPT:
                raise
            if self._checked is None:
                if not self._is_whole_with_its_log():
                    raise
                self._checked = stamp
            elif stamp.size < self._checked.size:
                raise
        else:
            self._checked = stamp

    def _is_whole_with_its_log(self) -> bool:
        """Reads all pages, as SQLite finds them in the file and the log beside it."""
        # Only to read: the last of other connections copies the log when it closes.
        uri = f"{self.path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)) as whole:
            return whole.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)

    def _connected(self) -> sqlite3.Connection | None:
        file, identity = self._stamp(), None
        if file is not None and file != self._checked:
            self._check_beginning(file)
            if self._connection is not None:  # Whose copies of pages may be of another content.
                self._connection.execute("PRAGMA shrink_memory")
        # In a folder that this process may only read, SQLite cannot make its -shm file. Without a
        # -wal file, all rows are in the file itself, which is then opened as immutable. Others may
        # change it all the same, so each look opens it anew.
        log = self.path.with_name(f"{self.file_name}-wal")
        is_read_only = not (os.access(self.path.parent, os.W_OK) or log.exists())
        if file is not None and (self._connection is None or is_read_only):
            self.__del__()
            self._connection = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?{'immutable=1' if is_read_only else 'mode=rw'}",
                uri=True,
                timeout=BUSY_SECONDS,
                isolation_level=None,  # Transactions begin and end as written here.
                check_same_thread=False,  # One at a time, by the lock.
            )
            # A commit waits until it is on disk; NORMAL could lose it in a power cut.
            self._connection.execute("PRAGMA synchronous = FULL")
        if file is not None and self._connection is not None:
            # While the file is open, no other file gets its inode number. SQLite raises the version
            # of the schema if a backup is restored in place.
            version: tuple[int, ...] = ()
            if self._identity is None or self._identity[:2] == file[:2]:
                version = self._connection.execute("PRAGMA schema_version").fetchone()
            identity = *file[:2], *version
        if self._identity not in (None, identity):
            if self.is_mirrored:
                raise Replaced(
                    f"{self.path} was deleted or restored since the model was loaded: load it "
                    "again."
                )
            self.__del__()
            self._connection = self._identity = None
            return self._connected()
        self._identity = identity
        return self._connection

    def _create_if_missing(self) -> None:
        """Makes the file under another name, then renames it: an empty file is a damaged one."""
        if self.path.exists():
            return
        with locked(self.path.with_name(f"{self.file_name}.lock"), wait=True):
            if self.path.exists():
                return
            for end in ("-wal", "-shm"):  # SQLite would apply a deleted file's to the new one.
                self.path.with_name(f"{self.file_name}{end}").unlink(missing_ok=True)
            # The connection is closed first, then the file is flushed and renamed.
            with replacing(self.path) as new, contextlib.closing(sqlite3.connect(new)) as sql:
                sql.executescript(self.schema)
