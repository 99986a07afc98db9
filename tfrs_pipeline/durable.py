"""Files that outlive a crash: written aside, flushed and renamed, with hashes of what they must be.

What is trusted later has a record: a JSON file that is written last and holds, under "sha256", its
own hash and those of the files that belong to it. Without its record a file is half written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_HASHES = "sha256"
# A full disk, a missing permission, a mount that is gone. Libraries raise errors of their own for
# them, whose messages hold the system's words.
_FAILURES = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENOTCONN),
)
# The last is DuckDB's, where a mount is gone.
_WORDS = re.compile(
    "|".join([*map(re.escape, map(os.strerror, _FAILURES)), "No files found"]), re.IGNORECASE
)
_held: set[tuple[Path, int]] = set()


class Damaged(ValueError):
    """A file that is not as it was written."""


class StorageError(OSError):
    """A path that cannot be written or read: a full disk, a missing permission, a lost mount."""


class InUse(RuntimeError):
    """A folder that another process works in."""


def file_hash(path: Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def part_files(path: Path) -> list[Path]:
    """Lists the files of a table: itself, or those of a folder in their order, as engines write it.

    Engines leave _SUCCESS, .x.crc and the like beside them.
    """
    return [path] if path.is_file() else sorted(path.glob("[!._]*.parquet"))


def replace_text(path: Path, text: str) -> None:
    """Writes a text file: at every moment it is what it was or all that it becomes."""
    partial = path.with_name(f"{path.name}.partial")
    with naming(path):
        partial.write_text(text, encoding="utf-8")
        flush([partial])
        os.replace(partial, path)
        flush([path.parent])


def flush(paths: Iterable[Path]) -> None:
    """Has the disk hold files and folders, before another file says that it does."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_record(path: Path, content: Mapping[str, Any], files: Iterable[Path] = ()) -> None:
    """Writes a record, JSON-able, after which it and its files, whole and below it, are trusted."""
    files = list(files)
    with naming(path.parent):
        flush({*files, *(file.parent for file in files)})
        hashes = {file.relative_to(path.parent).as_posix(): file_hash(file) for file in files}
    record = json.loads(json.dumps({**content, _HASHES: hashes}))
    hashes[path.name] = _own_hash(record)
    replace_text(path, json.dumps({**record, _HASHES: hashes}, indent=2))


def refuse_others(paths: Iterable[Path], written_first: Path) -> None:
    """Refuses (`ValueError`) to write where files are that this package may not have written.

    What it has `written_first` tells its own from others.
    """
    found = [path for path in paths if path.exists()]
    if found and not written_first.exists():
        raise ValueError(
            f"{found[0]} may be somebody's own: there is no {written_first}, which this package "
            "writes first. Choose another folder."
        )


def hold_to(path: Path, made_of: Mapping[str, Any]) -> None:
    """Records what a folder's content is made of; a `ValueError` if the record says otherwise."""
    made_of = json.loads(json.dumps(made_of))
    if not is_whole(path):
        write_record(path, made_of)
        return
    before = read_record(path)
    changed = [name for name in {**before, **made_of} if before.get(name) != made_of.get(name)]
    if changed:
        differ = (f"{x}: {before.get(x)!r}, now {made_of.get(x)!r}" for x in changed)
        raise ValueError(
            f"{path.parent} holds what was made of something else ({'; '.join(differ)}). Give "
            "another folder, or delete this one."
        )


def read_record(path: Path, *, check_files: bool = True) -> dict[str, Any]:
    """Reads the content of a record, and checks that it and its files are as they were written.

    Raises:
        FileNotFoundError: If there is no record: what it would stand for is not whole.
        Damaged: Naming the first file that was cut, changed or lost.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "table").write_text("1 2 3")
        >>> write_record(folder / "about.json", {"columns": 3}, [folder / "table"])
        >>> read_record(folder / "about.json")
        {'columns': 3}
        >>> _ = (folder / "table").write_text("1 2 4")
        >>> read_record(folder / "about.json")
        Traceback (most recent call last):
        tfrs_pipeline.durable.Damaged: ...table is not as it was written: cut, changed or lost.
    """
    text = path.read_bytes()
    try:
        record = json.loads(text)
        hashes = record[_HASHES]
        is_whole = hashes.pop(path.name) == _own_hash(record)
    except (ValueError, TypeError, KeyError, AttributeError):
        is_whole = False
    if not is_whole:
        raise _damaged(path)
    for name, expected in hashes.items() if check_files else ():
        file = path.parent / name
        if not file.is_file() or file_hash(file) != expected:
            raise _damaged(file)
    del record[_HASHES]
    return dict(record)


def is_whole(path: Path) -> bool:
    """Whether there is a record and all is as it was written; logs what is not."""
    try:
        read_record(path)
    except FileNotFoundError:
        return False
    except Damaged as error:
        logger.warning("%s It is made again.", error)
        return False
    return True


def _own_hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _damaged(path: Path) -> Damaged:
    return Damaged(f"{path} is not as it was written: cut, changed or lost.")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has the block's failures of a disk, of whatever library, name a path in one line.

    They are a `StorageError` instead. An inner block names the path before an outer one.
    """
    try:
        yield
    except (StorageError, ValueError, RuntimeError):  # Said already, refused, or no disk's.
        raise
    except Exception as error:
        reason = _WORDS.search(str(error))
        if reason is None:
            raise
        raise _storage_error(getattr(error, "filename", None) or path, reason[0]) from error


def _storage_error(path: Path | str, reason: str) -> StorageError:
    return StorageError(
        f"{path}: {reason}. Once that is mended, the same command goes on from what is finished."
    )


def try_writing(folder: Path) -> None:
    """Checks that files can be made in a folder, or where it will be; leaves nothing.

    A `StorageError` if not.
    """
    place = folder
    while not place.exists() and place != place.parent:
        if place.is_symlink():  # Such as to a disk that is not mounted.
            raise _storage_error(place, f"is a link to {os.readlink(place)}, which is not there")
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _storage_error(folder, error.strerror or str(error)) from error


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock file; the system frees it if this process is killed.

    A thread may hold it again that holds it already. Where another process or thread holds it, that
    is waited for, and logged, or (without `wait`) an `InUse` that names it.
    """
    key = path.resolve(), threading.get_ident()
    if key in _held:
        yield
        return
    with naming(path):
        descriptor = _lock(path, wait)
    _held.add(key)
    try:
        yield
    finally:
        _held.remove(key)
        path.unlink(missing_ok=True)  # While it is held: nobody else's is taken away.
        os.close(descriptor)


def _lock(path: Path, wait: bool) -> int:
    at_once = fcntl.LOCK_NB
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | at_once)
            # Whoever held it before has removed the file, perhaps since it was opened here.
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
            message = f"{path.parent} is in use by {holder}, which holds {path.name} there."
            if wait:
                logger.warning("%s Waiting until it ends.", message)
                at_once = 0
            else:
                os.close(descriptor)
                raise InUse(f"{message} Wait until it ends, or take another folder.") from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
