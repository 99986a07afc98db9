"""The data of a run: its log, split and samples; TensorFlow is imported for the samples alone."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.data.engines import connect, connect_spark
from tfrs_pipeline.data.held_out_queries import Holdout
from tfrs_pipeline.data.log import Log, Split
from tfrs_pipeline.data.schema import ASKED, DataError, Exclude
from tfrs_pipeline.data.settings import DataConfig
from tfrs_pipeline.durable import Damaged, read_whole
from tfrs_pipeline.evaluation.evaluate import Truth
from tfrs_pipeline.messages import counted, in_percent
from tfrs_pipeline.negatives.samplers import FunnelLosers
from tfrs_pipeline.run.folder import DATA, SAMPLES, SPLIT_FILE, RunFolder
from tfrs_pipeline.run.steps import RunContext, Step
from tfrs_pipeline.sources.movielens import load_movielens_100k

if TYPE_CHECKING:
    from tfrs_pipeline.model.corpus import TrainingSet
    from tfrs_pipeline.model.false_negatives import FalseNegatives

# Above this share of repeats, a ranking that leaves them out measures something else.
_MANY_REPEATS = 0.2
# On logs of fewer, simple models were level with this package's (docs/guides/size.md).
_FEW_POSITIVES = 12_000


@dataclass(frozen=True)
class RunData:
    """The data that the trainings of a run share."""

    split: Split
    selection: "TrainingSet"
    final: "TrainingSet"  # All events that the tested models are trained on.
    validation: Holdout  # Chooses the epoch; like the test, sampled if it has too many users.
    test: Holdout  # Asked by the question that decides.
    other_test: Holdout | str  # Asked by the other question, or why there is none.
    # Of the hard negatives of the first training, in validation; empty without any.
    false_negatives: "Mapping[str, FalseNegatives]"

    @property
    def by_user(self) -> Holdout:
        """The test with a query per user: the lists that a person can judge at a glance."""
        tests = self.test, self.other_test
        # Only the test by request may be missing.
        return next(test for test in tests if isinstance(test, Holdout) and test.by == "users")

    @property
    def has_refit(self) -> bool:
        """Whether models are trained again on all events before the test."""
        return self.final is not self.selection


def log_steps() -> list[Step]:
    """Returns the steps that make the log and its split; they import no TensorFlow."""
    return [
        Step("data", (), "log", _make_log, f"{DATA}/", _read_log, Log.describe),
        Step("split", ("log",), "split", _make_split, SPLIT_FILE, _read_split, Split.describe),
    ]


def data_steps(hard: FunnelLosers | None = None) -> list[Step]:
    """Returns the steps that make the samples; `hard` replaces the losers of the settings."""
    make = functools.partial(_make_samples, hard=hard)
    return [*log_steps(), Step("samples", ("split",), "samples", make, f"{SAMPLES}/")]


def prepare(config: RunConfig, folder: Path) -> RunData:
    """Makes the samples of a config in a folder, or reads those there."""
    return RunContext(config, RunFolder(folder)).do(data_steps())


def _make_log(run: RunContext) -> Log:
    config, folder = run.config.data, run.folder.data
    folder.mkdir(parents=True, exist_ok=True)
    load_log(config).write(folder)
    # It has just been hashed, and to hash a large log takes minutes.
    return Log.read(folder, connect(config.memory_limit), check_files=False)


def _read_log(run: RunContext) -> Log | None:
    folder = run.folder
    if not (folder.data / "log.json").exists():
        return None
    try:
        return Log.read(folder.data, connect(run.config.data.memory_limit))
    except Damaged as error:
        # If made again, it might hold other events than those that were trained on.
        raise Damaged(
            f"{error} Everything in {folder.path} depends on it: train in another folder, with "
            f"--config {folder.config_file} --run-dir NEW, and delete this one."
        ) from error


def _make_split(run: RunContext, log: Log) -> Split:
    log.split(**dict(run.config.split), seed=run.config.seed).write(run.folder.split)
    return Split.read(log, run.folder.split)


def _read_split(run: RunContext, log: Log) -> Split | None:
    path = run.folder.split
    return None if read_whole(path.with_suffix(".json")) is None else Split.read(log, path)


def _make_samples(run: RunContext, split: Split, hard: FunnelLosers | None) -> RunData:
    """Makes the samples of both trainings, and the queries of validation and test.

    `TrainingSet.build` reads samples back that are whole.
    """
    from tfrs_pipeline.model.corpus import TrainingSet
    from tfrs_pipeline.model.false_negatives import FalseNegatives, false_negatives
    from tfrs_pipeline.model.two_tower import TwoTower

    config, folder = run.config, run.folder.samples
    # A `hard` of the caller, such as of a comparison, has the losers that any of its plans needs.
    build = functools.partial(TrainingSet.build, seed=config.seed, hard=hard or config.model.hard)
    last = final_part(config, split)
    # The first training must not see validation; the last one sees all events before the test.
    selection = final = build(split.train, folder / "selection")
    if last is not split.train:
        final = build(last, folder / "final")
    run.note(*describe_samples(final.report, config.evaluation.exclude))
    test, other = _make_tests(config, split, last)
    question = ASKED[test.by]
    if isinstance(other, str):
        run.note(f"asked {question} alone: {other}")
    else:
        run.note(f"the model is judged {question}; {ASKED[other.by]} it is measured too")
    # The same question as the test's: a model chosen by another one may be worse at this one.
    most = config.training.validation_users
    validation = split.holdout("validation", most, config.seed, by=test.by)
    for part, holdout in (("validation", validation), ("test", test)):
        # Refuses a part in which nothing is left to find.
        Truth.of(holdout, config.evaluation.exclude, f"{part} part (split.{part})")
    counts: dict[str, FalseNegatives] = {}
    if any(len(pool.values) for pool in selection.samples.hard_pools.values()):
        # A comparison's plans all train on single positives, as hard negatives need.
        training = config.training.model_copy(update={"examples": "single"})
        drawn = dict(config.model) | {"hard": hard or config.model.hard}
        plan = TwoTower(**drawn, training=training, seed=config.seed)
        counts = false_negatives(plan.batches(selection.samples), validation)
        run.note(*(f"{pool}: {count}" for pool, count in counts.items()))
    return RunData(split, selection, final, validation, test, other, counts)


def _make_tests(config: RunConfig, split: Split, last: Log) -> tuple[Holdout, Holdout | str]:
    """Makes the test by the question that decides, and by the other one or why there is none.

    The question is `evaluation.by`. If that is not set, it is the one that service will ask: by
    request where the log's order tells what a user had clicked before each request. Where both
    questions are the same, it is by user.
    """
    by, exclude = config.evaluation.by, config.evaluation.exclude
    may_be_by_user = by in (None, "users")
    max_queries, seed = config.evaluation.max_users, config.seed
    holdout = functools.partial(split.holdout, "test", max_queries, seed, trained_on=last)
    by_user = holdout(by="users")
    # A log without an order is an error only if the settings ask by request.
    if split.log.order == "none" and may_be_by_user:
        return by_user, "the log has no order, so no history up to a request"
    try:
        by_request = holdout(by="requests")
    except DataError as error:  # One user's requests are too many; by user, all can be asked.
        if by != "users":
            raise
        return by_user, str(error)
    # Measured twice, the same question would only take time.
    if by_request.asks_like(by_user, exclude):
        return by_user, "by request is the same, one request per user with the history before it"
    if may_be_by_user:
        try:
            Truth.of(by_request, exclude)
        except ValueError:
            return by_user, f"by request, evaluation.exclude {exclude} leaves nothing to find"
    return (by_user, by_request) if by == "users" else (by_request, by_user)


def final_part(config: RunConfig, split: Split) -> Log:
    """Returns the part of the log that the tested models are trained on."""
    return split.before_test if config.training.refit else split.train


def load_log(config: DataConfig) -> Log:
    """Loads the log that a config names."""
    sides = ("item_features", "user_features", "request_features")
    features: dict[str, Any] = {name: getattr(config, name) for name in sides}
    if config.source == "movielens-100k":
        log = load_movielens_100k(config.path, ties=config.ties, **features)
        # It has times, but a user may want to try what a log without an order is worth.
        return dataclasses.replace(log, is_ordered=config.is_ordered)
    assert config.path is not None  # The config has checked it.
    if config.source == "spark":
        paths = {"events": config.path, "items": config.items_path, "users": config.users_path}
        # The tables stay in Spark until the log copies their rows.
        spark = connect_spark()
        tables = {
            name: None if path is None else spark.sql(f"SELECT * FROM {path}")
            for name, path in paths.items()
        }
        return Log.from_ibis(**tables, is_ordered=config.is_ordered, ties=config.ties, **features)
    return Log.from_files(
        config.path,
        items=config.items_path,
        users=config.users_path,
        reading=config.reading(),
        connection=connect(config.memory_limit),
        **features,
    )


def describe_samples(report: Mapping[str, Any], exclude: Exclude) -> list[str]:
    """Describes samples, and which items are never negatives (see `build_samples`).

    Repeats, positives on an item that their user had before, are mentioned if they are many and
    rankings leave them out.
    """
    pools = report.get("hard_negatives", {})
    notes = [
        f"{counted(report['num_samples'], 'positive')}, {report['num_empty_histories']:,} of them "
        "with an empty history",
        f"{counted(report['num_candidates'], 'candidate')}, "
        f"{report['num_candidates_without_count']:,} of them never clicked in training",
        f"masked as negatives of their user: {report['num_known_positives']:,} known positives, "
        f"{report['num_exposed']:,} exposed and not clicked"
        f"{', or disliked' * ('num_disliked' in report)}",
    ]
    if report["num_samples"] < _FEW_POSITIVES:
        notes.append(
            f"few positives: on fewer than {_FEW_POSITIVES:,}, iALS or EASE do as well "
            "(docs/guides/size.md)"
        )
    repeats = 1 - report["num_known_positives"] / report["num_samples"]
    if repeats > _MANY_REPEATS and exclude != "none":
        notes.append(
            f"{repeats:.0%} repeats, which rankings leave out (evaluation.exclude {exclude}): if a "
            "user's own items may come again, set it to none (docs/guides/rules.md)"
        )
    if "num_disliked" in report:
        notes.append(
            f"disliked: {report['num_disliked']:,} items of a user, never shown to them again; "
            f"{counted(report['num_disliked_clicks'], 'click')} on them left out of training"
        )
    if any(pool["num_samples"] for pool in pools.values()):
        notes += [
            f"hard negatives, {stage}: {pool['num_samples']:,} positives have some "
            f"({in_percent(pool['num_samples'], report['num_samples'])}), "
            f"{pool['mean_pool']:.1f} on average"
            for stage, pool in pools.items()
        ]
    if num := report.get("num_losers_removed"):
        why = "clicked or exposed, or not ranked low"
        notes.append(f"losers that are never hard negatives: {num:,} ({why})")
    return notes
