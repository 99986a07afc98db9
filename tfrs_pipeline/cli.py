"""The command line: `tfrs-pipeline COMMAND`."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import logging
import os
import re
import shlex
import shutil
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tfrs_pipeline.config import (
    RUN_PRESETS,
    Config,
    ConfigError,
    RunConfig,
    load_config,
    main_job_config,
    preset_settings,
    with_settings,
)
from tfrs_pipeline.serving.settings import ServeSettings

if TYPE_CHECKING:
    import numpy as np

    from tfrs_pipeline.compare import Comparison
    from tfrs_pipeline.run import RunResult, StageReport
    from tfrs_pipeline.serving.retriever import LoadedRetriever

logger = logging.getLogger(__name__)

INTERRUPTED = 130
# Of progress, where the output is no terminal.
SECONDS_BETWEEN_LINES = 15.0
PROGRAM = "tfrs-pipeline"
# Settings of the data that the messages of the loaders name, as a caller from Python passes them.
_LOADER_ARGUMENTS = ("duplicates", "time_zone", "timestamp_unit", "unknown_items")


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
    options, unknown = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_StderrHandler()])
    logging.getLogger("tfrs_pipeline").setLevel(
        logging.INFO if options.verbose else logging.WARNING
    )
    # A model a plan traces its functions anew, and TensorFlow takes that for a fault.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    try:
        if unknown:
            raise _unknown_argument(unknown[0], options.parser)
        return int(options.command(options))
    except (ConfigError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {_message(error, options)}", file=sys.stderr)
        if options.verbose:
            logger.exception("the whole trace")
        elif not _is_ours(error):
            print("It came unforeseen: --verbose shows where from.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _message(error: BaseException, options: argparse.Namespace) -> str:
    """Returns what an error says; for commands that have the flags, loaders' remedies as flags."""
    if options.command not in (_run, _compare):
        return str(error)
    return re.sub(
        rf"\b({'|'.join(_LOADER_ARGUMENTS)})='([^']*)'",
        lambda match: f"--data.{match[1].replace('_', '-')} {shlex.quote(match[2])}",
        str(error),
    )


def _is_ours(error: BaseException) -> bool:
    """Says whether the package raised an error itself, as what it foresaw, and no library did."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


class _StderrHandler(logging.StreamHandler[Any]):
    """Logs to the standard error of the moment: a run sends the one of C++ libraries elsewhere."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _program() -> str:
    """Names this program so that a command printed for the user works as it stands."""
    called = Path(sys.argv[0])
    is_script = called.name == PROGRAM and called.exists()
    on_path = shutil.which(PROGRAM)
    if not is_script or (on_path and Path(on_path).samefile(called)):
        return PROGRAM
    return str(called)


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
    _add_compare(commands, common)
    _add_report(commands, common)
    _add_query(commands, common)
    _add_serve(commands, common)
    _add_tune_index(commands, common)
    _add_refresh_index(commands, common)
    return parser


def _unknown_argument(argument: str, parser: argparse.ArgumentParser) -> UsageError:
    if not argument.startswith("-"):
        return UsageError(f"unexpected {argument!r}; see {parser.prog} --help")
    flag = argument.partition("=")[0]
    near = difflib.get_close_matches(flag, parser._option_string_actions, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]!r}?" if near else f"see {parser.prog} --help"
    return UsageError(f"unknown flag {flag}; {hint}")


def _add_run(commands: Any, common: argparse.ArgumentParser) -> None:
    run = commands.add_parser(
        "run",
        parents=[common],
        allow_abbrev=False,
        usage="tfrs-pipeline run [--config FILE] [--run-dir DIR] [--preset NAME] "
        "[--SETTING VALUE ...]",
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
    goods = "; ".join(f"{name}: {good_for}" for name, (good_for, _) in RUN_PRESETS.items())
    run.add_argument(
        "--preset",
        metavar="{" + ",".join(RUN_PRESETS) + "}",
        help=f"Settings by what they are good for, which flags may replace. {goods}.",
    )
    _add_settings(run, RunConfig, without=("compare",))
    run.set_defaults(command=_run, parser=run)


def _add_compare(commands: Any, common: argparse.ArgumentParser) -> None:
    compare = commands.add_parser(
        "compare",
        parents=[common],
        allow_abbrev=False,
        usage="tfrs-pipeline compare [--config FILE] [--run-dir DIR] [--SETTING VALUE ...]",
        help="Compare ways of choosing negatives on your data.",
        description=(
            "Trains the same towers with one sampling plan after another, within the same budget, "
            "and shows what each of them finds, what of the tail, and how well it tells positives "
            "from the corpus, from the losers of the funnel and from exposed items. Settings come "
            "from --config, or from the comparison in --run-dir that is to be resumed; flags "
            "replace them."
        ),
    )
    compare.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings.")
    compare.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="Folder of the comparison; one that holds a stopped comparison resumes it. Default: a "
        "new one in runs/.",
    )
    _add_settings(compare, RunConfig, without=("export",))
    compare.set_defaults(command=_compare, parser=compare)


def _add_settings(
    parser: Any, table: type[Config], prefix: str = "", without: Sequence[str] = ()
) -> None:
    """Adds a flag for every setting, from the config classes themselves."""
    defaults = main_job_config().model_dump()
    for name, field in table.model_fields.items():
        if name in without:
            continue
        annotation = field.annotation
        if _is_table(annotation):
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


def _is_table(annotation: Any) -> TypeGuard[type[Config]]:
    return isinstance(annotation, type) and issubclass(annotation, Config)


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
    if _is_table(annotation):
        return ":".join(annotation.model_fields).upper()
    return {"str": "TEXT", "Path": "PATH", "datetime": "TIME"}.get(
        annotation.__name__, annotation.__name__.upper()
    )


def _shown(value: Any) -> str:
    """Writes a value as its flag takes it."""
    if isinstance(value, Mapping):
        return " ".join(f"{k}={v}" for k, v in value.items()) or "none"
    if isinstance(value, tuple | list):
        entries = [v.values() if isinstance(v, Mapping) else [v] for v in value]
        return " ".join(":".join(map(str, entry)) for entry in entries) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Reads the settings that were given as flags, by dotted name."""
    given = {}
    for name, value in vars(options).items():
        table: Any = RunConfig
        for key in name.split("."):
            if not _is_table(table) or key not in table.model_fields:
                break
            table = table.model_fields[key].annotation
        else:
            given[name] = _parsed(name, table, value)
    return given


def _parsed(name: str, annotation: Any, value: Any) -> Any:
    """Turns a flag's text into what the config takes; the config checks and converts the rest."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (dict, tuple) and value == ["none"]:
        value = []
    if origin is dict:
        return dict(_parts(name, entry, "=", ["NAME", "VALUE"]) for entry in value)
    if origin is tuple and _is_table(inner[0]):
        fields = list(inner[0].model_fields)
        return [dict(zip(fields, _parts(name, entry, ":", fields), strict=True)) for entry in value]
    is_optional = origin in (typing.Union, types.UnionType) and type(None) in inner
    return None if is_optional and value == "none" else value


def _parts(name: str, entry: str, separator: str, names: Sequence[str]) -> list[str]:
    parts = entry.split(separator, maxsplit=len(names) - 1)
    if len(parts) < len(names):
        form = separator.join(names).upper()
        raise UsageError(f"--{name.replace('_', '-')}: got {entry!r}; write {form}")
    return parts


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
    def work(config: RunConfig, folder: Path, **callbacks: Any) -> RunResult:
        from tfrs_pipeline.report.facts import write_report
        from tfrs_pipeline.run import run

        result = run(config, folder, **callbacks)
        callbacks["on_progress"]("report", 0, 0)
        write_report(folder)
        return result

    return _work(options, "run", "", work, _print_result)


def _compare(options: argparse.Namespace) -> int:
    def work(config: RunConfig, folder: Path, **callbacks: Any) -> Comparison:
        from tfrs_pipeline.compare import compare

        return compare(config, folder, **callbacks)

    return _work(options, "compare", "compare-", work, _print_comparison)


def _work(
    options: argparse.Namespace,
    command: str,
    prefix: str,
    work: Callable[..., Any],
    print_result: Callable[[Console, RunConfig, Any], None],
) -> int:
    """Does long work in a folder, which says how to go on if it is stopped."""
    given = _settings_of(options)
    # At once: a flag may mend what a preset alone would not go with.
    preset = preset_settings(options.preset) if getattr(options, "preset", None) else {}
    config = with_settings(_base_config(options, given), {**preset, **given})
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = options.run_dir or Path("runs") / f"{prefix}{config.model_name}-{stamp}"
    console = Console()
    _say(console, f"run folder: {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (
            _native_errors_to(folder / "native.log"),
            _progress(console) as (on_stage, on_progress),
        ):
            result = work(config, folder, on_stage=on_stage, on_progress=on_progress)
    except KeyboardInterrupt:
        again = shlex.join([_program(), command, "--run-dir", str(folder)])
        has_begun = (folder / "config.toml").exists()
        _say(console, f"\nstopped; go on with:  {again}" if has_begun else "\nstopped")
        return INTERRUPTED
    print_result(console, config, result)
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


def _say(console: Console, text: str) -> None:
    # As it stands: markup could be read into the "[...]" of a user's file name.
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[tuple[Any, Any]]:
    """Shows a bar for the task at hand, and a line with its notes for each finished stage."""
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
                _say(console, f"    {name} {done:,}/{total:,}")
            return
        (task,) = bar.tasks
        if task.description != name:  # A task cannot lose its total, nor start its clock again.
            bar.remove_task(task.id)
            bar.add_task(name, total=total or None, count="")
        bar.update(bar.task_ids[0], completed=done, count=f"{done:,}/{total:,}" if total else "")

    def on_stage(report: StageReport) -> None:
        _say(console, f"{report.name:<28}{report.seconds:8.1f} s")
        for note in report.notes:
            _say(console, f"    {note}")

    with bar:
        yield on_stage, on_progress


def _print_result(console: Console, config: RunConfig, result: RunResult) -> None:
    from tfrs_pipeline.evaluation.table import format_table

    shortest, longest = min(config.evaluation.cutoffs), max(config.evaluation.cutoffs)
    columns = [f"ndcg@{longest}", f"recall@{longest}", f"recall@{shortest}"]
    columns += [f"tail/recall@{longest}", f"coverage@{shortest}", f"mrr@{shortest}"]
    columns = list(dict.fromkeys(columns))
    table = format_table(result.metrics["models"], columns)
    # A wrapped table cannot be read; metrics.json has every number.
    while console.is_terminal and len(table.partition("\n")[0]) > console.width and columns[1:]:
        table = format_table(result.metrics["models"], columns := columns[:-1])
    left_out = {"clicked": ", clicked items left out", "seen": ", seen items left out", "none": ""}
    _say(console, f"\nOn the test part{left_out[config.evaluation.exclude]}:")
    _say(console, table)
    for line in _verdicts(result.metrics["differences"], [f"ndcg@{longest}", f"recall@{shortest}"]):
        _say(console, line)
    _say(console, f"\nmetrics  {result.folder / 'metrics.json'}")
    _say(console, f"config   {result.folder / 'config.toml'}")
    _say(console, f"report   {result.folder / 'report.html'}")
    _say(console, f"model    {result.export_folder}")
    manifest = json.loads((result.export_folder / "manifest.json").read_text())
    command = [_program(), "query", str(result.export_folder.parent)]
    command += ["--user", str(manifest["example_user"]), "-k", "10"]
    _say(console, f"\nnext:  {shlex.join(command)}")


def _verdicts(
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


def _print_comparison(console: Console, config: RunConfig, result: Comparison) -> None:
    _say(console, "")
    _say(console, result.table)
    reference = config.compare.reference
    _say(console, f"\nDifferences are from {reference}, query by query, 95% intervals.")
    for note in result.notes:
        _say(console, note)
    for kind in ("md", "png", "json"):
        _say(console, f"{kind:5} {result.folder / f'comparison.{kind}'}")


def _add_report(commands: Any, common: argparse.ArgumentParser) -> None:
    report = commands.add_parser(
        "report",
        parents=[common],
        allow_abbrev=False,
        help="Write the report of a run as one HTML page.",
        description=(
            "Writes one HTML page about a finished run: data, sampling, training, metrics, index, "
            "recommendations for a few users. It needs no other file and no network. A run writes "
            "it at its end too."
        ),
    )
    report.add_argument("run", type=Path, metavar="RUN", help="Folder of the run.")
    report.add_argument(
        "--output", type=Path, metavar="FILE", help="Where to write (default: RUN/report.html)."
    )
    report.set_defaults(command=_report, parser=report)


def _report(options: argparse.Namespace) -> int:
    from tfrs_pipeline.report.facts import write_report

    print(write_report(options.run, options.output))
    return 0


def _add_query(commands: Any, common: argparse.ArgumentParser) -> None:
    query = commands.add_parser(
        "query",
        parents=[common],
        help="Ask an exported model for a user's items.",
        description=(
            "Prints the best items of a user, or for a history, with ids, titles and scores. The "
            "user's known items, or those of the history given, are left out; an unknown user gets "
            "the answer for an empty history."
        ),
    )
    query.add_argument(
        "model", type=Path, metavar="MODEL", help="Folder saved_models/NAME[/VERSION]."
    )
    query.add_argument("--user", metavar="ID", help="Id of the user, as in the logs.")
    query.add_argument(
        "--history",
        nargs="+",
        metavar="ITEM",
        help="Ids of the items that the user liked, oldest first, for someone whom the model "
        "does not know or in place of what it knows.",
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
        "--filter",
        nargs="+",
        metavar="VALUE",
        help="Only items with one of these values of the feature that the model filters by "
        "(export.filter_by).",
    )
    query.add_argument(
        "--exact", action="store_true", help="Use the brute-force twin instead of the index."
    )
    query.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    query.set_defaults(command=_query, parser=query)


def _query(options: argparse.Namespace) -> int:
    if options.k < 1:
        raise UsageError(f"-k: got {options.k}; must be 1 or more")
    if options.user is None and options.history is None:
        raise UsageError("give --user ID, or --history ITEM ... for someone without an id")
    from tfrs_pipeline.serving.retriever import load_retriever

    retriever = load_retriever(options.model, exact=options.exact)
    ask = _ask_by_user if options.history is None else _ask_by_history
    ids, scores, about, note = ask(retriever, options)
    titles = retriever.titles()
    found = [
        {"rank": rank, "item_id": id_, "title": titles.get(id_), "score": round(float(score), 6)}
        for rank, (id_, score) in enumerate(zip(ids.tolist(), scores, strict=True), 1)
        if score > -float("inf")
    ]
    if options.json:
        print(json.dumps({**about, "items": found}, ensure_ascii=False))
        return 0
    console = Console()
    if note:
        _say(console, note)
    table = Table("rank", "item", *(["title"] if titles else []), "score")
    for item in found:
        title = [item["title"] or ""] if titles else []
        cells = [str(item["rank"]), str(item["item_id"]), *title, f"{item['score']:.4f}"]
        table.add_row(*map(Text, cells))
    console.print(table)
    if len(found) < options.k:
        _say(console, f"Only {len(found)} items are left for this user.")
    return 0


# Ids and scores of the best items, what to say of the question in JSON, and to a reader.
_Answer: TypeAlias = "tuple[np.ndarray, np.ndarray, dict[str, Any], str]"


def _ask_by_user(retriever: LoadedRetriever, options: argparse.Namespace) -> _Answer:
    user_id = retriever.parse_user_id(options.user)
    exclude = [retriever.parse_item_id(text) for text in options.exclude]
    ids, scores, is_known = retriever.retrieve_user(
        [user_id], min(options.k, retriever.num_candidates), [exclude], allowed=_allowed(options)
    )
    unknown = f"User {options.user} is unknown to this model: the answer for an empty history."
    about = {"user_id": user_id, "is_known_user": bool(is_known[0])}
    return ids[0], scores[0], about, "" if is_known[0] else unknown


def _ask_by_history(retriever: LoadedRetriever, options: argparse.Namespace) -> _Answer:
    history, exclude = (
        [retriever.parse_item_id(text) for text in texts]
        for texts in (options.history, options.exclude)
    )
    query: dict[str, Any] = {"history": history}
    if options.user is not None:
        query["user_id"] = retriever.parse_user_id(options.user)
    ids, scores = retriever.retrieve(
        [query],
        min(options.k, retriever.num_candidates),
        [[*history, *exclude]],
        allowed=_allowed(options),
    )
    known = set(retriever.candidate_ids())
    unknown = [id_ for id_ in history if id_ not in known]
    note = (
        f"{len(unknown)} of {len(history)} items of the history are not among this model's items, "
        f"first {unknown[0]!r}."
        if unknown
        else ""
    )
    return ids[0], scores[0], {**query, "unknown_items": unknown}, note


def _allowed(options: argparse.Namespace) -> list[list[str]] | None:
    return None if options.filter is None else [options.filter]


def _add_serve(commands: Any, common: argparse.ArgumentParser) -> None:
    serve = commands.add_parser(
        "serve",
        parents=[common],
        allow_abbrev=False,
        help="Serve an exported model over HTTP.",
        description=(
            "Answers TensorFlow Serving's REST requests for a model, picks up its new versions, "
            "and has a page to try it on. Listens on this machine alone unless --host says "
            "otherwise; docs/serving.md says what a network takes. SIGTERM or Ctrl-C stops it."
        ),
    )
    serve.add_argument(
        "model", type=Path, metavar="MODEL", help="Folder saved_models/NAME[/VERSION]."
    )
    for name, field in ServeSettings.model_fields.items():
        is_switch = field.annotation is bool
        serve.add_argument(
            "--" + name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=f"{field.description} (default: {_shown(field.default)})".replace("%", "%%"),
            **({"action": argparse.BooleanOptionalAction} if is_switch else {}),
            **({} if is_switch else {"metavar": _metavar(field.annotation)}),
        )
    serve.set_defaults(command=_serve, parser=serve)


def _serve(options: argparse.Namespace) -> int:
    given = {k: v for k, v in vars(options).items() if k in ServeSettings.model_fields}
    settings = ServeSettings(**given)
    from tfrs_pipeline.serving.server import serve

    # What went wrong is in the answers too, but a server's log must say when.
    logging.getLogger("tfrs_pipeline").setLevel(logging.INFO)
    serve(
        options.model,
        settings,
        lambda address: print(f"serving {options.model} at {address}", flush=True),
    )
    return 0


def _add_tune_index(commands: Any, common: argparse.ArgumentParser) -> None:
    tune = commands.add_parser(
        "tune-index",
        parents=[common],
        allow_abbrev=False,
        help="Measure what an index costs for what it finds.",
        description=(
            "Measures ScaNN indexes over the items of an exported model: the share of the exact "
            "top k that they find for its held-out queries, against time a query. Prints the "
            "settings that no other beats, marks the one that keeps the promise at the least time "
            "and draws them. The model stays as it is: `run` and `refresh-index` choose by the "
            "same measure."
        ),
    )
    tune.add_argument(
        "model", type=Path, metavar="MODEL", help="Folder saved_models/NAME[/VERSION]."
    )
    tune.add_argument(
        "--target-recall",
        metavar="SHARE",
        help="The promise, in (0, 1] (default: that of the model's config).",
    )
    tune.add_argument("-k", default="100", metavar="K", help="Of the promise (default: 100).")
    tune.add_argument(
        "--figure", type=Path, metavar="FILE", help="Picture (default: NAME-VERSION-frontier.png)."
    )
    tune.add_argument("--json", type=Path, metavar="FILE", help="Where to write every point.")
    tune.set_defaults(command=_tune_index, parser=tune)


def _tune_index(options: argparse.Namespace) -> int:
    target_recall = _share("--target-recall", options.target_recall)
    k = _whole_number("-k", options.k)
    from tfrs_pipeline.serving.retriever import load_retriever
    from tfrs_pipeline.serving.tune import measure_frontier

    retriever = load_retriever(options.model, exact=True)
    if target_recall is None:
        target_recall = retriever.manifest["config"]["export"]["target_recall"]
    with _native_errors_to(Path(os.devnull)):  # ScaNN tells of every index that it builds.
        _, frontier = measure_frontier(
            retriever.candidate_embeddings(),
            retriever.embed_queries(retriever.held_out_queries()),
            k=k,
            target_recall=target_recall,
            num_structures=None,
        )
    console = Console()
    _say(console, frontier.table())
    name, version = retriever.folder.parts[-2:]
    figure = options.figure or Path(f"{name}-{version}-frontier.png")
    frontier.figure().savefig(figure, dpi=150)
    _say(console, f"\nfigure  {figure}")
    if options.json:
        options.json.write_text(json.dumps(frontier.as_dict(), indent=1))
        _say(console, f"json    {options.json}")
    return 0


def _add_refresh_index(commands: Any, common: argparse.ArgumentParser) -> None:
    refresh = commands.add_parser(
        "refresh-index",
        parents=[common],
        allow_abbrev=False,
        help="Exchange the items of an exported model, without training.",
        description=(
            "Writes a new version of a model that retrieves the items of a file: new ones are "
            "embedded by their features, those that the file lacks are gone. The towers stay as "
            "they are. A server picks the version up."
        ),
    )
    refresh.add_argument(
        "model", type=Path, metavar="MODEL", help="Folder saved_models/NAME[/VERSION]."
    )
    refresh.add_argument(
        "--items",
        type=Path,
        required=True,
        metavar="FILE",
        help="CSV or Parquet of all items to retrieve, with the item features of the model.",
    )
    refresh.add_argument(
        "--index",
        choices=("auto", "scann", "exact"),
        help="Search structure (default: that of the model's config).",
    )
    refresh.add_argument(
        "--target-recall", metavar="SHARE", help="Of a ScaNN index, in (0, 1] (default: likewise)."
    )
    refresh.add_argument(
        "--keep-versions",
        metavar="N",
        help="Keep the newest N versions, delete older ones (default: likewise).",
    )
    refresh.add_argument(
        "--all-new",
        action="store_true",
        help="Accept a file without any item that the model knows.",
    )
    refresh.set_defaults(command=_refresh_index, parser=refresh)


def _refresh_index(options: argparse.Namespace) -> int:
    target_recall = _share("--target-recall", options.target_recall)
    keep = options.keep_versions
    keep_versions = None if keep is None else _whole_number("--keep-versions", keep)
    from tfrs_pipeline.serving.export import describe_index
    from tfrs_pipeline.serving.refresh import refresh_index

    console = Console()
    with _native_errors_to(Path(os.devnull)), _progress(console) as (_, on_progress):
        done = refresh_index(
            options.model,
            options.items,
            index=options.index,
            target_recall=target_recall,
            keep_versions=keep_versions,
            allow_all_new=options.all_new,
            on_progress=on_progress,
        )
    _say(
        console,
        f"{done.num_items:,} items: {done.num_new:,} are new, {done.num_dropped:,} gone since the "
        "version before",
    )
    if done.num_untrained:
        _say(
            console, f"{done.num_untrained:,} were in no training: embedded by their features alone"
        )
        if not done.has_trained_unknown:
            _say(
                console,
                "    beside the embedding of an unknown id, which was not trained: they will "
                "seldom be found. Train with model.unknown_rate above 0, such as 0.1",
            )
    if done.num_left_out:
        _say(
            console,
            f"left out {done.num_left_out:,} of the file: the model reads no item features, and "
            "its training did not have them",
        )
    for line in describe_index(done.index, done.num_items):
        _say(console, line)
    _say(console, f"model  {done.folder}")
    return 0


def _share(flag: str, text: str | None) -> float | None:
    """Reads a share in (0, 1]."""
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise UsageError(f"{flag}: got {text!r}; must be above 0, and 1 at most")


def _whole_number(flag: str, text: str) -> int:
    """Reads a whole number of 1 or more."""
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise UsageError(f"{flag}: got {text!r}; must be a whole number, 1 or more")


if __name__ == "__main__":
    sys.exit(main())
