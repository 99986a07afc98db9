"""Exports a run's model unless it is worse than others, and at most once per training."""

import functools
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.durable import file_hash, part_files, read_record
from tfrs_pipeline.messages import counted
from tfrs_pipeline.run.data import RunData
from tfrs_pipeline.run.folder import RunFolder, name_of_log, own_version, trained_by
from tfrs_pipeline.run.measure import Measured
from tfrs_pipeline.run.refresh import describe_undone
from tfrs_pipeline.run.steps import Runner, Step
from tfrs_pipeline.serving.export import ExportOptions, describe_index, export_version
from tfrs_pipeline.serving.gate import IN_SERVICE, refuse_beaten, refuse_worse
from tfrs_pipeline.serving.index import search_of
from tfrs_pipeline.serving.publish import MANIFEST_FILE, NotPublished

_NOT_EXPORTED: dict[str, Any] = {"index": {"kind": "none, not published"}, "export_folder": None}


def export_step(config: RunConfig, folder: RunFolder) -> Step:
    """Returns the step that exports a run's model; it makes the export's part of metrics.json."""
    make, read = (functools.partial(x, config, folder) for x in (_export_best, _read_exported))
    place = "export.directory/NAME/VERSION/"
    return Step("export", ("samples", "measured"), "version", make, read, place)


def _read_exported(
    config: RunConfig, folder: RunFolder, runner: Runner, *_: Any
) -> dict[str, Any] | None:
    """Reads the version that this training has exported, unless the index settings have changed."""
    version = own_version(config, folder.path)
    if version is None:
        return None
    manifest = read_record(version / MANIFEST_FILE, check_files=False)
    export = config.export.model_dump(mode="json")
    then = manifest["config"]["export"]
    if export["index"] != "none" and any(then[x] != export[x] for x in ("index", "target_recall")):
        return None
    runner.note(f"{version}, exported before the run was stopped, is kept")
    return {"index": manifest["index"], "export_folder": str(version.resolve())}


def _export_best(
    config: RunConfig, folder: RunFolder, runner: Runner, data: RunData, measured: Measured
) -> dict[str, Any]:
    """Exports the two-tower model, unless a baseline or the version in service is better."""
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
    # No item was read before the older file. A resumed run may have rewritten its settings.
    files = folder.config_file, folder.data / "log.json"
    began = datetime.fromtimestamp(min(file.stat().st_mtime for file in files), UTC)
    if (undone := describe_undone(config.model_folder, began, listed)) is not None:
        runner.note(undone)
    search = search_of(export.index, export.target_recall)
    version, manifest = export_version(
        measured.models["two_tower"],
        config.model_folder,
        ExportOptions(search, export.filter_by, export.keep_versions),
        user_data=export.user_data,
        # A ScaNN index is tuned and measured on these. The first user is the manifest's example.
        queries=data.test.as_queries(),
        manifest={
            "config": config.model_dump(mode="json"),
            **_made_by(config, folder),
            "counts": data.final.report,
            "metrics": measured.evaluation.summary()["models"]["two_tower"],
            "items_read": began.isoformat(),
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


def _pass_gate(config: RunConfig, folder: RunFolder, measured: Measured) -> Iterator[str]:
    """Compares the model with the baselines, and with the version in service if that is measured.

    It is not compared with its own export. Yields notes; raises `NotPublished` if it is worse.
    """
    export, monitor, models = config.export, config.training.monitor, config.model_folder
    evaluation = measured.evaluation
    baselines = [x for x in evaluation.results if x not in (*measured.models, IN_SERVICE)]
    kept = f"{models} stays as it is. The trained run is kept: --run-dir {folder.path} with"
    try:
        refuse_beaten(evaluation, monitor, baselines)
    except NotPublished as error:
        if not export.if_beaten:
            raise NotPublished(f"{error} {kept} --export.if_beaten exports it anyway.") from None
        yield f"exported anyway, as export.if_beaten allows: {error}"
    if IN_SERVICE not in evaluation.results:
        yield from ["no version is in service yet"] if export.gate else []
        return
    try:
        yield refuse_worse(evaluation, monitor, models, without=own_version(config, folder.path))
    except NotPublished as error:
        if export.gate:
            raise NotPublished(f"{error} {kept} --no-export.gate exports it anyway.") from None
        yield f"exported anyway, without the gate: {error}"


def _made_by(config: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """Returns the training and the data behind a version."""
    data = folder.data
    tables = [file for table in sorted(data.glob("*.parquet")) for file in part_files(table)]
    return {
        "run": str(folder.path.resolve()),
        "log": name_of_log(config.data),
        "data": {file.relative_to(data).as_posix(): file_hash(file) for file in tables},
        "training": trained_by(folder.path),
    }
