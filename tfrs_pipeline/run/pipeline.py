"""`tfrs-pipeline run`: from a config to a model in service, with one folder per run.

A model is exported unless it is worse than others (`run/gate.py`), and at most once per training.
"""

import importlib.metadata
import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from tfrs_pipeline import __version__
from tfrs_pipeline.answers.publish import MANIFEST_FILE, NotPublished, versions_of
from tfrs_pipeline.answers.version import LIBRARIES, NUM_QUERIES, ExportOptions, describe_index
from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.durable import read_record, recorded_hashes, write_record
from tfrs_pipeline.evaluation.results import Evaluation
from tfrs_pipeline.exports.export import export_version
from tfrs_pipeline.messages import SILENT, Progress, StepReport, counted
from tfrs_pipeline.model.distribution import chief_first, on_chief
from tfrs_pipeline.model.ensemble import Model
from tfrs_pipeline.model.fitted_model import excluding
from tfrs_pipeline.run.data import RunData, data_steps
from tfrs_pipeline.run.folder import CHECKPOINTS, METRICS_FILE, STEPS_FILE, RunFolder, name_of_log
from tfrs_pipeline.run.gate import pass_gate
from tfrs_pipeline.run.measure import MeasuredBaselines, examples_of, measure, measure_baselines
from tfrs_pipeline.run.plans import ensemble_of, models_of, resolve_settings
from tfrs_pipeline.run.race import race_step
from tfrs_pipeline.run.refresh import WRITING
from tfrs_pipeline.run.steps import RunContext, Step
from tfrs_pipeline.run.training import train_model, training_step, trainings_of
from tfrs_pipeline.search.settings import search_of

VERSION = "export.directory/NAME/VERSION/"  # As the list of steps shows it.
_NOT_EXPORTED: dict[str, Any] = {"index": {"kind": "none"}, "export_folder": None}


@dataclass(frozen=True)
class RunResult:
    """The result of a run: its folder, and the contents of metrics.json."""

    folder: Path
    metrics: dict[str, Any]

    @property
    def refusal(self) -> str | None:
        """Why a baseline or `export.gate` keeps the model out of service; None if neither does."""
        return self.metrics.get("refusal")

    @property
    def export_folder(self) -> Path | None:
        """The new version; None if the model was not exported."""
        written = self.metrics["export_folder"]
        return None if written is None else Path(written)


def run_steps(config: RunConfig) -> list[Step]:
    """Returns the steps of a run, in order: `run` does them, `--check` lists them, docs draw them.

    The last step's file, metrics.json, marks a finished run.
    """
    models, race = models_of(config), ("race",) if config.recipes else ()
    judged = "samples", "baselines", "two_tower", "measured"
    every = ["samples", "baselines", "measured", "version", *models, *race]
    by_chief: dict[str, Any] = {"workers": "chief"}
    return [
        *data_steps(),
        *([race_step()] if race else []),
        *(
            training_step(name, f"{CHECKPOINTS}/{name}", partial(train_model, name=name), *race)
            for name in models
        ),
        Step("baselines", ("samples",), "baselines", measure_baselines, **by_chief),
        Step("evaluate", ("samples", "baselines", *models), "measured", measure, **by_chief),
        Step("export", judged, "version", _export_best, VERSION, _read_exported, **by_chief),
        Step("metrics", tuple(every), "metrics", _write_metrics, METRICS_FILE, **by_chief),
    ]


def run(config: RunConfig, folder: Path, *, progress: Progress = SILENT) -> RunResult:
    """Runs the whole pipeline in a folder, which is made if missing.

    A stopped run of the same config in the folder is resumed from its last epoch. A finished run is
    returned unchanged, and exported again only if it was refused or no version is left.

    If TF_CONFIG names several workers, each calls this with the same folder, on a shared file
    system. They train together; the chief alone writes, with its own config, evaluates and exports.

    Raises:
        ValueError: If the folder holds a run of another config, the run to start from is unfinished
            or has another shape (`ConfigError`), or the data is refused (`DataError`).
        WorkerLost: If another worker fails or does not answer.
    """
    run_folder = RunFolder(folder)
    config = _of_chief(lambda: resolve_settings(config, run_folder))
    with run_folder.claim(config, is_run=True):
        return run_claimed(RunContext(config, run_folder, progress))


def run_claimed(run: RunContext) -> RunResult:
    """Does a run, or what is left of it, in a folder that is claimed, with resolved settings."""
    # The other workers take the chief's settings: a shared file system may show the files on which
    # these depend to some workers before others.
    run.config = _of_chief(lambda: run.config)
    if (finished := chief_first(lambda: _read_result(run))) is not None:
        return finished
    run.do(run_steps(run.config))
    # Read back, because only the chief has made it.
    return RunResult(run.folder.path, run.folder.results())


def _of_chief(settings: Callable[[], RunConfig]) -> RunConfig:
    return RunConfig(**on_chief(lambda: settings().model_dump(mode="json")))


def _write_metrics(
    run: RunContext,
    samples: RunData,
    baselines: MeasuredBaselines,
    measured: Evaluation,
    version: dict[str, Any],
    race: dict[str, Any] | None = None,
    **models: Model,
) -> dict[str, Any]:
    """Writes steps.json, then metrics.json, which marks a finished run; returns both as one."""
    metrics = {
        "dataset": run.config.model_name,
        "split": samples.split.report(),
        **measured.summary(),
        "training": {
            name: _describe_training(model)
            for trained in models.items()
            for name, model in trainings_of(*trained).items()
        },
        "examples": examples_of(models["two_tower"], samples.by_user, run.config),
        "versions": {
            "tfrs-pipeline": __version__,
            "python": platform.python_version(),
            **{library: importlib.metadata.version(library) for library in LIBRARIES},
        },
        "ensemble": ensemble_of(run.config, race).model_dump(mode="json"),
        **({} if race is None else {"race": race["race"]}),
        **version,
        "left_out": baselines.not_measured,
        "false_negatives": {
            pool: {**asdict(x), "words": str(x)} for pool, x in samples.false_negatives.items()
        },
    }
    done = run.reports[:-1]  # Without this step, which has not ended.
    steps = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "notes": {report.name: report.notes for report in done},
        "seconds": {report.name: report.seconds for report in done},
    }
    write_record(run.folder.path / STEPS_FILE, steps)
    write_record(run.folder.metrics_file, metrics)
    return {**steps, **metrics}


def _describe_training(model: Model) -> dict[str, Any]:
    # A slice of validation without a relevant item has NaN, which JSON lacks.
    history = {
        metric: [None if math.isnan(value) else value for value in values]
        for metric, values in model.result.history.items()
    }
    return {
        "best_epoch": model.result.best_epoch,
        "history": history,
        "bonus": model.bonus and model.bonus.as_dict(),
    }


def _read_result(run: RunContext) -> RunResult | None:
    """Reads and reports the result of a finished run; None if something is left to do."""
    if (metrics := run.folder.metrics()) is None:
        return None
    exports, models = run.config.export.index != "none", run.config.model_folder
    report = StepReport("finished before", ["its results follow; nothing was done"])
    if (version := run.folder.own_version(run.config)) is not None:
        metrics["export_folder"] = str(version.resolve())
    elif metrics["export_folder"] is None:
        if exports:  # It was refused, but the settings may allow it now.
            return None
    else:
        gone = Path(metrics["export_folder"])  # The project may have moved, so both are looked at.
        if exports and not (versions_of(gone.parent) or versions_of(models)):
            return None
        # If other versions exist, a new one would replace them, such as after a rollback.
        report.notes.append(
            f"its version {gone} is gone, and a finished run is not exported again by itself: to "
            f"do so, delete {run.folder.metrics_file} and run it again"
        )
    run.progress.step(report)
    return RunResult(run.folder.path, metrics)


def _read_exported(run: RunContext, **_: Any) -> dict[str, Any] | None:
    """Reads the version that this training was exported as, unless what it holds has changed.

    Exported again, it would push an older version out of `keep_versions`.
    """
    if (version := run.folder.own_version(run.config)) is None:
        return None
    manifest = read_record(version / MANIFEST_FILE, check_files=False)
    export, then = run.config.export.model_dump(mode="json"), manifest["config"]["export"]
    decisive = "index", "target_recall", "filter_by", "user_data"
    if export["index"] != "none" and any(then.get(name) != export[name] for name in decisive):
        return None
    run.note(f"{version}, exported before the run was stopped, is kept")
    return {"index": manifest["index"], "export_folder": str(version.resolve())}


def _export_best(
    run: RunContext,
    samples: RunData,
    baselines: MeasuredBaselines,
    two_tower: Model,
    measured: Evaluation,
) -> dict[str, Any]:
    """Exports the two-tower model, unless a baseline or the version in service is better.

    If every baseline failed, the model is not exported. Returns the export's part of metrics.json.
    """
    config, folder, log = run.config, run.folder, samples.split.log
    export, best = config.export, two_tower.first
    if export.index == "none":
        run.note("export.index is 'none': nothing is exported")
        return _NOT_EXPORTED
    try:
        run.note(*pass_gate(config, folder, measured, baselines.names, baselines.failed))
    except NotPublished as error:
        run.note(f"not exported: {str(error).partition('. ')[0]}")
        return {**_NOT_EXPORTED, "refusal": str(error)}
    # Said before the long work, since notes are shown only when a step has ended.
    run.progress.task("export", 0, 0, WRITING)
    search = search_of(export.index, export.target_recall)
    version, manifest = export_version(
        excluding(two_tower.exportable(), log, config.evaluation.exclude),
        config.model_folder,
        ExportOptions(search, export.filter_by, export.keep_versions),
        user_data=export.user_data,
        # A ScaNN index is tuned and measured on these, drawn from all users: the first requests
        # would be those of a few. The first user is the manifest's example.
        queries=samples.test.sample(NUM_QUERIES, config.seed).as_queries(),
        manifest={
            # With the settings that a race may have found.
            "config": config.model_copy(
                update={"model": best.settings, "training": best.training}
            ).model_dump(mode="json"),
            "run": str(folder.path.resolve()),
            "log": name_of_log(config.data),
            "data": {
                **recorded_hashes(folder.data / "log.json"),
                **recorded_hashes(folder.split.with_suffix(".json")),
            },
            "training": folder.trained_by(),
            "counts": samples.final.report,
            "metrics": measured.summary()["models"]["two_tower"],
        },
    )
    num_listed = len(log.listed_ids)
    if num_left := len(samples.test.candidate_ids) - num_listed:
        lacks = f"the item table lacks {counted(num_left, 'item')} of the log"
        run.note(f"{lacks}: they are read in histories but not retrieved")
    if aligned := manifest["aligned"]:
        run.note(
            "vectors are turned onto those of version {version}: mean cosine {mean_cosine:.3f} of "
            "the {num_items:,} items that both have".format(**aligned)
        )
    run.note(
        describe_index(manifest["index"], num_listed),
        "a fresh process loaded the export and gave the same answers",
    )
    return {"index": manifest["index"], "export_folder": str(version.resolve())}
