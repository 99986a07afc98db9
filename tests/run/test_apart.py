"""Baselines in a process of their own: whatever happens to one costs its row and no more."""

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.failing_baselines import FAILING, MORE_THAN_LEFT, Light
from tests.small_log import Watched, event_table, small_config, write
from tfrs_pipeline import MostPopular
from tfrs_pipeline.config import RunConfig, with_settings
from tfrs_pipeline.messages import StepReport
from tfrs_pipeline.run import apart
from tfrs_pipeline.run.data import RunData, prepare
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.measure import evaluate_all, fit_best
from tfrs_pipeline.run.pipeline import run
from tfrs_pipeline.run.steps import Runner

WHY = {
    "raises": "RuntimeError: three is too many",
    "refuses": "three is too many",
    "crashes": "its process ended with SIGSEGV",
    "crashes_in_use": "its process ended with SIGSEGV",
    "killed": "its process ended with SIGKILL (where memory runs out, the system sends it)",
    "exits": "its process ended with exit code 3",
    "greedy": "Unable to allocate 1.00 GiB",
}
CHOICES: dict[str, Any] = {
    "before": [Light()],
    **{name: [baseline] for name, baseline in FAILING.items()},
    "after": [Light()],
}


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a run measure `CHOICES`, with less memory left than one of them takes."""
    monkeypatch.setattr(apart, "baselines_of", lambda config, data: CHOICES)
    monkeypatch.setattr(apart, "memory_left", lambda: MORE_THAN_LEFT // 2)


def config_in(folder: Path) -> RunConfig:
    events = write(event_table("str"), folder / "events.parquet")
    split = {"kind": "last_share", "test": 0.2, "validation": 0.1}
    return small_config(folder, {"path": events}, split=split)


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[RunConfig, RunFolder, RunData]:
    config = config_in(tmp_path)
    return config, RunFolder(tmp_path / "run"), prepare(config, tmp_path / "run")


def measured(config: RunConfig, folder: RunFolder, data: RunData) -> Any:
    runner = Runner()
    runner.reports.append(StepReport("baselines"))
    return apart.measure_baselines(config, folder, runner, data), runner.reports[0].notes


@pytest.mark.usefixtures("failing")
def test_each_failure_costs_its_row_alone_and_is_not_tried_again(
    prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder, data = prepared
    found, notes = measured(config, folder, data)
    assert [name for x in found.evaluations for name in x.results] == ["before", "after"]
    assert list(found.left_out) == list(WHY)
    for name, why in WHY.items():
        assert why in found.left_out[name]
        assert f"{name} is left out: {found.left_out[name]}" in notes
    assert found.left_out["refuses"] == WHY["refuses"]
    assert found.failed == {x: y for x, y in found.left_out.items() if x != "refuses"}
    # Those that could be measured have the numbers that they have in this process.
    fitted, _ = fit_best("popularity", [MostPopular()], config, data)
    here = evaluate_all(config, {"before": fitted}, data)
    assert found.evaluations[0].summary() == here.summary()
    asked, from_process = [], apart.answers_from_process

    def watched(*task: Any) -> Any:
        asked.append(list(task[-1]))
        return from_process(*task)

    monkeypatch.setattr(apart, "answers_from_process", watched)
    again, _ = measured(config, folder, data)
    assert asked == [["before", "after"]]
    assert [x.summary() for x in again.evaluations] == [x.summary() for x in found.evaluations]
    assert again.failed == found.failed
    for name, why in found.left_out.items():
        assert again.left_out[name].startswith(f"{why} (it is not tried again; to do so, delete ")


@pytest.mark.parametrize("preset", [None, "quick"])
def test_who_leaves_a_baseline_out_is_named(
    prepared: Any, monkeypatch: pytest.MonkeyPatch, preset: str | None
) -> None:
    monkeypatch.setattr(apart, "baselines_of", lambda config, data: {})
    config, *where = prepared
    settings = {} if preset else {"evaluation.baselines": ["ease"]}
    _, notes = measured(with_settings(config, settings, preset=preset), *where)
    by = "the preset quick" if preset else "evaluation.baselines"
    assert f"ials: left out by {by}" in notes
    assert not any("ease" in note for note in notes)


def test_a_process_that_dies_at_its_start_costs_its_row_until_the_program_is_mended(
    prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a program without `if __name__ == "__main__"`, which the process imports first."""
    config, folder, data = prepared
    script, started = tmp_path / "unguarded.py", tmp_path / "started"
    script.write_text(f"open({str(started)!r}, 'a').write('x')\nraise SystemExit(7)")
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__spec__", None, raising=False)
    monkeypatch.setattr(main, "__file__", str(script), raising=False)
    # More than a pipe holds, so that sending it takes a process that reads.
    choices: Any = {"large": [bytes(1_000_000)], "larger": [bytes(2_000_000)]}
    (folder.path / "native.log").write_text("Traceback\nValueError: the run is in use\n")
    first, second = apart.answers_from_process(config, folder.path, data, choices)
    assert first == second
    assert isinstance(first, apart.NotBegun)
    assert first.startswith("its process ended with exit code 7 while importing the program again")
    assert 'below `if __name__ == "__main__":`' in first
    assert first.endswith("native.log: ValueError: the run is in use")
    assert started.read_text() == "x"  # It would fail for the next baseline too.
    # The failure says nothing about a baseline, so the next call measures it.
    monkeypatch.setattr(apart, "baselines_of", lambda config, data: {"before": [Light()]})
    found, _ = measured(config, folder, data)
    assert found == ([], {"before": first}, {"before": first})
    assert not folder.left_out_file.exists()
    script.write_text("")
    found, _ = measured(config, folder, data)
    assert [name for x in found.evaluations for name in x.results] == ["before"]
    assert not found.left_out
    assert not found.failed


@pytest.mark.nightly
@pytest.mark.usefixtures("failing", "trusted_exports", "few_signatures", "figures_undrawn")
def test_a_run_exports_and_reports_without_a_baseline_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tfrs_pipeline.report.facts import write_report

    choices = {"popularity": [MostPopular()], "ease": CHOICES["crashes"]}
    monkeypatch.setattr(apart, "baselines_of", lambda config, data: choices)
    config, folder, watched = config_in(tmp_path), tmp_path / "run", Watched()
    few = {"training.max_epochs": 1, "training.refit": False}
    config = with_settings(config, {"evaluation.baselines": ("popularity", "ease"), **few})
    result = run(config, folder, progress=watched)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["models"]) == ["two_tower", "popularity"]
    assert list(metrics["left_out"]) == ["ease"]
    assert WHY["crashes"] in metrics["left_out"]["ease"]
    assert any(WHY["crashes"] in note for note in watched.reports["baselines"].notes)
    assert result.export_folder is not None
    page = write_report(str(folder)).read_text()
    assert f"ease is left out: {metrics['left_out']['ease']}" in page


def test_the_memory_left_is_that_of_the_machine_or_of_its_container(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    7000 kB\n")
    group = tmp_path / "group"
    left = {"no container": apart.memory_left(tmp_path, group)}
    group.mkdir()
    (group / "memory.current").write_text("3000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 1000000\n")
    for limit in ("max", "4000000", "90000000"):
        (group / "memory.max").write_text(f"{limit}\n")
        left[limit] = apart.memory_left(tmp_path, group)
    machine = 7000 * 1024
    assert left == {"no container": machine, "max": machine, "4000000": 2_000_000,
                    "90000000": machine}  # fmt: skip
    assert apart.memory_left() > 0


def test_a_stopped_run_ends_the_other_process(prepared: Any) -> None:
    config, folder, data = prepared
    choices: dict[str, Any] = {name: [MostPopular()] for name in "ab"}
    answers = apart.answers_from_process(config, folder.path, data, choices)
    next(answers)
    (process,) = multiprocessing.active_children()
    del answers
    process.join(timeout=60)
    assert not process.is_alive()
