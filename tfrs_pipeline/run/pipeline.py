"""`tfrs-pipeline run`: from a config to a model in service, with one folder per run.

A model is exported unless it is worse than others, and at most once per training.
"""

import functools
import importlib.metadata
import math
import platform
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tfrs_pipeline import __version__
from tfrs_pipeline.cluster import this_worker
from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.data.log import Split
from tfrs_pipeline.durable import read_record, read_whole, recorded_hashes, write_record
from tfrs_pipeline.evaluation.results import Evaluation
from tfrs_pipeline.evaluation.signals import Signals, signals
from tfrs_pipeline.messages import SILENT, Progress, StepReport, counted
from tfrs_pipeline.model.distribution import chief_first, on_chief, training_strategy
from tfrs_pipeline.model.fitted import FittedTwoTower
from tfrs_pipeline.run.apart import measure_baselines
from tfrs_pipeline.run.data import RunData, data_steps
from tfrs_pipeline.run.folder import (
    RunFolder,
    name_of_log,
    own_version,
    trained_by,
)
from tfrs_pipeline.run.measure import examples_of, is_compared, measure
from tfrs_pipeline.run.race import race_step, settle
from tfrs_pipeline.run.refresh import WRITING, describe_undone
from tfrs_pipeline.run.steps import Runner, Step
from tfrs_pipeline.run.training import training_step, variants
from tfrs_pipeline.serving.export import (
    LIBRARIES,
    NUM_QUERIES,
    ExportOptions,
    describe_index,
    export_version,
)
from tfrs_pipeline.serving.gate import IN_SERVICE, refuse_beaten, refuse_worse
from tfrs_pipeline.serving.index import search_of
from tfrs_pipeline.serving.publish import MANIFEST_FILE, NotPublished, publishing, versions_of

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


def run_steps(config: RunConfig, folder: RunFolder) -> list[Step]:
    """Returns the steps of a run, in order.

    After a race, the model steps are those of the winner's settings.
    """
    return [
        *_first_steps(config, folder),
        *([race_step(config, folder)] if config.recipes else []),
        *_model_steps(config, folder),
        *_closing_steps(config, folder),
    ]


def _first_steps(config: RunConfig, folder: RunFolder) -> list[Step]:
    def measure_signals(runner: Runner, split: Split) -> Signals:
        found = signals(split.train, seed=config.seed)
        runner.note(*str(found).splitlines(), *found.excluded_repeats(config.evaluation.exclude))
        return found

    return [*data_steps(config, folder), Step("signals", ("split",), "signals", measure_signals)]


def _model_steps(config: RunConfig, folder: RunFolder) -> list[Step]:
    models = variants(config).items()
    return [training_step(name, each, folder, f"checkpoints/{name}") for name, each in models]


def _closing_steps(config: RunConfig, folder: RunFolder) -> list[Step]:
    fit, measure_all, export = (
        functools.partial(make, config, folder)
        for make in (measure_baselines, measure, _export_best)
    )
    reads, place = ("samples", "two_tower", "measured"), "export.directory/NAME/VERSION/"
    return [
        Step("baselines", ("samples",), "baselines", fit),
        Step("evaluate", ("samples", "baselines", *variants(config)), "measured", measure_all),
        Step("export", reads, "version", export, place),
    ]


def run(
    config: RunConfig, folder: Path, *, progress: Progress = SILENT, begun: Runner | None = None
) -> RunResult:
    """Runs the whole pipeline in a folder, which is made if missing.

    A stopped run of the same config in the folder is resumed from its last epoch. A finished run is
    returned unchanged, and exported again only if it was refused or no version is left.

    If TF_CONFIG names several workers, each calls this with the same folder, on a shared file
    system. They train together; the chief alone writes, with its own config, evaluates and exports.
    `begun`, a runner that has made the first steps, replaces `progress`.

    Raises:
        ValueError: If the folder holds a run of another config, the run to start from is unfinished
            or has another shape (`ConfigError`), or the data is refused (`DataError`).
        WorkerLost: If another worker fails or does not answer.
    """
    runner, is_chief = begun or Runner(progress), this_worker().is_chief
    training_strategy()  # Joins the other workers, if there are any.
    place = RunFolder(folder)
    chiefs = on_chief(lambda: place.settled(config).model_dump(mode="json"))
    config = RunConfig(**chiefs)
    with place.claim(config, is_run=True):
        if (finished := chief_first(lambda: _read_result(config, place, runner))) is not None:
            return finished
        first = _first_steps(config, place) if is_chief else data_steps(config, place)
        chief_first(lambda: runner.run(runner.remaining(first)))
        if config.recipes:
            config = settle(config, place, runner.run([race_step(config, place)]))
        runner.run(_model_steps(config, place))
        return chief_first(lambda: _conclude(config, place, runner))


def _conclude(config: RunConfig, folder: RunFolder, runner: Runner) -> RunResult:
    """Measures and exports the trained models on the chief; other workers read its results."""
    if not this_worker().is_chief:
        return RunResult(folder.path, folder.metrics() or {})
    baselines, *steps = _closing_steps(config, folder)
    runner.run([baselines])
    # The version that the model is compared with must stay in service until the export.
    is_held = is_compared(config, folder)
    with publishing(config.model_folder) if is_held else nullcontext():
        runner.run(steps)
    made, data = runner.artifacts, runner.artifacts["samples"]
    metrics = {
        "dataset": config.model_name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "split": data.split.report(),
        **made["measured"].summary(),
        "training": {
            name: {
                "best_epoch": made[name].result.best_epoch,
                # A slice of validation without a relevant item has NaN, which JSON lacks.
                "history": {
                    metric: [None if math.isnan(value) else value for value in values]
                    for metric, values in made[name].result.history.items()
                },
            }
            for name in variants(config)
        },
        "examples": examples_of(made["two_tower"], data.by_user, config),
        "versions": {
            "tfrs-pipeline": __version__,
            "python": platform.python_version(),
            **{library: importlib.metadata.version(library) for library in LIBRARIES},
        },
        **({} if (race := read_whole(folder.race_file)) is None else {"race": race["race"]}),
        **made["version"],
        "left_out": made["baselines"].left_out,
        "signals": made["signals"].as_dict(),
        "notes": {report.name: report.notes for report in runner.reports},
        "seconds": {report.name: report.seconds for report in runner.reports},
    }
    write_record(folder.metrics_file, metrics)  # This file marks a finished run.
    return RunResult(folder.path, metrics)


def _read_result(config: RunConfig, folder: RunFolder, runner: Runner) -> RunResult | None:
    """Reads and reports the result of a finished run; None if something is left to do."""
    metrics = folder.metrics()
    if metrics is None:
        return None
    result, report = RunResult(folder.path, metrics), StepReport("finished before")
    report.notes.append("its results follow; nothing was done")
    if (own := own_version(config, folder)) is not None:
        metrics["export_folder"] = str(own.resolve())
    elif (gone := result.export_folder) is not None:
        # If other versions exist, this one would replace them. The project may have moved.
        if config.export.index != "none" and not any(
            map(versions_of, (gone.parent, config.model_folder))
        ):
            return None
        report.notes.append(
            f"its version {gone} is gone, and a finished run is not exported again by itself: to "
            f"do so, delete {folder.metrics_file} and run it again"
        )
    elif config.export.index != "none":  # It was refused, but the settings may allow it now.
        return None
    runner.progress.step(report)
    return result


def _read_exported(config: RunConfig, folder: RunFolder, runner: Runner) -> dict[str, Any] | None:
    """Reads what `_export_best` made of this training, unless the index settings have changed."""
    if (version := own_version(config, folder)) is None:
        return None
    manifest = read_record(version / MANIFEST_FILE, check_files=False)
    export = config.export.model_dump(mode="json")
    then = manifest["config"]["export"]
    if export["index"] != "none" and any(then[x] != export[x] for x in ("index", "target_recall")):
        return None
    runner.note(f"{version}, exported before the run was stopped, is kept")
    return {"index": manifest["index"], "export_folder": str(version.resolve())}


def _export_best(
    config: RunConfig,
    folder: RunFolder,
    runner: Runner,
    data: RunData,
    model: FittedTwoTower,
    measured: Evaluation,
) -> dict[str, Any]:
    """Exports the two-tower model, unless a baseline or the version in service is better.

    Returns the export's part of metrics.json.
    """
    if (kept := _read_exported(config, folder, runner)) is not None:
        return kept
    listed, export = data.split.log.listed_ids, config.export
    if export.index == "none":
        runner.note("export.index is 'none': nothing is exported")
        return _NOT_EXPORTED
    try:
        runner.note(*_pass_gate(config, folder, measured))
    except NotPublished as error:
        refusal = str(error)
        runner.note(f"not exported: {refusal.partition('. ')[0]}")
        return {**_NOT_EXPORTED, "refusal": refusal}
    runner.note(*describe_undone(config.model_folder, data.split.log.items_read))
    search = search_of(export.index, export.target_recall)
    runner.progress.task("export", 0, 0, WRITING)
    version, manifest = export_version(
        model,
        config.model_folder,
        ExportOptions(search, export.filter_by, export.keep_versions),
        user_data=export.user_data,
        # A ScaNN index is tuned and measured on these, drawn from all users: the first requests
        # would be those of a few. The first user is the manifest's example.
        queries=data.test.sample(NUM_QUERIES, config.seed).as_queries(),
        manifest={
            "config": config.model_dump(mode="json"),
            "run": str(folder.path.resolve()),
            "log": name_of_log(config.data),
            "data": {
                **recorded_hashes(folder.data / "log.json"),
                **recorded_hashes(folder.split.with_suffix(".json")),
            },
            "training": trained_by(folder.path),
            "counts": data.final.report,
            "metrics": measured.summary()["models"]["two_tower"],
        },
    )
    if config.evaluation.exclude == "none" and export.user_data:
        runner.note(
            "asked by user id, the model leaves out the user's known items, which the test ranks "
            "(evaluation.exclude none): ask by history, with `retrieve`, to get them too"
        )
    if num_left := len(data.test.candidate_ids) - len(listed):
        lacks = f"the item table lacks {counted(num_left, 'item')} of the log"
        runner.note(f"{lacks}: they are read in histories but not retrieved")
    runner.note(
        describe_index(manifest["index"], len(listed)),
        "a fresh process loaded the export and gave the same answers",
    )
    return {"index": manifest["index"], "export_folder": str(version.resolve())}


def _pass_gate(config: RunConfig, folder: RunFolder, evaluation: Evaluation) -> Iterator[str]:
    """Compares the model with the baselines, and with the version in service if that is measured.

    It is not compared with its own export. Yields notes; raises `NotPublished` if it is worse.
    """
    export, monitor, models = config.export, config.training.monitor, config.model_folder
    baselines = [x for x in evaluation.results if x not in (*variants(config), IN_SERVICE)]
    refusals: dict[str, str] = {}  # By the flag that overrules each: all are told at once.
    try:
        refuse_beaten(evaluation, monitor, baselines)
    except NotPublished as error:
        if export.if_beaten:
            yield f"exported anyway, as export.if_beaten allows: {error}"
        else:
            refusals["--export.if_beaten"] = str(error)
    if IN_SERVICE in evaluation.results:
        try:
            yield refuse_worse(evaluation, monitor, models, without=own_version(config, folder))
        except NotPublished as error:
            if export.gate:
                refusals["--no-export.gate"] = str(error)
            else:
                yield f"exported anyway, without the gate: {error}"
    elif export.gate:
        yield "no version is in service yet"
    if refusals:
        stays = f"{models} stays as it is. " if versions_of(models) else ""
        kept = f"{stays}The trained run is kept: --run-dir {folder.path} with"
        flags = " ".join(refusals)
        raise NotPublished(f"{' '.join(refusals.values())} {kept} {flags} exports it anyway.")
