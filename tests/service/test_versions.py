"""Which version is served as folders come and go; the versions are fakes that load at once."""

import contextlib
import os
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from starlette.exceptions import HTTPException

from tfrs_pipeline.durable import read_record, write_record
from tfrs_pipeline.service import versions
from tfrs_pipeline.service.server import write_items
from tfrs_pipeline.service.versions import VIOLATIONS, ModelVersions


class Fake:
    """Stands for a loaded version; a folder with a file `broken` cannot be loaded."""

    def __init__(self, folder: Path) -> None:
        if (folder / "broken").exists():
            raise ValueError("no such\nvariable")
        self.number = int(folder.name)
        self.payload = read_record(folder / "manifest.json")["payload"]
        self.num_uses = 0
        self.retriever = SimpleNamespace(catch_up=lambda: None, violations=lambda: [])


def put(folder: Path, number: int, payload: str = "", *, broken: bool = False) -> None:
    partial = folder / f".partial-{number}"
    partial.mkdir(parents=True)
    (partial / "weights").touch()
    write_record(partial / "manifest.json", {"payload": payload}, [partial / "weights"])
    if broken:
        (partial / "broken").touch()
    os.rename(partial, folder / str(number))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put(tmp_path / "films", 1)
    return tmp_path / "films"


def versions_of(folder: Path) -> ModelVersions:
    model = ModelVersions(folder, Fake)  # type: ignore[arg-type]
    model.load_first()
    return model


@pytest.fixture
def model(folder: Path) -> ModelVersions:
    return versions_of(folder)


def served(model: ModelVersions) -> Any:
    with model.use() as version:
        return version


def states(model: ModelVersions) -> dict[int, str]:
    return {number: state for number, (state, _) in model.statuses().items()}


def test_only_the_newest_is_served(model: ModelVersions, folder: Path) -> None:
    first = served(model)
    model.refresh()
    assert served(model) is first  # Without a new version, nothing is loaded.
    put(folder, 2)
    model.refresh()
    assert states(model) == {2: "AVAILABLE"}
    with model.use("2") as version:
        assert version.number == 2
    for number in ("1", "02", "x"):
        with pytest.raises(HTTPException, match=rf"films, {number}\)") as caught, model.use(number):
            pass
        assert caught.value.status_code == 404


def test_an_old_version_lives_until_its_last_request(model: ModelVersions, folder: Path) -> None:
    with model.use() as first, model.use("1") as again:
        assert first is again
        put(folder, 2)
        model.refresh()
        assert served(model).number == 2
        assert states(model) == {2: "AVAILABLE", 1: "UNLOADING"}
    model.refresh()
    model.refresh()
    assert states(model) == {2: "AVAILABLE"}
    left = weakref.ref(first)
    del first, again
    assert left() is None


def test_a_broken_version_changes_nothing_but_the_status(
    model: ModelVersions, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    now = 1000.0
    monkeypatch.setattr(versions.time, "monotonic", lambda: now)
    catch_up = served(model).retriever.catch_up = mock.Mock()
    put(folder, 2, broken=True)
    model.refresh()
    assert served(model).number == 1
    catch_up.assert_called_once()  # Live items are taken in all the same.
    state, error = model.statuses()[2]
    assert (state, error in caplog.text) == ("END", True)
    assert error == "Version 2 cannot be loaded: ValueError: no such variable"  # In one line.
    (folder / "2" / "broken").unlink()
    now += versions.RETRY_SECONDS - 1
    model.refresh()
    assert served(model).number == 1
    now += 1
    model.refresh()
    assert served(model).number == 2
    assert states(model) == {2: "AVAILABLE"}


def test_a_broken_newest_version_is_passed_over(folder: Path) -> None:
    put(folder, 2)
    put(folder, 3, broken=True)
    model = versions_of(folder)
    assert states(model) == {3: "END", 2: "AVAILABLE"}
    for removed, left in ((3, 2), (2, 1)):
        shutil.rmtree(folder / str(removed))
        model.refresh()
        assert states(model) == {left: "AVAILABLE"}


def test_another_model_of_that_number_is_a_new_version(model: ModelVersions, folder: Path) -> None:
    shutil.rmtree(folder / "1")
    put(folder, 1, "another")
    model.refresh()
    assert served(model).payload == "another"
    assert states(model) == {1: "AVAILABLE"}
    folder.rename(folder.with_name("away"))  # Its absence changes nothing.
    model.refresh()
    assert states(model) == {1: "AVAILABLE"}


def test_a_link_is_served_by_its_own_name_and_followed_anew(folder: Path) -> None:
    live, other = folder.with_name("live"), folder.with_name("other")
    put(other, 1, "other")
    live.symlink_to(folder)
    model = versions_of(live)
    assert (model.name, served(model).payload) == ("live", "")
    live.unlink()
    live.symlink_to(other)
    model.refresh()
    assert served(model).payload == "other"


@contextlib.contextmanager
def watched(model: ModelVersions) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=model.watch, args=(0.01, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_version_by_itself_stays(folder: Path) -> None:
    model = versions_of(folder / "1")
    put(folder, 2)
    model.refresh()
    assert (model.name, served(model).number) == ("films", 1)
    folder.with_name("current").symlink_to(folder / "1")
    linked = versions_of(folder.with_name("current"))
    assert (linked.name, served(linked).number) == ("films", 1)
    # What other processes write is taken in all the same.
    with mock.patch.object(served(model), "retriever") as retriever, watched(model):
        while retriever.catch_up.call_count < 2:
            time.sleep(0.01)
    assert served(model).number == 1


def test_a_pinned_version_outlives_newer_ones_and_its_own_folder(folder: Path) -> None:
    put(folder, 2)
    put(folder, 3)
    model = versions_of(folder / "2")
    for number in (3, 2, 1):
        shutil.rmtree(folder / str(number))
        model.refresh()
        with model.use("2") as version:
            assert version.number == 2
        assert states(model) == {2: "AVAILABLE"}


def test_the_watch(model: ModelVersions, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, num_looks = versions.versions_of, 0

    def look(path: Path) -> list[int]:
        nonlocal num_looks
        num_looks += 1
        if num_looks == 1:
            raise OSError("stale file handle")
        return real(path)

    monkeypatch.setattr(versions, "versions_of", look)

    with watched(model):
        put(folder, 2)
        while served(model).number != 2:
            time.sleep(0.01)
    assert num_looks > 1


def test_what_does_not_hold_is_said_between_calls_once_a_minute(
    model: ModelVersions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    version, now = served(model), [100.0]
    monkeypatch.setattr("tfrs_pipeline.service.versions.time.monotonic", lambda: now[0])

    def checked() -> int:
        caplog.clear()
        model._check_if_idle()
        return len(caplog.messages)

    version.retriever.violations = lambda: ["a candidate's vector is not finite", "and more"]
    with model.use():
        assert checked() == 0  # Somebody waits for it.
    assert checked() == 2
    assert caplog.messages[0] == "version 1 of films is broken: a candidate's vector is not finite"
    assert VIOLATIONS.labels("films")._value.get() == 2
    for seconds, num in ((59.0, 0), (2.0, 2)):
        now[0] += seconds
        assert checked() == num
    version.retriever.violations, now[0] = lambda: [], now[0] + 61
    assert checked() == VIOLATIONS.labels("films")._value.get() == 0


def test_no_version_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No exported model at"):
        versions_of(tmp_path / "nowhere")
    put(tmp_path / "films", 1, broken=True)
    with pytest.raises(RuntimeError, match="no such variable"):
        versions_of(tmp_path / "films")


def test_a_version_comes_into_use_with_every_confirmed_write(
    model: ModelVersions, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal: list[Any] = []
    writer = threading.Thread(target=write_items, args=(model, b'{"item_ids": [7]}', False))

    class Reader:
        """Knows what was written when it last caught up."""

        num_candidates = 0

        def __init__(self, folder: Path) -> None:
            self.known: list[Any] = []
            self.is_first = folder.name == "2"

        @property
        def live(self) -> Any:
            return self

        def prepare(self, items: Any = (), removed: Any = ()) -> Any:
            return SimpleNamespace(removed=removed, notes=[])

        def write(self, change: Any) -> tuple[int, int]:
            journal.extend(change.removed)
            self.known = [*journal]
            return 0, len(change.removed)

        def catch_up(self) -> None:
            self.known = [*journal]
            if self.is_first:  # A write that begins now must wait, or it would be missed.
                self.is_first = False
                writer.start()
                writer.join(0.3)
                assert journal == [5]

    def loaded(folder: Path) -> Any:
        version = Fake(folder)
        version.retriever = Reader(folder)  # type: ignore[assignment]
        if folder.name == "2":
            write_items(model, b'{"item_ids": [5]}', False)
        return version

    monkeypatch.setattr(model, "_load_version", loaded)
    served(model).retriever = Reader(folder / "1")
    put(folder, 2)
    model.refresh()
    writer.join()
    assert served(model).number == 2
    assert served(model).retriever.known == [5, 7]
