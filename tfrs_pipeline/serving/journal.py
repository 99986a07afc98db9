"""The journal of a model's live items: an append-only file beside its versions.

A record is a line: the CRC-32 of its JSON in hexadecimal, a space, and the JSON. It is on disk
before its write is confirmed. If a writer is killed, what is left of its record has no end of line,
and the next write cuts it off. Several processes may write, one at a time; any number may read.
"""

import contextlib
import json
import logging
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from tfrs_pipeline.durable import Damaged, flush, naming, open_locked, replacing

logger = logging.getLogger(__name__)

JOURNAL_FILE = "live.journal"

Record: TypeAlias = Mapping[str, Any]


class Journal:
    """Reads and writes the journal in a model's folder, which may not exist yet.

    It remembers how far it has read. A rewritten journal is read from its start.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL_FILE
        self._lock = threading.RLock()
        self._file = -1  # Its descriptor, while `writing` holds the lock.
        self._read: tuple[int, int] = (0, 0)  # The file's inode, and the offset.

    def records(self) -> list[Record]:
        """Reads the records since the last call or write; raises `Damaged` if one has changed."""
        with self._lock, naming(self.path):
            try:
                file = self.path.open("rb")
            except FileNotFoundError:
                return []
            with file:
                inode = os.fstat(file.fileno()).st_ino
                offset = self._read[1] if self._read[0] == inode else 0
                file.seek(offset)
                lines = file.read().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):
                del lines[-1]  # Still being written, or never confirmed.
            records = [_decoded(self.path, line) for line in lines]
            self._read = inode, offset + sum(map(len, lines))
            return records

    @contextlib.contextmanager
    def writing(self) -> Iterator["Journal"]:
        """Locks the journal against other threads and processes, to read it and then write."""
        with self._lock, naming(self.path):
            is_new = not self.path.exists()
            self._file = open_locked(self.path, flags=os.O_APPEND)
            try:
                if is_new:
                    flush([self.path.parent])
                yield self
            finally:
                os.close(self._file)

    def append(self, record: Record) -> None:
        """Appends a record within `writing`, on disk when this returns; call `records` first.

        If this fails, nothing of the record is left.
        """
        (inode, end), line = self._read, _encoded(record)
        os.ftruncate(self._file, end)  # Cuts off what a killed writer has left.
        left = line
        try:
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, end)
            raise
        self._read = inode, end + len(line)

    def replace(self, records: Iterable[Record]) -> None:
        """Rewrites it within `writing`: a reader sees the old journal or the new one, whole."""
        lines = b"".join(map(_encoded, records))
        with replacing(self.path) as partial:
            partial.write_bytes(lines)
            inode = partial.stat().st_ino
        self._read = inode, len(lines)


def _encoded(record: Record) -> bytes:
    # JSON escapes ends of lines, so a record is one line whatever a client sends.
    text = json.dumps(record, allow_nan=False, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decoded(path: Path, line: bytes) -> Record:
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        raise Damaged(
            f"{path} is not as it was written: a record of it has changed. Restore the file, or "
            "move it away and write the live items again."
        )
    return json.loads(text)
