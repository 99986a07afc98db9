"""The folder of a run: its layout, lock and settings; the versions that were exported from it."""

import contextlib
import hashlib
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tfrs_pipeline import durable
from tfrs_pipeline.answers.publish import MANIFEST_FILE, versions_of
from tfrs_pipeline.cluster import this_worker
from tfrs_pipeline.config import (
    ExportConfig,
    RunConfig,
    dump_config,
    flat_settings,
    load_config,
)
from tfrs_pipeline.data.settings import DataConfig
from tfrs_pipeline.messages import beside
from tfrs_pipeline.settings import ConfigError

CONFIG_FILE, METRICS_FILE, COMPARISON_FILE = "config.toml", "metrics.json", "comparison.json"
STEPS_FILE = "steps.json"  # What differs between equal runs: date, durations, and steps' notes.
DATA, SPLIT_FILE, SAMPLES = "data", "data/split.parquet", "samples"
CURVES_FILE, RACE_FILE = "curves.json", "race.json"
CHECKPOINTS, PLANS_FOLDER = "checkpoints", "plans"
# The names of a run's models in its results, and of their trainings.
MODEL, UNCORRECTED = "two_tower", "two_tower_uncorrected"
MAY_CHANGE = tuple(f"export.{name}" for name in ExportConfig.model_fields)
"""Settings of a started run that may change until something is exported; then only the gate."""

# Files that a run replaces; a user's own files may have the same names.
_REPLACED = (
    CONFIG_FILE,
    DATA,
    SAMPLES,
    CURVES_FILE,
    RACE_FILE,
    PLANS_FOLDER,
    "native.log",
    "report.html",
    COMPARISON_FILE,
    "comparison.md",
    "comparison.svg",
)
# Files that show that a run has started; from then on its settings are fixed.
_BEGUN = (f"{DATA}/log.json", CHECKPOINTS, METRICS_FILE)
_HASH_LINE = "# sha256 of the lines above: "


class RunFolder:
    """The folder of a run or of a comparison, and what lies in it.

    `config_file` has the settings with their hash, `metrics_file` is the record of a finished run.
    `samples` has a folder each for "selection" and "final", `checkpoints` one for each model, and
    during a race for each recipe. `curves_file` has the curves of a race so far, and `race_file` is
    the record of a decided one. `left_out_file` records the baselines that failed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file, self.metrics_file = path / CONFIG_FILE, path / METRICS_FILE
        self.data, self.split = path / DATA, path / SPLIT_FILE
        self.curves_file, self.race_file = path / CURVES_FILE, path / RACE_FILE
        self.left_out_file = path / "left_out.json"
        self.samples, self.checkpoints = path / SAMPLES, path / CHECKPOINTS

    def holds_run(self) -> bool:
        """Returns whether there is a run or a comparison, or a remainder of one."""
        return self._has(CONFIG_FILE, PLANS_FOLDER, *_BEGUN)

    def has_begun(self) -> bool:
        """Returns whether a run has started, whose settings are fixed."""
        return self._has(*_BEGUN)

    def _has(self, *names: str) -> bool:
        return any((self.path / name).exists() for name in names)

    def metrics(self) -> dict[str, Any] | None:
        """Reads the metrics of a finished run; None if it is not finished."""
        metrics = durable.read_whole(self.metrics_file)
        return None if metrics is None else {**self._steps(), **metrics}

    def _steps(self) -> dict[str, Any]:
        # Runs of older releases have these values in metrics.json.
        return durable.read_whole(self.path / STEPS_FILE) or {}

    def results(self) -> dict[str, Any]:
        """Reads the metrics of a finished run; refuses (`ValueError`) any other folder."""
        if not self.metrics_file.is_file():
            if self.holds_run():
                again = f"tfrs-pipeline run --run-dir {shlex.quote(str(self.path))}"
                remedy = f" It was stopped: finish it with:  {again}"
            else:
                remedy = beside(self.path, lambda path: (path / METRICS_FILE).is_file())
            raise ValueError(
                f"{self.path} holds no finished run: it has no {METRICS_FILE}.{remedy}"
            )
        return {**self._steps(), **durable.read_record(self.metrics_file)}

    def trained_by(self) -> list[str]:
        """Identifies the training of the run's model by hashes of its epochs' records."""
        epochs = self.checkpoints.glob("*/*/epoch-*.json")
        own = (path for path in epochs if path.parts[-3] != UNCORRECTED)
        # The records hold times, so they differ between trainings, even with equal settings.
        return sorted(map(durable.file_hash, own))

    def own_version(self, config: RunConfig) -> Path | None:
        """Returns the version that was exported from the run's training; None if there is none."""
        written, models = (self.metrics() or {}).get("export_folder"), config.model_folder
        # It is among the model's versions, or where it was written: the folders may have moved.
        versions = [models / str(number) for number in reversed(versions_of(models))]
        training = self.trained_by()
        for version in [*versions, *([Path(written)] if written else [])]:
            with contextlib.suppress(durable.Damaged, OSError):
                manifest = durable.read_record(version / MANIFEST_FILE, check_files=False)
                # A refresh carries the record of the training over, but another command exported.
                if "refreshed" not in manifest and manifest.get("training") == training:
                    return version
        return None

    def settings(self) -> RunConfig:
        """Reads the settings that the run started with; refuses a lost, cut or changed file."""
        path = self.config_file  # A cut file might hold the settings of another run.
        # The hash would not match bytes that are not UTF-8 either.
        text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
        settings, _, written = text.rpartition(_HASH_LINE)
        if written and written.strip() == _hash(settings):
            return load_config(path)
        message = (
            "is not as the run wrote it: lost, cut or changed. A run keeps the settings that it "
            "began with. Put the file back, or give settings with --config FILE and another "
            "--run-dir"
        )
        raise ConfigError([("", message)], str(path))

    @contextlib.contextmanager
    def claim(self, config: RunConfig, *, is_run: bool) -> Iterator[None]:
        """Locks the folder, and checks or writes its settings.

        If the data is rejected, files created for the run are removed. If several workers train
        together, the chief claims the folder for all. If a run exports, this also checks that the
        model's folder can be written.
        """
        # The others write nothing.
        if not this_worker().is_chief:
            yield
            return
        import duckdb  # Imported here, because the command line's help does not need it.

        exports = is_run and config.export.index != "none"
        for written in (self.path, *([config.model_folder] if exports else [])):
            # TensorFlow treats [ and \ as a pattern when it reads, but not when it writes.
            if wrong := sorted(set("[\\") & set(str(written))):
                raise ValueError(
                    f"{written} holds {' and '.join(wrong)}: TensorFlow could not read back what "
                    "it writes there. Choose a folder without."
                )
            durable.try_writing(written)
        was_there = self.path.exists()
        is_new = not was_there or not any(self.path.iterdir())
        with durable.naming(self.path, duckdb.IOException):
            self.path.mkdir(parents=True, exist_ok=True)
            with durable.locked(self.path / "lock"):
                left = (PLANS_FOLDER,) if is_run else (CHECKPOINTS, METRICS_FILE)
                if self._has(*left):
                    held = f"{self.path} holds a {'comparison' if is_run else 'run'}"
                    raise ValueError(f"{held}. Choose another folder with --run-dir.")
                self._check_settings(config)
                try:
                    yield
                except ValueError:  # Refused input. After Ctrl-C or a crash, the run is resumed.
                    # Hours of trainings are kept, such as those before a model diverged.
                    if is_new and not self._has(CHECKPOINTS, PLANS_FOLDER, CURVES_FILE):
                        shutil.rmtree(self.path, ignore_errors=True)
                        if was_there:
                            self.path.mkdir(exist_ok=True)
                    raise

    def _check_settings(self, config: RunConfig) -> None:
        """Writes the settings, or checks that they are those of the existing run.

        A comparison may get more seeds: the trainings of the others stay.
        """
        # A run whose data was refused leaves nothing behind, so its settings may be corrected.
        if not self.has_begun():
            if existing := [name for name in _REPLACED if self._has(name)]:
                try:
                    self.settings()
                except ConfigError:
                    raise ValueError(
                        f"{self.path} holds {', '.join(existing)}, which a run would replace, but "
                        f"no {CONFIG_FILE} as a run writes it: they may be your own. Choose "
                        "another folder with --run-dir."
                    ) from None
            self._write_settings(config)
            return
        configs = self.settings(), config
        old, new = (flat_settings(settings.model_dump(mode="json")) for settings in configs)
        changes = [name for name in old | new if old.get(name) != new.get(name)]
        exported = self.metrics() and self.own_version(config)
        allowed = (*(["export.gate"] if exported else MAY_CHANGE), "compare.seeds")
        refused = [name for name in changes if name not in allowed]
        if refused:
            lines = [f"{name}: {old.get(name)!r}, now {new.get(name)!r}" for name in refused]
            raise ValueError(
                f"{self.path} holds a run with other settings ({'; '.join(lines)}). Choose another "
                "folder with --run-dir, or leave these settings out to go on with this run."
                f"{f' Its model is in {exported}: copy that folder.' if exported else ''}"
            )
        if changes:
            self._write_settings(config)

    def _write_settings(self, config: RunConfig) -> None:
        settings = dump_config(config)
        with durable.replacing(self.config_file) as partial:
            partial.write_text(f"{settings}{_HASH_LINE}{_hash(settings)}\n", encoding="utf-8")


def _hash(settings: str) -> str:
    return hashlib.sha256(settings.encode()).hexdigest()


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
        manifest = durable.read_record(path, check_files=False)
        # A model that was exported from Python does not name its log.
        log = manifest.get("log", "data that it does not name")
        if log != name_of_log(config.data):
            anyway = f"or {config.model_name!r} to add a version to it anyway"
            message = f"{path.parent} is a model of {log}: set another name, {anyway}"
            raise ConfigError([("export.name", message)])


def name_of_log(data: DataConfig) -> str:
    """Identifies a log by its file's absolute path, or by the name of its table in Spark."""
    if data.path is None:
        return data.source
    # A link to a file is not followed, because its target may change from day to day.
    path = data.path
    return str(path if data.source == "spark" else path.parent.resolve() / path.name)
