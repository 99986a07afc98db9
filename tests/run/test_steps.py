"""Steps: what is whole is read, the rest is made; and the drawing of them on the page."""

import re
from pathlib import Path
from typing import Any

import pytest

from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.pipeline import run_steps
from tfrs_pipeline.run.steps import Runner, Step, StepReport, as_diagram, as_lines

ROOT = Path(__file__).parents[2]


def counted_step(name: str, reads: tuple[str, ...], done: list[str]) -> Step:
    """A step that writes the names of all that it was made from into a file."""

    def read(runner: Runner, *given: str) -> str | None:
        path = runner.folder.path / name
        return path.read_text() if path.is_file() else None

    def make(runner: Runner, *given: str) -> str:
        done.append(name)
        runner.note(f"made {name}")
        text = " ".join([*given, name])
        (runner.folder.path / name).write_text(text)
        return text

    return Step(name, reads, name, make, read, place=name)


@pytest.mark.parametrize(
    ("lost", "made"),
    [((), []), (("c",), ["c"]), (("b",), ["b"]), (("b", "c"), ["b", "c"]), (("a",), ["a"])],
    ids=["nothing", "the last", "one between", "two", "the first"],
)
def test_what_is_whole_is_read_and_the_rest_is_made(
    tmp_path: Path, lost: tuple[str, ...], made: list[str]
) -> None:
    done: list[str] = []
    steps = [counted_step(*x, done) for x in (("a", ()), ("b", ("a",)), ("c", ("a", "b")))]
    runner = Runner(RunConfig(), RunFolder(tmp_path))
    assert runner.run(steps) == "a a b c"
    for name in lost:
        (tmp_path / name).unlink()
    done.clear()
    reports: list[StepReport] = []
    again = Runner(RunConfig(), RunFolder(tmp_path), reports.append)
    assert again.run(steps) == "a a b c"
    assert done == made
    assert again.artifacts == runner.artifacts
    assert [report.name for report in reports] == ["a", "b", "c"]
    assert [report.notes for report in reports] == [
        [f"made {name}"] if name in made else [] for name in "abc"
    ]


def test_an_artifact_in_memory_is_made_each_time(tmp_path: Path) -> None:
    made: list[Any] = []
    step = Step("count", (), "number", lambda runner: made.append(1) or len(made))
    runner = Runner(RunConfig(), RunFolder(tmp_path))
    assert [runner.run([step]) for _ in range(2)] == [1, 2]


def test_the_page_draws_the_steps_of_a_run() -> None:
    steps = run_steps(RunConfig())
    page = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
    (drawn,) = re.findall(r"```mermaid\n(.*?)\n```", page, re.DOTALL)
    assert drawn == as_diagram(steps), "Put what as_diagram draws on the page."


def test_each_step_reads_what_one_before_it_wrote() -> None:
    known: set[str] = set()
    steps = run_steps(RunConfig())
    for step in steps:
        assert set(step.reads) <= known
        known.add(step.writes)
    assert as_lines(steps)[1] == "split: log -> split (data/split.parquet)"
