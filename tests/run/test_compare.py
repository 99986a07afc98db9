"""Comparison of sampling plans: what each plan is, that they share everything else, resuming."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests.small_log import SMALL_TRAINING, Stopped, event_table, small_config, stop_at, write
from tfrs_pipeline.cli import main
from tfrs_pipeline.config import ConfigError, RunConfig, dump_config, with_settings
from tfrs_pipeline.durable import read_record
from tfrs_pipeline.evaluation.bootstrap import Interval
from tfrs_pipeline.evaluation.comparison import (
    PlanRow,
    compared_in_words,
    comparison_figure,
    comparison_table,
)
from tfrs_pipeline.negatives.funnel import FunnelLosers
from tfrs_pipeline.negatives.in_batch import InBatch
from tfrs_pipeline.negatives.popularity import Popularity
from tfrs_pipeline.negatives.uniform import Uniform
from tfrs_pipeline.run.compare import (
    PlanComparison,
    auc_rows,
    compare,
)
from tfrs_pipeline.run.data import prepare
from tfrs_pipeline.run.measure import evaluate_all
from tfrs_pipeline.run.plans import every_loser, sampling_plans
from tfrs_pipeline.run.steps import StepReport
from tfrs_pipeline.run.training import train_and_refit
from tfrs_pipeline.sources.simulated import FunnelOptions, simulate_funnel

PLANS = ("in_batch_uncorrected", "in_batch", "uniform", "popularity", "mixed", "hybrid", "mined")
NUM_EPOCHS, MAX_STEPS = 2, 20  # Of twelve steps each.


def funnel_config(folder: Path, *, min_rank: int = 10, **compare_settings: Any) -> RunConfig:
    """Makes settings for a small simulated funnel, which `write_funnel` writes."""
    return small_config(
        folder,
        {"source": "files", "path": folder / "funnel.parquet"},
        model={
            "dim": 16,
            "history_length": 10,
            "negatives": ["in_batch", "uniform:num=32"],
            "hard": {"kind": "mined", "min_rank": min_rank, "max_rank": 500, "every": 1},
        },
        # Two epochs are more than a plan's budget.
        training={**SMALL_TRAINING, "max_epochs": 9, "patience": 9, "refit": False},
        split={"kind": "last_share"},
        compare={"hard_shares": [0.1], "resampling_exponents": [0.5], **compare_settings},
    )


def write_funnel(folder: Path) -> None:
    simulation = simulate_funnel(
        num_users=150,
        num_items=400,
        num_requests=1500,
        seed=1,
        options=FunnelOptions(
            num_retrieved=30, num_pre_ranked=15, num_ranked=8, num_exposed=5, click_bias=-2.0
        ),
    )
    simulation.log.events.to_parquet(folder / "funnel.parquet")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("funnel")
    write_funnel(folder)
    plans = ["in_batch_uncorrected", "mixed", "hybrid", "mined"]
    return funnel_config(folder, min_rank=400, plans=plans, max_steps=MAX_STEPS)


@pytest.fixture(scope="module")
def compared(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> PlanComparison:
    return compare(config, tmp_path_factory.mktemp("compared"))


# What the plans are


def test_a_check_shows_the_data_and_the_plans_of_the_comparison(
    config: RunConfig,
    compared: PlanComparison,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "compare.toml"
    path.write_text(dump_config(config))
    assert main(["compare", "--config", str(path), "--check"]) == 0
    shown = capsys.readouterr().out
    # Mined negatives are the config's own: losers are counted because the plan "hybrid" wants them.
    samples = read_record(compared.folder / "samples" / "selection" / "report.json")
    for stage, pool in samples["hard_negatives"].items():
        assert f"hard negatives, {stage}: {pool['num_samples']:,} positives have some" in shown
    plans = [row.name for row in compared.rows]
    assert f"{len(plans)} plans: {', '.join(plans)}\n" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["compare.toml"]


def test_what_a_plan_cannot_train_on_is_refused_before_the_first_one_is_trained(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "compare.toml"
    plans = {"compare.plans": ["mixed", "hybrid"], "compare.max_steps": None}
    warm_up = {"training.warmup_steps": 1000, "training.decay": "cosine"}
    path.write_text(dump_config(with_settings(config, plans | warm_up)))
    for more in (["--check"], ["--run-dir", str(tmp_path / "run")]):
        assert main(["compare", "--config", str(path), *more])
        said = " ".join(capsys.readouterr().err.split())
        assert "A warm-up of 1000 steps leaves nothing of" in said
    assert not [*tmp_path.glob("run/plans/*/checkpoints/*/*")]


@pytest.mark.parametrize("examples", ["sequences", "sets"])
def test_positives_trained_together_are_single_in_every_plan(
    config: RunConfig, tmp_path: Path, examples: str, capsys: pytest.CaptureFixture[str]
) -> None:
    easy = ["uniform:num=16", "popularity:num=16"]
    together = {"training.examples": examples, "model.negatives": easy, "model.hard": None}
    path = tmp_path / "compare.toml"
    plans = {"compare.plans": ["in_batch", "mixed"]}
    path.write_text(dump_config(with_settings(config, together | plans)))
    assert main(["compare", "--config", str(path), "--check"]) == 0
    assert "every plan is trained with training.examples 'single'" in capsys.readouterr().out


def test_plans_change_the_negatives_and_nothing_else(tmp_path: Path) -> None:
    config = funnel_config(tmp_path, plans=[*PLANS, "hybrid_50_50", "resampled", "exposed"])
    plans, notes = sampling_plans(config, ["retrieved", "pre_ranked", "exposed"], 60, 9)
    assert notes == []
    of = {name: with_settings(config, plan) for name, plan in plans.items()}
    assert list(of) == [
        "in_batch_uncorrected",
        "in_batch",
        "uniform",
        "popularity",
        "mixed",
        "hybrid_0.1",
        "mined_0.1",
        "hybrid_50_50",
        "resampled_0.5",
        "exposed_0.1",
    ]
    for name, plan in of.items():
        assert plan.model_copy(update={"model": config.model}) == config, name
        towers = {
            field: getattr(config.model, field)
            for field in ("negatives", "hard", "resampling_exponent")
        }
        corrected = {"correction": "mixture"}
        assert plan.model.model_copy(update={**towers, **corrected}) == config.model, name
        assert (plan.model.correction == "none") == (name == "in_batch_uncorrected")
    num_columns = {
        name: sum(
            config.training.batch_size - 1 if isinstance(kind, InBatch) else kind.num
            for kind in plan.model.negatives
        )
        for name, plan in of.items()
    }
    # In-batch alone cannot have more; all others have as many.
    assert num_columns.pop("in_batch") == num_columns.pop("in_batch_uncorrected") == 255
    assert set(num_columns.values()) == {255 + 32}
    assert of["popularity"].model.negatives == (Popularity(287, 0.75),)
    assert of["uniform"].model.negatives == (Uniform(287),)
    hard = {
        name: (plan.model.hard.share, plan.model.hard.pools)
        for name, plan in of.items()
        if plan.model.hard is not None
    }
    assert hard == {
        "hybrid_0.1": (0.1, ("retrieved", "pre_ranked")),
        "mined_0.1": (0.1, ("mined",)),
        "hybrid_50_50": (0.5, ("retrieved", "pre_ranked")),
        "exposed_0.1": (0.1, ("exposed",)),
    }
    assert {n for n, plan in of.items() if plan.model.resampling_exponent} == {"resampled_0.5"}


def test_exposed_items_are_negatives_only_where_the_user_insists(tmp_path: Path) -> None:
    assert "exposed" not in RunConfig().compare.plans
    config = funnel_config(tmp_path, plans=["mixed", "exposed"])
    plans, (note,) = sampling_plans(config, ["retrieved"], 60, 9)
    assert list(plans) == ["mixed"]
    assert "no exposed items" in note


def test_without_losers_hybrids_are_mined_or_missing(tmp_path: Path) -> None:
    config = funnel_config(tmp_path, plans=["mixed", "hybrid", "hybrid_50_50"])
    plans, notes = sampling_plans(config, [], 60, 9)
    assert list(plans) == ["mixed", "mined_0.1", "mined_50_50"]
    assert all("no losers" in note for note in notes)
    plans, notes = sampling_plans(config, [], 10)
    assert list(plans) == ["mixed"]
    assert ["missing" in note for note in notes] == [True, True]
    # Mined for the first time when all is over.
    unset = with_settings(config, {"model.hard": None})
    plans, notes = sampling_plans(unset, [], 600, 3)
    assert list(plans) == ["mixed"]
    assert all(
        "every 3 epochs (model.hard.every), and a plan has 3 (training.max_epochs" in x
        for x in notes
    )


def test_hybrid_plans_are_the_users_own_losers_with_other_shares(tmp_path: Path) -> None:
    own = FunnelLosers(stages=("ranked", "pre_ranked"), min_rank=10, num=2, share=0.2)
    config = funnel_config(tmp_path, plans=["mixed", "hybrid", "exposed"])
    config = with_settings(config, {"model.hard": own})
    asked = every_loser(config)
    assert asked == replace(own, stages=(*own.stages, "exposed"), allow_exposed=True)
    plans, notes = sampling_plans(config, ["ranked", "retrieved"], 60, 9)
    assert notes == ["plan exposed is missing: the log holds no exposed items"]
    assert plans["hybrid_0.1"]["model.hard"] == replace(own, stages=("ranked",), share=0.1)
    # What is said of ranked ones says nothing of others.
    plans, _ = sampling_plans(config, ["pre_ranked"], 60, 9)
    losers = FunnelLosers(stages=("pre_ranked",), num=2, share=0.1)
    assert plans["hybrid_0.1"]["model.hard"] == losers
    (note,) = [x for x in sampling_plans(config, ["retrieved"], 600, 9)[1] if "hybrid" in x]
    assert "no losers of ranked or pre_ranked" in note


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plans": ["in_batch"]}, "reference: got 'mixed', which is not among"),
        ({"plans": []}, "plans: .*must list at least one"),
        ({"hard_shares": [0.1, 0.1]}, "hard_shares.*twice"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        funnel_config(tmp_path, **settings)


def test_a_run_to_start_from_is_refused_as_all_plans_start_from_nothing(tmp_path: Path) -> None:
    config = funnel_config(tmp_path).model_copy(update={"warm_start": Path("runs/yesterday")})
    with pytest.raises(ConfigError, match=r"^warm_start: got 'runs/yesterday': .*from nothing"):
        compare(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# What comes out


def test_rows_and_differences(compared: PlanComparison) -> None:
    assert [row.name for row in compared.rows] == ["in_batch_uncorrected", "mixed", "hybrid_0.1"]
    uncorrected, mixed, _ = compared.rows
    assert mixed.differences == {}
    for metric, interval in uncorrected.differences.items():
        expected = uncorrected.metrics[metric].mean - mixed.metrics[metric].mean
        assert interval.mean == pytest.approx(expected, abs=1e-12), metric
        assert interval.low <= interval.mean <= interval.high
    aucs = {name for name in mixed.metrics if name.startswith("auc_")}
    assert aucs == {"auc_corpus", "auc_pre_rank_losers", "auc_rank_losers", "auc_exposed"}
    # Tighter than the two intervals apart: queries are paired.
    width = uncorrected.differences["ndcg@20"].high - uncorrected.differences["ndcg@20"].low
    apart = [row.metrics["ndcg@20"] for row in (uncorrected, mixed)]
    assert width < sum(interval.high - interval.low for interval in apart)


def test_files_hold_the_rows(compared: PlanComparison) -> None:
    saved = json.loads((compared.folder / "comparison.json").read_text())
    assert saved["plans"][2]["metrics"] == {
        name: interval.as_dict() for name, interval in compared.rows[2].metrics.items()
    }
    text = (compared.folder / "comparison.md").read_text()
    for row in compared.rows:
        assert row.name in text
        assert f"{row.metrics['recall@20'].mean:.4f}" in compared.table
    assert "auc_rank_losers" in text
    assert (compared.folder / "comparison.svg").read_text().startswith("<svg xmlns=")
    (note,) = compared.notes
    assert note == "plan mined is missing: 400 items have no rank 400 (model.hard.min_rank)"
    assert f"P{note[1:]}.\n" in text


def test_mixed_is_the_model_of_a_run_and_its_auc_that_of_scikit_learn(
    config: RunConfig, compared: PlanComparison, tmp_path: Path
) -> None:
    data = prepare(config, tmp_path)
    split, test = data.split, data.test
    plain = with_settings(config, {"model.hard": None, "training.max_epochs": NUM_EPOCHS})
    model = train_and_refit(plain, data)
    result = evaluate_all(plain, {"model": model}, test).first
    row = compared.rows[1]
    for metric, interval in result.overall.intervals.items():
        assert row.metrics[metric].mean == pytest.approx(interval.mean, abs=1e-9), metric
    tail = result.slices["tail"].intervals["recall@20"].mean
    assert row.metrics["tail/recall@20"].mean == pytest.approx(tail, abs=1e-9)

    # What each user met in the test part alone, from the rows of the split.
    order = ["retrieved", "pre_ranked", "ranked", "exposed", "clicked"]
    furthest: dict[tuple[int, int], int] = Counter()
    met_before = set()
    for event in split.events.to_pyarrow().to_pylist():
        key = (event["user_id"], event["item_id"])
        furthest[key] = max(furthest[key], order.index(event["stage"]))
        if event["part"] != "test":
            met_before.add(key)
    place = {id_: i for i, id_ in enumerate(test.candidate_ids.tolist())}
    scores = model.query_embeddings(test.as_queries()) @ model.network.embed_corpus().T
    for column, stage in (("auc_corpus", None), ("auc_exposed", 3), ("auc_rank_losers", 1)):
        values = []
        for i, user in enumerate(test.user_ids.tolist()):
            known = set(test.clicked[i].tolist())
            positives = [place[id_] for id_ in test.relevant[i].tolist() if id_ not in known]
            negatives = [
                place[item]
                for (who, item), reached in furthest.items()
                if who == user and reached == stage and (who, item) not in met_before
            ]
            if stage is None:  # Of 400 items all are compared, but those of the user's own events.
                met = {item for who, item in furthest if who == user}
                negatives = [row for item, row in place.items() if item not in met]
            if positives and negatives:
                labels = [1] * len(positives) + [0] * len(negatives)
                values.append(roc_auc_score(labels, scores[i, positives + negatives]))
        assert len(values) > 10
        assert row.metrics[column].mean == pytest.approx(np.mean(values), abs=1e-6)
    # Rivals of users without a positive to find are no column.
    nothing = replace(test, relevant=[ids[:0] for ids in test.relevant])
    assert auc_rows(plain, replace(data, test=nothing))[1] == {}


def test_figure_shows_the_rows(compared: PlanComparison) -> None:
    figure = comparison_figure(compared.rows, "mixed", (5, 20))
    gains, slices, aucs = figure.axes
    assert [label.get_text() for label in gains.get_yticklabels()] == [
        row.name for row in compared.rows
    ]
    (tail,) = (line for line in slices.lines if line.get_label() == "tail")
    expected = [row.summary["slices"]["tail"]["recall@20"]["mean"] for row in compared.rows]
    assert np.asarray(tail.get_xdata()).tolist() == expected
    (corpus,) = (line for line in aucs.lines if line.get_label() == "the corpus")
    expected = [row.metrics["auc_corpus"].mean for row in compared.rows]
    assert np.asarray(corpus.get_xdata()).tolist() == expected


# How it runs


def test_what_a_comparison_comes_to_is_said(compared: PlanComparison) -> None:
    def row(name: str, mean: float, low: float | None = None, high: float = 0.0) -> PlanRow:
        differences = {} if low is None else {"ndcg@5": Interval(0.0, low, high)}
        return PlanRow(name, {"ndcg@5": Interval(mean, 0, 1)}, differences, {}, 1, 1.0)

    rows = [
        row("mixed", 0.3),
        row("uniform", 0.2, -0.11, -0.09),
        row("mined", 0.31, -0.01, 0.03),
        row("hybrid", 0.4, 0.09, 0.11),
        row("one query", 0.3, np.nan, np.nan),
    ]
    assert compared_in_words(rows, "ndcg@5", "mixed") == (
        "in ndcg@5 best: hybrid; better than mixed: hybrid; level with mixed: mined, one query; "
        "worse than mixed: uniform"
    )
    # The best one may be level, or the reference itself.
    said = compared_in_words([rows[0], rows[2]], "ndcg@5", "mixed")
    assert said == "in ndcg@5 best: mined; level with mixed: mined"
    said = compared_in_words(rows[:2], "ndcg@5", "mixed")
    assert said == "in ndcg@5 best: mixed; worse than mixed: uniform"
    # A terminal gets the columns that fit, the first ones; none is wrapped.
    whole = comparison_table(compared.rows, (5, 20), markdown=False)
    narrow = comparison_table(compared.rows, (5, 20), markdown=False, width=80)
    assert max(map(len, narrow.split("\n"))) <= 80 < max(map(len, whole.split("\n")))
    assert [line[:30] for line in narrow.split("\n")] == [line[:30] for line in whole.split("\n")]


def test_a_stopped_comparison_goes_on_where_it_was(
    config: RunConfig, compared: PlanComparison, tmp_path: Path
) -> None:
    """In the second plan, after the first one."""
    folder = Path(shutil.copytree(compared.folder, tmp_path / "run"))
    for path in (*folder.glob("comparison.*"), *folder.glob("plans/mixed/checkpoints/*/*")):
        path.unlink()
    shutil.rmtree(folder / "plans" / "hybrid_0.1")
    told: list[tuple[str, int]] = []
    with pytest.raises(Stopped):
        compare(config, folder, on_progress=stop_at("mixed, selection", 1, told))
    again = compare(config, folder, on_progress=stop_at("", 0, told))
    for row, expected in zip(again.rows, compared.rows, strict=True):
        assert row.metrics == expected.metrics
        assert row.differences == expected.differences
    epochs = Counter(step for step in told if ", " in step[0] and step[1])
    names = ("mixed, selection", "hybrid_0.1, selection")
    assert epochs == {(name, i): 1 for name in names for i in range(1, NUM_EPOCHS + 1)}


def epochs_of(folder: Path, plan: str) -> list[str]:
    saved = folder / "plans" / plan / "checkpoints" / "selection"
    return sorted(path.stem for path in saved.glob("epoch-*.json"))


def test_the_budget_in_steps(compared: PlanComparison) -> None:
    assert epochs_of(compared.folder, "mixed")[-1] == f"epoch-{NUM_EPOCHS}"


def test_a_gain_of_exposed_negatives_that_is_none_is_told(tmp_path: Path) -> None:
    """Ratings: a rated item cannot come back, so that pushing it down frees a place."""
    path = write(event_table("int"), tmp_path / "ratings.parquet")
    data = {"source": "files", "path": path, "rating_threshold": 3, "stage_values": {}}
    plans = {"plans": ["mixed", "exposed"], "hard_shares": [0.1]}
    config = small_config(tmp_path, data, split={"kind": "last_share"}, compare=plans)
    exposed = FunnelLosers(stages=("exposed",), allow_exposed=True)
    hybrid = with_settings(config, {"compare.plans": ["mixed", "hybrid"], "model.hard": exposed})

    def notes_of(config: RunConfig, folder: Path, plan: str = "exposed_0.1") -> list[str]:
        reports: list[StepReport] = []

        def on_step(report: StepReport) -> None:
            reports.append(report)
            if report.name == "plans":
                raise Stopped

        with pytest.raises(Stopped):
            compare(config, folder, on_step=on_step)
        assert f"2 plans: mixed, {plan}" in reports[-1].notes
        return list(reports[-1].notes)

    assert any("seem better than they are" in note for note in notes_of(config, tmp_path / "run"))
    assert any("seem better" in x for x in notes_of(hybrid, tmp_path / "own", "hybrid_0.1"))
    excluding = with_settings(config, {"evaluation.exclude": "seen"})
    assert not any("seem better" in note for note in notes_of(excluding, tmp_path / "excluding"))
