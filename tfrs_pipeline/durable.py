"""Files that survive a crash: written aside, flushed, renamed, and hashed.

A record is a JSON file that is written last. Under "sha256" it holds its own hash and those of the
files that belong to it. Files without their record count as incomplete.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tfrs_pipeline.messages import printable

logger = logging.getLogger(__name__)

_HASHES = "sha256"
_held: set[tuple[Path, int]] = set()


class Damaged(ValueError):
    """A file has changed since it was written."""


class StorageError(OSError):
    """A path cannot be written or read: a full disk, a missing permission, a lost mount."""


class InUse(RuntimeError):
    """Another process works in a folder."""


def file_hash(path: Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a file to write, which then replaces `path`: readers see the old or the new one.

    If the block fails, the old file stays.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log.json"
        >>> with replacing(path) as partial:
        ...     _ = partial.write_text("{}")
        >>> path.read_text()
        '{}'
    """
    partial = _partial(path)
    try:
        with naming(path):
            yield partial
            flush([partial])
            os.replace(partial, path)
            flush([path.parent])
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def parquet_destination(path: str | Path) -> Path:
    """Returns the path of a Parquet file to write; a `ValueError` if it cannot be written there."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"'{path}' is a folder: give a file in it, {path / 'all.parquet'}")
    if path.suffix != ".parquet":
        raise ValueError(f"'{path}' has to be Parquet: end the name with .parquet")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder '{path.parent}': make it, or choose another")
    return path


def flush(paths: Iterable[Path]) -> None:
    """Forces files and folders to disk, so that a later file can rely on them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def write_record(path: Path, content: Mapping[str, Any], files: Iterable[Path] = ()) -> None:
    """Writes a record of JSON content and of files in the record's folder or below it."""
    files = list(files)
    with naming(path.parent):
        flush({*files, *(file.parent for file in files)})
        hashes = {file.relative_to(path.parent).as_posix(): file_hash(file) for file in files}
    # Hashed as it will be read back: JSON has no tuples, and its keys are text.
    record = json.loads(json.dumps({**content, _HASHES: hashes}))
    hashes[path.name] = _own_hash(record)
    with replacing(path) as partial:
        partial.write_text(json.dumps({**record, _HASHES: hashes}, indent=2), encoding="utf-8")


def refuse_others(paths: Iterable[Path], written_first: Path) -> None:
    """Refuses to overwrite files, unless the file that this package writes first exists.

    A process that was killed may have left a part of that file.
    """
    existing = [path for path in paths if path.exists() and path != _partial(written_first)]
    if existing and not written_first.exists():
        raise ValueError(
            f"{existing[0]} may not be this package's: it writes {written_first} first, which is "
            "missing. Choose another folder."
        )


def hold_to(path: Path, made_of: Mapping[str, Any]) -> None:
    """Records what a folder is made from; a `ValueError` if another record exists."""
    made_of = json.loads(json.dumps(made_of))
    if (before := read_whole(path)) is None:
        write_record(path, made_of)
        return
    changed = [name for name in {**before, **made_of} if before.get(name) != made_of.get(name)]
    if changed:
        differ = (f"{name}: {before.get(name)!r}, now {made_of.get(name)!r}" for name in changed)
        raise ValueError(
            f"{path.parent} was made of something else ({'; '.join(differ)}). Give another folder, "
            "or delete this one."
        )


def read_record(
    path: Path, *, check_files: bool = True, leave_out: Collection[str] = ()
) -> dict[str, Any]:
    """Reads a record; raises `Damaged`, which names the first of its files that has changed.

    Files and folders beside the record that `leave_out` names are not checked.
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
        if name.partition("/")[0] in leave_out:
            continue
        if not file.is_file() or file_hash(file) != expected:
            raise _damaged(file)
    del record[_HASHES]
    return dict(record)


def recorded_hashes(path: Path) -> dict[str, str]:
    """Returns the hashes that the files of a record had when it was written, by name."""
    hashes: dict[str, str] = json.loads(path.read_bytes())[_HASHES]
    return {name: hash_ for name, hash_ in hashes.items() if name != path.name}


def read_whole(path: Path) -> dict[str, Any] | None:
    """Reads a record; None if it is missing or damaged, or one of its files is, which is logged."""
    try:
        return read_record(path)
    except FileNotFoundError:
        return None
    except Damaged as error:
        logger.warning("%s It is made again.", error)
        return None


def _own_hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _damaged(path: Path) -> Damaged:
    return Damaged(f"{path} is not as it was written: cut, changed or lost.")


@contextlib.contextmanager
def naming(path: Path, *failures: type[Exception]) -> Iterator[None]:
    """Turns disk failures, an `OSError` or one of `failures`, into one line that names a path.

    A file that the error names has priority over `path`, and an inner block's path over an outer's.
    """
    try:
        yield
    except StorageError:
        raise
    except failures as error:
        reason = printable(str(error).strip().partition("\n")[0], 300)
        raise StorageError(f"{path}: {reason}.") from error
    except OSError as error:
        # NumPy's error for a full disk has no number: "9 requested and 5 written".
        is_short = error.errno is None and " requested and " in str(error)
        number = errno.ENOSPC if is_short else error.errno
        # Errors without a number come from libraries, and a broken pipe from the console.
        if number is None or isinstance(error, ConnectionError):
            raise
        raise StorageError(f"{error.filename or path}: {os.strerror(number)}.") from error


def try_writing(folder: Path) -> None:
    """Raises a `StorageError` unless files can be written in a folder; leaves none there."""
    parent = folder
    while not parent.exists() and parent != parent.parent:
        if parent.is_symlink():  # For instance, a link to a disk that is not mounted.
            raise StorageError(f"{parent}: is a link to {os.readlink(parent)}, which is not there.")
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror or error}.") from error


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock file within the block; the system releases it if this process is killed.

    If another thread or process holds it, this waits, or raises an `InUse` that names the holder.
    """
    key = path.resolve(), threading.get_ident()
    if key in _held:  # A thread may take its own lock again.
        yield
        return
    with naming(path):
        descriptor = _lock(path, wait)
    _held.add(key)
    try:
        with naming(path):
            # For people: what locks is the descriptor.
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        _held.remove(key)
        path.unlink(missing_ok=True)  # Removed while it is held, so it cannot be another's.
        os.close(descriptor)


def _lock(path: Path, wait: bool) -> int:
    try:
        return open_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = "another process"
        with contextlib.suppress(FileNotFoundError):  # It may have ended by now.
            holder = path.read_text(errors="replace") or holder
        message = f"{path.parent} is in use by {holder}, which holds {path.name} there."
        if not wait:
            raise InUse(f"{message} Wait until it ends, or take another folder.") from None
        logger.warning("%s Waiting until it ends.", message)
        return open_locked(path)


def open_locked(path: Path, how: int = fcntl.LOCK_EX) -> int:
    """Opens a file, made if missing, and locks it; closing the descriptor unlocks it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, how)
            # The previous holder may have removed or replaced the file after it was opened here.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
