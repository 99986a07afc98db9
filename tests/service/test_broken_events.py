"""A file of events that breaks while a server runs."""

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.damage import largest_file
from tests.service.running_server import PREDICT, Running, retrieve_user, send, until
from tests.service.test_user_events import event
from tfrs_pipeline.durable import Damaged, StorageError
from tfrs_pipeline.records.journal import JOURNAL_FILE, Journal, Watch
from tfrs_pipeline.records.user_events import Event


def ask(running: Running, user: int = 102, k: int = 5) -> tuple[list[int], str | None]:
    """Returns the ids of an answer, and its header about events."""
    response = running.post(PREDICT, json=retrieve_user([user], [[]], k))
    assert response.status_code == 200, response.text
    return response.json()["outputs"]["candidate_ids"][0], response.headers.get("x-events")


def of_events(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert not [record for record in caplog.records if record.exc_info]
    return [record.getMessage() for record in caplog.records if "event" in record.getMessage()]


def damage_a_page(path: Path, whole: bytes) -> None:
    """Overwrites the first page of the table of events; the file's own page stays."""
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'events'"
        (page,) = connection.execute(query).fetchone()
    path.write_bytes(whole[: 4096 * (page - 1)] + b"x" * 4096 + whole[4096 * page :])


DAMAGES: dict[str, Callable[[Path, bytes], object]] = {
    "empty": lambda path, whole: path.write_bytes(b""),
    "overwritten": lambda path, whole: path.write_bytes(b"no database" * 2000),
    "cut": lambda path, whole: path.write_bytes(whole[: len(whole) // 2]),
    "a page": damage_a_page,
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_server_goes_on_without_its_file_of_events(
    films: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    path = films / JOURNAL_FILE
    with Running(films, takes_writes=True, record_share=1) as running:
        before, _ = ask(running)
        assert send(running, event(102, before[0])).status_code == 200
        after = ask(running)
        assert before[0] not in after[0]
        # Into the file, which holds nothing but its tables until then.
        subprocess.run(["sqlite3", str(path), "PRAGMA wal_checkpoint"], check=True)
        until(lambda: not running.server.recorder._waiting)
        with running.server.recorder.journal.writing() as connection:
            assert connection.execute("SELECT count(*) FROM served").fetchone() == (2,)
        subprocess.run(["sqlite3", str(path), "PRAGMA wal_checkpoint"], check=True)
        whole, ready = path.read_bytes(), running.get("/readyz").text
        num_confirmed = running.metric("tfrs_events_total", type="clicked", outcome="confirmed")
        num_refused = running.metric("tfrs_events_total", type="clicked", outcome="refused")
        num_without = running.metric("tfrs_answers_without_events_total")
        caplog.clear()
        DAMAGES[how](path, whole)
        for _ in range(3):
            assert ask(running) == (before, "unavailable")
            answer = send(running, event(102, after[0][0]))
            assert (answer.status_code, "is damaged" in answer.text) == (503, True)
            deletion = send(running, b"", "/v1/users/102", "DELETE")
            assert deletion.status_code == 503
        # What other users did may still be read; no event is taken, lest a backup loses it.
        assert send(running, event(105, after[0][0])).status_code == 503
        told = running.get("/readyz")
        assert (told.status_code, "events are unavailable" in told.text) == (200, True)
        assert told.text.startswith(ready.strip())
        assert len(of_events(caplog)) == 1
        counted = {"type": "clicked", "outcome": "refused"}
        assert running.metric("tfrs_events_total", **counted) == num_refused + 4
        assert running.metric("tfrs_answers_without_events_total") == num_without + 3
        caplog.clear()
        path.write_bytes(whole)
        assert running.get("/readyz").text == ready
        assert ask(running) == after
        assert send(running, event(102, after[0][0])).json()["num_new"] == 1
        assert ask(running)[0][0] == after[0][1]
        assert of_events(caplog) == ["The events can be read again."]
        counted["outcome"] = "confirmed"
        assert running.metric("tfrs_events_total", **counted) == num_confirmed + 1
    assert len(Journal(films).events_by_user([102])[102]) == 2


def test_a_version_is_loaded_while_events_cannot_be_read(films: Path) -> None:
    with Running(films, takes_writes=True) as running:
        before, _ = ask(running)
        assert send(running, event(102, before[0])).status_code == 200
        (films / JOURNAL_FILE).write_bytes(b"")
        shutil.copytree(films / "1", films / ".2")
        (films / ".2").rename(films / "2")
        until(lambda: running.get("/readyz").text.startswith("ok: films version 2;"))
        assert ask(running) == (before, "unavailable")


def test_a_damaged_file_makes_way_for_another(films: Path) -> None:
    """As the guide says: the three files are moved away, and a backup takes their place."""
    path = films / JOURNAL_FILE
    with Running(films, takes_writes=True) as running:
        first, *others = ask(running)[0]
        send(running, event(102, first))
        subprocess.run(["sqlite3", str(path), f".backup {films / 'backup'}"], check=True)
        send(running, event(102, others[0]))
        path.write_bytes(b"")
        assert ask(running)[1] == "unavailable"
        for end in ("", "-wal", "-shm"):
            path.with_name(f"{JOURNAL_FILE}{end}").rename(films / f"away{end}")
        (films / "backup").rename(path)
        assert ask(running)[0][0] == others[0]
        assert send(running, event(102, others[1])).status_code == 200
        assert others[1] not in ask(running)[0]
    assert [e.item_id for e in Journal(films).events_by_user([102])[102]] == [first, others[1]]


def test_nothing_is_written_to_a_file_whose_damage_is_known(tmp_path: Path) -> None:
    """Its whole pages would take an event, which a backup in its place then lacks."""
    journal, click = Journal(tmp_path, watch := Watch()), Event(7, 1, 10, "clicked", None, None)
    journal.write([[click]])
    watch.failed(Damaged("one page"), journal._stamp(), is_writer=False)
    assert [*journal.events_by_user([7])] == [7]
    with pytest.raises(Damaged, match="one page"):
        journal.another().write([[click._replace(time=2)]])
    assert watch.unreadable == "one page"  # A page that can be read says nothing of the others.
    os.utime(journal.path)  # As of another file.
    assert journal.another().write([[click._replace(time=2)]]) == [1]
    assert watch.unreadable == ""


def test_another_file_leaves_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path, Watch())
    others = [journal.another() for _ in range(2)]
    click = Event(7, 1, 10, "clicked", None, None)

    def told() -> list[str]:
        for other in (*others, journal):
            other.events_by_user([7])
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    journal.write([[click]])
    subprocess.run(["sqlite3", journal.path, f".backup {tmp_path / 'backup'}"], check=True)
    journal.write([[click._replace(time=2)]])
    assert journal.forget([8]) == [0]  # It writes the file anew itself.
    assert told() == []
    subprocess.run(["sqlite3", journal.path, f".restore {tmp_path / 'backup'}"], check=True)
    assert told() == ["The file of events was replaced, restored or written anew."]
    journal.path.unlink()
    assert told() == ["The file of events was deleted."]
    journal.write([[click]])
    assert told() == []


def test_a_full_disk_leaves_one_line_in_the_log(
    films: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Running(films, takes_writes=True, record_share=1) as running:
        assert send(running, event(102, 3)).status_code == 200
        caplog.clear()
        lost = running.metric("tfrs_unrecorded_answers_total")
        with largest_file(1):
            for item in range(5):
                answer = send(running, event(102, item))
                assert (answer.status_code, "events.sqlite: disk" in answer.text) == (503, True)
                ask(running, 103)
            until(lambda: running.metric("tfrs_unrecorded_answers_total") == lost + 5)
            assert len(of_events(caplog)) == 1
            assert ask(running)[1] is None  # Events can be read.
            caplog.clear()
        assert send(running, event(102, 10)).status_code == 200
        assert of_events(caplog) == ["The events can be written again."]


def test_a_deletion_needs_no_room_in_the_folder_of_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy that it makes is in the model's folder; without room there, it says how much."""
    journal = Journal(tmp_path)
    journal.write([[Event(n, n, "x" * 500, "clicked", None, None) for n in range(9_000)]])
    journal.forget([0])
    with closing(sqlite3.connect(":memory:")) as connection:
        folder = connection.execute("PRAGMA temp_store_directory").fetchone()
    assert folder == (str(tmp_path),)
    size = journal.path.stat().st_size
    with largest_file(size // 2), pytest.raises(StorageError) as caught:
        journal.forget([1])
    assert f"takes up to {2 * size / 1e6:.1f} MB more in {tmp_path}" in str(caught.value)
    assert journal.events_by_user([1]) == {}
    assert journal.forget([1]) == [0]
