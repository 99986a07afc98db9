"""The command line: help, flags made from the settings, errors in one line, query, Ctrl-C."""

import errno
import functools
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console
from rich.progress import Progress as Bar
from rich.text import Text

from tests.small_log import NUM_ITEMS, event_table, item_table, small_config, write
from tfrs_pipeline import FunnelLosers, Popularity, Uniform, cli, dump_config, load_config
from tfrs_pipeline.answers import retriever
from tfrs_pipeline.cli.commands import BRIEF, COMMAND_LINE, TRAINING
from tfrs_pipeline.cli.console import Shown, shown
from tfrs_pipeline.cli.flags import as_typed, explained
from tfrs_pipeline.cli.results import print_result
from tfrs_pipeline.config import RunConfig, movielens_config, with_settings
from tfrs_pipeline.data.engines import connect
from tfrs_pipeline.durable import naming, read_record, write_record
from tfrs_pipeline.messages import StepReport
from tfrs_pipeline.presets import RECIPES
from tfrs_pipeline.run import data as run_data
from tfrs_pipeline.run import pipeline
from tfrs_pipeline.run.folder import RunFolder
from tfrs_pipeline.run.steps import RunContext, Step
from tfrs_pipeline.settings import Config, tables_in

pytestmark = pytest.mark.usefixtures("quick_runs", "traced_once")
RUN = "it's a run"  # A folder name that a shell needs in quotes.


@pytest.fixture
def config_of(command: Any, monkeypatch: pytest.MonkeyPatch, here: Path) -> Any:
    configs: list[RunConfig] = []

    def record(run: RunContext) -> None:
        configs.append(run.config)
        raise RuntimeError("enough")

    monkeypatch.setattr(pipeline, "run_claimed", record)
    monkeypatch.setattr(run_data, "log_steps", lambda *settings: [])
    monkeypatch.setattr(cli.runs, "check_exists", lambda path: None)

    def run(*arguments: Any) -> RunConfig:
        own = arguments and "--run-dir" not in arguments
        given = ["--run-dir", here / f"run {len(configs)}"] if own else []
        assert command("run", *arguments, *given).err.startswith("error: enough\nThe error is un")
        return configs[-1]

    return run


def settings(table: type[Config], prefix: str = "") -> Iterator[tuple[str, Any]]:
    tables = tables_in(table)
    for name, field in table.model_fields.items():
        if name in tables:
            yield from settings(tables[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def squeezed(text: str) -> str:
    """Drops all white space, because argparse also wraps at hyphens."""
    return re.sub(r"\s+", "", text)


# Help


@pytest.mark.parametrize("name", COMMAND_LINE.commands)
def test_a_command_explains_itself(command: Any, name: str) -> None:
    answer = command(name, "--help")
    assert (answer.code, answer.err) == (0, "")
    doc = str(COMMAND_LINE.table(name).__doc__)
    assert squeezed(doc) in squeezed(answer.out)
    assert squeezed(name + doc.split("\n\n")[0]) in squeezed(command("--help").out)
    for _, field in settings(COMMAND_LINE.table(name)) if name not in TRAINING else ():
        assert field.description
        assert squeezed(explained(field)) in squeezed(answer.out)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("run", ("compare.", "fixed")),
        ("compare", ("export.", "warm_start", "recipes", "fixed", "members", "budget")),
    ],
)
def test_the_long_help_shows_every_setting_and_the_defaults_for_own_data(
    command: Any, name: str, other: str | tuple[str, ...]
) -> None:
    shown = squeezed(command(name, "--help-all").out)
    for setting, field in settings(RunConfig):
        assert field.description
        assert (squeezed(field.description) in shown) != setting.startswith(other), setting
        about = squeezed(explained(field))
        assert shown.count(about) == (not setting.startswith(other)), setting
        if field.default is not None:
            assert about.endswith(squeezed(f"(default: {as_typed(field.default)})"))


def test_the_short_help_is_short_and_says_what_a_bare_run_does(command: Any) -> None:
    shown = command("run", "--help").out
    assert len(shown.splitlines()) < 100
    assert "Without an argument it does so on MovieLens-100K" in " ".join(shown.split())
    for name in BRIEF:
        assert name in dict(settings(RunConfig))
        assert (f"--{name}" in shown) != name.startswith("compare.")
    assert re.fullmatch(r"\d+\.\d+.*\n", command("--version").out)


# Settings


def as_flags(config: RunConfig) -> list[str]:
    """Writes every setting as the help shows it."""
    flags = []
    for name, field in settings(RunConfig):
        value: Any = functools.reduce(getattr, name.split("."), config)
        if name.startswith(("compare.", "fixed")):
            continue
        name = name if "." in name else name.replace("_", "-")
        if field.annotation is bool:
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict):
            flags += [f"--{name}", *(f"{key}={inner}" for key, inner in value.items())]
        elif isinstance(value, tuple):
            flags += [f"--{name}", *(map(as_typed, value) if value else ["none"])]
        else:
            flags += [f"--{name}", as_typed(value)]
    return flags


COLUMNS = {"user_id": "viewer", "item_id": 'the=film, [or] "so\\'}
DATA = {"path": "stars, [1] néne.csv", "rating_threshold": 3.5, "columns": COLUMNS}
LOSERS = FunnelLosers(share=0.25, stages=("ranked", "retrieved"))
MODEL = {"negatives": [Uniform(16), Popularity(8, 0.5)], "hard": LOSERS, "hidden_layers": (64, 32)}
OWN = RunConfig(
    data={**DATA, "timestamp_unit": "ms", "is_ordered": False},
    model={**MODEL, "history_pooling": (), "use_user_id": True},
    evaluation={"baselines": (), "cutoffs": (5, 100)},
    split={"kind": "time", "validation": "2024-01-01T00:00Z", "test": "2024-02-01T00:00+01:00"},
    export={"name": "007"},
    seed=7,
)


@pytest.mark.parametrize("config", [movielens_config(), OWN], ids=["main job", "own data"])
def test_flags_and_files_are_read_back(config_of: Any, config: RunConfig, tmp_path: Path) -> None:
    assert config_of(*as_flags(config)) == config
    path = tmp_path / "run.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_a_default_filter_goes_with_the_default_features(config_of: Any, command: Any) -> None:
    for given, filtered in (("title=text", None), ("none", None), ("genres=categorical", "genres")):
        assert config_of("--data.item_features", given).export.filter_by == filtered
    titles = ("--data.item_features", "title=text")
    assert "export.filter_by: got 'x'" in command("run", *titles, "--export.filter_by", "x").err


def test_a_sampler_is_read_as_json(config_of: Any) -> None:
    flags = ["--training.batch_size=32", "--no-data.is_ordered", "--model.negatives"]
    config = config_of(*flags, '{"kind": "popularity", "alpha": 0.5, "num": 8}', "uniform")
    assert (config.training.batch_size, config.data.is_ordered) == (32, False)
    assert config.model.negatives == (Popularity(8, 0.5), Uniform())
    assert config_of("--model.hard", "funnel:stages=ranked").model.hard.stages == ("ranked",)


def test_values_of_a_query_may_begin_with_a_hyphen_or_be_none() -> None:
    flags = ["--history=-a", "--history=-b", "--filter", "none", "music", "--exclude", "7", "-k3"]
    command, given = COMMAND_LINE.read(["query", "model", *flags])
    assert command == "query"
    assert given["history"] == ["-a", "-b"]
    assert (given["filter"], given["exclude"]) == (["none", "music"], ["7"])
    assert COMMAND_LINE.read(["query", "model", "--history"])[1]["history"] == []
    assert COMMAND_LINE.read(["query", "model", "--filter", "none"])[1]["filter"] == ["none"]
    asked = COMMAND_LINE.read(["query", "model", "--request", "a=1", "--request", "b=2"])
    assert asked[1]["request"] == {"a": "1", "b": "2"}
    # If a setting is given twice, the last flag counts.
    cutoffs = ["--evaluation.cutoffs", "5", "--evaluation.cutoffs", "7", "9"]
    assert COMMAND_LINE.read(["run", *cutoffs])[1]["evaluation.cutoffs"] == ["7", "9"]


def test_without_an_argument_it_is_the_main_job(config_of: Any) -> None:
    assert config_of() == movielens_config()
    # The user's own data gets neither the features nor the index of MovieLens.
    own = config_of("--data.path", "x.csv")
    data = {"source": "files", "path": "x.csv"}
    assert own == RunConfig(data=data, recipes=RECIPES, fixed=["data.path"])
    # Recipes do not change what the user sets; a preset alone, or no recipes, means no race.
    dim = config_of("--data.path", "x.csv", "--model.dim", "32", "--recipes", "sets", "sequence")
    assert (dim.recipes, dim.fixed) == (("sets", "sequence"), ("data.path", "model.dim"))
    gate = config_of("--data.path", "x.csv", "--export.gate")
    assert (gate.export.gate, gate.fixed) == (True, ("data.path",))
    for chosen in (["--preset", "quick"], ["--recipes", "none"], ["--recipes", "none"] * 2):
        assert config_of("--data.path", "x.csv", *chosen).recipes == ()
    both = ["--preset", "hybrid_1_100", "--recipes", "default", "sequence"]
    assert config_of("--data.path", "x.csv", *both).fixed == ("data.path", "model.hard")


def test_a_folder_without_run_is_not_resumed(config_of: Any, command: Any, tmp_path: Path) -> None:
    for name in ("videos-20261126-141654", "videos-20261127-091500", "others"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text("seed = 3\n")
    remedy = "For a new run there, name its data too: --data.path FILE"
    missing = tmp_path / "videos-2026112-141654"
    near = f"Did you mean {tmp_path}/videos-20261126-141654 or {tmp_path}/videos-20261127-091500?"
    # A setting that may change in a finished run does not start a new one.
    for asked in (["run"], ["run", "--no-export.gate"], ["compare"]):
        answer = command(*asked, "--run-dir", missing)
        assert f"there is no run in {missing}. {near} {remedy}" in answer.err
    empty, own = tmp_path / "empty", tmp_path / "own"
    empty.mkdir()
    (own / "data").mkdir(parents=True)
    for folder in (tmp_path / "nope", empty, own):
        answer = command("run", "--run-dir", folder)
        assert (answer.code, answer.out) == (2, "")
        assert f"there is no run in {folder}. {remedy}" in answer.err
    assert not missing.exists()
    assert config_of("--run-dir", missing, "--seed", 4).seed == 4
    named = ["--data.source", "movielens-100k"]
    assert config_of("--run-dir", empty, *named) == movielens_config()


def test_flags_replace_a_preset_and_that_a_file(config_of: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        "seed = 3\n[training]\nbatch_size = 128\nmax_epochs = 7\n[model]\ndim = 8\n"
        "[data]\nitem_features = {x = 'text'}\n"
    )
    flags = ["--training.batch_size", "32", "--model.temperature", "1"]
    config = config_of("--config", path, *flags)
    assert (config.seed, config.training.batch_size, config.model.temperature) == (3, 32, 1.0)
    assert (config.training.max_epochs, config.data.item_features) == (7, {"x": "text"})
    config = config_of("--config", path, "--preset", "quick", "--training.max_epochs", "9")
    assert (config.seed, config.model.dim, config.training.max_epochs) == (3, 32, 9)
    config = config_of("--config", path, "--data.item_features", "y=categorical")
    assert config.data.item_features == {"y": "categorical"}
    assert config_of("--run-dir", tmp_path / "run 2") == config


# Errors


@pytest.mark.parametrize(("arguments", "message"), [
    ("run --trainin.batch_size 3", "did you mean '--training.batch_size'"),
    ("run --training.batch-size 3", "did you mean '--training.batch_size'"),
    ("run --run_dir x", "did you mean '--run-dir'"),
    # argparse would take these for abbreviations.
    ("run --training.max_epoch 3", "unknown flag --training.max_epoch; did you mean "
        "'--training.max_epochs'"),
    ("run --export.gat", "unknown flag --export.gat; did you mean '--export.gate'"),
    ("compare --see=3", "unknown flag --see; did you mean '--seed'"),
    ("query model --us 3", "unknown flag --us; did you mean '--user'"),
    ("--versio", "no command; known: run"),
    ("compare --seeds 3", r"unknown flag --seeds; did you mean '--compare.seeds'\?\n$"),
    ("run --zzz", "unknown flag --zzz; no known one is near"),
    ("--verbose query model", "--verbose stands before the command: write it after 'query'"),
    ("run mine", "unexpected 'mine' after 'run'; see tfrs-pipeline run --help"),
    ("run --seed 3 --budget 10 minutes", "'minutes' after '10': --budget takes one value"),
    ("run --export.gate maybe", "unexpected 'maybe' after '--export.gate'; see tfrs-pip"),
    ("run --export.gate=false", "--no-export.gate: takes no value; got 'false'"),
    ("report a b", "unexpected 'b' after 'a'; see tfrs-pipeline report --help"),
    ("run --export.filter_by brand category_path",
     "unexpected 'category_path' after 'brand': --export.filter_by takes one value"),
    ("query model --user 3 --top 5", "unknown flag --top; known: --exact, --exclude, "),
    ("run --seed", "argument --seed: expected one argument"),
    ("run --training.batch_size many", r"training.batch_size: got 'many'; must be a valid integer"),
    ("run --split.kind tme", r"split.kind: got 'tme'; must be 'time', 'last_"),
    ("run --data.path x.csv --preset quick --budget 9s", "--budget: nothing races here"),
    ("run --data.path x.csv --preset quick --members 1", "--members: nothing races here"),
    ("run --data.columns user_id", r"--data.columns: got 'user_id'; write NAME=VALUE"),
    ("run --data.columns usr_id=x --data.path x.csv", r"usr_id: .* did you mean 'user_id'\?"),
    ("run --model.negatives popularity:alpha=x", r"popularity.alpha: got 'x'; must be a valid num"),
    ("run --data.path x.csv --recipes sets sequenc", "recipes: got 'sequenc'; must be 'default'"),
    ("run --data.path x.csv --evaluation.baselines alphabet",
     "got 'alphabet'; no baseline; known: .* A piece of your own. Start from the script that im"),
    ("run --config broken.toml", r"broken.toml:\s+is not a TOML file: .*line 1"),
    ("run --config unknown.toml", r"unknown.toml:\s+training.batch_sise: .*batch_size'\?"),
    ("run --run-dir cut", r"cut/config.toml:\s+is not as the run wrote it: .* --config FILE"),
    ("run --run-dir lost", r"lost/config.toml:\s+is not as the run wrote it: lost, cut or ch"),
    ("run --data.path b/log.csv", "export.name: saved_models/log/1 is a model of /a/log.csv"),
    ("query", "the following arguments are required: MODEL\n"),
    ("query model", "user: required, or --history ITEM ... for someone without an id"),
    ("query model --user 3 -k ten", "k: got 'ten'; must be a valid integer"),
    ("refresh-index model --items x.csv --keep-versions 0", "keep_versions: got '0'; must be"),
    ("serve model --port 70000", "port: got '70000'; must be less than or equal to 65535"),
    ("server", "unknown command 'server'; did you mean 'serve'?"),
    ("", "no command; known: run, compare, report, query, explain, serve, "
        "refresh-index, recommend, audience, log, vectors"),
])  # fmt: skip
@pytest.mark.usefixtures("here")
def test_a_wrong_word_is_told_in_a_line(command: Any, arguments: str, message: str) -> None:
    for folder in ("cut", "lost/checkpoints", "saved_models/log/1"):
        Path(folder).mkdir(parents=True)
    files = {"broken": "seed == 3", "unknown": "[training]\nbatch_sise = 3"}
    for name, text in {**files, "cut/config": "seed = 3\n[train"}.items():
        Path(f"{name}.toml").write_text(text)
    write_record(Path("saved_models/log/1/manifest.json"), {"log": "/a/log.csv"})
    answer = command(*shlex.split(arguments))
    assert (answer.code, answer.out) == (2, "")
    assert re.search(f"error: .*{message}", answer.err, re.DOTALL)
    # A problem in a file is shown below the file's name.
    assert len(answer.err.splitlines()) == (2 if ".toml" in answer.err else 1)
    assert not Path("runs").exists()


@pytest.mark.usefixtures("here")
def test_refused_data_can_be_mended_in_the_same_folder(command: Any) -> None:
    """A run folder that was created in vain is removed; other files in it stay."""
    write(pa.table({"usr_id": [1], "item_id": [2]}), Path("clicks.csv"))
    arguments = ["run", "--run-dir", "run", "--data.path", "clicks.csv"]
    assert "no column 'user_id'" in command(*arguments).err
    assert not Path("run").exists()
    mended = [*arguments, "--data.columns", "user_id=usr_id", "--split.kind", "last_share"]
    answer = command(*mended)
    assert "1 event, 1 item, 1 user" in answer.out
    assert (answer.code, "other settings" in answer.err) == (1, False)
    assert answer.out.splitlines()[-1] == "nothing was made: the run folder is removed"
    assert not Path("run").exists()
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("mine")
    assert command(*mended).code == 1
    assert Path("run/thesis.txt").read_text() == "mine"
    # Missing files are reported before a folder is created.
    assert command("run", "--data.path", "nowhere.csv").out == ""


@pytest.mark.parametrize(
    ("name", "full"), [("run", "a run"), ("compare", "a run"), ("run", "saved_models/clicks")]
)
@pytest.mark.parametrize("finished", [None, "data/log.json", "checkpoints"])
def test_a_full_disk_is_said_to_keep_what_is_finished_if_something_is(
    command: Any, here: Path, monkeypatch: Any, name: str, full: str, finished: str | None
) -> None:
    Path("clicks.csv").touch()
    folder = here / "a run"

    def fill_the_disk(*_: Any) -> None:
        if finished:
            (folder / finished).mkdir(parents=True)
        with naming(Path(full)):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_data, "log_steps", fill_the_disk)
    answer = command(name, "--data.path", "clicks.csv", "--run-dir", folder)
    other = ", or set --export.directory to another folder," if full != "a run" else ""
    remedy = f" Fix this{other} and rerun the command; finished steps are kept:"
    remedy += f"  tfrs-pipeline {name} --run-dir '{folder}'"
    told = f"error: {full}: No space left on device.{remedy if finished else ''}\n"
    assert (answer.code, answer.err) == (1, told)


def test_a_command_that_resumes_nothing_does_not_speak_of_it(
    command: Any, run: "Run", tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "below"
    for arguments, message in (
        (["serve", run.model, "--token-file", tmp_path / "token"], f"openssl.* > {tmp_path}/tok"),
        (["serve", run.model, "--token-file", tmp_path], f"{tmp_path}: Is a directory"),
        (["serve", run.model, "--host", "not a host", "--port", 0], "known.* Set --host to an ad"),
        (["serve", run.model, "--host", "192.0.2.1", "--port", 0], "assign.* Set --host to an ad"),
        (["vectors", run.model, below / "x.parquet"], f"there is no folder .{below}"),
        (["refresh-index", run.model, "--items", below], "below does not exist"),
        (["run", "--data.source", "movielens-100k", "--run-dir", below], "Not a directory"),
    ):
        answer = command(*arguments)
        assert answer.code in (1, 2)
        assert re.fullmatch(rf"error: .*{message}.*\n", answer.err)
        assert "rerun" not in answer.err
        assert "unexpected" not in answer.err


# A run and its model


def run_arguments(folder: Path, *more: Any) -> list[str]:
    data: dict[str, Any] = {"item_features": {"title": "text", "genre": "categorical"}}
    data["path"] = write(event_table("int"), folder / "events.parquet")
    data["items_path"] = write(item_table("int"), folder / "items.csv")
    (folder / "small.toml").write_text(dump_config(small_config(folder, data)))
    more = ("--export.filter_by", "genre", *more)
    arguments = ["run", "--config", folder / "small.toml", "--run-dir", folder / RUN, *more]
    return [str(argument) for argument in arguments]


@dataclass(frozen=True)
class Run:
    folder: Path
    model: Path
    out: str


@pytest.fixture(scope="module")
def run(module_path: Path) -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch:
        out = io.StringIO()
        patch.setattr(sys, "stdout", out)
        assert cli.main(run_arguments(module_path)) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retriever, "load", functools.cache(retriever.load))
        yield Run(module_path, module_path / "saved_models" / "films", out.getvalue())


def test_a_warm_start_has_its_sources_baselines_unless_named(config_of: Any, run: Run) -> None:
    """An uncorrected model that the source did not train would begin from random weights."""
    arguments = ["--data.path", "x.csv", "--warm-start", run.folder / RUN]
    source = load_config(run.folder / RUN / "config.toml").evaluation.baselines
    assert "uncorrected" not in source
    assert config_of(*arguments).evaluation.baselines == source
    named = config_of(*arguments, "--evaluation.baselines", "uncorrected", "ease")
    assert named.evaluation.baselines == ("uncorrected", "ease")


@pytest.mark.usefixtures("here")
def test_a_refusal_needs_no_tensorflow(run: Run) -> None:
    """Importing TensorFlow takes seconds. One fresh process runs all refused commands."""
    write(pa.table({"usr_id": [1], "item_id": [2]}), Path("other.csv"))
    write(pa.table({"user_id": [1, 1], "item_id": [2, 3], "stage": ["a", "b"]}), Path("rows.csv"))
    write(event_table("int"), Path("log.parquet"))
    for name, time_ in (("old", 1_700_000_000_000), ("naive", "2024-01-31 12:00:00")):
        write(pa.table({"user_id": [1], "item_id": [2], "timestamp": [time_]}), Path(f"{name}.csv"))
    write(pa.table({"title": ["a"], "genre": ["b"]}), Path("titles.csv"))
    for folder in ("empty/1", "films/1"):
        Path(folder).mkdir(parents=True)
    Path("films/1/manifest.json").write_text("{}")
    warm = ["--warm-start", run.folder / RUN]
    taken = socket.create_server(("127.0.0.1", 0))
    refused: list[tuple[list[Any], str]] = [
        (["run", "--data.path", "lg.parquet"], r"Did you mean log\.parquet\?"),
        (["run", "--data.path", "other.csv", "--check"], "Nearest: usr_id"),
        (["run", "--data.path", "rows.csv"], "stage"),
        (["run", "--data.path", "old.csv"], "timestamp_unit"),
        (["run", "--data.path", "naive.csv"], r"Set time_zone to .* \(--data\.time_zone\)"),
        (["run", "--data.path", "log.parquet", "--data.items_path", "titles.csv"], "'item_id'"),
        (["run", "--data.path", "log.parquet", *warm, "--model.dim", "5"], "model.dim"),
        (["compare", "--data.path", "nowhere.csv"], "nowhere.csv does not exist"),
        (["report", "nowhere"], "holds no finished run"),
        (["query", "empty", "--user", "3"], "No exported model at 'empty': .*`tfrs-pipeline run`"),
        (["vectors", "empty", "x.parquet"], "No exported model at 'empty'"),
        (["serve", "empty"], "No exported model at 'empty'"),
        (["serve", run.model, "--port", taken.getsockname()[1]], "Address already in use"),
        (["compare", "--export.name", "x"], "unknown flag --export.name; a flag of run"),
        (["refresh-index", run.model, "--items", "item.csv"], "item.csv does not exist"),
        (["refresh-index", run.model, "--items", "titles.csv"], "no column 'item_id'"),
        (["refresh-index", f"{run.model}x", "--items", "titles.csv"], f"Did you mean {run.model}"),
        (["vectors", "films", "."], "file: got .*; '.' is a folder: give a file in it"),
        (["vectors", "films", "films.csv"], "end the name with .parquet"),
        (["log", "films", "--out", "lost/films.parquet"], "out: got .*; there is no folder 'lost'"),
        (["vectors", "films", "lost/films.parquet"], "there is no folder 'lost'"),
        (["vectors", "film", "films.parquet"], r"Did you mean films\?"),
    ]
    arguments = [[str(word) for word in words] for words, _ in refused]
    code = (
        "import json, sys\nfrom tfrs_pipeline import cli\ntry:\n    cli.main(['run', '--help'])\n"
        "except SystemExit:\n    print({name.partition('.')[0] for name in sys.modules})\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    print('code', cli.main(arguments), 'tensorflow' in sys.modules)"
    )
    program = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for (words, message), line in zip(refused, told, strict=True):
        assert re.search(message, line), words
    codes = [line for line in done.stdout.splitlines() if line.startswith("code ")]
    assert {line.partition(" ")[2] for line in codes} == {"1 False", "2 False"}
    # What the command line itself can tell is its own kind of mistake.
    assert [line.split()[1] for line in codes[-4:]] == ["2", "2", "2", "1"]
    # The help, which was printed first, imports even less.
    (after_help,) = re.findall(r"^\{'.*'\}$", done.stdout, re.MULTILINE)
    heavy = {"tensorflow", "tf_keras", "scann", "ibis", "duckdb", "pyarrow", "matplotlib"}
    assert not heavy & set(re.findall(r"'(\w+)'", after_help))


def told_of(run: Run, metrics: dict[str, Any], **settings: Any) -> str:
    """Returns what is printed of the run, with some metrics and settings replaced."""
    folder = RunFolder(run.folder / RUN)
    config = with_settings(folder.settings(), settings)
    result = pipeline.RunResult(folder.path, {**read_record(folder.metrics_file), **metrics})
    return without_colours(rendered(200, lambda console: print_result(console, config, result)))


def test_what_came_out_is_shown_whatever_has_become_of_the_model(run: Run) -> None:
    gone = run.folder / "saved_models" / "films" / "77"  # Another run has replaced it.
    shown = told_of(run, {"export_folder": str(gone)})
    assert f"model    {gone}\nreplaces version 1\n" in shown
    assert "replaces" not in run.out
    assert "    ials: left out by evaluation.baselines\n" in run.out
    (names,) = read_record(run.folder / RUN / "metrics.json")["differences"].values()
    for gain in (0.0, 0.2):  # Of the baseline over the model.
        interval = {"mean": gain, "low": gain / 2, "high": 2 * gain}
        differences = {"popularity": dict.fromkeys(names, interval)}
        metrics = {"differences": differences, "export_folder": None}
        shown = told_of(run, metrics, **{"export.index": "none", "export.if_beaten": False})
        (line,) = re.findall(r"^next:.*", shown, re.MULTILINE)
        assert line.endswith("--export.index auto" + " --export.if_beaten" * (gain > 0))


def test_an_id_that_a_terminal_would_obey_is_not_printed(run: Run) -> None:
    users = ["\x1b]0;pwned\x07", "\u202e7", "fine"]
    for ids, last in ((users, "--user=fine -k 10"), (users[:2], "--history=ITEM -k 10")):
        shown = told_of(run, {"examples": [{"user_id": id_} for id_ in ids]})
        assert shown.splitlines()[-1].endswith(last)


def test_the_next_command_starts_the_users_own_script(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only that script imports the user's parts, without which the run's settings are refused."""
    programs = {
        "my pieces/cli.py": "python 'my pieces/cli.py'",
        "/usr/bin/tfrs-pipeline": "tfrs-pipeline",
        "/lib/tfrs_pipeline/cli/__main__.py": "tfrs-pipeline",
    }
    unexported = {"export_folder": None}, {"export.index": "none"}
    for path, program in programs.items():
        monkeypatch.setattr(sys, "argv", [path, "run"])
        assert f"\nnext:  {program} query " in told_of(run, {})
        assert f"\nnext:  {program} run --run-dir " in told_of(run, unexported[0], **unexported[1])


def test_the_next_command_it_names_works(command: Any, run: Run) -> None:
    _, *arguments = shlex.split(run.out.splitlines()[-1].removeprefix("next:"))
    answer = command(*arguments)
    assert (answer.code, answer.err) == (0, "")
    assert "unknown" not in answer.out
    assert answer.out.count("Film ") == 10


def test_a_check_reads_as_a_run_and_keeps_nothing(command: Any, run: Run, tmp_path: Path) -> None:
    more = ["--preset", "quick", "--training.max_epochs", "7", "--check"]
    arguments = run_arguments(tmp_path, *more)
    before = set(tmp_path.iterdir())
    answer = command(*arguments)
    assert answer.code == 0
    stages, note, _ = answer.err.partition("\nnothing was trained or kept; settings that are")
    assert note
    outputs = stages, run.out.replace(str(run.folder), str(tmp_path))
    said, everything = (re.sub(r"(?m) +\d+\.\d s$", "", text).splitlines() for text in outputs)
    first_epoch = next(i for i, line in enumerate(everything) if "two_tower, selection " in line)
    assert said == everything[everything.index("data") : first_epoch]
    path = tmp_path / "shown.toml"
    path.write_text(answer.out)  # Which `--config` reads as it is.
    given = {"export.filter_by": "genre", "training.max_epochs": 7}
    # The printed settings are those of the file, the preset and the flags, and no others.
    written = load_config(tmp_path / "small.toml")
    assert load_config(path) == with_settings(written, given, preset="quick")
    assert "seed" not in answer.out
    # The file names no preset, and does the same steps all the same: none races.
    again = command("run", "--config", path, "--check")
    steps = [[x for x in text.splitlines() if x[:2] == "# "] for text in (answer.out, again.out)]
    assert steps[0] == steps[1]
    assert not any("race" in line for line in steps[0])
    assert {*tmp_path.iterdir()} - before == {path}


@pytest.mark.parametrize(("flags", "message"), [
    (["--model.hard", "funnel:stages=ranked"], "none of .* positives has one"),
    (["--training.warmup_steps", "1000", "--training.decay", "cosine"], "of 1000 steps leaves"),
    (["--warm-start", "{folder}/{run}", "--data.item_features", "genre=categorical"],
     "data.item_features: got genre=categorical, where the model to start from has title=text"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_a_check_refuses_as_a_run(
    command: Any, run: Run, tmp_path: Path, flags: Any, message: str
) -> None:
    flags = [flag.format(folder=run.folder, run=RUN) for flag in flags]
    for more in ([], ["--check"]):
        answer = command(*run_arguments(tmp_path, *flags, *more))
        assert answer.code
        assert re.search(message, " ".join(answer.err.split()))


@pytest.mark.parametrize(
    ("part", "items"), [("validation", [0, 1] * 5), ("test", [0] * 7 + [1] * 3)]
)
def test_a_part_with_nothing_to_find_is_named(
    command: Any, here: Path, part: str, items: list[int]
) -> None:
    """A click a day: the eighth and ninth are for validation, the last for the test."""
    days = [86_400 * day for day in range(20_000, 20_010)]
    clicks = {"user_id": [1] * 10, "item_id": items, "timestamp": days}
    write(pa.table(clicks), here / "clicks.csv")
    kept = ["--split.kind", "time", "--split.validation", "0.2", "--split.test", "0.1"]
    kept += ["--evaluation.exclude", "clicked"]
    answer = command("run", "--check", "--data.path", "clicks.csv", *kept)
    assert f"Nothing to measure in the {part} part (split.{part}): none of 1 quer" in answer.err


def test_a_run_exports_nothing_until_it_is_asked_to(command: Any, tmp_path: Path) -> None:
    short = ["--training.max_epochs", "1", "--no-training.refit", "--evaluation.baselines", "none"]
    short += ["--evaluation.exclude", "none"]
    arguments = run_arguments(tmp_path, *short, "--export.index", "none")
    answer = command(*arguments)
    assert (answer.code, answer.err) == (0, "")
    assert "    export: builds the index" not in answer.out
    *_, not_exported, _, after = answer.out.splitlines()
    assert not_exported == "model    not exported"
    assert not (tmp_path / "saved_models").exists()
    assert (tmp_path / RUN / "report.html").is_file()
    # The run is finished, and asking for it again does not change that.
    again = command("run", "--run-dir", tmp_path / RUN)
    assert (again.code, again.out.splitlines()[-1]) == (0, after)
    exported = command(*shlex.split(after.removeprefix("next:"))[1:])
    assert exported.code == 0
    # The test ranked what users know, so service answers with it too.
    loaded = retriever.load(tmp_path / "saved_models" / "films")
    user = loaded.manifest["example_user"]
    ids, _, _ = loaded.retrieve_user([user], k=loaded.num_candidates)
    assert {*loaded.users.history(user)} <= {*ids[0].tolist()}
    # It may take minutes.
    assert "\n    export: builds the index, writes it, and has a fresh process load" in exported.out
    assert (tmp_path / "saved_models" / "films" / "1" / "manifest.json").is_file()
    changed = r"holds a run with other settings \(export\.index: 'auto', now"
    assert re.fullmatch(rf"error: .*{changed}.*\n", command(*arguments).err)


def test_report_writes_the_page_of_a_finished_run(command: Any, run: Run, here: Path) -> None:
    page = run.folder / RUN / "report.html"
    written = page.read_text()
    page.unlink()
    assert command("report", run.folder / RUN) == (0, f"{page}\n", "")
    assert page.read_text() == written
    verdicts = json.loads(command("report", run.folder / RUN, "--json").out)
    metrics = json.loads((run.folder / RUN / "metrics.json").read_text())
    monitor = load_config(run.folder / RUN / "config.toml").training.monitor
    for question in (metrics, metrics["other"]):
        differences = [gaps[monitor] for name, gaps in question["differences"].items()]
        # A baseline less the model: below 0, the model is better.
        outcome = (
            "worse"
            if any(gap["low"] > 0 for gap in differences)
            else "better"
            if all(gap["high"] < 0 for gap in differences)
            else "level"
        )
        assert verdicts[question["asked_by"]]["outcome"] == outcome
    assert verdicts["export_folder"] == metrics["export_folder"]
    (here / RUN / "checkpoints").mkdir(parents=True)
    answer = command("report", here / RUN)
    finish = f"finish it with:  tfrs-pipeline run --run-dir {shlex.quote(str(here / RUN))}"
    assert (answer.code, finish in answer.err) == (1, True)


def clicked_by(user_id: int) -> set[int]:
    rows = event_table("int").to_pylist()
    return {x["item_id"] for x in rows if (x["user_id"], x["stage"]) == (user_id, "clicked")}


def asked(command: Any, *arguments: Any) -> dict[str, Any]:
    answer = command("query", *arguments, "--json")
    assert (answer.code, answer.err) == (0, "")
    return dict(json.loads(answer.out))


def test_query_prints_the_best_titles_and_leaves_known_items_out(command: Any, run: Run) -> None:
    answered = asked(command, run.model, "--user", 7, "-k", NUM_ITEMS)
    assert (answered["user_id"], answered["is_known_user"]) == (7, True)
    items = answered["items"]
    titles = {row["item_id"]: row["title"] for row in item_table("int").to_pylist()}
    assert {item["item_id"] for item in items} == titles.keys() - clicked_by(7)
    assert [item["rank"] for item in items] == list(range(1, len(items) + 1))
    assert items == sorted(items, key=lambda item: -item["score"])
    assert all(item["title"] == titles[item["item_id"]] for item in items)

    shown = command("query", run.model / "1", "--user", 7, "-k", 5).out
    rows = re.findall(r"│ (\d+) +│ (\d+) +│ (.*?) +│ +(-?\d\.\d+) +│", shown)
    for (rank, id_, title, score), item in zip(rows, items[:5], strict=True):
        assert (int(rank), int(id_), title) == (item["rank"], item["item_id"], item["title"])
        assert float(score) == pytest.approx(item["score"], abs=1e-4)
    assert asked(command, run.model, "--user", 7, "-k", NUM_ITEMS, "--exact")["items"] == items


def test_query_excludes_and_filters_as_it_is_told_to(command: Any, run: Run) -> None:
    everything = [item["item_id"] for item in asked(command, run.model, "--user", 7)["items"]]
    excluded = [everything[0], everything[3]]
    excluding = ("--user", 7, "--exclude", *excluded, 999)
    answer = asked(command, run.model, *excluding)
    rest = [item["item_id"] for item in answer["items"]]
    assert rest[:8] == [item for item in everything if item not in excluded]
    assert answer["notes"] == []
    genres = {row["item_id"]: row["genre"] for row in item_table("int").to_pylist()}
    first, *others = sorted(set(genres.values()))
    for question in (["--user", 7], ["--history", *list(genres)[:2]]):
        for values in ([first], others):
            filtered = asked(command, run.model, *question, "-k", NUM_ITEMS, "--filter", *values)
            assert {genres[item["item_id"]] for item in filtered["items"]} == set(values)


def test_query_tells_of_unknown_users_and_fewer_items(command: Any, run: Run) -> None:
    for user in ("123456", "-5", "9" * 30):
        answer = command("query", run.model, "--user", user, "-k", 3)
        assert answer.out.startswith(f"User {user} is unknown to this model")
        assert answer.out.count("Film ") == 3
        assert not asked(command, run.model, "--user", user)["is_known_user"]
    num_left = NUM_ITEMS - len(clicked_by(7))
    for k in (NUM_ITEMS + 1, 10**12):
        answer = command("query", run.model, "--user", 7, "-k", k)
        assert answer.out.endswith(f"Left for this user: {num_left} items.\n")
        assert answer.out.count("Film ") == num_left


def test_query_answers_a_history_in_its_order_and_leaves_it_out(command: Any, run: Run) -> None:
    history = [30, 10, 50, 70]
    for order in (history, history[::-1]):
        answered = asked(command, run.model, "-k", 5, "--history", *order, 999)
        assert (answered["history"], answered["unknown_items"]) == ([*order, 999], [999])
        ids, scores = retriever.load(run.model).retrieve([{"history": order}], 5, [history])
        assert [item["item_id"] for item in answered["items"]] == ids[0].tolist()
        assert [x["score"] for x in answered["items"]] == pytest.approx(scores[0], abs=1e-6)
    more = ("--exclude", int(ids[0][1]), 998)
    answered = asked(command, run.model, "-k", 4, "--history", *order, *more)
    assert [item["item_id"] for item in answered["items"]] == [ids[0][0], *ids[0][2:]]
    assert answered["unknown_items"] == []
    shown = command("query", run.model, "--user", 7, "--history", *history, 999).out
    assert re.match(r"1 of 5 items of the history .*, first 999\.\n", shown)


# Progress and Ctrl-C


def rendered(width: int, show: Any) -> str:
    out = io.StringIO()
    show(Console(file=out, force_terminal=True, color_system="truecolor", width=width))
    return out.getvalue()


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def progress_at(width: int, tell: Any, wait_s: float = 0.0) -> str:
    """Returns what a terminal shows of what `tell` reports; a bar is drawn every 0.1 s."""

    def show(console: Console) -> None:
        with shown(console) as progress:
            tell(progress)
            time.sleep(wait_s)

    return rendered(width, show)


def test_the_bar_counts_and_forgets_the_count_of_what_came_before() -> None:
    def tell(progress: Any) -> None:
        for done in (500, 1500):
            progress.task("evaluate", done, 1500)
        time.sleep(0.5)  # Five times the time between two drawings.
        progress.task("export", 0, 0)

    before, _, after = progress_at(100, tell).rpartition("export")
    whole_bar = "━" * 40  # A bar of unknown length is drawn in changing colours.
    assert "1,500/1,500" in without_colours(before)
    assert whole_bar in before
    assert "/" not in without_colours(after)
    assert whole_bar not in after


def test_without_a_terminal_only_what_has_news_is_a_line() -> None:
    """A task of unknown length has no count."""
    out = io.StringIO()
    with shown(Console(file=out, width=200)) as progress:
        for done in range(3):
            progress.task("evaluate", done, 3)
        progress.task("export", 0, 0)
        progress.task("export", 0, 0, "builds the index")
        for task in ("first", "second"):
            for done in range(1, 31):
                progress.task(task, done, 30, "loss 4.8")
        for done in range(1, 8):  # Patience ends these two.
            progress.task("third", done, 30, f"loss {done}")
        for done in range(1, 10):
            progress.task("fourth", done, 30, f"loss {done}")
        progress.step(StepReport("train", ["a note"], 1.0))
        progress.step(StepReport("export"))
    first, *told = out.getvalue().splitlines()
    assert first == "    export: builds the index"
    assert told[:2] == ["    first 30/30: loss 4.8", "    second 30/30: loss 4.8"]
    assert told[2:4] == ["    third 7/30: loss 7", "    fourth 9/30: loss 9"]
    assert [line.split()[0] for line in told[4:]] == ["train", "a", "export"]


def test_without_a_terminal_a_slow_task_is_told_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, seconds = io.StringIO(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    progress = Shown(Console(file=out, width=200), Bar(), Text())
    for done in range(1, 10):
        seconds[0] += 11
        progress.task("two_tower", done, 100, "loss 4.8")
    assert re.findall(r"(\d)/", out.getvalue()) == ["3", "6", "9"]  # 30 s take three epochs.


def test_an_epoch_is_told_within_the_terminal_and_the_lines_of_a_stage_as_they_are() -> None:
    note = "loss 4.876, validation ndcg@100 0.2932, best 0.2932 (epoch 6), 0:01:00 left"
    for width in (60, 120):
        task = ("two_tower_uncorrected, selection", 6, 30, note)
        text = without_colours(progress_at(width, lambda x, of=task: x.task(*of), 0.3))
        lines = [line.split("\r")[-1] for line in text.splitlines()]
        assert max(map(len, lines)) <= width
        assert any("6/30" in line for line in lines)
        notes = {line.strip() for line in lines if line.startswith("  loss 4.876")}
        assert (notes == {note}) == (width == 120)
        assert notes
    note = "no [b]markup[/b] :star: 12 " + "x" * 100
    text = without_colours(progress_at(80, lambda x: x.step(StepReport("data", [note], 12.34))))
    assert f"data{' ' * 24}    12.3 s\n" in text
    assert f"    {note}\n" in text


@pytest.mark.parametrize("in_duckdb", [False, True])
def test_ctrl_c_before_the_first_stage_can_be_gone_on_from(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_duckdb: bool
) -> None:
    configs = []

    def interrupt(run: RunContext) -> None:
        configs.append(run.config)
        if not in_duckdb:
            raise KeyboardInterrupt
        # Shells start background jobs with SIGINT ignored, so that it may be ignored here.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
        timer.start()
        try:  # The query ends with a RuntimeError.
            slow = "SELECT count(*) FROM range(1000000000000) numbers(n) WHERE n % 7 = 3"
            # One thread: others would go on counting during all later tests.
            connect().con.execute(f"SET threads = 1; CREATE TABLE made AS {slow}")
        finally:
            signal.signal(signal.SIGINT, before)

    steps = [Step("data", (), "log", interrupt)]
    monkeypatch.setattr(run_data, "log_steps", lambda: steps)
    (log := tmp_path / "clicks.csv").touch()
    own = ("--data.path", log, "--run-dir", tmp_path / "a run")
    answer = command("run", *own)
    assert answer.code == 130
    again = f"stopped; go on with:  tfrs-pipeline run --run-dir '{tmp_path}/a run'"
    assert answer.out.splitlines()[-1] == again
    # The run still reads the user's own log, not the data of a bare run.
    command("run", "--run-dir", tmp_path / "a run")
    assert configs[1] == configs[0]
    assert configs[1].data.path == tmp_path / "clicks.csv"


@pytest.mark.nightly
def test_ctrl_c_in_training_can_be_gone_on_from(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tfrs_pipeline.cli"]
    more = ["--training.max_epochs", "25", "--training.patience", "25", "--no-training.refit"]
    arguments = run_arguments(tmp_path, *more)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Shells start background jobs, such as a whole test run, with SIGINT ignored.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([*program, *arguments], **pipes)
    checkpoints = tmp_path / RUN / "checkpoints" / "two_tower" / "selection"
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if list(checkpoints.glob("epoch-*.json")):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert not (checkpoints / "epoch-25.json").exists()
    last = out.splitlines()[-1]
    assert last.startswith("stopped; go on with:  tfrs-pipeline run --run-dir ")
    again = shlex.split(last.partition("tfrs-pipeline")[2])
    done = subprocess.run([*program, *again], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, "resumed after epoch " in done.stdout) == (0, "", True)
