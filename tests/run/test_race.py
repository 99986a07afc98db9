"""A race of recipes in a run: which may race, what the winner leaves, how a race resumes."""

import dataclasses
import itertools
import json
import operator
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest

import tfrs_pipeline as tp
from tests.small_log import Stopped, Watched, event_table, small_config, write
from tfrs_pipeline import ConfigError, TrainingSettings
from tfrs_pipeline.config import RunConfig, load_config, with_settings
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.data.settings import DataConfig
from tfrs_pipeline.durable import read_record
from tfrs_pipeline.model.corpus import TrainingSet
from tfrs_pipeline.presets import PRESETS, RECIPES, recipe
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.pipeline import RunResult, run, run_steps
from tfrs_pipeline.run.race import Race, _Trainings, planned, trainable_recipes
from tfrs_pipeline.run.rounds import Curve

pytestmark = pytest.mark.usefixtures("trusted_exports", "few_signatures", "baselines_here")
# Small settings, so that a race takes seconds; no recipe changes them.
GIVEN = {"model.dim": 8, "model.negatives": ["uniform:num=32"], "model.history_length": 10}
GIVEN |= {"training.max_epochs": 3, "training.batch_size": 256, "training.monitor": "ndcg@20"}
UNEXPORTED = {"export.index": "none"}
Raced: TypeAlias = tuple[RunConfig, RunResult]


def config_in(folder: Path, **changes: Any) -> RunConfig:
    path = write(event_table("int"), folder / "events.parquet")
    config = small_config(folder, {"path": path}, split={"kind": "last_share", "test": 0.2})
    asked = {"recipes": ["default", "quick", "sets"], "fixed": list(GIVEN)}
    return with_settings(config, {**GIVEN, **asked, **changes})


@pytest.fixture(scope="module")
def watched() -> Watched:
    return Watched()


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory, watched: Watched) -> Raced:
    folder = tmp_path_factory.mktemp("race")
    config = config_in(folder)
    return config, run(config, folder / "run", progress=watched)


def curves_of(result: RunResult) -> dict[str, list[float]]:
    return {name: curve["values"] for name, curve in result.metrics["race"]["recipes"].items()}


def test_the_winner_is_trained_and_its_settings_are_the_runs(raced: Raced) -> None:
    config, result = raced
    curves = curves_of(result)
    best = max(curves, key=lambda name: max(curves[name]))
    assert result.metrics["race"]["winner"] == best
    settled = RunFolder(result.folder).settings()
    assert (settled.recipes, settled.fixed, settled.budget) == ((), (), None)
    assert settled.model == planned(config, best).model
    assert settled.training == planned(config, best).training
    for name in GIVEN:
        value = operator.attrgetter(name)
        assert value(settled) == value(config), name
    # The winner's training in the race is the run's first training: no epoch was trained twice.
    history = result.metrics["training"]["two_tower"]["history"]
    assert history["val_ndcg@20"] == curves[best]
    assert (result.folder / "checkpoints" / "two_tower" / "selection").is_dir()
    kept_files = sorted(path.name for path in (result.folder / "race").iterdir())
    assert kept_files == ["curves.json", "race.json"]
    assert f"{best} won" in result.metrics["notes"]["race"][0]


def test_a_recipe_trains_in_a_race_as_it_trains_alone(raced: Raced, tmp_path: Path) -> None:
    config, result = raced
    best = result.metrics["race"]["winner"]
    alone = with_settings(planned(config, best), {"recipes": (), "fixed": ()})
    alone = with_settings(alone, UNEXPORTED)
    trained = run(alone, tmp_path / "run").metrics
    assert trained["training"]["two_tower"] == result.metrics["training"]["two_tower"]
    assert trained["models"]["two_tower"] == result.metrics["models"]["two_tower"]


def test_the_next_days_run_does_not_race(raced: Raced) -> None:
    _, result = raced
    settings = load_config(result.folder / "config.toml")
    today = with_settings(settings, {"warm_start": result.folder, "split.test": 0.1})
    steps = [step.name for step in run_steps(today)]
    assert "train two_tower" in steps
    assert "race" not in steps
    source = tp.trained_in(result.folder)
    assert source is not None
    assert source.settings == today.model
    with pytest.raises(ConfigError, match="recipes: got some with warm_start"):
        with_settings(today, {"recipes": ["default"]})


def test_a_killed_race_goes_on_and_ends_the_same(raced: Raced, tmp_path: Path) -> None:
    """It is killed in a round and after the race."""
    _, result = raced
    config = config_in(tmp_path, **UNEXPORTED)
    stops: list[Any] = [("race: quick", 2), "race", ""]
    *stopped, last = told = [StoppedIn(stop) for stop in stops]
    for watched in stopped:
        with pytest.raises(Stopped):
            run(config, tmp_path / "run", progress=watched)
    again = run(config, tmp_path / "run", progress=last)
    assert curves_of(again) == curves_of(result)
    assert again.metrics["models"] == result.metrics["models"]
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
    """At first, only recipes with an epoch have a known speed."""
    told = [name for name, done in watched.tasks if done and "race" in name]
    assert len(told) == sum(map(len, curves_of(raced[1]).values()))
    minutes, untimed = r", at most about \d+ CPU minutes?", r", [123] recipes? not timed yet"
    leading = r": \w+ \(leading: \w+, 0\.\d{4}\)"
    for name in told[1:]:
        left = rf"{minutes}|{untimed}|{minutes}{untimed}"
        assert re.fullmatch(rf"race, round \d+, 3 recipes left({left}){leading}", name)


def test_a_turn_is_described_with_the_time_of_all_recipes() -> None:
    """`slow` has 40 of its 50 epochs left, of 6 s each, and `new` has not begun."""
    slow, quick = (
        Curve(name, tuple(epoch * i for i in range(1, 11)), (best,) * 10)
        for name, epoch, best in (("slow", 6.0, 0.2), ("quick", 2.0, 0.1))
    )
    epochs = with_settings(RunConfig(), {"training.max_epochs": 50})

    def told(within: str, *curves: Curve, budget: float | None = None) -> str:
        race: Any = SimpleNamespace(curves={curve.name: curve for curve in curves})
        race.configs = dict.fromkeys(race.curves, epochs)
        race.config = epochs.model_copy(update={"budget": budget})
        return _Trainings._describe(race, "slow", within)

    within, new = "round 2, 2 recipes left", Curve("new")
    leads = ": slow (leading: slow, 0.2000)"
    # 240 + 80 seconds.
    assert told(within, slow, quick) == f"race, {within}, at most about 6 CPU minutes{leads}"
    first = f"race, {within}, at most about 4 CPU minutes, 1 recipe not timed yet{leads}"
    assert told(within, slow, new) == first
    assert told(within, Curve("slow"), new) == f"race, {within}, 2 recipes not timed yet: slow"
    for more in (quick, new):  # The budget bounds those whose speed is unknown, too.
        spent = slow.spent + more.spent
        bounded = told(within, slow, more, budget=spent + 100)
        assert bounded == f"race, {within}, at most about 2 CPU minutes{leads}"
    # Once the race is decided, the others and the budget do not count any more.
    assert (
        told("", slow, quick, budget=1.0)
        == "the winner trains on, at most about 4 CPU minutes: slow"
    )


def test_a_budget_ends_the_race(tmp_path: Path) -> None:
    short = {"budget": "0.001s", "training.refit": False, **UNEXPORTED}
    result = run(config_in(tmp_path, **short), tmp_path / "run")
    trained = {name: len(values) for name, values in curves_of(result).items()}
    assert trained == {"default": 1, "quick": 0, "sets": 0}
    assert result.metrics["race"]["winner"] == "default"
    assert "quick: not trained before the budget ended" in result.metrics["race"]["lines"]
    # The winner is still trained to its end.
    assert len(result.metrics["training"]["two_tower"]["history"]["val_ndcg@20"]) == 3


def test_a_budget_has_a_unit() -> None:
    for text, seconds in (("90", 90.0), ("90s", 90.0), ("10m", 600.0), ("1.5h", 5400.0)):
        assert RunConfig(budget=text).budget == RunConfig(budget=seconds).budget == seconds
    for wrong in ("ten minutes", "10d", "0", "-5", "m"):
        with pytest.raises(ConfigError, match="budget"):
            RunConfig(budget=wrong)


IN_ORDER = ("quick", "sequence", "sparse")
ORDERED_LOG = Log.from_table(event_table("int").select(["user_id", "item_id"]))


@pytest.mark.parametrize(("is_ordered", "given", "racing", "why"), [
    (True, {}, RECIPES, {}),
    (False, {}, ("default", "sets"), dict.fromkeys(IN_ORDER, "is_ordered")),
    (True, {"training.examples": "sets"}, (*IN_ORDER, "sets"), {"default": "model.negatives"}),
    (True, {"training.batch_size": 50}, ("default", "sets"),
     dict.fromkeys(IN_ORDER, "training.batch_size")),
    (True, {"training.max_epochs": 2}, ("default", *IN_ORDER), {"sets": "warm-up"}),
])  # fmt: skip
def test_who_races(is_ordered: bool, given: Any, racing: Any, why: Any, tmp_path: Path) -> None:
    log = dataclasses.replace(ORDERED_LOG, is_ordered=is_ordered)
    # Given settings may contradict those that a recipe would replace.
    training = TrainingSettings(**{x.removeprefix("training."): y for x, y in given.items()})
    tables = {"data": DataConfig(is_ordered=is_ordered), "training": training}
    asked = {"recipes": RECIPES, "fixed": tuple(given), **tables}
    config = RunConfig.model_construct(**{**dict(RunConfig()), **asked})
    data = TrainingSet.build(log, tmp_path, seed=0)
    found, not_begun = trainable_recipes(config, data)
    assert tuple(found) == racing
    assert not_begun.keys() == why.keys()
    for name, fragment in why.items():
        assert fragment in not_begun[name]


def test_if_none_can_race_the_first_recipe_says_why(tmp_path: Path) -> None:
    """`sets` could have no hard negatives anyway, whatever the log is."""
    config = with_settings(RunConfig(), {"model.hard": "funnel", "recipes": RECIPES})
    data = TrainingSet.build(ORDERED_LOG, tmp_path, seed=0, hard=config.model.hard)
    config = with_settings(config, {"fixed": ["model.hard"]})
    with pytest.raises(ValueError, match=r"none of .* positives has one"):
        trainable_recipes(config, data)


def test_sets_do_not_race_in_a_log_with_request_features(tmp_path: Path) -> None:
    table = event_table("int").select(["user_id", "item_id"])
    table = table.append_column("device", [["ios"] * table.num_rows])
    log = Log.from_table(table, request_features={"device": "categorical"})
    data = TrainingSet.build(log, tmp_path, seed=0)
    found, not_begun = trainable_recipes(RunConfig(recipes=RECIPES), data)
    assert tuple(found) == ("default", *IN_ORDER)
    assert "request features" in not_begun["sets"]


def test_recipes_that_the_given_settings_make_equal_race_once(tmp_path: Path) -> None:
    every = list(dict.fromkeys(itertools.chain.from_iterable(map(recipe, RECIPES))))
    config = with_settings(RunConfig(), {"recipes": RECIPES, "fixed": every})
    data = TrainingSet.build(ORDERED_LOG, tmp_path, seed=0)
    found, not_begun = trainable_recipes(config, data)
    assert tuple(found) == ("default",)
    assert set(not_begun.values()) == {"your settings make it equal to default"}
    # A recipe leaves the data and the evaluation alone.
    for name in RECIPES[1:]:
        left_out = PRESETS[name][1].keys() - recipe(name).keys()
        assert all(x.startswith(("data.", "evaluation.")) for x in left_out), name


def test_a_race_in_python_is_one_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log = Log.from_table(event_table("int"))
    train, validation, _ = log.split("last_share", validation=0.1, test=0.2)
    settings = {**GIVEN, "training.max_epochs": 4}
    names = ("default", "sets")
    model, race = tp.race(train, validation, recipes=names, settings=settings, folder=tmp_path)
    assert isinstance(race, Race)
    assert [curve.name for curve in race.curves] == ["default", "sets"]
    won = next(curve for curve in race.curves if curve.name == race.winner)
    assert tuple(model.result.history["val_ndcg@20"]) == won.values
    assert str(race).splitlines() == race.lines()
    assert len(race.lines()) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == sum(len(curve.values) for curve in race.curves)
    first = "race, round 1, 2 recipes left, 2 recipes not timed yet: default, 1/4 epochs: loss"
    assert told[0].startswith(first)
    ids, _ = model.retrieve([{"history": [10, 20]}], k=5)
    assert ids.shape == (1, 5)
    # The folder keeps the race: the second call trains nothing.
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("epoch-*.json")}
    again, same = tp.race(train, validation, recipes=names, settings=settings, folder=tmp_path)
    for wrong, message in (
        ({"data.ties": "drop"}, r"data\.ties: a race reads only model, training"),
        ({"evaluation.baselines": ["ease"]}, "a race reads only"),
        ({"trainng.max_epochs": 3}, "did you mean 'training"),
    ):
        with pytest.raises(ConfigError, match=message):
            tp.race(train, validation, settings=wrong)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingSet, "build", lambda *_, **__: pytest.fail("Samples were built."))
        for recipes, message in (
            (["sequences"], "did you mean 'sequence'"),
            ([], "recipes: got none"),
        ):
            with pytest.raises(ConfigError, match=message):
                tp.race(train, validation, recipes=recipes)
    assert same.curves == race.curves
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("epoch-*.json")} == files
    assert again.retrieve([{"history": [10, 20]}], k=5)[0].tolist() == ids.tolist()


def test_the_record_of_a_race_reads_back(raced: Raced) -> None:
    config, result = raced
    folder = RunFolder(result.folder)
    record = read_record(folder.race_file)
    assert RunConfig(**record["asked"]) == config
    assert record["race"] == json.loads(json.dumps(result.metrics["race"]))
    assert folder.settled(config) == folder.settings()
    # Settings that may change in a started run may also change here.
    opened = with_settings(config, {"export.gate": True})
    assert folder.settled(opened).export.gate
    other = with_settings(config, {"seed": 9})
    assert folder.settled(other) is other
