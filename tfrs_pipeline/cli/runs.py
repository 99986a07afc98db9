"""The commands that train, `run` and `compare`, and `report`, which describes a run."""

import contextlib
import itertools
import json
import shlex
import tempfile
import time
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import pydantic
from pydantic import Field
from rich.console import Console

from tfrs_pipeline.answers.publish import NotPublished
from tfrs_pipeline.cli.console import native_errors_to, program, say, shown
from tfrs_pipeline.cli.flags import Command, PositionalPath, UsageError
from tfrs_pipeline.cli.results import print_comparison, print_result
from tfrs_pipeline.cluster import this_worker
from tfrs_pipeline.config import (
    RunConfig,
    dump_changes,
    flat_settings,
    load_config,
    movielens_config,
    with_settings,
)
from tfrs_pipeline.data.schema import check_exists
from tfrs_pipeline.durable import StorageError
from tfrs_pipeline.messages import as_interrupts, beside
from tfrs_pipeline.presets import PRESETS, RECIPES
from tfrs_pipeline.run.folder import CONFIG_FILE, MAY_CHANGE, RunFolder
from tfrs_pipeline.run.plans import resolve_settings
from tfrs_pipeline.run.steps import RunContext, as_lines


class Work(Command):
    """Flags of long work that may be stopped and resumed, besides the settings themselves."""

    config: Path | None = None
    """TOML file of settings."""
    run_dir: Path | None = None
    """Folder of the run; given alone, resumes the run in it. If not given, a new one in runs/."""
    check: bool = False
    """Only read and split data; show settings."""
    preset: str | None = Field(
        None,
        description="Settings for a kind of log: "
        + "; ".join(f"{name}, {x.words.partition(':')[0]}" for name, x in PRESETS.items())
        + ".",
    )


def _with_settings_but(excluded: Collection[str], doc: str) -> type[Command]:
    """Returns the flags of long work: those of `Work`, and the settings of a run except some."""
    fields: dict[str, Any] = {
        name: (field.annotation, field)
        for name, field in RunConfig.model_fields.items()
        if name not in excluded
    }
    return cast(type[Command], pydantic.create_model("Work", __base__=Work, __doc__=doc, **fields))


Run = _with_settings_but(
    ["compare", "fixed"],
    """Train, evaluate and export a model.

    Trains a two-tower model, compares it with baselines and exports it with its index. Without an
    argument it does so on MovieLens-100K, fetched if needed, with that data's features and a ScaNN
    index; the defaults below are for your own data, on which recipes race unless a --preset is
    given. Settings come from --config or the stopped run in --run-dir; --preset replaces some,
    flags replace those.
    """,
)

Compare = _with_settings_but(
    ["export", "warm_start", "recipes", "fixed", "members", "budget"],
    """Compare ways of choosing negatives on your data.

    Trains the same towers with one sampling plan after another, within the same budget, and shows
    each plan's NDCG and recall, overall and in the tail, and how it differs from the reference.
    Settings come from --config, or from the stopped comparison in --run-dir; --preset replaces
    some, and flags replace those.
    """,
)


def train(command: str, given: Mapping[str, Any]) -> int:
    """Does `run` or `compare` in a folder, and says how to resume it if it is stopped."""
    flags = Work(**{name: value for name, value in given.items() if name in Work.model_fields})
    settings = {k: v for k, v in given.items() if k not in Work.model_fields}
    config = _config_of(flags, settings)
    is_run = command == "run"
    # The name says what it is of, and sorts by time.
    name = f"{'' if is_run else 'compare-'}{config.model_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = flags.run_dir or Path("runs") / name
    place = RunFolder(folder)
    if is_run:
        # Checked before a folder is made.
        config = resolve_settings(_with_recipes(config, flags, settings), place)
    if (data := config.data).source == "files" and not place.holds_run():
        # Missing files are refused before slow imports.
        for path in filter(None, (data.path, data.items_path, data.users_path)):
            check_exists(path)
    if flags.check:
        return _check(command, config)
    is_chief = this_worker().is_chief
    again = shlex.join([*program(), command, "--run-dir", str(folder)])
    # Each worker would make up another name.
    if this_worker().count > 1 and flags.run_dir is None:
        raise UsageError("--run-dir DIR is needed with TF_CONFIG: one folder, that all workers see")
    console = Console()
    try:
        with (
            # Claimed at once, in case the run is stopped while libraries are being imported.
            place.claim(config, is_run=is_run),
            native_errors_to(folder / "native.log") if is_chief else contextlib.nullcontext(),
            shown(console) as progress,
            as_interrupts(),
        ):
            say(console, f"run folder: {folder}")
            run = RunContext(config, place, progress)
            _make_log(run)
            result = (_train if is_run else _compare)(run)
    except ValueError:
        if not folder.exists():
            say(console, "nothing was made: the run folder is removed")
        raise
    except StorageError as error:
        if not place.has_begun():  # No step is kept, so there is nothing to resume.
            raise
        is_export = str(error).startswith(str(config.model_folder))
        other = ", or set --export.directory to another folder," if is_export else ""
        remedy = f"Fix this{other} and rerun the command; finished steps are kept:"
        raise StorageError(f"{error} {remedy}  {again}") from error
    except KeyboardInterrupt:
        say(console, f"\nstopped; go on with:  {again}")
        raise
    if not is_run:
        print_comparison(console, result, folder)
        return 0
    if is_chief:
        print_result(console, run.config, result)
    if result.refusal:
        raise NotPublished(result.refusal)
    return 0


def _check(command: str, config: RunConfig) -> int:
    """Shows the data, and writes the settings that are not the defaults as TOML; keeps nothing.

    The TOML alone is on standard output: it is the file that `--config` reads.
    """
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        native_errors_to(Path(folder) / "native.log"),
        shown(console) as progress,
    ):
        run = RunContext(config, RunFolder(Path(folder)), progress)
        _make_log(run)
        from tfrs_pipeline.run.compare import plan_steps
        from tfrs_pipeline.run.pipeline import run_steps
        from tfrs_pipeline.run.race import trainable_recipes
        from tfrs_pipeline.run.training import check_trainings

        steps = (run_steps if command == "run" else plan_steps)(config)
        # All steps up to the first training, which is what all workers do together.
        run.do([*itertools.takewhile(lambda step: step.workers != "all", steps)])
        # A comparison has checked its plans in the step that makes them.
        if command == "run":
            check = trainable_recipes if config.recipes else check_trainings
            check(config, run.artifacts["samples"].selection)
    say(console, "\nnothing was trained or kept; settings that are not the defaults:\n")
    if command == "run" and not config.recipes:
        print("recipes = []")  # Otherwise the file, which names no preset, would race.
    print(dump_changes(config).rstrip())
    print("\n# steps, as name: reads -> writes")
    for line in as_lines(steps):
        print(f"# {line}")
    return 0


def _config_of(flags: Work, settings: Mapping[str, Any]) -> RunConfig:
    """Combines settings: a file, a stopped run's or the defaults; then a preset; then flags."""
    # Other workers take the chief's settings later, since it may be writing the file now.
    folder = flags.run_dir if this_worker().is_chief else None
    names_data = {"data.source", "data.path"} & settings.keys()
    holds_nothing = folder is not None and not RunFolder(folder).holds_run()
    # Settings that may change in a started run do not start another one.
    is_named = flags.config or flags.preset or settings.keys() - set(MAY_CHANGE)
    if folder and holds_nothing and not is_named:
        near = beside(folder, lambda x: (x / CONFIG_FILE).is_file())
        raise UsageError(
            f"--run-dir: there is no run in {folder}.{near} For a new run there, name its data "
            "too: --data.path FILE, --config FILE, or --data.source movielens-100k"
        )
    if flags.config:
        base = load_config(flags.config)
    elif folder and ((folder / CONFIG_FILE).exists() or not (names_data or holds_nothing)):
        base = RunFolder(folder).settings()
    elif settings.get("data.source") == "movielens-100k" or not names_data:
        base = movielens_config()
        if "genres" not in settings.get("data.item_features", ["genres"]):
            settings = {"export.filter_by": None, **settings}
    else:  # MovieLens's features and name do not apply to other data.
        base = RunConfig()
    # Together, because a flag may resolve a conflict with a preset.
    return with_settings(base, settings, preset=flags.preset)


def _with_recipes(config: RunConfig, flags: Work, settings: Mapping[str, Any]) -> RunConfig:
    """Adds the recipes to race: all, if the log is the user's own and nothing chooses a model.

    Also adds the names of the settings that recipes and a source leave alone: those of flags, file
    and preset.
    """
    folder = None if flags.run_dir is None else RunFolder(flags.run_dir)
    is_kept = folder is not None and folder.config_file.exists() and not flags.config
    named = {*config.fixed}
    if flags.config and not named:
        text = flags.config.read_text(encoding="utf-8-sig")
        named = set(flat_settings(tomllib.loads(text)))
    named |= {*settings, *(PRESETS[flags.preset].settings if flags.preset else ())}
    is_demo = config.data.source == "movielens-100k"
    chooses = "recipes" in named or is_kept or is_demo or flags.preset or config.warm_start
    if not (config.recipes or chooses):
        config = with_settings(config, {"recipes": RECIPES})
    for name in ("budget", "members"):
        if not config.recipes and getattr(config, name) != getattr(RunConfig(), name):
            raise UsageError(f"--{name}: nothing races here; name --recipes, or leave it out")
    if not config.recipes and (flags.preset or config.warm_start is None):
        return config
    # Without what may change in a started run, which has its names already.
    fixed = tuple(sorted(named - {"recipes", "fixed", "members", "budget", *MAY_CHANGE}))
    if folder is not None and this_worker().is_chief and folder.has_begun():
        fixed = tuple(folder.settings().fixed)
    return with_settings(config, {"fixed": fixed})


def _make_log(run: RunContext) -> None:
    """Makes the log and its split before TensorFlow is imported: a refusal comes at once."""
    # Several workers have to join first, and a finished run needs no log.
    if this_worker().count == 1 and run.folder.metrics() is None:
        from tfrs_pipeline.run.data import log_steps

        run.do(log_steps())


def _train(run: RunContext) -> Any:
    """Runs, and writes the report; libraries are imported only here."""
    from tfrs_pipeline.run.pipeline import run_claimed

    result = run_claimed(run)
    from tfrs_pipeline.report.facts import write_report

    run.progress.task("report", 0, 0)
    if this_worker().is_chief:
        write_report(run.folder.path)
    return result


def _compare(run: RunContext) -> Any:
    from tfrs_pipeline.run.compare import compare_claimed

    return compare_claimed(run)


class Report(Command):
    """Write the report of a run as one HTML page.

    The page shows a finished run: data, sampling, training, metrics, index, recommendations for a
    few users. It needs no other file and no network. `run` also writes it at its end.
    """

    run: PositionalPath
    """Folder of the run, in which report.html is written."""
    as_json: bool = Field(False, alias="json")
    """Print the verdicts by request and by user as JSON, and write no page: whether the model beats
    the baselines."""

    def __call__(self) -> int:
        """Writes the page and prints its path, or prints the verdicts."""
        folder = RunFolder(self.run)
        metrics = folder.results()  # Refuses at once, before libraries are imported.
        if self.as_json:
            from tfrs_pipeline.report.verdict import compared_with_baselines

            monitor, verdicts = folder.settings().training.monitor, dict[str, Any]()
            for question in (metrics, metrics.get("other", {})):
                if "models" in question:
                    verdict = compared_with_baselines(question, monitor)
                    outcome = verdict.outcome and verdict.outcome.value
                    verdicts[question["asked_by"]] = {"outcome": outcome, "why": verdict.why}
            export = {name: metrics.get(name) for name in ("export_folder", "refusal")}
            print(json.dumps({**verdicts, **export}, indent=2))
            return 0
        from tfrs_pipeline.report.facts import write_report

        print(write_report(self.run))
        return 0
