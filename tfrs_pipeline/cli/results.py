"""Prints what a run or a comparison found."""

import shlex
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tfrs_pipeline.answers.publish import versions_of
from tfrs_pipeline.cli.console import program, say
from tfrs_pipeline.config import RunConfig
from tfrs_pipeline.data.schema import ASKED
from tfrs_pipeline.evaluation.bootstrap import Outcome
from tfrs_pipeline.report.advice import advice
from tfrs_pipeline.report.verdict import by_popularity, compared_with_baselines, other_question
from tfrs_pipeline.run.folder import CONFIG_FILE

if TYPE_CHECKING:
    from tfrs_pipeline.run.comparison import Comparison
    from tfrs_pipeline.run.pipeline import RunResult


def print_result(console: Console, config: RunConfig, result: "RunResult") -> None:
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


def _findings(config: RunConfig, metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
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
        yield "more", "docs/guides/report.md"


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
