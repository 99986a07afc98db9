"""Steps: what is whole is read, and the rest is made; the page shows their drawing."""

import itertools
import re
from pathlib import Path

import pytest

from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.pipeline import run_steps
from tfrs_pipeline.run.refresh import refresh_steps
from tfrs_pipeline.run.steps import Runner, Step, as_diagram, as_lines

ROOT = Path(__file__).parents[2]


def counted_step(name: str, reads: tuple[str, ...], done: list[str], folder: Path) -> Step:
    """Makes a step that writes into a file the names of all that it was made from."""
    path = folder / name

    def make(runner: Runner, *given: str) -> str:
        if path.is_file():
            return path.read_text()
        done.append(name)
        runner.note(f"made {name}")
        text = " ".join([*given, name])
        path.write_text(text)
        return text

    return Step(name, reads, name, make, place=name)


@pytest.mark.parametrize("lost", ["", "c", "b", "bc", "a"])
def test_what_is_whole_is_read_and_the_rest_is_made(tmp_path: Path, lost: str) -> None:
    done: list[str] = []
    reads: dict[str, tuple[str, ...]] = {"a": (), "b": ("a",), "c": ("a", "b")}
    steps = [counted_step(name, given, done, tmp_path) for name, given in reads.items()]
    runner = Runner()
    assert runner.run(steps) == "a a b c"
    for name in lost:
        (tmp_path / name).unlink()
    done.clear()
    again = Runner()
    assert again.run(steps) == "a a b c"
    assert done == [*lost]
    assert again.artifacts == runner.artifacts
    assert [(report.name, report.notes) for report in again.reports] == [
        (name, [f"made {name}"] if name in lost else []) for name in "abc"
    ]
    # An artifact in memory is made each time.
    numbers = itertools.count(1)
    count = Step("count", (), "number", lambda runner: next(numbers))
    assert [again.run([count]) for _ in range(2)] == [1, 2]


STEPS = {
    "a run": run_steps(RunConfig(), RunFolder(Path("run"))),
    "a refresh": refresh_steps(Path("model"), Path("items.csv"), {}, allow_all_new=False),
}


@pytest.mark.parametrize("work", STEPS)
def test_the_page_draws_the_steps(work: str) -> None:
    page = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
    section = page.partition(f"## The steps of {work}\n")[2].partition("\n## ")[0]
    (drawn,) = re.findall(r"```mermaid\n(.*?)\n```", section, re.DOTALL)
    assert drawn == as_diagram(STEPS[work]), "Put what as_diagram draws on the page."
    lines = re.findall(r"```\n(.*?)\n```", section, re.DOTALL)
    assert lines == ["\n".join(as_lines(STEPS[work]))], "Put what as_lines lists on the page."
    known: set[str] = set()
    for step in STEPS[work]:
        assert set(step.reads) <= known
        known.add(step.writes)
