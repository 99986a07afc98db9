"""A run is a list of steps. What is whole in its folder is read, and the rest is made.

This is the one place where a stopped run is resumed: the first step whose artifact cannot be read
back is the first that does anything. Within a training, the epochs are the training's own affair.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.model.notes import OnProgress
from tfrs_pipeline.run.folder import RunFolder


@dataclass
class StepReport:
    """What a step did: its name, lines for the user, seconds of wall time."""

    name: str
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


OnStep = Callable[[StepReport], None]


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        name: Name for the user.
        reads: Names of the artifacts that the step needs.
        writes: Name of the artifact that it makes.
        make: Makes the artifact. It is called with the runner and what the step reads, in order.
        read: Reads the artifact back, called in the same way; returns None if it is not whole. If
            `read` is None, the artifact lives in memory and is made each time.
        place: Where the artifact lies in the folder; empty if in memory.
    """

    name: str
    reads: tuple[str, ...]
    writes: str
    make: Callable[..., Any]
    read: Callable[..., Any] | None = None
    place: str = ""


class Runner:
    """Runs steps in a folder, and shows each as it begins and ends.

    Attributes:
        config: The settings of the run.
        folder: Where artifacts are kept.
        on_step: Called as each step ends.
        on_progress: Called within a step with a task's name, steps done and steps in all.
        artifacts: What the steps have made or read back, by name.
        reports: What each step did; the last one is that of the step at hand.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        on_step: OnStep = lambda report: None,
        on_progress: OnProgress = lambda *task: None,
    ) -> None:
        self.config, self.folder = config, folder
        self.on_step, self.on_progress = on_step, on_progress
        self.artifacts: dict[str, Any] = {}
        self.reports: list[StepReport] = []

    def run(self, steps: Sequence[Step]) -> Any:
        """Runs steps in order; returns the artifact of the last one."""
        made = None
        for step in steps:
            report, start = StepReport(step.name), time.monotonic()
            self.reports.append(report)
            self.on_progress(step.name, 0, 0)
            given = [self.artifacts[name] for name in step.reads]
            made = None if step.read is None else step.read(self, *given)
            if made is None:
                made = step.make(self, *given)
            self.artifacts[step.writes] = made
            report.seconds = round(time.monotonic() - start, 3)
            self.on_step(report)
        return made

    def note(self, *lines: str) -> None:
        """Adds lines for the user to the report of the step at hand."""
        self.reports[-1].notes += lines


def as_lines(steps: Sequence[Step]) -> list[str]:
    """Lists steps, one a line: what each reads, and what it writes where."""
    return [
        f"{step.name}: {', '.join(step.reads) or 'settings'} -> {step.writes}"
        f"{f' ({step.place})' if step.place else ''}"
        for step in steps
    ]


def as_diagram(steps: Sequence[Step]) -> str:
    """Draws steps as a Mermaid flowchart: an arrow leads to each step that reads what one wrote.

    Example:
        >>> split = Step("split", ("log",), "split", make=print, place="data/split.parquet")
        >>> print(as_diagram([Step("data", (), "log", make=print), split]))
        flowchart TD
            log["data"]
            split["split<br>data/split.parquet"]
            log --> split
    """
    lines = ["flowchart TD"]
    for step in steps:
        place = f"<br>{step.place}" if step.place else ""
        lines.append(f'    {step.writes}["{step.name}{place}"]')
        lines += [f"    {name} --> {step.writes}" for name in step.reads]
    return "\n".join(lines)
