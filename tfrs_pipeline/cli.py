"""The command line: `tfrs-pipeline COMMAND`."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, cast

import pydantic
from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg, CliToggleFlag
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tfrs_pipeline import __version__
from tfrs_pipeline.config import (
    RUN_PRESETS,
    RunConfig,
    load_config,
    main_job_config,
    with_settings,
)
from tfrs_pipeline.console import (
    PROGRAM,
    native_errors_to,
    print_comparison,
    print_result,
    program,
    progress,
    say,
)
from tfrs_pipeline.flags import CommandLine, UsageError
from tfrs_pipeline.serving.settings import ServeSettings
from tfrs_pipeline.settings import Config, ConfigError

if TYPE_CHECKING:
    import numpy as np

    from tfrs_pipeline.compare import Comparison
    from tfrs_pipeline.run import RunResult
    from tfrs_pipeline.serving.retriever import LoadedRetriever

logger = logging.getLogger(__name__)

INTERRUPTED = 130
BROKEN_PIPE = 141
# Settings within tables that the short help shows.
BRIEF = frozenset(
    {
        *("data.source", "data.path", "data.columns", "data.items_path", "data.users_path"),
        *("data.item_features", "data.user_features", "data.rating_threshold"),
        *("split.kind", "model.embedding_dim"),
        *("training.batch_size", "training.max_epochs", "training.learning_rate"),
        *("evaluation.cutoffs", "export.name", "export.index"),
        *("compare.plans", "compare.reference", "compare.max_steps"),
    }
)
TargetRecall: TypeAlias = Annotated[float, Field(gt=0, le=1)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Without the program's name; None takes those of the process.

    Returns:
        0 if all went well, 1 for refused data or a failed run, 2 for a wrong flag or setting, 130
        after Ctrl-C, 141 if nobody reads the output any more.
    """
    # TensorFlow's C++ log helps nobody here; what fails comes as a Python error too.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    is_verbose = False
    try:
        name, given = COMMAND_LINE.read(sys.argv[1:] if arguments is None else arguments)
        is_verbose = given.pop("verbose", False)
        _log(is_verbose)
        return COMMANDS[name][1](given)
    except (ConfigError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # What is left to flush has nowhere to go either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        if is_verbose:
            logger.exception("the whole trace")
        elif not _is_ours(error):
            print("It came unforeseen: --verbose shows where from.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _log(is_verbose: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_StderrHandler()])
    logging.getLogger("tfrs_pipeline").setLevel(logging.INFO if is_verbose else logging.WARNING)
    # A model a plan traces its functions anew, and TensorFlow takes that for a fault.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)


def _is_ours(error: BaseException) -> bool:
    """Says whether the package raised an error itself, as what it foresaw, and no library did."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


class _StderrHandler(logging.StreamHandler[Any]):
    """Logs to the standard error of the moment: a run sends the one of C++ libraries elsewhere."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class Command(Config):
    """Flags that every command has."""

    verbose: CliToggleFlag[bool] = False
    """Log what happens within stages."""


class OfModel(Command):
    """Flags of what is done with an exported model."""

    model: CliPositionalArg[Path]
    """Folder saved_models/NAME[/VERSION]."""


class Work(Command):
    """Flags of long work that may be stopped and resumed, besides the settings themselves."""

    config: Path | None = None
    """TOML file of settings."""
    run_dir: Path | None = None
    """Folder of the run; one that holds a stopped run resumes it. If not given, a new one in
    runs/."""
    preset: str | None = Field(
        None,
        description="Settings by what they are good for, which other flags may replace. "
        + "; ".join(f"{name}, {good.partition(':')[0]}" for name, (good, _) in RUN_PRESETS.items())
        + ".",
    )


def _with_settings_but(left_out: str, doc: str) -> type[Config]:
    """Returns the flags of long work: those above, and the settings of a run but for a table."""
    fields: dict[str, Any] = {
        name: (field.annotation, field)
        for name, field in RunConfig.model_fields.items()
        if name != left_out
    }
    return cast(type[Config], pydantic.create_model("Work", __base__=Work, __doc__=doc, **fields))


Run = _with_settings_but(
    "compare",
    """Train, evaluate and export a model.

    Trains a two-tower retrieval model, compares it with baselines and exports it with its index.
    Without an argument it does so on MovieLens-100K, fetched if need be, with that data's own
    features and a ScaNN index; the defaults below are those for your own data. Settings come from
    --config, or from the run in --run-dir that is to be resumed; then from --preset; flags replace
    them.
    """,
)

Compare = _with_settings_but(
    "export",
    """Compare ways of choosing negatives on your data.

    Trains the same towers with one sampling plan after another, within the same budget, and shows
    what each of them finds, what of the tail, and how well it tells positives from the corpus,
    from the losers of the funnel and from exposed items. Settings come from --config, or from the
    comparison in --run-dir that is to be resumed; then from --preset; flags replace them.
    """,
)


def _run(given: dict[str, Any]) -> int:
    def work(config: RunConfig, folder: Path, **callbacks: Any) -> RunResult:
        from tfrs_pipeline.report.facts import write_report
        from tfrs_pipeline.run import run

        result = run(config, folder, **callbacks)
        callbacks["on_progress"]("report", 0, 0)
        write_report(folder)
        return result

    return _work(given, "run", "", work, print_result)


def _compare(given: dict[str, Any]) -> int:
    def work(config: RunConfig, folder: Path, **callbacks: Any) -> Comparison:
        from tfrs_pipeline.compare import compare

        return compare(config, folder, **callbacks)

    return _work(given, "compare", "compare-", work, print_comparison)


def _config_of(flags: Work, settings: Mapping[str, Any]) -> RunConfig:
    """Puts settings together: a file, that of a stopped run or the defaults; a preset; flags."""
    written = flags.config or (flags.run_dir and flags.run_dir / "config.toml")
    if flags.config or (written and written.exists()):
        base = load_config(cast(Path, written))
    elif settings.get("data.source", "movielens-100k") == "movielens-100k":
        base = main_job_config()
    else:  # The main job's features and name are MovieLens' own.
        base = RunConfig()
    # At once: a flag may mend what a preset alone would not go with.
    return with_settings(base, settings, preset=flags.preset)


def _work(
    given: Mapping[str, Any],
    command: str,
    prefix: str,
    work: Callable[..., Any],
    print_result: Callable[[Console, RunConfig, Any], None],
) -> int:
    """Does long work in a folder, which says how to go on if it is stopped."""
    flags = Work(**{name: value for name, value in given.items() if name in Work.model_fields})
    config = _config_of(flags, {k: v for k, v in given.items() if k not in Work.model_fields})
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = flags.run_dir or Path("runs") / f"{prefix}{config.model_name}-{stamp}"
    console = Console()
    say(console, f"run folder: {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (
            native_errors_to(folder / "native.log"),
            progress(console) as (on_stage, on_progress),
        ):
            result = work(config, folder, on_stage=on_stage, on_progress=on_progress)
    except KeyboardInterrupt:
        again = shlex.join([program(), command, "--run-dir", str(folder)])
        has_begun = (folder / "config.toml").exists()
        say(console, f"\nstopped; go on with:  {again}" if has_begun else "\nstopped")
        return INTERRUPTED
    print_result(console, config, result)
    return 0


class Report(Command):
    """Write the report of a run as one HTML page.

    The page is about a finished run: data, sampling, training, metrics, index, recommendations for
    a few users. It needs no other file and no network. A run writes it at its end too.
    """

    run: CliPositionalArg[Path]
    """Folder of the run."""
    output: Path | None = None
    """Where to write; if not given, RUN/report.html."""


def _report(given: dict[str, Any]) -> int:
    from tfrs_pipeline.report.facts import write_report

    flags = Report(**given)
    print(write_report(flags.run, flags.output))
    return 0


class Query(OfModel):
    """Ask an exported model for a user's items.

    Prints the best items of a user, or for a history, with ids, titles and scores. The user's known
    items, or those of the history given, are excluded; an unknown user gets the answer for an empty
    history.
    """

    user: str | None = None
    """Id of the user, as in the logs."""
    history: tuple[str, ...] | None = None
    """Ids of the items that the user liked, oldest first, for someone whom the model does not know
    or in place of what it knows."""
    k: PositiveInt = 10
    """How many."""
    exclude: tuple[str, ...] = ()
    """Ids of further items to exclude."""
    filter: tuple[str, ...] | None = None
    """Only items with one of these values of the feature that the model filters by
    (export.filter_by)."""
    exact: CliToggleFlag[bool] = False
    """Use the brute-force fallback instead of the index."""
    as_json: CliToggleFlag[bool] = Field(False, alias="json")
    """Print JSON instead of a table."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Query:
        if self.user is None and self.history is None:
            message = "required, or --history ITEM ... for someone without an id"
            raise ConfigError([("user", message)])
        return self


def _query(given: dict[str, Any]) -> int:
    options = Query(**given)
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
    if options.as_json:
        print(json.dumps({**about, "items": found}, ensure_ascii=False))
        return 0
    console = Console()
    if note:
        say(console, note)
    table = Table("rank", "item", *(["title"] if titles else []), "score")
    for item in found:
        title = [item["title"] or ""] if titles else []
        cells = [str(item["rank"]), str(item["item_id"]), *title, f"{item['score']:.4f}"]
        table.add_row(*map(Text, cells))
    console.print(table)
    if len(found) < options.k:
        say(console, f"Only {len(found)} items are left for this user.")
    return 0


# Ids and scores of the best items, what to say of the question in JSON, and to a reader.
_Answer: TypeAlias = "tuple[np.ndarray, np.ndarray, dict[str, Any], str]"


def _ask_by_user(retriever: LoadedRetriever, options: Query) -> _Answer:
    user_id = retriever.parse_user_id(str(options.user))
    exclude = [retriever.parse_item_id(text) for text in options.exclude]
    ids, scores, is_known = retriever.retrieve_user(
        [user_id], min(options.k, retriever.num_candidates), [exclude], allowed=_allowed(options)
    )
    unknown = f"User {options.user} is unknown to this model: the answer for an empty history."
    about = {"user_id": user_id, "is_known_user": bool(is_known[0])}
    return ids[0], scores[0], about, "" if is_known[0] else unknown


def _ask_by_history(retriever: LoadedRetriever, options: Query) -> _Answer:
    history, exclude = (
        [retriever.parse_item_id(text) for text in texts]
        for texts in (options.history or (), options.exclude)
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


def _allowed(options: Query) -> list[list[str]] | None:
    return None if options.filter is None else [list(options.filter)]


class Serve(ServeSettings, OfModel):
    """Serve an exported model over HTTP.

    Answers TensorFlow Serving's REST requests for a model, picks up its new versions, and has a
    page to try it on. Listens on this machine alone unless --host says otherwise; docs/serving.md
    says what a network takes. SIGTERM or Ctrl-C stops it.
    """


def _serve(given: dict[str, Any]) -> int:
    model = OfModel(model=given.pop("model")).model
    settings = ServeSettings(**given)
    from tfrs_pipeline.serving.server import serve

    # What went wrong is in the answers too, but a server's log must say when.
    logging.getLogger("tfrs_pipeline").setLevel(logging.INFO)
    serve(model, settings, lambda address: print(f"serving {model} at {address}", flush=True))
    return 0


class TuneIndex(OfModel):
    """Measure what an index costs for what it finds.

    Measures ScaNN indexes over the items of an exported model: the share of the exact top k that
    they find for its held-out queries, against time a query. Prints the settings that no other
    beats, marks the one that reaches the recall target at the least time and draws the
    recall/latency curve. The model stays as it is: `run` and `refresh-index` choose by the same
    measure.
    """

    target_recall: TargetRecall | None = None
    """Recall target, in (0, 1]; if not given, that of the model's config."""
    k: PositiveInt = 100
    """Of the recall target."""
    figure: Path | None = None
    """Picture; if not given, NAME-VERSION-frontier.png."""
    as_json: Path | None = Field(None, alias="json")
    """Where to write every point."""


def _tune_index(given: dict[str, Any]) -> int:
    options = TuneIndex(**given)
    from tfrs_pipeline.serving.retriever import load_retriever
    from tfrs_pipeline.serving.tune import measure_frontier

    retriever = load_retriever(options.model, exact=True)
    by_config = retriever.manifest["config"]["export"]["target_recall"]
    with native_errors_to(Path(os.devnull)):  # ScaNN tells of every index that it builds.
        _, frontier = measure_frontier(
            retriever.candidate_embeddings(),
            retriever.embed_queries(retriever.held_out_queries()),
            k=options.k,
            target_recall=options.target_recall or by_config,
            num_structures=None,
        )
    console = Console()
    say(console, frontier.table())
    name, version = retriever.folder.parts[-2:]
    figure = options.figure or Path(f"{name}-{version}-frontier.png")
    frontier.figure().savefig(figure, dpi=150)
    say(console, f"\nfigure  {figure}")
    if options.as_json:
        options.as_json.write_text(json.dumps(frontier.as_dict(), indent=1))
        say(console, f"json    {options.as_json}")
    return 0


class RefreshIndex(OfModel):
    """Exchange the items of an exported model, without training.

    Writes a new version of a model that retrieves the items of a file: new ones are embedded by
    their features, those that the file lacks are gone. The towers stay as they are. A server picks
    the version up. What is not given is as in the model's config.
    """

    items: Path
    """CSV or Parquet of all items to retrieve, with the item features of the model."""
    index: Literal["auto", "scann", "exact"] | None = None
    """Search structure."""
    target_recall: TargetRecall | None = None
    """Recall target of a ScaNN index, in (0, 1]."""
    keep_versions: PositiveInt | None = None
    """Keep the newest versions, this many, and delete older ones."""
    all_new: CliToggleFlag[bool] = False
    """Accept a file without any item that the model knows."""


def _refresh_index(given: dict[str, Any]) -> int:
    options = RefreshIndex(**given)
    from tfrs_pipeline.serving.export import describe_index
    from tfrs_pipeline.serving.refresh import refresh_index

    console = Console()
    with native_errors_to(Path(os.devnull)), progress(console) as (_, on_progress):
        done = refresh_index(
            options.model,
            options.items,
            index=options.index,
            target_recall=options.target_recall,
            keep_versions=options.keep_versions,
            allow_all_new=options.all_new,
            on_progress=on_progress,
        )
    say(
        console,
        f"{done.num_items:,} items: {done.num_new:,} are new, {done.num_dropped:,} gone since the "
        "version before",
    )
    if done.num_untrained:
        say(
            console, f"{done.num_untrained:,} were in no training: embedded by their features alone"
        )
        if not done.has_trained_unknown:
            say(
                console,
                "    beside the embedding of an unknown id, which was not trained: they will "
                "seldom be found. Train with model.unknown_rate above 0, such as 0.1",
            )
    if done.num_left_out:
        say(
            console,
            f"left out {done.num_left_out:,} of the file: the model reads no item features, and "
            "its training did not have them",
        )
    for line in describe_index(done.index, done.num_items):
        say(console, line)
    say(console, f"model  {done.folder}")
    return 0


COMMANDS: dict[str, tuple[type[Config], Callable[[dict[str, Any]], int]]] = {
    "run": (Run, _run),
    "compare": (Compare, _compare),
    "report": (Report, _report),
    "query": (Query, _query),
    "serve": (Serve, _serve),
    "tune-index": (TuneIndex, _tune_index),
    "refresh-index": (RefreshIndex, _refresh_index),
}

COMMAND_LINE = CommandLine(
    PROGRAM,
    __version__,
    "Retrieval models from the logs of a recommendation funnel.",
    {name: table for name, (table, _) in COMMANDS.items()},
    brief={"run": BRIEF, "compare": BRIEF},
)


if __name__ == "__main__":
    sys.exit(main())
