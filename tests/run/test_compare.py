"""Comparison of sampling plans: what each plan is, that they share everything else, resuming."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.small_log import Stopped, Watched, small_config
from tfrs_pipeline import FunnelLosers, Popularity, Uniform
from tfrs_pipeline.config import ConfigError, RunConfig, dump_config, with_settings
from tfrs_pipeline.durable import read_record
from tfrs_pipeline.evaluation.bootstrap import Interval
from tfrs_pipeline.run.compare import (
    PlanComparison,
    compare,
    compared_in_words,
    comparison_figure,
    every_loser,
    sampling_plans,
)
from tfrs_pipeline.run.data import prepare
from tfrs_pipeline.run.measure import evaluate_all
from tfrs_pipeline.run.training import train_and_refit
from tfrs_pipeline.sources.simulated import FunnelOptions, simulate_funnel

PLANS = ("in_batch_uncorrected", "in_batch", "uniform", "popularity", "mixed", "hybrid")
NUM_EPOCHS, MAX_STEPS = 2, 20  # An epoch has twelve steps.


def funnel_config(folder: Path, **compare_settings: Any) -> RunConfig:
    settings: dict[str, Any] = {"split": {"kind": "last_share"}}
    # Two epochs are more than a plan's budget.
    settings["training"] = {"max_epochs": 9, "patience": 9, "refit": False}
    settings["compare"] = {"hard_shares": [0.1], "resampling_exponents": [0.5], **compare_settings}
    return small_config(folder, {"path": folder / "funnel.parquet"}, **settings)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("funnel")
    stages = {"num_retrieved": 30, "num_pre_ranked": 15, "num_ranked": 8, "num_exposed": 5}
    options = FunnelOptions(**stages, click_bias=-2.0)
    made = simulate_funnel(num_users=150, num_items=400, num_requests=1500, seed=1, options=options)
    made.log.events.to_parquet(folder / "funnel.parquet")
    plans = ["in_batch_uncorrected", "mixed", "hybrid"]
    return funnel_config(folder, plans=plans, max_steps=MAX_STEPS)


@pytest.fixture(scope="module")
def compared(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> PlanComparison:
    return compare(config, tmp_path_factory.mktemp("compared"))


# What the plans are


def test_a_check_shows_the_data_and_the_plans_of_the_comparison(
    config: RunConfig, compared: PlanComparison, here: Path, command: Any
) -> None:
    Path("compare.toml").write_text(dump_config(config))
    code, shown, _ = command("compare", "--config", "compare.toml", "--check")
    assert code == 0
    # The config has no hard negatives: losers are counted because the plan "hybrid" wants them.
    samples = read_record(compared.folder / "samples" / "selection" / "report.json")
    for stage, pool in samples["hard_negatives"].items():
        assert f"hard negatives, {stage}: {pool['num_samples']:,} positives have some (" in shown
    assert "3 plans: in_batch_uncorrected, mixed, hybrid_0.1\n" in shown
    assert [path.name for path in here.iterdir()] == ["compare.toml"]


def test_what_a_plan_cannot_train_on_is_refused_before_the_first_one_is_trained(
    config: RunConfig, here: Path, command: Any
) -> None:
    plans = {"compare.plans": ["mixed", "hybrid"], "compare.max_steps": None}
    warm_up = {"training.warmup_steps": 1000, "training.decay": "cosine"}
    Path("compare.toml").write_text(dump_config(with_settings(config, plans | warm_up)))
    for more in (["--check"], ["--run-dir", "run"]):
        answer = command("compare", "--config", "compare.toml", *more)
        assert answer.code
        assert "A warm-up of 1000 steps leaves nothing of" in " ".join(answer.err.split())
    assert not [*here.glob("run/plans/*/checkpoints/*/*")]


def test_positives_trained_together_are_single_in_every_plan(
    config: RunConfig, here: Path, command: Any
) -> None:
    easy = ["uniform:num=16", "popularity:num=16"]
    together = {"training.examples": "sets", "model.negatives": easy, "model.hard": None}
    plans = {"compare.plans": ["in_batch", "mixed"]}
    Path("compare.toml").write_text(dump_config(with_settings(config, together | plans)))
    answer = command("compare", "--config", "compare.toml", "--check")
    assert answer.code == 0
    assert "every plan is trained with training.examples 'single'" in answer.out


def test_plans_change_the_negatives_and_nothing_else(tmp_path: Path) -> None:
    config = funnel_config(tmp_path, plans=[*PLANS, "hybrid_50_50", "resampled", "exposed"])
    plans, notes = sampling_plans(config, ["retrieved", "pre_ranked", "exposed"])
    assert notes == []
    of = {name: with_settings(config, plan) for name, plan in plans.items()}
    easy = "in_batch_uncorrected in_batch uniform popularity mixed"
    assert list(of) == f"{easy} hybrid_0.1 hybrid_50_50 resampled_0.5 exposed_0.1".split()
    sampling = ("negatives", "hard", "resampling_exponent")
    same = {"correction": "mixture"} | {x: getattr(config.model, x) for x in sampling}
    for name, plan in of.items():
        assert plan.model_copy(update={"model": config.model}) == config, name
        assert plan.model.model_copy(update=same) == config.model, name
        assert (plan.model.correction == "none") == (name == "in_batch_uncorrected")
    kinds = {name: plan.model.negatives for name, plan in of.items()}
    num_columns = {name: sum(getattr(x, "num", 255) for x in kinds[name]) for name in kinds}
    # In-batch plans cannot have more columns; all others have equally many.
    assert num_columns.pop("in_batch") == num_columns.pop("in_batch_uncorrected") == 255
    assert set(num_columns.values()) == {255 + 32}
    assert (kinds["popularity"], kinds["uniform"]) == ((Popularity(287, 0.75),), (Uniform(287),))
    hard = {name: plan.model.hard for name, plan in of.items() if plan.model.hard is not None}
    assert {name: (kind.share, kind.stages) for name, kind in hard.items()} == {
        "hybrid_0.1": (0.1, ("retrieved", "pre_ranked")),
        "hybrid_50_50": (0.5, ("retrieved", "pre_ranked")),
        "exposed_0.1": (0.1, ("exposed",)),
    }
    assert {n for n, plan in of.items() if plan.model.resampling_exponent} == {"resampled_0.5"}


def test_without_losers_hybrids_are_missing(tmp_path: Path) -> None:
    config = funnel_config(tmp_path, plans=["mixed", "hybrid", "hybrid_50_50", "exposed"])
    plans, notes = sampling_plans(config, ["ranked"])
    assert list(plans) == ["mixed"]
    said = " is missing: no positive has an item of "
    assert [note.partition(said)[::2] for note in notes] == [
        ("plan hybrid", "retrieved or pre_ranked in its request"),
        ("plan hybrid_50_50", "retrieved or pre_ranked in its request"),
        ("plan exposed", "exposed in its request"),
    ]


def test_hybrid_plans_are_the_users_own_losers_with_other_shares(tmp_path: Path) -> None:
    own = FunnelLosers(stages=("ranked", "pre_ranked"), bottom_share=0.1, num=2, share=0.2)
    config = funnel_config(tmp_path, plans=["mixed", "hybrid", "exposed"])
    config = with_settings(config, {"model.hard": own})
    # Exposed items are negatives only if the user asks for them and the log has some.
    assert "exposed" not in RunConfig().compare.plans
    asked = every_loser(config)
    assert asked == replace(own, stages=(*own.stages, "exposed"), allow_exposed=True)
    plans, notes = sampling_plans(config, ["ranked", "retrieved"])
    assert notes == ["plan exposed is missing: no positive has an item of exposed in its request"]
    assert plans["hybrid_0.1"]["model.hard"] == replace(own, stages=("ranked",), share=0.1)
    # `bottom_share` is only about ranked items.
    plans, _ = sampling_plans(config, ["pre_ranked"])
    losers = FunnelLosers(stages=("pre_ranked",), num=2, share=0.1)
    assert plans["hybrid_0.1"]["model.hard"] == losers
    (note,) = [x for x in sampling_plans(config, ["retrieved"])[1] if "hybrid" in x]
    assert "no positive has an item of ranked or pre_ranked" in note


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"plans": ["in_batch"]}, "reference: got 'mixed', which is not among"),
        ({"plans": []}, "plans: .*must list at least one"),
        ({"hard_shares": [0.1, 0.1]}, "hard_shares.*twice"),
    )
    for settings, message in wrong:
        with pytest.raises(ConfigError, match=message):
            funnel_config(tmp_path, **settings)
    # All plans start from random weights.
    config = funnel_config(tmp_path).model_copy(update={"warm_start": Path("runs/yesterday")})
    with pytest.raises(ConfigError, match=r"^warm_start: got 'runs/yesterday': .*random weights"):
        compare(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# What comes out


def test_plans_are_compared_with_the_reference_query_by_query(compared: PlanComparison) -> None:
    evaluation = compared.evaluation
    mixed, uncorrected, hybrid = evaluation.results.values()
    assert list(evaluation.results) == ["mixed", "in_batch_uncorrected", "hybrid_0.1"]
    assert list(evaluation.differences) == ["in_batch_uncorrected", "hybrid_0.1"]
    for metric, values in mixed.per_query.items():
        interval = evaluation.differences["hybrid_0.1"][metric]
        expected = np.nanmean(hybrid.per_query[metric] - values)
        assert interval.mean == pytest.approx(expected, abs=1e-12), metric
        assert interval.low <= interval.mean <= interval.high
    # The interval is tighter than the separate two, because queries are paired.
    difference = evaluation.differences["in_batch_uncorrected"]["ndcg@20"]
    apart = [x.overall.intervals["ndcg@20"] for x in (uncorrected, mixed)]
    assert difference.high - difference.low < sum(x.high - x.low for x in apart)


def test_files_hold_the_plans(compared: PlanComparison) -> None:
    saved = json.loads((compared.folder / "comparison.json").read_text())
    evaluation = compared.evaluation
    assert evaluation.summary().items() <= saved.items()
    assert saved["plans"]["mixed"]["epochs"] == compared.trainings["mixed"].best_epoch
    # Two epochs are the budget in steps.
    epochs = [*compared.folder.glob("plans/mixed/checkpoints/selection/epoch-*.json")]
    assert max(path.stem for path in epochs) == f"epoch-{NUM_EPOCHS}"
    text = (compared.folder / "comparison.md").read_text()
    assert all(name in text for name in evaluation.results)
    assert (compared.folder / "comparison.svg").read_text().startswith("<svg xmlns=")
    (cut_off,) = compared.notes
    assert cut_off.startswith("compare.max_steps ended every plan after 2 epochs")
    assert f"\n- {cut_off}\n" in text
    # A terminal gets only the first columns that fit; none is wrapped.
    whole, narrow = compared.table(), compared.table(width=80)
    assert max(map(len, narrow.split("\n"))) <= 80 < max(map(len, whole.split("\n")))
    assert [line[:30] for line in narrow.split("\n")] == [line[:30] for line in whole.split("\n")]


def test_mixed_equals_a_run(config: RunConfig, compared: PlanComparison, tmp_path: Path) -> None:
    data = prepare(config, tmp_path)
    plain = with_settings(config, {"model.hard": None, "training.max_epochs": NUM_EPOCHS})
    result = evaluate_all(plain, {"model": train_and_refit(plain, data)}, data)
    found = compared.evaluation
    pairs: Any = ((found, result), (found.other, result.other))
    for measured, again in pairs:
        mixed = measured.results["mixed"]
        assert mixed.overall.intervals == again.first.overall.intervals
        assert mixed.slices["tail"].intervals == again.first.slices["tail"].intervals


def test_figure_shows_the_plans(compared: PlanComparison) -> None:
    results = compared.evaluation.results
    gains, slices = comparison_figure(compared.evaluation).axes
    assert [label.get_text() for label in gains.get_yticklabels()] == list(results)
    (tail,) = (line for line in slices.lines if line.get_label() == "tail")
    expected = [x.slices["tail"].intervals["recall@20"].mean for x in results.values()]
    assert np.asarray(tail.get_xdata()).tolist() == expected


# How it runs


def test_what_a_comparison_comes_to_is_said() -> None:
    """It depends on whether the interval of a difference excludes 0, holds it, or is unknown."""
    ends = {"hybrid": (0.09, 0.11), "popularity": (-0.01, 0.03), "uniform": (-0.11, -0.09)}
    ends |= {"one query": (np.nan, np.nan), "exposed": (0.1, 0.12)}
    means = {"mixed": 0.3, "hybrid": 0.4, "popularity": 0.31, "uniform": 0.2, "one query": 0.3}
    means["exposed"] = 0.41

    def measured(name: str) -> Any:
        overall = SimpleNamespace(intervals={"ndcg@5": Interval(means[name], 0, 1)})
        return SimpleNamespace(overall=overall)

    def said(*names: str) -> str:
        differences = {x: {"ndcg@5": Interval(0.0, *ends[x])} for x in names}
        results = {x: measured(x) for x in ("mixed", *names)}
        found: Any = SimpleNamespace(results=results, differences=differences)
        return compared_in_words(found, "ndcg@5").removeprefix("in ndcg@5 ")

    assert said("uniform", "popularity", "hybrid", "one query") == (
        "hybrid beats mixed; popularity, one query tie with mixed; uniform is worse than mixed"
    )
    # The highest plan may tie with the reference, or be the reference itself.
    one = "popularity ties with mixed; popularity is highest, by no more than chance"
    assert said("popularity") == one
    assert said("uniform") == "mixed is highest; uniform is worse than mixed"
    assert said("hybrid", "exposed") == "hybrid, exposed beat mixed, exposed the most"


def test_a_stopped_one_goes_on(config: RunConfig, compared: PlanComparison, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compared.folder, tmp_path / "run"))
    for path in (*folder.glob("comparison.*"), *folder.glob("plans/mixed/checkpoints/*/*")):
        path.unlink()
    shutil.rmtree(folder / "plans" / "hybrid_0.1")
    first, second = Watched(("mixed, selection", 1)), Watched()
    with pytest.raises(Stopped):
        compare(config, folder, progress=first)
    again = compare(config, folder, progress=second)
    assert again.evaluation.summary() == compared.evaluation.summary()
    epochs = Counter(step for step in first.tasks + second.tasks if ", " in step[0] and step[1])
    names = ("mixed, selection", "hybrid_0.1, selection")
    assert epochs == {(name, i): 1 for name in names for i in range(1, NUM_EPOCHS + 1)}
