"""Prints stages and progress, and keeps the errors of C++ libraries apart."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from tfrs_pipeline.messages import Progress, StepReport

PROGRAM = "tfrs-pipeline"
_SECONDS_BETWEEN_LINES = 30.0  # Without a terminal, where each line stays.


def program() -> list[str]:
    """Returns the words that start this program: a user's script, which imports its own parts."""
    script = Path(sys.argv[0])
    is_script = script.suffix == ".py" and script.stem not in ("__main__", "ipykernel_launcher")
    return ["python", str(script)] if is_script else [PROGRAM]


def say(console: Console, text: str) -> None:
    """Prints a line unchanged, because "[...]" in a file name would be read as markup."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


class Shown(Progress):
    """A bar for the current task, and a line with notes for each finished step.

    Without a terminal it prints a task's last line, and others every 30 seconds: the log of a
    nightly job should not have a line for each epoch.
    """

    def __init__(self, console: Console, bar: Bar, remark: Text) -> None:
        self._console, self._bar, self._remark = console, bar, remark
        self._said = time.monotonic()
        self._task, self._unsaid = "", ""  # Without a terminal: the task, and its latest line.

    def step(self, report: StepReport) -> None:
        """Prints the step's name, time and notes."""
        self._end_task()
        say(self._console, f"{report.name:<28}{report.seconds:8.1f} s")
        for note in report.notes:
            say(self._console, f"    {note}")

    def task(self, name: str, done: int, total: int, note: str = "", /) -> None:
        """Moves the bar, or prints a line if it is time."""
        if not self._console.is_terminal:
            if name != self._task:
                self._end_task()
            count = f" {done:,}/{total:,}" if total else ""
            line = f"    {name}{count}{f': {note}' if note else ''}"
            self._task, self._unsaid = name, line if note else ""
            is_last = note and done == total
            if is_last or (total and time.monotonic() - self._said > _SECONDS_BETWEEN_LINES):
                self._said, self._unsaid = time.monotonic(), ""
                say(self._console, line)
            return
        bar, (task,) = self._bar, self._bar.tasks
        if task.description != name:  # A task cannot lose its total or restart its clock.
            bar.remove_task(task.id)
            bar.add_task(name, total=total or None, count="")
        bar.update(bar.task_ids[0], completed=done, count=f"{done:,}/{total:,}" if total else "")
        self._remark.plain = f"  {note}" if note else ""

    def _end_task(self) -> None:
        """Prints the last line of a task that ended early, as a training does by its patience."""
        if self._unsaid:
            say(self._console, self._unsaid)
        self._unsaid = ""


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Shown]:
    """Yields a progress that the console shows while the block runs."""
    columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
    bar = Bar(*columns, TimeElapsedColumn(), console=console)
    bar.add_task("starting", total=None, count="")
    remark = Text(no_wrap=True, overflow="ellipsis")
    progress = Shown(console, bar, remark)
    with Live(Group(bar, remark), console=console, transient=True, refresh_per_second=10):
        yield progress


@contextlib.contextmanager
def native_errors_to(path: Path) -> Iterator[None]:
    """Redirects errors that C++ libraries print to a file; Python's own stay."""
    try:
        descriptor = sys.stderr.fileno()
    except (OSError, ValueError):  # Captured, for instance by a test.
        yield
        return
    # C++ writes to the descriptor, Python to `sys.stderr`, which gets a copy of the terminal's.
    saved = os.dup(descriptor)
    python_errors = sys.stderr
    with path.open("ab") as log, os.fdopen(os.dup(saved), "w", buffering=1) as terminal:
        sys.stderr = terminal
        os.dup2(log.fileno(), descriptor)
        try:
            yield
        finally:
            os.dup2(saved, descriptor)
            os.close(saved)
            sys.stderr = python_errors
