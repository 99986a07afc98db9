"""The command line: `tfrs-pipeline COMMAND`."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shlex
import sys
import time
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tfrs_pipeline.config import (
    Config,
    ConfigError,
    EasySampler,
    RunConfig,
    load_config,
    main_job_config,
    with_settings,
)

if TYPE_CHECKING:
    from tfrs_pipeline.pipeline import RunResult, StageReport

logger = logging.getLogger(__name__)

INTERRUPTED = 130


class UsageError(ValueError):
    """A flag that cannot be read."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Without the program's name; None takes those of the process.

    Returns:
        0 if all went well, 1 for refused data or a failed run, 2 for a wrong flag or setting, 130
        after Ctrl-C.
    """
    # TensorFlow's C++ log helps nobody here; what fails comes as a Python error too.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tfrs_pipeline").setLevel(
        logging.INFO if options.verbose else logging.WARNING
    )
    try:
        return int(options.command(options))
    except (ConfigError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if options.verbose:
            logger.exception("the whole trace")
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    from tfrs_pipeline import __version__

    parser = argparse.ArgumentParser(
        prog="tfrs-pipeline",
        description="Retrieval models from the logs of a recommendation funnel.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--verbose", action="store_true", help="Log what happens within stages.")
    _add_run(commands, common)
    _add_query(commands, common)
    return parser


def _add_run(commands: Any, common: argparse.ArgumentParser) -> None:
    run = commands.add_parser(
        "run",
        parents=[common],
        allow_abbrev=False,
        usage="tfrs-pipeline run [--config FILE] [--run-dir DIR] [--SETTING VALUE ...]",
        help="Train, evaluate and export a model.",
        description=(
            "Trains a two-tower retrieval model, compares it with baselines and exports it with "
            "its index. Without an argument: MovieLens-100K, fetched if need be. Settings come "
            "from --config, or from the run in --run-dir that is to be resumed; flags replace "
            "them."
        ),
    )
    run.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings.")
    run.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="Folder of the run; one that holds a stopped run resumes it. Default: a new one in "
        "runs/.",
    )
    _add_settings(run, RunConfig)
    run.set_defaults(command=_run)


def _add_settings(parser: Any, table: type[Config], prefix: str = "") -> None:
    """Adds a flag for every setting, from the config classes themselves."""
    defaults = main_job_config().model_dump()
    for name, field in table.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Config):
            group = parser.add_argument_group(f"{name} settings", field.description)
            _add_settings(group, annotation, f"{prefix}{name}.")
            continue
        setting = f"{prefix}{name}"
        default: Any = defaults
        for key in setting.split("."):
            default = default[key]
        options: dict[str, Any] = {
            "dest": setting,
            "default": argparse.SUPPRESS,
            "help": f"{field.description} (default: {_shown(default)})".replace("%", "%%"),
        }
        flag = "--" + setting.replace("_", "-")
        if annotation is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif typing.get_origin(annotation) in (tuple, dict):
            parser.add_argument(flag, nargs="*", metavar=_metavar(annotation), **options)
        else:
            parser.add_argument(flag, metavar=_metavar(annotation), **options)


def _metavar(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if origin is dict:
        return "NAME=" + _metavar(inner[1])
    if origin is tuple:
        return _metavar(inner[0])
    if origin is typing.Annotated:
        return _metavar(inner[0])
    if origin in (typing.Union, types.UnionType):
        names = [_metavar(option) for option in inner if option is not type(None)]
        return "|".join([*names, "none"])
    if annotation is EasySampler:
        return "ALPHA:NUM"
    return {"str": "TEXT", "Path": "PATH", "datetime": "TIME"}.get(
        annotation.__name__, annotation.__name__.upper()
    )


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}={v}" for k, v in value.items()) or "none"
    if isinstance(value, tuple | list):
        parts = [f"{v['alpha']:g}:{v['num']}" if isinstance(v, Mapping) else str(v) for v in value]
        return " ".join(parts) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Reads the settings that were given as flags, by dotted name."""
    given = {}
    for name, value in vars(options).items():
        table: Any = RunConfig
        for key in name.split("."):
            is_table = isinstance(table, type) and issubclass(table, Config)
            if not is_table or key not in table.model_fields:
                break
            table = table.model_fields[key].annotation
        else:
            given[name] = _parsed(name, table, value)
    return given


def _parsed(name: str, annotation: Any, value: Any) -> Any:
    """Turns a flag's text into what the config takes; the config checks and converts the rest."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is dict:
        return dict(_parts(name, entry, "=", "NAME=VALUE") for entry in value)
    if origin is tuple and inner[0] is EasySampler:
        pairs = [_parts(name, entry, ":", "ALPHA:NUM") for entry in value]
        return [{"alpha": alpha, "num": num} for alpha, num in pairs]
    is_optional = origin in (typing.Union, types.UnionType) and type(None) in inner
    return None if is_optional and value == "none" else value


def _parts(name: str, entry: str, separator: str, form: str) -> tuple[str, str]:
    left, found, right = entry.partition(separator)
    if not found:
        raise UsageError(f"--{name.replace('_', '-')}: got {entry!r}; write {form}")
    return left, right


def _base_config(options: argparse.Namespace, given: Mapping[str, Any]) -> RunConfig:
    if options.config is not None:
        return load_config(options.config)
    if options.run_dir is not None and (options.run_dir / "config.toml").exists():
        return load_config(options.run_dir / "config.toml")
    if given.get("data.source", "movielens-100k") != "movielens-100k":
        # The main job's features and name are MovieLens' own. A source needs its path at once.
        data = {k.removeprefix("data."): v for k, v in given.items() if k.startswith("data.")}
        return RunConfig(data=data)
    return main_job_config()


def _run(options: argparse.Namespace) -> int:
    given = _settings_of(options)
    config = with_settings(_base_config(options, given), given)
    folder = (
        options.run_dir or Path("runs") / f"{config.model_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    console = Console()
    console.print(f"run folder: {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (
            _native_errors_to(folder / "native.log"),
            _progress(console) as (on_stage, on_progress),
        ):
            from tfrs_pipeline.pipeline import run

            result = run(config, folder, on_stage=on_stage, on_progress=on_progress)
    except KeyboardInterrupt:
        again = shlex.join(["tfrs-pipeline", "run", "--run-dir", str(folder)])
        console.print(f"\nstopped; go on with:  {again}", soft_wrap=True)
        return INTERRUPTED
    _print_result(console, config, result)
    return 0


@contextlib.contextmanager
def _native_errors_to(path: Path) -> Iterator[None]:
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


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[tuple[Any, Any]]:
    """Shows a bar for the task at hand, and a line with its notes for each finished stage."""
    bar = Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task("starting", total=None)

    def on_progress(name: str, done: int, total: int) -> None:
        bar.update(task, description=name, completed=done, total=total or None)

    def on_stage(report: StageReport) -> None:
        # A tag of markup could be read into "[...]" of a user's file name.
        console.print(f"{report.name:<28}{report.seconds:8.1f} s", markup=False, highlight=False)
        for note in report.notes:
            console.print(f"    {note}", markup=False, highlight=False, soft_wrap=True)

    with bar:
        yield on_stage, on_progress


def _print_result(console: Console, config: RunConfig, result: RunResult) -> None:
    from tfrs_pipeline.evaluation.table import format_table

    cutoffs = config.evaluation.cutoffs
    columns = [f"ndcg@{max(cutoffs)}", f"recall@{max(cutoffs)}", f"recall@{min(cutoffs)}"]
    columns += [f"mrr@{min(cutoffs)}", f"coverage@{min(cutoffs)}", f"tail/recall@{max(cutoffs)}"]
    table = format_table(result.metrics["models"], list(dict.fromkeys(columns)))
    left_out = {"clicked": ", clicked items left out", "seen": ", seen items left out", "none": ""}
    console.print(f"\nOn the test part{left_out[config.evaluation.exclude]}:", highlight=False)
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nmetrics  {result.folder / 'metrics.json'}", soft_wrap=True, highlight=False)
    console.print(f"config   {result.folder / 'config.toml'}", soft_wrap=True, highlight=False)
    console.print(f"model    {result.export_folder}", soft_wrap=True, highlight=False)
    manifest = json.loads((result.export_folder / "manifest.json").read_text())
    command = ["tfrs-pipeline", "query", str(result.export_folder.parent)]
    command += ["--user", str(manifest["example_user"]), "-k", "10"]
    console.print(f"\nnext:  {shlex.join(command)}", soft_wrap=True, highlight=False)


def _add_query(commands: Any, common: argparse.ArgumentParser) -> None:
    query = commands.add_parser(
        "query",
        parents=[common],
        help="Ask an exported model for a user's items.",
        description=(
            "Prints the best items of a user with ids, titles and scores. The user's known items "
            "are left out; an unknown user gets the answer for an empty history."
        ),
    )
    query.add_argument(
        "model", type=Path, metavar="MODEL", help="Folder saved_models/NAME[/VERSION]."
    )
    query.add_argument(
        "--user", required=True, metavar="ID", help="Id of the user, as in the logs."
    )
    query.add_argument("-k", type=int, default=10, metavar="K", help="How many (default: 10).")
    query.add_argument(
        "--exclude",
        nargs="*",
        default=[],
        metavar="ITEM",
        help="Ids of further items to leave out.",
    )
    query.add_argument(
        "--exact", action="store_true", help="Use the brute-force twin instead of the index."
    )
    query.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    query.set_defaults(command=_query)


def _query(options: argparse.Namespace) -> int:
    if options.k < 1:
        raise UsageError(f"-k: got {options.k}; must be 1 or more")
    from tfrs_pipeline.serving.retriever import load_retriever

    retriever = load_retriever(options.model, exact=options.exact)
    user_id = retriever.parse_user_id(options.user)
    exclude = [retriever.parse_item_id(text) for text in options.exclude]
    ids, scores, is_known = retriever.retrieve_user([user_id], options.k, [exclude])
    titles = retriever.titles()
    found = [
        {"rank": rank, "item_id": id_, "title": titles.get(id_), "score": round(float(score), 6)}
        for rank, (id_, score) in enumerate(zip(ids[0].tolist(), scores[0], strict=True), 1)
        if score > -float("inf")
    ]
    if options.json:
        answer = {"user_id": user_id, "is_known_user": bool(is_known[0]), "items": found}
        print(json.dumps(answer, ensure_ascii=False))
        return 0
    console = Console()
    if not is_known[0]:
        console.print(
            f"User {options.user} is unknown to this model: the answer for an empty history.",
            markup=False,
        )
    table = Table("rank", "item", *(["title"] if titles else []), "score")
    for item in found:
        title = [item["title"] or ""] if titles else []
        table.add_row(str(item["rank"]), str(item["item_id"]), *title, f"{item['score']:.4f}")
    console.print(table)
    if len(found) < options.k:
        console.print(f"Only {len(found)} items are left for this user.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
