"""A metric and a baseline from outside the package, in a run and in Python."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.brought import Crowd, NoOne, Precision
from tests.small_log import event_table, small_config, write
from tfrs_pipeline import ConfigError, MostPopular, RunConfig, TrainingSettings, evaluate
from tfrs_pipeline.config import with_settings
from tfrs_pipeline.data.log import Log
from tfrs_pipeline.evaluation.baselines import BASELINES
from tfrs_pipeline.evaluation.metrics import METRICS, Metric, Recall
from tfrs_pipeline.report.facts import write_report
from tfrs_pipeline.report.verdict import compared_with_baselines
from tfrs_pipeline.run.pipeline import run


@pytest.fixture
def brought() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METRICS, "precision", Precision)
        patch.setitem(BASELINES, "crowd", Crowd)
        patch.setitem(BASELINES, "no_one", NoOne)
        yield


def split_of(folder: Path) -> Any:
    log = Log.from_files(write(event_table("str"), folder / "events.parquet"))
    return log.split("last_share", test=0.3)


def test_a_metric_is_measured_compared_and_printed(tmp_path: Path) -> None:
    """Precision is also hits over k: recall times the number of items to find, over k."""
    train, _, test = split_of(tmp_path)
    models = {"crowd": Crowd().fit(train), "late": MostPopular(latest=0.5).fit(train)}
    evaluation = evaluate(models, test, metrics=[Precision(5), Recall(20)], exclude="none")
    for result in evaluation.results.values():
        assert set(result.per_query) == {"precision@5", "recall@20"}
    at_5 = evaluate(models, test, metrics=[Recall(5)], exclude="none")
    num_to_find = np.array([len(ids) for ids in test.relevant])
    for name, result in evaluation.results.items():
        hits = at_5.results[name].per_query["recall@5"] * num_to_find
        np.testing.assert_allclose(result.per_query["precision@5"], hits / 5)
    gap = evaluation.differences["late"]["precision@5"]
    header, first, second = str(evaluation).splitlines()[:3]
    assert header.split()[1:5] == ["precision@5", "from", "crowd", "recall@20"]
    assert f"{evaluation.first.overall.intervals['precision@5'].mean:.4f}" in first
    assert f"{gap.mean:+.4f}" in second
    assert "ndcg" not in header


def test_any_metric_is_shown_alone(tmp_path: Path) -> None:
    """One of whole lists has no interval, so that models are not compared by it."""
    train, _, test = split_of(tmp_path)
    models = {"one": MostPopular().fit(train), "other": Crowd().fit(train)}
    shown = {name: evaluate(models, test, metrics=[metric(7)]) for name, metric in METRICS.items()}
    for name, evaluation in shown.items():
        result = evaluation.first.overall
        assert [*result.per_query, *result.set_metrics] == [f"{name}@7"]
        assert str(evaluation).split()[1] == f"{name}@7"
        assert list(evaluation.differences["other"]) == [
            *result.per_query,
            *(f"{part}/recall@7" for part in ("head", "torso", "tail") if name == "recall"),
        ]


class Wrong(Precision):
    def measure(self, rankings: Any) -> Any:
        return super().measure(rankings)[:-1] if self.k == 1 else 2 + super().measure(rankings)


@pytest.mark.parametrize("k", [1, 5])
def test_a_metric_that_leaves_its_range_or_shape_is_refused(k: int, tmp_path: Path) -> None:
    train, _, test = split_of(tmp_path)
    with pytest.raises(ValueError, match=rf"precision@{k} must measure .* from 0 to 1\. Received"):
        evaluate(MostPopular().fit(train), test, metrics=[Wrong(k)])
    with pytest.raises(TypeError, match=rf"metrics come in a list, .*\[Precision\(k={k}\)\]"):
        evaluate(MostPopular().fit(train), test, metrics=Precision(k))
    with pytest.raises(TypeError, match=r"metrics must be like .*Received: \['recall@20'\]"):
        evaluate(MostPopular().fit(train), test, metrics=["recall@20"])


def test_settings_take_what_was_brought_and_refuse_the_rest(brought: None) -> None:
    assert TrainingSettings(monitor="precision@7").monitor == "precision@7"
    for monitor, why in {
        "precison@7": "did you mean 'precision@7'",
        "precision": "at a cutoff",
        "coverage@20": "of which more is not better",
    }.items():
        with pytest.raises(ConfigError, match=rf"monitor: got '{monitor}'.*{why}"):
            TrainingSettings(monitor=monitor)
    given = RunConfig(data={"path": "x"}, evaluation={"baselines": ["uncorrected", "crowd"]})
    assert given.evaluation.baselines == ("uncorrected", "crowd")
    with pytest.raises(ConfigError, match=r"evaluation.baselines: .*did you mean 'crowd'"):
        with_settings(given, {"evaluation.baselines": ("crow",)})


@pytest.mark.usefixtures("brought", "trusted_exports", "few_signatures", "figures_undrawn")
def test_a_run_chooses_compares_and_refuses_by_them(tmp_path: Path) -> None:
    path = write(event_table("str"), tmp_path / "events.parquet")
    changed: dict[str, Any] = {
        "split.kind": "last_share",
        "training.monitor": "precision@20",
        "training.max_epochs": 2,
        "training.learning_rate": 1e-9,  # Learns nothing, so that a baseline wins.
        "training.refit": False,
        "training.history_bonus": False,
        "evaluation.baselines": ("crowd", "no_one"),
        "export.if_beaten": False,
    }
    config = with_settings(small_config(tmp_path, {"path": path}), changed)
    result = run(config, tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(metrics["models"]) == ["two_tower", "crowd"]
    assert metrics["left_out"] == {"no_one": "no one learns from this"}
    for model in metrics["models"].values():
        assert {"precision@5", "precision@20"} <= model.keys()
    training = metrics["training"]["two_tower"]
    values = training["history"]["val_precision@20"]
    assert training["best_epoch"] == 1 + int(np.argmax(values))
    assert result.export_folder is None
    assert "precision@20" in (result.refusal or "")
    assert "of the baseline crowd" in (result.refusal or "")
    verdict = compared_with_baselines(metrics, "precision@20")
    assert "is behind the best baseline, the wisdom of the crowd: -" in verdict.why
    page = write_report(tmp_path / "run").read_text()
    # The page's verdict is by the metric that kept the model out of service.
    assert "in precision@20 it is behind the best baseline" in page
    left_out = "no_one is left out: no one learns from this"
    for words in ("precision@20", "Share of the top k that is relevant.", Crowd.label, left_out):
        assert words in page


def test_a_metric_says_its_name_and_its_meaning() -> None:
    for name, metric in METRICS.items():
        assert str(metric(20)) == f"{name}@20"
        assert metric.meaning().endswith(".")
        assert metric(20) == metric(20) != metric(10)

    class Unwritten(Metric):
        name = "unwritten"

    with pytest.raises(NotImplementedError):
        Unwritten(1).measure(None)  # type: ignore[arg-type]
