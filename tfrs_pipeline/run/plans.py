"""How the models of a run are trained: as its settings, its race or the run before it says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import PositiveFloat, PositiveInt

from tfrs_pipeline import durable
from tfrs_pipeline.answers.publish import MANIFEST_FILE, version_at
from tfrs_pipeline.config import RunConfig, with_settings
from tfrs_pipeline.model.settings import TrainingSettings, TwoTowerSettings, shape_problems
from tfrs_pipeline.run.folder import MODEL, UNCORRECTED, RunFolder, check_model_name
from tfrs_pipeline.settings import Config, ConfigError, refuse

IALS = "ials"
"""The name of iALS in an ensemble: it has a weight and no plan, and is fitted anew."""


class Plan(Config):
    """The settings of a training, in place of those of the run."""

    model: TwoTowerSettings
    training: TrainingSettings
    epochs: PositiveInt | None = None
    """Epochs that it had in the race, by which its weight was chosen; None trains to its end."""

    @classmethod
    def of(cls, config: RunConfig, epochs: int | None = None) -> Self:
        """Returns the plan by which a run of these settings trains."""
        return cls(model=config.model, training=config.training, epochs=epochs)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by dotted name."""
        return {
            f"{table}.{name}": value
            for table in ("model", "training")
            for name, value in getattr(self, table)
        }


class Ensemble(Config):
    """The models whose weighted sum a run exports, the best first; or one alone."""

    weights: dict[str, PositiveFloat]
    """What a member's score is multiplied by, in units of its spread over items."""
    plans: dict[str, Plan]
    """How each member is trained, without iALS."""

    @property
    def best(self) -> tuple[str, Plan]:
        """The name and the plan of the best member alone."""
        return next(iter(self.plans.items()))

    @property
    def is_sum(self) -> bool:
        """Whether there are several members."""
        return len(self.weights) > 1

    def training(self, name: str) -> tuple[str, Plan]:
        """Returns the folder and the plan of a training by its name in the results.

        That of the run's model is its only member's. The uncorrected one has the best member's
        settings.
        """
        best, plan = self.best
        if name == UNCORRECTED:
            model = plan.model.model_copy(update={"correction": "none"})
            return name, Plan(model=model, training=plan.training)
        return (best, plan) if name == MODEL else (name, self.plans[name])


def ensemble_of(config: RunConfig, race: Mapping[str, Any] | None = None) -> Ensemble:
    """Returns what a run trains, by the record of its race if it has one.

    Where the names of the given settings are known (`fixed`), a warm start from a sum starts each
    member from its own. Else the run trains one model by its settings.
    """
    if race is not None:
        return Ensemble(**race["ensemble"])
    if config.warm_start is not None and config.fixed:
        source = ensemble_in(config.warm_start)
        if source.is_sum:
            plans = {name: _begun(config, name, plan) for name, plan in source.plans.items()}
            return Ensemble(weights=source.weights, plans=plans)
    return Ensemble(weights={MODEL: 1.0}, plans={MODEL: Plan.of(config)})


def ensemble_in(folder: Path) -> Ensemble:
    """Reads what a finished run has trained; a `ValueError` if it is not finished."""
    return Ensemble(**RunFolder(folder).results()["ensemble"])


def training_in(folder: Path, name: str) -> tuple[Path, Plan] | None:
    """Returns the folder and the plan of a training of a finished run; None if it has no such."""
    run = RunFolder(folder)
    if name not in run.results()["training"]:
        return None
    path, plan = ensemble_in(folder).training(name)
    return run.checkpoints / path, plan


def models_of(config: RunConfig) -> list[str]:
    """Returns the names of the models that a run trains: its own, and what that is compared with.

    A race leaves out the uncorrected model, unless it is named, to save a second long training.
    """
    # The same model without the correction shows what the correction is worth on this log.
    is_compared = "uncorrected" in config.evaluation.baselines and config.model.correction != "none"
    saves_it = bool(config.recipes) and "evaluation.baselines" not in config.fixed
    return [MODEL, *([UNCORRECTED] if is_compared and not saves_it else [])]


def resolve_settings(config: RunConfig, folder: RunFolder) -> RunConfig:
    """Returns the settings by which a run in a folder trains; refuses a model name or a source.

    `warm_start` becomes the folder of a finished run of the same shape. If the names of the given
    settings are known (`fixed`), other settings of the model, its training, the baselines,
    `evaluation.exclude` and `evaluation.by` come from that run, such as those of a recipe that won
    there. If it began from random weights, `training.max_epochs` becomes a fifth of the epochs that
    it needed, 2 or more: a warm start needs no more (docs/guides/daily.md). A started run keeps its
    own.
    """
    check_model_name(config)
    if config.warm_start is None:
        return config
    path = _source(config.warm_start, folder)
    source, is_begun = RunFolder(path), folder.has_begun()
    if config.fixed:
        theirs = (folder if is_begun else source).settings()
        plan = Plan.of(theirs) if is_begun else ensemble_in(path).best[1]
        changes = plan.settings | _fewer_epochs(source, theirs, MODEL, plan)
        # Rankings that exclude other items would be another service's.
        for name in ("exclude", "by", "baselines"):
            changes[f"evaluation.{name}"] = getattr(theirs.evaluation, name)
        if not is_begun and UNCORRECTED not in source.results()["training"]:
            # An uncorrected model would begin from random weights.
            baselines = theirs.evaluation.baselines
            kept = tuple(name for name in baselines if name != "uncorrected")
            changes["evaluation.baselines"] = kept
        config = with_settings(config, changes, fixed=config.fixed)
    if folder.metrics() is None:  # A finished run needs no source any more.
        refuse(shape_problems(ensemble_in(path).best[1].model, config.model))
    return config.model_copy(update={"warm_start": path})


def _begun(config: RunConfig, name: str, plan: Plan) -> Plan:
    """Returns the plan of a member that starts from the same member of the run `warm_start`."""
    assert config.warm_start is not None
    source = RunFolder(config.warm_start)
    changes = plan.settings | _fewer_epochs(source, source.settings(), name, plan)
    return Plan.of(with_settings(config, changes, fixed=config.fixed))


def _fewer_epochs(source: RunFolder, theirs: RunConfig, name: str, plan: Plan) -> dict[str, int]:
    """Returns `training.max_epochs` of a warm start: a fifth of the source's best epoch, or 2.

    Where the rate decays over all epochs, the warm-up becomes shorter in proportion.
    """
    if theirs.warm_start is not None:  # That run's number is already a fifth.
        return {}
    training = plan.training
    num_epochs = max(2, -(-source.results()["training"][name]["best_epoch"] // 5))
    changes = {"training.max_epochs": num_epochs}
    if training.decay != "none":
        num_steps = training.warmup_steps * num_epochs // training.max_epochs
        changes["training.warmup_steps"] = num_steps
    return changes


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
