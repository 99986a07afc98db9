"""Versions on disk: whole or absent, in order, and none lost in a crash."""

import contextlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tfrs_pipeline.answers.publish import MANIFEST_FILE, new_version, versions_of
from tfrs_pipeline.durable import write_record

NUM_KILLS = 16
MAX_KILLS = 10 * NUM_KILLS
FILES_OF_A_VERSION = 8

# Publishes forever. Each file of a version holds its payload. The manifest is written in the
# middle, where it helps least, and every step is slow enough for a kill.
PUBLISHER = """
import itertools, sys
from pathlib import Path
from tfrs_pipeline.answers.publish import MANIFEST_FILE, new_version

parent = Path(sys.argv[1])
print("ready", flush=True)
for number in itertools.count():
    payload = f"{sys.argv[2]}-{number}"
    with new_version(parent, keep=3) as (partial, folder):
        for i in range(8):
            name = MANIFEST_FILE if i == 4 else f"file-{i}"
            with (partial / name).open("w") as file:
                for part in payload:
                    file.write(part)
                    file.flush()
    print("published", flush=True)
"""


def publish(parent: Path, payload: str, keep: int | None = None) -> Path:
    with new_version(parent, keep=keep) as (partial, folder):
        (partial / MANIFEST_FILE).write_text(payload)
        written = partial.stat().st_ino
    # In one step: the folder was renamed, and nothing was copied.
    assert folder.stat().st_ino == written
    return folder


def test_versions_count_up_and_ignore_what_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "6").mkdir()
    (tmp_path / "6" / "half_copied").write_text("")
    (tmp_path / "7").write_text("a file")
    (tmp_path / "notes").mkdir()
    # Its number, 5, is not written like its name.
    (tmp_path / "005").mkdir()
    (tmp_path / "005" / MANIFEST_FILE).touch()
    assert versions_of(tmp_path) == []
    assert versions_of(tmp_path / "nowhere") == []
    assert [publish(tmp_path, name).name for name in "abc"] == ["8", "9", "10"]
    shutil.rmtree(tmp_path / "8")
    assert versions_of(tmp_path) == [9, 10]
    assert publish(tmp_path, "d").name == "11"


def test_a_failed_version_leaves_nothing(tmp_path: Path) -> None:
    publish(tmp_path, "first")

    def fail() -> None:
        with new_version(tmp_path, keep=1) as (partial, _):
            (partial / MANIFEST_FILE).write_text("second")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with pytest.raises(ValueError, match=r"needs a manifest\.json"), new_version(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert (tmp_path / "1" / MANIFEST_FILE).read_text() == "first"


def test_keeps_only_the_newest_versions(tmp_path: Path) -> None:
    for i in range(5):
        publish(tmp_path, f"payload {i}")
    (tmp_path / "notes").mkdir()
    assert publish(tmp_path, "newest", keep=2).name == "6"
    assert {path.name for path in tmp_path.iterdir()} == {"5", "6", "notes"}
    # Numbers are not used again, even if all versions before are gone.
    assert publish(tmp_path, "another", keep=1).name == "7"
    assert versions_of(tmp_path) == [7]
    with pytest.raises(ValueError, match="keep must be 1 or more"):
        publish(tmp_path, "none", keep=0)
    assert versions_of(tmp_path) == [7]


def test_refreshes_push_out_no_other_training(tmp_path: Path) -> None:
    """One training a night, refreshed every hour."""
    nights: list[list[int]] = []  # The versions of each night.
    for _ in range(7):
        nights.append([])
        for _ in range(7):
            about = {"refreshed": {"trained_as": nights[-1][0]}} if nights[-1] else {}
            with new_version(tmp_path, keep=5) as (partial, folder):
                write_record(partial / MANIFEST_FILE, about)
            nights[-1].append(int(folder.name))
            made, kept = [x for night in nights for x in night], versions_of(tmp_path)
            assert len(kept) == min(5, len(made))
            assert kept[-2:] == made[-2:]
            assert {night[-1] for night in nights[-4:]} <= set(kept)
        if len(nights) == 1:
            assert kept == made[-5:]


# Decides by the newest version, and publishes when told to.
DECIDER = """
import sys
from pathlib import Path
from tfrs_pipeline.answers.publish import MANIFEST_FILE, new_version, publishing, versions_of

parent = Path(sys.argv[1])
print("ready", flush=True)
with publishing(parent):
    newest = versions_of(parent)[-1:]
    print("decided", flush=True)
    sys.stdin.readline()
    with new_version(parent) as (partial, folder):
        (partial / MANIFEST_FILE).write_text(str(newest))
"""


def test_who_decides_by_the_newest_version_publishes_the_next(tmp_path: Path) -> None:
    """The second of two processes waits, and decides by what the first one made."""
    command = [sys.executable, "-c", DECIDER, str(tmp_path)]

    def start(stack: contextlib.ExitStack) -> Any:
        pipes: dict[str, Any] = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        process = stack.enter_context(subprocess.Popen(command, text=True, **pipes))
        # Ends a process that hangs, so that reading from it ends too.
        killer = threading.Timer(120, process.kill)
        killer.start()
        stack.callback(killer.cancel)
        return process

    with contextlib.ExitStack() as stack:
        first = start(stack)
        assert [first.stdout.readline() for _ in range(2)] == ["ready\n", "decided\n"]
        second = start(stack)
        second.stdin.write("go\n")
        second.stdin.flush()
        told = second.stderr.readline()
        assert f"{tmp_path} is in use by process {first.pid}" in told
        assert told.endswith("Waiting until it ends.\n")
        first.stdin.write("go\n")
        first.stdin.flush()
        assert [process.wait() for process in (first, second)] == [0, 0]
    found = [(tmp_path / str(x) / MANIFEST_FILE).read_text() for x in versions_of(tmp_path)]
    assert found == ["[]", "[1]"]


def test_publications_at_once_do_not_mix(tmp_path: Path) -> None:
    payloads = {f"payload-{i}" for i in range(20)}
    together = threading.Barrier(20)

    def publish_together(payload: str) -> None:
        together.wait(60)
        publish(tmp_path, payload)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(publish_together, payloads))
    assert versions_of(tmp_path) == list(range(1, 21))
    found = {(tmp_path / str(v) / MANIFEST_FILE).read_text() for v in versions_of(tmp_path)}
    assert found == payloads


def test_killed_at_random_points_the_newest_version_is_whole(tmp_path: Path) -> None:
    """Kills publishers without warning; readers find whole versions, and never older ones."""
    rng = np.random.default_rng(0)
    newest, num_partial, trial = 0, 0, 0
    # How many kills fall within a version depends on the disk: goes on until enough have.
    while trial < NUM_KILLS or (num_partial <= NUM_KILLS // 4 and trial < MAX_KILLS):
        trial += 1
        command = [sys.executable, "-c", PUBLISHER, str(tmp_path), f"payload-{trial}"]
        publisher = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert publisher.stdout is not None
        publisher.stdout.readline()
        # Waits for some versions, then to a random point within the next one.
        start, num_whole = time.monotonic(), 1 + trial % 3
        for _ in range(num_whole):
            publisher.stdout.readline()
        time.sleep(float(rng.uniform(0, (time.monotonic() - start) / num_whole)))
        publisher.send_signal(signal.SIGKILL)
        publisher.wait()
        publisher.stdout.close()
        num_partial += any(path.name.startswith(".partial") for path in tmp_path.iterdir())
        versions = versions_of(tmp_path)
        for number in versions:
            payloads = [path.read_text() for path in (tmp_path / str(number)).iterdir()]
            assert (len(payloads), len(set(payloads))) == (FILES_OF_A_VERSION, 1)
        assert not versions or versions[-1] >= newest
        newest = versions[-1] if versions else newest
        # The next publisher's first version removes what this one left.
        assert sum(path.is_dir() for path in tmp_path.glob(".partial-*")) <= 1
    assert newest > 0
    # Otherwise too few were killed within a version, and the test shows nothing.
    assert num_partial > NUM_KILLS // 4
