"""The stages of a run composed: from a config to a model in service, one folder a run."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tfrs_pipeline import __version__
from tfrs_pipeline.config import (
    DataConfig,
    RunConfig,
    SplitConfig,
    check_model_name,
)
from tfrs_pipeline.data.log import Log, Split
from tfrs_pipeline.data.split import Holdout
from tfrs_pipeline.durable import Damaged, file_hash, is_whole, read_record, write_record
from tfrs_pipeline.evaluation.baselines import Ease, Ials, MostPopular
from tfrs_pipeline.evaluation.evaluate import evaluate
from tfrs_pipeline.evaluation.results import Evaluation, EvaluationResult
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.model.settings import TwoTowerSettings
from tfrs_pipeline.model.two_tower import OnProgress, TwoTower
from tfrs_pipeline.negatives.funnel import FunnelLosers
from tfrs_pipeline.retrieval import Retriever
from tfrs_pipeline.run_folder import CONFIG_FILE, claim_folder
from tfrs_pipeline.serving.export import LIBRARIES, describe_index, export_version
from tfrs_pipeline.serving.index import Exact, Scann, index_for
from tfrs_pipeline.serving.publish import MANIFEST_FILE
from tfrs_pipeline.sources.kuairand import load_kuairand
from tfrs_pipeline.sources.movielens import load_movielens_100k
from tfrs_pipeline.sources.recflow import load_recflow

NUM_EXAMPLES = 4
EXAMPLE_LENGTH = 10

OnStep = Callable[["StepReport"], None]


@dataclass
class StepReport:
    """What one step of a command did.

    Args:
        name: Of the step.
        notes: Lines for the user: counts, what was dropped.
        seconds: Wall time.
    """

    name: str
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Steps:
    """Times the steps of a command, shows them and keeps their notes.

    Args:
        on_step: Called as each step ends.
        on_progress: Called as each step begins, with its name and no total.

    Attributes:
        notes: Step -> its lines.
        seconds: Step -> wall time.
    """

    def __init__(self, on_step: OnStep, on_progress: OnProgress) -> None:
        self._on_step = on_step
        self._on_progress = on_progress
        self.notes: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[StepReport]:
        """Runs a step within; what is noted in its report is kept."""
        report = StepReport(name)
        start = time.monotonic()
        self._on_progress(name, 0, 0)
        yield report
        self.notes[name] = report.notes
        report.seconds = self.seconds[name] = round(time.monotonic() - start, 3)
        self._on_step(report)


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Args:
        folder: Of the run: config.toml, metrics.json, data, samples, checkpoints.
        export_folder: The new version of the model.
        metrics: What metrics.json holds.
    """

    folder: Path
    export_folder: Path
    metrics: dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """What the trainings of a run have in common.

    Args:
        split: The log in parts.
        selection: Samples of the training part.
        final: Samples of all that precedes the test, as far as the run trains on it.
        validation: Queries that choose; sampled where there are more than the config asks for.
        test: Queries that are measured; sampled likewise.
    """

    split: Split
    selection: TrainingSet
    final: TrainingSet
    validation: Holdout
    test: Holdout


def run(
    config: RunConfig,
    folder: Path,
    *,
    on_step: OnStep = lambda report: None,
    on_progress: OnProgress = lambda task, done, total: None,
) -> RunResult:
    """Runs the whole pipeline.

    A folder that holds a stopped run of the same config is resumed: finished data and samples are
    kept, training goes on from its last epoch. A finished run whose export is still there is given
    back as it is: another export would be another version for a server to take up.

    Args:
        config: What to do.
        folder: The run's folder; made if missing.
        on_step: Called as each step ends.
        on_progress: Called within long steps with a task's name, steps done and steps in all.

    Returns:
        Where things lie, and the metrics.

    Raises:
        ValueError: If the folder holds a run of another config, or the data is refused
            (`DataError`).
    """
    check_model_name(config)
    with claim_folder(config, folder, exports=True):
        if (finished := _finished_run(folder)) is not None:
            on_step(StepReport("finished before", ["its results follow; nothing was done"]))
            return finished
        return _run(config, folder, Steps(on_step, on_progress), on_progress)


def _run(config: RunConfig, folder: Path, step: Steps, on_progress: OnProgress) -> RunResult:
    data = prepare(config, folder, step)
    models: dict[str, TwoTower] = {}
    for name, settings in _variants(config).items():
        with step(f"train {name}") as report:
            models[name] = train_and_refit(
                config,
                data,
                settings=settings,
                folder=folder / "checkpoints" / name,
                name=name,
                on_progress=on_progress,
            )
            report.notes = models[name].notes
    with step("baselines") as report:
        baselines, report.notes = fit_baselines(config, data, on_progress=on_progress)
    with step("evaluate") as report:
        evaluation = evaluate_all(config, {**models, **baselines}, data.test, on_progress)
        report.notes += _describe_evaluation(evaluation.first)
    with step("export") as report:
        metrics = _metrics(config, data, models, evaluation)
        data_files = sorted((folder / "data").glob("*.parquet"))
        export_folder, metrics["index"] = export_model(
            config,
            models["two_tower"],
            data.test,
            manifest={
                "data": {path.name: file_hash(path) for path in data_files},
                "counts": data.final.report,
                "metrics": metrics["models"]["two_tower"],
            },
        )
        num_candidates = len(models["two_tower"].candidate_ids)
        report.notes.append(describe_index(metrics["index"], num_candidates))
        report.notes.append("a fresh process loaded the export and gave the same answers")
    metrics |= {"export_folder": str(export_folder), "notes": step.notes, "seconds": step.seconds}
    write_record(folder / "metrics.json", metrics)
    return RunResult(folder, export_folder, metrics)


def _finished_run(folder: Path) -> RunResult | None:
    """Reads what a finished run left behind; None if it is not finished, or its export is gone."""
    if not is_whole(folder / "metrics.json"):
        return None
    metrics = read_record(folder / "metrics.json")
    export_folder = Path(metrics["export_folder"])
    return (
        RunResult(folder, export_folder, metrics)
        if is_whole(export_folder / MANIFEST_FILE)
        else None
    )


def prepare(
    config: RunConfig, folder: Path, step: Steps, hard: FunnelLosers | None = None
) -> RunData:
    """Makes the data, the split and the samples of a config, or reads what a folder holds of them.

    Args:
        config: Of the run.
        folder: Of the run.
        step: Reports each step.
        hard: Losers to find instead of those of the config.

    Raises:
        DataError: If the data is refused.
        Damaged: If the folder's log is not as it was written.
    """
    if hard is None and isinstance(config.model.hard, FunnelLosers):
        hard = config.model.hard
    with step("data") as report:
        if not (folder / "data" / "log.json").exists():
            load_log(config.data).write(folder / "data")
        try:
            log = Log.read(folder / "data")
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
            split_log(log, config.split, config.seed).write(path)
        split = Split.read(log, config.split.kind, path)
        report.notes = split.describe()
    with step("samples") as report:
        samples = folder / "samples"
        selection = final = TrainingSet.build(
            split.train, samples / "selection", seed=config.seed, hard=hard
        )
        if config.training.refit and split.before_test is not split.train:
            final = TrainingSet.build(
                split.before_test, samples / "final", seed=config.seed, hard=hard
            )
        report.notes = describe_samples(final.report)
    return RunData(
        split,
        selection,
        final,
        split.validation.sample(config.training.validation_users, config.seed),
        split.test.sample(config.evaluation.max_users, config.seed),
    )


def train_and_refit(
    config: RunConfig,
    data: RunData,
    *,
    settings: TwoTowerSettings | None = None,
    max_epochs: int | None = None,
    max_seconds: float | None = None,
    folder: Path | None = None,
    name: str = "two_tower",
    on_progress: OnProgress = lambda task, done, total: None,
) -> TwoTower:
    """Chooses the number of epochs on validation, then trains on all that precedes the test.

    Args:
        config: Of the run; `training.refit` says whether there is a second training.
        data: Split and samples.
        settings: Of the model, instead of the config's own.
        max_epochs: Instead of the config's own.
        max_seconds: After this time the first training begins no epoch.
        folder: Where both trainings are kept, to be resumed if stopped.
        name: Of the model.
        on_progress: As in `run`.

    Returns:
        The model; its `result` is that of the first training, and its `notes` tell of both.
    """
    training = config.training
    if max_epochs is not None:
        training = training.model_copy(update={"max_epochs": max_epochs})

    def fit(
        samples: TrainingSet, step: str, max_epochs: int, validation: Holdout | None
    ) -> TwoTower:
        model = TwoTower(settings or config.model, training=training, seed=config.seed, name=name)
        return model.fit_samples(
            samples,
            validation,
            max_epochs=max_epochs,
            max_seconds=max_seconds if validation else None,
            folder=None if folder is None else folder / step,
            exclude=config.evaluation.exclude,
            cutoffs=config.evaluation.cutoffs,
            on_epoch=lambda epoch, logs: on_progress(f"{name}, {step}", epoch, max_epochs),
            on_progress=on_progress,
            log=data.split.train,
        )

    model = fit(data.selection, "selection", training.max_epochs, data.validation)
    chosen = model.result
    monitored = chosen.history[f"val_{training.monitor}"]
    notes = [
        f"best validation {training.monitor} {max(monitored):.4f} after "
        f"{chosen.best_epoch} of {len(monitored)} epochs"
    ]
    if data.final is not data.selection:
        model = fit(data.final, "refit", chosen.best_epoch, None)
        notes.append(
            f"trained again on training and validation positives for {chosen.best_epoch} epochs"
        )
        model.result = chosen
    model.notes = [*notes, *model.notes]
    return model


def fit_baselines(
    config: RunConfig,
    data: RunData,
    *,
    on_progress: OnProgress = lambda task, done, total: None,
) -> tuple[dict[str, Retriever], list[str]]:
    """Fits the baselines of a config, their settings chosen on validation where it lists several.

    Args:
        config: Of the run; `evaluation` lists the baselines and their settings.
        data: Split and queries.
        on_progress: As in `run`.

    Returns:
        The baselines by name, and notes on what was chosen and what was skipped.
    """
    settings = config.evaluation
    final = data.split.before_test if config.training.refit else data.split.train
    grids: dict[str, list[Any]] = {
        "popularity": [MostPopular()],
        "ease": [Ease(l2=l2) for l2 in settings.ease_l2],
        "ials": [
            Ials(regularization=regularization, alpha=alpha, seed=config.seed)
            for regularization, alpha in itertools.product(
                settings.ials_regularization, settings.ials_alpha
            )
        ],
    }
    num_items = len(data.test.candidate_ids)
    found: dict[str, Retriever] = {}
    notes = []
    for name in settings.baselines:
        if name == "ease" and num_items > Ease.max_candidates:
            notes.append(
                f"ease: skipped, it inverts a matrix of items by items, and {num_items:,} items "
                f"are more than {Ease.max_candidates:,}"
            )
        if name == "uncorrected" or (name == "ease" and num_items > Ease.max_candidates):
            continue
        grid, scores = grids[name], []
        for i, baseline in enumerate(grid if len(grid) > 1 else []):
            on_progress(f"{name}, choosing on validation", i, len(grid))
            measured = evaluate(
                baseline.fit(data.split.train),
                data.validation,
                exclude=settings.exclude,
                cutoffs=settings.cutoffs,
                num_bootstrap=0,
            )
            scores.append(measured.first.overall.intervals[config.training.monitor].mean)
        best = grid[int(np.argmax(scores))] if scores else grid[0]
        found[name] = best.fit(final)
        if scores:
            notes.append(f"{name}: {best!r}, best of {len(grid)} on validation")
    return found, notes


def evaluate_all(
    config: RunConfig,
    retrievers: Mapping[str, Retriever],
    holdout: Holdout,
    on_progress: OnProgress = lambda task, done, total: None,
) -> Evaluation:
    """Evaluates retrievers by the settings of a config, the first compared with the others."""
    return evaluate(
        retrievers,
        holdout,
        exclude=config.evaluation.exclude,
        cutoffs=config.evaluation.cutoffs,
        seed=config.seed,
        on_progress=on_progress,
    )


def export_model(
    config: RunConfig,
    model: TwoTower,
    holdout: Holdout,
    *,
    manifest: Mapping[str, Any],
) -> tuple[Path, dict[str, Any]]:
    """Exports a model with its index, checked in a fresh process (see `serving.export`).

    Args:
        config: Of the run; `export` says where and with which index.
        model: Trained.
        holdout: What a ScaNN index is tuned and measured on; the manifest's example user is the
            first.
        manifest: More to write into the manifest, such as metrics; JSON-able.

    Returns:
        The folder of the new version, and what the index is.
    """
    recall = config.export.target_recall
    index: Scann | Exact = index_for(len(model.candidate_ids), recall)
    if config.export.index != "auto":
        index = Scann(recall) if config.export.index == "scann" else Exact()
    folder, written = export_version(
        model,
        config.export.directory / config.model_name,
        index=index,
        filter_by=config.export.filter_by,
        keep_versions=config.export.keep_versions,
        user_data=config.export.user_data,
        queries=holdout.as_queries(),
        manifest={"config": config.model_dump(mode="json"), **manifest},
    )
    return folder, written["index"]


def load_log(config: DataConfig) -> Log:
    """Loads the log that a config names."""
    features: dict[str, Any] = {
        "item_features": config.item_features,
        "user_features": config.user_features,
    }
    if config.source == "movielens-100k":
        log = load_movielens_100k(config.path, **features)
        return dataclasses.replace(log, is_ordered=config.is_ordered)
    assert config.path is not None  # The config's own check.
    common: dict[str, Any] = {"label": config.label, "duplicates": config.duplicates, **features}
    if config.source == "kuairand":
        return load_kuairand(config.path, unknown_items=config.unknown_items, **common)
    if config.source == "recflow":
        return load_recflow(config.path, **common)
    return Log.from_files(
        config.path,
        items=config.items_path,
        users=config.users_path,
        columns=config.columns,
        item_columns=config.item_columns,
        user_columns=config.user_columns,
        rating_threshold=config.rating_threshold,
        stage_values=config.stage_values,
        timestamp_unit=config.timestamp_unit,
        time_zone=config.time_zone,
        list_separator=config.list_separator,
        unknown_items=config.unknown_items,
        is_ordered=config.is_ordered,
        earliest_time=config.earliest_time,
        latest_time=config.latest_time,
        max_bad_share=config.max_bad_share,
        **common,
    )


def split_log(log: Log, config: SplitConfig, seed: int) -> Split:
    """Splits a log as a config says."""
    return log.split(
        config.kind,
        validation=config.validation,
        test=config.test,
        target_share=config.target_share,
        min_positives=config.min_positives,
        seed=seed,
    )


def describe_samples(report: Mapping[str, Any]) -> list[str]:
    """Says what samples hold, and what was kept from being a negative (see `build_samples`)."""
    return [
        f"{report['num_samples']:,} positives, {report['num_empty_histories']:,} of them with an "
        "empty history",
        f"{report['num_candidates']:,} candidates, {report['num_candidates_without_count']:,} of "
        "them never clicked in training",
        f"masked as negatives of their user: {report['num_known_positives']:,} known positives, "
        f"{report['num_exposed']:,} exposed and not clicked",
        *(
            f"hard negatives, {stage}: {pool['num_samples']:,} positives have some, "
            f"{pool['mean_pool']:.1f} on average"
            for stage, pool in report.get("hard_negatives", {}).items()
        ),
        *(
            f"never hard negatives, {reason}: {num_rows:,} rows"
            for reason, num_rows in report.get("hard_negatives_removed", {}).items()
        ),
    ]


def _variants(config: RunConfig) -> dict[str, TwoTowerSettings]:
    variants = {"two_tower": config.model}
    if "uncorrected" in config.evaluation.baselines and config.model.correction != "none":
        without = config.model.model_copy(update={"correction": "none"})
        variants["two_tower_uncorrected"] = without
    return variants


def _metrics(
    config: RunConfig, data: RunData, models: Mapping[str, TwoTower], evaluation: Evaluation
) -> dict[str, Any]:
    """Gathers what metrics.json holds.

    Of "differences": other model -> metric -> by how much it is above the two-tower model, query by
    query, with an interval.
    """
    return {
        "dataset": config.model_name,
        "split": data.split.report(),
        "models": {name: result.summary() for name, result in evaluation.results.items()},
        "training": {
            name: {"best_epoch": model.result.best_epoch, "history": model.result.history}
            for name, model in models.items()
        },
        "differences": {
            name: {metric: interval.as_dict() for metric, interval in by_metric.items()}
            for name, by_metric in evaluation.differences.items()
        },
        "examples": _examples(models["two_tower"], data.test, config),
        "versions": library_versions(),
    }


def _describe_evaluation(result: EvaluationResult) -> list[str]:
    return [
        *filter(None, [result.describe_sample()]),
        f"{len(result.user_ids):,} queries, {result.overall.num_relevant:,} items to find",
        f"skipped {result.num_skipped:,} queries with nothing to find; "
        f"{result.num_relevant_excluded:,} items to find were excluded from the ranking",
    ]


def _examples(retriever: Retriever, holdout: Holdout, config: RunConfig) -> list[dict[str, Any]]:
    """Shows what a few test queries are answered, chosen by length of history, short to long.

    Returns:
        A dict a query: user_id; history, the latest ids first, `EXAMPLE_LENGTH` at most, of
        num_history; recommended, ids, best first, without what the evaluation excludes; found,
        those of them that are among the num_relevant items to find.
    """
    order = np.argsort([len(history) for history in holdout.histories], kind="stable")
    places = np.linspace(0, len(order) - 1, NUM_EXAMPLES + 2)[1:-1].round().astype(int)
    numbers = list(dict.fromkeys(order[places].tolist()))
    queries = holdout.as_queries()
    excluded = holdout.excluded(config.evaluation.exclude)
    ids, scores = retriever.retrieve(
        [queries[i] for i in numbers],
        min(EXAMPLE_LENGTH, len(holdout.candidate_ids)),
        None if excluded is None else [excluded[i] for i in numbers],
    )
    examples = []
    for i, recommended, is_item in zip(numbers, ids, scores > -np.inf, strict=True):
        relevant = set(holdout.relevant[i].tolist())
        shown = recommended[is_item].tolist()
        examples.append(
            {
                "user_id": holdout.user_ids[i : i + 1].tolist()[0],
                "num_history": len(holdout.histories[i]),
                "history": holdout.histories[i][::-1][:EXAMPLE_LENGTH].tolist(),
                "recommended": shown,
                "num_relevant": len(relevant),
                "found": [id_ for id_ in shown if id_ in relevant],
            }
        )
    return examples


def library_versions() -> dict[str, str]:
    """Returns the versions of Python, of this package and of the libraries that an export needs."""
    return {
        "tfrs-pipeline": __version__,
        "python": platform.python_version(),
        **{library: importlib.metadata.version(library) for library in LIBRARIES},
    }
