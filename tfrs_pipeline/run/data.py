"""The data of a run: its log, the split of it and the samples, in the run's folder."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.data.engines import connect, connect_spark
from tfrs_pipeline.data.holdout import Holdout
from tfrs_pipeline.data.log import Log, Split
from tfrs_pipeline.data.settings import DataConfig
from tfrs_pipeline.durable import Damaged, is_whole
from tfrs_pipeline.evaluation.evaluate import check_measurable
from tfrs_pipeline.messages import counted
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.model.notes import OnProgress
from tfrs_pipeline.negatives.funnel import FunnelLosers
from tfrs_pipeline.run.folder import CONFIG_FILE
from tfrs_pipeline.sources.movielens import load_movielens_100k

OnStep = Callable[["StepReport"], None]


@dataclass
class StepReport:
    """What one step of a command did: its name, lines for the user, wall time."""

    name: str
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Steps:
    """Times the steps of a command, shows them as they begin and end, keeps their notes."""

    on_step: OnStep
    on_progress: OnProgress
    notes: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[StepReport]:
        """Runs a step within; what is noted in its report is kept."""
        report = StepReport(name)
        start = time.monotonic()
        self.on_progress(name, 0, 0)
        yield report
        self.notes[name] = report.notes
        report.seconds = self.seconds[name] = round(time.monotonic() - start, 3)
        self.on_step(report)


@dataclass(frozen=True)
class RunData:
    """What the trainings of a run have in common.

    `selection` are samples of the training part, `final` those of all that precedes the test, as
    far as the run trains on it. Of queries there is a sample where there are more than the config
    asks for.
    """

    split: Split[Log]
    selection: TrainingSet
    final: TrainingSet
    validation: Holdout
    test: Holdout


def prepare(
    config: RunConfig, folder: Path, step: Steps, hard: FunnelLosers | None = None
) -> RunData:
    """Makes the data, the split and the samples of a config, or reads what a folder holds of them.

    Losers are found for `hard` in place of the config's own, if it is given. `Damaged` if the
    folder's log is not as it was written; a `DataError` if the data is refused, a `ValueError` if
    validation or test has nothing to find.
    """
    if hard is None and isinstance(config.model.hard, FunnelLosers):
        hard = config.model.hard
    with step("data") as report:
        connection = connect_engine(config.data)
        if not (folder / "data" / "log.json").exists():
            log = load_log(config.data, connection)
            (folder / "data").mkdir(parents=True, exist_ok=True)
            log.write(folder / "data")
        try:
            log = Log.read(folder / "data", connection)
        except Damaged as error:
            # Made again it might be of other events than what was trained on it.
            raise Damaged(
                f"{error} All else in {folder} was made from it: train in another folder, with "
                f"--config {folder / CONFIG_FILE} --run-dir NEW, and delete this one."
            ) from error
        report.notes = log.describe()
    with step("split") as report:
        path = folder / "data" / "split.parquet"
        if not is_whole(path.with_suffix(".json")):
            log.split(**dict(config.split), seed=config.seed).write(path)
        split = Split.read(log, path)
        report.notes = split.describe()
    with step("samples") as report:
        samples = folder / "samples"
        build = functools.partial(
            TrainingSet.build,
            seed=config.seed,
            hard=hard,
            min_positives=config.training.min_positives,
        )
        selection = final = build(split.train, samples / "selection")
        if final_part(config, split) is not split.train:
            final = build(split.before_test, samples / "final")
        report.notes = describe_samples(final.report)
    validation = split.holdout("validation", config.training.validation_users, config.seed)
    test = split.holdout(
        "test", config.evaluation.max_users, config.seed, trained_on=final_part(config, split)
    )
    for holdout in (validation, test):
        check_measurable(holdout, config.evaluation.exclude)
    return RunData(split, selection, final, validation, test)


def final_part(config: RunConfig, split: Split[Log]) -> Log:
    """Returns what the models that are tested have been trained on."""
    return split.before_test if config.training.refit else split.train


def connect_engine(config: DataConfig) -> Any:
    """Opens the engine that a config makes its log and samples in."""
    return connect_spark() if config.source == "spark" else connect(config.memory_limit)


def load_log(config: DataConfig, connection: Any = None) -> Log:
    """Loads the log that a config names, into a connection of `connect_engine`; None opens one."""
    connection = connection or connect_engine(config)

    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(config, name) for name in names}

    features = given("item_features", "user_features", "request_features")
    if config.source == "movielens-100k":
        log = load_movielens_100k(config.path, **features)
        return dataclasses.replace(log, is_ordered=config.is_ordered)
    assert config.path is not None  # The config's own check.
    if config.source == "spark":
        paths = {"events": config.path, "items": config.items_path, "users": config.users_path}
        tables = {
            name: None if path is None else connection.sql(f"SELECT * FROM {path}")
            for name, path in paths.items()
        }
        return Log.from_ibis(**tables, is_ordered=config.is_ordered, **features)
    return Log.from_files(
        config.path,
        items=config.items_path,
        users=config.users_path,
        reading=config.reading(),
        connection=connection,
        **features,
    )


def describe_samples(report: Mapping[str, Any]) -> list[str]:
    """Says what samples hold, and what was kept from being a negative (see `build_samples`)."""
    pools = report.get("hard_negatives", {})
    has_losers = any(pool["num_samples"] for pool in pools.values())
    return [
        f"{counted(report['num_samples'], 'positive')}, {report['num_empty_histories']:,} of them "
        "with an empty history",
        f"{counted(report['num_candidates'], 'candidate')}, "
        f"{report['num_candidates_without_count']:,} of them never clicked in training",
        f"masked as negatives of their user: {report['num_known_positives']:,} known positives, "
        f"{report['num_exposed']:,} exposed and not clicked",
        *(
            f"hard negatives, {stage}: {pool['num_samples']:,} positives have some, "
            f"{pool['mean_pool']:.1f} on average"
            for stage, pool in pools.items()
            if has_losers
        ),
        *(
            f"never hard negatives, {reason}: {counted(num_rows, 'row')}"
            for reason, num_rows in report.get("hard_negatives_removed", {}).items()
            if num_rows
        ),
    ]
