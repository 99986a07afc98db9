"""Files that are whole or known to be damaged, locks, disk failures in one line."""

import contextlib
import errno
import fcntl
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from tests.damage import DAMAGES, damage, largest_file
from tfrs_pipeline import durable
from tfrs_pipeline.durable import Damaged, InUse, StorageError, locked, naming, read_record

ROOT = str(Path(__file__).parents[1])


@pytest.fixture
def record(tmp_path: Path) -> Path:
    (tmp_path / "below").mkdir()
    files = [tmp_path / "table", tmp_path / "below" / "shard"]
    for file in files:
        file.write_text("1 2 3")
    path = tmp_path / "about.json"
    durable.write_record(path, {"epochs": (1, 2.5), "name": "é", "nothing": None}, files)
    return path


def test_a_record_gives_back_its_content(record: Path) -> None:
    assert read_record(record) == {"epochs": [1, 2.5], "name": "é", "nothing": None}
    with pytest.raises(FileNotFoundError):
        read_record(record.with_name("none.json"))
    durable.write_record(record, {"name": "new"})
    assert read_record(record) == {"name": "new"}
    assert {path.name for path in record.parent.iterdir()} == {"about.json", "below", "table"}


def test_a_record_with_a_flipped_bit_or_a_cut_is_damaged(record: Path) -> None:
    whole, content = record.read_bytes(), read_record(record)
    rng = np.random.default_rng(0)
    for i in range(len(whole)):
        flipped = bytearray(whole)
        flipped[i] ^= 1 << int(rng.integers(8))
        for broken in (bytes(flipped), whole[:i]):
            record.write_bytes(broken)
            with pytest.raises(Damaged, match=r"about\.json is not as it was written"):
                read_record(record)
    record.write_bytes(whole)
    assert read_record(record) == content


@pytest.mark.parametrize("how", [*DAMAGES, "lost"])
@pytest.mark.parametrize("name", ["table", "below/shard"])
def test_a_damaged_file_of_a_record_is_named(record: Path, name: str, how: str) -> None:
    path = record.parent / name
    damage(path, how) if how in DAMAGES else path.unlink()
    with pytest.raises(Damaged, match=rf"{name} is not as it was written"):
        read_record(record)
    assert read_record(record, check_files=False)["name"] == "é"


START = """
import itertools, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tfrs_pipeline.durable import locked, write_record
path = Path(sys.argv[1])
"""
REPLACER = """
for number in itertools.count(int(sys.argv[3])):
    write_record(path, {"number": number, "more": [number] * 20_000})
    print("written", flush=True)
"""
HOLDER = """
with locked(path):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def started(code: str, *arguments: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a program, waits for its first line, and kills it at the end."""
    command = [sys.executable, "-c", START + code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_killed_at_random_points_a_record_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    last = num_kills = num_partial = 0
    # On a quiet machine, few kills fall within a write.
    while num_kills < 20 or (not num_partial and num_kills < 200):
        num_kills += 1
        with started(REPLACER, tmp_path / "about.json", ROOT, last + 1):
            time.sleep(float(rng.uniform(0.05, 0.1)))
        content = read_record(tmp_path / "about.json")
        assert content["more"] == [content["number"]] * 20_000
        assert content["number"] > last
        last = content["number"]
        num_partial += (tmp_path / "about.json.partial").exists()
    assert num_partial > 0


def test_a_lock_is_held_by_one_and_freed_by_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with started(HOLDER, path, ROOT) as process:
        message = rf"{tmp_path} is in use by process {process.pid} on \S+, which holds lock"
        with pytest.raises(InUse, match=message), locked(path):
            pass
    assert path.exists()
    refused = []

    def try_it() -> None:
        try:
            with locked(path):
                pass
        except InUse as error:
            refused.append(str(error))

    with locked(path), locked(path):  # The holding thread may lock it again.
        other = threading.Thread(target=try_it)
        other.start()
        other.join()
    assert len(refused) == 1
    assert f"process {os.getpid()} on" in refused[0]
    assert not path.exists()


def test_a_lock_file_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the file is being opened, its holder removes it and another makes a new one."""
    path, stack, flock = tmp_path / "lock", contextlib.ExitStack(), fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        path.unlink()
        other = threading.Thread(target=stack.enter_context, args=[locked(path)])
        other.start()
        other.join()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(InUse, match="is in use by process"), locked(path):
        pass
    stack.close()


NUMBERS = np.random.default_rng(0).random(100_000)
IN_SQL = "COPY (SELECT random() FROM range(100_000)) TO '{}' (FORMAT parquet)"
WRITERS: dict[str, Callable[[Path], object]] = {
    "DuckDB": lambda path: duckdb.sql(IN_SQL.format(path)),
    "TensorFlow": lambda path: tf.train.Checkpoint(x=tf.Variable(NUMBERS)).write(str(path)),
    "Arrow": lambda path: pq.write_table(pa.table({"x": NUMBERS}), path),
    "NumPy": lambda path: np.save(path, NUMBERS),
    "zip": lambda path: np.savez(path, x=NUMBERS),
}
FAILURES = {"DuckDB": duckdb.IOException, "TensorFlow": tf.errors.OpError}


@pytest.mark.parametrize("library", WRITERS)
def test_a_full_disk_is_reported_in_one_line(library: str, tmp_path: Path) -> None:
    failures = [FAILURES[library]] if library in FAILURES else []
    inner = tmp_path / "run"
    writing = naming(tmp_path), naming(inner, *failures)
    with largest_file(50_000), pytest.raises(StorageError) as refused, writing[0], writing[1]:
        WRITERS[library](tmp_path / "written")
    assert re.fullmatch(rf"({inner}|{tmp_path}/written): [^\n]*", str(refused.value))
    assert ("File too large" in str(refused.value)) == (library != "NumPy")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ESTALE])
def test_only_errors_of_a_disk_become_storage_errors(code: int, tmp_path: Path) -> None:
    for error, told in (
        (OSError(code, os.strerror(code)), rf"^{tmp_path}: {os.strerror(code)}\."),
        (OSError(code, os.strerror(code), "/elsewhere"), r"^/elsewhere: "),
        # NumPy's error has no number.
        (OSError("14076 requested and 6112 written"), rf"^{tmp_path}: No space left"),
    ):
        with pytest.raises(StorageError, match=told), naming(tmp_path):
            raise error
    broken_pipe = BrokenPipeError(errno.EPIPE, "nobody reads the output")
    for other in (ValueError("x"), KeyError("x"), OSError(os.strerror(code)), broken_pipe):
        with pytest.raises(type(other)) as raised, naming(tmp_path):
            raise other
        assert raised.value is other


def test_a_folder_is_tried_and_nothing_is_left(tmp_path: Path) -> None:
    durable.try_writing(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file.*: Not a directory"):
        durable.try_writing(tmp_path / "file" / "below")
