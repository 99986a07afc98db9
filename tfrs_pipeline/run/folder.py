"""The folder of a run: its layout, lock and settings; the versions that were exported from it."""

import contextlib
import hashlib
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from tfrs_pipeline import durable
from tfrs_pipeline.cluster import this_worker
from tfrs_pipeline.config import (
    ExportConfig,
    MemberConfig,
    RunConfig,
    dump_config,
    flat_settings,
    load_config,
    plan_settings,
    with_settings,
)
from tfrs_pipeline.data.settings import DataConfig
from tfrs_pipeline.messages import beside
from tfrs_pipeline.model.settings import shape_problems
from tfrs_pipeline.serving.publish import MANIFEST_FILE, version_at, versions_of
from tfrs_pipeline.settings import ConfigError, refuse

CONFIG_FILE, METRICS_FILE, COMPARISON_FILE = "config.toml", "metrics.json", "comparison.json"
MAY_CHANGE = tuple(f"export.{name}" for name in ExportConfig.model_fields)
"""Settings of a started run that may change until something is exported; then only the gate."""

# Files that a run replaces; a user's own files may have the same names.
_REPLACED = (
    CONFIG_FILE,
    "data",
    "samples",
    "race",
    "plans",
    "native.log",
    "report.html",
    COMPARISON_FILE,
    "comparison.md",
    "comparison.svg",
)
# Files that show that a run has started; from then on its settings are fixed.
_BEGUN = ("data/log.json", "checkpoints", METRICS_FILE)
_HASH_LINE = "# sha256 of the lines above: "


class RunFolder:
    """The folder of a run or of a comparison, and what lies in it.

    `config_file` has the settings with their hash, `metrics_file` is the record of a finished run.
    `samples` has a folder each for "selection" and "final", `checkpoints` one for each model.
    `race` has the trainings of a race until it is decided, and `curves_file` their curves;
    `race_file` is the record of a decided one, with the settings that it began with.
    `left_out_file` records the baselines that failed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file, self.metrics_file = path / CONFIG_FILE, path / METRICS_FILE
        self.data, self.split = path / "data", path / "data" / "split.parquet"
        self.race, self.race_file = path / "race", path / "race" / "race.json"
        self.curves_file = self.race / "curves.json"
        self.left_out_file = path / "left_out.json"
        self.samples, self.checkpoints = path / "samples", path / "checkpoints"

    def training_folder(self, name: str) -> Path:
        """Returns the folder of a model's trainings; that of a sum holds those of its members."""
        member = self.checkpoints / "two_tower" / name
        return member if member.is_dir() else self.checkpoints / name

    def holds_run(self) -> bool:
        """Returns whether there is a run or a comparison, or a remainder of one."""
        return self._has(CONFIG_FILE, "plans", *_BEGUN)

    def has_begun(self) -> bool:
        """Returns whether a run has started, whose settings are fixed."""
        return self._has(*_BEGUN)

    def _has(self, *names: str) -> bool:
        return any((self.path / name).exists() for name in names)

    def metrics(self) -> dict[str, Any] | None:
        """Reads the metrics of a finished run; None if it is not finished."""
        return durable.read_whole(self.metrics_file)

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
        return durable.read_record(self.metrics_file)

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

    def settle(self, config: RunConfig, winner: RunConfig, race: Mapping[str, Any]) -> None:
        """Replaces the settings by those of a race's winner and its sum, and records the race."""
        content = {"asked": config.model_dump(mode="json"), "race": dict(race)}
        durable.write_record(self.race_file, content)
        self._write_settings(winner)

    def settled(self, config: RunConfig, fixed: Collection[str] | None = None) -> RunConfig:
        """Returns the settings of a run in this folder; refuses an unusable model name or source.

        If a race of these settings was decided here, they are the winner's. `fixed` are as in
        `with_source`.
        """
        check_model_name(config)
        config = with_source(config, self, fixed)
        record = durable.read_whole(self.race_file) if config.recipes else None
        if record is None:
            return config
        # How to export may change, and `claim` refuses what may not.
        export = {"export": config.export.model_dump()}
        if with_settings(RunConfig(**record["asked"]), export) != config:
            return config
        return with_settings(self.settings(), export)

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
                left = ("plans",) if is_run else ("checkpoints", METRICS_FILE)
                if self._has(*left):
                    held = f"{self.path} holds a {'comparison' if is_run else 'run'}"
                    raise ValueError(f"{held}. Choose another folder with --run-dir.")
                self._check_settings(config)
                try:
                    yield
                except ValueError:  # Refused input. After Ctrl-C or a crash, the run is resumed.
                    # Hours of trainings are kept, such as those before a model diverged.
                    has_trained = self._has("checkpoints", "plans") or self.curves_file.exists()
                    if is_new and not has_trained:
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
        exported = self.metrics() and own_version(config, self)
        allowed = (*(["export.gate"] if exported else MAY_CHANGE), "compare.seeds")
        refused = [name for name in changes if name not in allowed]
        if refused:
            # `fixed` holds the names of settings that are compared themselves, so it is shown only
            # if nothing else differs.
            shown = [name for name in refused if name != "fixed"] or refused
            lines = [f"{name}: {old.get(name)!r}, now {new.get(name)!r}" for name in shown]
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


def trained_by(folder: Path) -> list[str]:
    """Identifies the training of a run's model by hashes of its epochs' records."""
    epochs = (folder / "checkpoints" / "two_tower").rglob("epoch-*.json")
    # The records hold times, so they differ between trainings, even with equal settings.
    return sorted(map(durable.file_hash, epochs))


def own_version(config: RunConfig, folder: RunFolder) -> Path | None:
    """Returns the version exported from the training in a run's folder; None if there is none."""
    written, models = (folder.metrics() or {}).get("export_folder"), config.model_folder
    # It is among the model's versions, or where it was written: the folders may have moved.
    versions = [models / str(number) for number in reversed(versions_of(models))]
    training = trained_by(folder.path)
    for version in [*versions, *([Path(written)] if written else [])]:
        with contextlib.suppress(durable.Damaged, OSError):
            manifest = durable.read_record(version / MANIFEST_FILE, check_files=False)
            # A refresh carries the record of the training over, but another command exported it.
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


def with_source(
    config: RunConfig, folder: RunFolder, fixed: Collection[str] | None = None
) -> RunConfig:
    """Returns the settings with `warm_start` as a finished run of the same shape, or refuses.

    If the names of the `fixed` settings are known, other settings of the model, its training,
    the baselines, `evaluation.exclude` and `evaluation.by` come from the source, such as those of a
    recipe that won there. If the source began from random weights, `training.max_epochs` becomes
    a fifth of the epochs that it needed, 2 or more: a warm start needs no more
    (docs/guides/daily.md). A started run keeps its own.
    """
    if config.warm_start is None:
        return config
    source = _source(config.warm_start, folder)
    run = RunFolder(source)
    if fixed is not None:
        theirs = (folder if folder.has_begun() else run).settings()
        changes = plan_settings(theirs) | _fewer_epochs(run, theirs, "two_tower")
        # Rankings that exclude other items would be another service's. An uncorrected model that
        # the source did not train would begin from random weights.
        for name in ("exclude", "by", "baselines"):
            changes[f"evaluation.{name}"] = getattr(theirs.evaluation, name)
        config = with_settings(config, changes, fixed=fixed)
        begun = {name: _begun_from(run, theirs, name, config, fixed) for name in theirs.trained}
        config = with_settings(config, {"summed": {**theirs.summed, **begun}})
    if folder.metrics() is None:  # A finished run needs no source any more.
        run.results()  # Refuses one that is not finished.
        refuse(shape_problems(run.settings().model, config.model))
    return config.model_copy(update={"warm_start": source})


def _fewer_epochs(source: RunFolder, theirs: RunConfig, name: str) -> dict[str, int]:
    """Returns `training.max_epochs` of a warm start: a fifth of the source's best epoch, or 2.

    Where the rate decays over all epochs, the warm-up becomes shorter in proportion.
    """
    if theirs.warm_start is not None:  # That run's number is already a fifth.
        return {}
    training = (theirs.trained.get(name) or theirs).training
    num_epochs = max(2, -(-source.results()["training"][name]["best_epoch"] // 5))
    changes = {"training.max_epochs": num_epochs}
    if training.decay != "none":
        num_steps = training.warmup_steps * num_epochs // training.max_epochs
        changes["training.warmup_steps"] = num_steps
    return changes


def _begun_from(
    source: RunFolder, theirs: RunConfig, name: str, config: RunConfig, fixed: Collection[str]
) -> MemberConfig:
    """Returns the settings of a sum's member that starts from the same member in the source."""
    member = theirs.trained[name]
    changes = {"summed": {}, **plan_settings(member), **_fewer_epochs(source, theirs, name)}
    plan = with_settings(config, changes, fixed=fixed)
    return MemberConfig(weight=member.weight, model=plan.model, training=plan.training)


def _source(path: Path, folder: RunFolder) -> Path:
    """Returns the run to start from: the one in a folder, or the one that a manifest names."""
    if RunFolder(path).config_file.is_file():
        return path
    # A started run keeps its source: by now the model has other versions, or the source is gone.
    if folder.has_begun() and (source := folder.settings().warm_start) is not None:
        return source
    try:
        version = version_at(path)
    except FileNotFoundError as error:
        what = "which is neither a run's folder nor an exported model's"
        raise _refused(f"got {str(path)!r}, {what}. {error}") from None
    manifest = durable.read_record(version / MANIFEST_FILE, check_files=False)
    if "run" not in manifest:
        raise _refused(
            f"{version} was exported from Python: no run holds its optimizer state. Use "
            "TwoTower.fit(warm_start=...) there"
        )
    source = Path(manifest["run"])
    if trained_by(source) != manifest["training"]:
        raise _refused(
            f"{version} was made by a run in {source}, which is gone with its optimizer state, or "
            "another run is there now. Give a run's folder, or none to train from random weights"
        )
    return source


def _refused(message: str) -> ConfigError:
    return ConfigError([("warm_start", message)])
