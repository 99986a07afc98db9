"""What long work shows: stages, progress, results; the errors of C++ libraries kept apart."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tfrs_pipeline.run_folder import CONFIG_FILE

if TYPE_CHECKING:
    from tfrs_pipeline.compare import PlanComparison
    from tfrs_pipeline.config import RunConfig
    from tfrs_pipeline.run import RunResult
    from tfrs_pipeline.run_data import StepReport

PROGRAM = "tfrs-pipeline"
SECONDS_BETWEEN_LINES = 15.0  # Of progress, where the output is no terminal.
Callbacks: TypeAlias = "tuple[Callable[[StepReport], None], Callable[[str, int, int], None]]"


def program() -> str:
    """Names this program so that a command printed for the user works as it stands."""
    called = Path(sys.argv[0])
    is_script = called.name == PROGRAM and called.exists()
    on_path = shutil.which(PROGRAM)
    if not is_script or (on_path and Path(on_path).samefile(called)):
        return PROGRAM
    return str(called)


def say(console: Console, text: str) -> None:
    """Prints a line as it stands: markup could be read into the "[...]" of a user's file name."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Callbacks]:
    """Shows a bar for the task at hand, and a line with its notes for each finished stage.

    Yields:
        `on_step` and `on_progress`, as `run` and `compare` take them.
    """
    bar = Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    bar.add_task("starting", total=None, count="")
    said = time.monotonic()

    def on_progress(name: str, done: int, total: int) -> None:
        nonlocal said
        if not console.is_terminal:  # No bar: a line now and then.
            if total and time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                say(console, f"    {name} {done:,}/{total:,}")
            return
        (task,) = bar.tasks
        if task.description != name:  # A task cannot lose its total, nor start its clock again.
            bar.remove_task(task.id)
            bar.add_task(name, total=total or None, count="")
        bar.update(bar.task_ids[0], completed=done, count=f"{done:,}/{total:,}" if total else "")

    def on_step(report: StepReport) -> None:
        say(console, f"{report.name:<28}{report.seconds:8.1f} s")
        for note in report.notes:
            say(console, f"    {note}")

    with bar:
        yield on_step, on_progress


@contextlib.contextmanager
def native_errors_to(path: Path) -> Iterator[None]:
    """Sends what C++ libraries write to the standard error to a file; Python's own stays."""
    try:
        descriptor = sys.stderr.fileno()
    except (OSError, ValueError):  # Captured, as in a test: nothing native to keep apart.
        yield
        return
    saved = os.dup(descriptor)
    python_errors = sys.stderr
    with path.open("ab") as log, os.fdopen(os.dup(saved), "w", buffering=1) as own:
        sys.stderr = own
        os.dup2(log.fileno(), descriptor)
        try:
            yield
        finally:
            os.dup2(saved, descriptor)
            os.close(saved)
            sys.stderr = python_errors


def print_result(console: Console, config: RunConfig, result: RunResult) -> None:
    """Prints the metrics of a run, where things lie and what to do next."""
    from tfrs_pipeline.evaluation.table import format_table

    shortest, longest = min(config.evaluation.cutoffs), max(config.evaluation.cutoffs)
    columns = [f"ndcg@{longest}", f"recall@{longest}", f"recall@{shortest}"]
    columns += [f"tail/recall@{longest}", f"coverage@{shortest}", f"mrr@{shortest}"]
    columns = list(dict.fromkeys(columns))
    table = format_table(result.metrics["models"], columns)
    # A wrapped table cannot be read; metrics.json has every number.
    while console.is_terminal and len(table.partition("\n")[0]) > console.width and columns[1:]:
        table = format_table(result.metrics["models"], columns := columns[:-1])
    excluded = {"clicked": ", clicked items excluded", "seen": ", seen items excluded", "none": ""}
    say(console, f"\nOn the test split{excluded[config.evaluation.exclude]}:")
    say(console, table)
    for line in verdicts(result.metrics["differences"], [f"ndcg@{longest}", f"recall@{shortest}"]):
        say(console, line)
    say(console, f"\nmetrics  {result.folder / 'metrics.json'}")
    say(console, f"config   {result.folder / CONFIG_FILE}")
    say(console, f"report   {result.folder / 'report.html'}")
    say(console, f"model    {result.export_folder}")
    command = [program(), "query", str(result.export_folder.parent)]
    user = str(result.metrics["examples"][0]["user_id"])
    command += ["--user", user] if config.export.user_data else ["--history", "ITEM"]
    say(console, f"\nnext:  {shlex.join([*command, '-k', '10'])}")


def verdicts(
    differences: Mapping[str, Mapping[str, Mapping[str, Any]]], metrics: Sequence[str]
) -> Iterator[str]:
    """Says of each model if it is better than two_tower, by 95% intervals of the difference."""
    for other, by_metric in differences.items():
        found = []
        for metric in metrics:
            x = by_metric[metric]
            if x["low"] is None:  # No query, or one alone: nothing to tell.
                continue
            word = "better" if x["low"] > 0 else "worse" if x["high"] < 0 else "no clear difference"
            found.append(f"{metric} {x['mean']:+.4f} [{x['low']:+.4f}, {x['high']:+.4f}], {word}")
        if found:
            yield f"{other} compared with two_tower: {'; '.join(found)}"


def print_comparison(console: Console, config: RunConfig, result: PlanComparison) -> None:
    """Prints the table of a comparison, and where its files lie."""
    say(console, "")
    say(console, result.table)
    reference = config.compare.reference
    say(console, f"\nDifferences are from {reference}, query by query, 95% intervals.")
    for note in result.notes:
        say(console, note)
    for kind in ("md", "svg", "json"):
        say(console, f"{kind:5} {result.folder / f'comparison.{kind}'}")
