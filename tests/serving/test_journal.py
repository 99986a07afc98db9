"""The journal: confirmed records survive any cut, and no record is half written."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.damage import damage
from tfrs_pipeline.durable import Damaged, StorageError
from tfrs_pipeline.serving.journal import JOURNAL_FILE, Journal

RECORDS = [{"version": 1, "put": [{"item_id": f"é\n{i}", "x": i / 3}]} for i in range(4)]


def append(folder: Path, *records: object) -> None:
    journal = Journal(folder)
    with journal.writing() as writer:
        journal.records()
        for record in records:
            writer.append(record)  # type: ignore[arg-type]


def test_a_reader_gets_each_record_once(tmp_path: Path) -> None:
    reader = Journal(tmp_path)
    assert reader.records() == []
    append(tmp_path, *RECORDS[:2])
    assert reader.records() == RECORDS[:2]
    append(tmp_path, RECORDS[2])
    assert reader.records() == RECORDS[2:3]
    assert reader.records() == []
    assert Journal(tmp_path).records() == RECORDS[:3]


def test_cut_at_any_byte_it_keeps_all_whole_records(tmp_path: Path) -> None:
    append(tmp_path, *RECORDS)
    path = tmp_path / JOURNAL_FILE
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        num_whole = sum(end <= length for end in ends)
        assert Journal(tmp_path).records() == RECORDS[:num_whole]
        append(tmp_path, RECORDS[0])
        assert Journal(tmp_path).records() == [*RECORDS[:num_whole], RECORDS[0]]


def test_a_changed_record_is_refused(tmp_path: Path) -> None:
    append(tmp_path, *RECORDS)
    damage(tmp_path / JOURNAL_FILE, "flipped")
    with pytest.raises(Damaged, match=JOURNAL_FILE):
        Journal(tmp_path).records()


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(tmp_path, RECORDS[0])
    write = os.write

    def half(file: int, content: bytes) -> int:
        if len(content) < 20:
            raise OSError(28, "No space left on device")
        return write(file, content[: len(content) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(StorageError, match=f"{JOURNAL_FILE}.*No space"):
        append(tmp_path, RECORDS[1])
    monkeypatch.undo()
    assert (tmp_path / JOURNAL_FILE).read_bytes().count(b"\n") == 1
    append(tmp_path, RECORDS[2])
    assert Journal(tmp_path).records() == [RECORDS[0], RECORDS[2]]


def test_a_rewritten_journal_is_read_anew(tmp_path: Path) -> None:
    append(tmp_path, *RECORDS)
    reader, writer_side = Journal(tmp_path), Journal(tmp_path)
    assert reader.records() == RECORDS
    with writer_side.writing() as writer:
        writer_side.records()
        writer.replace(RECORDS[3:])
    assert reader.records() == RECORDS[3:]
    append(tmp_path, RECORDS[0])
    assert reader.records() == [RECORDS[0]]
    assert writer_side.records() == [RECORDS[0]]


def test_threads_and_processes_write_in_turn(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tfrs_pipeline.serving.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for i in range(50):\n"
        "    with journal.writing() as writer:\n"
        "        journal.records()\n"
        "        writer.append({'version': 1, 'put': [[sys.argv[2], i]]})\n"
        "        if i % 20 == 19: writer.replace(Journal(Path(sys.argv[1])).records())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    others = [subprocess.Popen([*command, name]) for name in "ab"]

    def write() -> None:
        for _ in range(50):
            append(tmp_path, {"version": 1, "put": [["c", 0]]})

    with ThreadPoolExecutor(2) as pool:
        assert [done.result() for done in (pool.submit(write), pool.submit(write))] == [None] * 2
    assert [other.wait(60) for other in others] == [0, 0]
    written = [tuple(record["put"][0]) for record in Journal(tmp_path).records()]
    assert written.count(("c", 0)) == 100
    for name in "ab":
        assert [x for x in written if x[0] == name] == [(name, i) for i in range(50)]
