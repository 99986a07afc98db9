"""A race of recipes in a run: which may race, what the winner leaves, how a race resumes."""

import dataclasses
import itertools
import operator
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pytest

import tfrs_pipeline as tp
from tests.small_log import NUM_ITEMS, Stopped, Watched, event_table, small_config, write
from tfrs_pipeline.cli.flags import as_typed
from tfrs_pipeline.data.settings import DataConfig
from tfrs_pipeline.model.fit import Diverged
from tfrs_pipeline.presets import PRESETS, RECIPES
from tfrs_pipeline.run import race as race_module
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.pipeline import RunResult, run, run_steps
from tfrs_pipeline.run.plans import Plan, ensemble_in, resolve_settings
from tfrs_pipeline.run.race import SHRINKAGES, planned, trainable_recipes
from tfrs_pipeline.run.race_rule import Turn

pytestmark = pytest.mark.usefixtures("quick_runs", "traced_once")
# Small settings, so that a race takes seconds; no recipe changes them.
GIVEN = {"model.dim": 8, "model.negatives": ["uniform:num=32"], "model.history_length": 10}
GIVEN |= {"training.max_epochs": 3, "training.batch_size": 256, "training.monitor": "ndcg@20"}
UNEXPORTED = {"export.index": "none"}
Raced: TypeAlias = tuple[tp.RunConfig, RunResult]


def config_in(folder: Path, **changes: Any) -> tp.RunConfig:
    path = write(event_table("int"), folder / "events.parquet")
    config = small_config(folder, {"path": path}, split={"kind": "last_share", "test": 0.2})
    asked = {"recipes": ["default", "sets"], "fixed": list(GIVEN), "members": 1}
    return tp.with_settings(config, {**GIVEN, **asked, **changes})


@pytest.fixture(scope="module")
def watched() -> Watched:
    return Watched()


@pytest.fixture(scope="module")
def raced(module_path: Path, watched: Watched) -> Raced:
    config = config_in(module_path)
    return config, run(config, module_path / "run", progress=watched)


def curves_of(result: RunResult) -> dict[str, list[float]]:
    return {name: curve["values"] for name, curve in result.metrics["race"]["recipes"].items()}


def test_the_winner_is_trained_and_the_settings_stay_as_they_were(raced: Raced) -> None:
    config, result = raced
    curves = curves_of(result)
    best = max(curves, key=lambda name: max(curves[name]))
    assert result.metrics["race"]["winner"] == best
    assert RunFolder(result.folder).settings() == config
    ensemble = ensemble_in(result.folder)
    assert ensemble.weights == {best: 1.0}
    plan = ensemble.plans[best]
    assert plan == Plan.of(planned(config, PRESETS[best]), len(curves[best]))
    settled = tp.with_settings(config, plan.settings)
    for name in GIVEN:
        value = operator.attrgetter(name)
        assert value(settled) == value(config), name
    # The winner's training in the race is the run's first training: no epoch was trained twice.
    history = result.metrics["training"]["two_tower"]["history"]
    assert history["val_ndcg@20"] == curves[best]
    assert [path.name for path in (result.folder / "checkpoints").iterdir()] == [best]
    # What serves it says by which settings it was trained.
    manifest = tp.load(result.export_folder).manifest["config"]
    assert tp.RunConfig(**manifest) == settled
    assert f"{best} won" in result.metrics["notes"]["race"][0]


def test_a_recipe_trains_in_a_race_as_it_trains_alone(raced: Raced, tmp_path: Path) -> None:
    config, result = raced
    best = result.metrics["race"]["winner"]
    alone = tp.with_settings(planned(config, PRESETS[best]), {"recipes": (), "fixed": ()})
    alone = tp.with_settings(alone, UNEXPORTED)
    trained = run(alone, tmp_path / "run").metrics
    assert trained["training"]["two_tower"] == result.metrics["training"]["two_tower"]
    assert trained["models"]["two_tower"] == result.metrics["models"]["two_tower"]


def test_the_next_days_run_starts_from_the_winner(raced: Raced, tmp_path: Path) -> None:
    config, result = raced
    (plan,) = ensemble_in(result.folder).plans.values()
    changes = {"recipes": (), "warm_start": result.folder, "fixed": ["warm_start"]}
    today = resolve_settings(tp.with_settings(config, changes), RunFolder(tmp_path))
    steps = [step.name for step in run_steps(today)]
    assert "train two_tower" in steps
    assert "race" not in steps
    assert today.model == plan.model
    # The race trained no uncorrected model.
    assert "uncorrected" not in today.evaluation.baselines
    source = tp.trained_in(result.folder)
    assert source is not None
    assert source.settings == today.model
    with pytest.raises(tp.ConfigError, match="recipes: got some with warm_start"):
        tp.with_settings(today, {"recipes": ["default"]})


def test_a_killed_race_goes_on_and_ends_the_same(raced: Raced, tmp_path: Path) -> None:
    """It is killed in a round and after the race."""
    _, result = raced
    config = config_in(tmp_path, **UNEXPORTED)
    stops: list[Any] = [("race: sets", 2), "race", ""]
    *stopped, last = told = [StoppedIn(stop) for stop in stops]
    for watched in stopped:
        with pytest.raises(Stopped):
            run(config, tmp_path / "run", progress=watched)
    again = run(config, tmp_path / "run", progress=last)
    assert curves_of(again) == curves_of(result)
    assert again.metrics["models"] == result.metrics["models"]
    # Who goes on after the race is told again what it came to.
    assert last.reports["race"].notes == again.metrics["race"]["lines"]
    assert again.metrics["notes"]["race"] == again.metrics["race"]["lines"]
    # No epoch was run twice.
    epochs = [task for watched in told for task in watched.tasks if task[1]]
    times = Counter(task for task in epochs if task[0].startswith("race: "))
    assert max(times.values()) == 1
    assert sum(times.values()) == sum(map(len, curves_of(result).values()))


class StoppedIn(Watched):
    """Stops at an epoch of a task; a race's is named by its recipe alone."""

    def task(self, name: str, done: int, total: int, note: str = "", /) -> None:
        name = re.sub(r"^(race|the winner trains on), .*: (\w+)( \(.*)?$", r"race: \2", name)
        super().task(name, done, total, note)


def test_a_race_tells_in_each_round_what_all_may_still_take(raced: Raced, watched: Watched) -> None:
    """Once every recipe is timed."""
    tasks = [name for name, done in watched.tasks if done and "race" in name]
    leading = r": \w+ \(leading: \w+, 0\.\d{4}\)"
    assert tasks[0] == "race, round 1, 2 recipes left: default"
    for name in tasks[3:]:
        text = r"race, round \d+, 2 recipes left(, at most about \d+ CPU (minutes?|seconds))?"
        assert re.fullmatch(text + leading, name)
    last = max(map(len, curves_of(raced[1]).values()))
    assert last <= len(tasks) <= sum(map(len, curves_of(raced[1]).values()))


def test_a_budget_ends_the_race(tmp_path: Path) -> None:
    short = {"budget": "0.001s", "training.refit": False, **UNEXPORTED}
    result = run(config_in(tmp_path, **short), tmp_path / "run", progress=(watched := Watched()))
    trained = {name: len(values) for name, values in curves_of(result).items()}
    # The winner is still trained to its end.
    assert trained == {"default": 3, "sets": 0}
    # It is told beforehand what that takes, which the budget does not bound.
    assert ("the winner trains on, at most about 10 CPU seconds: default", 3) in watched.tasks
    assert result.metrics["race"]["winner"] == "default"
    assert result.metrics["race"]["budget"] == 0.001
    assert "sets: not trained before the budget ended" in result.metrics["race"]["lines"]
    assert len(result.metrics["training"]["two_tower"]["history"]["val_ndcg@20"]) == 3


def test_a_training_that_diverges_ends_a_recipe_and_not_the_race(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bad` diverges at once, `late` as the winner in its last epochs: the next best wins then."""
    train, validation, _ = tp.Log.from_table(event_table("int")).split("last_share")
    fit, begun = tp.TwoTower.fit_samples, list[tuple[float, int]]()

    def fit_samples(plan: tp.TwoTower, *data: Any, max_epochs: int, **options: Any) -> Any:
        begun.append((plan.temperature, max_epochs))
        if plan.temperature == 0.1 or begun[-1] == (0.2, 3):
            raise Diverged("The loss is nan.")
        return fit(plan, *data, max_epochs=max_epochs, **options)

    monkeypatch.setattr(tp.TwoTower, "fit_samples", fit_samples)
    rates = {"bad": 0.1, "late": 0.2, "good": 0.3}
    bad, late, good = (tp.Recipe(name, {"model.temperature": x}) for name, x in rates.items())

    def raced(name: str, *recipes: tp.Recipe, **options: Any) -> Any:
        options = {"members": 1, "settings": GIVEN, "folder": tmp_path / name, **options}
        return tp.race(train, validation, recipes=recipes, **options)

    _, race = raced("first", bad, good)
    assert race.winner == "good"
    assert race.lines()[1:] == ["bad: dropped out. The loss is nan."]
    # The budget ends with the first recipe: the next one then begins and trains to its end.
    model, race = raced("last", late, good, budget=0.001)
    assert race.winner == "good"
    assert model.result.num_epochs == 3
    cut = "the budget ended the race: others might still have won"
    assert race.lines()[1:] == ["late: dropped out. The loss is nan.", cut]
    # It is not tried again.
    begun.clear()
    assert raced("last", late, good, budget=0.001)[1].lines() == race.lines()
    assert {temperature for temperature, _ in begun} == {0.3}
    with pytest.raises(ValueError, match=r"^bad: dropped out\. The loss is nan"):
        raced("all", bad)


def test_a_budget_has_a_unit() -> None:
    for text, seconds in (("90", 90.0), ("90s", 90.0), ("10m", 600.0), ("1.5h", 5400.0)):
        assert tp.RunConfig(budget=text).budget == tp.RunConfig(budget=seconds).budget == seconds
    for wrong in ("ten minutes", "10d", "0", "-5", "m"):
        with pytest.raises(tp.ConfigError, match="budget"):
            tp.RunConfig(budget=wrong)


IN_ORDER = ("quick", "sequence", "sparse")
ORDERED_LOG = tp.Log.from_table(event_table("int").select(["user_id", "item_id"]))


@pytest.mark.parametrize(("is_ordered", "given", "racing", "why"), [
    (True, {}, RECIPES, {}),
    (False, {}, ("default", "sets"), dict.fromkeys(IN_ORDER, "is_ordered")),
    (True, {"training.examples": "sets"}, ("quick", "sets", "sequence", "sparse"),
     {"default": "model.negatives"}),
    (True, {"training.batch_size": 50}, ("default", "sets"),
     dict.fromkeys(IN_ORDER, "training.batch_size")),
    (True, {"training.max_epochs": 2}, ("default", *IN_ORDER), {"sets": "warm-up"}),
])  # fmt: skip
def test_who_races(is_ordered: bool, given: Any, racing: Any, why: Any, tmp_path: Path) -> None:
    log = dataclasses.replace(ORDERED_LOG, is_ordered=is_ordered)
    # Given settings may contradict those that a recipe would replace.
    training = tp.TrainingSettings(**{x.removeprefix("training."): y for x, y in given.items()})
    tables = {"data": DataConfig(is_ordered=is_ordered), "training": training}
    asked = {"recipes": RECIPES, "fixed": tuple(given), **tables}
    config = tp.RunConfig.model_construct(**{**dict(tp.RunConfig()), **asked})
    data = tp.TrainingSet.build(log, tmp_path, seed=0)
    found, not_begun = trainable_recipes(config, data)
    assert tuple(found) == racing
    assert not_begun.keys() == why.keys()
    for name, fragment in why.items():
        assert fragment in not_begun[name]


def test_if_none_can_race_the_first_recipe_says_why(tmp_path: Path) -> None:
    """`sets` could have no hard negatives anyway, whatever the log is."""
    config = tp.with_settings(tp.RunConfig(), {"model.hard": "funnel", "recipes": RECIPES})
    data = tp.TrainingSet.build(ORDERED_LOG, tmp_path, seed=0, hard=config.model.hard)
    config = tp.with_settings(config, {"fixed": ["model.hard"]})
    with pytest.raises(ValueError, match=r"none of .* positives has one"):
        trainable_recipes(config, data)


def test_sets_do_not_race_in_a_log_with_request_features(tmp_path: Path) -> None:
    table = event_table("int").select(["user_id", "item_id"])
    table = table.append_column("device", [["ios"] * table.num_rows])
    log = tp.Log.from_table(table, request_features={"device": "categorical"})
    data = tp.TrainingSet.build(log, tmp_path, seed=0)
    found, not_begun = trainable_recipes(tp.RunConfig(recipes=RECIPES), data)
    assert tuple(found) == ("default", *IN_ORDER)
    assert "request features" in not_begun["sets"]


def test_recipes_that_the_given_settings_make_equal_race_once(tmp_path: Path) -> None:
    every = list(dict.fromkeys(x for name in RECIPES for x in PRESETS[name].of_training()))
    config = tp.with_settings(tp.RunConfig(), {"recipes": RECIPES, "fixed": every})
    data = tp.TrainingSet.build(ORDERED_LOG, tmp_path, seed=0)
    found, not_begun = trainable_recipes(config, data)
    assert tuple(found) == ("default",)
    assert set(not_begun.values()) == {"your settings make it equal to default"}
    # A recipe leaves the data and the evaluation alone.
    for name in RECIPES:
        left_out = PRESETS[name].settings.keys() - PRESETS[name].of_training().keys()
        assert all(x.startswith(("data.", "evaluation.")) for x in left_out), name


def test_a_race_in_python_is_one_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe of the user's own is one object, made outside the package (CONTRIBUTING.md)."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train, validation, _ = tp.Log.from_table(event_table("int")).split(
        "last_share", validation=0.1, test=0.2
    )
    mine = tp.Recipe("mine / wide", {"model.dim": 12, "data.ties": "drop"}, "a test")
    same = tp.Recipe("same", {"model.dim": 64})
    settings = {**GIVEN, "training.max_epochs": 4}
    del settings["model.dim"]
    recipes = ["default", mine, same]
    model, race = tp.race(train, validation, recipes=recipes, settings=settings, folder=tmp_path)
    assert isinstance(race, tp.Race)
    assert [curve.name for curve in race.curves] == ["default", "mine / wide"]
    assert race.not_begun == {"same": "your settings make it equal to default"}
    curves = {curve.name: curve.values for curve in race.curves}
    assert model.result.history["val_ndcg@20"] == curves[race.winner]
    won = {"default": 64, "mine / wide": 12}[race.winner]
    assert model.query_embeddings([{"history": [10]}]).shape == (1, won)
    assert str(race).splitlines() == race.lines()
    assert race.choice is not None
    assert len(race.lines()) == 3 + len(race.choice.lines())
    told = capsys.readouterr().err.splitlines()
    assert len(told) == sum(map(len, curves.values()))
    assert told[0].startswith("race, round 1, 2 recipes left: default, 1/4 epochs: loss")
    ids, _ = model.retrieve([{"history": [10, 20]}], k=5)
    assert ids.shape == (1, 5)
    # The folder keeps the race: the second call trains nothing.
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("epoch-*.json")}
    again, same = tp.race(train, validation, recipes=recipes, settings=settings, folder=tmp_path)
    assert same.curves == race.curves
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("epoch-*.json")} == files
    assert again.retrieve([{"history": [10, 20]}], k=5)[0].tolist() == ids.tolist()
    # With other settings, these trainings would be taken for those of the new ones.
    other = {**settings, "model.temperature": 0.3}
    with pytest.raises(ValueError, match=r"made of something else .*temperature: 0\.15, now 0\.3"):
        tp.race(train, validation, recipes=recipes, settings=other, folder=tmp_path)
    # A recipe trains as the same settings do alone.
    config = tp.with_settings(tp.RunConfig(), {**settings, **mine.of_training()})
    plan = tp.TwoTower(**dict(config.model), training=config.training)
    alone = plan.fit(train, validation).result.history["val_ndcg@20"]
    assert curves[mine.name] == alone


def chance_log() -> tp.Log:
    """Two clicks a user, drawn from one popularity: the first says nothing about the second."""
    rng = np.random.default_rng(0)
    num_users, shares = 600, (1 + np.arange(NUM_ITEMS)) ** -1.0
    items = [rng.choice(NUM_ITEMS, 2, False, shares / shares.sum()) for _ in range(num_users)]
    times = 1_700_000_000 + np.sort(rng.integers(0, 10**6, num_users))
    clicks = {"user_id": np.repeat(np.arange(num_users), 2), "item_id": np.concatenate(items)}
    clicks["timestamp"] = np.stack([times, times + 60], axis=1).ravel()
    return tp.Log.from_table(pa.table(clicks))


@pytest.mark.parametrize("given", [None, 0.0])
def test_a_race_chooses_how_much_a_short_history_counts(given: float | None) -> None:
    split = chance_log().split("time", validation=0.3, test=0.1)
    train, validation = split.train, split.holdout("validation", by="requests")
    settings = {**GIVEN, "training.max_epochs": 8, "training.learning_rate": 0.02}
    settings["training.history_bonus"] = False
    if given is not None:
        settings["model.history_shrinkage"] = given
    model, race = tp.race(train, validation, recipes=["quick"], settings=settings, members=1)
    assert isinstance(model, tp.FittedTwoTower)
    chosen = race.configs["quick"].model.history_shrinkage
    assert chosen in (SHRINKAGES if given is None else [given])
    assert model.settings.history_shrinkage == model.network.shrinkage == chosen
    metrics = [tp.metric_of("ndcg@20")]
    (value,) = tp.evaluate(model, validation, metrics=metrics).first.overall.intervals.values()
    assert race.best_values["quick"] == pytest.approx(value.mean)
    line = f"quick won: validation ndcg@20 {value.mean:.4f} with model.history_shrinkage {chosen:g}"
    assert race.lines()[0].startswith(line) == (given is None)
    # With the user's own value, that of the curve is all there is.
    best = race.curves[0].best
    assert value.mean > 1.03 * best if given is None else value.mean == pytest.approx(best)


def test_who_wins_by_a_shrinkage_trains_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its curve stays what it is without the shrinkage, so that one measure chooses the epoch."""
    slow = tp.Recipe("slow", {"training.learning_rate": 1e-5}, "hardly learns")
    settings = {**GIVEN, "training.max_epochs": 4, "training.patience": 4}
    train, validation, _ = tp.Log.from_table(event_table("int")).split(
        "last_share", validation=0.1, test=0.2
    )

    def two_epochs(curves: Any, budget: float) -> Turn | bool:
        return next((Turn(name, 2, name) for name in curves if not curves[name].values), False)

    times = itertools.count()
    monkeypatch.setattr(race_module, "next_turn", two_epochs)
    # Each measurement is better than the one before, so that the last recipe wins.
    later = lambda x, *_: np.full(len(x), float(next(times)))  # noqa: E731
    monkeypatch.setattr(race_module, "measure_vectors", later)
    recipes = ["quick", slow]
    model, race = tp.race(train, validation, recipes=recipes, settings=settings, members=1)
    values = {curve.name: curve.values for curve in race.curves}
    assert race.winner == "slow" != max(values, key=lambda name: max(values[name]))
    assert [len(curve) for curve in values.values()] == [2, 4]
    assert model.result.history["val_ndcg@20"] == values["slow"]
    config = tp.with_settings(tp.RunConfig(), {**settings, **slow.of_training()})
    plan = tp.TwoTower(**dict(config.model), training=config.training)
    assert plan.fit(train, validation).result.history["val_ndcg@20"] == values["slow"]


def test_the_recipe_of_the_docstring_races(tmp_path: Path) -> None:
    (example,) = re.findall(r"( +negatives = .*?)\n +model, race = ", tp.race.__doc__, re.DOTALL)
    names: dict[str, Any] = {"tp": tp}
    exec(textwrap.dedent(example), names)
    data = tp.TrainingSet.build(ORDERED_LOG, tmp_path, seed=0)
    entrants = [PRESETS["default"], PRESETS["sequence"], names["wide"]]
    racing, not_begun = trainable_recipes(tp.RunConfig(), data, entrants)
    assert (list(racing), not_begun) == (["default", "sequence", "wide"], {})


class NewestItems:
    """A kind of negatives of the user's own, which no setting can hold."""

    def draw(self, frame: Any, positive_rows: Any, seed: Any) -> Any: ...
    def expected_count(self, frame: Any) -> Any: ...


def test_what_a_race_in_python_refuses_before_samples_are_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        tp.TrainingSet, "build", lambda *_, **__: pytest.fail("Samples were built.")
    )
    train, validation, _ = tp.Log.from_table(event_table("int")).split("last_share")
    mine = tp.Recipe("mine", {"model.dim": 12})
    wrong: list[tuple[Any, Any, str]] = [
        (["default"], {"data.ties": "drop"}, r"data\.ties: a race reads only model, training"),
        (["default"], {"evaluation.baselines": ["ease"]}, "a race reads only"),
        (["default"], {"trainng.max_epochs": 3}, "did you mean 'training"),
        (["sequences"], {}, "did you mean 'sequence'"),
        ([], {}, r"recipes: got \[\]; name one or more"),
        ([mine, mine], {}, "each once"),
        (
            ["default", tp.Recipe("mine", {"model.dimm": 12})],
            {},
            r"^recipe 'mine':\n  model\.dimm: unknown setting; did you mean 'model\.dim'\?$",
        ),
        ([tp.Recipe("mine", {"data.tys": "drop"})], {}, r"'mine':\n  data.tys: unknown setting"),
        ([tp.Recipe("mine", {"model.dim": 0})], {}, r"'mine':\n  model.dim: got 0; must be"),
        (
            [tp.Recipe("mine", {"training.examples": "sequences"})],
            {},
            r"'mine':\n  model.negatives: got in_batch with training.examples",
        ),
        (
            [tp.Recipe("mine", {"model.negatives": [NewestItems()]})],
            {},
            r"model.negatives: got <.*NewestItems.*Give one of your own to tp.TwoTower\(negatives=",
        ),
        (
            [tp.Recipe("mine", {"model.hard": NewestItems()})],
            {},
            r"model.hard: got <.*NewestItems.*Give one of your own to tp.TwoTower\(hard=",
        ),
        ([tp.Recipe("default", {"model.dim": 12})], {}, "named 'default', as one of the package"),
    ]
    for recipes, settings, message in wrong:
        with pytest.raises(tp.ConfigError, match=message):
            tp.race(train, validation, recipes=recipes, settings=settings)
    with pytest.raises(TypeError, match=r"recipes must be a list .*Received: 'default'"):
        tp.race(train, validation, recipes="default")
    with pytest.raises(TypeError, match=r"names or tp\.Recipe. Received: \[None\]"):
        tp.race(train, validation, recipes=[None])
    with pytest.raises(TypeError, match="needs a Holdout"):
        tp.race(train, train, recipes=["default"])


def test_the_same_command_again_goes_on_after_the_race(tmp_path: Path, command: Any) -> None:
    write(event_table("int"), tmp_path / "events.parquet")
    asked = {"data.path": tmp_path / "events.parquet", "run-dir": tmp_path / "run", **GIVEN}
    asked |= {"training.max_epochs": 1, "evaluation.baselines": "popularity", **UNEXPORTED}
    asked |= {"evaluation.cutoffs": 20, "members": 1, "budget": "9s", "model.dim": 4}
    asked |= {"export.directory": tmp_path / "models"}
    flags = [word for name, value in asked.items() for word in (f"--{name}", as_typed(value))]
    flags += ["--recipes", "quick"]  # Its settings differ from those that the run begins with.
    assert command("run", *flags).code == 0
    again = command("run", *flags)
    assert (again.code, again.err) == (0, "")
    assert "its results follow; nothing was done" in again.out
    # A flag with the value that the setting had: then it decides nothing.
    assert command("run", "--run-dir", tmp_path / "run", "--seed", 0).code == 0
    over = command("run", "--run-dir", tmp_path / "run", "--budget", "8s")
    assert "other settings (budget: 9.0, now 8.0)" in over.err
    other = command("run", *flags, "--model.dim", "8")
    assert "other settings (model.dim: 4, now 8" in other.err
    # How to export may change; then the rest of the run is done.
    exported = command("run", *flags, "--export.index", "exact", "--export.if_beaten")
    assert (exported.code, exported.err) == (0, "")
    assert "race, round" not in exported.out
    assert " won: validation ndcg@20" in exported.out
