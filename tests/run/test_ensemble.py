"""A run whose race ends in a sum: its trainings, its export, the next day, and how it resumes."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tfrs_pipeline as tp
from tests.run.test_race import GIVEN, config_in
from tests.small_log import Stopped, Watched
from tests.tracing import tracing_once
from tfrs_pipeline.config import RunConfig, with_settings
from tfrs_pipeline.model.ensemble import FittedSum
from tfrs_pipeline.model.ensemble_choice import Choice
from tfrs_pipeline.model.ials import FittedIals
from tfrs_pipeline.model.projection import Vectors
from tfrs_pipeline.presets import PRESETS
from tfrs_pipeline.report.facts import gather_facts, write_report
from tfrs_pipeline.run import race, training
from tfrs_pipeline.run.data import prepare
from tfrs_pipeline.run.folder import MODEL, UNCORRECTED, RunFolder
from tfrs_pipeline.run.pipeline import RunResult, run
from tfrs_pipeline.run.plans import Plan, ensemble_in, models_of, resolve_settings
from tfrs_pipeline.run.race import planned
from tfrs_pipeline.run.training import check_trainings, queries_of

pytestmark = pytest.mark.usefixtures("quick_runs")


def choose(members: Mapping[str, Vectors], *_: Any, winner: str, **__: Any) -> Choice:
    """Sums the winner, the next recipe and iALS, whatever validation says."""
    other = next(name for name in members if name != winner)
    weights, nothing = (
        {winner: 1.0, other: 0.3, "ials": 0.6},
        {"mean": 0.0, "low": 0.0, "high": 0.0},
    )
    return Choice(weights, "ndcg@20", 0.1, 0.2, nothing)


@pytest.fixture(scope="module")
def summing() -> Iterator[None]:
    """Sums the last recipe and the one before it, each with the last shrinkage that is tried."""
    times = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race, "choose", choose)
        # Each measurement is better than the one before.
        patch.setattr(race, "measure_vectors", lambda x, *_: np.full(len(x), float(next(times))))
        yield


@pytest.fixture(scope="module")
def summed(module_path: Path, summing: None) -> tuple[RunConfig, RunResult]:
    config = config_in(module_path, recipes=["sets", "quick"], members=5)
    with tracing_once():
        return config, run(config, module_path / "run")


def shrunk(config: RunConfig, name: str) -> RunConfig:
    """Returns the settings of a recipe with the shrinkage that its race chooses."""
    return with_settings(planned(config, PRESETS[name]), {"model.history_shrinkage": 4.0})


def test_a_run_exports_the_sum_of_its_race(summed: tuple[RunConfig, RunResult]) -> None:
    config, result = summed
    folder = RunFolder(result.folder)
    assert folder.settings() == config
    ensemble, raced = ensemble_in(result.folder), result.metrics["race"]["recipes"]
    first, other = ensemble.plans
    assert ensemble.weights == {first: 1.0, other: 0.3, "ials": 0.6}
    for name, plan in ensemble.plans.items():
        assert plan == Plan.of(shrunk(config, name), len(raced[name]["values"]))
    # The best with its shrinkage, which is not that of the curves.
    curves = {x: max(y["values"]) for x, y in raced.items()}
    assert first == "quick" != max(curves, key=lambda name: curves[name])
    assert "quick won" in result.metrics["notes"]["race"][0]
    # Both were trained in the race, and again on training and validation; no epoch was trained
    # twice.
    for name in (first, other):
        trained = folder.checkpoints / name
        assert sorted(path.name for path in trained.iterdir()) == ["refit", "selection"]
        history = result.metrics["training"][name]["history"]["val_ndcg@20"]
        assert history == raced[name]["values"]
    # The export answers as the sum of the members, read back one by one.
    data = prepare(config, result.folder)
    members = {name: tp.trained_in(result.folder, "refit", name) for name in (first, other)}
    # iALS too was fitted again to training and validation.
    members["ials"] = FittedIals.fit(tp.Ials(seed=config.seed), data.split.before_test)
    queries = queries_of(config, data.validation).queries
    again = FittedSum.of(members, {first: 1.0, other: 0.3, "ials": 0.6}, queries)
    requests = [{"history": [10, 20, 30]}, {"history": [400]}, {}]
    ids, scores = tp.load(result.export_folder).retrieve(requests, k=9)
    expected = again.retrieve(requests, k=9)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_allclose(scores, expected[1], rtol=1e-4, atol=1e-5)
    # The best member alone is measured beside the sum, and is no baseline.
    assert {"two_tower", "best_member"} <= result.metrics["models"].keys()
    assert result.metrics["models"]["two_tower"] != result.metrics["models"]["best_member"]
    lines = result.metrics["race"]["lines"]
    assert any(line.startswith(f"the sum 1 {first} + 0.3 {other} + 0.6 ials:") for line in lines)
    page = write_report(result.folder).read_text(encoding="utf-8")
    assert "two_tower is the sum of models" in page
    assert list(gather_facts(result.folder).trainings) == [first, other]


def test_the_model_of_a_sum_is_asked_by_member(summed: tuple[RunConfig, RunResult]) -> None:
    _, result = summed
    with pytest.raises(ValueError, match=r"is a sum.*give name, one of \w+, \w+"):
        tp.trained_in(result.folder)
    # iALS is fitted, not trained.
    assert tp.trained_in(result.folder, name="ials") is None


def test_the_uncorrected_model_of_a_sum_is_its_first_member(
    summed: tuple[RunConfig, RunResult],
) -> None:
    """A member keeps its own settings, so the sum without the correction would be the sum."""
    config, result = summed
    named = with_settings(config, {"evaluation.baselines": ["uncorrected", "ease"]})
    assert models_of(named) == [MODEL]  # It is not named by the user.
    given = {"fixed": [*GIVEN, "evaluation.baselines"]}
    assert models_of(with_settings(named, given)) == [MODEL, UNCORRECTED]
    ensemble = ensemble_in(result.folder)
    _, plan = ensemble.training(UNCORRECTED)
    first, *_ = ensemble.plans.values()
    assert plan.model == first.model.model_copy(update={"correction": "none"})
    assert plan.training == first.training


def test_the_next_days_sum_starts_from_each_member(
    summed: tuple[RunConfig, RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, result = summed
    today = with_settings(
        config,
        {"recipes": (), "warm_start": result.folder, "split.test": 0.1, "export.gate": False},
    )
    folder = RunFolder(tmp_path / "today")
    settings = resolve_settings(today, folder)
    yesterday = ensemble_in(result.folder)
    trained = run(settings, folder.path)
    assert ensemble_in(folder.path).weights == yesterday.weights
    assert list(trained.metrics["training"]) == ["two_tower", *yesterday.plans]
    assert "ials: fitted anew" in "".join(trained.metrics["notes"]["train two_tower"])
    for name in yesterday.plans:
        notes = trained.metrics["notes"]["train two_tower"]
        assert f"{name}: started from {result.folder}" in notes
        epochs = len(trained.metrics["training"][name]["history"]["val_ndcg@20"])
        assert epochs <= settings.training.max_epochs
    model = tp.load(trained.export_folder)
    assert model.manifest["run"] == str(folder.path.resolve())
    # `--check` compares each member with the one that it starts from.
    compared = []
    monkeypatch.setattr(training, "WarmStart", lambda *arguments: compared.append(arguments))
    check_trainings(settings, prepare(settings, folder.path).selection)
    for (source, plan, *_), name in zip(compared, yesterday.plans, strict=True):
        assert source.settings == plan.settings == yesterday.plans[name].model


def test_a_killed_sum_goes_on_and_ends_the_same(
    summed: tuple[RunConfig, RunResult], tmp_path: Path
) -> None:
    _, result = summed
    config = config_in(tmp_path, recipes=["sets", "quick"], members=5, **{"export.index": "none"})
    _, other, ials = ensemble_in(result.folder).weights
    with tracing_once():
        for stop in ("chooses the sum", f"{other}, refit", ials):
            with pytest.raises(Stopped):
                run(config, tmp_path / "run", progress=StoppedAt(stop))
        again = run(config, tmp_path / "run")
    assert again.metrics["models"] == result.metrics["models"]


class StoppedAt(Watched):
    """Stops when a task begins."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.stop = task

    def task(self, name: str, done: int, total: int, note: str = "", /) -> None:
        super().task(name, done, total, note)
        if name == self.stop:
            raise Stopped
