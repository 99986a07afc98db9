"""Races recipes: trains them side by side, in rounds; the best on validation wins."""

import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import tensorflow as tf

from tfrs_pipeline.config import RunConfig, with_settings
from tfrs_pipeline.data.held_out_queries import Holdout, check_holdout
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.durable import hold_to, read_whole, write_record
from tfrs_pipeline.evaluation.baselines import Ials
from tfrs_pipeline.evaluation.bootstrap import Outcome, mean_interval
from tfrs_pipeline.evaluation.evaluate import measure_vectors
from tfrs_pipeline.evaluation.metrics import metric_of
from tfrs_pipeline.messages import Progress, suggest, written
from tfrs_pipeline.model.corpus import MADE_OF_FILE, TrainingSet
from tfrs_pipeline.model.distribution import on_chief
from tfrs_pipeline.model.ensemble import FittedSum, Model, vectors_of
from tfrs_pipeline.model.ensemble_choice import Choice, choose
from tfrs_pipeline.model.fit import Diverged
from tfrs_pipeline.model.fitted_model import FittedTwoTower, encoder_of
from tfrs_pipeline.model.ials import FittedIals
from tfrs_pipeline.model.projection import Vectors
from tfrs_pipeline.presets import PRESETS, RECIPES, Recipe
from tfrs_pipeline.run.data import RunData
from tfrs_pipeline.run.folder import MODEL, RACE_FILE, RunFolder
from tfrs_pipeline.run.plans import IALS, Ensemble, Plan
from tfrs_pipeline.run.race_rule import Curve, Turn, in_cpu_time, next_turn
from tfrs_pipeline.run.steps import RunContext, Step, give_back_memory
from tfrs_pipeline.run.training import check_plan, plan_of, queries_of
from tfrs_pipeline.settings import ConfigError, refuse

# Validation chooses from these values of `model.history_shrinkage`, or none, for each recipe.
SHRINKAGES = (1.0, 4.0)


def forget_networks() -> None:
    """Frees the memory of earlier trainings, so that only one network is in memory at a time."""
    tf.keras.backend.clear_session()
    give_back_memory()


@dataclass(frozen=True)
class Race:
    """A decided race: the curves of the recipes, and the validation metric that decided.

    `not_begun` says, by recipe, why it did not race. `choice` says which of the models are summed;
    it is None if no sum was tried (`members` 1). `configs` has the settings of each recipe, with
    the `model.history_shrinkage` that validation chose, and `best_values` its value of the metric
    with it. `was_cut` says that the budget ended the race before the curves decided.
    """

    curves: Sequence[Curve]
    metric: str
    not_begun: Mapping[str, str] = dataclasses.field(default_factory=dict)
    choice: Choice | None = None
    configs: Mapping[str, RunConfig] = dataclasses.field(default_factory=dict)
    best_values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    was_cut: bool = False

    @property
    def winner(self) -> str:
        """Name of the recipe that won: the first of those with the best value."""
        return min(self.curves, key=self._rank).name

    def _rank(self, curve: Curve) -> tuple[bool, float]:
        return bool(curve.failure), -self.best_values.get(curve.name, curve.best)

    @property
    def weights(self) -> Mapping[str, float]:
        """The weights of the recipes whose models are summed, the winner first; or its own, 1."""
        return {self.winner: 1.0} if self.choice is None else self.choice.weights

    @property
    def ensemble(self) -> Ensemble:
        """What a run trains after the race, each member for as many epochs as it had there."""
        epochs = {curve.name: len(curve.values) for curve in self.curves}
        plans = {x: Plan.of(self.configs[x], epochs[x]) for x in self.weights if x != IALS}
        return Ensemble(weights=self.weights, plans=plans)

    def lines(self) -> list[str]:
        """Describes the race in a line for each recipe, the winner first."""
        first, *others = sorted(self.curves, key=self._rank)
        spent = sum(curve.spent for curve in self.curves)
        return [
            f"{first.name} won: validation {self.metric} {self._best(first)} after epoch "
            f"{first.best_epoch}; its epochs took {first.spent:.0f} of all {spent:.0f} CPU seconds",
            *(
                f"{curve.name}: best {self._best(curve)} after epoch {curve.best_epoch} of "
                f"{len(curve.values)}, in {curve.spent:.0f} CPU seconds"
                if curve.values and not curve.failure
                else f"{curve.name}: {curve.failure or 'not trained before the budget ended'}"
                for curve in others
            ),
            *(f"{name} did not race: {why}" for name, why in self.not_begun.items()),
            *(["the budget ended the race: others might still have won"] if self.was_cut else ()),
            *(self.choice.lines() if self.choice else ()),
        ]

    def _best(self, curve: Curve) -> str:
        """Words a recipe's best value, and the one with the shrinkage that validation chose."""
        without = f"{curve.best:.4f}"
        value = f"{self.best_values.get(curve.name, curve.best):.4f}"
        if value == without:
            return without
        shrinkage = self.configs[curve.name].model.history_shrinkage
        return f"{value} with model.history_shrinkage {shrinkage:g} ({without} without)"

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def as_metrics(self) -> dict[str, Any]:
        """Returns the race as an entry of metrics.json."""
        curves = {
            curve.name: {"values": curve.values, "seconds": curve.seconds} for curve in self.curves
        }
        return {
            "winner": self.winner,
            "metric": self.metric,
            "recipes": curves,
            "sum": None if self.choice is None else dataclasses.asdict(self.choice),
            "lines": self.lines(),
        }


def race(
    train: Log,
    validation: Holdout,
    *,
    recipes: Sequence[str | Recipe] = RECIPES,
    settings: Mapping[str, Any] | None = None,
    budget: float | None = None,
    members: int = 5,
    seed: int = 0,
    folder: Path | str | None = None,
    progress: Progress | None = None,
) -> tuple[Model, Race]:
    """Races recipes on validation; returns the sum of the best models, or the winner, and the race.

    The winner is trained to its end. If its sum with models of other recipes or iALS is better on
    validation, the sum is returned, rotated to the winner's dimensions (see `FittedSum`).

    Args:
        train: The training part.
        validation: Decides the race, and chooses the winner's epoch. In a split by time, a run asks
            by request: `split.holdout("validation", by="requests")`.
        recipes: Names of the package's recipes, and your own.
        settings: Settings of the model, its training, `evaluation.exclude` and
            `evaluation.cutoffs`, by dotted name, for all recipes.
        budget: CPU seconds of all recipes together, after which the leader wins and is trained to
            its end: that training is not bounded. If None, recipes race until their curves decide.
        members: Most models in the sum; 1 returns the winner alone.
        seed: Seed of everything random.
        folder: Keeps samples and trainings, so that a stopped race can resume with the same log and
            settings; None is temporary.
        progress: Shows the epochs; None writes them to a notebook's cell, or to standard error
            if it is a terminal.

    Raises:
        ConfigError: If a name or setting is unknown, a value or a recipe of your own is impossible
            with the settings, or no recipe is named.
        TypeError: If `validation` is no holdout, or `recipes` is not a sequence.
        ValueError: If no recipe can train, all diverge, the folder holds other trainings, or there
            is no positive (`DataError`).

    Example:
        A recipe of your own against two of the package's::

            train, validation, test = log.split("time")
            # Batches of whole sequences take no in-batch negatives.
            negatives = [tp.Uniform(512), tp.Popularity(512)]
            by_user = {"training.examples": "sequences", "model.negatives": negatives}
            wide = tp.Recipe("wide", {"model.dim": 256, **by_user})
            model, race = tp.race(train, validation, recipes=["default", "sequence", wide])
            print(race)
    """
    check_holdout(validation)
    is_list = isinstance(recipes, Sequence) and not isinstance(recipes, str)
    if not is_list or not all(isinstance(recipe, str | Recipe) for recipe in recipes):
        raise TypeError(f"recipes must be a list of names or tp.Recipe. Received: {recipes!r:.200}")
    entrants = [_recipe_named(entry) if isinstance(entry, str) else entry for entry in recipes]
    if len({recipe.name for recipe in entrants}) < max(1, len(entrants)):
        names = [recipe.name for recipe in entrants]
        refuse([("recipes", f"got {names}; name one or more, each once: {', '.join(RECIPES)}")])
    refuse(
        ("recipes", f"got a recipe named {recipe.name!r}, as one of the package: rename yours")
        for recipe in entrants
        if recipe.name == IALS or PRESETS.get(recipe.name, recipe) != recipe
    )
    options: dict[str, Any] = {"fixed": tuple(settings or ()), "members": members}
    options |= {} if budget is None else {"budget": budget}  # Checked like that of a run.
    config = with_settings(RunConfig(seed=seed), {**(settings or {}), **options})
    read = "model.", "training.", "evaluation.exclude.", "evaluation.cutoffs."
    message = "a race reads only model, training, evaluation.exclude and evaluation.cutoffs"
    refuse((name, message) for name in settings or () if not f"{name}.".startswith(read))
    for recipe in entrants:
        # One of the package that the settings contradict is left out, as if the log did.
        if recipe.name not in PRESETS:
            try:
                with_settings(config, recipe.settings, fixed=config.fixed)
            except ConfigError as error:
                raise ConfigError(error.problems, f"recipe {recipe.name!r}") from None
    with ExitStack() as stack:
        path = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        data = TrainingSet.build(train, path / "samples", seed=seed, hard=config.model.hard)
        run = RunContext(config, RunFolder(path), progress or written())
        racing = _Racing(run, entrants, data, validation)
        racing.refuse_other_trainings()
        decided = racing.decide(math.inf if budget is None else config.budget)
        models = {name: racing.model(name) for name in decided.weights}
        model: Model = models[decided.winner]
        if len(models) > 1:
            queries = queries_of(config, validation).queries
            model = FittedSum.of(models, decided.weights, queries)
        return model.with_bonus(validation, config.evaluation.exclude, seed), decided


class _Chosen(NamedTuple):
    """A recipe's settings with the chosen shrinkage, the metric with it, and the vectors."""

    config: RunConfig
    value: float
    vectors: Vectors


class _Racing:
    """A race in the folder of a run, where each training resumes.

    Attributes:
        configs: The settings of each recipe that races, by name.
        not_begun: Why other recipes do not race, by name.
        curves: What each recipe has reached so far, by name.
    """

    def __init__(
        self, run: RunContext, entrants: Iterable[Recipe], data: TrainingSet, validation: Holdout
    ) -> None:
        self._run, self._data, self._validation = run, data, validation
        self._metric = run.config.training.monitor
        self._truth = queries_of(run.config, validation)
        self.configs, self.not_begun = trainable_recipes(run.config, data, entrants)
        self.curves = {
            name: Curve(name, num_left=config.training.max_epochs)
            for name, config in self.configs.items()
        }
        self.curves |= self._recorded_curves()  # Those of a race that was stopped.
        self._chosen: dict[str, _Chosen] = {}  # By recipe, once its epochs are over.

    def decide(self, budget: float) -> Race:
        """Races until the budget is spent, trains the winner to its end, and chooses the sum."""
        while isinstance(turn := next_turn(self.curves, budget), Turn):
            self._train(turn)
        while True:  # Until the winner has trained to its end, where it may still diverge.
            for name, curve in self.curves.items():
                if curve.values and not curve.failure and name not in self._chosen:
                    self._chosen[name] = self._choose_shrinkage(name)
            race = Race(
                [*self.curves.values()],
                self._metric,
                self.not_begun,
                best_values={name: chosen.value for name, chosen in self._chosen.items()},
                was_cut=turn,
            )
            winner = self.curves[race.winner]
            if winner.failure:  # All have diverged.
                raise Diverged(f"{winner.name}: {winner.failure}")
            if not winner.num_left:
                break
            # The budget does not bound this training, so its time is told.
            seconds = winner.num_left * winner.epoch_seconds
            most = f", at most about {in_cpu_time(seconds)}" if seconds else ""
            task = f"the winner trains on{most}: {winner.name}"
            self._train(Turn(winner.name, winner.num_epochs, task))
            # It is of fewer epochs; a single recipe has none, since it has not trained before.
            self._chosen.pop(winner.name, None)
        # After the race, because its epochs were measured without shrinkage.
        self.configs |= {name: chosen.config for name, chosen in self._chosen.items()}
        choice = self._choose_ensemble(race.winner) if self._run.config.members > 1 else None
        return dataclasses.replace(race, choice=choice, configs=self.configs)

    def model(self, name: str) -> Any:
        """Reads back the model of a recipe, as trained so far; fits iALS."""
        if name == IALS:
            self._run.progress.task(name, 0, 0)
            return FittedIals.fit(Ials(seed=self._run.config.seed), self._data.log)
        return self._fit(Turn(name, len(self.curves[name].values), f"reads {name}"))[0]

    def refuse_other_trainings(self) -> None:
        """Refuses trainings of other settings, which a race in Python may find in its folder."""
        for name, config in self.configs.items():
            folder = self._folder_of(name)
            folder.mkdir(parents=True, exist_ok=True)
            plan, exclude = plan_of(config, MODEL), config.evaluation.exclude
            hold_to(folder / MADE_OF_FILE, plan.made_of(self._data.log, self._validation, exclude))

    def _folder_of(self, name: str) -> Path:
        # Where a run then reads the training; a user's recipe may have any name.
        return self._run.folder.checkpoints / quote(name, safe=" ") / "selection"

    def _fit(self, turn: Turn) -> tuple[FittedTwoTower, list[float]]:
        """Trains a recipe up to a number of epochs; returns it, and the CPU clock at their ends."""
        forget_networks()
        config, clock = self.configs[turn.name], list[float]()
        model = plan_of(config, MODEL).fit_samples(
            self._data,
            self._validation,
            max_epochs=turn.num_epochs,
            folder=self._folder_of(turn.name),
            exclude=config.evaluation.exclude,
            cutoffs=config.evaluation.cutoffs,
            on_epoch=lambda so_far: clock.append(time.process_time()),
            tell=lambda done, line: self._run.progress.task(turn.task, done, turn.num_epochs, line),
        )
        return model, clock

    def _train(self, turn: Turn) -> None:
        """Trains a recipe and records its curve; one that diverges drops out."""
        curve, training = self.curves[turn.name], self.configs[turn.name].training
        try:
            model, clock = self._fit(turn)
        except Diverged as error:
            self._record(dataclasses.replace(curve, failure=f"dropped out. {error}"))
            return
        result, seconds = model.result, curve.epoch_seconds
        if not seconds:  # Timed once, so that a resumed race decides as it would have done.
            timed = np.diff(clock)  # The first epoch, in which the network is built, is left out.
            seconds = float(np.median(timed)) if len(timed) else result.seconds / result.num_epochs
        is_over = result.num_waited >= training.patience
        num_left = 0 if is_over else training.max_epochs - result.num_epochs
        values = result.history[f"val_{training.monitor}"]
        self._record(Curve(turn.name, values, seconds, num_left))

    def _record(self, curve: Curve) -> None:
        self.curves[curve.name] = curve
        content = {"curves": [dataclasses.asdict(curve) for curve in self.curves.values()]}
        on_chief(lambda: write_record(self._run.folder.curves_file, content))
        self.curves.update(self._recorded_curves())  # The chief's clock decides for all workers.

    def _recorded_curves(self) -> dict[str, Curve]:
        # A recipe that can no longer train is left out.
        record = on_chief(lambda: read_whole(self._run.folder.curves_file)) or {"curves": []}
        curves = [Curve(**content) for content in record["curves"]]
        return {curve.name: curve for curve in curves if curve.name in self.configs}

    def _choose_shrinkage(self, name: str) -> "_Chosen":
        """Chooses the best one, if it is better than none beyond the 95% interval."""
        truth, metric = self._truth, metric_of(self._metric)
        model, setting = self.model(name), self.configs[name].model.history_shrinkage
        trials = {setting: vectors_of(model, truth.queries, truth.items)}
        for shrinkage in SHRINKAGES if setting is None else ():
            model.network.shrinkage = shrinkage
            queries = encoder_of(model.towers)(truth.queries)
            trials[shrinkage] = trials[None]._replace(queries=queries)
        model.network.shrinkage = setting
        measured = {
            shrinkage: measure_vectors(trial.queries, trial.candidates, truth, metric)
            for shrinkage, trial in trials.items()
        }

        def best() -> tuple[float | None, float]:
            highest = max(measured, key=lambda shrinkage: np.nanmean(measured[shrinkage]))
            gain = mean_interval(measured[highest] - measured[setting], truth.user_ids)
            shrinkage = highest if gain.outcome is Outcome.BETTER else setting
            return shrinkage, float(np.nanmean(measured[shrinkage]))

        # One process decides, because others may round differently.
        shrinkage, value = on_chief(best)
        config = with_settings(self.configs[name], {"model.history_shrinkage": shrinkage})
        return _Chosen(config, value, trials[shrinkage])

    def _choose_ensemble(self, winner: str) -> Choice:
        truth, metric = self._truth, metric_of(self._metric)
        vectors = {name: chosen.vectors for name, chosen in self._chosen.items()}
        vectors[IALS] = vectors_of(self.model(IALS), truth.queries, truth.items)
        self._run.progress.task("chooses the sum", 0, 0)
        num = self._run.config.members
        choose_members = partial(choose, vectors, truth, metric, winner=winner, max_members=num)
        return Choice(**on_chief(lambda: dataclasses.asdict(choose_members())))


def _recipe_named(name: str) -> Recipe:
    if name not in PRESETS:
        raise ConfigError([("recipes", f"got {name!r}; {suggest(name, PRESETS)}")])
    return PRESETS[name]


def race_step() -> Step:
    """Returns the step that races a run's recipes.

    Its artifact is the record of the race: "race" has its entry of metrics.json (`Race.as_metrics`)
    and "ensemble" what it found: the `Ensemble` that the run trains on. The trainings of its
    members stay as their first ones; those of other recipes are removed.
    """

    def make(run: RunContext, samples: RunData) -> dict[str, Any]:
        entrants = [PRESETS[name] for name in run.config.recipes]
        racing = _Racing(run, entrants, samples.selection, samples.validation)
        race = racing.decide(run.config.budget)
        record = {
            "race": {**race.as_metrics(), "budget": run.config.budget},
            "ensemble": race.ensemble.model_dump(mode="json"),
        }

        def keep() -> None:
            # Before the others are removed, since a race that is decided again would train them.
            write_record(run.folder.race_file, record)
            for name in racing.curves.keys() - race.weights.keys():
                shutil.rmtree(run.folder.checkpoints / name, ignore_errors=True)

        on_chief(keep)
        return record

    def read(run: RunContext, samples: RunData) -> dict[str, Any] | None:
        record: dict[str, Any] | None = on_chief(lambda: read_whole(run.folder.race_file))
        return record

    def lines(record: dict[str, Any]) -> list[str]:
        return list(record["race"]["lines"])

    return Step("race", ("samples",), "race", make, RACE_FILE, read, lines, workers="all")


def planned(config: RunConfig, recipe: Recipe) -> RunConfig:
    """Returns the config with a recipe's settings, except for those that are fixed."""
    return with_settings(config, recipe.of_training(), fixed=config.fixed)


def trainable_recipes(
    config: RunConfig, data: TrainingSet, entrants: Iterable[Recipe] | None = None
) -> tuple[dict[str, RunConfig], dict[str, str]]:
    """Returns the settings of each recipe that can train, and why the others are not begun.

    The `entrants` are those that the config names, if they are not given. Raises the error of the
    first one if none can train: the others may fail by their own settings.
    """
    configs: dict[str, RunConfig] = {}
    refused: dict[str, ValueError] = {}
    for recipe in entrants or [PRESETS[name] for name in config.recipes]:
        try:
            settings = planned(config, recipe)
            check_plan(plan_of(settings, MODEL), data)
            if same := [name for name, other in configs.items() if other == settings]:
                raise ValueError(f"your settings make it equal to {same[0]}")
            configs[recipe.name] = settings
        except ValueError as error:
            refused[recipe.name] = error
    if not configs:
        raise next(iter(refused.values()))
    return configs, {name: str(error) for name, error in refused.items()}
