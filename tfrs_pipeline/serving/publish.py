"""The versions of a model on disk: a new one appears whole or not at all.

A version is written beside its place and renamed once it is whole, so that a reader, and whoever is
left by a crash, finds the newest complete version and nothing of a broken one. What a killed
process left behind is removed by a later publication.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
ITEMS_FILE = Path("assets.extra") / "items.parquet"
QUERIES_FILE = Path("assets.extra") / "queries.parquet"
# The brute-force fallback of a ScaNN model.
EXACT_FOLDER = Path("exact") / "1"
_PARTIAL, _DISCARDED = ".partial-", ".discarded-"
# The longest that a version may take to write: an older partial one is nobody's any more.
_ABANDONED_AFTER_SECONDS = 24 * 3600.0


def versions_of(folder: Path) -> list[int]:
    """Lists the complete versions below a model's folder, ascending."""
    if not folder.is_dir():
        return []
    names = [child.name for child in folder.iterdir() if (child / MANIFEST_FILE).is_file()]
    return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))


@contextlib.contextmanager
def new_version(parent: Path, *, keep: int | None = None) -> Iterator[NewVersion]:
    """Gives a folder to write a version into, and puts it in place if the block ends well.

    Args:
        parent: The model's folder; made if missing.
        keep: Complete versions to keep, the newest; the others are deleted. None keeps all.

    Yields:
        What to write into: the `partial` folder, which must hold a manifest at the end; `folder`
        is its place afterwards.

    Raises:
        ValueError: If the partial folder holds no manifest at the end, or `keep` is below 1.

    Example:
        >>> import tempfile
        >>> parent = Path(tempfile.mkdtemp())
        >>> with new_version(parent) as version:
        ...     _ = (version.partial / MANIFEST_FILE).write_text("{}")
        >>> versions_of(parent)
        [1]
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be 1 or more, or None. Received: {keep}")
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent)
    version = NewVersion(parent / f"{_PARTIAL}{uuid.uuid4().hex}")
    version.partial.mkdir()
    try:
        yield version
        if not (version.partial / MANIFEST_FILE).is_file():
            raise ValueError(f"A version needs a {MANIFEST_FILE}. Received: none in {parent}")
        _flush(version.partial)
        version.folder = _put_in_place(version.partial, parent)
    finally:
        shutil.rmtree(version.partial, ignore_errors=True)
    if keep is not None:
        for number in versions_of(parent)[:-keep]:
            _discard(parent / str(number))


class NewVersion:
    """A version in the making.

    Attributes:
        partial: Where to write it.
        folder: Its place, once it is there.
    """

    def __init__(self, partial: Path) -> None:
        self.partial = partial
        self.folder = partial


def _put_in_place(partial: Path, parent: Path) -> Path:
    while True:
        # Also of what is no version, or none yet: its number is taken.
        taken = [int(child.name) for child in parent.iterdir() if child.name.isdecimal()]
        folder = parent / str(max(taken, default=0) + 1)
        try:
            # Fails where another export took the number: a folder that is not empty stays.
            os.rename(partial, folder)
        except OSError:
            if not folder.exists():
                raise
            continue
        return folder


def _discard(folder: Path) -> None:
    """Deletes a version; it is no version any more from the first moment on."""
    hidden = folder.with_name(f"{_DISCARDED}{uuid.uuid4().hex}")
    try:
        os.rename(folder, hidden)
    except FileNotFoundError:  # Another publication was faster.
        return
    logger.info("deleted version %s of %s", folder.name, folder.parent)
    shutil.rmtree(hidden, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    for child in parent.iterdir():
        if child.name.startswith(_DISCARDED):
            shutil.rmtree(child, ignore_errors=True)
        elif child.name.startswith(_PARTIAL):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - child.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
                    shutil.rmtree(child, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Has the disk hold what was written, before a name says that it does."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
