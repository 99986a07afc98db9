"""`tfrs-pipeline run`: from a config to a model in service, with one folder per run."""

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfrs_pipeline.cluster import this_worker
from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.split import Split
from tfrs_pipeline.durable import read_whole, write_record
from tfrs_pipeline.evaluation.signals import Signals, signals
from tfrs_pipeline.messages import SILENT, Progress, StepReport
from tfrs_pipeline.model.distribution import chief_first, on_chief, training_strategy
from tfrs_pipeline.retrieval import Retriever
from tfrs_pipeline.run.data import RunData, data_steps
from tfrs_pipeline.run.folder import RunFolder, check_model_name, exported_version, with_source
from tfrs_pipeline.run.measure import fit_baselines, is_compared, measure, metrics_of
from tfrs_pipeline.run.publish import export_step
from tfrs_pipeline.run.race import race_step, settle
from tfrs_pipeline.run.steps import Runner, Step
from tfrs_pipeline.run.training import training_step, variants
from tfrs_pipeline.serving.publish import publishing, versions_of


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
        *data_steps(config, folder),
        _signals_step(config),
        *([race_step(config, folder)] if config.recipes else []),
        *_model_steps(config, folder),
        *_closing_steps(config, folder),
    ]


def _signals_step(config: RunConfig) -> Step:
    def measure_signals(runner: Runner, split: Split[Log]) -> Signals:
        found = signals(split.train, seed=config.seed)
        runner.note(*str(found).splitlines(), *found.excluded_repeats(config.evaluation.exclude))
        return found

    return Step("signals", ("split",), "signals", measure_signals)


def _model_steps(config: RunConfig, folder: RunFolder) -> list[Step]:
    models = variants(config).items()
    return [training_step(name, each, folder, f"checkpoints/{name}") for name, each in models]


def _closing_steps(config: RunConfig, folder: RunFolder) -> list[Step]:
    def fit(runner: Runner, data: RunData) -> dict[str, Retriever]:
        baselines, notes = fit_baselines(config, data, runner.progress.task)
        left_out = [x for x in ("ease", "ials") if x not in config.evaluation.baselines]
        why = [f"{x}: left out by the preset or by evaluation.baselines" for x in left_out]
        runner.note(*notes, *why)
        return baselines

    measure_all = functools.partial(measure, config, folder)
    return [
        Step("baselines", ("samples",), "baselines", fit),
        Step("evaluate", ("samples", "baselines", *variants(config)), "measured", measure_all),
        export_step(config, folder),
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
    check_model_name(config)
    runner, is_chief = begun or Runner(progress), this_worker().is_chief
    training_strategy()  # Joins the other workers, if there are any.
    place = RunFolder(folder)
    chiefs = on_chief(lambda: place.settled(with_source(config, place)).model_dump(mode="json"))
    config = RunConfig(**chiefs)
    with place.claim(config, is_run=True):
        if (finished := chief_first(lambda: read_result(config, place))) is not None:
            notes = _describe_finished(finished, config)
            runner.progress.step(StepReport("finished before", notes))
            return finished
        first = [*data_steps(config, place), *([_signals_step(config)] if is_chief else [])]
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
        exported = runner.run(steps)
    data, measured = runner.artifacts["samples"], runner.artifacts["measured"]
    metrics = {
        **metrics_of(config, data, measured),
        **({} if (race := read_whole(folder.race_file)) is None else {"race": race["race"]}),
        **exported,
        "signals": runner.artifacts["signals"].as_dict(),
        "notes": {report.name: report.notes for report in runner.reports},
        "seconds": {report.name: report.seconds for report in runner.reports},
    }
    write_record(folder.metrics_file, metrics)  # This file marks a finished run.
    return RunResult(folder.path, metrics)


def read_result(config: RunConfig, folder: RunFolder) -> RunResult | None:
    """Reads the result of a finished run; None if something is left to do."""
    metrics = folder.metrics()
    if metrics is None:
        return None
    if (own := exported_version(metrics, config.model_folder)) is not None:
        return RunResult(folder.path, {**metrics, "export_folder": str(own.resolve())})
    result = RunResult(folder.path, metrics)
    if config.export.index == "none":
        return result
    if result.export_folder is None:  # It was refused, but the settings may allow it now.
        return None
    # If other versions exist, this one would replace them. The project may have moved.
    folders = result.export_folder.parent, config.model_folder
    return result if any(map(versions_of, folders)) else None


def _describe_finished(result: RunResult, config: RunConfig) -> list[str]:
    notes = ["its results follow; nothing was done"]
    is_there = exported_version(result.metrics, config.model_folder) is not None
    if result.export_folder is not None and not is_there:
        notes.append(
            f"its version {result.export_folder} is gone, and a finished run is not exported again "
            f"by itself: to do so, delete {RunFolder(result.folder).metrics_file} and run it again"
        )
    return notes
