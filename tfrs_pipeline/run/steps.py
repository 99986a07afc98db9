"""Work as a list of steps, and the one loop that runs and resumes it.

A step whose artifact is whole on disk is read back (`Step.read`), and any other step makes its
artifact (`Step.make`). So work that was stopped resumes at the first step without a whole artifact.
"""

import contextlib
import ctypes
import functools
import gc
import time
from collections.abc import Callable, Iterable, Sequence
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

    `make` and `read` are called with the runner, and with the artifacts that the step reads as
    keyword arguments. They return the artifact that the step writes; `read` returns None if it is
    not complete on disk. Samples and trainings have none: their `make` resumes them itself, as
    without a runner.
    """

    name: str
    reads: tuple[str, ...]
    writes: str
    make: Callable[..., Any]
    path: str = ""  # Where the artifact is stored; empty if in memory.
    read: Callable[..., Any] = lambda runner, **inputs: None
    # What the user is told of the artifact, whether it was made or read back.
    describe: Callable[[Any], Iterable[str]] = lambda artifact: ()
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

    def do(self, steps: Sequence[Step]) -> Any:
        """Does the steps in order; returns the last artifact.

        Skips steps whose artifact an earlier call made.

        Example:
            >>> one = Step("first", (), "number", lambda runner: 1)
            >>> two = Step("second", ("number",), "sum", lambda runner, number: number + 1)
            >>> Runner().do([one, two])
            2
        """
        with self._held:
            for step in steps:
                if step.writes not in self.artifacts:
                    self._do_together(step)
        return self.artifacts.get(steps[-1].writes) if steps else None

    def _do_together(self, step: Step) -> None:
        """Does a step on the workers that it is for."""
        if step.workers == "all" or this_worker().count == 1:
            self._do(step)
            return
        # Imported here, because reading a log needs no TensorFlow.
        from tfrs_pipeline.model.distribution import chief_first, on_chief

        call = on_chief if step.workers == "chief" else chief_first
        call(functools.partial(self._do, step))

    def _do(self, step: Step) -> None:
        """Reads the artifact of a step back, or makes it; here stopped work is resumed."""
        report, start = StepReport(step.name), time.monotonic()
        self.reports.append(report)
        self.progress.task(step.name, 0, 0)
        inputs = {name: self.artifacts[name] for name in step.reads}
        artifact = step.read(self, **inputs)
        if artifact is None:
            artifact = step.make(self, **inputs)
        self.artifacts[step.writes] = artifact
        self.note(*step.describe(artifact))
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
    """Runs the steps of a run or a comparison, which share its settings and its folder."""

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
