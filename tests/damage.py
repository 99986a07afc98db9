"""What bad and full disks do to files, and a person to a database."""

import contextlib
import resource
import sqlite3
from collections.abc import Iterator
from pathlib import Path

DAMAGES = ("emptied", "cut", "flipped")


def damage(path: Path, how: str) -> None:
    """Empties a file, cuts it in half, or flips a bit in the middle."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if how == "flipped":
        content[middle] ^= 1
    else:
        del content[0 if how == "emptied" else middle :]
    path.write_bytes(content)


def copy_database(source: Path, target: Path) -> None:
    """Copies an SQLite file, also one in use, or restores it in place; as `.backup`, `.restore`."""
    here, there = sqlite3.connect(source), sqlite3.connect(target)
    with contextlib.closing(here), contextlib.closing(there):
        here.backup(there)


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Limits the size of files in this process, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
