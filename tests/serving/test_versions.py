"""Which version is served as folders come and go, with loads that cost nothing."""

import asyncio
import gc
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest

from tfrs_pipeline.serving import versions
from tfrs_pipeline.serving.rest import RequestError
from tfrs_pipeline.serving.versions import ModelVersions


class Fake:
    """Stands for a loaded version; a folder with a file `broken` cannot be loaded."""

    def __init__(self, folder: Path, *, with_exact: bool) -> None:
        if (folder / "broken").exists():
            raise ValueError("no such variable")
        self.number = int(folder.name)
        self.payload = (folder / "manifest.json").read_text()
        self.num_releases = 0

    def release(self) -> None:
        self.num_releases += 1


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "ServedVersion", Fake)


def put(folder: Path, number: int, payload: str = "", *, broken: bool = False) -> None:
    partial = folder / f".partial-{number}"
    partial.mkdir(parents=True)
    (partial / "manifest.json").write_text(payload)
    if broken:
        (partial / "broken").touch()
    os.rename(partial, folder / str(number))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put(tmp_path / "films", 1)
    return tmp_path / "films"


@pytest.fixture
def loads() -> list[tuple[int, bool]]:
    return []


@pytest.fixture
def model(folder: Path, loads: list[tuple[int, bool]]) -> ModelVersions:
    model = ModelVersions(
        folder,
        with_exact=False,
        on_load=lambda number, seconds, error: loads.append((number, error is None)),
    )
    model.load_first()
    return model


def states(model: ModelVersions) -> dict[int, str]:
    return {number: state for number, state, _ in model.statuses()}


def test_the_newest_is_served_and_the_old_one_not_found(model: ModelVersions, folder: Path) -> None:
    put(folder, 2)
    assert model.refresh()
    assert model.current.number == 2
    assert states(model) == {2: "AVAILABLE", 1: "END"}
    with model.use(2) as version:
        assert version is model.current
    with pytest.raises(RequestError, match=r"Specific\(films, 1\)") as caught, model.use(1):
        pass
    assert caught.value.status == 404


def test_nothing_new_loads_nothing(model: ModelVersions, loads: list[Any]) -> None:
    assert not model.refresh()
    assert loads == [(1, True)]


def test_an_old_version_lives_until_its_last_request(model: ModelVersions, folder: Path) -> None:
    with model.use() as first, model.use(1) as again:
        assert first is again
        put(folder, 2)
        model.refresh()
        assert model.current.number == 2
        assert states(model) == {2: "AVAILABLE", 1: "UNLOADING"}
        assert first.num_releases == 0  # type: ignore[attr-defined]
    assert first.num_releases == 1  # type: ignore[attr-defined]
    assert states(model) == {2: "AVAILABLE", 1: "END"}
    left = weakref.ref(first)
    del first, again
    gc.collect()
    assert left() is None


def test_a_broken_version_changes_nothing_but_the_status(
    model: ModelVersions,
    folder: Path,
    loads: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 1000.0
    monkeypatch.setattr(versions.time, "monotonic", lambda: now)
    put(folder, 2, broken=True)
    assert not model.refresh()
    assert model.current.number == 1
    (number, state, error), *_ = model.statuses()
    assert (number, state) == (2, "END")
    assert "no such variable" in error
    assert error in caplog.text
    for now, num_loads in [(1009.0, 2), (1010.0, 3), (1029.0, 3), (1030.0, 4)]:
        model.refresh()
        assert len(loads) == num_loads, now
    (folder / "2" / "broken").unlink()
    now += 40
    assert model.refresh()
    assert model.current.number == 2
    assert states(model) == {2: "AVAILABLE", 1: "END"}


def test_the_next_best_is_loaded_where_the_newest_is_broken(
    model: ModelVersions, folder: Path
) -> None:
    put(folder, 2)
    put(folder, 3, broken=True)
    model.refresh()
    assert model.current.number == 2
    fresh = ModelVersions(folder, with_exact=False)
    fresh.load_first()
    assert fresh.current.number == 2
    assert states(fresh) == {3: "END", 2: "AVAILABLE"}


def test_a_version_taken_away_is_a_step_back(model: ModelVersions, folder: Path) -> None:
    put(folder, 2)
    model.refresh()
    shutil.rmtree(folder / "2")
    assert model.refresh()
    assert model.current.number == 1
    assert states(model) == {2: "END", 1: "AVAILABLE"}


def test_another_model_under_the_same_number_is_a_new_version(
    model: ModelVersions, folder: Path
) -> None:
    shutil.rmtree(folder / "1")
    put(folder, 1, "another")
    assert model.refresh()
    assert model.current.payload == "another"  # type: ignore[attr-defined]
    assert states(model) == {1: "AVAILABLE"}


def test_a_folder_gone_for_a_while_changes_nothing(model: ModelVersions, folder: Path) -> None:
    folder.rename(folder.with_name("away"))
    assert not model.refresh()
    assert model.current.number == 1


def test_a_version_by_itself_stays(folder: Path) -> None:
    model = ModelVersions(folder / "1", with_exact=False)
    model.load_first()
    put(folder, 2)
    assert not model.refresh()
    assert (model.name, model.current.number) == ("films", 1)
    asyncio.run(asyncio.wait_for(model.watch(0.01), 5))  # Has nothing to watch.


def test_the_watch_follows_and_survives_a_broken_disk(
    model: ModelVersions, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, num_looks = versions.versions_of, 0

    def look(path: Path) -> list[int]:
        nonlocal num_looks
        num_looks += 1
        if num_looks == 1:
            raise OSError("stale file handle")
        return real(path)

    monkeypatch.setattr(versions, "versions_of", look)

    async def watched() -> None:
        watch = asyncio.create_task(model.watch(0.01))
        put(folder, 2)
        while model.current.number != 2:
            await asyncio.sleep(0.01)
        watch.cancel()

    asyncio.run(asyncio.wait_for(watched(), 20))
    assert num_looks > 1


def test_no_version_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No exported model at"):
        ModelVersions(tmp_path / "nowhere", with_exact=False)
    put(tmp_path / "films", 1, broken=True)
    model = ModelVersions(tmp_path / "films", with_exact=False)
    with pytest.raises(RuntimeError, match="no such variable"):
        model.load_first()
    with pytest.raises(RequestError) as caught, model.use():
        pass
    assert caught.value.status == 503


def test_the_list_of_old_versions_does_not_grow_for_ever(
    model: ModelVersions, folder: Path
) -> None:
    for number in range(2, 50):
        put(folder, number)
        model.refresh()
    assert len(model.statuses()) == versions.MAX_REPORTED
    assert states(model)[49] == "AVAILABLE"
    assert min(states(model)) == 50 - versions.MAX_REPORTED
    assert len(model._uses) == 1
