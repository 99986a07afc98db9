"""Files that are whole or known to be damaged, locks, disk failures in one line."""

import contextlib
import errno
import fcntl
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from tests.damage import DAMAGES, damage
from tfrs_pipeline.durable import (
    Damaged,
    InUse,
    StorageError,
    locked,
    naming,
    read_record,
    try_writing,
    write_record,
)

ROOT = str(Path(__file__).parents[1])


@pytest.fixture
def record(tmp_path: Path) -> Path:
    (tmp_path / "below").mkdir()
    files = [tmp_path / "table", tmp_path / "below" / "shard"]
    for file in files:
        file.write_text("1 2 3")
    path = tmp_path / "about.json"
    write_record(path, {"epochs": (1, 2.5), "name": "é", "nothing": None}, files)
    return path


def test_a_record_gives_back_its_content(record: Path) -> None:
    assert read_record(record) == {"epochs": [1, 2.5], "name": "é", "nothing": None}
    with pytest.raises(FileNotFoundError):
        read_record(record.with_name("none.json"))
    write_record(record, {"name": "new"})
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


@pytest.mark.parametrize("how", [*DAMAGES, "lost", "other"])
@pytest.mark.parametrize("name", ["table", "below/shard"])
def test_a_damaged_file_of_a_record_is_named(record: Path, name: str, how: str) -> None:
    path = record.parent / name
    if how in DAMAGES:
        damage(path, how)
    else:
        path.unlink() if how == "lost" else path.write_text("1 2 4")
    with pytest.raises(Damaged, match=rf"{name} is not as it was written"):
        read_record(record)
    assert read_record(record, check_files=False)["name"] == "é"


REPLACER = """
import itertools, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tfrs_pipeline.durable import write_record

print("ready", flush=True)
for number in itertools.count(int(sys.argv[3])):
    write_record(Path(sys.argv[1]), {"number": number, "more": [number] * 20_000})
"""


def test_killed_at_random_points_a_record_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    last = num_kills = num_partial = 0
    # A quiet machine is rarely killed within a write.
    while num_kills < 20 or (not num_partial and num_kills < 200):
        num_kills += 1
        command = [sys.executable, "-c", REPLACER, str(tmp_path / "about.json"), ROOT, str(last)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(float(rng.uniform(0.05, 0.1)))
        process.kill()
        process.wait()
        process.stdout.close()
        content = read_record(tmp_path / "about.json")
        assert content["more"] == [content["number"]] * 20_000
        assert content["number"] >= last
        last = content["number"]
        num_partial += (tmp_path / "about.json.partial").exists()
    assert last > 0
    assert num_partial > 0


HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tfrs_pipeline.durable import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_held_by_one_and_freed_by_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), ROOT], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    message = rf"{tmp_path} is in use by process {process.pid} on \S+, which holds lock"
    with pytest.raises(InUse, match=message), locked(path):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    assert path.exists()
    refused = []

    def try_it() -> None:
        try:
            with locked(path):
                pass
        except InUse as error:
            refused.append(str(error))

    with locked(path), locked(path):  # Again by the thread that holds it.
        other = threading.Thread(target=try_it)
        other.start()
        other.join()
    assert len(refused) == 1
    assert f"process {os.getpid()} on" in refused[0]
    assert not path.exists()


def test_a_lock_file_that_was_removed_meanwhile_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is opened while its holder removes it, and another holder makes a new one."""
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


def with_duckdb(path: Path) -> None:
    duckdb.sql(f"COPY (SELECT random() FROM range(100_000)) TO '{path}' (FORMAT parquet)")


def with_tensorflow(path: Path) -> None:
    values = tf.Variable(tf.random.stateless_normal([100_000], [0, 0]))
    tf.train.Checkpoint(values=values).write(str(path))


def with_arrow(path: Path) -> None:
    pq.write_table(pa.table({"values": np.arange(100_000)}), path)


def with_numpy(path: Path) -> None:
    np.save(path, np.arange(100_000))


def with_zip(path: Path) -> None:
    np.savez(path, values=np.arange(100_000))


@pytest.mark.parametrize(
    ("write", "failures"),
    [
        pytest.param(with_duckdb, [duckdb.IOException], id="DuckDB"),
        pytest.param(with_tensorflow, [tf.errors.OpError], id="TensorFlow"),
        pytest.param(with_arrow, [], id="Arrow"),
        pytest.param(with_numpy, [], id="NumPy"),
        pytest.param(with_zip, [], id="zip"),
    ],
)
def test_a_full_disk_is_reported_in_one_line(
    write: Callable[[Path], None], failures: list[type[Exception]], tmp_path: Path
) -> None:
    inner, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(StorageError) as refused, naming(tmp_path), naming(inner, *failures):
            write(tmp_path / "written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.fullmatch(rf"({inner}|{tmp_path}/written): [^\n]*", str(refused.value))
    assert ("File too large" in str(refused.value)) == (write is not with_numpy)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ESTALE])
def test_only_errors_of_a_disk_become_storage_errors(code: int, tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=rf"^{tmp_path}: {os.strerror(code)}\."),
        naming(tmp_path),
    ):
        raise OSError(code, os.strerror(code))
    with pytest.raises(StorageError, match=r"^/elsewhere: "), naming(tmp_path):
        raise OSError(code, os.strerror(code), "/elsewhere")
    # NumPy's error has no number.
    with pytest.raises(StorageError, match=rf"^{tmp_path}: No space left"), naming(tmp_path):
        raise OSError("14076 requested and 6112 written")
    for other in (ValueError(os.strerror(code)), KeyError("x"), OSError(os.strerror(code))):
        with pytest.raises(type(other)) as raised, naming(tmp_path):
            raise other
        assert raised.value is other


def test_a_folder_is_tried_and_nothing_is_left(tmp_path: Path) -> None:
    try_writing(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file.*: Not a directory"):
        try_writing(tmp_path / "file" / "below")
