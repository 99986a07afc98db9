"""Work as a list of steps, each of which reads what is complete on disk and makes the rest."""

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tfrs_pipeline.messages import SILENT, Progress, StepReport


@dataclass(frozen=True)
class Step:
    """One step of a run, a comparison or a refresh.

    `make` makes an artifact, or reads it back if it is complete on disk. It is called with the
    runner and the artifacts that the step reads, in order.
    """

    name: str
    reads: tuple[str, ...]
    writes: str
    make: Callable[..., Any]
    place: str = ""  # Where the artifact is stored; empty if in memory.


class Runner:
    """Runs steps, and shows each as it begins and ends."""

    def __init__(self, progress: Progress = SILENT) -> None:
        self.progress = progress
        self.artifacts: dict[str, Any] = {}  # What the steps have made or read back, by name.
        self.reports: list[StepReport] = []  # The last one belongs to the current step.

    def run(self, steps: Sequence[Step]) -> Any:
        """Runs steps in order; returns the artifact of the last one."""
        made = None
        for step in steps:
            report, start = StepReport(step.name), time.monotonic()
            self.reports.append(report)
            self.progress.task(step.name, 0, 0)
            given = [self.artifacts[name] for name in step.reads]
            made = self.artifacts[step.writes] = step.make(self, *given)
            give_back_memory()
            report.seconds = round(time.monotonic() - start, 3)
            self.progress.step(report)
        return made

    def remaining(self, steps: Sequence[Step]) -> list[Step]:
        """Lists the steps whose artifacts are not there yet."""
        return [step for step in steps if step.writes not in self.artifacts]

    def note(self, *lines: str) -> None:
        """Adds lines for the user to the report of the current step."""
        self.reports[-1].notes += lines


def give_back_memory() -> None:
    """Gives the memory of what is gone back to the system.

    After a training, the C library would keep a gigabyte of freed blocks for the next one, beside
    which the process of the baselines may need as much.
    """
    gc.collect()  # A Keras model and its functions hold each other.
    with contextlib.suppress(AttributeError, OSError):  # Only glibc has it.
        ctypes.CDLL(None).malloc_trim(0)


def as_lines(steps: Sequence[Step]) -> list[str]:
    """Lists steps, one per line: what each reads, and what it writes where."""
    return [
        f"{step.name}: {', '.join(step.reads) or 'settings'} -> {step.writes}"
        f"{f' ({step.place})' if step.place else ''}"
        for step in steps
    ]


def as_diagram(steps: Sequence[Step]) -> str:
    """Draws steps as a Mermaid flowchart, with an arrow to each step that reads an artifact.

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
