"""A run's folder holds one run's settings, one process at a time, and nothing of refused input."""

import codecs
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tfrs_pipeline import ConfigError, DataError
from tfrs_pipeline.config import RunConfig, load_config, with_settings
from tfrs_pipeline.durable import InUse, StorageError, file_hash, write_record
from tfrs_pipeline.run.folder import (
    CONFIG_FILE,
    RunFolder,
    check_model_name,
    name_of_log,
)
from tfrs_pipeline.run.pipeline import run


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    settings = {"data.path": "clicks.csv", "export.directory": tmp_path / "saved_models"}
    return with_settings(RunConfig(), settings)


def begin(config: RunConfig, folder: Path) -> None:
    """Does what a run does until it has its data."""
    with RunFolder(folder).claim(config, is_run=True):
        (folder / "data").mkdir()
        (folder / "data" / "log.json").write_text("{}")


def refused(folder: Path, config: RunConfig, message: str, *, is_run: bool = True) -> None:
    error = pytest.raises((ValueError, ConfigError, StorageError, InUse), match=message)
    with error, RunFolder(folder).claim(config, is_run=is_run):
        pytest.fail("the work began")


def test_settings_are_read_back_whole_or_refused(config: RunConfig, tmp_path: Path) -> None:
    """A cut file may still be valid TOML, and its defaults would be the settings of another run."""
    begin(config, tmp_path / "run")
    path = tmp_path / "run" / CONFIG_FILE
    assert RunFolder(tmp_path / "run").settings() == load_config(path) == config
    whole = path.read_bytes()
    path.write_bytes(codecs.BOM_UTF8 + whole)  # As an editor may save it.
    assert RunFolder(tmp_path / "run").settings() == load_config(path) == config
    cuts = [whole[:i] for i in range(0, len(whole) - 1, 49)]
    for broken in (b"", *cuts, whole.replace(b"clicks", b"others"), whole + b"seed = 3\n"):
        path.write_bytes(broken)
        with pytest.raises(ConfigError, match=r"config\.toml:\n.*is not as the run wrote it"):
            RunFolder(tmp_path / "run").settings()
        refused(tmp_path / "run", config, "is not as the run wrote it")
        assert path.read_bytes() == broken
    path.unlink()
    with pytest.raises(ConfigError, match="lost, cut or changed"):
        RunFolder(tmp_path / "run").settings()


@pytest.mark.parametrize("left", ["data/log.json", "metrics.json", "checkpoints/last"])
def test_other_settings_are_refused_by_name(config: RunConfig, tmp_path: Path, left: str) -> None:
    """Also if the data has been removed since."""
    folder = tmp_path / "run"
    begin(config, folder)
    shutil.rmtree(folder / "data")
    (folder / left).parent.mkdir(exist_ok=True)
    (folder / left).write_text("{}")
    other = with_settings(config, {"training.batch_size": 512, "model.hidden_layers": [8]})
    changed = r"model.hidden_layers: \[\], now \[8\]; training.batch_size: 1024, now 512"
    refused(folder, other, rf"holds a run with other settings \({changed}\). Choose another folder")
    assert RunFolder(folder).settings() == config


def test_how_to_export_may_change_until_it_is_done(config: RunConfig, tmp_path: Path) -> None:
    """Otherwise a recall that no index can reach would cost the whole training."""
    folder, version = tmp_path / "run", tmp_path / "saved_models" / "clicks" / "1"
    begin(config, folder)
    record = folder / "checkpoints" / "two_tower" / "selection" / "epoch-1.json"
    # Also where: the disk of the first folder may be full.
    elsewhere = {"export.directory": tmp_path / "tiny", "export.name": "q1"}
    for changes in (
        {"export.index": "scann", "export.target_recall": 0.9},
        {"export.index": "none"},
        {**elsewhere, "export.user_data": False, "export.keep_versions": 3},
        {"export.index": "exact", "export.target_recall": 0.8},
    ):
        changed = with_settings(config, changes)
        with RunFolder(folder).claim(changed, is_run=True):
            assert RunFolder(folder).settings() == changed
        write_record(folder / "metrics.json", {"export_folder": None})
    for path in (version, record.parent):
        path.mkdir(parents=True)
    write_record(record, {})
    write_record(version / "manifest.json", {"training": [file_hash(record)]})
    write_record(folder / "metrics.json", {"export_folder": str(version)})
    others = {"export.index": "scann", "export.target_recall": 0.9, **elsewhere}
    for name, value in others.items():
        other = with_settings(changed, {name: value})
        message = (
            rf"other settings \({name}: .*leave these settings out.* Its model is in {version}:"
        )
        refused(folder, other, message)
    # A version of that number made by another run does not count.
    write_record(version / "manifest.json", {"training": ["another"]})
    with RunFolder(folder).claim(other, is_run=True):
        pass


@pytest.mark.parametrize(("left", "exports"), [("plans", True), ("checkpoints", False)])
def test_runs_and_comparisons_keep_apart(
    config: RunConfig, tmp_path: Path, left: str, exports: bool
) -> None:
    begin(config, tmp_path)
    (tmp_path / left).mkdir()
    what = "comparison" if exports else "run"
    refused(tmp_path, config, rf"holds a {what}\. Choose another folder", is_run=exports)


@pytest.mark.parametrize("own", ["data/events.parquet", "samples/july", "config.toml", "plans/a"])
def test_own_files_are_refused_and_left_alone(config: RunConfig, tmp_path: Path, own: str) -> None:
    (tmp_path / own).parent.mkdir(exist_ok=True)
    (tmp_path / own).write_text("seed = 3\n")
    for is_run in (True, False):
        refused(tmp_path, config, r"holds .*Choose another folder", is_run=is_run)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [(path, path.read_text()) for path in files] == [(tmp_path / own, "seed = 3\n")]


TRAININGS = ("checkpoints", "plans", "curves.json")


def fail(config: RunConfig, folder: Path, error: BaseException, *done: Path) -> None:
    with pytest.raises(type(error)), RunFolder(folder).claim(config, is_run=True):  # noqa: PT012
        for path in (folder / "data", *done):
            path.mkdir(parents=True)
        raise error


def test_only_a_stopped_run_leaves_a_folder(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "today"
    fail(config, folder, DataError("no column"), folder.parent / "another")
    assert list((tmp_path / "runs").iterdir()) == [folder.parent / "another"]
    folder.mkdir()  # The user's own folder.
    fail(config, folder, DataError("no column"))
    assert list(folder.iterdir()) == []
    (folder / "notes.txt").touch()
    fail(config, folder, DataError("no column"))
    assert (folder / "notes.txt").exists()
    trained = [(ValueError("diverged"), [name]) for name in TRAININGS]
    for number, (error, names) in enumerate([(KeyboardInterrupt(), []), *trained]):
        stopped = tmp_path / str(number)
        fail(config, stopped, error, *(stopped / name for name in names))
        assert RunFolder(stopped).settings() == config


def test_outputs_are_tried_before_the_work(config: RunConfig, tmp_path: Path) -> None:
    models, folder = tmp_path / "saved_models", tmp_path / "run"
    models.write_text("a file")
    refused(folder, config, "saved_models/clicks: Not a directory")
    assert list(tmp_path.iterdir()) == [models]
    models.unlink()
    models.symlink_to(tmp_path / "not mounted")
    refused(folder, config, "saved_models: is a link to .*not mounted")
    # The model's own folder is tried too, not only that of all models: it may be somebody else's.
    models.unlink()
    models.mkdir()
    (models / "clicks").symlink_to(tmp_path / "not mounted")
    refused(folder, config, "clicks: is a link to .*not mounted")
    unexported = with_settings(config, {"export.index": "none"})
    for config_, is_run in ((config, False), (unexported, True)):
        with RunFolder(folder).claim(config_, is_run=is_run):
            pass


def of_clicks(path: str, **export: Any) -> RunConfig:
    return RunConfig(data={"path": path}, export=export)


def test_names_of_other_models_are_kept(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Path("saved_models/log/1/manifest.json")
    written.parent.mkdir(parents=True)
    config = of_clicks("a/log.csv")
    about = {"config": config.model_dump(mode="json"), "log": name_of_log(config.data)}
    write_record(written, about)
    for same in ("a/log.csv", here / "a" / "log.csv", "b/../a/log.csv"):
        check_model_name(of_clicks(str(same)))
    # What a killed export left behind is not a model.
    left = written.parents[1] / ".partial-1" / "manifest.json"
    left.parent.mkdir()
    write_record(left, {"config": {"data": {"path": "b/log.csv", "source": ""}}, "log": "other"})
    check_model_name(config)
    # A link to the file of the day is one log, wherever it points.
    today, names = here / "log.csv", set()
    for day in ("monday", "tuesday"):
        today.unlink(missing_ok=True)
        today.symlink_to(here / f"{day}.csv")
        names.add(name_of_log(of_clicks("log.csv").data))
    assert len(names) == 1
    # The same relative path in another folder is another log.
    (here / "c").mkdir()
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(here / "c")
        other = of_clicks("a/log.csv", directory=here / "saved_models")
        with pytest.raises(ConfigError, match=r"is a model of /.*/a/log\.csv"):
            check_model_name(other)
    # A table of Spark has a name and no folder.
    table = {"source": "spark", "path": "shop.events"}
    assert name_of_log(RunConfig(data=table).data) == "shop.events"
    check_model_name(of_clicks("b/log.csv", name="log"))
    check_model_name(of_clicks("b/log.csv", index="none"))
    with pytest.raises(
        ConfigError, match=r"^export.name: .*log/1 is a model of /.*/a/log.csv: set"
    ):
        run(of_clicks("b/log.csv"), here / "run")
    assert not (here / "run").exists()
    write_record(written, {})  # As in a model exported from Python.
    for path, told in (("a/log.csv", "of data that it does not name"), ("журнал.csv", "required")):
        with pytest.raises(ConfigError, match=rf"^export\.name: .*{told}"):
            check_model_name(of_clicks(path))


def test_a_second_run_is_refused_at_once(config: RunConfig, tmp_path: Path) -> None:
    """Here the second run is in a thread; locks of other processes have their own tests."""
    folder = tmp_path / "run"
    with RunFolder(folder).claim(config, is_run=True), ThreadPoolExecutor() as other:
        other.submit(refused, folder, config, f"{folder} is in use by process").result()
    with RunFolder(folder).claim(config, is_run=True):
        pass
