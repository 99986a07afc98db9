"""Races recipes: trains them side by side, in rounds; the best on validation wins."""

import dataclasses
import functools
import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import tensorflow as tf

from tfrs_pipeline.config import IalsConfig, MemberConfig, RunConfig, with_settings
from tfrs_pipeline.data.held_out_queries import Holdout, check_holdout
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.durable import hold_to, read_whole, write_record
from tfrs_pipeline.evaluation.bootstrap import Outcome, mean_interval
from tfrs_pipeline.evaluation.evaluate import measure_vectors
from tfrs_pipeline.evaluation.metrics import metric_of
from tfrs_pipeline.messages import Progress, counted, suggest, written
from tfrs_pipeline.model.corpus import MADE_OF_FILE, TrainingSet
from tfrs_pipeline.model.distribution import on_chief
from tfrs_pipeline.model.fit import Diverged
from tfrs_pipeline.model.fitted_model import FittedTwoTower, encoder_of
from tfrs_pipeline.model.ials import FittedIals
from tfrs_pipeline.model.sums import Choice, FittedSum, Model, Vectors, choose, vectors_of
from tfrs_pipeline.presets import PRESETS, RECIPES, Recipe
from tfrs_pipeline.run.data import RunData
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.steps import RunContext, Step, give_back_memory
from tfrs_pipeline.run.training import check_plan, ials_of, plan_of, queries_of, trains_winner_alone
from tfrs_pipeline.settings import ConfigError, refuse

# Recipes are compared for the first time at the CPU time that this many epochs of the slowest take.
# With 5, noise in the first epochs decides: docs/explanation/tried.md has replays of both numbers.
FIRST_EPOCHS = 8
# A trailing recipe trains on if this many times its gain in the second half of its time would bring
# it to the leader's best. Self-attention rises late: it may be a quarter behind after nine epochs,
# and win.
STILL_TO_GAIN = 2.5
# It also trains on if that would bring it to this share of the leader's best, and this share of its
# own best is from the second half: a model that is a fifth behind alone may still improve a sum.
NEAR, RISES = 0.75, 0.01
# With a budget, a recipe first trains for this many epochs: the second one, in which no network is
# built, says how many more the budget allows.
TIMED_EPOCHS = 2
# Validation chooses from these values of `model.history_shrinkage`, or none, for each recipe.
SHRINKAGES = (1.0, 4.0)
# The name of iALS, which may join the sum although it does not race.
IALS = "ials"


def forget_networks() -> None:
    """Frees the memory of earlier trainings, so that only one network is in memory at a time."""
    tf.keras.backend.clear_session()
    give_back_memory()


@dataclass(frozen=True)
class Curve:
    """What a recipe has reached so far.

    `values` has the validation metric after each epoch. An epoch takes `epoch_seconds` of CPU time,
    without the building of the network, which each turn repeats. At most `num_left` more follow:
    none if its patience or its epochs are over. If its training diverged, `failure` says so, and
    the values are those before that turn: it neither wins nor joins a sum.
    """

    name: str
    values: Sequence[float] = ()
    epoch_seconds: float = 0.0
    num_left: int = 0
    failure: str = ""

    @property
    def seconds(self) -> list[float]:
        """CPU seconds up to the end of each epoch."""
        return [self.epoch_seconds * epoch for epoch in range(1, len(self.values) + 1)]

    @property
    def spent(self) -> float:
        """CPU seconds so far."""
        return self.epoch_seconds * len(self.values)

    @property
    def best(self) -> float:
        """Best value so far; minus infinity before the first epoch."""
        return max(self.values, default=-math.inf)

    @property
    def best_epoch(self) -> int:
        """Epoch, from 1, of the best value; 0 before the first."""
        return self.values.index(self.best) + 1 if self.values else 0

    @property
    def num_epochs(self) -> int:
        """Most epochs that it may have in the end."""
        return len(self.values) + self.num_left

    def epochs_by(self, seconds: float) -> int:
        """Returns how many epochs end within a number of CPU seconds."""
        # The term is for rounding: ten epochs take ten times the seconds of one.
        return math.floor(seconds / self.epoch_seconds + 1e-6) if self.epoch_seconds else 0

    def best_by(self, seconds: float) -> float:
        """Returns the best value within a number of CPU seconds, or of the first epoch."""
        return max(self.values[: max(1, self.epochs_by(seconds))], default=-math.inf)


@dataclass(frozen=True)
class Race:
    """A decided race: the curves of the recipes, and the validation metric that decided.

    `not_begun` says, by recipe, why it did not race. `choice` says which of the models are summed;
    it is None if the winner is kept without a look at sums. `configs` has the settings of each
    recipe, with the `model.history_shrinkage` that validation chose, and `best_values` its value
    of the metric with it.
    """

    curves: Sequence[Curve]
    metric: str
    not_begun: Mapping[str, str] = dataclasses.field(default_factory=dict)
    choice: Choice | None = None
    configs: Mapping[str, RunConfig] = dataclasses.field(default_factory=dict)
    best_values: Mapping[str, float] = dataclasses.field(default_factory=dict)

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
            "sum": None if self.choice is None else self.choice.as_dict(),
            "lines": self.lines(),
        }


def race_in_rungs(
    curves: dict[str, Curve],
    train: Callable[[str, int, str], object],
    budget: float = math.inf,
) -> None:
    """Trains recipes until one is left, all that are left have ended, or the budget is spent.

    Updates their `curves`. In the first round, each recipe is timed: it trains for `FIRST_EPOCHS`,
    or for `TIMED_EPOCHS` if there is a budget. In each further round, those that are left train up
    to the same CPU time t: first the time that `FIRST_EPOCHS` of the slowest take, then twice the
    time of the round before. A recipe trains on if its best value by t, plus what it can still
    gain, reaches the leader's best by t:

        best(t) + STILL_TO_GAIN * (best(t) - best(t / 2)) >= best of the leader(t);

    or, for the sum, if the left side reaches the share `NEAR` of the right one, and the gain since
    t / 2 is the share `RISES` of best(t) or more.

    This is successive halving (Jamieson and Talwalkar 2016), except that a recipe's own curve drops
    it, and not that half of the others are better: a slow starter that still rises may continue.

    Args:
        curves: Recipe -> its curve so far: without an epoch, or as an earlier process left it.
        train: Called with a recipe, the number of epochs to have in the end, and the name of the
            turn; replaces its curve.
        budget: CPU seconds of all recipes together. In a round, no recipe takes more than an equal
            share of what is left when the round begins, so that a small budget serves all.
    """
    # Epochs of each recipe after the turns so far. A race that resumes takes the same turns, with
    # the budget that was left at each, although its curves may be longer.
    reached = dict.fromkeys(curves, 0)
    diverged = set[str]()

    def unspent() -> float:
        return budget - sum(curves[name].epoch_seconds * reached[name] for name in curves)

    def turn(name: str, number: int, seconds: float = 0.0) -> None:
        curve, left = curves[name], [curves[name] for name in racing]
        num_epochs = curve.epochs_by(seconds)
        if number == 1:
            num_epochs = TIMED_EPOCHS if math.isfinite(budget) else FIRST_EPOCHS
        num_epochs = min(num_epochs, curve.num_epochs)
        if num_epochs <= reached[name] or unspent() <= 0:
            return
        if num_epochs <= len(curve.values):
            reached[name] = num_epochs
            return
        task = f"race, round {number}, {counted(len(racing), 'recipe')} left"
        if all(curve.values for curve in left):  # All are timed.
            most = min(unspent(), sum(curve.num_left * curve.epoch_seconds for curve in left))
            task += f", at most about {_in_cpu_time(most)}"
        leader = max(left, key=lambda curve: curve.best)
        leading = f" (leading: {leader.name}, {leader.best:.4f})" if leader.values else ""
        if not curve.failure:  # Otherwise it failed in this turn before the race was resumed.
            train(name, num_epochs, f"{task}: {name}{leading}")
        reached[name] = len(curves[name].values)  # Fewer if its patience is over.
        if curves[name].failure:
            diverged.add(name)

    racing = list(curves)
    if len(racing) < 2:
        return
    for name in racing:
        turn(name, 1)
    first = FIRST_EPOCHS * max(curve.epoch_seconds for curve in curves.values())
    seconds = min(first, budget / len(curves))
    for number in itertools.count(2):
        for name in racing:
            turn(name, number, seconds)
        racing = [name for name in racing if name not in diverged]
        if not racing:
            return
        best = {name: curves[name].best_by(seconds) for name in racing}
        gain = {name: best[name] - curves[name].best_by(seconds / 2) for name in racing}
        reach = {name: best[name] + STILL_TO_GAIN * gain[name] for name in racing}
        shares = {name: NEAR if gain[name] >= RISES * best[name] else 1.0 for name in racing}
        leading = max(best.values())
        # A custom metric may be negative. A share of the leader's best is then above that best.
        needed = {name: min(shares[name] * leading, leading) for name in racing}
        racing = [name for name in racing if reach[name] >= needed[name]]
        share = unspent() / len(racing)  # Equal, so that the last round has time for all.
        left = [name for name in racing if curves[name].num_epochs > reached[name]]
        if len(racing) == 1 or not any(0 < curves[name].epoch_seconds <= share for name in left):
            return
        seconds = min(2 * seconds, seconds + share)


def _in_cpu_time(seconds: float) -> str:
    if seconds <= 90:
        return f"{10 * math.ceil(seconds / 10)} CPU seconds"
    return counted(math.ceil(seconds / 60), "CPU minute")


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
        limit = math.inf if budget is None else config.budget
        decided, fitted = _race(run, entrants, data, validation, limit)
        models = {name: fitted(name) for name in decided.weights}
        model: Model = models[decided.winner]
        if len(models) > 1:
            queries = queries_of(config, validation).queries
            model = FittedSum.of(models, decided.weights, queries)
        return model.with_repeat_bonus(validation, config.evaluation.exclude, seed), decided


def _race(
    run: RunContext,
    entrants: Iterable[Recipe],
    data: TrainingSet,
    validation: Holdout,
    budget: float,
) -> tuple[Race, Callable[[str], Any]]:
    """Races in the folder of a run, where each training resumes; trains the winner to its end.

    Returns the race, and a function that returns a model by its name: it reads that of a recipe
    back, and fits iALS.
    """
    config, folder, progress = run.config, run.folder.race, run.progress
    configs, not_begun = trainable_recipes(config, data, entrants)
    curves = {
        name: Curve(name, num_left=settings.training.max_epochs)
        for name, settings in configs.items()
    }

    def recorded() -> dict[str, Curve]:
        # A recipe that can no longer train is left out.
        record = on_chief(lambda: read_whole(run.folder.curves_file)) or {"curves": []}
        read = [Curve(**content) for content in record["curves"]]
        return {curve.name: curve for curve in read if curve.name in configs}

    def train(name: str, num_epochs: int, task: str) -> FittedTwoTower:
        forget_networks()
        settings, clock = configs[name], list[float]()
        model = plan_of(settings, "two_tower").fit_samples(
            data,
            validation,
            max_epochs=num_epochs,
            folder=folder / quote(name, safe=" "),  # A user's recipe may have any name.
            exclude=settings.evaluation.exclude,
            cutoffs=settings.evaluation.cutoffs,
            on_epoch=lambda so_far: clock.append(time.process_time()),
            tell=lambda done, line: progress.task(task, done, num_epochs, line),
        )
        result, seconds = model.result, curves[name].epoch_seconds
        if not seconds:  # Timed once, so that a resumed race decides as it would have done.
            timed = np.diff(clock)  # The first epoch, in which the network is built, is left out.
            seconds = float(np.median(timed)) if len(timed) else result.seconds / result.num_epochs
        is_over = result.num_waited >= settings.training.patience
        num_left = 0 if is_over else settings.training.max_epochs - result.num_epochs
        values = result.history[f"val_{settings.training.monitor}"]
        record(Curve(name, values, seconds, num_left))
        return model

    def record(curve: Curve) -> None:
        curves[curve.name] = curve
        content = {"curves": [dataclasses.asdict(curve) for curve in curves.values()]}
        on_chief(lambda: write_record(run.folder.curves_file, content))
        curves.update(recorded())  # The chief's clock decides for all workers.

    def turn(name: str, num_epochs: int, task: str) -> None:
        """Trains a recipe; one that diverges drops out, and the others go on."""
        try:
            train(name, num_epochs, task)
        except Diverged as error:
            record(dataclasses.replace(curves[name], failure=f"dropped out. {error}"))

    def hold() -> None:
        """Refuses trainings of other settings, which a race in Python may find in its folder."""
        assert data.log is not None  # A race's samples come from a log.
        for name, settings in configs.items():
            kept = folder / quote(name, safe=" ")
            kept.mkdir(parents=True, exist_ok=True)
            plan, exclude = plan_of(settings, "two_tower"), settings.evaluation.exclude
            hold_to(kept / MADE_OF_FILE, plan.made_of(data.log, validation, exclude))

    on_chief(hold)
    curves |= recorded()  # Those of a race that was stopped.
    metric, truth = config.training.monitor, queries_of(config, validation)
    # By recipe: the shrinkage that validation chose, its value of the metric, its vectors.
    shrinkages: dict[str, float | None] = {}
    values: dict[str, float] = {}
    vectors: dict[str, Vectors] = {}

    def fitted(name: str) -> Any:
        if name == IALS:
            progress.task(name, 0, 0)
            return FittedIals.fit(ials_of(config), data)
        return train(name, len(curves[name].values), f"reads {name}")

    def choose_shrinkage(name: str) -> None:
        """Chooses the best one, if it is better than none beyond the 95% interval."""
        model, setting = fitted(name), configs[name].model.history_shrinkage
        trials = {setting: vectors_of(model, truth.queries, truth.items)}
        for shrinkage in SHRINKAGES if setting is None else ():
            model.network.shrinkage = shrinkage
            queries = encoder_of(model.towers)(truth.queries)
            trials[shrinkage] = trials[None]._replace(queries=queries)
        model.network.shrinkage = setting
        measured = {
            shrinkage: measure_vectors(trial.queries, trial.candidates, truth, metric_of(metric))
            for shrinkage, trial in trials.items()
        }

        def best() -> tuple[float | None, float]:
            highest = max(measured, key=lambda shrinkage: np.nanmean(measured[shrinkage]))
            gain = mean_interval(measured[highest] - measured[setting], truth.user_ids)
            shrinkage = highest if gain.outcome is Outcome.BETTER else setting
            return shrinkage, float(np.nanmean(measured[shrinkage]))

        # One process decides, because others may round differently.
        shrinkages[name], values[name] = on_chief(best)
        vectors[name] = trials[shrinkages[name]]

    race_in_rungs(curves, turn, budget)
    while True:  # Until the winner has trained to its end, where it may still diverge.
        for name, curve in curves.items():
            if curve.values and not curve.failure and name not in values:
                choose_shrinkage(name)
        decided = Race([*curves.values()], metric, not_begun, best_values=values)
        winner = curves[decided.winner]
        if winner.failure:  # All have diverged.
            raise Diverged(f"{winner.name}: {winner.failure}")
        if not winner.num_left:
            break
        # The budget does not bound this training, so its time is told.
        seconds = winner.num_left * winner.epoch_seconds
        most = f", at most about {_in_cpu_time(seconds)}" if seconds else ""
        turn(winner.name, winner.num_epochs, f"the winner trains on{most}: {winner.name}")
        # Both are of fewer epochs; a single recipe has none, since it has not trained before.
        values.pop(winner.name, None)
        vectors.pop(winner.name, None)

    for name, shrinkage in shrinkages.items():
        configs[name] = with_settings(configs[name], {"model.history_shrinkage": shrinkage})
    choice = None
    if config.members > 1:
        vectors[IALS] = vectors_of(fitted(IALS), truth.queries, truth.items)
        progress.task("chooses the sum", 0, 0)
        chosen = functools.partial(
            choose,
            vectors,
            truth,
            metric_of(metric),
            winner=decided.winner,
            max_members=config.members,
        )
        choice = Choice.read(on_chief(lambda: chosen().as_dict()))
    return dataclasses.replace(decided, choice=choice, configs=configs), fitted


def _recipe_named(name: str) -> Recipe:
    if name not in PRESETS:
        raise ConfigError([("recipes", f"got {name!r}; {suggest(name, PRESETS)}")])
    return PRESETS[name]


def race_step() -> Step:
    """Returns the step that races a run's recipes, and gives it the settings of winner and sum."""

    def make(run: RunContext, samples: RunData) -> Race:
        entrants = [PRESETS[name] for name in run.config.recipes]
        # The model's step reads the trainings back.
        decided, _ = _race(run, entrants, samples.selection, samples.validation, run.config.budget)
        run.note(*decided.lines())
        run.config = settle(run.config, run.folder, decided)
        return decided

    return Step("race", ("samples",), "race", make, "race/", workers="all")


def settle(config: RunConfig, folder: RunFolder, decided: Race) -> RunConfig:
    """Makes the chosen trainings the first ones of the run; returns the winner's settings.

    These have the members of the sum, if one was chosen, and no recipes, so that they do not race
    again. The other recipes' checkpoints are removed.
    """
    raced = ("recipes", "fixed", "members", "budget")
    changed: dict[str, Any] = {name: getattr(RunConfig(), name) for name in raced}
    summed: dict[str, MemberConfig | IalsConfig] = {}
    if len(decided.weights) > 1:
        epochs = {curve.name: len(curve.values) for curve in decided.curves}
        for name, weight in decided.weights.items():
            if name == IALS:
                ials = ials_of(config)
                kept = IalsConfig.model_fields.keys() - {"weight"}
                fitted = {setting: getattr(ials, setting) for setting in kept}
                summed[name] = IalsConfig(weight=weight, **fitted)
                continue
            plan = decided.configs[name]
            summed[name] = MemberConfig(
                weight=weight, epochs=epochs[name], model=plan.model, training=plan.training
            )
    changed["summed"] = summed
    if trains_winner_alone(config):
        named = config.evaluation.baselines
        changed["evaluation.baselines"] = tuple(name for name in named if name != "uncorrected")
    winner_config = with_settings(decided.configs[decided.winner], changed)

    def move() -> None:
        for name in decided.weights:
            path = folder.checkpoints / "two_tower" / (name if summed else "") / "selection"
            if (folder.race / name).is_dir() and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                (folder.race / name).rename(path)
        for curve in decided.curves:
            shutil.rmtree(folder.race / curve.name, ignore_errors=True)
        # Last, because its record makes a resumed run skip the race.
        race = {**decided.as_metrics(), "budget": config.budget}
        folder.settle(config, winner_config, race)

    on_chief(move)
    return winner_config


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
            check_plan(plan_of(settings, "two_tower"), data)
            if same := [name for name, other in configs.items() if other == settings]:
                raise ValueError(f"your settings make it equal to {same[0]}")
            configs[recipe.name] = settings
        except ValueError as error:
            refused[recipe.name] = error
    if not configs:
        raise next(iter(refused.values()))
    return configs, {name: str(error) for name, error in refused.items()}
