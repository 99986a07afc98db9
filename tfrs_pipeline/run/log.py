"""The log of a run and its split, each made by a step.

No TensorFlow is imported here, so that refused data is told at once.
"""

import dataclasses
import functools
from typing import Any

from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.data.engines import connect, connect_spark
from tfrs_pipeline.data.log import Log, Split
from tfrs_pipeline.data.settings import DataConfig
from tfrs_pipeline.durable import Damaged, is_whole
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.steps import Runner, Step
from tfrs_pipeline.sources.movielens import load_movielens_100k


def log_steps(config: RunConfig, folder: RunFolder) -> list[Step]:
    """Returns the steps that make the log and its split."""
    make_log, read_log, make_split, read_split = (
        functools.partial(each, config, folder)
        for each in (_make_log, _read_log, _make_split, _read_split)
    )
    return [
        Step("data", (), "log", make_log, read_log, "data/"),
        Step("split", ("log",), "split", make_split, read_split, "data/split.parquet"),
    ]


def _make_log(config: RunConfig, folder: RunFolder, runner: Runner) -> Log | None:
    folder.data.mkdir(parents=True, exist_ok=True)
    load_log(config.data).write(folder.data)
    return _read_log(config, folder, runner)


def _read_log(config: RunConfig, folder: RunFolder, runner: Runner) -> Log | None:
    if not (folder.data / "log.json").exists():
        return None
    try:
        log = Log.read(folder.data, connect_engine(config.data))
    except Damaged as error:
        # If made again, it might hold other events than those that were trained on.
        raise Damaged(
            f"{error} Everything in {folder.path} depends on it: train in another folder, with "
            f"--config {folder.config_file} --run-dir NEW, and delete this one."
        ) from error
    runner.note(*log.describe())
    return log


def _make_split(
    config: RunConfig, folder: RunFolder, runner: Runner, log: Log
) -> Split[Log] | None:
    log.split(**dict(config.split), seed=config.seed).write(folder.split)
    return _read_split(config, folder, runner, log)


def _read_split(
    config: RunConfig, folder: RunFolder, runner: Runner, log: Log
) -> Split[Log] | None:
    if not is_whole(folder.split.with_suffix(".json")):
        return None
    split = Split.read(log, folder.split)
    runner.note(*split.describe())
    return split


def connect_engine(config: DataConfig) -> Any:
    """Opens the engine in which a config's log and samples are made."""
    return connect_spark() if config.source == "spark" else connect(config.memory_limit)


def load_log(config: DataConfig, connection: Any = None) -> Log:
    """Loads the log that a config names, into a connection of `connect_engine`; None opens one."""
    connection = connection or connect_engine(config)

    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(config, name) for name in names}

    features = given("item_features", "user_features", "request_features")
    if config.source == "movielens-100k":
        log = load_movielens_100k(config.path, ties=config.ties, **features)
        return dataclasses.replace(log, is_ordered=config.is_ordered)
    assert config.path is not None  # The config has checked it.
    if config.source == "spark":
        paths = {"events": config.path, "items": config.items_path, "users": config.users_path}
        tables = {
            name: None if path is None else connection.sql(f"SELECT * FROM {path}")
            for name, path in paths.items()
        }
        return Log.from_ibis(**tables, is_ordered=config.is_ordered, ties=config.ties, **features)
    return Log.from_files(
        config.path,
        items=config.items_path,
        users=config.users_path,
        reading=config.reading(),
        connection=connection,
        **features,
    )
