"""The stages of a run composed: from a config to a model in service, one folder a run."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np

from tfrs_pipeline import __version__
from tfrs_pipeline.cluster import this_worker
from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.data.holdout import Holdout
from tfrs_pipeline.durable import (
    Damaged,
    file_hash,
    is_whole,
    part_files,
    read_record,
    write_record,
)
from tfrs_pipeline.evaluation.evaluate import evaluate
from tfrs_pipeline.evaluation.results import Evaluation
from tfrs_pipeline.messages import counted
from tfrs_pipeline.model.distribution import chief_first, on_chief, training_strategy
from tfrs_pipeline.model.fitted import FittedTwoTower
from tfrs_pipeline.model.notes import OnProgress
from tfrs_pipeline.retrieval import Retriever
from tfrs_pipeline.run.baselines import fit_baselines
from tfrs_pipeline.run.data import OnStep, RunData, StepReport, Steps, prepare
from tfrs_pipeline.run.folder import (
    CONFIG_FILE,
    METRICS_FILE,
    check_model_name,
    claim_folder,
    find_version,
    origin,
    with_source,
)
from tfrs_pipeline.run.training import check_source, train_and_refit, variants
from tfrs_pipeline.serving.export import LIBRARIES, ExportOptions, describe_index, export_version
from tfrs_pipeline.serving.gate import (
    IN_SERVICE,
    describe_lacking,
    refuse_worse,
    version_in_service,
)
from tfrs_pipeline.serving.index import search_of
from tfrs_pipeline.serving.publish import MANIFEST_FILE, NotPublished, publishing, versions_of
from tfrs_pipeline.serving.refresh import describe_undone

NOT_EXPORTED = {"index": {"kind": "none, not published"}, "export_folder": None}
NUM_EXAMPLES = 4
EXAMPLE_LENGTH = 10


@dataclass(frozen=True)
class RunResult:
    """What a run left behind: its folder, and what metrics.json holds."""

    folder: Path
    metrics: dict[str, Any]

    @property
    def export_folder(self) -> Path | None:
        """The new version; None if the model was not exported."""
        written = self.metrics["export_folder"]
        return None if written is None else Path(written)


def run(
    config: RunConfig,
    folder: Path,
    *,
    on_step: OnStep = lambda report: None,
    on_progress: OnProgress = lambda *task: None,
) -> RunResult:
    """Runs the whole pipeline in a folder, which is made if missing.

    A folder that holds a stopped run of the same config is resumed: finished data and samples are
    kept, training goes on from its last epoch. A finished run is given back as it is: another
    export would be another version for a server to take up. Its export is made again only if it is
    gone and no other version is there.

    Where TF_CONFIG names several workers, each of them calls this with the same folder, on a file
    system that all see. They train together; the chief alone writes, by its own config, evaluates
    and exports, and the others wait for it.

    `on_step` is called as each step ends, `on_progress` within long ones with a task's name, steps
    done and steps in all.

    Raises:
        NotPublished: If `export.gate` is set and the model is worse than the one in service; the
            trained run is kept.
        ValueError: If the folder holds a run of another config, the run to start from is not
            finished or of another shape (`ConfigError`), or the data is refused (`DataError`).
        WorkerLost: If another worker fails or does not answer.
    """
    check_model_name(config)
    training_strategy()  # Joins the other workers, if there are any.
    config = RunConfig(**on_chief(lambda: with_source(config, folder).model_dump(mode="json")))
    if not is_whole(folder / METRICS_FILE):  # A finished run needs no source any more.
        check_source(config)
    with claim_folder(config, folder, is_run=True):
        if (finished := chief_first(lambda: _finished_run(config, folder))) is not None:
            on_step(StepReport("finished before", _describe_finished(finished, config)))
            return finished
        return _run(config, folder, Steps(on_step, on_progress))


def _run(config: RunConfig, folder: Path, step: Steps) -> RunResult:
    data = chief_first(lambda: prepare(config, folder, step))
    models: dict[str, FittedTwoTower] = {}
    for name, settings in variants(config).items():
        with step(f"train {name}") as report:
            models[name] = train_and_refit(
                config,
                data,
                settings=settings,
                folder=folder / "checkpoints" / name,
                name=name,
                warm_start=config.warm_start,
                on_progress=step.on_progress,
            )
            report.notes = models[name].notes

    def conclude() -> RunResult:
        if this_worker().is_chief:
            return _conclude(config, folder, data, models, step)
        return cast(RunResult, _finished_run(config, folder))

    return chief_first(conclude)


def _conclude(
    config: RunConfig,
    folder: Path,
    data: RunData,
    models: Mapping[str, FittedTwoTower],
    step: Steps,
) -> RunResult:
    """Compares what was trained with the baselines, and exports it."""
    with step("baselines") as report:
        baselines, report.notes = fit_baselines(config, data, step.on_progress)
    is_compared, model_folder = _is_compared(config, folder), config.model_folder
    ids, listed = data.test.candidate_ids, data.split.log.listed_ids
    # What it is compared with stays in service until the new version is there.
    with publishing(model_folder) if is_compared else nullcontext():
        with step("evaluate") as report:
            measured: dict[str, Retriever] = {**models, **baselines}
            made_by = _made_by(config, folder)
            own = _own_version(config, made_by["training"])
            served = None
            if is_compared:
                log = data.split.log
                served = version_in_service(model_folder, ids, listed, log=log, without=own)
            if served is not None:
                measured[IN_SERVICE] = served
            evaluation = evaluate_all(config, measured, data.test, step.on_progress)
            first = evaluation.first
            num_queries, num_relevant = len(first.user_ids), first.overall.num_relevant
            report.notes += [f"{counted(num_queries, 'query')}, {num_relevant:,} items to find"]
            report.notes += first.describe()
        metrics = _metrics(config, data, models, evaluation)
        if own is not None and (adopted := _adopt(own, config, folder, metrics, step)) is not None:
            return adopted
        if config.export.index == "none":
            return _keep(folder, {**metrics, **NOT_EXPORTED}, step)
        with step("export") as report:
            report.notes += _pass_gate(config, folder, evaluation, metrics, own, step)
            if served is not None:
                known = {"in_service": served.corpus.values, "exported": listed}
                report.notes.append(describe_lacking(data.test, config.evaluation.exclude, **known))
            if (undone := describe_undone(model_folder, _began(folder), listed)) is not None:
                report.notes.append(undone)
            export_folder, metrics["index"] = export_model(
                config,
                models["two_tower"],
                data.test,
                manifest={
                    **made_by,
                    "counts": data.final.report,
                    "metrics": metrics["models"]["two_tower"],
                },
            )
            if num_left := len(ids) - len(listed):
                report.notes.append(
                    f"{counted(num_left, 'item')} of the log that the item table lacks: read in "
                    "histories, not retrieved"
                )
            report.notes.append(describe_index(metrics["index"], len(listed)))
            report.notes.append("a fresh process loaded the export and gave the same answers")
    return _keep(folder, {**metrics, "export_folder": str(export_folder.resolve())}, step)


def _began(folder: Path) -> datetime:
    """Returns when a run began, at the latest: no item was read before it."""
    # A resumed run may write its settings anew: the older of the two counts.
    files = folder / CONFIG_FILE, folder / "data" / "log.json"
    return datetime.fromtimestamp(min(file.stat().st_mtime for file in files), UTC)


def _made_by(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Says in a manifest which training made a version, and of which data."""
    data = folder / "data"
    tables = [file for table in sorted(data.glob("*.parquet")) for file in part_files(table)]
    epochs = (folder / "checkpoints" / "two_tower").rglob("epoch-*.json")
    return {
        "run": str(folder.resolve()),
        "log": origin(config.data),
        "data": {file.relative_to(data).as_posix(): file_hash(file) for file in tables},
        # These hold how long it took: another training has others, of the same settings too.
        "training": sorted(map(file_hash, epochs)),
    }


def _own_version(config: RunConfig, training: Sequence[str]) -> Path | None:
    """Finds the version that this training has made, if the run was killed right after that."""
    for number in reversed(versions_of(config.model_folder)):
        version = config.model_folder / str(number)
        try:
            manifest = read_record(version / MANIFEST_FILE, check_files=False)
        except Damaged:
            continue
        if "refreshed" not in manifest and manifest.get("training") == training:
            return version
    return None


def _adopt(
    version: Path, config: RunConfig, folder: Path, metrics: Mapping[str, Any], step: Steps
) -> RunResult | None:
    """Finishes a run whose version is there already; None if it is to have another index."""
    manifest = read_record(version / MANIFEST_FILE, check_files=False)
    export = config.export.model_dump(mode="json")
    then = manifest["config"]["export"]
    if export["index"] != "none" and any(then[x] != export[x] for x in ("index", "target_recall")):
        return None
    with step("export") as report:
        report.notes.append(f"{version}, exported before the run was stopped, is kept")
    made = {"index": manifest["index"], "export_folder": str(version.resolve())}
    return _keep(folder, {**metrics, **made}, step)


def _keep(folder: Path, metrics: Mapping[str, Any], step: Steps) -> RunResult:
    """Writes metrics.json, by which a run is a finished one."""
    metrics = {**metrics, "notes": step.notes, "seconds": step.seconds}
    write_record(folder / METRICS_FILE, metrics)
    return RunResult(folder, metrics)


def _finished_run(config: RunConfig, folder: Path) -> RunResult | None:
    """Reads what a finished run left behind; None if it is to go on."""
    metrics = _read_metrics(folder)
    if metrics is None:
        return None
    if (own := find_version(metrics, config.model_folder)) is not None:
        return RunResult(folder, {**metrics, "export_folder": str(own.resolve())})
    result = RunResult(folder, metrics)
    if config.export.index == "none":
        return result
    if result.export_folder is None:  # Refused: the gate may be open now.
        return None
    # Where others are in service, this one would go before them. The project may have moved.
    folders = result.export_folder.parent, config.model_folder
    return result if any(map(versions_of, folders)) else None


def _describe_finished(result: RunResult, config: RunConfig) -> list[str]:
    notes = ["its results follow; nothing was done"]
    is_there = find_version(result.metrics, config.model_folder) is not None
    if result.export_folder is not None and not is_there:
        notes.append(
            f"its version {result.export_folder} is gone, and a finished run is not exported again "
            f"by itself: to do so, delete {result.folder / METRICS_FILE} and run it again"
        )
    return notes


def _read_metrics(folder: Path) -> dict[str, Any] | None:
    path = folder / METRICS_FILE
    return read_record(path) if is_whole(path) else None


def _is_compared(config: RunConfig, folder: Path) -> bool:
    """Whether to measure the version in service too: for the gate, or as it has refused the run."""
    metrics = _read_metrics(folder)
    return config.export.gate or (metrics is not None and IN_SERVICE in metrics["models"])


def _pass_gate(
    config: RunConfig,
    folder: Path,
    evaluation: Evaluation,
    metrics: Mapping[str, Any],
    own: Path | None,
    step: Steps,
) -> list[str]:
    """Lets the model through to its export, or keeps the run without one.

    It is not compared with `own`, a version of itself.
    """
    if IN_SERVICE not in evaluation.results:
        return ["no version is in service yet"] if config.export.gate else []
    model = config.model_folder
    try:
        return [refuse_worse(evaluation, config.training.monitor, model, without=own)]
    except NotPublished as error:
        if not config.export.gate:
            return [f"exported all the same, without the gate: {error}"]
        _keep(folder, {**metrics, **NOT_EXPORTED}, step)
        raise NotPublished(
            f"{error} {model} stays as it is. The trained run is kept: --run-dir {folder} with "
            "--no-export.gate exports it all the same."
        ) from None


def evaluate_all(
    config: RunConfig,
    retrievers: Mapping[str, Retriever],
    holdout: Holdout,
    on_progress: OnProgress = lambda *task: None,
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
    model: FittedTwoTower,
    holdout: Holdout,
    *,
    manifest: Mapping[str, Any],
) -> tuple[Path, dict[str, Any]]:
    """Exports a model; returns the folder of the new version, and what its index is.

    A ScaNN index is tuned and measured on the holdout, whose first user is the manifest's example.
    """
    index = search_of(config.export.index, config.export.target_recall)
    folder, written = export_version(
        model,
        config.model_folder,
        ExportOptions(index, config.export.filter_by, config.export.keep_versions),
        item_ids=None,
        user_data=config.export.user_data,
        queries=holdout.as_queries(),
        manifest={"config": config.model_dump(mode="json"), **manifest},
    )
    return folder, written["index"]


def _metrics(
    config: RunConfig, data: RunData, models: Mapping[str, FittedTwoTower], evaluation: Evaluation
) -> dict[str, Any]:
    """Gathers what metrics.json holds.

    The differences say by how much others are above the two-tower model, query by query.
    """
    return {
        "dataset": config.model_name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "split": data.split.report(),
        **evaluation.summary(),
        "training": {
            name: {
                "best_epoch": model.result.best_epoch,
                # A part of validation without an item to find measures NaN, which is no JSON.
                "history": {
                    metric: [None if np.isnan(value) else value for value in values]
                    for metric, values in model.result.history.items()
                },
            }
            for name, model in models.items()
        },
        "examples": _examples(models["two_tower"], data.test, config),
        "versions": {
            "tfrs-pipeline": __version__,
            "python": platform.python_version(),
            **{library: importlib.metadata.version(library) for library in LIBRARIES},
        },
    }


def _examples(retriever: Retriever, holdout: Holdout, config: RunConfig) -> list[dict[str, Any]]:
    """Shows what a few test queries are answered, chosen by length of history, short to long.

    Each has `EXAMPLE_LENGTH` ids at most of the history, the latest first, and of the recommended
    items, the best first, without what the evaluation excludes; found are the recommended ones that
    are among the items to find.
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
