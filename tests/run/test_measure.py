"""Baselines in a run: whatever happens to one costs its row and no more."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.small_log import event_table, small_config, write
from tfrs_pipeline import Log, MostPopular, Transitions, evaluate
from tfrs_pipeline.config import RunConfig, with_settings
from tfrs_pipeline.durable import read_record, write_record
from tfrs_pipeline.messages import StepReport
from tfrs_pipeline.run import measure
from tfrs_pipeline.run.data import prepare
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.steps import RunContext


@dataclass(frozen=True)
class Raises:
    error: BaseException

    def fit(self, train: Any) -> Any:
        raise self.error


class Fails(MostPopular):
    """Is fitted, and fails later."""

    def fit(self, train: Any) -> Any:
        return self

    def retrieve(self, *arguments: Any) -> Any:
        raise ZeroDivisionError("in use")


WHY = {
    "raises": "RuntimeError: three is too many",
    "refuses": "three is too many",
    "fails_in_use": "ZeroDivisionError: in use",
    "greedy": "MemoryError: Unable to allocate 1.00 GiB",
}
CHOICES: dict[str, Any] = {
    "before": [MostPopular()],
    "raises": [Raises(RuntimeError("three is too many"))],
    "refuses": [Raises(ValueError("three is too many"))],
    "fails_in_use": [Fails()],
    "greedy": [Raises(MemoryError("Unable to allocate 1.00 GiB"))],
    "after": [MostPopular()],
}


def config_in(folder: Path) -> RunConfig:
    events = write(event_table("str"), folder / "events.parquet")
    split = {"kind": "last_share", "test": 0.2, "validation": 0.1}
    return small_config(folder, {"path": events}, split=split)


def measured(
    folder: Path, choices: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[Any, list[str]]:
    config = with_settings(config_in(folder), **settings)
    runner = RunContext(config, RunFolder(folder / "run"))
    data = prepare(config, runner.folder.path)
    runner.reports.append(StepReport("baselines"))
    monkeypatch.setattr(measure, "baselines_of", lambda config, data: choices)
    return measure.measure_baselines(runner, data), runner.reports[0].notes


def test_each_failure_costs_its_row_alone_and_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, notes = measured(tmp_path, CHOICES, monkeypatch)
    assert [name for x in found.evaluations for name in x.results] == ["before", "after"]
    assert found.not_measured == WHY
    assert {f"{name} is left out: {why}" for name, why in WHY.items()} <= {*notes}
    assert found.failed == {name: why for name, why in WHY.items() if name != "refuses"}
    # Each is fitted now, but those that failed are not asked.
    again, _ = measured(tmp_path, {name: [MostPopular()] for name in CHOICES}, monkeypatch)
    assert [x.summary() for x in again.evaluations] == [x.summary() for x in found.evaluations]
    assert again.failed == found.failed
    for name, why in found.not_measured.items():
        assert again.not_measured[name].startswith(
            f"{why} (it is not tried again; to do so, delete "
        )


@pytest.mark.parametrize("preset", [None, "quick"])
def test_what_leaves_a_baseline_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str | None
) -> None:
    changes = {} if preset else {"evaluation.baselines": ["ease"]}
    _, notes = measured(tmp_path, {}, monkeypatch, settings=changes, preset=preset)
    assert "ials: left out by evaluation.baselines" in notes
    assert not any("ease" in note for note in notes)


def test_a_baseline_in_which_the_run_ended_twice_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a crash of native code, after which only the record on disk is left."""
    path = RunFolder(tmp_path / "run").left_out_file
    records: list[Any] = []

    class Ends(MostPopular):
        def fit(self, train: Any) -> Any:
            records.append(read_record(path))
            return super().fit(train)

    left: dict[str, Any] = {"baselines": {}, "failed": {}, "at_work": {}}
    for num_ends in (1, 2, 3):
        found, _ = measured(tmp_path, {"fine": [MostPopular()], "ends": [Ends()]}, monkeypatch)
        assert len(found.evaluations) == (1 if num_ends == 3 else 2)
        if num_ends < 3:
            # It ends here, before what follows is written.
            assert records[-1] == {**left, "at_work": {"ends": num_ends}}
            assert read_record(path) == left
            write_record(path, records[-1])
    why = {"ends": "RuntimeError: the run has ended 2 times while it was measured"}
    assert found.not_measured == found.failed == read_record(path)["failed"] == why


def test_ctrl_c_stops_the_run_and_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted = RuntimeError("Query interrupted")  # So DuckDB says it.
    interrupted.__cause__ = KeyboardInterrupt()
    for error in (KeyboardInterrupt(), interrupted):
        with pytest.raises(KeyboardInterrupt):
            measured(tmp_path, {"slow": [Raises(error)]}, monkeypatch)
        found, _ = measured(tmp_path, {"slow": [MostPopular()]}, monkeypatch)
        assert not found.not_measured


def test_a_run_says_how_far_counting_alone_gets() -> None:
    """After an item a comes its b: counts know it, and popularity, which asks nobody, does not."""
    users = np.repeat(np.arange(40), 4)
    items = [f"{x}{m % 10}" for n in range(40) for m in (n, n + 3) for x in "ab"]
    log = Log.from_table(pa.table({"user_id": users, "item_id": items}))
    split = log.split("last_n", min_positives=4)
    fitted = {"two_tower": MostPopular(), "transitions": Transitions()}
    models = {name: baseline.fit(split.train) for name, baseline in fitted.items()}
    evaluation = evaluate(models, split.test, cutoffs=(1, 5))
    model, alone = (
        result.overall.intervals["recall@1"].mean for result in evaluation.results.values()
    )
    assert model < 0.5
    assert alone == 1.0
    (line,) = measure.about_counting(evaluation)
    assert f"finds 100.0% of a query's items among its first 1, the model {model:.1%}" in line
    assert not [*measure.about_counting(evaluate(models["two_tower"], split.test))]
