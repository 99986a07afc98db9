"""Prints stages, progress and results, and keeps the errors of C++ libraries apart."""

import contextlib
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from tfrs_pipeline.data.schema import ASKED
from tfrs_pipeline.evaluation.bootstrap import Outcome
from tfrs_pipeline.messages import Progress, StepReport
from tfrs_pipeline.report.advice import advice
from tfrs_pipeline.report.verdict import by_popularity, compared_with_baselines, other_question
from tfrs_pipeline.run.folder import CONFIG_FILE
from tfrs_pipeline.service.publish import versions_of

if TYPE_CHECKING:
    from tfrs_pipeline.config import RunConfig
    from tfrs_pipeline.run.comparison import Comparison
    from tfrs_pipeline.run.pipeline import RunResult

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
        self.is_interrupted = False

    def step(self, report: StepReport) -> None:
        """Prints the step's name, time and notes."""
        self.raise_if_interrupted()
        self._end_task()
        say(self._console, f"{report.name:<28}{report.seconds:8.1f} s")
        for note in report.notes:
            say(self._console, f"    {note}")

    def task(self, name: str, done: int, total: int, note: str = "", /) -> None:
        """Moves the bar, or prints a line if it is time."""
        self.raise_if_interrupted()
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

    def raise_if_interrupted(self) -> None:
        """Raises the Ctrl-C that Python has ignored, if any."""
        if self.is_interrupted:
            raise KeyboardInterrupt


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Shown]:
    """Yields a progress that the console shows while the block runs."""
    columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
    bar = Bar(*columns, TimeElapsedColumn(), console=console)
    bar.add_task("starting", total=None, count="")
    remark = Text(no_wrap=True, overflow="ellipsis")
    progress, show_ignored = Shown(console, bar, remark), sys.unraisablehook

    def note_interrupt(ignored: Any) -> None:
        # Python ignores a Ctrl-C within the callback of a weak reference, of which TensorFlow has
        # many. The next word of progress raises it again.
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            progress.is_interrupted = True
        else:
            show_ignored(ignored)

    sys.unraisablehook = note_interrupt
    try:
        with Live(Group(bar, remark), console=console, transient=True, refresh_per_second=10):
            yield progress
        progress.raise_if_interrupted()
    finally:
        sys.unraisablehook = show_ignored


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


def print_result(console: Console, config: "RunConfig", result: "RunResult") -> None:
    """Prints the metrics of a run, its files and the next command."""
    from tfrs_pipeline.evaluation.results import explained, format_table, other_columns, with_other

    shortest, longest = min(config.evaluation.cutoffs), max(config.evaluation.cutoffs)
    monitor = config.training.monitor
    # What decides comes first; the others follow in the order in which they may be left out.
    columns = [monitor, *other_columns(result.metrics, monitor), f"ndcg@{longest}"]
    columns += [f"recall@{longest}", f"even_recall@{longest}", f"recall@{shortest}"]
    columns += [f"tail/recall@{longest}", f"coverage@{shortest}"]
    columns += [f"average_popularity@{shortest}", f"mrr@{shortest}"]
    # Columns that do not fit are left out, since a wrapped table is unreadable.
    width = console.width if console.is_terminal else None
    columns = list(dict.fromkeys(columns))
    table = format_table(with_other(result.metrics), columns, width=width)
    monitored = compared_with_baselines(result.metrics, monitor)
    if monitored.outcome is Outcome.WORSE:
        say(console, f"\na baseline wins: {monitored.why}")
    question = ASKED[result.metrics["asked_by"]]
    excluded = {"clicked": ", clicked items excluded", "seen": ", seen items excluded", "none": ""}
    question += excluded[config.evaluation.exclude]
    say(console, f"\nOn the test split, asked {question}:\n{table}")
    _say_filled(console, *explained(table, result.metrics))
    say(console, "")
    for head, text in _findings(config, result.metrics):
        _say_filled(console, f"{head:8} {text}", indent=9)
    say(console, f"\nmetrics  {result.folder / 'metrics.json'}")
    say(console, f"config   {result.folder / CONFIG_FILE}")
    say(console, f"report   {result.folder / 'report.html'}")
    if result.export_folder is None:
        say(console, "model    not exported")
        if config.export.index == "none":
            again = [*program(), "run", "--run-dir", str(result.folder), "--export.index", "auto"]
            is_kept_out = monitored.outcome is Outcome.WORSE and not config.export.if_beaten
            again += ["--export.if_beaten"] if is_kept_out else []
            say(console, f"\nnext:  {shlex.join(again)}")
        return
    model = result.export_folder
    if model.is_relative_to(Path.cwd()):
        model = model.relative_to(Path.cwd())
    say(console, f"model    {model}")
    # A server loads the newest version, so an earlier one is no longer served.
    if earlier := [number for number in versions_of(model.parent) if number < int(model.name)]:
        say(console, f"replaces version {earlier[-1]}")
    # A terminal would obey control characters in an id.
    users = (str(example["user_id"]) for example in result.metrics["examples"])
    user = next(filter(str.isprintable, users), None) if config.export.user_data else None
    # With "=", because an id may begin with a hyphen.
    whom = "--history=ITEM" if user is None else f"--user={user}"
    query = [*program(), "query", str(model.parent), whom, "-k", "10"]
    say(console, f"\nnext:  {shlex.join(query)}")


def _say_filled(console: Console, *lines: str, indent: int = 0) -> None:
    """Prints lines, wrapped for a terminal; a pipe gets them unwrapped."""
    width = min(console.width, 100) if console.is_terminal else 100_000
    for line in lines:
        say(console, textwrap.fill(line, width, subsequent_indent=" " * indent))


def _findings(config: "RunConfig", metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields what the numbers mean and, if they are not good, what to try."""
    metric, recall = config.training.monitor, f"recall@{max(config.evaluation.cutoffs)}"
    better = compared_with_baselines(metrics, metric)
    yield "better?", f"{better.answer}: {better.why}"
    if (otherwise := other_question(metrics, metric)) is not None:
        yield "but", otherwise
    for_whom = by_popularity(metrics, recall)
    unknown = "" if for_whom.outcome else f"{for_whom.answer}: "
    yield "for whom", f"{unknown}{for_whom.why}"
    for line in advice(metrics, metric, config):
        yield "try", line
    if better.outcome in (Outcome.LEVEL, Outcome.WORSE):
        yield "more", "docs/guides/debugging.md"


def print_comparison(console: Console, result: "Comparison", folder: Path) -> None:
    """Prints the table of a comparison, its conclusion and its files."""
    from tfrs_pipeline.run.comparison import WIDTH

    width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    say(console, f"\n{result.table(width=width)}\n")
    for line in result.lines(width):
        say(console, textwrap.fill(line, width))
    say(console, "")
    for name in ("comparison.md", "comparison.svg", "comparison.json"):
        say(console, f"{name.rpartition('.')[2]:5} {folder / name}")
