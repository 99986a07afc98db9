"""The folder of a run: one process works in it, with the settings that it was begun with."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tfrs_pipeline.cluster import this_worker
from tfrs_pipeline.config import RunConfig, dump_config, load_config
from tfrs_pipeline.data.settings import DataConfig
from tfrs_pipeline.durable import (
    is_whole,
    locked,
    naming,
    read_record,
    replace_text,
    try_writing,
)
from tfrs_pipeline.serving.publish import MANIFEST_FILE, versions_of
from tfrs_pipeline.settings import ConfigError

CONFIG_FILE, METRICS_FILE = "config.toml", "metrics.json"
# What would be replaced in a folder that is somebody's own.
_REPLACED = (
    *(CONFIG_FILE, "data", "samples", "plans", "native.log", "report.html"),
    *("comparison.json", "comparison.md", "comparison.svg"),
)
# What shows that a run was begun, and its settings hold from then on.
_BEGUN = ("data/log.json", "checkpoints", METRICS_FILE)
_HASH_LINE = "# sha256 of the lines above: "
_MAX_DIFFERENCES = 10
# What a resumed run may be told otherwise, as long as nothing is exported.
MAY_CHANGE = ("export.gate", "export.index", "export.target_recall")


@contextlib.contextmanager
def claim_folder(config: RunConfig, folder: Path, *, is_run: bool) -> Iterator[None]:
    """Works in a folder: no other process does meanwhile, and its settings are these.

    What was made for a run whose data is refused goes again. Where several workers train together,
    the chief's claim is that of all. Where a run exports, the model's folder is tried too.

    Raises:
        ConfigError: If the folder's settings are damaged.
        InUse: If another process works in it.
        StorageError: If it, or where the model is to be exported, cannot be written.
        ValueError: If it holds a run with other settings, a comparison where a run is asked for or
            the reverse, or TensorFlow could not use its path.
    """
    import duckdb  # Here: the command line's help does without it.

    if not this_worker().is_chief:
        yield
        return
    exports = is_run and config.export.index != "none"
    for written in (folder, *([config.model_folder] if exports else [])):
        # TensorFlow takes these for a pattern when it reads, and not when it writes.
        if wrong := sorted(set("[\\") & set(str(written))):
            raise ValueError(
                f"{written} holds {' and '.join(wrong)}: TensorFlow could not read back what it "
                "writes there. Choose a folder without."
            )
        try_writing(written)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    is_new = not folder.exists() or not any(folder.iterdir())
    with naming(folder, duckdb.IOException):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            _refuse_other_command(folder, is_run=is_run)
            _settle_settings(config, folder)
            try:
                yield
            except ValueError:
                if is_new and not any((folder / x).exists() for x in ("checkpoints", "plans")):
                    _empty(folder, made)
                raise


def _refuse_other_command(folder: Path, *, is_run: bool) -> None:
    """Refuses (`ValueError`) to run where a comparison lies, and the other way round."""
    left, what = (("plans",), "comparison") if is_run else (("checkpoints", METRICS_FILE), "run")
    if any((folder / name).exists() for name in left):
        raise ValueError(f"{folder} holds a {what}. Choose another folder with --run-dir.")


def _empty(folder: Path, made: Sequence[Path]) -> None:
    """Removes what a folder holds, and the folders that were made for it, the innermost first."""
    shutil.rmtree(folder, ignore_errors=True)
    if not made:
        folder.mkdir(exist_ok=True)
    for path in made[1:]:
        with contextlib.suppress(OSError):  # Another run may be in it by now.
            path.rmdir()


def read_settings(folder: Path) -> RunConfig:
    """Reads the settings that a run's folder was begun with.

    A `ConfigError` if the file is missing, cut or changed: what is left of it might be the settings
    of another run.
    """
    path = folder / CONFIG_FILE
    text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    settings, _, written = text.rpartition(_HASH_LINE)
    if not written or written.strip() != _hash(settings):
        message = (
            "is not as the run wrote it: lost, cut or changed. A run keeps the settings that it "
            "began with. Put the file back, or give settings with --config FILE and another "
            "--run-dir"
        )
        raise ConfigError([("", message)], str(path))
    return load_config(path)


def _settle_settings(config: RunConfig, folder: Path) -> None:
    """Writes the settings into a folder, or checks that they are those of what it holds."""
    # A run whose data was refused has left nothing behind: its settings may be mended in place.
    if not any((folder / x).exists() for x in _BEGUN):
        _refuse_others(folder)
        _write_settings(config, folder)
        return
    old, new = (_flat(each.model_dump(mode="json")) for each in (read_settings(folder), config))
    every_change = [name for name in old | new if old.get(name) != new.get(name)]
    may_change = MAY_CHANGE[:1] if _is_exported(folder, config.model_folder) else MAY_CHANGE
    changed = [name for name in every_change if name not in may_change]
    if every_change and not changed:
        _write_settings(config, folder)
    if changed:
        lines = [f"{x}: {old.get(x)!r}, now {new.get(x)!r}" for x in changed[:_MAX_DIFFERENCES]]
        more = len(changed) - len(lines)
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(lines)}"
            f"{f'; and {more} more' if more else ''}). Choose another folder with --run-dir, or "
            "delete this one."
        )


def holds_run(folder: Path) -> bool:
    """Says whether a folder holds a run or a comparison, or what is left of one."""
    return any((folder / name).exists() for name in (CONFIG_FILE, "plans", *_BEGUN))


def _refuse_others(folder: Path) -> None:
    """Refuses (`ValueError`) to begin a run where it would replace files that are of no run."""
    found = [name for name in _REPLACED if (folder / name).exists()]
    try:
        if found:
            read_settings(folder)
    except ConfigError:
        raise ValueError(
            f"{folder} holds {', '.join(found)}, which a run would replace, and no "
            f"{CONFIG_FILE} as a run has written it: they may be your own. Choose another "
            "folder with --run-dir."
        ) from None


def _is_exported(folder: Path, model_folder: Path) -> bool:
    path = folder / METRICS_FILE
    return is_whole(path) and find_version(read_record(path), model_folder) is not None


def find_version(metrics: Mapping[str, Any], model_folder: Path) -> Path | None:
    """Finds the version that a run has exported; another's may have taken its number.

    It is looked for among the model's versions, and where it was written: all may have moved.
    """
    if (made := metrics["export_folder"]) is None:
        return None
    places = (model_folder / Path(made).name, Path(made))
    return next((place for place in places if _is_of_run(place, metrics)), None)


def _is_of_run(version: Path, metrics: Mapping[str, Any]) -> bool:
    path = version / MANIFEST_FILE
    of_model = metrics["models"]["two_tower"]
    return is_whole(path) and read_record(path, check_files=False).get("metrics") == of_model


def _write_settings(config: RunConfig, folder: Path) -> None:
    settings = dump_config(config)
    replace_text(folder / CONFIG_FILE, f"{settings}{_HASH_LINE}{_hash(settings)}\n")


def with_source(config: RunConfig, folder: Path) -> RunConfig:
    """Returns the settings with the run to start from in place of the model that it made.

    A model gets new versions: a stopped run must go on from what it has begun with, and so must one
    that is asked for again once its own version is the newest. A `ConfigError` if there is no run.
    """
    path = config.warm_start
    if path is None or (path / CONFIG_FILE).is_file():
        return config
    # A finished run: its source may be gone.
    if is_whole(folder / METRICS_FILE) and (source := read_settings(folder).warm_start) is not None:
        return config.model_copy(update={"warm_start": source})
    versions = versions_of(path)
    version = path / str(versions[-1]) if versions else path
    if not (version / MANIFEST_FILE).is_file():
        message = f"got {str(path)!r}, which is neither a run's folder nor an exported model's"
        raise ConfigError([("warm_start", message)])
    made_by = read_record(version / MANIFEST_FILE, check_files=False).get("run")
    if made_by is None:
        message = f"{version} was exported from Python: no run holds its optimizer state"
        raise ConfigError([("warm_start", f"{message}. Use TwoTower.fit(warm_start=...) there")])
    if not (Path(made_by) / CONFIG_FILE).is_file():
        message = (
            f"{version} was made by the run {made_by}, which is gone, and its optimizer state with "
            "it. Give another run's folder, or none to train from nothing"
        )
        raise ConfigError([("warm_start", message)])
    of_run = Path(made_by) / METRICS_FILE
    if is_whole(of_run) and not _is_of_run(version, read_record(of_run)):
        message = (
            f"{version} was made by a run in {made_by}, where another run is now. Give the folder "
            "of the run to start from"
        )
        raise ConfigError([("warm_start", message)])
    source = Path(made_by)
    if Path(made_by).resolve() == folder.resolve():
        source = read_settings(folder).warm_start
        if source is None:
            message = (
                f"{version} was made by this very run, which began from nothing. To train on from "
                "it, give another --run-dir"
            )
            raise ConfigError([("warm_start", message)])
    return config.model_copy(update={"warm_start": source})


def check_model_name(config: RunConfig) -> None:
    """Checks a name that comes from the file of the events, before anything is done in it.

    A `ConfigError` if nothing of it can name a folder, or a model of other data has it: a version
    of that model is added only if it is asked for by name.
    """
    if config.export.name is not None:
        return
    if not config.model_name:
        message = f"required: no letter or digit in the name of {config.data.path} to name it by"
        raise ConfigError([("export.name", message)])
    if config.export.index == "none":
        return
    for number in versions_of(config.model_folder):
        path = config.model_folder / str(number) / MANIFEST_FILE
        # A model that Python exported has no config: of what data it is, nobody knows.
        manifest = read_record(path, check_files=False)
        theirs = manifest.get("config", {}).get("data")
        if theirs is None or manifest.get("log") != origin(config.data):
            made_of = theirs["path"] or theirs["source"] if theirs else "data that it does not name"
            message = (
                f"{path.parent} is a model of {made_of}: set another "
                f"name, or {config.model_name!r} to add a version to it all the same"
            )
            raise ConfigError([("export.name", message)])


def origin(data: DataConfig) -> str:
    """Says which log it is: by its path from the root, a table of Spark by its name."""
    if data.path is None:
        return data.source
    # A link to a file stays: today's may be another than yesterday's.
    path = data.path
    return str(path if data.source == "spark" else path.parent.resolve() / path.name)


def _hash(settings: str) -> str:
    return hashlib.sha256(settings.encode()).hexdigest()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Names the settings of a table, and of tables within it, with dots."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else None
        flat |= inner or {f"{prefix}{name}": value}
    return flat
