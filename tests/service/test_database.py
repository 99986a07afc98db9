"""The store: a confirmed write survives, none is half there, and another file is noticed."""

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.damage import copy_database, largest_file
from tfrs_pipeline.durable import Damaged, StorageError
from tfrs_pipeline.records.database import Replaced
from tfrs_pipeline.records.live_items import STORE_FILE, Store

ITEMS: list[dict[str, Any]] = [{"item_id": f"é\n{i}\0", "x": i / 3, "tags": [""]} for i in range(4)]


def write(store: Store, *items: dict[str, Any], removed: Any = ()) -> int:
    return store.write_items({x["item_id"]: x for x in items} | dict.fromkeys(removed))


def read(store: Store | Path, seq: int = 0) -> list[Any]:
    """Reads all items, with a store of its own if given a folder."""
    rows = (Store(store) if isinstance(store, Path) else store).items_after(seq)
    return [row.item if row.item is not None else row.item_id for row in rows]


def test_a_reader_gets_each_last_write_once(tmp_path: Path) -> None:
    reader, writer = Store(tmp_path), Store(tmp_path)
    assert read(reader) == []
    assert list(tmp_path.iterdir()) == []  # Only writers make the file.
    seq = write(writer, *ITEMS[:2])
    assert read(reader) == ITEMS[:2]
    assert read(reader, seq) == []
    changed = {**ITEMS[0], "x": -1}
    last = write(writer, changed, removed=[ITEMS[1]["item_id"]])
    assert read(reader, seq) == [changed, ITEMS[1]["item_id"]]
    assert read(tmp_path) == [changed, ITEMS[1]["item_id"]]  # Earlier writes of them are gone.
    assert last > seq
    assert [row.seq for row in reader.items_after(0)] == [last - 1, last]


def test_ids_keep_their_type(tmp_path: Path) -> None:
    ids = [7, "7", -(2**63), 2**63 - 1, "07", "7.0", "nan", "☂", "a\0b", "a"]
    write(Store(tmp_path), *({"item_id": id_} for id_ in ids))
    rows = Store(tmp_path).items_after(0)
    assert [(row.item_id, type(row.item_id)) for row in rows] == [(x, type(x)) for x in ids]


def test_a_number_is_never_used_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    seq = write(store, *ITEMS)
    store.mark_listed([], over=[row.seq for row in store.items_after(0)])
    assert read(store) == []
    assert write(store, ITEMS[0]) > seq


def test_old_rows_are_marked_and_dropped(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write(store, *ITEMS)
    assert not any(row.is_listed for row in store.items_after(0))
    first, *_ = (row.seq for row in store.items_after(0))
    store.mark_listed([ITEMS[1]["item_id"], "unknown"], over=[first])
    assert [row.is_listed for row in Store(tmp_path).items_after(0)] == [True, False, False]
    # A later write tells anew whether a version has the item.
    write(store, ITEMS[1])
    assert not any(row.is_listed for row in store.items_after(0))


def test_a_block_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    store, other = Store(tmp_path), Store(tmp_path)
    write(store, ITEMS[0])
    with pytest.raises(ZeroDivisionError), store.writing():  # noqa: PT012
        write(store, *ITEMS[1:3])
        assert read(other) == ITEMS[:1]
        raise ZeroDivisionError
    with store.writing():
        write(store, ITEMS[1])
        write(store, ITEMS[2])
        assert read(other) == ITEMS[:1]
    assert read(store) == read(other) == ITEMS[:3]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    # Wherever the disk is full: while the file is made, within a transaction, or at its end.
    for size in (0, 1, 4_097, 20_000, 60_000, 100_000):
        folder = tmp_path / str(size)
        folder.mkdir()
        store, other, confirmed = Store(folder), Store(folder), list[Any]()
        with largest_file(size), contextlib.suppress(StorageError):
            for number in range(100):
                write(store, {"item_id": number, "text": "x" * 3000})
                confirmed.append(number)
        assert len(confirmed) < 100
        for reader in (store, other, Store(folder)):
            assert [row.item_id for row in reader.items_after(0)] == confirmed
        write(store, ITEMS[0])
        assert read(folder)[-1] == ITEMS[0]


def test_it_says_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(Store(tmp_path), ITEMS[0])
    monkeypatch.setattr("tfrs_pipeline.records.database.BUSY_SECONDS", 0.05)
    store = Store(tmp_path)
    with Store(tmp_path).writing():
        assert read(store) == ITEMS[:1]  # Readers do not wait.
        with pytest.raises(StorageError, match=f"{STORE_FILE}: database is locked"):
            write(store, ITEMS[1])
    write(store, ITEMS[1])
    with largest_file(1), pytest.raises(StorageError, match=STORE_FILE):
        write(Store(tmp_path), ITEMS[2])


def test_a_folder_that_may_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Store(tmp_path)
    seq = write(writer, ITEMS[0])
    reader = Store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *arguments: False)
        assert read(reader) == ITEMS[:1]  # The writer's -wal file is there.
        del writer, reader  # Who comes last removes it.
        fresh = Store(tmp_path)
        assert read(fresh) == ITEMS[:1]
        assert [file.name for file in tmp_path.iterdir()] == [STORE_FILE]
        with pytest.raises(StorageError, match=STORE_FILE):
            write(Store(tmp_path), ITEMS[1])
    write(Store(tmp_path), ITEMS[1])
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *arguments: False)
        assert read(fresh, seq) == ITEMS[1:2]


def test_damage_is_named(tmp_path: Path) -> None:
    write(Store(tmp_path), *ITEMS)
    path = tmp_path / STORE_FILE
    whole = path.read_bytes()
    damages = [b"", whole[: len(whole) // 2], whole[:100], b"no database" * 100, whole[:4096]]
    damages.append(whole.replace(b'{"item_id"', b'{"item_id:'))
    damages.append(whole.replace(b"live_items", b"dead_items"))
    for number, damaged in enumerate(damages):
        path.write_bytes(damaged)
        with pytest.raises(Damaged, match=f"{STORE_FILE} is damaged.*Restore"):
            Store(tmp_path).items_after(0)
        with pytest.raises(Damaged, match=STORE_FILE), Store(tmp_path).writing():
            read(tmp_path)
        assert path.read_bytes() == damaged, number
    path.write_bytes(whole)
    assert read(tmp_path) == ITEMS


def put_back(backup: Path, path: Path) -> None:
    for end in ("-wal", "-shm"):  # As the guide says.
        path.with_name(f"{path.name}{end}").unlink()
    shutil.copy(backup, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


def delete(backup: Path, path: Path) -> None:
    path.unlink()  # Its -wal and -shm files stay behind.


@pytest.mark.parametrize("change", [copy_database, put_back, delete])
def test_another_file_is_noticed(tmp_path: Path, change: Any) -> None:
    path, backup, old = tmp_path / STORE_FILE, tmp_path / "backup", Store(tmp_path)
    write(old, *ITEMS[:2])
    copy_database(path, backup)
    write(old, *ITEMS[2:])
    idle = Store(tmp_path)
    assert read(idle) == ITEMS
    change(backup, path)
    # Others write more than was there, so that numbers of rows alone tell nothing.
    kept = [] if change is delete else ITEMS[:2]
    fresh = Store(tmp_path)
    assert read(fresh) == kept
    later = [{"item_id": number} for number in range(50)]
    for item in later:
        write(fresh, item)
    for store in (old, idle):
        for act in (lambda store: store.items_after(0), lambda store: write(store, ITEMS[3])):
            with pytest.raises(Replaced, match=f"{STORE_FILE} was deleted or restored"):
                act(store)
    # Processes that leave the old file behind do no harm to the new one.
    del old, idle, store
    assert read(fresh) == read(tmp_path) == [*kept, *later]
    write(fresh, ITEMS[3])
    assert read(tmp_path)[-1] == ITEMS[3]


WRITER = (
    "import sys; from pathlib import Path; from tfrs_pipeline.records.live_items import Store\n"
    "name, first, last = sys.argv[2], *map(int, sys.argv[3:])\n"
    "stores = [Store(Path(sys.argv[1])) for _ in range(2)]\n"
    "for number in range(first, last):\n"
    "    ids = [f'{name} {number} {i}' for i in range(3)]\n"
    "    items = {x: {'item_id': x, 'text': 'x' * (37 * number % 3000)} for x in ids}\n"
    "    stores[number % 2].write_items({**items, f'{name} last': {'number': number}})\n"
    "    print(number, flush=True)\n"
)


def start(folder: Path, name: str, first: int, last: int = 10**9) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), name, str(first), str(last)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_writers_lose_nothing_confirmed(tmp_path: Path) -> None:
    """Two writers, killed at random moments."""
    folder, rng, reader, seq = tmp_path, random.Random(0), Store(tmp_path), 0
    seen, confirmed = set[str](), {"a": -1, "b": -1}
    for _ in range(4):
        writers = {name: start(folder, name, number + 1) for name, number in confirmed.items()}
        for writer in writers.values():
            assert writer.stdout is not None
            writer.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        for writer in rng.sample([*writers.values()], 2):
            writer.kill()
        for name, writer in writers.items():
            left = writer.communicate()[0].split("\n")[:-1]
            confirmed[name] = max([confirmed[name] + 1, *map(int, left)])
        # A reader that goes on, and one that begins, see the same: each item once.
        rows = reader.items_after(seq)
        seq = rows[-1].seq
        ids = [row.item_id for row in rows if not row.item_id.endswith("last")]
        assert seen.isdisjoint(ids)
        seen.update(ids)
        items: dict[str, Any] = {row.item_id: row.item for row in Store(folder).items_after(0)}
        assert {x for x in items if not x.endswith("last")} == seen
        for name in writers:
            last = items[f"{name} last"]["number"]
            # The write after the last confirmed one may be there, but only whole.
            assert last in (confirmed[name], confirmed[name] + 1)
            written = {x for x in seen if x.startswith(f"{name} ")}
            assert written == {f"{name} {n} {i}" for n in range(last + 1) for i in range(3)}
            confirmed[name] = last
    with contextlib.closing(sqlite3.connect(folder / STORE_FILE)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert sum(number + 1 for number in confirmed.values()) >= 8


def test_a_kill_while_the_log_is_copied_loses_nothing(tmp_path: Path) -> None:
    """The file's first page tells of pages that only the log holds."""
    store, copy = Store(tmp_path), tmp_path / "copy"
    copy.mkdir()
    write(store, *ITEMS)
    items = [{"item_id": f"late {number}", "text": "x" * 3000} for number in range(40)]
    write(store, *items)
    log = (tmp_path / f"{STORE_FILE}-wal").read_bytes()
    before = (tmp_path / STORE_FILE).read_bytes()
    with contextlib.closing(sqlite3.connect(tmp_path / STORE_FILE)) as connection:
        assert connection.execute("PRAGMA wal_checkpoint").fetchone()[0] == 0
    after = (tmp_path / STORE_FILE).read_bytes()
    assert len(after) > len(before)
    (copy / STORE_FILE).write_bytes(after[:4096] + before[4096:])
    with pytest.raises(Damaged):
        read(copy)
    (copy / f"{STORE_FILE}-wal").write_bytes(log)
    assert read(copy) == [*ITEMS, *items]


def test_a_log_does_not_hide_that_a_file_was_cut(tmp_path: Path) -> None:
    """The log holds a later write, not the pages that the file lost."""
    store, cut = Store(tmp_path), tmp_path / "cut"
    cut.mkdir()
    write(store, *({"item_id": f"early {number}", "text": "x" * 3000} for number in range(40)))
    with contextlib.closing(sqlite3.connect(tmp_path / STORE_FILE)) as connection:
        connection.execute("PRAGMA wal_checkpoint")
    write(store, ITEMS[0])
    whole = (tmp_path / STORE_FILE).read_bytes()
    # The log holds the last page, in which the later write is.
    for size in (4096 * 3, len(whole) // 2, len(whole) - 2 * 4096):
        contents = {"": whole[:size], "-wal": (tmp_path / f"{STORE_FILE}-wal").read_bytes()}
        for end, content in contents.items():
            (cut / f"{STORE_FILE}{end}").write_bytes(content)
        for _ in range(2):
            with pytest.raises(Damaged):
                write(Store(cut), ITEMS[1])
        for end, content in contents.items():  # What is left of it stays for its owner.
            assert (cut / f"{STORE_FILE}{end}").read_bytes() == content


def test_threads_and_processes_write_in_turn(tmp_path: Path) -> None:
    others = [start(tmp_path, name, 0, 40) for name in "ab"]
    shared, reader, seq = Store(tmp_path), Store(tmp_path), 0
    seen: list[Any] = []

    def write_some(name: str) -> None:
        for number in range(40):
            write(shared, {"item_id": f"{name} {number}"})

    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(write_some, name) for name in "cd"]
        while not all(x.done() for x in done) or any(x.poll() is None for x in others):
            rows = reader.items_after(seq)
            seen += [row.item_id for row in rows if not row.item_id.endswith("last")]
            seq = rows[-1].seq if rows else seq
        assert [x.result() for x in done] == [None, None]
    assert [other.wait(60) for other in others] == [0, 0]
    seen += [x.item_id for x in reader.items_after(seq) if not x.item_id.endswith("last")]
    assert len(seen) == len(set(seen)) == 2 * 40 * 3 + 2 * 40
