"""Races recipes on validation, and continues with the winner.

The race trains each as a run would, so the winner's training just continues.
"""

import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfrs_pipeline.config import RunConfig, with_settings
from tfrs_pipeline.data.holdout import Holdout
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.durable import read_whole, write_record
from tfrs_pipeline.messages import Progress, counted, written
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.model.distribution import on_chief
from tfrs_pipeline.model.fit import TrainingResult
from tfrs_pipeline.model.fitted import FittedTwoTower
from tfrs_pipeline.presets import RECIPES, recipe
from tfrs_pipeline.run.data import RunData
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.rounds import Curve, most_left, standing, winner
from tfrs_pipeline.run.steps import Runner, Step
from tfrs_pipeline.run.training import (
    check_plan,
    fit_once,
    plan_of,
    trains_winner_alone,
)
from tfrs_pipeline.settings import refuse

# The curves so far, in the folder of the trainings.
CURVES_FILE = "curves.json"
# Two seeds of one recipe differ by about as much.
CLOSE = 0.003


@dataclass(frozen=True)
class Race:
    """A decided race: the curves of the recipes, and the validation metric that decided.

    `dropped` has the CPU seconds of a recipe when it was dropped, and how far it was behind by
    then; `not_begun` has why a recipe did not race.
    """

    curves: tuple[Curve, ...]
    metric: str
    dropped: Mapping[str, tuple[float, float]]
    not_begun: Mapping[str, str]

    @property
    def winner(self) -> str:
        """Name of the recipe that won."""
        return winner(self.curves).name

    def lines(self) -> list[str]:
        """Describes the race in a line for each recipe, the winner first."""
        first = winner(self.curves)
        ranked = sorted(self.curves, key=lambda curve: -curve.best)
        spent = sum(curve.spent for curve in self.curves)
        return [
            f"{first.name} won: validation {self.metric} {first.best:.4f} after epoch "
            f"{first.best_epoch}; its epochs took {first.spent:.0f} of all {spent:.0f} CPU seconds",
            *(self._line(curve) for curve in ranked if curve is not first),
            *(f"{name} did not race: {why}" for name, why in self.not_begun.items()),
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _line(self, curve: Curve) -> str:
        if not curve.values:
            return f"{curve.name}: not trained before the budget ended"
        best = f"{curve.name}: best {curve.best:.4f} after epoch {curve.best_epoch}"
        if winner(self.curves).best - curve.best < CLOSE:
            best += ", close to the winner"
        if curve.name in self.dropped and not curve.has_ended:
            seconds, behind = self.dropped[curve.name]
            return (
                f"{best}; dropped after {seconds:.0f} CPU seconds, {behind:.4f} behind the leader"
            )
        how = "trained to its end in" if curve.has_ended else "stopped by the budget after"
        return f"{best}; {how} {curve.spent:.0f} CPU seconds"

    def as_metrics(self) -> dict[str, Any]:
        """Returns the race as an entry of metrics.json."""
        return {
            "winner": self.winner,
            "metric": self.metric,
            "recipes": {curve.name: dataclasses.asdict(curve) for curve in self.curves},
            "lines": self.lines(),
        }


class _Paused(Exception):
    """Ends a turn, from within a training whose last epoch is saved."""


def race(
    train: Log,
    validation: Holdout,
    *,
    recipes: Sequence[str] = RECIPES,
    settings: Mapping[str, Any] | None = None,
    budget: float | None = None,
    seed: int = 0,
    folder: Path | str | None = None,
    progress: Progress | None = None,
) -> tuple[FittedTwoTower, Race]:
    """Races recipes on validation; returns the winner's model, trained to its end, and the race.

    Args:
        train: The training part.
        validation: Decides the race, and chooses the winner's epoch. In a split by time, a run asks
            by request: `split.holdout("validation", by="requests")`.
        recipes: Names among "default", "quick", "sequence", "sparse" and "sets".
        settings: Settings of the model, its training, `evaluation.exclude` and
            `evaluation.cutoffs`, by dotted name, for all recipes.
        budget: CPU seconds of all recipes together, after which the leader wins and is trained to
            its end. If None, recipes race until their curves decide.
        seed: Seed of everything random.
        folder: Keeps samples and trainings, so that a stopped race can resume; None is temporary.
        progress: Told about epochs; None writes them to a notebook's cell, or to standard error
            if it is a terminal.

    Raises:
        ConfigError: If a name or setting is unknown, or no recipe is named.
        ValueError: If no recipe can train, or there is no positive (`DataError`).

    Example:
        The model of the best recipe::

            train, validation, test = log.split("time")
            model, race = tp.race(train, validation)
            print(race)
    """
    if not recipes:
        refuse([("recipes", f"got none; name one or more of {', '.join(RECIPES)}")])
    asked = {"recipes": recipes, "fixed": tuple(settings or ()), "budget": budget}
    base = with_settings(RunConfig(seed=seed), {**(settings or {}), **asked})
    read = "model.", "training.", "evaluation.exclude.", "evaluation.cutoffs."
    message = "a race reads only model, training, evaluation.exclude and evaluation.cutoffs"
    refuse((x, message) for x in settings or () if not f"{x}.".startswith(read))
    with ExitStack() as stack:
        place = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        data = TrainingSet.build(train, place / "samples", seed=seed, hard=base.model.hard)
        told = progress or written()
        trainings = _Trainings(base, data, validation, place / "race", told)
        decided = trainings.run()
        model = trainings.train(decided.winner)
        assert model is not None
        return model, decided


def settle(config: RunConfig, folder: RunFolder, decided: Race) -> RunConfig:
    """Makes the winner's training the first one of the run; returns the winner's settings.

    These have no recipes, so they do not race again. The other recipes' checkpoints are removed.
    """
    changed: dict[str, Any] = {"recipes": (), "fixed": (), "budget": None}
    if trains_winner_alone(config):
        named = config.evaluation.baselines
        changed["evaluation.baselines"] = tuple(x for x in named if x != "uncorrected")
    settled = with_settings(planned(config, decided.winner), changed)

    def move() -> None:
        won, place = folder.race / decided.winner, folder.checkpoints / "two_tower" / "selection"
        if won.is_dir() and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            won.rename(place)
        for curve in decided.curves:
            shutil.rmtree(folder.race / curve.name, ignore_errors=True)
        folder.settle(config, settled, decided.as_metrics())

    on_chief(move)
    return settled


def race_step(config: RunConfig, folder: RunFolder) -> Step:
    """Returns the step that races the recipes of a config."""

    def make(runner: Runner, data: RunData) -> Race:
        selection, validation = data.selection, data.validation
        trainings = _Trainings(config, selection, validation, folder.race, runner.progress)
        decided = trainings.run()
        runner.note(*decided.lines())
        return decided

    return Step("race", ("samples",), "race", make, place="race/")


def planned(config: RunConfig, name: str) -> RunConfig:
    """Returns the config with a recipe's settings, except for those that are fixed."""
    # A table that is fixed covers its settings.
    fixed = tuple(f"{setting}." for setting in config.fixed)
    changed = {key: x for key, x in recipe(name).items() if not f"{key}.".startswith(fixed)}
    return with_settings(config, changed)


def trainable_recipes(
    config: RunConfig, data: TrainingSet
) -> tuple[dict[str, RunConfig], dict[str, str]]:
    """Returns the settings of each recipe that can train, and why the others are not begun.

    Raises the error of the first recipe if none can: the others may fail by their own settings.
    """
    found: dict[str, RunConfig] = {}
    not_begun, refused = dict[str, str](), list[ValueError]()
    for name in config.recipes:
        try:
            each = planned(config, name)
            check_plan(plan_of(each, "two_tower"), data)
        except ValueError as error:
            not_begun[name] = str(error)
            refused.append(error)
            continue
        if same := [other for other, config in found.items() if config == each]:
            not_begun[name] = f"your settings make it equal to {same[0]}"
        else:
            found[name] = each
    if not found:
        raise refused[0]
    return found, not_begun


class _Trainings:
    """The trainings of a race, which take turns. A folder keeps their curves and checkpoints."""

    def __init__(
        self,
        config: RunConfig,
        data: TrainingSet,
        validation: Holdout,
        folder: Path,
        progress: Progress,
    ) -> None:
        self.config, self.data, self.validation = config, data, validation
        self.folder, self.progress = folder, progress
        self.configs, self.not_begun = trainable_recipes(config, data)
        self.curves = {name: Curve(name) for name in self.configs}
        for name, (seconds, values, has_ended) in on_chief(self._read).items():
            if name in self.configs:
                self.curves[name] = Curve(name, tuple(seconds), tuple(values), has_ended)

    def run(self) -> Race:
        """Trains in turns until the race is decided; resumes after the last whole epoch."""
        while (name := self._next()[0]) is not None:
            self.train(name)
        curves = tuple(self.curves.values())
        dropped = standing(curves, self.config.budget).dropped
        return Race(curves, self.config.training.monitor, dropped, self.not_begun)

    def _next(self) -> Sequence[Any]:
        """Returns the recipe of the next epoch, None if there is none, and a name for the round."""

        def decide() -> tuple[str | None, str]:
            now = standing(tuple(self.curves.values()), self.config.budget)
            return now.next, now.within

        return on_chief(decide)  # The chief's clock decides for all.

    def train(self, name: str) -> FittedTwoTower | None:
        """Trains a recipe while it is next; once the race is decided, to its end.

        Returns the model if the training has ended.
        """
        tf.keras.backend.clear_session()  # One network at a time.
        config, before = self.configs[name], self.curves[name]
        coming, within = self._next()
        task = self._describe(name, within)
        clock, durations = [time.process_time()], list[float]()

        def keep(so_far: TrainingResult, has_ended: bool) -> None:
            values = so_far.history[f"val_{config.training.monitor}"]
            self.curves[name] = before.after(values, durations, has_ended)
            on_chief(self._write)

        def on_epoch(so_far: TrainingResult) -> None:
            nonlocal within, task
            clock.append(time.process_time())
            durations.append(clock[-1] - clock[-2])
            keep(so_far, has_ended=False)
            ends = so_far.num_waited >= config.training.patience
            if coming is None or ends or so_far.num_epochs == config.training.max_epochs:
                return
            now, within = self._next()
            if now != name:
                raise _Paused
            task = self._describe(name, within)

        try:
            model = fit_once(
                plan_of(config, "two_tower"),
                config.evaluation,
                self.data,
                self.validation,
                task=lambda: task,
                max_epochs=config.training.max_epochs,
                folder=self.folder / name,
                progress=self.progress,
                on_epoch=on_epoch,
            )
        except _Paused:
            return None
        keep(model.result, has_ended=True)
        return model

    def _describe(self, name: str, within: str) -> str:
        """Describes a turn: its round, how long all may still take, its recipe, and who leads."""
        curves, budget = tuple(self.curves.values()), self.config.budget
        epochs = {name: each.training.max_epochs for name, each in self.configs.items()}
        left, num_untimed = most_left(curves if within else [self.curves[name]], epochs)
        if within and budget is not None:
            unspent = budget - sum(curve.spent for curve in curves)
            left, num_untimed = unspent if num_untimed else min(left, unspent), 0
        bounds = [f"at most about {counted(math.ceil(left / 60), 'CPU minute')}"] if left else []
        bounds += [f"{counted(num_untimed, 'recipe')} not timed yet"] if num_untimed else []
        told = ", ".join([f"race, {within}" if within else "the winner trains on", *bounds])
        first = winner(curves)
        leading = f" (leading: {first.name}, {first.best:.4f})" if within and first.values else ""
        return f"{told}: {name}{leading}"

    def _read(self) -> dict[str, Any]:
        record = read_whole(self.folder / CURVES_FILE)
        return {} if record is None else dict(record["curves"])

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        curves = {x.name: (x.seconds, x.values, x.has_ended) for x in self.curves.values()}
        write_record(self.folder / CURVES_FILE, {"curves": curves})
