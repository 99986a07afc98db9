"""Comparison of sampling plans: what each plan is, that they share everything else, resuming."""

import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats

import tfrs_pipeline as tp
from tests.small_log import Stopped, Watched, event_table, small_config, write
from tfrs_pipeline import FunnelLosers, Popularity, SamplingFrame, Uniform
from tfrs_pipeline.config import ConfigError, RunConfig, dump_config, with_settings
from tfrs_pipeline.durable import read_record
from tfrs_pipeline.evaluation.bootstrap import Interval
from tfrs_pipeline.evaluation.results import Evaluation, averaged
from tfrs_pipeline.messages import SILENT, Progress
from tfrs_pipeline.run.compare import (
    PLANS,
    compare_claimed,
    every_loser,
    num_columns,
    sampling_plans,
)
from tfrs_pipeline.run.comparison import WIDTH, Comparison, OverSeeds, compared_in_words
from tfrs_pipeline.run.data import prepare
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.measure import evaluate_all
from tfrs_pipeline.run.steps import RunContext
from tfrs_pipeline.run.training import train_and_refit
from tfrs_pipeline.sources.simulated import FunnelOptions, simulate_funnel

pytestmark = pytest.mark.usefixtures("traced_once")
METRIC = "ndcg@20"
EASY = ("mixed", "in_batch_uncorrected", "in_batch", "uniform", "popularity")
NUM_EPOCHS = 2


def funnel_config(folder: Path, **compare_settings: Any) -> RunConfig:
    settings: dict[str, Any] = {"split": {"kind": "last_share"}}
    settings["training"] = {"max_epochs": NUM_EPOCHS, "patience": 9, "refit": False}
    settings["compare"] = compare_settings
    return small_config(folder, {"path": folder / "funnel.parquet"}, **settings)


@pytest.fixture(scope="module")
def config(module_path: Path) -> RunConfig:
    stages = {"num_retrieved": 30, "num_pre_ranked": 15, "num_ranked": 8, "num_exposed": 5}
    options = FunnelOptions(**stages, click_bias=-2.0)
    made = simulate_funnel(num_users=150, num_items=400, num_requests=1500, seed=1, options=options)
    made.log.events.to_parquet(module_path / "funnel.parquet")
    return funnel_config(
        module_path, plans=["mixed", "in_batch_uncorrected", "hybrid_0.1"], seeds=2
    )


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    """Returns the folder of the comparison that the tests read."""
    return module_path / "compared"


@pytest.fixture(scope="module")
def compared(config: RunConfig, folder: Path) -> Comparison:
    return compare_plans(config, folder)


def compare_plans(config: RunConfig, folder: Path, progress: Progress = SILENT) -> Comparison:
    """Compares as the command does."""
    run = RunContext(config, RunFolder(folder), progress)
    with run.folder.claim(config, is_run=False):
        return compare_claimed(run)


# What the plans are


def test_a_check_shows_the_data_and_the_plans_of_the_comparison(
    config: RunConfig, compared: Comparison, folder: Path, here: Path, command: Any
) -> None:
    Path("compare.toml").write_text(dump_config(config))
    code, _, shown = command("compare", "--config", "compare.toml", "--check")
    assert code == 0
    # The config has no hard negatives: losers are counted because a plan wants them.
    samples = read_record(folder / "samples" / "selection" / "report.json")
    for stage, pool in samples["hard_negatives"].items():
        assert f"hard negatives, {stage}: {pool['num_samples']:,} positives have some (" in shown
    assert "3 plans: mixed, in_batch_uncorrected, hybrid_0.1\n" in shown
    assert [path.name for path in here.iterdir()] == ["compare.toml"]


def test_what_a_plan_cannot_train_on_is_refused_before_the_first_one_is_trained(
    config: RunConfig, here: Path, command: Any
) -> None:
    plans = {"compare.plans": ["mixed", "hybrid_0.1"]}
    warm_up = {"training.warmup_steps": 1000, "training.decay": "cosine"}
    Path("compare.toml").write_text(dump_config(with_settings(config, plans | warm_up)))
    for more in (["--check"], ["--run-dir", "run"]):
        answer = command("compare", "--config", "compare.toml", *more)
        assert answer.code
        assert "A warm-up of 1000 steps leaves nothing of" in " ".join(answer.err.split())
    assert not [*here.glob("run/plans/*/*/*/*")]


def test_positives_trained_together_are_single_in_every_plan(
    config: RunConfig, here: Path, command: Any
) -> None:
    easy = ["uniform:num=16", "popularity:num=16"]
    together = {"training.examples": "sets", "model.negatives": easy, "model.hard": None}
    plans = {"compare.plans": ["in_batch", "mixed"]}
    Path("compare.toml").write_text(dump_config(with_settings(config, together | plans)))
    answer = command("compare", "--config", "compare.toml", "--check")
    assert answer.code == 0
    assert "every plan is trained with training.examples 'single'" in answer.err


def test_plans_change_the_negatives_and_nothing_else(tmp_path: Path) -> None:
    names = [*EASY, "hybrid_0.1", "hybrid_0.5", "resampled_0.5", "exposed_0.1"]
    config = funnel_config(tmp_path, plans=names)
    plans, notes = sampling_plans(config, ["retrieved", "pre_ranked", "exposed"])
    assert notes == []
    configs = {name: with_settings(config, plan) for name, plan in plans.items()}
    assert list(configs) == names
    sampling = ("negatives", "hard", "resampling_exponent")
    same = {"correction": "mixture"} | {x: getattr(config.model, x) for x in sampling}
    for name, plan in configs.items():
        assert plan.model_copy(update={"model": config.model}) == config, name
        assert plan.model.model_copy(update=same) == config.model, name
        assert (plan.model.correction == "none") == (name == "in_batch_uncorrected")
    kinds = {name: plan.model.negatives for name, plan in configs.items()}
    in_batch = {name: config.training.batch_size - 1 for name in kinds if name.startswith("in_")}
    # In-batch plans cannot have more columns; all others have equally many.
    assert {name: num_columns(plan) for name, plan in configs.items()} == {
        **dict.fromkeys(names, 255 + 32),
        **in_batch,
    }
    assert (kinds["popularity"], kinds["uniform"]) == ((Popularity(287, 0.75),), (Uniform(287),))
    hard = {name: x.model.hard for name, x in configs.items() if x.model.hard is not None}
    assert {name: (kind.share, kind.stages) for name, kind in hard.items()} == {
        "hybrid_0.1": (0.1, ("retrieved", "pre_ranked")),
        "hybrid_0.5": (0.5, ("retrieved", "pre_ranked")),
        "exposed_0.1": (0.1, ("exposed",)),
    }
    assert {n for n, x in configs.items() if x.model.resampling_exponent} == {"resampled_0.5"}


def test_a_plan_counts_the_columns_of_any_kind(tmp_path: Path) -> None:
    """A kind has no `num` in common with others, but says how often it draws each item."""

    class Twice:
        def expected_count(self, frame: SamplingFrame) -> np.ndarray:
            return np.append(0.0, np.full(frame.num_candidates, 40 / frame.num_candidates))

    config = funnel_config(tmp_path)
    kinds = [Twice(), Uniform(8), Popularity(5)]
    model = config.model.model_construct(**{**dict(config.model), "negatives": kinds})
    config = config.model_construct(**{**dict(config), "model": model})
    assert num_columns(config) == 40 + 8 + 5
    assert PLANS["uniform"](config, 0.0) == {"model.negatives": (Uniform(53),)}


def test_without_losers_hybrids_are_missing(tmp_path: Path) -> None:
    config = funnel_config(tmp_path, plans=["mixed", "hybrid_0.1", "exposed_0.1"])
    plans, notes = sampling_plans(config, ["ranked"])
    assert list(plans) == ["mixed"]
    said = " is missing: no positive has an item of "
    assert [note.partition(said)[::2] for note in notes] == [
        ("plan hybrid_0.1", "retrieved or pre_ranked in its request"),
        ("plan exposed_0.1", "exposed in its request"),
    ]


def test_hybrid_plans_are_the_users_own_losers_with_other_shares(tmp_path: Path) -> None:
    own = FunnelLosers(stages=("ranked", "pre_ranked"), bottom_share=0.1, num=2, share=0.2)
    config = funnel_config(tmp_path, plans=["mixed", "hybrid_0.1", "exposed_0.1"])
    config = with_settings(config, {"model.hard": own})
    # Exposed items are negatives only if the user asks for them and the log has some.
    assert not any(name.startswith("exposed") for name in RunConfig().compare.plans)
    losers = every_loser(config)
    assert losers == replace(own, stages=(*own.stages, "exposed"), allow_exposed=True)
    plans, notes = sampling_plans(config, ["ranked", "retrieved"])
    assert notes == [
        "plan exposed_0.1 is missing: no positive has an item of exposed in its request"
    ]
    assert plans["hybrid_0.1"]["model.hard"] == replace(own, stages=("ranked",), share=0.1)
    # `bottom_share` is only about ranked items.
    plans, _ = sampling_plans(config, ["pre_ranked"])
    losers = FunnelLosers(stages=("pre_ranked",), num=2, share=0.1)
    assert plans["hybrid_0.1"]["model.hard"] == losers
    (note,) = [x for x in sampling_plans(config, ["retrieved"])[1] if "hybrid" in x]
    assert "no positive has an item of ranked or pre_ranked" in note


@pytest.mark.parametrize(("name", "message"), [
    ("uniforn", "compare.plans: got 'uniforn'; did you mean 'uniform'"),
    ("hybrid", "compare.plans: got 'hybrid'; did you mean 'hybrid_'.* .a number follows"),
    ("mixed0.1", "compare.plans: got 'mixed0.1'; did you mean 'mixed'"),
    ("hybrid_0", "share: got 0.0; must be greater than 0"),
])  # fmt: skip
def test_a_plan_that_there_is_not(name: str, message: str, tmp_path: Path) -> None:
    """It is refused before the log is read."""
    config = funnel_config(tmp_path, plans=["mixed", name])
    with pytest.raises(ConfigError, match=message):
        compare_plans(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_plans_of_which_none_is_left_are_refused(tmp_path: Path) -> None:
    """A log of clicks alone has no losers."""
    path = write(event_table("int"), tmp_path / "clicks.parquet")
    config = with_settings(
        small_config(tmp_path, {"path": path}), {"compare.plans": ("hybrid_0.1", "hybrid_0.5")}
    )
    with pytest.raises(ConfigError, match=r"compare.plans: none is left: plan hybrid_0\.1 is miss"):
        compare_plans(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"plans": []}, "plans: .*must list at least one"),
        ({"plans": ["mixed", "mixed"]}, "plans.*twice"),
        ({"seeds": 0}, "seeds: got 0"),
    )
    for settings, message in wrong:
        with pytest.raises(ConfigError, match=message):
            funnel_config(tmp_path, **settings)
    # All plans start from random weights.
    config = funnel_config(tmp_path).model_copy(update={"warm_start": Path("runs/yesterday")})
    with pytest.raises(ConfigError, match=r"^warm_start: got 'runs/yesterday': .*random weights"):
        compare_plans(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# What comes out


def test_plans_are_compared_with_the_reference_query_by_query(compared: Comparison) -> None:
    """A query's metric is its mean over the seeds; the interval is over the users."""
    evaluation = compared.evaluation
    mixed, uncorrected, _ = evaluation.results.values()
    assert list(evaluation.results) == ["mixed", "in_batch_uncorrected", "hybrid_0.1"]
    assert list(evaluation.differences) == ["in_batch_uncorrected", "hybrid_0.1"]
    for metric in mixed.per_query:
        interval = evaluation.differences["hybrid_0.1"][metric]
        gaps = [
            x.results["hybrid_0.1"].per_query[metric] - x.results["mixed"].per_query[metric]
            for x in compared.by_seed.values()
        ]
        expected = np.nanmean([np.mean(of_query) for of_query in zip(*gaps, strict=True)])
        assert interval.mean == pytest.approx(expected, abs=1e-12), metric
        assert interval.low <= interval.mean <= interval.high
    # The interval is tighter than the separate two, because queries are paired.
    difference = evaluation.differences["in_batch_uncorrected"][METRIC]
    apart = [x.overall.intervals[METRIC] for x in (uncorrected, mixed)]
    assert difference.high - difference.low < sum(x.high - x.low for x in apart)


def test_plans_are_compared_seed_by_seed(compared: Comparison) -> None:
    """SciPy's paired test has the same interval; the mean is the one over the users' means."""
    assert list(compared.by_seed) == [0, 1]
    for is_other in (False, True):
        every: Any = {s: x.other if is_other else x for s, x in compared.by_seed.items()}
        for name, part in (("overall", ""), ("tail", "tail/")):
            hybrid, mixed = (
                [of_plan(x.results[plan], name).intervals["recall@20"].mean for x in every.values()]
                for plan in ("hybrid_0.1", "mixed")
            )
            over = OverSeeds.of(dict(zip(every, np.subtract(hybrid, mixed), strict=True)))
            test = scipy.stats.ttest_rel(hybrid, mixed)
            assert test.confidence_interval() == pytest.approx((over.low, over.high))
            assert over.standard_error == pytest.approx(over.mean / test.statistic)
            if not is_other:
                found = compared.over_seeds["hybrid_0.1"][f"{part}recall@20"]
                assert vars(found) == {name: pytest.approx(x) for name, x in vars(over).items()}
                of_users = compared.evaluation.differences["hybrid_0.1"][f"{part}recall@20"]
                assert found.mean == pytest.approx(of_users.mean, abs=1e-12)
    # Seeds differ in their training alone, so all have the same queries.
    first, second = compared.by_seed.values()
    assert first.first.user_ids.tolist() == second.first.user_ids.tolist()
    assert first.first.per_query[METRIC].tolist() != second.first.per_query[METRIC].tolist()


def of_plan(result: Any, part: str) -> Any:
    return result.overall if part == "overall" else result.slices[part]


def test_the_mean_of_equal_evaluations_is_each(compared: Comparison) -> None:
    evaluation = compared.by_seed[1]
    assert averaged([evaluation]) is evaluation
    again = averaged([evaluation] * 3)
    assert json.dumps(again.summary()) == json.dumps(rounded(evaluation.summary(), again.summary()))
    with_request: Any = again.other
    assert isinstance(with_request, Evaluation)
    # Metrics of whole lists, which no query has, are averaged too.
    both, coverage = [*compared.by_seed.values()], "coverage@5"
    found = [x.first.overall.set_metrics[coverage] for x in (*both, averaged(both))]
    assert found[2] == pytest.approx((found[0] + found[1]) / 2)


def rounded(value: Any, like: Any) -> Any:
    """Replaces numbers by those of `like` where these are equal up to rounding."""
    if isinstance(value, dict):
        assert value.keys() == like.keys()
        return {name: rounded(x, like[name]) for name, x in value.items()}
    return like if isinstance(value, float) and value == pytest.approx(like, abs=1e-12) else value


def test_files_hold_the_plans(compared: Comparison, folder: Path) -> None:
    saved = json.loads((folder / "comparison.json").read_text())
    evaluation = compared.evaluation
    assert evaluation.summary().items() <= saved.items()
    assert saved["seeds"] == [0, 1]
    training = saved["trainings"]["mixed"]["1"]
    assert training["best_epoch"] == compared.trainings["mixed"][1].best_epoch
    assert saved["over_seeds"]["hybrid_0.1"][METRIC]["by_seed"].keys() == {"0", "1"}
    epochs = [*folder.glob("plans/mixed/seed-1/selection/epoch-*.json")]
    assert max(path.stem for path in epochs) == f"epoch-{NUM_EPOCHS}"
    text = (folder / "comparison.md").read_text()
    assert all(name in text for name in evaluation.results)
    assert (folder / "comparison.svg").read_text().startswith("<svg role=")
    assert all(f"\n- {line}\n" in text for line in compared.lines(None))


def test_what_is_printed_is_narrow(
    config: RunConfig, compared: Comparison, folder: Path, command: Any
) -> None:
    """A finished comparison trains nothing; it is measured and printed again."""
    answer = command("compare", "--run-dir", folder)
    assert answer.code == 0
    _, _, shown = answer.out.partition("\nmodel ")
    lines = [line for line in shown.splitlines() if str(folder) not in line]
    assert max(map(len, lines)) <= WIDTH < len(compared.table(width=None).partition("\n")[0])
    assert [line.split() for line in lines[1:4]] == [
        line.split() for line in compared.table().splitlines()[1:]
    ]
    assert "se, 2 seeds" in lines[0]
    reach = [scipy.stats.t.ppf(0.975, num - 1) for num in (2, 3)]
    warnings = [line for line in lines if line.startswith("two seeds rarely decide")]
    assert [f"{x:.1f}" for x in reach] == re.findall(r"\d+\.\d", warnings[0])
    # A narrow terminal gets only the first columns that fit; none is wrapped.
    whole, narrow = compared.table(), compared.table(width=80)
    assert max(map(len, narrow.split("\n"))) <= 80 < max(map(len, whole.split("\n")))
    assert [line[:30] for line in narrow.split("\n")] == [line[:30] for line in whole.split("\n")]
    # A notebook shows the same.
    shown = compared._repr_markdown_()
    assert all(line in shown for line in compared.lines())
    cells = [line.split() for line in compared.table(markdown=True).replace("|", " ").splitlines()]
    for found, line in zip(cells[2:], whole.splitlines()[1:], strict=True):
        assert found[: len(line.split())] == line.split()


def test_mixed_equals_a_run(config: RunConfig, compared: Comparison, tmp_path: Path) -> None:
    """The data is that of the config's seed, whatever the seed of the training."""
    seed, data = 1, prepare(config, tmp_path)
    plain = with_settings(config, {"model.hard": None})
    run = RunContext(plain, RunFolder(tmp_path))
    seeded = with_settings(plain, {"seed": seed})
    trained = train_and_refit(run, data, config=seeded, folder=tmp_path / "again")
    result = evaluate_all(plain, {"model": trained}, data)
    found = compared.by_seed[seed]
    pairs: Any = ((found, result), (found.other, result.other))
    for measured, again in pairs:
        mixed = measured.results["mixed"]
        assert mixed.overall.intervals == again.first.overall.intervals
        assert mixed.slices["tail"].intervals == again.first.slices["tail"].intervals


def test_the_figure_shows_what_each_plan_gains(compared: Comparison) -> None:
    figure = compared.plot()
    assert f"{METRIC} minus that of mixed" in figure.label
    for name, differences in compared.evaluation.differences.items():
        assert name.partition("_uncorr")[0] in figure.svg
        assert f"{differences[METRIC].mean:+.3f}".replace("0.", ".") in figure.svg
    # A plan alone has nothing to be above.
    first = compared.by_seed[0]
    results = {"mixed": first.results["mixed"]}
    alone = replace(compared, by_seed={0: replace(first, results=results, other="")})
    assert f"{METRIC} of each model" in alone.plot().label


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

    def said(*names: str, seeds: Any = None) -> str:
        differences = {x: {"ndcg@5": Interval(0.0, *ends[x])} for x in names}
        results = {x: measured(x) for x in ("mixed", *names)}
        found: Any = SimpleNamespace(results=results, differences=differences)
        over = {
            x: {"ndcg@5": OverSeeds.of(dict(enumerate((seeds or {}).get(x, [0.0]))))} for x in names
        }
        return compared_in_words(found, "ndcg@5", over).removeprefix("in ndcg@5 ")

    assert said("uniform", "popularity", "hybrid", "one query") == (
        "hybrid is highest; against mixed, better: hybrid; level: popularity, one query; "
        "worse: uniform"
    )
    # The highest plan may be level with the reference, or be the reference itself.
    assert said("popularity") == "popularity is highest; against mixed, level: popularity"
    assert said("uniform") == "mixed is highest; against mixed, worse: uniform"
    both = "exposed is highest; against mixed, better: hybrid, exposed"
    assert said("hybrid", "exposed") == both
    # With several seeds, their interval has to exclude 0 too.
    seeds = {"hybrid": [0.1, 0.11, 0.09], "exposed": [0.3, 0.02, 0.01]}
    assert said("hybrid", "exposed", seeds=seeds) == (
        "exposed is highest; against mixed, better: hybrid; level: exposed"
    )


@pytest.mark.nightly
def test_a_stopped_one_goes_on(
    config: RunConfig, compared: Comparison, folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folder, tmp_path / "run"))
    for path in (*folder.glob("comparison.*"), *folder.glob("plans/mixed/seed-1/*/*")):
        path.unlink()
    shutil.rmtree(folder / "plans" / "hybrid_0.1" / "seed-1")
    first, second = Watched(("mixed/seed_1, selection", 1)), Watched()
    with pytest.raises(Stopped):
        compare_plans(config, folder, progress=first)
    # It may have more seeds by then; any other change is another comparison.
    more = with_settings(config, {"compare.seeds": 3})
    again = compare_plans(more, folder, progress=second)
    assert list(again.by_seed) == [0, 1, 2]
    assert {seed: again.by_seed[seed].summary() for seed in (0, 1)} == {
        seed: x.summary() for seed, x in compared.by_seed.items()
    }
    epochs = Counter(step for step in first.tasks + second.tasks if ", " in step[0] and step[1])
    names = {"mixed/seed_1", "hybrid_0.1/seed_1", *(f"{x}/seed_2" for x in compared.trainings)}
    every = range(1, NUM_EPOCHS + 1)
    assert epochs == {(f"{name}, selection", i): 1 for name in names for i in every}
    with pytest.raises(ValueError, match=r"other settings \(model.dim: 16, now 8\)"):
        compare_plans(with_settings(more, {"model.dim": 8}), folder)


# In Python


def python_plans() -> dict[str, tp.TwoTower]:
    training = tp.TrainingSettings(
        batch_size=256, max_epochs=2, learning_rate=0.02, monitor=METRIC, patience=9
    )
    plan = tp.TwoTower(dim=8, negatives=[Uniform(32)], training=training)
    return {
        "plain": plan,
        "losers / exposed": plan.model_copy(update={"hard": FunnelLosers(num=2)}),
    }


def test_a_comparison_in_python_is_one_call(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    split = tp.Log.from_files(config.data.path).split("last_share", validation=0.1, test=0.2)
    plans, cutoffs = python_plans(), (5, 20)
    watched = Watched()
    asked: Any = {"plans": plans, "seed": 3, "cutoffs": cutoffs, "folder": tmp_path}
    found = tp.compare(*split, **asked, progress=watched)
    assert list(found.by_seed) == [3]
    assert Counter(name for name, _ in watched.tasks) == dict.fromkeys(plans, 2)
    # Each is what fitting and measuring it alone comes to; its losers are drawn by the first seed.
    plan = plans["plain"].model_copy(update={"seed": 3})
    alone = tp.evaluate(plan.fit(split.train, split.validation), split.test, cutoffs=cutoffs)
    values = found.by_seed[3].results["plain"].per_query
    assert {name: x.tolist() for name, x in values.items()} == {
        name: x.tolist() for name, x in alone.first.per_query.items()
    }
    assert found.settings["losers / exposed"]["hard"] == FunnelLosers(num=2)
    # The folder keeps the trainings and the files.
    assert {path.name for path in tmp_path.glob("comparison.*")} == {
        f"comparison.{kind}" for kind in ("json", "md", "svg")
    }
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("epoch-*.json")}
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    # The next seed is trained; another test is measured with the trainings that are there.
    test = split.test.sample(20)
    again = tp.compare(split.train, split.validation, test, **{**asked, "seeds": 2})
    told = capsys.readouterr().err.splitlines()
    assert [line[: line.index(": loss")] for line in told] == [
        f"{name}/seed_4, {epoch}/2 epochs" for name in plans for epoch in (1, 2)
    ]
    assert {path: path.stat().st_mtime_ns for path in files} == files
    fewer = again.by_seed[3].first
    places = np.searchsorted(found.by_seed[3].first.user_ids, fewer.user_ids)
    whole = found.by_seed[3].first.per_query[METRIC]
    assert fewer.per_query[METRIC].tolist() == whole[places].tolist()
    other = {"plain": plans["plain"].model_copy(update={"dim": 4})}
    with pytest.raises(ValueError, match=r"made of something else .dim: 8, now 4"):
        tp.compare(*split, **{**asked, "plans": other})


def test_plans_that_cannot_be_compared(config: RunConfig, tmp_path: Path) -> None:
    """They are refused before anything is trained."""
    split = tp.Log.from_files(config.data.path).split("last_share")
    warm_up = tp.TrainingSettings(warmup_steps=1000, decay="cosine", max_epochs=1)
    late: Any = {"plain": tp.TwoTower(dim=8), "late": tp.TwoTower(dim=8, training=warm_up)}
    for wrong, error, message in (
        ({"plans": {}}, TypeError, "one or more TwoTower. Received: {}"),
        ({"plans": {"popular": tp.MostPopular()}}, TypeError, "Received: {'popular'"),
        ({"plans": late}, ValueError, "A warm-up of 1000 steps leaves nothing"),
        ({"plans": late, "seeds": 0}, ValueError, "seeds must be a whole number, 1 or more"),
        ({"plans": late, "cutoffs": (0,)}, ConfigError, "cutoffs: got 0"),
    ):
        with pytest.raises(error, match=message):
            tp.compare(*split, **wrong, folder=tmp_path)
    assert not [*tmp_path.rglob("epoch-*")]
