"""How many hard negatives are clicked later: counted again from the events, by a loop."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tfrs_pipeline as tp
from tests.small_log import Watched, small_config
from tfrs_pipeline.evaluation.bootstrap import ratio_interval
from tfrs_pipeline.model.false_negatives import false_negatives
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.pipeline import run
from tfrs_pipeline.sources.simulated import FunnelOptions, simulate_funnel

STAGES = ("retrieved", "pre_ranked")
NUM_UNIFORM, BATCH_SIZE = 32, 256


def simulated(num_users: int = 60) -> tp.Log:
    stages = {"num_retrieved": 20, "num_pre_ranked": 12, "num_ranked": 8, "num_exposed": 5}
    options = FunnelOptions(**stages, click_bias=-1.0)
    sizes = {"num_users": num_users, "num_items": 60, "num_requests": 600}
    return simulate_funnel(**sizes, seed=1, options=options).log


class Counted:
    """The events of a split as sets, by user."""

    def __init__(self, split: tp.Split) -> None:
        rows = split.events.to_pyarrow().to_pylist()
        self.clicks, self.shown, self.later = (defaultdict[int, set[int]](set) for _ in range(3))
        self.num_clicks = defaultdict[int, int](int)
        self.losers = defaultdict[tuple[int, str], set[int]](set)
        in_training = [row for row in rows if row["part"] == "train"]
        for row in in_training:
            if row["stage"] in ("clicked", "exposed"):
                events = self.clicks if row["stage"] == "clicked" else self.shown
                events[row["user_id"]].add(row["item_id"])
            self.num_clicks[row["item_id"]] += row["stage"] == "clicked"
        for row in rows:
            if row["part"] == "validation" and row["stage"] == "clicked":
                self.later[row["user_id"]].add(row["item_id"])
        clicked = {row["request_id"] for row in in_training if row["stage"] == "clicked"}
        for row in in_training:
            if row["request_id"] in clicked and row["stage"] in STAGES:
                never = self.clicks[row["user_id"]] | self.shown[row["user_id"]]
                if row["item_id"] not in never:
                    self.losers[row["user_id"], row["stage"]].add(row["item_id"])
        self.items = split.log.items["item_id"].to_pyarrow().to_pylist()

    def easy_rate(self, user: int) -> float:
        """The chance that an easy negative of a user is clicked later."""
        total = sum(self.num_clicks.values())
        never = self.clicks[user] | self.shown[user]
        n = {
            item: (BATCH_SIZE - 1) * self.num_clicks[item] / total + NUM_UNIFORM / len(self.items)
            for item in self.items
            if item not in never
        }
        return sum(n[item] for item in self.later[user] if item in n) / sum(n.values())

    def check(self, stage: str, count: tp.FalseNegatives) -> None:
        pairs = {user: self.losers[user, stage] for user, items in self.later.items() if items}
        hits = {user: len(items & self.later[user]) for user, items in pairs.items()}
        num_pairs = sum(map(len, pairs.values()))
        easy = sum(len(items) * self.easy_rate(user) for user, items in pairs.items())
        assert (count.num_pairs, count.num_clicked) == (num_pairs, sum(hits.values()))
        assert count.num_easy == pytest.approx(easy)
        assert count.rate.mean == pytest.approx(sum(hits.values()) / num_pairs)
        assert count.times_easy is not None
        assert count.times_easy.mean == pytest.approx(sum(hits.values()) / easy)
        assert count.rate.low <= count.rate.mean <= count.rate.high


@pytest.mark.usefixtures("traced_once", "figures_undrawn")
def test_a_run_counts_them_by_stage_and_tells_them(tmp_path: Path) -> None:
    simulated().events.to_parquet(tmp_path / "funnel.parquet")
    settings: dict[str, Any] = {"split": {"kind": "last_share"}, "export": {"index": "none"}}
    settings["model"] = {"hard": "funnel:share=0.1"}
    settings["training"] = {"batch_size": BATCH_SIZE, "max_epochs": 1, "refit": False}
    settings["evaluation"] = {"baselines": [], "by": "users"}
    config = small_config(tmp_path, {"path": tmp_path / "funnel.parquet"}, **settings)
    watched = Watched()
    metrics = run(config, tmp_path / "run", progress=watched).metrics
    folder = RunFolder(tmp_path / "run")
    log = tp.Log.read(folder.data)
    counted = Counted(tp.Split.read(log, folder.split))
    assert set(metrics["false_negatives"]) == set(STAGES)
    page = tp.write_report(folder.path).read_text()
    notes = metrics["notes"]["samples"]
    for stage, written in metrics["false_negatives"].items():
        assert written["num_clicked"] > 0
        words = written.pop("words")
        assert f"{stage}: {words}" in notes
        assert f"False negatives, {stage}: {words}." in page
        intervals = {name: tp.Interval(**written[name]) for name in ("rate", "times_easy")}
        counted.check(stage, tp.FalseNegatives(**{**written, **intervals}))
    saved = json.loads((tmp_path / "run" / "metrics.json").read_text())["false_negatives"]
    assert [*saved] == [*STAGES]


def test_a_plan_counts_those_of_any_kind_asked_by_user_or_by_request() -> None:
    split = simulated().split("last_share", validation=0.2, test=0.1)
    counted = Counted(split)
    negatives = [tp.InBatch(), tp.Uniform(NUM_UNIFORM)]
    training = tp.TrainingSettings(batch_size=BATCH_SIZE)
    model = tp.TwoTower(hard=tp.FunnelLosers(0.1), negatives=negatives, training=training)
    by_user = model.false_negatives(split.train, split.validation)
    by_request = model.false_negatives(split.train, split.holdout("validation", by="requests"))
    assert by_user == by_request
    for stage, count in by_user.items():
        counted.check(stage, count)

    class Everything:
        """All items, so that the hard negatives are the unmasked ones."""

        share, num = 0.1, 2

        def pools(self, samples: tp.Samples) -> dict[str, Any]:
            assert samples.candidate_ids is not None
            return {"all": ([samples.candidate_ids.rows(counted.items)], 0 * samples.query_rows)}

    uniform = [tp.Uniform(NUM_UNIFORM)]
    model = tp.TwoTower(hard=Everything(), negatives=uniform, training=training)
    (count,) = model.false_negatives(split.train, split.validation).values()
    # Each easy negative is one of these, with the same chance.
    assert count.num_clicked == pytest.approx(count.num_easy)
    assert count.times_easy is not None
    assert count.times_easy.low == pytest.approx(1) == count.times_easy.high
    assert "1 times as many [1, 1]" in str(count)


def test_without_hard_negatives_or_a_log_there_is_nothing_to_count() -> None:
    split = simulated(20).split("last_share")
    with pytest.raises(ValueError, match="give a model with `hard`"):
        tp.TwoTower().false_negatives(split.train, split.validation)
    samples = tp.Samples.from_pairs([1, 2], [1, 4], num_queries=2, num_candidates=6)
    examples = tp.SinglePositives(samples, batch_size=2, history_length=4, seed=0)
    batches = tp.HybridBatches(samples, examples, [tp.Uniform(5)], seed=0)
    with pytest.raises(ValueError, match="samples of a log"):
        false_negatives(batches, split.validation)


def test_a_ratio_has_the_interval_of_resampled_users() -> None:
    rng = np.random.default_rng(0)
    num, hits = rng.integers(1, 50, 400), rng.binomial(1, 0.3, 400)
    interval = ratio_interval(hits, num)
    draws = rng.integers(0, 400, (4000, 400))
    low, high = np.quantile(hits[draws].sum(1) / num[draws].sum(1), [0.025, 0.975])
    assert interval.mean == hits.sum() / num.sum()
    np.testing.assert_allclose([interval.low, interval.high], [low, high], rtol=0.03)
