"""The exported versions of a model, and the runs that made them."""

from pathlib import Path

from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.data.settings import DataConfig
from tfrs_pipeline.durable import Damaged, file_hash, read_record
from tfrs_pipeline.messages import beside
from tfrs_pipeline.model.settings import shape_problems
from tfrs_pipeline.run.folder import RunFolder, is_made_by
from tfrs_pipeline.serving.publish import MANIFEST_FILE, versions_of
from tfrs_pipeline.settings import ConfigError, refuse


def trained_by(folder: Path) -> list[str]:
    """Identifies the training of a run's model by hashes of its epochs' records."""
    epochs = (folder / "checkpoints" / "two_tower").rglob("epoch-*.json")
    # The records hold times, so they differ between trainings, even with equal settings.
    return sorted(map(file_hash, epochs))


def own_version(config: RunConfig, folder: Path) -> Path | None:
    """Returns the version exported from the training in a run's folder; None if there is none."""
    training = trained_by(folder)
    for number in reversed(versions_of(config.model_folder)):
        version = config.model_folder / str(number)
        try:
            manifest = read_record(version / MANIFEST_FILE, check_files=False)
        except Damaged:
            continue
        if "refreshed" not in manifest and manifest.get("training") == training:
            return version
    return None


def check_model_name(config: RunConfig) -> None:
    """Refuses a name derived from the events' file if it is empty or another log's model has it."""
    if config.export.name is not None:
        return
    if not config.model_name:
        message = f"required: no letter or digit in the name of {config.data.path} to name it by"
        raise ConfigError([("export.name", message)])
    if config.export.index == "none":
        return
    for number in versions_of(config.model_folder):
        path = config.model_folder / str(number) / MANIFEST_FILE
        # A model exported from Python has no config, so its data is not known.
        manifest = read_record(path, check_files=False)
        theirs = manifest.get("config", {}).get("data")
        if theirs is None or manifest.get("log") != name_of_log(config.data):
            made_of = theirs["path"] or theirs["source"] if theirs else "data that it does not name"
            anyway = f"or {config.model_name!r} to add a version to it anyway"
            message = f"{path.parent} is a model of {made_of}: set another name, {anyway}"
            raise ConfigError([("export.name", message)])


def name_of_log(data: DataConfig) -> str:
    """Identifies a log by its file's absolute path, or by the name of its table in Spark."""
    if data.path is None:
        return data.source
    # A link to a file is not followed, because its target may change from day to day.
    path = data.path
    return str(path if data.source == "spark" else path.parent.resolve() / path.name)


def with_source(config: RunConfig, folder: RunFolder) -> RunConfig:
    """Returns the settings with `warm_start` as a finished run of the same shape, or refuses."""
    if config.warm_start is None:
        return config
    source = _source(config.warm_start, folder)
    if folder.metrics() is None:  # A finished run needs no source any more.
        refuse(shape_problems(settings_of_finished(source).model, config.model))
    return config.model_copy(update={"warm_start": source})


def _source(path: Path, folder: RunFolder) -> Path:
    # A resumed run keeps the source that it began with, though the model has newer versions by now.
    if RunFolder(path).config_file.is_file():
        return path
    # The source of a finished run may be gone.
    if folder.metrics() is not None and (source := folder.settings().warm_start) is not None:
        return source
    versions = versions_of(path)
    version = path / str(versions[-1]) if versions else path
    if not (version / MANIFEST_FILE).is_file():
        near = beside(path)
        what = "which is neither a run's folder nor an exported model's"
        raise _refused(f"got {str(path)!r}, {what}{near and f'.{near}'}")
    source = _run_that_made(version)
    if source.resolve() != folder.path.resolve():
        return source
    if (first := folder.settings().warm_start) is not None:
        return first
    raise _refused(
        f"{version} was made by this very run, which began from random weights. To continue "
        "training from it, give another --run-dir"
    )


def _run_that_made(version: Path) -> Path:
    """Returns the folder of the run that exported a version; a `ConfigError` if it is gone."""
    made_by = read_record(version / MANIFEST_FILE, check_files=False).get("run")
    if made_by is None:
        raise _refused(
            f"{version} was exported from Python: no run holds its optimizer state. Use "
            "TwoTower.fit(warm_start=...) there"
        )
    folder = RunFolder(Path(made_by))
    if not folder.config_file.is_file():
        raise _refused(
            f"{version} was made by the run {made_by}, which is gone with its optimizer state. "
            "Give another run's folder, or none to train from random weights"
        )
    metrics = folder.metrics()
    if metrics is not None and not is_made_by(version, metrics):
        raise _refused(
            f"{version} was made by a run in {made_by}, where another run is now. Give the folder "
            "of the run to start from"
        )
    return folder.path


def _refused(message: str) -> ConfigError:
    return ConfigError([("warm_start", message)])


def settings_of_finished(path: Path) -> RunConfig:
    """Reads the settings of a finished run; a `ConfigError` if it is not finished."""
    folder = RunFolder(path)
    if not folder.metrics_file.is_file():
        raise _refused(f"got {str(path)!r}, a run that is not finished: resume it first")
    return folder.settings()
