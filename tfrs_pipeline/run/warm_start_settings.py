"""Settings that a run takes from a finished run that it starts from, or from its own race."""

from collections.abc import Collection
from pathlib import Path

from tfrs_pipeline import durable
from tfrs_pipeline.config import MemberConfig, RunConfig, plan_settings, with_settings
from tfrs_pipeline.model.settings import shape_problems
from tfrs_pipeline.run.folder import RunFolder, check_model_name
from tfrs_pipeline.service.publish import MANIFEST_FILE, version_at
from tfrs_pipeline.settings import ConfigError, refuse


def resolve_settings(
    config: RunConfig, folder: RunFolder, fixed: Collection[str] | None = None
) -> RunConfig:
    """Returns the settings by which a run in a folder trains; refuses a model name or a source.

    If a race of these settings was decided there, they are its winner's. The source is the run to
    start from; `fixed` names the settings that it does not replace, None all of them.
    """
    check_model_name(config)
    config = with_source(config, folder, fixed)
    asked = folder.settings_before_race() if config.recipes else None
    # How to export may change, and `RunFolder.claim` refuses what may not.
    export = {"export": config.export.model_dump()}
    if asked is None or with_settings(asked, export) != config:
        return config
    return with_settings(folder.settings(), export)


def with_source(
    config: RunConfig, folder: RunFolder, fixed: Collection[str] | None = None
) -> RunConfig:
    """Returns the settings with `warm_start` as a finished run of the same shape, or refuses.

    If the names of the `fixed` settings are known, other settings of the model, its training,
    the baselines, `evaluation.exclude` and `evaluation.by` come from the source, such as those of a
    recipe that won there. If the source began from random weights, `training.max_epochs` becomes
    a fifth of the epochs that it needed, 2 or more: a warm start needs no more
    (docs/guides/daily.md). A started run keeps its own.
    """
    if config.warm_start is None:
        return config
    source = _source(config.warm_start, folder)
    run = RunFolder(source)
    if fixed is not None:
        theirs = (folder if folder.has_begun() else run).settings()
        changes = plan_settings(theirs) | _fewer_epochs(run, theirs, "two_tower")
        # Rankings that exclude other items would be another service's. An uncorrected model that
        # the source did not train would begin from random weights.
        for name in ("exclude", "by", "baselines"):
            changes[f"evaluation.{name}"] = getattr(theirs.evaluation, name)
        config = with_settings(config, changes, fixed=fixed)
        begun = {name: _begun_from(run, theirs, name, config, fixed) for name in theirs.trained}
        config = with_settings(config, {"summed": {**theirs.summed, **begun}})
    if folder.metrics() is None:  # A finished run needs no source any more.
        run.results()  # Refuses one that is not finished.
        refuse(shape_problems(run.settings().model, config.model))
    return config.model_copy(update={"warm_start": source})


def _fewer_epochs(source: RunFolder, theirs: RunConfig, name: str) -> dict[str, int]:
    """Returns `training.max_epochs` of a warm start: a fifth of the source's best epoch, or 2.

    Where the rate decays over all epochs, the warm-up becomes shorter in proportion.
    """
    if theirs.warm_start is not None:  # That run's number is already a fifth.
        return {}
    training = (theirs.trained.get(name) or theirs).training
    num_epochs = max(2, -(-source.results()["training"][name]["best_epoch"] // 5))
    changes = {"training.max_epochs": num_epochs}
    if training.decay != "none":
        num_steps = training.warmup_steps * num_epochs // training.max_epochs
        changes["training.warmup_steps"] = num_steps
    return changes


def _begun_from(
    source: RunFolder, theirs: RunConfig, name: str, config: RunConfig, fixed: Collection[str]
) -> MemberConfig:
    """Returns the settings of a sum's member that starts from the same member in the source."""
    member = theirs.trained[name]
    changes = {"summed": {}, **plan_settings(member), **_fewer_epochs(source, theirs, name)}
    plan = with_settings(config, changes, fixed=fixed)
    return MemberConfig(weight=member.weight, model=plan.model, training=plan.training)


def _source(path: Path, folder: RunFolder) -> Path:
    """Returns the run to start from: the one in a folder, or the one that a manifest names."""
    if RunFolder(path).config_file.is_file():
        return path
    # A started run keeps its source: by now the model has other versions, or the source is gone.
    if folder.has_begun() and (source := folder.settings().warm_start) is not None:
        return source
    try:
        version = version_at(path)
    except FileNotFoundError as error:
        what = "which is neither a run's folder nor an exported model's"
        raise _refused(f"got {str(path)!r}, {what}. {error}") from None
    manifest = durable.read_record(version / MANIFEST_FILE, check_files=False)
    if "run" not in manifest:
        raise _refused(
            f"{version} was exported from Python: no run holds its optimizer state. Use "
            "TwoTower.fit(warm_start=...) there"
        )
    source = Path(manifest["run"])
    if RunFolder(source).trained_by() != manifest["training"]:
        raise _refused(
            f"{version} was made by a run in {source}, which is gone with its optimizer state, or "
            "another run is there now. Give a run's folder, or none to train from random weights"
        )
    return source


def _refused(message: str) -> ConfigError:
    return ConfigError([("warm_start", message)])
