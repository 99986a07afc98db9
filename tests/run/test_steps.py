"""Steps: what is whole is read, and the rest is made; the page lists them."""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from tfrs_pipeline.cluster import Worker
from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.model import distribution
from tfrs_pipeline.run.pipeline import run_steps
from tfrs_pipeline.run.refresh import refresh_steps
from tfrs_pipeline.run.steps import Runner, Step, as_lines

ROOT = Path(__file__).parents[2]
KINDS: tuple[Literal["all", "chief first", "chief"], ...] = ("all", "chief first", "chief")


def counted_step(name: str, reads: tuple[str, ...], done: list[str], folder: Path) -> Step:
    """Makes a step that writes into a file the names of all that it was made from."""
    path = folder / name

    def read(runner: Runner, **inputs: str) -> str | None:
        return path.read_text() if path.is_file() else None

    def make(runner: Runner, **inputs: str) -> str:
        done.append(name)
        text = " ".join([*inputs.values(), name])
        path.write_text(text)
        return text

    return Step(name, reads, name, make, name, read, lambda text: [f"{name} is {text}"])


@pytest.mark.parametrize("lost", ["", "c", "b", "bc", "a"])
def test_what_is_whole_is_read_and_the_rest_is_made(tmp_path: Path, lost: str) -> None:
    done: list[str] = []
    reads: dict[str, tuple[str, ...]] = {"a": (), "b": ("a",), "c": ("a", "b")}
    steps = [counted_step(name, given, done, tmp_path) for name, given in reads.items()]
    runner = Runner()
    assert runner.do(steps) == "a a b c"
    for name in lost:
        (tmp_path / name).unlink()
    done.clear()
    again = Runner()
    assert again.do(steps) == "a a b c"
    assert done == [*lost]
    assert again.artifacts == runner.artifacts
    # What is told of an artifact does not depend on whether it was made or read back.
    for told in (runner, again):
        assert [(report.name, report.notes) for report in told.reports] == [
            (name, [f"{name} is {runner.artifacts[name]}"]) for name in "abc"
        ]
    # What a runner has made, it does not make again; another one makes what is only in memory.
    numbers = itertools.count(1)
    count = Step("count", (), "number", lambda runner: next(numbers))
    assert [runner.do([count]) for runner in (again, again, Runner())] == [1, 1, 2]


def test_inputs_are_told_apart_by_name() -> None:
    """So the order in which a step lists them does not matter, and a wrong name is an error."""
    made = {"whole": 7, "part": 2}
    steps = [Step(name, (), name, lambda _, x=x: x) for name, x in made.items()]
    for reads in (("whole", "part"), ("part", "whole")):
        left = Step("left", reads, "left", lambda _, part, whole: whole - part)
        assert Runner().do([*steps, left]) == 5
    with pytest.raises(TypeError, match="unexpected keyword argument 'whole'"):
        Runner().do([*steps, Step("left", ("whole",), "left", lambda _, part: part)])


@pytest.mark.parametrize(("number", "made"), [(0, KINDS), (1, KINDS[:2])])
def test_the_chief_works_first_or_alone_or_with_all(
    number: int, made: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process is the chief of two workers, or the other one."""
    steps = [Step(kind, (), kind, lambda _: "made", workers=kind) for kind in KINDS]
    waits: list[str] = []

    def chief_first(work: Callable[[], None]) -> None:
        waits.append("chief first")
        work()

    def on_chief(work: Callable[[], None]) -> None:
        waits.append("chief")
        if number == 0:
            work()

    monkeypatch.setattr("tfrs_pipeline.run.steps.this_worker", lambda: Worker(number, 2))
    monkeypatch.setattr(distribution, "chief_first", chief_first)
    monkeypatch.setattr(distribution, "on_chief", on_chief)
    runner = Runner()
    runner.do(steps)
    assert tuple(runner.artifacts) == made
    assert tuple(report.name for report in runner.reports) == made
    assert waits == ["chief first", "chief"]  # A step that all do at once waits for nobody.


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_step_holds_is_held_until_all_have_ended(fails: bool) -> None:
    events: list[str] = []

    @contextlib.contextmanager
    def lock() -> Iterator[None]:
        events.append("locked")
        try:
            yield
        finally:
            events.append("unlocked")

    def use(runner: Runner) -> None:
        events.append("used")
        if fails:
            raise OSError

    steps = [Step("a", (), "a", lambda runner: runner.hold(lock())), Step("b", (), "b", use)]
    runner = Runner()
    with pytest.raises(OSError) if fails else contextlib.nullcontext():
        runner.do(steps)
    assert events == ["locked", "used", "unlocked"]


STEPS = {"a run": run_steps(RunConfig()), "a refresh": refresh_steps()}


@pytest.mark.parametrize("work", STEPS)
def test_the_page_lists_the_steps(work: str) -> None:
    page = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
    section = page.partition(f"## The steps of {work}\n")[2].partition("\n## ")[0]
    lines = re.findall(r"```\n(.*?)\n```", section, re.DOTALL)
    assert lines == ["\n".join(as_lines(STEPS[work]))], "Put what as_lines lists on the page."
    known: set[str] = set()
    for step in STEPS[work]:
        assert set(step.reads) <= known
        known.add(step.writes)
