"""Work as a list of steps, and the one loop that runs it.

The function of a step (`Step.make`) reads its artifact back if it is complete on disk, and makes it
if not. So work that was stopped resumes at the first step without a complete artifact.
"""

import contextlib
import ctypes
import functools
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from tfrs_pipeline.cluster import this_worker
from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.messages import SILENT, Progress, StepReport
from tfrs_pipeline.run.folder import RunFolder


@dataclass(frozen=True)
class Step:
    """One step of a run, a comparison or a refresh.

    `make` is called with the runner, and with the artifacts that the step reads as keyword
    arguments. It returns the artifact that the step writes.
    """

    name: str
    reads: tuple[str, ...]
    writes: str
    make: Callable[..., Any]
    path: str = ""  # Where the artifact is stored; empty if in memory.
    # If several workers train together: "all" do the step at once, as in a training; or the chief
    # does it first, and the others then read its files; or only the chief does it.
    workers: Literal["all", "chief first", "chief"] = "chief first"


class Runner:
    """Runs steps, and shows each as it begins and ends.

    Attributes:
        artifacts: What the steps have made or read back, by name.
        reports: A report of each step that has begun, the current one last.
    """

    def __init__(self, progress: Progress = SILENT) -> None:
        self.progress = progress
        self.artifacts: dict[str, Any] = {}
        self.reports: list[StepReport] = []
        self._held = contextlib.ExitStack()

    def run(self, steps: Sequence[Step]) -> Any:
        """Calls the steps in order; returns the last artifact.

        A step whose artifact this runner has already, from another list, is passed over. What is on
        disk the step itself reads back.

        Example:
            >>> one = Step("first", (), "number", lambda runner: 1)
            >>> two = Step("second", ("number",), "sum", lambda runner, number: number + 1)
            >>> Runner().run([one, two])
            2
        """
        artifact = None
        with self._held:
            for step in steps:
                # A runner that goes on from another list of steps has the first artifacts already.
                if step.writes not in self.artifacts:
                    self._make_together(step)
                artifact = self.artifacts.get(step.writes)
        return artifact

    def _make_together(self, step: Step) -> None:
        """Makes a step's artifact on the workers that it is for."""
        if step.workers == "all" or this_worker().count == 1:
            self._make(step)
            return
        # Imported here, because reading a log needs no TensorFlow.
        from tfrs_pipeline.model.distribution import chief_first, on_chief

        call = on_chief if step.workers == "chief" else chief_first
        call(functools.partial(self._make, step))

    def _make(self, step: Step) -> None:
        report, start = StepReport(step.name), time.monotonic()
        self.reports.append(report)
        self.progress.task(step.name, 0, 0)
        inputs = {name: self.artifacts[name] for name in step.reads}
        self.artifacts[step.writes] = step.make(self, **inputs)
        if step.workers == "all":  # After a training. Elsewhere, a second of work gains little.
            give_back_memory()
        report.seconds = round(time.monotonic() - start, 3)
        self.progress.step(report)

    def note(self, *lines: str) -> None:
        """Adds lines for the user to the report of the current step."""
        self.reports[-1].notes += lines

    def hold(self, context: AbstractContextManager[Any]) -> None:
        """Enters a context, such as a lock, which is left when all steps have ended."""
        self._held.enter_context(context)


class RunContext(Runner):
    """Runs the steps of a run or a comparison, which share its settings and its folder.

    A race replaces `config` by the winner's settings. So a step reads it when it begins, not when
    the list is made.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, progress: Progress = SILENT) -> None:
        super().__init__(progress)
        self.config, self.folder = config, folder


def give_back_memory() -> None:
    """Returns freed memory to the system.

    After a training, the C library would keep a gigabyte of freed blocks for itself, while another
    process may need as much.
    """
    gc.collect()  # A Keras model and its functions hold each other.
    with contextlib.suppress(AttributeError, OSError):  # Only glibc has it.
        ctypes.CDLL(None).malloc_trim(0)


def as_lines(steps: Sequence[Step]) -> list[str]:
    """Lists steps, one per line: what each reads, and what it writes where."""
    return [
        f"{step.name}: {', '.join(step.reads) or 'settings'} -> {step.writes}"
        f"{f' ({step.path})' if step.path else ''}"
        for step in steps
    ]


def as_diagram(steps: Sequence[Step]) -> str:
    """Draws steps as a Mermaid flowchart, with an arrow to each step that reads an artifact.

    Example:
        >>> split = Step("split", ("log",), "split", make=print, path="data/split.parquet")
        >>> print(as_diagram([Step("data", (), "log", make=print), split]))
        flowchart TD
            log["data"]
            split["split<br>data/split.parquet"]
            log --> split
    """
    lines = ["flowchart TD"]
    for step in steps:
        path = f"<br>{step.path}" if step.path else ""
        lines.append(f'    {step.writes}["{step.name}{path}"]')
        lines += [f"    {name} --> {step.writes}" for name in step.reads]
    return "\n".join(lines)
